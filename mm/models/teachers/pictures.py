"""VQ models as teachers of pictures, by transformers: the code nearest to the latent of each of a picture's squares.

Of a checkpoint only the tensors of its VQ model are read, from safetensors; of Meta's `vqgan.ckpt` by torch's
restricted unpickler. A picture is encoded as it is decoded for the student, all of it as a square; the published
preprocessing cuts a square out of its middle. Sources of the structures: Gafni et al., 2203.13131; Esser et
al., 2012.09841 and github CompVis/taming-transformers, whose layout Meta's files have.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import ChameleonVQVAE, Emu3VQVAE, JanusVQVAE
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock, JanusVQVAEDecoder

from mm.data.features import digest_tensors
from mm.data.layout import ImageLayout, Layout
from mm.errors import CheckpointError, ConfigError
from mm.models.released.release import Repository, fit, read_pickle
from mm.models.teachers import in_float32
from mm.models.teachers.config import ChameleonConfig, Emu3Config

PIXELS = 1 << 19
"""That are encoded or decoded at once, and those of a larger picture: two of 512, at a gigabyte of activations."""
DISTANCES = 1 << 25
"""Between latents and codes that are held at once."""
CENTRED = (0.5, 0.5, 0.5)
PREFIXES = ("model.vqmodel.", "vqmodel.", "")
"""Of a VQ model's tensors in a checkpoint of the whole model, now and in files of before, and in one of its own."""
BOOK = "quantize.embedding.weight"


class _VQ:
    """See `PictureTeacher`. Raises `ConfigError` where the model cannot be loaded."""

    medium = "image"
    kind: str
    decodes = True
    frames = 1
    """Pictures that the network makes of one."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        self.sizes: tuple[int, ...] = config.sizes()
        self.size: int = config.size
        self.positions: int = config.positions()
        self._model: Any = model
        self._at_once = max(1, PIXELS // (self.size**2 * self.frames))

    def check(self, layout: Layout) -> None:
        """See `Teacher`."""
        image = layout.image
        found = "takes no pictures" if image is None else "keeps the aspect ratio of pictures"
        if isinstance(image, ImageLayout):
            seen = image.transform
            if (seen.size, seen.mean, seen.std, image.tokens) == (self.size, CENTRED, CENTRED, self.positions):
                return
            found = f"has {image.tokens} positions for squares of {seen.size}, mean {seen.mean} and std {seen.std}"
        raise ConfigError(
            f"model.teacher: it gives {self.positions} codes of a square of {self.size} pixels in values from -1 to 1 "
            f"(mean and std 0.5), and the model {found}; set the model's pictures to the teacher's"
        )

    @torch.no_grad()
    def codes(self, items: list[Tensor], lengths: list[int], layout: Layout) -> Tensor:
        """See `Teacher`."""
        device = items[0].device
        self._model.to(device)
        book = self._codebook()
        found = []
        with in_float32(device):
            for at in range(0, len(items), self._at_once):
                latents = self._latents(torch.stack(items[at : at + self._at_once]).float())  # n c h w
                found.append(nearest(latents.movedim(1, -1).flatten(0, 2), book))
        return torch.cat(found)[:, None]

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """See `PictureTeacher`."""
        if not self.decodes:
            raise ConfigError(
                "model.teacher: transformers' Chameleon has no decoder, so no pictures can be made of its codes; give "
                "the folder of Meta's vqgan.yaml and vqgan.ckpt as model.teacher.name"
            )
        self._model.to(codes.device)
        side = math.isqrt(self.positions)
        with in_float32(codes.device):
            some = [self._decoded(few.view(-1, side, side)) for few in codes.split(self._at_once)]
        return torch.cat(some).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        """See `Teacher`."""
        tensors = {
            f"{part}.{name}": tensor
            for part in ("encoder", "quant_conv")
            for name, tensor in getattr(self._model, part).state_dict().items()
        }
        return {"kind": self.kind, "weights": digest_tensors({**tensors, BOOK: self._model.quantize.embedding.weight})}

    def _codebook(self) -> Tensor:
        """[codes, C] that latents are compared with."""
        return self._model.quantize.embedding.weight

    def _latents(self, pictures: Tensor) -> Tensor:
        """[n, 3, H, W] to [n, C, h, w]."""
        return self._model.quant_conv(self._model.encoder(pictures))

    def _decoded(self, codes: Tensor) -> Tensor:
        """int64 [n, h, w] to [n, 3, H, W]."""
        raise NotImplementedError


class Janus(_VQ):
    """Janus' VQ model, and those that `mm export --to janus-vq` writes, whose directions alone count (github
    deepseek-ai/Janus, `vq_model.py`, `l2_norm`). `config`: a `JanusConfig`, or one of the kind vq."""

    kind = "janus"

    def __init__(self, config: Any) -> None:
        about = JanusVQVAEConfig.from_dict({**config.vq(), "num_patches": math.isqrt(config.positions())})
        super().__init__(config, _load(lambda: JanusVQVAE(about), _tensors(config.where), config.where))

    def _codebook(self) -> Tensor:
        return F.normalize(super()._codebook(), dim=-1)

    def _latents(self, pictures: Tensor) -> Tensor:
        return F.normalize(super()._latents(pictures), dim=1)

    def _decoded(self, codes: Tensor) -> Tensor:
        return self._model.decode(codes.flatten(1))


class Emu3(_VQ):
    """Emu3's VQ model, which is one of clips: a picture is `frames` times the same."""

    kind = "emu3"

    def __init__(self, config: Emu3Config) -> None:
        about = Emu3VQVAEConfig.from_dict(config.vq())
        self.frames, self._heads = about.temporal_downsample_factor, about.num_attention_heads
        super().__init__(config, _load(lambda: Emu3VQVAE(about), _tensors(config.where), config.where))

    def describe(self) -> dict[str, Any]:
        """See `Teacher`."""
        return {**super().describe(), "heads": self._heads}

    def _latents(self, pictures: Tensor) -> Tensor:
        clips = pictures[:, None].expand(-1, self.frames, -1, -1, -1)  # n t c h w, as the encoder takes and gives
        return self._model.quant_conv(self._model.encoder(clips).transpose(1, 2)).squeeze(2)

    def _decoded(self, codes: Tensor) -> Tensor:
        return self._model.decode(codes)


class Chameleon(_VQ):
    """Chameleon's VQ model, in transformers' layout or in Meta's, of which the second has a decoder."""

    kind = "chameleon"

    def __init__(self, config: ChameleonConfig) -> None:
        values, where = config.vq(), config.where
        tensors = _vqgan_tensors(where) if config.is_vqgan else _tensors(where)
        about = ChameleonVQVAEConfig.from_dict(values)
        encoding = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
        super().__init__(config, _load(lambda: ChameleonVQVAE(about), encoding, where))
        self.decodes = config.is_vqgan
        if self.decodes:
            levels = len(about.channel_multiplier)

            def spelt(name: str) -> str:
                """taming-transformers counts levels from the finest, Janus in the order in which they run."""
                return "decoder." + re.sub(r"^up\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)

            decoding = {name: tensor for name, tensor in tensors.items() if name not in encoding}
            self._model.decoder = _load(lambda: _decoder(values), decoding, where, spelt)

    def _decoded(self, codes: Tensor) -> Tensor:
        latents = self._codebook()[codes].movedim(-1, 1)
        return self._model.decoder(self._model.post_quant_conv(latents))


def _decoder(values: dict[str, Any]) -> JanusVQVAEDecoder:
    """That of taming-transformers, which is Janus' but for the levels that have attention."""
    decoder = JanusVQVAEDecoder(JanusVQVAEConfig.from_dict(values))
    levels = reversed(list(enumerate(values["channel_multiplier"])))
    for up, (level, multiplier) in zip(decoder.up, levels, strict=True):
        has_attention = values["resolution"] >> level in (values["attn_resolutions"] or ())
        blocks = range(values["num_res_blocks"] + 1 if has_attention else 0)
        up.attn = nn.ModuleList(JanusVQVAEAttnBlock(values["base_channels"] * multiplier) for _ in blocks)
    return decoder


def nearest(latents: Tensor, book: Tensor) -> Tensor:
    """int64 [N]: of each of latents [N, C] the code of book [K, C] at the least distance, the first of several."""
    lengths = book.square().sum(1)  # |z - e|^2 without |z|^2, which is the same for all codes
    at_once = max(1, DISTANCES // len(book))
    return torch.cat([(lengths - 2 * some @ book.T).argmin(1) for some in latents.split(at_once)])


def _load(
    build: Callable[[], nn.Module], tensors: dict[str, Tensor], where: str, spelt: Callable[[str], str] = str
) -> nn.Module:
    """A model with these weights in float32, no other ones made first. Raises `ConfigError` unless they fit."""
    with torch.device("meta"):
        model = build()
    try:
        fitted = fit(model, tensors, where, spelt)
    except CheckpointError as error:
        raise ConfigError(f"model.teacher: {error}") from None
    kept = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in fitted.items()}
    model.load_state_dict(kept, assign=True)
    return model.eval().requires_grad_(False)


def _tensors(where: str) -> dict[str, Tensor]:
    """Of the VQ model in a folder or repository of safetensors, by its own names. Raises `ConfigError`."""
    repository = Repository(where)
    found: dict[str, Tensor] = {}
    try:
        index = repository.optional_json("model.safetensors.index.json")
        if index is None:
            with safe_open(repository.file("model.safetensors"), framework="pt") as file:
                files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            files = index["weight_map"]
        prefix = next((prefix for prefix in PREFIXES if prefix + BOOK in files), None)
        if prefix is None:
            raise CheckpointError(f"{where}: there is no {PREFIXES[0]}{BOOK} in its safetensors, so no VQ model")
        names = [name for name in files if name.startswith(prefix)]
        for one in sorted({files[name] for name in names}):
            with safe_open(repository.file(one), framework="pt") as file:
                found |= {name.removeprefix(prefix): file.get_tensor(name) for name in names if files[name] == one}
    except CheckpointError as error:
        raise ConfigError(f"model.teacher: {error}") from None
    except (OSError, SafetensorError, LookupError, TypeError) as error:
        raise ConfigError(f"model.teacher: {where}: its safetensors cannot be read ({error})") from None
    return found


def _vqgan_tensors(where: str) -> dict[str, Tensor]:
    """Of a `vqgan.ckpt`, without those of the losses that it was trained with. Raises `ConfigError`."""
    path = Path(where).expanduser() / "vqgan.ckpt"
    if not path.is_file():
        raise ConfigError(f"model.teacher.name {where}: there is a vqgan.yaml and no vqgan.ckpt")
    try:
        saved = read_pickle(path)
    except CheckpointError as error:
        raise ConfigError(f"model.teacher.name {error}") from None
    found = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    parts = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
    return {name: tensor for name, tensor in found.items() if name.partition(".")[0] in parts}
