"""Exponential moving average of the trained parameters (Polyak averaging), for evaluation and export.

In float32, and in the same parts as the parameters: under FSDP2 every rank averages its own shards. The decay of update
t is min(decay, (1 + t) / (10 + t)), so that a short run does not average over its random start (as TensorFlow's
ExponentialMovingAverage with num_updates). Parameters that came later count from there.
"""

import contextlib
from collections.abc import Collection, Iterator
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
        self.since: dict[str, int] = {}
        """The updates that were made before a parameter was there, where there were any."""

    def update(self) -> None:
        """Take the weights in; call it after every optimizer step that was not skipped."""
        self.updates += 1
        for since in {0, *self.since.values()}:
            names = [name for name in self.parameters if self.since.get(name, 0) == since]
            if names:
                own = self.updates - since
                weights = [self.parameters[name].detach().float() for name in names]
                get_ema_multi_avg_fn(min(self.decay, (1 + own) / (10 + own)))(
                    [self.averages[name] for name in names], weights, own
                )

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
        return {"updates": self.updates, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.since = state["updates"], dict(state.get("since", {}))

    def go_on(self, state: dict[str, Any], names: Collection[str]) -> None:
        """From the state of another stage, of which the averages of these parameters were loaded; others begin now."""
        self.load_state_dict(state)
        self.since = {name: self.since.get(name, 0) if name in names else self.updates for name in self.parameters}
        self.since = {name: since for name, since in self.since.items() if since}
