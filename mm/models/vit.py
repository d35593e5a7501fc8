"""Vision transformers of timm, with room between a block's attention and its MLP.

There tokens merge (`mm.models.merging`) and modules for clips look across frames. A block stays the module that it is
and is called once, so what is done to blocks (recomputing, compiling, sharding) is done to this too; what goes from
one to the next, such as the sizes of merged tokens, are arguments and results. All else is as in timm 1.0: layer scale,
drop path, norms behind attention and MLP, norms of queries and keys, gates.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.merging import match

BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)


def make_room(
    vit: Any, where: str, rs: Sequence[int], proportional: bool = True, between: Sequence[nn.Module] = ()
) -> None:
    """Make the first blocks of a vision transformer take and give more than the tokens (`_block`).

    Args:
        where: the setting that asks for it, and the model's name, for errors.
        rs: of each block, the tokens that it merges away. proportional: attention counts merged tokens by their size.
        between: of each block, what it calls behind its attention where it is given `frames`:
            `module(x [n * frames, N, D], frames)`.

    Raises `ConfigError` for a model whose blocks are not known.
    """
    if isinstance(vit, Eva) and vit.rope is not None:
        raise ConfigError(
            f"{where} has rotary positions, which its blocks would lose; choose a tower without, such as "
            "timm/eva_giant_patch14_clip_224 or timm/vit_base_patch16_clip_224"
        )
    if (
        not isinstance(vit, VisionTransformer | Eva)
        or not all(type(one) in BLOCKS and type(one.attn) in (Attention, EvaAttention) for one in vit.blocks)
        or not isinstance(getattr(vit, "patch_drop", None), nn.Identity | None)
    ):
        raise ConfigError(
            f"{where} is no plain vision transformer of timm (VisionTransformer or Eva, attention before MLP, no patch "
            "dropout); choose one, such as timm/vit_base_patch16_clip_224, which timm has with OpenAI's weights"
        )
    for number, (block, r) in enumerate(zip(vit.blocks, rs, strict=False)):
        block.attn.forward = partial(_attention, block.attn)
        module = between[number] if between else None
        block.forward = partial(_block, block, r, vit.num_prefix_tokens, proportional, module)


def run_blocks(
    vit: Any, pixels: Tensor, blocks: int, frames: int | None = None, trace: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What the last of some blocks gives, which have been made room in.

    Args:
        pixels: [B, 3, H, W]; of clips, all frames of the first one first. frames: of a clip; None: pictures.
        trace: say where each token went.

    Returns:
        [B, T, D], prefix tokens in front, and int64 [B, N] or None: where each of N tokens is among the T.
    """
    x = vit.patch_embed(pixels)
    x = vit.norm_pre(vit._pos_embed(x)[0] if isinstance(vit, Eva) else vit._pos_embed(x))
    size, source = None, None
    if trace:
        source = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    for block in islice(vit.blocks, blocks):
        x, size, source = block(x, size, source, frames)
    return x, source


def _block(
    block: Any, r: int, protected: int, proportional: bool, between: nn.Module | None,
    x: Tensor, size: Tensor | None, source: Tensor | None, frames: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """timm's forward of a block on x [B, N, D], and tokens merged, by their keys, between its halves.

    size: int64 [B, N], the patches that a token stands for, counted in whole numbers, which no precision rounds; None
    while all stand for one. source: int64 [B, N0], where the tokens of the beginning are, if anyone asks.
    """
    behind = isinstance(block, ResPostBlock | EvaBlockPostNorm)
    bias = size.log()[:, None, None] if proportional and size is not None else None
    out, keys = block.attn(x if behind else block.norm1(x), bias)
    x = x + block.drop_path1(block.norm1(out) if behind else _layer_scale(block, 1, out))
    if between is not None and frames is not None:
        x = between(x, frames)
    if r > 0:
        merge = match(keys.detach().mean(dim=1), r, protected)
        if size is None:
            size = torch.ones_like(merge.order)
        x, size = merge.merge(x, size)
        source = None if source is None else merge.sources(source)
    out = block.mlp(x if behind else block.norm2(x))
    x = x + block.drop_path2(block.norm2(out) if behind else _layer_scale(block, 2, out))
    return x, size, source


def _layer_scale(block: Any, half: int, out: Tensor) -> Tensor:
    """EVA's blocks have it as a parameter, if at all."""
    if isinstance(block, Block):
        scaled: Tensor = getattr(block, f"ls{half}")(out)
        return scaled
    gamma = getattr(block, f"gamma_{half}")
    return out if gamma is None else gamma * out


def _attention(self: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """timm's forward of an attention on x [B, N, D], with a bias of keys [B, 1, 1, N]; and the keys [B, H, N, d]."""
    gate = None if self.gate is None else self.gate(x).sigmoid()
    query, key, value = rearrange(_projected(self, x), "b n (part h d) -> part b h n d", part=3, h=self.num_heads)
    query, key = self.q_norm(query), self.k_norm(key)
    bias = None if bias is None else bias.to(query.dtype)
    dropout = self.attn_drop.p if self.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    out = self.norm(rearrange(out, "b h n d -> b n (h d)"))
    return self.proj_drop(self.proj(out if gate is None else out * gate)), key


def _projected(attention: Any, x: Tensor) -> Tensor:
    """[B, N, D] to queries, keys and values, [B, N, 3 D]."""
    if attention.qkv is None:
        return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=2)
    projected: Tensor = attention.qkv(x)
    if isinstance(attention, EvaAttention) and attention.q_bias is not None:  # it has the biases apart
        projected = projected + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return projected
