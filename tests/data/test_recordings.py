"""Recordings: a clip is what decoding its span gives, everything found has one fate, and bad files end nothing."""

import csv
import gzip
import io
import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from mm.data.audio import decode_audio, planned_samples, probe_audio
from mm.data.batch import collate
from mm.data.check import check
from mm.data.inspect import summary
from mm.data.layout import AudioLayout, Layout, Template
from mm.data.limits import Limits
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers
from mm.data.sample import Media, Sample, Special
from mm.data.sources import SourceConfig
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE = 8000
LIMITS = Limits()


def noise(seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (round(seconds * rate), channels))


def encoded(wave: np.ndarray, rate: int = RATE, format: str = "FLAC", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(file, "w", rate, channels, subtype, format=format) as out:
        for start in range(0, len(wave), 8192):  # libsndfile's Vorbis encoder overflows its stack on long blocks
            out.write(wave[start : start + 8192])
    return file.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def layout(labels: tuple[str, ...] = (), **audio: Any) -> Layout:
    """A model of sound alone: 8 kHz, a position every 100 samples that sees 130, labels behind the recording."""
    tokenizer = Tokenizer.of_labels(labels)
    described = AudioLayout(**{"sampling_rate": RATE, "hop": 100, "window": 130, "alone": True, **audio})
    return Layout(tokenizer, Template(None, None), 0, audio=described)


def found(path: Path | str, limits: Limits = LIMITS, **config: Any) -> dict[str, list[Sample | str]]:
    """Of every shard by its name: samples, and what is said of what cannot be used. Media are read."""
    source = TypeAdapter(SourceConfig).validate_python({"kind": "recordings", "path": str(path), **config}).build("")
    result: dict[str, list[Sample | str]] = {}
    for shard in source.shards():
        said = result[source.shard_name(shard)] = []
        with source.open(shard, limits) as opened:
            opened.name = source.shard_name(shard)
            for group in opened.groups():
                try:
                    if isinstance(group, DataError):
                        raise group
                    for sample in source.samples(group, limits):
                        parts = (
                            replace(one, data=one.read()) if isinstance(one, Media) else one for one in sample.parts
                        )
                        said.append(replace(sample, parts=tuple(parts)))
                except DataError as error:
                    assert "\n" not in str(error)
                    said.append(str(error))
    return result


def ids(said: list[Sample | str]) -> list[str]:
    """Ids of the samples that are kept."""
    return [one.id for one in said if isinstance(one, Sample) and one.parts]


def clips(said: list[Sample | str]) -> list[bytes]:
    media = [one.parts[0] for one in said if isinstance(one, Sample) and one.parts]
    assert all(isinstance(one, Media) and one.kind == "audio" for one in media)
    return [one.data for one in media if isinstance(one, Media)]


def samples_of(data: bytes, rate: int) -> np.ndarray:
    return decode_audio(data, rate, planned_samples(probe_audio(data, "s", 1e6), rate), "s")


# Clips


@pytest.mark.parametrize(("format", "channels"), [("FLAC", 1), ("WAV", 2), ("OGG", 1), ("MP3", 2)])
@pytest.mark.parametrize("sampling_rate", [None, 6000, 16000])
def test_a_clip_is_what_decoding_its_span_gives(
    tmp_path: Path, format: str, channels: int, sampling_rate: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the nearest of 16 bits, whatever the size of the blocks that are read."""
    monkeypatch.setattr("mm.data.audio._BLOCK", 3000)
    data = encoded(noise(5.3, channels=channels), format=format)
    put(tmp_path / f"music/a.{format.lower()}", data)
    (said,) = found(tmp_path / "music", seconds=1.5, min_seconds=0.5, sampling_rate=sampling_rate).values()
    assert ids(said) == [f"music/./a.{format.lower()}#{k}" for k in range(4)]
    rate = sampling_rate or RATE
    header = probe_audio(data, "s", 60)
    for number, clip in enumerate(clips(said)):
        about = soundfile.info(io.BytesIO(clip))
        assert (about.format, about.subtype, about.samplerate, about.channels) == ("FLAC", "PCM_16", rate, 1)
        span = (1.5 * number, 1.5 * number + 1.5)
        expected = decode_audio(data, rate, planned_samples(header, rate, span), "s", span)
        assert abs(about.frames - len(expected)) <= (1 if number == 3 else 0)
        np.testing.assert_allclose(samples_of(clip, rate)[: len(expected)], expected[: about.frames], atol=1.01 / 32768)


def test_what_is_left_behind_the_last_clip_is_kept_if_it_is_long_enough(tmp_path: Path) -> None:
    for seconds in (0.4, 2.0, 4.4, 4.6):
        put(tmp_path / f"m/{seconds}.wav", encoded(noise(seconds), format="WAV"))
    (said,) = found(tmp_path / "m", seconds=2, min_seconds=0.5).values()
    kept = ["2.0.wav#0", "4.4.wav#0", "4.4.wav#1", "4.6.wav#0", "4.6.wav#1", "4.6.wav#2"]
    assert ids(said) == [f"m/./{one}" for one in kept]
    left_out = [one.id for one in said if isinstance(one, Sample) and not one.parts]
    assert left_out == ["m/./0.4.wav#0", "m/./4.4.wav#2"]
    lengths = [probe_audio(clip, "s", 9).seconds for clip in clips(said)]
    np.testing.assert_allclose(lengths, [2, 2, 2, 2, 2, 0.6])


def test_what_is_neither_cut_nor_resampled_stays_as_it_came(tmp_path: Path) -> None:
    wave = encoded(noise(1.2, channels=2), format="WAV", subtype="FLOAT")
    put(tmp_path / "m/a.wav", wave)
    for config in ({}, {"sampling_rate": RATE}, {"seconds": 3}, {"silence": None, "max_clipped": 1}):
        (said,) = found(tmp_path / "m", **config).values()
        assert clips(said) == [wave], config
    (said,) = found(tmp_path / "m", sampling_rate=4000).values()
    assert ids(said) == ["m/./a.wav"]
    assert soundfile.info(io.BytesIO(clips(said)[0])).samplerate == 4000


def test_values_beyond_full_scale_are_clipped_and_not_wrapped(tmp_path: Path) -> None:
    put(tmp_path / "m/a.wav", encoded(np.tile([1.4, -1.3, 0.5, -0.2], 4000), format="WAV", subtype="FLOAT"))
    (said,) = found(tmp_path / "m", seconds=1, max_clipped=1).values()
    np.testing.assert_allclose(samples_of(clips(said)[0], RATE)[:4], [1, -1, 0.5, -0.2], atol=1e-4)


def test_silence_and_clipping(tmp_path: Path) -> None:
    """Levels are of the RMS about the mean: a constant is silent, however large."""
    whole = noise(1)[:, 0]
    clipped = np.where(np.arange(RATE) % 5 == 0, 1.0, whole)  # a fifth
    waves = {
        "zeros": 0 * whole, "constant": 0 * whole + 0.5, "dither": whole * 1e-4, "faint": whole * 1e-2, "loud": whole,
        "clipped": clipped, "peaks": np.where(np.arange(RATE) % 50 == 0, 1.0, whole),
    }  # fmt: skip
    for name, wave in waves.items():
        put(tmp_path / f"m/{name}.wav", encoded(wave, format="WAV", subtype="PCM_24"))
    put(tmp_path / "long/a.wav", encoded(np.concatenate(list(waves.values())), format="WAV", subtype="PCM_24"))

    def kept(folder: str, **config: Any) -> set[str]:
        (said,) = found(tmp_path / folder, **config).values()
        assert len(said) == len(waves) and not any(isinstance(one, str) for one in said)
        return {one.rpartition("/")[2].removesuffix(".wav") for one in ids(said)}

    assert kept("m") == {"faint", "loud", "peaks"}
    assert kept("m", silence=-30) == {"loud", "peaks"}
    assert kept("m", silence=None) == waves.keys() - {"clipped"}
    assert kept("m", silence=None, max_clipped=0.3) == waves.keys()
    assert kept("m", max_clipped=0.01) == {"faint", "loud"}
    names = list(waves)
    assert {names[int(one.rpartition("#")[2])] for one in kept("long", seconds=1)} == {"faint", "loud", "peaks"}


@pytest.mark.parametrize(("config", "count"), [({"seconds": 10}, 60), ({"sampling_rate": 8000}, 1), ({}, 1)])
def test_long_recordings_are_read_in_blocks(tmp_path: Path, config: dict[str, Any], count: int) -> None:
    """Ten minutes at 48 kHz are 115 MB as numbers; cutting, resampling or measuring them takes a small part of that."""
    path = tmp_path / "m/a.wav"
    path.parent.mkdir()
    minute = np.tile(noise(1, rate=48000), (60, 1)).astype(np.float32)
    with soundfile.SoundFile(path, "w", 48000, 1) as file:
        for _ in range(10):
            file.write(minute)
    section = {"kind": "recordings", "path": str(path), **config}
    source = TypeAdapter(SourceConfig).validate_python(section).build("")
    tracemalloc.start()
    with source.open(source.shards()[0], Limits()) as shard:
        (group,) = shard.groups()
        kept = sum(bool(sample.parts) for sample in source.samples(group, Limits()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept == count and peak < 30e6, peak


# Where they lie


def test_folders_at_every_depth(tmp_path: Path) -> None:
    sound = encoded(noise(1.1))
    names = ["b.flac", "CD1/01. Intro.MP3", "x/CD1/01. Intro.wav", "x/y/C#4 100%.ogg", "m/a.flac", "x y/a.flac"]
    forms = {"flac": "FLAC", "mp3": "MP3", "wav": "WAV", "ogg": "OGG"}
    for name in names:
        put(tmp_path / "m" / name, encoded(noise(1.1), format=forms[name.rpartition(".")[2].lower()]))
    for other in ("cover.jpg", ".hidden.flac", "x/._b.mp3", ".trash/a.flac", "flac", "list.txt"):
        put(tmp_path / "m" / other, sound)
    said = found(tmp_path / "m", silence=None, max_clipped=1)
    assert list(said) == [".", "CD1", "m", "x y", "x/CD1", "x/y"]
    assert [one for group in said.values() for one in ids(group)] == [
        "m/./b.flac", "m/CD1/01. Intro.MP3", "m/m/a.flac", "m/x y/a.flac", "m/x/CD1/01. Intro.wav",
        "m/x/y/C%234 100%25.ogg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("m/", ["./a.flac", "./b.wav", "p00/c.flac", "p01/deep/d.flac"]),
        ("m/*.flac", ["./a.flac"]),
        ("m/**/*.flac", ["./a.flac", "p00/c.flac", "p01/deep/d.flac"]),
        ("m/p{00..01}", ["p00/c.flac", "p01/deep/d.flac"]),
        ("m/p*", ["p00/c.flac", "p01/deep/d.flac"]),
        ("m/b.wav", ["./b.wav"]),
    ],
)
def test_patterns(tmp_path: Path, path: str, expected: list[str]) -> None:
    for name in ("a.flac", "b.wav", "p00/c.flac", "p01/deep/d.flac"):
        put(tmp_path / "m" / name, encoded(noise(1.1), format="WAV" if name.endswith("wav") else "FLAC"))
    said = found(tmp_path / path)
    assert [one for group in said.values() for one in ids(group)] == [f"m/{one}" for one in expected]


def test_paths_that_mean_nothing_or_two_things(tmp_path: Path) -> None:
    put(tmp_path / "m/a.flac", encoded(noise(1.1)))
    put(tmp_path / "m/p/a.txt", "no sound")
    for path in ("nothing", "m/p", "m/*.mp3", "m/p/*.flac"):
        with pytest.raises(DataError, match=r"no flac, wav, ogg, mp3 .*looked from"):
            found(tmp_path / path)
    with pytest.raises(DataError, match=r"means files too, .*a\.flac for one"):
        found(tmp_path / "m/*")
    with pytest.raises(DataError, match=r"m\.csv: No such file"):
        found(tmp_path / "m", table=str(tmp_path / "m.csv"))
    with pytest.raises(ValidationError, match="min_seconds = 2 is over seconds = 1"):
        found(tmp_path / "m", seconds=1, min_seconds=2)


def test_names_that_are_no_text_and_forms_that_are_not_read(tmp_path: Path) -> None:
    sound = encoded(noise(1.1))
    put(tmp_path / "m/a.flac", sound)
    for name in ("b.m4a", "c\n.flac"):
        put(tmp_path / "m" / name, sound)
    with open(bytes(tmp_path / "m") + b"/d\xff.flac", "wb") as file:
        file.write(sound)
    (said,) = found(tmp_path / "m").values()
    kept, other, newline, bytes_ = said
    assert ids([kept]) == ["m/./a.flac"]
    assert "b.m4a: expected flac, wav, ogg, mp3; convert it" in str(other)
    assert "plain UTF-8" in str(newline) and "plain UTF-8" in str(bytes_) and str(bytes_).isascii()


def test_shards_of_every_form(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first, second = encoded(noise(2.5)), encoded(noise(1.1, 1), format="WAV")
    members = {"a": {"flac": first, "json": {"genre": "folk"}}, "b": {"wav": second, "json": {"genre": "rock"}}}
    shard = write_shard(tmp_path / "m.tar", members)
    (tmp_path / "n.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    table = {"audio": [{"bytes": one, "path": None} for one in (first, second)], "genre": ["folk", "rock"]}
    pq.write_table(pa.table(table), tmp_path / "o.parquet")
    for path in ("m.tar", "n.tar.gz", "o.parquet"):
        (said,) = found(tmp_path / path, name="s", labels="genre").values()
        assert clips(said) == [first, second]
        assert [one.parts[1:] for one in said] == [(Special("folk", True),), (Special("rock", True),)]
        (said,) = found(tmp_path / path, name="s", only={"genre": "rock"}, seconds=1, min_seconds=0.1).values()
        key = "1" if path == "o.parquet" else "b"
        assert [one.rpartition("/")[2] for one in ids(said)] == [f"{key}#0", f"{key}#1"]


# Labels


def test_labels_stand_behind_the_recording_to_be_learned(tmp_path: Path) -> None:
    fields = {
        "list": {"tags": ["slow", "folk", "slow"], "year": 1990},
        "text": {"tags": "slow; folk;", "year": "1990"},
        "none": {"tags": None, "year": ""},
        "lacks": {"tags": "slow"},
    }
    for name, one in fields.items():
        put(tmp_path / f"m/{name}.flac", encoded(noise(2.2)))
        put(tmp_path / f"m/{name}.json", json.dumps(one))
    (said,) = found(tmp_path / "m", labels=["tags", "year"], seconds=1, min_seconds=1).values()
    labels = (Special("slow", True), Special("folk", True), Special("1990", True))
    assert "no field 'year' for its labels; there are ['tags']" in str(said[0])
    by_name = {one.id: (one.parts[1:], one.meta) for one in said if isinstance(one, Sample) and one.parts}
    assert by_name == {
        **{f"m/./{name}.flac#{k}": (labels, fields[name]) for name in ("list", "text") for k in (0, 1)},
        **{f"m/./none.flac#{k}": ((), fields["none"]) for k in (0, 1)},
    }


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_a_table_says_what_is_meant_and_what_it_is(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    for name in ("a.flac", "x/b.flac", "x/c.flac"):
        put(tmp_path / "m" / name, encoded(noise(1.1)))
    rows = [
        {"PATH": "a.flac", "genre": "folk", "split": "train"},
        {"PATH": str(tmp_path / "m/x/b.flac"), "genre": "rock;pop", "split": "test"},
        {"PATH": "gone.flac", "genre": "jazz", "split": "train"},
    ]
    table = write_table(tmp_path / "t.csv", rows)
    config = {"labels": "genre", "table": table, "columns": {"file": "PATH"}}
    said = [one for group in found(tmp_path / "m", **config).values() for one in group]
    assert [(one.id, one.parts[1:]) for one in said] == [
        ("m/./a.flac", (Special("folk", True),)),
        ("m/x/b.flac", (Special("rock", True), Special("pop", True))),
    ]
    assert [len(group) for group in found(tmp_path / "m", **config, only={"split": "train"}).values()] == [1, 0]
    with pytest.raises(DataError, match=r"no `file` in line 2, .*columns: \{file: NAME\}"):
        found(tmp_path / "m", labels="genre", table=table)
    write_table(tmp_path / "t.csv", [*rows, rows[0]])
    with pytest.raises(DataError, match=r"two lines for a\.flac"):
        found(tmp_path / "m", **config)
    # As MTG-Jamendo has them: tags in as many columns as there are, of which the first has a heading.
    (tmp_path / "t.tsv").write_text("file\ttags\na.flac\tgenre---folk\tmood---calm\nx/c.flac\tgenre---rock\n")
    tagged = found(tmp_path / "m", labels="tags", table=str(tmp_path / "t.tsv"))
    tags = [[label.token for label in one.parts[1:]] for group in tagged.values() for one in group]
    assert tags == [["genre---folk", "mood---calm"], ["genre---rock"]]
    shard = write_shard(tmp_path / "m.tar", {"a": {"flac": encoded(noise(1.1))}, "b": {"flac": encoded(noise(1.1))}})
    for name in ("b.flac", "./b.FLAC"):
        table = write_table(tmp_path / "u.csv", [{"file": name, "genre": "folk"}])
        (said,) = found(shard, labels="genre", table=table).values()
        assert [one.id.rpartition("/")[2] for one in said] == ["b"] and said[0].parts[1:] == (Special("folk", True),)


def test_another_table_names_another_set(tmp_path: Path, pack: Callable[..., PackedDataset]) -> None:
    put(tmp_path / "m/a.flac", encoded(noise(1.1)))
    put(tmp_path / "m/b.flac", encoded(noise(1.1)))
    source = {"kind": "recordings", "name": "m", "table": write_table(tmp_path / "t.csv", [{"file": "a.flac"}])}
    packed = pack(tmp_path / "m", tmp_path / "out", layout(), source, context_length=200)
    assert packed.about["ledger"]["m"]["segments"] == packed.about["ledger"]["m"]["filtered"] == 1
    assert len(pack(tmp_path / "m", tmp_path / "out", layout(), source, context_length=200)) == 1
    write_table(tmp_path / "t.csv", [{"file": "a.flac"}, {"file": "b.flac"}])
    with pytest.raises(DataError, match="packed from other shards or settings"):
        pack(tmp_path / "m", tmp_path / "out", layout(), source, context_length=200)


# Packed


def test_packs_hold_the_clips_and_the_ledger_closes(tmp_path: Path, pack: Callable[..., PackedDataset]) -> None:
    """From folders, in two processes or one; sums are right to the sample."""
    waves = {"a.flac": 5.5, "x/b.wav": 2.0, "x/c.wav": 0.3, "y/d.flac": 3.0}
    for number, (name, seconds) in enumerate(waves.items()):
        wave = noise(seconds, number) * (name != "y/d.flac")
        put(tmp_path / "m" / name, encoded(wave, format="WAV" if name.endswith("wav") else "FLAC"))
        put(tmp_path / "m" / name.replace(".flac", ".json").replace(".wav", ".json"), json.dumps({"tag": f"t{number}"}))
    source = {"kind": "recordings", "name": "m", "seconds": 2, "min_seconds": 1, "labels": "tag"}
    model = layout(("t0", "t1"))
    packed = pack(tmp_path / "m", tmp_path / "train", model, source, workers=Workers(2), context_length=330)
    ledger = packed.about["ledger"]["m"]
    assert ledger["samples"] == 3 + 1 + 1 + 2 and ledger["filtered"] == 1 + 2 and ledger["quarantined"] == 0
    frames = [159, 159, 119, 159]  # (16000 - 130) // 100 + 1, and of 1.5 s
    assert ledger["audio_tokens"] == sum(frames) and ledger["loss_tokens"] == ledger["text_tokens"] == 4
    assert ledger["audio_samples"] == 7.5 * RATE and packed.audio_seconds == 7.5
    again = pack(tmp_path / "m", tmp_path / "again", model, source, context_length=330)
    tars = [[file.read_bytes() for file in sorted(one.folder.glob("*.tar"))] for one in (packed, again)]
    assert tars[0] == tars[1]
    about = summary(packed)
    assert about["audio_seconds"] == 7.5 and not about["ledger_open"] and not list(check(packed))
    found_labels = {}
    for number in range(len(packed)):
        pack_ = packed.read(number)
        batch = collate([pack_], model, 330)
        for segment, one, values in zip(pack_.segments, pack_.media, batch.media["audio"].items(), strict=True):
            place = slice(segment.start, segment.start + segment.length)
            labels = batch.labels[0, place]
            found_labels[segment.id] = model.tokenizer.token(int(labels[labels != -100]))
            assert one.length == segment.length - 1 and one.ext in ("flac", "wav")
            name, _, clip = segment.id.removeprefix("m/").removeprefix("./").partition("#")
            start = 2 * RATE * int(clip)
            original = noise(waves[name], list(waves).index(name))[start : start + len(values), 0]
            np.testing.assert_allclose(values, original, atol=1.01 / 32768)
    assert found_labels == {"m/./a.flac#0": "t0", "m/./a.flac#1": "t0", "m/./a.flac#2": "t0", "m/x/b.wav#0": "t1"}


def test_a_ledger_with_other_sound_does_not_close(tmp_path: Path, pack: Callable[..., PackedDataset]) -> None:
    put(tmp_path / "m/a.flac", encoded(noise(1.5)))
    pack(tmp_path / "m", tmp_path / "t", layout(), {"kind": "recordings", "name": "m"}, context_length=200)
    about = json.loads((tmp_path / "t/dataset.json").read_text())
    about["ledger"]["m"]["audio_samples"] += 1
    (tmp_path / "t/dataset.json").write_text(json.dumps(about))
    (line,) = summary(PackedDataset(tmp_path / "t"))["ledger_open"]
    assert "audio_samples in the ledger" in line


def test_a_label_that_the_model_has_not_is_a_bad_sample(tmp_path: Path, pack: Callable[..., PackedDataset]) -> None:
    for name, tag in (("a", "folk"), ("b", "polka")):
        put(tmp_path / f"m/{name}.flac", encoded(noise(1.1)))
        put(tmp_path / f"m/{name}.json", json.dumps({"tag": tag}))
    source = {"kind": "recordings", "name": "m", "labels": "tag"}
    model = layout(("folk", "rock"))
    with pytest.raises(DataError, match=r"m/\./b\.flac: no label 'polka'"):
        pack(tmp_path / "m", tmp_path / "a", model, source, context_length=200)
    packed = pack(tmp_path / "m", tmp_path / "b", model, source, context_length=200, max_bad_fraction=0.5)
    (line,) = (packed.folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "m/./b.flac" and "'polka'" in json.loads(line)["reason"]


def test_a_file_that_changes_between_scan_and_writing(
    tmp_path: Path, pack: Callable[..., PackedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm.data import prepare

    put(tmp_path / "m/a.flac", encoded(noise(1.1)))
    plan = prepare.make_plan

    def and_then(*given: Any) -> None:
        plan(*given)
        put(tmp_path / "m/a.flac", encoded(noise(1.1, 1)))

    monkeypatch.setattr(prepare, "make_plan", and_then)
    with pytest.raises(DataError, match=r"a\.flac: was changed after it had been scanned; pack the data set again"):
        pack(tmp_path / "m", tmp_path / "t", layout(), {"kind": "recordings", "name": "m"}, context_length=200)


# Bad audio


def lying_flac(data: bytes, frames: int) -> bytes:
    """The 36 bits of the stream information that say how many samples there are."""
    lied = bytearray(data)
    lied[21] = lied[21] & 0xF0 | frames >> 32
    lied[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(lied)


def lying_wav(data: bytes, size: int) -> bytes:
    at = data.index(b"data") + 4
    return data[:at] + size.to_bytes(4, "little") + data[at + 4 :]


def holed(data: bytes, share: float) -> bytes:
    at = int(len(data) * share)
    return data[:at] + bytes(2000) + data[at + 2000 :]


def guessed(wave: np.ndarray) -> bytes:
    """An mp3 of varying bit rate without the header that says how long it is, which is then guessed from the first."""
    data = encoded(wave, 44100, "MP3")
    return data[data.index(data[:2], 200) :]


def bad_files() -> dict[str, bytes]:
    sound = noise(3)
    flac, wav = encoded(sound), encoded(sound, format="WAV")
    mp3 = encoded(noise(3, rate=44100), 44100, "MP3")
    nan, infinite = sound.copy(), sound.copy()
    nan[20_000], infinite[20_000] = np.nan, np.inf
    floats = {"format": "WAV", "subtype": "FLOAT"}
    return {
        "cut.flac": flac[: len(flac) // 2],
        "cut.mp3": mp3[: len(mp3) // 2],
        "cut.wav": wav[: len(wav) * 2 // 3],
        "eight-channels.wav": encoded(noise(3, channels=8), format="WAV"),
        "empty.flac": b"",
        "flac-called.mp3": flac,
        "guessed-too-long.mp3": guessed(np.concatenate([np.zeros((44100, 1)), noise(3, rate=44100)])),
        "guessed-too-short.mp3": guessed(np.concatenate([noise(2, rate=44100), noise(8, rate=44100) / 100])),
        "high-rate.flac": encoded(noise(3, rate=192_000), 192_000),
        "holed.flac": holed(flac, 0.5),
        "huge-length.flac": lying_flac(flac, (1 << 36) - 1),
        "infinite.wav": encoded(infinite, **floats),
        "integers.wav": encoded(32768 * sound, **floats),
        "long-length.flac": lying_flac(flac, 80_000),
        "long-length.wav": lying_wav(wav, 2**31),
        "mp3-called.flac": mp3,
        "nan.wav": encoded(nan, **floats),
        "no-length.flac": lying_flac(flac, 0),
        "no-samples.wav": encoded(sound[:0], format="WAV"),
        "one-sample.wav": encoded(sound[:1], format="WAV"),
        "page.mp3": b"<!DOCTYPE html><title>404</title>" * 50,
        "short-length.wav": lying_wav(wav, 2 * 16_000),
        "silent.flac": encoded(0 * sound),
        "whole.flac": flac,
    }


FATES: dict[str, tuple[int, int, str, str, str]] = {
    # With `recordings` in clips of a second: clips kept, clips left out, why there are no more. With `audio`: what
    # packing says, what decoding says.
    "cut.flac": (1, 0, "damaged", "", "damaged"),
    "cut.mp3": (1, 0, "ends after", "", "its header promised"),
    "cut.wav": (2, 0, "", "", ""),
    "eight-channels.wav": (3, 0, "", "", ""),
    "empty.flac": (0, 0, "is empty", "is empty", ""),
    "flac-called.mp3": (3, 0, "", "", ""),
    "guessed-too-long.mp3": (3, 1, "ends after", "", "its header promised"),
    "guessed-too-short.mp3": (2, 0, "goes on after", "", "goes on after"),
    "high-rate.flac": (3, 0, "", "", ""),
    "holed.flac": (1, 0, "damaged", "", "damaged"),
    "huge-length.flac": (0, 0, "data.max_seconds", "data.max_seconds", ""),
    "infinite.wav": (2, 0, "no numbers", "", "no numbers"),
    "integers.wav": (0, 0, "expected -1 to 1", "", "expected -1 to 1"),
    "long-length.flac": (3, 0, "ends after", "", "its header promised"),
    "long-length.wav": (3, 0, "", "", ""),
    "mp3-called.flac": (3, 0, "", "", ""),
    "nan.wav": (2, 0, "no numbers", "", "no numbers"),
    "no-length.flac": (0, 0, "how long", "how long", ""),
    "no-samples.wav": (0, 0, "is empty", "is empty", ""),
    "one-sample.wav": (0, 1, "", "less than the 130", ""),
    "page.mp3": (0, 0, "not a readable", "not a readable", ""),
    "short-length.wav": (2, 0, "", "", ""),
    "silent.flac": (0, 3, "", "", ""),
    "whole.flac": (3, 0, "", "", ""),
}


def quarantined(dataset: PackedDataset) -> dict[str, str]:
    lines = (dataset.folder / "quarantine.jsonl").read_text().splitlines()
    return {one["id"].rpartition("/")[2]: one["reason"] for one in map(json.loads, lines)}


def test_bad_recordings_are_cut_left_out_or_quarantined(tmp_path: Path, pack: Callable[..., PackedDataset]) -> None:
    files = bad_files()
    assert files.keys() == FATES.keys()
    for name, data in files.items():
        put(tmp_path / "m" / name, data)
    source = {"kind": "recordings", "name": "m", "seconds": 1, "min_seconds": 0.5}
    packed = pack(tmp_path / "m", tmp_path / "t", layout(), source, context_length=400, max_bad_fraction=1)
    kept = [segment.id for number in range(len(packed)) for segment in packed.read(number).segments]
    bad, ledger = quarantined(packed), packed.about["ledger"]["m"]
    for name, (clips_kept, _, why, _, _) in FATES.items():
        assert sum(f"/{name}#" in one for one in kept) == clips_kept, name
        assert why in bad.get(name, "") and bool(why) == (name in bad), (name, bad.get(name))
    assert ledger["filtered"] == sum(fate[1] for fate in FATES.values())
    assert ledger["samples"] == len(kept) + ledger["filtered"] + len(bad)
    assert not summary(packed)["ledger_open"]
    for number in range(len(packed)):  # and what was kept can be read
        batch = collate([packed.read(number)], layout(), 1100)
        assert not batch.bad and all(one.isfinite().all() for one in batch.media["audio"].items())


def test_bad_audio_is_quarantined_when_packed_or_when_decoded(
    tmp_path: Path, pack: Callable[..., PackedDataset], write_shard: Callable[..., Path]
) -> None:
    files = {name.replace(".", "_"): {name.rpartition(".")[2]: data} for name, data in bad_files().items()}
    shard = write_shard(tmp_path / "m.tar", files)
    source = {"kind": "audio", "name": "m", "caption": ""}
    packed = pack(shard, tmp_path / "t", layout(), source, context_length=1100, max_bad_fraction=1)
    bad, fates = quarantined(packed), {name.replace(".", "_"): fate for name, fate in FATES.items()}
    said: dict[str, str] = {}
    for number in range(len(packed)):
        batch = collate([packed.read(number)], layout(), 1100, quarantine=True)
        found = {id.rpartition("/")[2]: reason for id, reason in batch.bad}
        unreadable = [id.rpartition("/")[2] in found for id in batch.ids[0]]
        assert batch.media["audio"].unreadable.tolist() == unreadable
        for values, is_bad in zip(batch.media["audio"].items(), unreadable, strict=True):
            assert values.isfinite().all() and not (is_bad and values.any())
        if found:
            with pytest.raises(DataError):
                collate([packed.read(number)], layout(), 1100)
        said |= found
    for name, (*_, packing, decoding) in fates.items():
        assert packing in bad.get(name, "") and bool(packing) == (name in bad), (name, bad.get(name))
        assert decoding in said.get(name, "") and bool(decoding) == (name in said), (name, said.get(name))


def test_the_first_bad_file_ends_packing_where_none_may_be(tmp_path: Path, pack: Callable[..., PackedDataset]) -> None:
    put(tmp_path / "m/a.flac", encoded(noise(1.1)))
    put(tmp_path / "m/b.flac", b"no sound")
    with pytest.raises(DataError, match=r"^m/\./b\.flac in .*: not a readable flac, wav, ogg or mp3 clip"):
        pack(tmp_path / "m", tmp_path / "t", layout(), {"kind": "recordings", "name": "m"}, context_length=200)
    (tmp_path / "m/b.flac").unlink()
    shutil.copy(tmp_path / "m/a.flac", tmp_path / "m/b.flac")
    assert len(pack(tmp_path / "m", tmp_path / "t", layout(), {"kind": "recordings", "name": "m"}, context_length=200))


@pytest.mark.parametrize("format", ["FLAC", "WAV", "OGG", "MP3"])
def test_mutated_files_give_clips_or_one_line(tmp_path: Path, format: str) -> None:
    rate = 44100 if format == "MP3" else RATE
    data = encoded(noise(0.6, rate=rate), rate, format)
    rng = np.random.default_rng(3)
    kept = refused = 0
    for case in range(60):
        mutated = bytearray(data)
        for at in rng.integers(0, len(data) if case % 2 else min(len(data), 200), rng.integers(1, 6)):
            mutated[at] = rng.integers(0, 256)
        if case % 4 == 0:
            del mutated[int(rng.integers(0, len(data))) :]
        put(tmp_path / f"m/a.{format.lower()}", bytes(mutated))
        config = {"seconds": 0.2, "min_seconds": 0.1, "silence": None, "max_clipped": 1}
        (said,) = found(tmp_path / "m", Limits(seconds=60), **config).values()
        for one in said:
            refused += isinstance(one, str)
            assert not isinstance(one, str) or one.startswith(f"m/./a.{format.lower()} in {tmp_path}")
        for clip in clips(said):
            kept += 1
            assert np.isfinite(samples_of(clip, RATE)).all()
    assert refused > 5 and (kept > 5 or format == "OGG")  # whose pages have checksums
