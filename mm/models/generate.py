"""Text from a model: what it goes on with after prompts of text and pictures, and how likely it finds given answers.

transformers' own `generate` writes, with its cache, sampling and beams; what is ours is the prompt. Prompts of any
lengths share a batch: they are laid out as in training and then moved to the right of their rows, so that all end
where writing begins; the mask hides what is left of them, and positions count from each prompt's first token. Models
that transformers cannot run with its cache, or whose pictures are tokens, are decoded by `mm.models.decode`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from mm.data.batch import PackedBatch, collate, with_dummies
from mm.data.chat import END, SPELLINGS, is_chat
from mm.data.conversations import IMAGE
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Media, Special, Text, Tokens, Turn
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import Segment, make_segment
from mm.errors import ConfigError, DataError
from mm.models import backbone
from mm.models.objectives import next_token_losses
from mm.models.system import GenerativeSystem

Prompt = tuple[Text | Tokens | Special | Media | Turn, ...]
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
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    beams: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, bad, expected in (
            ("max_new_tokens", self.max_new_tokens < 1, "a number from 1 on"),
            ("temperature", not self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p is not None and not 0 < self.top_p <= 1, "a share above 0, up to 1"),
            ("top_k", self.top_k is not None and self.top_k < 1, "a number from 1 on"),
            ("beams", self.beams < 1, "a number from 1 on"),
            ("stop", "" in self.stop, "texts that are not empty"),
        ):
            if bad:
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected {expected}")
        if not self.temperature and (self.top_p is not None or self.top_k is not None):
            raise ConfigError("top_p and top_k are for sampling: give a temperature above 0 with them")


@torch.no_grad()
def generate(
    system: GenerativeSystem,
    layout: Layout,
    prompts: Sequence[Prompt | Segment],
    decoding: Decoding = Decoding(),
    limits: Limits = Limits(),  # noqa: B008
    synced: bool = False,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without blanks around it. All prompts are one batch.

    Where the longest prompt leaves less of the model's positions than `max_new_tokens`, fewer tokens are written.

    Args:
        prompts: parts to be laid out, or segments that are.
        synced: of several ranks, with weights in parts: towers run on all, and all go on until the last is done.
        stream: is given the text of a single prompt in pieces, as soon as they are certain; together they are what is
            returned.

    Raises:
        DataError: a picture cannot be read; a prompt is empty or longer than the model's positions.
        ConfigError: `stream` with several prompts or beams; beams, of a model with experts or pictures of its own.
    """
    from mm.models import decode

    if not prompts:
        return []
    if system.sparsity is not None or decode.draws(system):
        found = decode.decode(system, layout, prompts, decoding, limits, synced, stream)
        return [written.text for written in found]
    if stream is not None and (len(prompts) != 1 or decoding.beams > 1):
        raise ConfigError(f"{len(prompts)} prompts, {decoding.beams} beams: only one prompt without beams can stream")
    segments = [lay_out(prompt, layout, f"prompt {i}", limits) for i, prompt in enumerate(prompts)]
    longest = max(map(len, segments))
    room = positions_of(system, segments) + 1 - longest  # the last token that is written takes no position
    packs = [join_segments([(f"prompt {i}", "", segment)]) for i, segment in enumerate(segments)]
    batch = collate(packs, layout, row_length=longest).to(next(system.parameters()).device)
    if synced:
        batch = with_dummies(batch, layout)
    chat = any(is_chat(prompt) for prompt in prompts if not isinstance(prompt, Segment))
    reader = Reader.of(layout, decoding, chat)
    with evaluating(system), backbone.ordinary_attention(system.language), _own_defaults(system.language):
        order = batch.segment_ids.argsort(dim=1, stable=True)  # padding first, then the prompt
        ids = system.language.generate(
            inputs_embeds=system.embed(batch).take_along_dim(order[..., None], dim=1),
            attention_mask=(batch.segment_ids > 0).long().gather(1, order),
            generation_config=_transformers_config(decoding, min(decoding.max_new_tokens, room), layout, reader),
            stopping_criteria=StoppingCriteriaList([_Stops(reader)] if reader.stop else []),
            streamer=Streamer(reader, stream) if stream is not None else None,
            synced_gpus=synced,
        )
    return [reader.text(row) for row in ids.tolist()]


@torch.no_grad()
def log_likelihoods(
    system: GenerativeSystem,
    layout: Layout,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008
) -> list[float]:
    """log p(answer | prompt) in nats for each pair: summed over the answer's tokens, without an end of text.

    An answer is tokenised apart from its prompt, as in training; blanks at its start count. All pairs are packed into
    one row.

    Raises:
        DataError: a picture cannot be read; a prompt is empty or longer than the model's positions with its answer.
    """
    if not prompts:
        return []
    batch, pair = _answered(system, layout, prompts, answers, limits)
    with evaluating(system):
        losses = system.token_losses(batch).double()
    return (-losses.new_zeros(len(prompts)).index_add(0, pair, losses)).tolist()


@torch.no_grad()
def mean_losses(
    system: GenerativeSystem,
    layout: Layout,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008
) -> list[tuple[float, bool]]:
    """Of each pair -log p(answer | prompt) in nats, the mean over the answer's tokens, and whether each of them is the
    likeliest after those before it, so that greedy decoding writes the answer.

    Raises:
        DataError: as `log_likelihoods`.
    """
    if not prompts:
        return []
    batch, pair = _answered(system, layout, prompts, answers, limits)
    keep = batch.learned()
    with evaluating(system):
        logits = system.logits(batch, keep)
    targets = batch.labels.flatten()[keep]
    losses = next_token_losses(logits, targets).double()
    missed = (logits.argmax(-1) != targets).double()
    total, misses, tokens = (
        values.new_zeros(len(prompts)).index_add(0, pair, values)
        for values in (losses, missed, torch.ones_like(losses))
    )
    return list(zip((total / tokens.clamp(min=1)).tolist(), (misses == 0).tolist(), strict=True))


def _answered(
    system: GenerativeSystem, layout: Layout, prompts: Sequence[Prompt], answers: Sequence[str], limits: Limits
) -> tuple[PackedBatch, Tensor]:
    """Prompts with their answers as one row whose targets are the answers' tokens; and of which pair each target is."""
    pairs = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        known = tuple(replace(part, loss=False) if isinstance(part, Text | Tokens) else part for part in prompt)
        start = len(lay_out(known, layout, f"prompt {i}", limits))
        segment = lay_out((*known, Text(answer)), layout, f"prompt {i} with its answer", limits)
        pairs.append(replace(segment, loss=((start, len(segment)),)))
    positions_of(system, pairs, packed=True)
    pack = join_segments([(f"prompt {i}", "", segment) for i, segment in enumerate(pairs)])
    batch = collate([pack], layout, row_length=len(pack.tokens)).to(next(system.parameters()).device)
    return batch, batch.segment_ids.flatten()[batch.learned()].long() - 1


def autocast(system: GenerativeSystem, precision: Precision) -> torch.autocast:
    """For a `with` around calls: float32, or bfloat16 over float32 weights as in training."""
    return torch.autocast(next(system.parameters()).device.type, torch.bfloat16, enabled=precision == "bf16")


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
    kept: list[Text | Tokens | Special | Media | Turn] = []
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
    segment = prompt if isinstance(prompt, Segment) else make_segment(prompt, layout, where, limits, closed=False)
    if not len(segment):
        raise DataError(f"{where} is empty; give a text or a picture to go on with")
    return segment


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


@contextmanager
def evaluating(system: GenerativeSystem) -> Iterator[None]:
    """In evaluation mode for the time of the context."""
    training = system.training
    system.eval()
    try:
        yield
    finally:
        system.train(training)


@contextmanager
def _own_defaults(language: Any) -> Iterator[None]:
    """Without what a published model's generation_config.json says: what is asked for is what is done."""
    published = language.generation_config
    language.generation_config = GenerationConfig()
    try:
        yield
    finally:
        language.generation_config = published


def _transformers_config(decoding: Decoding, tokens: int, layout: Layout, reader: "Reader") -> GenerationConfig:
    sampling: dict[str, Any] = {}
    if decoding.temperature:
        # 0 and 1 are transformers' words for all tokens; None means its own defaults, which leave the 50 likeliest.
        sampling = {
            "do_sample": True,
            "temperature": float(decoding.temperature),
            "top_p": decoding.top_p or 1.0,
            "top_k": decoding.top_k or 0,
        }
    return GenerationConfig(
        max_new_tokens=tokens,
        num_beams=decoding.beams,
        eos_token_id=sorted(reader.ends) or None,
        pad_token_id=layout.pad,
        **sampling,
    )


def _special(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a special token, which no decoded text will ever show."""
    try:
        token = tokenizer.id(text)
    except DataError:
        return None
    return None if tokenizer.decode([token]) else token


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


class _Stops(StoppingCriteria):
    """Ends a row whose text holds a stop string.

    transformers' own criterion looks through the whole vocabulary first (a second and more for 150,000 tokens), wants a
    tokenizer of its own, and may see another text than the one that is cut.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([self.reader.stopped(row) for row in input_ids.tolist()], device=input_ids.device)


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
