"""Tokens of their own weights in a language model that is frozen: the rows of those that were added to its vocabulary.

The model's embeddings and head stay as they are. Hooks put other rows in the place of the last ones, in what is read
and in what is predicted; these rows are a parameter of their own, so freezing, decay, sharding and checkpoints treat
them as any other. It is open_flamingo's training of new tokens alone, which does it by gradients that are masked.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NewTokens(nn.Module):
    """Rows from `first` on of a language model's embeddings and, where it is another tensor, of its head.

    Both are read in calls of the module: engines that keep weights in parts gather them around these.
    """

    def __init__(self, language: Any, first: int, tokens: int) -> None:
        super().__init__()
        self.first, self.tokens = first, tokens
        embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
        rows = slice(first, first + tokens)
        self.embedding = nn.Parameter(embedding.weight[rows].detach().clone())
        tied = head.weight is embedding.weight
        self.head = None if tied else nn.Parameter(head.weight[rows].detach().clone())
        embedding.register_forward_hook(partial(_read, self))
        head.register_forward_hook(partial(_predict, self))
        language.logit_factor = None  # the loss takes whole logits, as for all heads that are no plain product

    def forward(self, given: Tensor) -> Tensor:
        """Ids, int64 […], to embeddings […, D]; hidden states […, D] to logits […, tokens]."""
        if not given.is_floating_point():
            return F.embedding((given - self.first).clamp(0, self.tokens - 1), self.embedding)
        return F.linear(given, self.embedding if self.head is None else self.head)


def _read(new: NewTokens, embedding: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
    (ids,) = args
    own = (ids >= new.first) & (ids < new.first + new.tokens)
    return torch.where(own[..., None], new(ids).to(out.dtype), out)


def _predict(new: NewTokens, head: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
    (hidden,) = args
    logits = new(hidden).to(out.dtype)
    return torch.cat([out[..., : new.first], logits, out[..., new.first + logits.shape[-1] :]], dim=-1)
