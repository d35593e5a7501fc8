"""The page of a packed split says what is on disk, and nothing from the data becomes markup."""

import base64
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mm.data import inspect
from mm.data.config import DataConfig
from mm.data.features import CODES, Encoding, describe
from mm.data.inspect import inspect_page, summary
from mm.data.layout import AudioLayout, ImageLayout, Layout, Template
from mm.data.media import ImageTransform
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError

CONTEXT = 96
HOSTILE = "<script>alert(1)</script> & \"quotes\" <img src=x onerror='y'>"


class Page(HTMLParser):
    """What a browser would see: addresses, text, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words += data


def make_layout() -> Layout:
    tokenizer = Tokenizer.load("builtin:emoji")
    image = ImageLayout(16, 64, ImageTransform(64, (0.5,) * 3, (0.5,) * 3))  # type: ignore[arg-type]
    return Layout(tokenizer, Template("<s>", "<|im_end|>", "\n"), tokenizer.id("<|endoftext|>"), image)


def pack(path: str, out: Path, captions: str = "all", **settings: object) -> PackedDataset:
    source = {"kind": "captions", "path": path, "name": "pictures", "captions": captions}
    data = DataConfig.model_validate({"sources": [source], "context_length": CONTEXT, **settings})
    return PackedDataset(pack_split(data, "train", make_layout(), seed=0, out=out))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return pack("builtin:emoji/validation-*.tar.gz", tmp_path_factory.mktemp("set") / "train", "draw", visits=2)


def write_shard(path: Path, captions: list[str], damaged: int = 0, size: int = 24) -> None:
    """Pictures of noise with captions; the last `damaged` ones are no pictures."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(picture, "PNG")
            data = b"no picture" if number >= len(captions) - damaged else picture.getvalue()
            for ext, content in (("png", data), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:04d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_summary_counts_what_the_packs_hold(dataset: PackedDataset) -> None:
    packs = [dataset.read(number) for number in range(len(dataset))]
    segments = [segment for pack in packs for segment in pack.segments]
    found = summary(dataset)
    assert json.loads(json.dumps(found)) == found
    assert found["packs"] == len(packs) and found["segments"] == len(segments)
    assert found["tokens"] == sum(len(pack.tokens) for pack in packs) == sum(s.length for s in segments)
    assert found["images"] == sum(len(pack.media) for pack in packs)
    assert found["loss_tokens"] == sum(b - a for segment in segments for a, b in segment.loss)
    assert found["tokens"] + found["padding"] == found["row_tokens"] == len(packs) * CONTEXT
    lengths = [segment.length for segment in segments]
    assert found["segment_length"]["p50"] == np.median(lengths)
    assert found["segment_length"]["max"] == max(lengths)
    assert found["segment_length"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-4)
    assert found["row_fill"]["min"] == pytest.approx(min(len(p.tokens) for p in packs) / CONTEXT, abs=1e-4)
    assert found["ledger_open"] == []


def test_page_shows_the_numbers_and_needs_no_network(dataset: PackedDataset) -> None:
    found = summary(dataset)
    page = Page(inspect_page(dataset, make_layout().tokenizer, rows=5))
    for name in ("packs", "tokens", "padding", "segments", "images", "loss_tokens", "row_tokens"):
        assert f"{found[name]:,}" in page.words, name
    for count in found["ledger"]["pictures"].values():
        assert f"{count:,}" in page.words
    assert "✓ closes" in page.words and "✗" not in page.words
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_rows_are_drawn_as_they_are(dataset: PackedDataset) -> None:
    tokenizer = make_layout().tokenizer
    html = inspect_page(dataset, tokenizer, rows=1)
    words = Page(html).words
    pack = dataset.read(0)
    assert f'viewBox="0 0 {CONTEXT} 100"' in html
    assert f'<rect class="text" width="{len(pack.tokens)}"' in html
    for media in pack.media:
        assert f'<rect class="image" x="{media.position}" width="{media.length}"' in html
    for segment in pack.segments:
        (start, stop), = segment.loss  # fmt: skip
        assert f'<rect class="loss" x="{start}" y="80" width="{stop - start}"' in html
        assert f"{segment.id}: {segment.length} tokens, {stop - start} learned" in words
        assert tokenizer.decode(pack.tokens[start:stop].tolist()) in words
    assert html.count('<details class="pack">') == 1


def test_evenly_spaced_rows_and_no_more_than_there_are(dataset: PackedDataset) -> None:
    words = Page(inspect_page(dataset, None, rows=3)).words
    assert all(f"Pack {number}\n" in words for number in (0, round((len(dataset) - 1) / 2), len(dataset) - 1))
    assert inspect_page(dataset, None, rows=10**6).count('<details class="pack">') == len(dataset)


def test_without_a_tokenizer_there_is_no_text(dataset: PackedDataset) -> None:
    pack = dataset.read(0)
    start, stop = pack.segments[0].loss[0]
    caption = make_layout().tokenizer.decode(pack.tokens[start:stop].tolist())
    page = Page(inspect_page(dataset, None, rows=1))
    assert caption not in page.words and pack.segments[0].id in page.words


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    write_shard(tmp_path / "<b>x.tar", [HOSTILE, "plain"])
    dataset = pack(str(tmp_path / "<b>x.tar"), tmp_path / "train")
    html = inspect_page(dataset, make_layout().tokenizer)
    page = Page(html)
    assert "script" not in page.tags and "b" in page.tags
    assert "<b>x" not in html and "<script" not in html
    assert HOSTILE in page.words and "pictures/<b>x/0000" in page.words


def test_quarantined_samples_are_listed_and_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", ["one", "two", "three"], damaged=1)
    dataset = pack(str(tmp_path / "x.tar"), tmp_path / "train", max_bad_fraction=0.5)
    words = Page(inspect_page(dataset, None)).words
    assert re.search(r"pictures/\S*0002  .*not a readable", words)
    assert summary(dataset)["ledger_open"] == []


def test_large_pictures_are_shown_small(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", ["noise"], size=640)
    dataset = pack(str(tmp_path / "x.tar"), tmp_path / "train")
    assert len(dataset.read(0).media[0].data) > 1_000_000
    assert 10_000 < len(inspect_page(dataset, None)) < 150_000


def test_a_ledger_that_does_not_close_is_shown(dataset: PackedDataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "train")
    about = json.loads((tmp_path / "train" / "dataset.json").read_text())
    true = about["ledger"]["pictures"]["loss_tokens"]
    about["ledger"]["pictures"]["loss_tokens"] += 1
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(about))
    wrong = PackedDataset(tmp_path / "train")
    words = Page(inspect_page(wrong, None, rows=1)).words
    assert "✗ 2 open" in words and "✓ closes" not in words
    line = f"loss_tokens in the ledger = loss_tokens in the packs: {true + 1:,} ≠ {true:,}"
    assert line in words and f"pictures: {line}" in summary(wrong)["ledger_open"]


def test_another_tokenizer_is_refused(dataset: PackedDataset) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        inspect_page(dataset, Tokenizer.load("builtin:emoji", added=("<extra>",)))


def test_a_missing_plan_is_named(dataset: PackedDataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "train")
    plan = tmp_path / "train" / "plan.parquet"
    assert len(pq.read_table(plan)) == summary(dataset)["segments"]
    plan.unlink()
    with pytest.raises(DataError, match=r"plan\.parquet: missing"):
        summary(PackedDataset(tmp_path / "train"))


def test_codes_and_the_tokens_around_pictures_are_shown(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", ["one", "two"])
    tokenizer = Tokenizer.load("builtin:emoji", added=("<boi>", "<eoi>"))
    image = ImageLayout(16, 64, ImageTransform(64, (0.5,) * 3, (0.5,) * 3), learned=True)  # type: ignore[arg-type]
    around = Template("<s>", "<|im_end|>", around_image=("<boi>", "<eoi>"))
    layout = Layout(tokenizer, around, tokenizer.id("<|endoftext|>"), image)
    source = {"kind": "captions", "path": str(tmp_path / "x.tar"), "name": "pictures"}
    data = DataConfig.model_validate({"sources": [source], "context_length": CONTEXT})
    dataset = PackedDataset(pack_split(data, "train", layout, seed=0, out=tmp_path / "train"))
    assert summary(dataset)["codes"] == [] and "its codes" not in Page(inspect_page(dataset, tokenizer)).words
    origin = describe(layout, "image", "exact", {"kind": "numbers"}, "w")
    Encoding(
        dataset, layout, CODES, origin, 1, lambda media: torch.arange(media.positions)[:, None] % 16, about={}
    ).run()  # fmt: skip
    html = inspect_page(dataset, tokenizer)
    assert "are its codes (numbers)" in Page(html).words
    for text in ("&lt;boi&gt;", "image", "&lt;eoi&gt;"):
        assert html.count(f'<span class="medium learn">{text}</span>') == 2, "all of a picture is learned"
    drawn = re.findall(r'<img class="codes" src="data:image/png;base64,([^"]*)"', html)
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    with Image.open(io.BytesIO(base64.b64decode(drawn[0]))) as picture:
        assert picture.size == (4, 4) and len(picture.getcolors() or ()) == 16, "a colour a code"
    (found,) = summary(dataset)["codes"]
    assert (found["of"], found["medium"], found["codebooks"]) == ("numbers", "image", 1)
    assert (found["items"], found["rows"], found["unreadable"]) == (2, 32, 0)


@pytest.fixture
def recordings(
    tmp_path: Path, write_shard: Callable[..., Path], sound: Callable[..., bytes], make_layout: Callable[..., Layout]
) -> tuple[PackedDataset, dict[str, bytes]]:
    """A set of recordings alone, the last of them cut short; and the bytes of the others."""
    files = {f"{number}": sound(number, 0.5 + number) for number in range(3)}
    cut = sound(9, 1.0)[:3000]
    write_shard(tmp_path / "x.tar", {key: {"flac": data} for key, data in {**files, "cut": cut}.items()})
    source = {"kind": "audio", "name": "music", "path": str(tmp_path / "x.tar"), "caption": ""}
    data = DataConfig.model_validate({"sources": [source], "context_length": 500, "max_bad_fraction": 0.5})
    layout = make_layout(audio=AudioLayout(8000, 100))
    return PackedDataset(pack_split(data, "train", layout, seed=0, out=tmp_path / "train")), files


def test_recordings_are_drawn_as_wide_as_their_run_and_can_be_played(
    recordings: tuple[PackedDataset, dict[str, bytes]],
) -> None:
    dataset, files = recordings
    html = inspect_page(dataset, None)
    page = Page(html)
    for number in range(len(dataset)):
        pack = dataset.read(number)
        for one in pack.media:
            place = f"left:{round(100 * one.position / 500, 3)}%;width:{round(100 * one.length / 500, 3)}%"
            cut = "cut" in pack.segments[one.segment].id
            shown = '<span class="none"[^>]*unreadable[^>]*' if cut else '<img src="data:image/png[^>]* class="sound"'
            assert re.search(f'{shown} style="{re.escape(place)}">', html), place
    players = [address.partition(",")[2] for address in page.addresses if address.startswith("data:audio/flac;base64,")]
    assert {base64.b64decode(one) for one in players} == {*files.values()} and page.tags.count("audio") == 3
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert all(f"{0.5 + number:.2f} s" in page.words for number in range(3))


def test_frames_are_told_in_seconds_too(recordings: tuple[PackedDataset, dict[str, bytes]]) -> None:
    dataset, _ = recordings
    media = [one for number in range(len(dataset)) for one in dataset.read(number).media]
    frames = sum(one.length for one in media)
    found = summary(dataset)
    assert found["audio_seconds"] == pytest.approx(sum(one.plan["samples"] for one in media) / 8000, abs=0.05)
    words = Page(inspect_page(dataset, None)).words
    assert f"{found['audio_seconds']:.0f} s" in words and f"{frames:,}" in words
    assert found["ledger"]["music"]["audio_tokens"] == frames


def test_a_page_holds_only_so_much_sound(
    recordings: tuple[PackedDataset, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, files = recordings
    most = 2 * max(map(len, files.values()))
    monkeypatch.setattr(inspect, "SOUND_BYTES", most)
    page = Page(inspect_page(dataset, None))
    assert sum(len(address) for address in page.addresses if address.startswith("data:audio/")) <= most
    assert 1 <= page.tags.count("audio") < 3 and "no player" in page.words
