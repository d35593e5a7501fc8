"""How much a model makes of metadata: the loss of held-out documents with the right ones, with wrong ones, with none.

Everything is read off one packed split whose documents have metadata: the tokens of a document and their targets are
the same under every condition, only what stands in front of them is exchanged. So losses can be compared document by
document.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from mm.data.batch import collate
from mm.data.layout import Layout
from mm.data.pack import pack
from mm.data.packed import PackedDataset, join_segments
from mm.data.sample import Metadata, keyed_rng
from mm.data.tokens import Segment
from mm.errors import DataError
from mm.models.prompts import evaluating, positions_of
from mm.models.system import GenerativeSystem

CONDITIONS = ("right", "wrong", "none")


@dataclass(frozen=True, slots=True)
class Losses:
    """Of n documents: `tokens` [n], learned ones; `nats` of each condition [n], -log p of these, summed."""

    ids: list[str]
    tokens: np.ndarray
    nats: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        """Nats a learned token under each condition, over all documents."""
        return {name: float(nats.sum() / self.tokens.sum()) for name, nats in self.nats.items()}


def conditioned_losses(
    system: GenerativeSystem,
    layout: Layout,
    dataset: PackedDataset,
    rows: int = 8,
    seed: int = 0,
    invented: Mapping[str, Metadata] = MappingProxyType({}),
) -> Losses:
    """Losses of the documents and pieces of documents in a split that have metadata.

    Args:
        rows: of a batch, each as long as the split's, or as its longest document with other metadata.
        seed: draws `wrong` metadata: those of another document, other than its own, by the document's id.
        invented: further conditions by name, such as `{"made up": config.spelt("example.com")}`.

    Raises:
        DataError: no document has metadata, all have the same, or some have media; one is longer than the model's
            positions with other metadata.
    """
    documents = _documents(dataset)
    values = [one.ids[slice(*_span(one))].tolist() for _, one in documents]
    if len(set(map(tuple, values))) < 2:
        raise DataError(f"{dataset.folder}: all its documents have the same metadata, so none are wrong for any")
    fronts: dict[str, Sequence[list[int]]] = {
        "right": values,
        "wrong": [_other(values, n, seed, id) for n, (id, _) in enumerate(documents)],
        "none": [[]] * len(values),
        **{name: [layout.tokenizer.encode(one.text)] * len(values) for name, one in invented.items()},
    }
    row_length = int(dataset.about["settings"]["context_length"])
    nats = {}
    for name, front in fronts.items():
        segments = [_with(one, given) for (_, one), given in zip(documents, front, strict=True)]
        positions_of(system, segments, packed=True)
        nats[name] = _sums(system, layout, segments, max(row_length, *map(len, segments)), rows)
    return Losses([id for id, _ in documents], np.array([one.loss_tokens for one in segments]), nats)


def _documents(dataset: PackedDataset) -> list[tuple[str, Segment]]:
    """What has metadata, with its id."""
    found: list[tuple[str, Segment]] = []
    for number in range(len(dataset)):
        row = dataset.text(number)
        if row.media:
            raise DataError(f"{dataset.folder}: its documents have media; losses with other metadata are of text alone")
        for one in row.segments:
            if one.metadata is not None:
                ids = row.tokens[one.start : one.start + one.length]
                loss = tuple((a - one.start, b - one.start) for a, b in one.loss)
                metadata = (one.metadata[0] - one.start, one.metadata[1] - one.start)
                found.append((one.id, Segment(ids, loss, (), metadata=metadata)))
    if not found:
        raise DataError(f"{dataset.folder}: no document has metadata; set `metadata` of its source")
    return found


def _span(segment: Segment) -> tuple[int, int]:
    assert segment.metadata is not None
    return segment.metadata


def _other(values: list[list[int]], number: int, seed: int, id: str) -> list[int]:
    rng = keyed_rng(seed, id, "wrong metadata")
    while (found := values[int(rng.integers(len(values)))]) == values[number]:
        pass
    return found


def _with(segment: Segment, metadata: list[int]) -> Segment:
    """With other metadata. Without begin of text the first token of a document has no target under any condition."""
    start, stop = _span(segment)
    ids = np.concatenate([segment.ids[:start], np.array(metadata, dtype=np.int32), segment.ids[stop:]])
    moved = start + len(metadata) - stop
    first = stop + (start == 0)
    loss = tuple((max(a, first) + moved, b + moved) for a, b in segment.loss if b > first)
    return replace(segment, ids=ids, loss=loss, metadata=(start, start + len(metadata)) if metadata else None)


@torch.no_grad()
def _sums(system: GenerativeSystem, layout: Layout, segments: list[Segment], row_length: int, rows: int) -> np.ndarray:
    """-log p of the targets of each segment, summed: [n], in nats."""
    packs = pack(np.array([[len(one)] for one in segments]), [row_length])
    order = np.argsort(packs, kind="stable")
    starts = np.searchsorted(packs[order], np.arange(packs.max() + 2))
    sums = np.zeros(len(segments))
    with evaluating(system):
        for first in range(0, len(starts) - 1, rows):
            members = [order[a:b] for a, b in zip(starts[first : first + rows], starts[first + 1 :], strict=False)]
            joined = [join_segments([(str(n), "", segments[n]) for n in some]) for some in members]
            batch = collate(joined, layout, row_length).to(next(system.parameters()).device)
            places = batch.learned()
            of = batch.segment_ids.flatten()[places].long() - 1
            which = np.concatenate([[0], np.cumsum([len(some) for some in members])])[:-1]
            rows_of = (places // row_length).cpu().numpy()
            losses = system.token_losses(batch).double().cpu().numpy()
            np.add.at(sums, np.concatenate(members)[which[rows_of] + of.cpu().numpy()], losses)
    return sums
