"""Published benchmarks from their local files: how they are read, asked, answered and scored.

A benchmark is a `Task` (`mm.evals.items`); those that `mm eval --task` knows are in `TASKS`. Tasks for models that
compare and do not write are in `mm.evals.zero_shot`.
"""

from mm.evals.benchmarks import AI2D, MMMU, POPE, VQA, MathVista, MMBench, MMStar, SeedBench, TextVQA
from mm.evals.captions import Captions
from mm.evals.items import Task

TASKS: dict[str, type[Task]] = {
    "mmbench": MMBench,
    "seedbench": SeedBench,
    "mmstar": MMStar,
    "ai2d": AI2D,
    "textvqa": TextVQA,
    "mathvista": MathVista,
    "pope": POPE,
    "mmmu": MMMU,
    "vqa": VQA,
    "captions": Captions,
}
