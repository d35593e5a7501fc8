"""Configs: composed, checked before anything is built, and wrong ones are one line that says where and what instead."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.config import RunConfig, json_schema, load_config
from mm.errors import ConfigError
from mm.settings import Loader, parse_number
from mm.train.schedules import DecayConfig

ROOT = Path(__file__).parent.parent


class StairsConfig(DecayConfig):
    """A schedule of a user's own, named by its import path."""

    kind: str = "tests.test_config:StairsConfig"
    stairs: int = 4

    def shape(self, progress: float) -> float:
        return 1 - int(progress * self.stairs) / self.stairs


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e-5", 5e-5), ("1M", 1_000_000), ("3%", 0.03), ("4_096", 4096), ("2.5k", 2500), ("1G", 10**9), ("-1", -1),
     ("0.1%", 0.001), ("1B", 10**9)],
)  # fmt: skip
def test_numbers(text: str, number: float) -> None:
    assert parse_number(text) == number and type(parse_number(text)) is type(number)


@pytest.mark.parametrize("text", ["", "M", "1X", "1 0", "0x10", "one"])
def test_what_is_no_number_is_left_alone(text: str) -> None:
    assert parse_number(text) == text


# The config of a release is on the hub; tests/models/test_finetune.py runs it on a release of its own.
SHIPPED = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.stem not in ("finetune", "tag")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_resolve_to_themselves(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.resolved()))
    assert load_config(again) == config


def test_schema_is_in_step() -> None:
    written = json.loads((ROOT / "configs/schema.json").read_text())
    assert written == json_schema(), "run `make schema`"


def test_overrides_and_units(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(
        "train.optimizer.lr=5e-5", "train.batch_tokens=1k", "train.schedule.warmup=3%", "data.sources.0.captions=all",
        "data.context_length=100", "train.params=[{match: 'vision.*', freeze: true}]", "train.micro_batch=5",
    )  # fmt: skip
    assert config.train.optimizer.lr == 5e-5 and config.train.batch_tokens == 1000
    assert config.train.schedule.warmup == 0.03 and config.data.sources[0].captions == "all"
    assert config.train.params[0].freeze


def test_exponents_are_numbers_and_home_is_home(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """YAML 1.1 takes `1e-6` for text, which a section without types would hand on."""
    config = tiny_config("model.language.config.rms_norm_eps=1e-6", "train.max_steps=1e3", "out=~/run")
    assert config.model.language.config["rms_norm_eps"] == 1e-6 and config.train.max_steps == 1000
    assert config.out == Path.home() / "run"
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-6\nb: [2E+3, 1e5x, '1e5', 10, 1.5e2]\n")
    assert yaml.load(path.read_text(), Loader) == {"a": 1e-6, "b": [2000.0, "1e5x", "1e5", 10, 150.0]}


def test_a_stage_is_checked_as_what_it_will_be(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Another kind than the default one takes nothing over from the settings above, and is refused nothing of them."""
    path = tmp_path / "staged.yaml"
    path.write_text(
        f"extends: {tiny().name}\ntrain: {{optimizer: {{lr: 7e-4}}, schedule: {{warmup: 2}}}}\n"
        "stages:\n  - {name: a}\n  - {name: b, train: {schedule: {kind: wsd, decay: 50%}}}\n"
    )
    assert load_config(path).stage_runs()[1].train.schedule.warmup == 0.03
    text = path.read_text().replace("schedule: {warmup: 2}", "schedule: {final: 0.1}")
    path.write_text(text.replace("kind: wsd, decay: 50%", "kind: constant"))
    assert load_config(path).stage_runs()[1].train.schedule.kind == "constant"


def test_extends_merges_mappings_and_replaces_lists_and_kinds(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("base")
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: base.yaml\ntrain: {max_steps: 3, schedule: {kind: constant}}\n"
        "data: {validation: [], visits: 5}\nevaluation: {every: 0}\n"
    )
    config, parent = load_config(child), load_config(base)
    assert config.train.max_steps == 3 and config.train.schedule.kind == "constant"
    assert config.data.validation == [] and config.data.visits == 5
    assert config.model == parent.model and config.train.optimizer == parent.train.optimizer


def test_a_kind_of_the_users_own(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config("train.schedule={kind: 'tests.test_config:StairsConfig', stairs: 2, warmup: 0}")
    assert type(config.train.schedule).__name__ == "StairsConfig"
    assert [config.train.schedule.factor(step, 4) for step in range(4)] == [1, 1, 0.5, 0.5]


# override -> what the one line must say
WRONG: list[tuple[str, str]] = [
    ("train.max_stps=4", "train.max_stps: unknown key; did you mean 'max_steps'?"),
    ("trian.max_steps=4", "trian: unknown key; did you mean 'train'?"),
    ("model.vision.imgsize=4", "model.vision.imgsize: unknown key; did you mean 'image_size'?"),
    ("train.max_steps=soon", "train.max_steps: expected integer, unable to parse string as an integer, found \"soon\""),
    ("train.precision=fp8", "train.precision: expected 'fp32' or 'bf16', found \"fp8\""),
    ("train.optimizer.kind=adam", "train.optimizer: unknown optimizer kind 'adam'; did you mean 'adamw'?"),
    ("model.kind=qwen", "model: unknown model kind 'qwen'; expected one of: open_qwen2vl"),
    ("model.kind=nosuch.module:Config", "model: model kind 'nosuch.module:Config' cannot be imported"),
    ("train.optimizer.lr=-1", "train.optimizer.lr: expected greater than 0, found -1"),
    ("model.connector.tokens=15", "model.connector.tokens: expected a square number; the nearest are 9 and 16"),
    ("model.connector.tokens=25", "connector.tokens 25 is more than the 16 patches of vision at 32 pixels"),
    ("data.packed=/tmp/x", "data.packed: contradicts data.sources"),
    ("train.epochs=1", "train.max_steps: give either train.max_steps or train.epochs, not both"),
    ("train.batch_tokens=100", "train.batch_tokens: 100 is less than one row of data.context_length = 128"),
    ("train.micro_batch=3", "train.micro_batch: 3 does not divide the 4 rows of a step"),
    ("train.schedule.warmup=100", "train.schedule.warmup: 100 steps are more than the schedule's 8 (train.max_steps)"),
    ("train.params=[{match: '(', freeze: true}]", "train.params.0.match: not a regular expression"),
    ("train.engine={kind: fsdp, units: ['(']}", "train.engine.units.0: not a regular expression"),
    ("data.sources.5.path=x", "data.sources is a list of 1"),
    ("train.max_steps.x=1", "train.max_steps is a single value"),
    ("nonsense", "expected KEY.SUB=VALUE"),
    ("data.max_bad_fraction=120%", "data.max_bad_fraction: expected less than or equal to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "line"), WRONG, ids=[o for o, _ in WRONG])
def test_wrong_settings_are_one_line(override: str, line: str, tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(override)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_errors_name_file_and_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tiny("base")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\n\ntrain:\n  max_steps: 3\n  optimzer: {lr: 1}\n")
    with pytest.raises(ConfigError, match=r"child\.yaml:5: train\.optimzer: unknown key; did you mean 'optimizer'\?"):
        load_config(child)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {a: 1", r":1: not valid YAML"),
        ("- a\n- b", r"expected a mapping of sections, found a list"),
        ("seed: 1\nseed: 2", r":2: seed: set twice in this file"),
        ("extends: nowhere.yaml", r"nowhere\.yaml: there is no such config file"),
        ("extends: x.yaml", r"extends itself"),
        ("", r"data: missing"),
    ],
)
def test_broken_files(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=line):
        load_config(tmp_path / "x.yaml")


def test_evaluation_needs_data(tiny: Callable[..., Path]) -> None:
    values: dict[str, Any] = yaml.safe_load(tiny().read_text())
    values["data"]["validation"] = []
    values["evaluation"] = {"every": 5}
    path = tiny("other")
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"evaluation\.every: there is no data\.validation"):
        load_config(path)
