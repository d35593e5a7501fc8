"""torch's Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, torch's AdamW for the rest.

Muon makes the momentum of a matrix nearly orthogonal by Newton-Schulz iterations, in bfloat16. It takes tensors of two
axes; a stack of matrices, such as experts, is stepped slice by slice. Whole matrices are needed: `owned` sees to that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mm.errors import ConfigError
from mm.train.optim.config import MuonConfig
from mm.train.optim.owned import Groups, owned
from mm.train.optim.split import Split


def build(config: MuonConfig, groups: Groups) -> Optimizer:
    """Muon for the groups of role matrix, AdamW for the others, at `adamw_lr` by their `lr_scale`.

    Raises `ConfigError` where there is no matrix, or one of more than three axes.
    """
    matrices = [group for group in groups if group["role"] == "matrix"]
    others = [group for group in groups if group["role"] != "matrix"]
    if not matrices:
        raise ConfigError("train.optimizer.kind muon: no matrix is trained; use adamw, or set roles in train.params")
    for group in matrices:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.ndim > 3:
                raise ConfigError(
                    f"train.optimizer.kind muon: {name} is {list(parameter.shape)}, expected a matrix or a stack of "
                    "them; set another role for it in train.params"
                )
    settings = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "ns_steps": config.iterations,
        "adjust_lr_fn": config.scale,
    }
    parts = [owned(matrices, lambda own: StackedMuon(own, **settings))]
    if others:
        rate = config.adamw_lr or config.lr
        for group in others:
            group["lr_scale"] *= rate / config.lr
        parts.append(torch.optim.AdamW(others, lr=rate, betas=config.betas, eps=config.eps, fused=True))
    return Split(parts)


class StackedMuon(Optimizer):
    """`torch.optim.Muon` for matrices [m, n] and stacks of matrices [E, m, n].

    In a step it is given the slices of weights, gradients and momenta, which share their memory with the whole. So its
    arithmetic is torch's, and `state[parameter]["momentum_buffer"]` has the parameter's shape.
    """

    def __init__(self, groups: Groups, **settings: Any) -> None:
        self._muon = torch.optim.Muon([{**group, "params": []} for group in groups], **settings)
        super().__init__(groups, self._muon.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, sliced in zip(self.param_groups, self._muon.param_groups, strict=True):
            sliced.update({**group, "params": []})
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                wholes = (parameter.detach(), parameter.grad, state["momentum_buffer"])
                for weight, gradient, momentum in zip(*map(_slices, wholes), strict=True):
                    weight.grad = gradient
                    self._muon.state[weight] = {"momentum_buffer": momentum}
                    sliced["params"].append(weight)
        self._muon.step()
        self._muon.state.clear()
        for sliced in self._muon.param_groups:
            sliced["params"] = []


def _slices(whole: Tensor) -> tuple[Tensor, ...]:
    return (whole,) if whole.ndim == 2 else whole.unbind(0)
