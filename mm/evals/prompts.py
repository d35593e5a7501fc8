"""An item as a prompt: as published (`raw`), as a conversation (`chat`), or as the models that learn from interleaved
documents are asked (`flamingo`), with solved examples before it or without.

Two rules hold for all. What a data set calls text stays text: a question that contains `<image>` shows no picture.
And the spelling has a version, which every result says: numbers of two versions are not compared.
"""

from collections.abc import Sequence

import numpy as np

from mm.data.layout import Layout
from mm.data.sample import Media, Special, Text, Tokens, Turn
from mm.errors import DataError
from mm.evals.items import Form, Item, Task
from mm.models.prompts import Decoding, Prompt, without_breaks

VERSION = 1
"""Of the wording and layout of prompts in all forms."""
END_OF_CHUNK = "<|endofchunk|>"


def build(
    task: Task, item: Item, form: Form, layout: Layout, shots: Sequence[Item] = (), text_shots: Sequence[Item] = ()
) -> Prompt:
    """The prompt of an item, up to where its answer begins.

    Raw examples are spelt `<image>`, newline, question, `Answer: `, the answer, and the token `<|endofchunk|>` (where
    the tokenizer lacks it, an empty line), as Open-Qwen2VL's harness does. Flamingo examples are `<image>Output:`, or
    `<image>Question:`, the question and ` Short answer:`, the answer, and the same token (showlab/cosmo, `src/eval`, as
    in OpenFlamingo, 2308.01390). Chat examples are turns.

    Args:
        shots: solved examples to go before it.
        text_shots: more of them, in front of those, without their media. Two are what this literature calls 0-shot.
    """
    parts: list[Text | Tokens | Media | Turn] = []
    for number, shot in enumerate([*text_shots, *shots]):
        placed = task.placed(shot, form)
        if number < len(text_shots):
            placed = [part for part in placed if isinstance(part, str) and part.strip()]
        if form == "chat":
            parts += [Turn("user"), *_texts(placed), Turn("assistant"), _text(task.shown(shot))]
        else:
            parts += [*_texts(placed), _text(gap(placed, form) + task.shown(shot)), _end_of_chunk(layout)]
    asked = _texts(task.placed(item, form))
    if form == "chat":
        return (*parts, Turn("user"), *asked, Turn("assistant"))
    return without_breaks((*parts, *asked), layout.template.after_media)


def gap(placed: Sequence[str | Media], form: Form) -> str:
    """What stands between a prompt and its answer: nothing, and in raw form a space, unless it ends with white space or
    a picture."""
    last = placed[-1] if placed else ""
    return " " if form == "raw" and isinstance(last, str) and last[-1:].strip() else ""


def answer_text(task: Task, item: Item, form: Form, answer: str) -> str:
    """An answer as its likelihood is taken."""
    return gap(task.placed(item, form), form) + answer


def decoding(task: Task, form: Form, layout: Layout) -> Decoding:
    """Greedy. Raw answers end at the task's stop characters, by the ids that the tokenizer has for them (Qwen's `.`,
    `,` and newline are 13, 11 and 198), and at `<|endofchunk|>`; flamingo answers there, or where the text of another
    example begins; chat answers where their turn does."""
    if form == "chat":
        return Decoding(task.new_tokens)
    end = _end_of_chunk_id(layout)
    ends = () if end is None else (end,)
    if form == "flamingo":
        return Decoding(task.flamingo_tokens, stop=(task.opening,), stop_ids=ends)
    ids = [layout.tokenizer.encode(stop) for stop in task.stops]
    single = [one[0] for one in ids if len(one) == 1]
    split = [stop for stop, one in zip(task.stops, ids, strict=True) if len(one) != 1]
    return Decoding(task.new_tokens, stop=tuple(split), stop_ids=(*single, *ends))


def spelt(prompt: Prompt, layout: Layout) -> str:
    """A prompt to be read by people: `<image>` for a picture, marks for turns."""
    shown = []
    after_media = False
    for part in prompt:
        if isinstance(part, Media):
            shown.append(f"<{part.kind}>")
        elif isinstance(part, Turn):
            shown.append(f"[{part.role}] ")
        elif isinstance(part, Tokens):
            shown.append("".join(map(layout.tokenizer.token, part.ids.tolist())))
        elif isinstance(part, Special):
            shown.append(part.token)
        else:
            in_document = not any(isinstance(one, Turn) for one in prompt)
            shown.append((layout.template.after_media if after_media and in_document else "") + part.text)
        after_media = isinstance(part, Media)
    return "".join(shown)


def _text(text: str) -> Text:
    return Text(text, loss=False)


def _texts(placed: Sequence[str | Media]) -> list[Text | Tokens | Media | Turn]:
    return [_text(part) if isinstance(part, str) else part for part in placed]


def _end_of_chunk(layout: Layout) -> Text | Tokens:
    id = _end_of_chunk_id(layout)
    return _text("\n\n") if id is None else Tokens(np.array([id], dtype=np.int32), loss=False)


def _end_of_chunk_id(layout: Layout) -> int | None:
    try:
        return layout.tokenizer.id(END_OF_CHUNK)
    except DataError:
        return None
