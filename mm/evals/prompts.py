"""An item as a prompt: as published (`raw`) or as a conversation (`chat`), with solved examples before it or without.

Two rules hold for both. What a data set calls text stays text: a question that contains `<image>` shows no picture.
And the spelling has a version, which every result says: numbers of two versions are not compared.
"""

from collections.abc import Sequence

import numpy as np

from mm.data.layout import Layout
from mm.data.sample import Media, Special, Text, Tokens, Turn
from mm.errors import DataError
from mm.evals.items import Item, Task
from mm.models.prompts import Decoding, Form, Prompt, without_breaks

VERSION = 1
"""Of the wording and layout of prompts in both forms."""
END_OF_CHUNK = "<|endofchunk|>"


def build(task: Task, item: Item, form: Form, layout: Layout, shots: Sequence[Item] = ()) -> Prompt:
    """The prompt of an item, up to where its answer begins; `shots`: solved examples to go before it.

    Raw examples are spelt `<image>`, newline, question, `Answer: `, the answer, and the token `<|endofchunk|>` (where
    the tokenizer lacks it, an empty line), as Open-Qwen2VL's harness does. Chat examples are turns.
    """
    parts: list[Text | Tokens | Media | Turn] = []
    for shot in shots:
        if form == "chat":
            parts += [Turn("user"), *_texts(task.placed(shot, form)), Turn("assistant"), _text(task.shown(shot))]
        else:
            placed = task.placed(shot, form)
            parts += [*_texts(placed), _text(gap(placed) + task.shown(shot)), _end_of_chunk(layout)]
    asked = _texts(task.placed(item, form))
    if form == "chat":
        return (*parts, Turn("user"), *asked, Turn("assistant"))
    return without_breaks((*parts, *asked), layout.template.after_media)


def gap(placed: Sequence[str | Media]) -> str:
    """What stands between a raw prompt and its answer: a space, unless it ends with white space or a picture."""
    last = placed[-1] if placed else ""
    return " " if isinstance(last, str) and last[-1:].strip() else ""


def answer_text(task: Task, item: Item, form: Form, answer: str) -> str:
    """An answer as its likelihood is taken."""
    return answer if form == "chat" else gap(task.placed(item, form)) + answer


def decoding(task: Task, form: Form, layout: Layout) -> Decoding:
    """Greedy. Raw answers end at the task's stop characters, by the ids that the tokenizer has for them (Qwen's `.`,
    `,` and newline are 13, 11 and 198), and at `<|endofchunk|>`; chat answers where their turn does."""
    if form == "chat":
        return Decoding(task.new_tokens)
    ids = [layout.tokenizer.encode(stop) for stop in task.stops]
    single = [one[0] for one in ids if len(one) == 1]
    split = [stop for stop, one in zip(task.stops, ids, strict=True) if len(one) != 1]
    end = _end_of_chunk_id(layout)
    return Decoding(task.new_tokens, stop=tuple(split), stop_ids=(*single, *([] if end is None else [end])))


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
