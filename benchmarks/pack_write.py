"""Packing a whole data set: scanning, planning and writing, in MB of raw shards and samples per second, and memory.

`--corpus FOLDER` takes a corpus that `mm data build` has made (its `corpus.json` says which), packed by the sources of
configs/data/corpora.yaml that name it. Without it: the emoji that ship with the package. Shards are repeated under
other names, so that all sample ids differ: enough of them for a run of seconds, and ten times as many for memory.
Every run is a process of its own. Memory is the most that one process ever held of its own, files in the page cache not
counted, less what it held when it had imported everything.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.harness import Row, show
from mm.config import load_config
from mm.data import builtin, prepare
from mm.data.config import DataConfig
from mm.data.packed import PackedDataset
from mm.data.prepare import PackJob, Workers, pack_split

CONFIG = Path(__file__).parents[1] / "configs" / "data" / "corpora.yaml"
PHASES = ("scan", "plan", "write")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "measure":
        print(json.dumps(measure(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition: does it run at all?")
    parser.add_argument("--corpus", type=Path, help="a folder that `mm data build` has made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = options.corpus or emoji(folder / "emoji")
        size = sum(shard.stat().st_size for shard in shards(corpus))
        copies = 1 if options.quick else max(1, round(100e6 / size))
        runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for _ in range(1 if options.quick else 3):
            for workers, found in runs.items():
                found.append(asked(corpus, copies, workers))
        rows: list[Row] = []
        what = f"{json.loads((corpus / 'corpus.json').read_text())['name']}, {size * copies / 1e6:.0f} MB"
        for workers, found in runs.items():
            seconds = {phase: statistics.median(one[phase] for one in found) for phase in (*PHASES, "all")}
            case = f"{what}, {workers} worker{'s' * (workers > 1)}"
            rows += [
                _row(case, "MB/s", size * copies / 1e6 / seconds["all"]),
                _row(case, "samples/s", found[0]["samples"] / seconds["all"]),
                *(_row(f"{case}: {phase}", "% of the time", 100 * seconds[phase] / seconds["all"]) for phase in PHASES),
            ]
        for times in (1,) if options.quick else (1, 10):
            many = asked(corpus, times * copies, 1)
            rows.append(_row(f"{what} x {times}, memory beyond the start", "MB", many["memory"]))
        show("pack_write", rows, options.json)


def _row(case: str, unit: str, ours: float) -> Row:
    return {"case": case, "unit": unit, "better": "higher" if "/s" in unit else "lower", "ours": ours, "peers": {}}


def shards(corpus: Path) -> list[Path]:
    return sorted(path for path in corpus.iterdir() if path.suffix in (".tar", ".gz"))


def emoji(folder: Path) -> Path:
    """The training pictures that ship with the package, as a corpus of plain tars."""
    folder.mkdir()
    for path in sorted(builtin.folder("emoji").glob("train-*.tar.gz")):
        (folder / f"emoji-{path.name.removesuffix('.gz')}").write_bytes(gzip.decompress(path.read_bytes()))
    (folder / "corpus.json").write_text('{"name": "emoji"}')
    return folder


def asked(corpus: Path, copies: int, workers: int) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.pack_write", "measure", str(corpus), str(copies), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(corpus: Path, copies: int, workers: int) -> dict[str, Any]:
    """Pack a corpus, its shards repeated: seconds by phase, samples, and memory beyond the start in MB."""
    import webdataset  # noqa: F401  # what writing imports when it comes to it

    name = json.loads((corpus / "corpus.json").read_text())["name"]
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        (root / name).mkdir()
        for copy in range(copies):
            for shard in shards(corpus):
                (root / name / f"{shard.name.partition('.')[0]}-{copy:03d}{''.join(shard.suffixes)}").symlink_to(shard)
        config = load_config(CONFIG)
        sources = [one for one in yaml.safe_load(CONFIG.read_text())["data"]["sources"] if f"/{name}/" in one["path"]]
        data = DataConfig.model_validate({**config.data.model_dump(), "sources": sources, "root": str(root)})
        layout = config.model.layout()
        seconds = dict.fromkeys(PHASES, 0.0)
        timed(seconds)
        with Memory() as memory:
            start = time.perf_counter()
            out = pack_split(data, "train", layout, 0, root / "packed", workers=Workers(workers))
            seconds["all"] = time.perf_counter() - start
        assert out is not None
        samples = sum(counts["samples"] for counts in PackedDataset(out).about["ledger"].values())
    return {**seconds, "samples": samples, "memory": memory.most}


def timed(seconds: dict[str, float]) -> None:
    """Add up the time of each phase in `seconds`."""
    step, plan = PackJob._step, prepare.make_plan

    def timed_step(self: PackJob, method: str, *rest: Any) -> bool:
        start = time.perf_counter()
        done = step(self, method, *rest)
        seconds[method] += time.perf_counter() - start
        return done

    def timed_plan(*given: Any) -> None:
        start = time.perf_counter()
        plan(*given)
        seconds["plan"] += time.perf_counter() - start

    PackJob._step, prepare.make_plan = timed_step, timed_plan  # type: ignore[method-assign]


class Memory:
    """The most that one process of this family has held of its own, in MB beyond what this one held at the start."""

    def __enter__(self) -> "Memory":
        self._before, self.most = own(psutil.Process()), 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.02):
            self.most = max(self.most, *(own(one) - self._before for one in (me, *me.children(recursive=True))), 0.0)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def own(process: psutil.Process) -> float:
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0.0
    return (memory.rss - memory.shared) / 2**20


if __name__ == "__main__":
    main()
