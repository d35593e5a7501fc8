"""Resuming: how long from a saved state to the first batch, in an epoch of a million packs.

An index with the real columns: three sources, shards of 1,000 packs, a checksum for each. The packs that are read are
real ones, of the emoji that ship with the package; the other rows are made up. Each figure is of a fresh process that
has imported what it needs, to the first batch of 8 rows from 2 workers. States are those of a mixture that was run to
there. Nothing is replayed, so the position should not matter.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import Row, arguments, show
from mm.data.config import DataConfig
from mm.data.layout import ImageLayout, Layout, Template
from mm.data.loader import PackedLoader, source_infos
from mm.data.media import ImageTransform
from mm.data.mixture import Mixture, MixtureConfig
from mm.data.packed import INDEX, PackedDataset
from mm.data.prepare import pack_split
from mm.data.tokenizer import Tokenizer

ROWS, WORKERS = 8, 2
SHARES = {"large": 0.7, "middle": 0.25, "small": 0.05}
PARTS = {"open": "of it, the index", "loader": "of it, mixture and state", "batch": "of it, the first batch"}
MIXTURES = {
    "natural": MixtureConfig(),
    "weighted": MixtureConfig(weights={"large": 0.5, "middle": 0.3, "small": 0.2}),
}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "measure":
        print(json.dumps(measure(Path(sys.argv[2]), *sys.argv[3:])))
        return
    options = arguments(__doc__)
    count, repetitions = (20_000, 1) if options.quick else (1_000_000, 5)
    places = {
        "start": 0.0,
        "at a quarter": 0.25,
        "in the middle": 0.5,
        "near the end": 0.999,
        "in the third epoch": 2.4,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name), count)
        positions = {place: int(part * count) // ROWS * ROWS for place, part in places.items()}
        read = [pack for kind in MIXTURES for pack in save_states(folder, kind, positions)]
        make_readable(folder, read)
        runs: dict[tuple[str, str], list[dict[str, float]]] = {
            (kind, place): [] for kind in MIXTURES for place in places
        }
        for _ in range(repetitions):
            for kind, place in runs:
                command = [sys.executable, "-m", "benchmarks.resume", "measure", str(folder), kind, place]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[kind, place].append(json.loads(done.stdout))
        rows: list[Row] = []
        for kind in MIXTURES:
            cold = runs[kind, "start"]
            for part, what in (("all", "cold start"), *PARTS.items()):
                rows.append(_row(f"{kind} mixture: {what}", statistics.median(one[part] for one in cold)))
            for place in places:
                beyond = [one["all"] - other["all"] for one, other in zip(runs[kind, place], cold, strict=True)]
                if place != "start":
                    rows.append(_row(f"{kind} mixture: resumed {place}, beyond it", statistics.median(beyond)))
        show(f"resume among {count:,} packs", rows, options.json)


def _row(case: str, seconds: float) -> Row:
    return {"case": case, "unit": "s", "better": "lower", "ours": seconds, "peers": {}}


def layout() -> Layout:
    tokenizer = Tokenizer.load("builtin:emoji")
    transform = ImageTransform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    template = Template("<s>", "<|im_end|>", "\n")
    return Layout(tokenizer, template, tokenizer.id("<|endoftext|>"), ImageLayout(4, 4, transform))


def make(folder: Path, count: int) -> Path:
    """A packed set whose index has `count` rows."""
    source = {"kind": "captions", "path": "builtin:emoji/train-*.tar.gz", "prompt": "{language}: "}
    data = DataConfig.model_validate({"sources": [source], "context_length": 512})
    out = pack_split(data, "train", layout(), 0, folder / "train")
    assert out is not None
    real = pq.read_table(out / "index.parquet")
    pq.write_table(real, out / "real.parquet")
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "pack": np.arange(count),
        "source": np.repeat(list(SHARES), np.diff(np.cumsum([0, *(round(one * count) for one in SHARES.values())]))),
        "shard": [f"packs-{number // 1000:06d}.tar" for number in range(count)],
        "checksum": [one.tobytes().hex() for one in rng.integers(0, 1 << 62, count)],
    }
    table = real.take(pa.array(np.arange(count) % len(real)))
    for name, values in columns.items():
        column = pa.array(values, INDEX.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), INDEX.field(name), column)
    _write(out, table)
    about = json.loads((out / "dataset.json").read_text())
    about |= {"packs": count, "ledger": dict.fromkeys(SHARES, next(iter(about["ledger"].values())))}
    (out / "dataset.json").write_text(json.dumps(about))
    return out


def make_readable(folder: Path, packs: list[int]) -> None:
    """Give these rows of the index, of all the made-up ones, the place and the checksum of a real pack."""
    table, real = pq.read_table(folder / "index.parquet"), pq.read_table(folder / "real.parquet")
    for name in ("shard", "offset", "length", "checksum"):
        values = table[name].to_pylist()
        for pack in packs:
            values[pack] = real[name][pack % len(real)].as_py()
        field = INDEX.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    _write(folder, table)


def _write(folder: Path, table: pa.Table) -> None:
    pq.write_table(table, folder / "index.parquet", compression="zstd", write_page_checksum=True)


def save_states(folder: Path, kind: str, positions: dict[str, int]) -> list[int]:
    """The state of the loader at each position into a file; returns the packs of the step after it."""
    mixture = Mixture(source_infos(PackedDataset(folder)), MIXTURES[kind], 0)
    packs: list[int] = []
    for place, position in sorted(positions.items(), key=lambda one: one[1]):
        while mixture.position < position:
            mixture.next()
        state = {"step": position // ROWS, "mixture": mixture.state_dict(), "passed_over": []}
        (folder / f"{kind}-{place}.json").write_text(json.dumps(state))
        packs += [draw.pack for draw in (mixture.next() for _ in range(ROWS)) if draw]
    return packs


def measure(folder: Path, kind: str, place: str) -> dict[str, float]:
    start = time.perf_counter()
    dataset = PackedDataset(folder)
    opened = time.perf_counter()
    loader = PackedLoader(dataset, layout(), ROWS, mixture=MIXTURES[kind], workers=WORKERS)
    if place != "start":
        loader.load_state_dict(json.loads((folder / f"{kind}-{place}.json").read_text()))
    made = time.perf_counter()
    batch = next(loader.batches(1))
    assert batch.input_ids.shape == (ROWS, 512) and torch.is_tensor(batch.media["image"].values)
    end = time.perf_counter()
    return {"open": opened - start, "loader": made - opened, "batch": end - made, "all": end - start}


if __name__ == "__main__":
    main()
