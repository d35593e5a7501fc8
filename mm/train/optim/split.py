"""Several optimizers as one, where parameters of different roles get different algorithms."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class Split(Optimizer):
    """Steps all its parts. Its groups are the parts' own, the same dicts, and there is one state for all of them: who
    sets rates, clips gradients or saves moments need not know that there are parts."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
