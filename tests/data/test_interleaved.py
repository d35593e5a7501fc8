"""Interleaved documents: three layouts say the same, and what is no document is one clear error."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.data.interleaved import InterleavedConfig
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.sample import Media, Sample, Special, Text
from mm.data.shards import Group, Tar
from mm.data.tokens import make_segment
from mm.errors import DataError

Members = dict[str, Any]


@pytest.fixture
def read(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any]
) -> Callable[..., Sample | DataError]:
    """The document of one group of tar members."""

    def run(members: Members, limits: Limits = Limits(), **config: Any) -> Sample | DataError:  # noqa: B008
        path = write_shard(tmp_path / "0.tar", {"k": members})
        (found,) = samples_in(path, {"kind": "interleaved", **config}, limits)
        return found if isinstance(found, DataError) else found[0]

    return run


def parts(found: Sample | DataError) -> list[Any]:
    """Text joined as tokenising joins it, pictures by their bytes."""
    assert isinstance(found, Sample), found
    said: list[Any] = []
    for part in found.parts:
        if isinstance(part, Text) and said and isinstance(said[-1], str):
            said[-1] += part.text
        else:
            said.append(part.text if isinstance(part, Text) else part.read())  # type: ignore[union-attr]
    return said


def test_three_layouts_of_one_document(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    a, b, c = (picture(n, format) for n, format in enumerate(("PNG", "JPEG", "WEBP")))
    files = {"one.png": a, "two.jpg": b, "3.webp": c}
    in_text = {name: base64.b64encode(data).decode() for name, data in files.items()}
    expected = [a, "First. Second.", b, c, "Third."]
    ours: list[Any] = [
        {"image": "one.png"}, {"text": "First."}, {"text": " Second."}, {"image": "two.jpg"}, {"image": "3.webp"},
        {"text": "Third."},
    ]  # fmt: skip
    assert parts(read({**files, "json": {"parts": ours}})) == expected

    texts = [None, "First. Second.", None, None, "Third."]
    names = ["one.png", None, "two.jpg", "3.webp", None]
    assert parts(read({**files, "json": {"texts": texts, "images": names}})) == expected
    info = [name and {"image_name": name} for name in names]
    assert parts(read({**files, "json": {"texts": texts, "image_info": info}})) == expected
    info = [name and {"image_base64": in_text[name]} for name in names]
    assert parts(read({"json": {"texts": texts, "image_info": info}})) == expected

    sentences = ["First.", "Second.", "Third."]
    matched = [("one.png", 0), ("two.jpg", 2), ("3.webp", 2)]
    info = [{"image_name": name, "matched_text_index": at} for name, at in matched]
    assert parts(read({**files, "json": {"text_list": sentences, "image_info": info}})) == expected
    similar = [[0.9, 0.1, 0.2], [-3, -2, -1], [0.1, 0.2, 0.3]]
    info = [{"image_base64": in_text[name]} for name, _ in matched]
    document = {"text_list": sentences, "image_info": info, "similarity_matrix": similar}
    assert parts(read({"json": document})) == expected


def test_what_parts_may_say(
    read: Callable[..., Any], picture: Callable[..., bytes], sound: Callable[..., bytes], clip: Callable[..., bytes]
) -> None:
    """Prompts, empty texts, capitals, and every medium; fields beside the document are its meta."""
    files = {"a.png": picture(), "b.flac": sound(), "c.mp4": clip()}
    said = [{"text": "Was?", "loss": False}, {"image": "A.PNG"}, {"text": ""}, {"audio": "b.flac"}, {"video": "c.mp4"}]
    found = read({**files, "json": {"parts": said, "url": "u", "score": 0.5, "nested": {"a": 1}}})
    assert found.parts[0] == Text("Was?", loss=False) and found.meta == {"url": "u", "score": 0.5}
    assert [(part.kind, part.ext) for part in found.parts[1:]] == [
        ("image", "png"),
        ("audio", "flac"),
        ("video", "mp4"),
    ]


def test_neighbouring_texts_stay_apart(read: Callable[..., Any]) -> None:
    assert parts(read({"json": {"texts": ["a", None, "b", "", "c"]}})) == ["a\n\nb\n\nc"]
    assert parts(read({"json": {"text_list": ["a", "", "b"]}})) == ["a b"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, r"neither `parts`, `texts`, `text_list` nor `clips` in its JSON; found \[\]"),
        ({"text": "x"}, r"neither .* found \['text'\]"),
        ({"parts": []}, "the document is empty"),
        ({"parts": None}, r"not laid out as a document \(TypeError: parts is a NoneType, expected a list\)"),
        ({"parts": {"text": "x"}}, "parts is a dict, expected a list"),
        ({"parts": ["text"]}, "not laid out"),
        ({"parts": [5]}, "not laid out"),
        ({"parts": [{"words": "x"}]}, r"part 0 is neither text, image, audio nor video; found \['words'\]"),
        ({"parts": [{"text": 5}]}, "a text is a int"),
        ({"parts": [{"text": []}]}, "a text is a list"),
        ({"parts": [{"image": 5}]}, "not laid out"),
        ({"parts": [{"image": None}]}, "the document is empty"),
        ({"parts": [{"image": "b.png"}]}, r"its image 'b\.png' is not in the shard; there are \['a\.png', 'json'\]"),
        ({"parts": [{"audio": "a.png"}]}, r"'a\.png' is no audio; expected flac"),
        ({"parts": [{"image": "json"}]}, "'json' is no image"),
        ({"parts": [{"text": "\ud83d"}]}, r"U\+D83D"),
        ({"texts": "abc"}, "texts is a str, expected a list"),
        ({"texts": ["a"], "images": "x"}, "pictures is a str"),
        ({"texts": ["a"], "images": [None, "a.png"]}, "1 texts and 2 pictures; the lists run in parallel"),
        ({"texts": ["a"], "images": ["a.png"]}, "place 0 has text and a picture"),
        ({"texts": [None], "images": [[]]}, "the document is empty"),
        ({"texts": [None], "images": [["a.png"]]}, "not laid out"),
        ({"texts": [None], "image_info": [{"image_base64": "%%%"}]}, "base64 cannot be read"),
        ({"texts": [None], "image_info": [{"image_base64": "AAA"}]}, "base64 cannot be read"),
        ({"texts": [None], "image_info": [{"image_base64": "日本"}]}, "base64 cannot be read"),
        ({"texts": [None], "image_info": [{"image_base64": 7}]}, "base64 cannot be read"),
        ({"texts": [None], "image_info": [{"image_base64": "R0lGODlh"}]}, "neither jpg, png nor webp"),
        ({"texts": [None], "image_info": [{"url": "x"}]}, "its image '' is not in the shard"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png"}]}, "KeyError: 'similarity_matrix'"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}, "sentence 1 of 1"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": -1}]}, "sentence -1 of 1"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1e999}]}, "OverflowError"),
        ({"text_list": [], "image_info": [{"image_name": "a.png"}], "similarity_matrix": [[]]}, "not laid out"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png"}], "similarity_matrix": [[]]}, "IndexError"),
        ({"text_list": "abc"}, "text_list is a str"),
        ({"parts": [{"x" * 10_000: 1}]}, "part 0 is neither"),
        ({"parts": [{"image": "x" * 10_000}]}, "is not in the shard"),
        ({"texts": ["a"], "images": {"x" * 10_000: 1}}, "pictures is a dict"),
    ],
)
def test_what_is_no_document_is_named(
    read: Callable[..., Any], picture: Callable[..., bytes], document: Any, words: str
) -> None:
    found = read({"a.png": picture(), "json": document})
    assert isinstance(found, DataError)
    with pytest.raises(DataError, match=words):
        raise found
    line = str(found)
    assert line.startswith("s/0/k in ") and "\n" not in line and len(line) < 800


def test_the_length_of_a_document_is_bounded(read: Callable[..., Any]) -> None:
    found = read({"json": {"texts": ["a" * 600, "b" * 600]}}, Limits(text_chars=1000))
    assert "characters are more than data.max_text_chars = 1,000" in str(found)


KEYS = st.sampled_from(
    [
        *("parts", "texts", "text_list", "images", "image_info", "similarity_matrix", "matched_text_index"),
        *("text", "image", "audio", "video", "loss", "image_name", "image_base64", "", "x", "clip", "caption"),
    ]
)
WORDS = st.sampled_from(
    ["a.png", "A.PNG", "json", "text", "image", "iVBORw0KGgo=", "AAAA", "\ud800", "\0", "1", "t0_i1", "0:1 - 0:2"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS | st.just(2**2000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        key: VALUES
        for key in ("parts", "texts", "text_list", "images", "image_info", "similarity_matrix", "score", "clips")
    },
)
CONFIGS = st.fixed_dictionaries(
    {}, optional={"match": st.just({}), "window": st.just({}), "end_of_chunk": st.just("<|endofchunk|>"),
                  "reverse": st.just(0.5), "learn": st.just("after_media")}
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS | VALUES, spelt=st.booleans(), config=CONFIGS)
def test_any_json_is_a_document_or_one_clear_error(
    tmp_path: Path, picture: Callable[..., bytes], document: Any, spelt: bool, config: Any
) -> None:
    """As the text of a member, and as the row of a table."""
    members: dict[str, Any] = {"a.png": picture(), "mp4": b"a clip"}
    if spelt or not isinstance(document, dict):
        members["json"] = json.dumps(document).encode()
    shard = Tar(os.devnull)
    group = Group(shard, "k", members, None if "json" in members else document)
    try:
        samples = InterleavedConfig(path="x", name="s", **config).build("").samples(group, Limits())
    except DataError as error:
        assert str(error).startswith(f"s/null/k in {os.devnull}: ") and "\n" not in str(error)
    else:
        assert len(samples) <= 1
        for part in (one for sample in samples for one in (*sample.parts, *sample.backwards)):
            assert isinstance(part, Text | Media | Special)
            assert not isinstance(part, Text) or (isinstance(part.text, str) and "\0" not in part.text)
        assert all(sample.parts for sample in samples) and (samples or config.keys() & {"match", "window", "learn"})


@pytest.mark.parametrize("depth", [8, 900, 100_000])
def test_nested_nonsense(read: Callable[..., Any], depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"parts":', "}")):
        found = read({"json": f'{{"parts": {opening * depth}1{closing * depth}}}'.encode()})
        assert isinstance(found, DataError) and "\n" not in str(found) and len(str(found)) < 800


Said = list[bytes | str]


def published(said: Said) -> dict[str, Any]:
    """A document of Open-Qwen2VL: `texts` and `image_info` side by side."""
    pictures = [{"image_base64": base64.b64encode(one).decode()} if isinstance(one, bytes) else None for one in said]
    return {"texts": [one if isinstance(one, str) else None for one in said], "image_info": pictures}


def published_ids(said: Said, layout: Layout, token: str = "<|endofchunk|>") -> list[int]:
    """As its packer joins and tokenises them, with `token` behind every text; -200 for a picture."""
    corpus = "".join("<image>\n" if isinstance(one, bytes) else one + token for one in said)
    backend = tokenizers.Tokenizer.from_str(layout.tokenizer.to_json())  # to which special tokens in a text are special
    ids = [layout.tokenizer.id("<s>")]
    for number, chunk in enumerate(corpus.split("<image>")):
        ids += [-200] * bool(number) + backend.encode(chunk, add_special_tokens=False).ids
    return [*ids, layout.tokenizer.id("<|im_end|>")]


def ids_of(sample: Sample, layout: Layout) -> list[int]:
    segment = make_segment(sample.drawn(0, 0), layout, "x", Limits())
    ids = segment.ids.tolist()
    for one in reversed(segment.media):
        ids[one.position : one.position + one.length] = [-200]
    learned = {place for start, stop in segment.loss for place in range(start, stop)}
    masked = {0}.union(*(range(one.position, one.position + one.length) for one in segment.media))
    assert learned == set(range(len(segment))) - masked, "all but the begin of text and pictures is learned"
    return ids


def test_joined_as_published(layout: Layout, read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    """With `end_of_chunk` the ids are those of Open-Qwen2VL's packer, whatever follows what."""
    a, b, c = (picture(n, "JPEG") for n in range(3))
    documents: list[Said] = [
        [a, "First.", b, "Second. "], ["First.", "Second.", a], [a, b, "Third.", " Fourth.", c],
        [a], ["Words."], [a, b],
    ]  # fmt: skip
    for said in documents:
        found = read({"json": published(said)}, end_of_chunk="<|endofchunk|>")
        assert ids_of(found, layout) == published_ids(said, layout)
    assert parts(read({"json": published(["a", a, "b", "c"])})) == ["a", a, "b\n\nc"], "otherwise as paragraphs"


def test_what_is_said_of_a_picture_that_is_not_there(read: Callable[..., Any]) -> None:
    document = {"texts": ["a", "b"], "image_info": [{"raw_url": "http://a"}, {}]}
    assert parts(read({"json": document})) == ["a\n\nb"]


def test_pictures_of_a_line_are_left_out(
    layout: Layout, read: Callable[..., Any], picture: Callable[..., bytes], tmp_path: Path, pack: Callable[..., Any]
) -> None:
    """With their place, in every layout, and counted; a document that is nothing else is filtered."""
    a, flat, high = picture(0), picture(1, size=(9, 1)), picture(2, size=(1, 9))
    said: Said = [flat, a, "Words.", high, "More."]
    found = read({"json": published(said)}, min_side=2, end_of_chunk="<|endofchunk|>")
    assert ids_of(found, layout) == published_ids([a, "Words.", "More."], layout) and found.left_out == 2
    found = read({"a.png": a, "b.png": flat, "json": {"parts": [{"image": "a.png"}, {"image": "b.png"}]}}, min_side=2)
    assert parts(found) == [a] and found.left_out == 1
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps(published(one)) for one in (said, [flat], [a, "Words."])))
    dataset = pack(path, tmp_path / "out", layout, {"kind": "interleaved", "min_side": 2})
    (ledger,) = dataset.about["ledger"].values()
    assert [ledger[name] for name in ("samples", "filtered", "left_out", "image", "segments")] == [3, 1, 2, 2, 2]


def write_packs(folder: Path, packs: list[list[Said]]) -> None:
    """As `sequence_packing_image_to_json.py` writes them, a folder each."""
    for tar, documents in enumerate(packs):
        data = [{**published(said), "key": f"{n}", "uid": "0", "length": 150} for n, said in enumerate(documents)]
        (folder / str(tar)).mkdir(parents=True)
        (folder / str(tar) / f"{tar:032x}_packed.json").write_text(
            json.dumps({"data": data, "lengths": [150] * len(data)})
        )
        (folder / f"{tar}_stats.json").write_text(json.dumps({"len": [300]}))


def test_packs_in_json(
    tmp_path: Path,
    samples_in: Callable[..., Any],
    layout: Layout,
    picture: Callable[..., bytes],
    pack: Callable[..., Any],
) -> None:
    """Every entry is a sample; documents with one picture have no `end_of_chunk`, as in the published loader."""
    a, b, c, d = (picture(n, "JPEG") for n in range(4))
    packs: list[list[Said]] = [[[a, "a cat"], [b, "a dog"]], [[c, "One.", d, "Two."]]]
    write_packs(tmp_path / "ccs_json", packs)
    source = {"kind": "packed_json", "end_of_chunk": "<|endofchunk|>"}
    for tar, documents in enumerate(packs):
        found = samples_in(tmp_path / "ccs_json" / str(tar), source)
        assert [one.id for (one,) in found] == [f"s/{tar}/{tar:032x}#{n}" for n in range(len(documents))]
        for (sample,), said in zip(found, documents, strict=True):
            assert ids_of(sample, layout) == published_ids(said, layout, "" if len(said) == 2 else "<|endofchunk|>")
            assert [part.read() for part in sample.parts if isinstance(part, Media)] == said[::2]
    dataset = pack(tmp_path / "ccs_json", tmp_path / "out", layout, {**source, "name": "ccs"})
    (ledger,) = dataset.about["ledger"].values()
    assert [ledger[name] for name in ("samples", "image", "segments", "quarantined")] == [3, 4, 3, 0]


def test_packs_in_json_that_are_none(
    tmp_path: Path,
    samples_in: Callable[..., Any],
    picture: Callable[..., bytes],
    pack: Callable[..., Any],
    layout: Layout,
) -> None:
    """What is wrong with one entry does not cost the others; what is wrong with a file does not cost the next."""
    write_packs(tmp_path / "x", [[[picture(1), "a"]]])
    folder = tmp_path / "x" / "0"
    for name, text in (("1", "{"), ("2", "[]"), ("3", "{}"), ("4", '{"data": {}}'), ("5", '{"data": [1, {}]}')):
        (folder / f"{name}_packed.json").write_text(text)
    (first,), *others = samples_in(folder, {"kind": "packed_json"})
    assert parts(first) == [picture(1), "a"]
    words = ["cannot be read", "is a list", "no `data`", "no `data`", "document 0 is a int", "neither `parts`"]
    assert len(others) == 6 and all(word in str(error) for word, error in zip(words, others, strict=True))
    assert all(f"{folder}/{n}_packed.json" in str(error) for n, error in zip("12345", others, strict=False))
    with pytest.raises(DataError, match=r"nothing: no folder there holds files \*_packed\.json"):
        pack(tmp_path / "nothing", tmp_path / "out", layout, {"kind": "packed_json"})
