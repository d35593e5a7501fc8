"""The `data:` section of a run."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mm.data.sources import SourceConfig
from mm.settings import Count, Number, Section

Split = Literal["train", "validation", "test"]


class DataConfig(Section):
    """What is trained on, and how it is packed. Give raw `sources`, or a `packed` set made by `mm pack`."""

    root: str = ""
    """Stands for `{root}` in the paths of sources."""
    sources: list[SourceConfig] = []
    """Raw shards to train on. They are packed first, into `cache`, unless that has been done."""
    validation: list[SourceConfig] = []
    """Held-out shards, evaluated every `evaluation.every` steps."""
    test: list[SourceConfig] = []
    """Held-out shards, evaluated once, at the end."""
    packed: Path | None = None
    """A folder written by `mm pack`. It is refused when it was made for another model."""
    context_length: Count = Field(default=4096, ge=8)
    """Tokens in a row. Longer rows waste less and need more memory."""
    budgets: dict[Literal["image"], Count] = {}
    """At most so many media in a row, so that no batch needs more memory than was planned for."""
    visits: Count = Field(default=1, ge=1)
    """How often the packed set holds each training sample, each time with another of its captions."""
    isolate_segments: bool = True
    """Attention stays inside a sample. `false`, as Open-Qwen2VL was trained: it reaches what stands before it in the
    row, too."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a sample longer than a row, or over a budget. It does not count for `max_bad_fraction`."""
    max_bad_fraction: Number = Field(default=0.0, ge=0, le=1)
    """Unreadable samples are left out and counted up to this share of a source; beyond it the run ends. 0: the first
    one ends it. A shard that is not a whole tar always does."""
    max_pixels: Count = Field(default=100_000_000, ge=1, le=178_956_970)
    """Pictures with more pixels are bad samples. Pillow opens none beyond the upper limit."""
    workers: int = Field(default=1, ge=0)
    """Processes that read and decode during training. Any number gives the same order."""
    cache: Path = Path("~/.cache/mm")
    """Where raw sources are packed to when a run needs it."""

    def split(self, split: Split) -> list[SourceConfig]:
        return self.sources if split == "train" else getattr(self, split)
