"""Studies: every run once, rows kept, and what was stopped goes on."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TINY

from benchmarks import study
from benchmarks.studies import mert
from benchmarks.study import Row, Run, Study
from mm.config import RunConfig


def config(steps: int) -> dict[str, Any]:
    return {**TINY, "train": {**TINY["train"], "max_steps": steps}, "evaluation": {"candidates": 4, "samples": 0}}


def test_runs_are_made_once_and_may_use_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)
    prepared = []

    def after(rows: list[Row]) -> dict[str, Any]:
        return with_cache(config(rows[-1]["steps"] + 1))

    def with_cache(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "data": {**values["data"], "cache": str(cache)}}

    first = Run("first", 0, 0.1, lambda rows: with_cache(config(1)))
    one = Study("tiny", "a try", lambda: prepared.append(1), [first, Run("after", 3, 0.1, after)], lambda rows: "")
    study.run_study(one, tmp_path / "work", minutes=0.15)
    assert "left for the next time" in capfd.readouterr().out
    assert [row["run"] for row in study.read_rows("tiny")] == ["first"]
    study.run_study(one, tmp_path / "work", minutes=None)
    rows = study.read_rows("tiny")
    assert [(row["run"], row["seed"], row["steps"]) for row in rows] == [("first", 0, 1), ("after", 3, 2)]
    said = json.loads((tmp_path / "work/after-3/run/eval.json").read_text())
    assert rows[1]["result"] == said and rows[1]["seconds"] > 0 and rows[1]["loss_tokens"] > rows[0]["loss_tokens"]
    study.run_study(one, tmp_path / "work", minutes=None)
    assert study.read_rows("tiny") == rows, "nothing is run again"
    with pytest.raises(SystemExit, match="ended with status 2"):
        study.run_one("tiny", Run("bad", 0, 0.1, lambda rows: {"data": {}}), [], tmp_path / "bad")


def test_a_run_may_be_measured_further_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)

    def trained(rows: list[Row]) -> dict[str, Any]:
        assert rows[-1]["run"] == "alone"
        values = config(1)
        return {**values, "data": {**values["data"], "cache": str(cache)}}

    def after(folder: Path) -> dict[str, Any]:
        return {"files": sorted(path.name for path in folder.iterdir()), "there": (folder / "run/eval.json").exists()}

    runs = [Run("alone", 2, 0.1, None, after), Run("both", 2, 0.1, trained, after)]
    study.run_study(Study("tiny", "a try", lambda: None, runs, lambda rows: ""), tmp_path / "work", None)
    alone, both = study.read_rows("tiny")
    assert alone["result"] == {"files": [], "there": False} and "steps" not in alone
    assert both["result"]["there"] and both["result"]["files"] == ["run", "study.yaml"]
    assert both["steps"] == 1 and "caption_loss" in both["result"]


def test_the_music_study_keeps_pieces_apart_and_fits_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, data = tmp_path / "music", tmp_path / "data"
    corpus.mkdir()
    with tarfile.open(corpus / "music-000000.tar", "w") as tar:
        for number in range(120):
            fields = {"source": f"piece {number // 4}", "key": "C major", "instrument": "oboe", "tempo": 60}
            mert.add(tar, f"{number}.flac", bytes([number]))
            mert.add(tar, f"{number}.json", json.dumps(fields).encode())
    monkeypatch.setattr(mert, "CORPUS", corpus)
    monkeypatch.setattr(mert, "DATA", data)
    mert.write_splits()
    pieces: dict[str, set[str]] = {}
    sound = set()
    for split in mert.SPLITS:
        with tarfile.open(data / f"{split}.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        about = [json.loads(content) for name, content in files.items() if name.endswith("json")]
        assert {one["split"] for one in about} == {split}
        pieces[split] = {one["source"] for one in about}
        sound |= {content for name, content in files.items() if name.endswith("flac")}
    assert sum(map(len, pieces.values())) == len(set().union(*pieces.values())) == 30 and len(sound) == 120
    assert all(pieces.values()) and len(pieces["train"]) > len(pieces["test"]) > len(pieces["validation"])

    assert sum(run.minutes for run in mert.RUNS) + 20 <= 180, "20 for the corpus and the centroids"
    for arm in mert.ARMS:
        made = RunConfig.model_validate({**mert.config(arm), "out": "x"})
        in_a_step = made.train.batch_tokens // made.data.context_length
        assert in_a_step % made.train.micro_batch == 0 and made.data.context_length % mert.CLIP == 0
        assert made.model.encoder.layout().count(120_000)[0] == mert.CLIP
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "constant": 0.1}
    probes = {
        label: {
            "recordings": {"test": 9},
            "groups": {"test": 3},
            "metrics": {metric: numbers},
            "against": {metric: numbers},
        }
        for label, metric in mert.LABELS.items()
    }
    alone = {label: {key: one[key] for key in one if key != "against"} for label, one in probes.items()}
    rows = [
        {"run": "cqt", "seed": 0, "result": {"probes": alone}},
        {"run": "full", "seed": 1, "steps": 3, "seconds": 60.0, "result": {"test_codes": 9.25, "probes": probes}},
    ]
    shown = mert.show(rows)
    assert shown.count("0.500 (0.400 to 0.600)") == 6 and shown.count("+0.500 (+0.400 to +0.600)") == 3
    assert "| full | 1 | 3 | 60 | 9.250 |" in shown and "9 clips of 3 test pieces" in shown and mert.show([])
