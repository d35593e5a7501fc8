"""Published checkpoint formats, one file each.

A *release* is a model as somebody else's code wrote it: a folder, or a repository of the hub of the same layout.
Reading one gives a section of a config and the tensors under this framework's names; nothing of it is run, and every
tensor has to be there, in its shape, and no other (`release.fit`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mm.errors import CheckpointError
from mm.models.released.release import Release, Repository, fill

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "Release", "fill", "find", "open_release", "tensors_of"]

FORMATS = {
    "transformers": "text_lm",
    "prismatic": "open_qwen2vl",
    "hf-llava": "open_qwen2vl",
}
"""The formats that `mm export` writes, and the kind of model that each is for."""


def find(name: Path | str) -> Release | None:
    """The release that a folder or a hub name holds; None where a folder holds something else.

    Raises:
        CheckpointError: there is no such folder, nor such a repository on the hub, or it is of an unknown format.
    """
    from mm.models.released.llava import LlavaFolder
    from mm.models.released.prismatic import PrismaticFolder

    repository = Repository(str(name))
    if repository.is_folder and not repository.has("config.json"):
        return None
    about = repository.json("config.json")
    if about.get("model_type") == "llava":
        return LlavaFolder(repository, about)
    if isinstance(model := about.get("model"), dict) and "arch_specifier" in model:
        return PrismaticFolder(repository, about)
    raise CheckpointError(
        f"{name}: its config.json is neither that of an Open-Qwen2VL release (model.arch_specifier) nor that of a "
        "LlavaForConditionalGeneration (model_type: llava)"
    )


def open_release(name: Path | str) -> Release:
    """`find`, where there has to be one."""
    release = find(name)
    if release is None:
        raise CheckpointError(f"{name}: holds no config.json, so it is no release")
    return release


def tensors_of(release: Release) -> "dict[str, Tensor]":
    """The weights of a release by the names of its own model here, to be taken over by another one."""
    import torch

    from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig

    with torch.device("meta"):
        system = OpenQwen2VLConfig.model_validate(release.section()).build(weights=False)
    return release.tensors(system)
