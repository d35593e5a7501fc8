"""Open Clip Art: drawings with the titles and keywords that their authors typed in, as noisy as captions of the web.

The texts stand in the metadata of the SVG files, the pictures are the PNG files of the same names. What cannot be a
caption at all is left out and counted: generated series, icon themes, and more than a few pictures of one title.
"""

import hashlib
import io
import re
import struct
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Any

from mm.data.corpora.build import Workbench, jpeg, on_white

ROOT = "usr/share/openclipart"
SIDE = 224
MAX_PIXELS = 100_000_000
SAME_TITLE = 3
KEYWORDS = 4
# Series that a program drew or that say what they are for instead of what they show.
SERIES = re.compile(r"etiquette|flat icon collection|icon.?(theme|set)|svg theme|^cards?( figures?\b.*)?$", re.I)
SERIES_FOLDERS = ("shapes/stars", "special/gradients", "special/patterns")

# Numbers, and addresses that a program wrote in place of words.
NO_WORD = re.compile(r"\d*|HASH\(0x\w+\)", re.I)


def build(bench: Workbench) -> None:
    drawings = bench.unpack("openclipart-svg", lambda path: path.startswith(ROOT)) / ROOT / "svg"
    pictures = bench.unpack("openclipart-png", lambda path: path.startswith(ROOT)) / ROOT / "png"
    titles = Counter[str]()
    seen = set[bytes]()
    with bench.shards("clipart") as shards:
        for path in sorted(drawings.rglob("*.svg")):
            name = path.relative_to(drawings).with_suffix("")
            about = read_metadata(path.read_bytes())
            picture = (pictures / name).with_name(f"{name.name}.png")
            data = picture.read_bytes() if picture.is_file() else b""
            reason = _reason(about, name.parent.as_posix(), data, titles, seen)
            image = b"" if reason else _draw(data)
            if reason or not image:
                bench.counts[f"dropped: {reason or 'the PNG is damaged'}"] += 1
                continue
            about |= {"label": name.parent.as_posix(), "source": f"openclipart-png/{name.as_posix()}.png"}
            shards.write(name.as_posix().replace("/", "-").replace(".", "_"), {"jpg": image, "json": about})
            bench.counts["pictures"] += 1
            bench.progress("drawing clip art", bench.counts["pictures"])


def _reason(about: dict[str, Any], folder: str, data: bytes, titles: Counter[str], seen: set[bytes]) -> str:
    """Why a drawing is left out, or "". Counts titles and pictures as it goes."""
    title = about.get("title", "").lower()
    if not title:
        return "no title"
    if folder.startswith(SERIES_FOLDERS) or SERIES.search(title):
        return "one of a generated series"
    if not data:
        return "no PNG of it"
    if pixels(data) > MAX_PIXELS:
        return f"over {MAX_PIXELS // 1_000_000} megapixels"
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest in seen:
        return "the same picture again"
    seen.add(digest)
    titles[title] += 1
    return f"more than {SAME_TITLE} of one title" if titles[title] > SAME_TITLE else ""


def read_metadata(svg: bytes) -> dict[str, Any]:
    """Title, description, keywords and licence of an SVG's RDF metadata, and a caption made of title and keywords.

    Empty when the metadata cannot be parsed.
    """
    match = re.search(rb"<metadata.*?</metadata>", svg, re.S)
    if match is None:
        return {}
    prefixes = {name: uri for name, uri in re.findall(rb'xmlns:(\w+)\s*=\s*"([^"]*)"', svg)}
    declared = b" ".join(b'xmlns:%s="%s"' % pair for pair in prefixes.items())
    inner = re.sub(rb'\sxmlns:\w+\s*=\s*"[^"]*"', b"", match[0])
    try:
        work = next(_all(ET.fromstring(b"<x %s>%s</x>" % (declared, inner)), "Work"))
    except (ET.ParseError, StopIteration):
        return {}
    words = dict.fromkeys(_text(item) for item in _all(work, "li"))
    keywords = [word for word in words if not NO_WORD.fullmatch(word)]
    title = _text(next((child for child in work if _local(child) == "title"), None))
    licence = next((value for child in _all(work, "license") for value in child.attrib.values()), "")
    extra = [word for word in keywords if word.lower() != title.lower()][:KEYWORDS]
    return {
        "caption": ", ".join([title, *extra]),
        "title": title,
        "description": _text(next((child for child in work if _local(child) == "description"), None)),
        "keywords": keywords,
        "licence": "public domain" if "publicdomain" in licence.lower() else licence,
    }


def _all(element: ET.Element, name: str) -> Any:
    return (child for child in element.iter() if _local(child) == name)


def _local(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ET.Element | None) -> str:
    return " ".join((element.text or "").split()) if element is not None else ""


def pixels(png: bytes) -> int:
    """Width x height in a PNG's header; 0 for what is no PNG."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        return 0
    width, height = struct.unpack(">II", png[16:24])
    return int(width * height)


def _draw(data: bytes) -> bytes:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked before
            return jpeg(on_white(Image.open(io.BytesIO(data), formats=["PNG"]), SIDE))
    except (OSError, SyntaxError, ValueError):
        return b""
