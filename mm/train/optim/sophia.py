"""Sophia (Liu et al., 2305.14342): steps of momentum over curvature, each coordinate clipped to the learning rate.

    m <- b1 m + (1 - b1) g        h <- b2 h + (1 - b2) estimate, every few steps
    theta <- (1 - lr * decay) theta - lr * sign(m) * min(|m| / (rho * max(h, 0) + 1e-15), 1)

Neither average is corrected for its start: until h has grown, and wherever it is not above 0, a step is a sign. The
arithmetic is that of the released code (github.com/Liuhong99/Sophia), whose `bs`, the number of terms of the loss that
an estimate is made from, is part of the estimate here. All of it goes by element, so it runs on whatever part of a
parameter a rank holds, and needs no other.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mm.data.sample import keyed_seed
from mm.errors import ConfigError
from mm.train.optim.config import SophiaConfig

if TYPE_CHECKING:
    from mm.train.engines.single import SingleEngine
    from mm.train.step import Passes

BLOCK = 1 << 16
"""Numbers that are stepped at a time on a CPU where nothing is compiled: what lies between fits into its cache."""
COMPILED = 1 << 22
"""Numbers in all from which on a step is compiled, which takes some seconds."""


def build(config: SophiaConfig, groups: list[dict[str, Any]]) -> "Sophia":
    return Sophia(groups, config)


class Sophia(Optimizer):
    """See the module. An `ExtraPass` (`mm.train.step`): estimates are made from gradients that it asks for.

    State: `exp_avg` and `hessian`, at least float32. A parameter without a gradient is left alone.
    """

    def __init__(self, groups: list[dict[str, Any]], config: SophiaConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        self.config = config
        self._made = self._lost = 0  # estimates since `shares` was asked, and those of them that were not finite
        # By whole parameters, so that it does not depend on the number of ranks.
        self._large = sum(one.numel() for group in self.param_groups for one in group["params"]) >= COMPILED

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        beta = self.config.betas[0]
        for group in self.param_groups:
            lr = group["lr"]
            factors = (1 - lr * group["weight_decay"], lr, beta, 1 - beta, self.config.rho)
            there: dict[tuple[torch.dtype, torch.device], Tensor] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state(parameter)
                weight, grad = _local(parameter), _local(parameter.grad)
                exp_avg, hessian = _local(state["exp_avg"]), _local(state["hessian"])
                if isinstance(weight, FakeTensor):  # of an estimate of memory: a fused step takes none
                    continue
                key = exp_avg.dtype, exp_avg.device
                if key not in there:
                    there[key] = torch.tensor(factors, dtype=key[0]).to(key[1], non_blocking=True)
                self._step(weight, grad, exp_avg, hessian, there[key])

    def _step(self, weight: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor, factors: Tensor) -> None:
        if not weight.is_contiguous():
            update(weight, grad, exp_avg, hessian, factors)
            return
        tensors = weight.view(-1), grad.reshape(-1), exp_avg.view(-1), hessian.view(-1)
        kernel = compiled(weight.device.type) if self._large and weight.numel() > 1 else None
        if kernel is not None:
            kernel(*tensors, factors)
            return
        for w, g, m, h in zip(*map(_blocks, tensors), strict=True):
            update(w, g, m, h, factors)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["exp_avg"], state["hessian"] = (torch.zeros_like(parameter, dtype=dtype) for _ in range(2))
        return state

    def check(self, engine: "SingleEngine") -> None:
        """Raises `ConfigError` where the estimator does not fit the system or the precision."""
        system, gnb = engine.system, self.config.estimator == "gnb"
        left = [name for name, weight in system.weights.items() if weight and name not in system.drawn]
        if gnb and left:
            raise ConfigError(
                f"train.optimizer.estimator gnb: {type(system).__name__} has no labels to draw for its objective "
                f"{left[0]}; set train.optimizer.estimator=hutchinson"
            )
        rules = getattr(engine.train.engine, "precision", [])
        coarse = [f"train.engine.precision of {rule.match!r}" for rule in rules if rule.weights != "fp32"]
        if engine.train.precision != "fp32":
            coarse = ["train.precision"]
        if not gnb and coarse:
            raise ConfigError(
                "train.optimizer.estimator hutchinson: takes small differences of gradients, for which bf16 is too "
                f"coarse; set {coarse[0]} to fp32, or train.optimizer.estimator=gnb"
            )

    def due(self, step: int) -> bool:
        return step % self.config.every == self.config.every - 1

    def extra(self, passes: "Passes") -> None:
        passes = passes.first(self.config.share)
        gnb = self.config.estimator == "gnb"
        finite = self._gauss_newton_bartlett(passes) if gnb else self._hutchinson(passes)
        self._made, self._lost = self._made + 1, self._lost + (not finite)

    def shares(self) -> dict[str, Tensor]:
        """`unclipped`: int64 [2], how many of the numbers that this rank holds take a step shorter than the learning
        rate, and how many there are. `estimates_lost`, if any were: of the estimates since this was asked last, those
        that were not finite and left out."""
        lost = {"estimates_lost": torch.tensor([self._lost, self._made])} if self._lost else {}
        self._made = self._lost = 0
        found = [torch.zeros(2, dtype=torch.int64, device=self.param_groups[0]["params"][0].device)]
        for state in self.state.values():
            exp_avg, hessian = (_local(state[key]) for key in ("exp_avg", "hessian"))
            for m, h in zip(_blocks(exp_avg), _blocks(hessian), strict=True):
                unclipped = m.abs().lt_(h * self.config.rho).sum().long()  # in place: a sum of numbers, not of bools
                found.append(torch.stack([unclipped, torch.full_like(unclipped, m.numel())]).to(found[0].device))
        return {"unclipped": torch.stack(found).sum(0), **lost}

    def _gauss_newton_bartlett(self, passes: "Passes") -> bool:
        """n * g^2, of the gradient g of the mean of n losses on labels that the model drew: in expectation the diagonal
        of the Gauss-Newton matrix (section 2.3), which g^2 on given labels is not. Returns whether it is finite."""
        count = passes.drawn()
        if not count:
            return True
        # The norm is looked at once in `every` steps: one estimate that is not finite would stay in h for good.
        if not passes.clip(self.config.clip_estimate).isfinite():
            return False
        beta = self.config.betas[1]
        with torch.no_grad():
            for _, parameter in self._trained():
                if parameter.grad is not None:
                    hessian = _local(self._state(parameter)["hessian"])
                    grad = _local(parameter.grad).to(hessian.dtype)
                    hessian.mul_(beta).addcmul_(grad, grad, value=(1 - beta) * count)
        return True

    def _hutchinson(self, passes: "Passes") -> bool:
        """u * (H u) for random signs u: in expectation the diagonal of the Hessian (section 2.3, where u is normal,
        which makes it vary more). Returns whether it is finite.

        H u is a central difference of gradients, since fused losses, recomputation and sharding have no second
        derivatives. Its error is of the order of spacing^2 by what the Hessian changes, and of epsilon / spacing by
        rounding, so weights are moved by the cube root of epsilon (0.5 % in float32) of the root mean square of all.
        """
        with torch.no_grad():
            trained = [(name, one, _local(one)) for name, one in self._trained()]
            kept = [weight.clone() for _, _, weight in trained]
        squares = torch.stack([weight.float().square().sum() for weight in kept]).sum()
        size = math.sqrt(float(passes.sum_shards(squares)) / sum(one.numel() for _, one, _ in trained))
        spacing = max(size, 1e-4) * torch.finfo(torch.float32).eps ** (1 / 3)
        gradients: list[list[Tensor | None]] = []
        finite = True
        try:
            for sign in (1, -1):
                with torch.no_grad():
                    for (name, parameter, weight), before in zip(trained, kept, strict=True):
                        weight.copy_(before + sign * spacing * _signs(name, parameter, passes))
                passes.loss()
                finite = finite and bool(passes.clip(None).isfinite())
                gradients.append([one.grad if one.grad is None else _local(one.grad) for _, one, _ in trained])
        finally:
            with torch.no_grad():
                for (_, _, weight), before in zip(trained, kept, strict=True):
                    weight.copy_(before)
        beta = self.config.betas[1]
        with torch.no_grad():
            for (name, parameter, _), up, down in zip(trained, *gradients, strict=True):
                if finite and up is not None and down is not None:
                    hessian = _local(self._state(parameter)["hessian"])
                    estimate = _signs(name, parameter, passes) * (up - down) / (2 * spacing)
                    hessian.mul_(beta).add_(estimate, alpha=1 - beta)
        return finite

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.param_groups:
            yield from zip(group["names"], group["params"], strict=True)


def update(weight: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor, factors: Tensor) -> None:
    """One step, in place, of tensors of one shape.

    Args:
        factors: [5], of the state's dtype: 1 - lr * decay, lr, b1, 1 - b1, rho.

    Products and sums are rounded one by one, so that compiled or not, and whatever the length of a part, it is the same
    to the last bit (on a CPU; compilers for GPUs fuse them).
    """
    keep, lr, beta, rest, rho = factors.unbind()
    exp_avg.mul_(beta).add_(grad.to(exp_avg.dtype) * rest)
    least = hessian.clamp(min=0).mul_(rho).add_(1e-15)
    step = exp_avg.abs().div_(least).clamp_(max=1).mul_(lr).mul_(exp_avg.sign())
    weight.copy_(weight.to(exp_avg.dtype).mul(keep).sub_(step))


@functools.cache
def compiled(device: str) -> Callable[..., None] | None:
    """`update` as one pass over memory, for tensors of one axis; None, with a warning, where there is no compiler."""
    try:
        kernel = torch.compile(update, dynamic=True)
        w, g, m, h = (torch.zeros(64, device=device) for _ in range(4))
        kernel(w, g, m, h, torch.zeros(5, device=device))
    except (RuntimeError, OSError) as error:  # all that torch raises; a compiler, its headers or Triton are missing
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"train.optimizer.kind sophia: torch.compile does not work on {device} ({reason}); steps go in blocks, to "
            "the same numbers in about three times the time; install a compiler (g++) to have them fast",
            stacklevel=2,
        )
        return None
    return kernel


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    flat = tensor.reshape(-1)
    return flat.split(BLOCK if flat.device.type == "cpu" else max(flat.numel(), 1))


def _signs(name: str, parameter: Tensor, passes: "Passes") -> Tensor:
    """-1 or 1 for every number of this rank's part of a parameter: drawn for all of it, so that ranks do not matter."""
    where = _local(parameter)
    generator = torch.Generator(where.device).manual_seed(keyed_seed(passes.seed, "signs", passes.step, name))
    drawn = torch.randint(2, parameter.shape, generator=generator, device=where.device, dtype=torch.int8)
    if isinstance(parameter, DTensor):
        (chunk,) = parameter.__create_chunk_list__()
        drawn = drawn[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))]
    return drawn.view(where.shape).to(where.dtype).mul_(2).sub_(1)


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
