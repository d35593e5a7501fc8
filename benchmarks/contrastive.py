"""Contrastive training: pairs a second, ours and open_clip's own trainer, on the same towers, weights and tars.

CLIP with a vision transformer and a text tower of 5 million parameters each (and 13 million of embeddings), 64 pairs a
step, AdamW, one process of two threads, and two of one: FSDP with whole copies of the weights beside open_clip's
DistributedDataParallel with `local_loss` and `gather_with_grad`. Texts are of a dozen tokens, as alternative texts of
pictures on the web are, and of more than the tower takes. Both sides read, decode and crop pictures in one further
process for each rank. Speeds are over all steps but the first. *loss* is the mean over all steps: pictures, crops and
the order of pairs are drawn differently, so the curves agree in the mean alone; that they are equal where the batches
are is a test (tests/train/test_clip_runs.py).

Three things of open_clip's trainer are got round: it hands a CPU to DistributedDataParallel as a device id, which that
refuses; it imports pandas, of which it needs nothing for tars; and it takes the mark that webdataset 1.0 puts between
shards for a file.
"""

import functools
import importlib
import io
import json
import os
import re
import runpy
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, arguments, release, show
from mm.config import RunConfig
from mm.data.prepare import open_splits
from mm.models.released import open_clip
from mm.train.metrics import read_metrics
from mm.train.trainer import Trainer, Unwatched

PAIRS = 64
SHARDS = 4
CONTEXT = {"short texts": 1024, "long texts": 4096}
WORDS = (
    "a",
    "red",
    "blue",
    "small",
    "old",
    "new",
    "round",
    "shiny",
    "picture",
    "of",
    "the",
    "with",
    "house",
    "dog",
    "tree",
)
MODEL: dict[str, Any] = {
    "kind": "clip",
    "embed_dim": 256,
    "vision": {"image_size": 64, "patch_size": 8, "width": 256, "layers": 6, "head_width": 64},
    "text": {"context_length": 77, "width": 256, "heads": 4, "layers": 6},
}
SMALL: dict[str, Any] = {
    **MODEL,
    "vision": {**MODEL["vision"], "width": 64, "layers": 1},
    "text": {**MODEL["text"], "width": 64, "heads": 1, "layers": 1},
}
RATE = 5e-4


def main() -> None:
    options = arguments(__doc__, job="what the benchmark starts itself")
    if options.job:
        work(json.loads(options.job))
        return
    steps, repetitions, model = (3, 1, SMALL) if options.quick else (9, 2, MODEL)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for texts, ranks in (("short texts", 1), ("long texts", 1), ("short texts", 2)):
            rows += compare(texts, ranks, steps, repetitions, model, Path(folder))
    show("contrastive", rows, options.json)


def compare(texts: str, ranks: int, steps: int, repetitions: int, model: dict[str, Any], folder: Path) -> list[Row]:
    data = folder / texts.replace(" ", "_")
    if not data.exists():
        write_tars(data, steps * PAIRS, 9 if texts == "short texts" else 90)
    config = config_of(data, model, steps, ranks, CONTEXT[texts])
    parsed = RunConfig.model_validate(config)
    open_splits(parsed.data, parsed.model.layout(), 0)  # packing is done once, before training
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "open_clip": []}
    for number in range(repetitions):
        for way in runs:
            out = folder / f"{data.name}-{ranks}-{way}-{number}"
            runs[way].append(run({"way": way, "out": str(out), "config": config, "steps": steps, "ranks": ranks}))
    peer = f"{release('open_clip_torch')}, open_clip_train"
    case = f"{texts}, {ranks} {'process' if ranks == 1 else 'processes'}"

    def median(way: str, key: str) -> float:
        return statistics.median(one[key] for one in runs[way])

    over = statistics.median(a["rate"] / b["rate"] for a, b in zip(*runs.values(), strict=True))
    return [
        {"case": case, "unit": "pairs/s", "better": "higher", "ours": median("ours", "rate"),
         "peers": {peer: median("open_clip", "rate")}},
        {"case": f"{case}: ours over it, paired runs", "unit": "x", "better": "higher", "ours": over, "peers": {},
         "limit": 0.95},
        {"case": f"{case}: loss", "unit": "nats", "better": "lower", "ours": median("ours", "loss"),
         "peers": {peer: median("open_clip", "loss")}},
    ]  # fmt: skip


def write_tars(folder: Path, pairs: int, words: int) -> None:
    """Smooth random pictures with texts of so many words, in `SHARDS` tars."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, pairs, SHARDS):
                small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
                picture = io.BytesIO()
                small.resize((96, 96), Image.Resampling.BICUBIC).save(picture, "JPEG")
                text = " ".join(rng.choice(WORDS, words))
                for ext, content in (("jpg", picture.getvalue()), ("txt", text.encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{ext}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def config_of(data: Path, model: dict[str, Any], steps: int, ranks: int, context: int) -> dict[str, Any]:
    """A step is two rows of 32 pairs."""
    return {
        "out": "unused",
        "data": {
            "sources": [{"kind": "captions", "path": str(data / "*.tar")}],
            "context_length": context,
            "budgets": {"image": PAIRS // 2},
            "workers": 1,
            "cache": str(data / "cache"),
        },
        "model": model,
        "train": {
            "max_steps": steps,
            "batch_tokens": 2 * context,
            "micro_batch": 2 // ranks,
            "device": "cpu",
            "engine": {"kind": "single"} if ranks == 1 else {"kind": "fsdp", "shard_size": 1},
            "optimizer": {"kind": "adamw", "lr": RATE, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2},
            "schedule": {"kind": "constant", "warmup": 0},
            "clip_norm": None,
            "log_every": 1,
            "save_every": 1_000_000,
        },
    }


def run(job: dict[str, Any]) -> dict[str, float]:
    """Rate and loss of a run in as many processes as it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: int = job["ranks"]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    processes = []
    if job["way"] != "ours":  # the weights that ours begins with
        config = RunConfig.model_validate(job["config"])
        start = Path(job["out"]) / "start"
        start.mkdir(parents=True)
        torch.manual_seed(config.seed)
        open_clip.write(config.model.build(), config.model, start)
    for rank in range(ranks):
        launched = {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        environment |= {key: str(value) for key, value in launched.items()} if ranks > 1 else {}
        command = [sys.executable, "-m", "benchmarks.contrastive", "--job", json.dumps(job)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate()[0].decode(errors="replace") for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{job['way']} failed:\n{said[0][-2000:]}")
    return figures_of_ours(job) if job["way"] == "ours" else figures_of_peer(job)


def work(job: dict[str, Any]) -> None:
    """In a process of its own: one rank of one run."""
    out = Path(job["out"])
    if job["way"] == "ours":
        Trainer(RunConfig.model_validate({**job["config"], "out": out / "run"}), Unwatched()).run()
        return
    start = out / "start"
    tars = Path(job["config"]["data"]["sources"][0]["path"]).parent
    options = {
        "model": f"local-dir:{start}", "train-data": f"{tars}/{{00000..{SHARDS - 1:05d}}}.tar",
        "train-num-samples": job["steps"] * PAIRS, "dataset-type": "webdataset", "device": "cpu",
        "dist-backend": "gloo", "batch-size": PAIRS // job["ranks"], "workers": 1, "epochs": 1, "lr": RATE,
        "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "wd": 0.2, "warmup": 0, "lr-scheduler": "const",
        "precision": "fp32", "logs": out, "name": "log", "log-every-n-steps": 1,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    sys.argv = ["open_clip_train", *words, "--local-loss", "--gather-with-grad"]
    sys.modules["pandas"] = types.ModuleType("pandas")
    data = importlib.import_module("open_clip_train.data")
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    parallel = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **more: parallel(model, **more)  # type: ignore[misc]
    runpy.run_module("open_clip_train.main", run_name="__main__")


def figures_of_ours(job: dict[str, Any]) -> dict[str, float]:
    rows = read_metrics(Path(job["out"]) / "run/metrics.jsonl")
    pairs, seconds = (rows[-1][key] - rows[0][key] for key in ("loss_tokens", "elapsed"))
    assert rows[-1]["loss_tokens"] == job["steps"] * PAIRS, "steps that are not full"
    return {"rate": pairs / seconds, "loss": statistics.mean(row["loss"] for row in rows)}


def figures_of_peer(job: dict[str, Any]) -> dict[str, float]:
    log = (Path(job["out"]) / "log/out.log").read_text()
    seconds = [float(one) for one in re.findall(r"Batch \(t\): ([\d.]+)", log)]
    losses = [float(one) for one in re.findall(r"Contrastive_loss: ([\d.]+)", log)]
    assert len(seconds) == len(losses) == job["steps"], log[-2000:]
    return {"rate": PAIRS * (len(seconds) - 1) / sum(seconds[1:]), "loss": statistics.mean(losses)}


if __name__ == "__main__":
    main()
