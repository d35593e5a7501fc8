"""Moving averages against their closed form, whole and sharded."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mm.train.ema import EMA


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def values(system: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in system.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def change(system: nn.Module, by: float) -> None:
    for parameter in system.parameters():
        parameter.mul_(1 + by).add_(by)


def closed_form(history: list[Tensor], decay: float) -> Tensor:
    """history[0] are the weights at the start: sum over t of w_t (1 - d_t) prod of the later d, in float64."""
    decays = [0.0] + [min(decay, (1 + t) / (10 + t)) for t in range(1, len(history))]
    total = torch.zeros_like(history[0], dtype=torch.float64)
    for t, weights in enumerate(history):
        rest = torch.tensor(decays[t + 1 :], dtype=torch.float64).prod()
        total += weights.double() * (1 - decays[t]) * rest
    return total


def test_what_comes_later_counts_from_there() -> None:
    """The averages of another stage go on; those of a new part are those of a run that begins with it."""
    before = net()
    ema = EMA(before, 0.999)
    for step in range(30):
        change(before, 0.01 * (step % 3))
        ema.update()
    system, alone = nn.ModuleDict({"old": before, "new": net()}), net()
    both, fresh = EMA(system, 0.999), EMA(alone, 0.999)
    for name, average in ema.averages.items():
        both.averages[f"old.{name}"].copy_(average)
    both.go_on(ema.state_dict(), {f"old.{name}" for name in ema.averages})
    for step in range(20):
        for one in (system, alone):
            change(one, 0.02 * (step % 2))
        ema.update()  # of what is the system's, too
        both.update()
        fresh.update()
        if step == 10:
            resumed = EMA(system, 0.999)
            resumed.load_state_dict(both.state_dict())
            resumed.averages = both.averages
            both = resumed
    for name in ema.averages:
        assert torch.equal(both.averages[f"old.{name}"], ema.averages[name])
        assert torch.equal(both.averages[f"new.{name}"], fresh.averages[name])


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_is_the_closed_form(decay: float) -> None:
    system = net()
    ema, history = EMA(system, decay), [values(system)]
    for step in range(40):
        change(system, 0.1 / (1 + step))
        ema.update()
        history.append(values(system))
    for name, average in ema.tensors().items():
        expected = closed_form([one[name.removeprefix("ema.")] for one in history], decay)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_trained_is_averaged_and_in_float32() -> None:
    system = net().bfloat16()
    system[0].requires_grad_(False)
    ema = EMA(system, 0.9)
    assert list(ema.tensors()) == ["ema.1.weight", "ema.1.bias", "ema.2.weight", "ema.2.bias"]
    assert all(tensor.dtype == torch.float32 for tensor in ema.tensors().values())
    change(system, 0.001)
    ema.update()
    with ema.swapped():
        assert torch.equal(system[2].weight, ema.averages["2.weight"].bfloat16())


def test_swapped_is_exact_both_ways() -> None:
    system = net()
    ema = EMA(system, 0.9)
    change(system, 0.37)
    ema.update()
    before, data = values(system), [p.data_ptr() for p in system.parameters()]
    with pytest.raises(KeyError), ema.swapped():
        assert all(torch.equal(p, ema.averages[name]) for name, p in system.named_parameters())
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in system.named_parameters())
    assert data == [p.data_ptr() for p in system.parameters()]  # the optimizer's parameters are these


def test_tied_weights_are_averaged_once() -> None:
    system = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    system["head"].weight = system["embed"].weight
    ema = EMA(system, 0.9)
    assert list(ema.averages) == ["embed.weight"]
    change(system, 0.5)
    with ema.swapped():
        assert torch.equal(system["head"].weight, ema.averages["embed.weight"])


def test_state_goes_on_where_it_was() -> None:
    whole_run, first = net(), net()
    one, other = EMA(whole_run, 0.99), EMA(first, 0.99)
    for _ in range(3):
        for system, ema in ((whole_run, one), (first, other)):
            change(system, 0.1)
            ema.update()
    resumed_system = net()
    resumed_system.load_state_dict(first.state_dict())
    resumed = EMA(resumed_system, 0.99)
    for name, tensor in resumed.tensors().items():  # as checkpoints load: in place
        tensor.copy_(other.tensors()[name])
    resumed.load_state_dict(other.state_dict())
    for system, ema in ((whole_run, one), (resumed_system, resumed)):
        change(system, 0.1)
        ema.update()
    assert all(torch.equal(one.averages[name], resumed.averages[name]) for name in one.averages)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shards_are_averaged_as_whole_weights_are(group: None) -> None:
    plain, sharded = net(), net()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False)
    averages = [EMA(plain, 0.9), EMA(sharded, 0.9)]
    inputs = torch.randn(3, 4)
    for _ in range(5):
        for system, ema in zip((plain, sharded), averages, strict=True):
            system(inputs).square().sum().backward()
            change(system, 0.1)
            ema.update()
    assert all(isinstance(tensor, DTensor) for tensor in averages[1].tensors().values())
    for name, average in averages[0].averages.items():
        assert torch.equal(average, whole(averages[1].averages[name]))
    with torch.no_grad():
        for system, ema in zip((plain, sharded), averages, strict=True):
            system(inputs)  # an evaluation leaves the outermost unit gathered
            with ema.swapped():
                system.inside = system(inputs)
            system.outside = system(inputs)
    assert torch.equal(plain.inside, sharded.inside) and torch.equal(plain.outside, sharded.outside)
    assert not torch.equal(plain.inside, plain.outside)
