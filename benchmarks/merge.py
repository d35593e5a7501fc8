"""A training step of a vision transformer, a connector and a language model, with and without token merging.

The model is `open_qwen2vl` with the connector `mlp`: ViT-T/16 at 224 pixels (196 patches and a class token, 12 blocks),
a Llama of 6 layers that reads what the tower gives of a picture and 32 tokens of text, and learns these. All of it is
trained, in float32 on a CPU. Of each r the step is forward and backward, everything between pictures and gradients:

- ours: `vision.merge: {r: …}`;
- not merged: the same model without, where timm's attention is `scaled_dot_product_attention`, as in ours;
- ToMe's patch of timm (`tome.patch.timm`, CC BY-NC 4.0) put on the same tower with the same weights. A plain ViT has
  nothing that it would drop. Loss and gradients of ours and of the patch are compared first.

Then the tower alone, ours and patched. *times …*: median of the ratios within a repetition. CPU time counts all
threads, and other work on the machine counts little in it.
"""

import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cqt import PEERS
from benchmarks.experts import in_turn, ratio, row
from benchmarks.harness import Row, arguments, show
from mm.data.batch import IGNORE, MODALITIES, MediaBatch, PackedBatch
from mm.models.system import GenerativeSystem
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
from mm.models.vision import VisionTower

RS = (4, 8, 13, 16)
"""Of 197 tokens, 149, 101, 41 and 11 are left behind the last of 12 blocks."""
VISION: dict[str, Any] = {
    "name": "timm/vit_tiny_patch16_224", "pretrained": False, "image_size": 224, "block": -1,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "tie_word_embeddings": True,
}
TEXT = 32
OURS, PLAIN, PATCH = "ours", "not merged", "ToMe's patch"
Step = Callable[[], Tensor]


def main() -> None:
    options = arguments(
        __doc__,
        tome="a checkout of github.com/facebookresearch/ToMe; by default the one that pip put among the peers",
        device="cpu (float32) or cuda (bfloat16 autocast)",
        threads="2 by default; 1 where others use the machine, since threads that wait for one another use CPU time",
    )
    device = options.device or "cpu"
    torch.set_num_threads(int(options.threads or 2))
    patch = patch_of(options.tome)
    rs = (4,) if options.quick else RS
    pictures, repetitions = (2, 1) if options.quick else (16 if device == "cpu" else 128, 5)
    rows: list[Row] = []
    for r in rs:
        torch.manual_seed(0)
        systems = candidates(r, patch, device)
        missing = {} if callable(patch) else {PATCH: patch}
        left = systems[OURS].vision.features
        pixels = torch.randn(pictures, 3, 224, 224, device=device)
        steps = {name: partial(step, system, batch_of(system, pixels, device)) for name, system in systems.items()}
        if PATCH in steps:
            check(systems, steps)
        rows += figures(f"r = {r}, {left + 1} tokens left: the step", pictures, in_turn(repetitions, steps), missing)
        towers = {name: partial(tower_step, system.vision, pixels) for name, system in systems.items()}
        rows += figures(f"r = {r}: the tower alone", pictures, in_turn(repetitions, towers), missing)
    show("merge", rows, options.json)
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", file=sys.stderr)


def figures(
    case: str, pictures: int, spent: dict[str, list[tuple[float, float]]], missing: dict[str, str]
) -> list[Row]:
    rows = []
    for number, unit in enumerate(("s", "CPU s")):
        times = {name: [each[number] for each in some] for name, some in spent.items()}
        speeds = {name: pictures / statistics.median(some) for name, some in times.items()}
        rows.append({**row(case, f"pictures/{unit}", speeds, missing), "better": "higher"})
        rows.append(
            row(case, f"times not merged, {unit}", {n: ratio(t, times[PLAIN]) for n, t in times.items()}, missing)
        )
        if PATCH in times:
            against = {OURS: ratio(times[OURS], times[PATCH]), PATCH: 1.0}
            rows.append({**row(case, f"times the patch, {unit}", against, {}), "limit": 1.0})
    return rows


def patch_of(folder: str | None) -> Any:
    """`tome.patch.timm`, or why there is none."""
    sys.path.append(folder or str(PEERS))
    try:
        import tome  # type: ignore[import-not-found]

        return tome.patch.timm
    except (ImportError, AttributeError) as error:
        repository = "https://github.com/facebookresearch/ToMe"
        return (
            f"not there ({error}); pip install --no-deps --target {PEERS} git+{repository}, or --tome FOLDER for a "
            "checkout of it"
        )


def candidates(r: int, patch: Any, device: str) -> dict[str, GenerativeSystem]:
    """Models with the same weights."""
    systems = {OURS: model({"r": r}), PLAIN: model(None)}
    if callable(patch):
        systems[PATCH] = model(None)
        systems[PATCH].rows = systems[OURS].rows
        vision = systems[PATCH].vision
        patch(vision.featurizer)
        vision.of_squares = partial(patched, vision, r)
    for system in systems.values():
        system.load_state_dict(systems[OURS].state_dict())
        system.train().to(device)
    return systems


def model(merge: dict[str, Any] | None) -> Any:
    vision = {**VISION, "merge": merge}
    language = {"tokenizer": "builtin:emoji", "config": LANGUAGE}
    values = {"vision": vision, "connector": {"kind": "mlp"}, "language": language}
    return OpenQwen2VLConfig.model_validate(values).build()


def patched(vision: VisionTower, r: int, pixels: Tensor) -> Tensor:
    """What the patched model's forward does up to its last block."""
    vit: Any = vision.featurizer
    vit._tome_info.update(r=[r] * len(vit.blocks), size=None, source=None)
    (features,) = vit.forward_intermediates(
        pixels, indices=[vision.block], intermediates_only=True, stop_early=True, output_fmt="NLC"
    )
    return features


def batch_of(system: Any, pixels: Tensor, device: str) -> PackedBatch:
    """A row for each picture: what its tower gives of it, then text that is learned."""
    with torch.no_grad():
        length = system.vision.of_squares(pixels[:1]).shape[1]
    count, total = len(pixels), length + TEXT
    ids = torch.randint(1000, (count, total), generator=torch.Generator().manual_seed(0))
    ids[:, :length] = 0
    labels = torch.full((count, total), IGNORE)
    labels[:, length - 1 : -1] = ids[:, length:]
    modality = torch.zeros(count, total, dtype=torch.uint8)
    modality[:, :length] = MODALITIES["image"]
    media = MediaBatch(
        values=pixels.flatten(),
        shapes=torch.tensor([pixels.shape[1:]] * count),
        offsets=torch.arange(count + 1) * pixels[0].numel(),
        row=torch.arange(count),
        position=torch.zeros(count, dtype=torch.int64),
        length=torch.full((count,), length),
        cost=torch.full((count,), 196),
    )
    batch = PackedBatch(
        input_ids=ids,
        labels=labels,
        segment_ids=torch.ones(count, total, dtype=torch.int32),
        position_ids=torch.arange(total).expand(count, -1).contiguous(),
        modality=modality,
        media={"image": media},
        ids=[[str(number)] for number in range(count)],
        sources=("noise",) * count,
    )
    moved: PackedBatch = batch.to(device)
    return moved


def step(system: Any, batch: PackedBatch) -> Tensor:
    system.zero_grad()
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=batch.input_ids.is_cuda):
        loss: Tensor = system(batch).losses["next_token"]
    loss.backward()
    return settled(loss)


def tower_step(vision: VisionTower, pixels: Tensor) -> Tensor:
    vision.zero_grad()
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        loss = vision.of_squares(pixels).float().square().mean()
    loss.backward()
    return settled(loss)


def settled(loss: Tensor) -> Tensor:
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss.detach()


def check(systems: dict[str, GenerativeSystem], steps: dict[str, Step]) -> None:
    """Ours and the patch merge the same tokens."""
    tolerance = 5e-2 if next(systems[OURS].parameters()).is_cuda else 1e-3
    torch.testing.assert_close(steps[OURS](), steps[PATCH](), rtol=tolerance, atol=tolerance)
    for (name, one), other in zip(systems[OURS].named_parameters(), systems[PATCH].parameters(), strict=True):
        if one.grad is None or other.grad is None:
            assert one.grad is other.grad, name
            continue
        assert float((one.grad - other.grad).norm()) <= tolerance * float(other.grad.norm() + 1e-6), name


if __name__ == "__main__":
    main()
