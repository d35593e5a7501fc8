"""SOAP against the official arithmetic, written down plainly, and against what must hold of any such optimizer."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mm.errors import ConfigError
from mm.train.checkpoint import create_optimizer_state, optimizer_tensors
from mm.train.config import ParamRule
from mm.train.optim.config import SOAPConfig
from mm.train.optim.soap import SOAP, add_gram_, eigenvectors, refresh_
from mm.train.params import parameter_groups

Gradient = Callable[[int, Tensor], Tensor]
"""Of a step's number and the weight."""
STEPS = 60


class Official:
    """github.com/nikhilvyas/SOAP's step of one matrix: five pairs of products, the first moment turned every time."""

    def __init__(
        self,
        weight: Tensor,
        sides: tuple[int, ...] = (0, 1),
        every: int = 10,
        normalize: bool = False,
        bias: bool = True,
    ) -> None:
        self.weight, self.sides, self.every, self.normalize, self.bias = weight.clone(), sides, every, normalize, bias
        self.steps, self.grams, self.bases = 0, dict[int, Tensor](), dict[int, Tensor]()
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)

    def into(self, x: Tensor) -> Tensor:
        x = self.bases[0].T @ x if 0 in self.bases else x
        return x @ self.bases[1] if 1 in self.bases else x

    def out_of(self, x: Tensor) -> Tensor:
        x = self.bases[0] @ x if 0 in self.bases else x
        return x @ self.bases[1].T if 1 in self.bases else x

    def step(self, g: Tensor, lr: float = 3e-3, decay: float = 0.01, beta: float = 0.95, eps: float = 1e-8) -> None:
        outer = {side: g.T @ g if side else g @ g.T for side in self.sides}
        if not self.grams:
            for side, product in outer.items():
                self.grams[side] = (1 - beta) * product
                eye = torch.eye(len(product), dtype=g.dtype)
                self.bases[side] = torch.linalg.eigh(self.grams[side] + 1e-30 * eye)[1].flip(1)
            return
        self.steps += 1
        turned = self.into(g)
        self.m = beta * self.m + (1 - beta) * turned
        self.v = beta * self.v + (1 - beta) * turned.square()
        update = self.out_of(self.m / (self.v.sqrt() + eps))
        size = lr * math.sqrt(1 - beta**self.steps) / (1 - beta**self.steps) if self.bias else lr
        if self.normalize:
            update = update / (1e-30 + update.square().mean().sqrt())
        self.weight = self.weight - size * update
        self.weight = self.weight - lr * decay * self.weight
        whole = self.out_of(self.m)
        for side, product in outer.items():
            self.grams[side] = beta * self.grams[side] + (1 - beta) * product
        if self.steps % self.every == 0:
            for side, gram in self.grams.items():
                order = torch.diag(self.bases[side].T @ gram @ self.bases[side]).argsort(descending=True)
                self.v = self.v.index_select(side, order)
                self.bases[side] = torch.linalg.qr(gram @ self.bases[side][:, order])[0]
        self.m = self.into(whole)


def gradients(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Gradient:
    """Of a quadratic whose axes are turned and of different scales, with noise."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randn(size, size, generator=draw, dtype=dtype) * torch.logspace(0, -0.5, size, dtype=dtype)
        for size in shape[-2:]
    )
    noise = torch.randn(STEPS + 1, *shape, generator=draw, dtype=dtype)
    return lambda step, weight: rows @ (noise[step] + weight) @ columns / math.prod(shape[-2:]) ** 0.5


def start(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(optimizer: Optimizer, weight: nn.Parameter, gradient: Gradient, steps: Any = range(STEPS)) -> Tensor:
    """The weight after some steps."""
    for step in steps:
        weight.grad = gradient(step, weight.detach())
        optimizer.step()
    return weight.detach()


def trained(weight: Tensor, gradient: Gradient, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight after `STEPS` steps, and the state."""
    parameter = nn.Parameter(weight.clone())
    optimizer = SOAP([parameter], **settings)
    return run(optimizer, parameter, gradient), optimizer.state[parameter]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"normalize": True}, {"every": 3}], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_equals_the_official_step(shape: tuple[int, int], settings: dict[str, Any], dtype: torch.dtype) -> None:
    gradient, weight = gradients(*shape, dtype=dtype), start(*shape, dtype=dtype)
    official = Official(weight, **settings)
    for step in range(STEPS):
        official.step(gradient(step, official.weight))
    ours = {"correct_bias" if key == "bias" else key: value for key, value in settings.items()}
    found, state = trained(weight, gradient, **ours)
    # Rounding goes with the length of steps, and `normalize` makes them five times as long.
    tolerance = 1e-10 if dtype == torch.float64 else 5e-5 if "normalize" in settings else 1e-5
    assert (found - official.weight).abs().max() < tolerance
    assert (found - weight).abs().max() > 0.05
    assert int(state["step"]) == official.steps == STEPS - 1
    for axis, basis in official.bases.items():
        ours_basis = state[f"basis_{axis}"]
        assert (ours_basis.T @ ours_basis - torch.eye(len(basis), dtype=dtype)).abs().max() < 1e-5


def test_an_axis_that_is_too_long_is_not_rotated() -> None:
    gradient, weight = gradients(16, 40, dtype=torch.float64), start(16, 40, dtype=torch.float64)
    official = Official(weight, sides=(0,))
    for step in range(STEPS):
        official.step(gradient(step, official.weight))
    found, state = trained(weight, gradient, max_precond_dim=39)
    assert (found - official.weight).abs().max() < 1e-10
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "gram_0", "basis_0"}


@pytest.mark.parametrize("bias", [True, False])
def test_equals_pytorch_optimizer(bias: bool) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    shapes = [(24, 24), (16, 40)]
    starts, grads = [start(*shape) for shape in shapes], [gradients(*shape) for shape in shapes]
    weights = [nn.Parameter(weight.clone()) for weight in starts]
    optimizer = peer.SOAP(weights, lr=3e-3, weight_decay=0.01, precondition_frequency=10, correct_bias=bias)
    for step in range(STEPS):
        for weight, gradient in zip(weights, grads, strict=True):
            weight.grad = gradient(step, weight.detach())
        optimizer.step()
    for weight, begin, gradient in zip(weights, starts, grads, strict=True):
        found, _ = trained(begin, gradient, correct_bias=bias)
        assert (found - weight).abs().max() < 1e-5


def test_without_a_rotation_it_is_adam() -> None:
    """With eps beside the root that is not corrected, and decay after the step."""
    weight = nn.Parameter(start(8, 12, dtype=torch.float64))
    gradient, optimizer = gradients(8, 12, dtype=torch.float64), SOAP([weight], betas=(0.9, 0.95), eps=1e-3, every=1000)
    run(optimizer, weight, gradient, range(1))
    for axis in (0, 1):
        optimizer.state[weight][f"basis_{axis}"].copy_(torch.eye(weight.shape[axis]))
    expected = weight.detach().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 30):
        g = gradient(step, expected)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square()
        size = 3e-3 * math.sqrt(1 - 0.95**step) / (1 - 0.9**step)
        expected = (expected - size * m / (v.sqrt() + 1e-3)) * (1 - 3e-3 * 0.01)
    found = run(optimizer, weight, gradient, range(1, 30))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_follows_a_rotation_of_the_problem() -> None:
    """Square, since the eigenvectors that the first gradient of another shape leaves open are anybody's choice."""
    gradient, weight = gradients(12, 12, dtype=torch.float64), start(12, 12, dtype=torch.float64)
    u, w = (torch.linalg.qr(start(12, 12, dtype=torch.float64, seed=seed))[0] for seed in (2, 3))
    found, _ = trained(weight, gradient)
    rotated, _ = trained(u @ weight @ w.T, lambda step, x: u @ gradient(step, u.T @ x @ w) @ w.T)
    assert (u @ found @ w.T - rotated).abs().max() < 1e-6
    assert (found - weight).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (40, 24)])
def test_blocks_are_matrices_of_their_own(shape: tuple[int, int]) -> None:
    """16, 16 and 8; and 16 and 8."""
    gradient, weight = gradients(*shape, dtype=torch.float64), start(*shape, dtype=torch.float64)
    noise = [gradient(step, torch.zeros_like(weight)) for step in range(STEPS)]
    found, state = trained(weight, lambda step, _: noise[step], max_precond_dim=16, block=16)
    parts = [
        (slice(row, row + 16), slice(column, column + 16))
        for row in range(0, shape[0], 16)
        for column in range(0, shape[1], 16)
    ]
    for number, place in enumerate(parts):
        alone, own = trained(weight[place], lambda step, _, place=place: noise[step][place])
        torch.testing.assert_close(found[place], alone, rtol=1e-9, atol=1e-11)
        for key in ("gram_0", "gram_1"):
            torch.testing.assert_close(state[f"{key}_{number}"].triu(), own[key].triu(), rtol=1e-9, atol=1e-12)
    assert len(state) == 3 + 4 * len(parts)


@pytest.mark.parametrize("shape", [(300, 7), (7, 300), (2, 300, 7), (2, 7, 300)])
def test_gram_matrices_are_worked_out_in_panels(shape: tuple[int, ...]) -> None:
    """Of which no more than the upper triangle is right, and no more is read."""
    g = start(*shape, dtype=torch.float64)
    side = g if shape[-2] == 300 else g.mT
    before = start(*shape[:-2], 300, 300, dtype=torch.float64, seed=2)
    gram, whole = before @ before.mT, 0.9 * before @ before.mT + 0.1 * side @ side.mT
    add_gram_(gram, side, 0.9)
    torch.testing.assert_close(gram.triu(), whole.triu())
    assert not torch.allclose(gram, whole)
    found, expected = ([torch.linalg.qr(before)[0], g.clone(), g.square()] for _ in range(2))
    axis = 0 if shape[-2] == 300 else 1
    for one, (basis, m, v) in ((gram, found), (whole, expected)):
        refresh_(m, v, {axis: one}, {axis: basis})
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-9)
    basis, _, v = found
    assert not torch.allclose(v, g.square())  # it was reordered
    torch.testing.assert_close(basis.mT @ basis, torch.eye(300, dtype=torch.float64).expand_as(basis))


def test_a_stack_is_so_many_matrices() -> None:
    gradient, weight = gradients(3, 8, 12, dtype=torch.float64), start(3, 8, 12, dtype=torch.float64)
    noise = [gradient(step, torch.zeros_like(weight)) for step in range(STEPS)]
    for settings in ({}, {"normalize": True}):
        found, _ = trained(weight, lambda step, _: noise[step], **settings)
        for n in range(3):
            alone, _ = trained(weight[n], lambda step, _, n=n: noise[step][n], **settings)
            torch.testing.assert_close(found[n], alone, rtol=1e-7, atol=1e-9)


def test_a_convolution_is_one_matrix() -> None:
    gradient, weight = gradients(6, 20, dtype=torch.float64), start(6, 20, dtype=torch.float64)
    expected, _ = trained(weight, gradient)
    for shape in ((6, 4, 5), (6, 5, 2, 2)):
        parameter = nn.Parameter(weight.view(shape).clone())
        optimizer = SOAP([{"params": [parameter], "role": "embedding"}])
        run(optimizer, parameter, lambda step, x, shape=shape: gradient(step, x.view(6, 20)).view(shape))
        assert torch.equal(parameter.detach().view(6, 20), expected)


def test_a_late_gradient_moves_nothing_and_counts_from_there() -> None:
    gradient, weight = gradients(8, 12), start(8, 12)
    early, late = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer = SOAP([early, late])
    for step in range(30):
        early.grad = gradient(step, early.detach())
        late.grad = gradient(step - 7, late.detach()) if step >= 7 else None
        optimizer.step()
        assert step > 7 or torch.equal(late.detach(), weight)
    alone = nn.Parameter(weight.clone())
    assert torch.equal(run(SOAP([alone]), alone, gradient, range(23)), late.detach())
    assert int(optimizer.state[late]["step"]) == 22 and int(optimizer.state[early]["step"]) == 29


def test_bf16_is_worked_out_in_float32() -> None:
    noise = [gradients(8, 12)(step, torch.zeros(8, 12)).bfloat16() for step in range(STEPS)]
    weight = start(8, 12).bfloat16()
    half, half_state = trained(weight, lambda step, _: noise[step])
    single, single_state = trained(weight.float(), lambda step, _: noise[step].float())
    assert half.dtype == torch.bfloat16 and half_state["gram_0"].dtype == torch.float32
    assert all(torch.equal(value, single_state[key]) for key, value in half_state.items())
    assert (half.float() - single).abs().max() < 0.01
    _, double = trained(weight.double(), lambda step, _: noise[step].double())
    assert {value.dtype for key, value in double.items() if key != "step"} == {torch.float64}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.inner = nn.Linear(6, 10)
        self.experts = nn.Parameter(torch.empty(2, 4, 10))


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    return parameter_groups(net, [ParamRule(match="experts", role="matrix")], 0.1)


def optimizer_of(net: nn.Module, **settings: Any) -> Optimizer:
    return SOAPConfig(every=5, **settings).build(groups_of(net))


def net_of() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.experts)
    return net


def train(net: Net, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(net.parameters()):
            draw = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=draw) + parameter.detach()
        optimizer.step()


@pytest.mark.parametrize(
    "settings", [{}, {"precondition": ["matrix", "embedding"], "max_precond_dim": 8, "block": 8}], ids=str
)
@pytest.mark.parametrize("stop", [1, 8, 10, 13])
def test_goes_on_bit_for_bit(stop: int, settings: dict[str, Any]) -> None:
    """From the tensors of a checkpoint, behind a first gradient, between refreshes and at one."""
    net = net_of()
    optimizer = optimizer_of(net, **settings)
    train(net, optimizer, range(stop))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    train(net, optimizer, range(stop, 24))

    resumed = net_of()
    resumed.load_state_dict(weights)
    other = optimizer_of(resumed, **settings)
    create_optimizer_state(other, {name.rpartition(".")[0] for name in saved})
    made = optimizer_tensors(other)
    assert {name: tensor.shape for name, tensor in made.items()} == {name: one.shape for name, one in saved.items()}
    for name, tensor in made.items():
        assert tensor.isfinite().all()
        tensor.copy_(saved[name])
    train(resumed, other, range(stop, 24))
    for name, tensor in net.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_gradients_of_zero_move_nothing() -> None:
    weight = start(8, 12)
    found, state = trained(weight, lambda step, x: torch.zeros_like(x), weight_decay=0.0)
    assert torch.equal(found, weight)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("shape", [(5, 5), (2, 5, 5)])
def test_a_gram_of_zeros_needs_no_eigenvectors(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """State that a checkpoint is loaded into is made of such ones; of a large matrix they take minutes."""
    expected = torch.linalg.eigh(torch.zeros(shape))[1].flip(-1)
    monkeypatch.delattr(torch.linalg, "eigh")
    assert torch.equal(eigenvectors(torch.zeros(shape)), expected)


def test_roles_that_are_not_rotated_take_adamw_steps() -> None:
    net, reference = net_of(), net_of()
    optimizer = optimizer_of(net, lr=1e-2)
    train(net, optimizer, range(6))
    keys = {name for name in optimizer_tensors(optimizer) if "gram" in name}
    assert keys == {f"{name}.gram_{axis}" for name in ("inner.weight", "experts") for axis in (0, 1)}
    groups = [group for group in groups_of(reference) if group["role"] != "matrix"]
    train(reference, torch.optim.AdamW(groups, lr=1e-2, betas=(0.95, 0.95), fused=True), range(6))
    for name in ("words.weight", "inner.bias"):
        assert torch.equal(net.get_parameter(name), reference.get_parameter(name))


def test_says_what_it_cannot_do() -> None:
    net = nn.LayerNorm(4)
    with pytest.raises(ConfigError, match="nothing of the roles in `precondition` is trained, only vector"):
        optimizer_of(net)
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        SOAP(net.parameters())
    with pytest.raises(ValueError, match="block is 8192, expected at most max_precond_dim, 4096"):
        SOAPConfig(block=8192)


def test_a_matrix_of_which_no_axis_would_be_rotated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"inner\.weight is \[10, 6\], both .* max_precond_dim 5.* set block"):
        optimizer_of(net_of(), max_precond_dim=5)
    with pytest.raises(ConfigError, match=r"experts is \[4, 10\]"):
        SOAPConfig(max_precond_dim=3).build([group for group in groups_of(net_of()) if "experts" in group["names"]])
    optimizer_of(net_of(), max_precond_dim=5, block=5)
    optimizer_of(net_of(), max_precond_dim=6)


def test_learns_where_adamw_stalls() -> None:
    """Noisy least squares of condition 10^6, in axes that are turned; both at the best of many rates. Without noise, in
    so few steps, AdamW does as well."""
    size, steps = 12, 300
    draw = torch.Generator().manual_seed(0)
    sides = []
    for _ in range(2):
        axes = torch.linalg.qr(torch.randn(size, size, generator=draw))[0]
        sides.append(axes * torch.logspace(0, -3, size) @ axes.T)
    target = torch.randn(size, size, generator=draw)
    noise = torch.randn(steps, size, size, generator=draw)

    def loss(build: Callable[[nn.Parameter], Optimizer], lr: float) -> float:
        weight = nn.Parameter(torch.zeros(size, size))
        optimizer = build(weight)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            weight.grad = sides[0] @ (weight.detach() - target + noise[step]) @ sides[1]
            optimizer.step()
        left = weight.detach() - target
        return float((sides[0] @ left @ sides[1] * left).sum() / 2)

    def adamw(weight: nn.Parameter) -> Optimizer:
        return torch.optim.AdamW([weight], betas=(0.9, 0.95), weight_decay=0.0)

    soap = min(loss(lambda weight: SOAP([weight], weight_decay=0.0), lr) for lr in (0.01, 0.03, 0.1))
    assert soap < min(loss(adamw, lr) for lr in (0.03, 0.1, 0.3, 1.0)) / 2
