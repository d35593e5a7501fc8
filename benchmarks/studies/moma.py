"""Dense, an expert a modality, eight shared experts, four and four: loss by modality against FLOPs.

MoMa's main comparison (arXiv 2407.21770, 4.2 and 4.4) on models of 2 million parameters that are active for a token,
and up to 8 million in all. Pictures are emoji, Tux Paint stamps and openclipart's drawings as 64 codes of 256, by a VQ
model that is trained first, half of them behind their English captions; text is English from Debian's documents. Both
modalities have equally many tokens.

    for name in emoji stamps clipart debian-text; do mm data build $name --out corpora/$name; done

Every arm takes the same packs in the same order, of its seed, and the FLOPs of the dense model for a token. No token is
seen twice: of each picture there are as many cuttings as the longest run needs. Learning rates are constant after a
warmup, so that the points of a curve can be held against each other, and the dense run is twice as long as the others:
how many FLOPs it takes to the loss that they end with is read off its curve. "upcycled" is an expert a modality for the
first quarter, then four copies of each.

Checkpoints along the way are measured on held-out pictures and documents, in the same pools of tokens for all: with
experts that choose among the tokens of a pool, which looks ahead, as in training and in the paper's curves; and with
auxiliary routers, which could write. These learn beside the model, at FLOPs of their own that are not counted with its.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import statistics
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.studies import open_qwen2vl
from benchmarks.studies.mert import add
from benchmarks.study import Config, Row, Run, Study, train
from benchmarks.training import CACHE
from mm.config import RunConfig
from mm.data.builtin.train_tokenizer import train as train_tokenizer
from mm.data.config import Split
from mm.data.loader import PackedLoader
from mm.data.mixture import MixtureConfig
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers, cores, pack_split
from mm.data.sample import keyed_rng
from mm.hub import export, load
from mm.train.estimate import estimate
from mm.train.features import attach_codes, encode
from mm.train.trainer import Unwatched

CORPORA = Path("corpora")
DATA = CACHE / "study-moma"
PICTURES = {"emoji": "emoji/emoji-*.tar", "stamps": "stamps/images-*.tar", "clipart": "clipart/clipart-*.tar"}
TEXT = "debian-text/*.jsonl.gz"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SEEDS = (0, 1)
SIZE = 64
CUTTINGS = 13
"""Of each training picture, 62,000 in all; the dense run takes about 58,000."""
DOCUMENTS = 0.2
"""Share of the English documents, 3.7 million tokens; the dense run takes 3.1 million."""
VOCABULARY = 2048
CONTEXT, ROWS = 640, 6
"""Eight pictures with their captions fill a row."""
STEPS, EVERY, SEED_STEPS, WARMUP = 1000, 125, 250, 50
LONGER = 2
"""Times the steps of the others that the dense model is trained for."""
POOLS = 16
"""Of the size of a step, that checkpoints are measured on."""
LR = 4e-3
"""Validation losses of the dense model after 150 steps (seed 0; codes of a VQ model of 60 steps), text and image: 6.14
and 2.05 at 1e-3, 5.81 and 1.88 at 2e-3, 5.69 and 1.84 at 4e-3, 5.63 and 1.86 at 8e-3. Not tuned on the others."""
KINDS = ("text", "image")
WAYS = {"choice": "experts choose", "auxiliary": "auxiliary routers"}
ARMS: dict[str, dict[str, int]] = {
    "dense": {},
    "1t1i": {"text": 1, "image": 1},
    "8x": {"all": 8},
    "4t4i": {"text": 4, "image": 4},
}
PUBLISHED = {"8x": (3.0, 3.0, 2.8), "4t4i": (3.7, 2.6, 5.2)}
"""Of 1.4B active parameters after 10^12 tokens (4.2): all, text, image."""
DRAWS = 1000

LANGUAGE = {
    "model_type": "chameleon", "swin_norm": True, "hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4,
    "num_attention_heads": 5, "num_key_value_heads": 5, "initializer_range": 0.06,
}  # fmt: skip
VQ = {"kind": "vq", "size": SIZE, "codes": 256, "weights": {"commitment": 0.02}}  # as configs/moma/vq_tiny.yaml
VQ_STEPS = 1000


def prepare() -> None:
    """Splits, the tokenizer, the VQ model, what is packed, and all codes; what is there is left alone."""
    if not DATA.exists():
        write_splits()
    if not (DATA / "vq").exists():
        (DATA / "vq-training").mkdir(exist_ok=True)
        train(Run("vq", 0, 9, None), vq_config(), DATA / "vq-training")
        export(DATA / "vq-training/run", DATA / "vq", to="janus-vq")
    raw = RunConfig.model_validate({**config("dense", data=raw_data()), "out": "unused"})
    for split in SPLITS:
        pack_split(raw.data, split, raw.model.layout(), 0, DATA / "packed" / split, workers=Workers(cores()))
    encode(RunConfig.model_validate({**config("dense"), "out": "unused"}), [], "cpu", (0, 1), Unwatched())


def write_splits() -> None:
    """Pictures and documents by split, and a tokenizer of those to train on; the folder appears when all is there."""
    unfinished = DATA.with_name(f".{DATA.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    found = list(pictures())
    captions = [caption for split, _, _, caption in found if split == "train"]
    for split in SPLITS:
        with tarfile.open(unfinished / f"pictures-{split}.tar", "w") as tar:
            # Cuttings of one picture far apart, so that no row and no step has two of them.
            for number in range(CUTTINGS if split == "train" else 1):
                for one, key, data, caption in found:
                    if one == split:
                        add(tar, f"{key}-{number}.jpg", cutting(data, key, number, caption))
                        add(tar, f"{key}-{number}.json", json.dumps({"caption": caption}).encode())
    texts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for split, text in documents():
        texts[split].append(text)
    for split, some in texts.items():
        with gzip.open(unfinished / f"text-{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
    (unfinished / "tokenizer").mkdir()
    train_tokenizer(iter([*captions, *texts["train"]]), VOCABULARY).save(str(unfinished / "tokenizer/tokenizer.json"))
    unfinished.rename(DATA)


def pictures() -> Iterator[tuple[Split, str, bytes, str]]:
    """(split, key, encoded picture, English caption). Emoji with a skin tone are left out: all but the same."""
    for name, pattern in PICTURES.items():
        for shard in shards(pattern, name):
            for number, (key, members) in enumerate(sorted(groups(shard).items())):
                about = json.loads(members.pop("json"))
                if not about.get("skin_tones"):
                    (data,) = members.values()
                    split: Any = split_of(about["group"]) if name == "emoji" else open_qwen2vl.split_of(key)
                    yield split, f"{name}-{number:05d}", data, caption_of(about)


def groups(shard: Path | str) -> dict[str, dict[str, bytes]]:
    """The members of a tar by key, up to the first dot, and the rest of their names."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            key, _, ext = member.name.partition(".")
            found.setdefault(key, {})[ext] = file.read()
    return found


def documents() -> Iterator[tuple[Split, str]]:
    for shard in shards(TEXT, "debian-text"):
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            for line in lines:
                one = json.loads(line)
                if one["language"] == "en" and place_of(f"some {one['id']}") < DOCUMENTS:
                    yield split_of(one["id"], 0.03), one["text"]


def shards(pattern: str, name: str) -> list[Path]:
    if not (found := sorted(CORPORA.glob(pattern))):
        raise SystemExit(f"{CORPORA / pattern}: not there; mm data build {name} --out {CORPORA / name}")
    return found


def split_of(group: str, share: float = 0.1) -> Split:
    """A share of all groups to test on, half as much to validate on; 10 % as `open_qwen2vl.split_of`."""
    place = place_of(group)
    return "test" if place < share else "validation" if place < 1.5 * share else "train"


def place_of(text: str) -> float:
    """Evenly spread from 0 to 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def caption_of(about: dict[str, Any]) -> str:
    english = [one["text"] for one in about.get("captions", []) if one["language"] == "en"]
    return str(english[0] if english else about["caption"])


def cutting(data: bytes, key: str, number: int, caption: str) -> bytes:
    """A square of a picture as a JPEG: 65 to 100 % of its longer side, from anywhere, and half of them mirrored, where
    the caption does not speak of sides."""
    rng = keyed_rng(0, "cutting", key, number)
    with Image.open(io.BytesIO(data)) as picture:
        whole = ImageOps.pad(picture.convert("RGB"), (max(picture.size),) * 2, color="white")
    side = whole.width * rng.uniform(0.65, 1)
    left, top = rng.uniform(0, whole.width - side, 2)
    cut = whole.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if rng.random() < 0.5 and not re.search("left|right", caption.lower()):
        cut = ImageOps.mirror(cut)
    out = io.BytesIO()
    cut.save(out, "JPEG", quality=90)
    return out.getvalue()


def raw_data() -> dict[str, Any]:
    def of(split: Split) -> list[dict[str, Any]]:
        return [
            {"kind": "captions", "name": "pictures", "path": str(DATA / f"pictures-{split}.tar"), "text_first": 0.5},
            {"kind": "text", "name": "text", "path": str(DATA / f"text-{split}.jsonl.gz")},
        ]

    return {"sources": of("train"), "validation": of("validation"), "test": of("test"), "too_long": "split"}


def vq_config() -> Config:
    """Of the VQ model, on the pictures alone."""
    of = {
        split: [{"kind": "captions", "name": "pictures", "path": str(DATA / f"pictures-{split}.tar"), "caption": ""}]
        for split in SPLITS
    }
    return {
        "data": {"sources": of["train"], "test": of["test"], "context_length": 1024, "workers": 0},
        "model": VQ,
        "train": {
            "max_steps": VQ_STEPS,
            "batch_tokens": 1024,  # 16 pictures
            "optimizer": {"kind": "adamw", "lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup": 0.05},
            "log_every": 10,
            "save_every": 200,
            "device": "cpu",
        },
        "evaluation": {"candidates": 0, "samples": 0},
    }


def shares() -> dict[str, float]:
    """Weights of the sources with which half of all tokens are of pictures, begin and end among them."""
    counts = json.loads((DATA / "packed/train/dataset.json").read_text())["ledger"]["pictures"]
    of_pictures = (counts["image_tokens"] + 2 * counts["image"]) / counts["segment_tokens"]
    share = round(0.5 / of_pictures, 4)
    return {"pictures": share, "text": 1 - share}


def config(arm: str, rows: Sequence[Row] = (), data: dict[str, Any] | None = None) -> Config:
    """A run of an arm, "upcycled" among them. `data`: in place of what is packed and encoded."""
    if data is None:
        weights = shares()
        mixture = {"weights": weights, "max_epochs": dict.fromkeys(weights, 1), "stop": "first"}
        data = {"packed": str(DATA / "packed"), "codes": True, "mixture": mixture}
    run: Config = {
        "data": {**data, "context_length": CONTEXT, "workers": 0},
        "model": {
            "kind": "moma",
            "teacher": {"kind": "vq", "path": str(DATA / "vq")},
            "language": {"tokenizer": str(DATA / "tokenizer"), "config": LANGUAGE},
            **({"experts": {**ARMS[arm], "auxiliary": "along"}} if ARMS.get(arm) else {}),
        },
        "train": {
            "max_steps": STEPS * (LONGER if arm == "dense" else 1),
            "batch_tokens": ROWS * CONTEXT,
            "micro_batch": ROWS,
            "optimizer": {"kind": "adamw", "lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"kind": "constant", "warmup": WARMUP},
            "log_every": 10,
            "save_every": EVERY,
            "keep_every": EVERY,
            "device": "cpu",
        },
        "evaluation": {"candidates": 0, "samples": 0},
    }
    if arm != "upcycled":
        return run
    later = STEPS - SEED_STEPS
    noise = {"steps": later // 2, "decay": True}
    return {
        **run,
        "stages": [
            {"name": "1t1i", "model": {"experts": ARMS["1t1i"]}, "train": {"max_steps": SEED_STEPS}},
            {
                "name": "4t4i",
                "carry_on": True,
                "model": {"experts": {**ARMS["4t4i"], "noise": noise, "auxiliary": "along"}},
                "train": {"max_steps": later},
            },
        ],
    }


@cache
def flops(arm: str, auxiliary: bool = False) -> float:
    """Of a step, forward and backward, by the counter; with auxiliary routers or without."""
    run = config(arm)
    if not auxiliary and "experts" in run["model"]:
        run["model"]["experts"] = ARMS[arm]
    return float(estimate(RunConfig.model_validate({**run, "out": "unused"}))["flops_per_step"]["total"])


def flops_until(arm: str, step: int, auxiliary: bool = False) -> float:
    if arm != "upcycled":
        return step * flops(arm, auxiliary)
    seed = min(step, SEED_STEPS)
    return seed * flops("1t1i", auxiliary) + (step - seed) * flops("4t4i", auxiliary)


def measured(folder: Path, arm: str) -> dict[str, Any]:
    """All checkpoints of a run on the test split. Those but the newest are removed.

    Returns:
        `tokens`: targets of each pool, by modality. `points`: of each checkpoint `step`, `flops`, `auxiliary_flops`,
        and by the way that experts are found the sums of losses of each pool, in nats, by modality.
    """
    checkpoints = sorted((folder / "run/checkpoints").glob("step-*"))
    points: list[dict[str, Any]] = []
    tokens: dict[str, list[int]] = {}
    for checkpoint in checkpoints:
        step = int(checkpoint.name.removeprefix("step-"))
        system, layout, run = load(checkpoint, "cpu")
        test = PackedDataset(DATA / "packed/test")
        attach_codes({"test": test}, layout, run)
        loader = PackedLoader(test, layout, ROWS, seed=0, mixture=MixtureConfig(weights=run.data.mixture.weights))
        spent = flops_until(arm, step)
        point: dict[str, Any] = {
            "step": step,
            "flops": spent,
            "auxiliary_flops": flops_until(arm, step, auxiliary=True) - spent,
        }
        system.begin_step(10**9, 10**9)  # no noise
        sparsity: Any = getattr(system, "sparsity", None)
        routed = sparsity is not None and any(sparsity.routed.values())
        outputs: dict[str, list[Any]] = {way: [] for way in (WAYS if routed else ["choice"])}
        with torch.no_grad():
            for (batch,) in loader.steps(POOLS):
                for way, found in outputs.items():
                    found.append(system.train(way == "choice")(batch))
        for way, found in outputs.items():
            point[way] = {kind: [round(float(one.losses[kind]), 2) for one in found] for kind in KINDS}
        tokens = {kind: [int(one.counts[kind]) for one in outputs["choice"]] for kind in KINDS}
        points.append(point)
    for checkpoint in checkpoints[:-1]:
        shutil.rmtree(checkpoint)
    return {"tokens": tokens, "points": points}


MINUTES = {"dense": 19, "1t1i": 10, "8x": 11, "4t4i": 11, "upcycled": 11}
RUNS = [
    Run(arm, seed, minutes, partial(config, arm), partial(measured, arm=arm))
    for seed in SEEDS
    for arm, minutes in MINUTES.items()
]


def spent(row: Row) -> list[float]:
    """FLOPs until each point."""
    return [point["flops"] for point in row["result"]["points"]]


def losses(row: Row, way: str, kind: str, weights: np.ndarray | None = None) -> np.ndarray:
    """[n, points] nats a token of a modality, or of all.

    weights: [n, POOLS], how often each pool counts; by default once, and n is 1.
    """
    found = row["result"]
    kinds = KINDS if kind == "all" else (kind,)
    weights = np.ones((1, POOLS)) if weights is None else weights

    def total(by_kind: dict[str, list[float]]) -> np.ndarray:
        return np.asarray(weights @ np.sum([by_kind[one] for one in kinds], axis=0))

    tokens = total(found["tokens"])
    # Before it has routers, what a run does is the same either way.
    return np.stack([total(point.get(way, point["choice"])) / tokens for point in found["points"]], axis=1)


def needed(spent: Sequence[float], losses: Sequence[float], loss: float) -> tuple[float, bool]:
    """FLOPs at which a curve, straight against their logarithm from point to point, is first down to a loss. Those at
    its end and False, where it never is."""
    if losses[0] <= loss:
        return spent[0], True
    for (before, high), (after, low) in pairwise(zip(spent, losses, strict=True)):
        if low <= loss:
            return before * (after / before) ** ((high - loss) / (high - low)), True
    return spent[-1], False


def saving(dense: Row, row: Row, way: str, kind: str, weights: np.ndarray | None = None) -> list[tuple[float, bool]]:
    """FLOPs that the dense model takes to the loss that a run ends with, over those of the run; False: more than that.
    One for each row of weights."""
    ends = losses(row, way, kind, weights)[:, -1]
    curves = losses(dense, "choice", kind, weights)
    each = [needed(spent(dense), curve, end) for curve, end in zip(curves.tolist(), ends.tolist(), strict=True)]
    return [(taken / spent(row)[-1], reached) for taken, reached in each]


def show(rows: list[Row]) -> str:
    """Losses at the end, savings, and losses along the way."""
    by = {(row["run"], row["seed"]): row for row in rows}
    arms = [arm for arm in MINUTES if any(run == arm for run, _ in by)]
    if not arms:
        return ""
    some = {arm: [by[arm, seed] for seed in SEEDS if (arm, seed) in by] for arm in arms}
    return "\n".join([*ends(some), "", *savings(some), *(line for kind in KINDS for line in ("", *along(some, kind)))])


def ends(some: dict[str, list[Row]]) -> list[str]:
    """Means of the seeds, (lowest to highest)."""
    columns = [f"{kind}, {words}" for words in WAYS.values() for kind in KINDS]
    titles = ["arm", "seeds", "steps", "training, s", "TFLOPs", "of auxiliary routers", *columns]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, found in some.items():
        last = found[0]["result"]["points"][-1]
        cells = [arm, str(len(found)), str(last["step"])]
        cells.append(spread([one["seconds"] for one in found if one["seconds"] is not None], ".0f"))
        cells += [f"{last['flops'] / 1e12:.2f}", f"{last['auxiliary_flops'] / 1e12:.2f}"]
        for way in WAYS:
            for kind in KINDS:
                values = [float(losses(one, way, kind)[0, -1]) for one in found]
                cells.append(spread(values, ".3f") if way in last else "the same")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def savings(some: dict[str, list[Row]]) -> list[str]:
    """Geometric means of the seeds, (lowest to highest; 95 % of the means of `DRAWS` draws of the pools)."""
    kinds = ("all", *KINDS)
    lines = [f"| FLOPs of the dense model over the arm's | {' | '.join(kinds)} |", "|---|---|---|---|"]
    dense = {row["seed"]: row for row in some.get("dense", [])}
    weights = np.random.default_rng(0).multinomial(POOLS, [1 / POOLS] * POOLS, DRAWS).astype(float)
    for arm, found in some.items():
        pairs = [(dense[row["seed"]], row) for row in found if row["seed"] in dense]
        if arm == "dense" or not pairs:
            continue
        for way, words in WAYS.items():
            if way not in found[0]["result"]["points"][-1]:
                continue
            cells = [arm if way == "choice" else f"{arm}, {words}"]
            for kind in kinds:
                each = [saving(*pair, way, kind)[0] for pair in pairs]
                drawn = [[value for value, _ in saving(*pair, way, kind, weights)] for pair in pairs]
                low, high = np.quantile(np.exp(np.log(drawn).mean(0)), (0.025, 0.975))
                values = [value for value, _ in each]
                more = "" if all(reached for _, reached in each) else "more than "
                between = f"{min(values):.2f} to {max(values):.2f}; {low:.2f} to {high:.2f}"
                cells.append(f"{more}{statistics.geometric_mean(values):.2f} ({between})")
            lines.append(f"| {' | '.join(cells)} |")
    for arm, published in PUBLISHED.items():
        lines.append(f"| *{arm} in the paper: 1.4B, 1T tokens* | {' | '.join(f'*{value}*' for value in published)} |")
    return lines


def along(some: dict[str, list[Row]], kind: str) -> list[str]:
    """Means of the seeds, while experts choose; all arms have points at the same steps."""
    lines = [f"| {kind}, after TFLOPs | {' | '.join(some)} |", f"|---{'|---' * len(some)}|"]
    curves = {arm: [losses(row, "choice", kind)[0] for row in found] for arm, found in some.items()}
    longest = max((found[0] for found in some.values()), key=lambda row: len(spent(row)))
    for number, flops in enumerate(spent(longest)):
        there = [[float(one[number]) for one in found if number < len(one)] for found in curves.values()]
        cells = [f"{statistics.mean(one):.3f}" if one else "" for one in there]
        lines.append(f"| {flops / 1e12:.2f} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """`mean (lowest to highest)`."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else ""


STUDY = Study(
    "moma", "dense, 1t1i, 8 shared experts, 4t4i, upcycled: loss by modality against FLOPs", prepare, RUNS, show
)
