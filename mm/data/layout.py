"""Layout: all that data must know of a model, without importing it.

A system's config returns one (`config.layout()`). Its fingerprint names the packed sets that fit the model: tokenizer,
template and the positions that media take. Pixel size and normalisation are left out of it, because packed sets keep
the original bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from mm.data.media import ImageHeader, ImageTransform
from mm.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Template:
    """How a document is spelt: `bos` + media and text in order + `eos`."""

    bos: str | None
    eos: str | None
    after_media: str = ""
    """Put before text that follows media (Open-Qwen2VL: a newline)."""


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """A picture in the row: `tokens` positions, whatever its size, at a price of `cost` encoder tokens."""

    tokens: int
    cost: int
    transform: ImageTransform

    def count(self, header: ImageHeader) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of a picture with this header."""
        return self.tokens, self.cost


@dataclass(frozen=True, slots=True)
class AudioLayout:
    """A recording in the row: mono at `sampling_rate` Hz, one position every `hop` samples (at least one)."""

    sampling_rate: int
    hop: int

    def count(self, samples: int) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of so many samples at `sampling_rate`."""
        positions = max(1, -(-samples // self.hop))
        return positions, positions


@dataclass(frozen=True, slots=True)
class VideoLayout:
    """A clip in the row: `frames` pictures, evenly spaced, of `tokens` positions and `cost` encoder tokens each."""

    frames: int
    tokens: int
    cost: int
    transform: ImageTransform

    def count(self) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of a clip."""
        return self.frames * self.tokens, self.frames * self.cost


@dataclass(frozen=True, slots=True)
class Layout:
    """Tokenizer, template, pad id, and what media cost; a medium without a layout is one the model does not take."""

    tokenizer: Tokenizer
    template: Template
    pad: int
    image: ImageLayout | None = None
    audio: AudioLayout | None = None
    video: VideoLayout | None = None

    def media(self) -> tuple[str, ...]:
        """The media that the model takes."""
        return tuple(kind for kind in ("image", "audio", "video") if getattr(self, kind) is not None)

    def smallest(self, kind: str) -> tuple[tuple[int, ...], int, int]:
        """(shape of the decoded values, positions in the row, encoder tokens) of the least item of a medium."""
        if kind == "image" and self.image is not None:
            side = self.image.transform.size
            return (3, side, side), self.image.tokens, self.image.cost
        if kind == "audio" and self.audio is not None:
            return (self.audio.hop,), *self.audio.count(self.audio.hop)
        if kind == "video" and self.video is not None:
            side = self.video.transform.size
            return (self.video.frames, 3, side, side), *self.video.count()
        raise ValueError(f"the model takes no {kind}")

    def describe(self) -> dict[str, Any]:
        """What a packed set depends on, as it stands in its `dataset.json`."""
        image, audio, video = self.image, self.audio, self.video
        return {
            "tokenizer": self.tokenizer.fingerprint(),
            "template": asdict(self.template),
            "pad": self.pad,
            "image": image and {"tokens": image.tokens, "cost": image.cost},
            "audio": audio and asdict(audio),
            "video": video and {"frames": video.frames, "tokens": video.tokens, "cost": video.cost},
        }

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]
