"""Conversations: every form and container says the same, and a packed batch learns exactly the answers."""

import base64
import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.config import load_config
from mm.data import builtin, tables
from mm.data.batch import collate
from mm.data.config import DataConfig
from mm.data.conversations import ConversationsConfig
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import PackedDataset, Reader
from mm.data.prepare import Workers, _job, pack_settings, pack_split
from mm.data.sample import Media, Sample, Text, Turn
from mm.data.scan import Scan, scan_shard
from mm.data.shards import Group, Placed, Tar
from mm.data.tables import JsonArray
from mm.errors import DataError

Row = dict[str, Any]
Found = list[list[Sample] | DataError]
LIMITS = Limits()
KIND = {"kind": "conversations"}


def said(found: list[Sample] | DataError) -> list[Any]:
    """Turns by role, text with what is learned of it, pictures by their bytes."""
    assert not isinstance(found, DataError), found
    (sample,) = found
    told: list[Any] = []
    for part in sample.parts:
        if isinstance(part, Turn):
            told.append(part.role)
        else:
            told.append((part.text, part.loss) if isinstance(part, Text) else (part.ext, part.read()))  # type: ignore[union-attr]
    return told


@pytest.fixture
def pictures(tmp_path: Path, picture: Callable[..., bytes]) -> dict[str, bytes]:
    """Files in the folder of the shards, and what is in them."""
    files = {"coco/1.png": picture(1), "coco/2.jpg": picture(2, "JPEG"), "3.WEBP": picture(3, "WEBP")}
    (tmp_path / "coco").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return files


def turns(*texts: str, system: str | None = None) -> list[Row]:
    roles = ["human", "gpt"] * len(texts)
    found = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return found if system is None else [{"from": "system", "value": system}, *found]


ROWS: list[Row] = [
    {"id": "a", "image": "coco/1.png", "conversations": turns("<image>\nWhat?", " A cat.\n", "Sure?", "Yes.")},
    {"id": "b", "image": ["coco/2.jpg", "3.WEBP"], "conversations": turns("One <image>, two\n<image>", "Two")},
    {"id": "c", "conversations": turns("Hello", "Hi", system=" Be brief. ")},
]


def expected(pictures: dict[str, bytes]) -> list[Any]:
    one, two, three = (pictures[name] for name in ("coco/1.png", "coco/2.jpg", "3.WEBP"))
    cat = ["user", ("png", one), ("\nWhat?", False), "assistant", ("A cat.", True)]
    return [
        [*cat, "user", ("Sure?", False), "assistant", ("Yes.", True)],
        ["user", ("One ", False), ("jpg", two), (", two\n", False), ("webp", three), "assistant", ("Two", True)],
        ["system", ("Be brief.", False), "user", ("Hello", False), "assistant", ("Hi", True)],
    ]


def write_json(path: Path, rows: list[Any], indent: int | None = None) -> Path:
    if ".jsonl" in path.name:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        data = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.json.gz", "x.jsonl.gz"])
def test_rows_of_json_with_pictures_in_a_folder(
    tmp_path: Path, samples_in: Callable[..., Found], pictures: dict[str, bytes], name: str
) -> None:
    found = samples_in(write_json(tmp_path / name, ROWS), KIND)
    assert [said(one) for one in found] == expected(pictures)
    assert [one[0].id for one in found if not isinstance(one, DataError)] == ["s/x/0", "s/x/1", "s/x/2"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write_json(elsewhere / name, ROWS)
    assert [said(one) for one in samples_in(path, {**KIND, "images": str(tmp_path)})] == expected(pictures)


def test_pictures_in_tars_columns_and_base64(
    tmp_path: Path, samples_in: Callable[..., Found], write_shard: Callable[..., Path], pictures: dict[str, bytes]
) -> None:
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for name, data in pictures.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write_json(elsewhere / "x.json", ROWS, indent=2)
    found = samples_in(path, {**KIND, "images": str(tmp_path / "pictures*.tar")})
    assert [said(one) for one in found] == expected(pictures)

    def column(row: Row) -> list[Row]:
        names = row.get("image", [])
        return [{"bytes": pictures[name], "path": name} for name in ([names] if isinstance(names, str) else names)]

    table = pa.Table.from_pylist([{"images": column(row), "conversations": row["conversations"]} for row in ROWS])
    pq.write_table(table, tmp_path / "x.parquet")
    assert [said(one) for one in samples_in(tmp_path / "x.parquet", KIND)] == expected(pictures)
    table = table.rename_columns(["photos", "conversations"])
    pq.write_table(table, tmp_path / "y.parquet")
    assert [said(one) for one in samples_in(tmp_path / "y.parquet", KIND)] == expected(pictures)

    encoded = [
        {**row, "image_base64": [base64.b64encode(one["bytes"]).decode() for one in column(row)]} for row in ROWS
    ]
    for row in encoded:
        row.pop("image", None)
    assert [said(one) for one in samples_in(write_json(tmp_path / "z.jsonl", encoded), KIND)] == expected(pictures)

    groups: dict[str, Row] = {}
    for row in ROWS:
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        inside = {f"{n}.{name.rpartition('.')[2]}": pictures[name] for n, name in enumerate(names)}
        groups[row["id"]] = {**inside, "json": {"image": list(inside), "conversations": row["conversations"]}}
    named = write_shard(tmp_path / "named.tar", groups)
    assert [said(one) for one in samples_in(named, KIND)] == expected(pictures)
    for members in groups.values():
        del members["json"]["image"]
    beside = write_shard(tmp_path / "beside.tar", groups)
    assert [said(one) for one in samples_in(beside, KIND)] == expected(pictures)


def test_messages(tmp_path: Path, samples_in: Callable[..., Found], pictures: dict[str, bytes]) -> None:
    """Plain content with marks; lists of text and pictures, by reference, in order, or in themselves."""
    url = "data:image/png;base64," + base64.b64encode(pictures["coco/1.png"]).decode()
    plain = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    text, answer = {"type": "text", "text": "\nWhat?"}, {"role": "assistant", "content": "A cat."}
    rows = [
        {"images": ["coco/1.png"], "messages": plain},
        {"images": ["coco/1.png"], "messages": [{"role": "user", "content": [{"type": "image"}, text]}, answer]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "coco/1.png"}, text]}, answer]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}, answer]},
    ]
    found = [said(one) for one in samples_in(write_json(tmp_path / "x.jsonl", rows), KIND)]
    one = ("png", pictures["coco/1.png"])
    assert found == [["user", one, ("\nWhat?", False), "assistant", ("A cat.", True)]] * 4


def test_an_index_of_files_with_a_row_each(
    tmp_path: Path, samples_in: Callable[..., Found], pictures: dict[str, bytes]
) -> None:
    (tmp_path / "split").mkdir()
    for number, row in enumerate(ROWS):
        (tmp_path / "split" / f"{number}.json").write_text(json.dumps(row))
    (tmp_path / "split" / "list.json").write_text("[]")
    names = ["0.json", "1.json", "2.json", "no.json", "../x.jsonl", "list.json"]
    index = write_json(tmp_path / "x.jsonl", [{"path": name, "length": 741} for name in names])
    *rows, missing, outside, no_object = samples_in(index, {**KIND, "rows": str(tmp_path / "split")})
    assert [said(one) for one in rows] == expected(pictures)
    assert re_found(missing, r"s/x/3 in .*split/no\.json: No such file")
    assert re_found(outside, r"'\.\./x\.jsonl' points outside .*split; refused")
    assert re_found(no_object, "holds a list, expected an object")


def re_found(found: Any, words: str) -> bool:
    assert isinstance(found, DataError), found
    with pytest.raises(DataError, match=words):
        raise found
    return "\n" not in str(found) and len(str(found)) < 800


def test_only(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    rows = [{"source": source, "conversations": turns("Hello", source)} for source in ("a", "b", "c")]
    path = write_json(tmp_path / "x.jsonl", [*rows, {"source": "d", "conversations": 5}])
    found = samples_in(path, {**KIND, "only": {"source": ["a", "c"]}})
    assert [len(one) for one in found if not isinstance(one, DataError)] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": turns("<image>\nWhat?", "A cat.")}, "1 <image> in its turns for 0 pictures"),
        ({"image": "a.png", "conversations": turns("What?", "A cat.")}, "0 <image> in its turns for 1 pictures"),
        ({"image": ["a.png"], "conversations": turns("<image><image>", "A")}, "2 <image> in its turns for 1 pictures"),
        ({"conversations": turns("What?", "A")[1:]}, "its first turn is the assistant's; expected a question"),
        ({"conversations": turns("What?")}, "its last turn is no answer"),
        ({"conversations": turns("What?", "A", "And?")}, "its last turn is no answer"),
        ({"conversations": turns(system="Be brief.")}, "its last turn is no answer"),
        ({"conversations": [*turns("What?"), *turns("Well?", "A")]}, "turn 1 is the user's; expected the assistant's"),
        ({"conversations": [*turns("What?", "A"), *turns(system="x")]}, "turn 2 is the system's; expected the user's"),
        ({"conversations": turns("What?", " \n")}, "turn 1, the assistant's, is empty"),
        ({"conversations": turns("", "A")}, "turn 0, the user's, is empty"),
        ({"conversations": [{"from": "Bob", "value": "x"}]}, "turn 0 is from 'Bob'; expected human, user, gpt"),
        ({"conversations": []}, r"neither `conversations` nor `messages` in its row; found \['conversations'\]"),
        ({"text": "x"}, r"neither .* found \['text'\]"),
        ({"conversations": "abc"}, "neither `conversations` nor `messages`"),
        ({"conversations": ["abc"]}, "not laid out as a conversation"),
        ({"conversations": [{"from": "human"}]}, "not laid out as a conversation"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "not laid out as a conversation"),
        ({"messages": [{"role": "user", "content": 5}, *turns("", "A")[1:]]}, "not laid out as a conversation"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}, *turns("", "A")[1:]]},
            "content of type 'video'",
        ),
        ({"image": 5, "conversations": turns("<image>", "A")}, "not laid out as a conversation"),
        ({"image": "no.png", "conversations": turns("<image>", "A")}, r"no\.png: No such file"),
        ({"image": "a\0.png", "conversations": turns("<image>", "A")}, "points outside"),
        ({"image": "x" * 10_000, "conversations": turns("<image>", "A")}, "File name too long"),
        ({"image": "coco", "conversations": turns("<image>", "A")}, "coco is not a file"),
        ({"image": "x.jsonl", "conversations": turns("<image>", "A")}, r"'x\.jsonl' is no picture; expected jpg"),
        ({"image": "/etc/passwd", "conversations": turns("<image>", "A")}, "'/etc/passwd' points outside .*; refused"),
        ({"image": "coco/../../a.png", "conversations": turns("<image>", "A")}, "points outside"),
        ({"image": "..\\a.png", "conversations": turns("<image>", "A")}, "points outside"),
        ({"image": "https://host/a.png", "conversations": turns("<image>", "A")}, "is a URL, and none is fetched"),
        ({"image_base64": "%%%", "conversations": turns("<image>", "A")}, "base64 cannot be read"),
        ({"image_base64": "R0lGODlh", "conversations": turns("<image>", "A")}, "neither jpg, png nor webp"),
        ({"conversations": turns("What?", "\ud83d")}, r"U\+D83D"),
    ],
)
def test_what_is_no_conversation_is_named(
    tmp_path: Path, samples_in: Callable[..., Found], pictures: dict[str, bytes], row: Row, words: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = samples_in(path, KIND)
    assert re_found(found, words) and str(found).startswith("s/x/0 in ")


def test_what_the_folder_links_to_is_part_of_it_and_devices_are_not(
    tmp_path: Path, samples_in: Callable[..., Found], pictures: dict[str, bytes]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "coco").symlink_to(tmp_path / "coco")
    os.mkfifo(folder / "pipe.png")
    rows = [{"image": name, "conversations": turns("<image>", "A")} for name in ("coco/1.png", "pipe.png")]
    linked, pipe = samples_in(write_json(folder / "x.jsonl", rows), KIND)
    assert said(linked)[1] == ("png", pictures["coco/1.png"])
    assert re_found(pipe, r"pipe\.png is not a file")


def test_a_remote_shard_needs_a_folder(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    source = ConversationsConfig(path="https://host/x.jsonl", name="s").build("")
    group = Group(JsonArray(str(write_json(tmp_path / "x.json", [])), LIMITS), "0", {}, ROWS[0])
    with pytest.raises(DataError, match="say where with `images`"):
        source.samples(group, LIMITS)


def test_tars_with_pictures_are_plain_and_whole(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    path = write_json(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(DataError, match="does not exist"):
        samples_in(path, {**KIND, "images": str(tmp_path / "no.tar")})
    (tmp_path / "a.tar").write_bytes(b"x" * 1024)
    with pytest.raises(DataError, match="not a whole tar"):
        samples_in(path, {**KIND, "images": str(tmp_path / "a.tar")})
    (tmp_path / "b.tar").write_bytes(gzip.compress(bytes(10240)))
    with pytest.raises(DataError, match="compressed"):
        samples_in(path, {**KIND, "images": str(tmp_path / "b.tar")})
    with tarfile.open(tmp_path / "c.tar", "w"):
        pass
    found, *_ = samples_in(path, {**KIND, "images": str(tmp_path / "c.tar")})
    assert re_found(found, r"its picture 'coco/1\.png' is not in .*c\.tar")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(OBJECTS, max_size=6),
    indent=st.none() | st.integers(0, 3),
    chunk=st.integers(1, 50),
    ascii=st.booleans(),
)
def test_an_array_is_read_a_row_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row], indent: int | None, chunk: int, ascii: bool
) -> None:
    """Whatever its layout and wherever a read ends; cut off anywhere, the rows before are given and the end is told."""
    monkeypatch.setattr(tables, "CHUNK", chunk)
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode()
    one_by_one = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows).encode()
    for data in (array, b"\xef\xbb\xbf" + array, one_by_one):
        assert [fields(one) for one in read(tmp_path / "x.json", data)] == rows
    *found, end = read(tmp_path / "x.json", array[: len(array) // 2]) if len(array) > 3 else [DataError("truncated")]
    assert [fields(one) for one in found] == rows[: len(found)]
    assert isinstance(end, DataError)


def read(path: Path, data: bytes, limits: Limits = LIMITS) -> list[Group | DataError]:
    path.write_bytes(data)
    with JsonArray(str(path), limits) as shard:
        return list(shard.groups())


def fields(group: Group | DataError) -> Any:
    assert isinstance(group, Group), group
    return group.fields


@pytest.mark.parametrize(
    ("data", "whole", "words"),
    [
        (b'[{"a": 1}, {"b" 2}]', 1, r"x\.json: damaged after 1 rows \(Expecting ':' delimiter\)"),
        (b'[{"a": 1}, 5, {"b": 2}]', 2, "row 2 is a int, expected an object"),
        (b'[{"a": 1}', 1, r"after 1 rows \(truncated: its array does not end\)"),
        (b'[{"a": "\xff"}]', 0, r"after 0 rows \(not UTF-8\)"),
        (b"[" * 1000, 0, "row 1 has over data.max_json_bytes"),
        (b'[{"a": "' + b"x" * 300 + b'"}]', 0, "row 1 has over data.max_json_bytes = 200 bytes"),
    ],
)
def test_damage_in_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, whole: int, words: str
) -> None:
    monkeypatch.setattr(tables, "CHUNK", 16)
    found = read(tmp_path / "x.json", data, replace(LIMITS, json_bytes=200))
    (error,) = [one for one in found if isinstance(one, DataError)]
    assert len(found) == whole + 1 and re_found(error, words)
    (error,) = read(tmp_path / "x.json", b"[" * 100_000)
    assert re_found(error, "after 0 rows")
    assert read(tmp_path / "x.json", b"") == read(tmp_path / "x.json", b" [ ] ") == []


@pytest.fixture
def emoji(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder of pictures and `x.jsonl` with a conversation about each; the answers by the ids of samples."""
    rows, answers = [], {}
    (tmp_path / "images").mkdir()
    with Tar(str(builtin.folder("emoji") / "validation-000.tar.gz")) as tar:
        for number, group in enumerate(tar.groups()):
            if number == 40:
                break
            assert isinstance(group, Group)
            about = json.loads(group.read("json"))
            ext = next(ext for ext in group.members if ext in ("png", "webp", "jpg"))
            name = f"{number}.{ext}"
            (tmp_path / "images" / name).write_bytes(group.read(ext))
            caption = about["captions"][0]["text"]
            said = turns("<image>\nWhat is this?", caption, "Which number?", f"Number {number}.")
            rows.append({"id": f"emoji-{number}", "image": f"images/{name}", "conversations": said})
            answers[f"chats/x/{number}"] = [caption, f"Number {number}."]
    rows.append({"id": "text", "conversations": turns("Hello", "Hi")})
    answers["chats/x/40"] = ["Hi"]
    write_json(tmp_path / "x.jsonl", rows)
    return tmp_path, answers


@pytest.mark.parametrize("workers", [Workers(), Workers(2)])
def test_from_a_folder_of_pictures_to_a_batch_that_learns_the_answers(
    emoji: tuple[Path, dict[str, list[str]]],
    make_layout: Callable[..., Layout],
    pack: Callable[..., PackedDataset],
    workers: Workers,
) -> None:
    folder, answers = emoji
    layout = make_layout()
    source = {"kind": "conversations", "name": "chats"}
    packed = pack(folder / "x.jsonl", folder / "packed", layout, source, workers=workers, context_length=512)
    tokenizer, end = layout.tokenizer, layout.tokenizer.id("<|im_end|>")
    seen = {}
    reader = Reader(packed.folder)
    for number in range(len(packed)):
        found = reader.read(packed.place(number))
        batch = collate([found], layout, row_length=512)
        ids, labels = batch.input_ids[0], batch.labels[0]
        for segment in found.segments:
            span = slice(segment.start, segment.start + segment.length)
            targets = labels[span][labels[span] != -100].tolist()
            spelt = [id for answer in answers[segment.id] for id in (*tokenizer.encode(answer), end)]
            assert targets == spelt
            # A target stands one position before the token.
            at = (labels[span] != -100).nonzero().flatten() + segment.start
            assert ids[at + 1].tolist() == targets
            seen[segment.id] = targets
        for one in found.media:
            id = found.segments[one.segment].id
            row = int(id.rpartition("/")[2])
            assert one.data == (folder / "images" / f"{row}.{one.ext}").read_bytes()
    assert seen.keys() == answers.keys()


def test_pictures_are_not_copied_to_be_packed(
    emoji: tuple[Path, dict[str, list[str]]], make_layout: Callable[..., Layout], tmp_path: Path
) -> None:
    folder, _ = emoji
    config = DataConfig.model_validate(
        {"sources": [{"kind": "conversations", "path": str(folder / "x.jsonl")}], "context_length": 512}
    )
    source = config.sources[0].build("")
    out = tmp_path / "0.arrow"
    scan_shard(out, source, folder / "x.jsonl", "x", False, make_layout(), pack_settings(config, "train", 0))
    assert out.with_suffix(".media").stat().st_size == 0
    media = [one for row in Scan(out).segments["media"].to_pylist() for one in row]
    assert len(media) == 40 and {one["copied"] for one in media} == {False}
    one = media[0]
    placed = Placed(one["file"], one["offset"], one["size"], one["modified"])
    assert placed.read() == Path(one["file"]).read_bytes() == placed.open().read()
    os.utime(one["file"], ns=(0, 0))
    with pytest.raises(DataError, match="was changed after it had been scanned"):
        placed.read()
    Path(one["file"]).unlink()
    with pytest.raises(DataError, match="is no longer there"):
        placed.read()


def test_long_conversations_are_split_or_dropped_and_counted(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    pack: Callable[..., PackedDataset],
    picture: Callable[..., bytes],
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    said = [text for n in range(12) for text in (f"Question {n}?", f"Answer {n}.")]
    said[0] = f"<image>\n{said[0]}"
    rows = [{"image": "a.png", "conversations": turns(*said)}, {"conversations": turns("x" * 900, "y")}]
    path = write_json(tmp_path / "x.json", rows)
    source = {"kind": "conversations", "name": "chats"}
    packed = pack(path, tmp_path / "packed", make_layout(system=""), source, too_long="split", context_length=128)
    ledger = packed.about["ledger"]["chats"]
    assert ledger["samples"] == 2 and ledger["too_long"] == 1
    assert ledger["segments"] == ledger["pieces"] + 1 == ledger["image"] > 2
    dropped = pack(path, tmp_path / "dropped", make_layout(system=""), source, too_long="drop", context_length=700)
    assert dropped.about["ledger"]["chats"]["too_long"] == 1


def test_any_json_is_a_conversation_or_one_clear_error(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    """What hypothesis makes of the keys that mean something."""
    source = ConversationsConfig(path=str(tmp_path / "x.json"), name="s").build("")
    shard = JsonArray(str(write_json(tmp_path / "x.json", [])), LIMITS)
    names = "conversations messages image images image_base64 path from value role content type text image_url url x"
    keys = st.sampled_from(names.split())
    words = st.sampled_from(["<image>", "human", "gpt", "user", "system", "text", "a.png", "", "..", "data:,AA", "\0"])
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | words,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=20,
    )

    @settings(max_examples=300, deadline=None)
    @given(row=st.dictionaries(keys, values, max_size=4))
    def check(row: Row) -> None:
        try:
            (sample,) = source.samples(Group(shard, "k", {"a.png": picture()}, row), LIMITS)
        except DataError as error:
            assert str(error).startswith("s/x/k in ") and "\n" not in str(error)
        else:
            assert all(isinstance(part, Text | Media | Turn) for part in sample.parts)

    check()


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text().partition("## Conversations\n")[2]
    (write, *_), (config, *_) = (re.findall(f"```{what}\n(.*?)```", page, re.S) for what in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    exec(write, {})
    Path("chats.yaml").write_text(config)
    run = load_config(Path("chats.yaml"))
    packed = pack_split(run.data, "train", run.model.layout(), 0, tmp_path / "packed")
    assert packed is not None
    found = PackedDataset(packed)
    pack = Reader(packed).read(found.place(0))
    learned = [layout.tokenizer.decode(pack.tokens[a:b].tolist()) for one in pack.segments for a, b in one.loss]
    assert sorted(learned) == ["It is blue.", "It is green.", "It is red."]


def test_names_of_pictures_tell_them_apart(
    tmp_path: Path, samples_in: Callable[..., Found], write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", {"a": {"png": picture(number)}})
    path = write_json(tmp_path / "x.jsonl", [{"image": "a.png", "conversations": turns("<image>What?", "This.")}])
    with pytest.raises(DataError, match=r"1\.tar: a\.png is in .*0\.tar, too"):
        samples_in(path, {**KIND, "images": str(tmp_path / "*.tar")})


def test_messages_bring_the_columns_of_a_table(
    tmp_path: Path, samples_in: Callable[..., Found], picture: Callable[..., bytes]
) -> None:
    def content(text: str, image: Any = None) -> Row:
        return {"type": "text" if image is None else "image", "text": text, "image": image}

    shown = {"bytes": picture(), "path": "a.png"}
    said_first = [content("", shown), content("What?")]
    messages = [{"role": "user", "content": said_first}, {"role": "assistant", "content": [content("A cat.")]}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "x.parquet")
    (found,) = samples_in(tmp_path / "x.parquet", KIND)
    assert said(found) == ["user", ("png", picture()), ("What?", False), "assistant", ("A cat.", True)]


def test_what_was_wrong_with_pictures_can_be_mended(
    emoji: tuple[Path, dict[str, list[str]]], make_layout: Callable[..., Layout], pack: Callable[..., PackedDataset]
) -> None:
    """Missing when they were scanned, or changed between scan and packs: the same command packs the set."""
    folder, answers = emoji
    source, settings = {"kind": "conversations", "name": "chats"}, {"context_length": 512, "max_bad_fraction": 0.01}
    some = sorted((folder / "images").iterdir())[:5]
    kept = {path: path.read_bytes() for path in some}
    for path in some:
        path.unlink()
    with pytest.raises(DataError, match="5 of 41 samples are unusable"):
        pack(folder / "x.jsonl", folder / "packed", make_layout(), source, **settings)
    for path, data in kept.items():
        path.write_bytes(data)
    config = DataConfig.model_validate({"sources": [{**source, "path": str(folder / "x.jsonl")}], **settings})
    job = _job(config, "train", make_layout(), 0, folder / "packed")
    (job.work / "scans").mkdir(parents=True, exist_ok=True)
    job.scan(0)
    os.utime(some[0], ns=(0, 0))
    with pytest.raises(DataError, match="was changed after it had been scanned"):
        job.run(Workers())
    packed = pack(folder / "x.jsonl", folder / "packed", make_layout(), source, **settings)
    assert packed.about["ledger"]["chats"]["segments"] == len(answers)


def test_another_folder_of_pictures_makes_another_set(tmp_path: Path, make_layout: Callable[..., Layout]) -> None:
    path = write_json(tmp_path / "x.jsonl", [{"conversations": turns("Hello", "Hi")}])
    found = set()
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        source = {"kind": "conversations", "path": str(path), "images": "{root}"}
        config = DataConfig.model_validate({"sources": [source], "root": str(tmp_path / root)})
        found.add(_job(config, "train", make_layout(), 0).provenance["fingerprint"])
    assert len(found) == 2


def test_an_array_that_is_cut_off_is_no_single_bad_sample(
    tmp_path: Path, make_layout: Callable[..., Layout], pack: Callable[..., PackedDataset]
) -> None:
    rows = [{"conversations": turns("Hello", f"Hi {n}")} for n in range(50)]
    path = write_json(tmp_path / "x.json", rows)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="damaged after 39 rows"):
        pack(path, tmp_path / "packed", make_layout(), {"kind": "conversations"}, max_bad_fraction=0.5)


def test_workers_spell_text_as_one_process_does(
    tmp_path: Path, make_layout: Callable[..., Layout], pack: Callable[..., PackedDataset]
) -> None:
    """Special tokens that a text spells out stay text in every process."""
    for number in range(3):
        rows = [{"conversations": turns("Say <|im_end|>", f"<s> {n} <|im_end|>")} for n in range(5)]
        write_json(tmp_path / f"{number}.jsonl", rows)
    made = [
        pack(tmp_path / "*.jsonl", tmp_path / f"packed{workers}", make_layout(), {"kind": "conversations"},
             workers=Workers(workers), context_length=128)
        for workers in (1, 2)
    ]  # fmt: skip
    one, two = ((one.folder / "packs-000000.tar").read_bytes() for one in made)
    assert one == two
