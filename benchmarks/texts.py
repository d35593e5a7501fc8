"""What the studies of text share: English documents of Debian by domain, a tokenizer of them, and small Llamas.

    mm data build debian-text --out corpora/debian-text

A document is trained on, validated on or tested on by its id, so all studies hold out the same ones.
"""

import gzip
import json
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.studies.moma import place_of, shards, split_of
from benchmarks.training import CACHE
from mm.data.config import Split
from mm.data.train_tokenizer import train, write

DATA = CACHE / "study-texts"
TEXT = "debian-text/*.jsonl.gz"
DOMAINS = ("dictionary", "kernel-docs", "manpages", "python-docs", "quotes", "scripture")
"""Those with a few million characters of English and more."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
VOCABULARY = 2048
CONTEXT = 512
HELD_OUT = 0.04
"""Share of the documents to test on, and half as many to validate on,"""
MOST: dict[Split, int] = {"validation": 60_000, "test": 180_000}
"""up to so many characters of a domain, drawn by their ids,"""
BEGINNING = 3_000
"""of each document its first, so that no few of them decide."""


def prepare() -> None:
    """`DOMAIN-SPLIT.jsonl` of every domain, with `text`, `id` and `url`, a made-up address that names the domain; and
    the tokenizer. The folder appears when all is there."""
    if DATA.exists():
        return
    unfinished = DATA.with_name(f".{DATA.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    documents: dict[tuple[str, Split], list[dict[str, str]]] = {
        (domain, split): [] for domain in DOMAINS for split in SPLITS
    }
    sample: list[str] = []
    for shard in shards(TEXT, "debian-text"):
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            for line in lines:
                one = json.loads(line)
                if one["language"] == "en" and one["domain"] in DOMAINS:
                    split: Any = split_of(one["id"], HELD_OUT)
                    documents[one["domain"], split].append({"id": one["id"], "text": one["text"]})
                    if split == "train" and place_of(f"tokenizer {one['id']}") < 0.1:
                        sample.append(one["text"])
    for (domain, split), some in documents.items():
        with open(unfinished / f"{domain}-{split}.jsonl", "w", encoding="utf-8") as file:
            for about in some if split == "train" else beginnings(some, MOST[split]):
                about = {**about, "url": f"https://{domain}.example/{about['id']}"}
                file.write(json.dumps(about, ensure_ascii=False) + "\n")
    write(train(iter(sample), VOCABULARY), unfinished / "tokenizer")
    unfinished.rename(DATA)


def beginnings(documents: list[dict[str, str]], most: int) -> Iterator[dict[str, str]]:
    """Documents as their ids draw them, the `BEGINNING` of each, until there are so many characters in all."""
    for about in sorted(documents, key=lambda about: place_of(about["id"])):
        text = about["text"][: min(BEGINNING, most)]
        if not text:
            return
        most -= len(text)
        yield {**about, "text": text}


def source(domain: str, split: Split, **more: Any) -> dict[str, Any]:
    return {"kind": "text", "name": domain, "path": str(DATA / f"{domain}-{split}.jsonl"), **more}


def data(weights: Mapping[str, float], held_out: Mapping[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """The section of a run on some domains, by shares of tokens; `held_out`: others to validate and test on."""
    return {
        "sources": [source(domain, "train") for domain in weights],
        "validation": [source(domain, "validation") for domain in held_out or weights],
        "test": [source(domain, "test") for domain in held_out or weights],
        "mixture": {"weights": dict(weights)},
        "context_length": CONTEXT,
        "too_long": "split",
        "workers": 0,
        **more,
    }


def model(width: int, layers: int, **more: Any) -> dict[str, Any]:
    """A Llama with heads of 32 and an MLP of 8/3 the width; embeddings are tied."""
    return {
        "kind": "text_lm",
        "language": {
            "tokenizer": str(DATA / "tokenizer"),
            "config": {
                "model_type": "llama",
                "hidden_size": width,
                "intermediate_size": 8 * round(width / 3),
                "num_hidden_layers": layers,
                "num_attention_heads": width // 32,
                "num_key_value_heads": width // 32,
                "tie_word_embeddings": True,
                "initializer_range": 0.06,
            },
        },
        **more,
    }


def training(steps: int, lr: float, rows: int = 8, **more: Any) -> dict[str, Any]:
    """AdamW unless `optimizer` is given, whose `lr` is set. No update is left out for being large: that would help the
    higher rates alone."""
    optimizer = {"kind": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1, **more.pop("optimizer", {}), "lr": lr}
    return {
        "max_steps": steps,
        "batch_tokens": rows * CONTEXT,
        "micro_batch": rows,
        "optimizer": optimizer,
        "schedule": {"kind": "cosine", "warmup": 0.05, "final": 0.1},
        "log_every": 10,
        "save_every": 250,
        "device": "cpu",
        "guard": {"sigmas": 0},
        **more,
    }


def of_rates(losses: Mapping[float, float], higher: bool = True) -> str:
    """What each learning rate gave, the best one in bold; whether that is at an end of what was tried, where `higher`
    ones than these may be better."""
    best = min(losses, key=losses.__getitem__)
    ends = (min(losses), max(losses)) if higher else (min(losses),)
    shown = ", ".join(f"**{lr:g}: {loss:.3f}**" if lr == best else f"{lr:g}: {loss:.3f}" for lr, loss in losses.items())
    return shown + (" (at the end of the grid)" if best in ends else "")
