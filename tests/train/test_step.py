"""The step's seams: objectives over all items of a step, optimizers with extra passes, and with whole matrices.

The oracle is one batch of all rows and plain autograd; the step must give the same however it is split.
"""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from ranks import Ranks
from test_engines import LAYOUT, LENGTH, MODEL, batches, rows, whole_parameters
from torch import Tensor, nn

from mm.data.batch import MODALITIES, PackedBatch, collate
from mm.data.sample import keyed_seed
from mm.errors import ConfigError
from mm.models import backbone
from mm.models.system import ALL, Output, PooledSystem, System
from mm.settings import KindSection
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.params import parameter_groups
from mm.train.step import ExtraPass, Passes, Stepper, count, counted

FSDP = {"kind": "fsdp"}
SPLITS = [(1, 2, {}), (1, 4, {}), (1, 1, FSDP), (2, 1, FSDP), (2, 2, FSDP), (2, 2, {**FSDP, "shard_size": 1})]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Recorder(torch.optim.SGD):
    """Keeps the last step's gradients, whole, by name."""

    def step(self, closure: Any = None) -> None:
        self.gradients = {
            name: whole(parameter.grad).clone().numpy()
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.grad is not None
        }
        super().step()


class RecorderConfig(KindSection):
    kind: str = "test_step:RecorderConfig"
    lr: float = 0.1
    weight_decay: float = 0.0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Recorder(groups, lr=self.lr)


def run_steps(
    build: Any,
    kind: str,
    micro_batches: int,
    engine: dict[str, Any],
    optimizer: str | dict[str, Any] = "Recorder",
    steps: int = 1,
) -> dict[str, Any]:
    """Some steps on this rank's share of the eight rows, through the trainer's own step."""
    section = {"kind": f"test_step:{optimizer}Config"} if isinstance(optimizer, str) else optimizer
    train = TrainConfig.model_validate({"device": "cpu", "engine": engine, "optimizer": section, "clip_norm": None})
    world = World.from_environment()
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        one.prepare(build(), lambda system: parameter_groups(system, [], 0.0), micro_batches)
        stepper = Stepper(one, LAYOUT, Guard(train.guard), 0, None, ["s"])
        losses, gradients, shares = [], [], []
        for step in range(steps):
            mine = batches(kind, world, micro_batches)
            totals = counted(one.system, world.sum(count(one.system, mine, ["s"])), ["s"])
            losses.append(stepper(mine, totals, step, train.optimizer.lr).loss)
            gradients.append(getattr(one.optimizer, "gradients", None))
            shares.append(stepper.shares())
        found = {name: whole(tensor).clone().numpy() for name, tensor in one.tensors().items()}
        return {
            "losses": losses,
            "gradients": gradients,
            "shares": shares,
            "state": getattr(one.optimizer, "squares", None)
            or {name.removeprefix("optimizer."): value for name, value in found.items() if name[0] == "o"},
            "parameters": whole_parameters(one),
        }
    finally:
        one.close()
        world.stop()


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Relative, over all parameters together."""
    assert found.keys() == expected.keys()
    square = sum(float(np.square(found[name] - value).sum()) for name, value in expected.items())
    return math.sqrt(square / sum(float(np.square(value).sum()) for value in expected.values()))


class TwoTowers(PooledSystem):
    """Contrastive alone: pictures against the mean of their captions' words."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weights = {"contrastive": 2.0}
        self.vision = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.GELU(), nn.Dropout(dropout))
        self.words = nn.Embedding(len(LAYOUT.tokenizer), 16)
        self.scale = nn.Parameter(torch.ones(1))

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        media = batch.media.get("image")
        return {"contrastive": torch.tensor(0 if media is None or media.dummy else len(media))}

    def forward(self, batch: PackedBatch) -> Output:
        words = self.words(batch.input_ids)
        counts = self.counts(batch)
        n = int(counts["contrastive"])
        if "image" not in batch.media:
            empty = words.flatten(0, 1)[:0]
            return Output({}, counts, features={"image": empty, "text": empty, "scale": self.scale[:0]})
        media = batch.media["image"]
        row, position = media.row[:n], media.position[:n]
        own = batch.segment_ids[row] == batch.segment_ids[row, position][:, None]
        own &= batch.modality[row] == MODALITIES["text"]
        text = torch.einsum("nl,nld->nd", own.float(), words[row])
        features = {"image": self.vision(media.stacked())[:n], "text": text}
        features = {name: F.normalize(value, dim=-1) for name, value in features.items()}
        return Output({}, counts, features={**features, "scale": self.scale.exp().expand(n)})

    def pooled_losses(self, features: dict[str, Tensor], own: slice = ALL) -> dict[str, Tensor]:
        image, text, scale = features["image"], features["text"], features["scale"][:, None]
        target = torch.arange(len(image))[own]
        logits = scale[own] * image[own] @ text.T, text[own] @ (scale * image).T
        both = [F.cross_entropy(one, target, reduction="sum") for one in logits]
        return {"contrastive": (both[0] + both[1]) / 2}


def contrastive_oracle(kind: str, dropout: float = 0.0) -> tuple[float, dict[str, np.ndarray]]:
    """All pairs in one batch, open_clip's loss, autograd."""
    torch.manual_seed(0)
    system = TwoTowers(dropout)
    batch = collate(rows(kind), LAYOUT, LENGTH)
    torch.manual_seed(keyed_seed(0, "dropout", 0, 0))
    features = system(batch).features
    loss = 2.0 * ClipLoss()(features["image"], features["text"], system.scale.exp())
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in system.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks_,micro_batches,engine", SPLITS)
@pytest.mark.parametrize("kind", ["image", "mixed"])  # of `mixed` the first ranks and micro-batches have no pair
def test_a_contrastive_objective_is_over_all_pairs_of_the_step(
    kind: str, ranks_: int, micro_batches: int, engine: dict[str, Any], ranks: Ranks
) -> None:
    loss, expected = contrastive_oracle(kind)
    for found in ranks.run(run_steps, ranks_, TwoTowers, kind, micro_batches, engine):
        assert found["losses"] == [pytest.approx(loss, rel=1e-6)]
        assert distance(found["gradients"][0], expected) < 1e-6


def test_both_passes_of_a_contrastive_step_drop_the_same() -> None:
    loss, expected = contrastive_oracle("image", dropout=0.5)
    found = run_steps(lambda: TwoTowers(0.5), "image", 1, {})
    assert found["losses"] == [pytest.approx(loss, rel=1e-6)]
    assert distance(found["gradients"][0], expected) < 1e-6


class Fisher(Recorder):
    """Adds up squared gradients of losses on labels drawn from the model itself, as Sophia-G does (2305.14342)."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr)
        self.squares: dict[str, np.ndarray] = {}

    def check(self, engine: Any) -> None:
        assert engine.system.drawn

    def due(self, step: int) -> bool:
        return step % 2 == 0

    def extra(self, passes: Passes) -> None:
        count = passes.drawn()
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    square = count * whole(parameter.grad).square().numpy()
                    self.squares[name] = self.squares.get(name, 0) + square

    def shares(self) -> dict[str, Tensor]:
        return {}


class FisherConfig(RecorderConfig):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Fisher(groups, lr=self.lr)


def model() -> System:
    return MODEL.build()


def model_with_dropout() -> System:
    language = {**MODEL.language.config, "attention_dropout": 0.3}
    changed = MODEL.language.model_copy(update={"config": language})
    return MODEL.model_copy(update={"language": changed}).build()


@pytest.mark.parametrize("ranks_,micro_batches,engine", SPLITS)
def test_an_extra_pass_is_the_same_however_the_step_is_split(
    ranks_: int, micro_batches: int, engine: dict[str, Any], ranks: Ranks, extra_reference: dict[str, Any]
) -> None:
    for found in ranks.run(run_steps, ranks_, model, "mixed", micro_batches, engine, "Fisher", 3):
        assert distance(found["state"], extra_reference["state"]) < 1e-5
        assert distance(found["parameters"], extra_reference["parameters"]) < 1e-6


@pytest.fixture(scope="module")
def extra_reference() -> dict[str, Any]:
    return run_steps(model, "mixed", 1, {}, "Fisher", 3)


def test_an_extra_pass_is_the_gradient_of_drawn_labels(extra_reference: dict[str, Any]) -> None:
    """Of the first step, after its update: labels drawn by a loop over rows, and autograd."""
    assert isinstance(Fisher([{"params": [nn.Parameter(torch.zeros(1))], "names": ["x"]}], 0.1), ExtraPass)
    found = run_steps(model, "mixed", 1, {}, "Fisher", 1)
    torch.manual_seed(0)
    system = model()
    system.load_state_dict({name: torch.from_numpy(value) for name, value in found["parameters"].items()}, strict=False)
    total, loss = 0, torch.zeros(())
    for pack in rows("mixed"):
        batch = collate([pack], LAYOUT, LENGTH)
        generator = torch.Generator().manual_seed(keyed_seed(0, "extra", 0, batch.ids[0]))
        keep = batch.learned()
        where = batch.segment_ids, batch.position_ids
        logits = backbone.run(system.language, system.embed(batch), *where, keep, True)
        noise = torch.empty_like(logits).exponential_(generator=generator)
        drawn = (logits.detach().softmax(-1) / noise).argmax(-1)  # as torch.multinomial does
        loss = loss + F.cross_entropy(logits, drawn, reduction="sum")
        total += len(keep)
    (loss / total).backward()
    expected = {n: total * p.grad.square().numpy() for n, p in system.named_parameters() if p.grad is not None}
    assert distance(found["state"], expected) < 1e-5


def test_an_extra_pass_does_not_disturb_the_steps() -> None:
    """With dropout, bit for bit."""
    plain = run_steps(model_with_dropout, "image", 2, {}, "Recorder", 3)
    extra = run_steps(model_with_dropout, "image", 2, {}, "Fisher", 3)
    assert extra["losses"] == plain["losses"] and extra["state"]
    for one, other in zip(extra["gradients"], plain["gradients"], strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("share,number,expected", [(0.07, 100, 7), (0.7, 10, 7), (0.71, 10, 8), (1e-10, 4, 1)])
def test_a_share_of_micro_batches_is_rounded_up(share: float, number: int, expected: int) -> None:
    """From what it is, and not from 0.07 * 100 = 7.000000000000001."""
    passes = Passes(cast(Stepper, None), [cast(PackedBatch, n) for n in range(number)], 0)
    assert passes.first(share).batches == [*range(expected)]


class Whole(torch.optim.SGD):
    """Updates of spectral norm 1: it needs whole matrices, as Muon and SOAP do, and changes the part that it holds."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad = whole(parameter.grad)
                if grad.ndim == 2:
                    grad = grad / torch.linalg.matrix_norm(grad, 2)
                parameter.sub_(part(grad, parameter), alpha=group["lr"])


def part(tensor: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(like, DTensor):
        return tensor
    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False).redistribute(
        placements=like.placements
    )


class WholeConfig(RecorderConfig):
    lr: float = 0.01

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Whole(groups, lr=self.lr)


@pytest.mark.parametrize("ranks_,engine", [(2, FSDP), (2, {**FSDP, "shard_size": 1})])
def test_an_optimizer_may_work_on_whole_matrices(ranks_: int, engine: dict[str, Any], ranks: Ranks) -> None:
    expected = run_steps(TwoTowers, "image", 1, {}, "Whole", 3)
    for found in ranks.run(run_steps, ranks_, TwoTowers, "image", 1, engine, "Whole", 3):
        assert distance(found["parameters"], expected["parameters"]) < 1e-6


def test_deepspeed_takes_no_extra_passes() -> None:
    with pytest.raises(ConfigError, match="extra passes"):
        run_steps(model, "text", 1, {"kind": "deepspeed", "stage": 0}, "FisherAdam", 1)


class FisherAdam(torch.optim.AdamW):
    check, due, extra, shares = Fisher.check, Fisher.due, Fisher.extra, Fisher.shares


class FisherAdamConfig(RecorderConfig):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return FisherAdam(groups, lr=self.lr)
