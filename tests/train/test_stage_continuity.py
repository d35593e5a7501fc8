"""What goes on from stage to stage, from run to branch, and over a resumption: bit for bit the run without the cut."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks
from torch import Tensor

from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch
from mm.errors import CheckpointError, ConfigError
from mm.train import checkpoint
from mm.train.config import TrainConfig
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.stages import Stage, count_steps
from mm.train.step import Counted
from mm.train.trainer import Trainer, Unwatched

TEXTS = [f"Text {n}. " + " ".join(f"word {n * k}" for k in range(n % 9 + 3)) for n in range(90)]
OTHERS = [f"Another {n}: " + ", ".join(f"thing {n + k}" for k in range(n % 7 + 3)) for n in range(40)]
SMALL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "attention_dropout": 0.1,
}  # fmt: skip
FIRST = {"name": "first", "train": {"max_steps": 3}}
GO_ON = {"name": "go on", "carry_on": True, "keep_optimizer": True, "train": {"max_steps": 4}}
INFINITE = {
    "kind": "infinite", "warmup": 2, "cooldown": 2, "constant": 0.5, "final": 0.01, "anneal": {"at": 6, "steps": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in (("texts", TEXTS), ("others", OTHERS)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))
    return folder


Configured = Callable[..., RunConfig]


@pytest.fixture
def configured(tmp_path: Path, texts: Path) -> Configured:
    """`configured("name", *overrides, stages=[…], schedule={…})`: a run of 4 rows a step on short texts."""

    def config(name: str, *overrides: str, stages: Any = (), **train: Any) -> RunConfig:
        values = {
            "data": {
                "sources": [{"kind": "text", "name": "texts", "path": str(texts / "texts.jsonl")}],
                "context_length": 64,
                "too_long": "split",
                "workers": 0,
                "cache": str(texts / "cache"),
            },
            "model": {"kind": "text_lm", "language": {"tokenizer": "builtin:emoji", "config": SMALL}},
            "train": {
                "batch_tokens": 256, "micro_batch": 2, "device": "cpu", "async_save": False, "save_every": 2,
                "optimizer": {"kind": "adamw", "lr": 1e-2}, "schedule": {"kind": "cosine", "warmup": 2}, **train,
            },
            "stages": list(stages),
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_config(path, (f"out={tmp_path / name}", *overrides))

    return config


class Said(Unwatched):
    """Keeps events."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def event(self, text: str) -> None:
        self.said.append(text)


class Stopping(Trainer):
    """Stops after step `stop`."""

    stop = 0

    def _agree(self, stage: Stage, batches: list[PackedBatch], error: Any) -> Counted:
        if self.progress.step + 1 == self.stop:
            self.signals.seen = 2
        return super()._agree(stage, batches, error)


def run(config: RunConfig, resume: bool = False, stop: int = 0) -> list[str]:
    """The run's events."""
    watcher = Said()
    trainer = Stopping(config, watcher)
    if stop:
        trainer.stop = stop
        with pytest.raises(Interrupted):
            trainer.run(resume)
    else:
        trainer.run(resume)
    return watcher.said


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    found = checkpoint.find(folder)
    described = checkpoint.open_reader(found).tensors
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described.items()}
    checkpoint.load(found, tensors)
    return tensors


def column(config: RunConfig, key: str, after: int = 0) -> list[Any]:
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    return [row[key] for row in rows if row["step"] > after]


def assert_same(a: RunConfig, b: RunConfig, after: int = 0) -> None:
    one, other = saved(Path(a.out)), saved(Path(b.out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for key in ("step", "lr", "loss", "tokens", "grad_norm"):
        assert column(a, key, after) == column(b, key, after), key


OPTIMIZERS = [
    {"kind": "adamw", "lr": 1e-2},
    {"kind": "muon", "lr": 1e-2},
    {"kind": "sophia", "lr": 1e-3, "every": 2},
    {"kind": "soap", "lr": 1e-2, "every": 2},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: one["kind"])
def test_stages_that_keep_the_optimizer_are_one_run(configured: Configured, optimizer: dict[str, Any]) -> None:
    """Weights, moments and averages; and stopped in either stage, and between them."""
    settings = {"optimizer": optimizer, "ema": 0.9}
    one = configured("one", "train.max_steps=7", **settings)
    run(one)
    parts = configured("parts", stages=[FIRST, GO_ON], **settings)
    run(parts, stop=2)
    run(parts, resume=True, stop=3)
    run(parts, resume=True, stop=5)
    run(parts, resume=True)
    assert_same(one, parts)


def test_a_schedule_is_over_all_stages_that_keep_it(configured: Configured) -> None:
    """Other rows and lengths of rows, and data from their beginning: the rate goes on, and so do the moments."""
    small = {**GO_ON, "carry_on": False, "data": {"context_length": 32}, "train": {"max_steps": 4, "batch_tokens": 128}}
    config = configured("run", stages=[FIRST, small])
    said = run(config)
    schedule, lr = config.train.schedule, config.train.optimizer.lr
    assert column(config, "lr") == [lr * schedule.factor(step, 7) for step in range(7)]
    tensors = saved(Path(config.out))
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")} == {7}
    assert any("the moments of 12 parameters go on" in text and "start anew" not in text for text in said)


def test_without_it_both_begin_anew(configured: Configured) -> None:
    config = configured("run", stages=[FIRST, {**GO_ON, "keep_optimizer": False}])
    run(config)
    schedule, lr = config.train.schedule, config.train.optimizer.lr
    assert column(config, "lr")[3:] == [lr * schedule.factor(step, 4) for step in range(4)]
    assert {float(one) for name, one in saved(Path(config.out)).items() if name.endswith(".step")} == {4}


def test_rewarming_keeps_moments_alone(configured: Configured) -> None:
    config = configured("run", stages=[FIRST, {**GO_ON, "rewarm": True}])
    run(config)
    schedule, lr = config.train.schedule, config.train.optimizer.lr
    expected = [schedule.factor(step, 3) for step in range(3)] + [schedule.factor(step, 4) for step in range(4)]
    assert column(config, "lr") == [lr * factor for factor in expected]
    assert {float(one) for name, one in saved(Path(config.out)).items() if name.endswith(".step")} == {7}


def test_new_parameters_start_anew_and_that_is_said(configured: Configured) -> None:
    """What was frozen, and what has another shape."""
    frozen = {**FIRST, "train": {"max_steps": 3, "params": [{"match": ".*embed_tokens.*", "freeze": True}]}}
    wider = {**GO_ON, "model": {"language": {"config": {"intermediate_size": 48}}}}
    config = configured("run", stages=[frozen, {**wider, "convert": "test_stage_continuity:widened"}])
    (said,) = [text for text in run(config) if "moments of" in text]
    assert "the moments of 8 parameters go on" in said and "; 4 start anew: " in said
    counts = {name: float(one) for name, one in saved(Path(config.out)).items() if name.endswith(".step")}
    new = {name for name, steps in counts.items() if steps == 4}
    assert len(new) == 4 and all("embed_tokens" in name or "mlp" in name for name in new)
    assert {steps for name, steps in counts.items() if name not in new} == {7}


def widened(tensors: dict[str, Tensor], system: torch.nn.Module) -> dict[str, Tensor]:
    """A wider feed-forward layer: its numbers, and zeros."""
    own = system.state_dict()
    grown = {name: torch.zeros_like(own[name]) for name in tensors}
    for name, tensor in tensors.items():
        grown[name][tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


HUTCHINSON = {"kind": "sophia", "estimator": "hutchinson"}
WRONG = [
    ([{**FIRST, "keep_optimizer": True}], r"stages\.0\.keep_optimizer: there is no stage before whose optimizer"),
    ([FIRST, {**GO_ON, "keep_optimizer": False, "rewarm": True}], r"stages\.1\.rewarm: the schedule begins anew"),
    (
        [FIRST, {**GO_ON, "train": {"max_steps": 4, "schedule": {"kind": "constant"}}}],
        r"stages\.1\.train\.schedule: is another than in the stage before: with rewarm it begins anew",
    ),
    (
        [FIRST, {**GO_ON, "train": {"max_steps": 4, "optimizer": {"kind": "sophia"}}}],
        r"stages\.1\.train\.optimizer: sophia cannot go on with the moments of adamw",
    ),
    (
        [FIRST, {**GO_ON, "train": {"max_steps": 4, "lora": [{"match": ".*q_proj"}]}}],
        r"stages\.1\.keep_optimizer: adapters are merged between stages",
    ),
    ([{**FIRST, "train": {"max_steps": 1}}, FIRST], r"train\.schedule\.warmup: 2 steps are more than the schedule's 1"),
    (
        [
            {**FIRST, "train": {"max_steps": 3, "optimizer": {"kind": "soap"}}},
            {**GO_ON, "train": {"max_steps": 4, "optimizer": {"kind": "soap", "block": 8}}},
        ],
        r"stages\.1\.train\.optimizer\.block: is 8, the moments of the stage before are of None",
    ),
    ([FIRST, {**GO_ON, "train": {"max_steps": 4, "init_from": "x"}}], r"stages\.1\.train\.init_from: is for the begin"),
    (
        [FIRST, {"name": "finer", "train": {"max_steps": 4, "precision": "bf16", "optimizer": HUTCHINSON}}],
        r"train\.optimizer\.estimator: hutchinson takes small differences",
    ),
]
DEEPSPEED = [
    (
        [FIRST, {"name": "muon", "train": {"max_steps": 4, "optimizer": {"kind": "muon"}}}],
        "muon under deepspeed: it works",
    ),
    (
        [FIRST, {**GO_ON, "convert": "test_stage_continuity:widened"}],
        r"stages\.1\.keep_optimizer: deepspeed loads moments",
    ),
]


@pytest.mark.parametrize(("stages", "words"), WRONG)
def test_what_cannot_go_on_is_refused(configured: Configured, stages: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured("run", stages=stages)


@pytest.mark.parametrize(("stages", "words"), DEEPSPEED)
def test_what_deepspeed_cannot_is_refused_before_a_stage_trains(
    configured: Configured, stages: list[Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        configured("run", "train.engine={kind: deepspeed}", stages=stages)


def test_a_warm_up_may_be_longer_than_its_first_stage(configured: Configured) -> None:
    configured("run", stages=[{**FIRST, "train": {"max_steps": 1}}, GO_ON])


SCHEDULES = [
    (INFINITE, (1, 3, 5, 8)),
    ({"kind": "wsd", "warmup": 2, "decay": 4}, (1, 4, 8)),
    ({"kind": "cosine", "warmup": 1, "cycles": 3}, (2, 5)),
]


@pytest.mark.parametrize(("schedule", "stops"), SCHEDULES, ids=["infinite", "wsd", "cosine"])
def test_resumed_in_every_phase(configured: Configured, schedule: dict[str, Any], stops: tuple[int, ...]) -> None:
    settings = ("train.max_steps=10", "train.save_every=100")
    whole, parts = (configured(name, *settings, schedule=schedule) for name in ("whole", "parts"))
    run(whole)
    for stop in stops:
        run(parts, resume=True, stop=stop)
    run(parts, resume=True)
    assert_same(whole, parts)
    lr = whole.train.optimizer.lr
    assert column(whole, "lr") == [lr * whole.train.schedule.factor(step, 10) for step in range(10)]
    longer = configured("parts", "train.max_steps=11", "train.save_every=100", schedule=schedule)
    if schedule["kind"] == "wsd":
        with pytest.raises(
            ConfigError, match="would change the rate of step 9, and 10 have been taken; let it fall at"
        ):
            run(longer, resume=True)
    else:  # a decay over all steps is stretched
        run(longer, resume=True)
        assert column(longer, "lr")[10:] == [lr * longer.train.schedule.factor(10, 11)]


TRUNK = {**INFINITE, "anneal": None}


@pytest.fixture
def trunk(configured: Configured, tmp_path: Path, texts: Path) -> Path:
    """A run of 6 steps of a constant rate, with checkpoints of every second; the same in every test."""
    made = texts / "trunk"
    if not made.exists():
        run(configured("trunk", "train.max_steps=6", "train.keep=10", schedule=TRUNK))
        shutil.copytree(tmp_path / "trunk", made)
    return made


def test_a_branch_without_changes_is_the_run_itself(configured: Configured, trunk: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(trunk.rglob("*")) if path.is_file()}
    start = trunk / "checkpoints/step-00000004"
    branch = configured("branch", "train.max_steps=6", f"train.branch={start}", schedule=TRUNK)
    said = run(branch)
    assert f"branching off from {start} after step 4" in said
    one, other = saved(trunk), saved(Path(branch.out))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = read_metrics(trunk / "metrics.jsonl")[4:]
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == list(
        zip(*(column(branch, key) for key in ("step", "loss", "lr")), strict=True)
    )
    assert {path: path.read_bytes() for path in sorted(trunk.rglob("*")) if path.is_file()} == before


def test_annealing_is_a_branch(configured: Configured, trunk: Path) -> None:
    """From any saved point, in steps of its own, stopped and resumed; and a branch of a branch."""
    config = configured(
        "annealed", "train.max_steps=7", f"train.branch={trunk / 'checkpoints/step-00000004'}",
        schedule={**TRUNK, "anneal": {"at": 4, "steps": 3}},
    )  # fmt: skip
    run(config, stop=5)
    run(config, resume=True)
    lr = config.train.optimizer.lr
    assert column(config, "lr") == pytest.approx([lr * 0.5 * (0.01 / 0.5) ** (n / 3) for n in range(3)], rel=1e-12)
    once = configured(
        "once", "train.max_steps=7", f"train.branch={trunk / 'checkpoints/step-00000004'}",
        schedule={**TRUNK, "anneal": {"at": 4, "steps": 3}},
    )  # fmt: skip
    run(once)
    assert_same(config, once)
    further = (f"train.branch={once.out}",)
    schedule = once.train.schedule.model_dump()
    with pytest.raises(ConfigError, match=r"step-00000007 is the end of that run; raise train\.max_steps to go on"):
        run(configured("end", "train.max_steps=7", *further, schedule=schedule))
    longer = configured("end", "train.max_steps=8", *further, schedule=schedule)
    run(longer)
    assert column(longer, "lr") == [lr * 0.01]


def test_annealing_may_be_set_when_resuming_but_not_in_the_past(
    configured: Configured, trunk: Path, tmp_path: Path
) -> None:
    shutil.copytree(trunk, tmp_path / "resumed")
    late = configured("resumed", "train.max_steps=9", schedule={**TRUNK, "anneal": {"at": 4, "steps": 5}})
    with pytest.raises(ConfigError, match="would change the rate of step 5, and 6 have been taken"):
        run(late, resume=True)
    config = configured("resumed", "train.max_steps=9", schedule={**TRUNK, "anneal": {"at": 6, "steps": 3}})
    run(config, resume=True, stop=8)
    longer = configured("resumed", "train.max_steps=10", schedule={**TRUNK, "anneal": {"at": 6, "steps": 4}})
    with pytest.raises(ConfigError, match="would change the rate of step 7, and 8 have been taken"):
        run(longer, resume=True)
    run(config, resume=True)
    lr = config.train.optimizer.lr
    assert column(config, "lr")[6:] == pytest.approx([lr * 0.5 * (0.01 / 0.5) ** (n / 3) for n in range(3)], rel=1e-12)


class Killed(Said):
    """Ends the process, as it were, when the first step is logged."""

    def step(self, row: dict[str, Any], steps: int) -> None:
        raise KeyboardInterrupt


def test_what_a_branch_may_change(configured: Configured, trunk: Path, texts: Path, tmp_path: Path) -> None:
    trunk = shutil.copytree(trunk, tmp_path / "used")
    start = trunk / "checkpoints/step-00000006"
    state = json.loads((start / "state.json").read_text())
    state["progress"] |= {"best": 0.1, "stale": 2, "bad": [["id", "reason"]], "offending": [5]}
    (start / "state.json").write_text(json.dumps(state))
    branch = f"train.branch={trunk}"
    with pytest.raises(CheckpointError, match=r"train\.branch: .*step-00000006 is of a run with another train\.cl"):
        run(configured("no", "train.max_steps=8", branch, "train.clip_norm=2", schedule=TRUNK))
    others = f"data.sources=[{{kind: text, name: others, path: {texts / 'others.jsonl'}}}]"
    changed = ("train.max_steps=8", branch, others, "data.context_length=32", "train.batch_tokens=128")
    with pytest.raises(CheckpointError, match=r"another data\.context_length.*as there, or train\.branch_data=anew"):
        run(configured("no", *changed, schedule=TRUNK))
    config = configured(
        "yes", *changed, "train.branch_data=anew", "data.mixture.max_epochs={others: 50%}", schedule=TRUNK
    )
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, Killed()).run()
    (trunk / "checkpoints/latest").write_text("step-00000004")  # the other run goes on; this one stays where it began
    said = run(config, resume=True)
    assert f"branching off from {start} after step 6" in said and "the data begin anew" in said
    about = json.loads((config.out / "run.json").read_text())
    assert about["branch"] == {"checkpoint": str(start), "step": 6, "stage": 0, "stage_step": 6}
    assert column(config, "step") == [7, 8]
    once, twice = column(config, "epoch")
    assert twice == pytest.approx(2 * once, rel=1e-2), "of these data"
    state = checkpoint.read_state(checkpoint.find(Path(config.out)))
    assert state["loader"]["step"] == 2 and set(state["loader"]["mixture"]["sources"]) == {"others"}
    of_the_other = {key: state["progress"][key] for key in ("best", "stale", "bad", "offending")}
    assert of_the_other == {"best": None, "stale": 0, "bad": [], "offending": []}
    assert {float(one) for name, one in saved(Path(config.out)).items() if name.endswith(".step")} == {8}
    with pytest.raises(
        ConfigError, match=r"train\.branch_data: anew is for a run with train\.branch; name .*"
    ) as error:
        configured("no", "train.branch_data=anew", stages=[FIRST, GO_ON])
    assert len(str(error.value).splitlines()) == 1, "once for all stages"
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with one"):
        run(configured("nowhere", "train.max_steps=8", "train.branch=nowhere", schedule=TRUNK))


def test_steps_on_the_data_of_another_run_take_no_packs() -> None:
    train = TrainConfig(max_steps=8)
    assert count_steps(train, 10, 4, 10, other_data=6) == 8
    with pytest.raises(ConfigError, match=r"max_steps 8 takes 12 packs, .* 4 of them in stages before: set at most 7 "):
        count_steps(train, 10, 4, 10, first=4, other_data=5)
    assert count_steps(TrainConfig(epochs=2), None, 4, 10, other_data=6) == 6 + 5
    assert count_steps(TrainConfig(epochs=1.1), None, 1, 10) == 11


def test_a_branch_in_the_second_stage(configured: Configured, texts: Path) -> None:
    staged = configured("staged", "train.keep=9", stages=[FIRST, GO_ON])
    run(staged)
    branch = configured(
        "branch", f"train.branch={staged.out / 'checkpoints/step-00000006'}", stages=[FIRST, GO_ON],
    )  # fmt: skip
    run(branch)
    assert column(branch, "step") == [7]
    assert_same(staged, branch, after=6)
    # Where the first stage ends: the data may go on, or begin anew, and the schedule goes on from there.
    end = f"train.branch={staged.out / 'checkpoints/step-00000003'}"
    others = f"data.sources=[{{kind: text, name: others, path: {texts / 'others.jsonl'}}}]"
    finite = (others, "data.mixture.max_epochs={others: 1}", "train.branch_data=anew")
    anew = configured("anew", end, *finite, stages=[FIRST, GO_ON])
    assert "the data begin anew" in run(anew)
    state = checkpoint.read_state(checkpoint.find(anew.out))
    assert state["loader"]["step"] == 4 and set(state["loader"]["mixture"]["sources"]) == {"others"}
    words = r"train\.max_steps \(or epochs\) of a stage up to {}: is another than when it ended"
    for name, length, number, *settings in (("staged", 4, "go on"), ("shorter", 2, "first", end)):
        changed = configured(name, "train.keep=9", *settings, stages=[{**FIRST, "train": {"max_steps": length}}, GO_ON])
        with pytest.raises(ConfigError, match=words.format(number)):
            run(changed, resume=True)


def test_another_runs_moments(configured: Configured) -> None:
    """`init_from` with `init_optimizer` is a stage that keeps the optimizer and re-warms."""
    undropped = ("model.language.config.attention_dropout=0",)  # what dropout draws goes by the run's step
    rewarm = {**GO_ON, "carry_on": False, "rewarm": True}
    staged = configured("staged", *undropped, stages=[FIRST, rewarm])
    run(staged)
    first = configured("first", *undropped, "train.max_steps=3")
    run(first)
    second = configured("second", *undropped, "train.max_steps=4", f"train.init_from={first.out}", init_optimizer=True)
    run(second, stop=2)
    run(second, resume=True)
    one, other = saved(Path(staged.out)), saved(Path(second.out))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert column(staged, "loss", after=3) == column(second, "loss")
    muon = {"kind": "muon", "lr": 1e-2}
    other = configured(
        "other", "train.max_steps=4", f"train.init_from={first.out}", init_optimizer=True, optimizer=muon
    )
    with pytest.raises(
        ConfigError, match=r"train\.init_optimizer: muon cannot go on with the moments of adamw in .*first"
    ):
        run(other)
    with pytest.raises(ConfigError, match=r"train\.init_optimizer: there is no train\.init_from"):
        configured("no", "train.max_steps=4", init_optimizer=True)
    with pytest.raises(ConfigError, match=r"train\.init_optimizer: adapters are new in every run"):
        configured(
            "no", "train.max_steps=4", "train.lora=[{match: '.*q_proj'}]", f"train.init_from={first.out}",
            init_optimizer=True,
        )  # fmt: skip


SOAP = {"kind": "soap", "lr": 1e-2}
EMBEDDING = [{"match": ".*mlp.*", "role": "embedding"}]
UNLIKE = [
    ({"kind": "muon", "lr": 1e-2}, {"params": EMBEDDING}, "mlp", 2),
    (SOAP, {"optimizer": {**SOAP, "max_precond_dim": 24}}, "mlp", 1),  # the first gradient makes its state
]


@pytest.mark.parametrize(("optimizer", "changed", "where", "steps"), UNLIKE, ids=["muon", "soap"])
def test_moments_of_another_algorithm_start_anew(
    configured: Configured, optimizer: dict[str, Any], changed: dict[str, Any], where: str, steps: int
) -> None:
    """Of another role, and in other bases; what is alike goes on."""
    first = configured("first", "train.max_steps=2", optimizer=optimizer)
    run(first)
    settings = ("train.max_steps=2", f"train.init_from={first.out}")
    second = configured("second", *settings, **{"optimizer": optimizer, "init_optimizer": True, **changed})
    (said,) = [text for text in run(second) if "moments of" in text]
    assert "the moments of 9 parameters go on" in said and f"; 3 start anew: language.model.layers.0.{where}" in said
    counts = {name: float(one) for name, one in saved(second.out).items() if name.endswith(".step")}
    assert {count for name, count in counts.items() if where in name} == {steps}
    assert all(count > steps for name, count in counts.items() if where not in name)


def train(config: RunConfig, resume: bool = False) -> str:
    try:
        Trainer(config, Unwatched()).run(resume)
    except ConfigError as error:
        return str(error)
    return ""


def test_two_ranks_under_fsdp(configured: Configured, ranks: Ranks) -> None:
    settings = ("train.engine={kind: fsdp}", "train.micro_batch=1")
    one = configured("one", "train.max_steps=6", "train.keep=9", *settings)
    parts = configured("parts", *settings, stages=[FIRST, {**GO_ON, "train": {"max_steps": 3}}])
    start = f"train.branch={one.out / 'checkpoints/step-00000004'}"
    branch = configured("branch", "train.max_steps=6", *settings, start)
    for config in (one, parts, branch):
        assert ranks.run(train, 2, config) == ["", ""]
    assert_same(one, parts)
    assert_same(one, branch, after=4)


def test_two_ranks_under_deepspeed(configured: Configured, ranks: Ranks) -> None:
    """It has one count of steps for all parameters of a flat tensor: all go on, or none."""
    settings = ("train.engine={kind: deepspeed, stage: 2}", "train.micro_batch=1")
    one = configured("one", "train.max_steps=5", *settings)
    parts = configured("parts", *settings, stages=[FIRST, {**GO_ON, "train": {"max_steps": 2}}])
    for config in (one, parts):
        assert ranks.run(train, 2, config) == ["", ""]
    assert_same(one, parts)
    frozen = {**FIRST, "train": {"max_steps": 1, "params": [{"match": ".*embed_tokens.*", "freeze": True}]}}
    new = configured("new", *settings, "train.schedule.warmup=1", stages=[frozen, GO_ON])
    words = "takes over the moments of all trained parameters or of none: language.model.embed_tokens.weight has none"
    assert all(words in said for said in ranks.run(train, 2, new))
