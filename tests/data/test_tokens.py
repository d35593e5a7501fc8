"""Samples laid out as segments, held against layouts written by hand for the emoji tokenizer."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from mm.data.layout import Layout
from mm.data.media import decode_image
from mm.data.sample import Media, Text
from mm.data.tokens import Segment, make_segment
from mm.errors import DataError

# Ids of the emoji tokenizer: special tokens, and pieces of text.
PAD, BOS, EOS = 0, 4, 2
BREAK, SPACE, EN, COLON, COLON_CAT, CAT = 203, 225, 266, 30, [266, 30, 3235], 3665
MAX = 100_000_000


def lay_out(layout: Layout, *parts: Text | Media, closed: bool = True) -> Segment:
    return make_segment(parts, layout, "s/0/k", MAX, closed)


@pytest.fixture
def image(picture: Callable[..., bytes]) -> Media:
    return Media("image", picture(), "png")


def test_caption_pair(layout: Layout, image: Media) -> None:
    segment = lay_out(layout, image, Text("en: ", loss=False), Text("cat"))
    assert segment.ids.tolist() == [BOS, PAD, PAD, PAD, PAD, BREAK, EN, COLON, SPACE, CAT, EOS]
    assert segment.loss == ((9, 11),) and segment.loss_tokens == 2
    (medium,) = segment.media
    assert (medium.kind, medium.position, medium.length, medium.cost, medium.part) == ("image", 1, 4, 9, 0)


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
    segment = lay_out(layout, Text("cat"), image, Text("cat"), image, image, Text("cat", loss=False))
    assert segment.ids.tolist() == [BOS, CAT, *[PAD] * 4, BREAK, CAT, *[PAD] * 8, BREAK, CAT, EOS]
    assert [(m.position, m.length, m.part) for m in segment.media] == [(2, 4, 1), (8, 4, 3), (12, 4, 4)]
    assert segment.loss == ((1, 2), (6, 8)), "the end is not learned after text that is not"


def test_media_are_never_targets(layout: Layout, image: Media) -> None:
    last = lay_out(layout, Text("cat"), image)
    assert last.ids.tolist() == [BOS, CAT, *[PAD] * 4, EOS] and last.loss == ((1, 2), (6, 7))
    alone = lay_out(layout, image)
    assert alone.ids.tolist() == [BOS, *[PAD] * 4, EOS] and alone.loss == ((5, 6),)


def test_empty_text_leaves_no_span(layout: Layout, make_layout: Callable[..., Layout]) -> None:
    assert lay_out(layout, Text("")).loss == ((1, 2),)
    bare = lay_out(make_layout(bos=None), Text(""), closed=False)
    assert bare.ids.tolist() == [] and bare.loss == () and bare.loss_tokens == 0


def test_open_segments_are_prompts(layout: Layout, image: Media) -> None:
    segment = lay_out(layout, image, Text("en: ", loss=False), closed=False)
    assert segment.ids.tolist() == [BOS, *[PAD] * 4, BREAK, EN, COLON, SPACE] and segment.loss == ()


def test_text_cannot_spell_special_tokens(layout: Layout) -> None:
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
    assert laid[0].ids.tolist() == laid[1].ids.tolist() and laid[0].media == laid[1].media
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
        (lambda data: huge_png(data, 60_000, 60_000), "3600000000 pixels"),
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
    make_segment(parts, layout, "s/0/k", 240)
    with pytest.raises(DataError, match=r"s/0/k: 20x12 pixels are more than data\.max_pixels = 239"):
        make_segment(parts, layout, "s/0/k", 239)


def test_media_that_the_model_does_not_take(layout: Layout, image: Media) -> None:
    blind: Any = dataclasses.replace(layout, image=None)
    with pytest.raises(DataError, match="s/0/k: the model takes no image"):
        lay_out(blind, image)
    with pytest.raises(DataError, match="s/0/k: the model takes no audio"):
        lay_out(layout, Media("audio", b"", "flac"))
