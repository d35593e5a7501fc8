"""Experts by brute force, in float64: loops over pools, experts and tokens. And batches that are easy to read."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.batch import IGNORE, MODALITIES, PackedBatch
from mm.models.systems.text_lm.config import TextLMConfig
from mm.models.systems.text_lm.model import TextLM

LETTERS = {name[0]: number for name, number in MODALITIES.items()}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
VOCABULARY = 60
"""Of the tokens in batches here."""


def text_lm(kind: str = "llama", experts: Any = None, depths: Any = None, **language: Any) -> TextLM:
    """A language model of four layers with random weights."""
    config = {"model_type": kind, **SMALL, **language}
    torch.manual_seed(0)
    return TextLMConfig.model_validate(
        {"language": {"tokenizer": "builtin:emoji", "config": config}, "experts": experts, "depths": depths}
    ).build()


def batch(*rows: str, seed: int = 0) -> PackedBatch:
    """Rows of segments, a letter a token: `tti|iit` is two of text and one of a picture, and another segment."""
    length = max(len(row.replace("|", "")) for row in rows)
    draw = torch.Generator().manual_seed(seed)
    made = PackedBatch(
        input_ids=torch.randint(VOCABULARY, (len(rows), length), generator=draw),
        labels=torch.full((len(rows), length), IGNORE),
        segment_ids=torch.zeros(len(rows), length, dtype=torch.int32),
        position_ids=torch.zeros(len(rows), length, dtype=torch.int64),
        modality=torch.zeros(len(rows), length, dtype=torch.uint8),
        media={},
        ids=[[] for _ in rows],
        sources=("",) * len(rows),
        draws=torch.arange(len(rows)) + 7,
    )
    for number, row in enumerate(rows):
        start = 0
        for segment, letters in enumerate(row.split("|"), 1):
            where = slice(start, start + len(letters))
            made.segment_ids[number, where] = segment
            made.position_ids[number, where] = torch.arange(len(letters))
            made.modality[number, where] = torch.tensor([LETTERS[letter] for letter in letters])
            made.labels[number, where][:-1] = made.input_ids[number, where][1:]
            start += len(letters)
    return replace(made, targets=-1)


def share(tokens: int, capacity: float) -> int:
    """How many of so many tokens an expert takes: the nearest number, but one at least."""
    return min(tokens, max(1, round(tokens * capacity)))


def choice(scores: list[list[float]], pools: list[int], capacity: float) -> list[list[bool]]:
    """Which tokens each expert takes: of every pool those of the highest scores; of equal ones the first."""
    chosen = [[False] * len(one) for one in scores]
    for pool in set(pools):
        here = [token for token, of in enumerate(pools) if of == pool]
        for expert in range(len(scores[0])):
            best = sorted(here, key=lambda token: (-scores[token][expert], token))
            for token in best[: share(len(here), capacity)]:
                chosen[token][expert] = True
    return chosen


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[D] to [D]."""
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


Weights = dict[str, Tensor]
"""By name as in `Experts`: `groups.text.gate_up`, `.down` and, of several experts, `.router.weight`."""


def expert_layer(
    hidden: Tensor,
    groups: dict[str, int],
    of: list[str | None],
    pools: list[int],
    weights: Weights,
    capacity: float | None = None,
    normalize: bool = False,
) -> tuple[Tensor, dict[str, list[list[bool]]]]:
    """What the experts add to tokens [N, D], and by group which experts took each of its tokens.

    Args:
        groups: experts of each; of: the group of each token, None for padding; pools: of each token.
    """
    out = [torch.zeros_like(one) for one in hidden]
    members = {}
    for group, experts in groups.items():
        own = [token for token, name in enumerate(of) if name == group]
        gate_up, down = (weights[f"groups.{group}.{part}"] for part in ("gate_up", "down"))
        if experts == 1:
            for token in own:
                out[token] = swiglu(hidden[token], gate_up[0], down[0])
            continue
        if not own:
            continue
        scores = [weights[f"groups.{group}.router.weight"] @ hidden[token] for token in own]
        taken = choice([one.tolist() for one in scores], [pools[token] for token in own], capacity or 1 / experts)
        members[group] = taken
        for token, score, mine in zip(own, scores, taken, strict=True):
            total = sum((torch.sigmoid(score[expert]) for expert in range(experts) if mine[expert]), torch.tensor(0.0))
            for expert in range(experts):
                if mine[expert]:
                    weight = torch.sigmoid(score[expert]) / (total if normalize else 1)
                    out[token] = out[token] + weight * swiglu(hidden[token], gate_up[expert], down[expert])
    return torch.stack(out), members
