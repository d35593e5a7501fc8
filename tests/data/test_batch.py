"""Packed rows as tensors, held against loops that do the same one position at a time."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mm.data.batch import IGNORE, MediaBatch, PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.media import decode_image
from mm.data.packed import Pack, PackedDataset, join_segments
from mm.data.sample import Media, Text
from mm.data.tokens import make_segment
from mm.errors import DataError

LENGTH = 64


@pytest.fixture
def packs(layout: Layout, picture: Callable[..., bytes]) -> list[Pack]:
    """Rows with several pictures in a segment, none, text before a picture, and unlearned text at the end."""

    def image(number: int) -> Media:
        return Media("image", picture(number), "png")

    documents: list[list[tuple[Text | Media, ...]]] = [
        [(image(0), Text("en: ", False), Text("a cat")), (Text("only text"),), (image(1), image(2), Text("two"))],
        [(Text("before"), image(3), Text("after", False)), (image(4),)],
        [(Text("x"),)],
    ]
    rows = []
    for row, parts in enumerate(documents):
        segments = [make_segment(one, layout, "s", Limits()) for one in parts]
        items = [(f"s/{row}/{n}", "s", segment) for n, segment in enumerate(segments)]
        rows.append(join_segments(items))
    return rows


def test_labels_are_the_next_learned_token_of_the_same_segment(
    layout: Layout, packs: list[Pack], packed: PackedDataset
) -> None:
    packs = packs + [packed.read(number) for number in range(10)]
    batch = collate(packs, layout, LENGTH)
    for row, pack in enumerate(packs):
        segment_of = [n for n, segment in enumerate(pack.segments) for _ in range(segment.length)]
        learned = {t for segment in pack.segments for start, stop in segment.loss for t in range(start, stop)}
        for t in range(LENGTH):
            expected = IGNORE
            if t + 1 < len(pack.tokens) and t + 1 in learned and segment_of[t] == segment_of[t + 1]:
                expected = int(pack.tokens[t + 1])
            assert batch.labels[row, t] == expected, (row, t)
    for row, pack in enumerate(packs):
        for segment in pack.segments:
            assert batch.labels[row, segment.start + segment.length - 1] == IGNORE
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64
    assert not (batch.labels == layout.pad).any(), "neither padding nor placeholders are targets"


def test_without_bos_no_segment_learns_its_first_token(make_layout: Callable[..., Layout]) -> None:
    """There is only another document before it, which it must not be predicted from."""
    bare = make_layout(bos=None)
    parts = [(Text("a cat"),), (Text("two dogs"),), (Text("x"),)]
    segments = [make_segment(one, bare, "s", Limits()) for one in parts]
    pack = join_segments([(f"{n}", "s", segment) for n, segment in enumerate(segments)])
    expected = [token for segment in segments for token in [*segment.ids[1:].tolist(), IGNORE]]
    batch = collate([pack], bare, LENGTH)
    assert batch.labels[0].tolist() == expected + [IGNORE] * (LENGTH - len(expected))
    assert (batch.labels != IGNORE).sum() == sum(segment.loss_tokens for segment in segments)


def test_learned_tokens_are_those_that_were_counted(layout: Layout, packed: PackedDataset) -> None:
    batch = collate([packed.read(number) for number in range(len(packed))], layout, LENGTH)
    assert (batch.labels != IGNORE).sum(dim=1).tolist() == packed.index["loss_tokens"].to_pylist()
    assert (batch.segment_ids > 0).sum(dim=1).tolist() == packed.index["tokens"].to_pylist()
    assert batch.tokens == packed.about["tokens"]
    assert batch.ids == [[s.id for s in packed.read(number).segments] for number in range(len(packed))]


@pytest.mark.parametrize("isolate", [True, False])
def test_positions_segments_and_modality(layout: Layout, packs: list[Pack], isolate: bool) -> None:
    """Positions restart with every segment, or run through the row; segment ids stay true either way."""
    batch = collate(packs, layout, LENGTH, isolate_segments=isolate)
    for row, pack in enumerate(packs):
        n = len(pack.tokens)
        assert batch.input_ids[row].tolist() == pack.tokens.tolist() + [layout.pad] * (LENGTH - n)
        own = [t for segment in pack.segments for t in range(segment.length)]
        assert batch.position_ids[row, :n].tolist() == (own if isolate else list(range(n)))
        numbers = [number + 1 for number, segment in enumerate(pack.segments) for _ in range(segment.length)]
        assert batch.segment_ids[row].tolist() == numbers + [0] * (LENGTH - n)
        image = {t for one in pack.media for t in range(one.position, one.position + one.length)}
        assert batch.modality[row].tolist() == [int(t in image) for t in range(LENGTH)]
    assert batch.isolate_segments is isolate


def test_media_keep_their_place_and_pixels(layout: Layout, packs: list[Pack]) -> None:
    image = collate(packs, layout, LENGTH).media["image"]
    assert layout.image is not None
    stacked = image.stacked()
    flat = []
    items = [(row, one) for row, pack in enumerate(packs) for one in pack.media]
    assert len(image) == len(items) == 5
    for item, (row, one) in enumerate(items):
        pixels = decode_image(one.data, layout.image.transform, "")
        assert torch.equal(stacked[item], torch.from_numpy(pixels))
        values = image.values[image.offsets[item] : image.offsets[item + 1]]
        assert torch.equal(values.view(*image.shapes[item].tolist()), stacked[item])
        placed = [int(getattr(image, name)[item]) for name in ("row", "position", "length", "cost")]
        assert placed == [row, one.position, one.length, one.cost]
        flat += [row * LENGTH + t for t in range(one.position, one.position + one.length)]
    assert image.slots(LENGTH).tolist() == flat


def test_slots_of_items_of_any_length() -> None:
    rng = np.random.default_rng(0)
    row, position, length = rng.integers(0, 4, 9), rng.integers(0, 30, 9), np.array([3, 0, 1, 7, 0, 0, 2, 5, 0])
    made = collate_media(row, position, length)
    expected = [int(r * 40 + p + k) for r, p, n in zip(row, position, length, strict=True) for k in range(n)]
    assert made.slots(40).tolist() == expected


def collate_media(row: np.ndarray, position: np.ndarray, length: np.ndarray) -> MediaBatch:
    numbers = [torch.from_numpy(values) for values in (row, position, length)]
    return MediaBatch(torch.empty(0), torch.empty(9, 3), torch.zeros(10), *numbers, cost=torch.zeros(9))


def test_items_of_other_shapes_do_not_stack(layout: Layout, packs: list[Pack]) -> None:
    image = collate(packs, layout, LENGTH).media["image"]
    shapes = image.shapes.clone()
    shapes[0, 1] = 4
    with pytest.raises(ValueError, match="differ in shape"):
        dataclasses.replace(image, shapes=shapes).stacked()


def test_text_alone_has_no_media(layout: Layout, packs: list[Pack]) -> None:
    assert collate(packs[2:], layout, LENGTH).media == {}


def test_to_moves_every_tensor(layout: Layout, packs: list[Pack]) -> None:
    batch: PackedBatch = collate(packs, layout, LENGTH).to("meta")
    tensors = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    tensors += [getattr(batch.media["image"], field.name) for field in dataclasses.fields(batch.media["image"])]
    found = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    assert len(found) == 6 + 8 and sum(tensor.is_meta for tensor in found) == 5 + 5
    image = batch.media["image"]
    assert not any(tensor.is_meta for tensor in (batch.draws, image.shapes, image.offsets, image.unreadable))


def cut(pack: Pack, item: int) -> Pack:
    """The pack with one picture whose header is whole and whose pixels are not."""
    media = list(pack.media)
    media[item] = dataclasses.replace(media[item], data=media[item].data[: len(media[item].data) // 2])
    return dataclasses.replace(pack, media=tuple(media))


def test_a_damaged_picture_is_named(layout: Layout, packs: list[Pack]) -> None:
    with pytest.raises(DataError, match=r"^s/0/2: the picture is damaged") as caught:
        collate([cut(packs[0], 2), *packs[1:]], layout, LENGTH)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_quarantined_in_place(layout: Layout, packs: list[Pack]) -> None:
    """Its segment is not learned and its pixels are zeros; everything else stays as and where it was."""
    whole = collate(packs, layout, LENGTH, quarantine=True)
    batch = collate([cut(packs[0], 2), *packs[1:]], layout, LENGTH, quarantine=True)
    assert whole.bad == () and [id for id, _ in batch.bad] == ["s/0/2"] and "damaged" in batch.bad[0][1]
    segment = packs[0].segments[2]
    inside = torch.zeros_like(whole.labels, dtype=torch.bool)
    inside[0, segment.start : segment.start + segment.length] = True
    assert (whole.labels[inside] != IGNORE).any() and (batch.labels[inside] == IGNORE).all()
    assert torch.equal(whole.labels[~inside], batch.labels[~inside])
    for name in ("input_ids", "segment_ids", "position_ids", "modality"):
        assert torch.equal(getattr(whole, name), getattr(batch, name)), name
    assert whole.ids == batch.ids
    pixels, true = batch.media["image"].stacked(), whole.media["image"].stacked()
    assert (pixels[2] == 0).all() and torch.equal(pixels[[0, 1, 3, 4]], true[[0, 1, 3, 4]])
    for name in ("shapes", "offsets", "row", "position", "length", "cost"):
        assert torch.equal(getattr(batch.media["image"], name), getattr(whole.media["image"], name)), name


def test_rows_too_short_and_media_not_taken(layout: Layout, packs: list[Pack]) -> None:
    with pytest.raises(DataError, match=r"s/0/0: its pack of \d+ tokens does not fit in rows of 16"):
        collate(packs, layout, 16)
    with pytest.raises(DataError, match="s/0/0: the model takes no image"):
        collate(packs, dataclasses.replace(layout, image=None), LENGTH)


def test_a_row_has_one_key_however_it_is_batched(layout: Layout, packed: PackedDataset) -> None:
    """Of what is drawn in training where there is something to draw by, else of the samples; nothing for padding."""
    packs = [packed.read(number) for number in range(4)]
    whole = collate(packs, layout, LENGTH).draws
    assert len({*whole.tolist()}) == 4 and bool((whole >= 0).all())
    assert whole.tolist() == [collate([pack], layout, LENGTH).draws.item() for pack in packs]
    drawn = [(0, np.int64(7)), (0, 8), (1, 7), (0, 7)]
    keys = collate(packs, layout, LENGTH, draws=drawn).draws.tolist()
    assert keys[0] == keys[3] and len({*keys, *whole.tolist()}) == 7
    assert collate([EMPTY], layout, LENGTH, draws=[(0, -1)]).draws.tolist() == [0]


def test_what_could_not_be_read_is_marked(layout: Layout, packs: list[Pack]) -> None:
    broken = dataclasses.replace(packs[0].media[1], data=b"nothing")
    pack = dataclasses.replace(packs[0], media=(packs[0].media[0], broken, *packs[0].media[2:]))
    image = collate([pack, packs[1]], layout, LENGTH, quarantine=True).media["image"]
    assert image.unreadable.tolist() == [one is broken for one in (*pack.media, *packs[1].media)]


def test_codes_lie_in_the_order_of_items(layout: Layout, packs: list[Pack]) -> None:
    rng = np.random.default_rng(0)
    coded = [
        dataclasses.replace(
            pack,
            media=tuple(
                dataclasses.replace(one, codes=rng.integers(0, 1 << 16, (one.length, 3), dtype=np.uint16))
                for one in pack.media
            ),
        )
        for pack in packs
    ]
    codes = collate(coded, layout, LENGTH).media["image"].codes
    assert codes is not None and codes.dtype == torch.int32
    assert np.array_equal(codes.numpy(), np.concatenate([one.codes for pack in coded for one in pack.media]))
    assert collate(packs, layout, LENGTH).media["image"].codes is None
