"""Windows of documents against brute force, what is learned in them on strings written by hand, clips of a video."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.interleaved import InterleavedConfig
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import PackedDataset, PackedSegment
from mm.data.sample import Media, Sample, Special, Text, Window, keyed_rng
from mm.data.takedown import take_down
from mm.data.tokens import DoesNotFit, SegmentMedia, Unit, join_units, learned_after_media, read_units, window_of
from mm.data.video import decode_video
from mm.errors import DataError

END = "<|endofchunk|>"
LIMITS = Limits()


def document(pieces: list[tuple[bool, int]], bos: bool = False) -> list[Unit]:
    """Units of so many tokens each, text or a medium; ids are positions from 1 on, begin of text is 0, and a special
    token ends it."""
    units = [Unit(np.zeros(1, dtype=np.int32), False, inserted=1)] if bos else []
    at = 1
    for is_media, length in [*pieces, (False, 1)]:
        ids = np.arange(at, at + length, dtype=np.int32)
        medium = SegmentMedia("image", 0, length, 1, Media("image", b"", "png")) if is_media else None
        units.append(Unit(ids, not is_media, media=medium))
        at += length
    units[-1] = Unit(units[-1].ids, True, inserted=1)
    return units


def spans(units: list[Unit]) -> list[tuple[int, int]]:
    """Half-open, by the ids."""
    return [(int(unit.ids[0]), int(unit.ids[-1]) + 1) for unit in units if unit.media]


def most_media(media: list[tuple[int, int]], last: int, room: int, first: int) -> int:
    """Over all spans of at most `room` tokens that cut no medium and have this one first."""
    best = 0
    for start in range(1, last + 1):
        for stop in range(start + 1, min(start + room, last) + 1):
            seen = [n for n, (begin, end) in enumerate(media) if begin < stop and end > start]
            whole = [n for n in seen if start <= media[n][0] and media[n][1] <= stop]
            if seen == whole and seen and seen[0] == first:
                best = max(best, len(seen))
    return best


PIECES = st.lists(st.tuples(st.booleans(), st.integers(1, 8)), min_size=1, max_size=8).filter(
    lambda pieces: any(is_media for is_media, _ in pieces)
)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.integers(9, 40), st.integers(1, 4), st.integers(0, 12), st.booleans(), st.integers(0, 1000))
def test_windows_cut_no_medium_and_hold_as_many_as_any(
    pieces: list[tuple[bool, int]], tokens: int, most: int, before: int, bos: bool, seed: int
) -> None:
    units = document(pieces, bos)
    media, last = spans(units), int(units[-1].ids[0]) + 1
    seen = window_of(units, Window(tokens, most, before), keyed_rng(seed), "x")
    ids = np.concatenate([unit.ids for unit in seen]).tolist()
    assert not bos or ids[0] == 0
    ids = ids[bos:]
    assert ids == list(range(ids[0], ids[-1] + 1)) and len(ids) <= tokens - bos
    start, stop = ids[0], ids[-1] + 1
    whole = spans(seen)
    assert whole == [one for one in media if start < one[1] and one[0] < stop], "none is there in part"
    first = media.index(whole[0])
    assert len(whole) == min(most, most_media(media, last, tokens - bos, first))
    if stop < last:
        assert 0 <= whole[0][0] - start <= before
        is_full = len(ids) == tokens - bos
        assert is_full or stop in [begin for begin, _ in media], "it ends where it is full or before a medium"
    else:
        could_begin = max(1, last - (tokens - bos))
        assert start == could_begin or any(
            start == end and (begin < could_begin or len(whole) == most) for begin, end in media
        ), "it begins as early as it can"
    if last - 1 <= tokens - bos and len(media) <= most:
        assert ids == list(range(1, last)), "a short document is seen whole"


def test_every_medium_is_drawn() -> None:
    """But those behind which fewer are left than a window may have; and every number of tokens in front of it."""
    units = document([*[(False, 30), (True, 2)] * 6, (False, 30)])
    starts = {int(window_of(units, Window(40, 2, 5), keyed_rng(n), "x")[0].ids[0]) for n in range(400)}
    assert starts == {begin - before for begin, _ in spans(units)[:5] for before in range(6)}


def test_a_window_that_cannot_be_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="x: its medium 0 takes 9 tokens, a window has 8"):
        window_of(document([(True, 9)]), Window(8, 1, 0), keyed_rng(0), "x")
    with pytest.raises(DataError, match="x: no media"):
        window_of(document([(False, 9)]), Window(8, 1, 0), keyed_rng(0), "x")


@pytest.fixture
def cosmo(make_layout: Callable[..., Layout]) -> Layout:
    """A picture takes one position, and nothing stands behind it."""
    return make_layout(tokens=1, after_media="", frames=1)


def shown(units: list[Unit], layout: Layout) -> str:
    """A segment as text: what is learned in square brackets, `I` for each position of a medium."""
    segment = join_units(units)
    media = {place for one in segment.media for place in range(one.position, one.position + one.length)}
    learned = {place for start, stop in segment.loss for place in range(start, stop)}
    text = ""
    for place, id in enumerate(segment.ids.tolist()):
        text += "[" * (place in learned and place - 1 not in learned)
        text += "I" if place in media else layout.tokenizer.token(id)
        text += "]" * (place in learned and place + 1 not in learned)
    return text


def sample_of(samples: Any) -> Sample:
    (sample,) = samples
    assert isinstance(sample, Sample), sample
    return sample


def test_what_is_learned_behind_media(
    cosmo: Layout,
    picture: Callable[..., bytes],
    tmp_path: Path,
    write_shard: Callable[..., Path],
    samples_in: Callable[..., Any],
) -> None:
    """On strings written by hand: of MMC4, of OBELICS with and without `match`, and of a document of our own."""
    I = {"image_base64": base64.b64encode(picture()).decode()}  # noqa: E741
    sentences = {"text_list": ["A.", "B.", "C.", "D."], "image_info": [{**I, "matched_text_index": n} for n in (1, 3)]}
    texts = {"texts": ["A.", None, "B.", "C.", None], "image_info": [None, I, None, None, I]}
    score = {"score": [["t0_i1", 1], ["t3_i4", 1]]}
    parts = {"parts": [{"image": "a.png"}, {"text": "A."}, {"text": " B.", "loss": False}, {"image": "a.png"}]}
    cases = [
        (sentences, {}, "<s>A.I[B. C.<|endofchunk|>]I[D.<|endofchunk|>]<|im_end|>"),
        (texts, {}, "<s>A.<|endofchunk|>I[B.<|endofchunk|>]C.<|endofchunk|>I[<|im_end|>]"),
        (
            {**texts, **score},
            {"match": {"noise": 0}},
            "<s>A.I[A.\n\nB.\n\nC.<|endofchunk|>]I[C.<|endofchunk|>]<|im_end|>",
        ),
        (parts, {}, "<s>I[A.] B.[<|endofchunk|>]I[<|im_end|>]"),
        (sentences, {"end_of_chunk": ""}, "<s>A.I[B. C.]I[D.<|im_end|>]"),
    ]
    for number, (fields, config, expected) in enumerate(cases):
        path = write_shard(tmp_path / f"{number}.tar", {"k": {"json": fields, "a.png": picture()}})
        source = {"kind": "interleaved", "learn": "after_media", "end_of_chunk": END, **config}
        sample = sample_of(samples_in(path, source)[0])
        units = read_units(sample.drawn(0, 0), cosmo, "x", LIMITS)
        assert sample.learn_after_media and shown(learned_after_media(units), cosmo) == expected
        everything = shown(units, cosmo).replace("[", "").replace("]", "")
        assert everything == expected.replace("[", "").replace("]", "")
    path = write_shard(tmp_path / "none.tar", {"k": {"json": {"texts": ["A."]}}})
    assert samples_in(path, {"kind": "interleaved", "learn": "after_media"}) == [[]]
    assert samples_in(path, {"kind": "interleaved", "window": {}}) == [[]]


def test_begin_of_text_behind_media_ends_no_learning(make_layout: Callable[..., Layout], picture: Any) -> None:
    """Of a prefix what follows begin of text is learned; windows that do not show its place have none."""
    prefix = make_layout(tokens=1, after_media="", bos_behind_media=True)
    image, end = Media("image", picture(), "png"), Special(END, True)
    parts = (image, image, Text("A."), end, image, Text("B."), end)
    units = read_units(parts, prefix, "x", LIMITS)
    assert shown(learned_after_media(units), prefix) == f"II<s>[A.{END}]I[B.{END}]<|im_end|>"
    seen = {shown(learned_after_media(window_of(units, Window(5, 1, 0), keyed_rng(n), "x")), prefix) for n in range(50)}
    assert seen == {"I", f"I<s>[A.{END}]", f"I[B.{END}]<|im_end|>"}
    before = (Text("A."), end, image, Text("B."), end)
    assert shown(learned_after_media(read_units(before, prefix, "x", LIMITS)), prefix) == (
        f"<s>A.{END}I[B.{END}]<|im_end|>"
    )


@pytest.fixture
def long_documents(tmp_path: Path, picture: Callable[..., bytes], write_shard: Callable[..., Path]) -> Path:
    """Six pictures in each, every one with a sentence of its own."""
    pictures = [picture(n) for n in range(6)]
    documents = {}
    for k in range(3):
        encoded = [base64.b64encode(one).decode() for one in pictures]
        info = [{"image_base64": one, "matched_text_index": n} for n, one in enumerate(encoded)]
        sentences = [f"{k} has umbrella {n} and a cat, and a dog under it." for n in range(6)]
        documents[f"{k}"] = {"json": {"text_list": sentences, "image_info": info}}
    return write_shard(tmp_path / "documents.tar", documents)


WINDOWS = {
    "kind": "interleaved",
    "end_of_chunk": END,
    "learn": "after_media",
    "window": {"tokens": 60, "media": 2, "before": 9},
}


def packed_files(dataset: PackedDataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(dataset.folder.iterdir())}


def segments(dataset: PackedDataset) -> list[tuple[PackedSegment, list[int], int]]:
    """Every segment with its ids and the number of its media."""
    found = []
    for number in range(len(dataset)):
        pack = dataset.kept(number)
        for place, one in enumerate(pack.segments):
            ids = pack.tokens[one.start : one.start + one.length].tolist()
            found.append((one, ids, sum(medium.segment == place for medium in pack.media)))
    return found


def published_labels(ids: list[int], layout: Layout) -> set[int]:
    """The places that are learned: none before the first picture, nor behind an end of chunk up to the next picture,
    nor pictures and begin of text."""
    learned, is_learned = set(), False
    for place, id in enumerate(ids):
        if id == layout.pad:
            is_learned = True
        elif is_learned:
            learned.add(place)
            is_learned = id != layout.tokenizer.id(END)
    return learned


def test_windows_are_packed(
    tmp_path: Path, cosmo: Layout, long_documents: Path, pack: Callable[..., PackedDataset]
) -> None:
    """Every visit has another; the same bytes again, other bytes by another seed; one id takes all of them down."""
    settings: dict[str, Any] = {"visits": 8, "context_length": 128}
    one, two, other = (
        pack(long_documents, tmp_path / name, cosmo, WINDOWS, seed, **settings)
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    assert packed_files(one) == packed_files(two)
    found = segments(one)
    assert sorted(ids for _, ids, _ in found) != sorted(ids for _, ids, _ in segments(other))
    assert len(found) == 24 and all(len(ids) <= 60 and count == 2 for _, ids, count in found)
    for id in sorted({segment.id for segment, _, _ in found}):
        assert len({tuple(ids) for segment, ids, _ in found if segment.id == id}) >= 4, "those at the end are one"
    for segment, ids, _ in found:
        learned = {place - segment.start for start, stop in segment.loss for place in range(start, stop)}
        assert learned == published_labels(ids, cosmo)
    (ledger,) = one.about["ledger"].values()
    assert ledger["samples"] * 8 == ledger["segments"] == 24 and ledger["image"] == 48
    gone = take_down(one.folder, [found[0][0].id])
    assert gone["segments"] == 8 and len(segments(PackedDataset(one.folder))) == 16


def test_every_option_is_part_of_what_a_set_is(
    tmp_path: Path, cosmo: Layout, long_documents: Path, pack: Callable[..., PackedDataset]
) -> None:
    """A folder that holds a set is refused by a config with another option."""
    settings: dict[str, Any] = {"context_length": 256, "too_long": "drop"}
    pack(long_documents, tmp_path / "a", cosmo, WINDOWS, **settings)
    options: list[dict[str, Any]] = [
        {"window": None}, {"window": {"tokens": 61, "media": 2, "before": 9}}, {"learn": "all"}, {"end_of_chunk": ""},
        {"match": {}}, {"reverse": 0.1}, {"speed": 2},
    ]  # fmt: skip
    for option in options:
        with pytest.raises(DataError, match="holds a set packed from other shards or settings"):
            pack(long_documents, tmp_path / "a", cosmo, {**WINDOWS, **option}, **settings)


CAPTIONS = ["Cut it.", "Fold it.", "Bake it."]
CLIPS = [{"clip": f"0:{5 * n:02d} - 0:{5 * n + 5:02d}", "caption": one} for n, one in enumerate(CAPTIONS)]


def test_clips_of_a_video(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    clip: Callable[..., bytes],
    write_shard: Callable[..., Path],
    samples_in: Callable[..., Any],
    pack: Callable[..., PackedDataset],
) -> None:
    """Each is a span of the one video in the time of the stored file, and all text is learned."""
    layout = make_layout(tokens=1, after_media="", frames=3)
    video = clip(frames=300, codec="libx264")  # half a minute of what took five times as long
    spelt = str(CLIPS).replace("'", '"')
    members = {"a": {"mp4": video, "json": {"clips": CLIPS}}, "b": {"mp4": video, "json": {"clips": spelt}}}
    path = write_shard(tmp_path / "clips.tar", members)
    source = {"kind": "interleaved", "speed": 5, "end_of_chunk": END}
    (a,), (b,) = samples_in(path, source)
    assert a.parts == b.parts, "a list, or JSON in JSON"
    assert [part.span for part in a.parts if isinstance(part, Media)] == [(0, 1), (1, 2), (2, 3)]
    text = shown(read_units(a.drawn(0, 0), layout, "x", LIMITS), layout)
    assert text == f"<s>III[Cut it.{END}]III[Fold it.{END}]III[Bake it.{END}<|im_end|>]"
    dataset = pack(path, tmp_path / "out", layout, source, context_length=128)
    ((_, _, count), _) = segments(dataset)
    middles = np.array([[1, 3, 5], [7, 9, 11], [13, 15, 17]]) / 6
    transform = layout.video.transform  # type: ignore[union-attr]
    for one, times in zip(dataset.read(0).media[:3], middles, strict=True):
        shown_here = decode_video(one.data, one.plan["times"], transform, "x")
        assert np.array_equal(shown_here, decode_video(video, times.tolist(), transform, "x"))
    sizes = [len(one.data) for one in dataset.read(0).media[:3]]
    assert count == 3 and min(sizes) < len(video) / 2, "parts do not bring all of the video along"
    window = {"window": {"tokens": 40, "media": 2, "before": 0}}
    windows = pack(path, tmp_path / "windows", layout, {**source, **window}, visits=8, context_length=128)
    assert all(count == 2 for _, _, count in segments(windows)) and len(segments(windows)) == 16
    hours = [{"clip": "1:00:02.5-1:00:03", "caption": ""}]
    path = write_shard(tmp_path / "hours.tar", {"k": {"mp4": video, "json": {"clips": hours}}})
    assert sample_of(samples_in(path, {"kind": "interleaved"})[0]).parts[0].span == (3602.5, 3603)


@pytest.mark.parametrize(
    ("clips", "words"),
    [
        ([], "the document is empty"),
        ("[[", "not laid out"),
        ("[" * 100_000, "not laid out"),
        ({}, "clips is a dict, expected a list"),
        ([5], "not laid out"),
        ([{"caption": "x"}], "KeyError: 'clip'"),
        ([{"clip": "0:00 - 0:01"}], "KeyError: 'caption'"),
        ([{"clip": "0:00 - 0:01", "caption": 5}], "a text is a int"),
        ([{"clip": 5, "caption": "x"}], "not laid out"),
        ([{"clip": "0:01 - 0:01", "caption": "x"}], "clip 0 is '0:01 - 0:01'; expected `m:s - m:s`, the earlier first"),
        ([{"clip": "0:02 - 0:01", "caption": "x"}], "the earlier first"),
        ([{"clip": "start - end", "caption": "x"}], "clip 0 is 'start - end'; expected"),
        ([{"clip": "-1:00 - 0:01", "caption": "x"}], "clip 0 is '-1:00 - 0:01'; expected"),
    ],
)
def test_clips_that_make_no_sense(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any], clips: Any, words: str
) -> None:
    path = write_shard(tmp_path / "x.tar", {"k": {"mp4": b"a clip", "json": {"clips": clips}}})
    (found,) = samples_in(path, {"kind": "interleaved"})
    assert isinstance(found, DataError) and words in str(found)
    assert str(found).startswith("s/x/k in ") and "\n" not in str(found) and len(str(found)) < 800


def test_clips_outside_the_video_are_quarantined(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    clip: Callable[..., bytes],
    write_shard: Callable[..., Path],
    pack: Callable[..., PackedDataset],
) -> None:
    outside = [{"clip": "0:00 - 0:01", "caption": "x"}, {"clip": "0:09 - 0:10", "caption": "y"}]
    members = {
        "a": {"mp4": clip(), "json": {"clips": outside}},
        "b": {"mp4": clip(), "json": {"clips": outside[:1]}},
        "c": {"json": {"clips": outside[:1]}},
    }
    path = write_shard(tmp_path / "x.tar", members)
    dataset = pack(path, tmp_path / "out", make_layout(frames=2), {"kind": "interleaved"}, max_bad_fraction=0.7)
    reasons = (dataset.folder / "quarantine.jsonl").read_text().splitlines()
    assert len(reasons) == 2 and "no frames in the span (9.0, 10.0)" in reasons[0] and "no video among" in reasons[1]
    assert [one.id for one, _, _ in segments(dataset)] == ["pictures/x/b"]


def test_chances_are_shares_of_visits() -> None:
    with pytest.raises(ValueError, match="reverse"):
        InterleavedConfig(path="x", reverse=1.5)
    sample = Sample("s/0/k", (), reverse=0.25, backwards=(Media("image", b"", "png"),))
    assert 60 < sum(bool(sample.drawn(0, visit)) for visit in range(400)) < 140
