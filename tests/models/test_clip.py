"""CLIP and SigLIP on packed rows: features, tokens and weights are those of open_clip's own model, in and out."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from pairs_run import CAPTIONS, MODEL, SIGLIP, caption, png
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor

from mm import hub
from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.media import decode_image, draw_box
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Text
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import make_segment
from mm.errors import CheckpointError, ConfigError, DataError
from mm.models.released import open_clip as released
from mm.models.released.release import Repository
from mm.models.systems.clip.config import ClipConfig
from mm.models.systems.clip.model import Clip, pairs

NATIVE = {"causal": {}, "custom_text": {"custom_text": True, "quick_gelu": True}, "bidirectional": SIGLIP}
TEXTS = [
    *CAPTIONS, "", "   ", "don't DON'T 'S it'd've", "a1b22 3.14 1,000", "e\u0301cole \u00e9cole Å", "ﬁne “quotes”…",
    "a\u00a0b\u3000c", "&lt;b&gt; &amp;amp; &quot;", "schÃ¶n mojibake", "ΑΣ ΣΑΣ.", "İstanbul ſtraße ẞ", "١٢٣ ½ ⅷ",
    "हिन्दी ไทย 한국어", "👩\u200d👩\u200d👧 🇩🇪!!", "word " * 200, "#hash_tag @user http://a.b/c?d=e", "--''--",
    "\u200bzero\u200bwidth", "</w> <|endoftext|>", "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_clips_tokenizer_is_open_clips(name: str) -> None:
    ours, theirs = Tokenizer.load(f"open_clip/{name}"), open_clip.get_tokenizer(name)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert len(ours) == theirs.vocab_size == 49408
    assert [ours.id(token) for token in ours.around()] == theirs.all_special_ids  # type: ignore[arg-type]


def test_plain_text_gives_plain_tokens() -> None:
    """Where open_clip makes the token of it."""
    ours = Tokenizer.load("open_clip/ViT-B-32")
    assert 49407 not in ours.encode("<end_of_text>") and 49407 in open_clip.get_tokenizer("ViT-B-32").encode(
        "<end_of_text>"
    )
    assert ours.fingerprint() != Tokenizer(ours._backend, "uncleaned").fingerprint()
    with pytest.raises(DataError, match="did you mean 'ViT-B-32'"):
        Tokenizer.load("open_clip/ViT-B32")


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A folder with a tokenizer of transformers that ends texts and fills them up with tokens of its own."""
    known = ["<pad>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.lower().split()})]
    backend = Backend(models.WordLevel({word: id for id, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(known[:3])
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path / "words"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)


def test_a_tokenizer_of_the_hub_is_used_as_open_clip_uses_it(words: str) -> None:
    cleaned = {"hf_tokenizer_name": words, "tokenizer_kwargs": {"clean": "canonicalize"}}
    config = ClipConfig.model_validate({**SIGLIP, "text": {**SIGLIP["text"], "vocab_size": 200, **cleaned}})
    theirs = open_clip.tokenizer.HFTokenizer(words, context_length=12, clean="canonicalize")
    system = config.build().eval()
    with torch.no_grad():
        expected = system.clip.encode_text(theirs(TEXTS), normalize=True)
        torch.testing.assert_close(system.encode_texts(TEXTS), expected)
    assert config.layout().pad == 1 and config.layout().template.bos is None


def packs(layout: Layout, rows: list[list[tuple[int, ...]]], learned: bool = True) -> list[Pack]:
    """A row for each list of pairs; a pair is a caption and its pictures, by their numbers."""
    made = []
    for number, row in enumerate(rows):
        items = []
        for text, *pictures in row:
            parts = (*(Media("image", png(one), "png") for one in pictures), Text(caption(text), loss=learned))
            items.append((f"{number}#{text}", "s", make_segment(parts, layout, "test", Limits())))
        made.append(join_segments(items) if items else EMPTY)
    return made


def rows_of(config: ClipConfig, rows: list[list[tuple[int, ...]]], **options: Any) -> PackedBatch:
    layout = config.layout()
    return collate(packs(layout, rows), layout, 96, **options)


def theirs(system: Clip, config: ClipConfig, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Features by open_clip's model, tokenizer and pictures."""
    transform = open_clip.image_transform(32, False, mean=config.mean, std=config.std)
    pixels = torch.stack([transform(Image.open(io.BytesIO(png(number)))) for number in numbers])
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=12)([caption(number) for number in numbers])
    with torch.no_grad():
        return system.clip.encode_image(pixels, normalize=True), system.clip.encode_text(tokens, normalize=True)


@pytest.mark.parametrize("kind", NATIVE)
def test_features_are_open_clips(kind: str) -> None:
    """Of texts of all lengths, too long ones among them; in several rows, in order."""
    config = ClipConfig.model_validate({**MODEL, **NATIVE[kind]})
    torch.manual_seed(0)
    system = config.build().eval()
    batch = rows_of(config, [[(n, n) for n in row] for row in (range(3), range(3, 9), range(0), range(9, 10))])
    with torch.no_grad():
        found = system(batch)
    image, text = theirs(system, config, list(range(10)))
    torch.testing.assert_close(found.features["image"], image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.features["text"], text, rtol=1e-5, atol=1e-6)
    assert found.counts["contrastive"] == system.counts(batch)["contrastive"] == 10
    assert ("bias" in found.features) == (kind == "bidirectional")
    short = rows_of(config, [[(5, 5)]])
    width = system.texts(short, pairs(short)[1]).shape[1]
    assert width == (12 if kind == "bidirectional" else 4), "begin, `x`, its number and end"


def test_only_pairs_count() -> None:
    """A picture alone with its text, both of which could be read and are learned; in any order."""
    config = ClipConfig.model_validate(MODEL)
    torch.manual_seed(0)
    system = config.build().eval()
    layout = config.layout()
    made = packs(layout, [[(0, 0), (1,), (2, 2, 7)], [(3, 3)]])
    turned = make_segment((Text(caption(4)), Media("image", png(4), "png")), layout, "test", Limits())
    damaged = make_segment((Media("image", png(5)[:60], "png"), Text(caption(5))), layout, "test", Limits())
    made.append(join_segments([("turned", "s", turned), ("damaged", "s", damaged)]))
    made += packs(layout, [[(6, 6)]], learned=False)
    batch = collate(made, layout, 96, quarantine=True)
    with torch.no_grad():
        found = system(batch).features
    image, text = theirs(system, config, [0, 3, 4])
    torch.testing.assert_close(found["image"], image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["text"], text, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [[[(1,)]], [[]]], ids=["text alone", "padding"])
def test_without_pairs_all_weights_are_in_reach_all_the_same(rows: list[list[tuple[int, ...]]]) -> None:
    system = ClipConfig.model_validate(SIGLIP).build()
    output = system(rows_of(ClipConfig.model_validate(SIGLIP), rows))
    assert output.counts["contrastive"] == 0 and all(len(one) == 0 for one in output.features.values())
    torch.stack([one.sum() for one in output.features.values()]).sum().backward()
    assert all(parameter.grad is not None for parameter in system.parameters())


def test_the_scale_is_bounded_as_open_clip_bounds_it() -> None:
    """Brought back before a step, and never more than 100 in between; at the bound it still gets its gradient."""
    system = ClipConfig.model_validate(MODEL).build()
    batch = rows_of(ClipConfig.model_validate(MODEL), [[(0, 0), (1, 1)]])
    with torch.no_grad():
        system.clip.logit_scale.fill_(9.0)
        torch.testing.assert_close(system(batch).features["scale"], torch.full((2,), 100.0))
    system.begin_step(1, 10)
    system(batch).features["scale"].sum().backward()
    assert system.clip.logit_scale.item() == pytest.approx(4.6052, abs=1e-4)
    assert system.clip.logit_scale.grad.item() == pytest.approx(200)


def test_the_scale_of_sigmoids_is_free() -> None:
    """Published models have larger ones than 100."""
    system = ClipConfig.model_validate(SIGLIP).build()
    with torch.no_grad():
        system.clip.logit_scale.fill_(4.7215)
    system.begin_step(1, 10)
    found = system(rows_of(ClipConfig.model_validate(SIGLIP), [[(0, 0), (1, 1)]])).features["scale"]
    torch.testing.assert_close(found, torch.full((2,), math.exp(4.7215)))


@pytest.mark.parametrize("values", [MODEL, {**SIGLIP, "resize": "squash"}, {
    **MODEL, "vision": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
}], ids=["clip", "siglip", "timm"])  # fmt: skip
def test_out_to_open_clip_and_in_again(values: dict[str, Any], tmp_path: Path) -> None:
    config = ClipConfig.model_validate(values)
    torch.manual_seed(0)
    system = config.build().eval()
    out = tmp_path / "out"
    out.mkdir()
    released.write(system, config, out)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    state = system.clip.state_dict()
    assert model.state_dict().keys() == state.keys() and model.logit_scale.ndim == 0
    assert all(torch.equal(tensor.view_as(state[name]), state[name]) for name, tensor in model.state_dict().items())
    texts = open_clip.get_tokenizer(f"local-dir:{out}")(list(CAPTIONS))
    with torch.no_grad():
        expected = model.eval().encode_text(texts, normalize=True)
        torch.testing.assert_close(system.encode_texts(list(CAPTIONS)), expected)
        wide = Image.open(io.BytesIO(png(3))).resize((60, 40))
        file = io.BytesIO()
        wide.save(file, "PNG")
        pixels = torch.from_numpy(decode_image(file.getvalue(), config.layout().image.transform, "test"))
        torch.testing.assert_close(pixels, transform(wide))
        image = model.encode_image(pixels[None], normalize=True)
        torch.testing.assert_close(system.encode_pictures(pixels[None]), image)
    again, layout, about = hub.load(out, "cpu")
    assert isinstance(again, Clip) and again.loss == system.loss
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.clip.state_dict().items())
    assert layout.fingerprint() == config.layout().fingerprint()
    assert type(about.model).model_validate(about.model.model_dump()) == about.model
    # A state dict alone, as open_clip's trainer saves it.
    trained = {"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}
    torch.save(trained, tmp_path / "epoch_1.pt")
    filled = ClipConfig.model_validate({**values, "weights": tmp_path / "epoch_1.pt"}).build()
    assert all(torch.equal(tensor, state[name]) for name, tensor in filled.clip.state_dict().items())
    with pytest.raises(CheckpointError, match="not the weights"):
        ClipConfig.model_validate({**values, "embed_dim": 8, "weights": tmp_path / "epoch_1.pt"}).build()


DAMAGED = {
    "towers": ({"model_cfg": {"embed_dim": 8, "vision_cfg": [], "text_cfg": {}}}, "with embed_dim and two towers"),
    "pictures": ({"preprocess_cfg": [1]}, "expected an object as its preprocess_cfg"),
    "mean": ({"preprocess_cfg": {"mean": "grey"}}, "mean: "),
    "weights": ({}, "damaged, or no safetensors"),
    "scale": ({"preprocess_cfg": None}, r"shape +logit_scale|logit_scale +found \[2\]"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_folders_are_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, message = DAMAGED[what]
    config = ClipConfig.model_validate(MODEL)
    released.write(config.build(), config, tmp_path)
    about = json.loads((tmp_path / released.CONFIG).read_text())
    (tmp_path / released.CONFIG).write_text(json.dumps(about | changes))
    path = tmp_path / released.WEIGHTS[0]
    if what == "weights":
        path.write_bytes(path.read_bytes()[:100])
    elif what == "scale":
        save_file({**load_file(path), "logit_scale": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=message):
        hub.load(tmp_path, "cpu")


@pytest.mark.parametrize("name", ["a/CLIP-small", "a/siglip-small"])
def test_a_name_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, as it lies after a download."""
    place, commit = tmp_path / f"models--{name.replace('/', '--')}", "0" * 40
    for folder in (place / "refs", place / "snapshots" / commit):
        folder.mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    config = ClipConfig.model_validate(MODEL)
    released.write(config.build(), config, place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert isinstance(hub.load(name, "cpu")[0], Clip)
    assert released.found(Repository("a/other")) is None


def test_a_damaged_tokenizer_config_is_said(words: str) -> None:
    text = {"hf_tokenizer_name": words, "context_length": 12}
    for content in ('["<pad>"', '["<pad>"]'):
        (Path(words) / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer_config\.json is damaged"):
            ClipConfig.model_validate({**MODEL, "text": {**MODEL["text"], **text}}).layout()


def test_crops_of_training_lie_in_the_middle_square() -> None:
    """Of a picture three times as wide as high, they are all different."""
    boxes = [draw_box(300, 100, 0.5, np.random.default_rng(seed), middle=True) for seed in range(50)]
    assert len(set(boxes)) == 50
    for left, top, right, bottom in boxes:
        assert 100 <= left < right <= 200.001 and 0 <= top < bottom <= 100.001
        assert (right - left) * (bottom - top) >= 0.35 * 100**2


def test_a_text_tower_of_transformers(words: str) -> None:
    from transformers import RobertaConfig

    about = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaConfig(vocab_size=200, pad_token_id=0, **about).save_pretrained(words)
    settings = json.loads((Path(words) / "tokenizer_config.json").read_text())
    (Path(words) / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    text = {"hf_model_name": words, "hf_tokenizer_name": words, "hf_model_pretrained": False, "context_length": 12}
    config = ClipConfig.model_validate({**MODEL, "text": text})
    system = config.build().eval()
    expected = open_clip.tokenizer.HFTokenizer(words, context_length=12)(TEXTS)
    with torch.no_grad():
        wanted = system.clip.encode_text(expected, normalize=True)
        torch.testing.assert_close(system.encode_texts(TEXTS), wanted, rtol=1e-5, atol=1e-6)


def test_models_by_name() -> None:
    """What a name says, and what is set over it."""
    config = ClipConfig.model_validate({"name": "open_clip/ViT-B-16-SigLIP.webli", "vision": {"image_size": 256}})
    assert config.objective == "siglip" and config.tag == "webli" and config.image_size == 256
    assert config.values["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    small = {"vision": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 1}}
    config = ClipConfig.model_validate({"name": "open_clip/ViT-B-32", **small})
    assert config.objective == "clip" and config.layout().image.transform.size == 224  # type: ignore[union-attr]
    system = config.build(weights=False)
    assert system.clip.visual.conv1.weight.shape == (64, 3, 32, 32) and system.clip.text_projection.shape == (64, 512)


@pytest.mark.parametrize(("values", "reason"), [
    ({"name": "timm/vit"}, "open_clip/NAME"),
    ({"name": "open_clip/ViT-B-33"}, "did you mean"),
    ({"embed_dim": 8, "vision": {"layers": 1}}, "give a `name`"),
    ({"name": "open_clip/ViT-B-32.openai", "weights": "x.pt"}, "leave the tag or the file out"),
    ({"name": "open_clip/coca_ViT-B-32"}, "CoCa"),
    ({**MODEL, "text": {"hf_model_name": "roberta-base"}}, "hf_tokenizer_name"),
])  # fmt: skip
def test_wrong_settings_are_one_line(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ClipConfig.model_validate(values)


def test_weights_are_refused_with_other_settings_than_theirs() -> None:
    """Before anything is fetched."""
    for values, reason in [
        ({"name": "open_clip/ViT-B-32.nothing"}, "there are: openai, laion"),
        ({"name": "open_clip/ViT-B-32.laion2b_s34b_b79k", "mean": [0.5] * 3}, r"model.mean: .*0\.48145466"),
        ({"name": "open_clip/ViT-B-32.openai"}, "quick_gelu"),
    ]:
        small = {"vision": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 1}}
        with pytest.raises(ConfigError, match=reason):
            ClipConfig.model_validate({**values, **small}).build()
