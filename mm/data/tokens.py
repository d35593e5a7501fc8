"""Tokenizers, and a Sample laid out as a Segment: token ids with placeholder runs where media go.

The number of placeholder positions comes from the media header, so counting never decodes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from mm.data import builtin
from mm.data.media import probe_image
from mm.data.sample import Media, MediaKind, Text
from mm.errors import DataError

if TYPE_CHECKING:
    from mm.data.layout import Layout


class Tokenizer:
    """A `tokenizers` tokenizer by folder, hub name, or `builtin:NAME`; plain text only ever gives plain tokens.

    A caption that happens to contain `<|im_end|>` is encoded as those characters, not as the special token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str) -> None:
        self.name = name
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()

    @classmethod
    def load(cls, name: str, added: tuple[str, ...] = ()) -> "Tokenizer":
        """Load `tokenizer.json`; `added` are special tokens to append where the vocabulary lacks them."""
        backend = tokenizers.Tokenizer.from_file(str(_tokenizer_file(name)))
        missing = [token for token in added if backend.token_to_id(token) is None]
        backend.add_special_tokens(missing)
        return cls(backend, name)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def token(self, id: int) -> str:
        return self._backend.decode([id], skip_special_tokens=False)

    def id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise DataError(f"tokenizer {self.name}: there is no token {token!r}; add it to model.language.added_tokens")
        return int(found)

    def fingerprint(self) -> str:
        """A digest of vocabulary, merges and rules: equal for equal tokenizers, whatever they are called."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:16]


def _tokenizer_file(name: str) -> Path:
    if name.startswith("builtin:"):
        try:
            return builtin.folder(name.removeprefix("builtin:")) / "tokenizer" / "tokenizer.json"
        except ValueError as error:
            raise DataError(f"tokenizer {name}: {error}") from None
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"tokenizer {name}: the folder holds no tokenizer.json")
        return folder / "tokenizer.json"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"tokenizer {name}: neither a folder here nor to be had from the hub ({reason})") from None


@dataclass(frozen=True, slots=True)
class SegmentMedia:
    """Media of one segment: `length` placeholder positions from `position` on; `cost` in encoder tokens."""

    kind: MediaKind
    position: int
    length: int
    cost: int
    part: int
    """Which part of the sample holds the bytes."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One document for one model, with one attention scope. All positions count from the segment's start."""

    ids: np.ndarray
    """int32 [n]; media positions hold the pad id."""
    loss: tuple[tuple[int, int], ...]
    """Half-open spans of positions that the model learns to predict."""
    media: tuple[SegmentMedia, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        # A segment's first token has nothing before it to be predicted from.
        return sum(stop - max(start, 1) for start, stop in self.loss)


def make_segment(
    parts: tuple[Text | Media, ...], layout: "Layout", where: str, max_pixels: int, closed: bool = True
) -> Segment:
    """Lay out drawn parts by the layout's template: bos, then the parts in order, then eos (unless not `closed`).

    Text that follows media opens with `template.after_media`; adjacent text with the same `loss` is tokenised as one
    run. The end-of-text token is a target wherever the last text is. Raises `DataError` for unreadable media.
    """
    template = layout.template
    ids: list[int] = [] if template.bos is None else [layout.tokenizer.id(template.bos)]
    loss: list[tuple[int, int]] = []
    media: list[SegmentMedia] = []
    trains = True
    runs = _text_runs(parts, template.after_media)
    for index, part in runs:
        if isinstance(part, Media):
            if part.kind != "image" or layout.image is None:
                raise DataError(f"{where}: the model takes no {part.kind}")
            length, cost = layout.image.count(probe_image(part.data, where, max_pixels))
            media.append(SegmentMedia(part.kind, len(ids), length, cost, index))
            ids += [layout.pad] * length
        else:
            start = len(ids)
            ids += layout.tokenizer.encode(part.text)
            trains = part.loss
            if part.loss:
                loss.append((start, len(ids)))
    if closed:
        ids.append(layout.tokenizer.id(template.eos))
    if closed and trains:
        last = loss.pop() if loss else (len(ids) - 1, len(ids) - 1)
        loss.append((last[0], len(ids)))
    return Segment(np.asarray(ids, dtype=np.int32), tuple(loss), tuple(media))


def _text_runs(parts: tuple[Text | Media, ...], after_media: str) -> list[tuple[int, Text | Media]]:
    """Parts with neighbouring text of one `loss` joined, and the template's break put after media."""
    runs: list[tuple[int, Text | Media]] = []
    for index, part in enumerate(parts):
        if isinstance(part, Text) and runs:
            _, before = runs[-1]
            if isinstance(before, Media):
                part = Text(after_media + part.text, part.loss)
            elif before.loss == part.loss:
                runs[-1] = (runs[-1][0], Text(before.text + part.text, part.loss))
                continue
        runs.append((index, part))
    return runs
