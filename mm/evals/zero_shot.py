"""Retrieval and zero-shot classification: pictures and texts are compared by their features, and nothing is written.

A system takes part that has `encode_pictures` and `encode_texts` (kinds `clip` and `cosmo`). Features are kept on disk
as they come, a row of float32 a picture or text, and beside them what each row is of: a run that was stopped goes on,
and one with a larger limit adds to them.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mm.data.batch import collate
from mm.data.layout import Layout
from mm.data.media import IMAGE_EXTENSIONS
from mm.data.packed import join_segments
from mm.data.sample import Media
from mm.data.sources import shortened
from mm.data.tokens import make_segment
from mm.errors import ConfigError, DataError
from mm.evals.captions import captioned
from mm.evals.items import Item, question_of
from mm.evals.results import Progress, Result, chunks, claim, prepared, write
from mm.evals.rows import LIMITS, TABLES, PictureFile, rows
from mm.files import atomic
from mm.models.contrastive import accuracies, recalls, zero_shot
from mm.models.prompts import Precision, autocast
from mm.models.system import System

T = TypeVar("T")
KEY = 16  # bytes of the digest that says what a row is of
SHOWN = 5  # of the texts that are most like a picture, in its record
TEMPLATES = ("a photo of a {}.",)
PICTURE, LABEL = ("image", "file_name", "path", "file"), ("label", "class", "category")
"""What the columns of a table of labelled pictures may be called."""


@runtime_checkable
class Encodes(Protocol):
    """A system whose features can be compared."""

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S], as the layout has them made, to [n, D] of length 1."""
        ...

    def encode_texts(self, texts: list[str]) -> Tensor:
        """[n, D], of length 1."""
        ...


class FeatureTask(ABC):
    """A task for features. `items`: one a picture; `answers` are its own texts, or its label."""

    name: str
    version = 1
    """Of reading and scoring, as of `Task`."""
    metric: str
    """The number that a table shows first."""

    @abstractmethod
    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        """The pictures of a file, folder or glob, in order. Raises `DataError`."""

    def open(self, path: str, images: Path | None) -> None:
        """Read what must be known of all pictures before some are looked at. Raises `DataError`."""
        return

    def settings(self) -> dict[str, Any]:
        """What decides the numbers besides the files, once these are open."""
        return {}

    @abstractmethod
    def texts(self, answers: Sequence[tuple[str, ...]]) -> list[str]:
        """What pictures with these answers are compared with."""

    @abstractmethod
    def score(
        self, image: Tensor, text: Tensor, answers: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, float], Tensor, list[str]]:
        """The numbers; and what a picture's record shows of it: candidates [M, D], and what they are called.

        Args:
            image: [N, D]; text: [M, D], of `texts(answers)`.
        """


class Retrieval(FeatureTask):
    """Pictures by texts and texts by pictures, from whatever the task `captions` reads (Karpathy's splits of COCO and
    Flickr30k among it). A picture may have several captions: it is found by any of them, and finds any of them.

    A prompt of the source (`prompt: "{language}: "`) is a part of the text, and all captions of a picture belong to it.
    """

    name = "retrieval"
    version = 2
    metric = "image_to_text_recall@1"

    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        for id, group in groupby(captioned(path, images), key=question_of):
            some = list(group)
            texts = tuple(one.question + answer for one in some for answer in one.answers)
            yield replace(some[0], id=id, answers=texts)

    def texts(self, answers: Sequence[tuple[str, ...]]) -> list[str]:
        return [text for some in answers for text in some]

    def score(
        self, image: Tensor, text: Tensor, answers: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, float], Tensor, list[str]]:
        owner = torch.repeat_interleave(torch.tensor(list(map(len, answers))))
        return recalls(image, text, owner), text, self.texts(answers)


class Classify(FeatureTask):
    """Which class, by the texts that its name gives (2103.00020, 3.1): a folder with a folder of pictures for each
    class, a table with columns `image` and `label`, or pairs whose first caption is the label.

    classes: what labels are called in texts; None: as they are, `_` as a space; `imagenet`: open_clip's names, for
    labels 0 to 999 or folders in their order; or a file, a line a class in the order of labels (of numbers: line 1 is
    0), or lines `LABEL<tab>NAME`.
    templates: None for `a photo of a {}.`; `openai` or `simple`, open_clip's 80 and 7 for ImageNet; or a file of lines
    with `{}` where the name goes.
    """

    name = "classify"
    metric = "accuracy@1"

    def __init__(self, classes: str | None = None, templates: str | None = None) -> None:
        self.classes, self.templates = classes, templates
        self._templates = read_templates(templates)

    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        if Path(path).expanduser().is_dir():
            yield from _class_folders(Path(path).expanduser())
        elif path.endswith(TABLES):
            for row in rows(path, images):
                id = str(row.get("id", "image_id", "file_name", "path") or f"{row.file.stem}/{row.number}")
                yield Item(id, "", (row.picture(*PICTURE),), (row.text(*LABEL),))
        else:
            yield from captioned(path, images)

    def open(self, path: str, images: Path | None) -> None:
        self.names = class_names({item.answers[0] for item in self.items(path, images)}, self.classes)

    def settings(self) -> dict[str, Any]:
        names = _digest(json.dumps(list(self.names.items()))).hex()
        return {"classes": self.classes, "names": names, "templates": list(self._templates)}

    def texts(self, answers: Sequence[tuple[str, ...]]) -> list[str]:
        return [template.replace("{}", name) for name in self.names.values() for template in self._templates]

    def score(
        self, image: Tensor, text: Tensor, answers: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, float], Tensor, list[str]]:
        encoded = iter(text.split(len(self._templates)))  # class by class, as they are asked for
        classifier = zero_shot(lambda _: next(encoded), list(self.names.values()), self._templates)
        number = {label: n for n, label in enumerate(self.names)}
        targets = torch.tensor([number[label] for label, *_ in answers])
        return accuracies(image, classifier, targets), classifier, list(self.names)


FEATURE_TASKS: dict[str, type[FeatureTask]] = {"retrieval": Retrieval, "classify": Classify}


def _class_folders(folder: Path) -> Iterator[Item]:
    classes = sorted(one for one in folder.iterdir() if one.is_dir())
    for one in classes:
        for file in sorted(one.rglob("*")):
            ext = file.suffix[1:].lower()
            if ext in IMAGE_EXTENSIONS:
                yield Item(str(file.relative_to(folder)), "", (Media("image", PictureFile(file), ext),), (one.name,))
    if not classes:
        raise DataError(f"{folder}: no folders in it; expected one for each class, with its pictures")


def class_names(labels: set[str], given: str | None) -> dict[str, str]:
    """By label, in order, what it is called: see `Classify`. Raises `DataError` where one has no name.

    Where names have labels or numbers of their own, those that are not among `labels` are classes too.
    """
    numbers = all(label.isdecimal() for label in labels)
    ordered = sorted(labels, key=int if numbers else str)
    if given is None:
        return {label: label.replace("_", " ") for label in ordered}
    if given == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        lines = list(IMAGENET_CLASSNAMES)
    else:
        lines = _lines(given, "names of classes")
    if all("\t" in line for line in lines):
        names = {label: name for label, _, name in (line.partition("\t") for line in lines)}
    elif numbers:
        spelt = {int(label): label for label in labels}  # as folders may have it: 007
        names = {spelt.get(number, str(number)): line for number, line in enumerate(lines)}
    elif len(lines) == len(ordered):
        names = dict(zip(ordered, lines, strict=True))
    else:
        raise DataError(f"{given}: {len(lines)} names for {len(ordered)} classes; give one a line, or LABEL<tab>NAME")
    if missing := [label for label in ordered if label not in names]:
        raise DataError(f"{given}: no name for the label {shortened(missing[0])}, nor for {len(missing) - 1} more")
    return names


def read_templates(given: str | None) -> tuple[str, ...]:
    """See `Classify`. Raises `ConfigError` for one without a place for the name."""
    if given is None:
        return TEMPLATES
    if given in ("openai", "simple"):
        import open_clip

        published = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return tuple(template("{}") for template in published[given])
    lines = _lines(given, "templates")
    for line in lines:
        if "{}" not in line:
            raise ConfigError(f"{given}: {shortened(line)} has no {{}} where the name of a class goes")
    return tuple(lines)


def _lines(path: str, what: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no {what} to be read there ({error})") from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"{path}: no {what} in it")
    return found


@torch.no_grad()
def run_features(
    system: System,
    layout: Layout,
    task: FeatureTask,
    path: str,
    images: Path | None,
    precision: Precision,
    out: Path,
    about: dict[str, Any],
    limit: int | None = None,
    batch: int = 8,
    progress: Progress = lambda what, count: None,
) -> Result:
    """One task from its first picture without features to its numbers. `system` is one that `Encodes`.

    Raises:
        ConfigError: `out` holds what was computed with other settings, or of other pictures or texts.
        DataError: a file or a picture cannot be read.
    """
    task.open(path, images)
    asked = {
        **about,
        "task": task.name,
        "task_version": task.version,
        "files": path,
        "images": images and str(images),
        "precision": precision,
        **task.settings(),
    }
    prepared(out, path)
    pictures, texts = (out / f"{task.name}.{what}.f32" for what in ("pictures", "texts"))
    claim(out / f"{task.name}.json", asked, pictures.exists())
    start = time.perf_counter()
    encoder = cast(Encodes, system)
    device = next(system.parameters()).device

    def encode_pictures(some: list[Item]) -> Tensor:
        names = [f"{path}: item {item.id} of {task.name}" for item in some]
        pixels = pixels_of([item.media[0] for item in some], layout, names)
        return system.within(encoder.encode_pictures, pixels.to(device))

    def encode_texts(some: list[str]) -> Tensor:
        return system.within(encoder.encode_texts, some)

    ids: list[str] = []
    answers: list[tuple[str, ...]] = []

    def items() -> Iterator[list[Item]]:
        for some in chunks(islice(task.items(path, images), limit), batch):
            ids.extend(item.id for item in some)
            answers.extend(item.answers for item in some)
            yield some

    def counted(what: str) -> Callable[[int], None]:
        return lambda count: progress(f"{task.name}: {what}", count)

    with autocast(system, precision):
        width = encode_texts(["a"]).shape[1]
        image = kept(pictures, width, items(), _picture_key, encode_pictures, counted("pictures"))
        if not len(image):
            raise DataError(f"{path}: no pictures for {task.name} in it")
        asked_of = task.texts(answers)
        text = kept(texts, width, chunks(asked_of, batch), str, encode_texts, counted("texts"))
    metrics, candidates, names = task.score(image, text, answers)
    with atomic(out / f"{task.name}.items.jsonl") as file:
        for id, own, some in zip(ids, answers, most_similar(image, candidates), strict=True):
            line = {"id": id, "answer": list(own), "top": [names[n] for n in some]}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    result = {
        **asked,
        "n": len(ids),
        "texts": len(asked_of),
        "metric": task.metric,
        "metrics": metrics,
        "by": {},
        "seconds": round(time.perf_counter() - start, 3),
    }
    write(out / f"{task.name}.json", result)
    return result


def pixels_of(media: Sequence[Media], layout: Layout, names: Sequence[str]) -> Tensor:
    """[n, 3, S, S] of pictures, as the model sees them in evaluation. Raises `DataError` where one cannot be read, by
    its name."""
    for one, name in zip(media, names, strict=True):
        if one.kind != "image":
            raise DataError(f"{name}: its medium is of the kind {one.kind}; features are compared of pictures alone")
    segments = [
        make_segment((one,), layout, name, LIMITS, closed=False) for one, name in zip(media, names, strict=True)
    ]
    pack = join_segments([(name, "", segment) for name, segment in zip(names, segments, strict=True)])
    return collate([pack], layout, row_length=None).media["image"].stacked()


def kept(
    file: Path,
    width: int,
    batches: Iterator[list[T]],
    key: Callable[[T], str],
    encode: Callable[[list[T]], Tensor],
    done: Callable[[int], None],
) -> Tensor:
    """float32 [n, width]: features of all that is in the batches. Those that the file has are not computed again, and
    those that it lacks are put behind them. What a row is of says a digest of its `key`, in the file `….keys`.

    Raises `ConfigError` where a row is of something else.
    """
    number = 0
    with open(file, "ab") as rows, open(file.with_suffix(".keys"), "a+b") as keys:
        known = min(rows.tell() // (4 * width), keys.tell() // KEY)
        rows.truncate(4 * width * known)
        keys.truncate(KEY * known)
        keys.seek(0)
        before = keys.read()
        for some in batches:
            own = [_digest(key(one)) for one in some]
            for n, (one, now) in enumerate(zip(some, own, strict=True), start=number):
                if n < known and before[KEY * n : KEY * (n + 1)] != now:
                    raise ConfigError(
                        f"{file}: its row {n + 1} is not of {shortened(key(one))}: what is evaluated has changed; "
                        "choose another --out"
                    )
            if new := some[max(0, known - number) :]:
                rows.write(encode(new).float().cpu().numpy().astype("<f4").tobytes())
                rows.flush()
                keys.write(b"".join(own[-len(new) :]))
                keys.flush()
            number += len(some)
            done(number)
    return torch.from_numpy(np.fromfile(file, "<f4").reshape(-1, width)[:number])


def _picture_key(item: Item) -> str:
    """Its id and how many bytes it has: these are known without reading it."""
    return f"{item.id} ({item.media[0].size:,} bytes)"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=KEY).digest()


def most_similar(image: Tensor, candidates: Tensor, chunk: int = 1024) -> Iterator[list[int]]:
    """Of each picture [N, D] the numbers of the most similar candidates [M, D], the most similar first."""
    for part in image.split(chunk):
        yield from (part @ candidates.T).topk(min(SHOWN, len(candidates)), dim=1).indices.tolist()
