"""Workers: processes that make rows and lay them into memory that both sides see.

A batch of pictures is hundreds of megabytes, and copying it costs as much as decoding. So a worker writes into a block
of shared memory and the batch that is handed out is a view of it; when nobody holds the batch any more, the block goes
back and is used again. Nothing is copied, nothing is allocated twice, and a batch that is kept stays as it is.

Blocks are anonymous files passed through the pipe. They are in no file system (a container's small /dev/shm does not
bound them), and nothing is left behind when a process is killed.
"""

import atexit
import contextlib
import gc
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np
import torch

from mm.data.batch import Allocate, Rows, Shapes
from mm.errors import DataError, MMError

AHEAD = 3  # requests that a worker has at a time, those that are done and wait for their turn among them
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
    crew: list[_Worker] = []
    asked = enumerate(requests)
    waiting: dict[int, tuple[Any, _Worker]] = {}
    done: dict[int, Rows | DataError] = {}
    turn = 0
    try:
        while len(crew) < workers:
            crew.append(_Worker(context, make))
        while True:
            while (idle := min(crew, key=lambda worker: worker.busy)).busy < AHEAD and (one := next(asked, None)):
                waiting[one[0]] = one[1], idle
                idle.ask(*one)
            if turn in done:
                found = done.pop(turn)
                request, worker = waiting.pop(turn)
                worker.busy -= 1
                turn += 1
                if isinstance(found, DataError):
                    raise found
                yield request, found
                del found  # or it would be kept while the next one is made
            elif waiting:
                for worker in crew:
                    worker.check()
                for ready in wait([worker.pipe for worker in crew], timeout=1.0):
                    number, answer = next(worker for worker in crew if worker.pipe is ready).answer()
                    done[number] = answer
                    del answer
            else:
                return
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """One process, seen from the one that started it."""

    def __init__(self, context: Any, make: Make) -> None:
        self.busy = 0
        """Requests that it was given and whose results have not been handed out."""
        self._blocks: dict[int, mmap.mmap] = {}
        self._free: deque[int] = deque()
        requests, self._requests = context.Pipe(duplex=False)
        self.pipe, answers = context.Pipe()
        mine = (self._requests, self.pipe)
        self._process = context.Process(target=_work, args=(requests, answers, mine, os.getpid(), make), daemon=True)
        self._process.start()
        atexit.register(self._process.kill)  # comes before multiprocessing's own end, which would send SIGTERM and wait
        requests.close()
        answers.close()

    def ask(self, number: int, request: Any) -> None:
        """The blocks that are free again go along with the request."""
        free = [self._free.popleft() for _ in range(len(self._free))]
        try:
            self._requests.send((number, request, free))
        except OSError:
            self._died()
        self.busy += 1

    def answer(self) -> tuple[int, Rows | DataError]:
        try:
            number, made, new_size = pickle.loads(self.pipe.recv_bytes())
            handle = recv_handle(self.pipe) if new_size else -1
        except (EOFError, OSError):
            self._died()
        if isinstance(made, str):
            raise RuntimeError(f"{made.strip().splitlines()[-1]}, in a data worker:\n{made}")
        if isinstance(made, DataError):
            return number, made
        block, dropped, places, rows = made
        for old in dropped:
            del self._blocks[old]
        if new_size:
            self._blocks[block] = mmap.mmap(handle, new_size)
            os.close(handle)
        # All arrays are views of this one, which therefore goes when the last of them does.
        whole = np.frombuffer(self._blocks[block], dtype=np.uint8)
        weakref.finalize(whole, self._free.append, block)
        rows.arrays = {name: place.of(whole) for name, place in places.items()}
        return number, rows

    def check(self) -> None:
        if not self._process.is_alive() and not self.pipe.poll():
            self._died()

    def _died(self) -> NoReturn:
        self._process.join(5)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        raise MMError(
            f"a data worker {how}; if memory ran out, lower data.workers, train.micro_batch or data.context_length"
        ) from None

    def stop(self) -> None:
        atexit.unregister(self._process.kill)
        self._process.kill()
        self._process.join()
        self._requests.close()
        self.pipe.close()
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


def _work(requests: Connection, answers: Connection, theirs: Iterable[Connection], parent: int, make: Make) -> None:
    """The loop of a worker. It ends with the process that started it, whose ends of the pipes are `theirs`."""
    # Ctrl-C, and SIGTERM to all processes of a job, are the trainer's business: it wants one more batch to end with.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    for end in theirs:
        end.close()
    # What was inherited is not for this process to finalise: a finaliser may want a lock that another thread of the
    # parent held when it forked.
    gc.freeze()
    torch.set_num_threads(1)
    blocks = _Blocks()
    asked: SimpleQueue[tuple[int, Any, list[int]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests, parent, asked), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            number, request, free = asked.get()
            blocks.free += free
            try:
                rows = make(request, blocks.allocate)
            except DataError as error:
                answers.send_bytes(pickle.dumps((number, error, 0)))
                continue
            except Exception:
                answers.send_bytes(pickle.dumps((number, traceback.format_exc(), 0)))
                continue
            rows.arrays = {}
            made = (blocks.taken, blocks.dropped, blocks.places, rows)
            answers.send_bytes(pickle.dumps((number, made, blocks.new_size())))
            if blocks.handle is not None:
                send_handle(answers, blocks.handle, None)
                os.close(blocks.handle)


def _receive(requests: Connection, parent: int, asked: "SimpleQueue[Any]") -> None:
    """Takes requests as they come, or both sides might wait for the other to read; ends the process with its parent.

    The pipe alone does not tell: other children of the parent may hold its end open.
    """
    try:
        while True:
            while not requests.poll(1.0):
                if os.getppid() != parent:
                    os._exit(1)
            asked.put(requests.recv())
    except (EOFError, OSError):
        os._exit(0)
