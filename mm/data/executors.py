"""Who does the work of packing: this process, a pool of them, or Ray. The work is the same, and so is what comes out.

A job is an object with methods that take the number of an item (a shard to scan, a shard to write). Every item is done
whole or not at all, so items may be done by anybody, in any order, and twice.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from mm.errors import DataError, MMError

ExecutorName = Literal["local", "ray"]
_job: Any = None


def run(job: Any, method: str, items: list[int], workers: int, executor: ExecutorName = "local") -> Iterator[int]:
    """`job.method(item)` for every item; yields the items as they are done. The first error ends it."""
    if executor == "ray":
        return _on_ray(job, method, items, workers)
    if workers <= 1 or len(items) <= 1:
        return _here(job, method, items)
    return _in_processes(job, method, items, min(workers, len(items)))


def _here(job: Any, method: str, items: list[int]) -> Iterator[int]:
    for item in items:
        getattr(job, method)(item)
        yield item


def _in_processes(job: Any, method: str, items: list[int], workers: int) -> Iterator[int]:
    # Tokenizers keep threads, and a forked process would inherit their locks but not them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(job).__module__])
    others = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, context, _start, (job,))
    try:
        futures = {pool.submit(_do, method, item): item for item in items}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool:
        raise MMError(
            "a packing process was killed, probably for lack of memory: use fewer --workers; what is done is kept"
        ) from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in {*multiprocessing.active_children()} - others:
            process.terminate()
        raise
    pool.shutdown()


def _start(job: Any) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(method: str, item: int) -> None:
    getattr(_job, method)(item)


def _on_ray(job: Any, method: str, items: list[int], workers: int) -> Iterator[int]:
    try:
        import ray
    except ImportError:
        raise DataError('Ray is not installed: pip install "mm-pretrain[ray]"') from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, num_cpus=None if "RAY_ADDRESS" in os.environ else workers)
    shared = ray.put(job)
    task: Any = ray.remote(lambda job, item: getattr(job, method)(item))
    waiting = {task.remote(shared, item): item for item in items}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, MMError | OSError) else error) from None
        yield waiting.pop(done)
