"""docs/finetune.md, as it is printed there, on a tiny model in the layout that Open-Qwen2VL was released in."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny_release import Prismatic, write_release

import mm
from mm.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/finetune.md").read_text()
CONFIG = "configs/open_qwen2vl/finetune.yaml"


def commands() -> list[list[str]]:
    """The `mm` commands of the page, in order."""
    block = "\n".join(line[4:] for line in PAGE.splitlines() if line.startswith("    "))
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mm ")]


def test_the_config_is_short() -> None:
    lines = (ROOT / CONFIG).read_text().splitlines()
    assert len(lines) < 20
    assert yaml.safe_load("\n".join(lines))["model"]["released"] == "weizhiwang/Open-Qwen2VL"


def test_every_command_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_release(tmp_path / "release", Prismatic(729))
    make_data, load = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(make_data, {})
    for name in ("train", "test"):  # a few: a picture takes 729 patches
        lines = Path(f"mine/{name}.jsonl").read_text().splitlines()
        assert len(lines) == {"train": 1540, "test": 222}[name]
        Path(f"mine/{name}.jsonl").write_text("".join(f"{line}\n" for line in lines[:4]))
    small = [
        "model.released=release", "train.epochs=null", "train.max_steps=1", "train.batch_tokens=4096",
        "train.device=cpu", "evaluation.every=1", f"data.cache={tmp_path / 'cache'}", "data.workers=0",
    ]  # fmt: skip
    done = []
    for command in commands():
        takes_config = CONFIG in command
        assert main([*command, *(small if takes_config else [])]) == 0, command
        done.append(command[0])
    assert done == ["estimate", "train", "train", "report", "generate", "export", "export"]
    exec(load, {})
    capsys.readouterr()
    found = mm.load("runs/finetune", "cpu")[0].state_dict()
    for folder in ("exported", "released"):
        again = mm.load(folder, "cpu")[0].state_dict()
        assert all((again[name] == tensor).all() for name, tensor in found.items())
