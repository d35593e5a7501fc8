"""Embeddings of many clips are those of each alone, whatever lies beside it, stopped it or was wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from tiny_music import RATE, flac, tiny_encoder, tone, write_config, write_folder, write_shard

from mm.cli import main
from mm.errors import ConfigError, DataError
from mm.evals import embed as module
from mm.evals.embed import Embeddings, Encoder, Level, Spectrum, embed, open_embedder, source_of
from mm.models.spectra import CQT, log_mel

LENGTHS = {"b.flac": 0.3, "c.flac": 2.1, "d.flac": 0.9, "a/one.flac": 0.7, "a/two.flac": 1.3}
IDS = ["music/./b.flac", "music/./c.flac", "music/./d.flac", "music/a/one.flac", "music/a/two.flac"]


@pytest.fixture
def music(tmp_path: Path) -> Path:
    waves = {name: tone(220 + 100 * number, seconds, number) for number, (name, seconds) in enumerate(LENGTHS.items())}
    return write_folder(tmp_path / "music", waves)


def listener() -> Encoder:
    return Encoder("tiny", tiny_encoder())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def alone(wave: np.ndarray) -> list[torch.Tensor]:
    """The states of one clip by itself, [T, D] a layer."""
    with torch.no_grad():
        return tiny_encoder()([torch.from_numpy(wave)], states=True).states


@pytest.mark.parametrize("level", ["clip", "frame"])
@pytest.mark.parametrize("batch_seconds", [1.0, 60.0])
def test_many_clips_are_each_alone(music: Path, tmp_path: Path, level: Level, batch_seconds: float) -> None:
    found = embed(listener(), source_of(str(music)), tmp_path / "out", level, batch_seconds=batch_seconds)
    assert [clip["id"] for clip in found.clips] == IDS and not found.bad
    for number, (clip, name) in enumerate(zip(found.clips, LENGTHS, strict=True)):
        assert clip["file"] == str(music / name)
        wave, rate = read(music / name)
        states = alone(wave)
        expected = torch.stack([state.mean(0, keepdim=True) if level == "clip" else state for state in states], 1)
        torch.testing.assert_close(found.read(number), expected, atol=2e-5, rtol=1e-4)
        assert clip["seconds"] == len(wave) / rate == LENGTHS[name] and clip["start"] == 0.0
        assert clip["rows"] == (1 if level == "clip" else 1 + (len(wave) - 400) // 320)
    assert found.about["layers"] == ["0", "1", "2"] and found.about["width"] == 32 and found.about["clips"] == 5


def read(path: Path) -> tuple[np.ndarray, int]:
    import soundfile  # type: ignore[import-untyped]

    return soundfile.read(path, dtype="float32")


@pytest.mark.parametrize(("layers", "numbers"), [("last", [2]), ("1", [1]), ("0", [0])])
def test_layers(music: Path, tmp_path: Path, layers: str, numbers: list[int]) -> None:
    some = embed(Encoder("tiny", tiny_encoder(), layers), source_of(str(music)), tmp_path / "some")
    all = embed(listener(), source_of(str(music)), tmp_path / "all")
    assert torch.equal(torch.cat([*some.parts()]), torch.cat([*all.parts()])[:, numbers])
    with pytest.raises(ConfigError, match="layers '3': expected all, last or a number from 0 to 2"):
        Encoder("tiny", tiny_encoder(), "3")


def test_parts_are_plain_safetensors(music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed(listener(), source_of(str(music)), tmp_path / "whole", "frame", batch_seconds=1.0)
    monkeypatch.setattr(module, "PART_BYTES", 40_000)
    parts = embed(listener(), source_of(str(music)), tmp_path / "parts", "frame", batch_seconds=1.0)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 1
    rows = torch.cat([load_file(file)["features"] for file in files])
    assert torch.equal(rows, load_file(tmp_path / "whole/features-000000.safetensors")["features"])
    assert all(torch.equal(parts.read(number), whole.read(number)) for number in range(len(whole)))


def test_windows_are_clips_of_their_own(tmp_path: Path) -> None:
    wave = tone(440, 2.35)
    write_folder(tmp_path / "long", {"long.flac": wave, "short.flac": tone(330, 0.8)})
    found = embed(listener(), source_of(str(tmp_path / "long")), tmp_path / "out", "frame", seconds=1.0)
    places = [(clip["id"], clip["start"], round(clip["seconds"], 6)) for clip in found.clips]
    windows = [(0.0, 1.0), (1.0, 1.0), (2.0, 0.35)]
    assert places == [*(("long/./long.flac", *window) for window in windows), ("long/./short.flac", 0.0, 0.8)]
    stored, _ = read(tmp_path / "long/long.flac")
    for number, start in enumerate((0, RATE, 2 * RATE)):
        expected = torch.stack(alone(stored[start : start + RATE]), 1)
        torch.testing.assert_close(found.read(number), expected, atol=2e-5, rtol=1e-4)


def test_a_rest_too_short_for_the_encoder_is_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "music", {"a.flac": tone(440, 1.01)})  # 240 samples more than a second
    found = embed(listener(), source_of(str(tmp_path / "music")), tmp_path / "out", seconds=1.0)
    assert [(clip["start"], clip["seconds"]) for clip in found.clips] == [(0.0, 1.0)] and not found.bad


def test_stopped_at_every_batch_it_ends_with_the_same_files(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (music / "broken.flac").write_bytes(b"fLaC nothing")
    monkeypatch.setattr(module, "PART_BYTES", 50_000)
    embedder = listener()
    embed(embedder, source_of(str(music)), tmp_path / "whole", "frame", seconds=1.0, batch_seconds=1.0)
    stops = 0
    while True:
        calls = 0

        def stop(clips: int) -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise KeyboardInterrupt

        try:
            embed(embedder, source_of(str(music)), tmp_path / "out", "frame", 1.0, 1.0, stop)
            break
        except KeyboardInterrupt:
            stops += 1
            (partial,) = tmp_path.glob(".out.partial-*")
            with open(partial / "journal.jsonl", "ab") as journal:  # as if killed in the middle of a line, and of rows
                journal.write(b'{"clips": [{"id"')
            with open(max(partial.glob("*.safetensors")), "ab") as part:
                part.write(bytes(1000))
    assert stops > 2 and not [*tmp_path.glob(".out.partial-*")]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_do_not_go_on_from_these(music: Path, tmp_path: Path) -> None:
    def stop(clips: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(listener(), source_of(str(music)), tmp_path / "out", "frame", None, 1.0, stop)
    found = embed(listener(), source_of(str(music)), tmp_path / "out", "clip")
    assert {clip["rows"] for clip in found.clips} == {1}
    with pytest.raises(ConfigError, match="out: is there already"):
        embed(listener(), source_of(str(music)), tmp_path / "out")


def test_bad_recordings_are_listed_and_cost_nothing_else(tmp_path: Path) -> None:
    good, other = flac(tone(300, 0.5)), flac(tone(400, 0.6))
    music = tmp_path / "music"
    music.mkdir()
    (music / "good.flac").write_bytes(good)
    (music / "other.WAV").write_bytes(other)  # a wrong extension does not matter: the header is asked
    (music / "cut.flac").write_bytes(good[: len(good) // 2])
    (music / "empty.mp3").write_bytes(b"")
    (music / "text.wav").write_text("no sound")
    (music / "one-sample.flac").write_bytes(flac(np.zeros(1, dtype=np.float32)))
    (music / "short.flac").write_bytes(flac(np.zeros(399, dtype=np.float32)))
    (music / "notes.txt").write_text("no recording")
    nan = tone(300, 0.5)
    nan[100] = np.nan
    import soundfile  # type: ignore[import-untyped]

    soundfile.write(music / "nan.wav", nan, RATE, subtype="FLOAT")
    found = embed(listener(), source_of(str(music)), tmp_path / "out")
    assert [clip["id"] for clip in found.clips] == ["music/./good.flac", "music/./other.WAV"]
    reasons = {one["id"].removeprefix("music/./"): one["reason"] for one in found.bad}
    assert set(reasons) == {"cut.flac", "empty.mp3", "text.wav", "one-sample.flac", "short.flac", "nan.wav"}
    assert "too short; the encoder needs 400 samples at 24000 Hz" in reasons["short.flac"]
    assert "is empty (0 bytes)" in reasons["empty.mp3"] and "values that are no numbers" in reasons["nan.wav"]
    assert all(str(music) in reason for reason in reasons.values())
    alone_folder = embed(listener(), source_of(str(music / "good.flac")), tmp_path / "alone")
    torch.testing.assert_close(found.read(0), alone_folder.read(0), atol=2e-5, rtol=1e-4)
    (tmp_path / "only").mkdir()
    (tmp_path / "only/empty.mp3").write_bytes(b"")
    with pytest.raises(DataError, match=r"no recording can be read: .*is empty"):
        embed(listener(), source_of(str(tmp_path / "only")), tmp_path / "none")
    with pytest.raises(DataError, match="no flac, wav, ogg, mp3"):
        embed(listener(), source_of(str(tmp_path / "alone")), tmp_path / "none")
    with pytest.raises(DataError, match="from this machine"):
        embed(listener(), source_of("s3://bucket/music.tar"), tmp_path / "none")


def test_shards_give_what_folders_give(tmp_path: Path) -> None:
    waves = {f"{name}.flac": tone(300 + 50 * number, 0.5 + number / 7) for number, name in enumerate("abcde")}
    write_folder(tmp_path / "folder", waves)
    for number, names in enumerate(("abc", "de")):
        samples = {name: ((tmp_path / f"folder/{name}.flac").read_bytes(), {"key": name}) for name in names}
        write_shard(tmp_path / f"shards/music-{number:06d}.tar", samples | {f"{names[-1]}x": (b"broken", {})})
    embedder = listener()
    folder = embed(embedder, source_of(str(tmp_path / "folder")), tmp_path / "one")
    for given in (str(tmp_path / "shards"), str(tmp_path / "shards/music-{000000..000001}.tar")):
        shards = embed(embedder, source_of(given), tmp_path / f"out-{len(given)}")
        ids = ["000000/a", "000000/b", "000000/c", "000001/d", "000001/e"]
        assert [clip["id"] for clip in shards.clips] == [f"shards/music-{id}" for id in ids]
        torch.testing.assert_close(torch.cat([*shards.parts()]), torch.cat([*folder.parts()]), atol=2e-5, rtol=1e-4)
        assert [one["id"] for one in shards.bad] == ["shards/music-000000/cx", "shards/music-000001/ex"]


def test_other_rates_and_channels_are_resampled(tmp_path: Path) -> None:
    wave = tone(440, 1.0, rate=44_100)
    write_folder(tmp_path / "music", {"mono.flac": wave, "stereo.flac": np.stack([wave, wave], 1)}, rate=44_100)
    found = embed(listener(), source_of(str(tmp_path / "music")), tmp_path / "out", "frame")
    assert [clip["rows"] for clip in found.clips] == [1 + (RATE - 400) // 320] * 2
    torch.testing.assert_close(found.read(0), found.read(1), atol=1e-4, rtol=1e-3)


def test_spectra_as_embedders(music: Path, tmp_path: Path) -> None:
    wave = torch.from_numpy(read(music / "c.flac")[0])
    place = [*LENGTHS].index("c.flac")
    expected = {"log-mel": log_mel(wave, RATE), "cqt": torch.log(CQT()([wave])[0] + 1e-4)}
    for name, frames in expected.items():
        spectrum, source = Spectrum(name, torch.device("cpu")), source_of(str(music))
        by_frame = embed(spectrum, source, tmp_path / f"{name}-frames", "frame")
        torch.testing.assert_close(by_frame.read(place)[:, 0], frames, atol=1e-4, rtol=1e-4)
        by_clip = embed(spectrum, source, tmp_path / name)
        both = torch.cat([frames.mean(0), frames.std(0, correction=0)])
        torch.testing.assert_close(by_clip.read(place)[0, 0], both, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="builtin:mfcc: no such features"):
        open_embedder("builtin:mfcc")


def test_by_the_command_line(music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (music / "empty.flac").write_bytes(b"")
    command = ["embed", f"untrained:{write_config(tmp_path)}", "--audio", str(music), "--out", str(tmp_path / "out")]
    assert main([*command, "--level", "frame", "--layers", "last", "--precision", "bf16", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["clips"], result["bad"], result["width"], result["layers"]) == (5, 1, 32, ["2"])
    assert "5 clips, 5 s" in captured.err and "music/./empty.flac in" in captured.err
    assert "the clip is empty (0 bytes)" in captured.err
    assert load_file(tmp_path / "out/features-000000.safetensors")["features"].dtype == torch.bfloat16
    found = Embeddings.open(tmp_path / "out")
    exact = embed(
        open_embedder(f"untrained:{write_config(tmp_path)}", "last"), source_of(str(music)), tmp_path / "fp32", "frame"
    )
    torch.testing.assert_close(found.read(0).float(), exact.read(0), atol=0.1, rtol=0.1)
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
    assert main(["embed", "builtin:nothing", "--audio", str(music), "--out", str(tmp_path / "x")]) == 2


def test_untrained_is_what_training_begins_with(tmp_path: Path) -> None:
    from mm.config import load_config

    config = load_config(write_config(tmp_path))
    torch.manual_seed(config.seed)
    begun: Any = config.model.build()
    embedder = open_embedder(f"untrained:{write_config(tmp_path)}")
    clip = torch.from_numpy(tone(300, 0.5))
    with torch.no_grad():
        states = begun.eval().encoder([clip], states=True).states
    for state, (given,) in zip(states, embedder.frames([clip]), strict=True):
        assert torch.equal(state, given)


def test_models_without_sound_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="0 audio encoders in it"):
        open_embedder(f"untrained:{tiny()}")
