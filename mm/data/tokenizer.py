"""Tokenizers by folder, hub name, `builtin:NAME` or `open_clip/NAME`; of a classifier's labels, and none at all."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mm.data import builtin
from mm.data.open_clip import CLEAN, clip_bpe, model_config
from mm.errors import DataError

PAD = "<pad>"
"""The one token of `builtin:none`, and the first of labels."""
PLACES = ("tokenizer.json", "text_tokenizer.json", "../../tokenizer/text_tokenizer.json")
"""Of a tokenizer from the folder that is named; the last two as Chameleon was released (`models/7b`, `tokenizer`)."""

GPT2 = ("vocab.json", "merges.txt", "special_tokens_map.json")
"""What makes a tokenizer where there is none of these."""


class Tokenizer:
    """A `tokenizers` tokenizer by folder, hub name, or `builtin:NAME`; plain text only ever gives plain tokens.

    `builtin:none` is for models without text: one token, of padding. A caption that happens to contain
    `<|im_end|>` is encoded as those characters, not as the special token. `open_clip/ViT-B-32` is the tokenizer of that
    model of open_clip. `clean`: how texts are cleaned first, a name of `mm.data.open_clip.CLEAN`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str, clean: str | None = None) -> None:
        self.name, self._clean = name, clean
        self._digest = ""
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
        if name.startswith("open_clip/"):
            tokenizer = cls.of_open_clip(model_config(name.removeprefix("open_clip/"))["text_cfg"], name)
        else:
            tokenizer = cls(_read(name), name)
        missing = [token for token in added if tokenizer._backend.token_to_id(token) is None]
        tokenizer._backend.add_special_tokens(missing)
        return tokenizer

    @classmethod
    def of_open_clip(cls, text: dict[str, Any], name: str) -> "Tokenizer":
        """The tokenizer that open_clip takes for a model with this `text_cfg`. Raises `DataError`."""
        published, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
        clean = options.pop("clean", "whitespace" if published else "lower")
        if options or text.get("tokenizer_mode"):
            what = ", ".join(options) or f"tokenizer_mode {text['tokenizer_mode']}"
            raise DataError(f"tokenizer {name}: {what} of its text_cfg is not supported; choose another model")
        return cls(_read(published) if published else clip_bpe(), name, clean)

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
        """`encode(text)`, and a function that gives the character that every token starts at, worked out when asked: of
        the cleaned text, where it is cleaned."""
        if not self._takes_text:
            raise DataError(
                f"tokenizer {self.name}: the model takes no text, found {text[:40]!r}; use a source without, such as "
                '`recordings`, or set its `caption: ""`'
            )
        encoding = self._backend.encode(CLEAN[self._clean](text) if self._clean else text, add_special_tokens=False)
        return encoding.ids, lambda: [start for start, _ in encoding.offsets]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text)`, and the characters, first and behind the last, that every token stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

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

    def around(self) -> tuple[str | None, str | None]:
        """The special tokens that the tokenizer's own rules put in front of a text and behind it, at most one each."""
        encoding = self._backend.encode("a")
        plain = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        before, after = encoding.tokens[: plain[0]], encoding.tokens[plain[-1] + 1 :]
        if len(before) > 1 or len(after) > 1:
            raise DataError(f"tokenizer {self.name}: puts {[*before, *after]} around texts; expected one token each")
        return next(iter(before), None), next(iter(after), None)

    def ids(self, special: bool = True) -> dict[str, int]:
        """Every token, as the vocabulary spells it, with its id, in order; or all but special ones."""
        found = sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda one: one[1])
        added = self._backend.get_added_tokens_decoder().values()
        left_out = set() if special else {token.content for token in added if token.special}
        return {token: id for token, id in found if token not in left_out}

    def to_json(self) -> str:
        """What a tokenizer.json holds."""
        return self._backend.to_str()

    def fingerprint(self) -> str:
        """A digest of vocabulary, merges and rules: equal for equal tokenizers, whatever they are called."""
        if not self._digest:  # asked for again and again, and a third of a second for 50,000 tokens
            canonical = json.dumps(json.loads(self.to_json()), sort_keys=True) + (self._clean or "")
            self._digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        return self._digest


def open_clip_pad(tokenizer: Tokenizer, text: dict[str, Any]) -> int:
    """The id that open_clip fills up texts with, for a model with this `text_cfg`: 0 with CLIP's own tokenizer, else
    that of the padding token of the one that is named. Raises `DataError`."""
    if not (name := text.get("hf_tokenizer_name")):
        return 0
    file = file_of(name, ("tokenizer_config.json",))
    try:
        pad = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"tokenizer {name}: {file} is damaged ({error})") from None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        raise DataError(f"tokenizer {name}: its tokenizer_config.json names no pad_token")
    return tokenizer.id(pad)


def chameleon_code(code: int) -> str:
    """What Chameleon's vocabulary calls a code of its picture tokenizer: the digits as letters, `IMGIMGBAZ` for 10."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"


def _read(name: str) -> tokenizers.Tokenizer:
    reader: Callable[..., tokenizers.Tokenizer] = tokenizers.Tokenizer.from_file
    files: list[Path] = []
    try:
        files = [_tokenizer_file(name)]
    except DataError:
        with suppress(DataError):
            reader, files = _of_gpt2, [file_of(name, (part,)) for part in GPT2]
        if not files:
            raise
    try:
        return reader(*map(str, files))
    except Exception as error:  # the library raises nothing narrower
        where = " or ".join(map(str, files))
        raise DataError(f"tokenizer {name}: {where} is damaged or of another version ({error})") from None


def _of_gpt2(vocabulary: str, merges: str, special_tokens: str) -> tokenizers.Tokenizer:
    """A byte-level BPE from the files of GPT-2's, which is all that repositories of OPT have."""
    special: dict[str, Any] = json.loads(Path(special_tokens).read_text(encoding="utf-8"))
    backend = tokenizers.Tokenizer(models.BPE.from_file(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = [token["content"] if isinstance(token, dict) else token for token in special.values()]
    backend.add_special_tokens([token for token in dict.fromkeys(named) if isinstance(token, str)])
    return backend


def _tokenizer_file(name: str) -> Path:
    if name.startswith("builtin:"):
        try:
            return builtin.folder(name.removeprefix("builtin:")) / "tokenizer" / "tokenizer.json"
        except ValueError as error:
            raise DataError(f"tokenizer {name}: {error}") from None
    return file_of(name, PLACES)


def file_of(name: str, places: Sequence[str]) -> Path:
    """The first of these files in a folder, or the first one of a repository of the hub."""
    folder = Path(name)
    if folder.is_dir():
        found = [path for place in places if (path := folder / place).is_file()]
        if not found:
            raise DataError(f"tokenizer {name}: the folder holds no {places[0]}")
        return found[0]
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, places[0]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"tokenizer {name}: neither a folder here nor to be had from the hub ({reason})") from None
