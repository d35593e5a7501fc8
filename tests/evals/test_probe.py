"""Probes find what is there and nothing that is not; pieces stay in one split; errors come before any work."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from tiny_music import flac, tone, write_config, write_folder, write_shard

from mm.cli import main
from mm.data.sample import keyed_rng
from mm.errors import DataError
from mm.evals import embed as embeddings
from mm.evals import probe as module
from mm.evals.embed import Embeddings
from mm.evals.probe import (
    Data,
    Kind,
    Probe,
    Settings,
    Split,
    hashed,
    parted,
    probe_label,
    recording_vectors,
    target_of,
)
from mm.evals.probing_metrics import KEYS

INSTRUMENTS = ("cello", "flute", "oboe")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(module, "EPOCHS", 40)


def synthetic(values: np.ndarray, noise: float = 0.3, elsewhere: float = 0.8) -> torch.Tensor:
    """[n, 3, 8]: layer 1 holds the values, a column each, the others hold them under more noise; scales differ
    by a million."""
    rng = keyed_rng("synthetic")
    features = rng.normal(size=(len(values), 3, 8)) * np.array([elsewhere, noise, elsewhere])[:, None]
    features[:, :, : values.shape[1]] += values[:, None]
    return torch.from_numpy(features * np.geomspace(1e-3, 1e3, 8) + 5).float()


def splits_of(n: int) -> list[Split]:
    return hashed([str(number) for number in range(n)], 0)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_separable_classes_are_found_and_shuffled_ones_are_not(kind: Kind) -> None:
    truth = keyed_rng("classes").integers(0, 3, 150)
    features, groups = synthetic(3.0 * np.eye(3)[truth]), [str(number) for number in range(150)]
    settings = Settings(probe=kind, seeds=2)
    target = target_of("instrument", [INSTRUMENTS[one] for one in truth])
    result, predictions = probe_label(features, target, splits_of(150), groups, settings)
    assert result["metrics"]["accuracy"]["value"] == 1.0 and result["metrics"]["macro_f1"]["value"] == 1.0
    assert np.argmax(result["layer_weights"]) == 1 and sum(result["layer_weights"]) == pytest.approx(1, abs=1e-3)
    assert result["recordings"] == {"train": 105, "validation": 15, "test": 30} and len(predictions) == 2
    shuffled = target_of("instrument", [INSTRUMENTS[one] for one in keyed_rng("shuffled").permutation(truth)])
    result, _ = probe_label(features, shuffled, splits_of(150), groups, settings)
    one = result["metrics"]["accuracy"]
    assert one["low"] <= 1 / 3 <= one["high"] and abs(one["value"] - 1 / 3) < 0.2


def test_tags_and_numbers() -> None:
    rng, groups = keyed_rng("tags"), [str(number) for number in range(150)]
    tags = rng.random((150, 3)) < 0.4
    target = target_of("tags", [[INSTRUMENTS[k] for k in range(3) if one[k]] for one in tags])
    assert target.task == "tags" and np.array_equal(target.values, tags)
    linear = Settings(seeds=1, probe="linear")
    result, _ = probe_label(synthetic(4.0 * tags), target, splits_of(150), groups, linear)
    assert result["metrics"]["roc_auc"]["value"] > 0.98 and result["metrics"]["average_precision"]["value"] > 0.95
    assert result["metrics"]["roc_auc"]["constant"] == 0.5
    numbers = 90 + 20 * rng.normal(size=150)
    features = synthetic((numbers[:, None] - 90) / 10, 0.01, 0.1)
    target = target_of("tempo", numbers.tolist())
    result, (predicted,) = probe_label(features, target, splits_of(150), groups, Settings(seeds=1))
    assert list(result["metrics"]) == ["r2", "tempo_accuracy"] and result["metrics"]["r2"]["value"] > 0.95
    assert abs(result["metrics"]["r2"]["constant"]) < 0.2 and 40 < predicted.mean() < 140  # in the label's own unit
    target = target_of("valence", rng.normal(size=150).tolist())
    result, _ = probe_label(features, target, splits_of(150), groups, linear)
    assert result["metrics"]["r2"]["value"] < 0.1


def test_the_same_seed_gives_the_same_probe() -> None:
    truth = keyed_rng("classes").integers(0, 3, 60)
    features, groups = synthetic(np.eye(3)[truth]), [str(number) for number in range(60)]
    target = target_of("x", truth.tolist())
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, _ = probe_label(features, target, splits_of(60), groups, Settings(seeds=2))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers are drawn
    torch.manual_seed(8)
    assert probe_label(features, target, splits_of(60), groups, Settings(seeds=2))[0] == one


def test_the_probe_is_a_mean_of_layers_then_a_map() -> None:
    probe = Probe(3, 4, 2, "mlp").eval()
    assert [tuple(p.shape) for p in probe.head.parameters()] == [(512, 4), (512,), (2, 512), (2,)]
    features = torch.randn(5, 3, 4)
    torch.testing.assert_close(probe(features), probe.head(features.mean(1)))  # weights begin equal
    with torch.no_grad():
        probe.mix.copy_(torch.tensor([0.0, 50.0, 0.0]))
    torch.testing.assert_close(probe(features), probe.head(features[:, 1]))


def test_groups_are_held_apart_and_shares_kept() -> None:
    groups = [str(number % 97) for number in range(1000)]
    splits = hashed(groups, 0)
    by_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        by_group.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in by_group.values())
    counts = [sum(found == {name} for found in by_group.values()) for name in ("train", "validation", "test")]
    assert counts == [68, 10, 19]
    assert hashed(groups[::-1], 0) == splits[::-1] and hashed(groups, 1) != splits
    assert sorted(hashed(["a", "b", "c"], 0)) == ["test", "train", "validation"]
    with pytest.raises(DataError, match="2 groups cannot be split"):
        hashed(["a", "b", "a"], 0)


def test_targets_by_what_values_are() -> None:
    tempi = target_of("tempo", [120, 60, 100])
    assert tempi.names == ("60", "100", "120") and list(tempi.values) == [2, 0, 1]
    assert list(tempi.metrics()) == ["accuracy", "macro_f1", "tempo_accuracy"]
    near = target_of("bpm", ["100", "103", "120"]).metrics()["tempo_accuracy"]
    assert near(np.array([0, 0, 2]), np.array([1, 2, 2])) == pytest.approx(2 / 3)
    keys = target_of("key", ["D♭ major", "C# major", "a minor"])
    assert keys.names == KEYS and list(keys.values) == [1, 1, 21] and next(iter(keys.metrics())) == "key_score"
    assert target_of("key", ["C major", "unknown"]).names == ("C major", "unknown")
    assert target_of("pitch", list(range(12))).task == "classes" and target_of("x", ["0.5", "1"]).task == "regression"
    assert target_of("x", list(range(60))).task == "regression"
    assert target_of("x", list(range(60)), "classes").outputs == 60
    assert target_of("x", ["rock;live", "rock", "jazz"]).names == ("jazz", "live", "rock")
    assert target_of("x", [True, False]).names == ("False", "True")
    with pytest.raises(DataError, match="'fast' is no number"):
        target_of("tempo", [120, "fast"], "regression")


def test_a_label_that_says_nothing_is_refused() -> None:
    target = target_of("x", ["a"] * 9 + ["b"])
    with pytest.raises(DataError, match="x: the same for all 6 recordings of the train split; expected two values"):
        parted(target, ["train"] * 6 + ["validation", "test", "test", "test"])
    with pytest.raises(DataError, match="no recording with it in the validation split"):
        parted(target, ["train"] * 5 + ["test"] * 4 + ["train"])


def music(n: int = 36) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Tones of three heights, an instrument each, four of each piece; the key has nothing to do with the sound."""
    rng, found = keyed_rng("music"), {}
    for number in range(n):
        which = number % 3
        fields = {"instrument": INSTRUMENTS[which], "source": f"piece {number // 4}", "tempo": [60, 90][number % 2]}
        fields["key"] = KEYS[int(rng.integers(24))]
        found[f"{number:03d}"] = (tone(300.0 * 2**which, 0.4 + 0.01 * (number % 5), number), fields)
    return found


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    samples = {key: (flac(wave), fields) for key, (wave, fields) in music().items()}
    return write_shard(tmp_path / "corpus/music-000000.tar", samples)


def test_shards_by_the_command_line(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["probe", "builtin:log-mel", "--data", str(shard), "--group", "source", "--seeds", "2"]
    command += ["--probe", "linear"]
    labels = ["--label", "instrument", "--label", "key", "--label", "tempo"]
    assert main([*command, *labels, "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(one["label"], one["task"]) for one in results] == [
        ("instrument", "classes"),
        ("key", "classes"),
        ("tempo", "classes"),
    ]
    instrument, key, _ = results
    assert instrument["metrics"]["accuracy"]["value"] == 1.0 and instrument["model"] == "builtin:log-mel"
    assert instrument["groups"] == {"train": 6, "validation": 1, "test": 2} and instrument["layers"] == ["log-mel"]
    assert list(key["metrics"]) == ["key_score", "accuracy", "macro_f1"] and key["metrics"]["accuracy"]["value"] < 0.5
    assert json.loads((out / "key-linear-weighted.json").read_text()) == key
    lines = [json.loads(line) for line in (out / "key-linear-weighted.predictions.jsonl").read_text().splitlines()]
    assert len(lines) == key["recordings"]["test"] == 8 and len({line["group"] for line in lines}) == 2
    assert lines[0]["id"].startswith("corpus/music-000000/") and lines[0]["truth"] in KEYS
    right = np.mean([[said == line["truth"] for said in line["predicted"]] for line in lines])
    assert right == pytest.approx(key["metrics"]["accuracy"]["value"])
    # The same embeddings serve another call; another model is kept out.
    (folder,) = out.glob("embeddings-*")
    before = folder.stat().st_mtime_ns
    assert main([*command, "--label", "instrument", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "instrument" in shown and "1.000 … 1.000" in shown and "8 recordings in 2 groups" in shown
    assert [*out.glob("embeddings-*")] == [folder] and folder.stat().st_mtime_ns == before
    other = ["probe", f"untrained:{write_config(tmp_path)}", *command[2:], "--label", "instrument"]
    assert main([*other, "--out", str(out)]) == 2
    assert "holds results with model 'builtin:log-mel'; choose another --out" in capsys.readouterr().err
    # Against it, from a folder of its own.
    assert main([*other, "--out", str(tmp_path / "mert"), "--against", str(out)]) == 0
    assert "difference" in capsys.readouterr().out
    compared = json.loads((tmp_path / "mert/instrument-linear-weighted.json").read_text())
    mine, theirs = compared["metrics"]["accuracy"]["value"], instrument["metrics"]["accuracy"]["value"]
    assert compared["against"]["accuracy"]["value"] == pytest.approx(mine - theirs)
    moved = ["--split-seed", "1", "--out", str(tmp_path / "moved"), "--against", str(out)]
    assert main([*other, *moved]) == 2 and "expected the same test split" in capsys.readouterr().err


def test_a_folder_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "music", {f"some/{key}.flac": wave for key, (wave, _) in music().items()})
    write_folder(folder, {"unlabelled.flac": tone(500, 0.3)})
    splits = ["train"] * 20 + ["valid"] * 6 + ["test"] * 10
    rows = [
        {"file": f"some/{key}.flac", "instrument": fields["instrument"], "bright": f"{number % 3}.5", "split": split}
        for (number, (key, (_, fields))), split in zip(enumerate(music().items()), splits, strict=True)
    ]
    rows[0]["instrument"] = ""  # not known
    table = tmp_path / "labels.csv"

    def write(rows: list[dict[str, str]]) -> None:
        with open(table, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write(rows)
    command = ["probe", "builtin:log-mel", "--data", str(folder), "--table", str(table), "--seeds", "1"]
    command += ["--label", "instrument", "--out", str(tmp_path / "out")]
    assert main([*command, "--label", "bright", "--json"]) == 0
    instrument, bright = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert instrument["recordings"] == {"train": 19, "validation": 6, "test": 10} and instrument["unlabelled"] == 1
    assert instrument["metrics"]["accuracy"]["value"] == 1.0
    assert bright["task"] == "regression" and bright["metrics"]["r2"]["value"] > 0.9
    (embedded,) = (tmp_path / "out").glob("embeddings-*")
    assert len(Embeddings.open(embedded)) == 36  # the file without labels is not embedded
    # Without a validation split an eighth of the training split is one.
    write([{**row, "split": row["split"].replace("valid", "train")} for row in rows])
    found = Data.open(str(folder), table).splits(Settings())
    assert sorted(found.values()) == ["test"] * 10 + ["train"] * 23 + ["validation"] * 3
    write([*rows, {**rows[0], "file": "some/missing.flac"}])
    assert main(command) == 2 and "some/missing.flac: not in" in capsys.readouterr().err
    write([*rows, rows[3]])
    assert main(command) == 2 and "two lines for some/003.flac" in capsys.readouterr().err
    write([{**row, "split": "somewhere"} for row in rows])
    assert main(command) == 2 and "is 'somewhere'; expected train, validation or test" in capsys.readouterr().err
    write([{"path": "x"}])
    assert main(command) == 2 and "no `file` in line 2" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_is_embedded(
    shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr(module, "embed", never)
    command = ["probe", "builtin:log-mel", "--data", str(shard), "--out", str(tmp_path / "out")]
    assert main([*command, "--label", "instrumnt"]) == 2
    assert "no recording has a label 'instrumnt'; did you mean 'instrument'?" in capsys.readouterr().err
    assert main([*command, "--label", "key", "--group", "piece"]) == 2
    assert "no recording has a label 'piece'" in capsys.readouterr().err
    assert main([*command, "--label", "key", "--task", "regression"]) == 2 and "is no number" in capsys.readouterr().err
    assert main([*command, "--label", "key", "--layers", "4"]) == 2
    assert "expected weighted, or one of log-mel" in capsys.readouterr().err
    single = write_shard(tmp_path / "one/one.tar", {f"{n}": (flac(tone(300, 0.3)), {"key": "same"}) for n in range(9)})
    assert main(["probe", "builtin:log-mel", "--data", str(single), "--label", "key"]) == 2
    assert "key: the same for all 6 recordings of the train split" in capsys.readouterr().err
    folder = write_folder(tmp_path / "plain", {"a.flac": tone(300, 0.3)})
    assert main(["probe", "builtin:log-mel", "--data", str(folder), "--label", "key"]) == 2
    assert "nothing is known of any recording; give a JSON beside each, or --table" in capsys.readouterr().err


def test_a_recording_is_the_mean_of_its_windows(tmp_path: Path) -> None:
    write_folder(tmp_path / "music", {"a.flac": tone(300, 2.5), "b.flac": tone(500, 0.7)})
    embedder = embeddings.open_embedder("builtin:log-mel")
    source = embeddings.source_of(str(tmp_path / "music"))
    found = embeddings.embed(embedder, source, tmp_path / "out", seconds=1.0)
    vectors = recording_vectors(found)
    a, b, c, other = (found.read(number)[0] for number in range(4))
    torch.testing.assert_close(vectors["music/./a.flac"], (a + b + 0.5 * c) / 2.5)
    torch.testing.assert_close(vectors["music/./b.flac"], other)


def test_unreadable_recordings_are_counted_and_left_out(tmp_path: Path) -> None:
    samples = {key: (flac(wave), fields) for key, (wave, fields) in music().items()}
    samples["035"] = (b"fLaC broken", samples["035"][1])
    shard = write_shard(tmp_path / "corpus/music-000000.tar", samples)
    (result,) = module.run(
        "builtin:log-mel", Data.open(str(shard)), ["instrument"], Settings(seeds=1, probe="linear"), tmp_path / "out"
    )
    assert result["unreadable"] == 1 and sum(result["recordings"].values()) == 35


def test_one_layer_alone_is_that_layer() -> None:
    truth = keyed_rng("classes").integers(0, 3, 120)
    features, groups = synthetic(3.0 * np.eye(3)[truth]), [str(number) for number in range(120)]
    target = target_of("x", truth.tolist())
    settings = Settings(seeds=1, probe="linear")
    features[:, 0] = torch.randn(120, 8)
    right, _ = probe_label(features[:, 1:2], target, splits_of(120), groups, settings)
    wrong, _ = probe_label(features[:, :1], target, splits_of(120), groups, settings)
    assert right["metrics"]["accuracy"]["value"] == 1.0 and right["layer_weights"] == [1.0]
    assert wrong["metrics"]["accuracy"]["value"] < 0.7
