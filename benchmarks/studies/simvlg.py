"""Merging tokens against time and loss: in the connector, in the tower, and across the frames of clips.

SimVLG's connector (arXiv 2310.03291) merges r features in each of its layers, and ToMe (2210.09461) tokens in each
block of a tower; both promise time for little loss. Pairs, the frozen language model and the CLIP tower are those of
the study `cosmo`; what is trained is the connector of 2 million parameters, and in the second group the tower.

- "TomeFormer": its r, behind a frozen tower whose 65 features (8 x 8 patches and the class token) are computed once, as
  published. The language model reads what is left. "weighted" is the mean by how many features each was made from,
  with proportional attention, where SimVLG has the plain mean.
- "tower": ToMe's r in a tower that is trained with everything behind it, an MLP for each feature that is left.

    for name in stamps clipart gimp-help debian-text; do mm data build $name --out corpora/$name; done
    mm data build clips --out corpora/clips

Learning rates are constant after a warmup, so that the points of a curve can be held against each other, and an arm has
as many steps as fill about the same time: what it has after the fewest steps, and after the least time that any arm of
its group took, is read off its validation curve. Steps have about as many pairs in all arms. Seeds are the outer loop.

The clips are nine files, each in four parts that say their number, and are learned by heart behind the same frozen
tower: this shows that the mean over frames and merging across them run, and that one of them sees which way time goes.
Nine files prove nothing else.
"""

import json
import statistics
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.studies import cosmo
from benchmarks.studies.cosmo import LANGUAGE, SPLITS, TEMPLATE, TOWER, assemble, cell, measured_pairs
from benchmarks.studies.mert import add
from benchmarks.studies.moma import groups, shards, spread
from benchmarks.study import Config, Row, Run, Study
from benchmarks.training import CACHE
from mm.config import RunConfig
from mm.data.loader import one_pass
from mm.data.prepare import Workers, cores, open_splits, pack_split
from mm.data.video import probe_video
from mm.hub import load
from mm.models.config import SYSTEMS
from mm.train.features import encode
from mm.train.trainer import Unwatched

DATA = CACHE / "study-simvlg"
CLIPS = "clips/clips-*.tar"
SEEDS = (0, 1)
PAIRS = 64  # of a step, about
TEXT = 14  # positions of a pair beside its picture's, in the mean
ROWS = 4
EVERY = 20
LR = 1e-3  # not tuned
PARTS, FRAMES, CLIP_STEPS = 4, 4, 150

BERT = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768,
    "max_position_embeddings": 80, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CONNECTORS: dict[str, dict[str, Any]] = {
    "TomeFormer, r 0": {"r": 0},
    "TomeFormer, r 5": {"r": 5},
    "TomeFormer, r 10": {"r": 10},
    "TomeFormer, r 15": {"r": 15},
    "TomeFormer, r 10, weighted": {"r": 10, "weighted": True, "proportional": True},
}
TOWERS = {"tower, r 0": 0, "tower, r 4": 4, "tower, r 8": 8, "tower, r 16": 16}
STEPS = {
    "TomeFormer, r 0": 180, "TomeFormer, r 5": 220, "TomeFormer, r 10": 320, "TomeFormer, r 15": 400,
    "TomeFormer, r 10, weighted": 300,
    "tower, r 0": 160, "tower, r 4": 220, "tower, r 8": 260, "tower, r 16": 400,
}  # fmt: skip
"""280 seconds of one processor each, by 1.60, 1.23, 0.89, 0.68, 0.95 and 1.67, 1.30, 1.05, 0.70 a step."""
JOINED = {"clips, mean": "mean", "clips, merge": "merge"}


def prepare() -> None:
    """The parts of the study `cosmo`, what is packed for each number of positions, and features of the frozen tower."""
    cosmo.parts()
    write_clips()
    for arm in (*CONNECTORS, *TOWERS, *JOINED):
        run = RunConfig.model_validate({**config(arm), "out": "unused"})
        raw = RunConfig.model_validate({**config(arm), "data": raw_data(arm), "out": "unused"})
        for split in SPLITS:
            pack_split(raw.data, split, raw.model.layout(), 0, packed(arm) / split, workers=Workers(cores()))
        if run.data.features:
            encode(run, [], "cpu", (0, 1), Unwatched())


def write_clips() -> None:
    """Every clip with its parts, of equal length, and what is said of each."""
    out = DATA / "clips.tar"
    if out.exists():
        return
    DATA.mkdir(parents=True, exist_ok=True)
    with tarfile.open(DATA / ".clips.partial", "w") as tar:
        for shard in shards(CLIPS, "clips"):
            for key, members in sorted(groups(shard).items()):
                about = json.loads(members.pop("json"))
                ((ext, data),) = members.items()
                length = probe_video(data, key, 10**9, 10**9).seconds / PARTS
                timed = [
                    {"start": n * length, "end": (n + 1) * length, "text": f"{n + 1} of {PARTS}: {about['caption']}"}
                    for n in range(PARTS)
                ]
                add(tar, f"{key}.{ext}", data)
                add(tar, f"{key}.json", json.dumps({"timed": timed}).encode())
    (DATA / ".clips.partial").rename(out)


def model(arm: str) -> dict[str, Any]:
    section = {
        "kind": "open_qwen2vl" if arm in TOWERS else "simvlg",
        "vision": TOWER,
        "language": {"tokenizer": str(cosmo.DATA / "tokenizer"), "config": LANGUAGE},
        "template": {**TEMPLATE, "bos_behind_media": True},
    }
    if arm in TOWERS:
        merge = {"merge": {"r": TOWERS[arm]}} if TOWERS[arm] else {}
        return {**section, "vision": {**TOWER, **merge}, "connector": {"kind": "mlp"}}
    connector = CONNECTORS.get(arm, {"r": 10})
    section |= {
        "vision": {**TOWER, "class_token": True},
        "connector": {"kind": "tomeformer", "config": BERT, **connector},
    }
    if arm in JOINED:
        section |= {"image": False, "video": {"frames": FRAMES, "temporal": JOINED[arm]}}
    return section


def positions(arm: str) -> int:
    """Of a picture, or a clip, in the row."""
    section: Any = SYSTEMS.resolve(model(arm)["kind"]).model_validate(model(arm))
    return int(section.connector.positions(section.vision))


def context(arm: str) -> int:
    """Of rows, with a fourth of a step's pairs in each."""
    return PAIRS // ROWS * (positions(arm) + TEXT)


def packed(arm: str) -> Path:
    return DATA / ("packed-clips" if arm in JOINED else f"packed-{model(arm)['kind']}-{positions(arm)}")


def raw_data(arm: str) -> dict[str, Any]:
    if arm in JOINED:
        clips = [{"kind": "video", "name": "clips", "path": str(DATA / "clips.tar"), "timed": True}]
        return {"sources": clips, "validation": clips, "test": clips, "context_length": context(arm)}
    pairs = cosmo.raw_data()
    return {**pairs, "sources": pairs["sources"][:1], "context_length": context(arm)}


def config(arm: str, rows: Sequence[Row] = ()) -> Config:
    params = [{"match": r"language\..*", "freeze": True}]
    params += [{"match": r"vision\..*", **({"lr_scale": 0.1} if arm in TOWERS else {"freeze": True})}]
    return {
        "data": {
            "packed": str(packed(arm)),
            "features": arm not in TOWERS,
            "context_length": context(arm),
            "workers": 0,
        },
        "model": model(arm),
        "train": {
            "max_steps": STEPS.get(arm, CLIP_STEPS),
            "batch_tokens": ROWS * context(arm),
            "micro_batch": ROWS,
            "init_from": str(cosmo.DATA / "tower/run"),
            "params": params,
            "optimizer": {"kind": "adamw", "lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"kind": "constant", "warmup": EVERY},
            "log_every": 10,
            "save_every": 100,
            "device": "cpu",
        },
        "evaluation": {"every": EVERY, "candidates": 0, "samples": 0},
        **assemble(),
    }


@torch.no_grad()
def measured_clips(folder: Path) -> dict[str, float]:
    """Nats a token of all clips as they are, and with their frames in reverse order."""
    system: Any
    system, layout, run = load(folder / "run", "cpu")
    losses, tokens = {"forwards": 0.0, "backwards": 0.0}, 0
    for batch in one_pass(open_splits(run.data, layout, run.seed)["test"], layout, ROWS):
        clips = batch.media["video"]
        turned = replace(clips, values=clips.stacked().flip(1).flatten())
        losses["forwards"] += float(system.token_losses(batch).sum())
        losses["backwards"] += float(system.token_losses(replace(batch, media={"video": turned})).sum())
        tokens += batch.targets
    return {name: loss / tokens for name, loss in losses.items()}


RUNS = [
    *(Run(arm, seed, 3.6, partial(config, arm), measured_pairs) for seed in SEEDS for arm in (*CONNECTORS, *TOWERS)),
    *(Run(arm, 0, 2, partial(config, arm), measured_clips) for arm in JOINED),
]


def show(rows: list[Row]) -> str:
    """Both groups, and the clips."""
    lines: list[str] = []
    for group in (CONNECTORS, TOWERS):
        some = {arm: found for arm in group if (found := [row for row in rows if row["run"] == arm])}
        if some:
            lines += [*curves(some), "", *differences(some), ""]
    clips = [row for row in rows if row["run"] in JOINED]
    if clips:
        lines += ["| nine clips, learned by heart | loss | of other clips | frames in reverse |", "|---" * 4 + "|"]
    for row in clips:
        found = row["result"]
        losses = (found["forwards"], found["shuffled_loss"], found["backwards"])
        lines.append(f"| {row['run']} | {' | '.join(f'{loss:.4f}' for loss in losses)} |")
    return "\n".join(lines)


def curves(some: dict[str, list[Row]]) -> list[str]:
    """Means of the seeds, (lowest to highest)."""
    ends = [row["curve"][-1] for found in some.values() for row in found]
    steps, seconds = min(end[0] for end in ends), min(end[1] for end in ends)
    titles = [
        "arm", "positions", "seeds", "s a step", f"validation loss after {steps} steps", f"after {seconds:.0f} s",
        "steps in all", "training, s", "test loss", "with other pictures",
    ]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, found in some.items():
        results = [row["result"] for row in found]
        cells = [
            arm,
            str(positions(arm)),
            str(len(found)),
            f"{statistics.mean(row['seconds'] / row['steps'] for row in found):.2f}",
            spread([read(row, 0, steps) for row in found], ".3f"),
            spread([read(row, 1, seconds) for row in found], ".3f"),
            str(found[0]["steps"]),
            spread([row["seconds"] for row in found], ".0f"),
            spread([one["caption_loss"] for one in results], ".3f"),
            spread([one["shuffled_loss"] - one["caption_loss"] for one in results], "+.3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def read(row: Row, column: int, value: float) -> float:
    """The validation loss of a run after so many steps (column 0) or seconds (1), straight from point to point."""
    points = np.array(row["curve"])
    return float(np.interp(value, points[:, column], points[:, 2]))


def differences(some: dict[str, list[Row]]) -> list[str]:
    """Of the test losses at the end, after about the same time, from the first arm's."""
    first, *others = some
    by_seed = {row["seed"]: row for row in some[first]}
    lines = [f"| at the end, less {first} | test loss |", "|---|---|"]
    for arm in others:
        found = [row for row in some[arm] if row["seed"] in by_seed]
        lines.append(f"| {arm} | {cell(found, 'losses', '+.3f', [by_seed[row['seed']] for row in found])} |")
    return lines


STUDY = Study(
    "simvlg", "merging tokens in a connector, in a tower and across frames: time and loss", prepare, RUNS, show
)
