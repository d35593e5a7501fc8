"""Packed against padded rows, few against many tokens a picture, low-to-high against high alone.

The three choices of Open-Qwen2VL (arXiv 2504.00595, sections 2.2 and 2.3) on pictures that anyone can have: the Tux
Paint stamps and openclipart's drawings with their English captions. A model of 6 million parameters from random
weights; a picture has 12 x 12 patches, pooled to 5 x 5 ("low", as 27 x 27 are to 12 x 12) or not at all ("high").

    mm data build stamps --out corpora/stamps && mm data build clipart --out corpora/clipart

Pictures whose files lie in one folder and begin with the same word ("bee1", "bee3") are one group; a group is trained
on, validated on or tested on as a whole. All runs have the same pictures, epochs and settings, and 91 pictures a step,
each in the micro-batches that are fastest for it; seeds are the outer loop, so the runs that are compared follow each
other. "repacked" is "low" with every epoch packed anew, so that a row never holds the same pictures twice: what is lost
by keeping them together.
"""

import hashlib
import io
import json
import re
import statistics
import tarfile
from collections import defaultdict
from functools import partial
from pathlib import Path

from benchmarks.study import Config, Row, Run, Study
from benchmarks.training import CACHE

CORPORA = Path("corpora")
DATA = CACHE / "study-open_qwen2vl"
SHARDS = {"stamps": "stamps/images-*.tar", "clipart": "clipart/clipart-*.tar"}
SPLITS = ("train", "validation", "test")
SEEDS = (0, 1)
LOW, HIGH = 25, 144
STEP = 91  # pictures
ROWS = {LOW: 4, HIGH: 15}
"""Packed rows that hold about so many, by tokens a picture."""
MICRO_BATCH = {(LOW, "full"): 2, (LOW, "single"): 13, (HIGH, "full"): 3}
"""The faster of two on 2 cores: seconds a step 1.92 (4 rows: 2.12), 2.03 (91: 2.48), 3.87 (5: 4.03)."""
LR = 2e-3
"""Of 5e-4, 1e-3, 2e-3 the best for low (validation loss after 1.5 epochs 4.93, 4.58, 4.52), of the last two for high,
too (4.69, 4.56); seed 0."""
CONTEXT = 1024
EPOCHS = 5

MODEL = {
    "kind": "open_qwen2vl",
    "vision": {
        "name": "timm/vit_tiny_patch16_224",
        "pretrained": False,
        "image_size": 96,
        "block": -1,
        "options": {
            "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 6, "class_token": False, "global_pool": "",
            "weight_init": "jax", "proj_drop_rate": 0.1,
        },
    },
    "language": {
        "tokenizer": "builtin:emoji",
        "config": {
            "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
            "initializer_range": 0.05, "attention_dropout": 0.1,
        },
    },
}  # fmt: skip


def prepare() -> None:
    """Shards of the splits, by picture; the folder appears when all are written."""
    if DATA.exists():
        return
    partial = DATA.with_name(f".{DATA.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, pattern in SHARDS.items():
        shards = sorted(CORPORA.glob(pattern))
        if not shards:
            raise SystemExit(f"{CORPORA / pattern}: not there; mm data build {name} --out {CORPORA / name}")
        outs = {split: tarfile.open(partial / f"{name}-{split}.tar", "w") for split in SPLITS}
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    data = file.read()
                    key, _, ext = member.name.rpartition(".")
                    if ext == "json":
                        data = _english(data)
                    member.size = len(data)
                    outs[split_of(key)].addfile(member, io.BytesIO(data))
        for out in outs.values():
            out.close()
    partial.rename(DATA)


def split_of(key: str) -> str:
    """Of a picture by its file's name, `FOLDER-FOLDER-WORDS`: 10 % of all groups to test on, 5 % to validate on."""
    folder, _, name = key.rpartition("-")
    word = re.search(r"[a-z]+", name.lower())
    place = hashlib.sha256(f"{folder} {word and word[0]}".encode()).digest()[0] / 256
    return "test" if place < 0.1 else "validation" if place < 0.15 else "train"


def _english(data: bytes) -> bytes:
    """The caption in English alone."""
    about = json.loads(data)
    english = [one["text"] for one in about.get("captions", []) if one["language"] == "en"]
    return json.dumps({"caption": english[0] if english else about["caption"]}).encode()


def config(tokens: int, packing: str = "full", visits: int = 1) -> Config:
    """A run at so many tokens a picture. `visits`: epochs that are packed each for itself."""
    sources, validation, test = (
        [{"kind": "captions", "name": name, "path": str(DATA / f"{name}-{split}.tar")} for name in SHARDS]
        for split in SPLITS
    )
    rows = ROWS[tokens] if packing == "full" else STEP
    return {
        "data": {
            "sources": sources,
            "validation": validation,
            "test": test,
            "context_length": CONTEXT,
            "packing": packing,
            "visits": visits,
            "too_long": "drop",
            "workers": 0,
        },
        "model": {**MODEL, "connector": {"kind": "pool_mlp", "tokens": tokens}},
        "train": {
            "epochs": EPOCHS,
            "batch_tokens": rows * CONTEXT,
            "micro_batch": MICRO_BATCH[tokens, packing],
            "optimizer": {"kind": "adamw", "lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.3},
            "schedule": {"kind": "cosine", "warmup": 5},
            "log_every": 10,
            "save_every": 50,
            "device": "cpu",
        },
        "evaluation": {"every": 40, "candidates": 32, "samples": 0},
    }


def low_to_high(seed: int, rows: list[Row]) -> Config:
    """All epochs at few tokens, then as many steps at many as fill the time that many tokens alone took.

    The second stage begins its schedule anew, at the full peak, and sees pictures again that the first has seen.
    """
    low, high = (next(row for row in rows if (row["run"], row["seed"]) == (name, seed)) for name in ("low", "high"))
    steps = max(1, round((high["seconds"] - low["seconds"]) / (high["seconds"] / high["steps"])))
    few, many = config(LOW), config(HIGH)
    stage = {"model": {"connector": many["model"]["connector"]}}
    train = {key: many["train"][key] for key in ("batch_tokens", "micro_batch")}
    return {
        **few,
        "stages": [
            {"name": "low"},
            {"name": "high", **stage, "train": {**train, "epochs": None, "max_steps": steps}},
        ],
    }


RUNS = [
    run
    for seed in SEEDS
    for run in (
        Run("low", seed, 6.5, lambda rows: config(LOW)),
        Run("padded", seed, 7, lambda rows: config(LOW, "single")),
        Run("high", seed, 13, lambda rows: config(HIGH)),
        Run("low-to-high", seed, 13, partial(low_to_high, seed)),
    )
]
RUNS += [Run("repacked", seed, 6.5, lambda rows: config(LOW, visits=EPOCHS)) for seed in SEEDS]


def show(rows: list[Row]) -> str:
    """A table of means and ranges over seeds. `seconds` is null where other work ran beside a run."""
    by_run: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_run[row["run"]].append(row)
    lines = [
        "| run | seeds | steps | loss-bearing tokens | training, s | caption loss | with other pictures | matching |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, some in by_run.items():
        results = [row["result"] for row in some]
        cells = [
            name,
            str(len(some)),
            f"{statistics.mean(row['steps'] for row in some):.0f}",
            f"{statistics.mean(row['loss_tokens'] for row in some):,.0f}",
            spread([row["seconds"] for row in some if row["seconds"] is not None], ".0f"),
            spread([one["caption_loss"] for one in results], ".3f"),
            spread([one["shuffled_loss"] - one["caption_loss"] for one in results], "+.3f"),
            spread([100 * one["match_accuracy"] for one in results], ".1f") + " %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """`mean (lowest to highest)`."""
    low, high = min(values), max(values)
    return f"{statistics.mean(values):{form}} ({low:{form}} to {high:{form}})"


STUDY = Study(
    "open_qwen2vl",
    "packed against padded; 25 against 144 tokens a picture; low-to-high against high alone, at equal time",
    prepare,
    RUNS,
    show,
)
