"""Sophia against the released arithmetic, closed forms of the curvature, and itself, however a step is split.

Toys are systems whose loss depends on their weights alone, so that the trainer's own step runs them.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import music_run
import numpy as np
import pytest
import tiny_moma
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from ranks import Ranks
from test_engines import LAYOUT, LENGTH, MODEL, batches, rows
from test_step import FSDP, TwoTowers, distance, model, model_with_dropout, run_steps
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from whole_runs import StopAt

from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch, collate, select_rows, with_dummies
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Media, Part, Text
from mm.data.tokens import make_segment
from mm.errors import ConfigError
from mm.models.objectives import DRAWN, draw_labels, drawn_errors, linear_cross_entropy_losses
from mm.models.system import Output, System
from mm.models.systems.joint.config import JointConfig
from mm.train import checkpoint
from mm.train.checkpoint import create_optimizer_state, optimizer_tensors
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.estimate import estimate
from mm.train.guard import Guard
from mm.train.metrics import read_metrics
from mm.train.optim.config import SophiaConfig
from mm.train.optim.sophia import BLOCK, Sophia, _signs, compiled, update
from mm.train.params import parameter_groups
from mm.train.signals import Interrupted
from mm.train.step import Passes, Stepper, count, counted
from mm.train.trainer import Trainer, Unwatched

SOPHIA = {"kind": "sophia", "lr": 1e-3, "every": 2}
STILL = {"kind": "sophia", "lr": 1e-12, "every": 2}
"""Weights stay what they are: a sign makes of a gradient that is zero but for rounding a step like any other."""
SPLITS = [(1, 4, {}), (2, 1, FSDP), (2, 2, {**FSDP, "shard_size": 1}), (3, 1, FSDP)]


def sophia(parameters: list[nn.Parameter], **settings: Any) -> Sophia:
    """As a run makes it."""
    names = [str(number) for number in range(len(parameters))]
    config = SophiaConfig(**settings)
    group = {"params": parameters, "names": names, "lr_scale": 1.0, "weight_decay": config.weight_decay}
    return Sophia([group], config)


class Toy(System):
    """A function of a point, whatever the batch."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
        super().__init__()
        self.weights = {"loss": 1.0}
        self.function, self.point = function, nn.Parameter(start.clone())

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        return {"loss": torch.tensor(1)}

    def forward(self, batch: PackedBatch) -> Output:
        return Output({"loss": self.function(self.point)}, self.counts(batch))


class Bench:
    """The trainer's step on one process, with the eight rows of text as its data."""

    def __init__(self, system: System, optimizer: dict[str, Any]) -> None:
        values = {"device": "cpu", "optimizer": optimizer, "clip_norm": None, "guard": {"sigmas": 0}}
        train = TrainConfig.model_validate(values)
        self.engine = train.engine.build(World(), train)
        decay = train.optimizer.weight_decay
        self.engine.prepare(system, lambda one: parameter_groups(one, [], decay), 1)
        self.stepper = Stepper(self.engine, LAYOUT, Guard(train.guard), 0, None, ["s"])
        self.batches = batches("text", World(), 1)
        self.totals = counted(system, count(system, self.batches, ["s"]), ["s"])

    def step(self, step: int, lr: float) -> float:
        return self.stepper(self.batches, self.totals, step, lr).loss

    def hessian(self, parameter: Tensor) -> Tensor:
        return self.engine.optimizer.state[parameter]["hessian"]


class Released:
    """The arithmetic of the released code (github.com/Liuhong99/Sophia, `sophia.py`), tensor by tensor."""

    def __init__(self, parameters: list[Tensor], decays: list[float], betas: tuple[float, float], rho: float) -> None:
        self.parameters, self.decays, self.betas, self.rho = parameters, decays, betas, rho
        self.exp_avg = [torch.zeros_like(one) for one in parameters]
        self.hessian = [torch.zeros_like(one) for one in parameters]

    def step(self, grads: list[Tensor], terms: int, lr: float) -> None:
        states = zip(self.parameters, self.exp_avg, self.hessian, self.decays, grads, strict=True)
        for theta, m, h, decay, grad in states:
            theta.mul_(1 - lr * decay)
            m.mul_(self.betas[0]).add_(grad, alpha=1 - self.betas[0])
            ratio = (m.abs() / (self.rho * terms * h + 1e-15)).clamp(max=1)
            theta.addcmul_(m.sign(), ratio, value=-lr)

    def update_hessian(self, grads: list[Tensor]) -> None:
        for h, grad in zip(self.hessian, grads, strict=True):
            h.mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])


class Linear(System):
    """Gradients that are given, those of the loss and those of drawn labels: losses are products with the weights."""

    def __init__(self, starts: list[Tensor], terms: int) -> None:
        super().__init__()
        self.weights, self.terms = {"loss": 1.0}, terms
        self.points = nn.ParameterList(starts)
        self.grads: list[Tensor] = []
        self.estimate: list[Tensor] = []

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        return {"loss": torch.tensor(self.terms)}

    def forward(self, batch: PackedBatch) -> Output:
        return Output({"loss": self._with(self.grads)}, self.counts(batch))

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("loss",)

    def drawn_losses(self, batch: PackedBatch, generators: Any) -> dict[str, Tensor]:
        return {"loss": self._with(self.estimate)}

    def _with(self, grads: list[Tensor]) -> Tensor:
        products = [(one * grad).sum() for one, grad in zip(self.points, grads, strict=True)]
        return self.terms * torch.stack(products).sum()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-7)])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_sixty_steps_are_those_of_the_released_arithmetic(
    dtype: torch.dtype, tolerance: float, limit: float | None
) -> None:
    generator, terms = torch.Generator().manual_seed(0), 512

    def drawn(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=dtype) * scale for shape in ((5, 7), (3,), (2, 3, 4))]

    starts = drawn(0.1)
    system = Linear([one.clone() for one in starts], terms)
    settings = {"rho": 0.01, "weight_decay": 0.2, "every": 10, "clip_estimate": limit}
    bench = Bench(system, {"kind": "sophia", **settings})
    theirs = Released([one.clone() for one in starts], [0.2, 0.0, 0.2], (0.965, 0.99), 0.01)
    unclipped = []
    for step in range(60):
        system.grads, system.estimate = drawn(0.1), drawn(0.15)
        lr = 1e-3 * (step + 1) / 60
        bench.step(step, lr)
        theirs.step(system.grads, terms, lr)
        if step % 10 == 9:
            norm = torch.stack([one.norm() for one in system.estimate]).norm()
            scale = 1 if limit is None else (limit / (norm + 1e-6)).clamp(max=1)
            theirs.update_hessian([scale * one for one in system.estimate])
        for parameter, expected in zip(system.points, theirs.parameters, strict=True):
            torch.testing.assert_close(parameter.data, expected, rtol=0, atol=tolerance)
        pairs = zip(theirs.exp_avg, theirs.hessian, strict=True)
        unclipped.append(sum(int((m.abs() < 0.01 * terms * h).sum()) for m, h in pairs) / 62)
        assert bench.stepper.shares() == ({"unclipped": pytest.approx(unclipped[-1])} if step % 10 == 9 else {})
    assert max(unclipped[:9]) == 0 and 0.1 < unclipped[-1] < 0.9, "signs first; then some of both"


def test_what_is_not_clipped_is_counted_where_an_estimate_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are logged one by one by default, and to count takes longer than a step."""
    bench = Bench(Toy(wavy, torch.ones(4)), {**HUTCHINSON, "every": 3})
    asked: list[int] = []
    monkeypatch.setattr(Sophia, "shares", lambda self: asked.append(step) or {})
    for step in range(7):
        bench.step(step, 0.01)
        bench.stepper.shares()
    assert asked == [2, 5]


def test_state_of_bfloat16_weights_is_float32() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = sophia([parameter], lr=0.25, weight_decay=0.0)
    parameter.grad = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16)
    optimizer.step()
    assert parameter.tolist() == [0.75, 1.25, 1.0]
    assert {key: value.dtype for key, value in optimizer.state[parameter].items()} == {
        "exp_avg": torch.float32, "hessian": torch.float32,
    }  # fmt: skip


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = sophia(parameters)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    assert parameters[1].tolist() == [1, 1] and parameters[1] not in optimizer.state


def test_a_step_with_a_rate_of_0_makes_all_state() -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    before, optimizer = parameter.detach().clone(), sophia([parameter])
    create_optimizer_state(optimizer, {"0"})
    assert torch.equal(parameter, before)
    assert {name: tensor.tolist() for name, tensor in optimizer_tensors(optimizer).items()} == {
        "0.exp_avg": [[0] * 4] * 3, "0.hessian": [[0] * 4] * 3,
    }  # fmt: skip


def test_the_kernel_and_the_blocks_are_equal_bit_for_bit() -> None:
    kernel = compiled("cpu")
    if kernel is None:
        pytest.skip("torch.compile has no compiler here")
    generator = torch.Generator().manual_seed(0)
    factors = torch.tensor([1 - 1e-4, 1e-3, 0.965, 1 - 0.965, 0.04])
    for size in (2, 17, 1000, BLOCK + 13):
        given = [torch.randn(size, generator=generator) for _ in range(4)]
        given[3] *= 30  # curvature of both signs, that clips some
        one, other = [[tensor.clone() for tensor in given] for _ in range(2)]
        kernel(*one, factors)
        update(*other, factors)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert not torch.equal(one[0], given[0])


def test_without_a_compiler_it_says_so_and_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(error: Exception) -> Callable[..., Any]:
        def kernel(*args: Any) -> None:
            raise error

        return lambda *args, **kwargs: kernel

    monkeypatch.setattr(torch, "compile", broken(InvalidCxxCompiler()))
    with pytest.warns(UserWarning, match=r"does not work on cpu \(No working C\+\+ compiler.*install a compiler"):
        assert compiled.__wrapped__("cpu") is None
    monkeypatch.setattr(torch, "compile", broken(TypeError("of our own")))
    with pytest.raises(TypeError, match="of our own"):
        compiled.__wrapped__("cpu")


def test_in_blocks_or_not_it_is_the_same() -> None:
    weight, grad = torch.randn(3, BLOCK - 5), torch.randn(3, BLOCK - 5)
    parameters = [nn.Parameter(weight.clone()), nn.Parameter(weight.T.contiguous().T)]  # of which one is not contiguous
    for parameter in parameters:
        parameter.grad = grad.clone()
    sophia(parameters).step()
    assert torch.equal(*parameters) and not torch.equal(parameters[0], weight)


def test_labels_are_drawn_from_the_softmax_and_by_rows() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(3 * DRAWN + 20, 4)
    lengths = [DRAWN + 7, 0, 2 * DRAWN + 13]

    def draw(counts: list[int], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw_labels(lambda part: logits[part], counts, generators)

    together = draw(lengths, [5, 6, 7])
    assert torch.equal(together, torch.cat([draw([one], [seed]) for one, seed in zip(lengths, [5, 6, 7], strict=True)]))
    assert torch.equal(torch.cat([together[lengths[0] :], together[: lengths[0]]]), draw(lengths[::-1], [7, 6, 5]))
    shares = logits[0].softmax(0)
    found = torch.stack([torch.bincount(draw([400], [seed]), minlength=4) for seed in range(50)]).sum(0)
    expected = shares * 400 * 50
    assert float(((found - expected) ** 2 / expected).sum()) < 16.3  # chi-square of 3 degrees of freedom, p = 0.001


def softmax_layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden [7, 3], weight [5, 3], labels [7], and the closed-form diagonal of the Gauss-Newton matrix of the mean
    loss, [5, 3]."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator)
    p = (hidden @ weight.T).softmax(-1)
    exact = torch.einsum("kv,kd->vd", p * (1 - p), hidden.square()) / len(hidden)
    labels = (hidden @ weight.T).argmax(-1)
    return hidden, weight, labels, exact


def estimate_on(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """n g^2 of the mean of n losses."""
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy_losses(hidden, leaf, None, labels).mean().backward()
    assert leaf.grad is not None
    return len(hidden) * leaf.grad.square()


def test_drawn_estimates_average_to_the_gauss_newton_diagonal_and_given_labels_do_not() -> None:
    hidden, weight, labels, exact = softmax_layer()
    generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    found = []
    for _ in range(3000):
        drawn = draw_labels(lambda part: hidden[part] @ weight.T, [3, 4], generators)
        found.append(estimate_on(hidden, weight, drawn))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / len(found) ** 0.5
    assert float(((mean - exact) / error).abs().max()) < 4
    assert float((error / exact).median()) < 0.04, "which is no empty statement"
    fisher = estimate_on(hidden, weight, labels)
    assert float(((fisher - exact) / error).abs().median()) > 8


def test_drawn_errors_average_to_the_gauss_newton_diagonal_of_a_mean_square() -> None:
    """Of a mean over D of (w x - t)^2, whose Gauss-Newton matrix is 2 / D x x^T."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(6, 3, generator=generator), torch.randn(4, 3, generator=generator)
    exact = (2 / 4 * hidden.square().mean(0)).expand(4, 3)
    found = []
    for _ in range(2000):
        leaf = weight.clone().requires_grad_()
        drawn_errors(hidden @ leaf.T, [2, 4], [generator, generator]).square().mean(1).mean().backward()
        assert leaf.grad is not None
        found.append(6 * leaf.grad.square())
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / len(found) ** 0.5
    assert float(((mean - exact) / error).abs().max()) < 4


@pytest.mark.parametrize("ranks_,micro_batches,engine", SPLITS)
def test_an_estimate_is_the_same_however_the_step_is_split(
    ranks_: int, micro_batches: int, engine: dict[str, Any], ranks: Ranks, reference: dict[str, Any]
) -> None:
    """Other draws would make an estimate of another size by far."""
    for found in ranks.run(run_steps, ranks_, model, "mixed", micro_batches, engine, STILL, 2):
        assert distance(hessians(found), hessians(reference)) < 1e-6
        # A coordinate at the border may fall on either side.
        assert found["shares"][0] == {}
        assert found["shares"][1]["unclipped"] == pytest.approx(reference["shares"][1]["unclipped"], abs=1e-3)
    assert 0 < reference["shares"][1]["unclipped"] < 1


def test_losses_at_a_real_rate_are_those_of_one_process(ranks: Ranks) -> None:
    """With estimates after steps 2 and 4, and steps by them."""
    settings = {**SOPHIA, "betas": [0.9, 0.5], "rho": 10.0}
    expected = run_steps(model, "mixed", 1, {}, settings, 6)
    assert expected["losses"][-1] < expected["losses"][0] - 0.1 and expected["shares"][3]["unclipped"] > 0.1
    for found in ranks.run(run_steps, 3, model, "mixed", 1, FSDP, settings, 6):
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return run_steps(model, "mixed", 1, {}, STILL, 2)


def hessians(found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: value for name, value in found["state"].items() if name.endswith(".hessian")}


def test_drawing_does_not_disturb_the_steps() -> None:
    """With dropout, bit for bit: an estimate is not there before the next step but one."""
    sparse, dense = ({**SOPHIA, "every": every} for every in (3, 2))
    one, other = (run_steps(model_with_dropout, "image", 2, {}, each, 2) for each in (sparse, dense))
    assert one["losses"] == other["losses"]
    assert all(np.array_equal(one["parameters"][name], value) for name, value in other["parameters"].items())
    assert not np.any(np.concatenate([value.ravel() for value in hessians(one).values()]))
    assert np.any(np.concatenate([value.ravel() for value in hessians(other).values()]))


def steps_in_parts() -> list[np.ndarray]:
    """The weights after some steps on given gradients and curvatures, whole, each over the ranks along its rows."""
    world, generator = World.from_environment(), torch.Generator().manual_seed(0)
    world.start(torch.device("cpu"), 60, True)
    try:
        mesh = init_device_mesh("cpu", (world.ranks,))

        def parts(shape: tuple[int, ...]) -> DTensor:
            return distribute_tensor(torch.randn(shape, generator=generator), mesh, [Shard(0)])

        shapes = [(7, 5), (2, 3), (1,), (301,)]
        parameters = [nn.Parameter(parts(shape)) for shape in shapes]
        optimizer = sophia(parameters, lr=1e-2, rho=0.3)
        for _ in range(5):
            for parameter, shape in zip(parameters, shapes, strict=True):
                parameter.grad = parts(shape)
                if parameter in optimizer.state:
                    optimizer.state[parameter]["hessian"].copy_(parts(shape))
            optimizer.step()
        return [parameter.full_tensor().detach().numpy() for parameter in parameters]  # type: ignore[attr-defined]
    finally:
        world.stop()


def test_parts_of_a_parameter_are_stepped_as_the_whole(ranks: Ranks) -> None:
    (expected,) = ranks.run(steps_in_parts, 1)
    for number in (2, 3):
        for found in ranks.run(steps_in_parts, number):
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def seeded(rows: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + row) for row in rows]


def drawn_sums(system: System, batches: list[tuple[PackedBatch, list[int]]]) -> tuple[dict[str, float], list[Tensor]]:
    """Sums of drawn losses over batches, each with the numbers of its rows, and the gradients of all together."""
    system.zero_grad()
    sums = {name: 0.0 for name in system.drawn}
    for batch, numbers in batches:
        losses = system.drawn_losses(batch, seeded(numbers))
        torch.stack([*losses.values()]).sum().backward()
        sums = {name: value + float(losses[name].detach()) for name, value in sums.items()}
    return sums, [one.grad.clone() for one in system.parameters() if one.grad is not None]


def assert_alike(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(*[{str(n): one.numpy() for n, one in enumerate(each[1])} for each in (found, expected)]) < 1e-5


def test_music_draws_what_teachers_would_say_by_rows() -> None:
    torch.manual_seed(0)
    system = music_run.model().build().train()
    vars(system)["teacher"] = None  # and asks none
    assert system.drawn == ("codes", "cqt", "feature_penalty")
    together = drawn_sums(system, [(music_run.batch([0, 1, 2, 3]), [0, 1, 2, 3])])
    assert_alike(drawn_sums(system, [(music_run.batch([row]), [row]) for row in (3, 0, 2, 1)]), together)
    # A bias of the constant-Q head has the curvature 2 / bins.
    batch, squares = music_run.batch([0, 1, 2, 3]), []
    frames = int(system.counts(batch)["cqt"])
    for seed in range(25):
        system.zero_grad()
        system.drawn_losses(batch, [torch.Generator().manual_seed(10 * seed + row) for row in range(4)])[
            "cqt"
        ].backward()
        squares.append(system.cqt_head.bias.grad.square() / frames)
    assert float(torch.stack(squares).mean()) == pytest.approx(2 / 24, rel=0.25)


def test_an_early_fusion_model_draws_by_rows() -> None:
    torch.manual_seed(0)
    system = tiny_moma.model().build().train()

    def batch(numbers: list[int]) -> tuple[PackedBatch, list[int]]:
        return tiny_moma.batch([tiny_moma.ROWS[row] for row in numbers]), numbers

    together = drawn_sums(system, [batch([0, 1, 2, 3])])
    assert_alike(drawn_sums(system, [batch([3, 1]), batch([2]), batch([0])]), together)
    assert together[0]["next_token"] > 0


def test_a_joint_run_draws_part_by_part() -> None:
    section = JointConfig.model_validate(
        {"kind": "joint", "parts": {"vlm": MODEL.model_dump(), "music": music_run.MODEL}, "weights": {"music": 0.2}}
    )
    torch.manual_seed(0)
    system, layout = section.build().train(), section.layout()
    segments: list[tuple[Part, ...]] = [
        (Text("some words"),), (Media("audio", music_run.wav(1, music_run.samples(60)), "wav"),), (Text("and others"),),
    ]  # fmt: skip
    made = [make_segment(parts, layout, "test", Limits()) for parts in segments]
    packs = [join_segments([(str(row), "s", segment)]) for row, segment in enumerate(made)]

    def batch(numbers: list[int]) -> PackedBatch:
        return collate([packs[row] for row in numbers], layout, 128, draws=[(5, row) for row in numbers])

    together = drawn_sums(system, [(batch([0, 1, 2]), [0, 1, 2])])
    assert together[0].keys() == set(system.drawn) >= {"vlm/next_token", "music/codes"}
    assert_alike(drawn_sums(system, [(batch([2, 1]), [2, 1]), (batch([0]), [0])]), together)
    alone = with_dummies(select_rows(batch([1]), [0]), section.parts["music"].layout())
    expected = system.music.drawn_losses(alone, seeded([1]))
    assert {name: float(loss.detach()) for name, loss in expected.items()} == pytest.approx(
        {name.removeprefix("music/"): value for name, value in together[0].items() if name.startswith("music/")}
    )


HUTCHINSON = {"kind": "sophia", "estimator": "hutchinson", "every": 1, "betas": [0.9, 0.0], "weight_decay": 0.0}
"""Each estimate takes the place of the one before."""


def wavy(point: Tensor) -> Tensor:
    """Curvature of both signs, and between all coordinates."""
    mixed = torch.linspace(-1, 1, point.numel() ** 2).view(point.numel(), -1).cos() @ point
    return mixed.sin().sum() + (point**4).sum() + mixed.square().mean() - 8 * point[::2].square().sum()


def test_signs_average_to_the_diagonal_of_the_hessian() -> None:
    start = torch.linspace(-1, 0.8, 6)
    system = Toy(wavy, start)
    bench = Bench(system, HUTCHINSON)
    exact = torch.func.hessian(wavy)(start).diagonal()
    found = []
    for step in range(150):
        bench.step(step, 0.0)
        found.append(bench.hessian(system.point).clone())
    assert torch.equal(system.point, start), "weights are put back bit for bit"
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / len(found) ** 0.5
    assert float(((mean - exact) / error).abs().max()) < 4
    assert (exact < 0).any() and (exact > 0).any()


def test_differences_are_the_products_that_double_backward_gives() -> None:
    torch.manual_seed(0)
    system = model().train()
    bench = Bench(system, HUTCHINSON)
    before = {name: one.detach().clone() for name, one in system.named_parameters()}
    bench.step(0, 0.0)
    assert all(torch.equal(one, before[name]) for name, one in system.named_parameters())
    passes = Passes(bench.stepper, bench.batches, 0)
    named = {name: one for name, one in system.named_parameters() if one in bench.engine.optimizer.state}
    signs = {name: _signs(name, one, passes) for name, one in named.items()}
    batch = collate(rows("text"), LAYOUT, LENGTH)
    keep = batch.learned()
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(system.logits(batch, keep), batch.labels.flatten()[keep])  # type: ignore[operator]
        used = [name for name in named if not name.startswith(("vision", "connector"))]
        grads = torch.autograd.grad(loss, [named[name] for name in used], create_graph=True)
        product = sum((grad * signs[name]).sum() for name, grad in zip(used, grads, strict=True))
        exact = torch.autograd.grad(product, [named[name] for name in used])
    expected = {name: (signs[name] * one).numpy() for name, one in zip(used, exact, strict=True)}
    assert distance({name: bench.hessian(named[name]).numpy() for name in used}, expected) < 5e-3


@pytest.mark.parametrize("ranks_,micro_batches,engine", [(1, 4, {}), (2, 2, FSDP), (3, 1, FSDP)])
def test_differences_are_the_same_however_the_step_is_split(
    ranks_: int, micro_batches: int, engine: dict[str, Any], ranks: Ranks
) -> None:
    """But for rounding, which a difference makes some hundred times larger. Of objectives over all items too."""
    still = {**HUTCHINSON, "lr": 1e-12}
    for build, kind in ((model, "mixed"), (TwoTowers, "image")):
        expected = run_steps(build, kind, 1, {}, still, 1)
        for found in ranks.run(run_steps, ranks_, build, kind, micro_batches, engine, still, 1):
            assert distance(hessians(found), hessians(expected)) < 2e-3


def valley(point: Tensor) -> Tensor:
    """Curvatures from 1e-2 to 1e4, and a saddle in the way of the last coordinate."""
    curvature = torch.tensor([1e4, 1e2, 1.0, 1e-2])
    return (curvature * point[:4].square()).sum() / 2 + (point[4].square() - 1).square() / 4


def test_it_crosses_a_valley_where_adamw_does_not() -> None:
    """In 40 steps of one learning rate, each with the best of several: the way along flat directions asks for a large
    one, with which AdamW jumps to and fro across the steep ones."""
    start = torch.tensor([1.0, 1.0, 10.0, 10.0, 1e-3])

    def reached(lr: float, **optimizer: Any) -> float:
        bench = Bench(Toy(valley, start), {**optimizer, "weight_decay": 0.0})
        return [bench.step(step, lr) for step in range(40)][-1]

    settings = {"kind": "sophia", "estimator": "hutchinson", "every": 1, "betas": [0.5, 0.5], "rho": 1.0}
    ours = min(reached(lr, **settings) for lr in (0.6, 1.0))
    rates, betas = (0.1, 0.3, 0.6, 1.0), ([0.5, 0.9], [0.9, 0.95], [0.5, 0.999], [0.9, 0.999])
    assert ours < 1e-2 * min(reached(lr, kind="adamw", betas=both) for lr in rates for both in betas)


def test_a_step_that_the_guard_skips_makes_no_estimate() -> None:
    spoiled = [False]
    system = Toy(lambda point: wavy(point) * (float("nan") if spoiled[0] else 1), torch.ones(4))
    bench = Bench(system, {**HUTCHINSON, "every": 2})
    bench.step(0, 0.01)
    spoiled[0] = True
    bench.step(1, 0.01)
    assert not bench.hessian(system.point).any()


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_an_estimate_that_is_not_finite_is_left_out_and_said(estimator: str) -> None:
    spoiled = True

    def loss(point: Tensor) -> Tensor:  # spoiled, it has no gradient 0.5 % below 1
        return (point - 0.9999).sqrt().sum() if spoiled else point.square().sum()

    system = Linear([torch.ones(3)], 1) if estimator == "gnb" else Toy(loss, torch.ones(3))
    bench, (point,) = Bench(system, {**SOPHIA, "estimator": estimator, "rho": 1e-9}), system.parameters()

    def two_steps(first: int) -> None:  # with an estimate after the second
        if isinstance(system, Linear):
            system.grads, system.estimate = [torch.ones(3)], [torch.full((3,), math.inf if spoiled else 1.0)]
        for step in (first, first + 1):
            bench.step(step, 0.0)

    two_steps(0)
    assert not bench.hessian(point).any()
    assert bench.stepper.shares() == {"unclipped": 0, "estimates_lost": 1}
    two_steps(2)
    spoiled = False
    two_steps(4)
    assert bench.hessian(point).all()
    assert bench.stepper.shares() == {"unclipped": 0, "estimates_lost": 0.5}
    two_steps(6)
    assert bench.stepper.shares() == {"unclipped": 0}


def test_objectives_without_labels_to_draw_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"TwoTowers has no labels to draw for its objective contrastive.*hutchinson"):
        Bench(TwoTowers(), SOPHIA)


@pytest.mark.parametrize("settings,place", [
    ({"precision": "bf16"}, "train.precision"),
    ({"engine": {**FSDP, "precision": [{"match": "a.*", "weights": "bf16"}]}}, "train.engine.precision of 'a.*'"),
])  # fmt: skip
def test_differences_in_bfloat16_are_refused(settings: dict[str, Any], place: str) -> None:
    train = TrainConfig.model_validate({"device": "cpu", "optimizer": HUTCHINSON, **settings})
    engine: Any = SimpleNamespace(system=Toy(wavy, torch.ones(2)), train=train)
    with pytest.raises(ConfigError, match=rf"set {re.escape(place)} to fp32"):
        sophia([nn.Parameter(torch.ones(2))], estimator="hutchinson").check(engine)


def test_clipping_what_is_not_squared_is_refused() -> None:
    with pytest.raises(ValidationError, match="clip_estimate is for estimator gnb"):
        SophiaConfig(estimator="hutchinson", clip_estimate=1.0)


def test_deepspeed_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="sophia under deepspeed: it takes extra passes, which are not wired"):
        train = TrainConfig.model_validate({"device": "cpu", "optimizer": SOPHIA, "engine": {"kind": "deepspeed"}})
        train.engine.build(World(), train)


def saved(folder: Path) -> dict[str, Tensor]:
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    tensors = {name: torch.empty(shape) for name, shape in checkpoint.described(found).items()}
    checkpoint.load(found, tensors)
    return tensors


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_cycle(
    estimator: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    section = f"train.optimizer={{kind: sophia, lr: 1e-3, every: 3, estimator: {estimator}, rho: 10}}"
    settings = (section, "train.max_steps=8", "evaluation.candidates=0", "evaluation.samples=0")

    def config(name: str) -> RunConfig:
        return load_config(tiny(), (*settings, f"out={tmp_path / name}"))

    Trainer(config("whole"), Unwatched()).run()
    with pytest.raises(Interrupted, match="after step 5 of 8"):  # estimates are made after steps 3 and 6
        Trainer(config("parts"), StopAt(4)).run()
    Trainer(config("parts"), Unwatched()).run(resume=True)
    expected, found = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert expected.keys() == found.keys() and any(name.endswith(".hessian") for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    logged = [
        {row["step"]: row["unclipped"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "unclipped" in row}
        for name in ("whole", "parts")
    ]
    assert logged[0] == logged[1] and logged[0].keys() == {3, 6} and 0 < logged[0][6] < 1


def test_memory_is_estimated_without_a_kernel(tiny_config: Callable[..., RunConfig]) -> None:
    found = estimate(tiny_config("train.optimizer={kind: sophia}"))
    trained = sum(part["trained"] for part in found["parameters"].values())
    assert found["memory"]["optimizer"] == pytest.approx(8 * trained, rel=0.01)  # but for what gets no gradient
