"""Loading: from JPEG files to normalised batches in the main process, by 2 worker processes.

2,000 pictures cut at random out of the photographs of `benchmarks.decode` (shorter side 512 px, quality 90), each with
a caption, in the format that every candidate asks for. All give float32 [64, 3, 224, 224] and what belongs to them to
the main process, which looks at one value of every picture. Ours gives tokens, rows and positions as well, the peers
the captions as text, not yet tokenised. Every candidate runs in a process of its own, all in turn in every repetition,
for three epochs. The limit is two bare processes that decode into one batch that is there already, from memory.

Peers: plain webdataset as its documentation has it (Pillow, torchvision's transforms, batches made in the workers), and
again, like the others, with our fast decoder, written straight into a batch in shared memory: the most that its users
could do. They are looked for in a folder of their own, because some ask for older torch and numpy than they run with;
the benchmark prints the `pip install` for what is missing.
"""

import importlib
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.decode import MEAN, PHOTOS, STD, members
from benchmarks.harness import Row, arguments, release, show
from mm.data.config import DataConfig
from mm.data.layout import ImageLayout, Layout, Template
from mm.data.loader import PackedLoader
from mm.data.media import Decoder, ImageTransform, decode_image
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.data.tokenizer import Tokenizer

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mm" / "benchmarks"
PEERS = CACHE / "peers"
PACKAGES = (
    "litdata lightning-utilities boto3 botocore s3transfer jmespath six tifffile obstore mosaicml-streaming Brotli "
    "python-snappy cramjam xxhash zstd catalogue megatron-energon multi-storage-client filetype mfusepy rapidyaml "
    "xattr lark opentelemetry-api pyroute2 prettytable wcmatch bracex s3fs"
)
BATCH, SIZE, SHARDS, WORKERS = 64, 224, 8, 2
PER_PACK = 8
WORDS = """a an the red old small bright quiet rocket cat coffee galaxy engine eye tissue portrait wheel table sky light
on under beside before with of in morning close wide from above"""
TRANSFORM = ImageTransform(SIZE, MEAN, STD)
Batches = Iterator[tuple[torch.Tensor, Any]]
"""float32 [B, 3, SIZE, SIZE], and what belongs to the pictures."""


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("prepare", "measure"):
        sys.path.append(str(PEERS))
        os.environ.update(DO_NOT_TRACK_LITDATA="1", LITDATA_DISABLE_VERSION_CHECK="1")
        what, name, folder, number = sys.argv[1:5]
        done = PREPARE[name](Path(folder)) if what == "prepare" else measure(name, Path(folder), int(number))
        print(json.dumps(done))
        return
    options = arguments(__doc__)
    count, repetitions, epochs = (512, 1, 2) if options.quick else (2000, 5, 3)
    folder = CACHE / f"loader-{count}"
    make_pictures(folder / "raw", count)
    missing = {name: reason for name in PREPARE if (reason := asked("prepare", name, folder, 0).get("error"))}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES if name not in missing}
    for _ in range(repetitions):
        for name in runs:
            runs[name].append(asked("measure", name, folder, epochs))
    show("loader", rows(runs, missing), options.json)
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", file=sys.stderr)


def asked(what: str, name: str, folder: Path, number: int) -> dict[str, Any]:
    """The answer of a process of its own, or `{"error": …}`."""
    command = [sys.executable, "-m", "benchmarks.loader", what, name, str(folder), str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if what == "measure":
        raise SystemExit(f"{name}: {done.stderr}")
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if "ModuleNotFoundError" in reason:
        reason += f"; pip install --no-deps --target {PEERS} {PACKAGES}"
    return {"error": f"not there ({reason})"}


def rows(runs: dict[str, list[dict[str, Any]]], missing: dict[str, str]) -> list[Row]:
    named = {name: NAMES.get(name, name) for name in CANDIDATES}
    peers = [name for name in CANDIDATES if not name.startswith(("ours", "limit"))]

    def median(name: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[name])

    def of_peers(value: Callable[[str], float]) -> dict[str, Any]:
        return {named[name]: value(name) if name in runs else missing[name] for name in peers}

    def over(one: str, other: str) -> float:
        """How many times as many pictures, the median over paired runs."""
        return statistics.median(a["rate"] / b["rate"] for a, b in zip(runs[one], runs[other], strict=True))

    plain = "webdataset, Pillow"
    found: list[Row] = []
    tokens = median("ours, fast", "tokens")
    for what, unit, better in (("rate", "pictures/s", "higher"), ("cpu", "CPU ms/picture", "lower")):
        found.append(
            {"case": "decoder fast", "unit": unit, "better": better, "ours": median("ours, fast", what),
             "peers": of_peers(lambda name, what=what: median(name, what)), "limit": median("limit, fast", what)}
        )  # fmt: skip
        found.append(
            {"case": "decoder exact", "unit": unit, "better": better, "ours": median("ours, exact", what),
             "peers": {named[plain]: median(plain, what)}, "limit": median("limit, exact", what)}
        )  # fmt: skip
    found.append(
        {"case": "decoder fast, with placeholders", "unit": "tokens/s", "better": "higher",
         "ours": tokens * median("ours, fast", "rate"), "peers": {}}
    )  # fmt: skip
    found.append(
        {"case": "ours over each, paired runs, fast", "unit": "x", "better": "higher", "ours": 1.0,
         "peers": of_peers(lambda name: over("ours, fast", name)), "limit": over("ours, fast", "limit, fast")}
    )  # fmt: skip
    found.append(
        {"case": "ours over each, paired runs, exact", "unit": "x", "better": "higher", "ours": 1.0,
         "peers": {named[plain]: over("ours, exact", plain)}, "limit": over("ours, exact", "limit, exact")}
    )  # fmt: skip
    for what, case, unit in (
        ("first", "first batch, after imports", "s"),
        ("memory", "memory of all processes after an epoch (PSS)", "MB"),
        ("growth", "and what the further epochs add", "MB"),
    ):
        found.append(
            {"case": case, "unit": unit, "better": "lower", "ours": median("ours, fast", what),
             "peers": of_peers(lambda name, what=what: median(name, what))}
        )  # fmt: skip
    return found


# The data


def make_pictures(folder: Path, count: int) -> None:
    """Shards of `KEY.jpg` and `KEY.txt`, unless they are there."""
    import webdataset as wds

    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    photos = [Image.open(io.BytesIO(data)).convert("RGB") for data in members("scikit-image", PHOTOS).values()]
    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / f"{shard:03d}.tar"), mtime=0) as tar:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                photo = photos[number % len(photos)]
                share = math.sqrt(rng.uniform(0.5, 1))
                width, height = photo.width * share * rng.uniform(0.9, 1), photo.height * share * rng.uniform(0.9, 1)
                left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
                scale = 512 / min(width, height)
                size = (round(width * scale), round(height * scale))
                cut = photo.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
                file = io.BytesIO()
                cut.save(file, "JPEG", quality=90)
                caption = " ".join(rng.choice(WORDS.split(), rng.integers(6, 16)))
                tar.write({"__key__": f"{number:06d}", "jpg": file.getvalue(), "txt": caption})
    (folder / "done").touch()


def pictures(folder: Path) -> Iterator[tuple[bytes, str]]:
    import webdataset as wds

    for sample in wds.WebDataset([str(path) for path in shards(folder)], shardshuffle=False):
        yield sample["jpg"], sample["txt"].decode()


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "raw").glob("*.tar"))


def layout() -> Layout:
    tokenizer = Tokenizer.load("builtin:emoji")
    template = Template("<s>", "<|im_end|>", "\n")
    return Layout(tokenizer, template, tokenizer.id("<|endoftext|>"), ImageLayout(64, 256, TRANSFORM))


def prepare_ours(folder: Path) -> dict[str, Any]:
    source = {"kind": "captions", "path": str(folder / "raw" / "*.tar"), "name": "pictures"}
    settings = {"context_length": 1024, "budgets": {"image": PER_PACK}, "cache": str(folder / "ours")}
    packed = pack_split(DataConfig.model_validate({"sources": [source], **settings}), "train", layout(), 0)
    return {"packed": str(packed)}


def prepare_energon(folder: Path) -> dict[str, Any]:
    from megatron.energon.flavors import BaseWebdatasetFactory

    for path in shards(folder):
        target = folder / "energon" / path.name
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            target.hardlink_to(path)
    if not (folder / "energon" / ".nv-meta" / "dataset.yaml").exists():
        names = [path.name for path in shards(folder)]
        BaseWebdatasetFactory.prepare_dataset(
            folder / "energon", names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
        (folder / "energon" / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )
    return {}


def prepare_streaming(folder: Path) -> dict[str, Any]:
    from streaming import MDSWriter

    if not (folder / "streaming" / "index.json").exists():
        columns = {"jpg": "bytes", "txt": "str"}
        with MDSWriter(out=str(folder / "streaming"), columns=columns, size_limit="64mb") as out:
            for jpg, txt in pictures(folder):
                out.write({"jpg": jpg, "txt": txt})
    return {}


def prepare_litdata(folder: Path) -> dict[str, Any]:
    from litdata.streaming.cache import Cache

    if not (folder / "litdata" / "index.json").exists():
        (folder / "litdata").mkdir(exist_ok=True)
        cache = Cache(str(folder / "litdata"), chunk_bytes="64MB")
        for number, (jpg, txt) in enumerate(pictures(folder)):
            cache[number] = {"jpg": jpg, "txt": txt}
        cache.done()
        cache.merge()
    return {}


PREPARE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ours": prepare_ours, "energon": prepare_energon, "streaming": prepare_streaming, "litdata": prepare_litdata,
}  # fmt: skip


# The candidates: batches of `epochs` epochs


def ours(folder: Path, epochs: int, decoder: Decoder) -> Batches:
    dataset = PackedDataset(next((folder / "ours" / "packed").glob("train-*")))
    loader = PackedLoader(dataset, layout(), rows=BATCH // PER_PACK, workers=WORKERS, decoder=decoder)
    for batch in loader.batches(epochs * len(dataset) * PER_PACK // BATCH):
        yield batch.media["image"].stacked(), batch


def decoded(jpgs: list[bytes]) -> torch.Tensor:
    """A batch in shared memory, so that a DataLoader passes it on without a copy."""
    storage = torch.UntypedStorage._new_shared(4 * len(jpgs) * 3 * SIZE * SIZE)
    batch = torch.empty(0).set_(torch.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True))
    batch = batch.view(len(jpgs), 3, SIZE, SIZE)
    for jpg, out in zip(jpgs, batch.numpy(), strict=True):
        decode_image(jpg, TRANSFORM, "", None, "fast", out)
    return batch


def collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, list[Any]]:
    return decoded([sample["jpg"] for sample in samples]), [sample["txt"] for sample in samples]


def webdataset(folder: Path, epochs: int, fast: bool) -> Batches:
    import webdataset as wds
    from torchvision import transforms

    data = wds.WebDataset([str(path) for path in shards(folder)], shardshuffle=SHARDS, seed=0).shuffle(1000)
    if fast:
        data = data.batched(BATCH, collation_fn=collate)
    else:
        chain = transforms.Compose(
            [
                transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        data = data.decode("pilrgb").to_tuple("jpg", "txt").map_tuple(chain).batched(BATCH)
    loader = wds.WebLoader(data.repeat(epochs), batch_size=None, num_workers=WORKERS, prefetch_factor=3)
    return iter(loader)


def energon(folder: Path, epochs: int) -> Batches:
    from megatron.energon import (
        Cooker,
        CrudeSample,
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )

    @stateless
    def cook(sample: CrudeSample) -> CrudeSample:
        return sample

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            return collate(samples)

        @stateless
        def encode_batch(self, batch: Any) -> Any:
            return batch

    config = WorkerConfig(rank=0, world_size=1, num_workers=WORKERS)
    data = get_train_dataset(
        folder / "energon", worker_config=config, batch_size=BATCH, shuffle_buffer_size=1000,
        max_samples_per_sequence=100, task_encoder=Encoder(),
    )  # fmt: skip
    left = epochs * sum(1 for _ in pictures(folder))
    for batch in get_loader(data, prefetch_factor=3):
        yield batch
        left -= len(batch[0])
        if left <= 0:
            return


def streaming(folder: Path, epochs: int) -> Batches:
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate, prefetch_factor=3, persistent_workers=True
    )
    for _ in range(epochs):
        yield from loader


def litdata(folder: Path, epochs: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / "litdata"), shuffle=True)
    loader = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate, prefetch_factor=3, persistent_workers=True
    )
    for _ in range(epochs):
        yield from loader


CANDIDATES: dict[str, Callable[[Path, int], Any]] = {
    "ours, fast": lambda folder, epochs: ours(folder, epochs, "fast"),
    "webdataset, Pillow": lambda folder, epochs: webdataset(folder, epochs, False),
    "webdataset, fast": lambda folder, epochs: webdataset(folder, epochs, True),
    "energon": energon,
    "streaming": streaming,
    "litdata": litdata,
    "ours, exact": lambda folder, epochs: ours(folder, epochs, "exact"),
    "limit, fast": lambda folder, epochs: limit(folder, epochs, "fast"),
    "limit, exact": lambda folder, epochs: limit(folder, epochs, "exact"),
}
MODULES = {"energon": ["megatron.energon"], "streaming": ["streaming"], "litdata": ["litdata"]}
sys.path.append(str(PEERS))
NAMES = {
    "webdataset, Pillow": f"{release('webdataset')}, Pillow", "webdataset, fast": f"{release('webdataset')}, fast",
    "energon": release("megatron-energon"), "streaming": release("mosaicml-streaming"), "litdata": release("litdata"),
}  # fmt: skip


# Measuring


def measure(name: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Rate and CPU time between the first batch and the end, time to the first, memory after every epoch."""
    if name.startswith("limit"):
        return CANDIDATES[name](folder, epochs)
    for module in ("torchvision.io", "torchvision.transforms", *MODULES.get(name, ())):
        importlib.import_module(module)
    of_an_epoch = sum(1 for _ in pictures(folder))
    seen, tokens, at_first = 0, 0, 0
    paused = 0.0  # looking at memory, as wall clock and CPU time alike
    memory: list[float] = []
    first = cpu = spent = begun = math.nan
    start = time.perf_counter()
    for values, rest in CANDIDATES[name](folder, epochs):
        assert values.shape[1:] == (3, SIZE, SIZE) and values.dtype == torch.float32
        assert bool(values[:, 0, 0, 0].isfinite().all())
        seen += len(values)
        tokens += rest.tokens if name.startswith("ours") else 0
        now = time.perf_counter()
        if not at_first:
            at_first, begun, first = seen, now, now - start
            cpu = cpu_seconds()
        if seen >= (len(memory) + 1) * (of_an_epoch - BATCH):  # not at the very end: workers leave before it
            spent, counted = cpu_seconds() - cpu - paused, seen - at_first
            memory.append(resident())
            paused += time.perf_counter() - now
    return {
        "rate": (seen - at_first) / max(now - begun - paused, 1e-9), "cpu": 1e3 * spent / counted, "first": first,
        "memory": memory[0], "growth": memory[-1] - memory[0], "tokens": tokens / seen,
    }  # fmt: skip


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family())


def resident() -> float:
    """MB of this process and those that it has started, shared pages counted once."""
    return sum(process.memory_full_info().pss for process in family()) / 2**20


def limit(folder: Path, epochs: int, decoder: Decoder) -> dict[str, Any]:
    """Two processes that decode the same pictures from memory into a batch that is there, and do nothing else."""
    data = [jpg for jpg, _ in pictures(folder)]
    decode_image(data[0], TRANSFORM, "", None, decoder)  # what is imported when it is used
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(WORKERS), context.SimpleQueue()

    def decode(part: list[bytes]) -> None:
        torch.set_num_threads(1)
        bytes(31 << 20)  # freed, it tells glibc to keep what is freed from now on: no page is faulted in twice
        batch = np.zeros((BATCH, 3, SIZE, SIZE), dtype=np.float32)
        barrier.wait()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(epochs):
            for number, jpg in enumerate(part):
                decode_image(jpg, TRANSFORM, "", None, decoder, batch[number % BATCH])
        results.put((time.perf_counter() - start, time.process_time() - cpu))

    processes = [context.Process(target=decode, args=(data[number::WORKERS],)) for number in range(WORKERS)]
    for process in processes:
        process.start()
    found = [cast(tuple[float, float], results.get()) for _ in processes]
    for process in processes:
        process.join()
    many = epochs * len(data)
    return {"rate": many / max(took for took, _ in found), "cpu": 1e3 * sum(cpu for _, cpu in found) / many}


if __name__ == "__main__":
    main()
