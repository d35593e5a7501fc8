"""Vision towers of timm and open_clip by name: the features of one block.

Towers are asked for intermediate features rather than for their pooled output, so vision transformers and convolutional
towers alike can be used, and the block of a published model can be named (Open-Qwen2VL: the last but one, without
the final norm). No block is taken away: what is saved is the tower as it was published.

Pictures in their own aspect ratio go through a vision transformer of timm together, as one sequence of patches without
padding: position embeddings are resampled to each grid, as timm does it, and a patch attends to its own picture alone.
Each module runs once a batch, whatever the grids are, so with sharded weights no rank waits for another.

Where tokens merge, or frames of clips look at one another, the blocks of timm's vision transformers run with room for
that (`mm.models.vit`); else towers run as their libraries run them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from mm.data.batch import MediaBatch
from mm.errors import ConfigError
from mm.models.config import VisionConfig
from mm.models.grids import Grid, each_grid
from mm.models.merging import counts, schedule, unmerge
from mm.models.vit import make_room, run_blocks


@dataclass(frozen=True)
class Runs:
    """Which positions of a sequence are of one picture: (pictures, positions of each), one run after the other."""

    sizes: list[tuple[int, int]]


class VisionTower(nn.Module):
    """See the module. `width` of a feature; a feature for every `patch` by `patch` pixels, or, where `is_grid` is
    false, `features` of a square: those of merged patches, and of the class token in front where `class_token` is
    true."""

    temporal: nn.ModuleList | None
    """What blocks call where they run on clips; see `set_temporal`."""

    def __init__(self, config: VisionConfig, weights: bool = True) -> None:
        super().__init__()
        build = _from_open_clip if config.name.startswith("open_clip/") else _from_timm
        try:
            self.featurizer = build(config, config.pretrained and weights)
        except ConfigError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"model.vision.name {config.name}: cannot be built: {reason}") from None
        refuse_batch_norm(self.featurizer, f"model.vision.name {config.name}")
        blocks = _blocks(self.featurizer)
        if not blocks or not hasattr(self.featurizer, "forward_intermediates"):
            raise ConfigError(f"model.vision.name {config.name}: it gives no features of its blocks")
        if not -len(blocks) <= config.block < len(blocks):
            raise ConfigError(f"model.vision.block {config.block}: {config.name} has {len(blocks)} blocks")
        self.block = config.block % len(blocks)
        self.width, self.patch = blocks[self.block]
        if self.patch != config.patch:
            raise ConfigError(
                f"model.vision.patch_size {config.patch}: block {config.block} of {config.name} has a feature for "
                f"every {self.patch} pixels; set model.vision.patch_size to that"
            )
        self.norm = config.norm
        if self.norm and _final_norm(self.featurizer) is None:
            raise ConfigError(
                f"model.vision.norm: {config.name} has no final layer norm over single patches; leave it out"
            )
        self.native = config.resize == "native"
        if self.native:
            _attend_within_pictures(self.featurizer, config.name)
        self.name, self.merge, self.temporal = config.name, config.merge, None
        self.is_grid, self.class_token = config.is_grid, config.class_token
        self.prefix = _prefix_tokens(self.featurizer)
        if self.class_token and self.prefix != 1:
            raise ConfigError(
                f"model.vision.class_token: {config.name} has {self.prefix} tokens in front of its patches, not a "
                "class token alone; leave it out"
            )
        self.features = config.patches + self.class_token
        if self.merge is not None:
            rs = schedule(self.merge.r, self.merge.inflect, self.block + 1)
            make_room(self.featurizer, f"model.vision.merge: {config.name}", rs, self.merge.proportional)
            if not self.merge.restore:
                self.features = counts(config.patches, rs)[-1] + self.class_token

    def set_temporal(self, modules: Sequence[nn.Module]) -> None:
        """Let each block that runs, `block` + 1 of them, call a module of its own between attention and MLP when it
        runs on clips: `module(x [n * F, N, D], F)`, prefix tokens in front, all frames of a clip together.

        Raises `ConfigError` for a tower whose blocks are not known, and for one that merges: then a place is of another
        patch in every frame.
        """
        if self.merge is not None:
            raise ConfigError(
                f"model.vision.merge: {self.name} looks across the frames of clips, in which the same place would be "
                "of other patches; leave out one of the two"
            )
        self.temporal = nn.ModuleList(modules)
        make_room(self.featurizer, f"model.vision.name: {self.name}", [0] * (self.block + 1), between=modules)

    def forward(self, media: MediaBatch) -> Tensor:
        """[sum rows * columns, D]: the features of all pictures, row by row of their `grids`, prefix tokens left out;
        of clips those of each frame."""
        if self.native:
            return self._normed(self._ragged(media))
        pixels = media.stacked()
        return self.of_clips(pixels).flatten(0, 2) if pixels.ndim == 5 else self.of_squares(pixels).flatten(0, 1)

    def grids(self, media: MediaBatch) -> list[Grid]:
        """(rows, columns) of the features of each picture; one row of all where they are no grid."""
        if not self.is_grid:
            return [(1, self.features)] * len(media)
        return [(height // self.patch, width // self.patch) for _, height, width in media.shapes.tolist()]

    def of_squares(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] pixels to [N, T, D] features."""
        return self._normed(self._of_block(pixels))

    def _of_block(self, pixels: Tensor) -> Tensor:
        if self.merge is not None or self.temporal is not None:
            return self._by_block(pixels, None)
        featurizer: Any = self.featurizer
        run = partial(featurizer.forward_intermediates, pixels, indices=[self.block], intermediates_only=True)
        if self.class_token:
            return _with_class_token(run, hasattr(featurizer, "transformer"))
        found = run(stop_early=True, output_fmt="NCHW")  # both libraries leave the norm out by default
        (features,) = found if isinstance(found, list) else found["image_intermediates"]
        return rearrange(features, "n d h w -> n (h w) d")

    def of_clips(self, pixels: Tensor) -> Tensor:
        """[N, F, 3, S, S] pixels of clips to [N, F, T, D] features."""
        frames = pixels.shape[1]
        flat = pixels.flatten(0, 1)
        features = self._of_block(flat) if self.temporal is None else self._by_block(flat, frames)
        return self._normed(features).unflatten(0, (-1, frames))

    def _normed(self, features: Tensor) -> Tensor:
        norm = _final_norm(self.featurizer) if self.norm else None
        return features if norm is None else norm(features)

    def sources(self, media: MediaBatch) -> Tensor:
        """int64 [N, patches]: which token, class token not counted, each patch of each picture was merged into."""
        with torch.no_grad():
            _, source = run_blocks(self.featurizer, media.stacked(), self.block + 1, trace=True)
        assert source is not None
        return source[:, self.prefix :] - self.prefix

    def _by_block(self, pixels: Tensor, frames: int | None) -> Tensor:
        restore = self.merge is not None and self.merge.restore
        hidden, source = run_blocks(self.featurizer, pixels, self.block + 1, frames, trace=restore)
        if source is not None:
            hidden = unmerge(hidden, source)
        return hidden[:, self.prefix - self.class_token :]

    def _ragged(self, media: MediaBatch) -> Tensor:
        vit, grids = cast(VisionTransformer, self.featurizer), self.grids(media)
        # Pictures with equally many patches stand side by side, so that attention takes them together.
        order = sorted(range(len(grids)), key=lambda number: math.prod(grids[number]))
        pictures = media.items()
        # One picture, a patch high: patches are embedded one by one anyway.
        size = {"p": self.patch, "q": self.patch}
        strips = [rearrange(pictures[number], "c (h p) (w q) -> c p (h w q)", **size) for number in order]
        patches = vit.patch_embed(torch.cat(strips, dim=2)[None]).flatten(0, 2)
        placed = each_grid(partial(_placed, vit), patches, [grids[number] for number in order])
        hidden = vit.norm_pre(vit.pos_drop(placed[None]))
        prefix = vit.num_prefix_tokens
        lengths = [prefix + math.prod(grids[number]) for number in order]
        runs = Runs([(len(list(alike)), length) for length, alike in groupby(lengths)])
        for block in islice(vit.blocks, self.block + 1):
            hidden = block(hidden, attn_mask=runs)
        features = dict(zip(order, hidden[0].split(lengths), strict=True))
        return torch.cat([features[number][prefix:] for number in range(len(grids))])


def refuse_batch_norm(tower: nn.Module, where: str) -> None:
    """Raise `ConfigError` for a tower whose features of a picture depend on other pictures. `where`: the setting."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules()):
        raise ConfigError(
            f"{where}: its batch normalisation would make a picture depend on the others of its micro-batch; choose a "
            "tower with layer normalisation, such as timm/convnext_tiny"
        )


def _from_timm(config: VisionConfig, weights: bool) -> nn.Module:
    name = config.name.removeprefix("timm/")
    published = timm.get_pretrained_cfg(name)
    size: dict[str, Any] = {}
    if published and published.fixed_input_size:
        # A vision transformer is made for one size; a convolutional tower takes any and has no such argument.
        size = {"img_size": config.image_size, **({"dynamic_img_size": True} if config.resize == "native" else {})}
    return timm.create_model(name, pretrained=weights, num_classes=0, **size, **config.options)


def _from_open_clip(config: VisionConfig, weights: bool) -> nn.Module:
    """The vision side alone; where that is a model of timm, that model."""
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    name, _, tag = config.name.removeprefix("open_clip/").partition(".")
    published = open_clip.get_model_config(name)
    if published is None:
        raise ConfigError(f"model.vision.name {config.name}: open_clip.list_models() has no {name}")
    vision = {**published["vision_cfg"], "image_size": config.image_size, **config.options}
    quick = published.get("quick_gelu", False)
    if weights:
        about = open_clip.get_pretrained_cfg(name, tag)
        if not about:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ConfigError(f"model.vision.name {config.name}: no such weights of {name}; there are: {known}")
        if about.get("quick_gelu", False) != quick:
            other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
            raise ConfigError(
                f"model.vision.name {config.name}: these weights were trained with{'out' if quick else ''} QuickGELU; "
                f"take open_clip/{other}.{tag}"
            )
        tower = open_clip.create_model(name, pretrained=tag, vision_cfg=vision).visual
    else:
        tower = _build_vision_tower(published["embed_dim"], CLIPVisionCfg(**vision), quick)
    trunk: Any = getattr(tower, "trunk", None)
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size((config.image_size, config.image_size))
    return tower if trunk is None else trunk


def _final_norm(featurizer: Any) -> nn.Module | None:
    """That of a vision transformer's tokens. It looks at each by itself, so it may come behind what picks some."""
    norm = featurizer.ln_post if hasattr(featurizer, "ln_post") else getattr(featurizer, "norm", None)
    return norm if isinstance(norm, nn.LayerNorm) else None


def _blocks(featurizer: Any) -> list[tuple[int, int]]:
    """Of every block the width of a feature, and the pixels along its side."""
    if hasattr(featurizer, "feature_info"):
        return [(block["num_chs"], block["reduction"]) for block in featurizer.feature_info]
    if hasattr(featurizer, "transformer"):
        return [(featurizer.transformer.width, featurizer.patch_size[0])] * featurizer.transformer.layers
    return []


def _prefix_tokens(featurizer: Any) -> int:
    """Tokens in front of the patches."""
    return 1 if hasattr(featurizer, "transformer") else getattr(featurizer, "num_prefix_tokens", 0)


def _with_class_token(run: Any, of_open_clip: bool) -> Tensor:
    """[N, 1 + T, D] of `forward_intermediates`."""
    if of_open_clip:
        found = run(stop_early=True, output_fmt="NLC", output_extra_tokens=True)
        return torch.cat([*found["image_intermediates_prefix"], *found["image_intermediates"]], dim=1)
    ((patches, token),) = run(stop_early=True, output_fmt="NLC", return_prefix_tokens=True)
    return torch.cat([token, patches], dim=1)


def _attend_within_pictures(featurizer: nn.Module, name: str) -> None:
    """Make the attention of a timm vision transformer take `Runs` for a mask. What it is made of stays as it is."""
    if (
        not isinstance(featurizer, VisionTransformer)
        or type(featurizer)._pos_embed is not VisionTransformer._pos_embed
        or type(featurizer.patch_embed) is not PatchEmbed
        or not all(isinstance(one, Block | ResPostBlock) and type(one.attn) is Attention for one in featurizer.blocks)
    ):
        raise ConfigError(
            f"model.vision.resize native: {name} is no plain vision transformer (timm's VisionTransformer with its own "
            "attention); choose another tower or `resize: square`"
        )
    for block in featurizer.blocks:
        block.attn.forward = partial(_attention, block.attn)


def _placed(vit: VisionTransformer, patches: Tensor) -> Tensor:
    """[n, rows, columns, D] to [n, prefix + rows * columns, D]: timm's `_pos_embed` up to its dropout, which is a
    module, and those have to run equally often on all ranks."""
    found = patches.flatten(1, 2)
    tokens = [token.expand(len(found), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    if vit.pos_embed is None:
        return torch.cat([*tokens, found], dim=1)
    placed_too = 0 if vit.no_embed_class else vit.num_prefix_tokens
    positions = resample_abs_pos_embed(vit.pos_embed, patches.shape[1:3], vit.patch_embed.grid_size, placed_too)
    if vit.no_embed_class:
        return torch.cat([*tokens, found + positions], dim=1)
    return torch.cat([*tokens, found], dim=1) + positions


def _attention(self: Attention, x: Tensor, attn_mask: Runs, is_causal: bool = False) -> Tensor:
    """timm's `Attention.forward` on x [1, N, D], where every picture of the runs attends to itself alone."""
    gate = None if self.gate is None else self.gate(x).sigmoid()
    query, key, value = rearrange(self.qkv(x), "1 n (part h d) -> part n h d", part=3, h=self.num_heads)
    query, key = self.q_norm(query), self.k_norm(key)
    out = _within_pictures(query, key, value, attn_mask, self.attn_drop.p if self.training else 0.0)
    out = self.norm(out[None])
    return self.proj_drop(self.proj(out if gate is None else out * gate))


@torch.compiler.disable  # it depends on the batch, and would be compiled anew for each
def _within_pictures(query: Tensor, key: Tensor, value: Tensor, runs: Runs, dropout: float) -> Tensor:
    """[N, H, D] each to [N, H * D]."""
    sizes = [pictures * length for pictures, length in runs.sizes]
    parts = []
    for (pictures, _), *qkv in zip(runs.sizes, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (rearrange(one, "(s m) h d -> s h m d", s=pictures) for one in qkv)
        part = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        parts.append(rearrange(part, "s h m d -> (s m) (h d)"))
    return torch.cat(parts)


def depth_of(config: VisionConfig) -> int:
    """Blocks of a tower that run. It is built without memory, once for each config, and raises `ConfigError` if it
    cannot be."""
    return _depth_of(config.model_dump_json())


@functools.cache
def _depth_of(config: str) -> int:
    with torch.device("meta"):
        return VisionTower(VisionConfig.model_validate_json(config), weights=False).block + 1
