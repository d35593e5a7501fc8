"""The plan: which segments make which pack, decided on counts alone, once every shard has been scanned.

The segments of one visit of one source are packed globally, under all budgets. Which of several segments of like costs
goes into which of the places for them is then free, and is settled so that packs that are neighbours on disk hold
samples that were neighbours, give or take `JITTER`: writing reads the shards from front to back, more or less, rather
than all over the place.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mm.data.pack import pack
from mm.data.sample import keyed_rng
from mm.data.scan import LEDGER, PackSettings, Scan
from mm.errors import DataError
from mm.files import atomic

Progress = Callable[[str, int], None]
"""Called with what is being done and how many samples or packs are through."""

JITTER = 50_000  # samples
PACKS_PER_SHARD = 1000
BYTES_PER_SHARD = 1 << 30
PLAN = pa.schema([("pack", pa.int64()), ("scan", pa.int32()), ("row", pa.int32())])


@dataclass(slots=True)
class Plan:
    """`table` has a row per segment in the order of packs and of places in them (PLAN), mapped from disk.

    `shards`: one past the last pack of each packed shard. `ledger`: counts by source, over all visits.
    """

    table: pa.Table
    shards: list[int]
    ledger: dict[str, dict[str, int]]

    @property
    def packs(self) -> int:
        return self.shards[-1]

    @classmethod
    def read(cls, path: Path) -> "Plan":
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return cls(table, **json.loads(table.schema.metadata[b"plan"]))

    def of_shard(self, number: int) -> pa.Table:
        """The rows of one packed shard."""
        ends = [0, *self.shards]
        packs = self.table["pack"].to_numpy()
        first, last = np.searchsorted(packs, [ends[number], ends[number + 1]])
        return self.table.slice(int(first), int(last - first))


def make_plan(path: Path, scans: dict[str, list[Path]], settings: PackSettings, progress: Progress) -> None:
    """Write the plan of scanned shards, by source, to `path`.

    Raises `DataError` for a source with too many unusable samples, or with none.
    """
    columns: list[list[np.ndarray]] = []
    sizes: list[np.ndarray] = []
    ledger: dict[str, dict[str, int]] = {}
    first_scan = first_pack = 0
    for name, paths in scans.items():
        found = [Scan(one) for one in paths]
        ledger[name] = _ledger(name, found, settings)
        scan = np.repeat(np.arange(len(found), dtype=np.int32), [len(one.segments) for one in found])
        row = np.concatenate([np.arange(len(one.segments), dtype=np.int32) for one in found])
        columns_of = {
            column: np.concatenate([one.segments[column].to_numpy() for one in found])
            for column in ("visit", "media_bytes", *settings.capacities)
        }
        for visit in range(settings.visits):
            progress(f"packing {name}", len(row))
            mine = np.flatnonzero(columns_of["visit"] == visit)
            costs = np.stack([columns_of[budget][mine] for budget in settings.capacities], axis=1)
            rng = keyed_rng(settings.seed, "packs", name, visit)
            if settings.packing == "single":
                # Stable, or what is at one place would be in another order on other processors.
                packs = np.argsort(np.argsort(_place(len(mine), rng), kind="stable"), kind="stable")
            else:
                packs = _near(pack(costs, list(settings.capacities.values())), costs, rng)
            # Inside a pack samples stand in a drawn order, so that a row does not open with its longest sample.
            order = np.lexsort((rng.permutation(len(mine)), packs))
            media_bytes = np.bincount(packs, columns_of["media_bytes"][mine])
            tokens = np.bincount(packs, costs[:, 0])
            sizes.append(media_bytes + 4 * tokens)
            columns.append([first_pack + packs[order], first_scan + scan[mine[order]], row[mine[order]]])
            first_pack += len(media_bytes)
        first_scan += len(found)
    arrays = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    about = json.dumps({"shards": _shards(np.concatenate(sizes)), "ledger": ledger})
    schema = PLAN.with_metadata({"plan": about})
    with atomic(path) as file, pa.ipc.new_file(file, schema) as out:
        out.write_table(
            pa.Table.from_arrays(
                [pa.array(one, type=t.type) for one, t in zip(arrays, PLAN, strict=True)], schema=schema
            )
        )


def _ledger(name: str, scans: list[Scan], settings: PackSettings) -> dict[str, int]:
    ledger = {count: sum(scan.ledger[count] for scan in scans) for count in LEDGER}
    if ledger["quarantined"] > settings.max_bad_fraction * ledger["samples"]:
        first = next(scan.bad[0] for scan in scans if scan.bad)
        raise DataError(
            f"source {name}: {ledger['quarantined']} of {ledger['samples']} samples are unusable, more than "
            f"data.max_bad_fraction = {settings.max_bad_fraction:g}; the first: {first['reason']}"
        )
    if not ledger["segments"]:
        raise DataError(
            f"source {name}: no usable sample in {len(scans)} shard(s), the first {scans[0].shard}: of "
            f"{ledger['samples']} samples {ledger['quarantined']} are unusable, {ledger['filtered']} left out by "
            f"its settings, {ledger['too_long']} (counted by visits) too long"
        )
    return ledger


def _near(packs: np.ndarray, costs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Packs numbered anew at random, and segments of equal costs swapped among them by their place in the source."""
    packs = rng.permutation(int(packs.max(initial=-1)) + 1)[packs]
    place = _place(len(packs), rng)
    alike = tuple(costs.T)
    near = np.empty_like(packs)
    near[np.lexsort((place, *alike))] = packs[np.lexsort((packs, *alike))]
    return near


def _place(count: int, rng: np.random.Generator) -> np.ndarray:
    """Where segments stand in the source, give or take."""
    return np.arange(count) + rng.integers(0, JITTER, count)


def _shards(sizes: np.ndarray) -> list[int]:
    """Where packed shards end: after 1,000 packs or about a gigabyte."""
    ends, first, bytes = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        if number - first >= PACKS_PER_SHARD or (number > first and bytes + size > BYTES_PER_SHARD):
            ends.append(number)
            first, bytes = number, 0
        bytes += size
    return [*ends, len(sizes)]
