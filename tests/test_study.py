"""Studies: every run once, rows kept, and what was stopped goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TINY

from benchmarks import study
from benchmarks.study import Row, Run, Study


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
        study.run_one("tiny", first, {"data": {}}, tmp_path / "bad")
