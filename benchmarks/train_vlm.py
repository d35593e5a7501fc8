"""Training a vision-language model of 25 million parameters: loss-bearing tokens a second, ours and the peers'.

The data, half of the tokens each: captions, the emoji that ship with the package, and interleaved documents, the GIMP
manual with its pictures. A picture of 128 pixels takes 16 positions. Tower, connector and language model all learn.

    mm data build gimp-help --out corpora/gimp-help

TRL packs no pictures ("Packing is not supported for vision datasets"), nor does transformers, so the peers are
Hugging Face's trainer on the very modules of ours, called as LLaVA is: one sample a row and padded, in random order or
grouped by length; samples flattened into one row by a collator like DataCollatorWithFlattening; and the rows that we
packed. They decode pictures by our decoder, in as many worker processes. See `benchmarks.train_lm` for the rest.
"""

from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, show
from benchmarks.train_lm import TRAIN
from benchmarks.training import CACHE, Job, compare, overhead

LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
VISION = {
    "name": "timm/vit_tiny_patch16_224",
    "pretrained": False,
    "image_size": 128,
    "block": -1,
    "options": {"embed_dim": 256, "depth": 6, "num_heads": 4, "class_token": False, "global_pool": ""},
}
CAPTIONS = {"kind": "captions", "name": "emoji", "path": "builtin:emoji/train-*.tar.gz", "prompt": "{language}: "}


def main() -> None:
    options = arguments(__doc__, corpus="the manual; by default corpora/gimp-help", device="cpu (default) or cuda")
    config = quick() if options.quick else full(Path(options.corpus or "corpora/gimp-help"))
    config["train"]["device"] = options.device or "cpu"
    repetitions, steps = (1, 2) if options.quick else (3, 7)  # steps differ more than those of text alone
    # Long documents would make 16 padded ones, drawn at random, too large.
    sizes = {
        "ours": (1, 2, 4),
        "padded": (1, 4),
        "by length": (1, 4, 16),
        "flattened": (1, 4, 16),
        "rows": (1, 2),
    }
    few = slice(-1, None) if options.quick else slice(None)
    candidates = {way: [Job(config, way, size) for size in some[few]] for way, some in sizes.items()}
    rows, runs = compare("captions and documents", candidates, steps, repetitions)
    show("train_vlm", rows + overhead(runs), options.json)


def full(corpus: Path) -> dict[str, Any]:
    if not list(corpus.glob("*.tar")):
        raise SystemExit(f"{corpus}: no corpus there; mm data build gimp-help --out {corpus}, or --corpus FOLDER")
    manual = {"kind": "interleaved", "name": "gimp-help", "path": str(corpus / "*.tar")}
    config = config_of([CAPTIONS, manual], VISION, LANGUAGE)
    config["data"]["mixture"] = {"weights": {"emoji": 1, "gimp-help": 1}}
    return config


def quick() -> dict[str, Any]:
    """Captions alone, and a model of a million parameters."""
    vision = {**VISION, "image_size": 32, "options": {**VISION["options"], "embed_dim": 64, "depth": 2}}
    config = config_of([CAPTIONS], vision, {**LANGUAGE, "hidden_size": 128, "num_hidden_layers": 2})
    config["model"]["connector"]["tokens"] = 4
    config["data"]["context_length"] = 512
    config["train"]["batch_tokens"] = 2048
    return config


def config_of(sources: list[Any], vision: dict[str, Any], language: dict[str, Any]) -> dict[str, Any]:
    return {
        "out": "unused",
        "data": {
            "sources": sources,
            "context_length": 2048,
            "budgets": {"image": 64},
            "visits": 6,
            "too_long": "split",
            "workers": 1,
            "decoder": "fast",
            "cache": str(CACHE),
        },
        "model": {
            "kind": "open_qwen2vl",
            "vision": vision,
            "connector": {"kind": "pool_mlp", "tokens": 16},
            "language": {"tokenizer": "builtin:emoji", "config": language},
        },
        "train": dict(TRAIN),
    }


if __name__ == "__main__":
    main()
