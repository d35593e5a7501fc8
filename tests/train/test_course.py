"""The drawing of a run is of what the trainer does, and needs neither data nor torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm.cli import main
from mm.config import RunConfig, load_config
from mm.errors import ConfigError
from mm.train.course import parts

ROOT = Path(__file__).parents[2]
WARM = {"name": "warm", "train": {"max_steps": 6, "batch_tokens": 256, "micro_batch": 2}}
MIXED = {
    "name": "mixed", "keep_optimizer": True, "carry_on": True, "train": {"max_steps": 10},
}  # fmt: skip
ANEW = {"name": "anew", "data": {"mixture": {"weights": {"a": 1, "b": 3}}}, "train": {"max_steps": 4}}


@pytest.fixture
def staged(tiny: Callable[..., Path]) -> RunConfig:
    def source(name: str) -> dict[str, Any]:
        return {"kind": "captions", "path": "builtin:emoji/validation-*.tar.gz", "name": name}

    schedule = [{"step": 3, "weights": {"a": 1, "b": 1}}, {"step": 12, "weights": {"a": 4, "b": 1}}]
    data = {"sources": [source("a"), source("b")], "context_length": 128, "mixture": {"schedule": schedule}}
    train = {
        "batch_tokens": 512, "optimizer": {"kind": "adamw", "lr": 1e-2}, "schedule": {"kind": "linear", "warmup": 4},
    }  # fmt: skip
    path = tiny(data=data, train=train, stages=[WARM, MIXED, ANEW], evaluation={"every": 0})
    return load_config(path)


def test_parts_are_what_the_trainer_takes(staged: RunConfig) -> None:
    warm, mixed, anew = parts(staged)
    schedule = staged.train.schedule
    assert [rate for _, rate in warm.rates + mixed.rates] == [1e-2 * schedule.factor(step, 16) for step in range(16)]
    assert [rate for _, rate in anew.rates] == [1e-2 * schedule.factor(step, 4) for step in range(4)]
    assert [step for part in (warm, mixed, anew) for step, _ in part.rates] == list(range(20))
    assert [part.tokens_before for part in (warm, mixed, anew)] == [0, 6 * 256, 6 * 256 + 10 * 512]
    assert warm.phases == [(0, 4, "warm-up"), (4, 16, "decay")] and not mixed.phases
    assert warm.weights == [(0, {}), (3, {"a": 0.5, "b": 0.5})]
    assert mixed.weights == [(6, {"a": 0.5, "b": 0.5}), (12, {"a": 0.8, "b": 0.2})], "steps of carried data count on"
    assert anew.weights[0] == (16, {"a": 0.25, "b": 0.75})


def test_long_runs_are_drawn_by_some_of_their_steps(tiny_config: Callable[..., RunConfig]) -> None:
    (whole,) = parts(tiny_config("train.max_steps=1M"))
    assert len(whole.rates) == 1500 and whole.rates[0][0] == 0 and whole.rates[-1][0] == 999_999


def test_steps_that_depend_on_the_data_are_refused(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs 2: how many steps that is depends on the packed data"):
        parts(tiny_config("train.max_steps=null", "train.epochs=2"))


def test_the_command_draws_without_torch(tmp_path: Path) -> None:
    config, picture = ROOT / "configs/text_lm/warmups.yaml", tmp_path / "warmups.png"
    code = (
        "import sys; from mm.cli import main; "
        f"status = main(['config', {str(config)!r}, '--plot', {str(picture)!r}]); print(status, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    assert said.splitlines() == [f"drew 300 steps, {60 * 1024 + 60 * 2048 + 180 * 4096:,} tokens: {picture}", "0 False"]
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 50


@pytest.mark.parametrize("name", ["infinite", "anneal", "continual"])
def test_shipped_configs_are_drawn(name: str, tmp_path: Path) -> None:
    assert main(["config", str(ROOT / f"configs/text_lm/{name}.yaml"), "--plot", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").read_text().count("<path") > 10
