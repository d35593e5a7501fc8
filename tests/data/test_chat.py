"""Conversations in the row, held against transformers' chat templates and a second writing of the published builder."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mm.data import builtin
from mm.data.chat import SPELLINGS
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.sample import Media, Text, Turn
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import DoesNotFit, Segment, Visible, costs_of, make_segment, split_turns
from mm.errors import ConfigError, DataError

PAD, START, END, BOS = 0, 1, 2, 4
LIMITS = Limits()
PICTURE_TOKENS = 4
Said = list[tuple[str, str]]
"""(role, text with <image> in it)"""

# Qwen2.5's template without tools, and with what is learned marked as transformers wants it.
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def oracle() -> Any:
    file = builtin.folder("emoji") / "tokenizer" / "tokenizer.json"
    made = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>")
    made.chat_template = QWEN
    return made


@pytest.fixture(scope="module")
def layouts(make_layout: Callable[..., Layout]) -> dict[str, Layout]:
    return {chat: make_layout(chat=chat) for chat in SPELLINGS}


@pytest.fixture(scope="module")
def image(picture: Callable[..., bytes]) -> Media:
    return Media("image", picture(), "png")


def parts_of(said: Said, image: Media) -> tuple[Visible, ...]:
    parts: list[Visible] = []
    for role, text in said:
        parts.append(Turn(role))  # type: ignore[arg-type]
        for number, piece in enumerate(text.split("<image>")):
            parts += [image] if number else []
            parts += [Text(piece, role == "assistant")] if piece else []
    return tuple(parts)


def lay_out(parts: Sequence[Visible], layout: Layout, closed: bool = True) -> Segment:
    return make_segment(tuple(parts), layout, "s/0/k", LIMITS, closed)


def learned(segment: Segment) -> list[int]:
    """0 or 1 a position."""
    mask = np.zeros(len(segment), dtype=int)
    for start, stop in segment.loss:
        mask[start:stop] = 1
    return mask.tolist()


WORDS = st.sampled_from(["cat", "a", "Umbrella", "傘と猫", "7", "?!", ".", "é", "🐱", "it's"])
GLUE = st.sampled_from(["", " ", "\n", "\n\n", "  ", " \n"])
TEXTS = st.lists(st.tuples(WORDS, GLUE), min_size=1, max_size=5).map(lambda pairs: "".join(map("".join, pairs)).strip())


@st.composite
def conversations(draw: st.DrawFn) -> Said:
    """Questions with pictures anywhere; behind those that open a turn there is white space, as LLaVA's data has it."""
    said: Said = [("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(TEXTS)
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
            before, after = draw(TEXTS), draw(TEXTS)
            question = draw(
                st.sampled_from([f"<image>\n{question}", f"{question}\n<image>", f"{before} <image>{after}", "<image>"])
            )
        said += [("user", question), ("assistant", draw(TEXTS))]
    return said


def with_pictures(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of a rendered text whose pieces between pictures are tokenised one by one."""
    first, *others = text.split("<image>")
    return encode(first) + [id for other in others for id in [PAD] * PICTURE_TOKENS + encode(other)]


@settings(max_examples=150, deadline=None)
@given(said=conversations())
def test_chatml_is_what_transformers_makes_of_qwens_template(
    layouts: dict[str, Layout], image: Media, oracle: Any, said: Said
) -> None:
    messages = [{"role": role, "content": text} for role, text in said]
    segment = lay_out(parts_of(said, image), layouts["chatml"])
    rendered = oracle.apply_chat_template(messages, tokenize=False)
    assert segment.ids.tolist() == with_pictures(rendered, oracle.encode)
    prompt = lay_out((*parts_of(said[:-1], image), Turn("assistant")), layouts["chatml"], closed=False)
    rendered = oracle.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt.ids.tolist() == with_pictures(rendered, oracle.encode)
    if not segment.media:
        whole = oracle.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert segment.ids.tolist() == whole["input_ids"] and learned(segment) == whole["assistant_masks"]


def test_chatml_in_full(layouts: dict[str, Layout], image: Media) -> None:
    layout = layouts["chatml"]
    encode = layout.tokenizer.encode
    said: Said = [("system", "Be brief."), ("user", "<image>What?"), ("assistant", "A cat")]
    segment = lay_out(parts_of(said, image), layout)
    asked = [START, *encode("system\nBe brief."), END, *encode("\n"), START, *encode("user\n"), *[PAD] * 4]
    asked += [*encode("\nWhat?"), END, *encode("\n"), START, *encode("assistant\n")]
    answer = [*encode("A cat"), END]
    assert segment.ids.tolist() == [*asked, *answer, *encode("\n")]
    assert segment.loss == ((len(asked), len(asked) + len(answer)),)
    assert segment.inserted == 6


def published(said: Said, tokenizer: Any, moves: bool) -> tuple[list[int], list[int]]:
    """Ids and what is learned, by the prompt builder, mover and splitter of Open-Qwen2VL's public code, from strings.

    `moves` is the code before commit e417110. -200 stands for a picture there; here it is its positions.
    """
    system = said[0][1] if said[0][0] == "system" else "You are a helpful assistant."
    spoken = [text for role, text in said if role != "system"]
    ids: list[int] = []
    mask: list[int] = []
    for turn, text in enumerate(spoken):
        text = text.strip()
        wrapped = f"<|im_start|>user\n{text}<|im_end|>assistant\n" if turn % 2 == 0 else f"{text}<|im_end|>\n"
        if turn == 0:
            wrapped = f"<s><|im_start|>system\n{system}<|im_end|>\n{wrapped}"
        if moves and wrapped.count("<image>") == 1:
            wrapped = ("<image>\n" + wrapped.replace("<image>", "").strip()).strip()
        chunks = [tokenizer(chunk).input_ids for chunk in wrapped.split("<image>")]
        skipped = int(bool(chunks[0]) and chunks[0][0] == BOS)
        made = chunks[0][:skipped]
        for number, chunk in enumerate(chunks):
            made += [PAD] * PICTURE_TOKENS * (number > 0) + chunk[skipped:]
        ids += made
        mask += [turn % 2] * len(made)
    return ids, mask


@pytest.mark.parametrize(("chat", "moves"), [("release", True), ("fixed", False)])
@settings(max_examples=150, deadline=None)
@given(said=conversations())
def test_published_forms(
    layouts: dict[str, Layout], image: Media, oracle: Any, chat: str, moves: bool, said: Said
) -> None:
    segment = lay_out(parts_of(said, image), layouts[chat])
    ids, mask = published(said, oracle, moves)
    assert segment.ids.tolist() == ids and learned(segment) == mask


def test_published_forms_in_full(layouts: dict[str, Layout], image: Media) -> None:
    """The oddities, written out: the header of the answer, the picture in front, the lost tokens."""
    encode = layouts["release"].tokenizer.encode
    asked = [("user", "<image>\nWhat?"), ("assistant", "A cat")]
    head = [BOS, START, *encode("system\nYou are a helpful assistant."), END, *encode("\n"), START]
    answer = [*encode("A cat"), END, *encode("\n")]
    found = lay_out(parts_of(asked, image), layouts["release"]).ids.tolist()
    moved = [*[PAD] * 4, *encode("\n"), *head, *encode("user\n\nWhat?"), END, *encode("assistant")]
    assert found == [*moved, *answer]
    found = lay_out(parts_of(asked, image), layouts["fixed"]).ids.tolist()
    stays = [*head, *encode("user\n"), *[PAD] * 4, *encode("What?"), END, *encode("assistant\n")]
    assert found == [*stays, *answer]
    at_end = [("user", "What?\n<image>"), ("assistant", "A cat")]
    found = lay_out(parts_of(at_end, image), layouts["fixed"]).ids.tolist()
    assert found == [*head, *encode("user\nWhat?\n"), *[PAD] * 4, *encode("assistant\n"), *answer], "no <|im_end|>"


def test_plain_in_full(make_layout: Callable[..., Layout], image: Media) -> None:
    layout = make_layout(chat="plain")
    encode = layout.tokenizer.encode
    said: Said = [("user", "<image>\nWhat?"), ("assistant", "A cat"), ("user", "Where?"), ("assistant", "Here")]
    segment = lay_out(parts_of(said, image), layout)
    first = [BOS, *[PAD] * 4, *encode("\nQuestion: What?\nAnswer:")]
    answers = [*encode(" A cat"), END], [*encode(" Here"), END]
    second = encode("Question: Where?\nAnswer:")
    assert segment.ids.tolist() == [*first, *answers[0], *second, *answers[1]]
    assert learned(segment) == [*[0] * len(first), *[1] * len(answers[0]), *[0] * len(second), *[1] * len(answers[1])]
    bare = make_layout(chat="plain", bos=None, eos=None, system="Be brief.")
    segment = lay_out(parts_of(said[2:], image), bare)
    assert segment.ids.tolist() == [*encode("Be brief.\nQuestion: Where?\nAnswer:"), *encode(" Here\n")]


@settings(max_examples=60, deadline=None)
@given(said=conversations())
@pytest.mark.parametrize("chat", SPELLINGS)
def test_a_prompt_is_the_conversation_up_to_its_last_answer(
    layouts: dict[str, Layout], image: Media, chat: str, said: Said
) -> None:
    whole = lay_out(parts_of(said, image), layouts[chat])
    prompt = lay_out((*parts_of(said[:-1], image), Turn("assistant")), layouts[chat], closed=False)
    assert prompt.ids.tolist() == whole.ids.tolist()[: len(prompt)]
    assert len(prompt) == whole.loss[-1][0], "what follows is learned"
    assert [(m.position, m.length) for m in prompt.media] == [(m.position, m.length) for m in whole.media]
    going_on = lay_out(parts_of(said, image), layouts[chat], closed=False)
    assert len(prompt) < len(going_on) < len(whole)
    assert going_on.ids.tolist() == whole.ids.tolist()[: len(going_on)]


@pytest.mark.parametrize("chat", SPELLINGS)
def test_text_never_becomes_a_special_token(layouts: dict[str, Layout], image: Media, chat: str) -> None:
    layout = layouts[chat]
    texts = [("What?", "A cat"), ("<|im_end|>\n<|im_start|>", "<s> <|im_end|>"), ("<|endoftext|>", "<|endofchunk|>")]
    counts = []
    for question, answer in texts:
        ids = lay_out(parts_of([("user", question), ("assistant", answer)], image), layout).ids
        counts.append([int((ids == special).sum()) for special in range(5)])
    assert counts[0] == counts[1] == counts[2]


def test_the_break_stands_behind_media_that_open_a_turn_and_have_none(layouts: dict[str, Layout], image: Media) -> None:
    def user(*parts: Text | Media, layout: Layout = layouts["chatml"]) -> list[int]:
        return lay_out([Turn("user"), *parts], layout).ids.tolist()

    text = [Text(one, False) for one in ("What?", "\nWhat?", "Is ", " it?")]
    assert user(image, text[0]) == user(image, text[1])
    assert user(image, image, text[0]) == user(image, image, text[1])
    assert user(text[2], image, text[0]) != user(text[2], image, text[1])
    plain = layouts["plain"]
    assert user(image, text[0], layout=plain) == user(image, text[1], layout=plain)


def test_system_turns(make_layout: Callable[..., Layout], image: Media) -> None:
    """A sample's own comes first, then the config's, then the template's; empty is none."""
    asked: Said = [("user", "What?"), ("assistant", "A cat")]
    own: Said = [("system", "Be brief."), *asked]
    for chat in SPELLINGS:
        layout = make_layout(chat=chat)
        brief, none = make_layout(chat=chat, system="Be brief."), make_layout(chat=chat, system="")
        found = lay_out(parts_of(own, image), layout).ids.tolist()
        for other in (brief, none):
            assert lay_out(parts_of(own, image), other).ids.tolist() == found
        assert lay_out(parts_of(asked, image), brief).ids.tolist() == found
        assert len(lay_out(parts_of(asked, image), none)) < len(found)
        assert len({one.fingerprint() for one in (layout, brief, none)}) == 3


def test_an_answer_may_be_left_unlearned(layouts: dict[str, Layout]) -> None:
    shown = [Turn("user"), Text("One?"), Turn("assistant"), Text("1", loss=False)]
    parts = [*shown, Turn("user"), Text("Two?"), Turn("assistant"), Text("2")]
    for chat, answer in (("chatml", "2"), ("plain", " 2")):
        segment = lay_out(parts, layouts[chat])
        assert answered(segment) == [[*layouts[chat].tokenizer.encode(answer), END]], "and a question never is"


def test_parts_before_the_first_turn(layouts: dict[str, Layout], image: Media) -> None:
    with pytest.raises(DataError, match="s/0/k: text or media before the first turn"):
        lay_out([image, Turn("user"), Text("What?")], layouts["chatml"])


def test_a_tokenizer_without_the_tokens_is_a_mistake_in_the_config(make_layout: Callable[..., Layout]) -> None:
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "<|im_end|>": 1, "cat": 2}, unk_token="<|endoftext|>")
    backend = tokenizers.Tokenizer(words)
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer = Tokenizer(backend, "words")
    parts = [Turn("user"), Text("cat"), Turn("assistant"), Text("cat")]
    lay_out(parts[1:2], make_layout(tokenizer=tokenizer, bos=None))
    with pytest.raises(ConfigError, match=r"template\.chat chatml: the tokenizer words has no token '<\|im_start\|>'"):
        lay_out(parts, make_layout(tokenizer=tokenizer, bos=None))
    lay_out(parts, make_layout(tokenizer=tokenizer, bos=None, chat="plain"))


@settings(max_examples=100, deadline=None)
@given(said=st.lists(conversations(), min_size=1, max_size=4), room=st.integers(0, 60), pictures=st.integers(1, 4))
@pytest.mark.parametrize("chat", SPELLINGS)
def test_pieces_of_a_long_conversation(
    layouts: dict[str, Layout], image: Media, chat: str, said: list[Said], room: int, pictures: int
) -> None:
    """They fit, open alike, see the pictures that were shown before, and learn the same answers."""
    flat = [turn for one in said for turn in one if turn[0] != "system"]
    system = [turn for turn in said[0] if turn[0] == "system"]
    parts = parts_of([*system, *flat], image)
    layout = layouts[chat]
    whole = lay_out(parts, layout)
    opening = lay_out(parts_of([*system, ("user", "?"), ("assistant", "!")], image), layout)
    capacities = {"tokens": len(opening) + room, "image": pictures}
    fits = len(whole) <= capacities["tokens"] and len(whole.media) <= pictures
    try:
        pieces = split_turns(parts, layout, "s/0/k", LIMITS, capacities)
    except DoesNotFit as error:
        assert not fits and str(error).startswith("s/0/k: a question with its answer takes more ")
        return
    assert (len(pieces) == 1) == fits
    answers = [ids for one in pieces for ids in answered(one)]
    assert answers == answered(whole)
    shown = [sum(text.count("<image>") for _, text in flat[: 2 * n]) for n in range(len(flat) // 2 + 1)]
    through = 0
    for piece in pieces:
        costs = {"tokens": len(piece), **costs_of(piece.media)}
        assert all(costs[name] <= most for name, most in capacities.items())
        through += len(answered(piece))
        assert len(piece.media) == shown[through]
        if chat in ("chatml", "fixed"):  # in the others pictures may stand in front of the system turn
            assert piece.ids[:5].tolist() == whole.ids[:5].tolist()


def answered(segment: Segment) -> list[list[int]]:
    return [segment.ids[a:b].tolist() for a, b in segment.loss]
