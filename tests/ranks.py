"""A pool of processes for tests of several ranks, and for those that are killed.

They are forked from one that has imported what takes seconds to import.

`ranks.run(function, 2, argument)` calls `function(argument)` in two processes that torchrun could have started (RANK,
WORLD_SIZE, …) and returns what each gave. Functions are module-level. A job that takes too long fails the test, and
the processes are made anew.
"""

import faulthandler
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import Any

PRELOADED = ["mm.train.trainer", "torchvision", "timm"]


def preload() -> None:
    """The forkserver of this process, which also packs, with these modules; once it is there this changes nothing."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    ensure_running()


def status_of(function: Callable[..., object], *arguments: Any) -> int | None:
    """How a module-level function ends in a process of its own: its exit status, minus the signal that killed it.

    None: it did not end in five minutes.
    """
    preload()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join(300)
    status = process.exitcode
    process.kill()
    return status


class RankError(AssertionError):
    """A function raised in one of the ranks; the text holds the traceback."""


class Ranks:
    """See the module."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = 120) -> list[Any]:
        """The results by rank. Raises `RankError` with the first rank's error, and `TimeoutError`."""
        self._start(ranks)
        port = _free_port()
        for rank in range(ranks):
            environment = {
                "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            self._pipes[rank].send((function, arguments, {key: str(value) for key, value in environment.items()}))
        deadline = time.monotonic() + seconds
        results, errors = [], []
        for rank in range(ranks):
            # Once a rank has failed, the others may wait for it in vain.
            limit = max(0.0, deadline - time.monotonic()) if not errors else 10.0
            try:
                if not self._pipes[rank].poll(limit):
                    errors.append(f"rank {rank}: not done after {seconds:g} s")
                    continue
                ok, value = self._pipes[rank].recv()
            except (EOFError, ConnectionResetError):
                self._processes[rank].join(5)
                errors.append(f"rank {rank}: the process ended with status {self._processes[rank].exitcode}")
                continue
            results.append(value)
            if not ok:
                errors.append(f"rank {rank}: {value}")
        if errors:
            self.stop()
            raise RankError("\n".join(errors))
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self, ranks: int) -> None:
        preload()
        context = multiprocessing.get_context("forkserver")
        while len(self._processes) < ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    faulthandler.enable()
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, environment = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        pipe.send(answer)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
