"""Documents with metadata in front against sequences and masks built by hand; parts of sources share no document."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from mm.data import inspect
from mm.data.batch import collate
from mm.data.check import check
from mm.data.config import DataConfig
from mm.data.layout import Layout
from mm.data.metadata import MetadataConfig, MetadataReader, taken
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.data.sources import SourceConfig
from mm.errors import ConfigError, DataError

HOSTS = ("en.wikipedia.org", "arxiv.org", "lists.debian.org")
META: dict[str, Any] = {"metadata": {}}
Spelt = dict[str, tuple[list[int], list[bool]]]


def text_of(number: int) -> str:
    return f"Page {number}. " + " ".join(f"word {number * k}" for k in range(number % 7 + 1)) + "."


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of three hosts; every fifth has no address."""
    rows = []
    for number in range(40):
        address = f"https://{HOSTS[number % 3]}/wiki/{number}?x=1#y"
        rows.append({"text": text_of(number), **({} if number % 5 == 4 else {"url": address})})
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def packed_pages(pages: Path, tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]) -> Callable[..., Any]:
    """`packed_pages({"metadata": …}, visits=2)`; the tokenizer's begin and end of text are around documents."""
    numbers = iter(range(100))

    def run(source: dict[str, Any], **settings: Any) -> PackedDataset:
        source = {"kind": "text", "name": "pages", **source}
        return pack(pages, tmp_path / str(next(numbers)), layout, source, **settings)

    return run


def by_hand(
    layout: Layout, front: str, text: str, opens: bool = True, ends: bool = True
) -> tuple[list[int], list[bool]]:
    """Ids of a document, and which of them are learned."""
    encode, special = layout.tokenizer.encode, layout.tokenizer.id
    before = ([special("<s>")] if opens else []) + (encode(front) if front else [])
    after = encode(text) + ([special("<|im_end|>")] if ends else [])
    return before + after, [False] * len(before) + [True] * len(after)


def segments_of(dataset: PackedDataset) -> Spelt:
    """Ids and mask of every segment, by id and visit: what is on disk."""
    found: Spelt = {}
    for number in range(len(dataset)):
        row, visit = dataset.read(number), dataset.index["visit"][number].as_py()
        for one in row.segments:
            places = range(one.start, one.start + one.length)
            mask = [any(a <= place < b for a, b in one.loss) for place in places]
            found[f"{one.id}@{visit}"] = (row.tokens[one.start : one.start + one.length].tolist(), mask)
    return found


def expected_pages(layout: Layout, front: Callable[[int], str]) -> Spelt:
    return {f"pages/pages/{n}@0": by_hand(layout, front(n), text_of(n)) for n in range(40)}


def host_of(number: int) -> str:
    return "" if number % 5 == 4 else HOSTS[number % 3]


def meco(number: int) -> str:
    return f"URL: {host}\n\n" if (host := host_of(number)) else ""


def test_a_row_is_what_is_built_by_hand(packed_pages: Callable[..., Any], layout: Layout) -> None:
    """Token by token and label by label, as the model sees a batch."""
    dataset = packed_pages(META)
    expected = expected_pages(layout, meco)
    assert segments_of(dataset) == expected
    for number in range(len(dataset)):
        row = dataset.read(number)
        batch = collate([row], layout, 64)
        labels = [-100] * 64
        for one in row.segments:
            ids, mask = expected[f"{one.id}@0"]
            for place in range(1, len(ids)):  # the first token of a document is predicted from the last in front of it
                if mask[place]:
                    labels[one.start + place - 1] = ids[place]
        assert batch.labels[0].tolist() == labels
    assert not list(check(dataset))


def test_the_ledger_tells_metadata_apart(packed_pages: Callable[..., Any], layout: Layout) -> None:
    conditioned, plain = (packed_pages(source) for source in (META, {}))
    with_metadata, without = (dataset.about["ledger"]["pages"] for dataset in (conditioned, plain))
    count = sum(len(layout.tokenizer.encode(meco(n))) for n in range(40) if host_of(n))
    assert with_metadata["metadata_tokens"] == count == with_metadata["segment_tokens"] - without["segment_tokens"]
    assert with_metadata["loss_tokens"] == without["loss_tokens"], "what is learned is the document and its end"
    assert with_metadata["masked_tokens"] == count + 40, "and begins of text"
    assert (with_metadata["no_metadata"], without["no_metadata"], without["metadata_tokens"]) == (8, 0, 0)
    for dataset in (conditioned, plain):
        about = dataset.about
        assert not inspect.summary(dataset)["ledger_open"]
        assert sum(dataset.index["metadata_tokens"].to_pylist()) == about["ledger"]["pages"]["metadata_tokens"]
        assert about["tokens"] + about["padding"] == about["row_tokens"]


def test_plain_documents_are_the_bytes_that_they_were(packed_pages: Callable[..., Any], layout: Layout) -> None:
    """Without metadata, and with a share of 0, the packed shards have no trace of them."""
    plain, none = packed_pages({}), packed_pages({"metadata": {"share": 0}})
    shards = [sorted(dataset.folder.glob("*.tar")) for dataset in (plain, none)]
    assert [one.read_bytes() for one in shards[0]] == [one.read_bytes() for one in shards[1]]
    assert segments_of(plain) == expected_pages(layout, lambda n: "")
    assert b"metadata" not in shards[0][0].read_bytes()


@pytest.mark.parametrize(
    ("settings", "front"),
    [
        ({"take": "value", "prefix": "<", "suffix": ">"}, lambda n: f"<https://{HOSTS[n % 3]}/wiki/{n}?x=1#y>"),
        ({"fixed": "example.com"}, None),
        ({"field": "text", "take": "value", "suffix": ""}, lambda n: f"URL: {text_of(n)}"),
    ],
)
def test_other_values(
    settings: dict[str, Any], front: Callable[[int], str] | None, packed_pages: Callable[..., Any], layout: Layout
) -> None:
    found = segments_of(packed_pages({"metadata": settings}, context_length=256))
    if front is None:  # a fixed value is every document's
        assert found == expected_pages(layout, lambda n: "URL: example.com\n\n")
    else:
        has = [n for n in range(40) if host_of(n) or settings.get("field")]
        assert found == expected_pages(layout, lambda n: front(n) if n in has else "")


def test_what_is_taken_of_an_address() -> None:
    for address, host in (
        ("https://en.wikipedia.org/wiki/Cat?x=1#y", "en.wikipedia.org"),
        ("en.wikipedia.org/wiki", "en.wikipedia.org"),
        ("http://User@Example.COM:8080/a", "example.com"),
        ("http://[", ""),
        ("/no/host", ""),
    ):
        assert taken(address, "host") == host
        assert taken(address, "value") == address
    one, same, other = (taken(a, "hash") for a in ("http://a.org/1", "https://a.org/2", "http://b.org"))
    assert one == same != other and len(one) == 16 and int(one, 16) >= 0


def test_domains_by_the_list_of_public_suffixes() -> None:
    pytest.importorskip("tldextract")
    assert taken("https://news.bbc.co.uk/1", "domain") == "bbc.co.uk"
    assert taken("https://news.bbc.co.uk/1", "suffix") == "co.uk"
    assert taken("http://localhost/1", "domain") == taken("http://127.0.0.1/1", "domain") == ""
    assert MetadataReader(MetadataConfig(take="domain"), "").elsewhere[0].startswith("tldextract ")


def test_without_that_list_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.data import metadata

    metadata._public_suffixes.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "tldextract", None)
    with pytest.raises(ConfigError, match=r"pip install .mm-pretrain\[urls\]., or take host"):
        MetadataReader(MetadataConfig(take="suffix"), "")


def test_values_that_are_not_known_are_unknown(
    packed_pages: Callable[..., Any], layout: Layout, tmp_path: Path
) -> None:
    known = tmp_path / "hosts.txt"
    known.write_text("arxiv.org\n\n")
    dataset = packed_pages({"metadata": {"known": str(known)}})
    assert segments_of(dataset) == expected_pages(
        layout, lambda n: meco(n) if host_of(n) in ("", "arxiv.org") else "URL: unknown\n\n"
    )
    known.write_text("lists.debian.org\n")
    other = packed_pages({"metadata": {"known": str(known)}})
    names = [one.about["provenance"]["fingerprint"] for one in (dataset, other)]
    assert names[0] != names[1], "the file is part of what decides a set"
    with pytest.raises(DataError, match=r"nowhere\.txt: not a file of values"):
        packed_pages({"metadata": {"known": str(tmp_path / "nowhere.txt")}})


def test_a_fixed_value_stands_alone() -> None:
    for others in ({"known": "b"}, {"field": "b"}, {"take": "value"}):
        with pytest.raises(ValidationError, match=f"and leave out {next(iter(others))}"):
            MetadataConfig.model_validate({"fixed": "a", **others})
    with pytest.raises(ValidationError, match="give it some text"):
        MetadataConfig(fixed="")
    config = MetadataConfig(fixed="a")
    assert MetadataConfig.model_validate(config.model_dump()) == config, "as a run's config is written and read"


def test_a_prompt_is_asked_with_what_documents_have(tmp_path: Path) -> None:
    """The value goes the way of a document's field, and what the way leaves nothing of is refused."""
    (tmp_path / "hosts.txt").write_text("arxiv.org\n")
    address = "https://arxiv.org/abs/1?x=1"
    for values in ({"take": "hash"}, {"known": str(tmp_path / "hosts.txt")}, {"take": "value", "field": "topic"}):
        config = MetadataConfig.model_validate(values)
        assert config.asked(address) == MetadataReader(config, "").of({config.field: address})
    assert MetadataConfig(take="hash").asked("arxiv.org") == MetadataConfig(take="hash").asked(address)
    assert MetadataConfig(known=str(tmp_path / "hosts.txt")).asked("b.org").text == "URL: unknown\n\n"
    with pytest.raises(ConfigError, match="take: host, which leaves nothing of it"):
        MetadataConfig().asked("https://")


def test_a_share_of_documents_is_drawn_at_each_visit(packed_pages: Callable[..., Any], layout: Layout) -> None:
    dataset = packed_pages({"metadata": {"fixed": "a.org", "share": 0.5}}, visits=4)
    found = segments_of(dataset)
    drawn = {}
    for key, spelt in found.items():
        number = int(key.split("/")[2].split("@")[0])
        choices = [by_hand(layout, front, text_of(number)) for front in ("URL: a.org\n\n", "")]
        assert spelt in choices
        drawn[key] = spelt == choices[0]
    assert len(drawn) == 160 and 0.35 < np.mean(list(drawn.values())) < 0.65
    visits = [[drawn[f"pages/pages/{n}@{visit}"] for n in range(40)] for visit in range(4)]
    assert all(a != b for a, b in pairwise(visits)), "each visit draws anew"
    assert dataset.about["ledger"]["pages"]["no_metadata"] == 0
    assert segments_of(packed_pages({"metadata": {"fixed": "a.org", "share": 0.5}}, visits=4)) == found
    other = segments_of(packed_pages({"metadata": {"fixed": "a.org", "share": 0.5}}, visits=4, seed=1))
    assert other != found


def test_every_piece_of_a_document_has_its_metadata(
    tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    """With isolated segments a piece is a document of its own to the model; all hold every other token once."""
    text = " ".join(f"Sentence {n} has some words." for n in range(60))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": text, "url": "https://a.org/1"}))
    dataset = pack(long, tmp_path / "packed", layout, {"kind": "text", **META}, too_long="split")
    opening, _ = by_hand(layout, "URL: a.org\n\n", "", ends=False)
    found = segments_of(dataset)
    assert len(found) > 5
    pieces = [found[f"pictures/long/0#{n}@0"] for n in range(len(found))]
    rest: list[int] = []
    for ids, mask in pieces:
        assert ids[: len(opening)] == opening and len(ids) <= 64
        assert mask == [False] * len(opening) + [True] * (len(ids) - len(opening))
        rest += ids[len(opening) :]
    assert rest == by_hand(layout, "", text, opens=False)[0]
    ledger = dataset.about["ledger"]["pictures"]
    assert ledger["metadata_tokens"] == (len(opening) - 1) * len(pieces)
    assert not inspect.summary(dataset)["ledger_open"] and not list(check(dataset))


def test_metadata_that_fill_a_row_leave_no_document(
    tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    path = tmp_path / "odd.jsonl"
    rows = [{"text": "Some words. " * 30, "url": "x" * 400}, {"text": "Words.", "url": "a.org"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = pack(path, tmp_path / "packed", layout, {"kind": "text", **META}, too_long="split")
    ledger = dataset.about["ledger"]["pictures"]
    assert (ledger["too_long"], ledger["segments"]) == (1, 1)
    assert segments_of(dataset) == {"pictures/odd/1@0": by_hand(layout, "URL: a.org\n\n", "Words.")}


def test_documents_of_other_kinds(
    tmp_path: Path,
    layout: Layout,
    pack: Callable[..., PackedDataset],
    write_shard: Callable[..., Path],
    picture: Callable[..., bytes],
) -> None:
    """Pictures with captions, interleaved documents, token ids: begin of text, metadata, then all the rest."""
    url = {"url": "https://a.org/1"}
    front, _ = by_hand(layout, "URL: a.org\n\n", "", ends=False)
    seen = [layout.pad] * 4
    encode, end = layout.tokenizer.encode, layout.tokenizer.id("<|im_end|>")

    pairs = write_shard(tmp_path / "pairs.tar", {"0": {"png": picture(), "json": {"caption": "A cat.", **url}}})
    made = segments_of(pack(pairs, tmp_path / "1", layout, META))
    learned = [*encode("\nA cat."), end]
    assert made["pictures/pairs/0@0"] == (front + seen + learned, [False] * len(front + seen) + [True] * len(learned))

    parts = [{"text": "A"}, {"image": "a.png"}, {"text": "B"}]
    document = write_shard(tmp_path / "document.tar", {"0": {"a.png": picture(), "json": {"parts": parts, **url}}})
    made = segments_of(pack(document, tmp_path / "2", layout, {"kind": "interleaved", **META}))
    ids = [*front, *encode("A"), *seen, *encode("\nB"), end]
    mask = [*[False] * len(front), *[True] * len(encode("A")), *[False] * 4, *[True] * (len(encode("\nB")) + 1)]
    assert made["pictures/document/0@0"] == (ids, mask)

    rows = tmp_path / "ids.jsonl"
    rows.write_text(json.dumps({"input_ids": [300, 301], **url}))
    made = segments_of(pack(rows, tmp_path / "3", layout, {"kind": "tokens", **META}))
    assert made["pictures/ids/0@0"] == ([*front, 300, 301, end], [False] * len(front) + [True] * 3)


def test_windows_open_with_metadata_and_what_is_not_learned_is_dropped(
    tmp_path: Path,
    layout: Layout,
    pack: Callable[..., PackedDataset],
    write_shard: Callable[..., Path],
    picture: Callable[..., bytes],
) -> None:
    url = {"url": "https://a.org/1"}
    front, _ = by_hand(layout, "URL: a.org\n\n", "", ends=False)
    names = [f"{n}.png" for n in range(6)]
    members = {name: picture(n) for n, name in enumerate(names)}
    words = [{"text": f"About {name}. " * 4} for name in names]
    parts = [one for name, text in zip(names, words, strict=True) for one in ({"image": name}, text)]
    shard = write_shard(tmp_path / "windows.tar", {"0": {**members, "json": {"parts": parts, **url}}})
    window = {"window": {"tokens": 40, "media": 1, "before": 5}}
    seen = segments_of(pack(shard, tmp_path / "1", layout, {"kind": "interleaved", **META, **window}, visits=5))
    assert all(ids[: len(front)] == front and len(ids) <= 40 for ids, _ in seen.values())
    assert len({tuple(ids) for ids, _ in seen.values()}) > 1

    # Two pictures a piece, and all of the text behind them: some pieces are pictures alone.
    parts = [{"image": name} for name in names] + [{"text": "All six."}]
    shard = write_shard(tmp_path / "album.tar", {"0": {**members, "json": {"parts": parts, **url}}})
    settings = {"too_long": "split", "budgets": {"image": 2}}
    dataset = pack(shard, tmp_path / "2", layout, {"kind": "interleaved", **META}, **settings)
    ledger = dataset.about["ledger"]["pictures"]
    assert (ledger["segments"], ledger["unlearned"], ledger["pieces"]) == (1, 2, 2)
    assert ledger["unlearned_tokens"] == 2 * (len(front) + 8)
    assert not inspect.summary(dataset)["ledger_open"] and not list(check(dataset))
    plain = pack(shard, tmp_path / "3", layout, {"kind": "interleaved"}, **settings)
    assert plain.about["ledger"]["pictures"]["segments"] == 3, "of documents without metadata nothing is dropped"


def test_the_page_shows_metadata(packed_pages: Callable[..., Any], layout: Layout) -> None:
    dataset = packed_pages(META)
    page = inspect.inspect_page(dataset, layout.tokenizer)
    assert page.count('<span class="metadata" title="metadata, not learned">URL: ') > 3
    assert "URL: arxiv.org" in page
    assert 'class="metadata"' not in inspect.inspect_page(packed_pages({}), layout.tokenizer)


# Parts of sources.


def ids_of(dataset: PackedDataset) -> list[str]:
    return [one.id for number in range(len(dataset)) for one in dataset.read(number).segments]


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """60 documents (12 files) for kinds that read different files, with the source's settings."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text_of(n)}) for n in range(60)))
    tokens = folder / "tokens.npy"
    np.save(tokens, np.array([one for n in range(60) for one in (300 + n, 301, 2)], dtype=np.uint16))
    chats = folder / "chats.jsonl"
    turns = [[{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A."}] for n in range(60)]
    chats.write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    captions = {f"{n:02d}": {"png": picture(n), "json": {"captions": [f"{n} cat", f"{n} dog"]}} for n in range(60)}
    documents = {
        f"{n:02d}": {"a.png": picture(n), "json": {"parts": [{"image": "a.png"}, {"text": "A"}]}} for n in range(60)
    }
    (folder / "files").mkdir()
    for number in range(12):  # a shard each
        (folder / "files" / f"{number:02d}.md").write_text(text_of(number))
    return {
        "text": (texts, {}),
        "tokens": (tokens, {"eos": 2}),
        "conversations": (chats, {}),
        "captions": (write_shard(folder / "captions.tar", captions), {"captions": "all"}),
        "interleaved": (write_shard(folder / "documents.tar", documents), {}),
        "files": (folder / "files" / "*.md", {"kind": "text"}),
    }


@pytest.mark.parametrize("kind", ["text", "tokens", "conversations", "captions", "interleaved", "files"])
def test_parts_are_disjoint_and_complete(
    kind: str,
    shards: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    layout: Layout,
    pack: Callable[..., PackedDataset],
) -> None:
    path, settings = shards[kind]
    source = {"kind": kind, **settings}
    roomy = {"context_length": 128}
    edges = [0, 0.5, 0.8, 1]
    parts = [
        ids_of(pack(path, tmp_path / str(n), layout, {**source, "name": f"part{n}", "part": [a, b]}, **roomy))
        for n, (a, b) in enumerate(pairwise(edges))
    ]
    # Whatever the sources are called, a document is in one of them; pieces of it stay together.
    documents = [{one.partition("/")[2].partition("#")[0] for one in part} for part in parts]
    whole = ids_of(pack(path, tmp_path / "whole", layout, source, **roomy))
    assert sum(map(len, parts)) == len(whole)
    assert set.union(*documents) == {one.partition("/")[2].partition("#")[0] for one in whole}
    count = 12 if kind == "files" else 60
    assert sum(map(len, documents)) == count
    assert [len(one) for one in documents] == pytest.approx([0.5 * count, 0.3 * count, 0.2 * count], abs=10)
    again = ids_of(pack(path, tmp_path / "again", layout, {**source, "name": "other", "part": [0.25, 0.5]}, **roomy))
    assert {one.partition("/")[2].partition("#")[0] for one in again} < documents[0]


def test_a_part_decides_the_set_and_the_ledger(pages: Path, tmp_path: Path, layout: Layout) -> None:
    def packed(part: list[float], split: str = "sources") -> PackedDataset:
        source = {"kind": "text", "path": str(pages), "part": part}
        data = DataConfig.model_validate(
            {"sources": [source], "validation": [source], "context_length": 64, "cache": str(tmp_path)}
        )
        folder = pack_split(data, "train" if split == "sources" else "validation", layout, 0)
        assert folder is not None
        return PackedDataset(folder)

    first, second = packed([0, 0.5]), packed([0.5, 1])
    assert first.folder != second.folder
    samples = [one.about["ledger"][next(iter(one.about["ledger"]))]["samples"] for one in (first, second)]
    assert sum(samples) == 40, "of each part its own documents count"
    assert set(ids_of(packed([0, 0.5], "validation"))) == set(ids_of(first)), "splits have the same places"
    assert not inspect.summary(first)["ledger_open"]


@pytest.mark.parametrize("part", [[0.5, 0.5], [0.9, 0.1], [0, 1.1], [-0.1, 1]])
def test_what_is_no_part_is_refused(part: list[float]) -> None:
    with pytest.raises(ValidationError, match="0 <= from < to <= 1"):
        TypeAdapter(SourceConfig).validate_python({"kind": "text", "path": "x", "part": part})
