"""Documents of a levelled grammar with known latents: where metadata helps a language model, and where it hurts.

After arXiv 2504.17562: a document is its terminals, and its metadata are the latents it was written by
(`mm.data.corpora.grammar`). Every row has the metadata at every depth, `metadata_0` to `metadata_D`, so that one corpus
serves models that are shown none, some or all of it: D tokens, first the latents that are told, then masks. A document
that is not conditioned has masks alone at every depth.
"""

import gzip
import json
import string
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from mm.data.corpora.build import Workbench
from mm.data.corpora.grammar import CHOICES, NOTHING, Grammar
from mm.data.sample import keyed_rng
from mm.errors import ConfigError, DataError

TERMINALS = string.ascii_lowercase
UNKNOWN, MASK, PAD, EOS = "<unk>", "<mask>", "<pad>", "<eos>"
HELD_OUT = 20
"""One document in the validation split, and one in the test split, for so many of the training split."""


def build(bench: Workbench) -> None:
    options = bench.options
    _check(options)
    depth, symbols = options["depth"], options["symbols"]
    grammar = Grammar.draw(depth, symbols, options["rules"], options["seed"])
    _write_json(bench, "grammar.json", {"options": dict(options), **grammar.to_json()})
    _write_json(bench, "tokenizer.json", json.loads(tokenizer_of(depth, symbols).to_str()))
    held_out = -(-options["count"] // HELD_OUT)
    for split, count in (("train", options["count"]), ("validation", held_out), ("test", held_out)):
        records = []
        for number in range(count):
            records.append(_document(grammar, options, split, number))
            bench.counts["terminals"] += len(records[-1]["text"].split())
            bench.counts[f"{split} documents"] += 1
            if number % 1000 == 999 or number + 1 == count:
                bench.progress(f"writing {split} documents", number + 1)
        bench.lines(split, records)


def metadata(latents: list[int], told: int) -> str:
    """D tokens: the first `told` latents, masks for the others.

    >>> metadata([1, 0, 1], 2)
    'j0=1 j1=0 <mask>'
    """
    return " ".join(f"j{level}={choice}" if level < told else MASK for level, choice in enumerate(latents))


def tokenizer_of(depth: int, symbols: int) -> tokenizers.Tokenizer:
    """A token a word: terminals, latents, mask; `<pad>` and `<eos>` as special tokens."""
    latents = [f"j{level}={choice}" for level in range(depth) for choice in range(CHOICES)]
    words = [UNKNOWN, MASK, *latents, *TERMINALS[:symbols]]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, EOS])
    return tokenizer


def read_split(folder: Path, split: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first documents of a split: terminals by number, int [B, N] with `NOTHING` behind, and latents, int [B, D].

    Raises `DataError`.
    """
    path = folder / f"{split}-000000.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, most)]
        texts = [[TERMINALS.index(word) for word in row["text"].split()] for row in rows]
        latents = np.array([row["latents"] for row in rows])
        strings = np.full((len(texts), max(map(len, texts))), NOTHING)
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no documents of a pcfg corpus ({why}); build one with mm data build pcfg") from None
    for row, text in zip(strings, texts, strict=True):
        row[: len(text)] = text
    return strings, latents


def _document(grammar: Grammar, options: Any, split: str, number: int) -> dict[str, Any]:
    rng = keyed_rng("pcfg", options["seed"], split, number)  # the same one whatever the number of documents
    latents = rng.integers(CHOICES, size=grammar.depth).tolist()
    conditioned = bool(rng.random() < options["conditioned"])
    text = " ".join(TERMINALS[symbol] for symbol in grammar.write(latents, rng))
    told = {f"metadata_{depth}": metadata(latents, depth if conditioned else 0) for depth in range(grammar.depth + 1)}
    return {"text": text, "latents": latents, "conditioned": conditioned, **told}


def _check(options: Any) -> None:
    """Raises `ConfigError`."""
    symbols = options["symbols"]
    for name, low, high in (
        ("count", 1, 10_000_000),
        ("depth", 1, 4),
        ("symbols", 2, len(TERMINALS)),
        ("rules", 1, symbols + symbols**2),  # as many different right sides as there are for a table's symbols
        ("conditioned", 0, 1),
    ):
        if not low <= options[name] <= high:
            raise ConfigError(f"pcfg: {name} is {options[name]:g}; expected {low} to {high:,}")


def _write_json(bench: Workbench, name: str, values: dict[str, Any]) -> None:
    path = bench.folder / name
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    bench.files[name] = {"bytes": path.stat().st_size, "samples": 0}
