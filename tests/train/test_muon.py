"""Muon: torch's own arithmetic on matrices and on slices of stacks, AdamW on the rest, and what it is refused for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm.cli import main
from mm.config import RunConfig
from mm.errors import ConfigError
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.estimate import estimate
from mm.train.optim.config import MuonConfig
from mm.train.params import roles


def groups(**parameters: tuple[str, nn.Parameter]) -> list[dict[str, Any]]:
    """One for each parameter."""
    return [
        {"params": [parameter], "names": [name], "lr_scale": 1.0, "weight_decay": 0.1, "role": role}
        for name, (role, parameter) in parameters.items()
    ]


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))))


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], number: int) -> None:
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(100 * number + sum(one.shape)))
    optimizer.step()


@pytest.mark.parametrize("settings", [
    {}, {"scale": "original", "momentum": 0.8}, {"nesterov": False, "iterations": 3},
], ids=str)  # fmt: skip
def test_it_is_torchs(settings: dict[str, Any]) -> None:
    config = MuonConfig(lr=2e-2, **settings)
    shapes = {"wide": (5, 9), "tall": (9, 4), "square": (6, 6)}
    ours = {name: parameter(*shape) for name, shape in shapes.items()}
    theirs = {name: parameter(*shape) for name, shape in shapes.items()}
    bias, their_bias = parameter(7), parameter(7)
    optimizer = config.build(groups(**{name: ("matrix", one) for name, one in ours.items()}, bias=("vector", bias)))
    muon = torch.optim.Muon(
        theirs.values(), lr=2e-2, weight_decay=0.1, momentum=config.momentum, nesterov=config.nesterov,
        ns_steps=config.iterations, adjust_lr_fn=config.scale,
    )  # fmt: skip
    adamw = torch.optim.AdamW([their_bias], lr=2e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for number in range(5):
        step(optimizer, [*ours.values(), bias], number)
        step(muon, [*theirs.values()], number)
        step(adamw, [their_bias], number)
    assert all(torch.equal(ours[name], theirs[name]) for name in shapes) and torch.equal(bias, their_bias)
    for name in shapes:
        assert torch.equal(optimizer.state[ours[name]]["momentum_buffer"], muon.state[theirs[name]]["momentum_buffer"])


def test_a_stack_is_its_slices() -> None:
    stack = parameter(3, 4, 6)
    slices = [nn.Parameter(one.detach().clone()) for one in stack]
    optimizer = MuonConfig(lr=1e-2).build(groups(stack=("matrix", stack)))
    muon = torch.optim.Muon(slices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for number in range(4):
        step(optimizer, [stack], number)
        assert stack.grad is not None
        for one, grad in zip(slices, stack.grad, strict=True):
            one.grad = grad.clone()
        muon.step()
    assert torch.equal(stack, torch.stack(slices))
    buffers = [muon.state[one]["momentum_buffer"] for one in slices]
    assert torch.equal(optimizer.state[stack]["momentum_buffer"], torch.stack(buffers))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (2, 24, 48)], ids=str)
def test_updates_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    """The update points where U V^T of the gradient's decomposition does; its singular values are about 1, not 1."""
    weight = parameter(*shape)
    before = weight.detach().clone()
    optimizer = MuonConfig(lr=1.0, momentum=0, scale="original").build(
        [{**group, "weight_decay": 0.0} for group in groups(weight=("matrix", weight))]
    )
    step(optimizer, [weight], 0)
    update = (before - weight.detach()) / math.sqrt(max(1, shape[-2] / shape[-1]))
    assert weight.grad is not None
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    found, exact = update.flatten(-2), (u @ v).flatten(-2)
    assert torch.cosine_similarity(found, exact, dim=-1).min() >= 0.95
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.25


def test_what_is_no_matrix_has_a_rate_of_its_own() -> None:
    made = groups(
        weight=("matrix", parameter(3, 3)), table=("embedding", parameter(5, 2)), bias=("vector", parameter(4))
    )
    made[1]["lr_scale"] = 0.1
    optimizer = MuonConfig(lr=2e-2, adamw_lr=4e-3).build(made)
    found = {group["names"][0]: group["lr_scale"] for group in optimizer.param_groups}
    assert found == {"weight": 1.0, "table": pytest.approx(0.02), "bias": pytest.approx(0.2)}


def test_what_it_cannot_step_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no matrix is trained"):
        MuonConfig().build(groups(table=("embedding", parameter(5, 2))))
    with pytest.raises(ConfigError, match=r"kernel is \[2, 3, 1, 1\], expected a matrix or a stack of them"):
        MuonConfig().build(groups(kernel=("matrix", parameter(2, 3, 1, 1))))


@pytest.mark.parametrize("kind", ["muon", "soap", "sophia"])
def test_deepspeed_refuses_it_with_the_reason(kind: str) -> None:
    train = TrainConfig.model_validate({"device": "cpu", "engine": {"kind": "deepspeed"}, "optimizer": {"kind": kind}})
    with pytest.raises(ConfigError, match=f"optimizer.kind {kind} under deepspeed: .* use train.engine.kind fsdp"):
        train.engine.build(World(), train)


def test_estimates_know_its_state_and_its_products(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config("train.optimizer={kind: muon, lr: 1e-3}")
    plain, found = estimate(tiny_config()), estimate(config)
    system = config.model.build(weights=False)
    named, found_roles = dict(system.named_parameters()), roles(system)
    matrices = [named[name] for name, role in found_roles.items() if role == "matrix"]
    # One moment instead of two for matrices, and no count of steps.
    saved = sum(4 * (one.numel() + 1) for one in matrices)
    assert plain["memory"]["optimizer"] - found["memory"]["optimizer"] == saved
    products = 0
    for one in matrices:
        m, n = sorted(one.shape)
        products += 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
    assert found["flops_per_step"]["update"] == products and plain["flops_per_step"]["update"] == 0
    assert found["flops_per_step"]["backward"] == plain["flops_per_step"]["backward"]


def test_a_run_trains(tiny: Callable[..., Path]) -> None:
    path = tiny()
    settings = ["train.optimizer={kind: muon, lr: 3e-3}", "train.max_steps=12", "train.save_every=6"]
    assert main(["train", str(path), *settings]) == 0
    rows = [json.loads(line) for line in (path.parent / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
