"""Corpora that a user can build anywhere: real data out of Debian and PyPI packages, and one made up (docs/corpora.md).

A corpus is an entry in a plain dict; the module that builds it is imported when it is built.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Corpus:
    """What a corpus is, before anything is downloaded. Sizes in MB, as measured for docs/corpora.md."""

    about: str
    download: int
    disk: int
    licence: str
    needs: str
    """Python packages that building it imports, beyond those of the framework."""
    build: str
    """`module:function`, called with the `Workbench` of mm.data.corpora.build."""
    options: dict[str, Any] = field(default_factory=dict)
    """What may be chosen, with its default."""

    def builder(self) -> Callable[..., None]:
        module, _, function = self.build.partition(":")
        builder: Callable[..., None] = getattr(importlib.import_module(module), function)
        return builder


CORPORA = {
    "emoji": Corpus(
        "emoji pictures (136 x 128) with names and keywords in 20 languages",
        27, 38, "OFL-1.1, Unicode-DFS-2016", "fonttools, uharfbuzz", "mm.data.corpora.emoji:build",
    ),
    "stamps": Corpus(
        "Tux Paint stamps: pictures with captions in 78 languages, spoken captions in 24, sounds",
        161, 207, "GPL-2", "cairosvg", "mm.data.corpora.stamps:build",
    ),
    "clipart": Corpus(
        "Open Clip Art with the titles and keywords its authors gave: noisy, as on the web",
        156, 26, "public domain", "", "mm.data.corpora.clipart:build",
    ),
    "gimp-help": Corpus(
        "the GIMP manual as interleaved text and pictures, one shard set a language",
        50, 58, "GFDL-1.2+", "", "mm.data.corpora.gimp_help:build", {"languages": ["en"]},
    ),
    "debian-text": Corpus(
        "text of eight domains: man pages, kernel, handbook, Python, WordNet, installation, quotes, scripture",
        127, 40, "per document", "", "mm.data.corpora.debian_text:build",
    ),
    "music": Corpus(
        "clips of 5 s, or longer, rendered from scores: the instrument and tempo are known exactly",
        27, 28, "see docs/corpora.md", "soundfile", "mm.data.corpora.music:build",
        {"count": 200, "seed": 0, "seconds": 5.0},
    ),
    "clips": Corpus(
        "nine short real videos, one of them with timed captions",
        107, 17, "per clip", "", "mm.data.corpora.clips:build",
    ),
    "pcfg": Corpus(
        "documents of a levelled grammar with known latents, for studies of metadata (docs/pcfg.md)",
        0, 1, "none needed", "", "mm.data.corpora.pcfg:build",
        {"count": 50_000, "seed": 0, "depth": 3, "symbols": 4, "rules": 3, "conditioned": 0.5},
    ),
}  # fmt: skip
