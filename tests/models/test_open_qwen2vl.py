"""Open-Qwen2VL: packing is invisible to the loss, the parts are the published ones, pictures go where they should."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_run import native, picture
from PIL import Image
from torch import Tensor

from mm.config import RunConfig
from mm.data.batch import IGNORE, PackedBatch, collate
from mm.data.media import ImageHeader, Native
from mm.data.packed import Pack, PackedDataset, PackedSegment
from mm.data.prepare import open_splits
from mm.data.sample import Media
from mm.errors import ConfigError, DataError
from mm.models.config import LanguageConfig
from mm.models.connectors import PoolMLP
from mm.models.generate import generate
from mm.models.prompts import Decoding, raw_prompt
from mm.models.system import GenerativeSystem
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig

Built = tuple[GenerativeSystem, Any, PackedDataset]


@pytest.fixture(params=["square", "native"])
def built(tiny_config: Callable[..., RunConfig], tmp_path: Path, request: pytest.FixtureRequest) -> Built:
    torch.manual_seed(0)
    config = tiny_config(*(native(tmp_path) if request.param == "native" else ()))
    layout = config.model.layout()
    return config.model.build(), layout, open_splits(config.data, layout, config.seed)["train"]


def singles(pack: Pack) -> list[Pack]:
    """Each segment of a pack in a row of its own."""
    found = []
    for number, segment in enumerate(pack.segments):
        start, stop = segment.start, segment.start + segment.length
        loss = tuple((a - start, b - start) for a, b in segment.loss)
        media = tuple(replace(m, segment=0, position=m.position - start) for m in pack.media if m.segment == number)
        alone = PackedSegment(segment.id, segment.source, 0, segment.length, loss)
        found.append(Pack(pack.tokens[start:stop], (alone,), media))
    return found


def gradients(system: GenerativeSystem, batches: list[PackedBatch]) -> tuple[float, dict[str, Tensor]]:
    """Sum of losses over sum of counts, and its gradients."""
    system.zero_grad()
    outputs = [system(batch) for batch in batches]
    total = sum(int(output.counts["next_token"]) for output in outputs)
    loss = torch.stack([output.losses["next_token"] for output in outputs]).sum() / total
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        error = float((a[name] - b[name]).norm() / (b[name].norm() + 1e-8))
        assert error < tolerance or float(b[name].norm()) < 1e-6, f"{name}: {error:.1e}"


def test_packed_loss_equals_the_samples_one_by_one(built: Built) -> None:
    system, layout, dataset = built
    packs = [dataset.read(0), dataset.read(1)]
    packed = collate(packs, layout, 128)
    alone = [collate([one], layout, len(one.tokens)) for pack in packs for one in singles(pack)]
    assert len(alone) > 8 and sum(len(b.media["image"]) for b in alone) == len(packed.media["image"])
    loss, grads = gradients(system, [packed])
    expected, expected_grads = gradients(system, alone)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert_close(grads, expected_grads, 1e-5)
    losses = system.token_losses(packed)
    torch.testing.assert_close(losses, torch.cat([system.token_losses(one) for one in alone]), rtol=1e-4, atol=1e-5)


def test_loss_equals_transformers_own(built: Built) -> None:
    """One sample through transformers' attention, its own label shift and mean, with the features spliced by hand."""
    system, layout, dataset = built
    (one, *_) = singles(dataset.read(0))
    batch = collate([one], layout, len(one.tokens))
    media = batch.media["image"]
    embeddings = system.language.get_input_embeddings()(batch.input_ids).clone()
    start, n = int(media.position[0]), int(media.length[0])
    embeddings[0, start : start + n] = system.connect("image", system.features("image", media))
    learned = torch.zeros(len(one.tokens), dtype=torch.bool)
    for a, b in one.segments[0].loss:
        learned[a:b] = True
    labels = torch.where(learned, batch.input_ids[0], IGNORE)[None]
    system.language.set_attn_implementation("eager")
    expected = system.language(inputs_embeds=embeddings, labels=labels, use_cache=False).loss
    system.language.set_attn_implementation("mm_packed")
    output = system(batch)
    found = output.losses["next_token"] / output.counts["next_token"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_counts_need_no_forward_and_are_the_labels(built: Built) -> None:
    system, layout, dataset = built
    batch = collate([dataset.read(0)], layout, 128)
    assert int(system.counts(batch)["next_token"]) == int((batch.labels != IGNORE).sum())
    assert int(system.counts(batch)["next_token"]) == dataset.index["loss_tokens"][0].as_py()


def test_a_batch_without_media_is_a_language_model(built: Built) -> None:
    system, layout, _ = built
    ids = layout.tokenizer.encode("flag: Norway and a red apple")
    text = PackedSegment("t", "text", 0, len(ids), ((0, len(ids)),))
    batch = collate([Pack(torch.tensor(ids, dtype=torch.int32).numpy(), (text,), ())], layout, 32)
    logits = system.language(input_ids=torch.tensor([ids]), packing=_one(len(ids)), use_cache=False).logits[0]
    expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    torch.testing.assert_close(system(batch).losses["next_token"], expected, rtol=1e-5, atol=1e-5)


def _one(n: int) -> Any:
    from mm.models.attention import packing

    return packing(torch.ones(1, n, dtype=torch.int32))


def test_rows_without_a_target_give_a_zero_that_touches_the_graph(built: Built) -> None:
    system, layout, dataset = built
    batch = collate([dataset.read(0)], layout, 128)
    output = system(replace(batch, labels=torch.full_like(batch.labels, IGNORE)))
    assert float(output.losses["next_token"].detach()) == 0 and int(output.counts["next_token"]) == 0
    output.losses["next_token"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in system.parameters() if p.grad is not None)


def with_first_picture_changed(batch: PackedBatch) -> PackedBatch:
    media = batch.media["image"]
    values = media.values.clone()
    values[: media.offsets[1]] += 1.0
    return replace(batch, media={"image": replace(media, values=values)})


def test_the_picture_matters_only_to_its_own_segment(built: Built) -> None:
    system, layout, dataset = built
    batch = collate([dataset.read(0)], layout, 128)
    changed = with_first_picture_changed(batch)
    media = batch.media["image"]
    segment = batch.segment_ids[batch.labels != IGNORE]
    differs = (system.token_losses(batch) - system.token_losses(changed)).abs() > 1e-7
    first = int(batch.segment_ids[int(media.row[0]), int(media.position[0])])
    assert differs.any() and set(segment[differs].tolist()) == {first}


def test_without_isolation_later_segments_see_earlier_ones(built: Built) -> None:
    system, layout, dataset = built
    pack = dataset.read(0)
    joint = collate([pack], layout, 128, isolate_segments=False)
    changed = with_first_picture_changed(joint)
    differs = (system.token_losses(joint) - system.token_losses(changed)).abs() > 1e-7
    segments = set(joint.segment_ids[joint.labels != IGNORE][differs].tolist())
    assert len(segments) > 1


def test_given_features_replace_the_tower(built: Built) -> None:
    system, layout, dataset = built
    batch = collate([dataset.read(0)], layout, 128)
    media = batch.media["image"]
    features = system.features("image", media)
    empty = replace(media, values=torch.empty(0), features=features)
    torch.testing.assert_close(
        system.token_losses(batch), system.token_losses(replace(batch, media={"image": empty})), rtol=0, atol=0
    )


def test_connector_pools_before_the_mlp_in_the_published_windows() -> None:
    """27 -> 12 in overlapping windows [0,3) [2,5) [4,7) … and 27 -> 27 as the identity (prismatic `nn_utils.py`)."""
    torch.manual_seed(0)
    grid = torch.randn(2, 27, 27, 8)
    features, grids = grid.view(-1, 8), [(27, 27)] * 2
    connector = PoolMLP(144, 8, 6)
    edges = [(i * 27 // 12, -(-(i + 1) * 27 // 12)) for i in range(12)]
    assert edges[:4] == [(0, 3), (2, 5), (4, 7), (6, 9)]
    pooled = torch.stack([grid[:, a:b, c:d].mean((1, 2)) for a, b in edges for c, d in edges], 1)
    torch.testing.assert_close(connector.pool(features, grids), pooled.flatten(0, 1), rtol=1e-5, atol=1e-6)
    whole = PoolMLP(729, 8, 6)
    torch.testing.assert_close(whole.pool(features, grids), features, rtol=1e-5, atol=1e-6)


QWEN = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


def test_published_size_has_the_published_parameters() -> None:
    """SigLIP so400m, 1152 -> 1536 -> 1536, Qwen2.5-1.5B, on the meta device (spec 1a)."""
    config = OpenQwen2VLConfig.model_validate(
        {
            "vision": {"name": "timm/vit_so400m_patch14_siglip_384", "block": -2},
            "connector": {"tokens": 144},
            "language": {"config": QWEN, "tokenizer": "builtin:emoji"},
        }
    )
    with torch.device("meta"):
        system = config.build(weights=False)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in system.named_children()}
    assert sizes == {"vision": 428_225_600, "connector": 4_131_840, "language": 1_543_714_304}
    layout = config.layout()
    assert layout.image is not None
    assert layout.image.count(ImageHeader(640, 480)) == (144, 729) and layout.image.shape({}) == (3, 384, 384)


def test_tokenizer_larger_than_the_model_is_refused(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config("model.language.config.vocab_size=100")
    with pytest.raises(ConfigError, match=r"4096 tokens, the model 100 embedding rows"):
        config.model.build()


def test_language_needs_one_of_name_and_config() -> None:
    with pytest.raises(ValueError, match="either `name`"):
        LanguageConfig()


def test_pictures_in_their_own_aspect_ratio_are_counted_from_their_headers(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """What is planned, packed, decoded and encoded agree, picture by picture; another budget is another packed set."""
    config = tiny_config(*native(tmp_path))
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    system = config.model.build()
    sizes = set()
    for number in range(len(dataset)):
        pack = dataset.read(number)
        media = collate([pack], layout, 128).media["image"]
        features = system.features("image", media)
        assert len(features) == media.positions == sum(one.length for one in pack.media)
        for one, shape in zip(pack.media, media.shapes.tolist(), strict=True):
            with Image.open(io.BytesIO(one.data)) as image:
                rows, columns = Native(8, 16).grid(ImageHeader(*image.size))
            sizes.add((rows, columns))
            assert one.plan == {"grid": [rows, columns]} and shape == [3, 8 * rows, 8 * columns]
            assert (one.length, one.cost) == (-(-rows // 2) * -(-columns // 2), rows * columns)
        assert dataset.index["image_cost"][number].as_py() == int(media.cost.sum())
    assert len(sizes) > 8
    fingerprints = {layout.fingerprint(), tiny_config().model.layout().fingerprint()}
    for change in ("model.vision.max_patches=9", "model.connector.pool=1", "model.vision.patch_size=4"):
        fingerprints.add(tiny_config(*native(tmp_path), change).model.layout().fingerprint())
    assert len(fingerprints) == 5
    with pytest.raises(DataError, match=r'"max_patches": 16, .* \(the model has .*"max_patches": 9, '):
        dataset.require(tiny_config(*native(tmp_path), "model.vision.max_patches=9").model.layout(), 128)


def test_native_pictures_need_windows_that_fit() -> None:
    values = {"vision": {"name": "timm/vit_tiny_patch16_224", "resize": "native"}, "language": {"name": "none"}}
    for connector, words in (
        ({"tokens": 144}, "set connector.pool, not connector.tokens"),
        ({"pool": 25}, "larger windows than the 576 patches"),
    ):
        with pytest.raises(ValueError, match=words):
            OpenQwen2VLConfig.model_validate({**values, "connector": connector})


def test_generation_takes_pictures_of_any_size(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A batch of prompts writes what each of them writes alone."""
    torch.manual_seed(0)
    config = tiny_config(*native(tmp_path))
    system, layout = config.model.build(), config.model.layout()
    prompts = [raw_prompt("a picture of", [Media("image", picture(seed), "png")]) for seed in (3, 4, 5)]
    decoding = Decoding(max_new_tokens=5)
    together = generate(system, layout, prompts, decoding)
    assert together == [generate(system, layout, [one], decoding)[0] for one in prompts]
