"""Workers: processes that make rows and lay them into memory that both sides see.

A batch of pictures is hundreds of megabytes, and copying it costs as much as decoding. So a worker writes into a block
of shared memory and the batch that is handed out is a view of it; when nobody holds the batch any more, the block goes
back and is used again. Nothing is copied, nothing is allocated twice, and a batch that is kept stays as it is.

Blocks are anonymous files passed through the pipe. They are in no file system (a container's small /dev/shm does not
bound them), and nothing is left behind when a process is killed.
"""

import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch

from mm.data.batch import Allocate, Rows, Shapes
from mm.errors import DataError, MMError

AHEAD = 3  # requests that a worker has at a time
ALIGN = 64
Make = Callable[[Any, Allocate], Rows]
"""Makes the rows that a request asks for, their arrays from the allocator that it is given. Raises `DataError`."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an array lies in a block."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The array, as a view of the block's bytes."""
        size = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        return whole[self.offset : self.offset + size].view(self.dtype).reshape(self.shape)


def run_workers(make: Make, requests: Iterable[Any], workers: int) -> Iterator[tuple[Any, Rows]]:
    """`make(request)` for every request, by `workers` processes: (request, rows) in the order of the requests.

    At most `AHEAD` requests a worker are taken before their turn. A `DataError` is raised when its turn comes.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    crew = [_Worker(context, make) for _ in range(workers)]
    asked = enumerate(requests)
    waiting: dict[int, Any] = {}
    done: dict[int, Rows | DataError] = {}
    try:
        turn = 0
        exhausted = False
        while True:
            while not exhausted and (idle := min(crew, key=lambda worker: worker.asked)).asked < AHEAD:
                number, request = next(asked, (-1, None))
                if exhausted := number < 0:
                    break
                waiting[number] = request
                idle.ask(number, request)
            while turn in done:
                found, request = done.pop(turn), waiting.pop(turn)
                turn += 1
                if isinstance(found, DataError):
                    raise found
                yield request, found
                del found
                break
            else:
                if exhausted and not waiting:
                    return
                for worker in crew:
                    worker.check()
                for ready in wait([worker.pipe for worker in crew], timeout=1.0):
                    number, answer = next(worker for worker in crew if worker.pipe is ready).answer()
                    done[number] = answer
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """One process, seen from the one that started it."""

    def __init__(self, context: Any, make: Make) -> None:
        self.pipe, theirs = context.Pipe()
        self.asked = 0
        self._blocks: dict[int, mmap.mmap] = {}
        self._free: deque[int] = deque()
        self._process = context.Process(target=_work, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, number: int, request: Any) -> None:
        """The blocks that are free again go along with the request."""
        free = [self._free.popleft() for _ in range(len(self._free))]
        try:
            self.pipe.send((number, request, free))
        except (BrokenPipeError, ConnectionResetError):
            self._died()
        self.asked += 1

    def answer(self) -> tuple[int, Rows | DataError]:
        try:
            number, made = pickle.loads(self.pipe.recv_bytes())
            self.asked -= 1
            if isinstance(made, str):
                raise RuntimeError(f"in a worker:\n{made}")
            if isinstance(made, DataError):
                return number, made
            block, new_size, dropped, places, rows = made
            for old in dropped:
                del self._blocks[old]
            if new_size:
                handle = recv_handle(self.pipe)
                self._blocks[block] = mmap.mmap(handle, new_size)
                os.close(handle)
        except (EOFError, ConnectionResetError):
            self._died()
        # All arrays are views of this one, which therefore goes when the last of them does.
        whole = np.frombuffer(self._blocks[block], dtype=np.uint8)
        weakref.finalize(whole, self._free.append, block)
        rows.arrays = {name: place.of(whole) for name, place in places.items()}
        return number, rows

    def check(self) -> None:
        if not self._process.is_alive() and not self.pipe.poll():
            self._died()

    def _died(self) -> None:
        self._process.join(5)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        raise MMError(
            f"a data worker {how}; if memory ran out, lower data.workers, train.micro_batch or data.context_length"
        ) from None

    def stop(self) -> None:
        self.pipe.close()
        self._process.terminate()
        self._process.join()
        self._process.close()


class _Blocks:
    """The blocks of a worker, on its side. A batch takes one; those that prove too small are replaced."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}
        self._count = 0

    def allocate(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """All arrays in one block; afterwards `taken`, `places`, `dropped` and `handle` (of a new one) say where."""
        self.places: dict[str, _Place] = {}
        size = 0
        for name, (shape, dtype) in shapes.items():
            self.places[name] = _Place(size, shape, np.dtype(dtype).str)
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGN) * ALIGN
        fitting = [block for block in self.free if len(self._maps[block]) >= size]
        self.dropped: list[int] = []
        self.handle: int | None = None
        if fitting:
            self.taken = min(fitting, key=lambda block: len(self._maps[block]))
            self.free.remove(self.taken)
        else:
            self.dropped, self.free = self.free, []
            for block in self.dropped:
                del self._maps[block]
            self.taken, self._count = self._count, self._count + 1
            self.handle = _anonymous_file(size * 5 // 4)
            self._maps[self.taken] = mmap.mmap(self.handle, size * 5 // 4)
        whole = np.frombuffer(self._maps[self.taken], dtype=np.uint8)
        return {name: place.of(whole) for name, place in self.places.items()}

    def new_size(self) -> int:
        return len(self._maps[self.taken]) if self.handle is not None else 0


def _anonymous_file(size: int) -> int:
    """A file that no name leads to, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("mm-batch", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle


def _work(pipe: Connection, make: Make) -> None:
    """The loop of a worker. It ends when nobody is at the other end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    blocks = _Blocks()
    try:
        while True:
            number, request, free = pipe.recv()
            blocks.free += free
            try:
                rows = make(request, blocks.allocate)
            except DataError as error:
                pipe.send_bytes(pickle.dumps((number, error)))
                continue
            except Exception:
                pipe.send_bytes(pickle.dumps((number, traceback.format_exc())))
                continue
            rows.arrays = {}
            answer = (blocks.taken, blocks.new_size(), blocks.dropped, blocks.places, rows)
            pipe.send_bytes(pickle.dumps((number, answer)))
            if blocks.handle is not None:
                send_handle(pipe, blocks.handle, None)
                os.close(blocks.handle)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return
