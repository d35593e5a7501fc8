"""The `data:` section of a run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mm.data.limits import Limits
from mm.data.media import Decoder
from mm.data.mixture import MixtureConfig
from mm.data.sources import SourceConfig
from mm.settings import Count, Number, Section

Split = Literal["train", "validation", "test"]
Budget = Literal[
    "image", "audio", "video", "image_cost", "audio_cost", "video_cost", "image_tokens", "audio_tokens", "video_tokens"
]


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
    budgets: dict[Budget, Annotated[Count, Field(ge=1)]] = {}
    """At most so much in a row, so that no batch needs more memory than was planned for: media (`image`, `audio`,
    `video`), their encoder tokens (`image_cost`, …) or the positions they take (`image_tokens`, …)."""
    visits: Count = Field(default=1, ge=1)
    """How often the packed set holds each training sample, each time with another of its captions."""
    isolate_segments: bool = True
    """Attention stays inside a sample. `false`, as Open-Qwen2VL was trained: it reaches what stands before it in the
    row, too."""
    mixture: MixtureConfig = MixtureConfig()
    """How sources are weighed against each other; by default every epoch holds every pack once."""
    decoder: Decoder = "exact"
    """Of pictures and frames in training; evaluation is always exact. `exact` is Pillow, as in published preprocessing;
    `fast` is two to five times as fast and differs from it by half a grey level in the mean, more at edges of pictures
    much larger than the model's."""
    skip_ids: Path | None = None
    """A file of sample ids, one a line, that a run leaves out; their places in the rows become padding."""
    packing: Literal["full", "single"] = "full"
    """`full`: rows are filled with whole samples. `single`: each sample is a row of its own, and the rows of a step go
    to micro-batches by length, padded to the longest: the grouping by length of LLaVA's fine-tuning, where a step holds
    so many samples (`train.batch_tokens` / `context_length`) rather than so many tokens."""
    too_long: Literal["error", "drop", "split"] = "error"
    """What to do with a sample longer than a row, or over a budget: end, leave it out, or make several of it, cut
    between paragraphs or sentences and never inside media, conversations between an answer and the next question.
    Counted, and not against `max_bad_fraction`."""
    max_bad_fraction: Number = Field(default=0.0, ge=0, le=1)
    """Unreadable samples and damaged places in shards are left out and counted up to this share of a source; beyond it
    the run ends. 0: the first one ends it."""
    max_pixels: Count = Field(default=100_000_000, ge=1, le=178_956_970)
    """Pictures with more pixels are bad samples. Pillow opens none beyond the upper limit."""
    max_seconds: Number = Field(default=14_400, gt=0)
    """Longer recordings and clips are bad samples."""
    max_media_bytes: Count = Field(default=2_000_000_000, ge=1)
    """Of one encoded picture, recording or clip."""
    max_json_bytes: Count = Field(default=64_000_000, ge=1)
    """Of the JSON or text of one sample, pictures in base64 included."""
    max_text_chars: Count = Field(default=8_000_000, ge=1)
    """Of all text of one sample."""
    features: bool = False
    """Read what a frozen tower gives for pictures, computed once by `mm data encode`, in place of pictures: these are
    neither read nor decoded, and the tower does not run."""
    codes: bool = False
    """Read what a teacher says of media, computed once by `mm data encode`, beside them: the teacher does not run."""
    workers: int = Field(default=1, ge=0)
    """Processes that read and decode during training. Any number gives the same order."""
    cache: Path = Path("~/.cache/mm")
    """Where raw sources are packed to when a run needs it, and remote shards are fetched to."""
    remote_cache: Count = Field(default=20_000_000_000, ge=1)
    """Bytes of remote shards that are kept in `cache`; the longest unused go first."""

    def limits(self) -> Limits:
        return Limits(
            pixels=self.max_pixels,
            seconds=self.max_seconds,
            media_bytes=self.max_media_bytes,
            json_bytes=self.max_json_bytes,
            text_chars=self.max_text_chars,
        )

    def split(self, split: Split) -> list[SourceConfig]:
        return self.sources if split == "train" else getattr(self, split)
