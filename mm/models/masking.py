"""What masked prediction draws, by numpy, on the host: of sound, spans of frames and noises from other clips; of text,
tokens, words or spans of words, and what stands in their place.

Who draws hands over a generator that is keyed by what is drawn for (`mm.data.sample.keyed_rng`), so that nothing here
depends on what else is in a batch.

Of text, where is chosen (`choose_text`) apart from what is put there (`corrupt`): an objective that puts something else
there, such as tokens that another model proposes (ELECTRA), takes the first and not the second.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
import torch
from torch import Tensor

from mm.data.tokenizer import Tokenizer

TextUnit = Literal["token", "word", "span"]
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""What SentencePiece calls a token that is a byte."""
SPANS = 0.2 * 0.8 ** np.arange(10)
SPANS /= SPANS.sum()
"""Chances of spans of 1 to 10 words: a geometric distribution with p = 0.2, cut off (SpanBERT, 1907.10529 3.1)."""


def span_mask(frames: int, prob: float, length: int, least: int, rng: np.random.Generator) -> np.ndarray:
    """bool [frames]: which are masked, by fairseq's rule (`compute_mask_indices`, static spans that may overlap).

    prob * frames / length spans, rounded up or down at random, at least `least`, start at different frames. Where they
    do not all have room, they are cut at the end. With 0.8 and spans of 5 some 58 % of the frames of a long clip.
    """
    spans = max(least, int(prob * frames / length + rng.random()))
    room = frames - length
    starts = rng.choice(room if room > spans else spans + 1, spans, replace=False)
    places = (starts[:, None] + np.arange(length)).ravel()
    mask = np.zeros(frames, dtype=bool)
    mask[places[places < frames]] = True
    return mask


def draw_noises(
    samples: int, others: int, number: tuple[int, int], length: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """int64 [noises, 3]: of each its start among the samples of other clips, its place in the clip, and its length.

    Args:
        samples: of the clip; others: of the other clips together.
        number: least and most noises; length: least and most samples of one, where both sides have as many.
    """
    count = int(rng.integers(*number, endpoint=True))
    lengths = np.minimum(rng.integers(*length, size=count, endpoint=True), min(samples, others))
    return np.stack([rng.integers(0, others - lengths + 1), rng.integers(0, samples - lengths + 1), lengths], axis=1)


def mix(clip: Tensor, others: Sequence[Tensor], noises: np.ndarray, gain: float) -> Tensor:
    """The clip [T] with noises from the concatenation of others added, as `draw_noises` placed them."""
    pool, mixed = torch.cat([*others]), clip.clone()
    for start, place, length in noises.tolist():
        mixed[place : place + length] += gain * pool[start : start + length]
    return mixed


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What masking knows of every token id, bool [V] each.

    special: stands for no text, and is never masked. opens: a word begins with it, whatever is in front. closes: a word
    begins behind it.
    """

    special: np.ndarray
    opens: np.ndarray
    closes: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, special: Sequence[int] = ()) -> "Vocabulary":
        """Of a tokenizer, whose own special tokens are special, and further ones.

        In a WordPiece vocabulary every token without the prefix of continuations opens a word. In all others, what
        begins or ends with something that is no letter, mark, number or underscore does and closes one: a blank, `Ġ` or
        `▁` among them, and punctuation, which is a word of its own. Bytes that are no whole character are taken for
        parts of a word. So where a script writes no blanks, what stands between punctuation marks is one word.
        """
        about = json.loads(tokenizer.to_json())
        model, added = about["model"], {one["id"]: one["special"] for one in about["added_tokens"]}
        vocab = model["vocab"]  # of Unigram, a list
        texts = (
            {n: text for n, (text, _) in enumerate(vocab)} if isinstance(vocab, list) else {vocab[t]: t for t in vocab}
        )
        size = max(len(tokenizer), 1 + max([*texts, *added], default=0))
        made = cls(*(np.zeros(size, dtype=bool) for _ in range(3)))
        made.special[[*(id for id, is_special in added.items() if is_special), *special]] = True
        made.opens[[id for id, is_special in added.items() if not is_special]] = True
        continues = (model.get("continuing_subword_prefix") or "##") if model["type"] == "WordPiece" else None
        is_bytes = "ByteLevel" in json.dumps([about["pre_tokenizer"], about["decoder"]])
        for id in texts.keys() - added.keys():
            text = texts[id]
            if continues is not None:
                made.opens[id] = not text.startswith(continues)
                continue
            shown = tokenizers.decoders.ByteLevel().decode([text]) if is_bytes else text.replace("▁", " ")
            if shown and not BYTE.fullmatch(shown):
                made.opens[id] = not _in_word(shown[0])
                made.closes[id] = not _in_word(shown[-1]) and shown != " "  # the blank in front of a rare word
        return made


def _in_word(character: str) -> bool:
    return character in "_\ufffd" or unicodedata.category(character)[0] in "LMN"


def words_of(ids: np.ndarray, segments: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """int64 [n]: the number of the word that each token belongs to, from 0 on. Words end where segments do, and a
    special token is one of its own.

    Args:
        ids: int [n], token ids; segments: int [n], the number of each one's segment.
    """
    special = vocabulary.special[ids]
    starts = vocabulary.opens[ids] | special
    starts[:1] = True
    starts[1:] |= (vocabulary.closes[ids] | special)[:-1] | (segments[1:] != segments[:-1])
    return np.cumsum(starts) - 1


def choose_text(
    eligible: np.ndarray, words: np.ndarray, segments: np.ndarray, rate: float, unit: TextUnit, rng: np.random.Generator
) -> np.ndarray:
    """int64 [n]: the number of the piece that a token is chosen with, from 0 on, or -1: what is corrupted alike.

    `token`: each eligible token, with a chance of `rate`, is a piece. `word`: each word with that chance, and each of
    its eligible tokens is a piece, as in BERT. `span`: spans of 1 to 10 whole words (`SPANS`), around places that are
    drawn again and again, until a share of `rate` of the eligible tokens (rounded up or down at random) is chosen, and
    a span is a piece, as in SpanBERT. A span that meets another is left out; one that meets a token that is not
    eligible, the end of its segment or that of what is still wanted, ends there.

    Args:
        eligible: bool [n]; words: as `words_of` gives them; segments: int [n].
    """
    if unit == "span":
        return _spans(eligible, words, segments, rate, rng)
    units = words if unit == "word" else np.arange(len(eligible))
    taken = rng.random(int(units[-1]) + 1 if len(units) else 0) < rate
    chosen = taken[units] & eligible
    return np.where(chosen, np.cumsum(chosen) - 1, -1)


def _spans(
    eligible: np.ndarray, words: np.ndarray, segments: np.ndarray, rate: float, rng: np.random.Generator
) -> np.ndarray:
    piece = np.full(len(eligible), -1, dtype=np.int64)
    places = np.flatnonzero(eligible)
    edges = np.append(np.flatnonzero(np.diff(words, prepend=-1)), len(words))
    wanted, number = int(rate * len(places) + rng.random()), 0
    for _ in range(10 * len(places)):  # a bound: at a high rate the last gaps are seldom met
        if not wanted:
            break
        first, length = words[rng.choice(places)], rng.choice(len(SPANS), p=SPANS) + 1
        span = np.arange(edges[first], edges[min(first + length, len(edges) - 1)])
        ends = ~eligible[span] | (segments[span] != segments[span[0]])
        span = span[: ends.argmax() if ends.any() else wanted][:wanted]
        if len(span) and (piece[span] < 0).all():
            piece[span] = number
            number, wanted = number + 1, wanted - len(span)
    return piece


def corrupt(
    ids: np.ndarray, piece: np.ndarray, shares: tuple[float, float, float], mask: int, vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """int64 [n]: the tokens with some in place of those that are chosen (BERT, 1810.04805 3.1).

    Args:
        piece: as `choose_text` gives it. A kind is drawn for each piece, tokens for each place.
        shares: of pieces that become the mask, tokens drawn from all that are not special, and that stay.
    """
    found = ids.astype(np.int64)
    at = np.flatnonzero(piece >= 0)
    draws = rng.random(int(piece.max(initial=-1)) + 1)[piece[at]]
    plain = np.flatnonzero(~vocabulary.special)
    other = plain[rng.integers(len(plain), size=len(at))]
    masked, drawn = draws < shares[0], (draws >= shares[0]) & (draws < shares[0] + shares[1])
    found[at[masked]] = mask
    found[at[drawn]] = other[drawn]
    return found
