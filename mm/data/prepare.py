"""From the `data:` section to packed splits on disk: what is there is used, what is missing is packed.

Packing is three steps: scan every shard, plan, write every packed shard. The items of a step are done whole or not at
all, in a work folder beside the result, so that a killed run goes on where it was and several machines can share the
work (`slice`). When all is written the result appears under its name.

    .SPLIT.work-FINGERPRINT/scans/000000.*    one scan a shard
    .SPLIT.work-FINGERPRINT/plan.arrow
    .SPLIT.work-FINGERPRINT/out, parts        packed shards and their rows of index and plan

Raw sources are packed into a cache folder named by a fingerprint of everything that decides the result: shards (path,
size, time), settings, layout, format. A set that the config itself names is used as it is or refused, never rebuilt.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mm.data.config import DataConfig, Split
from mm.data.executors import ExecutorName, run
from mm.data.layout import Layout
from mm.data.packed import FORMAT_VERSION, INDEX, PackedDataset, read_ids
from mm.data.plan import Plan, Progress, make_plan
from mm.data.remote import Identity, RemoteCache, file_name, identity, is_remote, without_secrets
from mm.data.scan import PackSettings, Scan, file_state, is_scanned, scan_shard
from mm.data.shards import Stale
from mm.data.sources import Source
from mm.data.write import PLAN_ROWS, Scanned, is_written, join_parts, write_shard
from mm.errors import DataError
from mm.files import atomic, clear_partials, fsync

SPLITS: tuple[Split, ...] = get_args(Split)


def cores() -> int:
    """The cores that this process may use, which a scheduler may have bounded."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Workers:
    """Who packs. `slice` (i, n): do only every n-th item, from the i-th on; others do the rest."""

    count: int = 1
    executor: ExecutorName = "local"
    slice: tuple[int, int] = (0, 1)


def pack_settings(data: DataConfig, split: Split, seed: int) -> PackSettings:
    """Held-out data are visited once; everything else is the run's."""
    return PackSettings(
        context_length=data.context_length,
        budgets={name: most for name, most in data.budgets.items()},
        visits=data.visits if split == "train" else 1,
        seed=seed,
        too_long=data.too_long,
        max_bad_fraction=data.max_bad_fraction,
        limits=data.limits(),
        packing=data.packing,
    )


@dataclass(slots=True)
class PackJob:
    """Packing one split into the folder `out`. Its items are shards, numbered through all sources."""

    out: Path
    work: Path
    sources: list[Source]
    shards: list[tuple[int, str]]
    """(number of its source, path or URL) of every shard."""
    identities: list[Identity | None]
    """Of every remote shard, what its server said when the job was made."""
    layout: Layout
    settings: PackSettings
    provenance: dict[str, Any]
    cache: RemoteCache
    progress: Progress = lambda what, n: None

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which have nobody to report to."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {"progress": _silent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def run(self, workers: Workers) -> bool:
        """Do what can be done of this slice now; True when the result is there, False while others have work left."""
        for folder in ("scans", "parts", "out"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        if not (self.work / "out" / "dataset.json").exists():
            if not self._step("scan", len(self.shards), lambda n: is_scanned(self._scan_path(n)), workers):
                return False
            plan = self.work / "plan.arrow"
            if not plan.exists():
                try:
                    make_plan(plan, self._scans(), self.settings, self.progress)
                except DataError:
                    self._forget_bad_scans()
                    raise
            count = len(Plan.read(plan).shards)
            try:
                if not self._step("write", count, lambda n: is_written(self.work, n), workers):
                    return False
            except Stale:
                shutil.rmtree(self.work, ignore_errors=True)
                raise
            self._describe(Plan.read(plan))
        (self.work / "out").rename(self.out)
        fsync(self.out.parent)
        return True

    def _forget_bad_scans(self) -> None:
        """Shards with bad samples are scanned again the next time: what they lacked may be there then."""
        for path in (self._scan_path(number) for number in range(len(self.shards))):
            if Scan(path).bad:
                path.with_suffix(".json").unlink()

    def _step(self, method: str, count: int, done: Callable[[int], bool], workers: Workers) -> bool:
        """The items of one step that are mine and not done; True when nobody has any left."""
        which, of = workers.slice
        mine = [n for n in range(which, count, of) if not done(n)]
        what = {"scan": "scanning shards", "write": "writing shards"}[method]
        for number, _ in enumerate(run(self, method, mine, workers.count, workers.executor), 1):
            self.progress(f"{what} ({count} in all)", number)
        return all(map(done, range(count)))

    def scan(self, number: int) -> None:
        which, url = self.shards[number]
        source = self.sources[which]
        known = self.identities[number]
        with self.cache.fetch(url, known) if is_remote(url) else contextlib.nullcontext(Path(url)) as local:
            clear_partials(*(self._scan_path(number).with_suffix(kind) for kind in (".arrow", ".media", ".json")))
            stays = not is_remote(url) and local.suffix == ".tar" and local.is_file() and not _is_gzip(local)
            scan_shard(
                self._scan_path(number), source, local, source.shard_name(url), stays, self.layout, self.settings,
                lambda samples: self.progress(f"scanning {source.name}", samples), is_remote(url),
            )  # fmt: skip

    def write(self, number: int) -> None:
        scanned = [
            Scanned(self._scan_path(n), self.sources[source].name, _file(url))
            for n, (source, url) in enumerate(self.shards)
        ]
        write_shard(self.work, number, scanned)

    def _scan_path(self, number: int) -> Path:
        return self.work / "scans" / f"{number:06d}.arrow"

    def _scans(self) -> dict[str, list[Path]]:
        """Scans by source, in the order of the config."""
        return {
            source.name: [self._scan_path(n) for n, (of, _) in enumerate(self.shards) if of == number]
            for number, source in enumerate(self.sources)
        }

    def _describe(self, plan: Plan) -> None:
        """Index, plan, bad samples and `dataset.json`, which comes last: with it the set is whole."""
        out, count = self.work / "out", len(plan.shards)
        join_parts(self.work, "index", count, INDEX, out / "index.parquet")
        join_parts(self.work, "plan", count, PLAN_ROWS, out / "plan.parquet")
        bad = [one for number in range(len(self.shards)) for one in Scan(self._scan_path(number)).bad]
        if bad:
            with atomic(out / "quarantine.jsonl", self.work / "parts") as file:
                file.writelines(f"{json.dumps(one, ensure_ascii=False)}\n".encode() for one in bad)
        row_tokens = plan.packs * self.settings.context_length
        tokens = sum(counts["segment_tokens"] for counts in plan.ledger.values())
        about = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.layout.fingerprint(),
            "layout": self.layout.describe(),
            "settings": asdict(self.settings),
            "packs": plan.packs,
            "tokens": tokens,
            "row_tokens": row_tokens,
            "padding": row_tokens - tokens,
            "fill": round(tokens / row_tokens, 6),
            "ledger": plan.ledger,
            "provenance": self.provenance,
        }
        with atomic(out / "dataset.json", self.work / "parts") as file:
            file.write(f"{json.dumps(about, indent=2, ensure_ascii=False)}\n".encode())
        fsync(out)


def _silent(what: str, n: int) -> None:
    """Nobody listens."""


def pack_split(
    data: DataConfig,
    split: Split,
    layout: Layout,
    seed: int,
    out: Path | None = None,
    progress: Progress = _silent,
    workers: Workers = Workers(),
) -> Path | None:
    """Pack one split into `out`, or into the cache when `out` is None, unless the very same set is there already.

    Goes on where an earlier call was stopped. None: this slice is done as far as it can be, others are not.
    """
    job = _job(data, split, layout, seed, out, progress)
    folder, fingerprint = job.out, job.provenance["fingerprint"]
    if _is_packed(folder, fingerprint):
        _remove_work(folder)
        return folder
    try:
        finished = job.run(workers)
    except OSError:
        # Another process may have finished the same set, and taken the work folder away.
        if not (finished := _is_packed(folder, fingerprint)):
            raise
    if finished:
        _remove_work(folder)
    return folder if finished else None


def find_packed(data: DataConfig, split: Split, layout: Layout, seed: int) -> Path | None:
    """The packed split that a run of this config would read, if it is there already."""
    if data.packed is not None:
        return data.packed / split
    job = _job(data, split, layout, seed)
    return job.out if _is_packed(job.out, job.provenance["fingerprint"]) else None


def _job(
    data: DataConfig, split: Split, layout: Layout, seed: int, out: Path | None = None, progress: Progress = _silent
) -> PackJob:
    configs = data.split(split)
    sources: list[Source] = [config.build(data.root) for config in configs]
    if len({source.name for source in sources}) < len(sources):
        name = Counter(source.name for source in sources).most_common(1)[0][0]
        raise DataError(f"two data sources are called {name!r}; give one of them another `name`")
    shards = [(number, url) for number, source in enumerate(sources) for url in _shards_of(source)]
    settings = pack_settings(data, split, seed)
    described = [config.model_dump(mode="json") for config in configs]
    for one in described:
        one["path"] = without_secrets(str(one.get("path", "")))
    with ThreadPoolExecutor(16) as pool:  # servers are asked side by side
        known = list(pool.map(lambda shard: identity(shard[1]) if is_remote(shard[1]) else None, shards))
    identities = [
        _local_identity(url) if one is None else {"path": url, **one}
        for (_, url), one in zip(shards, known, strict=True)
    ]
    elsewhere = [source.elsewhere for source in sources]
    fingerprint = _digest([FORMAT_VERSION, layout.describe(), asdict(settings), described, identities, elsewhere])
    folder = out or data.cache.expanduser() / "packed" / f"{split}-{fingerprint}"
    # What the set was made of, without where that happened to lie: names and sizes, not folders and times.
    names = [{"name": _file(url), "bytes": one["size"]} for (_, url), one in zip(shards, identities, strict=True)]
    provenance = {"sources": described, "shards": names, "fingerprint": fingerprint}
    cache = RemoteCache(data.cache.expanduser() / "remote", data.remote_cache)
    work = folder.with_name(f".{folder.name}.work-{fingerprint}")
    return PackJob(folder, work, sources, shards, known, layout, settings, provenance, cache, progress)


def _remove_work(folder: Path) -> None:
    """The work folders of a finished set, those of other settings included."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.work-*"):
        shutil.rmtree(left, ignore_errors=True)


def _is_packed(folder: Path, fingerprint: str) -> bool:
    """Whether the very set is there. Raises `DataError` where something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if PackedDataset(folder).about["provenance"].get("fingerprint") != fingerprint:
        raise DataError(
            f"{folder}: holds a set packed from other shards or settings; choose another --out or remove it"
        )
    return True


def _shards_of(source: Source) -> list[str]:
    shards = source.shards()
    name, times = Counter(map(source.shard_name, shards)).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"source {source.name}: {times} shards are called {name}, so their samples would have the same ids; "
            "make each folder a data source of its own, with a `name`"
        )
    return shards


def open_splits(
    data: DataConfig, layout: Layout, seed: int, progress: Progress = _silent
) -> dict[Split, PackedDataset]:
    """The packed splits of a run, packing raw sources first. Raises `DataError` for one that does not fit the model."""
    if data.packed is not None:
        folders = {split: data.packed / split for split in SPLITS if (data.packed / split).exists()}
        if "train" not in folders:
            raise DataError(
                f"{data.packed}: no packed training set ({data.packed / 'train'} is missing); see `mm pack`"
            )
    else:
        workers = Workers(cores())
        found = {
            split: pack_split(data, split, layout, seed, progress=progress, workers=workers)
            for split in SPLITS
            if data.split(split)
        }
        folders = {split: folder for split, folder in found.items() if folder is not None}
    opened = {split: PackedDataset(folder) for split, folder in folders.items()}
    settings = pack_settings(data, "train", seed)
    for dataset in opened.values():
        dataset.require(layout, settings.context_length, settings.budgets, settings.packing)
    return opened


def skipped(data: DataConfig) -> frozenset[str]:
    """The ids of `data.skip_ids`. Raises `DataError` where there is no such file."""
    return read_ids(data.skip_ids.expanduser()) if data.skip_ids else frozenset()


def _local_identity(path: str) -> dict[str, Any]:
    """Of a file, or of a folder that is a shard: the bytes in it, and a digest of what each file looks like."""
    place = Path(path)
    about: dict[str, Any]
    if place.is_dir():
        files = sorted((one.name, *file_state(one)) for one in place.iterdir() if one.is_file())
        about = {"size": sum(size for _, size, _ in files), "modified": _digest(files)}
    else:
        size, modified = file_state(place)
        about = {"size": size, "modified": modified}
    return {"path": str(place.resolve()), **about}


def _file(url: str) -> str:
    """A shard's file name, without what signs a URL."""
    return file_name(url) if is_remote(url) else Path(url).name


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
