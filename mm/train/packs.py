"""The packs that stand for a training set where not all can be looked at: a cross-section, and the worst of them.

Where nothing is packed yet, the fullest packs that the budgets allow stand for all.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mm.data.batch import MODALITIES, MediaBatch, PackedBatch, collate, decoded_shape
from mm.data.config import DataConfig
from mm.data.layout import AudioLayout, Layout
from mm.data.loader import source_infos
from mm.data.mixture import Draw, Mixture
from mm.data.packed import Pack, PackedDataset, PackedMedia, PackedSegment
from mm.data.prepare import find_packed
from mm.errors import DataError
from mm.train.config import Run, TrainConfig
from mm.train.stages import count_steps

SAMPLE = 32
"""Packs of a cross-section, evenly spaced by cost among those that are drawn."""
DRAWS = 10_000


class Packs:
    """The packs of a training set; where nothing is packed yet, the fullest packs that the budgets allow.

    tokens: means of a row, by modality, `loss` and `padding`. sample: packs that stand for all. codebooks: what a
    teacher says of a position of sound, so many numbers, is given with every batch, for the teacher does not run here.
    """

    def __init__(
        self,
        layout: Layout,
        data: DataConfig,
        dataset: PackedDataset | None = None,
        mixture: Mixture | None = None,
        codebooks: int = 0,
    ) -> None:
        self.layout, self.data, self.dataset, self.mixture, self.codebooks = layout, data, dataset, mixture, codebooks
        counts: dict[str, float]
        if dataset is None or mixture is None:
            self.origin = "budgets"
            self.sample = fullest_packs(layout, data)
            each = [_counts(pack, layout) for pack in self.sample]
            counts = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        else:
            self.origin = str(dataset.folder)
            self.limit = mixture.total()
            drawn = np.array([draw.pack for draw in _draws(mixture, min(DRAWS, len(dataset)))])
            columns = {name: dataset.index[name].to_numpy() for name in ("tokens", "loss_tokens")}
            self._by_cost = (dataset.encoder_costs(), columns["loss_tokens"], columns["tokens"])
            counts = {
                "tokens": columns["tokens"][drawn].mean(),
                "loss": columns["loss_tokens"][drawn].mean(),
                **{kind: dataset.index[f"{kind}_tokens"].to_numpy()[drawn].mean() for kind in layout.media()},
            }
            order = drawn[np.lexsort((columns["tokens"][drawn], self._by_cost[0][drawn]))]
            count = min(SAMPLE, len(order))
            self.sample = [self._read(int(order[int((n + 0.5) * len(order) / count)])) for n in range(count)]
        tokens = counts.pop("tokens")
        text = tokens - sum(counts[kind] for kind in layout.media())
        # Rows of one sample are only as long as the longest of their micro-batch, which has its like in length.
        padding = 0 if data.packing == "single" else data.context_length - tokens
        self.tokens = {"text": text, **counts, "padding": padding}

    @classmethod
    def of(cls, config: Run, layout: Layout) -> "Packs":
        try:
            folder = find_packed(config.data, "train", layout, config.seed)
        except (DataError, OSError):
            if config.data.packed is not None:
                raise
            folder = None  # the shards may be on another machine
        if folder is None:
            return cls(layout, config.data, codebooks=codebooks_of(config.model))
        dataset = PackedDataset(folder)
        budgets: dict[str, int] = {name: most for name, most in config.data.budgets.items()}
        dataset.require(layout, config.data.context_length, budgets, config.data.packing)
        mixture = Mixture(source_infos(dataset), config.data.mixture, config.seed)
        return cls(layout, config.data, dataset, mixture, codebooks_of(config.model))

    def _read(self, number: int) -> Pack:
        assert self.dataset is not None
        return self.dataset.kept(number, self.layout.pad)

    def steps(self, train: TrainConfig, rows: int) -> int | None:
        """Of the run; None where that depends on packs that are not there yet."""
        if self.dataset is None:
            return train.max_steps
        an_epoch = len(self.dataset) / int(self.dataset.about["settings"]["visits"])
        return count_steps(train, self.limit, rows, an_epoch)

    def worst(self, rows: int) -> list[list[Pack]]:
        """Rows that one micro-batch may hold at worst: with the most for encoders, to learn, or of all."""
        if self.dataset is None:
            return [[pack] * rows for pack in self.sample]
        costs, learned, tokens = self._by_cost
        keys = [(learned, costs), (costs, learned), *([(costs, tokens)] if self.data.packing == "single" else [])]
        orders = {tuple(np.lexsort(one)[::-1][:rows].tolist()) for one in keys}
        return [[self._read(number) for number in order] for order in sorted(orders)]

    def alike(self, packs: list[Pack], micro_batch: int) -> list[list[Pack]]:
        """Packs that are laid out together: all of them; where each is one sample, micro-batches by length."""
        if self.data.packing == "full":
            return [packs]
        packs = sorted(packs, key=lambda pack: len(pack.tokens))
        return [packs[first : first + micro_batch] for first in range(0, len(packs), micro_batch)]

    def batch(self, packs: list[Pack]) -> PackedBatch:
        """As the loader would make it, but with media on the meta device, never decoded."""
        length = None if self.data.packing == "single" else self.data.context_length
        isolate = self.data.isolate_segments
        bare = [Pack(pack.tokens, pack.segments, ()) for pack in packs]
        batch = collate(bare, self.layout, length, isolate)
        found: dict[str, list[tuple[int, PackedMedia]]] = {}
        for row, pack in enumerate(packs):
            for one in pack.media:
                found.setdefault(one.kind, []).append((row, one))
                batch.modality[row, self.layout.span(one.kind, one.position, one.length)] = MODALITIES[one.kind]
        for kind, items in found.items():
            given = self.layout.features.get(kind)
            shapes = [
                decoded_shape(one, self.layout, packs[row].segments[one.segment].id) if given is None else (0, 0, 0)
                for row, one in items
            ]
            positions = sum(one.length for _, one in items)
            size = (sum(given.count(one.length) for _, one in items), given.width) if given else (0, 0)
            offsets = torch.tensor([0, *np.cumsum([math.prod(shape) for shape in shapes])])
            batch.media[kind] = MediaBatch(
                values=torch.empty(int(offsets[-1]), device="meta"),
                shapes=torch.tensor(shapes),
                offsets=offsets,
                row=torch.tensor([row for row, _ in items]),
                position=torch.tensor([one.position for _, one in items]),
                length=torch.tensor([one.length for _, one in items]),
                cost=torch.tensor([one.cost for _, one in items]),
                features=torch.empty(size, dtype=torch.bfloat16, device="meta") if given else None,
                codes=torch.zeros(positions, self.codebooks, dtype=torch.int32) if self.codebooks else None,
            )
        return batch

    def describe(self, packs: list[Pack]) -> dict[str, int]:
        """Sums over the packs of a micro-batch."""
        counts = [_counts(pack, self.layout) for pack in packs]
        items = {f"{kind}_items": sum(m.kind == kind for p in packs for m in p.media) for kind in self.layout.media()}
        return {"rows": len(packs), **{name: int(sum(one[name] for one in counts)) for name in counts[0]}, **items}


def _draws(mixture: Mixture, count: int) -> Iterator[Draw]:
    mixture.start_step(0)
    for _ in range(count):
        if (draw := mixture.next()) is not None:
            yield draw


def _counts(pack: Pack, layout: Layout) -> dict[str, float]:
    return {
        "tokens": len(pack.tokens),
        "loss": sum(stop - max(start, segment.start + 1) for segment in pack.segments for start, stop in segment.loss),
        **{kind: sum(one.length for one in pack.media if one.kind == kind) for kind in layout.media()},
    }


def codebooks_of(model: Any) -> int:
    """How many numbers the teacher of a system's config, or of one of its parts, says of a position; 0 without."""
    parts = getattr(model, "parts", {})
    teachers = [getattr(one, "teacher", None) for one in (model, *parts.values())]
    return max((len(teacher.sizes()) for teacher in teachers if teacher is not None), default=0)


def fullest_packs(layout: Layout, data: DataConfig) -> list[Pack]:
    """Rows that are as full as may be: of one document, or of recordings, where these are samples by themselves."""
    together = [kind for kind in layout.media() if not (kind == "audio" and layout.audio and layout.audio.alone)]
    packs = [_document(layout, data, together)] if together or not layout.media() else []
    return packs if "audio" in together or layout.audio is None else [*packs, _recordings(layout.audio, data)]


def _recordings(audio: AudioLayout, data: DataConfig) -> Pack:
    """Recordings, each a segment, as long as the sources or else the row let them be."""
    budget: dict[str, int] = {name: most for name, most in data.budgets.items()}
    room = min([data.context_length, *(budget[name] for name in ("audio_tokens", "audio_cost") if name in budget)])
    seconds = [getattr(source, "seconds", None) for source in data.sources]
    longest = room
    if seconds and None not in seconds:
        longest = audio.count(max(round(one * audio.sampling_rate) for one in seconds if one is not None))[0]
    lengths: list[int] = []
    while sum(lengths) < room and len(lengths) < budget.get("audio", room):
        lengths.append(min(longest, room - sum(lengths)))
    starts = np.cumsum([0, *lengths]).tolist()
    segments = [PackedSegment("fullest", "budgets", at, n, ()) for at, n in zip(starts, lengths, strict=False)]
    media = [
        PackedMedia("audio", number, at, n, n, "", b"", {"samples": audio.samples(n)})
        for number, (at, n) in enumerate(zip(starts, lengths, strict=False))
    ]
    return Pack(np.zeros(sum(lengths), dtype=np.int32), tuple(segments), tuple(media))


def _document(layout: Layout, data: DataConfig, kinds: list[str]) -> Pack:
    """One document that fills a row: as many media as positions and budgets allow, the rest learned text."""
    length = data.context_length
    media: list[PackedMedia] = []
    at = 1
    for kind in kinds:
        budget: dict[str, int] = {name: most for name, most in data.budgets.items()}
        plan: Any = {}
        _, positions, cost = layout.smallest(kind)
        room = length - 1 - at
        if kind == "image":
            assert layout.image is not None
            plan, positions, cost = layout.image.largest()
        if kind == "video":
            assert layout.video is not None
            plan = {"times": [0.0] * layout.video.frames}
        if kind == "audio":  # one recording as long as may be
            assert layout.audio is not None
            positions = min(room, budget.get("audio_tokens", room), budget.get("audio_cost", room))
            plan = {"samples": layout.audio.samples(positions)}
            _, cost = layout.audio.count(plan["samples"])
        span = layout.span(kind, 0, positions)  # with what is around it
        most = [
            room // max(span.stop - span.start, 1),
            budget.get(kind, room),
            budget.get(f"{kind}_tokens", length) // max(positions, 1),
            budget.get(f"{kind}_cost", cost * room) // max(cost, 1),
        ]
        for _ in range(min(most)):
            media.append(PackedMedia(kind, 0, at - span.start, positions, cost, "", b"", plan))
            at += span.stop - span.start
    tokens = np.zeros(length, dtype=np.int32)
    first = 1 if layout.learns("image") else at
    return Pack(tokens, (PackedSegment("fullest", "budgets", 0, length, ((first, length),)),), tuple(media))
