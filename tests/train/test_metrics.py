"""What is written down can be read back, by us and by the tools it is meant for; speeds are counts over time."""

import gzip
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.errors import ConfigError
from mm.train.accelerators import ACCELERATORS, find, peak_flops
from mm.train.metrics import MetricsLog, Throughput, check_trackers, read_metrics
from mm.train.profile import Profiler

CPU = torch.device("cpu")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, read with its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    rows = [
        {"step": n, "loss": 1.0 / n, "loss/text": n, "skipped": n == 2, "note": "words", "grad_norm": math.inf}
        for n in range(1, 6)
    ]
    log = MetricsLog(tmp_path, 0)
    for row in rows:
        log.write(row)
    log.close()
    again = MetricsLog(tmp_path, 3)  # resumed from step 3: steps 4 and 5 are done again
    again.write({"step": 4, "loss": 9.0})
    again.close()

    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in kept] == [1, 2, 3, 4] and kept[0]["grad_norm"] is None
    shown = scalars(tmp_path)
    assert [(s, pytest.approx(v)) for s, v in shown["loss"]] == [(row["step"], row["loss"]) for row in kept]
    assert shown["loss/text"] == [(1, 1), (2, 2), (3, 3)] and shown["skipped"][1] == (2, 1.0)
    assert "note" not in shown and "step" not in shown


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"wandb is not installed; .*mm-pretrain\[wandb\]") as error:
        check_trackers(["wandb"])
    assert "\n" not in str(error.value)
    check_trackers([])


def test_wandb_gets_the_numbers_and_resumes_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, stop in ((0, 3), (2, 4)):  # the second one goes on from step 2
        log = MetricsLog(tmp_path, start, ["wandb"], {"seed": 7})
        for step in range(start + 1, stop + 1):
            log.write({"step": step, "loss": 10.0 + step, "note": "words"})
        log.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem for path in files} == {f"run-{(tmp_path / 'wandb/id').read_text()}"}
    logged = [row for path in files for row in wandb_history(path)]
    assert [(row["step"], row["loss"]) for row in logged] == [(1, 11), (2, 12), (3, 13), (3, 13), (4, 14)]
    assert not any("note" in row for row in logged)


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows in a `.wandb` file: a LevelDB log of protobuf records, 7 bytes of header, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, rows = path.read_bytes(), 7, []
    while place + 7 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        record = Record.FromString(data[place + 7 : place + 7 + size])
        place += 7 + size
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items()})
    assert place < 32768  # one block: no record is split
    return rows


def test_throughput_is_counts_over_time_that_is_not_excluded() -> None:
    timer = Throughput(CPU, peak=1e6)
    before = time.perf_counter()
    with timer.excluded():
        time.sleep(0.05)
    with timer.waiting():
        time.sleep(0.02)
    for _ in range(3):
        timer.add(100, 40, flops=5e3)
    row = timer.read()
    whole = time.perf_counter() - before
    seconds = row["seconds"]
    assert 0.02 <= seconds <= whole - 0.05
    near: Callable[[float], Any] = lambda value: pytest.approx(value, rel=1e-3)  # noqa: E731
    assert row["tokens_per_second"] == near(300 / seconds) and row["loss_tokens_per_second"] == near(120 / seconds)
    assert row["steps_per_second"] == near(3 / seconds) and row["mfu"] == near(15e3 / seconds / 1e6)
    assert 0.02 <= row["data_wait"] * seconds + 1e-5 <= seconds
    # The next reading starts from nothing.
    assert (again := timer.read())["tokens_per_second"] == 0 and again["seconds"] < seconds and "mfu" not in again


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_memory_of_the_host_is_the_peak_that_linux_counts() -> None:
    found = Throughput(CPU).read()["memory_gb"]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak and found == pytest.approx(int(peak[1]) * 1024 / 1e9, abs=0.02)


def test_every_accelerator_is_found_by_its_own_name_and_by_torchs() -> None:
    assert all(find(one.name) is one for one in ACCELERATORS)
    names = {
        "NVIDIA A100-SXM4-80GB": (312, 79), "NVIDIA A100 80GB PCIe": (312, 79), "NVIDIA A100-PCIE-40GB": (312, 39),
        "NVIDIA H100 80GB HBM3": (989, 79), "NVIDIA H100 PCIe": (756, 79), "NVIDIA H100 NVL": (835, 93),
        "NVIDIA H200": (989, 139), "NVIDIA GH200 480GB": (989, 94), "NVIDIA B200": (2250, 178),
        "NVIDIA L4": (121, 22), "NVIDIA L40": (181, 44), "NVIDIA L40S": (362, 44), "NVIDIA A10": (125, 22),
        "NVIDIA A10G": (70, 22), "NVIDIA A40": (149.7, 44), "NVIDIA RTX A6000": (154.8, 47),
        "NVIDIA RTX 6000 Ada Generation": (364.2, 47), "NVIDIA GeForce RTX 3090": (71, 23),
        "NVIDIA GeForce RTX 4090": (165.2, 23), "NVIDIA GeForce RTX 5090": (209.5, 31),
        "AMD Instinct MI300X": (1307.4, 191),
    }  # fmt: skip
    for name, figures in names.items():
        found = find(name)
        assert found is not None and (found.tflops, found.memory) == figures, name
    for unknown in (
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "Tesla T4",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ):
        assert find(unknown) is None
    assert peak_flops(CPU, "bf16") is None


def run_steps(profiler: Profiler, steps: range) -> None:
    weight = torch.ones(8, 8)
    for step in steps:
        profiler.step(step)
        for _ in range(step):
            weight = torch.mm(weight, weight) / 8


@pytest.mark.parametrize(
    ("steps", "ran", "traced"),
    [((3, 4), range(1, 7), (3, 4)), ((1, 1), range(1, 3), (1, 1)), ((3, 9), range(1, 6), (3, 5)),
     ((2, 5), range(4, 8), (4, 5))],
    ids=["inside", "from the first step", "the run ends first", "resumed inside"],
)  # fmt: skip
def test_the_trace_holds_the_steps_of_the_range_and_no_others(
    tmp_path: Path, steps: tuple[int, int], ran: range, traced: tuple[int, int]
) -> None:
    with Profiler(steps, tmp_path, rank=1) as profiler:
        run_steps(profiler, ran)
    name = f"steps-{traced[0]}-{traced[1]}.rank1"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.trace.json.gz", f"{name}.ops.txt"}
    events = json.loads(gzip.open(tmp_path / f"{name}.trace.json.gz").read())["traceEvents"]
    marks = sorted(event["name"] for event in events if re.fullmatch(r"step \d+", event.get("name", "")))
    wanted = range(traced[0], traced[1] + 1)
    assert marks == [f"step {step}" for step in wanted]
    # Step n multiplies n times, so the count of products says which steps were traced.
    assert sum(event.get("name") == "aten::mm" for event in events) == sum(wanted)
    assert "aten::mm" in (tmp_path / f"{name}.ops.txt").read_text()


def test_no_range_no_trace_and_a_wrong_range_is_refused(tmp_path: Path) -> None:
    with Profiler(None, tmp_path) as profiler:
        run_steps(profiler, range(1, 4))
    with Profiler((9, 12), tmp_path) as profiler:
        run_steps(profiler, range(1, 9))  # warmed up, but the range never came
    assert not list(tmp_path.iterdir())
    for wrong in ((0, 3), (5, 2)):
        with pytest.raises(ConfigError, match="is no range"):
            Profiler(wrong, tmp_path)
