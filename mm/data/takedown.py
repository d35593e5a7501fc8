"""Taking samples down from a packed set without packing it again.

Their token ids and media are overwritten with zeros where they lie, and their ids are kept in `dropped.txt`: whatever
reads the set for use turns their places into padding. Packs keep their size and their place in the order, so runs can
be resumed. Doing it twice, or again after it was killed, gives the same files.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm.data.features import erase
from mm.data.packed import DROPPED, PackedDataset, checksum, names_of, parse_pack, read_range
from mm.files import atomic


def take_down(
    folder: Path, ids: Iterable[str], progress: Callable[[str, int], None] = lambda what, n: None
) -> dict[str, int]:
    """Erase samples from the split in `folder`; an id stands for all pieces and visits of a sample.

    Returns counts: `samples` found, `unknown` ids, `segments` and `tokens` erased, those of earlier calls included.
    """
    dataset = PackedDataset(folder)
    wanted = dataset.dropped | frozenset(ids)
    with atomic(folder / DROPPED) as file:  # first, so that nobody reads them while they go
        file.writelines(f"{id}\n".encode() for id in sorted(wanted))
    plan = pq.read_table(folder / "plan.parquet", columns=["pack", "id", "tokens"])
    names = [names_of(id) & wanted for id in plan["id"].to_pylist()]
    erased = plan.filter(pa.array(map(bool, names), type=pa.bool_()))
    checksums = dataset.index["checksum"].to_pylist()
    for number, pack in enumerate(sorted(set(erased["pack"].to_pylist())), 1):
        place = dataset.place(pack)
        with open(folder / place["shard"], "r+b") as shard:
            data = _erase(read_range(shard, place["offset"], place["length"]), wanted)
            os.pwrite(shard.fileno(), data, place["offset"])
            os.fsync(shard.fileno())
        checksums[pack] = checksum(data)
        progress("erasing from packs", number)
    index = dataset.index.set_column(dataset.index.schema.get_field_index("checksum"), "checksum", pa.array(checksums))
    with atomic(folder / "index.parquet") as file:
        pq.write_table(index, file, compression="zstd", write_page_checksum=True)
    erase(folder, sorted(set(erased["pack"].to_pylist())), wanted)
    found = frozenset[str]().union(*names)
    return {
        "samples": len(found),
        "unknown": len(wanted - found),
        "segments": len(erased),
        "tokens": int(pc.sum(erased["tokens"]).as_py() or 0),
    }


def _erase(data: bytes, ids: frozenset[str]) -> bytes:
    """The bytes of a pack with the tokens and media of some samples as zeros; everything else stays where it is."""
    pack = parse_pack(data)
    erased = bytearray(data)
    gone = {n for n, segment in enumerate(pack.segments) if names_of(segment.id) & ids}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        places = {info.name.partition(".")[2]: (info.offset_data, info.size) for info in tar}
    start, size = places["npy"]
    first = start + size - pack.tokens.nbytes
    tokens = np.frombuffer(erased, dtype=pack.tokens.dtype, count=len(pack.tokens), offset=first)
    for segment in (pack.segments[n] for n in gone):
        tokens[segment.start : segment.start + segment.length] = 0
    for number, one in enumerate(pack.media):
        if one.segment in gone:
            offset, length = places[f"{number:04d}.{one.ext}"]
            erased[offset : offset + length] = bytes(length)
    return bytes(erased)
