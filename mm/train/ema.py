"""Exponential moving average of the trained parameters (Polyak averaging), for evaluation and export.

In float32, and in the same parts as the parameters: under FSDP2 every rank averages its own shards. The decay of update
t is min(decay, (1 + t) / (10 + t)), so that a short run does not average over its random start (as TensorFlow's
ExponentialMovingAverage with num_updates).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Averages of what is trained in a system when this is made: after freezing and sharding.

    `decay` in [0, 1). Parameters that are replaced later (another stage that trains other ones, sharding) need a new
    EMA. Not for DeepSpeed's stage 3, whose parameters hold no values between steps.
    """

    def __init__(self, system: nn.Module, decay: float) -> None:
        self.system, self.decay, self.updates = system, decay, 0
        self.parameters = {name: p for name, p in system.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    def update(self) -> None:
        """Take the weights in; call it after every optimizer step that was not skipped."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach().float() for p in self.parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), weights, self.updates)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The system has the averages for weights inside, and afterwards the same weights as before, bit for bit.

        Every rank has to come. Train and save checkpoints outside of it.
        """
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        for module in self.system.modules():
            # What was gathered before, as the outermost unit is after an evaluation, would be used again.
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self) -> dict[str, Tensor]:
        """The averages as `ema.NAME`, for checkpoints: to be saved, or to be loaded into in place."""
        return {f"ema.{name}": average for name, average in self.averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints hold besides `tensors`, in plain JSON."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
