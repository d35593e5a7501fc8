"""Released checkpoints: read strictly and without running anything, written back bit for bit, fine-tuned in between."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_release import TOWER, Prismatic, picture, qwen_like_tokenizer, row_of, write_release
from tiny_run import TINY
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mm
from mm.cli import main
from mm.config import RunConfig, load_config
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.media import decode_image
from mm.data.sample import Media, Text, Turn
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import make_segment
from mm.errors import CheckpointError, ConfigError
from mm.hub import export
from mm.models import answers, released
from mm.models.generate import generate
from mm.models.prompts import Decoding, chat_prompt, raw_prompt
from mm.models.released import llava, prismatic
from mm.models.released.chat_templates import jinja
from mm.models.released.release import fit
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
from mm.train.stages import initial_tensors, take_over

LANGUAGE = "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.fixture(scope="module")
def theirs() -> Prismatic:
    return Prismatic(144)


@pytest.fixture(scope="module")
def kept(theirs: Prismatic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with its tower, which tests only read."""
    return write_release(tmp_path_factory.mktemp("kept") / "release", theirs)


@pytest.fixture(scope="module")
def llava_folder(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llava") / "out"
    export(kept, out, to="hf-llava", tokens=729)
    return out


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(kept, tmp_path / "release"))


def tensors(system: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in system.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def pixels(layout: Layout, *pictures: Media) -> Tensor:
    assert layout.image is not None
    values = [torch.from_numpy(decode_image(one.read(), layout.image.transform, "test")) for one in pictures]
    return torch.stack(values)


def checkpoint_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / "checkpoints/latest-checkpoint.pt", weights_only=True)["model"]  # type: ignore[no-any-return]


def save_checkpoint(folder: Path, modules: dict[str, dict[str, Tensor]]) -> None:
    torch.save({"model": modules}, folder / "checkpoints/latest-checkpoint.pt")


@pytest.mark.parametrize("vision", [True, False])
def test_a_release_loads_with_its_tower_or_timms(vision: bool, theirs: Prismatic, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release", theirs, vision)
    system, layout, config = mm.load(folder, device="cpu")
    found = tensors(system)
    names = {"vision_backbone": "vision.", "projector": "connector.", "llm_backbone": "language."}
    expected = {
        names[module] + name.replace("mlp_projector.", "mlp.").removeprefix("llm."): tensor
        for module, part in theirs.modules().items()
        for name, tensor in part.items()
    }
    assert_same(found, expected)
    model = config.model
    assert (model.vision.image_size, model.vision.block, model.connector.tokens) == (384, -2, 144)
    assert layout.image is not None and layout.image.tokens == 144 and layout.template.chat == "release"
    # Appended in the order of the repository's tokenizer, into rows that the model has to spare.
    assert [layout.tokenizer.id(token) for token in ("<|endofchunk|>", "<s>")] == [4096, 4097]
    assert len(layout.tokenizer) == 4098 < found["language.model.embed_tokens.weight"].shape[0]


@pytest.mark.parametrize("tokens", [144, 729])
def test_it_writes_what_the_published_forward_writes(tokens: int, tmp_path: Path) -> None:
    theirs = Prismatic(tokens, seed=3)
    system: Any
    system, layout, _ = mm.load(write_release(tmp_path / "release", theirs), device="cpu")
    pictures = [picture(5), picture(6, 40, 60)]
    end = layout.tokenizer.id("<|im_end|>")
    prompts = [raw_prompt("<image>\nQuestion: what? <image> Answer:", pictures), chat_prompt("What?", pictures[:1])]
    written = generate(system, layout, prompts, Decoding(max_new_tokens=6))
    for prompt, text in zip(prompts, written, strict=True):
        ids, _ = row_of(make_segment(prompt, layout, "test", Limits(), closed=False))
        shown = [part for part in prompt if isinstance(part, Media)]
        expected = theirs.greedy(ids, pixels(layout, *shown), 6, end)
        assert text == layout.tokenizer.decode(expected).strip() and expected


def test_templates_by_name(kept: Path, theirs: Prismatic, tmp_path: Path) -> None:
    chats = {name: mm.load(kept, "cpu", template=name)[1].template.chat for name in ("release", "fixed", "chatml")}
    assert chats == {name: name for name in chats}
    base = write_release(tmp_path / "base", theirs, stage="pretrain")
    _, layout, config = mm.load(base, "cpu")
    assert (layout.template.chat, answers.form_of(config)) == ("chatml", "raw")
    assert answers.form_of(mm.load(kept, "cpu", template="chatml")[2]) == "chat"
    with pytest.raises(ConfigError, match="template"):
        mm.load(kept, "cpu", template="nosuch")


def test_another_number_of_tokens_is_the_same_weights(kept: Path) -> None:
    system, layout, _ = mm.load(kept, "cpu", tokens=729)
    assert layout.image is not None and layout.image.tokens == 729
    assert_same(tensors(system), tensors(mm.load(kept, "cpu")[0]))
    with pytest.raises(ConfigError, match="square number"):
        mm.load(kept, "cpu", tokens=730)


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.made,))


@pytest.mark.parametrize("how", ["torch", "pickle", "torch without zip"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(how: str, folder: Path, tmp_path: Path) -> None:
    path, made = folder / "checkpoints/latest-checkpoint.pt", tmp_path / "made"
    values = {"model": {"projector": Hostile(made), "llm_backbone": {}}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(values))
    else:
        torch.save(values, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"was not loaded and nothing in it was run") as caught:
        mm.load(folder, "cpu")
    assert not made.exists() and "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Hostile(made)))
    assert made.exists()  # it would have


def test_a_damaged_checkpoint_is_one_line(folder: Path) -> None:
    path = folder / "checkpoints/latest-checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="damaged, or not saved by torch") as caught:
        mm.load(folder, "cpu")
    assert "\n" not in str(caught.value)
    torch.save({"model": {"projector": [1]}}, path)
    with pytest.raises(CheckpointError, match="as prismatic writes it"):
        mm.load(folder, "cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoints/latest-checkpoint\.pt in this folder"):
        mm.load(folder, "cpu")


def test_all_that_does_not_fit_is_in_one_table(folder: Path) -> None:
    modules = checkpoint_of(folder)
    modules["projector"]["mlp_projector.0.bias"] = torch.zeros(7)
    modules["projector"]["mlp_projector.4.bias"] = torch.zeros(3)
    modules["head"] = {"weight": torch.zeros(1)}
    for layer in range(2):
        del modules["llm_backbone"][f"llm.model.layers.{layer}.mlp.up_proj.weight"]
    del modules["llm_backbone"]["llm.model.norm.weight"]
    save_checkpoint(folder, modules)
    with pytest.raises(CheckpointError) as caught:
        mm.load(folder, "cpu")
    head, *rows = [re.split(r" {2,}", line.strip()) for line in str(caught.value).splitlines()]
    assert "nothing was loaded" in head[0]
    assert sorted(rows) == sorted(
        [
            ["shape", "projector mlp_projector.0.bias", "found [7], expected [32]"],
            ["missing", "llm_backbone llm.model.layers.*.mlp.up_proj.weight (2 tensors)", "expected [64, 32]"],
            ["missing", "llm_backbone llm.model.norm.weight", "expected [32]"],
            ["unexpected", "projector mlp_projector.4.bias", "found [3]"],
            ["unexpected", "head weight", "found [1]"],
        ]
    )


def test_a_tied_head_may_be_there_once_or_twice_but_not_differ(folder: Path, kept: Path) -> None:
    modules = checkpoint_of(folder)
    head, embeddings = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    for gone in (head, embeddings):
        left = {name: tensor for name, tensor in modules["llm_backbone"].items() if name != gone}
        save_checkpoint(folder, {**modules, "llm_backbone": left})
        assert_same(tensors(mm.load(folder, "cpu")[0]), tensors(mm.load(kept, "cpu")[0]))
    modules["llm_backbone"][head] = modules["llm_backbone"][embeddings] + 1
    save_checkpoint(folder, modules)
    with pytest.raises(CheckpointError, match=rf"not equal +llm_backbone {head} +to llm_backbone {embeddings}"):
        mm.load(folder, "cpu")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vision_backbone_id", "clip-vit-l", r"'clip-vit-l' is unknown here; known: siglip-vit-b16-224px"),
        ("llm_backbone_id", "phi3-3b", r"'phi3-3b' is unknown here; known: qwen2.5-1.5b, "),
        ("arch_specifier", "gelu-mlp", r"'gelu-mlp' is unknown here; known: …\+avgpool \(144 tokens\)"),
        ("image_resize_strategy", "letterbox", r"'letterbox'; pictures are resized to a square"),
    ],
)
def test_what_is_unknown_is_said_with_what_is_known(key: str, value: str, words: str, folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    about["model"][key] = value
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=words):
        mm.load(folder, "cpu")


def test_without_network_the_towers_place_is_named(folder: Path) -> None:
    modules = checkpoint_of(folder)
    tower = modules.pop("vision_backbone")
    save_checkpoint(folder, modules)
    place = folder / f"timm/{TOWER}.webli"
    with pytest.raises(CheckpointError) as caught:
        mm.load(folder, "cpu")
    text = str(caught.value)
    assert f"put model.safetensors of https://huggingface.co/timm/{TOWER}.webli into {place}/" in text
    assert "\n" not in text
    save_file({n.removeprefix("featurizer."): t.clone() for n, t in tower.items()}, place / "model.safetensors")
    mm.load(folder, "cpu")


def test_names_that_are_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder, and the hub does not give its config\.json"):
        mm.load("nobody/nothing-of-that-name")
    with pytest.raises(CheckpointError, match=r"no such folder, and it is no name on the hub \(OWNER/NAME\)"):
        mm.load(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CheckpointError, match="neither that of an Open-Qwen2VL release"):
        mm.load(tmp_path)


def test_export_to_prismatic_is_the_same_release(kept: Path, tmp_path: Path) -> None:
    assert main(["export", str(kept), "--out", str(tmp_path / "out"), "--to", "prismatic"]) == 0
    before, after = checkpoint_of(kept), checkpoint_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for module, part in before.items():
        assert_same(part, after[module])
    about = [json.loads((folder / "config.json").read_text())["model"] for folder in (kept, tmp_path / "out")]
    assert {**about[0], "model_id": "out"} == about[1]
    first, second = (mm.load(folder, "cpu", template="fixed") for folder in (kept, tmp_path / "out"))
    assert first[1].fingerprint() == second[1].fingerprint()
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        export(kept, tmp_path / "other", to="prismatic")


def test_a_tokenizer_that_is_not_the_published_one_is_written(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model's name; and refused where the tokens that every reader adds have no rows."""
    system: Any
    system, layout, config = mm.load(kept, "cpu")
    named = config.model.language.model_copy(update={"name": LANGUAGE})
    model = config.model.model_copy(update={"language": named})

    def written(name: str, *added: str) -> Path:
        changed = replace(layout, tokenizer=Tokenizer.load(str(kept / LANGUAGE), added))
        prismatic.write(system, changed, model, tmp_path / name, name, "raw")
        return tmp_path / name

    _, again, about = mm.load(written("other", *prismatic.ADDED_TOKENS, "<|extra|>"), "cpu")
    assert again.tokenizer.id("<|extra|>") == 4098 and answers.form_of(about) == "raw"
    monkeypatch.chdir(kept)  # where a folder stands for the repository of that name
    assert (written("another", *prismatic.ADDED_TOKENS, "<|extra|>") / LANGUAGE).is_dir()
    assert not (written("same", *prismatic.ADDED_TOKENS) / LANGUAGE).exists()
    with pytest.raises(ConfigError, match="4,226 tokens, and the model has 4,224 embedding rows"):
        written("full", *(f"<|{number}|>" for number in range(128)))


def test_export_to_llava_and_back_is_the_same_model(kept: Path, llava_folder: Path) -> None:
    again, layout, config = mm.load(llava_folder, "cpu")
    system, before, _ = mm.load(kept, "cpu", tokens=729)
    assert_same(tensors(again), tensors(system))
    assert layout.template == before.template and layout.image == before.image
    assert config.model.vision.options == {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 179.5 / 48}
    # Names as published folders have them, which other readers know.
    names = load_file(llava_folder / "model.safetensors")
    assert {"language_model.model.norm.weight", "vision_tower.vision_model.head.probe"} <= names.keys()
    assert json.loads((llava_folder / "config.json").read_text())["text_config"]["rope_theta"] == 10000
    assert sorted(path.name for path in llava_folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_llava_folder_in_several_files(llava_folder: Path, tmp_path: Path) -> None:
    """As models over 5 GB are written, and with the names of transformers 5 as well as with the published ones."""
    folder = Path(shutil.copytree(llava_folder, tmp_path / "llava"))
    (folder / "model.safetensors").unlink()
    stock: Any = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype="float32")
    stock.save_pretrained(tmp_path / "stock", max_shard_size="200KB")
    for path in (tmp_path / "stock").glob("model*"):
        shutil.copy(path, folder)
    expected = tensors(mm.load(llava_folder, "cpu")[0])
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(tensors(mm.load(folder, "cpu")[0]), expected)
    llava._as_published(folder)
    assert_same(tensors(mm.load(folder, "cpu")[0]), expected)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "vision_tower.vision_model.head.probe" in index and "vision_tower.head.probe" not in index


def test_a_llava_folder_of_another_kind_is_refused(llava_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava_folder, tmp_path / "llava"))
    about = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "model_type is 'clip_vision_model'"),
    ):
        (folder / "config.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(CheckpointError, match=words):
            mm.load(folder, "cpu")
    (folder / "config.json").write_text(json.dumps(about))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("linear_1.bias"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*linear_1\.bias"):
        mm.load(folder, "cpu")


def test_stock_transformers_writes_the_same(llava_folder: Path, kept: Path) -> None:
    system: Any
    system, layout, _ = mm.load(kept, "cpu", tokens=729)
    processor = AutoProcessor.from_pretrained(llava_folder, backend="pil")
    stock: Any = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype="float32").eval()
    image = picture(7)
    expected = generate(system, layout, [chat_prompt("What is this?", [image])], Decoding(max_new_tokens=8))
    parts = [
        {"type": "image", "image": Image.open(io.BytesIO(image.read()))},
        {"type": "text", "text": "What is this?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(inputs["pixel_values"], pixels(layout, image))
    ids = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == expected[0] != ""


def test_without_a_spare_row_one_is_added(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A copy of the pad token's, which generation suppresses; a tower without a pooling head."""
    short = ["train.max_steps=1", "data.test=[]", "evaluation.every=0", "model.connector.tokens=16"]
    assert main(["train", str(tiny()), *short]) == 0
    export(tmp_path / "run", tmp_path / "out", to="hf-llava")
    before, after = (tensors(mm.load(tmp_path / name, "cpu")[0]) for name in ("run", "out"))
    longer = {name for name in before if before[name].shape != after[name].shape}
    assert longer == {"language.model.embed_tokens.weight", "language.lm_head.weight"}
    rows = after["language.lm_head.weight"]
    assert len(rows) == 4097 and torch.equal(rows[-1], rows[0])  # the pad token is the first
    assert_same(before, {name: tensor[:4096] if name in longer else tensor for name, tensor in after.items()})
    stock: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="float32")
    assert stock.generation_config.suppress_tokens == [4096] == [stock.config.image_token_index]


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4112,
}  # fmt: skip


def with_language(kind: str, **settings: Any) -> OpenQwen2VLConfig:
    """The tiny model with another language model."""
    language = {"tokenizer": "builtin:emoji", "config": {"model_type": kind, **SMALL, **settings}}
    values = {**TINY["model"], "connector": {"tokens": 16}, "language": language}
    return OpenQwen2VLConfig.model_validate(values)


def test_llava_takes_a_captioner_without_tokens_of_a_chat(tmp_path: Path) -> None:
    values = with_language("qwen2").model_dump()
    lacking = qwen_like_tokenizer(("<|im_start|>", "<|im_end|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(lacking))
    values["language"]["tokenizer"], values["template"]["eos"] = str(tmp_path), "<|endoftext|>"
    config = OpenQwen2VLConfig.model_validate(values)
    system = config.build().eval()
    llava.write(system, config.layout(), config, tmp_path / "out")
    again, layout, about = mm.load(tmp_path / "out", "cpu")
    assert_same(tensors(again), tensors(system))
    ends = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert ends == [layout.tokenizer.id("<|endoftext|>")] and answers.form_of(about) == "raw"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_llava_takes_other_language_models(kind: str, tmp_path: Path) -> None:
    """With untied heads, whatever these are called."""
    config = with_language(kind, tie_word_embeddings=False)
    system = config.build().eval()
    llava.write(system, config.layout(), config, tmp_path / "out")
    again, layout, _ = mm.load(tmp_path / "out", "cpu")
    assert_same(tensors(again), tensors(system))
    assert layout.template == config.layout().template


@pytest.mark.parametrize(("block", "act"), [(-1, "gelu"), (0, "gelu_tanh"), (-2, "gelu_tanh")])
def test_llavas_tower_gives_the_features_of_ours(block: int, act: str, tmp_path: Path) -> None:
    """Of any block, with either form of GELU, and again when the folder is read as one that others wrote."""
    values = with_language("qwen2").model_dump()
    values["vision"] |= {"block": block, "options": {**values["vision"]["options"], "act_layer": act}}
    config = OpenQwen2VLConfig.model_validate(values)
    system = config.build().eval()
    llava.write(system, config.layout(), config, tmp_path / "out")
    stock: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="float32").eval()
    about = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({k: v for k, v in about.items() if k != "mm_template"}))
    again: Any
    again, layout, _ = mm.load(tmp_path / "out", "cpu")
    assert layout.template == config.layout().template
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = system.vision.of_squares(inputs)
        states = stock.model.vision_tower(inputs, output_hidden_states=True).hidden_states
        theirs = states[stock.config.vision_feature_layer]
        assert torch.equal(again.vision.of_squares(inputs), features)
    torch.testing.assert_close(theirs, features, rtol=1e-5, atol=1e-6)


def test_llava_takes_no_scaled_logits(tmp_path: Path) -> None:
    config = with_language("granite", logits_scaling=7.0)
    with pytest.raises(ConfigError, match="a granite model does more with its hidden states than a linear head"):
        llava.write(config.build(), config.layout(), config, tmp_path / "out")


IMAGE = {"type": "image"}
CONVERSATIONS: dict[str, list[tuple[str, list[Any]]]] = {
    "one picture": [("user", [IMAGE, "What is this?"])],
    "no picture": [("user", ["Say something,\nanything."])],
    "two pictures": [("user", [IMAGE, IMAGE, "Which is larger?"])],
    "a line break behind it": [("user", [IMAGE, "\nWhat?"])],
    "in the end": [("user", ["What is this?", IMAGE])],
    "a system turn": [("system", ["Be short."]), ("user", [IMAGE, "What is it?"])],
    "several turns": [
        ("user", [IMAGE, "What?"]), ("assistant", ["A cat."]), ("user", ["Why?"]), ("assistant", ["It is."]),
        ("user", ["And this?", IMAGE]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("chat", "name"), product(("chatml", "release", "fixed", "plain"), CONVERSATIONS))
def test_jinja_gives_the_ids_of_the_layout(chat: str, name: str, kept: Path, llava_folder: Path) -> None:
    """Of prompts, and of conversations that end with an answer."""
    model = OpenQwen2VLConfig.model_validate({"released": str(kept), "template": {"chat": chat}})
    layout = model.layout()
    assert layout.image is not None
    tokenizer = AutoProcessor.from_pretrained(llava_folder).tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    conversation = CONVERSATIONS[name]
    for closed in (False, True):
        turns = [*conversation, *([("assistant", ["It is a dog."])] if closed else [])]
        parts: list[Any] = []
        for role, content in turns:
            parts += [Turn(role), *(picture(1) if part is IMAGE else Text(part) for part in content)]  # type: ignore[arg-type]
        segment = make_segment((*parts, *([] if closed else [Turn("assistant")])), layout, "test", Limits(), closed)
        ids, _ = row_of(segment)
        expected = [image_id if token < 0 else token for token in ids]
        as_parts = [
            {"role": role, "content": [part if part is IMAGE else {"type": "text", "text": part} for part in content]}
            for role, content in turns
        ]
        as_text = [
            {"role": role, "content": "".join("<image>" if part is IMAGE else part for part in content)}
            for role, content in turns
        ]
        for messages in (as_parts, as_text):
            text = tokenizer.apply_chat_template(
                messages, chat_template=jinja(layout.template), tokenize=False, add_generation_prompt=not closed
            )
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text


def test_what_a_template_cannot_say_is_refused(kept: Path, llava_folder: Path) -> None:
    """`fixed` drops the token behind a picture; words there cannot be dropped in text."""
    layout = mm.load(kept, "cpu", template="fixed")[1]
    tokenizer = AutoProcessor.from_pretrained(llava_folder).tokenizer
    messages = [{"role": "user", "content": "Look: <image> and say"}]
    with pytest.raises(Exception, match="drops the first token behind a picture"):
        tokenizer.apply_chat_template(messages, chat_template=jinja(layout.template), tokenize=False)


@pytest.mark.parametrize(
    ("overrides", "to", "words"),
    [
        (["model.connector.tokens=4"], "hf-llava", r"pools a picture's 16 patches to 4 tokens .*--tokens 16"),
        (["model.vision.options.class_token=true"], "hf-llava", "is no vision transformer such as SigLIP's"),
        (["model.vision.options.init_values=0.1"], "hf-llava", "is no vision transformer such as SigLIP's"),
        ([], "prismatic", r"takes the towers timm/vit_base_patch16_siglip_224\.webli at 224 pixels, "),
        ([], "transformers", "is not for --to transformers: it can be written as prismatic or hf-llava, with --to"),
        ([], None, "a model of the kind open_qwen2vl: it can be written as prismatic or hf-llava, with --to"),
    ],
)
def test_what_does_not_fit_a_format_is_said(
    overrides: list[str], to: str | None, words: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    short = ["train.max_steps=1", "data.test=[]", "evaluation.every=0", "model.connector.tokens=16"]
    assert main(["train", str(tiny()), *short, *overrides]) == 0
    with pytest.raises(ConfigError, match=words) as caught:
        export(tmp_path / "run", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)


FINE_TUNING = """
out: {folder}/run
data:
  sources: [{{kind: conversations, path: "{folder}/data/talk.jsonl"}}]
  context_length: 512
  workers: 0
  cache: {folder}/cache
model: {{kind: open_qwen2vl, released: {release}, template: {{chat: fixed}}}}
train:
  max_steps: 3
  batch_tokens: 1k
  device: cpu
  optimizer: {{lr: 1e-3}}
  params: [{{match: "vision.*", freeze: true}}]
"""


ADAPTERS = (
    'train.params.0.match="(vision|language).*"',
    "train.lora=[{match: 'language.*[qv]_proj', rank: 2}]",
)


def fine_tuned(tmp_path: Path, release: Path, *overrides: str) -> RunConfig:
    """On conversations about pictures in a folder."""
    (tmp_path / "data").mkdir()
    rows = []
    for number in range(12):
        shown = picture(number)
        (tmp_path / f"data/{number}.png").write_bytes(shown.read())
        said = ("human", f"<image>\nWhich number is this? {number}?"), ("gpt", f"It is the number {number}.")
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data/talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "tune.yaml"
    text = FINE_TUNING.format(folder=tmp_path, release=release)
    assert len(text.strip().splitlines()) < 20
    path.write_text(text)
    assert main(["train", str(path), *overrides]) == 0
    return load_config(path, overrides)


@pytest.mark.parametrize(("chat", "overrides"), [("fixed", ()), ("chatml", ADAPTERS)], ids=["whole", "adapters"])
def test_fine_tuned_exported_and_loaded_it_is_the_same(
    chat: str, overrides: tuple[str, ...], kept: Path, tmp_path: Path
) -> None:
    config = fine_tuned(tmp_path, kept, f"model.template.chat={chat}", *overrides)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == config.resolved()
    trained, layout, _ = mm.load(tmp_path / "run", "cpu")
    before = tensors(mm.load(kept, "cpu")[0])
    after = tensors(trained)
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"connector", "language"}
    for to, tokens in (("prismatic", None), ("hf-llava", 729)):
        export(tmp_path / "run", tmp_path / to, to=to, tokens=tokens)
        again, its_layout, about = mm.load(tmp_path / to, "cpu")
        assert_same(tensors(again), after)
        assert its_layout.template == layout.template and layout.template.chat == chat
        assert answers.form_of(about) == "chat"
    # From a run to LLaVA by way of the released layout.
    export(tmp_path / "prismatic", tmp_path / "further", to="hf-llava", tokens=729)
    assert_same(load_file(tmp_path / "further/model.safetensors"), load_file(tmp_path / "hf-llava/model.safetensors"))


def test_adapters_on_a_release(kept: Path, tmp_path: Path) -> None:
    fine_tuned(tmp_path, kept, *ADAPTERS)
    before, after = (tensors(mm.load(where, "cpu")[0]) for where in (kept, tmp_path / "run"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith("language.")} == {
        f"language.model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qv"
    }


@pytest.mark.parametrize("layout", ["prismatic", "llava"])
def test_init_from_takes_releases_of_both_layouts(layout: str, kept: Path, llava_folder: Path) -> None:
    folder = kept if layout == "prismatic" else llava_folder
    system = mm.load(kept, "cpu")[0]
    expected = {name: tensor.clone() for name, tensor in tensors(system).items()}
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.zero_()
    found, where = initial_tensors(folder)
    assert take_over(system, found, None, where) == []
    assert_same(tensors(system), expected)


def test_a_release_section_gives_way_to_what_is_set(kept: Path) -> None:
    config = OpenQwen2VLConfig.model_validate(
        {"released": str(kept), "connector": {"tokens": 729}, "template": {"chat": "chatml"}, "vision": {"crop": 0.8}}
    )
    assert (config.connector.tokens, config.template.chat, config.vision.crop) == (729, "chatml", 0.8)
    assert config.vision.image_size == 384 and config.vision.options["depth"] == 3
    assert config.language.name == str(kept / LANGUAGE)
    values = {"released": str(kept), "vision": {"name": f"timm/{TOWER}.webli", "crop": 0.8}}
    named = OpenQwen2VLConfig.model_validate(values)
    assert (named.vision, named.language) == (config.vision, config.language)
    # What a run keeps is whole: the release is not asked again.
    again = {**config.model_dump(), "released": "nobody/nothing"}
    assert OpenQwen2VLConfig.model_validate(again).vision == config.vision
    assert released.find(kept / "checkpoints") is None


def test_what_a_local_release_names_is_found_from_anywhere(
    kept: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kept.parent)
    assert released.open_release(kept.name, "open_qwen2vl").section()["language"]["name"] == str(kept / LANGUAGE)
    monkeypatch.chdir(llava_folder.parent)
    assert released.open_release(llava_folder.name, "open_qwen2vl").section()["language"]["tokenizer"] == str(
        llava_folder
    )


def test_a_config_that_names_a_release_is_checked_without_torch(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(FINE_TUNING.format(folder=tmp_path, release=kept))
    code = f"import sys; from mm.cli import main; print(main(['config', {str(path)!r}]), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "0 False" and "image_size: 384" in out


def test_a_name_on_the_hub(kept: Path, tmp_path: Path) -> None:
    """From the hub's cache, as it lies after a download; only what is asked for is fetched."""
    snapshot = tmp_path / "hub/models--weizhiwang--Open-Qwen2VL/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(kept / "config.json", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    code = "from mm.models.released import find; print(find('weizhiwang/Open-Qwen2VL').section())"
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    section = ast.literal_eval(out)
    assert section["language"]["name"] == LANGUAGE and section["vision"]["name"] == f"timm/{TOWER}.webli"
    assert section["connector"]["tokens"] == 144 and section["vision"]["options"] == {}


def test_mount_path_may_be_a_folder(theirs: Prismatic, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release", theirs, mount_path=str(tmp_path / "models"))
    (folder / "Qwen").rename(tmp_path / "models")
    assert mm.load(folder, "cpu")[2].model.language.name == str(tmp_path / "models/Qwen2.5-1.5B-Instruct")


def test_numbers_of_another_kind_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"type +weight +found torch.int64, expected torch.float32"):
        fit(torch.nn.Linear(2, 3, bias=False), {"weight": torch.ones(3, 2).long()}, "here")
