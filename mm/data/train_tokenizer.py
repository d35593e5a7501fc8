"""Tokenizers trained on files of text, or on what a run is trained on, and trained ones extended.

All pieces are of bytes, so every text can be spelt. Extending goes on with BPE's merges where the tokenizer's own end:
what it had stays as it was and comes first, so an old token is what it was, and texts only get shorter.
"""

import contextlib
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mm.data.config import DataConfig
from mm.data.limits import Limits
from mm.data.remote import RemoteCache, is_remote
from mm.data.sample import Text
from mm.data.sources import Source, TextConfig
from mm.errors import ConfigError, DataError

Kind = Literal["bpe", "unigram"]
ROLES = {"bos": "<s>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
"""What the template of a model calls them unless it says otherwise."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|endofchunk|>", "<s>")
"""Their ids are their places: padding is 0."""
LEAST = 2
"""How often a pair must occur to be merged."""
Pair = tuple[str, str]


def texts_of(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(kind of file, text) of every document: of .txt and .md, and of the `text` of jsonl, parquet and tars.

    The kind is the end of the file's name, such as `.jsonl.gz`. Raises `DataError` for what cannot be read.
    """
    return texts_in([TextConfig(path=path).build("") for path in paths])


def texts_in(sources: Sequence[Source], cache: RemoteCache | None = None) -> Iterator[tuple[str, str]]:
    """The same of sources: of those documents that a run would see, without metadata. `cache`: of remote shards."""
    limits = Limits()
    for source in sources:
        for name in source.shards():
            ends = PurePath(name).suffixes
            kind = "".join(ends[-2:] if ends[-1:] in ([".gz"], [".zst"]) else ends[-1:])
            if is_remote(name) and cache is None:
                raise ConfigError(f"{name}: remote files are read through the cache of a run; give its config")
            fetched = cache.fetch(name) if cache and is_remote(name) else contextlib.nullcontext(Path(name))
            with fetched as local, source.open(str(local), limits) as shard:
                shard.name = source.shard_name(name)  # which `part` goes by
                for group in shard.groups():
                    if isinstance(group, DataError):
                        raise group
                    if not source.holds(group):
                        continue
                    for sample in source.samples(group, limits):
                        yield kind, "".join(part.text for part in sample.parts if isinstance(part, Text))


def text_sources(runs: Iterable[DataConfig]) -> list[Source]:
    """What runs are trained on of the kind `text`, each source once. Raises `ConfigError` where there is nothing."""
    found = [(one, run.root) for run in runs for one in run.sources if isinstance(one, TextConfig)]
    if not found:
        raise ConfigError("data.sources: no source of kind text to learn from; give --files instead of the config")
    return [one.build(root) for number, (one, root) in enumerate(found) if (one, root) not in found[:number]]


def train(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIAL, kind: Kind = "bpe", multiple: int = 1
) -> Tokenizer:
    """A byte-level tokenizer with the special tokens first. The same texts and library give the same BPE; of unigram
    the library gives another one every time.

    Args:
        vocab_size: entries, special tokens included, rounded up to a multiple of `multiple`. Little text gives fewer;
            up to the next multiple they are then filled up with special tokens `<|reserved_0|>`, ….
        kind: `bpe`, merges of frequent pairs; `unigram`, the pieces that make the texts likeliest (Kudo, 1804.10959).

    Raises `DataError` where the bytes alone are more.
    """
    vocab_size += -vocab_size % multiple
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (least := len(alphabet) + len(special)):
        raise DataError(f"a vocabulary of {vocab_size}: the bytes and the special tokens alone are {least}")
    tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = (trainers.BpeTrainer if kind == "bpe" else trainers.UnigramTrainer)(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([f"<|reserved_{n}|>" for n in range(-tokenizer.get_vocab_size() % multiple)])
    return tokenizer


def write(tokenizer: Tokenizer, out: Path, special: Sequence[str] = SPECIAL) -> None:
    """Into the folder `out`, which `AutoTokenizer` loads too."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    named = {f"{role}_token": token for role, token in ROLES.items() if token in special}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "extra_special_tokens": [token for token in special if token not in named.values()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


@dataclass(slots=True)
class Compression:
    """What a tokenizer makes of some texts."""

    characters: int = 0
    bytes: int = 0
    tokens: int = 0

    def about(self) -> dict[str, float]:
        """The counts, and characters and bytes a token."""
        tokens = max(self.tokens, 1)
        return {
            "characters": self.characters,
            "tokens": self.tokens,
            "characters_per_token": round(self.characters / tokens, 3),
            "bytes_per_token": round(self.bytes / tokens, 3),
        }


def compression(
    tokenizer: Tokenizer, texts: Iterable[tuple[str, str]], most: int = 4_000_000
) -> dict[str, dict[str, float]]:
    """By kind of file, over the first `most` characters of each; see `Compression.about`."""
    found: dict[str, Compression] = defaultdict(Compression)
    for kind, text in texts:
        one = found[kind]
        if one.characters < most:
            one.characters += len(text)
            one.bytes += len(text.encode())
            one.tokens += len(tokenizer.encode(text, add_special_tokens=False).ids)
    return {kind: one.about() for kind, one in sorted(found.items())}


def with_words(tokenizer: str, words: Iterable[str]) -> str:
    """A tokenizer.json with words as tokens of their own, wherever they stand alone; those that are are left out.

    A blank in front of such a word is not part of it.
    """
    backend = Tokenizer.from_str(tokenizer)
    new = [
        AddedToken(word, single_word=True, normalized=False)
        for word in dict.fromkeys(words)
        if len(backend.encode(word, add_special_tokens=False).ids) > 1
    ]
    backend.add_tokens(new)
    return str(backend.to_str())


def with_merges(tokenizer: str, texts: Iterable[str], count: int) -> str:
    """A tokenizer.json of a BPE with up to `count` merges, and tokens, more: the pairs that are most frequent in texts
    as the tokenizer splits them so far, one after the other.

    Raises `DataError` for a tokenizer that merges nothing, or in which a token is spelt in another way than its parts.
    """
    backend = Tokenizer.from_str(tokenizer)
    state = json.loads(backend.to_str())
    model = state["model"]
    other = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if model["type"] != "BPE" or other:
        what = ", ".join([model["type"], *other])
        raise DataError(f"new tokens can be learned for a byte-level BPE, this tokenizer is {what}; name them instead")
    if backend.pre_tokenizer is None:
        raise DataError("new tokens cannot be learned: this tokenizer does not split texts into words; name them")
    words = Counter[str]()
    for text in texts:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    pieces = {word: [token.value for token in backend.model.tokenize(word)] for word in words}
    vocabulary: dict[str, int] = model["vocab"]
    next_id = backend.get_vocab_size(with_added_tokens=True)
    for added in state["added_tokens"]:  # new ids are behind theirs, and a vocabulary with holes is complained of
        vocabulary.setdefault(added["content"], added["id"])
    merges = merges_of([(pieces[word], number) for word, number in words.items()], vocabulary, count)
    for number, pair in enumerate(merges):
        vocabulary["".join(pair)] = next_id + number
    model["merges"] += [list(pair) for pair in merges]
    return json.dumps(state, ensure_ascii=False)


def merges_of(words: Iterable[tuple[list[str], int]], known: Iterable[str], count: int) -> list[Pair]:
    """The next `count` merges of BPE (Sennrich et al., 1508.07909) over words in pieces, with how often each occurs.

    The most frequent pair is merged everywhere, again and again; of equally frequent ones the first in order. Pairs
    that make a token which is `known` are passed over: merging them would let old merges apply to what they make.
    """
    words = list(words)
    pieces, times = [one for one, _ in words], [number for _, number in words]
    known = set(known)
    frequency = Counter[Pair]()
    where: dict[Pair, set[int]] = defaultdict(set)

    def count_word(number: int, sign: int) -> None:
        for pair in pairwise(pieces[number]):
            frequency[pair] += sign * times[number]
            where[pair].add(number)

    for number in range(len(pieces)):
        count_word(number, 1)
    queue = [(-number, pair) for pair, number in frequency.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(merges) < count:
        negative, pair = heapq.heappop(queue)
        if frequency[pair] != -negative or -negative < LEAST or "".join(pair) in known:
            continue  # counted anew since it was put there, or of no use
        merges.append(pair)
        known.add("".join(pair))
        changed: set[Pair] = set()
        for number in where.pop(pair):
            changed.update(pairwise(pieces[number]))
            count_word(number, -1)
            pieces[number] = merged(pieces[number], pair)
            count_word(number, 1)
            changed.update(pairwise(pieces[number]))
        for one in changed - {pair}:
            heapq.heappush(queue, (-frequency[one], one))
    return merges


def merged(pieces: list[str], pair: Pair) -> list[str]:
    """With a pair put together wherever it stands, from the left."""
    found: list[str] = []
    at = 0
    while at < len(pieces):
        both = (*pieces[at : at + 2],) == pair
        found.append("".join(pair) if both else pieces[at])
        at += 1 + both
    return found
