"""Samples laid out as segments, held against layouts written by hand for the emoji tokenizer."""

import dataclasses
import json
import pickle
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.layout import AudioLayout, Layout
from mm.data.limits import Limits
from mm.data.media import decode_image
from mm.data.sample import Media, Text, Tokens, Turn
from mm.data.tokens import DoesNotFit, Segment, costs_of, make_segment, read_units, split_units
from mm.errors import DataError

# Ids of the emoji tokenizer: special tokens, and pieces of text.
PAD, BOS, EOS = 0, 4, 2
AROUND, BEGIN, END = ("<|im_start|>", "<|endofchunk|>"), 1, 3
BREAK, SPACE, EN, COLON, COLON_CAT, CAT = 203, 225, 266, 30, [266, 30, 3235], 3665
LIMITS = Limits()


def lay_out(layout: Layout, *parts: Text | Media, closed: bool = True) -> Segment:
    return make_segment(parts, layout, "s/0/k", LIMITS, closed)


def split(parts: tuple[Text | Media | Tokens, ...], layout: Layout, capacities: dict[str, int]) -> list[Segment]:
    return split_units(read_units(parts, layout, "s/0/k", LIMITS), "s/0/k", capacities)


@pytest.fixture
def image(picture: Callable[..., bytes]) -> Media:
    return Media("image", picture(), "png")


def test_caption_pair(layout: Layout, image: Media) -> None:
    segment = lay_out(layout, image, Text("en: ", loss=False), Text("cat"))
    assert segment.ids.tolist() == [BOS, PAD, PAD, PAD, PAD, BREAK, EN, COLON, SPACE, CAT, EOS]
    assert segment.loss == ((9, 11),) and segment.loss_tokens == 2
    (medium,) = segment.media
    assert (medium.kind, medium.position, medium.length, medium.cost) == ("image", 1, 4, 9)
    assert medium.media is image and medium.plan == {} and segment.inserted == 2


def test_text_alone_has_no_media_and_learns_all_but_its_first_token(layout: Layout) -> None:
    segment = lay_out(layout, Text("cat"))
    assert segment.ids.tolist() == [BOS, CAT, EOS] and segment.media == ()
    assert segment.loss == ((1, 3),) and segment.loss_tokens == 2


def test_without_bos_the_first_token_has_nothing_to_be_learned_from(make_layout: Callable[..., Layout]) -> None:
    segment = lay_out(make_layout(bos=None), Text("cat"))
    assert segment.ids.tolist() == [CAT, EOS]
    assert segment.loss == ((0, 2),) and segment.loss_tokens == 1


def test_neighbouring_text_is_tokenised_as_one_run(layout: Layout) -> None:
    assert lay_out(layout, Text("en: "), Text("cat")).ids.tolist() == [BOS, *COLON_CAT, EOS]
    split = lay_out(layout, Text("en: ", loss=False), Text("cat"))
    assert split.ids.tolist() == [BOS, EN, COLON, SPACE, CAT, EOS] and split.loss == ((4, 6),)


def test_interleaved_documents(layout: Layout, image: Media) -> None:
    second, third = (dataclasses.replace(image) for _ in range(2))
    segment = lay_out(layout, Text("cat"), image, Text("cat"), second, third, Text("cat", loss=False))
    assert segment.ids.tolist() == [BOS, CAT, *[PAD] * 4, BREAK, CAT, *[PAD] * 8, BREAK, CAT, EOS]
    assert [(m.position, m.length) for m in segment.media] == [(2, 4), (8, 4), (12, 4)]
    assert all(one.media is given for one, given in zip(segment.media, (image, second, third), strict=True))
    assert segment.loss == ((1, 2), (6, 8)), "the end is not learned after text that is not"


def test_media_are_never_targets(layout: Layout, image: Media) -> None:
    last = lay_out(layout, Text("cat"), image)
    assert last.ids.tolist() == [BOS, CAT, *[PAD] * 4, EOS] and last.loss == ((1, 2), (6, 7))
    alone = lay_out(layout, image)
    assert alone.ids.tolist() == [BOS, *[PAD] * 4, EOS] and alone.loss == ((5, 6),)


def test_a_picture_between_its_tokens(make_layout: Callable[..., Layout], image: Media) -> None:
    """Begin and end are part of it, and inserted; all are learned where the layout says so, and the end behind them."""
    parts = (Text("cat"), image, Text("en: ", loss=False), Text("cat"))
    segment = lay_out(make_layout(around_image=AROUND), *parts)
    assert segment.ids.tolist() == [BOS, CAT, BEGIN, *[PAD] * 4, END, BREAK, EN, COLON, SPACE, CAT, EOS]
    assert [(one.position, one.length, one.cost) for one in segment.media] == [(3, 4, 9)]
    assert segment.loss == ((1, 2), (12, 14)) and segment.inserted == 4
    layout = make_layout(around_image=AROUND, learned=True)
    learned = lay_out(layout, *parts)
    assert learned.ids.tolist() == segment.ids.tolist() and learned.media == segment.media
    assert learned.loss == ((1, 8), (12, 14)) and learned.loss_tokens == 9
    drawn = lay_out(layout, Text("cat", loss=False), image)
    assert drawn.ids.tolist() == [BOS, CAT, BEGIN, *[PAD] * 4, END, EOS] and drawn.loss == ((2, 9),)
    with pytest.raises(DataError, match=r"s/0/k: tokenizer .*: there is no token '<boi>'"):
        lay_out(make_layout(around_image=("<boi>", "<eoi>")), image)


def test_pictures_of_conversations_are_not_learned(make_layout: Callable[..., Layout], image: Media) -> None:
    said = (Turn("user"), image, Text("Which?"), Turn("assistant"), Text("cat"))
    plain, learned = (
        make_segment(said, make_layout(around_image=AROUND, chat="plain", learned=one), "s/0/k", LIMITS)
        for one in (False, True)
    )
    assert plain.loss == learned.loss and plain.ids.tolist() == learned.ids.tolist()
    assert plain.ids.tolist()[:8] == [BOS, BEGIN, *[PAD] * 4, END, BREAK] and plain.media[0].position == 2


def test_what_packed_sets_depend_on_is_as_it_was(layout: Layout, make_layout: Callable[..., Layout]) -> None:
    """Sets that know nothing of learned pictures stay valid, and the others' description survives JSON."""
    spelling = {"bos": "<s>", "eos": "<|im_end|>", "after_media": "\n", "chat": "chatml", "system": None}
    assert layout.describe()["template"] == spelling and layout.describe()["image"] == {"tokens": 4, "cost": 9}
    other = make_layout(around_image=AROUND, learned=True).describe()
    assert other["template"] == {**spelling, "around_image": list(AROUND)} and other["image"]["learned"] is True
    assert other == json.loads(json.dumps(other))


def test_begin_of_text_behind_media_that_a_document_opens_with(
    make_layout: Callable[..., Layout], image: Media
) -> None:
    """The order of a prefix for a frozen language model: media, begin of text, prompt, text, end."""
    prefix = make_layout(bos_behind_media=True, after_media="")
    segment = lay_out(prefix, image, Text("en: ", loss=False), Text("cat"))
    assert segment.ids.tolist() == [PAD] * 4 + [BOS, EN, COLON, SPACE, CAT, EOS] and segment.loss == ((8, 10),)
    assert segment.media[0].position == 0
    assert lay_out(prefix, image, image, Text("cat")).ids.tolist() == [PAD] * 8 + [BOS, CAT, EOS]
    assert lay_out(prefix, Text("cat"), image).ids.tolist() == [BOS, CAT] + [PAD] * 4 + [EOS]
    assert lay_out(prefix, image, closed=False).ids.tolist() == [PAD] * 4 + [BOS]
    template = prefix.describe()["template"]
    assert template["bos_behind_media"] is True and "bos_behind_media" not in make_layout().describe()["template"]
    assert prefix.fingerprint() != make_layout(after_media="").fingerprint()


def test_empty_text_leaves_no_span(layout: Layout, make_layout: Callable[..., Layout]) -> None:
    assert lay_out(layout, Text("")).loss == ((1, 2),)
    bare = lay_out(make_layout(bos=None), Text(""), closed=False)
    assert bare.ids.tolist() == [] and bare.loss == () and bare.loss_tokens == 0


def test_open_segments_are_prompts(layout: Layout, image: Media) -> None:
    segment = lay_out(layout, image, Text("en: ", loss=False), closed=False)
    assert segment.ids.tolist() == [BOS, *[PAD] * 4, BREAK, EN, COLON, SPACE] and segment.loss == ()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another process"])
def test_text_cannot_spell_special_tokens(layout: Layout, elsewhere: bool) -> None:
    if elsewhere:  # a layout is sent to packing workers as a pickle
        layout = pickle.loads(pickle.dumps(layout))
    hostile = "<|im_end|><s><|endoftext|> <|im_start|>"
    ids = lay_out(layout, Text(hostile)).ids[1:-1].tolist()
    assert not {*ids} & {0, 1, 2, 3, 4} and layout.tokenizer.decode(ids) == hostile


@pytest.mark.parametrize("tokens", [1, 4, 144])
def test_placeholders_are_as_many_as_the_layout_says(
    make_layout: Callable[..., Layout], image: Media, tokens: int
) -> None:
    segment = lay_out(make_layout(tokens=tokens, cost=7 * tokens), image, Text("cat"))
    assert segment.ids.tolist().count(PAD) == segment.media[0].length == tokens
    assert segment.media[0].cost == 7 * tokens


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_counting_reads_the_header_only(layout: Layout, picture: Callable[..., bytes], format: str) -> None:
    """A picture whose pixel data are cut off is laid out like the whole one, and cannot be decoded."""
    whole = picture(3, format, (200, 100))
    cut = whole[: len(whole) // 3]
    laid = [lay_out(layout, Media("image", data, format.lower()), Text("cat")) for data in (whole, cut)]
    assert laid[0].ids.tolist() == laid[1].ids.tolist()
    assert [one.length for one in laid[0].media] == [one.length for one in laid[1].media] == [4]
    assert layout.image is not None
    assert decode_image(whole, layout.image.transform, "s/0/k").shape == (3, 8, 8)
    with pytest.raises(DataError, match="s/0/k: the picture is damaged"):
        decode_image(cut, layout.image.transform, "s/0/k")


def huge_png(data: bytes, width: int, height: int) -> bytes:
    """The same picture with a sound header that claims another size."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "the picture is empty"),
        (lambda data: b"<svg/>" * 20, "not a readable jpg, png or webp"),
        (lambda data: data[:20], "not a readable jpg, png or webp"),
        (lambda data: huge_png(data, 60_000, 60_000), "60000x60000 pixels"),
        (lambda data: huge_png(data, 12_000, 12_000), "12000x12000 pixels are more than data.max_pixels"),
    ],
)
def test_pictures_without_a_usable_header_are_refused(
    layout: Layout, picture: Callable[..., bytes], change: Callable[[bytes], bytes], words: str
) -> None:
    with pytest.raises(DataError, match=f"s/0/k.*{words}") as caught:
        lay_out(layout, Media("image", change(picture()), "png"))
    assert "\n" not in str(caught.value)


def test_max_pixels(layout: Layout, picture: Callable[..., bytes]) -> None:
    parts = (Media("image", picture(0, "PNG", (20, 12)), "png"),)
    make_segment(parts, layout, "s/0/k", Limits(pixels=240))
    with pytest.raises(DataError, match=r"s/0/k: 20x12 pixels are more than data\.max_pixels = 239"):
        make_segment(parts, layout, "s/0/k", Limits(pixels=239))


def test_media_that_the_model_does_not_take(layout: Layout, image: Media) -> None:
    blind: Any = dataclasses.replace(layout, image=None)
    with pytest.raises(DataError, match="s/0/k: the model takes no image"):
        lay_out(blind, image)
    with pytest.raises(DataError, match="s/0/k: the model takes no audio"):
        lay_out(layout, Media("audio", b"", "flac"))


def test_tokens_are_taken_as_they_are(layout: Layout, image: Media) -> None:
    segment = lay_out(layout, image, Tokens(np.array([CAT, EN], dtype=np.uint16)), Text("cat", loss=False))
    assert segment.ids.tolist() == [BOS, *[PAD] * 4, CAT, EN, CAT, EOS] and segment.loss == ((5, 7),)
    for ids in ([-1], [len(layout.tokenizer)], [0, 2**40]):
        with pytest.raises(DataError, match=r"s/0/k: token ids from .* it was tokenised for another model"):
            lay_out(layout, Tokens(np.array(ids)))


def test_sound_and_clips_take_what_their_headers_say(
    all_media: Layout, sound: Callable[..., bytes], clip: Callable[..., bytes]
) -> None:
    """8,000 samples a second and 1,000 a position, whatever the rate of the file; a clip is always 3 pictures."""
    parts = [Media("audio", sound(0, 2.5), "flac"), Media("audio", sound(1, 0.01, "WAV", 44100), "wav")]
    segment = lay_out(all_media, Text("cat"), *parts, Media("video", clip(), "mp4"), Text("cat"))
    assert segment.ids.tolist() == [BOS, CAT, *[PAD] * (20 + 1 + 12), BREAK, CAT, EOS]
    assert [(one.kind, one.position, one.length, one.cost) for one in segment.media] == [
        ("audio", 2, 20, 20), ("audio", 22, 1, 1), ("video", 23, 12, 27),
    ]  # fmt: skip
    assert [one.plan for one in segment.media[:2]] == [{"samples": 20_000}, {"samples": 80}]
    assert segment.media[2].plan["times"] == pytest.approx([1 / 3, 1, 5 / 3], abs=1e-6)
    assert segment.loss == ((1, 2), (35, 38))


def test_spans_of_clips_and_recordings(
    all_media: Layout, sound: Callable[..., bytes], clip: Callable[..., bytes]
) -> None:
    data = clip()
    for span, times in (((0.5, 1.5), (4 / 6, 1, 8 / 6)), ((1, 99), (7 / 6, 1.5, 11 / 6)), ((0, 2), (1 / 3, 1, 5 / 3))):
        (one,) = lay_out(all_media, Media("video", data, "mp4", span)).media
        assert one.plan["times"] == pytest.approx(times, abs=1e-6) and (one.length, one.cost) == (12, 27)
    (one,) = lay_out(all_media, Media("audio", sound(0, 3), "flac", (0.5, 1.75))).media
    assert one.plan == {"samples": 10_000, "span": [0.5, 1.75]} and one.length == 10
    for media in (Media("video", data, "mp4", (2.5, 3)), Media("audio", sound(0, 3), "flac", (5, 6))):
        with pytest.raises(DataError, match=r"s/0/k: no .* in the span"):
            lay_out(all_media, media)


def test_bounds_on_media(
    all_media: Layout, sound: Callable[..., bytes], clip: Callable[..., bytes], image: Media
) -> None:
    parts = [Media("audio", sound(0, 3), "flac"), Media("video", clip(), "mp4"), image]
    limits = [Limits(seconds=1.5), Limits(seconds=1.5), Limits(pixels=239)]
    words = [
        "s of sound are more than data.max_seconds",
        "s of video are more than data.max_seconds",
        "data.max_pixels",
    ]
    for part, limit, expected in zip(parts, limits, words, strict=True):
        make_segment((part,), all_media, "s/0/k", Limits())
        with pytest.raises(DataError, match=f"s/0/k: .*{expected}"):
            make_segment((part,), all_media, "s/0/k", limit)
        with pytest.raises(DataError, match=f"its {part.kind} has .* bytes, over data.max_media_bytes"):
            make_segment((part,), all_media, "s/0/k", Limits(media_bytes=part.size - 1))


ENDS = {4: r"\n[^\S\n]*\n", 3: r"\n", 2: r"[.!?][\"')\]]*(?=\s)|[。！？]"}


def cut_levels(layout: Layout, text: str) -> list[int]:
    """How well the text may be cut before each of its tokens, by trying every place."""
    starts = layout.tokenizer.encode_placed(text)[1]()
    levels = [0] * len(starts)
    for level in (2, 3, 4):
        for end in (match.end() for match in re.finditer(ENDS[level], text)):
            after = [token for token, start in enumerate(starts) if start >= end]
            if after and after[0] > 0:
                levels[after[0]] = level
    return levels


WORDS = st.sampled_from(["cat", "Regenschirm", "傘", "a", "x" * 40, "\U0001f469\u200d\U0001f680", ""])
GLUE = st.sampled_from([" ", " ", " ", ". ", "! ", '." ', "。", "\n", "\n\n", "\n \n"])
TEXTS = st.lists(st.tuples(WORDS, GLUE), max_size=40).map(lambda pairs: "".join(map("".join, pairs)))
PARTS = st.one_of(
    st.builds(Text, TEXTS, st.booleans()),
    st.builds(Text, TEXTS),
    st.just("image"),
    st.lists(st.integers(5, 3000), min_size=1, max_size=80).map(lambda ids: Tokens(np.array(ids))),
)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=6),
    tokens=st.integers(8, 60),
    images=st.integers(1, 3),
    bos=st.sampled_from(["<s>", None]),
    eos=st.sampled_from(["<|im_end|>", None]),
    around=st.sampled_from([AROUND, None]),
    learned=st.booleans(),
)
def test_pieces_hold_the_whole(
    make_layout: Callable[..., Layout],
    picture: Callable[..., bytes],
    parts: list[Any],
    tokens: int,
    images: int,
    bos: str | None,
    eos: str | None,
    around: tuple[str, str] | None,
    learned: bool,
) -> None:
    """Every token once and in order, every medium whole and in one piece, the same tokens learned, nothing over."""
    layout = make_layout(bos=bos, eos=eos, around_image=around, learned=learned)
    parts = [Media("image", picture(n), "png") if part == "image" else part for n, part in enumerate(parts)]
    capacities = {"tokens": tokens, "image": images}
    whole = make_segment(tuple(parts), layout, "s/0/k", LIMITS)
    pieces = split(tuple(parts), layout, capacities)

    inner: list[int] = []
    targets: set[int] = set()
    media: list[Any] = []
    begin = int(bos is not None)
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        costs = {"tokens": len(piece), **costs_of(piece.media)}
        assert all(costs[name] <= most for name, most in capacities.items())
        assert piece.inserted == begin + (last and eos is not None) + (2 * len(piece.media) if around else 0)
        assert len(piece) > piece.inserted or len(pieces) == 1, "no piece is empty"
        if bos is not None:
            assert piece.ids[0] == BOS
        targets |= {position - begin + len(inner) for a, b in piece.loss for position in range(a, b)}
        assert all(a < b for a, b in piece.loss) and list(piece.loss) == sorted(piece.loss)
        for one in piece.media:
            assert (piece.ids[one.position : one.position + one.length] == PAD).all()
            if around:
                assert piece.ids[[one.position - 1, one.position + one.length]].tolist() == [BEGIN, END]
            media.append((one.position - begin + len(inner), one.length, id(one.media)))
        inner += piece.ids[begin : len(piece) - (last and eos is not None)].tolist()
    assert inner + [EOS] * (eos is not None) == whole.ids[begin:].tolist()
    assert targets == {position - begin for a, b in whole.loss for position in range(a, b)}
    assert media == [(one.position - begin, one.length, id(one.media)) for one in whole.media]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, tokens=st.integers(8, 60))
def test_text_is_cut_at_the_best_place_in_the_second_half(layout: Layout, text: str, tokens: int) -> None:
    """Paragraphs before lines before sentences; a piece is shorter than half of its room only at the end."""
    levels, room = cut_levels(layout, text), tokens - 2
    at = 0
    for piece in split((Text(text),), layout, {"tokens": tokens})[:-1]:
        length = len(piece) - 1
        reach = [levels[at + n] for n in range(-(-room // 2), room + 1) if at + n < len(levels)]
        best = max(reach)
        if best >= 2:
            assert levels[at + length] == best
            assert not any(level >= best for level in levels[at + length + 1 : at + room + 1]), "the last such place"
        assert length * 2 >= room
        at += length


def test_cuts_by_eye(layout: Layout, image: Media) -> None:
    """A text that does not fit behind a picture, and has no end there, opens the next piece; decoded they are read."""
    text = "Eine Katze. Noch eine Katze! Drei Katzen\n\nVier. Und so weiter, und so fort, ohne Ende"

    def said(*parts: Text | Media, tokens: int) -> list[str]:
        pieces = split(parts, layout, {"tokens": tokens})
        return [
            layout.tokenizer.decode([t for t in piece.ids.tolist() if t not in (BOS, EOS, PAD)]) for piece in pieces
        ]

    words = len(layout.tokenizer.encode(text))
    assert said(Text(text), tokens=words + 2) == [text]
    cut = said(Text(text), tokens=words)
    assert cut == [text[: text.index("Vier")], text[text.index("Vier") :]]
    pieces = said(Text("cat " * 10), image, Text("one long sentence without an end"), tokens=18)
    assert pieces[-1].strip() == "one long sentence without an end" or len(pieces) > 2


def test_a_medium_over_a_row_does_not_fit(layout: Layout, image: Media, make_layout: Callable[..., Layout]) -> None:
    split((image,), layout, {"tokens": 6, "image_cost": 9})
    for capacities in ({"tokens": 5}, {"tokens": 99, "image_cost": 8}, {"tokens": 99, "image_tokens": 3}):
        with pytest.raises(DoesNotFit, match="s/0/k: its image takes"):
            split((Text("cat"), image, Text("cat")), layout, capacities)


def test_the_end_after_media_is_learned_as_in_the_whole(layout: Layout, image: Media) -> None:
    """A last piece of nothing but pictures does not know by itself whether the text before them was learned."""
    for loss in (True, False):
        pieces = split((Text("cat " * 9, loss=loss), image), layout, {"tokens": 12})
        assert len(pieces) == 2 and pieces[-1].ids.tolist()[-5:] == [PAD] * 4 + [EOS]
        assert any(b == len(pieces[-1]) for _, b in pieces[-1].loss) is loss


def test_a_window_needs_all_its_samples(make_layout: Callable[..., Layout], sound: Callable[..., bytes]) -> None:
    """As many positions as a stack of convolutions without padding gives; MERT's numbers (120,000 samples: 374)."""
    layers = list(zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True))
    mert = AudioLayout(24_000, 320, window=400)
    for samples in (400, 719, 720, 12_345, 24_000, 120_000, 122_880):
        length = samples
        for kernel, stride in layers:
            length = (length - kernel) // stride + 1
        assert mert.count(samples) == (length, length)
        assert mert.count(mert.samples(length)) == (length, length) > mert.count(mert.samples(length) - 1)
    assert [mert.count(samples)[0] for samples in (24_000, 120_000, 122_880)] == [74, 374, 383]
    short = make_layout(audio=AudioLayout(8000, 80, window=100))
    with pytest.raises(DataError, match="80 samples at 8000 Hz are less than the 100 that the model takes at once"):
        lay_out(short, Media("audio", sound(0, 0.01), "flac"))


def test_a_recording_alone_has_no_template(make_layout: Callable[..., Layout], sound: Callable[..., bytes]) -> None:
    layout = make_layout(audio=AudioLayout(8000, 1000, alone=True))
    media = Media("audio", sound(0, 1), "flac")
    assert lay_out(layout, media).ids.tolist() == [PAD] * 8 and lay_out(layout, media).loss == ()
    assert lay_out(layout, media, Text("a cat")).ids.tolist()[0] == BOS
    assert lay_out(make_layout(audio=AudioLayout(8000, 1000)), media).ids.tolist()[0] == BOS
