"""Open-Qwen2VL against the published forward, put together by hand, and stock LLaVA; pictures against timm's chain."""

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_release import Prismatic, picture, row_of, write_release
from torch import Tensor
from torchvision import transforms
from transformers import LlavaForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import mm
from mm.data.batch import PackedBatch, collate
from mm.data.limits import Limits
from mm.data.media import ImageTransform, decode_image
from mm.data.packed import join_segments
from mm.data.sample import Text
from mm.data.tokens import Segment, make_segment
from mm.models import backbone
from mm.models.released import llava
from mm.models.released.prismatic import released_name
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig

# Documents of no, one and three pictures; what is learned begins and ends in the middle of rows.
DOCUMENTS = [
    (Text("No picture at all, "), Text("only words.")),
    (picture(1), Text("en: ", loss=False), Text("one picture")),
    (picture(2), Text("first", loss=False), picture(3, 50, 120), picture(4), Text("and the last of three")),
]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Case:
    """A model of the repository's structure, and the same one read from its release."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.theirs = Prismatic(tokens)
        self.folder = write_release(folder, self.theirs)
        self.system, self.layout, self.config = mm.load(self.folder, device="cpu")
        self.segments = [make_segment(parts, self.layout, "test", Limits()) for parts in DOCUMENTS]

    def batch(self, packs: list[list[Segment]], isolate: bool = True) -> PackedBatch:
        joined = [join_segments([(str(n), "", one) for n, one in enumerate(pack)]) for pack in packs]
        return collate(joined, self.layout, max(len(pack.tokens) for pack in joined) + 5, isolate)

    def ours(self, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of losses, logits of all positions [B * L, V], gradients."""
        self.system.zero_grad()
        loss = self.system(batch).losses["next_token"]
        loss.backward()
        grads = {n: p.grad for n, p in self.system.named_parameters() if p.grad is not None}
        system: Any = self.system
        with torch.no_grad():
            where = batch.segment_ids, batch.position_ids, torch.arange(batch.input_ids.numel())
            logits = backbone.run(system.language, system.embed(batch), *where, batch.isolate_segments)
        return loss.detach(), logits, grads


@pytest.fixture(scope="module", params=[144, 729])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("release"), request.param)


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 50
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


# Padded to one length; packed and kept apart; packed with attention across samples, as published.
FORMS: dict[str, tuple[Callable[[list[Segment]], list[list[Segment]]], bool]] = {
    "padded": (lambda segments: [[one] for one in segments], True),
    "packed": (lambda segments: [segments[:2], segments[2:]], True),
    "packed, across": (lambda segments: [segments[:2], segments[2:]], False),
}


@pytest.mark.parametrize("form", FORMS)
def test_loss_logits_and_gradients_equal_the_published_forward(case: Case, form: str) -> None:
    arrange, isolate = FORMS[form]
    packs = arrange(case.segments)
    batch = case.batch(packs, isolate)
    loss, logits, grads = case.ours(batch)
    documents = [row_of(segment) for segment in case.segments]
    if isolate:
        rows = documents
        scopes = batch.segment_ids.flatten() + 1000 * torch.arange(len(packs)).repeat_interleave(batch.labels.shape[1])
    else:
        rows = []
        for pack in packs:
            ids, labels = zip(*map(row_of, pack), strict=True)
            rows.append(([*chain(*ids)], [*chain(*labels)]))
        scopes = torch.arange(len(packs)).repeat_interleave(batch.labels.shape[1])
    for parameter in case.theirs.parameters():
        parameter.grad = None
    images = batch.media["image"].stacked()
    expected, expected_logits = case.theirs.forward([ids for ids, _ in rows], [labels for _, labels in rows], images)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    real = batch.segment_ids.flatten() > 0
    numbers = scopes[real].unique_consecutive()
    for number, theirs in zip(numbers, expected_logits, strict=True):
        torch.testing.assert_close(logits[real & (scopes == number)], theirs.detach(), **TOLERANCE)
    assert_gradients(grads, case.theirs.gradients())


def test_loss_logits_and_gradients_equal_stock_llava(tmp_path: Path) -> None:
    case = Case(tmp_path / "release", 729)
    system: Any = case.system
    llava.write(system, case.layout, case.config.model, tmp_path / "llava")
    stock: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype="float32").eval()
    for form in ("packed", "packed, across", "padded"):
        arrange, isolate = FORMS[form]
        batch = case.batch(arrange(case.segments), isolate)
        loss, logits, grads = case.ours(batch)
        ids, labels = batch.input_ids.clone(), torch.full_like(batch.labels, -100)
        ids[batch.modality == 1] = stock.config.image_token_index
        labels[:, 1:] = batch.labels[:, :-1]
        real = batch.segment_ids > 0
        # transformers keeps packed documents apart by their positions, where there is no mask.
        apart = {"position_ids": batch.position_ids} if form == "packed" else {"attention_mask": real.long()}
        stock.zero_grad()
        pictures = batch.media["image"].stacked()
        found = stock(input_ids=ids, pixel_values=pictures, labels=labels, use_cache=False, **apart)
        total = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(found.loss, total / int((labels != -100).sum()))
        total.backward()
        torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.view_as(found.logits)[real], found.logits[real].detach(), **TOLERANCE)
    tower = {n.removeprefix("vision.featurizer."): g for n, g in grads.items() if n.startswith("vision.")}
    language = {n.removeprefix("language.model."): g for n, g in grads.items() if n.startswith("language.model.")}
    mapped = {
        **{f"model.vision_tower.{n}": g for n, g in llava.to_siglip(tower).items()},
        **{f"model.language_model.{n}": g for n, g in language.items()},
        **{
            f"model.multi_modal_projector.linear_{number}.{kind}": grads[f"connector.mlp.{ours}.{kind}"]
            for number, ours in ((1, 0), (2, 2))
            for kind in ("weight", "bias")
        },
    }
    expected = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    assert_gradients(mapped, expected)


def test_names_of_a_tower_map_to_siglip_and_back() -> None:
    tower = Prismatic(144).tower.state_dict()
    again = llava.from_siglip(llava.to_siglip(tower))
    assert again.keys() == tower.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tower.items())


FULL_SIZE = {
    "vision": {"name": "timm/vit_so400m_patch14_siglip_384"},
    "connector": {"tokens": 144},
    "language": {
        "tokenizer": "builtin:emoji",
        "config": {
            "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    },
}  # fmt: skip


def test_full_size_has_the_published_tensors_and_counts() -> None:
    """Every name, shape and number of a release at full size, from the published list."""
    with torch.device("meta"):
        system = OpenQwen2VLConfig.model_validate(FULL_SIZE).build(weights=False)
    found = {released_name(name): list(tensor.shape) for name, tensor in system.state_dict().items()}
    block = {
        "norm1.weight": [1152], "norm1.bias": [1152], "norm2.weight": [1152], "norm2.bias": [1152],
        "attn.qkv.weight": [3456, 1152], "attn.qkv.bias": [3456], "attn.proj.weight": [1152, 1152],
        "attn.proj.bias": [1152], "mlp.fc1.weight": [4304, 1152], "mlp.fc1.bias": [4304],
        "mlp.fc2.weight": [1152, 4304], "mlp.fc2.bias": [1152],
    }  # fmt: skip
    layer = {
        "self_attn.q_proj.weight": [1536, 1536], "self_attn.q_proj.bias": [1536],
        "self_attn.k_proj.weight": [256, 1536], "self_attn.k_proj.bias": [256],
        "self_attn.v_proj.weight": [256, 1536], "self_attn.v_proj.bias": [256],
        "self_attn.o_proj.weight": [1536, 1536], "mlp.gate_proj.weight": [8960, 1536],
        "mlp.up_proj.weight": [8960, 1536], "mlp.down_proj.weight": [1536, 8960], "input_layernorm.weight": [1536],
        "post_attention_layernorm.weight": [1536],
    }  # fmt: skip
    head = {
        "latent": [1, 1, 1152], "q.weight": [1152, 1152], "q.bias": [1152], "kv.weight": [2304, 1152],
        "kv.bias": [2304], "proj.weight": [1152, 1152], "proj.bias": [1152], "norm.weight": [1152], "norm.bias": [1152],
        "mlp.fc1.weight": [4304, 1152], "mlp.fc1.bias": [4304], "mlp.fc2.weight": [1152, 4304], "mlp.fc2.bias": [1152],
    }  # fmt: skip
    published = {
        "projector mlp_projector.0.weight": [1536, 1152], "projector mlp_projector.0.bias": [1536],
        "projector mlp_projector.2.weight": [1536, 1536], "projector mlp_projector.2.bias": [1536],
        "llm_backbone llm.model.embed_tokens.weight": [151936, 1536], "llm_backbone llm.model.norm.weight": [1536],
        "llm_backbone llm.lm_head.weight": [151936, 1536],
        **{f"llm_backbone llm.model.layers.{n}.{name}": shape for n in range(28) for name, shape in layer.items()},
        "vision_backbone featurizer.pos_embed": [1, 729, 1152],
        "vision_backbone featurizer.patch_embed.proj.weight": [1152, 3, 14, 14],
        "vision_backbone featurizer.patch_embed.proj.bias": [1152],
        **{f"vision_backbone featurizer.blocks.{n}.{name}": shape for n in range(27) for name, shape in block.items()},
        "vision_backbone featurizer.norm.weight": [1152], "vision_backbone featurizer.norm.bias": [1152],
        **{f"vision_backbone featurizer.attn_pool.{name}": shape for name, shape in head.items()},
    }  # fmt: skip
    assert found == published
    for module, tensors in (("projector", 4), ("llm_backbone", 339), ("vision_backbone", 342)):
        assert sum(name.startswith(f"{module} ") for name in found) == tensors
    for part, values in ((system.connector, 4_131_840), (system.language, 1_543_714_304), (system.vision, 428_225_600)):
        assert sum(p.numel() for p in part.parameters()) == values


PHOTOS = [(90, 70), (384, 384), (1000, 300), (200, 900), (1600, 1200)]


@pytest.mark.parametrize("size", PHOTOS)
def test_exact_pictures_equal_timms_chain_bit_for_bit(size: tuple[int, int]) -> None:
    """As prismatic's `resize-naive` makes it of timm's transform, and as transformers' SigLIP processor on Pillow."""
    data = picture(3, *size).read()
    transform = ImageTransform(384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    found = decode_image(data, transform, "test")
    image = Image.open(io.BytesIO(data)).convert("RGB")
    published = transforms.Compose(
        [
            transforms.Resize((384, 384), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(384),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
        ]
    )
    assert np.array_equal(found, published(image).numpy())
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    assert np.array_equal(found, processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", PHOTOS)
def test_fast_pictures_are_within_two_levels(size: tuple[int, int]) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(3, *size).read())).save(file, "JPEG", quality=90)
    transform = ImageTransform(384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    exact, fast = (decode_image(file.getvalue(), transform, "test", decoder=how) for how in ("exact", "fast"))
    levels = np.abs(exact - fast) * 127.5
    assert levels.max() < 2.5 and levels.mean() < 0.1
