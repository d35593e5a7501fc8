"""Captioning: texts for pictures (or recordings, or clips) against the captions that people gave them.

BLEU is sacrebleu's; CIDEr is computed here, since the library that defines it comes with 100 MB of Java programs for
other metrics. Tests hold ours against numbers of that library.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mm.data.sample import Choice, Media, Sample, Text
from mm.data.sources import SourceConfig, sample_id
from mm.errors import ConfigError, DataError
from mm.evals.items import Form, Item, Record, Task
from mm.evals.rows import LIMITS, Row, rows

Words = tuple[str, ...]
SIGMA = 6.0
_WORD = r"\w+(?:-\w+|(?<=\d)\.\d+)*"
_TOKEN = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"  # Thai, Japanese, Chinese: without spaces, so a word a character
    rf"|{_WORD}(?=n't\b)|n't\b|{_WORD}|'(?:s|re|ve|ll|d|m)\b"
)


class Captions(Task):
    """Pictures with captions, from COCO's JSON (`images`: id, file_name; `annotations`: image_id, caption) and its
    folder, from the test split of Karpathy's JSON (`images`: filename, split, `sentences` with `raw`), from shards in
    any layout of `kind: captions`, or from a YAML file with one data source as in a config.

    Captions of one picture under several prompts (`prompt: "{language}: "`) are one item for each prompt.
    """

    name = "captions"
    metric = "cider"
    groups = ()
    new_tokens = 64
    stops = "\n"
    opening = "Output:"
    flamingo_tokens = 20

    def __init__(self) -> None:
        _bleu(1)  # what is missing is said before a model is asked

    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        yield from captioned(path, images)

    def text(self, item: Item, form: Form) -> str:
        texts = {"raw": item.question, "chat": "Provide a short image description.", "flamingo": self.opening}
        return texts[form]

    def placed(self, item: Item, form: Form) -> list[str | Media]:
        if form == "raw" and "prompt" in item.meta:  # as the source's samples are laid out in training
            return [*item.media, item.question]
        return super().placed(item, form)

    def candidates(self, item: Item) -> Sequence[str]:
        return ()

    def parse(self, item: Item, output: str) -> str | None:
        return output.strip() or None

    def right(self, item: Item, parsed: str | None) -> float:
        return float(parsed is not None and words(parsed) in map(words, item.answers))

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        said = [words(record["output"]) for record in records]
        references = [list(map(words, record["answer"])) for record in records]
        exact = sum(record["right"] for record in records) / len(records)
        return {"cider": cider(said, references), **bleu(said, references), "exact": exact}


def captioned(path: str, images: Path | None) -> Iterator[Item]:
    """Pictures with the captions that people gave them; see `Captions`. Raises `DataError`."""
    if Path(path).suffix == ".json":
        yield from _coco(Path(path), images)
    else:
        yield from _pairs(path)


def _coco(file: Path, images: Path | None) -> Iterator[Item]:
    captions: dict[str, list[str]] = defaultdict(list)
    listed = list(rows(str(file), images, key="images"))
    if listed and listed[0].get("sentences"):
        yield from map(_karpathy, (row for row in listed if row.text("split") == "test"))
        return
    for row in rows(str(file), images):  # annotations, a list of their own in the same object
        captions[row.text("image_id")].append(row.text("caption").strip())
    pictures = {row.text("id"): row for row in listed}
    for id, texts in captions.items():
        if id not in pictures:
            raise DataError(f"{file}: no picture with the id {id[:40]} under `images`")
        yield Item(id, "", (pictures[id].picture("file_name"),), tuple(texts))


def _karpathy(row: Row) -> Item:
    try:
        texts = tuple(str(one["raw"]).strip() for one in row.need("sentences"))
    except (LookupError, TypeError):
        raise DataError(f"{row.where}: its sentences have no `raw` text") from None
    return Item(row.text("cocoid", "imgid", "filename"), "", (row.picture("filename"),), texts)


def _pairs(path: str) -> Iterator[Item]:
    """Items out of a source of pairs."""
    given: Any = {"kind": "captions", "path": path}
    if path.endswith((".yaml", ".yml")):
        given = yaml.safe_load(Path(path).read_text())
    try:
        config = TypeAdapter(SourceConfig).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    source = config.build("")
    # Then each caption is a sample of its own, and they are of one picture all the same.
    apart = getattr(config, "captions", None) == "all" and not getattr(config, "timed", False)
    for shard in source.shards():
        with source.open(shard, LIMITS) as opened:
            for group in opened.groups():
                if isinstance(group, DataError):
                    raise group
                for sample in source.samples(group, LIMITS):
                    yield from _items(sample, sample_id(source.name, group) if apart else sample.id, shard)


def _items(sample: Sample, picture: str, shard: str) -> Iterator[Item]:
    # Read now: the shard is closed when the last of its items is asked.
    media = tuple(replace(part, data=part.read()) for part in sample.parts if isinstance(part, Media))
    options = [part.options for part in sample.parts if isinstance(part, Choice)]
    texts = options[0] if options else (tuple(part for part in sample.parts if isinstance(part, Text)),)
    if len(media) != 1:
        raise DataError(f"{sample.id} in {shard}: {len(media)} media; expected pairs of one medium and its captions")
    captions: dict[str, list[str]] = defaultdict(list)
    for option in texts:
        prompt = "".join(part.text for part in option if not part.loss)
        captions[prompt].append("".join(part.text for part in option if part.loss))
    for number, (prompt, some) in enumerate(captions.items()):
        id = sample.id if len(captions) == 1 else f"{sample.id}#{number}"
        # Under another prompt it is the same picture, which is no example for itself.
        yield Item(id, prompt, media, tuple(some), meta={"prompt": prompt, "question": picture})


def words(text: str) -> Words:
    """Words in lower case, without punctuation; contractions in two (`do n't`), as COCO's evaluation has them.

    COCO's tokenizer is the Stanford parser's, in Java; this is the part of its rules that captions meet.
    """
    return tuple(_TOKEN.findall(text.lower().replace("’", "'")))


def bleu(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 of the corpus, 0 to 1 (Papineni et al., 2002), by sacrebleu on `words`, unsmoothed."""
    most = max(map(len, references))
    hypotheses = [" ".join(one) for one in said]
    columns = [[" ".join(some[k]) if k < len(some) else None for some in references] for k in range(most)]
    found = {}
    for n in range(1, 5):
        found[f"bleu_{n}"] = _bleu(n).corpus_score(hypotheses, columns).score / 100
    return found


def _bleu(most: int) -> Any:
    """sacrebleu's metric of n-grams up to `most`."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ConfigError("captions are scored with sacrebleu: pip install 'mm-pretrain[eval]'") from None
    return BLEU(tokenize="none", smooth_method="none", max_ngram_order=most, force=True)


def cider(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D of the corpus, 0 to 10 (Vedantam et al., 1411.5726, and COCO's code, which calls it CIDEr).

    n-grams up to 4 weighted by how rare they are among the pictures' references, counts clipped to the reference's,
    cosine per n, times exp(-(difference in length)^2 / 2 sigma^2) with sigma 6, averaged over references and n, by 10.
    """
    document = Counter(gram for some in references for gram in {gram for one in some for gram in _grams(one)})
    log_pictures = math.log(max(len(references), 1))

    def vector(one: Words) -> list[dict[Words, float]]:
        by_length: list[dict[Words, float]] = [{}, {}, {}, {}]
        for gram, count in _grams(one).items():
            by_length[len(gram) - 1][gram] = count * (log_pictures - math.log(max(document[gram], 1)))
        return by_length

    total = 0.0
    for one, some in zip(said, references, strict=True):
        ours = vector(one)
        for reference in some:
            similarity = sum(map(_clipped_cosine, ours, vector(reference))) / 4
            total += similarity * math.exp(-((len(one) - len(reference)) ** 2) / (2 * SIGMA**2)) / len(some)
    return 10 * total / max(len(said), 1)


def _grams(one: Words) -> Counter[Words]:
    return Counter(one[at : at + n] for n in range(1, 5) for at in range(len(one) - n + 1))


def _clipped_cosine(ours: dict[Words, float], theirs: dict[Words, float]) -> float:
    dot = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
    lengths = math.sqrt(sum(w * w for w in ours.values()) * sum(w * w for w in theirs.values()))
    return dot / lengths if lengths else 0.0
