"""What a run writes down: metrics.jsonl, one object a logged step, and the same numbers for TensorBoard and trackers.

metrics.jsonl is the record: a resumed run cuts it back to its checkpoint, and the report reads nothing else.
`Throughput` measures the numbers that are about the machine and not about the model.
"""

import contextlib
import importlib.util
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mm.errors import ConfigError

if TYPE_CHECKING:
    import torch


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class Tracker(Protocol):
    """A place that metrics go to beside metrics.jsonl."""

    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard files of a run folder, from `step` on: what came later is cut back.

    `trackers`: names out of `TRACKERS`, which get the same numbers; `config`: the resolved config, for them to show.
    """

    def __init__(
        self, folder: Path, step: int, trackers: Sequence[str] = (), config: dict[str, Any] | None = None
    ) -> None:
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        self._last = kept[-1] if kept else {}
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in kept))
        partial.replace(path)
        self._trackers: list[Tracker] = [TensorBoard(folder, step)]
        self._trackers += [TRACKERS[name](folder, config or {}) for name in trackers]
        self._path, self._size, self._late = path, path.stat().st_size, list[str]()

    def write(self, row: dict[str, Any]) -> str | None:
        """`row["step"]` says where; numbers go to all trackers, the rest to metrics.jsonl alone.

        A disk that is full is no reason for a run to end: rows wait to be written with the next one, and a tracker that
        fails gets no more. Returns what went wrong, if anything.
        """
        problem = self._append(_line(row))
        numbers = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        for tracker in [*self._trackers]:
            try:
                tracker.write(row["step"], numbers)
            except Exception as error:
                self._trackers.remove(tracker)
                problem = f"{type(tracker).__name__.lower()} gets no more rows: {error}"
        return problem

    def amend(self, row: dict[str, Any]) -> str | None:
        """`write` as the first row, into that of the same step if the file ends in one."""
        if self._last.get("step") == row["step"]:
            self._size -= len(_line(self._last).encode())
            row = {**self._last, **row}
        return self.write(row)

    def _append(self, line: str) -> str | None:
        self._late.append(line)
        try:
            with open(self._path, "r+b") as file:
                file.truncate(self._size)  # without a half of a line that was written before
                file.seek(self._size)
                file.write("".join(self._late).encode())
                file.flush()
                self._size = file.tell()
        except OSError as error:
            first = len(self._late) == 1
            return f"{self._path}: {error.strerror}; its rows wait until they can be written" if first else None
        self._late = []
        return None

    def close(self) -> None:
        if self._late:
            self._append("")
        for tracker in self._trackers:
            with contextlib.suppress(Exception):
                tracker.close()


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event a row: `add_scalar` writes one a number, at ten times the cost.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. `WANDB_MODE=offline` needs no account: `wandb sync RUN/wandb/offline-*` sends it later.

    Curves are drawn over `step`, not over wandb's own counter, which cannot go back: what a resumed run does again is
    drawn over what it did before. The project is `WANDB_PROJECT`, or `mm`.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        check_trackers(["wandb"])
        import wandb  # type: ignore[import-not-found,unused-ignore]

        path = folder / "wandb" / "id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mm"),
                dir=str(folder),
                id=path.read_text(),
                name=folder.resolve().name,
                config=config,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"train.trackers: wandb did not start ({reason}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"wandb": Wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a tracker whose package is not installed: call it before anything is built."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.trackers: {name} is not installed; install it with `pip install 'mm-pretrain[{name}]'`, "
                "or take it out of the list"
            )


class Throughput:
    """Speed, waiting and memory of the training loop since they were last read.

        timer = Throughput(device, peak=peak_flops(device, precision) * ranks)
        with timer.waiting(): batch = next(batches)
        with timer.excluded(): evaluate()
        timer.add(tokens, loss_tokens, flops)
        row |= timer.read()

    `peak`: FLOP/s of all devices together, None where it is not known. On a GPU, read after the step's numbers came to
    the host: the time is the host's.
    """

    def __init__(self, device: "torch.device", peak: float | None = None) -> None:
        self._device, self._peak = device, peak
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._excluded = self._flops = 0.0
        self._steps = self._tokens = self._loss_tokens = 0

    def add(self, tokens: int, loss_tokens: int, flops: float = 0.0) -> None:
        """One step: its tokens and floating-point operations on all ranks; 0 where operations were not counted."""
        self._steps += 1
        self._tokens += tokens
        self._loss_tokens += loss_tokens
        self._flops += flops

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time in here is no training time: evaluation, saving."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Of training, since it was last read."""
        return max(time.perf_counter() - self._start - self._excluded, 1e-9)

    def read(self) -> dict[str, float]:
        """What goes into a row of metrics.jsonl, and `seconds`, the training time behind it. Starts anew.

        `data_wait` is a share of that time. `memory_gb` (10^9 bytes) is the peak of what tensors take on the GPU, and
        `host_memory_gb` that of this process; without a GPU, `memory_gb` is the latter. Peaks are over the whole run.
        """
        seconds = self.seconds
        row = {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "loss_tokens_per_second": round(self._loss_tokens / seconds, 1),
            "steps_per_second": round(self._steps / seconds, 5),
            "data_wait": round(self._waited / seconds, 5),
            **({"mfu": round(self._flops / seconds / self._peak, 5)} if self._peak and self._flops else {}),
            **_memory(self._device),
            "seconds": seconds,
        }
        self._reset()
        return row


def _memory(device: "torch.device") -> dict[str, float]:
    unit = 1 if sys.platform == "darwin" else 1024
    host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
    if device.type != "cuda":
        return {"memory_gb": host}
    import torch

    return {"memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3), "host_memory_gb": host}


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN: a loss that is not finite is written as null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, ensure_ascii=False) + "\n"
