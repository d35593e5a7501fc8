"""The launch scripts of configs/launch/, with stand-ins for Slurm that start processes on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm.train import checkpoint
from mm.train.metrics import read_metrics

LAUNCH = Path(__file__).parent.parent / "configs/launch"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
trap : TERM
pids=() status=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
echo "${pids[@]}" > tasks
for pid in "${pids[@]}"; do
    while :; do wait "$pid"; found=$?; kill -0 "$pid" 2>/dev/null || break; done
    ((found > status)) && status=$found
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) echo 127.0.0.1 ;;
*) echo "$@" >> scontrol.log ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on one node."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(LAUNCH.parent.parent),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[0]",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_a_job_is_saved_and_queued_again(tiny: Callable[..., Path], tmp_path: Path, slurm: dict[str, str]) -> None:
    """By SIGTERM to all its processes, loader workers too, as Slurm sends it."""
    config = tiny()
    command = [str(LAUNCH / "slurm.sh"), str(config), "data.test=[]", "data.validation=[]", "train.save_every=1000"]
    command += ["data.workers=1", "train.engine={kind: fsdp}", "train.max_steps=100000"]
    metrics = tmp_path / "run/metrics.jsonl"
    job = subprocess.Popen(command, cwd=tmp_path, env=slurm, start_new_session=True)
    try:
        wait_for(lambda: job.poll() is not None or len(read_metrics(metrics)) > 3)
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(60) == 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    (saved,) = checkpoint.complete(tmp_path / "run/checkpoints")
    step = int(saved.name.removeprefix(checkpoint.PREFIX))
    assert read_metrics(metrics)[-1]["step"] == step > 3


@pytest.mark.parametrize(
    "status,restarts,queued", [(75, 0, True), (76, 3, True), (75, 50, False), (2, 0, False), (0, 0, False)]
)
def test_only_what_can_go_on_is_queued_again(
    status: int, restarts: int, queued: bool, tmp_path: Path, slurm: dict[str, str]
) -> None:
    (tmp_path / "bin/python").write_text(f"#!/bin/sh\nexit {status}\n")
    environment = {**slurm, "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run([str(LAUNCH / "slurm.sh"), "x.yaml"], cwd=tmp_path, env=environment)
    assert done.returncode == (0 if queued else status)
    assert (tmp_path / "scontrol.log").exists() == queued


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
