"""Captions in the img2dataset layout: what becomes a sample, and what is said of what cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mm.data.sample import Choice, Media, Sample, Text
from mm.data.shards import Shard
from mm.data.sources import CaptionsConfig, scan
from mm.errors import DataError

Members = dict[str, Any]


@pytest.fixture
def read(tmp_path: Path, write_shard: Callable[..., Path]) -> Callable[..., list[list[Sample] | DataError]]:
    """`read({"key": members}, caption=…)`: the samples of every group, or why there are none."""

    def run(samples: dict[str, Members], **settings: Any) -> list[list[Sample] | DataError]:
        write_shard(tmp_path / "00000.tar", samples)
        source = CaptionsConfig(path=str(tmp_path / "*.tar"), name="s", **settings).build("")
        with Shard(tmp_path / "00000.tar") as shard:
            return [found for _, found in scan(source, shard.groups())]

    return run


def only(found: list[list[Sample] | DataError]) -> Sample:
    ((sample,),) = found  # type: ignore[misc]
    assert isinstance(sample, Sample)
    return sample


def texts(sample: Sample) -> list[list[str]]:
    (choice,) = [part for part in sample.parts if isinstance(part, Choice)]
    return [[text.text for text in option] for option in choice.options]


def test_img2dataset_layout(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    """The files that img2dataset writes: the picture as it came, the caption from .txt, the metadata beside it."""
    jpg = picture(1, "JPEG")
    meta = {"caption": None, "url": "https://example.org/1.jpg", "key": "000000001", "status": "success", "width": 20}
    sample = only(read({"000000001": {"jpg": jpg, "txt": "a caption\n", "json": meta}}))
    assert sample.id == "s/00000/000000001"
    assert sample.parts == (Media("image", jpg, "jpg"), Choice(((Text("a caption"),),)))
    assert sample.meta == meta


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": "plain"}, ["plain"]),
        ({"txt": b"\xef\xbb\xbfwith a mark"}, ["with a mark"]),
        ({"txt": "  Зонт 傘 ☔ \r\n"}, ["Зонт 傘 ☔"]),
        ({"txt": "two\nlines"}, ["two\nlines"]),
        ({"json": {"caption": "one"}, "txt": "not this"}, ["one"]),
        ({"json": {"captions": ["one", {"text": " two "}], "caption": "not this"}}, ["one", "two"]),
        ({"json": {"captions": [], "caption": ""}, "txt": "the last resort"}, ["the last resort"]),
        ({"json": b"\xef\xbb\xbf" + json.dumps({"caption": "with a mark"}).encode()}, ["with a mark"]),
        ({"json": {"caption": "{text} <|im_end|> {0} %s"}}, ["{text} <|im_end|> {0} %s"]),
    ],
)
def test_where_captions_come_from(
    read: Callable[..., Any], picture: Callable[..., bytes], members: Members, expected: list[str]
) -> None:
    assert texts(only(read({"k": {"png": picture(), **members}}))) == [[text] for text in expected]


CAPTIONS = [{"text": "cat", "language": "en", "keywords": ["pet", "fur"]}, {"text": "Katze", "language": "de"}]


def test_prompt_and_caption_templates(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    members = {"png": picture(), "json": {"captions": CAPTIONS, "keywords": ["animal"], "site": "x"}}
    sample = only(read({"k": members}, prompt="{language}@{site}: ", caption="{text} ({keywords})"))
    assert texts(sample) == [["en@x: ", "cat (pet, fur)"], ["de@x: ", "Katze (animal)"]]
    options = sample.parts[1].options  # type: ignore[union-attr]
    assert [[text.loss for text in option] for option in options] == [[False, True]] * 2


def test_all_captions_or_one_drawn(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    data = {"k": {"png": picture(), "json": {"captions": CAPTIONS}}, "one": {"png": picture(1), "txt": "x"}}
    pieces, (single,) = read(data, captions="all")
    assert [sample.id for sample in pieces] == ["s/00000/k#0", "s/00000/k#1"]
    assert [sample.drawn(0, 7)[1:] for sample in pieces] == [(Text("cat"),), (Text("Katze"),)]
    assert single.id == "s/00000/one"
    for seed in range(5):
        sample = read(data)[0][0]
        drawn = [sample.drawn(seed, visit)[1].text for visit in range(4)]
        assert sorted(drawn[:2]) == ["Katze", "cat"] and drawn[2:] == drawn[:2]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"png": None, "txt": "x"}, r"no picture among \['txt'\]"),
        ({"png": None, "gif": b"GIF89a", "txt": "x"}, r"no picture among \['gif', 'txt'\]"),
        ({}, r"no caption; expected a \.txt"),
        ({"txt": ""}, r"no caption"),
        ({"txt": " \n\t"}, r"caption 0 is empty"),
        ({"txt": b"caf\xe9"}, r"its \.txt is not UTF-8 \(byte 3\)"),
        ({"txt": "UTF-16".encode("utf-16-le")}, r"U\+0000"),
        ({"json": b'{"caption": "half \\ud83d"}'}, r"U\+D83D"),
        ({"json": {"captions": ["fine", "  "]}}, r"caption 1 is empty"),
        ({"json": {"captions": ["fine", None]}}, r"caption 1 is empty or not text"),
        ({"json": {"captions": ["fine", ["nested"]]}}, r"caption 1 .* found \"\['nested'\]\""),
        ({"json": {"captions": [{"words": "x"}]}}, r"caption 0 is empty"),
        ({"json": {"captions": [{"text": 5}]}}, r"caption 0 is empty or not text"),
        ({"json": {"caption": 7}}, r"caption 0 is empty or not text; .* '7'"),
        ({"json": b"[1, 2]"}, r"its JSON is a list, expected an object"),
        ({"json": b"{'caption': 'x'}"}, r"its JSON cannot be read"),
        ({"json": b""}, r"its JSON cannot be read"),
        ({"json": b"\xff\xfe{}"}, r"its \.json is not UTF-8"),
        ({"json": b"[" * 100_000}, r"its JSON cannot be read"),
        ({"json": b'{"n": ' + b"9" * 10_000 + b"}"}, r"its JSON cannot be read"),
        ({"json": b" " * 8_000_001}, r"its \.json has 8000001 bytes, over 8000000"),
        ({"txt": b"x" * 8_000_001}, r"its \.txt has 8000001 bytes"),
    ],
)
def test_what_cannot_be_a_sample_is_named(
    read: Callable[..., Any], picture: Callable[..., bytes], members: Members, words: str
) -> None:
    """One line that names sample and shard, and only for that sample."""
    members = {ext: data for ext, data in {"png": picture(), **members}.items() if data is not None}
    found = read({"good": {"png": picture(), "txt": "x"}, "odd": members, "zood": {"png": picture(), "txt": "y"}})
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    with pytest.raises(DataError, match=words) as caught:
        raise found[1]
    line = str(caught.value)
    assert line.startswith("s/00000/odd in ") and "/00000.tar: " in line and "\n" not in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "{language}: "}, r"KeyError: 'language'.*has the fields \['caption', 'text'\]"),
        ({"prompt": "{null}: "}, r"KeyError: 'null'"),
        ({"caption": "{text:d}"}, r"ValueError"),
        ({"caption": "{text.nothing}"}, r"AttributeError"),
        ({"caption": "{empty}"}, r"the caption is empty once the template '\{empty\}' is filled in"),
    ],
)
def test_a_template_that_does_not_fit_is_named(
    read: Callable[..., Any], picture: Callable[..., bytes], settings: Members, words: str
) -> None:
    fields = {"empty": []} if "empty" in words else {}
    (found,) = read({"k": {"png": picture(), "json": {"caption": "x", "null": None, **fields}}}, **settings)
    assert isinstance(found, DataError)
    with pytest.raises(DataError, match=words):
        raise found


@pytest.mark.parametrize("template", ["{", "}", "{text", "{}", "{text} {}"])
def test_a_template_that_cannot_work_is_refused_with_the_config(template: str) -> None:
    with pytest.raises(ValidationError, match="prompt"):
        CaptionsConfig(path="x.tar", prompt=template)


@pytest.mark.parametrize(
    ("path", "root", "name"),
    [
        ("/data/ccs/{00000..00851}.tar", "", "ccs"),
        ("{root}/ccs/{00000..00851}.tar", "/data", "ccs"),
        ("{root}/{000..851}.tar", "/data/cc12m", "cc12m"),
        ("/data/laion/*/x.tar", "", "laion"),
        ("shard-000.tar", "", "shard-000"),
        ("builtin:emoji/train-*.tar.gz", "", "emoji"),
    ],
)
def test_a_source_is_called_by_its_folder(path: str, root: str, name: str) -> None:
    assert CaptionsConfig(path=path).build(root).name == name
    assert CaptionsConfig(path=path, name="mine").build(root).name == "mine"


def test_only_keeps_captions_with_the_given_fields() -> None:

    for only, languages in (({"language": "de"}, ["de"]), ({"language": ["fr", "en"]}, ["en", "fr"])):
        source = CaptionsConfig(path="builtin:emoji/test-*.tar.gz", prompt="{language}", only=only).build("")
        with Shard(source.shards()[0]) as shard:
            for group in shard.groups():
                (sample,) = source.samples(group)
                assert [option[0].text for option in sample.parts[1].options] == languages  # type: ignore[union-attr]
    nothing = CaptionsConfig(path="builtin:emoji/test-*.tar.gz", only={"language": "tlh"}).build("")
    with Shard(nothing.shards()[0]) as shard, pytest.raises(DataError, match="none of its captions has"):
        nothing.samples(next(shard.groups()))
