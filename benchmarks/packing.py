"""Bin packing: time to assign, and how full the bins are.

Lengths are drawn like captions (80 %) and interleaved documents (20 %), seed 0; what is longer than a row is left out.
Peers get the same lengths. TRL's `bfd` works on tables: it is given rows of these lengths, all in one batch as its best
case for fill, and its time includes rearranging them. Open-Qwen2VL's first-fit decreasing works tar by tar (10,000
samples) and sums a bin anew at every look, as the paper's Algorithm 1 and the repository have it. `pip install -e
".[bench]"` installs the peers. With several budgets there is no peer: neither knows any other than length.
"""

import math
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks.harness import Row, arguments, interleaved, release, show
from mm.data.pack import best_fit_decreasing, pack

CONTEXT = 4096
PLACEHOLDERS = 144
SIZE_OF_A_TAR = 10_000


def lengths(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    captions = PLACEHOLDERS + rng.lognormal(4.0, 0.7, int(count * 0.8))
    documents = rng.lognormal(6.6, 0.8, count - len(captions))
    both = rng.permutation(np.concatenate([captions, documents]).astype(np.int32))
    return both[(both > 0) & (both <= CONTEXT)]


def with_pictures(count: int, seed: int = 0, placeholders: int = PLACEHOLDERS) -> np.ndarray:
    """[N, 2] tokens and pictures: captions, interleaved documents of 1 to 9 pictures, and text."""
    rng = np.random.default_rng(seed)
    captions, documents = int(count * 0.6), int(count * 0.2)
    text = count - captions - documents
    pictures = np.concatenate([np.ones(captions), np.clip(rng.geometric(0.35, documents), 1, 9), np.zeros(text)])
    words = np.concatenate(
        [rng.lognormal(3.3, 0.7, captions), rng.lognormal(6.3, 0.8, documents), rng.lognormal(6.6, 0.9, text)]
    )
    costs = np.stack([placeholders * pictures + np.maximum(words, 4), pictures], axis=1).astype(np.int64)
    return rng.permutation(costs[costs[:, 0] <= CONTEXT])


def with_pictures_and_audio(count: int, seed: int = 0) -> np.ndarray:
    """[N, 3] tokens, pictures and seconds of sound: half as above, the rest sound (12.5 tokens a second) and films."""
    rng = np.random.default_rng(seed)
    parts = [np.pad(with_pictures(count // 2, seed), ((0, 0), (0, 1)))]
    for many, median, longest, pictures_a_second in ((count // 4, 9, 30, 0.0), (count // 8, 4.5, 16, 0.5)):
        seconds = np.clip(rng.lognormal(np.log(median), 0.6, many).astype(np.int64), 1, longest)
        pictures = np.ceil(seconds * pictures_a_second)
        tokens = np.ceil(12.5 * seconds) + PLACEHOLDERS * pictures + rng.lognormal(3.3, 0.7, many)
        parts.append(np.stack([tokens, pictures, seconds], axis=1).astype(np.int64))
    costs = np.concatenate(parts)
    return rng.permutation(costs[costs[:, 0] <= CONTEXT])


def first_fit_decreasing_per_tar(sizes: np.ndarray) -> int:
    """Open-Qwen2VL's bins, counted."""
    bins_in_all = 0
    for start in range(0, len(sizes), SIZE_OF_A_TAR):
        bins: list[list[int]] = []
        for size in sorted(sizes[start : start + SIZE_OF_A_TAR].tolist(), reverse=True):
            for one in bins:
                if sum(one) + size <= CONTEXT:
                    one.append(size)
                    break
            else:
                bins.append([size])
        bins_in_all += len(bins)
    return bins_in_all


def trl_bfd(sizes: np.ndarray) -> Any:
    """A function that packs `sizes` by TRL and gives the number of bins, or the reason why it cannot be had."""
    try:
        import pyarrow as pa
        from datasets import Dataset
        from trl.data_utils import pack_dataset
    except ImportError as error:
        return f"not installed ({error}); pip install trl"
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], dtype=np.int32)))
    table = Dataset(pa.table({"input_ids": tokens}))
    return lambda: len(pack_dataset(table, CONTEXT, strategy="bfd", map_kwargs={"batch_size": len(sizes)}))


def memory_of(count: int) -> float:
    """MB that packing `count` lengths adds to the peak of a fresh process that already holds them."""
    code = (
        "import resource; from benchmarks.packing import lengths, best_fit_decreasing, CONTEXT\n"
        f"best_fit_decreasing(lengths(1000), CONTEXT); sizes = lengths({count}).copy()\n"
        "import ctypes; ctypes.CDLL('libc.so.6').malloc_trim(0)\n"
        "now = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "best_fit_decreasing(sizes, CONTEXT)\n"
        "peak = next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM')) / 2**10\n"
        "print(peak - now)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def several_budgets(case: str, costs: np.ndarray, limits: list[int], repetitions: int) -> list[Row]:
    """Time, and the part that is used of the budget that needs most bins."""
    took = interleaved(repetitions, ours=lambda: pack(costs, limits))["ours"]
    bins = int(pack(costs, limits).max()) + 1
    fill = 100 * float((costs.sum(axis=0) / limits).max()) / bins
    return [
        {"case": case, "unit": "s", "better": "lower", "ours": took, "peers": {}},
        {"case": f"{case}: fill of the scarcest budget", "unit": "%", "better": "higher", "ours": fill,
         "peers": {}, "limit": 100.0},
    ]  # fmt: skip


def main() -> None:
    options = arguments(__doc__)
    small, large, repetitions = (20_000, 200_000, 1) if options.quick else (240_000, 10_000_000, 5)
    rows: list[Row] = []

    sizes = lengths(small)
    bound = math.ceil(int(sizes.sum()) / CONTEXT)
    ours = interleaved(repetitions, ours=lambda: best_fit_decreasing(sizes, CONTEXT))["ours"]
    count = int(best_fit_decreasing(sizes, CONTEXT).max()) + 1
    seconds: dict[str, Any] = {}
    over: dict[str, Any] = {}
    trl, peer = trl_bfd(sizes), "Open-Qwen2VL, first-fit decreasing per tar"
    if callable(trl):
        bins: dict[str, int] = {}
        seconds[release("trl")] = interleaved(1, trl=lambda: bins.setdefault("trl", trl()))["trl"]
        over[release("trl")] = 100 * (bins["trl"] / bound - 1)
    else:
        seconds["trl"] = over["trl"] = trl
    found: dict[str, int] = {}
    seconds[peer] = interleaved(1, ffd=lambda: found.setdefault("n", first_fit_decreasing_per_tar(sizes)))["ffd"]
    over[peer] = 100 * (found["n"] / bound - 1)
    case = f"{small:,} lengths"
    rows.append({"case": case, "unit": "s", "better": "lower", "ours": ours, "peers": seconds})
    rows.append(
        {"case": f"{case}: bins above ceil(sum / {CONTEXT})", "unit": "%", "better": "lower",
         "ours": 100 * (count / bound - 1), "peers": over, "limit": 0.0}
    )  # fmt: skip

    for n in [n for n in (100_000, 1_000_000, 10_000_000, 100_000_000) if n <= large * 10]:
        many = lengths(n)
        took = interleaved(1 if n > large else 3, ours=lambda many=many: best_fit_decreasing(many, CONTEXT))["ours"]
        above = 100 * ((int(best_fit_decreasing(many, CONTEXT).max()) + 1) / math.ceil(int(many.sum()) / CONTEXT) - 1)
        rows.append({"case": f"{n:,} lengths", "unit": "s", "better": "lower", "ours": took, "peers": {}})
        rows.append(
            {"case": f"{n:,} lengths: bins above the bound", "unit": "%", "better": "lower", "ours": above,
             "peers": {}, "limit": 0.0}
        )  # fmt: skip
    rows.append(
        {"case": f"{large:,} lengths: memory beyond them", "unit": "MB", "better": "lower", "ours": memory_of(large),
         "peers": {}}
    )  # fmt: skip

    for placeholders, budgets in ((PLACEHOLDERS, (40, 28, 20, 16, 12, 10, 9)), (64, (28, 16, 12, 9))):
        costs = with_pictures(small, placeholders=placeholders)
        for pictures in budgets:
            case = f"{small:,} samples of {placeholders} positions a picture, {pictures} pictures"
            rows += several_budgets(case, costs, [CONTEXT, pictures], repetitions)
    costs = with_pictures(large)
    rows += several_budgets(f"{large:,} samples, 16 pictures", costs, [CONTEXT, 16], 1)
    costs = with_pictures_and_audio(small)
    for pictures, seconds in ((20, 70), (13, 35), (10, 35), (9, 30)):
        case = f"{small:,} samples with sound, {pictures} pictures and {seconds} seconds"
        rows += several_budgets(case, costs, [CONTEXT, pictures, seconds], repetitions)
    show("packing", rows, options.json)


if __name__ == "__main__":
    main()
