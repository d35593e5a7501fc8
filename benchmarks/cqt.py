"""MERT's CQT target: time, memory and distance, ours by FFT and nnAudio's by convolution with kernels of 65,536 taps.

Both have MERT's settings: 24 kHz, hop 320, 336 bins, 48 an octave, zeros beyond the ends. Clips are decaying notes with
a little noise. Times are medians of interleaved repetitions in one process, kernels made before; CPU time counts all
threads, and other work on the machine counts little in it. Memory is what making the kernels and one call add to the
peak of a fresh process that has its imports behind it. Distances are from nnAudio's module turned into float64 (its
kernels are still rounded to float32); its own in float32 shows what rounding alone does.
"""

import ctypes
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, arguments, release, show
from mm.models.spectra import CQT

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mm" / "benchmarks"
PEERS = CACHE / "peers"
PACKAGES = "nnAudio scipy"
RATE, HOP, FMIN, BINS, BINS_PER_OCTAVE = 24_000, 320, 32.7, 336, 48
Transform = Callable[[Tensor], Tensor]
"""float32 [B, T] to magnitudes [B, bins, frames]."""
sys.path.append(str(PEERS))


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "measure":
        print(memory_of(sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
        return
    options = arguments(__doc__)
    repetitions, long = (1, 10) if options.quick else (7, 30)
    peer = release("nnAudio")
    transforms: dict[str, Transform] = {"ours": ours()}
    missing: dict[str, str] = {}
    try:
        transforms[peer] = nnaudio()
    except ImportError as error:
        missing[peer] = f"not there ({error}); pip install --no-deps --target {PEERS} {PACKAGES}"

    rows: list[Row] = []
    for count, seconds in ((1, 5), (8, 5), (1, long)):
        case = f"{count} clip{'s' if count > 1 else ''} of {seconds} s"
        clips = notes(count, seconds)
        took = timed(repetitions, {name: partial(run, clips) for name, run in transforms.items()})
        for number, unit in enumerate(("ms", "CPU ms")):
            figures = {name: 1e3 * both[number] for name, both in took.items()}
            rows.append(row(case, unit, figures, missing))
        memory = {name: asked("ours" if name == "ours" else "nnaudio", count, seconds) for name in transforms}
        rows.append(row(f"{case}: peak memory, kernels included", "MB", memory, missing))
    if not missing:
        rows += distances(transforms)
    show("cqt", rows, options.json)
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", file=sys.stderr)


def row(case: str, unit: str, figures: dict[str, float], missing: dict[str, str]) -> Row:
    peers: dict[str, Any] = {name: figure for name, figure in figures.items() if name != "ours"}
    return {"case": case, "unit": unit, "better": "lower", "ours": figures["ours"], "peers": {**peers, **missing}}


def ours() -> Transform:
    transform = CQT(RATE, HOP, FMIN, BINS, BINS_PER_OCTAVE)
    transform([torch.zeros(1)])  # which makes the kernels
    return lambda clips: torch.stack(transform(list(clips))).transpose(1, 2)


def nnaudio() -> Any:
    from nnAudio.features.cqt import CQT1992v2

    layer = CQT1992v2(
        sr=RATE, hop_length=HOP, fmin=FMIN, n_bins=BINS, bins_per_octave=BINS_PER_OCTAVE, pad_mode="constant",
        verbose=False,
    )  # fmt: skip
    return layer.requires_grad_(False)


def notes(count: int, seconds: float) -> Tensor:
    """float32 [count, seconds * RATE], at most 1: notes from A1 to A6 of ten partials, and noise at -60 dB."""
    draw = np.random.default_rng(0)
    at = np.arange(int(seconds * RATE)) / RATE
    clips = 1e-3 * draw.standard_normal((count, len(at)))
    for clip in clips:
        for start in np.arange(0, seconds, 0.25):
            partials = 55 * 2 ** (draw.integers(60) / 12) * np.arange(1, 11)
            since = at[at >= start] - start
            for number, frequency in enumerate(partials[partials < RATE / 2], start=1):
                clip[at >= start] += np.sin(2 * np.pi * frequency * since) * np.exp(-3 * number * since) / number
    return torch.from_numpy((clips / np.abs(clips).max()).astype(np.float32))


def timed(repetitions: int, candidates: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Median seconds of each candidate and of all its threads, all run in turn in every repetition."""
    for run in candidates.values():
        run()  # what is set up once for a shape is not what is asked
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, run in candidates.items():
            start = time.perf_counter(), time.process_time()
            run()
            spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: (statistics.median(wall for wall, _ in some), statistics.median(cpu for _, cpu in some))
        for name, some in spent.items()
    }


def asked(which: str, count: int, seconds: float) -> float:
    """`memory_of` from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cqt", "measure", which, str(count), str(seconds)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def memory_of(which: str, count: int, seconds: float) -> float:
    """MB that making the kernels and one call add to this process at their peak."""
    clips = notes(count, seconds)
    if which == "nnaudio":
        import nnAudio.features.cqt  # noqa: F401
    ones = torch.ones(4, 40, 40)
    torch.fft.ifft(torch.fft.fft(ones @ ones))  # libraries take memory of their own when they are first used
    torch.conv1d(ones, ones[:, :, :3])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    {"ours": ours, "nnaudio": nnaudio}[which]()(clips)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - now) / 1e6


def distances(transforms: dict[str, Transform]) -> list[Row]:
    """Of 5 s of notes, and of 5 s of noise, in which every value is of like size."""
    reference = nnaudio().double()
    rows: list[Row] = []
    noise = 0.1 * torch.randn(1, 5 * RATE, generator=torch.Generator().manual_seed(0))
    for what, clips in {"notes": notes(1, 5), "noise": noise}.items():
        expected = reference(clips.double())
        found = {name: run(clips).double() for name, run in transforms.items()}
        apart = {name: (values - expected).abs() for name, values in found.items()}
        largest = {name: float((error / expected.max()).max()) for name, error in apart.items()}
        rows.append(row(f"{what}: largest difference, of the largest value", "1", largest, {}))
        for decibel in (-60, -80):
            heard = expected > 10 ** (decibel / 20) * expected.max()
            relative = {name: float((error / expected)[heard].max()) for name, error in apart.items()}
            rows.append(row(f"{what}: largest relative difference, values above {decibel} dB", "1", relative, {}))
    return rows


if __name__ == "__main__":
    main()
