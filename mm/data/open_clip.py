"""What open_clip says of its models and how it reads texts, taken from its files: importing it would bring torch.

Texts are cleaned before they are tokenised, which `tokenizers` cannot do (`CLEAN`), and most models have CLIP's own
byte-level BPE (`clip_bpe`). Source: open_clip 3, `tokenizer.py`, `model_configs/`.
"""

import gzip
import html
import importlib.util
import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mm.errors import DataError
from mm.settings import nearest

BEGIN, END = "<start_of_text>", "<end_of_text>"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
MERGES = 48_894  # of those in the file: the vocabulary of 49,408 has 2 * 256 bytes and 2 special tokens besides
UNPUNCTUATED = str.maketrans("", "", string.punctuation)


@cache
def folder() -> Path:
    """Of the installed package. Raises `DataError` where there is none."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise DataError("open_clip is not installed; pip install open_clip_torch")
    return Path(found.submodule_search_locations[0])


def model_config(name: str) -> dict[str, Any]:
    """Of a model such as `ViT-B-32`: `embed_dim`, `vision_cfg`, `text_cfg`, … Raises `DataError` for an unknown one."""
    path = folder() / "model_configs" / f"{name}.json"
    if not path.is_file():
        known = (path.stem for path in path.parent.glob("*.json"))
        raise DataError(f"open_clip/{name}: no such model; {nearest(name, known)}")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def clip_bpe() -> tokenizers.Tokenizer:
    """CLIP's tokenizer, for cleaned texts: words, single digits and runs of other signs, each by BPE of its bytes."""
    with gzip.open(folder() / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]  # the first is a header
    merges = [(first, second) for first, second in map(str.split, lines)]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    characters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]
    tokens = [*characters, *(f"{one}</w>" for one in characters), *("".join(pair) for pair in merges), BEGIN, END]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens([BEGIN, END])
    around = [(token, vocabulary[token]) for token in (BEGIN, END)]
    backend.post_processor = processors.TemplateProcessing(f"{BEGIN} $A {END}", special_tokens=around)
    return backend


def _basic(text: str) -> str:
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _whitespace(text: str) -> str:
    return " ".join(_basic(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    return " ".join(_basic(text).replace("_", " ").translate(UNPUNCTUATED).lower().split())


CLEAN: dict[str, Callable[[str], str]] = {"whitespace": _whitespace, "lower": _lower, "canonicalize": _canonicalize}
"""How texts are cleaned, by open_clip's names."""
