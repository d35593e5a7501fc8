"""Tux Paint stamps: pictures with captions in 78 languages, these captions spoken in 24, and sounds.

A stamp is a handful of files with one stem: the picture, `STEM.txt` with the caption in English and then a line a
language, `STEM_desc_fr.ogg` with the French caption spoken, `STEM.ogg` with the sound that the thing makes. Of numbers
and letters there is no sound: `7.ogg` and `7_fr.ogg` are the word.
"""

import importlib
import io
import re
from pathlib import Path
from typing import Any

from mm.data.corpora.build import Workbench, jpeg, on_white
from mm.errors import DataError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
SIDE = 256
LANGUAGE = r"[a-z]{2,3}(?:_[A-Za-z]{2})?"
SPEECH = re.compile(rf"(?P<stem>.+?)(?P<desc>_desc)?(?:_(?P<language>{LANGUAGE}))?(?:\.ogg)?\.(?P<ext>ogg|wav)")


def build(bench: Workbench) -> None:
    root = bench.unpack(PACKAGE, lambda path: path.startswith(f"{STAMPS}/")) / STAMPS
    captions = _write_pictures(bench, root)
    _write_sounds(bench, root, captions)


def _write_pictures(bench: Workbench, root: Path) -> dict[str, dict[str, str]]:
    """Returns the captions, language -> text, of every stamp that was written, by its stem below `root`."""
    written: dict[str, dict[str, str]] = {}
    with bench.shards("images") as shards:
        for path in sorted(root.rglob("*.txt")):
            stem = path.relative_to(root).with_suffix("").as_posix()
            captions = read_captions(path.read_bytes())
            picture = next((path.with_suffix(ext) for ext in (".png", ".svg") if path.with_suffix(ext).exists()), None)
            if picture is None or not captions:
                bench.counts["stamps dropped: no picture" if picture is None else "stamps dropped: no caption"] += 1
                continue
            if picture.suffix == ".svg" and b"<text" in picture.read_bytes():
                # It would look different on every machine.
                bench.counts["stamps dropped: has text, and brings no font for it"] += 1
                continue
            try:
                image = jpeg(on_white(_open(picture), SIDE))
            except (DataError, ImportError):
                raise
            except Exception:  # whatever cairosvg makes of a drawing that it does not understand
                bench.counts["stamps dropped: the picture cannot be drawn"] += 1
                continue
            about = {
                "captions": [{"language": language, "text": text} for language, text in captions.items()],
                "label": path.parent.relative_to(root).as_posix(),
                "source": picture.relative_to(root).as_posix(),
                "licence": "GPL-2",
            }
            shards.write(key_of(stem), {"jpg": image, "json": about})
            written[stem] = captions
            bench.counts["pictures"] += 1
            bench.counts[f"pictures from {picture.suffix[1:]}"] += 1
            bench.counts["captions"] += len(captions)
            bench.progress("drawing stamps", bench.counts["pictures"])
    return written


def _write_sounds(bench: Workbench, root: Path, captions: dict[str, dict[str, str]]) -> None:
    """Speech and sounds go to shards of their own, each with the key of the picture it belongs to."""
    with bench.shards("speech") as speech, bench.shards("sounds") as sounds:
        for path in sorted([*root.rglob("*.ogg"), *root.rglob("*.wav")]):
            name = path.relative_to(root).as_posix()
            found = _owner(name, captions)
            if found is None:
                bench.counts["recordings dropped: no picture with a caption"] += 1
                continue
            stem, spoken, language, ext = found
            about = {"text": captions[stem].get("en", ""), "image": key_of(stem), "source": name, "licence": "GPL-2"}
            if not spoken:
                sounds.write(key_of(stem), {ext: path.read_bytes(), "json": about})
                bench.counts["sounds"] += 1
                continue
            text = _text_in(captions[stem], language)
            if text is None:
                bench.counts["recordings dropped: no caption in its language"] += 1
                continue
            about |= {"text": text, "language": language}
            speech.write(key_of(name.removesuffix(f".{ext}")), {ext: path.read_bytes(), "json": about})
            bench.counts["speech"] += 1
            bench.counts[f"speech {language}"] += 1
            bench.progress("sorting recordings", bench.counts["speech"])


def read_captions(text: bytes) -> dict[str, str]:
    """Language -> caption of a stamp's `.txt`: the first line is English, then `LANGUAGE.utf8=…`.

    >>> read_captions("A wapiti.\\nde.utf8=Ein Wapiti.\\nxx.utf8=\\n".encode())
    {'en': 'A wapiti.', 'de': 'Ein Wapiti.'}
    """
    first, *rest = text.decode("utf-8-sig", errors="replace").splitlines() or [""]
    captions = {"en": first.strip()}
    for line in rest:
        if match := re.fullmatch(r"([\w@]+)\.utf-?8=(.*)", line.strip(), re.I):
            captions[match[1]] = match[2].strip()
    return {language: caption for language, caption in captions.items() if caption and "\ufffd" not in caption}


def _owner(name: str, stems: Any) -> tuple[str, bool, str, str] | None:
    """The stamp a recording belongs to, whether it is speech, its language, its extension."""
    match = SPEECH.fullmatch(name)
    plain, _, ext = name.rpartition(".")
    if plain in stems and not plain.startswith("symbols/"):  # a stem may itself end in what looks like a language
        return plain, False, "", ext
    if match is None:
        return None
    stem = match["stem"]
    if stem not in stems or not (match["desc"] or stem.startswith("symbols/")):
        return None
    language, _, country = (match["language"] or "en").partition("_")
    return stem, True, f"{language}_{country.upper()}" if country else language, ext


def _text_in(captions: dict[str, str], language: str) -> str | None:
    """The caption in a language, whatever its case; without one for the country, that of the language."""
    lower = {name.lower(): text for name, text in captions.items()}
    return lower.get(language.lower()) or lower.get(language.lower().partition("_")[0])


def _open(path: Path) -> Any:
    from PIL import Image

    if path.suffix != ".svg":
        return Image.open(path)
    try:
        cairosvg: Any = importlib.import_module("cairosvg")
    except OSError as error:  # the Python package is there, the library that it wraps is not
        raise DataError(
            f"stamps: cairosvg needs the cairo library (Debian: apt-get install libcairo2): {error}"
        ) from None
    return Image.open(io.BytesIO(cairosvg.svg2png(bytestring=path.read_bytes(), output_width=2 * SIDE)))


def key_of(stem: str) -> str:
    return stem.replace("/", "-").replace(".", "_")
