"""Rows for new tokens: a causal language model's embeddings and head made larger, and what the new rows begin as.

Rows that were there stay bit for bit, but for spare ones that a new token takes. Rows that fill a table up to a
multiple belong to no token: they are the mean of all, and like the spare rows of published models they stay in the
softmax.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
from torch import Tensor

from mm.data.tokenizer import Tokenizer
from mm.data.train_tokenizer import texts_of, with_merges, with_words
from mm.errors import ConfigError, DataError

Init = Literal["mean", "normal", "subtokens", "contextual"]
SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")
LONGEST = 512
"""Pieces of a sentence that are read, where a model has positions for them."""
MOST = 100
"""Occurrences of a token that its row is made from."""


@torch.no_grad()
def add_rows(
    model: Any,
    rows: int,
    init: Init,
    pieces: Sequence[Sequence[int]] = (),
    first: int | None = None,
    count: int | None = None,
    contexts: Tensor | None = None,
) -> None:
    """Give a model embeddings, and rows of its head, up to `rows`, and let those of new tokens begin as `init` says.

    Args:
        init: `mean` of the old rows; `normal`, drawn with torch's generator from the multivariate normal distribution
            that has their mean and covariance; `subtokens`, the mean of the rows of a token's `pieces`; `contextual`,
            in the direction of a token's `contexts` and as long as old rows are in the mean (BIOptimus, 2308.08625, of
            which the layer and the length are not published), or as by `subtokens` where there is none.
        pieces: of each new token its ids among the old ones; none: the mean.
        first: the number of old tokens; by default the rows that the model has. There may be spare rows from there on.
        count: of new tokens; by default all rows from `first` on are theirs. Rows behind them stay what they are, or
            are the mean where there were none.
        contexts: [new tokens, D]; zeros where there is none.
    """
    have = model.get_input_embeddings().num_embeddings
    first = have if first is None else first
    count = rows - first if count is None else count
    new, filling = slice(first, first + count), slice(max(first + count, have), None)
    if rows > have:
        # Of what transformers would fill new rows with, by default a mean since 4.46, nothing remains.
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    for weight in {id(part.weight): part.weight for part in (model.get_input_embeddings(), head)}.values():
        known = weight[:first].float()
        weight[new] = new_rows(known, count, init, pieces, contexts).to(weight.dtype)
        weight[filling] = known.mean(0).to(weight.dtype)
    if head.bias is not None:
        head.bias[new] = head.bias[filling] = head.bias[:first].mean()


def new_rows(
    known: Tensor, count: int, init: Init, pieces: Sequence[Sequence[int]] = (), contexts: Tensor | None = None
) -> Tensor:
    """[count, D] rows for tokens beside `known` [V, D], float32; see `add_rows`."""
    mean = known.mean(0)
    if init == "normal":
        centred = (known - mean).double()
        # Not by Cholesky: with fewer rows than columns, or a column that is the same in all, there is none.
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(known))
        noise = torch.randn(count, known.shape[1], dtype=torch.float64, device=known.device)
        return mean + (noise * values.clamp(min=0).sqrt() @ vectors.T).to(known.dtype)
    found = mean.repeat(count, 1)
    if init == "mean":
        return found
    for number, ids in enumerate(pieces):
        if ids:
            found[number] = known[list(ids)].mean(0)
    if init == "contextual" and contexts is not None:
        there = contexts.norm(dim=1) > 0
        unit = torch.nn.functional.normalize(contexts[there].to(known), dim=1)
        found[: len(contexts)][there] = unit * known.norm(dim=1).mean()
    return found


def make_room(model: Any, section: Any, tokens: int, weights: bool) -> None:
    """Give a model of a `model.language` section rows for all `tokens` of its tokenizer. Those that its own tokenizer
    lacks begin as `new_rows` says, on spare rows too.

    Args:
        section: a `LanguageConfig` or an `EncoderConfig`.
        weights: whether published weights were read; else rows are only there to be filled.

    Raises `ConfigError` where there are too few rows and nothing says what more of them begin as.
    """
    rows = model.get_input_embeddings().num_embeddings
    if section.new_rows is None:
        if rows < tokens:
            name = section.name or section.config["model_type"]
            raise ConfigError(
                f"model.language {name}: the tokenizer has {tokens} tokens, the "
                f"model {rows} embedding rows; give the model's own tokenizer, or say what the embeddings of added "
                "tokens begin as (model.language.new_rows)"
            )
        return
    if section.name is None or not weights:
        if rows < tokens:
            add_rows(model, tokens, "mean")
        return
    try:
        old: Tokenizer | None = Tokenizer.load(section.name)
    except DataError:
        if section.new_rows == "subtokens":
            raise
        old = None
    first = rows if old is None else min(rows, len(old))
    if first < tokens:
        pieces: list[list[int]] = []
        if old is not None and section.new_rows == "subtokens":
            new = Tokenizer.load(section.tokenizer_name, section.added_tokens)
            pieces = pieces_of(old, new, range(first, tokens))
        add_rows(model, max(rows, tokens), section.new_rows, pieces, first, tokens - first)


def check_tokenizer(name: str, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` where a tokenizer lacks tokens of the one that lies beside a published model. It may have
    more, and call special ones otherwise. A model without a tokenizer is taken with any."""
    try:
        own = Tokenizer.load(name).ids(special=False)
    except DataError:
        return
    given = tokenizer.ids()
    if other := [token for token, id in own.items() if given.get(token) != id]:
        raise ConfigError(
            f"model.language.tokenizer {tokenizer.name}: {len(other):,} of the {len(own):,} tokens of {name} have no "
            f"such id in it, {other[0]!r} for one, so their rows would be lost or read as others; leave it out "
            "(model.language.tokenizer=null)"
        )


def pieces_of(old: Tokenizer, new: Tokenizer, ids: Iterable[int]) -> list[list[int]]:
    """What the old tokenizer makes of the text of new tokens; nothing of those that are no text, such as half a
    character."""
    return [[] if "\ufffd" in (text := new.token(id)) else old.encode(text) for id in ids]


@torch.no_grad()
def contextual(
    model: Any, old: Tokenizer, new: Tokenizer, first: int, texts: Iterable[str]
) -> tuple[Tensor, list[int]]:
    """What a model makes of new tokens where they occur: the last layer's states of their old pieces, in sentences of
    old tokens, in the mean over pieces and then over up to 100 occurrences.

    A causal model's states lie closer to what comes next than BERT's do, for which this was published.

    Returns:
        [len(new) - first, D] float32, zeros for a token that does not occur, and how often each was found.
    """
    sums = torch.zeros(len(new) - first, model.get_input_embeddings().embedding_dim)
    counts = [0] * len(sums)
    before, _ = old.around()
    begin = [] if before is None else [old.id(before)]
    longest = min(LONGEST, (getattr(model.config, "max_position_embeddings", None) or LONGEST) - len(begin))
    for sentence in _sentences(texts):
        spans = zip(*new.encode_spans(sentence), strict=True)
        wanted = [(id - first, span) for id, span in spans if id >= first and counts[id - first] < MOST]
        if not wanted:
            continue
        ids, places = old.encode_spans(sentence)
        read = torch.tensor([begin + ids[:longest]], device=model.device)
        states = model.base_model(input_ids=read, use_cache=False).last_hidden_state[0, len(begin) :].float().cpu()
        for row, (start, stop) in wanted:
            own = [n for n, (a, b) in enumerate(places[:longest]) if a < stop and b > start]
            if own:
                sums[row] += states[own].mean(0)
                counts[row] += 1
        if min(counts) >= MOST:
            break
    return sums / torch.tensor(counts).clamp(min=1)[:, None], counts


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from filter(None, map(str.strip, SENTENCE.split(text)))


def extend(
    name: str,
    out: Path,
    init: Init,
    words: Path | None = None,
    train_on: Sequence[str] = (),
    count: int = 0,
    corpus: Sequence[str] = (),
    multiple: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a published model, or a folder of transformers', with more tokens into the folder `out`, which appears
    whole or not at all.

    Args:
        words: a file of new tokens, one a line. Or instead:
        train_on, count: files of text, and how many tokens BPE is to learn from them behind its own.
        corpus: files of text that `contextual` looks for new tokens in; by default those of `train_on`.
        multiple: rows of the tables are filled up to a multiple of this.
        seed: of `normal`.

    Returns:
        `tokens` added, those of them `found` in the corpus, `first` of their ids, `rows` of the tables, and a `note`
        if there is something to know.

    Raises:
        ConfigError: `out` is there, or what is to be added is not given, or given twice.
        DataError: the tokenizer cannot learn, or there is nothing new.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    if (words is None) == (not train_on) or (bool(train_on) and count < 1):
        raise ConfigError("give either a file of words (--add), or files to learn from and --rows (--train-on)")
    corpus = corpus or train_on
    if init == "contextual" and not corpus:
        raise ConfigError("contextual rows need text that has the new tokens: give --corpus")
    old = Tokenizer.load(name)
    if words is not None:
        if not words.is_file():
            raise DataError(f"{words}: no such file; expected new tokens, one a line")
        lines = words.read_text(encoding="utf-8").splitlines()
        grown = with_words(old.to_json(), filter(None, map(str.strip, lines)))
    else:
        grown = with_merges(old.to_json(), (text for _, text in texts_of(train_on)), count)
    new = Tokenizer(tokenizers.Tokenizer.from_str(grown), f"{name}, extended")
    first, tokens = len(old), len(new) - len(old)
    if not tokens:
        raise DataError(f"{words or ', '.join(train_on)}: nothing in it that {name} has no token for")

    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be loaded: {str(error).splitlines()[0]}") from None
    contexts, counts = None, [0] * tokens
    if init == "contextual":
        contexts, counts = contextual(model, old, new, first, (text for _, text in texts_of(corpus)))
    rows = max(len(new) + -len(new) % multiple, model.get_input_embeddings().num_embeddings)
    torch.manual_seed(seed)
    add_rows(model, rows, init, pieces_of(old, new, range(first, len(new))), first, tokens, contexts)
    note = _write(model, name, new, out)
    return {"tokens": tokens, "found": sum(map(bool, counts)), "first": first, "rows": rows, "note": note}


def _write(model: Any, name: str, new: Tokenizer, out: Path) -> str | None:
    """The model and the tokenizer, with what its folder says of it; what a user has to know, if anything."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        about = PreTrainedTokenizerFast.from_pretrained(name)
        about._tokenizer = tokenizers.Tokenizer.from_str(new.to_json())
        about.save_pretrained(partial)
        sample = new.token(len(new) - 1)
        kind = type(loaded := AutoTokenizer.from_pretrained(partial)).__name__
        same = loaded(sample, add_special_tokens=False)["input_ids"] == new.encode(sample)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if same:
        return None
    return (
        f"AutoTokenizer takes {kind} and splits text in another way: load it with transformers.PreTrainedTokenizerFast"
    )
