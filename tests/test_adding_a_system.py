"""The system of docs/adding-a-system.md, run as it is printed there: its own test, one process, two ranks."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from mm.config import load_config
from mm.train.metrics import read_metrics
from mm.train.trainer import Trainer, Unwatched

PAGE = (Path(__file__).parent.parent / "docs/adding-a-system.md").read_text()
CONFIG, MODEL, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(YAML,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adding")
    (folder / "pairs").mkdir()
    (folder / "pairs/__init__.py").touch()
    (folder / "pairs/config.py").write_text(CONFIG)
    (folder / "pairs/model.py").write_text(MODEL)
    (folder / "pairs.yaml").write_text(YAML)
    (folder / "test_pairs.py").write_text(TEST)
    return folder


def train(folder: Path, cache: Path, out: str, *overrides: str) -> list[dict[str, Any]]:
    sys.path.insert(0, str(folder))
    try:
        config = load_config(
            folder / "pairs.yaml", (f"out={folder / out}", f"data.cache={cache}", "train.device=cpu", *overrides)
        )
        Trainer(config, Unwatched()).run()
    finally:
        sys.path.remove(str(folder))
    return read_metrics(folder / out / "metrics.jsonl")


def test_it_is_as_short_as_the_page_says() -> None:
    lines = [line for code in (CONFIG, MODEL) for line in code.splitlines() if line.strip()]
    assert f"It has {len(lines)} lines" in PAGE and len(lines) < 80


def test_its_own_test_passes(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    text = TEST.replace('load_config("pairs.yaml")', f'load_config("pairs.yaml", ("data.cache={cache}",))')
    names: dict[str, Any] = {"__name__": "test_pairs"}
    exec(compile(text, str(folder / "test_pairs.py"), "exec"), names)
    for objective in ("next_token", "contrastive"):
        names["test_packing_and_dummies_change_nothing"](objective)


def test_one_process_and_two_ranks_learn_alike(folder: Path, cache: Path, ranks: Ranks) -> None:
    one = train(folder, cache, "one")
    assert one[-1]["loss/next_token"] < one[0]["loss/next_token"] - 1
    assert one[-1]["loss/contrastive"] < one[0]["loss/contrastive"] - 1
    ranks.run(train, 2, folder, cache, "two", "train.engine={kind: fsdp}")
    two = read_metrics(folder / "two/metrics.jsonl")
    assert len(two) == len(one) == 20
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss/next_token", "loss/contrastive", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
        assert a["loss"] == pytest.approx(a["loss/next_token"] + 0.5 * a["loss/contrastive"])
