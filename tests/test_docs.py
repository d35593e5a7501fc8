"""The examples of docs/formats.md, run as they are printed there."""

import re
from pathlib import Path

import pytest

from mm.cli import main

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
