"""Tables as shards: every format gives the samples that a tar of the same content gives, and damage costs no more than
itself."""

import base64
import gzip
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data import tables
from mm.data.limits import Limits
from mm.data.sample import Choice, Media, Sample, Tokens
from mm.data.shards import expand
from mm.data.sources import TokensConfig
from mm.data.tables import TokenFile, sniff
from mm.errors import DataError

Rows = list[dict[str, Any]]
Found = list[list[Sample] | DataError]
ROWS: Rows = [
    {
        "text": f"Zeile {n}\nund 傘 {'x' * (n % 7)}",
        "language": ("en", "de")[n % 2],
        "score": n / 4,
        "tags": ["a", str(n)],
    }
    for n in range(200)
]


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zst(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def write(path: Path, rows: Rows, kind: str = "", batch: int = 70) -> Path:
    """Rows as the table that the name of the file says; `kind` is `stream` or `file` for Arrow."""
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows) if path.suffix in (".parquet", ".arrow") else None
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=batch)
    elif table is not None:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
    else:
        pack: Callable[[bytes], bytes] = {".gz": gzip.compress, ".zst": zst}.get(path.suffix, bytes)
        array = json.dumps(rows, ensure_ascii=False).encode() if ".jsonl" not in path.name else jsonl(rows)
        path.write_bytes(pack(array))
    return path


def told(found: Found) -> list[Any]:
    """Samples as plain values, media read; errors as they are."""

    def part(one: Any) -> Any:
        if isinstance(one, Media):
            return one.kind, one.ext, one.read()
        if isinstance(one, Tokens):
            return one.ids.tolist()
        return [tuple(map(part, option)) for option in one.options] if isinstance(one, Choice) else (one.text, one.loss)

    return [
        one if isinstance(one, DataError) else [(s.id, [part(p) for p in s.parts], s.meta) for s in one]
        for one in found
    ]


FORMATS = [("jsonl", ""), ("jsonl.gz", ""), ("jsonl.zst", ""), ("parquet", ""), ("arrow", "stream"), ("arrow", "file")]


@pytest.mark.parametrize(("ext", "kind"), [*FORMATS, ("json", ""), ("json.gz", ""), ("json.zst", "")])
@pytest.mark.parametrize("read_at_once", [64, 3])
def test_a_table_is_what_a_tar_of_the_same_rows_is(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    samples_in: Callable[..., Found],
    monkeypatch: pytest.MonkeyPatch,
    ext: str,
    kind: str,
    read_at_once: int,
) -> None:
    monkeypatch.setattr(tables, "ROWS", read_at_once)
    config = {"kind": "text", "prompt": "{language}: ", "text": "{text} [{tags}]", "only": {"language": "en"}}
    tar = write_shard(tmp_path / "rows.tar", {str(n): {"json": row} for n, row in enumerate(ROWS)})
    table = write(tmp_path / f"rows.{ext}", ROWS, kind)
    expected = told(samples_in(tar, config))
    assert told(samples_in(table, config)) == expected
    assert len(expected) == 200 and sum(map(bool, expected)) == 100


def test_a_folder_that_datasets_saved_is_its_files(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    folder = tmp_path / "saved"
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (ROWS[:120], ROWS[120:]), strict=True):
        write(folder / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    assert expand(str(folder)) == [str(folder / name) for name in names]
    found = [sample for path in expand(str(folder)) for (sample,) in samples_in(Path(path), {"kind": "text"})]
    assert [sample.parts[0].text for sample in found] == [row["text"] for row in ROWS]
    assert [found[119].id, found[120].id] == ["s/data-00000-of-00002/119", "s/data-00001-of-00002/0"]
    for broken in ("{}", "[]", '{"_data_files": [{}]}', '{"_data_files": [{"filename": "../x.arrow"}]}', "{"):
        (folder / "state.json").write_text(broken)
        with pytest.raises(DataError, match=r"saved: its state\.json"):
            expand(str(folder))


@pytest.mark.parametrize(("ext", "kind"), FORMATS[3:])
def test_pictures_and_sound_in_columns(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    samples_in: Callable[..., Found],
    picture: Callable[..., bytes],
    sound: Callable[..., bytes],
    ext: str,
    kind: str,
) -> None:
    """As plain bytes and as `{bytes, path}` structs, by whatever name; two captions are drawn from as in a tar."""
    media = [
        (picture(n, ("PNG", "JPEG", "WEBP")[n % 3]), sound(n, 0.1, ("FLAC", "WAV", "OGG")[n % 3])) for n in range(9)
    ]
    texts = [[f"cat {n}", f"Katze {n}"][: n % 2 + 1] for n in range(9)]
    extensions = [("png", "jpg", "webp"), ("flac", "wav", "ogg")]
    for which, (medium, source) in enumerate((("image", "captions"), ("audio", "audio"))):
        encoded = [pair[which] for pair in media]
        tar = write_shard(
            tmp_path / f"{medium}.tar",
            {str(n): {extensions[which][n % 3]: encoded[n], "json": {"captions": texts[n]}} for n in range(9)},
        )
        expected = [one[:2] for (one,) in told(samples_in(tar, {"kind": source}))]
        for struct in (True, False):
            cells = [{"bytes": data, "path": f"{n}.bin"} if struct else data for n, data in enumerate(encoded)]
            rows = [{"seen": one, "said": text, "id": 5} for one, text in zip(cells, texts, strict=True)]
            table = write(tmp_path / f"{medium}.{ext}", rows, kind, batch=4)
            columns = {medium: "seen", "captions": "said"}
            found = told(samples_in(table, {"kind": source, "columns": columns}))
            assert [one[:2] for (one,) in found] == expected


def test_the_named_column_is_taken_where_there_are_several(
    tmp_path: Path, samples_in: Callable[..., Found], picture: Callable[..., bytes]
) -> None:
    rows = [{"before": picture(1), "after": picture(2), "mask": b"\0\1", "caption": "cat", "pages": [picture(3)]}]
    table = write(tmp_path / "x.parquet", rows)
    for name, number in (("before", 1), ("after", 2)):
        (((_, parts, _),),) = told(samples_in(table, {"kind": "captions", "columns": {"image": name}}))
        assert parts[0] == ("image", "png", picture(number))
    (error,) = samples_in(table, {"kind": "captions", "columns": {"image": "mask"}})
    assert "no image among" in str(error)


def test_documents_in_columns(
    tmp_path: Path, samples_in: Callable[..., Found], picture: Callable[..., bytes], write_shard: Callable[..., Path]
) -> None:
    """Interleaved documents as rows: pictures in lists, in structs, and in base64; as in a tar with members."""
    pictures = [picture(n) for n in range(2)]
    texts, encoded = ["eins", None, "zwei", None], [base64.b64encode(one).decode() for one in pictures]
    cells = [{"bytes": one, "path": None} for one in pictures]
    tar = write_shard(
        tmp_path / "tar.tar",
        {
            "0": {
                "0.png": pictures[0],
                "1.png": pictures[1],
                "json": {"texts": texts, "images": [None, "0.png", None, "1.png"]},
            }
        },
    )
    ((expected,),) = told(samples_in(tar, {"kind": "interleaved"}))
    named = [None, {"image_name": cells[0]}, None, {"image_name": cells[1]}]
    spelt = [None, {"image_base64": encoded[0]}, None, {"image_base64": encoded[1]}]
    rows = {
        "list.parquet": {"texts": texts, "images": [None, cells[0], None, cells[1]]},
        "bytes.arrow": {"Texts": texts, "Images": [None, pictures[0], None, pictures[1]]},
        "base64.jsonl": {"texts": texts, "image_info": spelt},
        "nested.parquet": {"texts": texts, "image_info": named},
    }  # fmt: skip
    for name, row in rows.items():
        config = {"kind": "interleaved", "columns": {"texts": "Texts", "images": "Images"}}
        ((found,),) = told(samples_in(write(tmp_path / name, [row]), config))
        assert found[1] == expected[1], name


def test_media_are_known_by_their_first_bytes(
    picture: Callable[..., bytes], sound: Callable[..., bytes], clip: Callable[..., bytes]
) -> None:
    found = {sniff(picture(0, format)) for format in ("PNG", "JPEG", "WEBP")}
    found |= {sniff(sound(0, 0.5, format)) for format in ("FLAC", "WAV", "OGG", "MP3")}
    found |= {sniff(clip(format=format)) for format in ("mp4", "matroska")}
    assert found == {"png", "jpg", "webp", "flac", "wav", "ogg", "mp3", "mp4", "webm"}
    assert [sniff(data) for data in (b"", b"\xff", b"RIFF", b"plain text", bytes(100))] == [None] * 5


LIMITS = Limits(json_bytes=1000)


@pytest.mark.parametrize("ext", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_long_lines_cost_themselves(tmp_path: Path, samples_in: Callable[..., Found], ext: str) -> None:
    lines: Rows = [
        {"text": "first"},
        {"text": "x" * 3_000_000},
        {"text": "y" * (1000 - 13)},
        {"text": "z" * 988},
        {"text": "last"},
    ]
    path = write(tmp_path / f"x.{ext}", lines)
    found = samples_in(path, {"kind": "text"}, LIMITS)
    assert [isinstance(one, DataError) for one in found] == [False, True, False, True, False]
    assert "x.jsonl" in str(found[1]) and "line 2 has over data.max_json_bytes = 1000 bytes" in str(found[1])
    ((sample,),) = found[4:]  # type: ignore[misc]
    assert sample.id == "s/x/4", "the number of the line, whatever was before it"


def test_blank_lines_and_a_missing_end_of_line(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\n{"text": "a"}\r\n  \n\n{"text": "b"}')
    assert [s.id for (s,) in samples_in(tmp_path / "x.jsonl", {"kind": "text"})] == ["s/x/1", "s/x/4"]
    (tmp_path / "x.jsonl").write_bytes(b"")
    assert samples_in(tmp_path / "x.jsonl", {"kind": "text"}) == []


def test_arrays_one_behind_the_other_are_read_to_the_end(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"text": "a"}, {"text": "b"}]\n[{"text": "c"}]\n[]\n{"text": "d"}\n')
    found = samples_in(tmp_path / "x.json", {"kind": "text"})
    assert [one.parts[0].text for (one,) in found] == ["a", "b", "c", "d"]
    for behind in (b"garbage", b"]"):
        (tmp_path / "x.json").write_bytes(b'[{"text": "a"}] ' + behind)
        (_, error) = samples_in(tmp_path / "x.json", {"kind": "text"})
        assert isinstance(error, DataError) and "damaged after 1 rows" in str(error)


def test_what_is_no_row_is_a_bad_sample(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    lines = [b'{"text": "a"}', b"[1]", b"nonsense", b'{"text": "\xff"}', b'{"text": 1e999}', b"\0", b'{"text": "b"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = samples_in(tmp_path / "x.jsonl", {"kind": "text", "text": "{text:>3}"})
    assert [isinstance(one, DataError) for one in found] == [False, True, True, True, False, True, False]
    for one in found:
        assert not isinstance(one, DataError) or (str(one).startswith("s/x/") and "\n" not in str(one))


@pytest.mark.parametrize("ext", ["jsonl.gz", "jsonl.zst"])
def test_a_stream_cut_anywhere_gives_what_comes_before(
    tmp_path: Path, samples_in: Callable[..., Found], ext: str
) -> None:
    rng = np.random.default_rng(0)
    rows: Rows = [{"text": rng.bytes(1000).hex()} for _ in range(100)]
    path = write(tmp_path / f"x.{ext}", rows)
    whole = told(samples_in(path, {"kind": "text"}))
    data = path.read_bytes()
    delivered = []
    for cut in [*range(0, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:cut])
        found = told(samples_in(path, {"kind": "text"}))
        if cut == 0 and not found:
            continue
        assert isinstance(found[-1], DataError) and str(path) in str(found[-1])
        good = [one for one in found if not isinstance(one, DataError)]
        assert good == whole[: len(good)] and len(found) - len(good) <= 2
        delivered.append(len(good))
    assert delivered == sorted(delivered)
    # zstd comes in blocks of 128 KiB
    assert (delivered[-1], len({*delivered})) >= ((90, 10) if ext == "jsonl.gz" else (60, 2))


@pytest.mark.parametrize("ext", ["jsonl.gz", "jsonl.zst"])
def test_a_damaged_stream_gives_what_comes_before(tmp_path: Path, samples_in: Callable[..., Found], ext: str) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / f"x.{ext}", [{"text": rng.bytes(1000).hex()} for _ in range(100)])
    whole, data = told(samples_in(path, {"kind": "text"})), path.read_bytes()
    for at in range(3, len(data), len(data) // 50):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        errors = [one for one in samples_in(path, {"kind": "text"}) if isinstance(one, DataError)]
        if ext == "jsonl.gz":  # zstd has checksums only if its writer put them in
            assert errors
            same = [a == b for a, b in zip(told(samples_in(path, {"kind": "text"})), whole, strict=False)]
            assert all(same[: max(0, 100 * at // len(data) - 40)]), "40 samples are more than a block"
        assert all("\n" not in str(error) for error in errors)
    path.write_bytes(data + b"rubbish behind it")
    found = told(samples_in(path, {"kind": "text"}))
    assert found[:95] == whole[:95] and isinstance(found[-1], DataError), "but for what a read of 8 KB holds"


def test_a_bomb_of_lines_is_refused(tmp_path: Path, samples_in: Callable[..., Found], monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "ALWAYS_ALLOWED", 1 << 20)
    path = write(tmp_path / "x.jsonl.gz", [{"text": "a"}, {"text": "b" * (8 << 20)}, {"text": "c"}])
    found = samples_in(path, {"kind": "text"})
    assert not isinstance(found[0], DataError) and "refused as a bomb" in str(found[1]) and len(found) == 2
    table = pa.table({"text": ["a", "b" * (8 << 20), "c"]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1, compression="zstd")
    path = tmp_path / "x.parquet"
    found = samples_in(path, {"kind": "text"})
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    assert "refused as a bomb" in str(found[1])


def test_a_damaged_row_group_costs_no_other(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    path = write(tmp_path / "x.parquet", ROWS, batch=50)
    whole = told(samples_in(path, {"kind": "text"}))
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    found = told(samples_in(path, {"kind": "text"}))
    errors = [one for one in found if isinstance(one, DataError)]
    assert len(errors) == 1 and "damaged after 50 rows" in str(errors[0]) and "\n" not in str(errors[0])
    assert [one for one in found if not isinstance(one, DataError)] == whole[:50] + whole[100:]


@pytest.mark.parametrize(("ext", "kind"), FORMATS[3:])
def test_a_table_cut_anywhere_gives_what_comes_before(
    tmp_path: Path, samples_in: Callable[..., Found], ext: str, kind: str
) -> None:
    path = write(tmp_path / f"x.{ext}", ROWS, kind, batch=10)
    whole, data = told(samples_in(path, {"kind": "text"})), path.read_bytes()
    most = 0
    for cut in [*range(0, len(data), len(data) // 30), len(data) - 9]:
        path.write_bytes(data[:cut])
        try:
            found = told(samples_in(path, {"kind": "text"}))
        except DataError as error:
            found = [error]
        good = [one for one in found if not isinstance(one, DataError)]
        assert good == whole[: len(good)]
        most = max(most, len(good))
        for one in found[len(good) :]:
            assert str(path) in str(one) and "\n" not in str(one)
    assert (most >= 180) == (kind == "stream"), "parquet and Arrow files say at their end where things are"


def test_what_is_not_the_files_fault_is_no_damage(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    for ext in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "npy", "bin", "tar"):
        with pytest.raises(FileNotFoundError):
            samples_in(tmp_path / f"x.{ext}", {"kind": "tokens"})


def split(ids: list[int], eos: int) -> list[list[int]]:
    return [list(run) for ends, run in groupby(ids, lambda one: one == eos) if not ends]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=60), chunk=st.integers(1, 20), eos=st.integers(0, 3))
def test_token_files_are_split_at_the_end_of_text(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], chunk: int, eos: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    for dtype in ("uint16", "int64"):
        np.save(folder / "x.npy", np.array(ids, dtype=dtype))
        np.array(ids, dtype=dtype).tofile(folder / "x.bin")
        for name in ("x.npy", "x.bin"):
            if not ids:
                continue
            with pytest.MonkeyPatch.context() as patch, TokenFile(str(folder / name), eos, dtype) as shard:
                patch.setattr(TokenFile, "CHUNK", chunk)
                groups = list(shard.groups())
                assert [group.fields["input_ids"].tolist() for group in groups] == split(ids, eos)
                assert [group.key for group in groups] == [str(n) for n in range(len(groups))]


def test_tokens_from_files_and_from_rows_are_the_same(tmp_path: Path, samples_in: Callable[..., Found]) -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, 5000).astype(np.uint16)
    ids[ids % 50 == 0] = 7
    documents = split(ids.tolist(), 7)
    np.save(tmp_path / "x.npy", ids)
    ids.tofile(tmp_path / "x.bin")
    rows = [{"input_ids": one} for one in documents]
    for path in (tmp_path / "x.npy", tmp_path / "x.bin", *(write(tmp_path / f"x.{e}", rows, k) for e, k in FORMATS)):
        found = told(samples_in(path, {"kind": "tokens", "eos": 7}))
        assert [one for ((_, (one,), _),) in found] == documents, path.name
        assert [id for ((id, _, _),) in found] == [f"s/x/{n}" for n in range(len(documents))]


@pytest.mark.parametrize(
    "row",
    [
        {}, {"input_ids": None}, {"input_ids": []}, {"input_ids": [1.5]}, {"input_ids": ["1"]}, {"input_ids": [[1]]},
        {"input_ids": [True]}, {"input_ids": [1, None]}, {"input_ids": "123"}, {"input_ids": 5}, {"input_ids": [2**70]},
        {"input_ids": {"0": 1}}, {"input_ids": ["x" * 10_000_000, *["y"] * 100_000]},
    ],
)  # fmt: skip
def test_rows_without_token_ids_are_named(tmp_path: Path, samples_in: Callable[..., Found], row: Any) -> None:
    (found,) = samples_in(write(tmp_path / "x.jsonl", [row]), {"kind": "tokens"})
    assert str(found).startswith("s/x/0 in ") and "no `input_ids`; expected a list of token ids" in str(found)


def npy(array: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, **options)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("x.npy", npy(np.zeros((3, 3), dtype=np.int32)), r"expected one row of whole numbers, found int32 \(3, 3\)"),
        ("x.npy", npy(np.zeros(3)), "found float64"),
        ("x.npy", npy(np.array([{}], dtype=object), allow_pickle=True), "not a file of token ids"),
        ("x.npy", lambda path: path.write_bytes(b""), "not a file of token ids"),
        ("x.npy", lambda path: path.write_bytes(b"PK\3\4" + bytes(40)), "not a file of token ids"),
        ("x.npy", lambda path: path.write_bytes(b"\x93NUMPY\1\0\x0e\0{'descr': (((("), "not a file of token ids"),
        ("x.npy", lambda path: path.write_bytes(b"\x80\4pickle"), "not a file of token ids"),
        ("x.bin", lambda path: path.write_bytes(b"123"), "not a file of token ids"),
        ("x.bin", lambda path: path.write_bytes(b""), "not a file of token ids"),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path: Path, name: str, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / name)
    source = TokensConfig(path=str(tmp_path / name)).build("")
    with pytest.raises(DataError, match=words) as caught:
        source.open(str(tmp_path / name), Limits())
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_file_damaged_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100, dtype=np.uint16))
    data = (tmp_path / "x.npy").read_bytes()
    refused = 0
    for at in range(140):
        for value in (data[at] ^ 0xFF, data[at] ^ 1, ord("9")):
            (tmp_path / "x.npy").write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                with TokenFile(str(tmp_path / "x.npy"), 0, "uint16") as shard:
                    list(shard.groups())
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50
