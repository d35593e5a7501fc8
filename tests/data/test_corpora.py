"""Corpora: packages made here by hand are read as real ones; every parser on an input that shows its rule.

With MM_CORPORA=1 the real ones are built as well, which downloads their packages.
"""

import doctest
import gzip
import importlib
import io
import json
import lzma
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image

from mm.cli import main
from mm.data.corpora import CORPORA, clipart, clips, debian_text, gimp_help, music, stamps
from mm.data.corpora.build import SHARD_SAMPLES, Shards, Workbench, build_corpus, on_white
from mm.data.corpora.fetch import TESTED, Packages, unpack
from mm.data.corpora.htmltext import Picture, read_page
from mm.errors import ConfigError, DataError


def tar_of(files: dict[str, bytes], links: Mapping[str, str] = MappingProxyType({})) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links.items():
            info = tarfile.TarInfo(f"./{name}")
            info.type, info.linkname = tarfile.LNKTYPE, f"./{target}"
            tar.addfile(info)
    return out.getvalue()


COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def make_deb(
    folder: Path,
    name: str,
    files: dict[str, bytes],
    how: str = ".xz",
    links: Mapping[str, str] = MappingProxyType({}),
    version: str = "1:2-3",
) -> Path:
    control = f"Package: {name}\nVersion: {version}\nDescription: made here\n more of it\n".encode()
    members = {
        "debian-binary": b"2.0\n",
        f"control.tar{how}": COMPRESS[how](tar_of({"control": control})),
        f"data.tar{how}": COMPRESS[how](tar_of(files, links)),
    }
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for member, data in members.items():
            file.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    return path


def png(size: tuple[int, int] = (12, 8), colour: Any = "red", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG")
    return out.getvalue()


def samples(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> members of a shard, JSON read."""
    read = wds.WebDataset(str(path), shardshuffle=False)
    return {sample["__key__"]: {**sample, "json": json.loads(sample["json"])} for sample in read}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without apt-get."""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("module", ["clips", "debian_text", "htmltext", "stamps"])
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"mm.data.corpora.{module}"))
    assert result.attempted and not result.failed


# Packages


@pytest.mark.parametrize("how", COMPRESS)
def test_a_package_is_unpacked_whatever_compresses_it(tmp_path: Path, how: str) -> None:
    files = {"usr/share/a.txt": b"a" * 70_000, "usr/share/sub/b.txt": b"b", "etc/c": b"c"}
    deb = make_deb(tmp_path, "made", files, how, {"usr/share/again.txt": "usr/share/a.txt"})
    unpacked = unpack(deb, tmp_path / "out", lambda path: path.startswith("usr/"))
    assert (unpacked.name, unpacked.version) == ("made", "1:2-3")
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {
        "usr/share/a.txt": b"a" * 70_000,
        "usr/share/again.txt": b"a" * 70_000,
        "usr/share/sub/b.txt": b"b",
    }


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not here to compare with")
def test_a_package_unpacks_as_dpkg_does(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "DEBIAN/control").write_text(
        "Package: made\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: made\n"
    )
    rng = random.Random(0)
    for name in ("x", "y/z", "y/ü ü"):
        path = source / "usr/share" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(9, 3000)))
    deb = tmp_path / "made_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(source), str(deb)], check=True, capture_output=True
    )
    subprocess.run(["dpkg-deb", "-x", str(deb), str(tmp_path / "theirs")], check=True)
    unpack(deb, tmp_path / "ours")

    def tree(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert tree(tmp_path / "ours") == tree(tmp_path / "theirs") and len(tree(tmp_path / "ours")) == 3


def test_a_damaged_package_says_so(tmp_path: Path) -> None:
    deb = make_deb(tmp_path, "made", {"a": bytes(range(256)) * 400})
    whole = deb.read_bytes()
    deb.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="truncated"):
        unpack(deb, tmp_path / "out")
    deb.write_bytes(whole[:-60] + bytes(60))
    with pytest.raises(DataError, match="damaged"):
        unpack(deb, tmp_path / "out")
    deb.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="not a Debian package"):
        unpack(deb, tmp_path / "out")


def test_a_member_that_points_outside_is_refused(tmp_path: Path) -> None:
    deb = make_deb(tmp_path, "made", {"../../outside": b"x"})
    with pytest.raises(DataError, match="points outside"):
        unpack(deb, tmp_path / "a" / "out")
    assert not (tmp_path / "outside").exists()


def test_without_apt_the_message_says_what_to_fetch_and_where_to_put_it(cache: Path, offline: None) -> None:
    with pytest.raises(DataError) as caught:
        Packages(cache).deb("unicode-cldr-core")
    text = str(caught.value)
    assert "\n" not in text and "not a Debian-like machine" in text
    assert f"fetch unicode-cldr-core_{TESTED['unicode-cldr-core']}_all.deb" in text and str(cache) in text


APT = """#!/bin/sh
# Knows the package only once the index was brought up to date.
echo "$@" >> {log}
case "$*" in
  *update*) touch {index} ;;
  *download*) [ -e {index} ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}; cp {deb} . ;;
esac
"""


def test_a_missing_package_is_looked_up_again_after_an_update_and_then_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    apt = tmp_path / "bin/apt-get"
    deb = make_deb(tmp_path, "made", {"a": b"1"})
    apt.write_text(APT.format(log=tmp_path / "log", index=tmp_path / "index", deb=deb))
    apt.chmod(apt.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{apt.parent}:{os.environ['PATH']}")
    found = Packages(cache).deb("made")
    assert found == cache / deb.name and found.read_bytes() == deb.read_bytes()
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == 3 and calls[0] == "download made" and "Dir::State::lists" in calls[1] + calls[2]
    assert Packages(cache).deb("made") == found  # from the cache
    assert len((tmp_path / "log").read_text().splitlines()) == 3
    assert not list(cache.glob(".download-*"))
    (tmp_path / "index").unlink()
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    with pytest.raises(DataError, match=r"apt-get cannot download it .E: Unable to locate package"):
        Packages(cache).deb("other")


def make_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "VALUE = 7")
    return path


def test_a_wheel_in_the_cache_is_used_if_it_fits_this_python(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")  # pip fails
    make_wheel(cache, "made_here", "cp27-cp27m-win32")
    with pytest.raises(DataError, match=r"made-here: pip cannot download it .*put it in"):
        Packages(cache).wheel("made-here", "1.0")
    fitting = make_wheel(cache, "made_here")
    assert Packages(cache).wheel("made-here", "1.0") == fitting
    with pytest.raises(DataError):
        Packages(cache).wheel("made-here", "2.0")
    folder = Packages(cache).library("made-here", "1.0")
    assert (folder / "made_here/__init__.py").read_text() == "VALUE = 7"
    fitting.write_bytes(b"cut short")
    with pytest.raises(DataError, match="damaged wheel"):
        Packages(cache).wheel("made-here", "1.0")


# The folder


def test_shards_are_cut_by_count_and_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.data.corpora.build.SHARD_SAMPLES", 3)
    assert SHARD_SAMPLES >= 1_000
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shards = Shards(tmp_path / folder, "set")
        for number in range(7):
            shards.write(f"{number}", {"png": bytes([number]), "json": {"text": "é"}})
        files = shards.close()
    assert {name: about["samples"] for name, about in files.items()} == {
        "set-000000.tar": 3, "set-000001.tar": 3, "set-000002.tar": 1,
    }  # fmt: skip
    for name, about in files.items():
        data = (tmp_path / "a" / name).read_bytes()
        assert data == (tmp_path / "b" / name).read_bytes() and len(data) == about["bytes"]
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert {(m.uname, m.gname, m.mode, m.mtime) for m in tar} == {("mm", "mm", 0o644, 0)}


@pytest.mark.parametrize("key", ["0", "a.b"])
def test_a_key_that_readers_would_confuse_is_refused(tmp_path: Path, key: str) -> None:
    shards = Shards(tmp_path, "set")
    shards.write("0", {"txt": b"x"})
    with pytest.raises(ValueError):
        shards.write(key, {"txt": b"y"})


def stamps_deb(cache: Path) -> Path:
    root = stamps.STAMPS
    return make_deb(
        cache,
        stamps.PACKAGE,
        {
            f"{root}/animals/mammals/wapiti.png": png((600, 300), (0, 0, 0, 0), "RGBA"),
            f"{root}/animals/mammals/wapiti.txt": b"A wapiti.\nde.utf8=Ein Wapiti.\nfr.utf8=\npt_BR.utf8=Um.\n",
            f"{root}/animals/mammals/wapiti.ogg": b"howl",
            f"{root}/animals/mammals/wapiti_desc_de.ogg": b"ein",
            f"{root}/animals/mammals/wapiti_desc_pt_br.wav": b"um",
            f"{root}/animals/mammals/wapiti_desc_fr.ogg": b"no text",
            f"{root}/animals/mammals/alone_desc_fr.ogg": b"no picture",
            f"{root}/animals/mammals/mirror_mirror.png": png(),
            f"{root}/symbols/math/7.png": png(),
            f"{root}/symbols/math/7.txt": b"Seven.\nsv.utf8=Sju.\n",
            f"{root}/symbols/math/7.ogg": b"seven",
            f"{root}/symbols/math/7_sv.ogg": b"sju",
            f"{root}/symbols/math/lost.txt": b"Lost.",
            f"{root}/symbols/math/odd.svg": b"not svg",
            f"{root}/symbols/math/odd.txt": b"Odd.",
            f"{root}/symbols/math/written.svg": b"<svg><text>8</text></svg>",
            f"{root}/symbols/math/written.txt": b"Written.",
        },
    )


def test_stamps(tmp_path: Path, cache: Path, offline: None) -> None:
    pytest.importorskip("cairosvg")
    stamps_deb(cache)
    out = tmp_path / "out"
    about = build_corpus("stamps", out, cache=cache)
    images = samples(out / "images-000000.tar")
    assert [*images] == ["animals-mammals-wapiti", "symbols-math-7"]
    wapiti = images["animals-mammals-wapiti"]
    assert wapiti["json"]["label"] == "animals/mammals"
    assert {one["language"]: one["text"] for one in wapiti["json"]["captions"]} == {
        "en": "A wapiti.", "de": "Ein Wapiti.", "pt_BR": "Um.",
    }  # fmt: skip
    picture = Image.open(io.BytesIO(wapiti["jpg"]))
    assert picture.size == (256, 128) and picture.getpixel((5, 5)) == (255, 255, 255)  # on white
    speech = {
        key: (one["json"]["language"], one["json"]["text"], one["json"]["image"])
        for key, one in samples(out / "speech-000000.tar").items()
    }
    assert speech == {
        "animals-mammals-wapiti_desc_de": ("de", "Ein Wapiti.", "animals-mammals-wapiti"),
        "animals-mammals-wapiti_desc_pt_br": ("pt_BR", "Um.", "animals-mammals-wapiti"),
        "symbols-math-7": ("en", "Seven.", "symbols-math-7"),
        "symbols-math-7_sv": ("sv", "Sju.", "symbols-math-7"),
    }
    sounds = samples(out / "sounds-000000.tar")
    assert sounds["animals-mammals-wapiti"]["ogg"] == b"howl" and len(sounds) == 1
    counts = about["counts"]
    assert counts["stamps dropped: no picture"] == counts["stamps dropped: the picture cannot be drawn"] == 1
    assert counts["stamps dropped: has text, and brings no font for it"] == 1
    assert counts["recordings dropped: no caption in its language"] == 1
    assert counts["recordings dropped: no picture with a caption"] == 1
    assert about["packages"] == {"tuxpaint-stamps-default": "1:2-3"}


def test_a_folder_appears_whole_or_not_at_all_and_is_not_built_again(
    tmp_path: Path, cache: Path, offline: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    build = ["data", "build", "clipart", "--out", str(out), "--cache", str(cache), "--json"]
    assert main(build) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == 2
    assert not out.exists() and not list(tmp_path.glob(".out*"))

    clipart_debs(cache)
    assert main(build) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not first["already"] and not list(tmp_path.glob(".out*"))
    assert {path.name for path in out.iterdir()} == {"corpus.json", *first["files"]}
    shutil.rmtree(cache)
    assert main(build) == 0  # without its packages
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again.pop("already") and again.items() <= first.items()

    with pytest.raises(DataError, match="holds the corpus clipart"):
        build_corpus("stamps", out, cache=cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(DataError, match="holds something else"):
        build_corpus("stamps", tmp_path / "mine", cache=cache)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_unknown_names_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'stamps'"):
        build_corpus("stamp", tmp_path / "out")
    with pytest.raises(ConfigError, match="music: has no option 'languages'"):
        build_corpus("music", tmp_path / "out", {"languages": ["en"]})
    with pytest.raises(ConfigError, match="count is 0"):
        music.build(Workbench(tmp_path, Packages(tmp_path), {"count": 0, "seed": 0, "seconds": 5.0}))
    with pytest.raises(ConfigError, match=r"seconds is 0\.5"):
        music.build(Workbench(tmp_path, Packages(tmp_path), {"count": 1, "seed": 0, "seconds": 0.5}))


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["corpora"]
    assert [*listed] == [*CORPORA]
    for corpus in CORPORA.values():
        assert callable(corpus.builder())
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CORPORA)


# Clip art

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="d" xmlns:cc="http://web.resource.org/cc/" xmlns:rdf="r">
<metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"><cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>
<rdf:li>food</rdf:li><rdf:li></rdf:li><rdf:li>11</rdf:li><rdf:li>hash(0x86a0bb0)</rdf:li><rdf:li>candy</rdf:li>
</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator>
<cc:license rdf:resource="http://web.resource.org/cc/PublicDomain"/></cc:Work></rdf:RDF></metadata></svg>"""


def clipart_debs(cache: Path) -> None:
    titles = {"food/a": "lollipop", "food/b": "", "shapes/stars/c": "star", "food/d": "pie", "food/e": "huge"}
    titles |= {f"food/same{number}": "Cake" for number in range(5)}
    svg = {f"usr/share/openclipart/svg/{name}.svg": SVG.format(title=title).encode() for name, title in titles.items()}
    pictures = {
        f"usr/share/openclipart/png/{name}.png": png((300, 30 + number))
        for number, name in enumerate(titles)
        if name not in ("food/d", "food/e")
    }
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 20_000, 20_000)
    pictures["usr/share/openclipart/png/food/e.png"] = header
    make_deb(cache, "openclipart-svg", svg)
    make_deb(cache, "openclipart-png", pictures)


def test_clipart_keeps_what_says_something_and_counts_the_rest(tmp_path: Path, cache: Path, offline: None) -> None:
    clipart_debs(cache)
    about = build_corpus("clipart", tmp_path / "out", cache=cache)
    found = samples(tmp_path / "out/clipart-000000.tar")
    assert [*found] == ["food-a", "food-same0", "food-same1", "food-same2"]
    record = found["food-a"]["json"]
    assert record["caption"] == "lollipop, food, candy" and record["keywords"] == ["food", "candy"]
    assert record["licence"] == "public domain" and record["label"] == "food"
    assert max(Image.open(io.BytesIO(found["food-a"]["jpg"])).size) == 224
    assert {name.removeprefix("dropped: "): n for name, n in about["counts"].items() if name.startswith("dropped")} == {
        "more than 3 of one title": 2,
        "no PNG of it": 1,
        "no title": 1,
        "one of a generated series": 1,
        "over 100 megapixels": 1,
    }


def test_clipart_without_metadata_has_no_title() -> None:
    assert clipart.read_metadata(b"<svg/>") == {} == clipart.read_metadata(b"<metadata><broken></metadata>")


def test_colours_under_transparency_do_not_bleed_in() -> None:
    picture = Image.new("RGBA", (200, 200), (255, 0, 0, 0))
    assert on_white(picture, 50).getextrema() == ((255, 255),) * 3


# Interleaved pages

PAGE = """<html><head><title>7.3. HSV &amp; Noise</title><style>x</style></head><body>
<div class="navheader"><img src="prev.png" alt="Prev"/>Prev</div>
<h3>7.3.  HSV
Noise</h3><p>Before <b>bold</b>.<img src="icon.png" alt="i"/> after</p>
<img src="a.png" alt="Original
 image"><p>Caption</p><img src="../outside.png"><img src="missing.png"><pre>one
two</pre><img src="b%20b.JPG" alt=""/><div class="navfooter"><div>Next</div></div></body></html>"""


def test_pages_keep_text_and_pictures_in_order() -> None:
    page = read_page(PAGE)
    assert page.title == "7.3. HSV & Noise"
    assert page.parts[:3] == ["7.3. HSV Noise\nBefore bold.", Picture("icon.png", "i"), "after"]
    assert "one\ntwo" in page.parts and "Next" not in page.text() and "Prev" not in page.text()


def test_gimp_help(tmp_path: Path, cache: Path, offline: None) -> None:
    def noise(format: str, seed: int) -> bytes:
        out = io.BytesIO()
        Image.frombytes("RGB", (60, 60), random.Random(seed).randbytes(10_800)).save(out, format)
        return out.getvalue()

    folder = f"{gimp_help.HELP}/pt_BR"
    first, second = noise("PNG", 1), noise("JPEG", 2)
    files = {
        f"{folder}/page.html": PAGE.encode(),
        f"{folder}/plain.html": b"<p>no picture</p>",
        f"{folder}/a.png": first,
        f"{folder}/b b.JPG": second,
        f"{folder}/icon.png": png(),
        f"{gimp_help.HELP}/outside.png": noise("PNG", 3),
    }
    make_deb(cache, "gimp-help-pt-br", files)
    about = build_corpus("gimp-help", tmp_path / "out", {"languages": ["pt_BR"]}, cache)
    (sample,) = samples(tmp_path / "out/pt_BR-000000.tar").values()
    assert sample["json"]["parts"] == [
        {"text": "7.3. HSV Noise\nBefore bold.\nafter"},
        {"image": "0000.png", "alt": "Original image"},
        {"text": "Caption\none\ntwo"},
        {"image": "0001.jpg", "alt": ""},
    ]
    assert sample["0000.png"] == first and sample["0001.jpg"] == second
    assert about["counts"]["pt_BR pages dropped: no picture"] == 1


# Text


def test_man_pages_lose_their_layout_and_no_words() -> None:
    source = r""".\" a comment
.de XX
hidden
..
.TH LS 1
.SH NAME
ls \- list directory contents
.SH DESCRIPTION
Show \fIfiles\fP and
.BR stat (2)
data\(em\[lq]all\[rq].
.IP \(bu 2
point
.TP
.B \-a
do not hide
.nf
int  x;
int  y;
.fi
.TS
l l.
Left	T{
Right
T}
.TE
end \*(lqquoted\*(rq
"""
    assert debian_text.plain_man(source).splitlines() == [
        "NAME",
        "ls - list directory contents",
        "",
        "DESCRIPTION",
        "Show files and stat(2) data—“all”.",
        "",
        "• point",
        "",
        "-a",
        "do not hide",
        "",
        "int  x;",
        "int  y;",
        "",
        "Left\t",
        "Right",
        "",
        "end “quoted”",
    ]


def lzw(data: bytes) -> bytes:
    """Unix `compress` without its header and without ever clearing the table."""
    table = {bytes([value]): value for value in range(256)}
    size, codes, held = 257, [], b""
    for value in data:
        if held + bytes([value]) in table:
            held += bytes([value])
            continue
        codes.append(table[held])
        table[held + bytes([value])] = size
        size += 1
        held = bytes([value])
    codes.append(table[held])
    bits, count, out, size = 0, 0, bytearray(), 257
    for number, code in enumerate(codes):
        # The reader knows an entry one code later than the writer, and both widen by what the reader knows.
        width = max(9, (size + max(0, number - 1)).bit_length()) if number else 9
        bits |= code << count
        count += width
        while count >= 8:
            out.append(bits & 255)
            bits >>= 8
            count -= 8
    out.append(bits & 255)
    return bytes(out)


def test_the_bible_file_is_unpacked() -> None:
    rng = random.Random(1)
    windows = ["".join(rng.choices("aab Ge1:", k=4000)).encode(), b"abababababab"]
    packed = [lzw(window) for window in windows]
    table = struct.pack(">II", 4000, len(packed))
    start = 0x54 + len(table) + 4 * len(packed)
    offsets = struct.pack(">II", start, start + len(packed[0]))
    assert debian_text.bible_text(bytes(0x54) + table + offsets + b"".join(packed)).encode() == b"".join(windows)


def test_debian_text_names_source_and_licence_and_drops_duplicates(
    tmp_path: Path, cache: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        debian_text,
        "DOMAINS",
        [one for one in debian_text.DOMAINS if one[0] in ("install-guide", "quotes", "kernel-docs")],
    )
    docs = "usr/share/doc/linux-doc-6.1/Documentation"
    text = "=====\nTitle\n=====\n\nSome words about it.\n"
    make_deb(
        cache,
        "linux-doc-6.1",
        {
            f"{docs}/a.rst.gz": gzip.compress(text.encode()),
            f"{docs}/translations/zh_CN/a.rst.gz": gzip.compress("内核文档的一些文字，足够长了，足够长了吧。".encode()),
            f"{docs}/again.txt.gz": gzip.compress(text.encode()),
            f"{docs}/Makefile.gz": gzip.compress(b"all: a very long rule that is no text"),
        },
    )
    guide = "usr/share/doc/installation-guide-amd64"
    page = "<title>Kapitel 1</title><p>Willkommen bei der Installation</p>"
    make_deb(cache, "installation-guide-amd64", {f"{guide}/de/ch01.html": page.encode(), f"{guide}/de/x.png": png()})
    quotes = b"To be, or not to be, that is it.\n%\nshort\n%\nAll the world's a stage, 100% so.\n"
    make_deb(cache, "fortunes", {"usr/share/games/fortunes/plays": quotes, "usr/share/games/fortunes/plays.dat": b"x"})
    about = build_corpus("debian-text", tmp_path / "out", cache=cache)

    def lines(domain: str) -> list[dict[str, Any]]:
        with gzip.open(tmp_path / f"out/{domain}-000000.jsonl.gz") as file:
            return [json.loads(line) for line in file]

    kernel, translated = lines("kernel-docs")
    assert kernel == {
        "id": "kernel-docs/000000",
        "text": text.strip(),
        "domain": "kernel-docs",
        "language": "en",
        "licence": "GPL-2",
        "source": f"linux-doc-6.1/{docs}/a.rst.gz",
        "title": "Title",
    }
    assert translated["language"] == "zh-CN"
    assert about["counts"]["kernel-docs dropped: the same text again"] == 1
    (german,) = lines("install-guide")
    assert (german["language"], german["title"]) == ("de", "Kapitel 1")
    assert german["text"] == "Willkommen bei der Installation"
    assert [quote["text"] for quote in lines("quotes")] == [
        "To be, or not to be, that is it.",
        "All the world's a stage, 100% so.",
    ]
    assert about["counts"]["quotes dropped: shorter than 20 characters"] == 1
    assert about["files"]["quotes-000000.jsonl.gz"]["samples"] == 2


# Music and clips


def scale(quarters: int) -> list[music.Note]:
    return [music.Note(float(start), start + 1.0, start % 2, 60 + start % 12) for start in range(quarters)]


@pytest.mark.parametrize(("seconds", "windows"), [(5.0, 2), (12.0, 9), (27.5, 20)])
def test_clips_of_a_score_fill_their_time_at_their_tempo(seconds: float, windows: int) -> None:
    notes = scale(64)
    drawn = music.draw_clips(notes, random.Random(3), seconds, windows)
    assert drawn == music.draw_clips(notes, random.Random(3), seconds, windows)
    assert 0 < len(drawn) <= windows * music.RENDERINGS
    for clip, instrument, tempo in drawn:
        quarters = seconds * tempo / 60
        assert instrument in music.INSTRUMENTS and tempo in music.TEMPI
        assert clip[0].start == 0 and clip[-1].start < quarters and max(note.end for note in clip) <= quarters
        assert abs(len(clip) - quarters) <= 1  # a note a quarter
    assert music.draw_clips(scale(4), random.Random(0), seconds, windows) == []  # too short
    pause = [music.Note(0.0, 1.0, 0, 60), music.Note(60.0, 61.0, 0, 60)]
    assert music.draw_clips(pause, random.Random(0), seconds, windows) == []  # silent after a second


def test_captions_of_music_say_what_is_known() -> None:
    clip = {"title": "T", "composer": "", "instrument": "flute", "key": "C major", "tempo": 80, "voices": 1}
    assert music.caption_of(clip) == "T, played on flute in C major at 80 beats per minute, 1 voice"
    assert " by C, " in music.caption_of({**clip, "composer": "C"})


def test_captions_that_nobody_translated_are_english_once(tmp_path: Path) -> None:
    page = '<!-- <tt:div begin="1s" end="2.5s"><tt:p>{}\n  <gui>now</gui></tt:p></tt:div> -->'
    pages = {}
    for language, text in {"C": "Click", "de": "Klicken", "fr": "Click"}.items():
        pages[language] = tmp_path / language
        pages[language].write_text(page.format(text))
    assert clips.timed_captions(pages) == [
        {"start": 1.0, "end": 2.5, "text": "Click now", "language": "en"},
        {"start": 1.0, "end": 2.5, "text": "Klicken now", "language": "de"},
    ]


# The real ones

EXPECTED = {
    "emoji": {"pictures": 3635, "captions": 72_699},
    "stamps": {"pictures": 945, "captions": 62_015},
    "clipart": {"pictures": 2855},
    "gimp-help": {"en documents": 458, "en pictures": 1784},
    "debian-text": {"scripture documents": 1189, "dictionary documents": 2356},
    "music": {"clips": 8},
    "clips": {"clips": 9, "timed captions": 7},
    "pcfg": {"train documents": 50_000, "validation documents": 2500, "test documents": 2500},
}


@pytest.mark.skipif(os.environ.get("MM_CORPORA") != "1", reason="downloads up to 160 MB each: set MM_CORPORA=1")
@pytest.mark.parametrize("name", CORPORA)
def test_the_real_one_is_built(name: str, tmp_path: Path) -> None:
    """Counts hold for the packages of Debian 12."""
    options = {"count": 8} if name == "music" else {}
    try:
        about = build_corpus(name, tmp_path / "out", options)
    except DataError as error:
        if "cannot download" in str(error) or "not downloaded" in str(error) or "pip install" in str(error):
            pytest.skip(str(error))
        raise
    assert EXPECTED[name].items() <= about["counts"].items()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"corpus.json", *about["files"]}
    for file, counts in about["files"].items():
        path = tmp_path / "out" / file
        assert path.stat().st_size == counts["bytes"]
        if path.suffix == ".tar":
            assert len(samples(path)) == counts["samples"]
