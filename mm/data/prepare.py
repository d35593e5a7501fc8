"""From the `data:` section to packed splits on disk: what is there is used, what is missing is packed.

Raw sources are packed into a cache folder named by a fingerprint of everything that decides the result: shards (path,
size, time), settings, layout, format. A set that the config itself names is used as it is or refused, never rebuilt.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mm.data.config import DataConfig, Split
from mm.data.layout import Layout
from mm.data.packed import FORMAT_VERSION, PackedDataset, write_packed
from mm.data.plan import PackSettings, Progress
from mm.errors import DataError

SPLITS: tuple[Split, ...] = get_args(Split)


def pack_settings(data: DataConfig, split: Split, seed: int) -> PackSettings:
    """Held-out data are visited once; everything else is the run's."""
    return PackSettings(
        context_length=data.context_length,
        budgets={name: most for name, most in data.budgets.items()},
        visits=data.visits if split == "train" else 1,
        seed=seed,
        too_long=data.too_long,
        max_bad_fraction=data.max_bad_fraction,
        max_pixels=data.max_pixels,
    )


def pack_split(
    data: DataConfig,
    split: Split,
    layout: Layout,
    seed: int,
    out: Path | None = None,
    progress: Progress = lambda what, n: None,
) -> Path:
    """Pack one split into `out`, or into the cache when `out` is None, unless the very same set is there already."""
    sources = [config.build(data.root) for config in data.split(split)]
    settings = pack_settings(data, split, seed)
    configs = [config.model_dump(mode="json") for config in data.split(split)]
    shards = [path for source in sources for path in source.shards()]
    identities = [_identity(path) for path in shards]
    fingerprint = _digest([FORMAT_VERSION, layout.describe(), asdict(settings), configs, identities])
    folder = out or data.cache.expanduser() / "packed" / f"{split}-{fingerprint}"
    if folder.exists() and any(folder.iterdir()):
        if PackedDataset(folder).about["provenance"].get("fingerprint") != fingerprint:
            raise DataError(
                f"{folder}: holds a set packed from other shards or settings; choose another --out or remove it"
            )
        return folder
    # What the set was made of, without where that happened to lie: names and sizes, not folders and times.
    provenance = {
        "sources": configs,
        "shards": [{"name": path.name, "bytes": path.stat().st_size} for path in shards],
        "fingerprint": fingerprint,
    }
    write_packed(folder, sources, layout, settings, provenance, progress)
    return folder


def open_splits(
    data: DataConfig, layout: Layout, seed: int, progress: Progress = lambda what, n: None
) -> dict[Split, PackedDataset]:
    """The packed splits of a run, packing raw sources first. Raises `DataError` for one that does not fit the model."""
    if data.packed is not None:
        folders = {split: data.packed / split for split in SPLITS if (data.packed / split).exists()}
        if "train" not in folders:
            raise DataError(
                f"{data.packed}: no packed training set ({data.packed / 'train'} is missing); see `mm pack`"
            )
    else:
        folders = {
            split: pack_split(data, split, layout, seed, progress=progress) for split in SPLITS if data.split(split)
        }
    opened = {split: PackedDataset(folder) for split, folder in folders.items()}
    settings = pack_settings(data, "train", seed)
    for dataset in opened.values():
        dataset.require(layout, settings.context_length, settings.budgets)
    return opened


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
