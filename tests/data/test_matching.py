"""Pictures matched to texts by similarity, held against brute force, and documents that are filled and reversed."""

import base64
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.data.layout import Layout
from mm.data.packed import PackedDataset
from mm.data.sample import Media, Sample, Special, Text
from mm.errors import DataError

END = "<|endofchunk|>"


@pytest.fixture
def read(tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any]) -> Callable[..., list[Any]]:
    """What becomes of each document in a tar: its samples, or an error."""

    def run(*documents: Any, **config: Any) -> list[Any]:
        path = write_shard(tmp_path / "0.tar", {f"{n}": {"json": one} for n, one in enumerate(documents)})
        return samples_in(path, {"kind": "interleaved", **config})

    return run


def said(parts: tuple[Any, ...]) -> list[Any]:
    """Texts, tokens in angle brackets, and pictures as their bytes."""
    return [
        part.read() if isinstance(part, Media) else part.token if isinstance(part, Special) else part.text
        for part in parts
    ]


@pytest.fixture(scope="module")
def pictures(picture: Callable[..., bytes]) -> list[bytes]:
    return [picture(n) for n in range(5)]


def encoded(one: bytes) -> dict[str, str]:
    return {"image_base64": base64.b64encode(one).decode()}


def mmc4(pictures: list[bytes], similarity: Any, sentences: int) -> dict[str, Any]:
    return {
        "text_list": [f"S{n}." for n in range(sentences)],
        "image_info": [encoded(one) for one in pictures],
        "similarity_matrix": similarity if isinstance(similarity, list) else similarity.tolist(),
    }


def brute_force(scores: np.ndarray, threshold: float) -> dict[int, int]:
    """Picture -> sentence, of all assignments the one with the largest sum."""
    flipped = scores.shape[0] > scores.shape[1]
    wide = scores.T if flipped else scores
    choices = itertools.permutations(range(wide.shape[1]), wide.shape[0])
    best = max(choices, key=lambda chosen: sum(wide[n, one] for n, one in enumerate(chosen)))
    pairs = [(one, n) if flipped else (n, one) for n, one in enumerate(best)]
    return {picture: sentence for picture, sentence in pairs if scores[picture, sentence] > threshold}


def test_pictures_are_assigned_so_that_the_sum_is_largest(read: Callable[..., Any], pictures: list[bytes]) -> None:
    """Against all assignments; those below the threshold are left out and counted, and so is a document without any."""
    rng = np.random.default_rng(0)
    shapes = [(n, m) for n in range(1, 5) for m in range(1, 6)]
    matrices = [rng.uniform(0, 1, shape) for shape in shapes]
    threshold = 0.6
    found = read(
        *(mmc4(pictures[: len(one)], one, one.shape[1]) for one in matrices),
        match={"noise": 0, "clip": 0, "threshold": threshold}, end_of_chunk=END,
    )  # fmt: skip
    filtered = 0
    for matrix, samples in zip(matrices, found, strict=True):
        matched = brute_force(matrix, threshold)
        expected: list[Any] = []
        for sentence in range(matrix.shape[1]):
            here = [picture for picture, one in matched.items() if one == sentence]
            if here and any(isinstance(one, bytes) for one in expected):
                expected.append(END)  # not in front of the first picture
            behind_text = bool(expected) and not here and expected[-1] != END
            expected += [*(pictures[one] for one in here), f"{' ' * behind_text}S{sentence}."]
        if not matched:
            filtered += 1
            assert samples == []
            continue
        (sample,) = samples
        assert said(sample.parts) == [*expected, END] and sample.left_out == len(matrix) - len(matched)
    assert 0 < filtered < len(matrices)


def test_noise_is_drawn_by_the_document(read: Callable[..., Any], pictures: list[bytes]) -> None:
    """Again the same; documents alike in all but their id are matched differently, as far as the noise can reach."""
    matrix = np.full((3, 3), 0.5) + np.eye(3) * 0.01
    documents = [mmc4(pictures[:3], matrix, 3)] * 12
    first, second = (
        [said(sample.parts) for (sample,) in read(*documents, match={"noise": 0.05, "clip": 0.2})] for _ in range(2)
    )
    assert first == second and 1 < len({tuple(one) for one in first}) <= 6
    quiet = read(*documents, match={"noise": 0.1, "clip": 0.004})
    plain = [pictures[0], "S0.", pictures[1], "S1.", pictures[2], "S2."]
    assert all(said(sample.parts) == plain for (sample,) in quiet), "noise below the differences changes nothing"
    low = read(*([mmc4(pictures[:1], [[0.24]], 1)] * 40), match={})
    assert 0 < sum(not one for one in low) < 40, "and it is part of what is held against the threshold"


def obelics(places: list[Any], score: Any) -> dict[str, Any]:
    info = [encoded(one) if isinstance(one, bytes) else None for one in places]
    return {"texts": [one if isinstance(one, str) else None for one in places], "image_info": info, "score": score}


def test_pictures_are_followed_by_the_text_most_like_them(read: Callable[..., Any], pictures: list[bytes]) -> None:
    a, b, c, d = pictures[:4]
    places = ["One.", a, b, "Two.", c, d]
    score = [["t0_i1", 0.1], ["t3_i1", 0.4], ["t0_i2", 0.3], ["t3_i2", 0.2], ["t3_i4", -0.1], ["t1_i5", 0.9]]
    filled = [a, "Two.", b, "One.", "\n\nTwo."]
    quiet = {"noise": 0, "clip": 0, "threshold": 0}
    (sample,), (again,) = read(obelics(places, score), obelics(places, str(score)), match=quiet, reverse=0.5)
    assert said(sample.parts) == ["One.", *filled] == said(again.parts), "as a list, or as Python writes one"
    assert sample.left_out == 2, "one is like no text, and of one it is not said"
    backwards = ["Two.", b, "One.", a, "Two.", "\n\nOne."]
    seen = [said(sample.drawn(0, visit)) for visit in range(200)]
    assert all(one in (["One.", *filled], backwards) for one in seen)
    assert 70 < seen.count(backwards) < 130 and seen == [said(sample.drawn(0, visit)) for visit in range(200)]
    assert seen != [said(sample.drawn(1, visit)) for visit in range(200)]
    ((chunks,),) = read(obelics(places, score), match=quiet, end_of_chunk=END)
    assert said(chunks.parts) == ["One.", a, "Two.", END, b, "One.", "\n\nTwo.", END]
    (none, text) = read(obelics(places, score), obelics(["Only text."], []), match={"threshold": 0.95})
    assert none == [] and text == [], "left out, and counted so"


def test_pictures_without_a_score_are_left_out(read: Callable[..., Any], pictures: list[bytes]) -> None:
    """Documents may have no `score`: they are filtered, not bad; without `match` it is not missed."""
    document = obelics(["One.", pictures[0], "Two."], None)
    bare = {name: value for name, value in document.items() if name != "score"}
    assert read(document, bare, match={}) == [[], []]
    ((sample,),) = read(bare)
    assert said(sample.parts) == ["One.", pictures[0], "Two."] and sample.left_out == 0


def test_noise_chooses_among_texts_of_like_scores(read: Callable[..., Any], pictures: list[bytes]) -> None:
    document = obelics(["One.", pictures[0], "Two."], [["t0_i1", 0.5], ["t2_i1", 0.5]])
    found = [tuple(said(sample.parts)) for (sample,) in read(*[document] * 20, match={"noise": 0.02, "clip": 0.04})]
    assert set(found) == {("One.", pictures[0], one, "\n\nTwo.") for one in ("One.", "Two.")}


P = {"image_name": "no picture"}  # never looked at
BAD: list[tuple[dict[str, Any], str]] = [
    ({"text_list": ["a"], "image_info": [P]}, "KeyError: 'similarity_matrix'"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [0.5]}, "matrix of 1; expected 1 pictures x 1 sent"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [[0.5, 0.5]]}, "matrix of 1 x 2; expected 1 pic"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [[0.5], [0.5]]}, "matrix of 2 x 1; expected 1 pic"),
    ({"text_list": ["a"] * 2, "image_info": [P] * 2, "similarity_matrix": [[0.5], [0.5, 1]]}, "not laid out"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [[float("nan")]]}, "values that are no numbers"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [[None]]}, "values that are no numbers"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [[float("inf")]]}, "values that are no numbers"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": [["x"]]}, "not laid out"),
    ({"text_list": ["a"], "image_info": [P], "similarity_matrix": {"a": 1}}, "not laid out"),
    ({"text_list": ["a"], "image_info": 5, "similarity_matrix": [[1]]}, "not laid out"),
    ({"texts": ["a", None], "images": [None, "x"], "score": {}}, "score is a dict, expected a list"),
    ({"texts": ["a", None], "images": [None, "x"], "score": "[["}, "not laid out"),
    ({"texts": ["a", None], "images": [None, "x"], "score": "[" * 100_000}, "not laid out"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [["t0_i1"]]}, "not laid out"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [["t0i1", 1]]}, "expected `t0_i1` and a number"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [["t0_i1", float("nan")]]}, "expected `t0_i1` and a num"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [["t0_i2", 1]]}, "score of t0_i2; there are 2 places"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [["t2_i1", 1]]}, "score of t2_i1; there are 2 places"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [["t0_i1", None]]}, "not laid out"),
    ({"texts": ["a", None], "images": [None, "x"], "score": [[f"t{'9' * 5000}_i1", 1]]}, "not laid out"),
]  # fmt: skip


def test_what_cannot_be_matched_is_named(read: Callable[..., Any]) -> None:
    found = read(*(document for document, _ in BAD), match={})
    for number, ((_, words), error) in enumerate(zip(BAD, found, strict=True)):
        assert isinstance(error, DataError) and words in str(error), (words, str(error))
        assert str(error).startswith(f"s/0/{number} in ") and "\n" not in str(error) and len(str(error)) < 800


def packed_files(dataset: PackedDataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(dataset.folder.iterdir())}


def test_matched_documents_are_packed(
    tmp_path: Path,
    layout: Layout,
    pictures: list[bytes],
    write_shard: Callable[..., Path],
    pack: Callable[..., PackedDataset],
) -> None:
    """The same bytes again; other settings are another set; the bad are quarantined, and all sums close."""
    rng = np.random.default_rng(1)
    good = [mmc4(pictures[:3], rng.uniform(0.1, 0.5, (3, 4)), 4) for _ in range(6)]
    documents = [*good, BAD[2][0], obelics(["One.", pictures[3]], [["t0_i1", 0.5]])]
    path = write_shard(tmp_path / "x.tar", {f"{n}": {"json": one} for n, one in enumerate(documents)})
    source = {"kind": "interleaved", "match": {"noise": 0.1, "clip": 0.2, "threshold": 0.3}, "reverse": 0.5}
    settings = {"visits": 2, "max_bad_fraction": 0.2}
    one, two = (pack(path, tmp_path / name, layout, source, **settings) for name in "ab")
    assert packed_files(one) == packed_files(two)
    other = pack(path, tmp_path / "c", layout, {**source, "reverse": 0.25}, **settings)
    assert one.about["provenance"]["fingerprint"] != other.about["provenance"]["fingerprint"]
    (ledger,) = one.about["ledger"].values()
    assert ledger["samples"] == 8 and ledger["quarantined"] == 1
    usable = ledger["samples"] - ledger["quarantined"] - ledger["filtered"]
    assert usable * 2 == ledger["segments"] and ledger["image"] == 2 * (3 * (usable - 1) - ledger["left_out"] + 1)


def test_a_default_match_is_the_published_one(read: Callable[..., Any], pictures: list[bytes]) -> None:
    """Without `match` documents stay as the file says, whatever it holds beside."""
    document = mmc4(pictures[:2], [[0.9, 0.1], [0.8, 0.1]], 2)
    document["image_info"] = [{**info, "matched_text_index": 1} for info in document["image_info"]]
    ((sample,),) = read(document)
    assert isinstance(sample, Sample) and said(sample.parts) == ["S0.", pictures[0], pictures[1], "S1."]
    ((chunks,),) = read(document, end_of_chunk=END)
    assert chunks.parts[-1] == Special(END, True) and chunks.parts[0] == Text("S0.") and len(chunks.parts) == 5
