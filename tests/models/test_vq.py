"""The VQ model: losses and gradients against each picture alone through stock `JanusVQVAE` modules, the exported model
against stock `JanusVQVAE`, and a run that learns."""

import copy
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from transformers import JanusVQVAE

from mm.cli import main
from mm.config import load_config
from mm.data.batch import PackedBatch, collate, with_dummies
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media
from mm.data.tokens import make_segment
from mm.hub import load
from mm.models.released import janus_vq
from mm.models.systems.vq.config import VQConfig
from mm.models.systems.vq.model import VQ
from mm.models.teachers.config import VQTeacherConfig
from mm.train.metrics import read_metrics
from mm.train.trainer import Trainer, Unwatched

SIZE, SIDE, CODES = 16, 4, 24
CONFIG = VQConfig(size=SIZE, codes=CODES, code_dim=4, channels=32, multipliers=(1, 1, 2), blocks=1, squared=0.5)
ROWS = [2, 0, 3, 1]
"""Pictures of each row."""
CONFIGS = Path(__file__).parents[2] / "configs/moma"


def build(config: VQConfig = CONFIG) -> VQ:
    """With weights that say something."""
    torch.manual_seed(0)
    system = config.build()
    with torch.no_grad():
        for parameter in system.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return system


def png(seed: int) -> bytes:
    """Four coloured quarters, in noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (2, 2, 3)).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)
    file = io.BytesIO()
    Image.fromarray((pixels + rng.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def pack(row: int, pictures: int) -> Pack:
    items = []
    for number in range(pictures):
        picture = Media("image", png(10 * row + number), "png")
        items.append((f"{row}/{number}", "s", make_segment((picture,), CONFIG.layout(), "test", Limits())))
    return join_segments(items) if items else EMPTY


def batch(rows: list[int]) -> PackedBatch:
    return collate([pack(row, ROWS[row]) for row in rows], CONFIG.layout(), 64)


ALL = list(range(len(ROWS)))
Found = tuple[dict[str, float], dict[str, Tensor]]


def step(system: VQ, batches: list[PackedBatch]) -> Found:
    """Means of the objectives, and the gradients of their weighted sum, as the trainer has them."""
    system.zero_grad()
    counts = {name: sum(int(system.counts(one)[name]) for one in batches) for name in system.weights}
    outputs = [system(one) for one in batches]
    for output, one in zip(outputs, batches, strict=True):
        assert {name: int(count) for name, count in output.counts.items()} == {
            name: int(count) for name, count in system.counts(one).items()
        }
        torch.testing.assert_close(output.rows["reconstruction"].sum(), output.losses["reconstruction"].detach())
    means = {
        name: torch.stack([output.losses[name] for output in outputs]).sum() / counts[name] for name in system.weights
    }
    sum(system.weights[name] * mean for name, mean in means.items()).backward()  # type: ignore[union-attr]
    grads = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(system.parameters())), "every parameter takes part"
    return {name: float(mean.detach()) for name, mean in means.items()}, grads


def assert_alike(found: Found, expected: Found, tolerance: float) -> None:
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=tolerance), name
    largest = max(grad.norm() for grad in expected[1].values())
    for name, grad in expected[1].items():
        # A bias in front of a norm of single channels has a gradient of zero, but for rounding.
        distance = (found[1][name] - grad).norm() / grad.norm().clamp(min=1e-3 * largest)
        assert distance < tolerance, (name, float(distance))


def by_brute_force(system: VQ, pictures: list[Tensor]) -> Found:
    """Picture by picture, code by code; the gradient of what is decoded is put on the latents by hand."""
    vqvae = copy.deepcopy(system.vqvae)
    weights, temperature = CONFIG.weights, system.config.temperature
    terms = {"reconstruction": 0.0, "codebook": 0.0, "commitment": 0.0}
    for parameter in vqvae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    total = len(pictures) * SIDE**2
    for picture in pictures:
        raw = vqvae.quant_conv(vqvae.encoder(picture[None]))[0]
        latents = [raw[:, row, column] / raw[:, row, column].norm() for row in range(SIDE) for column in range(SIDE)]
        book = torch.stack([code / code.norm() for code in vqvae.quantize.embedding.weight])
        chosen = [min(book, key=lambda code, z=z: float((z - code).detach().norm())) for z in latents]
        grid = torch.stack(chosen).detach().T.reshape(1, -1, SIDE, SIDE).requires_grad_()
        error = vqvae.decoder(vqvae.post_quant_conv(grid))[0] - picture
        reconstruction = 0.0
        for row in range(SIDE):
            for column in range(SIDE):
                square = error[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                reconstruction = reconstruction + square.abs().mean() + CONFIG.squared * square.square().mean()
        codebook = 0.0
        for z, e in zip(latents, chosen, strict=True):
            every = book if temperature else e[None]
            shares = torch.softmax((every @ z).detach() / (temperature or 1), 0)
            codebook = codebook + (shares * (every - z.detach()).square().mean(1)).sum()
        commitment = sum((z - e.detach()).square().mean() for z, e in zip(latents, chosen, strict=True))
        loss = weights.reconstruction * reconstruction / total
        (onto,) = torch.autograd.grad(loss, grid, retain_graph=True)
        loss.backward()
        through = (torch.stack(latents) * onto[0].flatten(1).T).sum()
        (through + (weights.codebook * codebook + weights.commitment * commitment) / total).backward()
        for name, value in (("reconstruction", reconstruction), ("codebook", codebook), ("commitment", commitment)):
            terms[name] += float(value.detach()) / total
    return terms, {f"vqvae.{name}": p.grad for name, p in vqvae.named_parameters()}


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_pictures_alone(temperature: float) -> None:
    """At 0 as in 1711.00937."""
    system, packed = build(CONFIG.model_copy(update={"temperature": temperature})).train(), batch(ALL)
    pictures = packed.media["image"].items()
    assert len(pictures) == sum(ROWS)
    assert_alike(step(system, [packed]), by_brute_force(system, pictures), 1e-4)
    latents, codes, *_ = system.encode(torch.stack(pictures))
    assert len(codes.unique()) > CODES // 3 and torch.allclose(latents.norm(dim=1), torch.ones(()))


def test_however_rows_are_split_the_numbers_are_the_same() -> None:
    system = build().train()
    whole = step(system, [batch(ALL)])
    assert_alike(step(system, [batch([row]) for row in ALL]), whole, 1e-5)
    assert_alike(step(system, [batch([3, 1]), batch([2, 0])]), whole, 1e-5)
    dummy = with_dummies(batch([1]), CONFIG.layout())
    assert_alike(step(system, [dummy, batch(ALL)]), whole, 1e-5)


def test_counts_are_positions_and_metrics_are_of_codes() -> None:
    system, packed = build().eval(), batch(ALL)
    output = system(packed)
    assert {int(count) for count in output.counts.values()} == {sum(ROWS) * SIDE**2}
    assert system.row_counts(packed).tolist() == [number * SIDE**2 for number in ROWS]
    assert system.learned == ("reconstruction",) and int(system.counts(batch([1]))["codebook"]) == 0
    pictures = torch.stack(packed.media["image"].items())
    _, codes, chosen, _ = system.encode(pictures)
    shares = [count / codes.numel() for count in Counter(codes.flatten().tolist()).values()]
    assert float(output.metrics["perplexity"]) == pytest.approx(np.prod([share**-share for share in shares]), rel=1e-4)
    squares = (system.decode(chosen) - pictures).square().mean((1, 2, 3))
    noise = [10 * np.log10(2**2 / float(square)) for square in squares.detach()]
    assert float(output.metrics["psnr"]) == pytest.approx(np.mean(noise), rel=1e-4)
    scores = system.scores({name: value.float() for name, value in output.predictions.items()})
    assert scores["codes_used"] == len(shares)
    assert scores["code_perplexity"] == pytest.approx(float(output.metrics["perplexity"]))


def test_no_loss_depends_on_what_could_not_be_read() -> None:
    system, packed = build().eval(), batch(ALL)
    media = packed.media["image"]
    unreadable = torch.tensor([True, False, False, True, False, False])
    found = []
    for noise in (0.0, 1.0):
        values = media.stacked().clone()
        values[unreadable] += noise
        spoilt = replace(packed, media={"image": replace(media, values=values.flatten(), unreadable=unreadable)})
        found.append(step(system, [spoilt]))
        assert int(system.counts(spoilt)["commitment"]) == 4 * SIDE**2
    assert_alike(found[1], found[0], 1e-6)
    kept = [one for one, bad in zip(media.items(), unreadable.tolist(), strict=True) if not bad]
    assert_alike(found[0], by_brute_force(system, kept), 1e-4)


def test_it_learns_and_keeps_many_codes_in_use() -> None:
    torch.manual_seed(0)
    config = VQConfig(size=SIZE, codes=CODES, multipliers=(1, 1, 1))
    system, packed = config.build().train(), batch(ALL)
    optimizer = torch.optim.AdamW(system.parameters(), lr=4e-3, weight_decay=0)
    seen = []
    for _ in range(60):
        losses, _ = step(system, [packed])
        optimizer.step()
        seen.append(losses["reconstruction"])
    assert seen[-1] < 0.3 * seen[0], seen[:: len(seen) // 8]
    assert float(system(packed).metrics["perplexity"]) > 10


@torch.no_grad()
def test_what_is_exported_is_stock_and_a_teacher(tmp_path: Path) -> None:
    system = build().eval()
    pictures = batch(ALL).media["image"].items()
    _, codes, chosen, _ = system.encode(torch.stack(pictures))
    again = system.decode(chosen)
    (tmp_path / "out").mkdir()
    note = janus_vq.write(system, tmp_path / "out")
    assert "squares of 16 pixels" in note
    stock = JanusVQVAE.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(stock.encode(torch.stack(pictures)).image_tokens.view(len(pictures), -1), codes)
    torch.testing.assert_close(stock.decode(codes), again, rtol=1e-4, atol=1e-5)
    config = VQTeacherConfig(path=tmp_path / "out")
    assert (config.sizes(), config.size, config.positions()) == ((CODES,), SIZE, SIDE**2)
    teacher = config.build()
    teacher.check(CONFIG.layout())
    found = teacher.codes(pictures, [SIDE**2] * len(pictures), CONFIG.layout())
    assert torch.equal(found.view_as(codes), codes)
    torch.testing.assert_close(teacher.pictures(codes), again.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    norm = F.normalize(system.vqvae.quantize.embedding.weight, dim=1)
    assert torch.equal(stock.quantize.embedding.weight, norm), "the model in memory stays as it was"
    assert not torch.equal(system.vqvae.quantize.embedding.weight, norm)


def test_the_recipe_runs_and_its_model_is_exported(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`configs/moma/vq_tiny.yaml`, smaller and for three steps, resumed after the second."""
    small = ["model.size=16", "model.multipliers=[1,1]", "data.context_length=64", "train.batch_tokens=256"]
    source = '[{kind: captions, path: "builtin:emoji/test-*.tar.gz", caption: ""}]'
    settings = [
        *small, "train.save_every=2", "train.schedule={kind: constant, warmup: 0}", f"out={tmp_path / 'run'}",
        f"data.sources={source}", f"data.validation={source}", f"data.test={source}", f"data.cache={cache}",
        "evaluation.every=2", "train.device=cpu", "data.workers=0",
    ]  # fmt: skip
    for steps in (2, 3):
        config = load_config(CONFIGS / "vq_tiny.yaml", [*settings, f"train.max_steps={steps}"])
        Trainer(config, Unwatched()).run(resume=steps == 3)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    named: dict[str, Any] = {key: value for row in rows for key, value in row.items()}
    assert {"loss/codebook", "psnr", "perplexity", "validation/psnr", "validation/codes_used"} <= named.keys()
    assert "test_code_perplexity" in json.loads((tmp_path / "run/eval.json").read_text())
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "in values from -1 to 1" in capsys.readouterr().out
    system, layout, _ = load(tmp_path / "run", "cpu")
    teacher = VQTeacherConfig(path=tmp_path / "out").build()
    teacher.check(layout)
    given = collate([pack(0, 3)], CONFIG.layout(), 64).media["image"].items()
    with torch.no_grad():
        _, codes, *_ = system.encode(torch.stack(given))
    assert torch.equal(teacher.codes(given, [64] * 3, layout).view_as(codes), codes)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 60}, "size 60: expected a multiple of 8"),
        ({"channels": 48}, "expected a multiple of 32"),
        ({"multipliers": [1, 1, 2]}, "without blocks nothing in the encoder"),
        ({"multipliers": []}, "at least 1 item"),
        ({"codes": 1}, "greater than or equal to 2"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        VQConfig.model_validate(values)
