"""Teachers of pictures against transformers' own encoding and decoding of each picture alone, from checkpoints in
published layouts; Meta's `vqgan.ckpt` against taming-transformers' forward, written out by the names of its keys."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
)

from mm.config import load_config
from mm.data.layout import ImageLayout, Layout, NativeLayout
from mm.data.loader import one_pass
from mm.data.media import ImageTransform, Native
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models.systems.vq.config import VQConfig
from mm.models.teachers import PictureTeacher, pictures
from mm.models.teachers.config import TEACHERS, TeacherConfig
from mm.train.features import attach_codes, encode
from mm.train.trainer import Unwatched

SIZE, SIDE, CODES = 16, 8, 32
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
VQ = {
    "num_embeddings": CODES, "embed_dim": 8, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}  # fmt: skip
EMU3 = {
    "codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 2,
    "projection_dim": 32,
}  # fmt: skip
WHOLE: dict[str, Callable[[], Any]] = {
    "chameleon": lambda: ChameleonForConditionalGeneration(
        ChameleonConfig(
            **TEXT, vocabulary_map={"<image>": 4}, vq_config={**VQ, "resolution": SIZE, "attn_resolutions": [8]}
        )
    ),
    "janus": lambda: JanusForConditionalGeneration(
        JanusConfig(text_config={"model_type": "llama", **TEXT}, vision_config=VISION, vq_config=VQ)
    ),
    "emu3": lambda: Emu3ForConditionalGeneration(
        Emu3Config(
            text_config={**TEXT, "pad_token_id": 0}, vq_config=EMU3, vocabulary_map={"<image>": 4, "<|extra_200|>": 5}
        )
    ),
}


def drawn(count: int, size: int = SIZE) -> list[Tensor]:
    """Patches of one colour each, and noise."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=generator) * 2 - 1
    fine = torch.rand(count, 3, size, size, generator=generator) * 0.4 - 0.2
    return list((F.interpolate(coarse, scale_factor=4) + fine).clamp(-1, 1))


def layout(size: int = SIZE, positions: int = SIDE**2) -> Layout:
    fitting = VQConfig().layout()
    return replace(fitting, image=ImageLayout(positions, positions, ImageTransform(size, (0.5,) * 3, (0.5,) * 3)))


@torch.no_grad()
def latents_of(kind: str, vq: Any) -> Tensor:
    """[N, C] of some pictures."""
    given = torch.stack(drawn(12))
    if kind == "emu3":
        hidden = vq.encoder(given[:, None].repeat(1, 4, 1, 1, 1)).permute(0, 2, 1, 3, 4)
        return vq.quant_conv(hidden).permute(0, 2, 3, 4, 1).flatten(0, 3)
    return vq.quant_conv(vq.encoder(given)).permute(0, 2, 3, 1).flatten(0, 2)


def made(kind: str) -> Any:
    """The whole model in evaluation, its VQ model with weights of some size, its codes among the latents."""
    torch.manual_seed(0)
    model = WHOLE[kind]().eval()
    vq = model.model.vqmodel
    with torch.no_grad():
        for name, parameter in vq.named_parameters():
            if parameter.ndim > 1 and kind != "emu3":
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        latents = latents_of(kind, vq)
        latents = latents[torch.randperm(len(latents))[:CODES]]
        vq.quantize.embedding.weight.copy_(F.normalize(latents, dim=1) if kind == "janus" else latents)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Path]]:
    """Of each kind: transformers' VQ model, the folder of the whole model (in several files), and of the VQ model."""
    found = {}
    for kind in WHOLE:
        model = made(kind)
        whole, alone = (tmp_path_factory.mktemp(f"{kind}_{what}") for what in ("whole", "alone"))
        model.save_pretrained(whole, max_shard_size="100KB")
        model.model.vqmodel.save_pretrained(alone)
        assert len(list(whole.glob("*.safetensors"))) > 1 == len(list(alone.glob("*.safetensors")))
        found[kind] = model.model.vqmodel, whole, alone
    return found


def section(kind: str, folder: Path, **values: Any) -> Any:
    resolution = {"resolution": SIZE} if kind == "emu3" else {}
    where = "path" if kind == "vq" else "name"
    return TEACHERS.resolve(kind).model_validate({"kind": kind, where: str(folder), **resolution, **values})


def codes_of(teacher: PictureTeacher, given: list[Tensor]) -> Tensor:
    """[n, positions]"""
    found = teacher.codes(given, [teacher.positions] * len(given), layout())
    assert found.dtype == torch.int64 and found.shape == (len(given) * teacher.positions, 1)
    return found.view(len(given), -1)


@torch.no_grad()
def theirs(kind: str, vq: Any, picture: Tensor) -> Tensor:
    if kind == "emu3":
        (found,) = vq.encode(picture[None], image_sizes=torch.tensor([[SIZE, SIZE]])).image_tokens
        return found.flatten()
    return vq.encode(picture[None]).image_tokens.flatten()


@pytest.mark.parametrize("kind", WHOLE)
def test_codes_are_transformers_own_of_each_picture_alone(
    models: dict[str, tuple[Any, Path, Path]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vq, whole, alone = models[kind]
    given = drawn(5)
    expected = torch.stack([theirs(kind, vq, one) for one in given])
    assert len(expected.unique()) > CODES // 3, "codes that say something"
    state = torch.get_rng_state()
    teacher = section(kind, whole).build()
    assert torch.equal(torch.get_rng_state(), state), "nothing that a run draws depends on it"
    assert (teacher.medium, teacher.sizes, teacher.size, teacher.positions) == ("image", (CODES,), SIZE, SIDE**2)
    assert torch.equal(codes_of(teacher, given), expected)
    assert torch.equal(codes_of(teacher, given[::-1]), expected.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes_of(teacher, given), expected)
    monkeypatch.setattr(pictures, "PIXELS", 2 * SIZE**2)
    monkeypatch.setattr(pictures, "DISTANCES", 10 * CODES)
    other = section(kind, alone).build()
    assert torch.equal(codes_of(other, given), expected)
    assert other.describe() == teacher.describe() == json.loads(json.dumps(teacher.describe()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["janus", "emu3"])
def test_pictures_are_transformers_own(models: dict[str, tuple[Any, Path, Path]], kind: str) -> None:
    vq, whole, _ = models[kind]
    codes = torch.randint(CODES, (3, SIDE**2), generator=torch.Generator().manual_seed(0))
    teacher = section(kind, whole).build()
    teacher._at_once = 2
    expected = vq.decode(codes if kind == "janus" else codes.view(-1, SIDE, SIDE))
    assert teacher.decodes and expected.abs().max() > 0.1
    torch.testing.assert_close(teacher.pictures(codes), expected.clamp(-1, 1))


def test_transformers_chameleon_does_not_decode(models: dict[str, tuple[Any, Path, Path]]) -> None:
    teacher = section("chameleon", models["chameleon"][1]).build()
    assert not teacher.decodes
    with pytest.raises(ConfigError, match=r"has no decoder.* Meta's vqgan"):
        teacher.pictures(torch.zeros(1, SIDE**2, dtype=torch.int64))


@torch.no_grad()
def test_janus_codes_are_those_of_the_nearest_direction(
    models: dict[str, tuple[Any, Path, Path]], tmp_path: Path
) -> None:
    """Also where codes are not of one length, as those of the published model need not be."""
    vq, _, alone = models["janus"]
    shutil.copytree(alone, tmp_path / "longer")
    tensors = load_file(alone / "model.safetensors")
    tensors[pictures.BOOK] *= torch.linspace(0.2, 3, CODES)[:, None]
    save_file(tensors, tmp_path / "longer/model.safetensors", {"format": "pt"})
    given = drawn(4)
    latents = vq.quant_conv(vq.encoder(torch.stack(given))).permute(0, 2, 3, 1).flatten(0, 2).double()
    cosines = F.cosine_similarity(latents[:, None], tensors[pictures.BOOK].double()[None], dim=2)
    longer, plain = section("janus", tmp_path / "longer").build(), section("janus", alone).build()
    found = codes_of(longer, given)
    assert torch.equal(found.flatten(), cosines.argmax(1)) and torch.equal(found, codes_of(plain, given))
    torch.testing.assert_close(longer.pictures(found), plain.pictures(found))


def test_another_resolution_gives_more_codes(models: dict[str, tuple[Any, Path, Path]]) -> None:
    for kind, (_, whole, _) in models.items():
        config = section(kind, whole, resolution=24)
        assert (config.size, config.positions()) == (24, 144)
        teacher = config.build()
        codes = teacher.codes(drawn(2, 24), [144, 144], layout(24, 144))
        assert codes.shape == (288, 1) and int(codes.max()) < CODES
        assert not teacher.decodes or teacher.pictures(codes.view(2, 144)).shape == (2, 3, 24, 24)
    with pytest.raises(ConfigError, match="resolution 17: expected a multiple of 2"):
        section("janus", models["janus"][1], resolution=17).positions()


class Taming:
    """taming-transformers' VQModel as functions of tensors by the names of its keys, which are made when first used."""

    def __init__(self, channels: int, multipliers: list[int], blocks: int, attention: list[int], size: int) -> None:
        self.channels, self.multipliers, self.blocks = channels, multipliers, blocks
        self.attention, self.size = attention, size
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            fan_in = torch.Size(shape[1:]).numel()
            made = torch.randn(shape, generator=self.generator) * fan_in**-0.5
            self.tensors[name] = made if len(shape) > 1 else made * 0.1 + name.endswith("weight")
        return self.tensors[name]

    def conv(self, x: Tensor, name: str, out: int, kernel: int = 3, stride: int = 1) -> Tensor:
        weight = self.tensor(f"{name}.weight", out, x.shape[1], kernel, kernel)
        padding = kernel // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.tensor(f"{name}.bias", out), stride, padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale, shift = self.tensor(f"{name}.weight", x.shape[1]), self.tensor(f"{name}.bias", x.shape[1])
        return F.group_norm(x, 32, scale, shift, 1e-6)

    def residual(self, x: Tensor, name: str, out: int) -> Tensor:
        hidden = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", out)
        hidden = self.conv(F.silu(self.norm(hidden, f"{name}.norm2")), f"{name}.conv2", out)
        return hidden + (x if x.shape[1] == out else self.conv(x, f"{name}.nin_shortcut", out, 1))

    def attend(self, x: Tensor, name: str) -> Tensor:
        normal = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(normal, f"{name}.{which}", x.shape[1], 1).flatten(2).mT for which in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).mT.view_as(x)
        return x + self.conv(mixed, f"{name}.proj_out", x.shape[1], 1)

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.residual(x, f"{name}.block_1", x.shape[1])
        return self.residual(self.attend(x, f"{name}.attn_1"), f"{name}.block_2", x.shape[1])

    def level(self, x: Tensor, name: str, number: int, blocks: int) -> Tensor:
        for block in range(blocks):
            x = self.residual(x, f"{name}.block.{block}", self.channels * self.multipliers[number])
            if self.size >> number in self.attention:
                x = self.attend(x, f"{name}.attn.{block}")
        return x

    def last(self, x: Tensor, name: str, out: int) -> Tensor:
        return self.conv(F.silu(self.norm(x, f"{name}.norm_out")), f"{name}.conv_out", out)

    def encode(self, pictures: Tensor, latent: int, width: int) -> Tensor:
        """[n, width, h, w]"""
        x = self.conv(pictures, "encoder.conv_in", self.channels)
        for number in range(len(self.multipliers)):
            x = self.level(x, f"encoder.down.{number}", number, self.blocks)
            if number < len(self.multipliers) - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{number}.downsample.conv", x.shape[1], stride=2)
        x = self.last(self.middle(x, "encoder.mid"), "encoder", latent)
        return self.conv(x, "quant_conv", width, 1)

    def decode(self, codes: Tensor, latent: int) -> Tensor:
        """int64 [n, h, w] to [n, 3, H, W]."""
        x = self.conv(self.tensors[pictures.BOOK][codes].permute(0, 3, 1, 2), "post_quant_conv", latent, 1)
        x = self.conv(x, "decoder.conv_in", self.channels * self.multipliers[-1])
        x = self.middle(x, "decoder.mid")
        for number in reversed(range(len(self.multipliers))):
            x = self.level(x, f"decoder.up.{number}", number, self.blocks + 1)
            if number:
                x = F.interpolate(x, scale_factor=2.0)
                x = self.conv(x, f"decoder.up.{number}.upsample.conv", x.shape[1])
        return self.last(x, "decoder", 3)


@pytest.mark.parametrize("attention", [[], [8], [4, 16]], ids=str)
def test_metas_files_are_taming_transformers_own(attention: list[int], tmp_path: Path) -> None:
    """Chameleon's have no attention but in the middle; others of the layout have."""
    taming = Taming(32, [1, 2, 3], 1, attention, SIZE)
    given = drawn(4)
    latents = taming.encode(torch.stack(given), 16, 8).permute(0, 2, 3, 1).flatten(0, 2)
    book = taming.tensors[pictures.BOOK] = latents[torch.randperm(len(latents), generator=taming.generator)[:CODES]]
    expected = torch.cdist(latents.double(), book.double()).argmin(1).view(4, -1)
    again = taming.decode(expected.view(4, 4, 4), 16)
    ddconfig = {
        "double_z": False, "z_channels": 16, "resolution": SIZE, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2, 3], "num_res_blocks": 1, "attn_resolutions": attention, "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": 8, "n_embed": CODES, "ckpt_path": "vqgan.ckpt", "lossconfig": {"target": "a.b"}}
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": {**params, "ddconfig": ddconfig}}}))
    unneeded = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    saved = {"state_dict": {**taming.tensors, **unneeded}, "global_step": 3}
    torch.save(saved, tmp_path / "vqgan.ckpt")
    config = section("chameleon", tmp_path)
    assert (config.sizes(), config.size, config.positions()) == ((CODES,), SIZE, 16)
    teacher = config.build()
    assert torch.equal(codes_of(teacher, given), expected) and len(expected.unique()) > 8
    assert teacher.decodes and again.abs().max() > 0.2
    torch.testing.assert_close(teacher.pictures(expected), again.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    del saved["state_dict"]["decoder.conv_in.bias"]
    torch.save(saved, tmp_path / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=r"missing +decoder\.conv_in\.bias"):
        section("chameleon", tmp_path).build()
    (tmp_path / "vqgan.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"a vqgan\.yaml and no vqgan\.ckpt"):
        section("chameleon", tmp_path).build()
    (tmp_path / "vqgan.yaml").write_text("model: {}")
    with pytest.raises(ConfigError, match=r"expected model\.params with ddconfig"):
        section("chameleon", tmp_path).sizes()


@pytest.mark.parametrize("kind", WHOLE)
def test_what_decides_codes_is_described(models: dict[str, tuple[Any, Path, Path]], kind: str, tmp_path: Path) -> None:
    _, _, alone = models[kind]
    described = section(kind, alone).build().describe()
    tensors = load_file(alone / "model.safetensors")
    for name, decides in (("encoder.conv_in.bias", True), (pictures.BOOK, True), ("post_quant_conv", False)):
        name = next(one for one in tensors if one.startswith(name))
        other = tmp_path / name
        shutil.copytree(alone, other)
        save_file({**tensors, name: tensors[name] + 1e-3}, other / "model.safetensors", {"format": "pt"})
        assert (section(kind, other).build().describe() != described) == decides, name


def test_students_that_see_something_else_are_refused(models: dict[str, tuple[Any, Path, Path]]) -> None:
    teacher = section("janus", models["janus"][1]).build()
    teacher.check(layout())
    squares = layout().image
    assert isinstance(squares, ImageLayout)
    dim = replace(squares, transform=replace(squares.transform, mean=(0.4, 0.5, 0.5)))
    native = NativeLayout(1, ImageTransform(Native(2, 64), (0.5,) * 3, (0.5,) * 3))
    for image, found in (
        (None, "takes no pictures"),
        (native, "keeps the aspect ratio of pictures"),
        (replace(squares, tokens=63), r"has 63 positions for squares of 16"),
        (layout(32).image, "has 64 positions for squares of 32"),
        (dim, r"mean \(0\.4, 0\.5, 0\.5\)"),
    ):
        refused = rf"64 codes of a square of 16 pixels .*, and the model .*{found}"
        with pytest.raises(ConfigError, match=refused) as error:
            teacher.check(replace(layout(), image=image))
        assert "\n" not in str(error.value)


def test_sizes_are_known_without_weights_or_torch(models: dict[str, tuple[Any, Path, Path]], tmp_path: Path) -> None:
    """And are kept, so that a run's config can be read where its teacher is not."""
    code = (
        "import sys; from mm.models.teachers.config import *; "
        "print([(one.sizes(), one.size, one.positions()) for one in (ChameleonConfig(), JanusConfig(), Emu3Config())], "
        "'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    published = [((8192,), 512, 1024), ((16384,), 384, 576), ((32768,), 512, 4096)]
    assert said.strip() == f"{published} False"
    for kind, (_, whole, alone) in models.items():
        for folder in (whole, alone):
            shutil.copytree(folder, tmp_path / "gone")
            config = section(kind, tmp_path / "gone")
            shutil.rmtree(tmp_path / "gone")
            again = TEACHERS.resolve(kind).model_validate(config.model_dump())
            assert (again.sizes(), again.size, again.positions()) == ((CODES,), SIZE, SIDE**2)
            with pytest.raises(ConfigError, match="there is no such folder"):
                again.build()


def test_what_is_no_teacher_says_so(models: dict[str, tuple[Any, Path, Path]], tmp_path: Path) -> None:
    _, _, alone = models["janus"]
    with pytest.raises(ConfigError, match="there is no such folder"):
        section("janus", tmp_path / "nowhere").sizes()
    with pytest.raises(ConfigError, match=r"of a janus_vqgan model; expected chameleon, or chameleon_vqgan"):
        section("chameleon", alone).sizes()
    with pytest.raises(ConfigError, match="holds no exported model; make it with `mm export RUN --to janus-vq"):
        section("vq", tmp_path).sizes()
    with pytest.raises(ConfigError, match=r"patch 4: a code of this teacher stands for 2 pixels"):
        section("janus", alone, patch=4).build()
    with pytest.raises(ConfigError, match=r"codebooks \[7\]: the teacher has \[32\] now"):
        section("janus", alone, codebooks=[7]).build()
    (tmp_path / "config.json").write_bytes((alone / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"there is no model\.safetensors"):
        section("janus", tmp_path).build()
    (tmp_path / "model.safetensors").write_text("none")
    with pytest.raises(ConfigError, match="its safetensors cannot be read"):
        section("janus", tmp_path).build()
    tensors = load_file(alone / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if name != pictures.BOOK}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no model\.vqmodel\.quantize\.embedding\.weight .* so no VQ model"):
        section("janus", tmp_path).build()
    save_file({name: one for name, one in tensors.items() if name != "quant_conv.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing +quant_conv\.bias"):
        section("janus", tmp_path).build()


class CodedConfig(VQConfig):
    """Pictures with a teacher, for `mm data encode`."""

    kind: str = "test_picture_teachers:CodedConfig"
    teacher: TeacherConfig | None = None
    """Of the pictures."""


def test_codes_are_computed_once_and_read_with_pictures(
    models: dict[str, tuple[Any, Path, Path]], tmp_path: Path, cache: Path
) -> None:
    _, whole, _ = models["chameleon"]
    source = {"kind": "captions", "path": "builtin:emoji/test-*.tar.gz", "caption": ""}
    values = {
        "data": {"sources": [source], "context_length": 256, "cache": str(cache), "codes": True, "workers": 0},
        "model": {
            "kind": CodedConfig.model_fields["kind"].default, "size": SIZE, "multipliers": [1, 1], "channels": 32,
            "teacher": {"kind": "chameleon", "name": str(whole)},
        },
        "train": {"max_steps": 1, "batch_tokens": 256},
    }  # fmt: skip
    path = tmp_path / "coded.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(path, [])
    (found,) = encode(config, [], "cpu", (0, 1), Unwatched()).values()
    assert found["finished"] and found["role"] == "codes" and found["unreadable"] == 0
    student = config.model.layout()
    splits = open_splits(config.data, student, config.seed, Unwatched().packing)
    attach_codes(splits, student, config)
    teacher = config.model.teacher.build()
    items = 0
    for batch in one_pass(splits["train"], student, 4, True, False, 0, 1):
        media = batch.media["image"]
        expected = teacher.codes(media.items(), media.length.tolist(), student)
        assert media.codes is not None and torch.equal(media.codes.long(), expected)
        items += len(media)
    assert items == found["items"] > 100 and len(expected.unique()) > 4
    small = load_config(path, ["model.size=24"])
    with pytest.raises(ConfigError, match="squares of 24"):
        encode(small, [], "cpu", (0, 1), Unwatched())
