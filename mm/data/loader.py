"""The loader: an endless global sequence of packs, of which a run takes its next rows.

The sequence is a pure function of (data set, seed): epoch after epoch, each a seeded permutation of one visit's packs.
So the whole state is how many packs have been consumed, whatever the number of workers; decoding happens late, in them.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.packed import PackedDataset
from mm.data.sample import keyed_rng
from mm.errors import DataError


class PackOrder:
    """Position in the endless sequence -> pack number.

    Epoch e holds the packs of visit e modulo the number of visits, in an order drawn by (seed, e).
    """

    def __init__(self, visits: np.ndarray, seed: int) -> None:
        self._packs = [np.flatnonzero(visits == visit) for visit in range(int(visits.max()) + 1)]
        self._ends = np.cumsum([len(packs) for packs in self._packs])
        self._seed = seed
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index in that epoch)."""
        rounds, rest = divmod(position, int(self._ends[-1]))
        visit = int(np.searchsorted(self._ends, rest, side="right"))
        return rounds * len(self._packs) + visit, rest - int(self._ends[visit - 1] if visit else 0)

    def __getitem__(self, position: int) -> int:
        epoch, index = self.locate(position)
        if self._drawn[0] != epoch:
            packs = self._packs[epoch % len(self._packs)]
            self._drawn = (epoch, keyed_rng(self._seed, "epoch", epoch).permutation(packs))
        return int(self._drawn[1][index])


@dataclass(frozen=True, slots=True)
class _Rows(Dataset[PackedBatch | DataError]):
    """Reads, decodes and collates the packs at some positions; runs in a worker.

    Damaged data come back as the error itself: raised in a worker it would arrive as a traceback in many lines.
    """

    dataset: PackedDataset
    order: PackOrder | np.ndarray
    layout: Layout
    row_length: int
    isolate_segments: bool
    quarantine: bool
    seed: int | None = None
    """Of what is drawn for training, keyed by position in the sequence; None draws nothing."""

    def __getitem__(self, positions: Any) -> PackedBatch | DataError:
        try:
            packs = [self.dataset.read(int(self.order[position])) for position in positions]
            draws = None if self.seed is None else [(self.seed, position) for position in positions]
            return collate(packs, self.layout, self.row_length, self.isolate_segments, self.quarantine, draws)
        except DataError as error:
            return error


class PackedLoader:
    """Batches of `rows` packs from the endless sequence.

        loader = PackedLoader(dataset, layout, rows=8, seed=0)
        for batch in loader.batches(100): ...
        state = loader.state_dict()          # {"consumed": 800}

    Args:
        dataset: a packed split; `layout` must be the one it was packed for.
        rows: packs in a batch.
        seed: of the order.
        workers: processes that read and decode; 0 does so in this one.
        quarantine: damaged media lose their loss in place rather than raising `DataError`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        layout: Layout,
        rows: int,
        seed: int = 0,
        isolate_segments: bool = True,
        workers: int = 0,
        quarantine: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self._rows = rows
        self._workers = workers
        self._pin_memory = pin_memory
        self.order = PackOrder(dataset.index["visit"].to_numpy(), seed)
        self.consumed = 0
        row_length = dataset.about["settings"]["context_length"]
        self._source = _Rows(dataset, self.order, layout, row_length, isolate_segments, quarantine, seed)

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]

    def batches(self, count: int) -> Iterator[PackedBatch]:
        """The next `count` batches. `consumed` counts what has been handed out, not what was read ahead."""
        start = self.consumed
        positions = [range(start + i * self._rows, start + (i + 1) * self._rows) for i in range(count)]
        loader: DataLoader[PackedBatch | DataError] = DataLoader(
            self._source,
            sampler=positions,  # an "index" is a range of positions: one whole batch
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=4 if self._workers else None,
            worker_init_fn=_leave_ctrl_c_to_the_trainer,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else starting would draw from torch's global one
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            self.consumed += self._rows
            yield batch


def _leave_ctrl_c_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def one_pass(
    dataset: PackedDataset, layout: Layout, rows: int, isolate_segments: bool = True, quarantine: bool = False
) -> Iterator[PackedBatch]:
    """Every pack once, in the order on disk, `rows` at a time: for evaluation. The last batch may be smaller."""
    order = np.arange(len(dataset))
    row_length = dataset.about["settings"]["context_length"]
    source = _Rows(dataset, order, layout, row_length, isolate_segments, quarantine)
    for start in range(0, len(order), rows):
        batch = source[range(start, min(start + rows, len(order)))]
        if isinstance(batch, DataError):
            raise batch
        yield batch
