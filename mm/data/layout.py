"""Layout: all that data must know of a model, without importing it.

A system's config returns one (`config.layout()`). Its fingerprint names the packed sets that fit the model: tokenizer,
template and the positions that media take. The size of squares and normalisation are left out of it, because packed
sets keep the original bytes.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mm.data.media import ImageHeader, ImageTransform, Native
from mm.data.sample import Chat
from mm.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Template:
    """How a document is spelt: `bos` + media and text in order + `eos`; and by which template conversations are."""

    bos: str | None
    eos: str | None
    after_media: str = ""
    """Put before text that follows media (Open-Qwen2VL: a newline)."""
    chat: Chat = "chatml"
    """See `mm.data.chat`."""
    system: str | None = None
    """The system turn of conversations without one; None: that of `chat`; empty: none."""
    around_image: tuple[str, str] | None = None
    """Begin and end of a picture: tokens around its positions, and part of it."""
    bos_behind_media: bool = False
    """`bos` stands behind the media that a document opens with."""

    def describe(self) -> dict[str, Any]:
        """What a packed set depends on."""
        about = asdict(self)
        if not self.bos_behind_media:
            del about["bos_behind_media"]
        around = about.pop("around_image")
        return about if around is None else {**about, "around_image": list(around)}


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """A picture in the row: `tokens` positions, whatever its size, at a price of `cost` encoder tokens."""

    tokens: int
    cost: int
    transform: ImageTransform
    learned: bool = False
    """Its positions are targets, in documents: the model is to draw it, and knows by itself what belongs there."""

    def count(self, header: ImageHeader) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of a picture with this header."""
        return self.tokens, self.cost

    def plan(self, header: ImageHeader) -> dict[str, Any]:
        """What decoding a picture with this header is held to: nothing, all are one square."""
        return {}

    def shape(self, plan: dict[str, Any]) -> tuple[int, int, int]:
        """[C, H, W] of a decoded picture."""
        assert isinstance(self.transform.size, int)
        return 3, self.transform.size, self.transform.size

    def smallest(self) -> tuple[dict[str, Any], int, int]:
        """(plan, positions in the row, encoder tokens) of the least picture."""
        return {}, self.tokens, self.cost

    def largest(self) -> tuple[dict[str, Any], int, int]:
        """(plan, positions in the row, encoder tokens) of the picture that takes the most for its positions."""
        return {}, self.tokens, self.cost

    def describe(self) -> dict[str, Any]:
        """What a packed set depends on."""
        return {"tokens": self.tokens, "cost": self.cost, **({"learned": True} if self.learned else {})}


@dataclass(frozen=True, slots=True)
class NativeLayout:
    """A picture in its own aspect ratio in the row: a position for every window of `pool` x `pool` patches, those that
    its edge cuts off included; each patch is an encoder token. The transform has the grids (`Native`)."""

    pool: int
    transform: ImageTransform

    @property
    def native(self) -> Native:
        assert isinstance(self.transform.size, Native)
        return self.transform.size

    def count(self, header: ImageHeader) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of a picture with this header."""
        return self._count(*self.native.grid(header))

    def plan(self, header: ImageHeader) -> dict[str, Any]:
        """What decoding a picture with this header is held to: its grid of patches, [rows, columns]."""
        return {"grid": [*self.native.grid(header)]}

    def shape(self, plan: dict[str, Any]) -> tuple[int, int, int]:
        """[C, H, W] of a decoded picture."""
        rows, columns = plan["grid"]
        return 3, rows * self.native.patch, columns * self.native.patch

    def smallest(self) -> tuple[dict[str, Any], int, int]:
        """(plan, positions in the row, encoder tokens) of the least picture."""
        return {"grid": [1, 1]}, 1, 1

    def largest(self) -> tuple[dict[str, Any], int, int]:
        """(plan, positions in the row, encoder tokens) of the picture that takes the most for its positions: whole
        windows, as many patches as may be."""
        most = self.native.max_patches
        sides = range(self.pool, math.isqrt(most) + 1, self.pool)
        rows = max(sides, key=lambda side: (side * (most // side // self.pool), side))
        columns = most // rows // self.pool * self.pool
        return {"grid": [rows, columns]}, *self._count(rows, columns)

    def describe(self) -> dict[str, Any]:
        """What a packed set depends on."""
        return {**asdict(self.native), "pool": self.pool}

    def _count(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.pool) * -(-columns // self.pool), rows * columns


@dataclass(frozen=True, slots=True)
class AudioLayout:
    """A recording in the row: mono at `sampling_rate` Hz, one position every `hop` samples.

    A position sees `window` samples, all of them there: (samples - window) // hop + 1 positions, as convolutions
    without padding give. With `window` 0 the last position may be short: ceil(samples / hop), at least one.
    """

    sampling_rate: int
    hop: int
    window: int = 0
    alone: bool = False
    """A sample that is a recording and nothing else is spelt without the template's begin and end of text."""

    def count(self, samples: int) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of so many samples at `sampling_rate`, at least `window`."""
        positions = (samples - self.window) // self.hop + 1 if self.window else max(1, -(-samples // self.hop))
        return positions, positions

    def samples(self, positions: int) -> int:
        """Of the shortest recording that takes so many positions and leaves none short."""
        return (positions - 1) * self.hop + (self.window or self.hop)


@dataclass(frozen=True, slots=True)
class VideoLayout:
    """A clip in the row: `frames` pictures, evenly spaced, of `tokens` positions and `cost` encoder tokens each."""

    frames: int
    tokens: int
    cost: int
    transform: ImageTransform
    pooled: bool = False
    """The positions are those of the whole clip, not of a frame."""

    def count(self) -> tuple[int, int]:
        """(positions in the row, encoder tokens) of a clip."""
        return self.tokens if self.pooled else self.frames * self.tokens, self.frames * self.cost

    def describe(self) -> dict[str, Any]:
        """What a packed set depends on."""
        about = {"frames": self.frames, "tokens": self.tokens, "cost": self.cost}
        return {**about, **({"pooled": True} if self.pooled else {})}

    def shape(self) -> tuple[int, int, int, int]:
        """[F, C, H, W] of a decoded clip."""
        assert isinstance(self.transform.size, int), "frames are squares"
        return self.frames, 3, self.transform.size, self.transform.size


@dataclass(frozen=True, slots=True)
class FeatureShape:
    """Of what a tower gives of a medium: rows of `width` numbers, one for each position, or `rows` for every item."""

    width: int
    rows: int | None = None

    def count(self, positions: int) -> int:
        """Rows of an item with so many positions."""
        return self.rows or positions


@dataclass(frozen=True, slots=True)
class MetaTokens:
    """Tokens that stand at random places of a document and are no text (2509.16278): `rate` of them for each token."""

    id: int
    rate: float

    def count(self, tokens: int) -> int:
        """Of a document with so many tokens."""
        return round(self.rate * tokens)

    def room(self, length: int) -> int:
        """Tokens of the longest document that has no more than `length` with these."""
        tokens = length
        while tokens + self.count(tokens) > length:
            tokens -= 1
        return tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """Tokenizer, template, pad id, and what media cost; a medium without a layout is one the model does not take."""

    tokenizer: Tokenizer
    template: Template
    pad: int
    image: ImageLayout | NativeLayout | None = None
    audio: AudioLayout | None = None
    video: VideoLayout | None = None
    features: dict[str, FeatureShape] = field(default_factory=dict)
    """Media whose features are read instead of being decoded."""
    meta_tokens: MetaTokens | None = None
    """Tokens that are put into documents when these are scanned."""

    def media(self) -> tuple[str, ...]:
        """The media that the model takes."""
        return tuple(kind for kind in ("image", "audio", "video") if getattr(self, kind) is not None)

    def learns(self, kind: str) -> bool:
        """Whether the positions of a medium are targets in documents."""
        return kind == "image" and isinstance(self.image, ImageLayout) and self.image.learned

    def span(self, kind: str, position: int, length: int) -> slice:
        """The row positions of a medium with the tokens around it."""
        around = int(kind == "image" and self.template.around_image is not None)
        return slice(position - around, position + length + around)

    def smallest(self, kind: str) -> tuple[tuple[int, ...], int, int]:
        """(shape of the decoded values, positions in the row, encoder tokens) of the least item of a medium."""
        if kind == "image" and self.image is not None:
            plan, length, cost = self.image.smallest()
            return self.image.shape(plan), length, cost
        if kind == "audio" and self.audio is not None:
            return (self.audio.samples(1),), *self.audio.count(self.audio.samples(1))
        if kind == "video" and self.video is not None:
            return self.video.shape(), *self.video.count()
        raise ValueError(f"the model takes no {kind}")

    def describe(self) -> dict[str, Any]:
        """What a packed set depends on, as it stands in its `dataset.json`."""
        image, audio, video = self.image, self.audio, self.video
        return {
            "tokenizer": self.tokenizer.fingerprint(),
            "template": self.template.describe(),
            "pad": self.pad,
            "image": image and image.describe(),
            "audio": audio and asdict(audio),
            "video": video and video.describe(),
            "meta_tokens": self.meta_tokens and asdict(self.meta_tokens),
        }

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]
