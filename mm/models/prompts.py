"""Prompts and answers: how a model is asked, how the next token is chosen, and where what it writes is over.

What `mm.models.generate` and `mm.models.decode` have in common.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from mm.data.chat import END, SPELLINGS
from mm.data.conversations import IMAGE
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.sample import Media, Metadata, Special, Text, Tokens, Turn
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import Segment, make_segment
from mm.errors import ConfigError, DataError
from mm.models.system import GenerativeSystem, System

Prompt = tuple[Text | Tokens | Special | Metadata | Media | Turn, ...]
Form = Literal["chat", "raw"]
"""How a model is asked: `chat_prompt` or `raw_prompt`."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is chosen, and when it is enough. The defaults take the likeliest one.

    temperature: 0 takes the likeliest token, or with `beams` the likeliest text; above 0 tokens are sampled with
    torch's RNG, from the `top_k` likeliest and from those that have `top_p` of the probability together.
    stop, stop_ids: texts and token ids that end an answer and are cut off it, beside the template's end of text.
    (Open-Qwen2VL's published numbers stop at 13, 11 and 198: a full stop, a comma, a line break.)
    min_new_tokens: before so many there is no token that ends an answer. length_penalty: of texts that a search ends,
    the best is that of the largest log p / length^length_penalty, so below 0 short ones are preferred.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    beams: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, bad, expected in (
            ("max_new_tokens", self.max_new_tokens < 1, "a number from 1 on"),
            ("temperature", not self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p is not None and not 0 < self.top_p <= 1, "a share above 0, up to 1"),
            ("top_k", self.top_k is not None and self.top_k < 1, "a number from 1 on"),
            ("beams", self.beams < 1, "a number from 1 on"),
            ("stop", "" in self.stop, "texts that are not empty"),
            ("min_new_tokens", not 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("length_penalty", self.beams == 1 and self.length_penalty != 1, "beams with it: it ranks what they end"),
        ):
            if bad:
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected {expected}")
        if not self.temperature and (self.top_p is not None or self.top_k is not None):
            raise ConfigError("top_p and top_k are for sampling: give a temperature above 0 with them")


def chat_prompt(text: str, pictures: Sequence[Media] = (), system: str | None = None) -> Prompt:
    """A question in the template's chat form, up to where the assistant's turn begins.

    Args:
        text: `<image>` in it marks where the pictures go; without it they stand in front.
        system: the system turn; None leaves it to the template.

    Raises:
        DataError: there are more or fewer `<image>` than pictures.
    """
    before: Prompt = () if system is None else (Turn("system"), Text(system, loss=False))
    return (*before, Turn("user"), *_placed(text, pictures), Turn("assistant"))


def raw_prompt(text: str, pictures: Sequence[Media] = (), after_media: str = "\n") -> Prompt:
    """A document to go on with, its pictures placed as in `chat_prompt`.

    So captioners are asked (`en: ` where the prompt of their captions was `{language}: `), and Open-Qwen2VL in its
    published evaluation. `after_media`: the template's; where it stands behind `<image>`, it is not put there twice.
    """
    parts = _placed(text, pictures)
    # The template opens text that follows media, even if it is empty.
    parts = parts if parts and isinstance(parts[-1], Text) else (*parts, Text("", loss=False))
    return without_breaks(parts, after_media)


def without_breaks(parts: Prompt, after_media: str) -> Prompt:
    """Text behind media without the break that the template of documents puts there itself."""
    kept: list[Text | Tokens | Special | Metadata | Media | Turn] = []
    for part in parts:
        if isinstance(part, Text) and kept and isinstance(kept[-1], Media):
            part = replace(part, text=part.text.removeprefix(after_media))
        kept.append(part)
    return tuple(kept)


def _placed(text: str, pictures: Sequence[Media]) -> Prompt:
    texts = text.split(IMAGE)
    if len(texts) == 1:
        texts = [""] * len(pictures) + texts
    if len(texts) != len(pictures) + 1:
        raise DataError(
            f"the prompt has {len(texts) - 1} {IMAGE} for {len(pictures)} pictures; give as many, or none to put the "
            "pictures in front"
        )
    parts: list[Text | Media] = []
    for part, picture in zip(texts, (*pictures, None), strict=True):
        parts += [Text(part, loss=False)] if part else []
        parts += [picture] if picture is not None else []
    return tuple(parts)


def lay_out(prompt: Prompt | Segment, layout: Layout, where: str, limits: Limits) -> Segment:
    """A prompt as it goes in. Raises `DataError`."""
    if isinstance(prompt, Segment):
        segment = prompt
    else:
        segment = make_segment(_with_meta_tokens(prompt, layout), layout, where, limits, closed=False)
    if not len(segment):
        raise DataError(f"{where} is empty; give a text or a picture to go on with")
    return segment


def _with_meta_tokens(prompt: Prompt, layout: Layout) -> Prompt:
    """The prompt with meta-tokens where its texts name them."""
    if layout.meta_tokens is None:
        return prompt
    token = layout.tokenizer.token(layout.meta_tokens.id)
    parts: list[Text | Tokens | Special | Metadata | Media | Turn] = []
    for part in prompt:
        if not isinstance(part, Text):
            parts.append(part)
            continue
        first, *others = part.text.split(token)
        parts.append(replace(part, text=first))
        for text in others:
            parts += [Special(token), replace(part, text=text)]
    return tuple(parts)


def positions_of(system: GenerativeSystem, segments: Sequence[Segment], packed: bool = False) -> int:
    """How many the model has, if all segments fit; `packed`: in packed attention, which knows no sliding window."""
    config = system.language.config
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    if packed:
        positions = min(positions, getattr(config, "sliding_window", None) or positions)
    for i, segment in enumerate(segments):
        if len(segment) > positions:
            raise DataError(
                f"prompt {i}: {len(segment):,} tokens are more than the model's {positions:,} positions; shorten it or "
                "give fewer pictures"
            )
    return int(positions)


def autocast(system: System, precision: Precision) -> torch.autocast:
    """For a `with` around calls: float32, or bfloat16 over float32 weights as in training."""
    return torch.autocast(next(system.parameters()).device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def evaluating(system: GenerativeSystem) -> Iterator[None]:
    """In evaluation mode for the time of the context."""
    training = system.training
    system.eval()
    try:
        yield
    finally:
        system.train(training)


@dataclass(frozen=True, slots=True)
class Reader:
    """New tokens as text, up to what ends it: the one place that says where an answer is over."""

    decode: Callable[[list[int]], str]
    ends: frozenset[int]
    stop: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout, decoding: Decoding, chat: bool) -> "Reader":
        """chat: there are conversations among the prompts, so an answer also ends where its turn does."""
        template, tokenizer = layout.template, layout.tokenizer
        ends, stop = set(decoding.stop_ids), list(decoding.stop)
        if template.eos is not None:
            ends.add(tokenizer.id(template.eos))
        if chat:
            stop.append(END if END in SPELLINGS[template.chat].tokens else template.eos or "\n")
        special = {text: token for text in stop if (token := _special(tokenizer, text)) is not None}
        left = tuple(text for text in stop if text not in special)
        return cls(tokenizer.decode, frozenset(ends.union(special.values())), left)

    def text(self, ids: list[int], going_on: bool = False) -> str:
        """The text without blanks around it; `going_on`: only as much as no further token can change."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.decode(ids[:end])
        cut = min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=None)
        if cut is None and end == len(ids) and going_on:
            text = text.rstrip("\ufffd")  # the first bytes of a character
            cut = len(text) - max(
                (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
            )
        return text[:cut].strip()

    def stopped(self, ids: list[int]) -> bool:
        """Whether a stop string is in the text."""
        text = self.decode(ids) if self.stop else ""
        return any(stop in text for stop in self.stop)


def _special(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a special token, which no decoded text will ever show."""
    try:
        token = tokenizer.id(text)
    except DataError:
        return None
    return None if tokenizer.decode([token]) else token


class Streamer(BaseStreamer):
    """Hands on text that is certain: no half characters, nothing that may turn out to be a stop string."""

    def __init__(self, reader: Reader, stream: Callable[[str], None]) -> None:
        self.reader, self.stream = reader, stream
        self.ids: list[int] = []
        self.given = ""

    def put(self, value: Tensor) -> None:
        self.add(value.flatten().tolist())

    def add(self, ids: list[int]) -> None:
        self.ids += ids
        self._give(self.reader.text(self.ids, going_on=True))

    def end(self) -> None:
        self._give(self.reader.text(self.ids))

    def _give(self, text: str) -> None:
        if len(text) > len(self.given):
            self.stream(text[len(self.given) :])
            self.given = text
