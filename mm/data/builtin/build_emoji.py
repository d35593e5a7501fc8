"""Build the shipped "emoji" data set: 1,855 pictures with names and keywords in six languages.

Pictures come from the bitmaps inside the Noto Color Emoji font, texts from Unicode's CLDR annotations, both
as packaged by Debian 12. Pictures that look or mean nearly the same form a group, and a group is never
divided between splits, so that a test picture has no near-twin in the training data.

    python -m mm.data.builtin.build_emoji --debs DIR --out DIR      # build
    python -m mm.data.builtin.build_emoji --debs DIR --check DIR    # build again and compare

The same packages and the same Pillow give the same bytes; another Pillow may encode WebP differently, which
`--check` tells apart from a change of pixels or text.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from gzip import GzipFile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import uharfbuzz as hb
from fontTools.ttLib import TTFont
from PIL import Image, features

PACKAGES = {"fonts-noto-color-emoji": "2.042-0+deb12u1", "unicode-cldr-core": "41-0.1"}
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = "usr/share/unicode/cldr/common"
COPYRIGHT = "usr/share/doc/{}/copyright"
LANGUAGES = ("en", "de", "fr", "es", "ru", "ja")

SIZE = 64
QUALITY = 88
SEED = 0
SHARDS = {"train": 4, "validation": 1, "test": 1}
SHARES = {"train": 0.83, "validation": 0.05, "test": 0.12}
# Pictures whose THUMB x THUMB thumbnails differ by less than this (RMS over RGB, 0..255) are near-twins.
THUMB = 16
THRESHOLD = 20.0
# No shipped picture may differ by more than this (RMS) from its pixels before encoding.
LARGEST_LOSS = 25.0
# Bigger groups always go to train: one of them would make up a good part of a held-out split.
LARGEST_HELD_OUT_GROUP = 8

VARIATION = "\ufe0f"
SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
# Characters that have a text style too, but are shown as emoji without a variation selector.
_EMOJI_BY_DEFAULT = frozenset(
    "⌚⌛⏩⏪⏳◽◾☔☕♈♉♊♋♌♍♎♏♐♑♒♓♿⚓⚡⚪⚫⚽⚾⛄⛅⛔⛪⛲⛳⛵⛺⛽❓❗⬛⬜⭐⭕🀄🈚🈯"
    "🌍🌎🌏🌕🌜🍸🎓🎧🎬🎭🎮🏂🏄🏆🏊🏠🏭🐈🐕🐟🐦👂👆👇👈👉👍👎👓👪👽💣💰💳💻💿📋📚📟📤📥📦📪📫📬📭📷📹📺📻"
    "🔈🔍🔒🔓🕐🕑🕒🕓🕔🕕🕖🕗🕘🕙🕚🕛🕜🕝🕞🕟🕠🕡🕢🕣🕤🕥🕦🕧😐🚇🚍🚑🚔🚘🚭🚲🚹🚺🚼"
)
# Joiners, gender signs, the direction arrow and hair styles: they vary a concept and do not make a new one.
_MODIFIERS = dict.fromkeys([0xFE0F, 0x200D, 0x2640, 0x2642, 0x27A1, *range(0x1F9B0, 0x1F9B4)])
# Each line is one concept: variants of a person, then things that differ in colour, direction or phase only.
_SAME = [
    "🧑👨👩👱🧔",
    "🧒👦👧",
    "🧓👴👵",
    "🎅🤶",
    "🫅🤴👸",
    "🫄🤰🫃",
    "💃🕺",
    "❤🧡💛💚💙💜🤎🖤🤍♥",
    "🔴🟠🟡🟢🔵🟣🟤⚫⚪",
    "🟥🟧🟨🟩🟦🟪🟫⬛⬜◼◻◾◽▪▫",
    "🔶🔷🔸🔹",
    "🔺🔻",
    "🔲🔳",
    "📕📗📘📙",
    "👈👉👆👇☝🫵",
    "🤛🤜👊",
    "🫱🫲🫳🫴",
    "⬆↗➡↘⬇↙⬅↖",
    "↩↪⤴⤵",
    "👍👎",
    "❓❔",
    "❗❕",
    "🔍🔎",
    "🔈🔉🔊🔇",
    "🌑🌒🌓🌔🌕🌖🌗🌘",
    "🌍🌎🌏",
    "🌛🌜",
    "⛅🌤🌥🌦",
    "⛄☃",
    "☔☂",
    "⭐🌟",
    "🏠🏡",
    "🏳🏴",
    "🥇🥈🥉",
    "🙈🙉🙊",
    "💀☠",
    "💴💵💶💷",
    "📈📉",
    "📱📲📳",
    "📪📫📬📭",
    "🔅🔆",
    "🔋🪫",
    "⌛⏳",
    "⏩⏪⏫⏬",
    "⏭⏮",
    "▶◀🔼🔽",
]
_CANONICAL = {ord(char): line[0] for line in _SAME for char in line}
# Whole sequences, after the steps above, that Unicode writes in two ways.
_RESPELLED = {
    "🧑🎄": "🎅",
    "👫": "🧑🤝🧑",
    "👬": "🧑🤝🧑",
    "👭": "🧑🤝🧑",
    "💏": "🧑❤💋🧑",
    "💑": "🧑❤🧑",
    "🤱": "🧑🍼",
    "🐈🟥": "🐈",  # the black cat; colours are one concept by now
}


@dataclass
class Sample:
    """One emoji: its fully qualified sequence, its glyph's picture, and what is said about it."""

    emoji: str
    pixels: np.ndarray
    captions: list[dict[str, Any]]
    group: str = ""
    split: str = ""

    @property
    def key(self) -> str:
        return key_of(self.emoji)

    def text(self) -> str:
        """The sample's JSON member."""
        height, width = self.pixels.shape[:2]
        record = {
            "captions": self.captions,
            "emoji": self.emoji,
            "group": self.group,
            "height": height,
            "width": width,
        }
        return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    def webp(self) -> bytes:
        out = io.BytesIO()
        Image.fromarray(self.pixels).save(out, "WEBP", quality=QUALITY, method=6)
        return out.getvalue()


@dataclass
class DataSet:
    """A finished build, in memory."""

    samples: list[Sample]
    tars: dict[str, bytes] = field(default_factory=dict)
    gzips: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)


def key_of(emoji: str) -> str:
    return "-".join(f"{ord(char):x}" for char in emoji)


def read_deb(path: Path, wanted: Iterable[str]) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the control fields and the wanted files of a Debian package, without dpkg."""
    parts: dict[str, bytes] = {}
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"{path} is not a Debian package")
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            parts[header[:16].decode().rstrip(" /")] = file.read(size)
            file.seek(size % 2, io.SEEK_CUR)
    control = next(iter(_untar(parts, "control", ["control"]).values())).decode()
    fields = dict(line.split(": ", 1) for line in control.splitlines() if ": " in line and line[0] != " ")
    return fields, _untar(parts, "data", wanted)


def _untar(parts: dict[str, bytes], part: str, wanted: Iterable[str]) -> dict[str, bytes]:
    name = next(name for name in parts if name.startswith(f"{part}.tar"))
    data = parts[name]
    if name.endswith(".zst"):
        if shutil.which("zstd") is None:
            raise RuntimeError("the package is compressed with zstd: install the zstd program")
        data = subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    missing, found = set(wanted), {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if (path := member.name.removeprefix("./")) in missing and member.isfile():
                found[path] = tar.extractfile(member).read()  # type: ignore[union-attr]
                missing.remove(path)
                if not missing:
                    return found
    raise ValueError(f"the package's {name} lacks {', '.join(sorted(missing))}")


def find_debs(folder: Path) -> dict[str, Path]:
    """Return the two packages in `folder`, downloading those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = " and ".join(f"{name} {number}" for name, number in PACKAGES.items())
    advice = f"get {wanted} (Debian 12) elsewhere, put the .deb files in a folder and name it with --debs"
    found = {}
    for name, number in PACKAGES.items():
        if not list(folder.glob(f"{name}_*.deb")):
            if shutil.which("apt-get") is None:
                raise SystemExit(f"{folder} has no {name}_*.deb and there is no apt-get to download it: {advice}")
            if subprocess.run(["apt-get", "download", f"{name}={number}"], cwd=folder).returncode:
                raise SystemExit(f"apt-get could not download {name} {number}: {advice}")
        found[name] = max(folder.glob(f"{name}_*.deb"))
    return found


class Glyphs:
    """The colour bitmaps of the font, found by emoji sequence."""

    def __init__(self, data: bytes) -> None:
        font = TTFont(io.BytesIO(data), lazy=True)
        self._names = font.getGlyphOrder()
        self._strike = font["CBDT"].strikeData[0]
        self._font = hb.Font(hb.Face(data))
        variations = next(table for table in font["cmap"].tables if table.format == 14)
        styled = {chr(code) for code, _ in variations.uvsDict[ord(VARIATION)]}
        self._textual = styled - _EMOJI_BY_DEFAULT

    def qualify(self, sequence: str) -> str:
        """Add the variation selectors that CLDR leaves out: one after each that is text by default."""
        return "".join(char + VARIATION if char in self._textual else char for char in sequence)

    def draw(self, sequence: str) -> np.ndarray | None:
        """Return the picture on white as SIZE x SIZE RGB, or None if the font has no single glyph for it."""
        buffer = hb.Buffer()
        buffer.add_str(sequence)
        buffer.guess_segment_properties()
        hb.shape(self._font, buffer)
        glyphs = [self._names[info.codepoint] for info in buffer.glyph_infos]
        drawn = [glyph for glyph in glyphs if glyph in self._strike]
        if len(drawn) != 1:
            return None
        picture = Image.open(io.BytesIO(self._strike[drawn[0]].imageData)).convert("RGBA")
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def read_annotations(files: dict[str, bytes], language: str) -> dict[str, tuple[str, list[str]]]:
    """Return {sequence without variation selectors: (name, keywords)}; the keywords leave out the name."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for kind in ("annotations", "annotationsDerived"):
        for entry in ET.fromstring(files[f"{CLDR}/{kind}/{language}.xml"]).iter("annotation"):
            sequence, text = entry.attrib["cp"], (entry.text or "").strip()
            if entry.get("type") == "tts":
                names[sequence] = text
            else:
                keywords[sequence] = [word.strip() for word in text.split("|")]
    return {
        sequence: (name, [word for word in keywords.get(sequence, []) if word and word != name])
        for sequence, name in names.items()
        if name
    }


def make_samples(font: bytes, cldr: dict[str, bytes]) -> list[Sample]:
    """Draw every emoji with an English name and no skin tone, give it what captions exist, sort by key."""
    glyphs = Glyphs(font)
    texts = {language: read_annotations(cldr, language) for language in LANGUAGES}
    samples = []
    for sequence in texts["en"]:
        if SKIN_TONES & set(sequence):
            continue
        emoji = glyphs.qualify(sequence)
        pixels = glyphs.draw(emoji)
        if pixels is None:
            continue
        captions = []
        for language in LANGUAGES:
            if sequence in texts[language]:
                name, keywords = texts[language][sequence]
                captions.append({"language": language, "text": name, "keywords": keywords})
        samples.append(Sample(emoji, pixels, captions))
    return sorted(samples, key=lambda sample: sample.key)


def concept(emoji: str) -> str:
    """Return what an emoji shows, without gender, hair, direction and the like; equal for near-synonyms.

    >>> concept("👩‍🚒") == concept("👨‍🚒") == concept("🧑‍🚒")
    True
    """
    bare = "".join(_CANONICAL.get(ord(char), char) for char in emoji.translate(_MODIFIERS))
    if not bare:  # the modifier itself: a gender sign or hair style shown alone
        return "".join(_CANONICAL.get(ord(char), char) for char in emoji.replace(VARIATION, ""))
    if bare == "👪" or (len(bare) > 1 and set(bare) <= {"🧑", "🧒"}):
        return "👪"
    return _RESPELLED.get(bare, bare)


def pixel_distances(pixels: np.ndarray) -> np.ndarray:
    """Return the RMS difference of the thumbnails of N x SIZE x SIZE x 3 pictures, N x N, in 0..255.

    The arithmetic is on whole numbers until the end, so that every machine agrees which side of a threshold a
    pair is on.
    """
    count, side = len(pixels), SIZE // THUMB
    blocks = pixels.reshape(count, THUMB, side, THUMB, side, 3).astype(np.int64).sum((2, 4))
    flat = blocks.reshape(count, -1).astype(np.float64)
    products = flat @ flat.T
    squares = np.diag(products)
    total = squares[:, None] + squares[None] - 2 * products
    return np.sqrt(total / flat.shape[1]) / side**2


def assign_groups(samples: list[Sample]) -> None:
    """Join samples of one concept and samples with near-equal pixels; name a group by its smallest key."""
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(first: int, second: int) -> None:
        low, high = sorted((root(first), root(second)))
        parent[high] = low

    seen: dict[str, int] = {}
    for index, sample in enumerate(samples):
        join(seen.setdefault(concept(sample.emoji), index), index)
    close = pixel_distances(np.stack([sample.pixels for sample in samples])) < THRESHOLD
    for first, second in zip(*np.nonzero(np.triu(close, 1)), strict=True):
        join(int(first), int(second))
    for index, sample in enumerate(samples):
        sample.group = samples[root(index)].key


def assign_splits(samples: list[Sample]) -> None:
    """Deal whole groups to the splits, like cards.

    The groups lie sorted by kind (flags, then blocks of 64 code points, which hold faces, animals, food and
    so on) and within a kind by a hash of their name. Each goes to the split that is furthest below its share
    so far, so that every kind is spread over all splits in proportion.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)

    def order(name: str) -> tuple[int, str]:
        code = int(name.split("-")[0], 16)
        return (0 if 0x1F1E6 <= code <= 0x1F1FF else code >> 6, hashlib.sha256(name.encode()).hexdigest())

    held, dealt = Counter[str](), 0
    for name in sorted(groups, key=order):
        members = groups[name]
        dealt += len(members)
        split = max(SHARES, key=lambda split: SHARES[split] * dealt - held[split])
        if len(members) > LARGEST_HELD_OUT_GROUP:
            split = "train"
        held[split] += len(members)
        for sample in members:
            sample.split = split


def write_tar(samples: Iterable[Sample]) -> bytes:
    """Return a WebDataset shard with nothing in its headers that depends on time or user."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, data in (("json", sample.text().encode()), ("webp", sample.webp())):
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def compress(data: bytes) -> bytes:
    out = io.BytesIO()
    with GzipFile(fileobj=out, mode="wb", filename="", mtime=0, compresslevel=9) as file:
        file.write(data)
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def licence_text(copyright_file: str, licence: str) -> str:
    """Return the copyright lines and the licence text of the last stanzas of a Debian copyright file."""
    stanza = copyright_file[copyright_file.rindex(f"License:   {licence}") :].splitlines()[1:]
    block = copyright_file.split(f"License:   {licence}")[0].rsplit("Copyright:", 1)[1]
    holders = "\n".join(f"Copyright {line.strip()}" for line in block.strip().splitlines())
    return holders + "\n\n" + "\n".join(line[1:] if line != " ." else "" for line in stanza).strip() + "\n"


def build(debs: dict[str, Path]) -> DataSet:
    """Read the packages and return the whole data set."""
    font_name, cldr_name = PACKAGES
    font_control, font = read_deb(debs[font_name], [FONT, COPYRIGHT.format(font_name)])
    kinds = ("annotations", "annotationsDerived")
    annotations = [f"{CLDR}/{kind}/{language}.xml" for kind in kinds for language in LANGUAGES]
    cldr_control, cldr = read_deb(debs[cldr_name], [*annotations, COPYRIGHT.format(cldr_name)])

    samples = make_samples(font[FONT], cldr)
    assign_groups(samples)
    assign_splits(samples)
    result = DataSet(samples)
    for split, count in SHARDS.items():
        members = [sample for sample in samples if sample.split == split]
        random.Random(SEED).shuffle(members)
        for index in range(count):
            name = f"{split}-{index:03d}.tar"
            result.tars[name] = write_tar(members[index::count])
            result.gzips[f"{name}.gz"] = compress(result.tars[name])
    result.licences = {
        "OFL-1.1.txt": licence_text(font[COPYRIGHT.format(font_name)].decode(), "SIL-1.1"),
        "Unicode-DFS-2016.txt": licence_text(cldr[COPYRIGHT.format(cldr_name)].decode(), "Unicode-DFS-2016"),
    }
    result.manifest = describe(result, [font_control, cldr_control])
    return result


def describe(result: DataSet, controls: list[dict[str, str]]) -> dict[str, Any]:
    """Return the manifest: what is there, how it was split, and what it was made from."""
    samples = result.samples
    sizes = Counter(sample.group for sample in samples)
    captions = {
        split: {
            language: sum(
                caption["language"] == language
                for sample in samples
                if sample.split == split
                for caption in sample.captions
            )
            for language in LANGUAGES
        }
        for split in SHARDS
    }
    return {
        "name": "emoji",
        "pictures": {split: sum(sample.split == split for sample in samples) for split in SHARDS},
        "captions": captions,
        "groups": {split: len({sample.group for sample in samples if sample.split == split}) for split in SHARDS},
        "groups_kept_in_train": {name: size for name, size in sizes.most_common() if size > LARGEST_HELD_OUT_GROUP},
        "split_rule": {
            "near_twins": "same concept, or RMS difference of thumbnails below the threshold; transitive",
            "thumbnail": [THUMB, THUMB, 3],
            "threshold": THRESHOLD,
            "shares": SHARES,
            "largest_held_out_group": LARGEST_HELD_OUT_GROUP,
        },
        "picture": {"size": [SIZE, SIZE], "format": f"WebP, quality {QUALITY}, method 6"},
        "sha256": {
            "pixels": sha256(b"".join(sample.pixels.tobytes() for sample in samples)),
            "tar": {name: sha256(data) for name, data in result.tars.items()},
            "tar.gz": {name: sha256(data) for name, data in result.gzips.items()},
        },
        "debian_packages": {control["Package"]: control["Version"] for control in controls},
        "made_with": {
            "pillow": version("pillow"),
            "libwebp": features.version("webp"),
            "fonttools": version("fonttools"),
            "uharfbuzz": version("uharfbuzz"),
        },
    }


def write(result: DataSet, folder: Path) -> None:
    """Write shards, manifest and licence texts; leave other files in the folder alone."""
    (folder / "licences").mkdir(parents=True, exist_ok=True)
    for name, data in result.gzips.items():
        (folder / name).write_bytes(data)
    for name, text in result.licences.items():
        (folder / "licences" / name).write_text(text, encoding="utf-8")
    (folder / "manifest.json").write_text(
        json.dumps(result.manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def check(result: DataSet, folder: Path) -> bool:
    """Compare a fresh build with a folder, print what equals; return whether pixels and text are the same.

    Tar and gzip bytes may differ between versions of libwebp and zlib. So that the shipped pictures are
    compared themselves, not only the digest beside them, they are decoded and held against the fresh pixels.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    fresh = {f"{sample.key}.webp": sample.pixels for sample in result.samples}
    texts, losses, tars, gzips = {}, [], {}, {}
    for path in sorted(folder.glob("*.tar.gz")):
        gzips[path.name] = sha256(path.read_bytes())
        with GzipFile(path) as file:
            data = file.read()
        tars[path.name.removesuffix(".gz")] = sha256(data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    texts[path.name, member.name] = content.decode()
                elif member.name in fresh:
                    shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)
                    losses.append(np.sqrt(np.mean((shown - fresh[member.name]) ** 2)))
    expected = {}
    for name, data in result.tars.items():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    expected[f"{name}.gz", member.name] = content.decode()
    new = result.manifest["sha256"]
    alike = len(losses) == len(fresh) and max(losses) <= LARGEST_LOSS
    checks = {
        "pixels before encoding (digest)": manifest["sha256"]["pixels"] == new["pixels"],
        f"shipped pictures, decoded (worst RMS loss {max(losses, default=0):.1f})": alike,
        "text and splits": texts == expected,
        "tar bytes": tars == new["tar"],
        "tar.gz bytes": gzips == new["tar.gz"],
        "shards against their manifest": tars == manifest["sha256"]["tar"] and gzips == manifest["sha256"]["tar.gz"],
    }
    for what, same in checks.items():
        print(f"{'same     ' if same else 'DIFFERENT'}  {what}")
    for part in ("debian_packages", "made_with"):
        for name, value in manifest[part].items():
            if (now := result.manifest[part].get(name)) != value:
                print(f"note: the folder was made with {name} {value}, here is {now}")
    return all(list(checks.values())[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description="Build or check the shipped emoji data set.")
    parser.add_argument("--debs", type=Path, help="folder of the two .deb files; what lacks is downloaded into it")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="write the data set into this folder")
    action.add_argument("--check", type=Path, help="build in memory and compare with this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = build(find_debs(args.debs or Path(scratch)))
    for language in LANGUAGES:
        have = sum(caption["language"] == language for sample in result.samples for caption in sample.captions)
        print(f"{language}: {have} captions, {len(result.samples) - have} missing")
    for split, count in result.manifest["pictures"].items():
        print(f"{split}: {count} pictures in {result.manifest['groups'][split]} groups")
    if args.check:
        sys.exit(0 if check(result, args.check) else 1)
    write(result, args.out)
    print(f"{sum(map(len, result.gzips.values())) / 1e6:.2f} MB of shards in {args.out}")


if __name__ == "__main__":
    main()
