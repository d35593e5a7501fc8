"""COSMO: shut gates are the language model alone, a picture reaches what stands behind it, packing is invisible."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from open_clip.loss import ClipLoss, SigLipLoss
from pydantic import ValidationError
from tiny_cosmo import FROZEN, LANGUAGE, MODEL, PAIRS, ROW, ROWS, batch, build, clip, model, open_gates, pack
from torch import Tensor

from mm.data.batch import IGNORE, PackedBatch, with_dummies
from mm.data.layout import FeatureShape
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError
from mm.models import backbone
from mm.models.experts import layers_of
from mm.models.gated import PerceiverResampler, TextQuery, insert_gated
from mm.models.systems.cosmo.config import CosmoConfig
from mm.models.systems.cosmo.model import Cosmo
from mm.models.vision import VisionTower
from mm.settings import KindSection, merge
from mm.train.blocks import DEFAULT_PATTERNS, checkpoint_activations, find_blocks
from mm.train.config import CheckpointingConfig, TrainConfig
from mm.train.distributed import World
from mm.train.guard import Guard
from mm.train.params import freeze, parameter_groups
from mm.train.step import Stepper, count, counted

CONFIGS = Path(__file__).parents[2] / "configs/cosmo"
NAMES = [name for row in ROWS for name in row]
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.2},
    "opt, narrow": {**SMALL, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.2,
                    "do_layer_norm_before": False, "max_position_embeddings": 128},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "llama": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
}  # fmt: skip


def of_family(name: str) -> dict[str, Any]:
    return {"tokenizer": "builtin:emoji", "config": {"model_type": name, **FAMILIES[name]}}


def everywhere(packed: PackedBatch) -> Tensor:
    return torch.arange(packed.input_ids.numel())


def with_other_pictures(packed: PackedBatch, items: slice = slice(None)) -> PackedBatch:
    """Some of the pictures are others."""
    media = packed.media["image"]
    values = media.values.view(len(media), -1).clone()
    values[items] = values[items].flip(1) + 1.0
    return replace(packed, media={"image": replace(media, values=values.flatten())})


@pytest.mark.parametrize("family", FAMILIES)
def test_with_shut_gates_it_is_the_language_model(family: str) -> None:
    """Bit for bit; with open gates it is not. The layers of every family are found, and take media along."""
    language = of_family(family)
    system = build(gate=None, language=language).eval()
    config = system.config
    torch.manual_seed(1)
    alone = backbone.load(config.language, len(config.layout().tokenizer)).eval()
    alone.load_state_dict({k: v for k, v in system.language.state_dict().items() if ".gated." not in k})
    packed = batch(ROWS, config)
    keep = everywhere(packed)
    with torch.no_grad():
        expected = backbone.run(alone, system.embed(packed), packed.segment_ids, packed.position_ids, keep, True)
        found = system.logits(packed, keep)
        assert torch.equal(found, expected)
        assert torch.equal(system.logits(with_other_pictures(packed), keep), expected)
        open_gates(system, 0.5)
        assert not torch.allclose(system.logits(packed, keep), expected)


def reached(system: Cosmo, packed: PackedBatch, items: slice) -> Tensor:
    """bool [B, L]: the positions whose logits change with some of the pictures."""
    keep = everywhere(packed)
    with torch.no_grad():
        change = system.logits(packed, keep) - system.logits(with_other_pictures(packed, items), keep)
    return (change.abs().amax(1) > 1e-6).view_as(packed.input_ids)


@pytest.mark.parametrize("immediate", [True, False])
def test_a_picture_reaches_what_stands_behind_it_in_its_document(immediate: bool) -> None:
    """Its own token on; not what is before, nor other documents. The text between carries it further on."""
    system = build(immediate=immediate).eval()
    packed = batch(ROWS, system.config)
    media = packed.media["image"]
    for item, (row, position) in enumerate(zip(media.row.tolist(), media.position.tolist(), strict=True)):
        here = torch.arange(packed.input_ids.shape[1]) >= position
        own = here & (packed.segment_ids[row] == packed.segment_ids[row, position])
        expected = torch.zeros_like(packed.input_ids, dtype=torch.bool)
        expected[row] = own
        found = reached(system, packed, slice(item, item + 1))
        assert not (found & ~expected).any() and found[row, position]
        assert found[row].sum() >= 0.9 * own.sum()


def test_a_picture_is_looked_at_by_its_chunk_or_by_all_behind_it() -> None:
    """What text carries on is cut off: every layer behind the first block is the identity."""
    for immediate in (True, False):
        system = build(immediate=immediate, interval=9).eval()
        for layer in system.language.base_model.layers[2:]:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                torch.nn.init.zeros_(layer.get_submodule(name).weight)
        packed = batch([["interleaved"]], system.config, None)
        first, second = packed.media["image"].position.tolist()
        found = reached(system, packed, slice(0, 1))[0].nonzero()[:, 0].tolist()
        last = packed.input_ids.shape[1] - 1
        assert found[0] == first and found[-1] == (second - 1 if immediate else last)


def total(system: Cosmo, batches: list[PackedBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Sums of losses, features of all pairs, and gradients of the loss of one step over all batches."""
    system.zero_grad()
    outputs = [system(one) for one in batches]
    features = {name: torch.cat([one.features[name] for one in outputs]) for name in outputs[0].features}
    losses = {
        "next_token": torch.stack([one.losses["next_token"] for one in outputs]).sum(),
        **system.pooled_losses(features),
    }
    counts = {name: sum(int(one.counts[name]) for one in outputs) for name in system.weights}
    assert counts["contrastive"] == len(features["image"])
    torch.stack([system.weights[name] * one / max(counts[name], 1) for name, one in losses.items()]).sum().backward()
    grads = {name: one.grad.clone() for name, one in system.named_parameters() if one.grad is not None}
    return losses, features, grads


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        error = float((found[name] - value).norm().detach() / (value.norm().detach() + 1e-8))
        assert error < tolerance or float(value.norm().detach()) < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "changes",
    [{}, {"immediate": False}, {"immediate": False, "faithful": True}, {"contrastive": {"width": 8, "loss": "siglip"}}],
    ids=["", "all", "faithful", "siglip"],
)
def test_packed_is_one_by_one(changes: dict[str, Any]) -> None:
    """Losses, features and gradients, of all parts trained."""
    system = build(**changes)
    packed = [batch(ROWS, system.config)]
    alone = [batch([[name]], system.config, None) for name in NAMES]
    losses, features, grads = total(system, packed)
    wanted, of_each, wanted_grads = total(system, alone)
    assert len(features["image"]) == len(PAIRS)
    assert_alike(losses, wanted, 1e-5)
    assert_alike(features, of_each, 1e-5)
    assert_alike(grads, wanted_grads, 1e-4)
    assert grads.keys() == dict(system.named_parameters()).keys()


def test_the_objectives_are_transformers_and_open_clips() -> None:
    """A pair by itself through transformers' own loss; all pairs through open_clip's."""
    for kind in ("clip", "siglip"):
        system = build(contrastive={"width": 8, "loss": kind, "weight": 0.5})
        losses, features, _ = total(system, [batch(ROWS, system.config)])
        image, text = features["image"], features["text"]
        torch.testing.assert_close(image.norm(dim=1), torch.ones(len(PAIRS)))
        scale = system.temperature.exp()
        theirs = ClipLoss()(image, text, scale) if kind == "clip" else SigLipLoss()(image, text, scale, system.bias)
        torch.testing.assert_close(losses["contrastive"], len(PAIRS) * theirs)
        assert float(scale.detach()) == pytest.approx(1 / 0.07 if kind == "clip" else 10)
    one = batch([["pair"]], system.config, None)
    labels = torch.full_like(one.input_ids, IGNORE)
    labels[:, 1:] = one.labels[:, :-1]
    system.language.set_attn_implementation("eager")
    expected = system.language(
        inputs_embeds=system.embed(one), labels=labels, media=system.media_seen(one), use_cache=False
    ).loss
    system.language.set_attn_implementation("mm_packed")
    output = system(one)
    torch.testing.assert_close(output.losses["next_token"] / output.counts["next_token"], expected)


def test_what_a_picture_and_a_text_are_to_each_other() -> None:
    """The first latent of the resampler; the query over the output of the unimodal half, or of one layer less."""
    for faithful in (False, True):
        system = build(faithful=faithful, unimodal=3)
        one = batch([["another"]], system.config, None)
        features = system(one).features
        hidden = system.language.base_model(
            inputs_embeds=system.embed(one), media=system.media_seen(one), use_cache=False, output_hidden_states=True,
            packing=backbone.attention.packing(one.segment_ids), position_ids=one.position_ids,
        ).hidden_states[2 if faithful else 3]  # fmt: skip
        query = system.text_query
        latent = query.latent[None] + query.attn(hidden, query.latent[None])
        text = F.normalize(system.text_projection(query.norm((latent + query.ff(latent))[0])), dim=-1)
        torch.testing.assert_close(features["text"], text, rtol=1e-5, atol=1e-6)
        patches = system.vision(one.media["image"])[None]
        image = F.normalize(system.image_projection(system.resampler(patches)[:, 0]), dim=-1)
        torch.testing.assert_close(features["image"], image, rtol=1e-5, atol=1e-6)
        assert float(features["scale"].detach()) == pytest.approx(1.2214 if faithful else 14.2857, rel=1e-4)
        scale = system.language.base_model.layers[3].gated.attn.scale
        assert scale == (64 if faithful else 16) ** -0.5


def test_the_text_of_a_pair_does_not_see_the_picture() -> None:
    system = build()
    packed = batch(ROWS, system.config)
    found, other = system(packed).features, system(with_other_pictures(packed)).features
    assert torch.equal(found["text"], other["text"]) and not torch.allclose(found["image"], other["image"])


def test_pictures_and_texts_are_encoded_apart_as_in_a_pair() -> None:
    """For retrieval and zero-shot classification."""
    system = build()
    packed = batch([["pair", "another"], ["third"]], system.config)
    features = system(packed).features
    pictures = system.encode_pictures(packed.media["image"].stacked())
    torch.testing.assert_close(pictures, features["image"], rtol=1e-5, atol=1e-6)
    texts = system.encode_texts(["a longer text than that", "a red fox"])
    torch.testing.assert_close(texts[1], features["text"][0], rtol=1e-5, atol=1e-6)


def test_pairs_have_one_medium_and_text_that_is_learned() -> None:
    system = build()
    packed = batch(ROWS, system.config)
    assert int(system.counts(packed)["contrastive"]) == len(PAIRS) == len(system(packed).features["image"])
    pairs = system._pairs(packed)
    layout = system.config.layout()
    media = packed.media["image"]
    numbers = torch.stack([pairs.media, pairs.start, pairs.length], dim=1).tolist()
    for item, start, length in numbers:
        row, position = int(media.row[item]), int(media.position[item])
        (name,) = {packed.ids[row][int(packed.segment_ids[row, position]) - 1]} & set(PAIRS)
        assert length == len(pack([name], layout).tokens) and start <= row * ROW + position < start + length
    # A row is of one source.
    chosen = model(contrastive={"width": 8, "sources": ["third"]}).build()
    apart = batch([[name] for name in NAMES], system.config)
    assert int(system.counts(apart)["contrastive"]) == 3 and int(chosen.counts(apart)["contrastive"]) == 1
    broken = replace(packed, labels=torch.where(packed.segment_ids == 1, IGNORE, packed.labels))
    assert int(system.counts(broken)["contrastive"]) == 1, "as of pictures that cannot be read"


def test_the_language_model_reads_a_token_for_every_picture() -> None:
    system = build()
    packed = batch(ROWS, system.config)
    layout = system.config.layout()
    slots = packed.media["image"].slots(ROW)
    assert (packed.input_ids.flatten()[slots] == layout.pad).all() and len(slots) == 8
    embedded = system.embed(packed).flatten(0, 1)
    weight = system.language.get_input_embeddings().weight
    assert torch.equal(embedded[slots], weight[layout.tokenizer.id("<visual>")].expand(len(slots), -1))
    others = torch.ones(len(embedded), dtype=torch.bool)
    others[slots] = False
    assert torch.equal(embedded[others], weight[packed.input_ids.flatten()[others]])
    tokens = [layout.tokenizer.token(id) for id in packed.input_ids[0, :2].tolist()]
    ends = [layout.tokenizer.token(id) for id in packed.labels[packed.labels != IGNORE].tolist()].count(
        "<|endofchunk|>"
    )
    assert tokens[0] == "<s>" and ends == len(NAMES) - 1, "of all but the document that is not learned"


@pytest.mark.parametrize("frames", [None, 2])
def test_a_rank_without_media_gives_zeros_that_touch_all(frames: int | None) -> None:
    """Dummies change nothing, and every parameter has a gradient as on ranks that have media."""
    system = build(frames=frames)
    layout = system.config.layout()
    for rows in ([["no picture"]], [[]]):
        plain = batch(rows, system.config)
        dummies = with_dummies(plain, layout)
        assert set(dummies.media) == ({"image"} if frames is None else {"image", "video"})
        system.zero_grad()
        output = system(dummies)
        assert torch.equal(output.losses["next_token"], system(plain).losses["next_token"])
        losses = {**output.losses, **system.pooled_losses(output.features)}
        assert float(losses["contrastive"].detach()) == 0 and output.features["text"].shape == (0, 8)
        torch.stack(list(losses.values())).sum().backward()
        assert not [name for name, parameter in system.named_parameters() if parameter.grad is None]
        for part in (system.resampler, system.text_query, system.image_projection):
            assert not any(parameter.grad.any() for parameter in part.parameters())


def test_clips_are_seen_as_pictures_are() -> None:
    """All patches of all frames are one axis of the resampler; a clip is one position."""
    system = build(frames=2)
    layout = system.config.layout()
    assert layout.video is not None and layout.video.count() == (1, 8)
    packed = batch([["no picture", "pair"]], system.config, None)
    with_clip = replace(packed, media={**packed.media, "video": clip(2, 0, 1)})
    assert int(system.counts(with_clip)["contrastive"]) == 2
    features = system(with_clip).features
    (video,) = system.connect("video", system.features("video", with_clip.media["video"]))
    frames = with_clip.media["video"].items()[0]
    patches = torch.cat([system.vision.of_squares(frame[None])[0] for frame in frames])
    torch.testing.assert_close(video, system.resampler(patches[None])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features["image"][1], F.normalize(system.image_projection(video[0]), dim=-1))
    keep = everywhere(packed)
    change = (system.logits(with_clip, keep) - system.logits(packed, keep)).abs().amax(1) > 1e-4
    text = len(pack(["no picture"], layout).tokens)
    assert not change[0] and change[1:text].all() and not change[text:].any()


def test_what_towers_give_may_be_known() -> None:
    """As `mm data encode` keeps it, rows for every item, however many positions it takes."""
    system = build(frames=2)
    assert {name: tower.shape for name, tower in system.media_towers.items()} == {
        "image": FeatureShape(24, 4), "video": FeatureShape(24, 8),
    }  # fmt: skip
    packed = batch(ROWS, system.config)
    media = packed.media["image"]
    features = system.features("image", media)
    assert len(features) == 4 * len(media)
    known = replace(packed, media={"image": replace(media, values=torch.empty(0), features=features)})
    found, expected = system(known), system(packed)
    assert torch.equal(found.losses["next_token"], expected.losses["next_token"])
    assert torch.equal(found.features["image"], expected.features["image"])


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "open_clip/ViT-B-32"])
def test_patches_are_behind_the_final_norm(name: str) -> None:
    """As open_clip's `output_tokens` has them, class token left out."""
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    if name.startswith("open_clip/"):
        options = {"patch_size": 8, "width": 24, "layers": 2, "head_width": 12}
    vision = {**MODEL["vision"], "name": name, "options": options}
    config = model(vision=vision)
    tower = VisionTower(config.vision)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pixels = torch.randn(2, 3, 16, 16)
    featurizer: Any = tower.featurizer
    if name.startswith("open_clip/"):
        featurizer.output_tokens = True
        expected = featurizer(pixels)[1]
    else:
        expected = featurizer.forward_features(pixels)[:, 1:]
    torch.testing.assert_close(tower.of_squares(pixels), expected, rtol=1e-5, atol=1e-5)
    clips = tower.of_clips(pixels[None])
    torch.testing.assert_close(clips[0], expected, rtol=1e-5, atol=1e-5)


def test_blocks_may_be_computed_again() -> None:
    """With everything trained, so that the text's gradient goes through recomputed layers."""
    system = build(frames=2)
    packed = batch(ROWS, system.config)
    packed = replace(packed, media={**packed.media, "video": clip(2, 1, 3)})
    again = copy.deepcopy(system)
    checkpoint_activations(again, CheckpointingConfig(mode="full"), find_blocks(again, DEFAULT_PATTERNS))
    for found, expected in zip(total(again, [packed]), total(system, [packed]), strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


class SGDConfig(KindSection):
    kind: str = "test_cosmo:SGDConfig"
    lr: float

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr)


def stepped(system: Cosmo, batches: list[PackedBatch], rules: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the parameters of one step of the trainer's own, by plain gradient descent."""
    train = TrainConfig.model_validate({
        "device": "cpu", "optimizer": {"kind": "test_cosmo:SGDConfig", "lr": 0.5}, "params": rules, "clip_norm": None,
    })  # fmt: skip
    world = World.from_environment()
    engine = train.engine.build(world, train)
    world.start(engine.device, 60, engine.group)
    try:
        freeze(system, train.params)
        engine.prepare(system, lambda one: parameter_groups(one, train.params, 0.0), len(batches))
        stepper = Stepper(engine, system.config.layout(), Guard(train.guard), 0, None, NAMES)
        totals = counted(system, count(system, batches, NAMES), NAMES)
        loss = stepper(batches, totals, 0, 0.5).loss
    finally:
        world.stop()
    return loss, {name: one.detach().clone() for name, one in system.named_parameters()}


def test_however_a_step_is_split_it_is_the_same() -> None:
    """4, 2 x 2 and 1 x 4 rows; some micro-batches have no pair, or no picture."""
    system = build()
    rows = [["pair", "interleaved"], [], ["third", "another"], ["no picture"]]
    loss, expected = stepped(copy.deepcopy(system), [batch(rows, system.config)], FROZEN)
    before = dict(system.named_parameters())
    assert any(not torch.equal(before[name], value) for name, value in expected.items())
    for size in (2, 1):
        parts = [batch(rows[n : n + size], system.config) for n in range(0, 4, size)]
        found_loss, found = stepped(copy.deepcopy(system), parts, FROZEN)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        updates = {name: found[name] - before[name] for name in expected}
        assert_alike(updates, {name: value - before[name] for name, value in expected.items()}, 1e-4)


TRAINED = {"resampler", "gated", "text_query", "image_projection", "text_projection", "temperature"}


@pytest.mark.parametrize("recipe", ["base_18m", "base_180m", "cosmo_2b", "cosmo_3.4b", "cosmo_8.1b"])
def test_what_a_recipe_trains_is_what_was_published(recipe: str) -> None:
    """A step with its freezing changes each of these parameters, and no bit of all others."""
    rules = read(recipe)["train"]["params"]
    system = build()
    before = {name: one.detach().clone() for name, one in system.named_parameters()}
    _, after = stepped(system, [batch(ROWS, system.config)], rules)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, one in system.named_parameters() if one.requires_grad}
    assert {"gated" if ".gated." in name else name.split(".")[0] for name in trained} == TRAINED
    assert changed == trained


def read(recipe: str) -> dict[str, Any]:
    """A recipe with what it extends."""
    values: dict[str, Any] = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    base = values.pop("extends", None)
    return values if base is None else merge(read(Path(base).stem), values)


def test_new_tokens_learn_alone() -> None:
    """Nothing changes before they have; then their rows change as they would in a model that is trained, and no bit of
    the others."""
    packed = batch(ROWS)
    for tied in (True, False):
        language = {**LANGUAGE, "config": {**LANGUAGE["config"], "tie_word_embeddings": tied}}
        system = build(language=language)
        own = build(language=language, train_new_tokens=True)
        new = own.new_tokens
        assert new is not None
        first = len(Tokenizer.load("builtin:emoji"))
        assert new.first == first and len(new.embedding) == len(system.config.layout().tokenizer) - first == 2
        own.load_state_dict(system.state_dict(), strict=False)
        with torch.no_grad():
            new.embedding.copy_(own.language.get_input_embeddings().weight[first:])
            if not tied:
                new.head.copy_(own.language.get_output_embeddings().weight[first:])
        losses, features, wanted = total(system, [packed])
        found, found_features, grads = total(own, [packed])
        assert_alike(found, losses, 1e-5)
        assert_alike(found_features, features, 1e-5)
        names = {"embedding": "language.model.embed_tokens.weight", "head": "language.lm_head.weight"}
        for part, name in names.items():
            if part == "embedding" or not tied:
                assert_alike({part: grads[f"new_tokens.{part}"]}, {part: wanted[name][first:]}, 1e-4)
        keep = everywhere(packed)
        torch.testing.assert_close(own.logits(packed, keep), system.logits(packed, keep), rtol=1e-5, atol=1e-5)
        _, after = stepped(own, [packed], FROZEN)
        before = dict(system.named_parameters())
        frozen = [name for name in before if name.startswith("language.") and ".gated." not in name]
        assert all(torch.equal(after[name], before[name]) for name in frozen)
        assert not torch.equal(after["new_tokens.embedding"], before[names["embedding"]][first:])


def test_new_tokens_have_to_be_new() -> None:
    """A tokenizer that has all that is named has no rows to train."""
    template = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
    with pytest.raises(ConfigError, match="train_new_tokens: the tokenizer has all tokens already"):
        build(visual_token="<|endofchunk|>", template=template, train_new_tokens=True)


OPT = {
    "model_type": "opt", "hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192, "num_attention_heads": 32,
    "word_embed_proj_dim": 2048,
}  # fmt: skip
NEOX = {"model_type": "gpt_neox", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32}


@pytest.mark.parametrize(("recipe", "language", "blocks", "millions"), [
    ("base_18m", OPT, 12, 542.8), ("base_180m", OPT, 6, 212.5), ("cosmo_2b", OPT, 12, 322.7),
    ("cosmo_3.4b", NEOX, 8, 347.0), ("cosmo_8.1b", MISTRAL, 8, 487.3),
])  # fmt: skip
def test_recipes_have_the_published_shapes(recipe: str, language: dict[str, Any], blocks: int, millions: float) -> None:
    """What is trained, on the meta device, in language models of the size that each names."""
    config = CosmoConfig.model_validate(read(recipe)["model"])
    assert config.vision.patches == 256 and config.contrastive.width == 512
    with torch.device("meta"):
        model: Any = backbone.from_config(language, "sdpa")
        insert_gated(model, config, 1024)
        resampler = PerceiverResampler(1024, config.resampler.latents, config.resampler.depth, config.resampler.heads)
        parts = [resampler, TextQuery(language["hidden_size"])]
    layers = layers_of(getattr(model.base_model, "decoder", model), "")
    assert resampler.latents.shape == (65, 1024)
    assert not any(hasattr(layer, "gated") for layer in layers[: config.unimodal])
    gated = [layer.gated for layer in layers if hasattr(layer, "gated")]
    assert len(gated) == blocks and config.unimodal == len(layers) // 2
    trained = sum(parameter.numel() for part in (*gated, *parts) for parameter in part.parameters())
    trained += 512 * (1024 + language["hidden_size"]) + 1
    assert trained / 1e6 == pytest.approx(millions, abs=0.1)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"faithful": True, "unimodal": 1}, "expected 2 or more"),
    ({"ratio": 3}, "Input should be 1, 2, 4 or 8"),
    ({"vision": {**MODEL["vision"], "resize": "native"}}, "the resampler takes squares"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_wrong_settings_are_said(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        model(**changes)
    assert line in str(error.value)


def test_a_language_model_without_an_upper_half_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.unimodal 4: the language model has 4 layers"):
        model(unimodal=4).build()


def test_a_tower_without_a_final_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.vision.norm: timm/convnext_atto has no final layer norm"):
        model(vision={**MODEL["vision"], "name": "timm/convnext_atto", "options": {}, "patch_size": 32}).build()
