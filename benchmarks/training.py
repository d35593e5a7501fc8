"""What the training benchmarks share: one short run of a system, by this trainer or by a peer's.

A `Job` is a config of ours and a way to run it, in a process of its own that reads it from standard input (`python -m
benchmarks.training`). The peers train the same modules, built from the same config, on the documents of the very packs
that ours would take in those steps, shuffled within a step, with the same optimizer and, in the mean, as many tokens a
step. What differs is who lays out rows, what attention does with them, how the loss is computed and who runs the loop.
Speeds are over all steps but the first.
"""

import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Row, release
from mm.config import RunConfig
from mm.data.batch import IGNORE
from mm.data.loader import PackedLoader
from mm.data.media import decode_image
from mm.data.prepare import open_splits
from mm.errors import MMError
from mm.train.config import TrainConfig
from mm.train.distributed import World, resolve_device
from mm.train.engines.config import SingleConfig
from mm.train.engines.single import SingleEngine
from mm.train.metrics import read_metrics
from mm.train.params import freeze
from mm.train.trainer import Trainer, Unwatched

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mm" / "benchmarks"
PEERS = CACHE / "peers"
PACKAGES = "trl datasets pandas dill multiprocess xxhash"
WAYS = {
    "ours": "ours",
    "padded": "Trainer, padded",
    "by length": "Trainer, padded, by length",
    "flattened": "Trainer, flattened",
    "rows": "Trainer, our packs",
    "trl": "SFTTrainer, packed",
}


@dataclass
class Job:
    """`config`: a `RunConfig` as plain values, its `train.max_steps` the steps to run.

    `size`: what one forward pass takes: rows of `ours`, `rows` and `trl`, documents or recordings of the others.
    `attention`: what the peer's language model uses.
    """

    config: dict[str, Any]
    way: str
    size: int
    attention: str = "sdpa"

    @property
    def unit(self) -> str:
        """What its rate counts."""
        return "s of sound" if self.config["model"]["kind"] == "mert" else "loss tokens"

    def with_steps(self, steps: int, seed: int) -> "Job":
        config = {**self.config, "seed": seed, "train": {**self.config["train"], "max_steps": steps}}
        return Job(config, self.way, self.size, self.attention)

    def __str__(self) -> str:
        package = release("trl" if self.way == "trl" else "transformers")
        about = [WAYS[self.way], f"{self.size} at a time", *([] if self.attention == "sdpa" else [self.attention])]
        about += ["compiled"] if self.config["train"].get("compile") else []
        return f"{package} ({', '.join(about)})"


def run(job: Job) -> dict[str, Any]:
    """What `measure` gives, from a process of its own; `{"error": …}` where it ended without."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training"], input=json.dumps(asdict(job)), capture_output=True, text=True
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if "ModuleNotFoundError" in reason or "ImportError" in reason:
        reason += f"; pip install --no-deps --target {PEERS} {PACKAGES}"
    return {"error": f"not measured ({reason})"}


def tuned(jobs: Iterable[Job], steps: int, log: list[Row]) -> Job | str:
    """The fastest of several settings of one way, each run briefly; the reason, where none ran. All go to `log`."""
    best: tuple[float, Job] | None = None
    reason = ""
    for job in jobs:
        found = run(job.with_steps(steps, 0))
        figure = found.get("rate", found.get("error"))
        ours, peers = (figure, {}) if job.way == "ours" else ("", {str(job): figure})
        log.append(
            {"case": f"to choose the size: {job.size}", "unit": f"{job.unit}/s", "better": "higher", "ours": ours,
             "peers": peers}
        )  # fmt: skip
        if "error" in found:
            reason = found["error"]
        elif best is None or found["rate"] > best[0]:
            best = found["rate"], job
    return best[1] if best else reason


def compare(
    what: str, candidates: dict[str, list[Job]], steps: int, repetitions: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of speeds, each way at its best size, all in turn in every repetition; and the runs by way.

    One way is `ours`.
    """
    for seed in range(repetitions):  # in this process, so that packing counts in no other's memory
        one = RunConfig.model_validate({**candidates["ours"][0].config, "seed": seed})
        open_splits(one.data, one.model.layout(), seed)
    tuning: list[Row] = []
    chosen = {way: tuned(jobs, max(2, steps // 2), tuning) for way, jobs in candidates.items()}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way, job in chosen.items() if isinstance(job, Job)}
    for seed in range(repetitions):
        for way in runs:
            runs[way].append(run(chosen[way].with_steps(steps, seed)))  # type: ignore[union-attr]
    failed = {way: one["error"] for way, some in runs.items() for one in some if "error" in one}

    def of_peers(value: Callable[[str], float]) -> dict[str, Any]:
        return {
            str(job) if isinstance(job, Job) else WAYS[way]: (
                failed.get(way) or (value(way) if isinstance(job, Job) else job)
            )
            for way, job in chosen.items()
            if way != "ours"
        }

    def median(way: str, key: str) -> float:
        return statistics.median(one[key] for one in runs[way])

    def over(way: str) -> float:
        return statistics.median(a["rate"] / b["rate"] for a, b in zip(runs["ours"], runs[way], strict=True))

    if "ours" not in runs or "ours" in failed:
        raise SystemExit(f"ours: {failed.get('ours', chosen['ours'])}")
    ours = chosen["ours"]
    assert isinstance(ours, Job)
    case = f"{what}, {ours.size} rows at a time"
    row = {"case": case, "unit": f"{ours.unit}/s", "better": "higher", "ours": median("ours", "rate")}
    cpu = {**row, "unit": f"{ours.unit}/CPU second", "ours": median("ours", "cpu_rate")}
    rows: list[Row] = [
        {**row, "peers": of_peers(lambda way: median(way, "rate"))},
        {**cpu, "peers": of_peers(lambda way: median(way, "cpu_rate"))},
        {**row, "case": "ours over each, paired runs", "unit": "x", "ours": 1.0, "peers": of_peers(over)},
        {**row, "case": "peak memory", "unit": "GB", "better": "lower", "ours": median("ours", "memory"),
         "peers": of_peers(lambda way: median(way, "memory"))},
    ]  # fmt: skip
    return [*rows, *tuning], {way: some for way, some in runs.items() if way not in failed}


def overhead(runs: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """What a step of ours spends beside forward, backward, clipping and optimizer; meaningful on a CPU."""
    return [
        {"case": case, "unit": "% of a step", "better": "lower",
         "ours": 100 * statistics.median(one[key] for one in runs["ours"]), "peers": {}, **limit}
        for case, key, limit in (
            ("overhead of the trainer, waiting for data included", "overhead", {"limit": 3.0}),
            ("waiting for data", "waiting", {}),
        )
    ]  # fmt: skip


def measure(job: Job) -> dict[str, Any]:
    """Of one run: rate and cpu_rate (what `Job.unit` says per second, and per second of the process's CPU time), memory
    (GB, peak), step (seconds) and loss (mean over steps); of ours also what overhead and waiting are of a step."""
    config = RunConfig.model_validate(job.config)
    with tempfile.TemporaryDirectory() as out:
        if job.way == "ours":
            return measure_ours(job, Path(out))
        if job.unit == "s of sound":
            from benchmarks import train_audio

            return train_audio.measure_peer(job, config, Path(out))
        return measure_peer(job, config, Path(out))


@dataclass
class Spent:
    """Seconds of a run's steps in what nobody can do without."""

    forward: float = 0.0
    backward: float = 0.0
    clip: float = 0.0
    update: float = 0.0
    at_step: list[tuple[float, float]] = field(default_factory=list)
    """After each step: all of the above together, and the CPU time of the process."""


class TimedConfig(SingleConfig):
    """The plain engine, with a watch. Its times mean something where operations are not queued: on a CPU."""

    kind: str = "benchmarks.training:TimedConfig"

    def build(self, world: World, train: TrainConfig) -> "TimedEngine":
        return TimedEngine(world, train)


class TimedEngine(SingleEngine):
    def __init__(self, world: World, train: TrainConfig) -> None:
        super().__init__(world, train)
        self.spent = Spent()

    def forward(self, batch: Any) -> Any:
        return self._timed("forward", super().forward, batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._timed("backward", super().backward, loss, last)

    def clip(self, limit: float | None) -> dict[str, Tensor]:
        return self._timed("clip", super().clip, limit)

    def update(self) -> None:
        self._timed("update", super().update)
        spent = self.spent
        spent.at_step.append((spent.forward + spent.backward + spent.clip + spent.update, time.process_time()))

    def _timed(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            setattr(self.spent, what, getattr(self.spent, what) + time.perf_counter() - start)


def measure_ours(job: Job, out: Path) -> dict[str, Any]:
    train = {
        **job.config["train"],
        "micro_batch": job.size,
        "async_save": False,
        "engine": {"kind": "benchmarks.training:TimedConfig"},
    }
    config = RunConfig.model_validate({**job.config, "out": str(out / "run"), "train": train})
    trainer = Trainer(config, Unwatched())
    trainer.run()
    rows = read_metrics(out / "run" / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    seconds = last["elapsed"] - first["elapsed"]
    assert isinstance(trainer.engine, TimedEngine)
    at_step = trainer.engine.spent.at_step
    needed, cpu = (after - before for before, after in zip(at_step[0], at_step[-1], strict=True))
    audio = config.model.layout().audio
    key, each = ("tokens/audio", audio.hop / audio.sampling_rate) if audio else ("loss_tokens", 1)
    done = (last[key] - first[key]) * each
    return {
        "rate": done / seconds,
        "cpu_rate": done / cpu,
        "step": seconds / (len(rows) - 1),
        "memory": last["memory_gb"],
        "loss": statistics.mean(row["loss"] for row in rows),
        "overhead": 1 - needed / seconds,
        "waiting": statistics.mean(row["data_wait"] for row in rows[1:]),
    }


@dataclass
class Document:
    """One segment, or a pack of them. labels [n]: the tokens that are learned, not shifted. positions [n]: in the
    segment. pictures: (position, length, bytes)."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    pictures: list[tuple[int, int, bytes]]


def documents(config: RunConfig, whole: bool) -> tuple[list[Document], Any]:
    """Those of the packs that the run would train on, shuffled within a step, and the layout; `whole`: the packs."""
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    rows = config.train.batch_tokens // config.data.context_length
    mixture = PackedLoader(dataset, layout, rows, seed=config.seed, mixture=config.data.mixture).mixture
    mixture.start_step(0)
    found: list[list[Document]] = []
    for number in range(rows * (config.train.max_steps or 0)):
        if number % rows == 0:
            found.append([])
        if (draw := mixture.next()) is None:
            raise SystemExit("the data is too small for so many steps")
        pack = dataset.read(draw.pack)
        tokens = pack.tokens.astype(np.int64)
        labels, positions = np.full_like(tokens, IGNORE), np.zeros_like(tokens)
        for segment in pack.segments:
            positions[segment.start : segment.start + segment.length] = np.arange(segment.length)
            for a, b in segment.loss:
                learned = slice(max(a, segment.start + 1), b)
                labels[learned] = tokens[learned]
        spans = [(s.start, s.start + s.length) for s in pack.segments]
        for start, stop in [(0, len(tokens))] if whole else spans:
            pictures = [(m.position - start, m.length, m.data) for m in pack.media if start <= m.position < stop]
            found[-1].append(Document(tokens[start:stop], labels[start:stop], positions[start:stop], pictures))
    rng = np.random.default_rng(config.seed)
    return [step[n] for step in found for n in rng.permutation(len(step))], layout


class Documents(torch.utils.data.Dataset[dict[str, Any]]):
    """For transformers' trainer: pictures are decoded when they are asked for, by our decoder."""

    def __init__(self, config: RunConfig, whole: bool) -> None:
        self.documents, self.layout = documents(config, whole)
        self.decoder = config.data.decoder

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = self.documents[index]
        item = {"input_ids": one.tokens, "labels": one.labels, "position_ids": one.positions}
        if self.layout.image is None:
            return item
        transform, here = self.layout.image.transform, np.zeros(len(one.tokens), dtype=bool)
        pixels = np.empty((len(one.pictures), 3, transform.size, transform.size), dtype=np.float32)
        for number, (position, length, data) in enumerate(one.pictures):
            here[position : position + length] = True
            decode_image(data, transform, "", None, self.decoder, pixels[number])
        return {**item, "pixels": pixels, "pictures": here}


def padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Each document a row, up to the longest of them."""
    longest = max(len(item["input_ids"]) for item in items)

    def rows(key: str, fill: int) -> Tensor:
        made = np.full((len(items), longest), fill, dtype=items[0][key].dtype)
        for row, item in zip(made, items, strict=True):
            row[: len(item[key])] = item[key]
        return torch.from_numpy(made)

    items = [{**item, "attention_mask": np.ones(len(item["input_ids"]), dtype=np.int64)} for item in items]
    fills = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0, "pictures": 0}
    batch = {key: rows(key, fill) for key, fill in fills.items() if key in items[0]}
    return batch | _pixels(items)


def flattened(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """All documents one row, told apart by their positions, as transformers' DataCollatorWithFlattening has it."""
    keys = ("input_ids", "labels", "position_ids", "pictures")
    batch = {
        key: torch.from_numpy(np.concatenate([item[key] for item in items]))[None] for key in keys if key in items[0]
    }
    return batch | _pixels(items)


def _pixels(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    pixels = np.concatenate([item["pixels"] for item in items]) if "pixels" in items[0] else ()
    return {"pixels": torch.from_numpy(pixels)} if len(pixels) else {}


class Composed(nn.Module):
    """A vision-language system's modules as transformers' trainer takes a model; features are placed as LLaVA does."""

    def __init__(self, system: Any) -> None:
        super().__init__()
        self.vision, self.connector, self.language = system.vision, system.connector, system.language

    def forward(
        self, input_ids: Tensor, pictures: Tensor, pixels: Tensor | None = None, **inputs: Any
    ) -> Any:  # what transformers' models take and give
        embeddings = self.language.get_input_embeddings()(input_ids)
        if pixels is not None:
            patches = self.vision.of_squares(pixels)
            side = math.isqrt(patches.shape[1])
            features = self.connector(self.connector.pool(patches.flatten(0, 1), [(side, side)] * len(patches)))
            embeddings = embeddings.masked_scatter(pictures[..., None], features.to(embeddings.dtype))
        return self.language(inputs_embeds=embeddings, use_cache=False, **inputs)


def measure_peer(job: Job, config: RunConfig, out: Path) -> dict[str, Any]:
    sys.path.append(str(PEERS))
    import transformers

    transformers.logging.set_verbosity_error()
    train, steps = config.train, config.train.max_steps or 0
    torch.manual_seed(config.seed)
    system = config.model.build(weights=False)
    system.language.set_attn_implementation(job.attention)
    system.language.config.use_cache = False
    freeze(system, train.params)
    model = Composed(system) if hasattr(system, "vision") else system.language
    data = Documents(config, job.way == "rows")
    rows = train.batch_tokens // config.data.context_length
    passes = rows / job.size if job.way in ("rows", "trl") else len(data) / steps / job.size
    watch = Watch(resolve_device(train.device, 0), lambda inputs: (inputs["labels"][:, 1:] != IGNORE).sum())
    if job.way == "trl":
        return learn(_trl(trainer_options(config, out, job.size, passes), model, data, config, watch), watch)
    collator = flattened if job.way in ("flattened", "rows") else padded
    return learn(transformers_trainer(job, config, out, model, data, collator, passes, watch), watch)


def transformers_trainer(
    job: Job, config: RunConfig, out: Path, model: nn.Module, data: Any, collator: Any, passes: float, watch: "Watch"
) -> Any:
    """Hugging Face's trainer, watched; `passes`: about how many forward passes make a step."""
    import transformers

    strategy = "group_by_length" if job.way == "by length" else "sequential"
    options = trainer_options(config, out, job.size, passes)
    return watched(transformers.Trainer, watch)(
        model=model,
        args=transformers.TrainingArguments(**options, train_sampling_strategy=strategy),
        train_dataset=data,
        data_collator=collator,
    )


def learn(trainer: Any, watch: "Watch") -> dict[str, Any]:
    trainer.add_callback(watch.callback())
    gc.collect()
    result = trainer.train()
    return {**watch.read(), "loss": result.training_loss}


def trainer_options(config: RunConfig, out: Path, size: int, passes: float) -> dict[str, Any]:
    """What Hugging Face's trainer takes for `size` samples a forward pass."""
    train, device = config.train, resolve_device(config.train.device, 0)
    return dict(
        output_dir=str(out),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=max(1, round(passes)),
        max_steps=train.max_steps,
        learning_rate=train.optimizer.lr,
        adam_beta1=train.optimizer.betas[0],
        adam_beta2=train.optimizer.betas[1],
        weight_decay=train.optimizer.weight_decay,
        max_grad_norm=train.clip_norm,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=device.type == "cpu",
        bf16=train.precision == "bf16",
        torch_compile=train.compile,
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        gradient_checkpointing=train.activation_checkpointing.mode == "full",
    )


def _trl(options: dict[str, Any], model: Any, data: Documents, config: RunConfig, watch: "Watch") -> Any:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    return watched(SFTTrainer, watch)(
        model=model,
        args=SFTConfig(**options, packing=True, max_length=config.data.context_length),
        train_dataset=Dataset.from_dict({"input_ids": [one.tokens for one in data.documents]}),
        processing_class=AutoTokenizer.from_pretrained(config.model.language.tokenizer_name),
    )


def watched(trainer: Any, watch: "Watch") -> Any:
    """The trainer's class, told to count what it learns."""

    class Watched(trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            watch.done = watch.done + watch.amount(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    return Watched


class Watch:
    """Time and what is done, by the `amount` of a batch, at the end of the first step and of the last."""

    def __init__(self, device: torch.device, amount: Callable[[dict[str, Tensor]], Any]) -> None:
        self.device, self.amount = device, amount
        self.done: Any = 0
        self.seen: list[tuple[float, float, float]] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                done = float(watch.done)  # waits for a GPU, as the logged loss would
                if watch.device.type == "cuda":
                    torch.cuda.synchronize(watch.device)
                watch.seen.append((time.perf_counter(), time.process_time(), done))

        return Callback()

    def read(self) -> dict[str, float]:
        seconds, cpu, done = (after - before for before, after in zip(self.seen[0], self.seen[-1], strict=True))
        peak = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return {
            "rate": done / seconds,
            "cpu_rate": done / cpu,
            "step": seconds / (len(self.seen) - 1),
            "memory": peak / 1e9,
        }


if __name__ == "__main__":
    from benchmarks import training  # as that module, so that `kind` and pickles find one and the same class

    try:
        print("\n" + json.dumps(training.measure(training.Job(**json.load(sys.stdin)))))
    except MMError as error:
        raise SystemExit(str(error)) from None
