"""Decoding with a cache of our own: packed prompts on one row, for models that transformers' `generate` cannot run.

What routers of experts must know of a position, its modality, and what layers with cross-attention look at has to come
along with every token, and a layer with mixture of depths remembers only the positions that took part in it. So all
prompts of a batch are scopes of one row without padding, as in training: first whole, then one token of each at a time.
The row's `Packing` has a memory in which each attention layer finds the keys and values of a scope's earlier positions,
those that the layer itself has seen. Prompts that are done leave the row. Nothing else of the model knows of it.

Media that are looked at are encoded once: what is written sees what its prompt's last position sees.

A system whose vocabulary has the codes of pictures (`vocabulary`) draws: behind the begin of a picture come as many
codes as a picture has and nothing else, then its end; in text there are none. So what is drawn is always a picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mm.data.batch import IGNORE, MODALITIES, PackedBatch, collate, with_dummies
from mm.data.chat import is_chat
from mm.data.conversations import IMAGE
from mm.data.layout import ImageLayout, Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Special
from mm.data.tokens import Segment
from mm.errors import ConfigError, DataError
from mm.models.attention import Packing, packed_attention
from mm.models.beams import Beams
from mm.models.prompts import Decoding, Prompt, Reader, Streamer, evaluating, lay_out, positions_of
from mm.models.system import GenerativeSystem, System

if TYPE_CHECKING:
    from mm.models.gated import MediaSeen


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What a model wrote after a prompt.

    text: without blanks around it, `<image>` where a picture is. pictures: uint8 [H, W, 3], in order; where the prompt
    itself began a picture, that is the first, and `<image>` stands for it too.
    """

    text: str
    pictures: tuple[np.ndarray, ...] = ()


@torch.no_grad()
def decode(
    system: GenerativeSystem,
    layout: Layout,
    prompts: Sequence[Prompt | Segment],
    decoding: Decoding = Decoding(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    synced: bool = False,
    stream: Callable[[str], None] | None = None,
    pictures: bool = False,
    guidance: float = 1.0,
) -> list[Written]:
    """What the model writes, and draws, after each prompt. All prompts are one batch.

    A picture counts as one of the `max_new_tokens`, and is begun only where the model's positions suffice for it.
    For a model that draws nothing this is `mm.models.generate.generate`, which calls it where it must.

    Args:
        prompts: as `generate` takes them. One that ends with the begin of a picture (`to_draw`) is gone on with by it.
        synced: as in `generate`.
        stream: is given the text of a single prompt in pieces.
        pictures: the model may draw.
        guidance: of pictures, by "classifier-free guidance" (Ho and Salimans, 2207.12598): u + guidance * (c - u), of
            logits c and those u after nothing but the begin of text and of the picture. Above 1 the prompt counts for
            more. Models are to be trained for it, on pictures without text.

    Raises:
        DataError: a picture of a prompt cannot be read; a prompt is empty, or longer than the model's positions, with
            the picture that it begins.
        ConfigError: beams that are sampled from, or of a model whose pictures are tokens; `stream` with several prompts
            or beams; the model may draw and cannot, or may not and is asked to.
    """
    if not prompts:
        return []
    if stream is not None and (len(prompts) != 1 or decoding.beams > 1):
        raise ConfigError(f"{len(prompts)} prompts, {decoding.beams} beams: only one prompt without beams can stream")
    image = _ImageTokens.of(system, layout, pictures)
    if decoding.beams > 1 and image is not None:
        raise ConfigError(f"{decoding.beams} beams: a model whose pictures are tokens takes one")
    if decoding.beams > 1 and decoding.temperature:
        raise ConfigError(f"{decoding.beams} beams: this model samples from one; leave the temperature at 0")
    segments = [lay_out(prompt, layout, f"prompt {i}", limits) for i, prompt in enumerate(prompts)]
    room = positions_of(system, segments, packed=True) + 1  # the last token that is written takes no position
    reader = Reader.of(layout, decoding, any(is_chat(one) for one in prompts if not isinstance(one, Segment)))
    if image is not None:
        reader = replace(reader, decode=image.shown)
    opened = [_opened(segment, image, f"prompt {i}", room) for i, segment in enumerate(segments)]
    streamer = Streamer(reader, stream) if stream is not None else None
    row = _Row(system, layout, image, guidance, synced)
    choose = _Chooser(decoding, reader.ends, image)
    # Nothing is compiled: memory and shapes are others at every step.
    with evaluating(system), torch.compiler.set_stance("force_eager"):
        if decoding.beams > 1:
            searched = _search(row, [prompt for prompt, _ in opened], decoding, room, reader)
            return [Written(reader.text(ids)) for ids in searched]
        writings = [_Writing(prompt, asked, room, decoding, reader, image) for prompt, asked in opened]
        logits = row.open([writing.prompt for writing in writings])
        live = writings
        while True:
            for writing, token in zip(live, choose(logits, live), strict=True):
                writing.take(token)
                if streamer is not None and writing.left is None:
                    streamer.add(writing.ids[len(streamer.ids) :])
            row.keep([place for place, writing in enumerate(live) if not writing.done])
            live = [writing for writing in live if not writing.done]
            if not _goes_on(bool(live), synced, logits.device):
                break
            logits = row.step(live)
        if streamer is not None:
            streamer.end()
        return [
            Written(reader.text(writing.ids), tuple(image.paint(codes) for codes in writing.pictures) if image else ())
            for writing in writings
        ]


def _search(row: "_Row", prompts: list[Segment], decoding: Decoding, room: int, reader: Reader) -> list[list[int]]:
    """Token ids of the best text that a search finds behind each prompt. Each text that runs on is a scope of the row,
    those of a prompt one after the other."""
    searches = [Beams.of(decoding, room - len(prompt), reader) for prompt in prompts]
    live = list(zip(prompts, searches, strict=True))
    logits = row.open(prompts)
    while True:
        log_probs = logits.log_softmax(-1)
        places: list[int] = []
        first = 0
        for _, search in live:
            running = len(search.running)
            parents = search.take(log_probs[first : first + running])
            places += [] if search.done else [first + parent for parent in parents]
            first += running
        row.keep(places)
        live = [(prompt, search) for prompt, search in live if not search.done]
        if not _goes_on(bool(live), row.synced, logits.device):
            return [search.finished[0][1] for search in searches]
        written = [(ids, len(prompt)) for prompt, search in live for _, ids in search.running]
        logits = row.run([(ids[-1], n, before + len(ids) - 1) for n, (ids, before) in enumerate(written, 1)])


def writable(system: GenerativeSystem, layout: Layout, logits: Tensor) -> Tensor:
    """Logits [n, V], lowest for what text has none of: what pictures are made of."""
    image = _ImageTokens.of(system, layout, pictures=False)
    return logits if image is None else logits.masked_fill(~image.allowed(logits.shape[1])[ENCLOSED], -torch.inf)


def draws(system: System) -> bool:
    """Whether pictures are in what the system writes, as tokens."""
    return getattr(system, "vocabulary", None) is not None


def to_draw(prompt: Prompt, layout: Layout) -> Prompt:
    """The prompt with the begin of a picture behind it. Raises `ConfigError` where the model has no such token."""
    around = layout.template.around_image
    if around is None:
        raise ConfigError("model.template.around_image: the model has no token that begins a picture; it draws none")
    return (*prompt, Special(around[0]))


@dataclass(frozen=True)
class CachedPacking(Packing):
    """The scopes of new positions, numbered from 1 on in rising order, with a memory of the positions before them."""

    memory: "Memory" = field(kw_only=True)

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """Attention to all positions of a query's scope so far, and the memory of `layer` has the new ones then."""
        return self.memory.attend(layer, self, query, key, value, scale)


class Memory:
    """Keys and values by attention layer, of so many scopes. Scopes number from 1 on; their places here from 0 on."""

    def __init__(self, scopes: int) -> None:
        self.scopes = scopes
        self.layers: dict[nn.Module, _Kept] = {}

    def attend(
        self, layer: nn.Module, packing: Packing, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """[1, H, N, D] of new positions, zeros at padding; query [1, H, N, D], key and value [1, H_kv, N, D].

        The first call of a layer may have any number of positions of a scope, every later one has one at most.
        """
        query, key = query.to(value.dtype), key.to(value.dtype)  # as in `packed_attention`
        kept = self.layers.get(layer)
        first = kept is None or not len(kept)
        if kept is None:
            kept = self.layers[layer] = _Kept(self.scopes, key, value)
        real = packing.scope.nonzero()[:, 0]
        places = packing.scope[real] - 1
        own = [one[0][:, real].transpose(0, 1) for one in (query, key, value)]  # n h d
        kept.add(places, *own[1:])
        if first:
            return packed_attention(query, key, value, packing, scale)
        asked = query.new_zeros(self.scopes, query.shape[1], query.shape[3])
        asked[places] = own[0]
        grouped = query.shape[1] != key.shape[1]
        found = F.scaled_dot_product_attention(
            asked[:, :, None], *kept.filled(), kept.mask(), scale=scale, enable_gqa=grouped
        )
        out = value.new_zeros(query.shape[2], query.shape[1], value.shape[3])  # n h d
        out[real] = found[:, :, 0][places]
        return out.transpose(0, 1)[None]

    def mark(self) -> None:
        """What is remembered now is what `rewind` goes back to."""
        for kept in self.layers.values():
            kept.marked = kept.length

    def rewind(self, place: int) -> None:
        """Forget what a scope has seen since `mark`."""
        for kept in self.layers.values():
            kept.length = kept.length.clone()
            kept.length[place] = kept.marked[place]

    def keep(self, places: list[int]) -> None:
        """Forget the other scopes; those that stay are numbered anew, in the order given."""
        self.scopes = len(places)
        for kept in self.layers.values():
            for name in ("keys", "values", "length", "marked"):
                setattr(kept, name, getattr(kept, name)[places])


class _Kept:
    """Of one layer: keys, values [scopes, H_kv, room, D]; how many each scope has, and had when it was marked."""

    def __init__(self, scopes: int, key: Tensor, value: Tensor) -> None:
        self.keys, self.values = (one.new_empty(scopes, one.shape[1], 0, one.shape[3]) for one in (key, value))
        self.length = torch.zeros(scopes, dtype=torch.int64, device=key.device)
        self.marked = self.length

    def __len__(self) -> int:
        """Of the longest scope."""
        return int(self.length.max()) if len(self.length) else 0

    def add(self, places: Tensor, key: Tensor, value: Tensor) -> None:
        """places: int64 [n], in rising order; key, value [n, H_kv, D]."""
        number = torch.arange(len(places), device=places.device) - torch.searchsorted(places, places)
        slots = self.length[places] + number
        self.length = self.length + torch.bincount(places, minlength=len(self.length))
        room, needed = self.keys.shape[2], len(self)
        if needed > room:
            more = max(needed, room * 3 // 2) - room
            self.keys, self.values = (F.pad(one, (0, 0, 0, more)) for one in (self.keys, self.values))
        self.keys[places, :, slots] = key
        self.values[places, :, slots] = value

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values [scopes, H_kv, M, D] up to the end of the longest scope."""
        return self.keys[:, :, : len(self)], self.values[:, :, : len(self)]

    def mask(self) -> Tensor:
        """bool [scopes, 1, 1, M]: where a scope has a position. One without any looks at the first place: its output,
        which nobody reads, would be NaN else."""
        there = torch.arange(len(self), device=self.length.device) < self.length.clamp(min=1)[:, None]
        return there[:, None, None]


TEXT, ENCLOSED, CODE, BEGIN, END = range(5)
"""What comes next: text or the begin of a picture, text alone, a code, the begin, the end of a picture."""


@dataclass(frozen=True, eq=False)
class _ImageTokens:
    """What pictures are made of: token ids of their begin, their end and each code, and how many codes one has.

    teacher: what paints; None: the model may not draw.
    """

    begin: int
    end: int
    codes: Tensor
    positions: int
    decode: Callable[[list[int]], str]
    teacher: Any

    @classmethod
    def of(cls, system: GenerativeSystem, layout: Layout, pictures: bool) -> "_ImageTokens | None":
        """None of a system without pictures in its vocabulary. Raises `ConfigError` where it is to draw and cannot."""
        model = cast(Any, system)
        if pictures and not (draws(system) and model.teacher.decodes):
            raise ConfigError(
                "pictures: this model draws none; leave --pictures out, or choose one whose pictures are codes of a "
                "teacher that decodes"
            )
        if not draws(system):
            return None
        around, slots = layout.template.around_image, layout.image
        assert around is not None and isinstance(slots, ImageLayout)
        begin, end = map(layout.tokenizer.id, around)
        teacher = model.teacher if pictures else None
        return cls(begin, end, model.vocabulary, slots.tokens, layout.tokenizer.decode, teacher)

    @cached_property
    def code_of(self) -> dict[int, int]:
        """By token id."""
        return {token: code for code, token in enumerate(self.codes.tolist())}

    def modality(self, token: int) -> int:
        inside = token in self.code_of or token in (self.begin, self.end)
        return MODALITIES["image" if inside else "text"]

    def allowed(self, vocabulary: int) -> Tensor:
        """bool [5, V]: which tokens may come next, by what comes next."""
        allowed = torch.zeros(5, vocabulary, dtype=torch.bool, device=self.codes.device)
        allowed[CODE, self.codes] = True
        allowed[BEGIN, self.begin] = allowed[END, self.end] = True
        allowed[TEXT] = ~allowed[[CODE, END]].any(0)
        allowed[ENCLOSED] = ~allowed[[CODE, BEGIN, END]].any(0)
        return allowed

    def shown(self, ids: list[int]) -> str:
        """As text, `<image>` for every whole picture."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if token == self.end:
                runs.append([])
            elif token != self.begin and token not in self.code_of:
                runs[-1].append(token)
        return IMAGE.join(map(self.decode, runs))

    def paint(self, tokens: list[int]) -> np.ndarray:
        """uint8 [H, W, 3] of the codes of a picture, given as token ids."""
        codes = torch.tensor([[self.code_of[token] for token in tokens]], device=self.codes.device)
        pixels = (self.teacher.pictures(codes)[0].float() + 1) * 127.5
        return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


@dataclass(slots=True)
class _Writing:
    """What is written after one prompt, token by token.

    prompt: without a begin of a picture at its end, which is `asked` for instead. room: of prompt and all that is
    written, in tokens. left: codes that the picture still lacks, None in text. counted: tokens, a picture being one.
    """

    prompt: Segment
    asked: bool
    room: int
    decoding: Decoding
    reader: Reader
    image: _ImageTokens | None
    ids: list[int] = field(default_factory=list)
    pictures: list[list[int]] = field(default_factory=list)
    left: int | None = None
    counted: int = 0
    done: bool = False

    @property
    def length(self) -> int:
        """Of prompt and what is written, in tokens."""
        return len(self.prompt) + len(self.ids)

    @property
    def expected(self) -> int:
        """What comes next: see `TEXT`."""
        if self.asked and not self.ids:
            return BEGIN
        if self.left is not None:
            return CODE if self.left else END
        if self.image is None or self.image.teacher is None:
            return ENCLOSED
        return TEXT if self.length + self.image.positions + 2 <= self.room else ENCLOSED

    def take(self, token: int) -> None:
        """Write a token of the kind that comes next."""
        self.ids.append(token)
        if self.left:
            self.pictures[-1].append(token)
            self.left -= 1
            return
        if self.left == 0:
            self.left = None
        else:
            self.counted += 1
            if self.image is not None and token == self.image.begin:
                self.left = self.image.positions
                self.pictures.append([])
                return
            self.done = token in self.reader.ends or self.reader.stopped(self.ids)
        self.done = self.done or self.counted >= self.decoding.max_new_tokens or self.length >= self.room


def _opened(segment: Segment, image: _ImageTokens | None, where: str, room: int) -> tuple[Segment, bool]:
    """A prompt without the begin of a picture at its end, and whether it had one."""
    segment = replace(segment, loss=())
    if image is None or int(segment.ids[-1]) != image.begin:
        return segment, False
    if image.teacher is None:
        raise ConfigError(f"{where} begins a picture, and the model may not draw: set pictures, --pictures FOLDER")
    if len(segment) == 1:
        raise DataError(f"{where} is a picture's begin alone, and the template has no begin of text; give a text, too")
    if len(segment) + image.positions + 1 > room:
        raise DataError(
            f"{where}: {len(segment):,} tokens with a picture of {image.positions:,} are more than the model's "
            f"{room - 1:,} positions; shorten it"
        )
    return replace(segment, ids=segment.ids[:-1]), True


class _Row:
    """All prompts in one row, each a scope. `numbers` says which of the prompts that it was opened with each is of.

    Under guidance each has a companion, a scope behind those of all prompts, which begins with the begin of text and is
    given the prompt's pictures, each as if it were the first.
    """

    def __init__(
        self, system: GenerativeSystem, layout: Layout, image: _ImageTokens | None, guidance: float, synced: bool
    ) -> None:
        self.system, self.layout, self.image, self.guidance, self.synced = system, layout, image, guidance, synced
        self.guided = guidance != 1 and image is not None and image.teacher is not None
        bos = layout.template.bos
        self.before = [] if bos is None else [layout.tokenizer.id(bos)]
        self.device = next(system.parameters()).device

    def open(self, prompts: list[Segment]) -> Tensor:
        """[prompts, V]: logits behind each prompt."""
        self.prompts = len(prompts)
        self.memory = Memory(self.prompts * (1 + self.guided))
        companion = Segment(np.array(self.before, np.int32), (), ())
        scopes = [*prompts, *([companion] * self.prompts if self.guided and self.before else [])]
        pack = join_segments([(f"prompt {i}", "", segment) for i, segment in enumerate(scopes)])
        batch = collate([pack], self.layout, row_length=len(pack.tokens)).to(self.device)
        if self.synced:
            batch = with_dummies(batch, self.layout)
        self.media = self.system.media_seen(batch)
        self.numbers = list(range(1, len(prompts) + 1))
        starts = np.cumsum([0, *(len(prompt) for prompt in prompts[:-1])])
        logits = self._logits(batch, starts + [self._last(prompt) for prompt in prompts], self.media)
        self.memory.mark()
        return logits

    def _last(self, prompt: Segment) -> int:
        """The position that says what comes behind a prompt: not a meta-token, as in training."""
        known = np.flatnonzero(prompt.ids != getattr(self.system, "meta_id", -1))
        return int(known[-1]) if len(known) else len(prompt) - 1

    def step(self, live: list[_Writing]) -> Tensor:
        """[live, V]: logits behind the last token of each, which the model is given here. Of none, padding runs."""
        at = [(writing.ids[-1], place + 1, writing.length - 1) for place, writing in enumerate(live)]
        painting = [place for place, writing in enumerate(live) if self.guided and writing.left]
        for place in painting:
            drawn, companion = len(live[place].pictures[-1]), self.prompts + place
            if not drawn:
                self.memory.rewind(companion)
            at.append((live[place].ids[-1], companion + 1, len(self.before) + drawn))
        logits = self.run(at)
        if painting:
            alone = logits[len(live) :]
            logits[painting] = alone + self.guidance * (logits[painting] - alone)
        return logits[: len(live)]

    def run(self, at: list[tuple[int, int, int]]) -> Tensor:
        """[n, V]: logits behind each of n tokens, (token, scope, position in it). Of none, padding runs."""
        batch = self._batch(at or [(self.layout.pad, 0, 0)])
        media = self.media
        if media is not None:
            numbers = [self.numbers[scope - 1] for _, scope, _ in at]
            media = media.after(torch.tensor(numbers or [0], device=self.device))
        return self._logits(batch, np.arange(len(at)), media)

    def keep(self, places: list[int]) -> None:
        """Let the other prompts go. A place that is named twice is two prompts from now on."""
        if places != list(range(self.prompts)):
            self.memory.keep([*places, *(self.prompts + place for place in places)] if self.guided else places)
            self.numbers = [self.numbers[place] for place in places]
            self.prompts = len(places)

    def _batch(self, at: list[tuple[int, int, int]]) -> PackedBatch:
        """A row of (token, scope, position in it)."""
        ids, scopes, positions = (torch.tensor([one], device=self.device) for one in zip(*at, strict=True))
        modality = [self.image.modality(token) if self.image else MODALITIES["text"] for token, *_ in at]
        return PackedBatch(
            input_ids=ids,
            labels=torch.full_like(ids, IGNORE),
            segment_ids=scopes.int(),
            position_ids=positions,
            modality=torch.tensor([modality], dtype=torch.uint8, device=self.device),
            media={},
            ids=[[]],
        )

    def _logits(self, batch: PackedBatch, keep: np.ndarray, media: "MediaSeen | None") -> Tensor:
        packing = CachedPacking(batch.segment_ids[0].long(), "segments", memory=self.memory)
        return self.system.logits(batch, torch.from_numpy(keep).to(self.device), packing, media).float()


class _Chooser:
    """Chooses tokens by logits: the likeliest, or sampled with torch's RNG as transformers does."""

    def __init__(self, decoding: Decoding, ends: frozenset[int], image: _ImageTokens | None) -> None:
        self.image, self.sampled, self.least = image, bool(decoding.temperature), decoding.min_new_tokens
        self.ends = sorted(ends)
        self.warpers: list[Any] = []
        if decoding.temperature:
            self.warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_k is not None:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p is not None:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, logits: Tensor, live: list[_Writing]) -> list[int]:
        """A token for each, of logits [live, V]."""
        if not live:  # while other ranks go on
            return []
        if self.image is not None:
            allowed = self.image.allowed(logits.shape[1])[[writing.expected for writing in live]]
            logits = logits.masked_fill(~allowed, -torch.inf)
        early = [place for place, writing in enumerate(live) if writing.counted < self.least]
        if early and self.ends:
            columns = torch.tensor(self.ends, device=logits.device)
            logits[torch.tensor(early, device=logits.device)[:, None], columns] = -torch.inf
        for warper in self.warpers:
            logits = warper(None, logits)
        if self.sampled:
            return torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
        return logits.argmax(-1).tolist()


def _goes_on(here: bool, synced: bool, device: torch.device) -> bool:
    """Whether any prompt is left; `synced`: on any rank."""
    if not synced:
        return here
    left = torch.tensor(float(here), device=device)
    dist.all_reduce(left, dist.ReduceOp.MAX)
    return bool(left)
