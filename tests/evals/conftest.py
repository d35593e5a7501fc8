"""A run to evaluate: the tiny model after one step."""

from pathlib import Path

import pytest
import yaml
from tiny_run import TINY

from mm.cli import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = {**TINY["data"], "cache": str(cache), "validation": [], "test": []}
    values = {**TINY, "out": str(folder / "run"), "data": data, "train": {**TINY["train"], "max_steps": 1}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "tiny.yaml")]) == 0
    return folder / "run"
