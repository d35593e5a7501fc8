"""What `mm checkpoint` does: list a run's checkpoints, verify them byte by byte, merge one into a model's weights."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from mm.errors import CheckpointError
from mm.files import atomic
from mm.train.checkpoint import PREFIX, complete, find, open_reader, pointed, read_state
from mm.train.storage import SUFFIX, crc32, in_order, write


def listing(run: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, oldest first.

    Each with `name`, `step`, `bytes`, `age` (seconds), `whole`, `marks` (`latest`, `best`), `ranks` and `engine`. One
    that is not whole is being written, or was left by a killed save.
    """
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    marks = {mark: pointed(folder, mark) for mark in ("latest", "best")}
    rows = []
    for path in sorted([*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*.partial")]):
        state: dict[str, Any] = {}
        try:
            state = read_state(path)
            problem = ""
        except CheckpointError as error:
            problem = str(error)
        name = path.name.removeprefix(".").removesuffix(".partial")
        rows.append(
            {
                "name": path.name,
                "step": int(name.removeprefix(PREFIX)),
                "bytes": sum(file.stat().st_size for file in path.iterdir()),
                "age": round(time.time() - state.get("saved", path.stat().st_mtime), 1),
                "whole": not problem and path.name == name,
                "marks": [mark for mark, at in marks.items() if at == path],
                "ranks": state.get("ranks"),
                "engine": state.get("engine"),
            }
        )
    if not rows:
        raise CheckpointError(f"{run}: neither a checkpoint nor a run with one (no {folder}/{PREFIX}*)")
    return sorted(rows, key=lambda row: row["step"])


def verify(path: Path, progress: Callable[[str, int], None]) -> dict[str, list[str]]:
    """Read every byte of a checkpoint, or of all of a run's; returns what is wrong, by checkpoint.

    Checks the state, sizes and checksums of files, that the parts of every tensor make a whole, and that every number
    is finite.
    """
    one = (path / "state.json").is_file()
    checkpoints = [path] if one else complete(path / "checkpoints") or complete(path) or [find(path)]
    return {str(checkpoint): _problems(checkpoint, progress) for checkpoint in checkpoints}


def _problems(checkpoint: Path, progress: Callable[[str, int], None]) -> list[str]:
    try:
        files = read_state(checkpoint)["files"]
        damaged = [name for name, about in files.items() if crc32(checkpoint / name) != about["crc32"]]
        if damaged:
            return [f"{name}: damaged: its checksum is not what was written" for name in damaged]
        reader = open_reader(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    problems = [
        f"{name}: {sum(math.prod(chunk.sizes) for chunk in about.chunks):,} of {about.size.numel():,} numbers"
        for name, about in reader.tensors.items()
        if sum(math.prod(chunk.sizes) for chunk in about.chunks) != about.size.numel()
    ]
    count = 0
    for file in files:
        with safe_open(checkpoint / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
                problems += [f"{name}: {bad:,} numbers are not finite"] if bad else []
                progress(f"verifying {checkpoint.name}", count := count + 1)
    return problems


def merge(
    checkpoint: Path,
    out: Path,
    average: bool,
    progress: Callable[[str, int], None],
    max_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write a checkpoint's model as plain safetensors with whole tensors; one tensor at a time is in memory.

    Args:
        checkpoint: Or a run: then its newest.
        out: `NAME.safetensors` for one file; otherwise a folder, for `model.safetensors`, or for files of at most
            `max_bytes` and `model.safetensors.index.json`, as transformers writes and reads them.
        average: Take the moving average of the weights (`train.ema`) instead.

    Returns:
        The files that were written.
    """
    checkpoint = find(checkpoint)
    read_state(checkpoint)
    reader = open_reader(checkpoint)
    prefix = "ema." if average else "model."
    whole = {name.removeprefix(prefix): about for name, about in reader.tensors.items() if name.startswith(prefix)}
    if not whole:
        raise CheckpointError(
            f"{checkpoint}: holds no moving average of the weights (train.ema was 0); leave out --ema"
        )
    single = out.suffix == SUFFIX
    folder = out.parent if single else out
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(about.size, dtype=about.properties.dtype, device="meta") for name, about in whole.items()},
        filename_pattern=out.name if single else f"model{{suffix}}{SUFFIX}",
        max_shard_size=sys.maxsize if single else max_bytes,
    )
    count = 0

    def counted(names: Iterable[str]) -> Iterator[Tensor]:
        nonlocal count
        for tensor in reader.whole(prefix + name for name in names):
            progress("merging", count := count + 1)
            yield tensor

    for file, names in split.filename_to_tensors.items():
        shapes = in_order({name: (whole[name].properties.dtype, whole[name].size) for name in names})
        write(folder / file, shapes, counted(shapes), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with atomic(folder / f"model{SUFFIX}.index.json") as opened:
            opened.write(json.dumps(index, indent=2).encode() + b"\n")
    return [folder / file for file in split.filename_to_tensors]
