"""Several runs as one model: what is gained by averaging what they say (`mm ensemble`).

Members are averaged by log-probabilities, as in *Pre-training under infinite compute* (2509.14786): p proportional to
exp(mean of log p). The mean of probabilities is reported beside it. For every number K of members the loss is the mean
over subsets of that size, so that the curve over K does not depend on their order.
"""

import csv
import io
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.batch import PackedBatch
from mm.data.config import Split
from mm.data.loader import one_pass
from mm.data.prepare import open_splits, skipped
from mm.errors import ConfigError
from mm.files import atomic
from mm.hub import load
from mm.models import backbone
from mm.models.system import GenerativeSystem

MOST = 30
"""Subsets of one size, drawn where there are more."""
POSITIONS = 512
"""At a time."""
Progress = Callable[[int], None]


@torch.no_grad()
def ensemble(
    paths: Sequence[Path | str], split: Split = "test", device: str = "auto", rows: int = 4,
    progress: Progress = lambda batches: None,
) -> dict[str, Any]:  # fmt: skip
    """Losses in nats a token of the members and of ensembles of 1 to all of them, on a split of the first run's data.

    Returns:
        `tokens`, `members` (name -> loss), and `sizes`: of each K `loss`, of averaged log-probabilities, and
        `probabilities`, of averaged probabilities, both means over `subsets` subsets.

    Raises `ConfigError` where the members do not read the same data: another tokenizer, or none that write text.
    """
    if len(paths) < 2:
        raise ConfigError("an ensemble needs at least 2 runs")
    opened = [load(path, device) for path in paths]
    _, layout, config = opened[0]
    if not hasattr(config, "data"):
        raise ConfigError(
            f"{paths[0]}: a published model has no data; name a run first, whose data all are asked about"
        )
    systems: list[GenerativeSystem] = []
    for path, (other, theirs, _) in zip(paths, opened, strict=True):
        if not isinstance(other, GenerativeSystem):
            raise ConfigError(f"{path}: writes no text; an ensemble is of models that give probabilities of tokens")
        if theirs.fingerprint() != layout.fingerprint():
            raise ConfigError(f"{path}: reads its data otherwise than {paths[0]} (tokenizer, template or media)")
        systems.append(other)
    data = open_splits(config.data, layout, config.seed)
    if split not in data:
        raise ConfigError(f"{paths[0]}: its data have no {split} split; they have {', '.join(data)}")
    data[split].drop(skipped(config.data))
    subsets = [(size, group) for size in range(1, len(paths) + 1) for group in _subsets(len(paths), size)]
    sums, tokens = np.zeros((len(subsets), 2)), 0
    where = next(systems[0].parameters()).device
    for number, batch in enumerate(one_pass(data[split], layout, rows, config.data.isolate_segments), start=1):
        sums += _losses(systems, batch.to(where), [group for _, group in subsets])
        tokens += batch.targets
        progress(number)
    each = sums / tokens
    sizes = []
    for size in range(1, len(paths) + 1):
        of_size = each[[n for n, (one, _) in enumerate(subsets) if one == size]]
        loss, probabilities = of_size.mean(0).tolist()
        sizes.append({"K": size, "loss": loss, "probabilities": probabilities, "subsets": len(of_size)})
    return {"tokens": tokens, "members": [[str(p), float(each[n, 0])] for n, p in enumerate(paths)], "sizes": sizes}


def _subsets(members: int, size: int) -> list[tuple[int, ...]]:
    found = list(combinations(range(members), size))
    if len(found) <= MOST or size == 1:
        return found
    chosen = np.random.default_rng([members, size]).choice(len(found), MOST, replace=False)
    return [found[n] for n in sorted(chosen)]


def _losses(systems: Sequence[GenerativeSystem], batch: PackedBatch, subsets: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Sums of -log p of the batch's targets, [subsets, 2]: averaged log-probabilities, averaged probabilities."""
    keep = batch.learned()
    targets, sums = batch.labels.flatten()[keep], np.zeros((len(subsets), 2))
    members = [_logits(one, batch, keep) for one in systems]
    for start in range(0, len(keep), POSITIONS):
        part = slice(start, start + POSITIONS)
        said = torch.stack([F.log_softmax(logits(part).float(), dim=-1) for logits in members])
        places = targets[part, None]
        for number, group in enumerate(subsets):
            some = said[list(group)]
            mean = some.mean(0)
            log_p = (mean.gather(1, places)[:, 0] - mean.logsumexp(1)).sum()
            p = (some.gather(2, places.expand(len(group), -1, -1))[..., 0].logsumexp(0) - np.log(len(group))).sum()
            sums[number] -= (float(log_p), float(p))
    return sums


def _logits(system: GenerativeSystem, batch: PackedBatch, keep: Tensor) -> Callable[[slice], Tensor]:
    """Logits [k, V] of some of the positions `keep`: a few at a time, where the head can be asked so."""
    if system.decodes_itself or not backbone.chunks_logits(system.language):
        whole = system.logits(batch, keep)
        return lambda part: whole[part]
    hidden = backbone.hidden_at(system.language, system.embed(batch), batch, keep)
    head, factor = system.language.get_output_embeddings(), system.language.logit_factor
    return lambda part: head(hidden[part]) * factor


def write_table(path: Path, found: dict[str, Any]) -> None:
    """K and loss, for `mm fit FILE --law E+A/K^a --metric loss`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["K", "loss", "probabilities", "subsets"])
    writer.writeheader()
    writer.writerows(found["sizes"])
    with atomic(path) as file:
        file.write(text.getvalue().encode())
