"""Text of eight domains out of named Debian packages, never of what happens to be installed.

One document a man page, manual page, quote, biblical chapter or 50 dictionary entries. Exact duplicates are dropped
over all domains; every document says where it is from and under which licence.
"""

import gzip
import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mm.data.corpora.build import Workbench
from mm.data.corpora.htmltext import read_page

MAN_LICENCE = "free, page by page: see the package's copyright file"
SHORTEST = 20
ENTRIES = 50
NOUNS_VERBS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclass(frozen=True)
class Document:
    """`source`: the path in the package, and a number where a file holds several documents."""

    text: str
    title: str
    language: str
    source: str


def build(bench: Workbench) -> None:
    seen = set[bytes]()
    for domain, packages, licence, read in DOMAINS:
        records: list[dict[str, Any]] = []
        for package in packages:
            for document in read(bench, package):
                text = document.text.strip()
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if len(text) < SHORTEST:
                    bench.counts[f"{domain} dropped: shorter than {SHORTEST} characters"] += 1
                elif digest in seen:
                    bench.counts[f"{domain} dropped: the same text again"] += 1
                else:
                    seen.add(digest)
                    source = f"{package}/{document.source}"
                    records.append(
                        {
                            "id": f"{domain}/{len(records):06d}",
                            "text": text,
                            "domain": domain,
                            "language": document.language,
                            "licence": licence,
                            "source": source,
                            "title": document.title,
                        }
                    )
                    bench.counts[f"{domain} documents"] += 1
                    bench.counts[f"{domain} bytes"] += len(text.encode())
                    bench.counts[f"bytes in {document.language}"] += len(text.encode())
                    bench.progress(f"reading {package}", bench.counts[f"{domain} documents"])
        bench.lines(domain, records)


def manpages(bench: Workbench, package: str) -> Iterator[Document]:
    root = bench.unpack(package, lambda path: path.startswith("usr/share/man/"))
    for path in sorted(root.glob("usr/share/man/**/man*/*.gz")):
        parts = path.relative_to(root / "usr/share/man").parts
        language = language_of(parts[0]) if len(parts) == 3 else "en"
        text = gzip.decompress(path.read_bytes()).decode(errors="replace")
        if re.search(r"^\.Sh ", text, re.M):
            bench.counts["manpages dropped: in the mdoc language"] += 1
            continue
        name, _, section = path.name.removesuffix(".gz").rpartition(".")
        yield Document(plain_man(text), f"{name}({section})", language, _source(path, root))


def kernel(bench: Workbench, package: str) -> Iterator[Document]:
    docs = f"usr/share/doc/{package}/Documentation/"
    root = bench.unpack(package, lambda path: path.startswith(docs) and path.endswith((".rst.gz", ".txt.gz")))
    for path in sorted((root / docs).rglob("*.gz")):
        text = gzip.decompress(path.read_bytes()).decode(errors="replace")
        where = path.relative_to(root / docs)
        language = where.parts[1] if where.parts[0] == "translations" and len(where.parts) > 2 else "en"
        yield Document(text, _first_title(text), language_of(language), _source(path, root))


def handbook(bench: Workbench, package: str) -> Iterator[Document]:
    return _pages(bench, package, f"usr/share/doc/{package}/html/")


def install_guide(bench: Workbench, package: str) -> Iterator[Document]:
    return _pages(bench, package, f"usr/share/doc/{package}/")


def python_docs(bench: Workbench, package: str) -> Iterator[Document]:
    sources = f"usr/share/doc/{package.removesuffix('-doc')}/html/_sources/"
    root = bench.unpack(package, lambda path: path.startswith(sources) and path.endswith(".txt"))
    for path in sorted(root.rglob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield Document(text, _first_title(text), "en", _source(path, root))


def dictionary(bench: Workbench, package: str) -> Iterator[Document]:
    root = bench.unpack(package, lambda path: path.startswith("usr/share/wordnet/data."))
    for path in sorted(root.glob("usr/share/wordnet/data.*")):
        entries = [entry for line in path.read_text(encoding="utf-8").splitlines() if (entry := wordnet_entry(line))]
        for start in range(0, len(entries), ENTRIES):
            words = [entry.partition(" (")[0].partition(",")[0] for entry in entries[start : start + ENTRIES]]
            title = f"{words[0]} – {words[-1]}"
            text = "\n".join(entries[start : start + ENTRIES])
            yield Document(text, title, "en", f"{_source(path, root)}#{start}")


def quotes(bench: Workbench, package: str) -> Iterator[Document]:
    folder = "usr/share/games/fortunes/"
    root = bench.unpack(package, lambda path: path.startswith(folder) and "." not in path)
    for path in sorted((root / folder).iterdir()):
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, quote in enumerate(re.split(r"^%\n?", text, flags=re.M)):
            yield Document(quote, path.name, "en", f"{_source(path, root)}#{number}")


def scripture(bench: Workbench, package: str) -> Iterator[Document]:
    file = "usr/lib/bible.data"
    root = bench.unpack(package, file.__eq__)
    chapters: dict[str, list[str]] = {}
    for line in bible_text((root / file).read_bytes()).splitlines():
        if verse := re.fullmatch(r"([1-3]?[A-Z][A-Za-z]+\d+):\d+ (.*)", line):
            chapters.setdefault(verse[1], []).append(verse[2].strip())
    for chapter, verses in chapters.items():
        yield Document("\n".join(verses), chapter, "en", f"{file}#{chapter}")


# Domain, packages, licence, reader. The order decides which of two equal texts stays.
DOMAINS = [
    (
        "manpages",
        ["manpages", "manpages-dev", "manpages-de", "manpages-fr", "manpages-es", "manpages-ja", "manpages-ru"],
        MAN_LICENCE,
        manpages,
    ),
    ("kernel-docs", ["linux-doc-6.1"], "GPL-2", kernel),
    ("handbook", ["debian-handbook"], "GPL-2+ or CC-BY-SA-3.0", handbook),
    ("python-docs", ["python3.11-doc"], "PSF-2.0", python_docs),
    ("dictionary", ["wordnet-base"], "WordNet", dictionary),
    ("install-guide", ["installation-guide-amd64"], "GPL-2", install_guide),
    ("quotes", ["fortunes"], "BSD, quotes by various authors", quotes),
    ("scripture", ["bible-kjv-text"], "public domain", scripture),
]


def _pages(bench: Workbench, package: str, folder: str) -> Iterator[Document]:
    """HTML pages that stand in a folder a language."""
    root = bench.unpack(package, lambda path: path.startswith(folder) and path.endswith(".html"))
    for path in sorted((root / folder).glob("*/*.html")):
        page = read_page(path.read_text(encoding="utf-8", errors="replace"))
        yield Document(page.text(), page.title, language_of(path.parent.name), _source(path, root))


def language_of(folder: str) -> str:
    """The language that a folder is named by; its country only where that is another way of writing.

    >>> language_of("de-DE"), language_of("zh_TW"), language_of("pt-BR")
    ('de', 'zh-TW', 'pt-BR')
    """
    language, _, country = folder.replace("_", "-").partition("-")
    return f"{language}-{country}" if country and language in ("zh", "pt") else language


def _source(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _first_title(text: str) -> str:
    """The first heading of reStructuredText: a line that is underlined."""
    match = re.search(r"^(\S.*)\n([=\-~#*^])\2{2,}\s*$", text, re.M)
    return match[1].strip() if match else ""


def wordnet_entry(line: str) -> str | None:
    """A line of WordNet's `data.*` (wndb(5WN)) as a sentence; None for the licence at its head.

    >>> wordnet_entry("02084071 05 n 02 dog 0 domestic_dog 0 000 | a canine; 'it barked'  ")
    "dog, domestic dog (noun): a canine; 'it barked'"
    """
    head, bar, gloss = line.partition(" | ")
    if not bar or line.startswith(" "):
        return None
    fields = head.split()
    count = int(fields[3], 16)
    words = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    return f"{', '.join(words)} ({NOUNS_VERBS[fields[2]]}): {gloss.strip()}"


def bible_text(data: bytes) -> str:
    """The text in `bible.data`: a table of windows, each packed with the LZW of Unix `compress`."""
    start = 0x54
    _, windows = struct.unpack_from(">II", data, start)
    offsets = [*struct.unpack_from(f">{windows}I", data, start + 8), len(data)]
    return b"".join(_lzw(data[a:b]) for a, b in pairwise(offsets)).decode("latin-1")


def _lzw(data: bytes) -> bytes:
    table = [bytes([value]) for value in range(256)] + [b""]  # 256 would clear the table
    out = bytearray()
    width, bits, held = 9, 0, 0
    before = b""
    for byte in data:
        bits |= byte << held
        held += 8
        if held < width:
            continue
        code = bits & ((1 << width) - 1)
        bits >>= width
        held -= width
        now = table[code] if code < len(table) else before + before[:1]
        out += now
        if before:
            table.append(before + now[:1])
            width = max(width, len(table).bit_length())
        before = now
    return bytes(out)


# troff's names of characters that man pages use.
CHARACTERS = {
    "aq": "'", "dq": '"', "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "em": "—", "en": "–", "hy": "-", "mi": "-",
    "bu": "•", "co": "©", "rg": "®", "tm": "™", "ha": "^", "ti": "~", "rs": "\\", "sl": "/", "ga": "`", "ul": "_",
    "<=": "≤", ">=": "≥", "!=": "≠", "->": "→", "<-": "←", "mu": "×", "+-": "±", "de": "°", "at": "@", "sh": "#",
    "Fo": "«", "Fc": "»", "Po": "£", "Eu": "€", "ba": "|", "or": "|", "lB": "[", "rB": "]", "lC": "{", "rC": "}",
    "la": "⟨", "ra": "⟩", "aa": "´", "ss": "ß", "'e": "é", "`e": "è", ":a": "ä", ":o": "ö", ":u": "ü", ",c": "ç",
}  # fmt: skip
ESCAPE = re.compile(
    r"""\\(?:
      \[(?P<long>[^\]]*)\] | \((?P<two>..) | \*(?:\[(?P<string>[^\]]*)\]|\((?P<string2>..)|.)
    | f(?:\[[^\]]*\]|\(..|.) | [sk](?:[-+]?\d+|\[[^\]]*\]|.) | [hvwolLDbXZ]'[^']*' | [mMnF](?:\[[^\]]*\]|\(..|.)
    | (?P<one>.) | $)""",
    re.X,
)
SINGLE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "´", "`": "`", ".": ".", "t": "\t"}
FONTS = frozenset(["B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "R"])
BREAKS = frozenset(
    ["PP", "P", "LP", "TP", "TQ", "IP", "HP", "br", "sp", "RS", "RE", "nf", "fi", "EX", "EE", "SY", "YS", "UE", "ME",
     "TS", "TE"]
)  # fmt: skip


def plain_man(source: str) -> str:
    r"""A man page (man(7)) as plain text: headings and paragraphs kept, fonts and layout dropped.

    >>> plain_man('.TH A 1\n.SH NAME\nls \\- list\n.TP\n.BR \\-a ", all"\nshow\n.IR b (1)')
    'NAME\nls - list\n\n-a, all\nshow b(1)'
    """
    lines: list[str] = []
    paragraph: list[str] = []
    filled = True  # lines are run together, as opposed to shown as they stand
    table = ""  # "head": the format lines of a table, "body": its cells
    skipping = False  # the definition of a macro
    term = False  # the next text is the term of a list

    def add(text: str) -> None:
        nonlocal term
        (paragraph if filled else lines).append(text.strip() if filled else text)
        if term:
            end(blank=False)
            term = False

    def end(blank: bool) -> None:
        if text := " ".join(paragraph).strip():
            lines.append(text)
        paragraph.clear()
        if blank and lines and lines[-1]:
            lines.append("")

    for raw in source.replace("\\\n", "").splitlines():
        line = re.sub(r'\\["#].*', "", raw).rstrip()
        if skipping:
            skipping = not line.startswith("..")
        elif re.match(r"[.'](de|ig|am)\b", line):
            skipping = True
        elif table and not line.startswith(".TE"):
            if table == "head":
                table = "body" if line.endswith(".") else "head"
            elif not re.match(r"[.'_=]", line) and line not in ("T{", "T}"):
                lines.append(_unescape(re.sub(r"T[{}]", "", line)))
        elif re.match(r"[.'](?!\\)", line):
            macro, *arguments = _arguments(line[1:])
            if macro in ("SH", "SS"):
                end(blank=True)
                lines.append(_unescape(" ".join(arguments)))
            elif macro in FONTS or macro in ("UR", "MT"):
                # Fonts that alternate join their arguments, `.BR ls (1)`.
                add(_unescape(("" if len(macro) == 2 and macro in FONTS - {"SM", "SB"} else " ").join(arguments)))
            elif macro in BREAKS:
                end(blank=macro not in ("br", "RS", "RE", "fi", "EE"))
                filled = {"nf": False, "EX": False, "fi": True, "EE": True}.get(macro, filled)
                table = "head" if macro == "TS" else ""
                term = macro in ("TP", "TQ")
                if macro == "IP" and arguments:
                    label = _unescape(arguments[0])
                    (paragraph if len(label) < 3 else lines).append(label)  # a bullet, or a term
        elif line:
            add(_unescape(line))
        else:
            end(blank=True)
    end(blank=False)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _arguments(line: str) -> list[str]:
    """A request and its arguments; quotes keep spaces, a doubled quote stands for itself."""
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |[^\s"])\S*(?:\\ \S*)*)', line.strip())
    return [quoted.replace('""', '"') or plain for quoted, plain in found] or [""]


def _unescape(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        name = match["long"] or match["two"]
        if name:
            if code := re.fullmatch(r"u([0-9A-F]{4,6})", name):
                return chr(int(code[1], 16))
            return CHARACTERS.get(name, "")
        if string := match["string"] or match["string2"]:
            return CHARACTERS.get(string, "")
        return SINGLE.get(match["one"] or "", "")

    return ESCAPE.sub(character, text)
