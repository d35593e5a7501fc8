"""COSMO's released layout: read strictly, with all names of a tensor, and written again; what it computes, against
its authors' modules by hand."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tiny_cosmo import picture
from tiny_released import LAYERS, NAMES, SPECIAL, TOKENS, WIDTH, language, run_of, spread, write_language
from torch import Tensor, nn

import mm
from mm.cli import main
from mm.data import builtin
from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Text
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import make_segment
from mm.errors import CheckpointError, ConfigError, DataError
from mm.hub import export
from mm.models import released
from mm.models.gated import PerceiverResampler, TextQuery, insert_gated
from mm.models.released import cosmo
from mm.models.released.cosmo import ADDED_TOKENS, released_names
from mm.models.systems.cosmo.config import CosmoConfig
from mm.models.vision import VisionTower
from mm.train.stages import initial_tensors

VISION, SIDE = 64, 16
UNIMODAL = 2
# Of each family: what the inner widths of gated blocks are divided by, and which layers have one.
SHAPES = {"opt": (1, 1), "gpt_neox": (2, 2), "mistral": (4, 1)}
LATENTS, DEPTH, SHARED = 3, 2, 10


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (8, -1)).transpose(-3, -2)


def attend(query: Tensor, key_value: Tensor) -> Tensor:
    """Scores are scaled for heads 64 wide, whatever they are."""
    key, value = key_value.chunk(2, dim=-1)
    scores = heads(query) @ heads(key).transpose(-1, -2) / 8
    return (scores.softmax(-1) @ heads(value)).transpose(-3, -2).flatten(-2)


class PerceiverAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, 512, bias=False)
        self.to_kv = nn.Linear(width, 1024, bias=False)
        self.to_out = nn.Linear(512, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        both = torch.cat([self.norm_media(x), latents], dim=-2)
        return self.to_out(attend(self.to_q(latents), self.to_kv(both)))


class Perceiver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1 + LATENTS, VISION))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(VISION), feed_forward(VISION, 4 * VISION)]) for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(VISION)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed in self.layers:  # type: ignore[misc]
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents)


class Cross(nn.Module):
    def __init__(self, ratio: int) -> None:
        super().__init__()
        inner = 512 // ratio
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, inner, bias=False)
        self.to_kv = nn.Linear(VISION, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, WIDTH, bias=False)


class Gated(nn.Module):
    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.attn = Cross(ratio)
        self.attn_gate = nn.Parameter(torch.tensor([0.7]))
        self.ff = feed_forward(WIDTH, 4 * WIDTH // ratio)
        self.ff_gate = nn.Parameter(torch.tensor([-0.4]))


class Layer(nn.Module):
    """`media` [B, K, D] is what is seen, by the positions where `seen` [B, L, 1] is 1."""

    def __init__(self, gated: nn.Module | None, decoder: nn.Module) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder
        self.media, self.seen = torch.zeros(()), torch.zeros(())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        block: Any = self.gated_cross_attn_layer
        if block is not None:
            cross = block.attn
            out = attend(cross.to_q(cross.norm(x)), cross.to_kv(self.media)) * self.seen
            x = cross.to_out(out) * block.attn_gate.tanh() + x
            x = block.ff(x) * block.ff_gate.tanh() + x
        return self.decoder_layer(x, *args, **kwargs)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("beta", torch.zeros(WIDTH))


class Theirs(nn.Module):
    """Named as COSMO's code names its parts, with every list that it keeps, so that `state_dict` has each name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        ratio, interval = SHAPES[kind]
        self.kind = kind
        lm = language(kind, TOKENS + len(ADDED_TOKENS))
        vision = {"image_size": SIDE, "layers": 2, "width": VISION, "patch_size": 8}
        text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
        clip = open_clip.model.CLIP
        self.vision_encoder: Any = clip(768, vision, text, quick_gelu=True)  # type: ignore[arg-type]
        self.vision_encoder.visual.output_tokens = True
        self.perceiver = Perceiver()
        lm.old_decoder_blocks = self.layers(lm)
        lm.gated_cross_attn_layers = nn.ModuleList(
            Gated(ratio) if number >= UNIMODAL and (number - UNIMODAL) % interval == 0 else None
            for number in range(LAYERS)
        )
        wrapped = map(Layer, lm.gated_cross_attn_layers, lm.old_decoder_blocks)
        self.place(lm).layers = nn.ModuleList(wrapped)
        self.lang_model = lm
        self.img_to_latents = nn.ModuleDict({"to_latents": nn.Linear(VISION, SHARED, bias=False)})
        self.text_to_latents = nn.ModuleDict({"to_latents": nn.Linear(WIDTH, SHARED, bias=False)})
        self.temperature = nn.Parameter(torch.tensor([0.2]))
        self.text_cls_norm = Norm()
        self.text_learn_attnetion_layer = PerceiverAttention(WIDTH)
        self.text_latent = nn.Parameter(torch.randn(1, WIDTH))
        self.text_learn_ff = feed_forward(WIDTH, 4 * WIDTH)

    def place(self, lm: Any) -> Any:
        if self.kind == "gpt_neox":
            return lm.gpt_neox
        return lm.model.decoder if self.kind == "opt" else lm.model

    def layers(self, lm: Any) -> Any:
        return self.place(lm).layers

    def tensors(self) -> dict[str, Tensor]:
        """As the versions of transformers named them that COSMO was trained with."""
        heads = {"lang_model.lm_head.weight": "lang_model.embed_out.weight"} if self.kind == "gpt_neox" else {}
        return {heads.get(name, name): tensor.detach() for name, tensor in self.state_dict().items()}

    def forward(self, pixels: Tensor, ids: Tensor, visual: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one picture and its text: logits [L, V], and what is compared of either, [SHARED]."""
        latents = self.perceiver(self.vision_encoder.visual(pixels)[1])
        lower: list[Tensor] = []
        layers = self.layers(self.lang_model)
        for layer in layers:
            layer.media = latents[:, 1:]
            layer.seen = ((ids == visual).cumsum(-1) > 0).float()[..., None]
        # hidden_states[U - 1] is what layer U - 2 gives: the first is that of the embeddings.
        hook = layers[UNIMODAL - 2].register_forward_hook(
            lambda module, args, out: lower.append(out[0] if isinstance(out, tuple) else out)
        )
        logits = self.lang_model(input_ids=ids, use_cache=False).logits[0]
        hook.remove()
        text = self.text_latent[None]
        text = self.text_learn_attnetion_layer(lower[0], text) + text
        text = self.text_learn_ff(text) + text
        text = F.layer_norm(text[0, 0], [WIDTH], self.text_cls_norm.gamma, self.text_cls_norm.beta)  # type: ignore[arg-type]
        image = self.img_to_latents["to_latents"](latents[0, 0])
        return logits, F.normalize(image, dim=-1), F.normalize(self.text_to_latents["to_latents"](text), dim=-1)


def write_release(folder: Path, theirs: Theirs, tensors: dict[str, Tensor] | None = None) -> Path:
    """A folder as it is on the hub, with the language model's own repository in it."""
    folder.mkdir(parents=True)
    torch.save(theirs.tensors() if tensors is None else tensors, folder / "pytorch_model.bin")
    write_language(folder / NAMES[theirs.kind], theirs.lang_model)
    return folder


def batch_of(layout: Layout, *texts: str) -> PackedBatch:
    """Pairs, a row each."""
    packs = []
    for number, text in enumerate(texts):
        segment = make_segment((picture(number), Text(text)), layout, "test", Limits())
        packs.append(join_segments([(text, "pairs", segment)]))
    return collate(packs, layout, 40)


def state(system: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in system.state_dict().items()}


def saved(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)  # type: ignore[no-any-return]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module", params=list(SHAPES))
def theirs(request: pytest.FixtureRequest) -> Theirs:
    torch.manual_seed(0)
    made: Theirs = spread(Theirs(request.param))
    return made


@pytest.fixture(scope="module")
def opt() -> Theirs:
    torch.manual_seed(0)
    made: Theirs = spread(Theirs("opt"))
    return made


@pytest.fixture(scope="module")
def kept(opt: Theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that tests only read."""
    return write_release(tmp_path_factory.mktemp("kept") / "release", opt)


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(kept, tmp_path / "release"))


def test_it_computes_what_its_authors_model_does(theirs: Theirs, tmp_path: Path) -> None:
    system: Any
    system, layout, config = mm.load(write_release(tmp_path / "release", theirs), "cpu")
    model, (ratio, interval) = config.model, SHAPES[theirs.kind]
    found = (model.unimodal, model.interval, model.ratio, model.resampler.latents, model.resampler.depth)
    # One gated block alone could be before any number of layers; all that are left is one.
    assert found == (UNIMODAL, interval, ratio, LATENTS, DEPTH)
    assert layout.tokenizer.id("<visual>") == TOKENS + 1 and layout.pad == TOKENS + 5
    packed = batch_of(layout, "a red fox")
    length = int((packed.segment_ids > 0).sum())
    ids = packed.input_ids[:, :length].clone()
    ids[packed.input_ids[:, :length] == layout.pad] = visual = layout.tokenizer.id("<visual>")
    assert (ids == visual).sum() == 1
    with torch.no_grad():
        logits, image, text = theirs(packed.media["image"].stacked(), ids, visual)
        features = system(packed).features
        torch.testing.assert_close(system.logits(packed, torch.arange(length)), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["image"][0], image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features["text"][0], text, rtol=1e-4, atol=1e-5)
    assert float(features["scale"][0].log()) == pytest.approx(float(theirs.temperature.detach()))


def test_it_is_written_as_it_was_read_after_a_step_too(theirs: Theirs, tmp_path: Path) -> None:
    release = write_release(tmp_path / "release", theirs)
    assert export(release, tmp_path / "out") is None
    assert_same(saved(tmp_path / "out"), saved(release))
    system: Any
    system, layout, config = mm.load(tmp_path / "out", "cpu")
    assert_same(state(system), state(mm.load(release, "cpu")[0]))
    packed = batch_of(layout, "a red fox", "two hats", "snow")
    out = system.train()(packed)
    (out.losses["next_token"] + system.pooled_losses(out.features)["contrastive"]).backward()
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            assert parameter.grad is not None or name.startswith("vision."), name
            parameter.sub_(0.0 if parameter.grad is None else 0.1 * parameter.grad)
    (tmp_path / "trained").mkdir()
    cosmo.write(system, config.model, tmp_path / "trained")
    trained, before = saved(tmp_path / "trained"), saved(release)
    assert trained.keys() == before.keys()
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert {"text_learn_attnetion_layer.to_q.weight", "perceiver.latents", "temperature"} <= changed
    within = [name for name in changed if ".decoder_layer." in name]
    for name in within:
        alias = re.sub(r"lang_model\..*?\.(\d+)\.decoder_layer", r"lang_model.old_decoder_blocks.\1", name)
        assert alias != name and torch.equal(trained[name], trained[alias])
    assert within
    again: Any = mm.load(tmp_path / "trained", "cpu")[0]
    assert_same(state(again), state(system))


def test_trained_further_and_exported(kept: Path, cache: Path, tmp_path: Path) -> None:
    """In a run that freezes what the release froze, and exported by the command."""
    freezes = [
        {"match": "(vision|language).*", "freeze": True},
        {"match": r"language\..*\.gated\..*", "freeze": False},
    ]
    run = run_of(tmp_path, cache, {"kind": "cosmo", "released": str(kept), "frames": None}, freezes)
    assert main(["train", str(run)]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--to", "cosmo"]) == 0
    trained, before = saved(tmp_path / "out"), saved(kept)
    assert trained.keys() == before.keys()
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    own = ("perceiver", "img_to", "text_", "temperature")
    for name in trained:
        frozen = name == "text_cls_norm.beta" or not (name.startswith(own) or ".gated_cross_attn_layer" in name)
        assert name not in changed or not frozen, name
    assert {"temperature", "text_latent", "perceiver.latents", BLOCK} <= changed
    assert_same(*(state(mm.load(tmp_path / folder, "cpu")[0]) for folder in ("out", "run")))


@pytest.mark.parametrize("way", ["each once", "in parts", "a file", "of a run", "in half precision"])
def test_every_form_of_its_weights_is_read(way: str, kept: Path, folder: Path, tmp_path: Path) -> None:
    tensors, path = saved(folder), folder
    (folder / "pytorch_model.bin").unlink()
    if way == "each once":  # safetensors keeps one name of what is shared
        once = {id(tensor.untyped_storage()._cdata): name for name, tensor in tensors.items()}
        by_place = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        assert len(by_place) < len(tensors) and once
        save_file({name: tensors[name].clone() for name in by_place.values()}, folder / "model.safetensors")
    elif way == "in parts":
        names = sorted(tensors)
        files = {name: f"pytorch_model-{number % 3}.bin" for number, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    elif way == "a file":
        path = folder / "cosmo.bin"
        torch.save(tensors, path)
    elif way == "of a run":  # as it is saved beside the run's config.json
        params = {"lang_model": {"lang_model_path": "/nowhere"}, "multimodality_model": {"qv_norm": False}}
        (folder / "config.json").write_text(json.dumps({"model_params": params}))
        for step, file in ((900, {"perceiver.latents": torch.zeros(1)}), (1000, tensors)):
            (folder / f"checkpoint-{step}").mkdir()
            torch.save(file, folder / f"checkpoint-{step}/pytorch_model.bin")
    else:
        torch.save({name: tensor.half() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    expected = state(mm.load(kept, "cpu")[0])
    if way == "in half precision":
        expected = {name: tensor.half().float() for name, tensor in expected.items()}
    assert_same(state(mm.load(path, "cpu")[0]), expected)


def test_what_tensors_do_not_say_is_read_from_a_config_of_theirs(folder: Path) -> None:
    params = {"only_attend_immediate_media": False, "cross_attention_compress_ratio": 1}
    vision = {"vision_encoder_name": "clip", "vision_encoder_arch": "ViT-B-16", "vision_encoder_pretrained": "laion2b"}
    values = {"model_params": {"vision_encoder": vision, "multimodality_model": params}}
    (folder / "base.yaml").write_text(json.dumps(values))
    release = released.open_release(folder, "cosmo").section()
    assert release["immediate"] is False and release["vision"]["name"] == "open_clip/ViT-B-16.laion2b"
    (folder / "base.yaml").rename(folder / "config.json")
    assert released.open_release(folder, "cosmo").section() == release
    for change, message in (({"qv_norm": True}, "qv_norm is true"), ({}, "vision encoder is sam")):
        about = {**values["model_params"], "multimodality_model": {**params, **change}}
        about["vision_encoder"] = {"vision_encoder_name": "sam"}
        (folder / "config.json").write_text(json.dumps({"model_params": about}))
        with pytest.raises(CheckpointError, match=message):
            mm.load(folder, "cpu")


def changed(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name] + 1

    return change


BLOCK = "lang_model.gated_cross_attn_layers.2.attn.to_q.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "unequal": (changed(BLOCK), rf"differs.*\n  {BLOCK} and lang_model\.model\.decoder\.layers\.2\.gated_cross"),
    "unequal layers": (
        changed("lang_model.old_decoder_blocks.1.fc1.bias"),
        r"differs.*\n  lang_model\.old_decoder_blocks\.1\.fc1\.bias and lang_model\.model\.decoder\.layers\.1\.dec",
    ),
    "untied": (changed("lang_model.lm_head.weight"), r"not equal +lang_model\.\S+ +to lang_model\."),
    "missing": (
        lambda t: t.pop("text_learn_attnetion_layer.to_q.weight"),
        r"missing +text_learn_attnetion_layer\.to_q\.weight +expected \[512, 32\]",
    ),
    "without blocks": (
        lambda t: [t.pop(name) for name in list(t) if "gated_cross_attn_layer" in name],
        r"there is no gated block",
    ),
    "blocks at odds": (
        lambda t: t.update({"lang_model.gated_cross_attn_layers.0.attn_gate": t["temperature"]}),
        r"before layers 0, 2, 3 of 4",
    ),
    "a block behind the last layer": (
        lambda t: [
            t.update({re.sub(r"(layers|gated_cross_attn_layers)\.\d", r"\1.4", name): t.pop(name)})
            for name in list(t)
            if "gated_cross_attn_layer" in name
        ],
        r"before layers 4 of 4",
    ),
    "a flat latent": (lambda t: t.update({"perceiver.latents": t["temperature"]}), r"latents is \[1\], expected 2 dim"),
    "without a resampler's layers": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("perceiver.layers")],
        r"there is no perceiver\.layers\.0\.0\.to_q\.weight",
    ),
    "extra": (
        lambda t: t.update({"lang_model.memory_layer.scale": t["temperature"]}),
        r"unexpected +lang_model\.memory_layer\.scale",
    ),
    "shape": (lambda t: t.update(text_latent=torch.zeros(2, WIDTH)), r"shape +text_latent +found \[2, 32\], expected"),
    "bias": (changed("text_cls_norm.beta"), r"text_cls_norm\.beta is not all zeros"),
    "norms": (
        lambda t: t.update({"perceiver.layers.0.0.q_norm.weight": torch.ones(512)}),
        r"unexpected +perceiver\.layers\.0\.0\.q_norm\.weight",
    ),
    "adapters": (lambda t: t.update({"lang_model.base_model.x": t["temperature"]}), r"has adapters"),
}


DAMAGED = {
    "params null": ({"model_params": None}, r"expected an object as model_params\.multi"),
    "params a list": ({"model_params": [1]}, r"expected an object as model_params\.multi"),
    "a part null": ({"model_params": {"vision_encoder": None}}, r"model_params\.vision_encoder"),
    "no path": ({"model_params": {"lang_model": {"lang_model_path": [1]}}}, "lang_model_path in its config is no path"),
    "no switch": ({"model_params": {"multimodality_model": {"only_attend_immediate_media": "x"}}}, "immediate: "),
    "mm": ({"model_params": {}, "mm": 1}, "expected an object as the mm"),
    "mm of a list": ({"model_params": {}, "mm": {"vision": [1]}}, "vision"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_configs_are_one_line(what: str, folder: Path) -> None:
    about, message = DAMAGED[what]
    if what == "no path":
        shutil.move(folder / NAMES["opt"], folder / "elsewhere")
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=message) as error:
        mm.load(folder, "cpu")
    assert "\n" not in str(error.value)


def test_files_of_yaml_that_are_none_are_not_read(folder: Path) -> None:
    (folder / "a.yaml").write_bytes(b"model_params: \xff\xfe")
    (folder / "b.yaml").write_text("model_params: {multimodality_model: {only_attend_immediate_media: false}}")
    assert released.open_release(folder, "cosmo").section()["immediate"] is False


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[1"])
def test_damaged_files_of_a_tokenizer_are_said(file: str, content: bytes, tmp_path: Path) -> None:
    whole = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n", "special_tokens_map.json": b"{}"}
    for name, text in {**whole, file: content}.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=f"{file}.* damaged"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(what: str, folder: Path) -> None:
    change, message = REFUSED[what]
    tensors = saved(folder)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        mm.load(folder, "cpu")


def test_an_unknown_language_model_is_asked_for(folder: Path) -> None:
    shutil.move(folder / "facebook/opt-iml-max-1.3b", folder.parent / "opt")
    with pytest.raises(CheckpointError, match=rf"32 wide with 4 layers.*tokenizer\.json .* into {folder}/language"):
        mm.load(folder, "cpu")
    shutil.move(folder.parent / "opt", folder / "language")
    assert mm.load(folder, "cpu")[2].model.language.tokenizer == str(folder / "language")


def test_opts_tokenizer_is_read_from_the_files_of_its_repository(folder: Path) -> None:
    """Which has no tokenizer.json. Against transformers' own reading of them."""
    place = folder / NAMES["opt"]
    (place / "tokenizer.json").unlink()
    values = json.loads((builtin.folder("emoji") / "tokenizer/tokenizer.json").read_text())["model"]
    words = sorted(values["vocab"], key=values["vocab"].get)
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in values["merges"]]
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "</s>", "eos_token": {"content": "</s>"}, "unk_token": "</s>", "pad_token": "<pad>"}
    (place / "special_tokens_map.json").write_text(json.dumps(special))
    theirs = transformers.GPT2Tokenizer.from_pretrained(place)
    found = Tokenizer.load(str(place))
    text = "In 1987 it DIDN'T rain, naïve é;\r\n\n\t  x = 3.25e+10  # 傘 🙂\n"
    assert found.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert found.decode(found.encode(text)) == text
    assert (found.id("</s>"), found.id("<pad>"), len(found)) == (2, 1, len(vocabulary))
    assert found.decode([2, *found.encode("a")]) == "a"


def test_a_name_on_the_hub_without_a_config(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, as it lies after a download: which files there are none of is kept there too."""
    place, commit = tmp_path / "models--Awiny--cosmo2.1b", "0" * 40
    absent = ["config.json", "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json"]
    for folder in (place / "snapshots" / commit, place / ".no_exist" / commit, place / "refs"):
        folder.mkdir(parents=True)
    for name in absent:
        (place / ".no_exist" / commit / name).touch()
    (place / "refs/main").write_text(commit)
    shutil.copy(kept / "pytorch_model.bin", place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    release = released.find("Awiny/cosmo2.1b")
    assert release is not None and release.kind == "cosmo"
    with pytest.raises(CheckpointError, match=r"32 wide with 4 layers.* into language/ of a copy"):
        release.section()


def test_other_folders_are_none_of_its_releases(tmp_path: Path) -> None:
    assert released.find(tmp_path) is None
    save_file({"model.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert released.find(tmp_path) is None
    with pytest.raises(CheckpointError, match="nor weights in the layout of COSMO"):
        released.open_release(tmp_path, "cosmo")


def test_runs_begin_from_it_and_train_new_tokens_by_themselves(kept: Path, tmp_path: Path) -> None:
    tensors, _ = initial_tensors(kept)
    system: Any = mm.load(kept, "cpu")[0]
    assert_same(tensors, {name: tensor for name, tensor in state(system).items() if name in tensors})
    config = CosmoConfig.model_validate({"released": str(kept), "train_new_tokens": True, "frames": 2})
    apart = config.build()
    assert apart.new_tokens is not None
    rows = apart.language.get_input_embeddings().weight[TOKENS:]
    assert torch.equal(apart.new_tokens.embedding, rows) and config.frames == 2
    with torch.no_grad():
        apart.new_tokens.embedding.add_(1)
    (tmp_path / "out").mkdir()
    cosmo.write(apart, config, tmp_path / "out")
    written, before = saved(tmp_path / "out"), saved(kept)
    for name in ("lang_model.model.decoder.embed_tokens.weight", "lang_model.lm_head.weight"):
        assert torch.equal(written[name][TOKENS:], rows + 1)
        assert torch.equal(written[name][:TOKENS], before[name][:TOKENS])
    again: Any = CosmoConfig.model_validate({"released": str(tmp_path / "out"), "train_new_tokens": True}).build()
    assert_same(state(again.new_tokens), state(apart.new_tokens))


def test_a_model_with_other_tokens_than_the_releases_is_read_back(kept: Path, tmp_path: Path) -> None:
    """Which has no row for the rest of them."""
    values = CosmoConfig.model_validate({"released": str(kept)}).model_dump(mode="json")
    values |= {
        "released": None,
        "visual_token": "<picture>",
        "template": {"bos": "</s>", "eos": "</s>", "pad": "<pad>"},
    }
    values["language"] = {
        "config": {**values["language"]["config"], "vocab_size": TOKENS + 2},
        "tokenizer": str(kept / NAMES["opt"]), "added_tokens": ["<ours>"],
    }  # fmt: skip
    config = CosmoConfig.model_validate(values)
    system = config.build(weights=False)
    (tmp_path / "out").mkdir()
    cosmo.write(system, config, tmp_path / "out")
    again, layout, about = mm.load(tmp_path / "out", "cpu")
    assert_same(state(again), state(system))
    assert layout.fingerprint() == config.layout().fingerprint() and about.model.visual_token == "<picture>"
    assert layout.tokenizer.id("<ours>") == TOKENS and layout.tokenizer.id("<picture>") == TOKENS + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrastive": {"loss": "siglip"}}, "CLIP's loss"),
        ({"vision": {"class_token": True}}, "every patch"),
        ({"language": {"config": {"model_type": "qwen2"}}}, "families opt"),
    ],
)
def test_models_with_other_parts_are_not_written(
    changes: dict[str, Any], message: str, kept: Path, tmp_path: Path
) -> None:
    system, _, config = mm.load(kept, "cpu")
    values = config.model.model_dump()
    for section, change in changes.items():
        values[section] |= change
    if "language" in changes:
        system.language.config = type("Other", (), {"model_type": "qwen2"})()  # type: ignore[union-attr]
    other = CosmoConfig.model_validate({**values, "released": None})
    with pytest.raises(ConfigError, match=f"the cosmo format takes .*{message}"):
        cosmo.write(system, other, tmp_path)  # type: ignore[arg-type]


def test_what_others_have_to_know_of_it_is_said(kept: Path, tmp_path: Path) -> None:
    system, _, config = mm.load(kept, "cpu")
    other = config.model.model_copy(update={"faithful": False, "released": None})
    note = cosmo.write(system, other, tmp_path)  # type: ignore[arg-type]
    assert note is not None and "text tower" in note and "one layer less" in note
    assert not any(name.startswith("vision_encoder.transformer.") for name in saved(tmp_path))
    found = mm.load(tmp_path, "cpu")[2].model
    assert found.faithful is False and found.unimodal == UNIMODAL
    with pytest.raises(CheckpointError, match=r"missing +bias +expected \[1\]"):
        CosmoConfig.model_validate({"released": str(kept), "contrastive": {"loss": "siglip"}}).build()


# Tensors of a full-size release by where they are, from the sizes of the models: OPT-IML's layers have 16 each, a
# resampler's layer 11, a gated block 11, a block of CLIP's tower 12.
COUNTS = {
    "vision_encoder.visual": 3 + 2 + 24 * 12 + 2 + 1,
    "perceiver": 1 + 6 * 11 + 2,
    "lang_model.old_decoder_blocks": 24 * 16,
    "lang_model.gated_cross_attn_layers": 6 * 11,
    "lang_model.model.decoder.layers": 24 * 16 + 6 * 11,
    "text_learn_attnetion_layer": 7,
    "text_learn_ff": 4,
}


@pytest.mark.parametrize(("kind", "sizes", "each"), [("gpt_neox", (2560, 32), 12), ("mistral", (4096, 32), 9)])
def test_names_of_the_larger_language_models(kind: str, sizes: tuple[int, int], each: int) -> None:
    """Of a layer of NeoX 12 tensors, of Mistral 9; beside them embeddings, head and a norm with and without bias."""
    width, layers = sizes
    assert cosmo.FAMILIES[kind].size == sizes
    config = transformers.AutoConfig.for_model(kind, hidden_size=width, num_hidden_layers=layers, vocab_size=32006)
    with torch.device("meta"):
        own = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    names = [alias for name in own for alias in released_names(f"language.{name}", kind == "gpt_neox")]
    assert len(set(names)) == len(names) == 2 * layers * each + (4 if kind == "gpt_neox" else 3)
    family = cosmo.FAMILIES[kind]
    assert {f"lang_model.{name}" for name in (family.embeddings, family.head)} < set(names)
    for part in ("lang_model.old_decoder_blocks.", f"lang_model.{family.layers}."):
        assert sum(name.startswith(part) for name in names) == layers * each
    assert all(".decoder_layer." in name for name in names if name.startswith(f"lang_model.{family.layers}."))


def test_names_and_sizes_of_the_2b_model(kept: Path) -> None:
    """On the meta device, as the base_180m config of its repository builds it."""
    opt = {
        "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "word_embed_proj_dim": 2048, "vocab_size": 50271, "max_position_embeddings": 2048,
    }  # fmt: skip
    values = {
        "vision": {
            "name": "open_clip/ViT-L-14-quickgelu", "pretrained": False, "image_size": 224, "block": -1, "norm": True,
        },
        "language": {"config": {"model_type": "opt", **opt}, "tokenizer": str(kept / NAMES["opt"])},
        "unimodal": 12, "interval": 2, "ratio": 2, "faithful": True,
    }  # fmt: skip
    config = CosmoConfig.model_validate(values)
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("opt", **opt))
        insert_gated(lm, config, 1024)
        resampler = PerceiverResampler(1024, config.resampler.latents, config.resampler.depth)
        parts = {"language": lm, "resampler": resampler, "text_query": TextQuery(2048)}
        own = nn.ModuleDict({**parts, "vision": VisionTower(config.vision, weights=False)}).state_dict()
    names = [alias for name in own for alias in released_names(name, neox=False)]
    assert len(set(names)) == len(names)
    for prefix, count in COUNTS.items():
        assert sum(name.startswith(f"{prefix}.") for name in names) == count, prefix
    assert sum(t.numel() for n, t in own.items() if ".layers.12.gated." in n) == pytest.approx(18.4e6, rel=0.01)
    assert own["resampler.latents"].shape == (65, 1024)
