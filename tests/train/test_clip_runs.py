"""Contrastive training however a step is split, and real runs of CLIP beside a plain loop over open_clip's model."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from open_clip import ClipLoss
from open_clip.loss import SigLipLoss
from pairs_run import MODEL, SIGLIP, caption, png, write_pairs
from PIL import Image
from ranks import Ranks
from test_step import distance
from torch import Tensor

from mm import hub
from mm.config import RunConfig, contradictions
from mm.data.batch import PackedBatch, collate
from mm.data.limits import Limits
from mm.data.loader import EMPTY, PackedLoader
from mm.data.packed import Pack, join_segments
from mm.data.prepare import open_splits
from mm.data.sample import Media, Text
from mm.data.tokens import make_segment
from mm.models.contrastive import recalls
from mm.models.systems.clip.config import ClipConfig
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.metrics import read_metrics
from mm.train.params import parameter_groups
from mm.train.step import Stepper, count, counted
from mm.train.trainer import Trainer, Unwatched

MODELS = {"clip": ClipConfig.model_validate(MODEL), "siglip": ClipConfig.model_validate(SIGLIP)}
UNEVEN = (3, 0, 1, 2, 0, 4)
"""Pairs of each of the six rows of a step, so that ranks and micro-batches differ, and some have none."""
EVEN = (2, 2, 2, 2, 2, 2)


def rows(config: ClipConfig, sizes: tuple[int, ...]) -> list[Pack]:
    layout, packs, number = config.layout(), [], 0
    for size in sizes:
        items = []
        for _ in range(size):
            parts = (Media("image", png(number), "png"), Text(caption(number)))
            items.append((str(number), "s", make_segment(parts, layout, "test", Limits())))
            number += 1
        packs.append(join_segments(items) if items else EMPTY)
    return packs


def one_step(loss: str, sizes: tuple[int, ...], micro_batches: int) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and gradients of a step through the trainer's own, of this rank's share of the rows."""
    config, world = MODELS[loss], World.from_environment()
    engine = {"kind": "fsdp"} if world.ranks > 1 else {}
    train = TrainConfig.model_validate(
        {"device": "cpu", "engine": engine, "optimizer": {"kind": "test_step:RecorderConfig"}, "clip_norm": None}
    )
    one = train.engine.build(world, train)
    world.start(one.device, 60, one.group)
    try:
        torch.manual_seed(0)
        one.prepare(config.build(), lambda system: parameter_groups(system, [], 0.0), micro_batches)
        packs = rows(config, sizes)
        share = np.array_split(np.arange(len(packs)), world.ranks)[world.rank]
        parts = [[packs[row] for row in part] or [EMPTY] for part in np.array_split(share, micro_batches)]
        mine = [collate(part, config.layout(), 96) for part in parts]
        stepper = Stepper(one, config.layout(), Guard(train.guard), 0, None, ["s"])
        totals = counted(one.system, world.sum(count(one.system, mine, ["s"])), ["s"])
        done = stepper(mine, totals, 0, 0.1)
        return done.loss, one.optimizer.gradients  # type: ignore[attr-defined]
    finally:
        one.close()
        world.stop()


def whole_batch(loss: str, numbers: range, ranks: int = 1, rank: int = 0) -> tuple[float, dict[str, np.ndarray]]:
    """The same by open_clip alone: its tokenizer, pictures, model and loss."""
    config = MODELS[loss]
    torch.manual_seed(0)
    model = config.build().clip.train()
    transform = open_clip.image_transform(32, False, mean=config.mean, std=config.std)
    pixels = torch.stack([transform(Image.open(io.BytesIO(png(number)))) for number in numbers])
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=12)([caption(number) for number in numbers])
    options: dict[str, Any] = {"rank": rank, "world_size": ranks}
    made = ClipLoss(local_loss=True, gather_with_grad=True, **options) if loss == "clip" else SigLipLoss(**options)
    value: Tensor = made(*model(pixels, tokens))
    value.backward()
    gradients = {f"clip.{name}": parameter.grad for name, parameter in model.named_parameters()}
    if ranks > 1:  # as DistributedDataParallel averages
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= ranks
    return float(value.detach()), {name: gradient.numpy() for name, gradient in gradients.items()}


def whole_batch_of_rank(loss: str, each: int) -> tuple[float, dict[str, np.ndarray]]:
    """open_clip's own way over ranks."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return whole_batch(loss, range(rank * each, (rank + 1) * each), ranks, rank)


@pytest.mark.parametrize(("ranks_", "micro_batches"), [(1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("loss", MODELS)
def test_a_step_has_the_gradients_of_the_single_big_batch(
    loss: str, ranks_: int, micro_batches: int, ranks: Ranks
) -> None:
    value, expected = whole_batch(loss, range(sum(UNEVEN)))
    for found, gradients in ranks.run(one_step, ranks_, loss, UNEVEN, micro_batches):
        assert found == pytest.approx(value, rel=1e-6)
        assert distance(gradients, expected) < 1e-6


@pytest.mark.parametrize("loss", MODELS)
def test_open_clips_own_way_over_ranks_gives_the_same(loss: str, ranks: Ranks) -> None:
    """`local_loss` and `gather_with_grad`, the average over ranks, of equally many pairs on each."""
    expected = ranks.run(whole_batch_of_rank, 2, loss, sum(EVEN) // 2)
    found = ranks.run(one_step, 2, loss, EVEN, 1)
    assert found[0][0] == pytest.approx(sum(value for value, _ in expected) / 2, rel=1e-6)
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-6


OPTIMIZER = {"kind": "adamw", "lr": 3e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}


def run_config(folder: Path, model: dict[str, Any], **train: Any) -> RunConfig:
    """A run of steps of 2 rows, 16 pairs, over 64 pairs; evaluated on 24 others."""
    if not (folder / "train.tar").exists():
        write_pairs(folder / "train.tar", range(64))
        write_pairs(folder / "held_out.tar", range(100, 124))

    def source(split: str) -> list[dict[str, Any]]:
        return [{"kind": "captions", "path": str(folder / f"{split}.tar")}]

    settings = {
        "max_steps": 10, "batch_tokens": 512, "micro_batch": 2, "device": "cpu", "save_every": 5, "log_every": 1,
        "optimizer": OPTIMIZER, "schedule": {"kind": "constant", "warmup": 0}, "clip_norm": None, **train,
    }  # fmt: skip
    values = {
        "out": folder / "run",
        "data": {
            "sources": source("train"), "validation": source("held_out"), "test": source("held_out"),
            "context_length": 256, "budgets": {"image": 8}, "cache": folder / "cache", "workers": 0,
        },
        "model": model,
        "train": settings,
        "evaluation": {"every": 5},
    }  # fmt: skip
    return RunConfig.model_validate(values)


def batches(config: RunConfig) -> list[list[PackedBatch]]:
    """What a run of this config sees, step by step."""
    layout = config.model.layout()
    loader = PackedLoader(
        open_splits(config.data, layout, config.seed)["train"], layout, rows=2, micro_batch=2, seed=config.seed
    )
    return list(loader.steps(10))


@pytest.mark.parametrize("loss", MODELS)
def test_a_run_learns_as_a_plain_loop_over_open_clip_does(loss: str, tmp_path: Path) -> None:
    """The same pairs, weights and AdamW, with its groups by open_clip's rule."""
    model = {"clip": MODEL, "siglip": SIGLIP}[loss]
    config = run_config(tmp_path, model)
    Trainer(config, Unwatched()).run()
    found = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl")]

    torch.manual_seed(config.seed)
    clip = config.model.build().clip.train()
    transform = open_clip.image_transform(32, False, mean=config.model.mean, std=config.model.std)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    plain = [p for n, p in clip.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
    known = {id(parameter) for parameter in plain}
    rest = [parameter for parameter in clip.parameters() if id(parameter) not in known]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), eps=1e-6)
    criterion = ClipLoss() if loss == "clip" else SigLipLoss()
    expected = []
    for (batch,) in batches(config):
        numbers = [int(id.rpartition("/")[2]) for row in batch.ids for id in row]
        assert len(numbers) == 16
        pixels = torch.stack([transform(Image.open(io.BytesIO(png(number)))) for number in numbers])
        value = criterion(*clip(pixels, tokenizer([caption(number) for number in numbers])))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        expected.append(float(value.detach()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_stage_3_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, MODEL, engine={"kind": "deepspeed", "stage": 3})
    assert [(key, text[:2]) for key, text in contradictions(config)] == [(("train", "engine", "stage"), "3 ")]


def test_a_run_is_evaluated_resumed_loaded_and_written_out(tmp_path: Path) -> None:
    config = run_config(tmp_path, {**MODEL, "crop": 0.8})
    result = Trainer(config, Unwatched()).run()
    rows_ = read_metrics(tmp_path / "run/metrics.jsonl")
    held_out = [row for row in rows_ if "validation_loss" in row]
    assert [row["step"] for row in held_out] == [5, 10] and all(10 < row["scale"] < 20 for row in rows_)
    system, layout, _ = hub.load(tmp_path / "run", "cpu")
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=12)([caption(number) for number in range(100, 124)])
    transform = open_clip.image_transform(32, False, mean=config.model.mean, std=config.model.std)
    pixels = torch.stack([transform(Image.open(io.BytesIO(png(number)))) for number in range(100, 124)])
    with torch.no_grad():
        image, text = system.encode_pictures(pixels), system.clip.encode_text(theirs, normalize=True)
        loss = ClipLoss()(image, text, system.clip.logit_scale.exp())
    assert held_out[1]["validation_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-5), "the split is the same"
    for name, value in recalls(image, text).items():
        assert held_out[1][f"validation/{name}"] == result[f"test_{name}"] == pytest.approx(value)

    parts = config.model_copy(update={"out": tmp_path / "parts"})
    half = parts.model_copy(update={"train": parts.train.model_copy(update={"max_steps": 5})})
    Trainer(half, Unwatched()).run()
    Trainer(parts, Unwatched()).run(resume=True)
    resumed = read_metrics(tmp_path / "parts/metrics.jsonl")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows_]

    note = hub.export(tmp_path / "run", tmp_path / "exported")
    assert note is not None and "local-dir" in note
    again = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}").eval()
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels, normalize=True), image)
    about = json.loads((tmp_path / "exported/open_clip_config.json").read_text())
    assert about["preprocess_cfg"]["mean"] == list(config.model.mean)
    assert layout.fingerprint() == config.model.layout().fingerprint()
