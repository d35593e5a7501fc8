"""Captions in the img2dataset layout: what becomes a sample, and what is said of what cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import PackedDataset
from mm.data.sample import Choice, Media, Sample, Special, Text
from mm.data.sources import CaptionsConfig
from mm.errors import DataError

Members = dict[str, Any]


LIMITS = Limits(json_bytes=8_000_000)


@pytest.fixture
def read(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any]
) -> Callable[..., list[list[Sample] | DataError]]:
    """`read({"key": members}, caption=…)`: the samples of every group, or why there are none."""

    def run(samples: dict[str, Members], **settings: Any) -> list[list[Sample] | DataError]:
        path = write_shard(tmp_path / "00000.tar", samples)
        return samples_in(path, {"kind": "captions", **settings}, LIMITS)

    return run


def only(found: list[list[Sample] | DataError]) -> Sample:
    ((sample,),) = found  # type: ignore[misc]
    assert isinstance(sample, Sample)
    return sample


def options(sample: Sample) -> tuple[tuple[Text, ...], ...]:
    """The captions that visits draw from, or the only one."""
    media, *rest = sample.parts
    assert isinstance(media, Media)
    return rest[0].options if isinstance(rest[0], Choice) else (tuple(rest),)  # type: ignore[arg-type]


def texts(sample: Sample) -> list[list[str]]:
    return [[text.text for text in option] for option in options(sample)]


def test_img2dataset_layout(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    """The files that img2dataset writes: the picture as it came, the caption from .txt, the metadata beside it."""
    jpg = picture(1, "JPEG")
    meta = {"caption": None, "url": "https://example.org/1.jpg", "key": "000000001", "status": "success", "width": 20}
    sample = only(read({"000000001": {"jpg": jpg, "txt": "a caption\n", "json": meta}}))
    assert sample.id == "s/00000/000000001"
    assert sample.parts == (Media("image", jpg, "jpg"), Text("a caption"))
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
    assert [[text.loss for text in option] for option in options(sample)] == [[False, True]] * 2


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
        ({"png": None, "txt": "x"}, r"no image among \['txt'\]"),
        ({"png": None, "gif": b"GIF89a", "txt": "x"}, r"no image among \['gif', 'txt'\]"),
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
        ({"json": b" " * 8_000_001}, r"its \.json has 8000001 bytes, over data.max_json_bytes"),
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
        ({"prompt": "{language}: "}, r"KeyError: 'language'.*there are the fields \['caption', 'text'\]"),
        ({"prompt": "{null}: "}, r"KeyError: 'null'"),
        ({"caption": "{text:d}"}, r"ValueError"),
        ({"caption": "{text.nothing}"}, r"AttributeError"),
        ({"caption": "{empty}"}, r"the text is empty once the template '\{empty\}' is filled in"),
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


def test_only_keeps_captions_with_the_given_fields(samples_in: Callable[..., Any]) -> None:
    (path,) = CaptionsConfig(path="builtin:emoji/test-*.tar.gz").build("").shards()
    for only, languages in (({"language": "de"}, ["de"]), ({"language": ["fr", "en"]}, ["en", "fr"])):
        for (sample,) in samples_in(path, {"kind": "captions", "prompt": "{language}", "only": only}):
            assert [option[0].text for option in options(sample)] == languages
    for found in samples_in(path, {"kind": "captions", "only": {"language": "tlh"}}):
        assert found == [], "left out rather than bad"


def test_only_looks_at_the_fields_of_the_sample_too(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    fields = {"language": "en", "captions": [{"text": "a"}, {"text": "b", "language": "de"}]}
    english = {"language": "en"}
    sample = only(read({"a": {"png": picture(), "json": json.dumps(fields).encode()}}, only=english))
    assert [part.text for part in sample.parts if isinstance(part, Text)] == ["a"]
    sample = only(read({"a": {"png": picture(), "json": b'{"caption": "c", "language": "en"}'}}, only=english))
    assert [part.text for part in sample.parts if isinstance(part, Text)] == ["c"]


def test_sound_with_captions_labels_or_nothing(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any], sound: Callable[..., bytes]
) -> None:
    data, fields = sound(), {"instrument": "lute", "tempo": 90, "tags": ["old", "slow"]}
    path = write_shard(tmp_path / "x.tar", {"k": {"flac": data, "json": fields}})
    for caption, expected in (
        ("{instrument} at {tempo:d} bpm: {tags}", (Text("lute at 90 bpm: old, slow"),)),
        ("", ()),
    ):
        ((sample,),) = samples_in(path, {"kind": "audio", "caption": caption})
        assert sample.parts == (Media("audio", data, "flac"), *expected) and sample.meta == fields
    ((sample,),) = samples_in(path, {"kind": "audio", "caption": "", "prompt": "{instrument}"})
    assert sample.parts[1:] == (Text("lute", loss=False),)
    (error,) = samples_in(path, {"kind": "audio"})
    assert "no caption" in str(error)
    (error,) = samples_in(write_shard(tmp_path / "y.tar", {"k": {"png": b"", "txt": "x"}}), {"kind": "audio"})
    assert "no audio among ['png', 'txt']; expected flac, wav, ogg, mp3" in str(error)


def test_clips_and_their_timed_captions(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any], clip: Callable[..., bytes]
) -> None:
    data = clip()
    timed = [
        {"start": 0, "end": "1.5", "text": "a cat", "language": "en"},
        {"start": 1, "end": 2, "text": "ein Hund", "language": "de"},
        {"start": 1.5, "end": 9, "text": "the end", "language": "en"},
    ]
    path = write_shard(tmp_path / "x.tar", {"k": {"mp4": data, "json": {"caption": "all", "timed": timed, "by": "me"}}})
    ((whole,),) = samples_in(path, {"kind": "video"})
    assert whole.parts == (Media("video", data, "mp4"), Text("all")) and whole.id == "s/x/k"
    (found,) = samples_in(path, {"kind": "video", "timed": True, "prompt": "{by}: ", "only": {"language": "en"}})
    assert [(one.id, one.parts[0].span, one.parts[1:]) for one in found] == [
        ("s/x/k#0", (0, 1.5), (Text("me: ", loss=False), Text("a cat"))),
        ("s/x/k#2", (1.5, 9), (Text("me: ", loss=False), Text("the end"))),
    ]


@pytest.mark.parametrize(
    ("timed", "words"),
    [
        (None, r"no `timed` captions in its JSON; expected a list of \{start, end, text\}"),
        ([], "no `timed` captions"),
        ("abc", "no `timed` captions"),
        ([5], "timed caption 0 has no start and end in seconds"),
        ([["start"]], "timed caption 0 has no start and end"),
        ([{"start": 0, "end": 1, "text": "x"}, {"start": 1}], "timed caption 1 has no start and end"),
        ([{"start": None, "end": 1}], "timed caption 0 has no start and end"),
        ([{"start": 0, "end": 10**400}], "timed caption 0 has no start and end"),
        ([{"start": 0, "end": 1e999}], "runs from 0.0 to inf; expected 0 <= start < end"),
        ([{"start": -1, "end": 1}], "runs from -1.0 to 1.0"),
        ([{"start": 2, "end": 2}], "runs from 2.0 to 2.0"),
        ([{"start": 0, "end": float("nan")}], "runs from 0.0 to nan"),
        ([{"start": 0, "end": 1, "text": ""}], "the text is empty"),
        ([{"start": 0, "end": 1}], "KeyError: 'text'"),
    ],
)
def test_timed_captions_that_make_no_sense(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any], timed: Any, words: str
) -> None:
    path = write_shard(tmp_path / "x.tar", {"k": {"mp4": b"a clip", "json": {"timed": timed}}})
    (found,) = samples_in(path, {"kind": "video", "timed": True})
    with pytest.raises(DataError, match=words) as caught:
        raise found
    assert str(caught.value).startswith("s/x/k in ") and "\n" not in str(caught.value)


def test_texts_from_members_and_fields(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any]
) -> None:
    samples = {
        "a": {"txt": " as it stands\n"},
        "b": {"json": {"text": "a field", "title": "T"}},
        "c": {"txt": "the member", "json": {"text": "not this", "title": "T"}},
        "d": {"json": {"body": "other"}},
        "e": {"txt": "  \n"},
    }
    path = write_shard(tmp_path / "x.tar", samples)
    *found, missing, empty = samples_in(path, {"kind": "text"})
    assert [one.parts for (one,) in found] == [(Text(" as it stands\n"),), (Text("a field"),), (Text("the member"),)]
    assert "KeyError: 'text'" in str(missing) and "the text is empty" in str(empty)
    found = samples_in(path, {"kind": "text", "columns": {"text": "body"}, "only": {"body": "other"}})
    assert [one and one[0].parts for one in found] == [[], [], [], (Text("other"),), []]


def test_a_text_file_is_one_sample(tmp_path: Path, samples_in: Callable[..., Any]) -> None:
    text = "# Kapitel\n\nEin 傘.\n"
    (tmp_path / "a.b.md").write_text(text)
    sample = only(samples_in(tmp_path / "a.b.md", {"kind": "text"}, LIMITS))
    assert (sample.id, sample.parts) == ("s/a.b/0", (Text(text),))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (error,) = samples_in(tmp_path / "c.txt", {"kind": "text"}, LIMITS)
    assert "s/c/0" in str(error) and "not UTF-8" in str(error)
    (error,) = samples_in(tmp_path / "a.b.md", {"kind": "text"}, Limits(json_bytes=5))
    assert "over data.max_json_bytes" in str(error)


def test_all_of_a_text_is_bounded_and_checked(
    tmp_path: Path, write_shard: Callable[..., Path], samples_in: Callable[..., Any], picture: Callable[..., bytes]
) -> None:
    """Prompts as well: they come from the data, too."""
    samples = {
        "a": {"png": picture(), "json": {"caption": "x" * 600, "hint": "y" * 600}},
        "b": {"png": picture(), "json": {"caption": "x", "hint": "\ud83d"}},
        "c": {"png": picture(), "json": {"caption": "x", "hint": "\0"}},
        "d": {"png": picture(), "json": {"caption": "x" * 400, "hint": "y" * 600}},
    }
    path = write_shard(tmp_path / "x.tar", samples)
    found = samples_in(path, {"kind": "captions", "prompt": "{hint}"}, Limits(text_chars=1000))
    assert [isinstance(one, DataError) for one in found] == [True, True, True, False]
    assert "1,200 characters are more than data.max_text_chars = 1,000" in str(found[0])
    assert "U+D83D" in str(found[1]) and "U+0000" in str(found[2])


def test_what_is_quoted_in_an_error_is_short(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    huge = {f"{'k' * 1000}{n}": "v" for n in range(1000)}
    for members in ({"json": huge}, {"png": picture(), "json": {"caption": "x", **huge}}, {"json": b"[" * 10**6}):
        (found,) = read({"k": members}, prompt="{nothing}")
        assert isinstance(found, DataError) and len(str(found)) < 1200


COSMO = {"alternatives": "<EOC>", "end_of_chunk": "<|endofchunk|>"}
END = Special("<|endofchunk|>", True)


def test_captions_behind_a_tab(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    """One of all of them a visit, each a sample, or the first; without the setting, and without a tab, one text."""
    written = "a cat\tA cat on a mat.<EOC> A pet. <EOC>"
    data = {"k": {"png": picture(), "txt": written}, "plain": {"png": picture(1), "txt": "a dog<EOC>"}}
    several, plain = (sample for (sample,) in read(data, **COSMO))
    assert texts(several) == [["a cat"], ["A cat on a mat."], ["A pet."]] and several.parts[-1] == END
    assert plain.parts[1:] == (Text("a dog<EOC>"), END)
    drawn = [several.drawn(0, visit) for visit in range(3)]
    assert {parts[1].text for parts in drawn} == {"a cat", "A cat on a mat.", "A pet."}  # type: ignore[union-attr]
    assert all(parts[2:] == (END,) for parts in drawn)
    firsts = [sample.parts[1:] for (sample,) in read(data, captions="first", **COSMO)]
    assert firsts == [(Text("a cat"), END), (Text("a dog<EOC>"), END)]
    pieces, _ = read(data, captions="all", alternatives="<EOC>")
    assert [sample.parts[1:] for sample in pieces] == [(Text(one),) for one in ("a cat", "A cat on a mat.", "A pet.")]
    whole = only(read({"k": data["k"]}))
    assert whole.parts[1:] == (Text(written),)
    fields = {"png": picture(), "json": {"captions": ["one", "two\tthree"]}}
    assert texts(only(read({"k": fields}, captions="first", alternatives="<EOC>"))) == [["one"]]
    (error,) = read({"k": {"png": picture(), "txt": "\t<EOC>"}}, **COSMO)
    assert "caption 0 is empty" in str(error)


def test_a_blank_in_front_of_a_share_of_captions(read: Callable[..., Any], picture: Callable[..., bytes]) -> None:
    """Behind the prompt, drawn anew for each visit, and the same again."""
    sample = only(read({"k": {"png": picture(), "txt": "a cat"}}, prompt="Say: ", blank=0.25, **COSMO))
    plain, blank = (Text("a cat"), END), (Text(" "), Text("a cat"), END)
    seen = [sample.drawn(3, visit)[1:] for visit in range(400)]
    assert all(one[0] == Text("Say: ", False) and one[1:] in (plain, blank) for one in seen)
    assert 60 < sum(one[1:] == blank for one in seen) < 140
    assert seen == [sample.drawn(3, visit)[1:] for visit in range(400)]
    alone = only(read({"k": {"png": picture(), "txt": "a cat"}}, caption="", blank=1, **COSMO))
    assert len(alone.drawn(0, 0)) == 1, "nothing is put behind a picture alone"


def test_pairs_as_published(
    tmp_path: Path,
    picture: Callable[..., bytes],
    write_shard: Callable[..., Path],
    make_layout: Callable[..., Layout],
    pack: Callable[..., PackedDataset],
) -> None:
    """`<s>`, the picture, a blank or none, the caption and the token behind it, end of text; all text is learned."""
    layout = make_layout(tokens=1, after_media="")
    path = write_shard(tmp_path / "x.tar", {f"{n}": {"png": picture(n), "txt": "a cat\ta dog<EOC>"} for n in range(8)})
    source = {**COSMO, "blank": 0.5}
    one, two = (pack(path, tmp_path / name, layout, source, visits=2) for name in "ab")
    files = [{path.name: path.read_bytes() for path in sorted(dataset.folder.iterdir())} for dataset in (one, two)]
    assert files[0] == files[1]
    said = []
    for number in range(len(one)):
        packed = one.read(number)
        for segment in packed.segments:
            ids = packed.tokens[segment.start : segment.start + segment.length].tolist()
            said.append("".join(map(layout.tokenizer.token, ids)))
            assert segment.loss == ((segment.start + 2, segment.start + segment.length),)
    forms = {
        f"<s><|endoftext|>{blank}a {animal}<|endofchunk|><|im_end|>" for blank in ("", " ") for animal in ("cat", "dog")
    }
    assert len(said) == 16 and set(said) == forms and sum("cat" in one for one in said) == 8
