"""Train the tokenizer that ships with the "emoji" data set.

    python -m mm.data.builtin.train_tokenizer SHARDS_DIR --vocab-size 4096 --out DIR

Byte-level BPE over the captions of the train shards alone, so that held-out names shape no token. Bytes make
every text representable. The folder written loads with `transformers.AutoTokenizer.from_pretrained`. The same
shards and the same `tokenizers` give the same files.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mm.data.train_tokenizer import train, write


def train_texts(shards: Path) -> Iterator[str]:
    """Yield every train caption as the model meets it: language prefix and name, then the keywords."""
    paths = sorted(shards.glob("train-*.tar.gz"))
    if not paths:
        raise SystemExit(f"{shards} holds no train-*.tar.gz")
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    continue
                for caption in json.load(tar.extractfile(member))["captions"]:  # type: ignore[arg-type]
                    yield f"{caption['language']}: {caption['text']}"
                    yield ", ".join(caption["keywords"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on the train captions.")
    parser.add_argument("shards", type=Path, help="folder with train-*.tar.gz")
    parser.add_argument("--vocab-size", type=int, default=4096, help="entries, special tokens included")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer files")
    args = parser.parse_args()
    tokenizer = train(train_texts(args.shards), args.vocab_size)
    write(tokenizer, args.out)
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        print(f"the text gives only {size} entries of {args.vocab_size}: every word is one token by now")
    print(f"{size} entries in {args.out}")


if __name__ == "__main__":
    main()
