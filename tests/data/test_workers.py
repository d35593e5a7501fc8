"""Workers: batches stay as they are, memory goes back and stays bounded, and nobody is left behind, whoever dies."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm.data import workers
from mm.data.batch import Allocate, Rows
from mm.data.layout import Layout
from mm.data.loader import PackedLoader
from mm.data.packed import PackedDataset
from mm.data.workers import AHEAD, run_workers
from mm.errors import DataError, MMError

HELD = 2
"""Batches that a loop over the results keeps alive: the one at hand, and the next before it is replaced."""


def rows_of(number: int, size: int, allocate: Allocate) -> Rows:
    arrays = allocate({"values": ((size,), np.float32), "number": ((1,), np.int64)})
    arrays["values"][:] = number
    arrays["number"][:] = number
    return Rows(arrays, [[f"s/{number}"]], True)


def make(request: Any, allocate: Allocate) -> Rows:
    """`number`, or `(number, size, seconds)`."""
    number, size, seconds = request if isinstance(request, tuple) else (request, 1000, 0.0)
    time.sleep(seconds)
    return rows_of(number, size, allocate)


def value(rows: Rows) -> int:
    """The number that all values are of."""
    values = rows.arrays["values"]
    assert (values == values[0]).all()
    assert rows.ids == [[f"s/{int(values[0])}"]]
    return int(values[0])


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many blocks the workers of the test hold now, seen from here."""
    crew: list[Any] = []

    class Seen(workers._Worker):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            crew.append(self)

    monkeypatch.setattr(workers, "_Worker", Seen)
    yield lambda: sum(len(worker._blocks) for worker in crew)
    crew.clear()


@pytest.fixture
def children() -> Callable[[], set[int]]:
    """The processes that this one has started since the test began; other tests have left helpers running."""

    def now() -> set[int]:
        found = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                if int(parent) == os.getpid() and state != "Z":
                    found.add(int(stat.parent.name))
        return found

    before = now()
    return lambda: now() - before


def mapped() -> int:
    """Blocks that are in the memory of this process."""
    return Path("/proc/self/maps").read_text().count("memfd:mm-batch")


def gone(pids: set[int], seconds: float = 5.0) -> bool:
    """Whether all processes end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Rather a failure than a test that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_batch_that_is_kept_is_never_overwritten(packed: PackedDataset, layout: Layout) -> None:
    """50 batches are kept, half of them as a single tensor, while 100 others come and go."""
    loaders = [PackedLoader(packed, layout, 4, seed=3, workers=count) for count in (2, 0)]
    kept: list[Any] = []
    for number, batch in enumerate(loaders[0].batches(150)):
        if number % 3 == 0:
            kept.append(batch if number % 2 else batch.media["image"].values)
        del batch
    for number, fresh in enumerate(loaders[1].batches(150)):
        if number % 3 == 0 and number % 2:
            assert torch.equal(kept[number // 3].input_ids, fresh.input_ids)
            assert torch.equal(kept[number // 3].labels, fresh.labels)
            assert torch.equal(kept[number // 3].media["image"].values, fresh.media["image"].values)
            assert kept[number // 3].ids == fresh.ids
        elif number % 3 == 0:
            assert torch.equal(kept[number // 3], fresh.media["image"].values)


def test_any_part_of_a_batch_keeps_all_of_its_block() -> None:
    """A slice of a view of an array is enough to keep the block from being used again."""
    parts = []
    for _, rows in run_workers(make, iter(range(60)), 2):
        parts.append(torch.from_numpy(rows.arrays["values"])[3:].view(-1, 1)[5:7])
        del rows
    assert [part.tolist() for part in parts] == [[[n], [n]] for n in range(60)]


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_are_used_again(count: int, blocks: Callable[[], int]) -> None:
    most = 0
    for _, rows in run_workers(make, iter(range(200)), count):
        value(rows)
        most = max(most, blocks())
    assert most <= count * (AHEAD + HELD)


def test_blocks_stay_bounded_when_sizes_vary(blocks: Callable[[], int]) -> None:
    """Also where a size never comes twice, and where large and small ones take turns."""
    sizes = [*range(1000, 31000, 300), *(10 ** (1 + n % 5) for n in range(100))]
    most, number = 0, 0
    for (number, size, _), rows in run_workers(make, ((n, size, 0.0) for n, size in enumerate(sizes)), 2):
        assert value(rows) == number and rows.arrays["values"].shape == (size,)
        most = max(most, blocks())
        assert mapped() <= 2 * (AHEAD + HELD) + 1
    assert number == len(sizes) - 1
    assert most <= 2 * (AHEAD + HELD)


def test_results_come_in_the_order_of_the_requests_whoever_is_slow() -> None:
    seconds = np.random.default_rng(0).choice([0.0, 0.001, 0.02], 80)
    found = [
        (request[0], value(rows)) for request, rows in run_workers(make, ((n, 9, s) for n, s in enumerate(seconds)), 3)
    ]
    assert found == [(n, n) for n in range(80)]


def test_a_slow_worker_does_not_let_the_others_run_away(blocks: Callable[[], int]) -> None:
    """While the first request is being made no more than the agreed number of others is taken."""
    taken: list[int] = []

    def requests() -> Iterator[tuple[int, int, float]]:
        for number in range(100):
            taken.append(number)
            yield number, 9, 0.0 if number else 0.5

    results = run_workers(make, requests(), 2)
    assert next(results)[0][0] == 0
    assert len(taken) <= 2 * AHEAD and blocks() <= 2 * AHEAD
    results.close()  # type: ignore[attr-defined]


def fails_at(error: Exception) -> Callable[[int, Allocate], Rows]:
    def make(number: int, allocate: Allocate) -> Rows:
        if number == 7:
            raise error
        return rows_of(number, 10, allocate)

    return make


def test_a_data_error_is_raised_in_its_turn(children: Callable[[], set[int]]) -> None:
    before: list[int] = []
    with pytest.raises(DataError, match=r"^sample 7 is damaged$"):
        for number, _ in run_workers(fails_at(DataError("sample 7 is damaged")), iter(range(20)), 3):
            before.append(number)
    assert before == list(range(7))
    assert not children()


def test_another_error_carries_the_workers_traceback(children: Callable[[], set[int]]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^ZeroDivisionError: seven, in a data worker:.*in make\b"):
        for _ in run_workers(fails_at(ZeroDivisionError("seven")), iter(range(20)), 2):
            pass
    assert not children()


@pytest.mark.parametrize("idle", [True, False])
def test_a_killed_worker_is_one_line_within_seconds(idle: bool, children: Callable[[], set[int]]) -> None:
    results = run_workers(make, ((n, 9, 0.0 if idle else 0.2) for n in range(1000)), 2)
    next(results)
    time.sleep(0.3 if idle else 0.0)
    os.kill(min(children()), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(MMError, match=r"a data worker was killed by signal 9; .*data\.workers") as caught:
        list(results)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    assert not children()


def named(pid: int) -> set[str]:
    """Shared memory with a name that a process has mapped; a session with a pool of ranks has some."""
    return set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))


def test_a_loop_left_early_leaves_nothing_behind(children: Callable[[], set[int]]) -> None:
    gc.collect()
    before, others = (len(os.listdir("/proc/self/fd")), mapped()), named(os.getpid())
    results = run_workers(make, iter(range(1000)), 2)
    kept = [next(results)[1] for _ in range(3)]
    assert len(children()) == 2
    for pid in (os.getpid(), *children()):
        assert named(pid) == others, "blocks have no names"
    results.close()  # type: ignore[attr-defined]
    assert not children()
    assert [value(rows) for rows in kept] == [0, 1, 2], "what was handed out stays"
    kept.clear()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), mapped()) == before


def test_requests_and_results_larger_than_a_pipe_do_not_wait_for_each_other() -> None:
    """Both sides send more than a pipe takes: neither may stop reading meanwhile."""

    def make(request: tuple[int, bytes], allocate: Allocate) -> Rows:
        rows = rows_of(request[0], 10, allocate)
        rows.ids.append([request[1].decode()])
        return rows

    with within(15):
        sizes = [len(rows.ids[1][0]) for _, rows in run_workers(make, ((n, b"x" * 3_000_000) for n in range(12)), 2)]
    assert sizes == [3_000_000] * 12


SCRIPT = """
import multiprocessing, os, sys, time
import numpy as np
from mm.data.batch import Rows
from mm.data.workers import run_workers

def make(number, allocate):
    time.sleep({seconds})
    arrays = allocate({{"values": ((1000,), np.float32)}})
    arrays["values"][:] = number
    return Rows(arrays, [], True)

results = run_workers(make, iter(range(10**9)), 3)
next(results)
crew = [child.pid for child in multiprocessing.active_children()]
bystander = os.fork() if {away} else 0
if {away} and not bystander:
    time.sleep(60)
    os._exit(0)
print(bystander, *crew, flush=True)
if {away}:
    time.sleep(60)
for _ in results:
    pass
"""


@pytest.mark.parametrize(("seconds", "away"), [(0.001, False), (0.001, True), (0.4, False)])
def test_a_killed_trainer_leaves_no_workers(seconds: float, away: bool) -> None:
    """Killed while it takes batches, while workers are at work, and while it does something else and another child of
    its own, which has inherited its ends of the pipes, lives on."""
    script = SCRIPT.format(seconds=seconds, away=away)
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    try:
        bystander, *crew = map(int, trainer.stdout.readline().split())
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert len(crew) == 3
    assert gone(set(crew))
    if bystander:
        os.kill(bystander, signal.SIGKILL)


def test_workers_of_a_process_that_has_used_threads(packed: PackedDataset, layout: Layout) -> None:
    """torch's and the tokenizer's threads exist before the workers are forked, and are of no use in them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        many = torch.rand(600, 600)
        (many @ many).softmax(0).sum()
        torch.nn.functional.interpolate(torch.rand(1, 3, 300, 300), (200, 200), mode="bicubic", antialias=True)
        layout.tokenizer._backend.encode_batch(["a cat under an umbrella"] * 1000)
        expected = list(PackedLoader(packed, layout, 4, decoder="fast").batches(6))
        with within(15):
            found = list(PackedLoader(packed, layout, 4, decoder="fast", workers=2).batches(6))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.media["image"].values, b.media["image"].values)
