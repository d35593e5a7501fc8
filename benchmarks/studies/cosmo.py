"""Writing captions, telling pairs apart, both, and a manual beside them: caption loss and retrieval.

COSMO's question (arXiv 2401.00849) at a few million trained parameters: what do the generative and the contrastive
objective give alone and together, and what do interleaved documents add. As there, the vision tower and the language
model are frozen. No published ones are at hand, so both are small and trained first: a CLIP on the same training pairs,
whose tower is kept, and a language model on their captions, the GIMP manual and WordNet. Pairs are the shipped emoji,
the Tux Paint stamps and openclipart's drawings with their English captions; documents are pages of the GIMP manual,
whole where they fit a row.

    for name in stamps clipart gimp-help debian-text; do mm data build $name --out corpora/$name; done

All arms take equally many steps of about as many pairs. With the manual a step has half as many rows again, of
documents, and takes longer. The generative model of "contrastive" is the language model without pictures, for its gates
stay shut: what it loses is what pictures may save. "tower" is the CLIP whose tower all arms have.

Every held-out pair gives its caption's loss and the places of its caption among all captions and of its picture among
all pictures, where others with the same caption do not count. Intervals are 95 %, of the mean over seeds, by a
bootstrap over pairs, and arms are compared on the same pairs. Seeds are the outer loop.
"""

import contextlib
import json
import shutil
import statistics
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from benchmarks.studies import open_qwen2vl
from benchmarks.studies.mert import add
from benchmarks.studies.moma import caption_of, groups, place_of, shards, split_of, spread
from benchmarks.study import Config, Row, Run, Study, train
from benchmarks.training import CACHE
from mm.config import RunConfig
from mm.data.batch import MODALITIES, PackedBatch
from mm.data.config import Split
from mm.data.loader import one_pass
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers, cores, open_splits, pack_split
from mm.data.shards import expand
from mm.data.train_tokenizer import train as train_tokenizer
from mm.hub import load
from mm.models.system import GenerativeSystem, PooledSystem
from mm.train import checkpoint
from mm.train.features import encode
from mm.train.stages import model_tensors_of
from mm.train.trainer import Unwatched

DATA = CACHE / "study-cosmo"
PICTURES = {"stamps": "stamps/images-*.tar", "clipart": "clipart/clipart-*.tar"}
MANUAL = "gimp-help/en-*.tar"
DICTIONARY = "debian-text/dictionary-*.jsonl.gz"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SEEDS = (0, 1)
VOCABULARY = 2048
CONTEXT = 512
ROWS = 4  # of pairs in a step, some 150 of them
STEPS = 360
LR = 1e-3  # not tuned
TOWER_STEPS, LM_STEPS = 450, 400
CANDIDATES = 16
KS = (1, 5, 10)
DRAWS = 1000

SIZE, PATCH = 96, 12
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
TOWER = {
    "name": "timm/vit_base_patch32_clip_224",
    "pretrained": False,
    "image_size": SIZE,
    "block": -1,
    "norm": True,
    **PIXELS,
    "options": {"patch_size": PATCH, "embed_dim": 192, "depth": 4, "num_heads": 6},
}
LANGUAGE = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, "initializer_range": 0.05,
}  # fmt: skip
TEMPLATE = {"bos": "<s>", "eos": "<|endofchunk|>", "pad": "<|endoftext|>", "after_media": ""}

ARMS: dict[str, dict[str, Any]] = {
    "generative": {"contrastive": 0},
    "contrastive": {"generative": 0},
    "both": {},
    "generative, manual": {"contrastive": 0, "manual": True},
    "both, manual": {"manual": True},
}
COMPARED = (
    ("both", "generative"), ("both", "contrastive"), ("generative, manual", "generative"), ("both, manual", "both")
)  # fmt: skip


def prepare() -> None:
    """What `parts` makes, and what is packed for the arms with the tower's features; what is there is left alone."""
    parts()
    raw = RunConfig.model_validate({**config("both"), "data": raw_data(), "out": "unused"})
    for split in SPLITS:
        pack_split(raw.data, split, raw.model.layout(), 0, DATA / "packed" / split, workers=Workers(cores()))
    held_out = RunConfig.model_validate({**config("both"), "data": raw_data(test="manual-test"), "out": "unused"})
    pack_split(held_out.data, "test", held_out.model.layout(), 0, DATA / "packed-manual")
    encode(RunConfig.model_validate({**config("both"), "out": "unused"}), [], "cpu", (0, 1), Unwatched())


def parts() -> None:
    """Splits, the tokenizer, the CLIP and the language model."""
    if not DATA.exists():
        write_splits()
    for name, made in (("tower", tower_config()), ("lm", lm_config())):
        if not (DATA / name / "run/eval.json").exists():
            (DATA / name).mkdir(exist_ok=True)
            train(Run(name, 0, MINUTES[name], None), made, DATA / name)


def write_splits() -> None:
    """Pairs and documents by split, texts, and a tokenizer of those to train on; the folder appears when all is
    there."""
    unfinished = DATA.with_name(f".{DATA.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    texts: dict[str, list[str]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        tars = {
            name: stack.enter_context(tarfile.open(unfinished / f"{name}.tar", "w"))
            for name in (f"{kind}-{split}" for kind in ("pairs", "manual") for split in SPLITS)
        }
        # In an order that has nothing to do with where pictures come from, so that rows are of all kinds.
        for split, key, members, caption in sorted(pairs(), key=lambda one: place_of(one[1])):
            ((ext, data),) = members.items()
            add(tars[f"pairs-{split}"], f"{key}.{ext}", data)
            add(tars[f"pairs-{split}"], f"{key}.json", json.dumps({"caption": caption}).encode())
            texts[f"captions-{split}"].append(caption)
        for shard in shards(MANUAL, "gimp-help"):
            for key, members in sorted(groups(shard).items()):
                split = split_of(key)
                for ext, data in members.items():
                    add(tars[f"manual-{split}"], f"{key}.{ext}", data)
                said = [part["text"] for part in json.loads(members["json"])["parts"] if "text" in part]
                texts[f"manual-{split}"].append("\n".join(said))
    for name, some in texts.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
        (unfinished / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (unfinished / "tokenizer").mkdir()
    tokenizer = train_tokenizer(iter([*texts["captions-train"], *texts["manual-train"]]), VOCABULARY)
    tokenizer.add_special_tokens(["<visual>"])
    tokenizer.save(str(unfinished / "tokenizer/tokenizer.json"))
    unfinished.rename(DATA)


def pairs() -> Iterator[tuple[Split, str, dict[str, bytes], str]]:
    """(split, key, the picture by its extension, English caption)."""
    for split in SPLITS:  # as they are shipped
        for shard in expand(f"builtin:emoji/{split}-*.tar.gz"):
            for key, members in groups(shard).items():
                about = json.loads(members.pop("json"))
                yield split, f"emoji-{key}", members, caption_of(about)
    for name, pattern in PICTURES.items():
        for shard in shards(pattern, name):
            for key, members in groups(shard).items():
                about = json.loads(members.pop("json"))
                place: Any = open_qwen2vl.split_of(key)
                yield place, f"{name}-{key}", members, caption_of(about)


def raw_data(test: str = "pairs-test") -> dict[str, Any]:
    """`test`: which of the tars is held out."""

    def of(name: str) -> dict[str, Any]:
        path = str(DATA / f"{name}.tar")
        if name.startswith("pairs"):
            return {"kind": "captions", "name": "pairs", "path": path}
        return {
            "kind": "interleaved",
            "name": "manual",
            "path": path,
            "end_of_chunk": "<|endofchunk|>",
            "learn": "after_media",
        }

    return {
        "sources": [of("pairs-train"), of("manual-train")],
        "validation": [of("pairs-validation")],
        "test": [of(test)],
        "context_length": CONTEXT,
        "too_long": "split",
    }


def tower_config() -> Config:
    """The CLIP whose tower is kept."""
    return {
        "data": {**raw_data(), "sources": raw_data()["sources"][:1], "workers": 0},
        "model": {
            "kind": "clip",
            "embed_dim": 256,
            "vision": {"image_size": SIZE, "patch_size": PATCH, "width": 192, "layers": 4, "head_width": 32},
            "text": {"context_length": 40, "width": 192, "heads": 6, "layers": 3},
            **PIXELS,
            "resize": "squash",
            "crop": 0.5,
            "flip": True,
        },
        "train": training(TOWER_STEPS, ROWS, lr=1e-3, decay=0.2),
        "evaluation": {"every": 75, "candidates": 0, "samples": 0},
    }


def lm_config() -> Config:
    """The language model, on text alone."""

    def of(name: str) -> dict[str, Any]:
        return {"kind": "text", "name": name.split("-")[0], "path": str(DATA / f"{name}.jsonl")}

    dictionary = {"kind": "text", "name": "dictionary", "path": str(shards(DICTIONARY, "debian-text")[0])}
    return {
        "data": {
            "sources": [of("captions-train"), of("manual-train"), dictionary],
            "validation": [of("captions-validation")],
            "test": [of("captions-test")],
            "mixture": {"weights": {"captions": 0.3, "manual": 0.35, "dictionary": 0.35}},
            "context_length": CONTEXT,
            "too_long": "split",
            "workers": 0,
        },
        "model": {
            "kind": "text_lm",
            "language": {"tokenizer": str(DATA / "tokenizer"), "config": LANGUAGE},
            "template": TEMPLATE,
        },
        "train": training(LM_STEPS, 8, lr=2e-3, decay=0.1),
        "evaluation": {"every": 100, "candidates": 0, "samples": 0},
    }


def training(steps: int, rows: int, lr: float, decay: float) -> dict[str, Any]:
    """All rows of a step are one micro-batch: then nothing has to be computed twice for the contrastive objective."""
    return {
        "max_steps": steps,
        "batch_tokens": rows * CONTEXT,
        "micro_batch": rows,
        "optimizer": {"kind": "adamw", "lr": lr, "betas": [0.9, 0.95], "weight_decay": decay},
        "schedule": {"kind": "cosine", "warmup": 0.05},
        "log_every": 10,
        "save_every": 100,
        "device": "cpu",
    }


def assembled(tensors: dict[str, Tensor], system: Any) -> dict[str, Tensor]:
    """The CLIP's tower and the language model, by the names of a system of both (`stages.convert`)."""
    return {**tower_of(tensors, system.vision.featurizer), **model_tensors_of(checkpoint.find(DATA / "lm/run"))}


def tower_of(clip: dict[str, Tensor], featurizer: Any) -> dict[str, Tensor]:
    """The tower of a `clip` system's tensors, as timm's vision transformer has it."""
    found = checkpoint_filter_fn({name.removeprefix("clip."): tensor for name, tensor in clip.items()}, featurizer)
    return {f"vision.featurizer.{name}": tensor for name, tensor in found.items()}


def assemble() -> dict[str, Any]:
    """The settings for a run to begin with the trained parts."""
    return {"stages": [{"name": "all", "convert": "benchmarks.studies.cosmo:assembled"}]}


def config(arm: str, rows: Sequence[Row] = ()) -> Config:
    about = ARMS[arm]
    manual = about.get("manual", False)
    return {
        "data": {
            "packed": str(DATA / "packed"),
            "features": True,
            "mixture": {"weights": {"pairs": 2, "manual": 1 if manual else 0}},
            "context_length": CONTEXT,
            "workers": 0,
        },
        "model": {
            "kind": "cosmo",
            "vision": TOWER,
            "language": {"tokenizer": str(DATA / "tokenizer"), "config": LANGUAGE},
            "template": TEMPLATE,
            "resampler": {"latents": 16, "depth": 2, "heads": 4},
            "unimodal": 2,
            "contrastive": {"width": 256, "weight": about.get("contrastive", 1), "sources": ["pairs"]},
            "generative": about.get("generative", 1),
        },
        "train": {
            **training(STEPS, ROWS * 3 // 2 if manual else ROWS, LR, decay=0.1),
            "init_from": str(DATA / "tower/run"),
            "params": [
                {"match": r"(vision|language)\..*", "freeze": True},
                {"match": r".*\.gated\..*", "freeze": False},
            ],
        },
        # What a language model says without pictures matches none.
        "evaluation": {"candidates": CANDIDATES if about.get("generative", 1) else 0, "samples": 0},
        **assemble(),
    }


def measured(folder: Path) -> dict[str, Any]:
    """`measured_pairs` of an arm, and `manual_losses` and `manual_tokens` by held-out document."""
    system, layout, _ = load(folder / "run", "cpu")
    return {**measured_pairs(folder), **measured_documents(system, PackedDataset(DATA / "packed-manual"), layout)}


@torch.no_grad()
def measured_pairs(folder: Path) -> dict[str, Any]:
    """A run on its test pairs, one by one, in the order of their ids.

    Returns:
        Of a system that writes, `losses` (in nats) and `tokens` of the captions. Of one that compares, `image_to_text`,
        how many other captions are as much like the picture as its own, and `text_to_image`, the other way around.
    """
    system, layout, run = load(folder / "run", "cpu")
    test = open_splits(run.data, layout, run.seed)["test"]
    losses: dict[str, tuple[float, int]] = {}
    captions: dict[str, tuple[int, ...]] = {}
    features: dict[str, list[Tensor]] = defaultdict(list)
    for batch in one_pass(test, layout, 2 * ROWS):
        captions |= captions_of(batch)
        if isinstance(system, GenerativeSystem):
            losses |= losses_of(system, batch)
        if isinstance(system, PooledSystem):
            for name, values in system(batch).features.items():
                features[name].append(values)
    order = sorted(range(len(captions)), key=[*captions].__getitem__)
    ids = sorted(captions)
    found: dict[str, Any] = {}
    if losses:
        found = {"losses": [round(losses[id][0], 2) for id in ids], "tokens": [losses[id][1] for id in ids]}
    if features:
        image, text = (torch.cat(features[name])[order] for name in ("image", "text"))
        alike = torch.tensor([[captions[one] == captions[other] for other in ids] for one in ids])
        found |= {"image_to_text": ranks(image, text, alike), "text_to_image": ranks(text, image, alike)}
    return found


@torch.no_grad()
def measured_documents(system: Any, documents: PackedDataset, layout: Any) -> dict[str, Any]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for batch in one_pass(documents, layout, 2 * ROWS):
        for id, (loss, tokens) in losses_of(system, batch).items():
            of_document = sums[id.split("#")[0]]
            of_document[0] += loss
            of_document[1] += tokens
    return {
        "manual_losses": [round(sums[id][0], 1) for id in sorted(sums)],
        "manual_tokens": [sums[id][1] for id in sorted(sums)],
    }


def segments(batch: PackedBatch) -> tuple[list[str], Tensor]:
    """The ids of all segments, row by row, and int64 [B * L]: the segment of each position among them, -1 for
    padding."""
    before = np.cumsum([0, *map(len, batch.ids)])[:-1]
    number = batch.segment_ids.long() - 1 + torch.from_numpy(before)[:, None]
    return [id for row in batch.ids for id in row], number.where(batch.segment_ids > 0, -1).flatten()


def losses_of(system: GenerativeSystem, batch: PackedBatch) -> dict[str, tuple[float, int]]:
    """By segment: the sum of its losses in nats, and how many there are."""
    ids, number = segments(batch)
    number = number[batch.learned()]
    sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, number, system.token_losses(batch).double())
    return dict(zip(ids, zip(sums.tolist(), number.bincount(minlength=len(ids)).tolist(), strict=True), strict=True))


def captions_of(batch: PackedBatch) -> dict[str, tuple[int, ...]]:
    """By segment, the ids of its text."""
    ids, number = segments(batch)
    number = number.where(batch.modality.flatten() == MODALITIES["text"], -1)
    tokens = batch.input_ids.flatten()
    return {id: tuple(tokens[number == n].tolist()) for n, id in enumerate(ids)}


def ranks(queries: Tensor, candidates: Tensor, alike: Tensor) -> list[int]:
    """How many candidates [N, D] are as much like each query [N, D] as the best of its own, which are `alike`, bool
    [N, N]."""
    similar = queries @ candidates.T
    best = similar.masked_fill(~alike, -torch.inf).amax(1, keepdim=True)
    return (similar.masked_fill(alike, -torch.inf) >= best).sum(1).tolist()


MINUTES = {
    "tower": 12, "lm": 5.5,
    "generative": 4.5, "contrastive": 4, "both": 5, "generative, manual": 6, "both, manual": 6,
}  # fmt: skip
"""By seconds of one processor a step (2.8, 1.4, then 1.1 to 1.2, and 1.5 with the manual) over 1.75 for two."""
RUNS = [
    Run("tower", 0, 0.5, None, lambda folder: measured_pairs(DATA / "tower")),
    *(Run(arm, seed, MINUTES[arm], partial(config, arm), measured) for seed in SEEDS for arm in ARMS),
]


def values(row: Row, what: str, weights: np.ndarray | None = None) -> np.ndarray:
    """[n] `losses` or `manual_losses` in nats a token, or a recall in per cent (`image_to_text@5`).

    weights: [n, items], how often each pair or document counts; by default once, and n is 1.
    """
    found, (name, _, k) = row["result"], what.partition("@")
    amounts = np.array(found[name], dtype=float)
    weights = np.ones((1, len(amounts))) if weights is None else weights
    if k:
        return 100 * (weights @ (amounts < int(k))) / weights.sum(1)
    return np.asarray((weights @ amounts) / (weights @ np.array(found[name.replace("losses", "tokens")], dtype=float)))


def cell(rows: list[Row], what: str, form: str, less: list[Row] | None = None) -> str:
    """The mean of runs (95 % of the means of `DRAWS` draws of the items), or of the differences from others, run by
    run; then also that of each seed."""
    if not rows or what.partition("@")[0] not in rows[0]["result"]:
        return ""
    items = len(rows[0]["result"][what.partition("@")[0]])
    drawn = np.random.default_rng(0).multinomial(items, [1 / items] * items, DRAWS).astype(float)

    def each(weights: np.ndarray | None) -> np.ndarray:
        found = [values(row, what, weights) for row in rows]
        return np.array(found) - (np.array([values(row, what, weights) for row in less]) if less else 0)

    single = each(None)[:, 0]
    low, high = np.quantile(each(drawn).mean(0), (0.025, 0.975))
    seeds = f"; {', '.join(f'{one:{form}}' for one in single)}" if less else ""
    return f"{statistics.mean(single):{form}} ({low:{form}} to {high:{form}}{seeds})"


RECALLS = [f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in KS]


def show(rows: list[Row]) -> str:
    """Losses, recalls, and differences on the same pairs."""
    some = {name: [row for row in rows if row["run"] == name] for name in ("tower", *ARMS)}
    lines = ["| arm | seeds | training, s | caption loss | with other pictures | matching | manual |", "|---" * 7 + "|"]
    for arm in ARMS:
        if found := some[arm]:
            results = [row["result"] for row in found]
            matching = [100 * one["match_accuracy"] for one in results if "match_accuracy" in one]
            cells = [
                arm,
                str(len(found)),
                spread([row["seconds"] for row in found if row["seconds"] is not None], ".0f"),
                cell(found, "losses", ".3f"),
                f"{statistics.mean(one['shuffled_loss'] - one['caption_loss'] for one in results):+.3f}",
                f"{statistics.mean(matching):.1f} %" if matching else "",
                cell(found, "manual_losses", ".3f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| recall, % | {' | '.join(one.replace('_', ' ') for one in RECALLS)} |", "|---" * 7 + "|"]
    for arm, found in some.items():
        if found:
            lines.append(f"| {arm} | {' | '.join(cell(found, one, '.1f') for one in RECALLS)} |")
    lines += ["", "| difference | caption loss | image to text@5 | text to image@5 |", "|---" * 4 + "|"]
    for arm, other in COMPARED:
        by_seed = {row["seed"]: row for row in some[other]}
        if found := [row for row in some[arm] if row["seed"] in by_seed]:
            less = [by_seed[row["seed"]] for row in found]
            cells = [cell(found, "losses", "+.3f", less)]
            cells += [cell(found, f"{way}@5", "+.1f", less) for way in ("image_to_text", "text_to_image")]
            lines.append(f"| {arm}, less {other} | {' | '.join(cells)} |")
    if items := len(next((row["result"]["image_to_text"] for row in rows), ())):
        lines += ["", f"{items} test pairs; by chance {', '.join(f'{100 * k / items:.1f} %' for k in KS)}."]
    return "\n".join(lines)


STUDY = Study(
    "cosmo",
    "the generative and the contrastive objective alone and together, with and without documents",
    prepare,
    RUNS,
    show,
)
