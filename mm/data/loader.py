"""The loader: an endless global sequence of packs, of which every step takes the next rows.

The sequence is a pure function of (data set, seed, mixture); ranks and workers only share the work of reading it. So
the whole state is where the sequence stands, whatever the number of either, and a run goes on from it with others.
"""

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mm.data.batch import Allocate, PackedBatch, Rows, RowSettings, collate, lay_out, new_arrays
from mm.data.layout import Layout
from mm.data.media import Decoder
from mm.data.mixture import Draw, Mixture, MixtureConfig, Policy, SourceInfo
from mm.data.pack import balance
from mm.data.packed import Pack, PackedDataset, PackReader, without
from mm.data.workers import run_workers
from mm.errors import ConfigError

EMPTY = Pack(np.empty(0, dtype=np.int32), (), ())
"""A row of padding."""


class _Request(NamedTuple):
    """One batch for a worker: where its packs are (None is a row of padding) and what keys their randomness."""

    places: list[dict[str, Any] | None]
    draws: list[tuple[int, int]] | None
    after: dict[str, Any] | None
    """The loader's state once this batch, the last of its step, has been handed out."""


@dataclass(frozen=True, slots=True)
class _Make:
    """Reads, decodes and lays out the packs of a request; runs in a worker."""

    reader: PackReader
    settings: RowSettings
    skip: frozenset[str]

    def __call__(self, request: _Request, allocate: Allocate) -> Rows:
        packs = [EMPTY if place is None else self.reader.read(place) for place in request.places]
        packs = [without(pack, self.skip, self.settings.layout.pad) for pack in packs]
        return lay_out(packs, self.settings, request.draws, allocate)


class PackedLoader:
    """Batches of packed rows from the endless global sequence.

        loader = PackedLoader(dataset, layout, rows=64, micro_batch=8, seed=0, workers=4)
        for micro_batches in loader.steps(100): ...      # 8 batches of 8 rows
        state = loader.state_dict()                      # to go on from, with any ranks and workers

    Args:
        dataset: a packed split; `layout` must be the one it was packed for.
        rows: packs in a step, over all ranks.
        micro_batch: rows in a batch; by default all that the rank has of a step.
        seed: of the order.
        mixture: weights of the sources; by default every epoch holds every pack once.
        policy: sets weights at the start of steps, instead of a schedule.
        rank, ranks: this process's part. The rows of a step go to ranks so that encoder cost is even; where they do not
            divide, and at the end of a finite sequence, what lacks is rows of padding: all ranks have as many batches.
        workers: processes that read and decode; 0 does so in this one.
        quarantine: damaged media lose their loss in place rather than raising `DataError`.
        decoder: `exact` or `fast`, of pictures and frames.
        pin_memory: hand out batches in page-locked memory, for copies to a GPU beside its work.
        together: so many packs that follow each other in the sequence do so in a batch, whatever the ranks and batches;
            the first of them is in a row whose number it divides, and rows of padding fill up where some are missing.
        by_modality: ranks are given positions of text and of each medium evenly, rather than encoder cost.

    Raises `ConfigError` where `rows` or `micro_batch` is no multiple of `together`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        layout: Layout,
        rows: int,
        micro_batch: int | None = None,
        seed: int = 0,
        mixture: MixtureConfig = MixtureConfig(),  # noqa: B008
        policy: Policy | None = None,
        rank: int = 0,
        ranks: int = 1,
        isolate_segments: bool = True,
        workers: int = 0,
        quarantine: bool = False,
        decoder: Decoder = "exact",
        pin_memory: bool = False,
        together: int = 1,
        by_modality: bool = False,
    ) -> None:
        for name, number in (("of a step (train.batch_tokens)", rows), ("of train.micro_batch", micro_batch or 0)):
            if number % together:
                raise ConfigError(
                    f"the {number} rows {name} are no multiple of the {together} that stay together (routing_rows); "
                    "change one of the two"
                )
        about = dataset.about["settings"]
        self._single = about["packing"] == "single"
        row_length = None if self._single else about["context_length"]
        self.rows, self.seed = rows, seed
        self.mixture = Mixture(source_infos(dataset), mixture, seed, policy)
        self.step = 0
        self._dataset = dataset
        self._costs = dataset.modality_costs() if by_modality else dataset.encoder_costs()
        self._tokens = dataset.index["tokens"].to_numpy()
        if self._single and not by_modality:  # rows differ in length, too
            self._costs = np.stack([self._costs, self._tokens], axis=1)
        self._rank, self._ranks, self._together = rank, ranks, together
        share = -(-rows // (together * ranks)) * together
        self._micro_batch = min(micro_batch or share, share)
        self.micro_batches = -(-share // self._micro_batch)
        """Batches in a step, the same on every rank."""
        self._workers = workers
        self._pin_memory = pin_memory
        self._passed_over: frozenset[int] = frozenset()
        self._settings = RowSettings(layout, row_length, isolate_segments, quarantine, decoder)
        self._state = self._current()

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last whole step that was handed out."""
        return self._state

    def pass_over(self, steps: Iterable[int]) -> None:
        """Leave out the packs of these steps, by their number in the sequence, where it has not come to them yet."""
        self._passed_over |= frozenset(steps)
        self._state = {**self._state, "passed_over": sorted(self._passed_over)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._passed_over = frozenset(state["passed_over"])
        self.mixture.load_state_dict(state["mixture"])
        self._state = state

    def _current(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "mixture": self.mixture.state_dict(),
            "passed_over": sorted(self._passed_over),
        }

    def steps(self, count: int) -> Iterator[list[PackedBatch]]:
        """The micro-batches of this rank for the next `count` steps, or until the sequence ends, on all ranks alike."""
        micro_batches: list[PackedBatch] = []
        for batch in self._batches(count):
            micro_batches.append(batch)
            if len(micro_batches) == self.micro_batches:
                yield micro_batches
                micro_batches = []

    def batches(self, count: int) -> Iterator[PackedBatch]:
        """The next `count` batches of this rank, one after the other."""
        for number, batch in enumerate(self._batches(-(-count // self.micro_batches)), 1):
            yield batch
            if number == count:
                return

    def _batches(self, count: int) -> Iterator[PackedBatch]:
        self.load_state_dict(self._state)  # what an earlier call read ahead was not handed out
        requests = (request for _ in range(count) for request in self._step())
        make = _Make(self._dataset.reader, self._settings, self._dataset.dropped)
        if self._workers:
            if self._settings.decoder == "fast":
                importlib.import_module("torchvision.io")  # takes a second, and workers have what is here
            made = run_workers(make, requests, self._workers)
        else:
            made = ((request, make(request, new_arrays)) for request in requests)
        for request, rows in made:
            batch = rows.batch()
            del rows
            if request.after is not None:
                self._state = request.after
            yield batch.pin_memory() if self._pin_memory else batch
            del batch

    def _step(self) -> Iterator[_Request]:
        """What this rank has to make of the next step; nothing at the end of the sequence."""
        while drawn := self._draw():
            self.step += 1
            if self.step - 1 not in self._passed_over:
                break
        if not drawn:
            return
        starts = range(0, len(drawn), self._together)
        units = [drawn[start : start + self._together] for start in starts]
        costs = np.add.reduceat(self._costs[[draw.pack for draw in drawn]], starts)
        mine = [unit for unit, rank in zip(units, balance(costs, self._ranks), strict=True) if rank == self._rank]
        if self._single:  # micro-batches of rows that are alike in length
            mine.sort(key=lambda unit: max(self._tokens[draw.pack] for draw in unit))
        rows: list[Draw | None] = []
        for unit in mine:
            rows += [*unit, *[None] * (self._together - len(unit))]
        rows += [None] * (self.micro_batches * self._micro_batch - len(rows))
        after = self._current()
        for number in range(self.micro_batches):
            part = rows[number * self._micro_batch : (number + 1) * self._micro_batch]
            places = [None if draw is None else self._dataset.place(draw.pack) for draw in part]
            draws = [(self.seed, -1 if draw is None else draw.position) for draw in part]
            yield _Request(places, draws, after if number == self.micro_batches - 1 else None)

    def _draw(self) -> list[Draw]:
        """The packs of the next step of the sequence."""
        self.mixture.start_step(self.step)
        drawn: list[Draw] = []
        while len(drawn) < self.rows and (draw := self.mixture.next()) is not None:
            drawn.append(draw)
        return drawn


def source_infos(dataset: PackedDataset) -> list[SourceInfo]:
    """The sources of a packed set, for a mixture. A visit of which all was left out is none."""
    visit, tokens = dataset.index["visit"].to_numpy(), dataset.index["tokens"].to_numpy()
    names = list(dataset.about["ledger"])
    number = dataset.source_numbers()
    visits = range(int(visit.max()) + 1)
    packs = [[np.flatnonzero((number == n) & (visit == one)) for one in visits] for n in range(len(names))]
    return [
        SourceInfo(name, [one for one in some if len(one)], tokens) for name, some in zip(names, packs, strict=True)
    ]


def one_pass(
    dataset: PackedDataset,
    layout: Layout,
    rows: int,
    isolate_segments: bool = True,
    quarantine: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[PackedBatch]:
    """Every pack once, in the order on disk, `rows` at a time: for evaluation. The last batch may be smaller.

    Of several ranks each takes its share of the batches; where they do not divide, what lacks is a row of padding, so
    that all ranks have as many.
    """
    about = dataset.about["settings"]
    row_length = None if about["packing"] == "single" else about["context_length"]
    for start in range(rank * rows, -(-len(dataset) // (rows * ranks)) * rows * ranks, rows * ranks):
        packs = [dataset.kept(n, layout.pad) for n in range(start, min(start + rows, len(dataset)))]
        yield collate(packs or [EMPTY], layout, row_length, isolate_segments, quarantine)
