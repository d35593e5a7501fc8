"""Whole runs of a config file: trained, stopped behind a step, and what their checkpoints hold."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import load_config
from mm.train import checkpoint
from mm.train.trainer import Trainer, Unwatched


def train(path: Path, overrides: tuple[str, ...] = (), resume: bool = False) -> dict[str, Any]:
    """What `eval.json` holds."""
    return Trainer(load_config(path, overrides), Unwatched()).run(resume)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint, or of the checkpoint itself."""
    found = checkpoint.find(folder)
    tensors = {name: torch.empty(shape) for name, shape in checkpoint.described(found).items()}
    checkpoint.load(found, tensors)
    return tensors


class StopAt(Unwatched):
    """Ctrl-C behind a step."""

    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, row: dict[str, Any], steps: int) -> None:
        if row["step"] == self.last:
            os.kill(os.getpid(), signal.SIGINT)
