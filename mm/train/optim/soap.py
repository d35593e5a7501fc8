"""SOAP (Vyas et al., 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner.

Of every matrix's gradients G there are running means of G G^T and G^T G (`gram_0`, `gram_1`), and approximate
eigenvectors of these (`basis_0`, `basis_1`), brought up to date every so many steps. Adam works on G as it is in these
bases, and its step is turned back. The arithmetic is that of github.com/nikhilvyas/SOAP, in three pairs of matrix
products instead of five: the first moment stays in the bases, and is turned only when they change.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from mm.errors import ConfigError
from mm.train.optim.config import SOAPConfig
from mm.train.optim.owned import Groups, owned
from mm.train.optim.split import Split

PANELS = 8  # that a large Gram matrix is worked out in
PANEL = 128  # rows at least


def build(config: SOAPConfig, groups: Groups) -> Optimizer:
    """SOAP for the groups of the roles that `precondition` names, AdamW for the others.

    Raises `ConfigError` where there is none of the former, or one of which no axis would be rotated.
    """
    rotated = [group for group in groups if group["role"] in config.precondition]
    others = [group for group in groups if group["role"] not in config.precondition]
    if not rotated:
        found = ", ".join(sorted({group["role"] for group in groups}))
        raise ConfigError(
            f"train.optimizer.kind soap: nothing of the roles in `precondition` is trained, only {found}; use adamw, "
            "or set roles in train.params"
        )
    for group in rotated:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            shape = _matrix_shape(parameter, group["role"])[-2:]
            if config.block is None and min(shape) > config.max_precond_dim:
                raise ConfigError(
                    f"train.optimizer.kind soap: {name} is {[*shape]}, both axes longer than max_precond_dim "
                    f"{config.max_precond_dim}, and would take steps of Adam; set block, a larger max_precond_dim, or "
                    "its role to one that is not in `precondition`, in train.params"
                )
    settings = config.model_dump(exclude={"kind", "precondition", "weight_decay"})
    parts = [owned(rotated, lambda own: SOAP(own, **settings))]
    if others:
        parts.append(torch.optim.AdamW(others, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    return Split(parts)


class SOAP(Optimizer):
    """Of whole, plain tensors of two or more axes. The first gradient of each makes its state and moves nothing.

    Three axes are a stack of matrices [n, rows, columns], unless the group's `role` is another than `matrix`; else
    what is behind the first axis is one: [rows, …]. State is float32, or float64 for parameters in float64.

    Args:
        params: Parameters, or groups of them.
        betas: Decay of the moments; `shampoo_beta` of the Gram matrices, by default the second of these.
        eps: Added to the root of the second moment before that is corrected for its bias.
        weight_decay: Decoupled, after the step.
        every: Steps between refreshes of the bases.
        max_precond_dim: A longer axis is not rotated, or, with `block`, cut into blocks of at most so many. Blocks are
            matrices of their own; the keys of their state end in `_NUMBER`, counted along rows.
        normalize: Bring the update of each matrix to a root mean square of 1.
        correct_bias: Of the moments, as Adam.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        every: int = 10,
        max_precond_dim: int = 4096,
        block: int | None = None,
        normalize: bool = False,
        correct_bias: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": betas[1] if shampoo_beta is None else shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "every": every,
            "max_precond_dim": max_precond_dim,
            "block": block,
            "normalize": normalize,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"SOAP is for matrices; there is a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        first = not state
        if first:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.int64)  # on the CPU, where it is read
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        else:
            state["step"] += 1
        step = int(state["step"])
        update = torch.empty_like(state["exp_avg"])
        shape = _matrix_shape(parameter, group.get("role", "matrix"))
        whole = [one.reshape(shape) for one in (grad.to(update), state["exp_avg"], state["exp_avg_sq"], update)]
        for suffix, place, axes in _blocks(whole[0].shape, group["max_precond_dim"], group["block"]):
            g, m, v, direction = (one[place] for one in whole)
            sides = {axis: g.mT if axis else g for axis in axes}
            if first:
                for axis, side in sides.items():
                    gram = (1 - group["shampoo_beta"]) * (side @ side.mT)
                    state[f"gram_{axis}{suffix}"], state[f"basis_{axis}{suffix}"] = gram, eigenvectors(gram)
                continue
            grams = {axis: state[f"gram_{axis}{suffix}"] for axis in axes}
            bases = {axis: state[f"basis_{axis}{suffix}"] for axis in axes}
            direction.copy_(_adam(g, m, v, bases, group))
            for axis, side in sides.items():
                add_gram_(grams[axis], side, group["shampoo_beta"])
            if step % group["every"] == 0:
                refresh_(m, v, grams, bases)
        if not first:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["correct_bias"] else lr
            # At once, so that weights less precise than the state are rounded once.
            parameter.copy_(torch.add(parameter, update, alpha=-size).mul_(1 - lr * group["weight_decay"]))


def _matrix_shape(parameter: Tensor, role: str) -> tuple[int, ...]:
    """[rows, columns], or of a stack [n, rows, columns]."""
    stacked = parameter.ndim == 3 and role == "matrix"
    return tuple(parameter.shape) if stacked else (len(parameter), math.prod(parameter.shape[1:]))


def _blocks(
    shape: torch.Size, limit: int, block: int | None
) -> Iterator[tuple[str, tuple[Any, slice, slice], tuple[int, ...]]]:
    """Of matrices [..., rows, columns]: what the keys of each block's state end in, its place, the axes it rotates."""
    cuts = [size if size <= limit or block is None else block for size in shape[-2:]]
    axes = tuple(axis for axis, cut in enumerate(cuts) if cut <= limit)
    rows, columns = (
        [slice(start, start + cut) for start in range(0, size, cut)] for size, cut in zip(shape[-2:], cuts, strict=True)
    )
    places = [(..., some, others) for some in rows for others in columns]
    for number, place in enumerate(places):
        yield "" if len(places) == 1 else f"_{number}", place, axes


def _adam(g: Tensor, m: Tensor, v: Tensor, bases: dict[int, Tensor], group: dict[str, Any]) -> Tensor:
    """Updates the moments, which are in the bases, and returns the direction of the step, which is not."""
    beta1, beta2 = group["betas"]
    g = rotate(g, bases)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    direction = m / v.sqrt().add_(group["eps"])
    if group["normalize"]:  # rotations keep the norm
        direction /= 1e-30 + direction.square().mean((-2, -1), keepdim=True).sqrt()
    return rotate_back(direction, bases)


def rotate(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """[..., rows, columns] in the bases of the axes that have one: Q0^T x Q1."""
    x = bases[0].mT @ x if 0 in bases else x
    return x @ bases[1] if 1 in bases else x


def rotate_back(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """Q0 x Q1^T."""
    x = bases[0] @ x if 0 in bases else x
    return x @ bases[1].mT if 1 in bases else x


def add_gram_(gram: Tensor, side: Tensor, beta: float) -> None:
    """gram [..., d, d] becomes beta * gram + (1 - beta) * side side^T, for side [..., d, k].

    It is symmetric, so a panel of rows is worked out from its diagonal block on: what is left of that is out of date.
    """
    panel = max(PANEL, -(-gram.shape[-1] // PANELS))
    for start in range(0, gram.shape[-1], panel):
        out, rows = gram[..., start : start + panel, start:], side[..., start : start + panel, :]
        add = torch.addmm if gram.ndim == 2 else torch.baddbmm
        add(out, rows, side[..., start:, :].mT, beta=beta, alpha=1 - beta, out=out)


def eigenvectors(gram: Tensor) -> Tensor:
    """Of symmetric [..., d, d], in columns, that of the largest eigenvalue first."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if not isinstance(gram, FakeTensor) and not gram.any():  # as where a checkpoint is to be loaded into it
        return eye.flip(-1).expand_as(gram).contiguous()
    gram = gram + 1e-30 * eye
    try:
        vectors = torch.linalg.eigh(gram)[1]
    except torch.linalg.LinAlgError:  # which float32 may meet where many eigenvalues are alike
        vectors = torch.linalg.eigh(gram.double())[1].to(gram.dtype)
    return vectors.flip(-1).contiguous()


def refresh_(m: Tensor, v: Tensor, grams: dict[int, Tensor], bases: dict[int, Tensor]) -> None:
    """Bring the bases closer to the eigenvectors by one power iteration, and the moments along.

    Columns are put in the order of their eigenvalues first, and the second moment with them; the signs that they come
    out with do not matter to it. The first moment is turned out of the old bases and into the new.
    """
    whole = rotate_back(m, bases)
    for axis, basis in bases.items():
        upper = grams[axis].triu()
        image = (upper + upper.triu(1).mT) @ basis
        order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
        basis.copy_(torch.linalg.qr(image.gather(-1, order.unsqueeze(-2).expand_as(image)))[0])
        v.copy_(v.gather(axis - 2, order.unsqueeze(-1 - axis).expand_as(v)))
    m.copy_(rotate(whole, bases))
