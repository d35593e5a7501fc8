"""`mm.load`: a run, or one of its checkpoints, back as a model; `export`: out again in a published format."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mm.config import RunConfig, load_config
from mm.errors import ConfigError

if TYPE_CHECKING:
    from mm.data.layout import Layout
    from mm.models.system import System


def load(path: Path | str, device: str = "auto") -> "tuple[System, Layout, RunConfig]":
    """The model of a run folder (its newest checkpoint) or of one checkpoint folder, in evaluation mode.

    Where the run keeps averaged weights they are taken; adapters are merged.

    Returns:
        The system, its layout (tokenizer, template, transforms), and the run's config; of a run in stages, that of the
        checkpoint's stage.

    Raises:
        CheckpointError: there is none, or it is of another model than the config beside it says.
    """
    from mm.train import checkpoint
    from mm.train.distributed import resolve_device
    from mm.train.stages import trained_system

    folder = checkpoint.find(Path(path))
    stage = checkpoint.read_state(folder)["progress"]["stage"]
    config = load_config(folder.parent.parent / "config.yaml").stage_runs()[stage]
    system = trained_system(config, folder).to(resolve_device(device))
    return system.eval(), config.model.layout(), config


def export(path: Path | str, out: Path) -> str | None:
    """Write the model of a run or checkpoint into the folder `out`, which appears whole or not at all.

    A text_lm becomes a plain transformers folder.

    Returns:
        What a user of the folder has to know, if anything.

    Raises:
        ConfigError: the model is of another kind, or `out` is there.
        CheckpointError: there is none.
    """
    from mm.models.released import transformers
    from mm.models.systems.text_lm.model import TextLM

    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    system, layout, config = load(path, device="cpu")
    if not isinstance(system, TextLM):
        raise ConfigError(
            f"{path}: a {config.model.kind} model; only text_lm can be exported yet (`mm checkpoint merge` writes "
            "the weights of any as safetensors)"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        note = transformers.write(system.language, layout, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return note
