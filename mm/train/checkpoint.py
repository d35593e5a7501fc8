"""Checkpoints: folders that are whole or absent, written by torch.distributed.checkpoint as safetensors.

    checkpoints/step-00000100/state.json          step, loader, counters, versions, resolved config
    checkpoints/step-00000100/*.safetensors       model.NAME, optimizer.NAME.MOMENT, rng.*

A save goes to a temporary name, is flushed to disk and renamed; what a killed save leaves is ignored and cleared. There
is no pickle: tensors are safetensors, the rest is JSON.
"""

import json
import platform
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata as Bytes

from mm.errors import CheckpointError
from mm.files import fsync

FORMAT_VERSION = 2
PREFIX = "step-"


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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    parameters = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    buffers = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in parameters}
    return {**parameters, **{name: t for name, t in buffers.items() if name not in aliases}}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name: `NAME.exp_avg`."""
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


def rng_tensors() -> dict[str, Tensor]:
    return {
        "cpu": torch.get_rng_state(),
        **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}),
    }


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `step-NNNNNNNN`, then remove all but the newest `keep`. Raises OSError when the disk is full, say."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tensors = {
        **{f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()},
        **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()},
        **{f"rng.{name}": tensor for name, tensor in rng_tensors().items()},
    }
    try:
        partial.mkdir()
        _dcp(dcp.save, tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
        about = {"format_version": FORMAT_VERSION, "step": step, **state, "versions": versions()}
        (partial / "state.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        for file in (*partial.iterdir(), partial):
            fsync(file)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        fsync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in complete(folder)[:-keep]:
        gone = old.with_name(f".{old.name}.removed")
        old.rename(gone)
        shutil.rmtree(gone)
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json, checked. Raises `CheckpointError`."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: not a whole checkpoint ({error})") from None
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: checkpoint format {state.get('format_version')}, this version of mm reads {FORMAT_VERSION}"
        )
    return state


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load weights (and optimizer and RNG, if an optimizer is given) in place; returns the state.

    Raises `CheckpointError`, naming tensors, when the checkpoint is of another model, and when it is damaged.
    """
    state = read_state(checkpoint)
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        described = reader.read_metadata().state_dict_metadata
        saved = {name: tuple(about.size) for name, about in described.items() if not isinstance(about, Bytes)}
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: cannot be read ({error}); use an older checkpoint") from None
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    rng: dict[str, Tensor] = {}
    if optimizer is not None:
        create_optimizer_state(optimizer, {name.removeprefix("optimizer.").rpartition(".")[0] for name in saved})
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
        rng = {f"rng.{name}": tensor.clone() for name, tensor in rng_tensors().items()}
    parts = ("model.", "optimizer.") if optimizer is not None else ("model.",)
    extra = [name for name in saved if name.startswith(parts) and name not in tensors]
    wrong = [
        f"{name} is {list(saved[name])}, the model's {list(tensor.shape)}" if name in saved else f"{name} is missing"
        for name, tensor in tensors.items()
        if saved.get(name) != tuple(tensor.shape)
    ] + [f"{name} is not in the model" for name in extra]
    if wrong:
        raise CheckpointError(
            f"{checkpoint}: of another model: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else "")
        )
    rng = {name: tensor for name, tensor in rng.items() if name in saved}
    _dcp(dcp.load, {**tensors, **rng}, storage_reader=reader)
    if "rng.cpu" in rng:
        torch.set_rng_state(rng["rng.cpu"])
    if "rng.cuda" in rng:
        torch.cuda.set_rng_state(rng["rng.cuda"])
    return state


def _dcp(function: Any, tensors: dict[str, Tensor], **storage: Any) -> None:
    """Run DCP in one process and give back the plain error that it wraps (a full disk is an OSError again)."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            function(tensors, no_dist=True, **storage)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from None
