"""A larger language model out of a smaller one's weights, for a stage's `convert: mm.models.growth:grow`.

Deeper: the layers of the smaller one once more on top of themselves. Wider, by a whole number: every unit is there
several times, and who reads it reads each copy with a share of the old weight, the shares adding up to one. So a wider
model computes the very same function (bert2BERT, 2110.07143, with a balanced map: where all units are copied equally
often their mean and variance stay what they were, which norms need).

Equal shares (`grow_evenly`, as published) keep copies equal for ever, since equal copies get equal gradients. Drawn
ones (`grow`) tell them apart from the first step on, as LEMON (2310.07999) does.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mm.errors import CheckpointError
from mm.models.system import System

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
LAYER = re.compile(r"(language\.(?:model\.layers|transformer\.h)\.)(\d+)(\..+)")
FUSED = {"c_attn": 3}
"""Layers whose output is so many vectors, one behind the other."""
SPREAD = 0.5
"""How far a drawn share may be from the equal one, relative to it, before shares are made to add up."""
Share = Callable[[int, Tensor], Tensor]
"""Of so many copies, for every number of a tensor: [copies, *its shape], adding up to 1."""


def grow(tensors: dict[str, Tensor], system: System) -> dict[str, Tensor]:
    """The tensors of a smaller language model, by name, as those of this system's, of the same kind.

    The width of the model, of its MLPs and its number of heads may each be a whole multiple of what they were, the
    heads of queries and of keys by the same one. Heads are as large as they were: say so by `head_dim`, since weights
    show no more than whether they are whole heads of the new size. The vocabulary is the same. Wider, the function
    stays, to rounding, with tied heads too. Deeper, layer l is the old layer l mod L for whole copies of the L old
    ones, and what remains on top is the upper ones again; the function does not stay. Shares are drawn with torch's
    generator. Tensors of other parts than `language` pass by.

    Raises `CheckpointError` where kind or shapes do not allow it.
    """
    return _grown(tensors, system, _drawn)


def grow_evenly(tensors: dict[str, Tensor], system: System) -> dict[str, Tensor]:
    """`grow` with equal shares: copies stay equal until something, such as dropout, tells them apart."""
    return _grown(tensors, system, _equal)


def layer_sources(old: int, new: int) -> list[int]:
    """The old layer that each of the new ones is a copy of (bert2BERT, 3.2)."""
    return [*range(old)] * (new // old) + [*range(old - new % old, old)]


def _equal(copies: int, like: Tensor) -> Tensor:
    return torch.full((copies, *like.shape), 1 / copies, dtype=like.dtype, device=like.device)


def _drawn(copies: int, like: Tensor) -> Tensor:
    noise = torch.empty(copies, *like.shape, dtype=like.dtype, device=like.device).uniform_(-SPREAD, SPREAD)
    return (1 + (noise - noise.mean(0))) / copies


def _grown(tensors: dict[str, Tensor], system: System, share: Share) -> dict[str, Tensor]:
    language: Any = getattr(system, "language", None)
    kind = getattr(getattr(language, "config", None), "model_type", "none")
    if kind not in KINDS or getattr(system, "sparsity", None) is not None:
        raise CheckpointError(f"growth: for dense models of the kinds {', '.join(KINDS)}; this one's is {kind}")
    tensors = _deeper(tensors, language.config.num_hidden_layers)
    grown = {name: tensor for name, tensor in tensors.items() if not name.startswith("language.")}
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    tied = head.weight is embedding.weight
    copies: dict[str, int] = {}
    about = language.config
    head_size = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    for path, part in language.named_modules():
        if part is head and tied:
            if f"language.{path}.weight" in tensors:
                raise CheckpointError("growth: the smaller model's head is not tied; set tie_word_embeddings: false")
            continue
        for key, new in part.named_parameters(recurse=False):
            name = f"language.{path}.{key}"
            old = tensors.get(name)
            if old is None and part is head:  # of a smaller model whose head is tied
                old = next(tensors[n] for n in tensors if n.endswith((".embed_tokens.weight", ".wte.weight")))
            if old is None:
                raise CheckpointError(f"growth: the smaller model has no {name}; both must be of one kind")
            try:
                grown[name] = _wider(part, path.rpartition(".")[2], old, new.shape, share)
                keys = {"k_proj": len(old), "c_attn": old.shape[-1] // 3}.get(path.rpartition(".")[2], 0)
                if keys % head_size:
                    raise ValueError(f"no whole heads of {head_size}, and heads stay as large: give more, or head_dim")
                if part is head and len(old) != len(new):
                    raise ValueError("the vocabulary must be the same")
            except ValueError as error:
                what = f"{name}, {list(old.shape)} to {list(new.shape)}"
                raise CheckpointError(f"growth: {what}: {error}") from None
            copies[path.rpartition(".")[2]] = len(new) // len(old)
    if copies.get("q_proj") != copies.get("k_proj"):
        raise CheckpointError(
            f"growth: {copies['q_proj']} times the heads of queries and {copies['k_proj']} times those of keys; the "
            "two must grow alike (num_attention_heads, num_key_value_heads)"
        )
    if tied:
        # The head's rows are the embeddings', which are read whole: what it reads is shared out by the norm before it.
        norm = "language.transformer.ln_f" if kind == "gpt2" else "language.model.norm"
        for name, old in tensors.items():
            if name.startswith(f"{norm}."):
                grown[name] = (share(len(grown[name]) // len(old), old) * old).flatten()
    return grown


def _deeper(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """With as many layers, each a copy; other names as they are."""
    found = {name: match for name in tensors if (match := LAYER.fullmatch(name))}
    old = 1 + max((int(match[2]) for match in found.values()), default=-1)
    if not old or layers < old:
        raise CheckpointError(f"growth: from {old} layers to {layers}; expected at least as many, and some")
    deeper = {name: tensor for name, tensor in tensors.items() if name not in found}
    for number, source in enumerate(layer_sources(old, layers)):
        for name, match in found.items():
            if int(match[2]) == source:
                deeper[f"{match[1]}{number}{match[3]}"] = tensors[name]
    return deeper


def _wider(part: nn.Module, name: str, old: Tensor, new: torch.Size, share: Share) -> Tensor:
    """A parameter with every unit it writes copied, and every one it reads shared out; unit c x old + i is a copy of i.

    Raises `ValueError`.
    """
    from transformers.pytorch_utils import Conv1D

    vectors = FUSED.get(name, 1)
    if old.ndim == 1:  # of a norm, or a bias
        if name in ("q_norm", "k_norm") and old.shape != new:
            raise ValueError("heads must stay as large as they were")
        return old.view(vectors, -1).repeat(1, _copies(old.shape[0], new[0])).flatten()
    if isinstance(part, nn.Embedding):
        if old.shape[0] != new[0]:
            raise ValueError("the vocabulary, and the positions, must be the same")
        return old.repeat(1, _copies(old.shape[1], new[1]))
    # [out, in]; GPT-2's layers have it the other way round.
    flipped = isinstance(part, Conv1D)
    weight, shape = (old.T, new[::-1]) if flipped else (old, new)
    written, read = (_copies(a, b) for a, b in zip(weight.shape, shape, strict=True))
    copied = weight.reshape(vectors, -1, weight.shape[1]).repeat(1, written, 1).flatten(0, 1)
    found = (share(read, copied) * copied).transpose(0, 1).flatten(1)
    return found.T.contiguous() if flipped else found


def _copies(old: int, new: int) -> int:
    if new % old:
        raise ValueError(f"{new} is no multiple of {old}")
    return new // old
