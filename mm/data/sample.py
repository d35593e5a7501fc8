"""A Sample: one document as an ordered list of parts, before any model has been chosen.

Media stay encoded here, and mostly unread: nothing in this file decodes. A part may be a `Choice`: a picture with six
captions is one sample whose text is drawn anew at every visit, so that the picture is stored once and seen with all of
them.
"""

import hashlib
import io
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

MediaKind = Literal["image", "audio", "video"]


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text. `loss=False` marks a prompt: the model reads it but is not trained to write it."""

    text: str
    loss: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    """Text that is tokens already: ids of the model's own tokenizer, int32 [n]."""

    ids: np.ndarray
    loss: bool = True


@dataclass(frozen=True, slots=True)
class Special:
    """One special token by its name. Text never becomes one: templates set them, and sources that follow a template."""

    token: str
    loss: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is said of a document in front of it: read, not learned, and tokenised apart (`mm.data.metadata`)."""

    text: str
    loss: bool = False


class Stored(Protocol):
    """Bytes that lie in a shard and are read when they are asked for."""

    @property
    def size(self) -> int: ...
    def read(self) -> bytes: ...
    def open(self) -> BinaryIO: ...


@dataclass(frozen=True, slots=True)
class Media:
    """One picture, recording or clip as its original encoded bytes; `ext` is the file extension without a dot.

    `span`: the part of a recording or clip that is meant, in seconds from its start; None is all of it.
    """

    kind: MediaKind
    data: bytes | Stored
    ext: str
    span: tuple[float, float] | None = None

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.size

    def read(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else self.data.read()

    def open(self) -> BinaryIO:
        """As a file, so that a header can be read without the rest."""
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open()


@dataclass(frozen=True, slots=True)
class Choice:
    """Alternatives of which one visit sees one."""

    options: tuple[tuple[Text, ...], ...]


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """Opens a turn of a conversation: the parts up to the next one are what `role` says.

    A sample without turns is a document. The layout's template says how turns are spelt (`mm.data.chat`).
    """

    role: Role


Visible = Text | Tokens | Special | Metadata | Media | Turn
Part = Visible | Choice
Chat = Literal["chatml", "release", "fixed", "plain"]
"""How the turns of a conversation are spelt: see `mm.data.chat`."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a visit sees of a document: at most so many tokens and media. See `mm.data.tokens.window_of`.

    `before`: up to so many tokens stand in front of the first medium.
    """

    tokens: int
    media: int
    before: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One document. `id` is `source/shard/key` (`…#k` for a piece of one) and survives every rewrite."""

    id: str
    parts: tuple[Part, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    left_out: int = 0
    """Media of the document that the source left out."""
    text_first: float = 0.0
    """Chance that a visit sees all text before the media."""
    blank: float = 0.0
    """Chance that a visit sees a blank in front of the first text that is learned."""
    reverse: float = 0.0
    """Chance that a visit sees `backwards` in place of `parts`."""
    backwards: tuple[Part, ...] = ()
    learn_after_media: bool = False
    """Text is learned behind a medium only, up to the next special token."""
    window: Window | None = None
    metadata: Metadata | None = None
    """Stands in front of all parts. Without text: the source asks for it, and this document has none."""
    metadata_share: float = 1.0
    """Chance that a visit sees it."""

    def drawn(self, seed: int, visit: int) -> tuple[Visible, ...]:
        """The parts with every choice made, and in order: a pure function of (seed, visit, id).

        Choices walk through a seeded permutation, so n visits see each of n options once.
        """
        is_reversed = self.reverse and keyed_rng(seed, visit, self.id, "reverse").random() < self.reverse
        parts: list[Visible] = []
        for part in self.backwards if is_reversed else self.parts:
            if isinstance(part, Choice):
                order = keyed_rng(seed, self.id).permutation(len(part.options))
                parts += part.options[order[visit % len(order)]]
            else:
                parts.append(part)
        if self.blank and keyed_rng(seed, visit, self.id, "blank").random() < self.blank:
            learned = (n for n, part in enumerate(parts) if isinstance(part, Text) and part.loss)
            if (first := next(learned, None)) is not None:
                parts.insert(first, Text(" "))
        if self.text_first and keyed_rng(seed, visit, self.id, "text first").random() < self.text_first:
            parts.sort(key=lambda part: isinstance(part, Media))  # stable: else the order stays
        if self.metadata and self.metadata.text:
            draw = keyed_rng(seed, visit, self.id, "metadata").random()
            parts[:0] = [self.metadata] if draw < self.metadata_share else []
        return tuple(parts)


def keyed_rng(*key: object) -> np.random.Generator:
    """A random generator that depends on the key alone: not on rank, worker, or what was drawn before."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(key, 16), "little")))


def keyed_seed(*key: object) -> int:
    """A seed of 63 bits that depends on the key alone, on all machines alike."""
    return int.from_bytes(_digest(key, 8), "little") >> 1


def _digest(key: tuple[object, ...], size: int) -> bytes:
    plain = tuple(part.item() if isinstance(part, np.generic) else part for part in key)  # np.int64(3) is written 3
    return hashlib.blake2b(repr(plain).encode(), digest_size=size).digest()
