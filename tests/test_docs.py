"""The examples of docs/formats.md, run as they are printed there; commands of other pages, as far as their configs."""

import re
import shlex
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


def test_the_runs_of_the_page_of_language_models_are_configs() -> None:
    page = (ROOT / "docs/text_lm.md").read_text().replace("\\\n", " ").replace("$seed", "0").replace(";", "\n")
    found = {}
    for command in re.findall(r"\bmm (?:train|pack|tokenizer train|estimate) (configs/.*)", page):
        path, *words = shlex.split(command, comments=True)
        config = load_config(ROOT / path, [word for word in words if "=" in word])
        found[config.out.name] = config
    assert found.keys() >= {"smoke_1m", "smoke_1m_through", "grown", "extended", "seed_0", "student"}
    assert found["extended"].model.language.tokenizer_name == found["extended"].model.language.name == "extended"
    heads = [stage.model.language.config["head_dim"] for stage in found["grown"].stage_runs()]
    assert heads == [32, 32], "a wider hidden_size alone does not make them wider"
    member, student = (found[name].train for name in ("seed_0", "student"))
    assert (member.epochs, member.optimizer) == (student.epochs, student.optimizer)
