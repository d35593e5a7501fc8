"""`mm.load`: a run, or one of its checkpoints, back as a model."""

from pathlib import Path
from typing import TYPE_CHECKING

from mm.config import RunConfig, load_config
from mm.errors import CheckpointError

if TYPE_CHECKING:
    from mm.data.layout import Layout
    from mm.models.system import System


def load(path: Path | str, device: str = "auto") -> "tuple[System, Layout, RunConfig]":
    """The model of a run folder (its newest checkpoint) or of one checkpoint folder, in evaluation mode.

    Returns:
        The system, its layout (tokenizer, template, transforms), and the run's config.

    Raises:
        CheckpointError: there is none, or it is of another model than the config beside it says.
    """
    from mm.train import checkpoint as checkpoints
    from mm.train.trainer import resolve_device

    path = Path(path)
    if (path / "state.json").is_file():
        run, newest = path.parent.parent, path
    else:
        run = path
        found = checkpoints.complete(path / "checkpoints")
        if not found:
            raise CheckpointError(f"{path}: neither a checkpoint nor a run with one (no {path / 'checkpoints'}/step-*)")
        newest = found[-1]
    config = load_config(run / "config.yaml")
    system = config.model.build(weights=False).to(resolve_device(device))
    checkpoints.load(newest, system)
    return system.eval(), config.model.layout(), config
