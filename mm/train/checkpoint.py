"""Checkpoints: folders that are whole or absent, written in the background by any number of ranks.

    checkpoints/step-00000100/state.json             step, what the trainer adds, versions, size and checksum of files
    checkpoints/step-00000100/tensors-00000.safetensors  rank 0's parts of model.NAME, optimizer.NAME.MOMENT, ema.NAME
    checkpoints/latest, checkpoints/best             the name of a folder

torch.distributed.checkpoint plans who writes and reads which part, so a checkpoint loads at any number of ranks. A save
goes to a temporary name; every file is on the disk before state.json is written, and that before the folder gets its
name and `latest` names it. What a killed save leaves is ignored, and cleared when the run goes on. There is no pickle:
tensors are safetensors, the rest is JSON.
"""

import json
import platform
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from mm.errors import CheckpointError
from mm.files import atomic, fsync
from mm.train.storage import Reader, Writer

FORMAT_VERSION = 4
PREFIX = "step-"
TRIES, PATIENCE = 5, 60
"""So many saves in a row may fail for the disk, which may be mended meanwhile; the first is to be tried again after so
many seconds, each further one after twice as many as the one before."""
PAUSES = (5, 10, 20, 40)
"""Seconds before one that nothing goes on without is tried again."""

# Said at each save and load of one process. A filter for the time of a call would not hold: they run in two threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def versions() -> dict[str, str]:
    """What a run was made with."""
    found = {"python": platform.python_version()}
    for package in (
        "mm-pretrain",
        "torch",
        "torchvision",
        "transformers",
        "timm",
        "tokenizers",
        "safetensors",
        "deepspeed",
        "peft",
        "numpy",
        "pillow",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def pointed(folder: Path, pointer: str) -> Path | None:
    """The whole checkpoint that `latest` or `best` names."""
    try:
        path = folder / (folder / pointer).read_text().strip()
    except OSError:
        return None
    return path if path.name.startswith(PREFIX) and (path / "state.json").is_file() else None


def newest(folder: Path) -> Path | None:
    """Where a run goes on: the checkpoint that `latest` names, or else the whole one of the highest step."""
    return pointed(folder, "latest") or next(reversed(complete(folder)), None)


def find(path: Path) -> Path:
    """A checkpoint, given itself, its run (then the newest), or the run's folder of checkpoints."""
    if (path / "state.json").is_file():
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run with one (no {path / 'checkpoints'}/{PREFIX}*)")
    return found


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    parameters = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    buffers = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in parameters}
    return {**parameters, **{name: t for name, t in buffers.items() if name not in aliases}}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name: `NAME.exp_avg`. What another rank owns (`mm.train.optim.owned`) it gives."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
    return tensors


def create_optimizer_state(optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Give the named parameters the (zero) state that a checkpoint is loaded into, by a step with a rate of 0.

    A parameter that never had a gradient, such as a norm behind the block that is used, has no state and gets none.
    """
    saved = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
        for name, parameter in zip(group["names"], group["params"], strict=True):
            parameter.grad = torch.zeros_like(parameter) if name in names else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, (lr, decay) in zip(optimizer.param_groups, saved, strict=True):
        group["lr"], group["weight_decay"] = lr, decay


class Checkpoints:
    """The checkpoints of a run that trains. Every rank makes one, and calls `save` and `wait` at the same steps.

    Args:
        folder: Of the run's checkpoints, the same for all ranks, on a disk that they share.
        keep: So many of the newest stay,
        keep_every: and those whose step is a multiple of this (0: none), and the best.
        asynchronous: Write from a copy in host memory, as large as this rank's parts, while training goes on.
        ranks, rank: Of the run. More than one need `torch.distributed`, and talk over a gloo group of their own.
        timeout: Seconds that a rank waits for the others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool = True,
        ranks: int = 1,
        rank: int = 0,
        timeout: float = 1800,
    ) -> None:
        self.folder = folder
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous = asynchronous
        self.ranks, self.rank = ranks, rank
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if ranks > 1 else None
        self._failures = 0
        """Saves in a row that failed,"""
        self._failure: BaseException | None = None
        """and what the last of them raised."""
        self._failed_at: float | None = None
        """When that was seen of the last one."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: bool = False) -> None:
        """Write `step-NNNNNNNN`; when asynchronous, this returns as soon as a copy of the tensors is made.

        Args:
            tensors: By name; whole ones, the same on all ranks or on one of them, or DTensors. Tied ones once.
            state: JSON for rank 0 to store beside them.
            best: Let `best` name this one.

        What writing raises, on any rank, all ranks are told by `ended`; the checkpoints before it are untouched.

        Raises:
            OSError, CheckpointError: What the save before this one raised, if it was no fault of the disk, or the last
                of `TRIES` in a row.
        """
        self.ended()
        if self._failure is not None and (self._failures >= TRIES or not isinstance(self._failure, OSError)):
            raise self._failure
        about = {"format_version": FORMAT_VERSION, "step": step, "ranks": self.ranks, **json.loads(json.dumps(state))}
        staged = self._stage(tensors)
        self._writing = self._thread.submit(self._write, self.folder / f"{PREFIX}{step:08d}", staged, about, best)
        if not self.asynchronous:
            futures.wait([self._writing])

    def to_be_repeated(self) -> bool:
        """Whether this rank has known for long enough that the last save failed for the disk."""
        if self._writing is None or not self._writing.done() or not isinstance(self._writing.exception(), OSError):
            return False
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        return time.monotonic() - self._failed_at >= PATIENCE * 2**self._failures

    def wait(self) -> None:
        """Return when the last save is on the disk, and raise what it raised."""
        if (failure := self.ended()) is not None:
            raise failure

    def insist(self, again: Callable[[], None], say: Callable[[str], None]) -> None:
        """`wait`, but `save` what could not be written for the disk `again`, and again, before giving up."""
        for pause in PAUSES:
            failure = self.ended()
            if not isinstance(failure, OSError):
                break
            say(f"the checkpoint could not be written ({failure}); trying again in {pause} s")
            time.sleep(pause)
            again()
        else:
            failure = self.ended()
        if failure is not None:
            raise failure

    def settle(self, seconds: float) -> None:
        """Let a save that is under way come to its end, if it does so in this time."""
        if self._writing is not None:
            futures.wait([self._writing], seconds)

    def ended(self) -> BaseException | None:
        """What the last save raised, when it has come to its end; said once."""
        if self._writing is None:
            return None
        writing, self._writing, self._failed_at = self._writing, None, None
        self._failure = writing.exception()
        self._failures = 0 if self._failure is None else self._failures + 1
        return self._failure

    def close(self) -> None:
        """`wait`, and end the thread and the group that were made for writing."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    @torch.no_grad()
    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, each with its place in the whole (`torch.distributed.checkpoint.protocol`)."""
        staged: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if self.asynchronous:
                copy = self._copies.get(name)
                if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
                    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                part = copy.copy_(part, non_blocking=True)
            if isinstance(tensor, DTensor):
                (chunk,) = tensor.__create_chunk_list__()
                part.global_shape = tuple(tensor.shape)  # type: ignore[attr-defined]
                part.global_offsets = (tuple(chunk.offsets),)  # type: ignore[attr-defined]
                part.local_offsets = ((0,) * tensor.dim(),)  # type: ignore[attr-defined]
                part.local_sizes = (tuple(chunk.sizes),)  # type: ignore[attr-defined]
            staged[name] = part
        if self.asynchronous:
            self._copies = staged
            for device in {tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"}:
                torch.accelerator.synchronize(device)
        return staged

    def _write(self, final: Path, tensors: dict[str, Tensor], about: dict[str, Any], best: bool) -> None:
        partial = final.with_name(f".{final.name}.partial")
        writer = Writer(partial, lambda files: self._commit(partial, final, {**about, "files": files}, best))
        try:
            dcp.save(
                tensors,
                storage_writer=writer,
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            raise _cause(error) from None
        finally:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _commit(self, partial: Path, final: Path, about: dict[str, Any], best: bool) -> None:
        """Rank 0, when all files are on the disk: the rest, in an order that may be cut off anywhere."""
        if missing := [name for name in about["files"] if not (partial / name).is_file()]:
            raise CheckpointError(
                f"{partial / missing[0]}: written by another rank and not seen by rank 0; `out` must be a folder that "
                "all machines share"
            )
        with atomic(partial / "state.json") as file:
            text = json.dumps({**about, "saved": time.time(), "versions": versions()}, indent=2, ensure_ascii=False)
            file.write(text.encode() + b"\n")
        fsync(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        for pointer in ("best", "latest") if best else ("latest",):
            with atomic(self.folder / pointer) as file:
                file.write(final.name.encode() + b"\n")
        fsync(self.folder)
        found = complete(self.folder)
        stay = {*found[-self.keep :], final, pointed(self.folder, "best")}
        for old in found:
            if old not in stay and not (self.keep_every and int(old.name.removeprefix(PREFIX)) % self.keep_every == 0):
                _remove(old)


def clear_leftovers(folder: Path) -> None:
    """Of a killed save. One that was whole, but for its name, gets it."""
    for left in folder.glob(f".{PREFIX}*.partial"):
        final = folder / left.name.removeprefix(".").removesuffix(".partial")
        if (left / "state.json").is_file() and not final.exists():
            left.rename(final)
    for left in folder.glob(".*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a checkpoint that is half removed must not be taken for a whole one.

    Files that somebody has open stay on some network disks, which is no reason to fail: they go with the next one.
    """
    checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.{uuid.uuid4().hex}.removed"))
    for gone in checkpoint.parent.glob(f".{PREFIX}*.removed"):
        shutil.rmtree(gone, ignore_errors=True)


def _cause(error: CheckpointException) -> BaseException:
    """The plain error that torch.distributed.checkpoint wraps: a full disk is an OSError again."""
    return error.failures[min(error.failures)][0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json, checked; the tensors' files are there in full size. Raises `CheckpointError`."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: not a whole checkpoint ({error})") from None
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: checkpoint format {state.get('format_version')}, this version of mm reads {FORMAT_VERSION}"
        )
    for name, about in state["files"].items():
        size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if size != about["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{checkpoint}: damaged: {name} {found}, expected {about['bytes']:,} bytes; use an older checkpoint"
            )
    return state


def open_reader(checkpoint: Path) -> Reader:
    """Raises `CheckpointError` when the headers of its files cannot be read."""
    try:
        return Reader(checkpoint)
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: cannot be read ({error}); use an older checkpoint") from None


def described(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole tensors by name. Raises `CheckpointError`."""
    read_state(checkpoint)
    return {name: tuple(about.size) for name, about in open_reader(checkpoint).tensors.items()}


def load(checkpoint: Path, tensors: dict[str, Tensor], all_of_a_kind: bool = True) -> dict[str, Any]:
    """Load tensors in place, whatever the number of ranks was that saved them; returns the state.

    Of the kinds of tensors that are given (`model.`, `optimizer.`, `ema.`), the checkpoint must hold these and, with
    `all_of_a_kind`, no others. Each rank reads its own parts; where `torch.distributed` runs, all ranks must call this,
    and what one of them cannot load is raised on all.

    Args:
        tensors: By name; whole ones (a rank may give some of them only) or DTensors.

    Raises:
        CheckpointError: The checkpoint is damaged, of another format, or, naming tensors, of another model.
    """
    state: dict[str, Any] = {}
    problem, kinds, others = "", set[str](), set[str]()
    try:
        state = read_state(checkpoint)
        reader = open_reader(checkpoint)
        saved = {name: tuple(about.size) for name, about in reader.tensors.items()}
        kinds = {name.partition(".")[0] for name in tensors}
        others = {name for name in saved if name not in tensors}
        problem = _summary(checkpoint, _mismatches(saved, tensors))
    except CheckpointError as error:
        problem = str(error)
    found = _all_ranks((problem, kinds, others))
    given = set().union(*(kinds for _, kinds, _ in found))
    nobodys = sorted(set.intersection(*(others for _, _, others in found)))
    unknown = [f"{name} is not in the model" for name in nobodys if all_of_a_kind and name.partition(".")[0] in given]
    _raise_first([*(problem for problem, _, _ in found), _summary(checkpoint, unknown)])
    try:
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        problem = f"{checkpoint}: cannot be read ({_cause(error)}); use an older checkpoint"
    _raise_first(_all_ranks(problem))
    return state


def _mismatches(saved: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> list[str]:
    return [
        f"{name} is {list(saved[name])}, the model's {list(tensor.shape)}" if name in saved else f"{name} is missing"
        for name, tensor in tensors.items()
        if saved.get(name) != tuple(tensor.shape)
    ]


def _summary(checkpoint: Path, wrong: list[str]) -> str:
    more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
    return f"{checkpoint}: of another model: {wrong[0]}{more}" if wrong else ""


def _all_ranks(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _raise_first(problems: list[str]) -> None:
    for problem in problems:
        if problem:
            raise CheckpointError(problem)
