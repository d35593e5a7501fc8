"""The examples of docs/formats.md, run as they are printed there; commands of other pages, as far as their configs."""

import re
import shlex
from pathlib import Path

import pytest

from mm.cli import main
from mm.config import json_schema, load_config
from mm.data.sources import SOURCES
from mm.models.config import CONNECTORS, SYSTEMS
from mm.models.teachers.config import TEACHERS
from mm.train.engines.config import ENGINES
from mm.train.optim.config import OPTIMIZERS
from mm.train.schedules import SCHEDULES

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


def test_the_reference_has_a_row_for_every_key() -> None:
    """All keys are named in it, those of an optimizer or an engine in the first column of its own table."""
    parts = re.split(r"^#{3,5} ", (ROOT / "docs/configuration.md").read_text(), flags=re.M)[1:]
    rows = {part.splitlines()[0]: re.findall(r"^\| (`[^|]*) \|", part, re.M) for part in parts}
    keys = {title: {key for row in found for key in re.findall(r"`([^`]+)`", row)} for title, found in rows.items()}
    code = re.findall("`[^`\n]+`", "\n".join(parts))
    anywhere = {word for one in code for word in re.findall(r"\w+", one)} | {"kind"}
    sections = {name: section.get("properties", {}) for name, section in json_schema()["$defs"].items()}
    for kinds in (SOURCES, SYSTEMS, CONNECTORS, TEACHERS, ENGINES, OPTIMIZERS, SCHEDULES):
        sections |= {f"{kinds.what} {kind}": kinds.resolve(kind).model_fields for kind in kinds.names}
    missing = {name: {*fields} - anywhere for name, fields in sections.items()}
    assert {name: found for name, found in missing.items() if found} == {}
    for kinds in (ENGINES, OPTIMIZERS):
        for kind in kinds.names:
            fields = kinds.resolve(kind).model_fields.keys() - {"kind"}
            assert fields <= keys.get(f"{kinds.what}: {kind}", set()), kind
