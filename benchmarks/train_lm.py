"""Training a language model of 22 million parameters: loss-bearing tokens a second, ours and the peers'.

The text: the English manuals of `debian-text` (kernel documentation, manual pages, Python's documentation, Debian's
handbook and installation guide), documents of many lengths, with a byte-level vocabulary of 32,768 trained on them.
Documents longer than a row of 4,096 tokens are cut between paragraphs; all candidates get the same pieces.

    mm data build debian-text --out corpora/debian-text

Peers: Hugging Face's trainer with each document a row of a padded batch, in random order or grouped by length; with
documents flattened into one row, as its DataCollatorWithFlattening does; and TRL's SFTTrainer with its packing. All use
SDPA attention and fused AdamW, every way at the micro-batch that is fastest for it, chosen by short runs that are
shown too. *Overhead* is the part of a step of ours that is not forward, backward, clipping or optimizer. For memory,
the same model with a vocabulary of 151,936 trains on micro-batches of one row.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, arguments, show
from benchmarks.training import CACHE, Job, compare, overhead, run
from mm.data import builtin
from mm.data.train_tokenizer import train, write

DOMAINS = ("kernel-docs", "manpages", "python-docs", "handbook", "install-guide")
VOCABULARY = 32_768
LARGE_VOCABULARY = 151_936  # Qwen2's
MODEL = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TRAIN = {
    "batch_tokens": 8192,
    "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "schedule": {"kind": "constant", "warmup": 0},
    "save_every": 1_000_000,
}


def main() -> None:
    options = arguments(__doc__, corpus="the corpus; by default corpora/debian-text", device="cpu (default) or cuda")
    config = quick() if options.quick else full(Path(options.corpus or "corpora/debian-text"))
    config["train"]["device"] = options.device or "cpu"
    repetitions, steps = (1, 2) if options.quick else (3, 4)
    # 8 padded documents would need 27 GB.
    sizes = {"ours": (1, 2), "padded": (1, 2, 4), "by length": (1, 2, 4), "flattened": (1, 2, 4), "trl": (1, 2)}
    candidates = {
        way: [Job(config, way, size) for size in some[-1 if options.quick else 0 :]] for way, some in sizes.items()
    }
    rows, runs = compare("documents", candidates, steps, repetitions)
    rows += overhead(runs)
    rows.append(memory(config))
    show("train_lm", rows, options.json)


def full(corpus: Path) -> dict[str, Any]:
    shards = [shard for domain in DOMAINS for shard in sorted(corpus.glob(f"{domain}-*.jsonl.gz"))]
    if not shards:
        raise SystemExit(f"{corpus}: no corpus there; mm data build debian-text --out {corpus}, or --corpus FOLDER")
    tokenizer = CACHE / f"train_lm-{VOCABULARY}"
    if not tokenizer.exists():
        documents = (json.loads(line) for shard in shards for line in gzip.open(shard))
        trained = train((one["text"] for one in documents if one["language"] == "en"), VOCABULARY)
        write(trained, tokenizer)
    sources = [
        {"kind": "text", "name": domain, "path": str(corpus / f"{domain}-*.jsonl.gz"), "only": {"language": "en"}}
        for domain in DOMAINS
    ]
    return config_of(sources, str(tokenizer), {**MODEL, "vocab_size": VOCABULARY}, TRAIN)


def quick() -> dict[str, Any]:
    """This project's own pages, and a model of a million parameters."""
    small = {**MODEL, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    sources = [{"kind": "text", "path": str(Path(__file__).parents[1] / "docs" / "*.md")}]
    tokenizer = str(builtin.folder("emoji") / "tokenizer")
    made = config_of(sources, tokenizer, {**small, "num_key_value_heads": 4}, {**TRAIN, "batch_tokens": 4096})
    made["data"]["context_length"] = 1024
    return made


def config_of(sources: list[Any], tokenizer: str, language: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    data = {"sources": sources, "context_length": 4096, "too_long": "split", "workers": 0, "cache": str(CACHE)}
    model = {"kind": "text_lm", "language": {"tokenizer": tokenizer, "config": language}}
    return {"out": "unused", "data": data, "model": model, "train": dict(train)}


def memory(config: dict[str, Any]) -> Row:
    """Peak of a process, weights and optimizer and Python included."""
    language = config["model"]["language"]
    large = {**language, "config": {**language["config"], "vocab_size": LARGE_VOCABULARY}}
    train = {**config["train"], "batch_tokens": config["data"]["context_length"], "max_steps": 2}
    config = {**config, "model": {**config["model"], "language": large}, "train": train}
    jobs = {way: Job(config, way, 1) for way in ("ours", "rows", "trl")}
    found = {way: run(job) for way, job in jobs.items()}
    figures = {way: one.get("memory", one.get("error")) for way, one in found.items()}
    return {
        "case": f"vocabulary of {LARGE_VOCABULARY:,}, micro-batches of {train['batch_tokens']:,} tokens: peak memory",
        "unit": "GB",
        "better": "lower",
        "ours": figures["ours"],
        "peers": {str(jobs[way]): figure for way, figure in figures.items() if way != "ours"},
        "limit": found["rows"].get("memory", 0.0) / 2,
    }


if __name__ == "__main__":
    main()
