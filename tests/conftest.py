"""A small real run that many tests share: emoji pictures, a few thousand parameters, seconds to train."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import Ranks, preload
from tiny_run import TINY

from mm.config import RunConfig, load_config


def pytest_sessionstart() -> None:
    """Before a worker of a whole suite packs anything, so that all its processes are forked from the same one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        preload()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of packed sets for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for tests of several ranks."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    """Writes `tiny.yaml` into the test's folder; the run goes to `run/` beside it."""

    def write(name: str = "tiny", **sections: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        values = {"out": str(tmp_path / "run"), **TINY, **sections}
        values["data"] = {**values["data"], "cache": str(cache)}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def tiny_config(tiny: Callable[..., Path]) -> Callable[..., RunConfig]:
    """The tiny run's config with overrides: `tiny_config("train.max_steps=2")`."""
    return lambda *overrides: load_config(tiny(), overrides)
