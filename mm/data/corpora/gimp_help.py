"""The GIMP manual: documents in which pictures stand between the sentences that speak of them.

The languages are parallel: a page has the same name in each, and mostly the same pictures.
"""

import io
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from mm.data.corpora.build import Workbench
from mm.data.corpora.htmltext import Picture, read_page

HELP = "usr/share/gimp/2.0/help"
LICENCE = "GFDL-1.2+"
# Smaller files are icons of keys, notes and tools that stand inside a sentence.
SMALLEST_PICTURE = 3_000


def build(bench: Workbench) -> None:
    for language in bench.options["languages"]:
        package = f"gimp-help-{language.lower().replace('_', '-')}"
        pages = bench.unpack(package, lambda path: path.startswith(f"{HELP}/")) / HELP
        with bench.shards(language) as shards:
            for path in sorted(pages.glob("*/*.html")):
                title, parts, media = read_document(path)
                bench.counts[f"{language} pages"] += 1
                if not media:
                    bench.counts[f"{language} pages dropped: no picture"] += 1
                    continue
                about = {
                    "parts": parts,
                    "language": language,
                    "title": title,
                    "source": f"{package}/{path.name}",
                    "licence": LICENCE,
                }
                shards.write(path.stem.replace(".", "_"), {"json": about, **media})
                bench.counts[f"{language} documents"] += 1
                bench.counts[f"{language} pictures"] += len(media)
                bench.counts[f"{language} characters"] += sum(len(part.get("text", "")) for part in parts)
                bench.progress(f"reading {package}", bench.counts[f"{language} documents"])


def read_document(path: Path) -> tuple[str, list[dict[str, str]], dict[str, bytes | dict[str, Any]]]:
    """Title, parts and media of a page. The `image` of a part is the name of its bytes among the media.

    Small or missing pictures are no parts; the text around them becomes one.
    """
    page = read_page(path.read_text(encoding="utf-8"))
    parts: list[dict[str, str]] = []
    media: dict[str, bytes | dict[str, Any]] = {}
    for part in page.parts:
        if isinstance(part, Picture):
            data = _picture(path.parent, part.source)
            if data is not None:
                name = f"{len(media):04d}{PurePosixPath(part.source).suffix.lower()}"
                media[name] = data
                parts.append({"image": name, "alt": part.alt})
        elif parts and "text" in parts[-1]:
            parts[-1]["text"] += f"\n{part}"
        else:
            parts.append({"text": part})
    return page.title, parts, media


def _picture(folder: Path, source: str) -> bytes | None:
    from PIL import Image, UnidentifiedImageError

    path = (folder / unquote(source)).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size < SMALLEST_PICTURE:
        return None
    data = path.read_bytes()
    try:
        Image.open(io.BytesIO(data), formats=["PNG", "JPEG"])
    except UnidentifiedImageError:
        return None
    return data
