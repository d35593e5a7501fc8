"""The processes of a run: who there is, what they agree on, and who did not come.

Started by torchrun, or alone. Sharding and reductions are the engines' (torch.distributed, DeepSpeed); here is what is
left: waiting for one another before the process group exists, sums that all ranks decide by, and a watch over hangs.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mm.errors import ConfigError, MMError

T = TypeVar("T")
HUNG = 76
"""Exit status of a process that ends because others did not come."""


class RankFailed(MMError):
    """Another rank ended with an error; that rank says which."""


@dataclass(slots=True)
class World:
    """This process among the processes of a run. Without torchrun there is one."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    store: Any = None
    """The key-value store of torchrun, by which ranks meet before the process group exists."""
    control: Any = None
    """A gloo group for numbers in host memory."""
    watch: "Watch | None" = None
    cuda: bool = False
    """Whether the process group is one of GPUs."""

    @classmethod
    def from_environment(cls) -> "World":
        """As torchrun's environment variables say. Raises `ConfigError` when they are incomplete."""
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks == 1:
            return cls()
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {ranks} but {', '.join(missing)} is not set; start with "
                "`torchrun --nproc-per-node N -m mm train CONFIG`"
            )
        from torch.distributed.rendezvous import rendezvous

        store, rank, ranks = next(iter(rendezvous("env://", timeout=timedelta(seconds=600))))
        return cls(rank, ranks, int(os.environ["LOCAL_RANK"]), store)

    @property
    def main(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call a function that prepares files: first on rank 0, then on the first of each node, then on all.

        So only one process prepares them, and the others find them. The waiting has no time limit: packing may take
        hours. An error on one rank ends the others, with `RankFailed`.
        """
        turns = [self.rank == 0, self.local_rank == 0, True]
        mine = turns.index(True)
        for turn in range(mine):
            self._await_turn(turn)
        try:
            result = function()
        except BaseException as error:
            if self.store is not None:
                self.store.set(f"turn/{mine}/error", f"rank {self.rank}: {type(error).__name__}")
            raise
        if self.store is not None:
            nodes = self.ranks // int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
            if mine == 0:
                self.store.set("turn/0", b"1")
            if mine < 2 and self.store.add("turn/1/count", 1) >= nodes:
                self.store.set("turn/1", b"1")
        return result

    def _await_turn(self, turn: int) -> None:
        try:
            while not self.store.check([f"turn/{turn}"]):
                for earlier in range(turn + 1):
                    if self.store.check([f"turn/{earlier}/error"]):
                        raise RankFailed(self.store.get(f"turn/{earlier}/error").decode())
                time.sleep(0.1)
        except dist.DistNetworkError:
            raise RankFailed("rank 0 has ended") from None

    def start(self, device: torch.device, timeout: float, group: bool) -> None:
        """Make the process group; of a single process only where an engine needs a `group`."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.ranks == 1 and not group:
            return
        self.cuda = device.type == "cuda"
        store = self.store if self.store is not None else dist.HashStore()
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("mm", store),
            rank=self.rank,
            world_size=self.ranks,
            timeout=limit,
        )
        self.control = dist.new_group(backend="gloo", timeout=limit)
        if self.ranks > 1:
            self.watch = Watch(self, timeout)

    def stop(self, failed: bool = False) -> None:
        """End the watch and the process group.

        Where this process has `failed` others may be in the middle of a collective, and on GPUs the end of the group
        would wait for them: it is left to the end of the process, and the watch to see to it that this comes.
        """
        if failed and self.cuda and self.ranks > 1:
            return
        if self.watch is not None:
            self.watch.stop()
            self.watch = None
        if self.control is not None:
            dist.destroy_process_group()
            self.control = None
        self.store = None  # closed here, rather than at some moment of the interpreter's end

    def at(self, step: int, what: str) -> None:
        """Note where this process is, for who might wait for it."""
        if self.watch is not None:
            self.watch.at(step, what)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks in float64, in host memory: exact for counts below 2^53."""
        if self.ranks == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum over ranks in place, on the tensor's device."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """A small value of every rank, by rank; for rare events."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.control)
        return values


class Watch:
    """Ends this process when it has made no progress for `seconds`, and says which rank all are waiting for.

    Every rank notes its way in the store; a collective that hangs leaves the ranks that came with more notes than the
    one that did not. Where each of these stands in its program is written there too, by its own watch.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._notes = dist.PrefixStore("watch", world.store)
        # A connection of its own: the main thread may be in the middle of a request.
        self._reads = dist.PrefixStore("watch", world.store.clone())
        self._main = threading.get_ident()
        self._since, self._here, self._count = time.monotonic(), "starting", 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def at(self, step: int, what: str) -> None:
        self._since, self._here, self._count = time.monotonic(), f"step {step}, {what}", self._count + 1
        self._notes.set(str(self._world.rank), f"{self._count}|{self._here} on {socket.gethostname()}")

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(min(5.0, self._seconds / 4)):
            if time.monotonic() - self._since > self._seconds:
                verdict = f"{self._waited()}, in {self._stack()}"  # all there is to say where the store is gone
                with contextlib.suppress(RuntimeError):
                    self._reads.set(f"{self._world.rank}/stack", self._stack())
                    time.sleep(min(5.0, self._seconds / 4) + 1)  # the others' watches look as often
                    verdict = self._verdict()
                print(f"mm: {verdict}", file=sys.stderr, flush=True)
                os._exit(HUNG)

    def _stack(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        return " < ".join(f"{one.name} ({Path(one.filename).name}:{one.lineno})" for one in frames[:-5:-1])

    def _verdict(self) -> str:
        notes: dict[int, tuple[int, str]] = {}
        for rank in range(self._world.ranks):
            count, _, where = self._read(str(rank)).partition("|")
            notes[rank] = (int(count or 0), where or "never seen")
        least, most = (limit(count for count, _ in notes.values()) for limit in (min, max))
        late = [rank for rank, (count, _) in notes.items() if count == least]
        which = "did not come" if least < most else "all ranks are at one place (is train.hang_timeout too short?)"
        stacks = {rank: self._read(f"{rank}/stack") or "an unknown place" for rank in late[:8]}
        places = "; ".join(f"rank {rank} ({notes[rank][1]}), in {at}" for rank, at in stacks.items())
        return f"{self._waited()}; {which}: {places}"

    def _waited(self) -> str:
        return f"no progress for {self._seconds:g} s on rank {self._world.rank} ({self._here})"

    def _read(self, key: str) -> str:
        return self._reads.get(key).decode() if self._reads.check([key]) else ""


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is this process's GPU if there is one, else the CPU. Raises `ConfigError`."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
