"""Tokenizers by folder, hub name or `builtin:NAME`; of the labels of a classifier, and none at all."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mm.data import builtin
from mm.errors import DataError

PAD = "<pad>"
"""The one token of `builtin:none`, and the first of labels."""
PLACES = ("tokenizer.json", "text_tokenizer.json", "../../tokenizer/text_tokenizer.json")
"""Of a tokenizer from the folder that is named; the last two as Chameleon was released (`models/7b`, `tokenizer`)."""


class Tokenizer:
    """A `tokenizers` tokenizer by folder, hub name, or `builtin:NAME`; plain text only ever gives plain tokens.

    `builtin:none` is for models without text: one token, of padding. A caption that happens to contain
    `<|im_end|>` is encoded as those characters, not as the special token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str) -> None:
        self.name = name
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self._takes_text = backend.get_vocab_size(with_added_tokens=False) > 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # which `tokenizers` does not pickle

    @classmethod
    def load(cls, name: str, added: tuple[str, ...] = ()) -> "Tokenizer":
        """Load `tokenizer.json`; `added` are special tokens to append where the vocabulary lacks them.

        Raises `DataError` where there is none, or none that can be read.
        """
        if name == "builtin:none":
            return cls.of_labels((*added,), name)
        file = _tokenizer_file(name)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"tokenizer {name}: {file} is damaged or of another version ({error})") from None
        missing = [token for token in added if backend.token_to_id(token) is None]
        backend.add_special_tokens(missing)
        return cls(backend, name)

    @classmethod
    def of_labels(cls, labels: Sequence[str], name: str = "labels") -> "Tokenizer":
        """One special token for every label, in order, behind `<pad>`, which is 0. It takes no text."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.add_special_tokens([PAD, *labels])
        return cls(backend, name)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.encode_placed(text)[0]

    def encode_placed(self, text: str) -> tuple[list[int], Callable[[], list[int]]]:
        """`encode(text)`, and a function that gives the character that every token starts at, worked out when asked."""
        if not self._takes_text:
            raise DataError(
                f"tokenizer {self.name}: the model takes no text, found {text[:40]!r}; use a source without, such as "
                '`recordings`, or set its `caption: ""`'
            )
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, lambda: [start for start, _ in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def token(self, id: int) -> str:
        return self._backend.decode([id], skip_special_tokens=False)

    def id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None and not self._takes_text:
            raise DataError(f"no label {token!r} among the {len(self) - 1} of the model; leave it out or add it")
        if found is None:
            raise DataError(
                f"tokenizer {self.name}: there is no token {token!r}; add it to model.language.added_tokens, or, for a "
                "model without spare rows, name another one in model.template.bos, eos, pad or around_image"
            )
        return int(found)

    def to_json(self) -> str:
        """What a tokenizer.json holds."""
        return self._backend.to_str()

    def fingerprint(self) -> str:
        """A digest of vocabulary, merges and rules: equal for equal tokenizers, whatever they are called."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:16]


def chameleon_code(code: int) -> str:
    """What Chameleon's vocabulary calls a code of its picture tokenizer: the digits as letters, `IMGIMGBAZ` for 10."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"


def _tokenizer_file(name: str) -> Path:
    if name.startswith("builtin:"):
        try:
            return builtin.folder(name.removeprefix("builtin:")) / "tokenizer" / "tokenizer.json"
        except ValueError as error:
            raise DataError(f"tokenizer {name}: {error}") from None
    folder = Path(name)
    if folder.is_dir():
        found = [path for place in PLACES if (path := folder / place).is_file()]
        if not found:
            raise DataError(f"tokenizer {name}: the folder holds no tokenizer.json")
        return found[0]
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"tokenizer {name}: neither a folder here nor to be had from the hub ({reason})") from None
