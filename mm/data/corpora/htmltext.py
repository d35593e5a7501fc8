"""An HTML page as running text and pictures in order: navigation, scripts and styles left out."""

import re
from dataclasses import dataclass
from html.parser import HTMLParser

BLOCKS = frozenset(
    ["address", "article", "aside", "blockquote", "br", "caption", "center", "dd", "div", "dl", "dt", "figcaption",
     "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section",
     "table", "tbody", "td", "th", "thead", "title", "tr", "ul"]
)  # fmt: skip
VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])
SKIPPED = frozenset(["head", "nav", "script", "style"])
# What DocBook, Publican and Sphinx put around a page, by class, role or id.
AROUND = frozenset(
    ["navheader", "navfooter", "navigation", "toc", "docnav", "banner", "related", "sphinxsidebar", "footer",
     "headerlink"]
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An image that a page shows: where it is, as written there, and its alternative text."""

    source: str
    alt: str


@dataclass(frozen=True)
class Page:
    title: str
    parts: list[str | Picture]
    """In order; two texts never follow one another."""

    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))


def read_page(html: str) -> Page:
    """
    >>> read_page("<title>A</title><p>one<b>two</b></p><img src='a.png' alt='x'>").parts
    ['onetwo', Picture(source='a.png', alt='x')]
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    parts: list[str | Picture] = []
    for part in [*reader.parts, "".join(reader.text)]:
        if isinstance(part, Picture):
            parts.append(part)
        elif text := _tidy(part):
            parts.append(text)
    return Page(_tidy("".join(reader.title)), parts)


def _tidy(text: str) -> str:
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n\n"))
    return "\n".join(line for line in lines if line)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.text: list[str] = []
        self.parts: list[str | Picture] = []
        self._open: list[str] = []
        self._skipping = 0  # how many open elements there were when what is skipped began

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in BLOCKS:
            self.text.append("\n\n")
        if tag == "img" and not self._skipping and given.get("src"):
            self.parts += ["".join(self.text), Picture(given["src"], " ".join(given.get("alt", "").split()))]
            self.text = []
        if tag in VOID:
            return
        self._open.append(tag)
        words = {*given.get("class", "").split(), given.get("role", ""), given.get("id", "")}
        if not self._skipping and (tag in SKIPPED or words & AROUND):
            self._skipping = len(self._open)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.text.append("\n\n")
        if tag in self._open:  # elements that were left open end with the one around them
            while self._open.pop() != tag:
                pass
            if len(self._open) < self._skipping:
                self._skipping = 0

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "title":
            self.title.append(data)
        elif not self._skipping:
            self.text.append(data.replace("\n", "\n\n") if "pre" in self._open else re.sub(r"\s+", " ", data))
