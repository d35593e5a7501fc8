"""Meta-attention: in every decoder layer, meta-tokens attend to the meta-tokens before them (2509.16278).

It is a sub-layer of its own, between causal self-attention and MLP. With x what self-attention leaves in the residual,
a position that is a meta-token has x + o(attention(q, k, v of norm(x))), over the meta-tokens of its own document up to
it; all others keep x, to the last bit. Only the few positions of meta-tokens are gathered, so there are no rows of
scores without an entry, and no NaN. Queries and keys are rotated as the model's own; a model that adds positions to its
embeddings has nothing more here.

The sub-layer is part of its decoder layer, as `layer.meta`, so that it is sharded, recomputed and saved with it. Where
the meta-tokens are travels as an explicit keyword argument, `meta`, through transformers' model into each layer. That
there is a norm in front, a residual around it, and that its weights are its own, is ours: no code was published, and
the notes that this follows do not say.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.attention import Packing

ATTENTION = ("self_attn", "attn", "attention")
"""What transformers' layers call their self-attention."""


@dataclass(frozen=True)
class MetaPlaces:
    """Where meta-tokens are among N flat positions: int64 [n], in rising order, at least one; and which of them attend
    to each other. Of a batch without any, one place that belongs to nothing, so that the same modules run as on other
    ranks."""

    places: Tensor
    packing: Packing

    @classmethod
    def of(cls, is_meta: Tensor, packing: Packing) -> "MetaPlaces":
        """is_meta: bool [B, L]; packing: of all positions."""
        places = is_meta.flatten().nonzero()[:, 0]
        if len(places):
            return cls(places, packing.select(places))
        return cls(places.new_zeros(1), packing.padding())


class MetaAttention(nn.Module):
    """See the module: [1, N, D] to what is to be added to it.

    Args:
        config: of the language model, whose heads these are like.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.head_width = getattr(config, "head_dim", None) or width // heads
        few = getattr(config, "num_key_value_heads", None) or heads
        self.dropout = getattr(config, "attention_dropout", 0.0)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.q_proj = nn.Linear(width, heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, few * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, few * self.head_width, bias=False)
        self.o_proj = nn.Linear(heads * self.head_width, width, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=getattr(config, "initializer_range", 0.02))

    @torch.compiler.disable  # it depends on the batch, and would be compiled anew for each
    def forward(self, hidden: Tensor, meta: MetaPlaces, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """rotary: cosines and sines [1, N, d] of the positions."""
        own = self.norm(hidden.index_select(1, meta.places))
        query, key, value = (
            rearrange(projection(own), "1 n (h d) -> 1 h n d", d=self.head_width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            cos, sin = (one.index_select(1, meta.places)[:, None] for one in rotary)
            query, key = (rotated(one, cos, sin) for one in (query, key))
        dropout = self.dropout if self.training else 0.0
        found = meta.packing.attend(self, query, key, value, None, dropout)
        out = self.o_proj(rearrange(found, "1 h n d -> 1 n (h d)"))
        return torch.zeros_like(hidden).index_add(1, meta.places, out.to(hidden.dtype))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[1, H, n, D] with its first d numbers rotated in pairs (i, i + d / 2), by cosines and sines [1, 1, n, d]."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def insert_meta_attention(language: Any, tiny: Any, scaled: bool = False) -> None:
    """Put meta-attention into every layer of a causal language model of transformers.

    Args:
        tiny: a small model of the same kind on the CPU, which is tried out and spoilt (`backbone.miniature`).
        scaled: what writes to the residual begins smaller, as the model's own matrices that do (`LanguageConfig.init`).

    Raises `ConfigError` where the layers are not known, or there is no place between attention and MLP: where both read
    the same (parallel blocks), or what attention gives is scaled or normed before it is added.
    """
    if not _has_place(tiny):
        raise ConfigError(
            f"model.meta_tokens.attention: the layers of {language.config.model_type} have no place between attention "
            "and MLP, or are not known; choose a model with one after the other and norms in front, or set it to false"
        )
    parts = _parts(language)
    for layer, attention in parts:
        with torch.device(next(layer.parameters()).device), torch.no_grad():
            layer.meta = MetaAttention(language.config)
            if scaled:
                layer.meta.o_proj.weight /= math.sqrt(2 * len(parts))
        layer.forward = partial(_layer, layer, layer.forward)
        attention.forward = partial(_attention, attention.forward)


def _parts(language: Any) -> list[tuple[Any, Any]]:
    """Each layer with its self-attention; none where these are not known."""
    base = getattr(language.base_model, "decoder", language.base_model)  # OPT's layers are one further in
    layers: Any = getattr(base, "layers", None) or getattr(base, "h", ())
    return [(layer, getattr(layer, name)) for layer in layers for name in ATTENTION if hasattr(layer, name)]


@torch.no_grad()
def _has_place(tiny: Any) -> bool:
    """Whether a layer knows the residual and what attention gives by their sum alone."""
    if not (parts := _parts(tiny)):
        return False
    layer, attention = parts[0]

    def output(residual: Tensor, attended: Tensor) -> Tensor:
        attention.forward = lambda *args, **kwargs: (attended, None)
        found = layer(residual, attention_mask=None)
        return found[0] if isinstance(found, tuple) else found

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        residual, attended, moved = torch.randn(3, 1, 5, tiny.get_input_embeddings().embedding_dim)
        try:
            pair = output(residual, attended), output(residual + moved, attended - moved)
        except (TypeError, ValueError, AttributeError):  # it wants more than a layer in sequence does
            return False
    return torch.allclose(*pair, rtol=1e-3, atol=1e-4)


def _layer(
    layer: Any, forward: Callable[..., Any], hidden_states: Tensor, *args: Any, meta: MetaPlaces | None = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """`forward` of a layer, whose attention is told what it is added to, and what comes behind it."""
    if meta is None:
        raise ValueError("a model with meta-attention needs `meta` in its call")
    return forward(hidden_states, *args, meta=(layer.meta, hidden_states, meta), **kwargs)


def _attention(
    forward: Callable[..., Any], *args: Any, meta: tuple[MetaAttention, Tensor, MetaPlaces],
    position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """`forward` of a layer's attention, with meta-attention on top of what it gives: the layer adds the sum to the
    residual."""
    if position_embeddings is not None:
        kwargs["position_embeddings"] = position_embeddings
    out, *rest = forward(*args, **kwargs)
    module, residual, places = meta
    return (out + module(residual + out, places, position_embeddings), *rest)
