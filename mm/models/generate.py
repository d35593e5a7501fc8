"""Text from a model: what it goes on with after prompts of text and pictures, and how likely it finds given answers.

transformers' own `generate` writes, with its cache, sampling and beams; what is ours is the prompt. Prompts of any
lengths share a batch: they are laid out as in training and then moved to the right of their rows, so that all end
where writing begins; the mask hides what is left of them, and positions count from each prompt's first token. Models
that transformers cannot run with its cache (`GenerativeSystem.decodes_itself`) are decoded by `mm.models.decode`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mm.data.batch import PackedBatch, collate, with_dummies
from mm.data.chat import is_chat
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Text, Tokens
from mm.data.tokens import Segment
from mm.errors import ConfigError
from mm.models import backbone, decode
from mm.models.objectives import next_token_losses
from mm.models.prompts import Decoding, Prompt, Reader, Streamer, evaluating, lay_out, positions_of
from mm.models.system import GenerativeSystem


@torch.no_grad()
def generate(
    system: GenerativeSystem,
    layout: Layout,
    prompts: Sequence[Prompt | Segment],
    decoding: Decoding = Decoding(),  # noqa: B008
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
        ConfigError: `stream` with several prompts or beams; beams, of a model with pictures of its own.
    """
    if not prompts:
        return []
    if system.decodes_itself:
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
    missed = (decode.writable(system, layout, logits).argmax(-1) != targets).double()
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
        min_new_tokens=min(decoding.min_new_tokens, tokens) or None,
        num_beams=decoding.beams,
        length_penalty=float(decoding.length_penalty),
        eos_token_id=sorted(reader.ends) or None,
        pad_token_id=layout.pad,
        **sampling,
    )


class _Stops(StoppingCriteria):
    """Ends a row whose text holds a stop string.

    transformers' own criterion looks through the whole vocabulary first (a second and more for 150,000 tokens), wants a
    tokenizer of its own, and may see another text than the one that is cut.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([self.reader.stopped(row) for row in input_ids.tolist()], device=input_ids.device)
