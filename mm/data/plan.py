"""The plan: which samples make which pack, decided on metadata alone and kept as a file.

Every split is scanned once per set of shards (media headers and tokenisation, no decoding), and the samples of one
visit of one source are packed globally, best fit decreasing, under all budgets. The plan refers to samples by tar byte
ranges; what it counts is a contract that writing and loading are held to.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.layout import Layout
from mm.data.pack import pack
from mm.data.sample import Sample, keyed_rng
from mm.data.shards import Group, Member, Shard, stem
from mm.data.sources import Source, sample_id, scan
from mm.data.tokens import Segment, make_segment
from mm.errors import DataError

Progress = Callable[[str, int], None]
"""Called with what is being done and how many samples or packs are through."""


@dataclass(frozen=True, slots=True)
class PackSettings:
    """What decides a plan, besides the sources and the layout."""

    context_length: int
    budgets: dict[str, int]
    visits: int
    seed: int
    too_long: str
    max_bad_fraction: float
    max_pixels: int


SCHEMA = pa.schema(
    [
        ("pack", pa.int64()),
        ("visit", pa.int32()),
        ("source", pa.int32()),
        ("id", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("piece", pa.int32()),
        (
            "members",
            pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])),
        ),
        ("tokens", pa.int32()),
        ("loss_tokens", pa.int32()),
        ("image", pa.int32()),
        ("image_tokens", pa.int32()),
        ("image_cost", pa.int32()),
    ]
)


@dataclass(slots=True)
class Plan:
    """`table` has a row per segment, sorted by pack (SCHEMA); `bad` is (id, reason).

    `ledger` has by source name, over all visits: visits x (samples - quarantined) = segments + too_long, and
    segment_tokens = text_tokens + image_tokens = loss_tokens + masked_tokens.
    """

    table: pa.Table
    ledger: dict[str, dict[str, int]]
    bad: list[tuple[str, str]] = field(default_factory=list)

    @property
    def packs(self) -> int:
        return self.table["pack"][-1].as_py() + 1 if len(self.table) else 0

    def write(self, path: Path) -> None:
        pq.write_table(self.table, path, compression="zstd")


def segment_of(sample: Sample, layout: Layout, settings: PackSettings, visit: int) -> Segment:
    """One visit's segment of a sample: the same whenever it is asked for."""
    return make_segment(sample.drawn(settings.seed, visit), layout, sample.id, settings.max_pixels)


def make_plan(
    sources: Iterable[Source],
    layout: Layout,
    settings: PackSettings,
    progress: Progress = lambda what, n: None,
) -> Plan:
    """Scan the sources and pack them.

    Raises `DataError` for a sample that cannot be used (beyond `max_bad_fraction`), one longer than a row (under
    `too_long = "error"`), and a source without samples.
    """
    rows: list[dict[str, Any]] = []
    ledger: dict[str, dict[str, int]] = {}
    bad: list[tuple[str, str]] = []
    first_pack = 0
    for number, source in enumerate(sources):
        if source.name in ledger:
            raise DataError(f"two data sources are called {source.name!r}; give one of them another `name`")
        found, counts = _scan_source(source, number, layout, settings, bad, progress)
        ledger[source.name] = counts
        for visit in range(settings.visits):
            of_visit = [row for row in found if row["visit"] == visit]
            packs = _pack(of_visit, settings, first_pack)
            first_pack = int(packs.max(initial=first_pack - 1)) + 1
            # Inside a pack samples stand in a drawn order, so that a row does not open with its longest sample.
            shuffled = keyed_rng(settings.seed, "order in packs", source.name, visit).permutation(len(of_visit))
            for index in shuffled[np.argsort(packs[shuffled], kind="stable")].tolist():
                rows.append({**of_visit[index], "pack": int(packs[index])})
    return Plan(pa.Table.from_pylist(rows, schema=SCHEMA), ledger, bad)


def _scan_source(
    source: Source,
    number: int,
    layout: Layout,
    settings: PackSettings,
    bad: list[tuple[str, str]],
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Plan rows (without packs) of one source for all visits, and its counts."""
    rows: list[dict[str, Any]] = []
    counts = dict.fromkeys(
        ("samples", "quarantined", "too_long", "too_long_tokens", "segments", "segment_tokens", "image", "image_tokens",
         "text_tokens", "loss_tokens", "masked_tokens"), 0,
    )  # fmt: skip
    shards = source.shards()
    name, times = Counter(map(stem, shards)).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"source {source.name}: {times} shards are called {name}, so their samples would have the same ids; "
            "make each folder a data source of its own, with a `name`"
        )
    first_bad = len(bad)
    for path in shards:
        with Shard(path) as shard:
            for group, samples in scan(source, shard.groups()):
                try:
                    if isinstance(samples, DataError):
                        raise samples
                    new = [
                        _row(group, sample, piece, segment_of(sample, layout, settings, visit), number, visit)
                        for piece, sample in enumerate(samples)
                        for visit in range(settings.visits)
                    ]
                    counts["samples"] += len(samples)
                except DataError as error:
                    if settings.max_bad_fraction == 0:
                        raise
                    counts["samples"] += 1
                    counts["quarantined"] += 1
                    bad.append((sample_id(source.name, group), str(error)))
                    continue
                rows += [row for row in new if _fits(row, settings, counts, path)]
                progress(f"scanning {source.name}", counts["samples"])
    if counts["quarantined"] > settings.max_bad_fraction * counts["samples"]:
        raise DataError(
            f"source {source.name}: {counts['quarantined']} of {counts['samples']} samples are unusable, more than "
            f"data.max_bad_fraction = {settings.max_bad_fraction:g}; the first: {bad[first_bad][1]}"
        )
    if not rows:
        raise DataError(f"source {source.name}: no usable sample in {len(shards)} shard(s), the first {shards[0]}")
    for row in rows:
        counts["segments"] += 1
        counts["segment_tokens"] += row["tokens"]
        counts["image"] += row["image"]
        counts["image_tokens"] += row["image_tokens"]
        counts["loss_tokens"] += row["loss_tokens"]
    counts["text_tokens"] = counts["segment_tokens"] - counts["image_tokens"]
    counts["masked_tokens"] = counts["segment_tokens"] - counts["loss_tokens"]
    return rows, counts


def _row(group: Group, sample: Sample, piece: int, segment: Segment, source: int, visit: int) -> dict[str, Any]:
    images = [media for media in segment.media if media.kind == "image"]
    return {
        "visit": visit,
        "source": source,
        "id": sample.id,
        "shard": str(group.shard.path),
        "key": group.key,
        "piece": piece,
        "members": [{"ext": ext, "offset": m.offset, "size": m.size} for ext, m in group.members.items()],
        "tokens": len(segment),
        "loss_tokens": segment.loss_tokens,
        "image": len(images),
        "image_tokens": sum(media.length for media in images),
        "image_cost": sum(media.cost for media in images),
    }


def _fits(row: dict[str, Any], settings: PackSettings, counts: dict[str, int], path: Path) -> bool:
    limits = {"tokens": settings.context_length, **settings.budgets}
    over = [name for name, limit in limits.items() if row[name] > limit]
    if not over:
        return True
    if settings.too_long == "error":
        name = over[0]
        setting = "data.context_length" if name == "tokens" else f"data.budgets.{name}"
        raise DataError(
            f"{row['id']} in {path}: {row[name]} {name} do not fit in {setting} = {limits[name]}; "
            "raise it, or leave such samples out with data.too_long=drop"
        )
    counts["too_long"] += 1
    counts["too_long_tokens"] += row["tokens"]
    return False


def _pack(rows: list[dict[str, Any]], settings: PackSettings, first: int) -> np.ndarray:
    names = ["tokens", *settings.budgets]
    costs = np.array([[row[name] for name in names] for row in rows], dtype=np.int64).reshape(len(rows), len(names))
    return first + pack(costs, [settings.context_length, *settings.budgets.values()])


def group_of(row: dict[str, Any], shard: Shard) -> Group:
    """The tar members that a plan row refers to."""
    return Group(shard, row["key"], {m["ext"]: Member(m["offset"], m["size"]) for m in row["members"]})
