"""How conversations are spelt: turns in; text, special tokens and media in the order of the row out.

A template is a function from turns to what stands in the row. Four kinds:

- `chatml`: as Qwen2.5's own chat template spells text (`<|im_start|>ROLE`, newline, the turn, `<|im_end|>`, newline);
  the answer and its `<|im_end|>` are learned.
- `release`, `fixed`: as Open-Qwen2VL was fine-tuned, before and after a change of its public code (commit e417110),
  oddities included. They are a string with `<image>` in it, cut up by LLaVA's splitter: see `_prismatic`.
- `plain`: `Question: …`, `Answer: …`, without special tokens of a chat; for tokenizers that have none.

The text of a turn is spelt as it stands, and never becomes a special token; only the template sets those.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from mm.data.layout import Layout
from mm.data.sample import Media, Metadata, Role, Special, Text, Tokens, Turn
from mm.errors import ConfigError, DataError

START, END = "<|im_start|>", "<|im_end|>"

Spelt = Text | Tokens | Special | Metadata | Media
"""What stands in the row, in order."""
Turns = list[tuple[Role, list[Spelt]]]


def is_chat(parts: tuple[Spelt | Turn, ...]) -> bool:
    """Whether a sample is a conversation rather than a document."""
    return any(isinstance(part, Turn) for part in parts)


def spell(parts: tuple[Spelt | Turn, ...], layout: Layout, where: str, closed: bool) -> list[Spelt]:
    """A conversation by the layout's chat template; not `closed`, its last turn is left open, to be gone on with.

    Raises `DataError` for parts before the first turn, `ConfigError` where the tokenizer lacks a token of the template.
    """
    spelling = SPELLINGS[layout.template.chat]
    template = layout.template
    turns = _turns(parts, where)
    if turns[0][0] != "system" and (text := spelling.system if template.system is None else template.system):
        turns = [("system", [Text(text, False)]), *turns]
    if spelling.literal:
        turns = [(role, _opened(content, template.after_media)) for role, content in turns]
    for token in spelling.tokens:
        try:
            layout.tokenizer.id(token)
        except DataError:
            raise ConfigError(
                f"model.template.chat {template.chat}: the tokenizer {layout.tokenizer.name} has no token {token!r}; "
                "add it to model.language.added_tokens, or choose model.template.chat=plain"
            ) from None
    return list(spelling.spell(turns, layout, closed))


def _turns(parts: tuple[Spelt | Turn, ...], where: str) -> Turns:
    """Turns with their content, of which only assistants' is learned."""
    turns: Turns = []
    for part in parts:
        if isinstance(part, Turn):
            turns.append((part.role, []))
        elif not turns:
            raise DataError(f"{where}: text or media before the first turn of a conversation")
        else:
            role, content = turns[-1]
            content.append(part if isinstance(part, Media) else replace(part, loss=part.loss and role == "assistant"))
    return turns


def _leading_media(content: list[Spelt]) -> tuple[list[Spelt], list[Spelt]]:
    """The media that open a turn, and the rest."""
    media = next((n for n, part in enumerate(content) if not isinstance(part, Media)), len(content))
    return content[:media], content[media:]


def _opened(content: list[Spelt], after_media: str) -> list[Spelt]:
    """Where media open a turn and no white space follows them, the template's break does: `<image>`, newline, words."""
    media, said = _leading_media(content)
    if media and said and not (isinstance(first := said[0], Text) and first.text[:1].isspace()):
        return [*media, Text(after_media, False), *said]
    return content


def _learned(role: Role, content: list[Spelt]) -> bool:
    """The end of a turn is learned where the last of its text is."""
    said = (part.loss for part in reversed(content) if not isinstance(part, Media))
    return next(said, role == "assistant")


def _chatml(turns: Turns, layout: Layout, closed: bool) -> Iterator[Spelt]:
    for number, (role, content) in enumerate(turns, 1):
        yield Special(START)
        yield Text(f"{role}\n", False)
        yield from content
        if closed or number < len(turns):
            yield Special(END, _learned(role, content))
            yield Text("\n", False)


def _plain(turns: Turns, layout: Layout, closed: bool) -> Iterator[Spelt]:
    """`SYSTEM`, newline; media, break, `Question: …`, newline; `Answer:`, space, the answer, end of text."""
    template = layout.template
    if template.bos is not None:
        yield Special(template.bos)
    for number, (role, content) in enumerate(turns, 1):
        ends = closed or number < len(turns)
        if role == "assistant":
            learned = _learned(role, content)
            yield Text("Answer:", False)
            if content:
                yield Text(" ", learned)  # belongs to the word behind it: a prompt ends without
                yield from content
            if ends:
                yield Text("\n", learned) if template.eos is None else Special(template.eos, learned)
        else:
            media, said = _leading_media(content)
            yield from media
            yield Text((template.after_media if media else "") + ("Question: " if role == "user" else ""), False)
            if said and isinstance(first := said[0], Text):
                said = [replace(first, text=first.text.lstrip()), *said[1:]]
            yield from said
            if ends:
                yield Text("\n", False)


def _release(turns: Turns, layout: Layout, closed: bool) -> Iterator[Spelt]:
    return _prismatic(turns, layout, closed, moves=True)


def _fixed(turns: Turns, layout: Layout, closed: bool) -> Iterator[Spelt]:
    return _prismatic(turns, layout, closed, moves=False)


def _prismatic(turns: Turns, layout: Layout, closed: bool, moves: bool) -> Iterator[Spelt]:
    """Open-Qwen2VL's `Qwen2PromptBuilder` and `tokenizer_image_token`.

    The question ends with the header of the answer, which lacks `<|im_start|>`; the answer is learned with its
    `<|im_end|>` and the newline behind. What is a question is told by the number of the turn, not by its role. `moves`:
    the only medium of a turn goes in front of all of it, the template's text included. Otherwise a turn that opens
    with `<s>` (the first) loses the first token behind every medium, which the splitter takes for another `<s>`.
    """
    system = turns[0][1] if turns[0][0] == "system" else None
    spoken = turns[1:] if system is not None else turns
    for number, (_, content) in enumerate(spoken):
        ends = closed or number + 1 < len(spoken)
        turn: list[Spelt] = []
        if number == 0:
            turn.append(Special("<s>"))
            if system is not None:
                turn += [Special(START), Text("system\n", False), *system, Special(END), Text("\n", False)]
        if number % 2 == 0:
            turn += [Special(START), Text("user\n", False)]
            turn += [part if isinstance(part, Media) else replace(part, loss=False) for part in content]
            turn += [Special(END), Text("assistant\n", False)] if ends else []
        else:
            turn += [part if isinstance(part, Media) else replace(part, loss=True) for part in content]
            turn += [Special(END, True), Text("\n", True)] if ends else []
        media = [part for part in turn if isinstance(part, Media)]
        if moves and len(media) == 1:
            turn = [media[0], *_stripped([Text("\n", False), *(part for part in turn if part is not media[0])])]
        elif number == 0:
            turn = _without_first_tokens(turn, layout)
        yield from turn


def _stripped(turn: list[Spelt]) -> list[Spelt]:
    """Without white space at the end."""
    last = turn[-1]
    return [*turn[:-1], replace(last, text=last.text.rstrip())] if isinstance(last, Text) else turn


def _without_first_tokens(turn: list[Spelt], layout: Layout) -> list[Spelt]:
    """Without the first token of every chunk of text and special tokens that follows a medium."""
    left: list[Spelt] = []
    follows = False
    for kind, run in groupby(turn, type):
        parts: list[Any] = list(run)
        if follows and kind is Text:  # neighbours are tokenised as one
            ids = layout.tokenizer.encode("".join(part.text for part in parts))
            parts = [Tokens(np.array(ids[1:], dtype=np.int32), False)]
        elif follows and kind is Tokens:
            parts[0] = replace(parts[0], ids=parts[0].ids[1:])
        elif follows:
            parts = parts[1:]
        left += parts
        follows = kind is Media
    return left


@dataclass(frozen=True, slots=True)
class Spelling:
    """A template, the tokens that it needs, and the system turn of conversations without one.

    `literal`: turns are text with media in their places, as in LLaVA's data.
    """

    spell: Callable[[Turns, Layout, bool], Iterator[Spelt]]
    tokens: tuple[str, ...] = ()
    system: str = ""
    literal: bool = True


SPELLINGS = {
    "chatml": Spelling(_chatml, (START, END), "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "release": Spelling(_release, ("<s>", START, END), "You are a helpful assistant."),
    "fixed": Spelling(_fixed, ("<s>", START, END), "You are a helpful assistant."),
    "plain": Spelling(_plain, literal=False),
}
