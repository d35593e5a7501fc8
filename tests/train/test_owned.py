"""Owner computes: given the same gradients, matrices in parts get the very updates of whole ones, bit for bit.

The cases have rows that ranks do not divide, fewer rows than ranks, stacks in parts along an inner axis, copies, and a
matrix that gets no gradient in a step. With real gradients, which differ by rounding, losses agree.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_engines import LAYOUT
from test_expert_parallel import MODELS, batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mm.train import checkpoint
from mm.train.checkpoint import Checkpoints, create_optimizer_state, optimizer_tensors
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.optim import owned
from mm.train.optim.config import OPTIMIZERS, Role
from mm.train.params import parameter_groups
from mm.train.step import Stepper, count, counted

SHAPES: dict[str, tuple[Role, tuple[int, ...]]] = {
    "square": ("matrix", (6, 6)),
    "wide": ("matrix", (5, 9)),
    "tall": ("matrix", (7, 4)),
    "short": ("matrix", (2, 8)),
    "row": ("matrix", (1, 5)),
    "stack": ("matrix", (4, 6, 10)),
    "table": ("embedding", (11, 3)),
    "bias": ("vector", (5,)),
    "scale": ("vector", (1,)),
}
OPTIMIZER = {
    "adamw": {"kind": "adamw", "lr": 1e-2},
    "muon": {"kind": "muon", "lr": 1e-2, "adamw_lr": 3e-3},
    # Where gradients have had nothing yet, any basis is as good, and rounding decides: at 1e-2 losses differ by 1e-3.
    "soap": {"kind": "soap", "lr": 3e-4, "every": 2},
    "sophia": {"kind": "sophia", "lr": 1e-2},
}
HOW = {
    "full, 1 rank": (1, "full"),
    "full, 2 ranks": (2, "full"),
    "full, 3 ranks": (3, "full"),
    "copies, 2 ranks": (2, "copies"),
    "hybrid, 4 ranks": (4, "hybrid"),
    "divided, 4 ranks": (4, "divided"),
}
STEPS = 5


def mesh_of(how: str | None) -> Any:
    if how is None:
        return None
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    return init_device_mesh("cpu", {"full": (ranks,), "copies": (ranks, 1)}.get(how, (2, 2)))


def drawn(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(SHAPES[name][1], generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Run:
    """Parameters and an optimizer, stepped with gradients that are drawn: the same however they are placed."""

    def __init__(self, optimizer: str, how: str | None, mesh: Any) -> None:
        self.how, self.mesh, section = how, mesh, OPTIMIZER[optimizer]
        self.config = OPTIMIZERS.resolve(section["kind"]).model_validate(section)
        self.parameters = {name: nn.Parameter(self.place(name, drawn(name, 0))) for name in SHAPES}
        groups: dict[Any, dict[str, Any]] = {}
        for name, parameter in self.parameters.items():
            role, scale = SHAPES[name][0], 0.5 if name == "wide" else 1.0
            decay = 0.0 if role == "vector" else 0.1
            new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay, "role": role}
            group = groups.setdefault((role, scale), new)
            group["params"].append(parameter)
            group["names"].append(name)
        self.optimizer = self.config.build(list(groups.values()))

    def place(self, name: str, whole: Tensor) -> Tensor:
        """Whole, or as FSDP2 has it: along rows, but a stack along its second axis; `divided`: over experts, too."""
        if self.mesh is None:
            return whole
        if self.how == "divided" and name == "stack":
            return distribute_tensor(whole, self.mesh, [Shard(1), Shard(0)])
        copies = [Replicate()] * (self.mesh.ndim - 1)
        return distribute_tensor(whole, self.mesh, [*copies, Shard(1 if name == "stack" else 0)])

    def steps(self, first: int, last: int) -> None:
        """Steps number first to last - 1; in number 2 `tall` and `bias` get no gradient."""
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * group["lr_scale"] / (1 + step)
            for name, parameter in self.parameters.items():
                missing = step == 2 and name in ("tall", "bias")
                parameter.grad = None if missing else self.place(name, drawn(name, step + 1))
                if "hessian" in (state := self.optimizer.state.get(parameter, {})):
                    state["hessian"].copy_(self.place(name, drawn(name, step + 50)))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        state = {f"optimizer.{name}": one for name, one in optimizer_tensors(self.optimizer).items()}
        return {**{f"model.{name}": one.detach() for name, one in self.parameters.items()}, **state}

    def values(self) -> dict[str, np.ndarray]:
        return {name: whole(one.detach()).numpy().copy() for name, one in self.parameters.items()}


def stepped(how: str | None, optimizers: list[str], limit: int = owned.ROUND) -> dict[str, dict[str, np.ndarray]]:
    """The parameters after all steps, by optimizer."""
    mesh, before, owned.ROUND = mesh_of(how), owned.ROUND, limit
    try:
        found = {}
        for optimizer in optimizers:
            run = Run(optimizer, how, mesh)
            run.steps(0, STEPS)
            found[optimizer] = run.values()
        return found
    finally:
        owned.ROUND = before


def differ(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(found[name], value)]


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> dict[str, dict[str, np.ndarray]]:
    """Of one process with whole tensors."""
    return ranks.run(stepped, 1, None, list(OPTIMIZER))[0]


@pytest.mark.parametrize("how", HOW)
def test_in_parts_as_whole_bit_for_bit(how: str, ranks: Ranks, expected: dict[str, Any]) -> None:
    number, placing = HOW[how]
    for found in ranks.run(stepped, number, placing, list(OPTIMIZER)):
        assert {name: differ(found[name], expected[name]) for name in OPTIMIZER} == {name: [] for name in OPTIMIZER}


@pytest.mark.parametrize("limit", [1, 200, 400])
def test_rounds_change_nothing(limit: int, ranks: Ranks, expected: dict[str, Any]) -> None:
    for found in ranks.run(stepped, 2, "full", ["muon"], limit):
        assert differ(found["muon"], expected["muon"]) == []


def rounds(sizes: list[tuple[int, int]], limit: int) -> list[list[int]]:
    """Numbers of the matrices of each round, given (owner, floats in it)."""
    before, owned.ROUND = owned.ROUND, limit
    try:
        made = [owned._Matrix(nn.Parameter(torch.empty(1, floats)), owner, None, [], []) for owner, floats in sizes]
        return [[made.index(one) for one in matrices] for matrices in owned._rounds(made)]
    finally:
        owned.ROUND = before


def test_an_owner_takes_in_no_more_than_a_round() -> None:
    """Each in the order of its matrices, and owners beside one another."""
    assert rounds([(0, 4), (0, 4), (1, 4), (0, 4), (1, 9), (1, 1)], 32) == [[0, 1, 2], [3, 4], [5]]
    assert rounds([(0, 9), (0, 9)], 4) == [[0], [1]]


@pytest.mark.parametrize("seed", range(5))
def test_work_is_balanced(seed: int) -> None:
    """The dearest first to who has least is within 4/3 - 1/3n of the best there is (Graham 1969)."""
    generator = np.random.default_rng(seed)
    shapes = [torch.Size(map(int, generator.integers(1, 40, 2 + int(generator.integers(2))))) for _ in range(7)]
    costs = [math.prod(shape[:-2]) * (m * m * n + m * n * n) for shape in shapes for m, n in [shape[-2:]]]
    for ranks in (1, 2, 3):
        assigned = [owned.assign(shapes, ranks), *itertools.product(range(ranks), repeat=len(shapes))]
        loads = [
            max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(ranks))
            for owners in assigned
        ]
        assert loads[0] <= (4 / 3 - 1 / (3 * ranks)) * min(loads[1:])


def state_names(optimizer: str, how: str) -> dict[str, list[int]]:
    """Of the state that this rank has: shapes, as they lie here."""
    run = Run(optimizer, how, mesh_of(how))
    run.steps(0, 1)
    assert all(type(one) is Tensor for name, one in optimizer_tensors(run.optimizer).items() if "momentum" in name)
    return {name: list(one.shape) for name, one in optimizer_tensors(run.optimizer).items() if "momentum" in name}


def test_state_is_whole_and_on_its_owner_alone(ranks: Ranks) -> None:
    found = ranks.run(state_names, 3, "muon", "full")
    together = [item for one in found for item in one.items()]
    matrices = {f"{name}.momentum_buffer": list(shape) for name, (role, shape) in SHAPES.items() if role == "matrix"}
    assert len(together) == len(matrices) and dict(together) == matrices
    assert all(found), "every rank owns something"


def interrupted(optimizer: str, how: str | None, folder: Path, load: bool) -> dict[str, np.ndarray]:
    """Three steps and a checkpoint, or from it to the last step; the parameters."""
    run = Run(optimizer, how, mesh_of(how))
    if load:
        (path,) = checkpoint.complete(folder)
        names = {name.removeprefix("optimizer.").rpartition(".")[0] for name in checkpoint.described(path)}
        create_optimizer_state(run.optimizer, names)
        checkpoint.load(path, run.tensors())
        run.steps(3, STEPS)
    else:
        run.steps(0, 3)
        size, rank = (dist.get_world_size(), dist.get_rank()) if how else (1, 0)
        checkpoints = Checkpoints(folder, keep=1, ranks=size, rank=rank)
        checkpoints.save(3, run.tensors(), {})
        checkpoints.close()
    return run.values()


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
@pytest.mark.parametrize(("saved", "loaded"), [
    ((2, "full"), [(1, None), (1, "full"), (3, "full")]),
    ((1, None), [(3, "full")]),
    ((4, "divided"), [(2, "full")]),
], ids=str)  # fmt: skip
def test_a_checkpoint_goes_on_at_any_number_of_ranks(
    optimizer: str, saved: tuple[int, str | None], loaded: list[tuple[int, str | None]], ranks: Ranks,
    expected: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Bit for bit, in the middle of SOAP's cycle too."""
    ranks.run(interrupted, saved[0], optimizer, saved[1], tmp_path, False)
    for number, how in loaded:
        for found in ranks.run(interrupted, number, optimizer, how, tmp_path, True):
            assert differ(found, expected[optimizer]) == [], (number, how)


EXPERTS = MODELS["two groups"]
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "3 ranks, offloaded": (3, {"kind": "fsdp", "cpu_offload": True}),
    "4 ranks, hybrid": (4, {"kind": "fsdp", "shard_size": 2}),
    "4 ranks, experts divided": (4, {"kind": "fsdp", "expert_parallel": 2}),
}


def trained(
    model: Any, optimizer: str, engine: dict[str, Any], folder: Path | None = None, stop: int | None = None
) -> dict[str, Any]:
    """Some steps of a real model by the trainer's own step, from a checkpoint in the folder if there is one; with
    `stop`, up to it and with a checkpoint there."""
    values = {"device": "cpu", "engine": engine, "optimizer": OPTIMIZER[optimizer], "clip_norm": 0.5}
    train = TrainConfig.model_validate(values)
    world = World.from_environment()
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        one.prepare(model.build().train(), lambda system: parameter_groups(system, [], 0.1), 1)
        stepper = Stepper(one, LAYOUT, Guard(train.guard), 0, train.clip_norm, ["s"])
        first, losses = 0, []
        if folder is not None and (found := checkpoint.newest(folder)):
            tensors = one.tensors_to_load(set(checkpoint.described(found)))
            first = checkpoint.load(found, tensors)["step"]
            one.loaded(tensors)
        for step in range(first, stop or STEPS):
            mine = batches(world, 1)
            one.system.begin_step(step, STEPS)
            totals = counted(one.system, world.sum(count(one.system, mine, ["s"])), ["s"])
            losses.append(stepper(mine, totals, step, train.optimizer.lr).loss)
        if folder is not None and stop:
            checkpoints = Checkpoints(folder, keep=1, ranks=world.ranks, rank=world.rank)
            checkpoints.save(stop, one.tensors(), {})
            checkpoints.close()
        parameters = {name: whole(t).float().numpy() for name, t in one.tensors().items() if name.startswith("model.")}
        return {"losses": losses, "parameters": parameters}
    finally:
        one.close()
        world.stop()


@pytest.fixture(scope="module")
def single(ranks: Ranks) -> dict[str, dict[str, Any]]:
    return {name: ranks.run(trained, 1, EXPERTS, name, {})[0] for name in ("muon", "soap")}


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_those_of_one_process(engine: str, optimizer: str, ranks: Ranks, single: dict[str, Any]) -> None:
    number, settings = ENGINES[engine]
    for found in ranks.run(trained, number, EXPERTS, optimizer, settings):
        np.testing.assert_allclose(found["losses"], single[optimizer]["losses"], rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_a_sharded_run_goes_on(optimizer: str, ranks: Ranks, single: dict[str, Any], tmp_path: Path) -> None:
    """With as many ranks bit for bit, in one process to rounding."""
    fsdp, losses = {"kind": "fsdp"}, single[optimizer]["losses"]
    straight = ranks.run(trained, 2, EXPERTS, optimizer, fsdp)[0]
    np.testing.assert_allclose(straight["losses"], losses, rtol=1e-4)
    ranks.run(trained, 2, EXPERTS, optimizer, fsdp, tmp_path, 3)
    for found in ranks.run(trained, 2, EXPERTS, optimizer, fsdp, tmp_path):
        assert found["losses"] == straight["losses"][3:]
        assert differ(found["parameters"], straight["parameters"]) == []
    alone = ranks.run(trained, 1, EXPERTS, optimizer, {}, tmp_path)[0]
    np.testing.assert_allclose(alone["losses"], losses[3:], rtol=1e-4)
