"""Whether a packed set is whole: every checksum, every layout, every count."""

from collections.abc import Callable, Iterator
from typing import Any

from mm.data.packed import Pack, PackedDataset
from mm.data.tokens import COSTS
from mm.errors import DataError


def check(dataset: PackedDataset, progress: Callable[[str, int], None] = lambda what, n: None) -> Iterator[str]:
    """What is wrong, one line each, pack by pack. Media are not decoded."""
    settings = dataset.about["settings"]
    capacities = {"tokens": settings["context_length"], **settings["budgets"]}
    if dataset.index["pack"].to_pylist() != list(range(len(dataset))):
        yield f"{dataset.folder}: index.parquet does not number the packs 0, 1, 2, …"
    for number in range(len(dataset)):
        row = dataset.index.slice(number, 1).to_pylist()[0]
        try:
            pack = dataset.read(number)
        except DataError as error:
            yield str(error)
        else:
            yield from (f"{dataset.folder}: pack {number}: {line}" for line in _problems(pack, row, capacities))
        progress("checking packs", number + 1)


def _problems(pack: Pack, row: dict[str, Any], capacities: dict[str, int]) -> Iterator[str]:
    end = 0
    for segment in pack.segments:
        if segment.start != end or segment.length < 1:
            yield f"segment {segment.id} starts at {segment.start}, expected {end}"
        end = segment.start + segment.length
        if any(not segment.start <= a < b <= end for a, b in segment.loss):
            yield f"segment {segment.id} learns outside itself: {segment.loss}"
        if segment.metadata and not segment.start <= segment.metadata[0] < segment.metadata[1] <= end:
            yield f"segment {segment.id} has metadata outside itself: {segment.metadata}"
        if segment.source != row["source"]:
            yield f"segment {segment.id} is of source {segment.source}, the index says {row['source']}"
    for one in pack.media:
        if not 0 <= one.segment < len(pack.segments):
            yield f"a {one.kind} belongs to segment {one.segment} of {len(pack.segments)}"
            continue
        segment = pack.segments[one.segment]
        if not segment.start <= one.position <= one.position + one.length <= segment.start + segment.length:
            yield f"a {one.kind} of {segment.id} lies outside its segment"
    found = {
        "segments": len(pack.segments),
        "tokens": len(pack.tokens),
        "loss_tokens": sum(b - max(a, one.start + 1) for one in pack.segments for a, b in one.loss),
        "metadata_tokens": sum(one.metadata[1] - one.metadata[0] for one in pack.segments if one.metadata),
        **dict.fromkeys(COSTS, 0),
        "audio_samples": sum(one.plan.get("samples", 0) for one in pack.media if one.kind == "audio"),
    }
    for one in pack.media:
        found[one.kind] += 1
        found[f"{one.kind}_tokens"] += one.length
        found[f"{one.kind}_cost"] += one.cost
    yield from (f"{count} {name}, the index says {row[name]}" for name, count in found.items() if count != row[name])
    yield from (
        f"{found[name]} {name} are over the budget of {most}" for name, most in capacities.items() if found[name] > most
    )
