"""SimVLG: the published order of a prefix, packing invisible to the loss, clips that are pictures where they may be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_simvlg import (
    BERT,
    FEATURES,
    FRAMES,
    LANGUAGE,
    MODEL,
    POSITIONS,
    ROW,
    ROWS,
    SAMPLES,
    TEMPLATE,
    VISION,
    batch,
    clip,
    media_of,
    model,
    picture,
)
from torch import Tensor

from mm.config import load_config
from mm.data.batch import IGNORE, PackedBatch, with_dummies
from mm.data.sample import Media
from mm.errors import ConfigError
from mm.models.generate import generate
from mm.models.prompts import Decoding, raw_prompt
from mm.models.system import GenerativeSystem
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
from mm.models.systems.simvlg.config import SimVLGConfig
from mm.models.systems.simvlg.model import SimVLG
from mm.train import checkpoint
from mm.train.config import ParamRule
from mm.train.params import freeze, parameter_groups

CONFIGS = Path(__file__).parents[2] / "configs/simvlg"
CLIPS = {"frames": FRAMES}
WAYS = ("attention", "mean", "merge")
LLAMA = {
    "tokenizer": "builtin:emoji",
    "config": {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2,
    },
}  # fmt: skip


def config(way: str = "attention", **changes: Any) -> SimVLGConfig:
    return model(**{"video": {**CLIPS, "temporal": way}, **changes})


def build(way: str = "attention", alpha: float = 0.3, **changes: Any) -> SimVLG:
    """With temporal modules that do something, unless `alpha` is 0."""
    torch.manual_seed(0)
    system = config(way, **changes).build()
    if alpha and system.vision.temporal is not None:
        for module in system.vision.temporal:
            torch.nn.init.constant_(module.alpha, alpha)
    if alpha and system.temporal is not None:
        torch.nn.init.normal_(system.temporal.frame)
    return system


@pytest.mark.parametrize("language", [LANGUAGE, LLAMA], ids=["opt", "llama"])
def test_visual_prefix_then_begin_of_text_then_the_caption(language: dict[str, Any]) -> None:
    """[visual][BOS][caption][end]; nothing but the caption and its end is learned."""
    made = config(language=language)
    layout = made.layout()
    assert layout.image is not None and layout.video is not None
    assert layout.image.tokens == POSITIONS and layout.video.count() == (POSITIONS, FRAMES * 16)
    tokenizer = layout.tokenizer
    bos, end = tokenizer.id("<s>"), tokenizer.id("<|im_end|>")
    for name in ("red", "asked", "moving"):
        _, *texts = SAMPLES[name]
        prompt = [id for part in texts if not part.loss for id in tokenizer.encode(part.text)]  # type: ignore[union-attr]
        caption = [id for part in texts if part.loss for id in tokenizer.encode(part.text)]  # type: ignore[union-attr]
        packed = batch([[name]], made)
        whole = [layout.pad] * POSITIONS + [bos, *prompt, *caption, end]
        assert packed.input_ids[0, : len(whole)].tolist() == whole
        first = POSITIONS + len(prompt)  # the last position before the caption
        labels = [IGNORE] * first + [*caption, end] + [IGNORE] * (ROW - first - len(caption) - 1)
        assert packed.labels[0].tolist() == labels
        assert packed.position_ids[0, : len(whole)].tolist() == list(range(len(whole)))


@pytest.mark.parametrize("language", [LANGUAGE, LLAMA], ids=["opt", "llama"])
def test_it_is_tower_connector_and_language_model_in_turn(language: dict[str, Any]) -> None:
    """One sample by hand through transformers' attention, its own label shift and mean."""
    system = build(language=language)
    packed = batch([["red"]], system_config := config(language=language))
    layout = system_config.layout()
    embeddings = system.language.get_input_embeddings()(packed.input_ids).clone()
    features = system.vision.of_squares(packed.media["image"].stacked())
    assert features.shape == (1, FEATURES, 32)
    embeddings[0, :POSITIONS] = system.connector(features)[0]
    length = int((packed.segment_ids > 0).sum())
    learned = torch.cat([torch.tensor([False]), packed.labels[0, : length - 1] != IGNORE])
    labels = torch.where(learned, packed.input_ids[0, :length], IGNORE)[None]
    assert layout.pad not in labels
    system.language.set_attn_implementation("eager")
    expected = system.language(inputs_embeds=embeddings[:, :length], labels=labels, use_cache=False).loss
    system.language.set_attn_implementation("mm_packed")
    output = system(packed)
    found = output.losses["next_token"] / output.counts["next_token"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


Step = tuple[Tensor, int, dict[str, Tensor]]


def step(system: GenerativeSystem, batches: list[PackedBatch]) -> Step:
    """Sum of losses, their count, and gradients of the sum."""
    system.zero_grad()
    outputs = [system(one) for one in batches]
    loss = torch.stack([output.losses["next_token"] for output in outputs]).sum()
    loss.backward()
    count = sum(int(output.counts["next_token"]) for output in outputs)
    return loss.detach(), count, {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}


def assert_alike(found: Step, expected: Step, tolerance: float) -> None:
    assert found[1] == expected[1] > 0
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=1e-5)
    assert found[2].keys() == expected[2].keys() and found[2]
    for name, grad in expected[2].items():
        assert float((found[2][name] - grad).norm()) <= tolerance * max(1.0, float(grad.norm())), name


@pytest.mark.parametrize("way", WAYS)
def test_packed_is_one_by_one_and_however_it_is_split(way: str) -> None:
    system = build(way)
    packed = batch(ROWS, config(way))
    assert len(packed.media["image"]) == 3 and len(packed.media["video"]) == 2
    found = step(system, [packed])
    trained = {name for name, _ in system.named_parameters()} - {
        name for name, _ in system.vision.named_parameters(prefix="vision") if ".norm." in name or "fc_norm" in name
    }
    assert trained == found[2].keys(), "but for the tower's final norm, each has a gradient"
    assert_alike(found, step(system, [batch([[name]], config(way)) for row in ROWS for name in row]), 1e-5)
    assert_alike(found, step(system, [batch(ROWS[:1], config(way)), batch(ROWS[1:], config(way))]), 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_clip_of_one_frame_is_its_picture(way: str) -> None:
    """Before temporal modules have learned anything: to the last bit."""
    system = build(way, alpha=0.0, video={"frames": 1, "temporal": way})
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        image = system.connect("image", system.features("image", media_of(pixels)))
        video = system.connect("video", system.features("video", media_of(pixels[:, None])))
    assert image.shape == (2 * POSITIONS, 32) and torch.equal(image, video)


def test_temporal_modules_begin_as_nothing() -> None:
    pixels = torch.randn(2, FRAMES, 3, 32, 32)
    with torch.no_grad():
        untouched, learned, plain = (
            one.features("video", media_of(pixels)) for one in (build(alpha=0.0), build(alpha=0.3), build("mean"))
        )
    torch.testing.assert_close(untouched, plain, rtol=1e-5, atol=1e-5)
    assert float((learned - plain).abs().max()) > 0.01


@pytest.mark.parametrize("way", WAYS)
def test_who_knows_the_order_of_frames(way: str) -> None:
    """As published nobody does; merging keeps it."""
    system, pixels = build(way), torch.randn(2, FRAMES, 3, 32, 32)
    with torch.no_grad():
        forward, backward = (
            system.connect("video", system.features("video", media_of(one))) for one in (pixels, pixels.flip(1))
        )
    difference = float((forward - backward).abs().max() / forward.abs().max())
    assert difference > 0.01 if way == "merge" else difference < 1e-5


def test_frozen_parts_are_what_they_were_to_the_last_bit() -> None:
    """As the recipes freeze them, under weight decay; what is trained has moved, the pooler has not."""
    system = build(alpha=0.0)
    rules = [ParamRule(match=match, freeze=freeze) for match, freeze in (
        ("vision.*", True), ("language.*", True), (r"vision\.temporal\..*", False),
    )]  # fmt: skip
    freeze(system, rules)
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    temporal = [name for name in trained if name.startswith("vision.temporal.")]
    assert len(temporal) == 2 * 5 and {name.split(".")[0] for name in trained} == {"vision", "connector"}
    optimizer = torch.optim.AdamW(parameter_groups(system, rules, 0.05), lr=1e-2)
    before = {name: one.clone() for name, one in checkpoint.model_tensors(system).items()}
    for _ in range(2):  # in the first queries and keys of time have no gradient: alpha is 0
        optimizer.zero_grad()
        system(batch(ROWS, config())).losses["next_token"].backward()
        optimizer.step()
    after = checkpoint.model_tensors(system)
    moved = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert moved == trained and "connector.bert.pooler.dense.weight" in before


@pytest.mark.parametrize("way", WAYS)
def test_given_features_replace_the_tower(way: str) -> None:
    system, packed = build(way), batch(ROWS, config(way))
    media = {}
    for kind, one in packed.media.items():
        features = system.features(kind, one)
        tower = system.media_towers[kind]
        assert features.shape == (len(one) * (tower.rows or 0), tower.width)
        media[kind] = replace(one, values=torch.empty(0), features=features)
    assert system.media_towers["video"].rows == (FRAMES * FEATURES if way == "merge" else FEATURES)
    expected = system.token_losses(packed)
    system.vision = torch.nn.Module()
    torch.testing.assert_close(system.token_losses(replace(packed, media=media)), expected, rtol=0, atol=0)


def test_dummies_change_nothing() -> None:
    system, layout = build(), config().layout()
    packed = batch([["text"]], config())
    found, expected = system(with_dummies(packed, layout)), system(packed)
    assert torch.equal(found.losses["next_token"], expected.losses["next_token"])
    found.losses["next_token"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in system.connector.parameters() if p.grad is not None)


@pytest.mark.parametrize("way", WAYS)
def test_it_writes_of_pictures_and_clips(way: str) -> None:
    """A batch of prompts gives what each gives alone, with begin of text behind the media."""
    system, layout = build(way).eval(), config(way).layout()
    media: list[Media] = [picture(5), clip(6), picture(7)]
    prompts = [raw_prompt(text, [one], "") for text, one in zip(("", "en: ", "a"), media, strict=True)]
    for decoding in (Decoding(max_new_tokens=6), Decoding(max_new_tokens=6, beams=3)):
        together = generate(system, layout, prompts, decoding)
        assert together == [generate(system, layout, [one], decoding)[0] for one in prompts] and any(together)


def test_the_tower_can_merge_too_and_other_connectors_serve() -> None:
    merging = {**VISION, "merge": {"r": 2}}
    left = 16 - 2 * 2
    made = config("merge", vision=merging, connector={"kind": "mlp"})
    layout = made.layout()
    assert layout.image is not None and layout.image.tokens == left + 1
    torch.manual_seed(0)
    output = made.build()(batch([["red"], ["moving"]], made))
    assert torch.isfinite(output.losses["next_token"])
    tome = config("merge", vision=merging).layout()
    assert tome.image is not None and tome.image.tokens == 1 + left - 2 * 3
    without = {name: value for name, value in VISION.items() if name != "class_token"}
    restored = config("mean", vision={**without, "merge": {"r": 2, "restore": True}})
    assert torch.isfinite(restored.build()(batch([["moving"]], restored)).losses["next_token"])


def test_open_qwen2vl_takes_the_connector_too() -> None:
    torch.manual_seed(0)
    ours = model()
    section = {key: value for key, value in MODEL.items() if key != "kind"}
    theirs = OpenQwen2VLConfig.model_validate(section)
    assert theirs.layout().fingerprint() == ours.layout().fingerprint()
    system, other = ours.build(), theirs.build()
    other.load_state_dict(system.state_dict())
    packed = batch([["red", "asked"], ["long"]], ours)
    assert_alike(step(other, [packed]), step(system, [packed]), 1e-6)


def test_pictures_or_clips_alone() -> None:
    pictures = model().layout()
    assert pictures.media() == ("image",) and model().build().media_towers.keys() == {"image"}
    clips = config(image=False)
    assert clips.layout().media() == ("video",) and list(clips.build().media_towers) == ["video"]
    fewer = model(connector={"kind": "tomeformer", "config": BERT, "r": 4})
    assert pictures.fingerprint() != fewer.layout().fingerprint()
    in_front = {**TEMPLATE, "bos_behind_media": False}
    assert pictures.fingerprint() != model(template=in_front).layout().fingerprint()


HERE = (
    "model.language={name: null, tokenizer: 'builtin:emoji', config: {model_type: opt, hidden_size: 2560, ffn_dim: 64, "
    "num_hidden_layers: 1, num_attention_heads: 32, word_embed_proj_dim: 2560}}",
    "model.connector={name: null, config: {}}",
    "model.template={bos: <s>, eos: <|im_end|>, pad: <|endoftext|>}",
)
"""A language model as wide as OPT-2.7B, a BERT of the published shape, a tokenizer that is in this repository."""


def test_what_the_recipes_train_at_published_sizes() -> None:
    """EVA-CLIP-g of timm and BERT-base on the meta device: what is trained is what the release trains."""
    config, pictures = (load_config(CONFIGS / f"{name}.yaml", HERE) for name in ("video", "image_104m"))
    for layout in (config.model.layout(), pictures.model.layout()):
        assert {one.count() for one in (layout.video,) if one} <= {(29, 4 * 256)}
        assert {one.tokens for one in (layout.image, layout.video) if one} == {29}
    assert config.model.media == ("video",) and pictures.model.media == ("image",)
    with torch.device("meta"):
        system: SimVLG = config.model.build(weights=False)
    freeze(system, config.train.params)
    trained = {name: p.numel() for name, p in system.named_parameters() if p.requires_grad}
    assert sum(count for name, count in trained.items() if ".temporal.0." in name) == 2 * (1408 * 256 + 256) + 1
    bert = (512 + 2 + 2) * 768 + 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    connector = 2 * 1408 + 1408 * 768 + 768 + bert + 768 * 2560 + 2560
    assert sum(trained.values()) == connector + 39 * (2 * (1408 * 256 + 256) + 1) and system.vision.block == 38
    freeze(system, pictures.train.params)
    assert sum(p.numel() for p in system.parameters() if p.requires_grad) == connector
    rows = pictures.train.batch_tokens // pictures.data.context_length
    assert rows == 1600 and rows % pictures.train.micro_batch == 0


# changes -> what the one line must say
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"connector": {"kind": "pool_mlp"}}, "connector.kind pool_mlp: pools grids"),
    ({"vision": {"name": "timm/vit_tiny_patch16_224", "resize": "native"}}, "vision.resize native: pictures are"),
    ({"image": False}, "image false: takes clips then"),
    ({"video": CLIPS, "vision": {**VISION, "merge": {"r": 2}}}, "video.temporal attention: joins frames place by"),
    ({"video": {**CLIPS, "temporal": "mean"}, "vision": {**VISION, "merge": {"r": 2}}}, "video.temporal mean: joins"),
    ({"video": {"temporal": "order"}}, "'attention', 'mean' or 'merge'"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=[line.split(":")[0] for _, line in WRONG])
def test_wrong_settings_are_said(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        model(**changes)
    assert line in str(error.value)


def test_a_tower_whose_blocks_are_not_known_takes_no_temporal_modules() -> None:
    with pytest.raises(ConfigError, match=r"vit_relpos_.* is no plain vision transformer"):
        config(vision={**VISION, "class_token": False, "name": "timm/vit_relpos_small_patch16_224"}).build()
