"""The folder of a run: what may be in it, and whether it may be gone on with.

`config.yaml`, `run.json`, `data.json`, `metrics.jsonl`, `guard.jsonl`, `quarantine.json`, `tensorboard/` and
`checkpoints/`, at the end `eval.json`, `samples.json` and `samples/`; and `.lock`, held while it trains. Rank 0 writes.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from PIL import Image

from mm.data.sample import Media
from mm.errors import CheckpointError, ConfigError
from mm.files import atomic
from mm.train import checkpoint
from mm.train.config import Run
from mm.train.metrics import read_metrics

# What may differ between a run and its continuation. Everything else decides what the numbers are.
MAY_CHANGE = (
    "out", "data.codes", "data.workers", "data.cache", "data.remote_cache", "data.skip_ids", "train.max_steps",
    "train.epochs", "train.optimizer.lr", "train.micro_batch", "train.engine", "train.blocks",
    "train.activation_checkpointing", "train.compile", "train.device", "train.log_every", "train.save_every",
    "train.keep", "train.keep_every", "train.async_save", "train.hang_timeout", "train.profile", "train.trackers",
    "train.schedule.anneal", "evaluation",
)  # fmt: skip

# What else may differ where a run branches off from another, and where its data begin anew.
BRANCH = ("train.branch", "train.branch_data")
OTHER_DATA = ("data", "train.batch_tokens")

# What a run that has not begun to train may have left in its folder.
FILES = {
    "config.yaml", "data.json", "run.json", "metrics.jsonl", "guard.jsonl", "tensorboard", "checkpoints",
    "profile", "wandb", "quarantine.json", "lock",
}  # fmt: skip


LEASE = 180
"""Seconds that locks of a machine which is gone may stay."""


class RunFolder:
    """See the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None

    def open(self, config: Run, resume: bool, say: Callable[[str], None] = lambda text: None) -> Path | None:
        """Refuse a folder with another run in it; returns the checkpoint to go on from, if any: the newest, or
        that of the run that this one branches off from, which is written down: it stays that one.

        A run that never got to a logged step or a checkpoint is none: its folder is simply used again.
        """
        if self._begun() and not resume:
            raise ConfigError(f"{self.path}: holds a run already; go on with --resume, or choose another with out=DIR")
        strange = self.path.is_dir() and any(one.name.removeprefix(".") not in FILES for one in self.path.iterdir())
        if strange and not self._begun():
            raise ConfigError(f"{self.path}: is not empty and not a run; choose another folder with out=DIR")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take(say if resume else None)
        checkpoint.clear_leftovers(self.checkpoints)
        newest, begun = checkpoint.newest(self.checkpoints), self._begun()
        if begun:
            self._check_same_run(config)
        if newest is None and config.train.branch is not None:
            return self._branching_off(config, self.branch_point(config) if begun else None)
        return newest

    def _begun(self) -> bool:
        return checkpoint.newest(self.checkpoints) is not None or bool(read_metrics(self.path / "metrics.jsonl"))

    def _take(self, say: Callable[[str], None] | None) -> None:
        """Refuse a folder that another process is training in. A process that ends, however it does, lets go of it; of
        a machine that ends the server of a network disk may find out minutes later, for which who resumes waits, and
        says so."""
        lock = open(self.path / ".lock", "a+")
        end = time.monotonic() + (LEASE if say is not None else 0)
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    lock.close()  # a disk without locks
                    return
            lock.seek(0)
            who = lock.read().strip() or "another process"
            if time.monotonic() >= end:
                lock.close()
                raise ConfigError(
                    f"{self.path}: {who} is training in it; wait for it to end, or choose another folder with out=DIR. "
                    f"If it is no longer there, remove {self.path / '.lock'}"
                )
            if say is not None:
                say(f"{who} holds {self.path}; waiting up to {LEASE} s for it to end")
                say = None
            time.sleep(1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def let_go(self) -> None:
        """Another process may train in it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def branch_point(self, config: Run) -> dict[str, Any] | None:
        """Where a run branched off: `checkpoint`, `step`, `stage`, `stage_step`; as written when it was begun."""
        path = self.path / "run.json"
        if config.train.branch is None or not path.exists():
            return None
        found: dict[str, Any] | None = json.loads(path.read_text()).get("branch")
        return found

    def holds(self, saved: Path) -> bool:
        """Whether a checkpoint is this run's own."""
        return saved.parent == self.checkpoints

    def _branching_off(self, config: Run, point: dict[str, Any] | None) -> Path:
        """The checkpoint to start from: the one that was written down, or else what the config names, written down."""
        train = config.train
        assert train.branch is not None
        folder = checkpoint.find(Path(point["checkpoint"]) if point else train.branch.expanduser())
        may = (*MAY_CHANGE, *BRANCH, *(OTHER_DATA if train.branch_data == "anew" else ()))
        state = checkpoint.read_state(folder)
        if changed := _changed(state["config"], config, may):
            other = any(_within(key, one) for key in changed for one in OTHER_DATA)
            raise CheckpointError(
                f"train.branch: {folder} is of a run with another {', '.join(changed[:4])}; set it as there, "
                + ("or train.branch_data=anew, " if other else "")
                + "or begin a run with its weights: train.init_from"
            )
        if point is None:
            self.path.mkdir(parents=True, exist_ok=True)
            numbers = {key: state["progress"][key] for key in ("step", "stage", "stage_step")}
            self.write_json("run.json", {"branch": {"checkpoint": str(folder.resolve()), **numbers}})
        return folder

    def _check_same_run(self, config: Run) -> None:
        saved = yaml.safe_load((self.path / "config.yaml").read_text())
        if changed := _changed(saved, config, MAY_CHANGE):
            raise CheckpointError(
                f"{self.path}: cannot resume with another {', '.join(changed[:4])}; set it back as in "
                f"{self.path / 'config.yaml'}, or start a new run with out=DIR"
            )

    def write_config(self, config: Run) -> None:
        text = yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)
        self._write("config.yaml", text)

    def write_json(self, name: str, value: Any) -> None:
        self._write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Add lines of JSON."""
        with open(self.path / name, "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def evaluation(self, about: dict[str, Any]) -> dict[str, Any] | None:
        """What eval.json holds, if it is `about` this."""
        path = self.path / "eval.json"
        saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return saved if saved and about.items() <= saved.items() else None

    def write_samples(self, found: Sequence[tuple[dict[str, str], Media, np.ndarray | None]]) -> None:
        """samples.json and samples/: pictures with what a model says of them, and what it draws, uint8 [H, W, 3]."""
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        rows = []
        for number, (sample, picture, drawn) in enumerate(found):
            row = {**sample, "image": f"samples/{number:04d}.{picture.ext}"}
            (self.path / row["image"]).write_bytes(picture.read())
            if drawn is not None:
                row["drawn"] = f"samples/{number:04d}-drawn.png"
                Image.fromarray(drawn).save(self.path / row["drawn"])
            rows.append(row)
        self.write_json("samples.json", rows)

    def _write(self, name: str, text: str) -> None:
        with atomic(self.path / name) as file:
            file.write(text.encode())


def _changed(saved: dict[str, Any], config: Run, may: Sequence[str]) -> list[str]:
    """The keys that differ though they may not."""
    return [key for key in _differences(saved, config.resolved()) if not any(_within(key, one) for one in may)]


def _within(key: str, may: str) -> bool:
    """Whether a dotted key is `may` or below it, in the run's settings or a stage's."""
    parts = key.split(".")
    if parts[0] == "stages":
        parts = parts[2:]
    wanted = may.split(".")
    return parts[: len(wanted)] == wanted


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted keys at which two resolved configs differ."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and path == "stages":
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            key
            for name in sorted({*a, *b})
            for key in _differences(a.get(name), b.get(name), f"{path}.{name}".strip("."))
        ]
    return [] if a == b else [path]
