"""Mixture of depths: layers that most tokens pass by (Raposo et al., 2404.02258; as in MoMa, 2407.21770 2.3).

In such a layer a router scores all tokens of a pool, and those with the highest scores take part, before modalities
are told apart: they attend to each other alone, each at its own position and in its own segment. What the layer adds to
a token is weighed by the token's score, so the router learns; the others are left as they are, to the last bit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mm.errors import ConfigError
from mm.models.attention import Packing
from mm.models.config import DepthsConfig
from mm.models.experts import layers_of
from mm.models.routing import Record, Router, Routing

NAME = "depth"
"""Of the routers, among the groups of experts."""


def stage_layers(language: Any, config: DepthsConfig) -> None:
    """Let most tokens pass by some layers of a causal language model of transformers.

    Raises `ConfigError` where the model has no such layer.
    """
    layers = layers_of(language, "depths")
    width = language.get_input_embeddings().embedding_dim
    numbers = range(config.first, len(layers), config.every)
    if not numbers:
        raise ConfigError(f"model.depths.first {config.first}: the model has {len(layers)} layers, numbered from 0")
    for number in numbers:
        layer: Any = layers[number]
        with torch.device(next(layer.parameters()).device):
            layer.depth_router = Router(width, 1)
        torch.nn.init.normal_(layer.depth_router.weight, std=language.config.initializer_range)
        layer.forward = partial(_staged, layer, layer.forward, str(number), config.capacity)


def _staged(
    layer: Any, forward: Callable[..., Any], number: str, capacity: float, hidden: Tensor, *, routing: Routing,
    packing: Packing, position_ids: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any,
) -> Any:  # fmt: skip
    """`forward` of a layer on the tokens that take part; hidden: [1, N, D]."""
    flat = hidden[0]
    score = layer.depth_router(flat)[:, 0]
    chosen = _taking_part(flat, score, number, capacity, routing)
    weight = torch.sigmoid(score.index_select(0, chosen))
    scopes = packing.select(chosen) if len(chosen) else packing.padding()
    if not len(chosen):  # the layer runs, as on other ranks, and gives nothing
        chosen = torch.zeros(1, dtype=torch.int64, device=flat.device)
        weight = 0 * score[:1]
    own = flat.index_select(0, chosen)
    out = forward(
        own[None],
        routing=routing.select(chosen),
        packing=scopes,
        position_ids=position_ids[:, chosen],
        position_embeddings=tuple(one[:, chosen] for one in position_embeddings),
        **kwargs,
    )
    after = out[0] if isinstance(out, tuple) else out  # of old and new layers of transformers
    added = (after[0] - own) * weight[:, None]
    whole = flat.index_add(0, chosen, added.to(flat.dtype))[None]
    return (whole, *out[1:]) if isinstance(out, tuple) else whole


def _taking_part(flat: Tensor, score: Tensor, number: str, capacity: float, routing: Routing) -> Tensor:
    """int64 [n]: the positions that take part, in rising order."""
    real = routing.everyone.places
    if routing.auxiliary is not None:
        return real[(routing.auxiliary[number][NAME](flat[real]) > 0)[:, 0]]
    if not len(real):
        return real
    chosen = routing.everyone.choose(score[real][:, None], capacity)[0]
    member = torch.zeros(len(real), dtype=torch.bool, device=flat.device)
    member[chosen] = True
    routing.records[number, NAME] = Record(flat.detach() if routing.keep else None, real, member[:, None])
    return real[chosen.sort().values]
