"""The examples of docs/formats.md, run as they are printed there."""

import re
from pathlib import Path

import pytest

from mm.cli import main
from mm.config import load_config

ROOT = Path(__file__).parent.parent


def test_a_shard_written_from_the_page_packs_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/formats.md").read_text()
    write, read = re.findall(r"```python\n(.*?)```", page, re.S)
    (config,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "colours.yaml").write_text(config)
    exec(write, {})
    assert main(["pack", "colours.yaml", "--out", "packed/colours"]) == 0
    capsys.readouterr()
    exec(read, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # four colours, two visits
    assert sum("colours/colours-000000/000003" in line for line in lines) == 2
    assert all("PIL" in line for line in lines)


def test_the_stages_of_the_training_page_are_a_run(tmp_path: Path) -> None:
    (config,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.S)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "staged.yaml").write_text(config)
    align, pretrain, last = load_config(tmp_path / "staged.yaml").stage_runs()
    assert align.train.params and not pretrain.train.params
    assert pretrain.train.optimizer.betas == align.train.optimizer.betas
    assert last.model.vision.image_size == 96 and last.model.vision.name == align.model.vision.name
