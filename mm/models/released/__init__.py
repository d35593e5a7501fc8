"""Published checkpoint formats, one file each.

A *release* is a model as somebody else's code wrote it: a folder, or a repository of the hub of the same layout.
Reading one gives a section of a config and the tensors under this framework's names; nothing of it is run, and every
tensor has to be there, in its shape, and no other (`release.fit`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mm.errors import CheckpointError
from mm.models.released.release import Release, Repository, fill
from mm.settings import Section, merge

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "Release", "fill", "find", "open_release", "tensors_of", "with_released"]

FORMATS = {
    "transformers": ("text_lm", "masked_lm"),
    "prismatic": ("open_qwen2vl",),
    "hf-llava": ("open_qwen2vl",),
    "hf": ("mert", "tagger"),
    "janus-vq": ("vq",),
    "open_clip": ("clip",),
    "cosmo": ("cosmo",),
    "lavis": ("simvlg",),
}
"""The formats that `mm export` writes, and the kinds of model that each is for."""


def find(name: Path | str) -> Release | None:
    """The release that a folder, a file of weights or a hub name holds; None where it holds something else.

    Raises:
        CheckpointError: there is no such folder, nor such a repository on the hub, or it is of an unknown format.
    """
    from mm.models.released import cosmo, lavis
    from mm.models.released.chameleon import ChameleonFolder, consolidated
    from mm.models.released.llava import LlavaFolder
    from mm.models.released.mert import MODEL_TYPES, MertFolder
    from mm.models.released.open_clip import found
    from mm.models.released.prismatic import PrismaticFolder

    if (meta := consolidated(name)) is not None:
        return meta
    repository = Repository(str(name))
    if (clip := found(repository)) is not None:
        return clip
    if (saved := lavis.checkpoint(name)) is not None:
        return saved
    if (state := cosmo.found(name)) is not None:
        return state
    if Path(name).exists() and not repository.has("config.json"):
        return None
    about = repository.json("config.json")
    if about.get("model_type") == "llava":
        return LlavaFolder(repository, about)
    if about.get("model_type") == "chameleon":
        return ChameleonFolder(repository)
    if about.get("model_type") in MODEL_TYPES:
        return MertFolder(repository, about)
    if isinstance(model := about.get("model"), dict) and "arch_specifier" in model:
        return PrismaticFolder(repository, about)
    raise CheckpointError(
        f"{name}: its config.json is neither that of an Open-Qwen2VL release (model.arch_specifier) nor that of a "
        "LlavaForConditionalGeneration (model_type: llava), nor of MERT (model_type: mert_model, or hubert), nor of "
        "Chameleon (model_type: chameleon), nor of COSMO (model_params)"
    )


def open_release(name: Path | str, kind: str) -> Release:
    """`find`, where there has to be one that becomes a system of this kind."""
    release = find(name)
    if release is None:
        raise CheckpointError(
            f"{name}: holds no config.json, nor weights in the layout of COSMO or LAVIS, so it is no release"
        )
    if release.kind != kind:
        raise CheckpointError(f"{name}: is a release of the kind {release.kind}, expected one of the kind {kind}")
    return release


def with_released(values: Any, kind: str, section: type[Section]) -> Any:
    """The values of a system's section over those of the release that its key `released` names, if it names one.

    When every key of the section is there, and of the sections in it, as in what a run keeps of its config, nothing is
    left for the release to say, and it is not asked. `kind` is that of the release.
    """
    if not (isinstance(values, dict) and values.get("released")) or _is_whole(values, section):
        return values
    return merge(open_release(values["released"], kind).section(), values)


def _is_whole(values: Any, section: type[Section]) -> bool:
    if not isinstance(values, dict):
        return isinstance(values, section)
    return all(
        name in values and (not _is_section(inner := field.annotation) or _is_whole(values[name], inner))
        for name, field in section.model_fields.items()
    )


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def tensors_of(release: Release) -> "dict[str, Tensor]":
    """The weights of a release by the names of its own model here, to be taken over by another one."""
    import torch

    from mm.models.config import SYSTEMS

    config: Any = SYSTEMS.resolve(release.kind).model_validate(release.section())
    with torch.device("meta"):
        system = config.build(weights=False)
    return release.tensors(system)
