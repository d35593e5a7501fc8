"""What the readers of releases share: where files come from, and whether tensors fit."""

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from mm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm.models.prompts import Form

    Filled = TypeVar("Filled", bound=nn.Module)


class Release(Protocol):
    """A model as it was published."""

    kind: ClassVar[str]
    """The kind of system that it becomes here (`mm.models.config.SYSTEMS`)."""

    @property
    def form(self) -> "Form | None":
        """How it is asked unless somebody says; None of a model that writes no text."""
        ...

    def section(self) -> dict[str, Any]:
        """What it says of the config of its kind, with every setting that its weights depend on. Reads no weights."""
        ...

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        """The weights by the names of `system.named_parameters()` (and of its buffers), on the CPU.

        A system may have parts of which the release says nothing (heads); those that it does describe have to fit:
        raises `CheckpointError` for tensors that are missing, left over or of another shape than the system's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Repository:
    """A folder, or a repository of the hub, of which only the files that are asked for are fetched.

    What a release takes from other repositories (`Qwen/Qwen2.5-1.5B-Instruct`, timm's towers) is looked for in a folder
    of that name inside the release first, so that a machine without network needs nothing but one folder.
    """

    name: str

    @property
    def is_folder(self) -> bool:
        return Path(self.name).expanduser().is_dir()

    @property
    def folder(self) -> Path:
        """Absolute, since configs that name it are read elsewhere too."""
        return Path(self.name).expanduser().resolve()

    def has(self, file: str) -> bool:
        """Whether a local folder holds the file."""
        return self.is_folder and (self.folder / file).is_file()

    def file(self, file: str) -> Path:
        """The path of a file, fetched where it is not local. Raises `CheckpointError`."""
        if self.is_folder:
            if not self.has(file):
                raise CheckpointError(f"{self.name}: there is no {file} in this folder")
            return self.folder / file
        return fetch(self.name, file)

    def first(self, *files: str) -> Path:
        """The path of the first of these files that is to be had. Raises `CheckpointError`."""
        if self.is_folder:
            found = [file for file in files if self.has(file)]
            if not found:
                raise CheckpointError(f"{self.name}: there is no {' or '.join(files)} in this folder")
            return self.folder / found[0]
        for file in files[:-1]:
            with suppress(CheckpointError):
                return fetch(self.name, file)
        return fetch(self.name, files[-1])

    def files(self) -> list[str]:
        """The names of the files of a repository of the hub, not those in folders of it. Raises `CheckpointError`."""
        from huggingface_hub import HfApi

        try:
            return sorted(file for file in HfApi().list_repo_files(self.name) if "/" not in file)
        except Exception as error:  # the hub's client raises errors of a dozen libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.name}: the hub does not say which files it has ({reason})") from None

    def optional_file(self, file: str) -> Path | None:
        """None where the release has no such file. Raises `CheckpointError`, also where that cannot be known."""
        if self.is_folder and not self.has(file):
            return None
        try:
            return self.file(file)
        except NoSuchFileError:
            return None

    def optional_json(self, file: str) -> dict[str, Any] | None:
        """None where the release has no such file. Raises `CheckpointError`, also where that cannot be known."""
        return None if self.optional_file(file) is None else self.json(file)

    def json(self, file: str) -> dict[str, Any]:
        """Raises `CheckpointError`."""
        path = self.file(file)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected an object, found a {type(values).__name__}")
        return values

    def inner(self, name: str) -> Path | None:
        """A folder in a local release that stands for another repository."""
        path = self.folder / name
        return path if self.is_folder and path.is_dir() else None


class NoSuchFileError(CheckpointError):
    """The hub was asked, and its repository has no such file."""


def fetch(repository: str, file: str) -> Path:
    """A file of a repository of the hub, by way of the hub's cache. Raises `CheckpointError`."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise CheckpointError(
            f"{repository}: there is no such folder, and it is no name on the hub (OWNER/NAME) either"
        )
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's client raises errors of a dozen libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        absent = isinstance(error, EntryNotFoundError)
        if isinstance(error, LocalEntryNotFoundError):  # the cache keeps what it was told when it could ask
            absent = try_to_load_from_cache(repository, file) is _CACHED_NO_EXIST
        raise (NoSuchFileError if absent else CheckpointError)(
            f"{repository}: there is no such folder, and the hub does not give its {file} ({reason})"
        ) from None


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls a file of weights; with `.index.json` behind it, a table of several."""


def weight_files(repository: Repository) -> list[Path]:
    """The files that hold the weights: under transformers' names, or, on the hub, a single one under another; none
    where there is neither. Raises `CheckpointError`."""
    for name in WEIGHTS:
        if (about := repository.optional_json(f"{name}.index.json")) is not None:
            parts = about.get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(f, str) and f == Path(f).name for f in parts.values()):
                raise CheckpointError(
                    f"{repository.name}/{name}.index.json: expected names of files beside it in weight_map"
                )
            return [repository.file(part) for part in sorted(set(parts.values()))]
        if (path := repository.optional_file(name)) is not None:
            return [path]
    if not repository.is_folder:
        names = repository.files()
        for ends in ((".safetensors",), (".bin", ".pt", ".pth")):
            single = [name for name in names if name.endswith(ends) and name != "training_args.bin"]
            if len(single) == 1:
                return [repository.file(single[0])]
    return []


def read_tensors(*paths: Path) -> "dict[str, Tensor]":
    """The tensors of one or several files by name, mapped rather than read where that can be. Runs nothing of them.

    Raises:
        CheckpointError: one is damaged, or holds anything else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            try:
                found |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: damaged, or no safetensors ({error})") from None
            continue
        part = read_pickle(path)
        if not isinstance(part, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in part.items()
        ):
            raise CheckpointError(f"{path}: expected tensors by name, as torch saves a model's state_dict")
        found |= part
    return found


def read_pickle(path: Path) -> Any:
    """What torch saved in a file, mapped rather than read where torch can.

    torch's restricted unpickler makes tensors and plain containers and runs nothing of the file.

    Raises:
        CheckpointError: it is damaged, or asks for anything else.
    """
    import pickle

    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {named[1]}" if named else "it is no plain pickle of tensors"
        raise CheckpointError(
            f"{path}: holds something else than tensors ({what}); it was not loaded and nothing in it was run: get the "
            "file from where it was published"
        ) from None
    except Exception as error:  # a damaged archive fails in torch, zipfile or the unpickler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged, or not saved by torch ({reason})") from None


def fit(
    system: "nn.Module", found: "Mapping[str, Tensor]", where: str, spelt: Callable[[str], str] = str
) -> "dict[str, Tensor]":
    """The found tensors by the system's names, tied ones once.

    Args:
        found: by the release's names.
        where: names the release in errors.
        spelt: the release's name of one of the system's.

    Raises:
        CheckpointError: a table of all that is missing, left over, or of another shape or kind of number. Of tied
            tensors one is enough; where there are several they have to be equal.
    """
    import torch

    names: dict[int, list[str]] = {}
    own = system.state_dict(keep_vars=True)
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    fitted: dict[str, Tensor] = {}
    wrong: list[tuple[str, str, str]] = []
    for tied in names.values():
        tensor = own[tied[0]]
        present = [spelt(name) for name in tied if spelt(name) in found]
        if not present:
            wrong.append(("missing", spelt(tied[0]), f"expected {list(tensor.shape)}"))
        for name in present:
            if found[name].shape != tensor.shape:
                wrong.append(("shape", name, f"found {list(found[name].shape)}, expected {list(tensor.shape)}"))
            elif found[name].is_floating_point() != tensor.is_floating_point():
                wrong.append(("type", name, f"found {found[name].dtype}, expected {tensor.dtype}"))
            elif name != present[0] and not torch.equal(found[name], found[present[0]]):
                wrong.append(("not equal", name, f"to {present[0]}, which it is tied to"))
        if present:
            fitted[tied[0]] = found[present[0]]
    expected = {spelt(name) for name in own}
    wrong += [("unexpected", name, f"found {list(found[name].shape)}") for name in found if name not in expected]
    if wrong:
        raise CheckpointError(
            f"{where}: does not fit the model that its config describes; nothing was loaded:\n{_table(wrong)}"
        )
    return fitted


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Rows that differ in the number of a layer alone become one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for what, name, detail in rows:
        groups.setdefault((what, re.sub(r"\.\d+(?=\.)", ".*", name), detail), []).append(name)
    lines = [
        (what, names[0] if len(names) == 1 else f"{pattern} ({len(names)} tensors)", detail)
        for (what, pattern, detail), names in groups.items()
    ]
    width = max(len(name) for _, name, _ in lines)
    return "\n".join(f"  {what:<10}  {name:<{width}}  {detail}" for what, name, detail in lines)


def fill(system: "Filled", release: Release) -> "Filled":
    """Put a release's weights into a system, in place. Raises `CheckpointError`, and then the system is as before."""
    import torch

    own = system.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in release.tensors(system).items():
            own[name].copy_(tensor)
    return system
