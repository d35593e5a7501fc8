"""Tensors in safetensors files: the storage that torch.distributed.checkpoint writes to.

Each rank writes one file with its parts of the tensors, and with where each part begins in the whole tensor, in the
form that torch's `HuggingFaceStorageReader` reads. So parts can be put together for any other number of ranks, and
nothing is pickled. The file is streamed from the tensors as they are: safetensors' own `save_file` reports a full disk
as text, wants all tensors in memory at once, and took up to six times the processor time (the Linux page cache).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mm.files import atomic

SUFFIX = ".safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
BLOCK = 1 << 22

Shapes = dict[str, tuple[torch.dtype, torch.Size]]
"""Type and shape by name, in the order of a file."""


def in_order(shapes: Shapes) -> Shapes:
    """Wider types first, so that every tensor is aligned in the file; then by name."""
    return dict(sorted(shapes.items(), key=lambda one: (-one[1][0].itemsize, one[0])))


def write(path: Path, shapes: Shapes, tensors: Iterable[Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """A safetensors file (huggingface.co/docs/safetensors), on the disk when this returns.

    Args:
        shapes: As `in_order` gives them.
        tensors: The tensors in that order, asked for one by one.
        metadata: Text by key for the header.

    Returns:
        `bytes` and `crc32` of the file.

    Raises:
        OSError: The disk is full, say; the file is then not there.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    about = {"bytes": 0, "crc32": 0}
    with atomic(path) as file:

        def put(data: memoryview) -> None:
            # Both calls let go of the interpreter lock for a whole block: training goes on meanwhile.
            about["crc32"] = zlib.crc32(data, about["crc32"])
            about["bytes"] += file.write(data)

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == shape, name
            flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(flat), BLOCK):
                put(flat[start : start + BLOCK])
    return {"bytes": about["bytes"], "crc32": f"{about['crc32']:08x}"}


def crc32(path: Path) -> str:
    """Of a file, as `write` returned it."""
    found = 0
    with open(path, "rb") as file:
        while data := file.read(BLOCK):
            found = zlib.crc32(data, found)
    return f"{found:08x}"


class Writer(StorageWriter):
    """Writes `tensors-RANK.safetensors` into a new folder. `commit` is then called once, on rank 0, with what each
    file is (`{name: {bytes, crc32}}`); what it raises, as what any rank's writing raises, is raised on every rank."""

    def __init__(self, folder: Path, commit: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        self.folder = folder
        self.commit = commit

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        if not plan.items:
            return done
        items = {item.index.fqn: item for item in plan.items}
        assert len(items) == len(plan.items), "a rank has one part of a tensor"
        tensors = {name: cast(Tensor, planner.resolve_data(item)) for name, item in items.items()}
        # Keys of torch's reader: torch.distributed.checkpoint._hf_utils.
        places = {name: {"saved_offsets": list(item.index.offset or ())} for name, item in items.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        path = self.folder / f"tensors-{plan.storage_data:05d}{SUFFIX}"
        shapes = in_order({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
        about = write(path, shapes, (tensors[name] for name in shapes), metadata)
        done = Future()
        done.set_result([WriteResult(plan.items[0].index, about["bytes"], (path.name, about))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.commit(dict(result.storage_data for rank in results for result in rank))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(HuggingFaceStorageReader):
    """torch's reader; the headers are read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self._metadata

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        found = self._metadata.state_dict_metadata
        return {name: about for name, about in found.items() if isinstance(about, TensorStorageMetadata)}

    def whole(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Whole tensors on the CPU, put together one after the other."""
        assert self._metadata.storage_data is not None
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for name in names:
                about = self.tensors[name]
                tensor = torch.empty(about.size, dtype=about.properties.dtype)
                for chunk in about.chunks:
                    path = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)].relative_path
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                    tensor[place] = files[path].get_tensor(name)
                yield tensor
