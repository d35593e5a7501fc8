"""Meta-tokens in documents: how many, where, and which position predicts what; by brute force."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from mm.data.batch import IGNORE, collate
from mm.data.config import DataConfig
from mm.data.layout import Layout, MetaTokens
from mm.data.packed import PackedDataset, join_segments
from mm.data.prepare import pack_split
from mm.data.sample import Media, keyed_rng
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import Segment, SegmentMedia, with_meta_tokens
from mm.errors import DataError

TOKENIZER = Tokenizer.load("builtin:emoji", ("<meta>",))
META = TOKENIZER.id("<meta>")


@pytest.fixture(scope="module")
def meta_layout(make_layout: Callable[..., Layout]) -> Layout:
    made = make_layout(tokenizer=TOKENIZER, around_image=("<s>", "<|im_end|>"))
    return replace(made, meta_tokens=MetaTokens(META, 0.3))


def document(
    tokens: int, loss: tuple[tuple[int, int], ...] | None = None, media: tuple[SegmentMedia, ...] = (), **fields: Any
) -> Segment:
    return Segment(np.arange(100, 100 + tokens, dtype=np.int32), loss or ((0, tokens),), media, **fields)


def rng(number: int = 0) -> np.random.Generator:
    return keyed_rng("test", number)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.35, 1.0])
def test_the_longest_document_that_fits(rate: float) -> None:
    meta = MetaTokens(META, rate)
    for length in range(1, 200):
        fits = [tokens for tokens in range(length + 1) if tokens + round(rate * tokens) <= length]
        assert meta.room(length) == max(fits)


@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 57])
def test_the_document_is_left_in_order_and_opens_and_ends_as_it_did(meta_layout: Layout, tokens: int) -> None:
    for number in range(20):
        made = with_meta_tokens(document(tokens), meta_layout, rng(number))
        assert made.ids[made.ids != META].tolist() == list(range(100, 100 + tokens))
        assert META not in (made.ids[0], made.ids[-1])
        count = round(0.3 * tokens) if tokens > 1 else 0
        assert len(made) == tokens + count and made.inserted == count
        assert made.loss_tokens == tokens - 1, "as many targets as before"


def test_places_are_uniform(meta_layout: Layout) -> None:
    """Of a document of 8 tokens with 2, each inner place of the result holds one equally often, and each pair too."""
    drawn = np.zeros((10, 10))
    for number in range(4000):
        places = np.flatnonzero(with_meta_tokens(document(8), meta_layout, rng(number)).ids == META)
        drawn[tuple(places)] += 1
    pairs = drawn[np.triu_indices(10, 1)].reshape(-1)
    inner = np.array([a > 0 and b < 9 for a in range(10) for b in range(a + 1, 10)])
    assert not pairs[~inner].any()
    expected = 4000 / 28
    assert ((pairs[inner] - expected) ** 2 / expected).sum() < 55, "chi-squared, 27 degrees of freedom, p = 0.001"


def test_a_key_gives_the_same_places(meta_layout: Layout) -> None:
    first, again, other = (with_meta_tokens(document(40), meta_layout, rng(n)) for n in (0, 0, 1))
    assert np.array_equal(first.ids, again.ids) and not np.array_equal(first.ids, other.ids)


def test_what_is_one_is_not_cut(meta_layout: Layout) -> None:
    """Media with what is around them, and metadata; spans and places go with their tokens."""
    picture = SegmentMedia("image", 11, 4, 9, Media("image", b"", "png"))  # its begin at 10, its end at 15
    segment = document(20, loss=((0, 1), (5, 9), (16, 20)), media=(picture,), metadata=(1, 5))
    for number in range(50):
        made = with_meta_tokens(segment, meta_layout, rng(number))
        assert META not in made.ids[made.media[0].position - 1 : made.media[0].position + 5]
        assert made.ids[made.media[0].position] == 111
        start, stop = made.metadata or (0, 0)
        assert made.ids[start:stop].tolist() == [101, 102, 103, 104]
        learned = [int(id) for a, b in made.loss for id in made.ids[a:b]]
        assert learned == [100, *range(105, 109), *range(116, 120)]


def test_the_token_before_a_run_predicts_the_one_behind(meta_layout: Layout) -> None:
    """In packed rows, against a loop; positions of meta-tokens predict nothing, and no label leaves its document."""
    kinds = (12, None), (2, None), (30, ((9, 30),))
    segments = [with_meta_tokens(document(n, loss), meta_layout, rng(n)) for n, loss in kinds]
    pack = join_segments([(f"a/b/{n}", "a", one) for n, one in enumerate(segments)])
    batch = collate([pack], meta_layout, row_length=64)
    expected, start = [IGNORE] * 64, 0
    for segment, first in zip(segments, (1, 1, 9), strict=True):
        ids = segment.ids.tolist()
        real = [place for place, id in enumerate(ids) if id != META]
        for number in range(1, len(real)):
            if number >= first:
                expected[start + real[number - 1]] = ids[real[number]]
        start += len(ids)
    assert batch.labels[0].tolist() == expected
    assert batch.targets == sum(one.loss_tokens for one in segments) == 11 + 1 + 21
    assert (batch.labels[batch.input_ids == META] == IGNORE).all()
    assert batch.position_ids[0, : len(segments[0])].tolist() == list(range(len(segments[0]))), "they take positions"


@pytest.fixture
def packed(tmp_path: Path, meta_layout: Layout) -> Callable[..., PackedDataset]:
    """Packs texts of 1 to 40 sentences into rows of 64."""
    (tmp_path / "texts").mkdir()
    for number in range(24):
        text = " ".join(f"Sentence {k} of {number}." for k in range(1 + (7 * number) % 40))
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)

    def pack(name: str, layout: Layout = meta_layout, **settings: Any) -> PackedDataset:
        values = {
            "sources": [{"kind": "text", "path": str(tmp_path / "texts" / "*.txt")}],
            "context_length": 64, "cache": str(tmp_path / "cache"), "too_long": "split", **settings,
        }  # fmt: skip
        folder = pack_split(TypeAdapter(DataConfig).validate_python(values), "train", layout, 0, tmp_path / name)
        assert folder is not None
        return PackedDataset(folder)

    return pack


def test_packed_documents_have_them_and_the_ledger_closes(
    packed: Callable[..., PackedDataset], meta_layout: Layout
) -> None:
    plain, dataset = packed("plain", replace(meta_layout, meta_tokens=None)), packed("meta", visits=2)
    (counts,), (before,) = dataset.about["ledger"].values(), plain.about["ledger"].values()
    assert counts["loss_tokens"] + counts["masked_tokens"] == counts["segment_tokens"]
    pieces: dict[str, list[list[int]]] = {}
    inserted = real = 0
    for number in range(len(dataset)):
        pack = dataset.read(number)
        assert len(pack.tokens) <= 64
        for segment in pack.segments:
            ids = pack.tokens[segment.start : segment.start + segment.length]
            metas = int((ids == META).sum())
            assert metas == round(0.3 * (len(ids) - metas))
            inserted, real = inserted + metas, real + len(ids) - metas
            pieces.setdefault(segment.id, []).append(np.flatnonzero(ids == META).tolist())
    assert counts["segment_tokens"] == inserted + real
    assert counts["inserted_tokens"] == inserted + 2 * counts["segments"] - counts["pieces"], "begin and end"
    assert before["segments"] < counts["segments"] / 2, "there is less room for text"
    visits = [both for both in pieces.values() if len(both) == 2 and both[0]]
    assert len(visits) > 10 and all(one != other for one, other in visits), "other places at every visit"


def test_a_document_that_fits_only_without_them_is_too_long(packed: Callable[..., PackedDataset]) -> None:
    with pytest.raises(DataError, match="= 300 beside meta-tokens"):
        packed("error", context_length=300, too_long="error")


def test_another_rate_is_another_packed_set(packed: Callable[..., PackedDataset], meta_layout: Layout) -> None:
    dataset = packed("set")
    dataset.require(meta_layout, 64)
    for meta in (None, MetaTokens(META, 0.1)):
        with pytest.raises(DataError, match="meta_tokens"):
            dataset.require(replace(meta_layout, meta_tokens=meta), 64)
