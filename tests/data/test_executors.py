"""Who does the work: every item once, the first error ends it, and no process is left behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mm.data.executors import run
from mm.errors import DataError, MMError


class Job:
    """Items leave a file each; item 13 is bad luck of some kind."""

    def __init__(self, folder: Path, luck: str = "") -> None:
        self.folder, self.luck = folder, luck

    def work(self, item: int) -> None:
        (self.folder / f"{item}-{time.monotonic_ns()}").write_text(str(os.getpid()))
        if item != 13:
            time.sleep(0.01)
        elif self.luck == "data":
            raise DataError("x.tar: damaged")
        elif self.luck == "disk":
            raise OSError(28, "No space left on device", "/full/disk")
        elif self.luck == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.luck == "slow":
            time.sleep(600)


Children = Callable[[], list[BaseProcess]]


@pytest.fixture
def children() -> Children:
    """The processes that this one has started since the test began; the session may have a pool of ranks."""
    before = multiprocessing.active_children()
    return lambda: [one for one in multiprocessing.active_children() if one not in before]


def done(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir())


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (1, 1), (3, 3), (99, 20)])
def test_every_item_once(tmp_path: Path, workers: int, processes: int, children: Children) -> None:
    items = list(range(0, 40, 2))
    assert sorted(run(Job(tmp_path), "work", items, workers)) == items == done(tmp_path)
    used = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(used) <= processes and (os.getpid() in used) == (workers <= 1)
    assert children() == []


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_to_do(tmp_path: Path, workers: int) -> None:
    assert list(run(Job(tmp_path), "work", [], workers)) == []
    assert list(run(Job(tmp_path), "work", [5], workers)) == [5], "one item is no reason to start processes"
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}


@pytest.mark.parametrize(
    ("luck", "kind", "words"),
    [
        ("data", DataError, r"^x\.tar: damaged$"),
        ("disk", OSError, "No space left on device: '/full/disk'"),
        ("killed", MMError, r"a packing process was killed, probably for lack of memory: use fewer --workers"),
    ],
)
def test_the_first_error_ends_it_as_it_was_raised(
    tmp_path: Path, luck: str, kind: type[Exception], words: str, children: Children
) -> None:
    with pytest.raises(kind, match=words):
        list(run(Job(tmp_path, luck), "work", list(range(200)), 2))
    assert len(done(tmp_path)) < 100, "what had not begun is left"
    assert ended(children)


def ended(children: Children) -> bool:
    """No process of a pool is left, a moment later."""
    deadline = time.monotonic() + 10
    while children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not children()


def test_an_interrupt_ends_the_workers_and_no_other_process(tmp_path: Path, children: Children) -> None:
    """Ctrl-C arrives between two items, while another one is long at work."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in run(Job(tmp_path, "slow"), "work", list(range(13, 30)), 2):
                raise KeyboardInterrupt
        deadline = time.monotonic() + 10
        while len(children()) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert children() == [other] and other.is_alive()
    finally:
        other.kill()
        other.join()
