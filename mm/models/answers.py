"""Many prompts answered: rows of a JSONL file in, the same rows with an `answer` out.

Rows go through the model a batch at a time. What is written to a file is there after every batch, beside its place and
under a name made of all that decides the answers; so a command that was stopped goes on when it is given again, and
samples what it would have sampled. Pictures that a model draws are PNG files in a folder, which rows name.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.media import probe_image
from mm.data.packed import PackedDataset
from mm.data.sample import Media, Metadata
from mm.errors import ConfigError, DataError
from mm.files import fsync
from mm.models.decode import decode, to_draw
from mm.models.generate import generate
from mm.models.prompts import Decoding, Form, Precision, Prompt, autocast, chat_prompt, raw_prompt
from mm.models.system import GenerativeSystem

Row = dict[str, Any]
Answer = Callable[[list[Row], int], list[Row]]
"""From rows and the number of the first to what is added to each: its `answer`, and what was drawn, `pictures`."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """That a model may draw, and where. `first`: it begins with a picture. `guidance`: see `decode`."""

    folder: Path
    first: bool = False
    guidance: float = 1.0


def drawing_of(folder: str | None, first: bool, guidance: float) -> Drawing | None:
    """None without a folder. Raises `ConfigError` for settings of drawing without one, and for no guidance at all."""
    if not guidance >= 0:
        raise ConfigError(f"guidance {guidance}: expected 0 or more")
    if folder is None and (first or guidance != 1):
        raise ConfigError("--draw and --guidance are for drawing: give --pictures FOLDER with them")
    return None if folder is None else Drawing(Path(folder), first, guidance)


def read_picture(path: Path | str, limits: Limits = Limits()) -> Media:  # noqa: B008
    """A picture's file as a part of a prompt. Raises `DataError` where it cannot be read or is no picture."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    probe_image(data, str(path), limits.pixels)
    return Media("image", data, Path(path).suffix.lstrip("."))


def read_rows(path: Path) -> list[Row]:
    """Rows `{"prompt": "…", "images": ["a.jpg", …]}` of a JSONL file, with whatever else they hold.

    Paths of pictures are relative to the file; all must be there, so that a long job does not end at the last one.

    Raises:
        DataError: a line is no such object, or names a picture that is not there.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        images = row.get("images", []) if isinstance(row, dict) else None
        if not (
            isinstance(row, dict)
            and isinstance(row.get("prompt", ""), str)
            and isinstance(images, list)
            and all(isinstance(image, str) for image in images)
        ):
            raise DataError(f'{path}, line {number}: expected {{"prompt": "…", "images": ["a.jpg", …]}}')
        for image in images:
            if not (path.parent / image).is_file():
                raise DataError(f"{path}, line {number}: there is no file {path.parent / image}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no prompts in it")
    return rows


def prompt_of(
    row: Row,
    form: Form,
    folder: Path = Path(),
    system: str | None = None,
    after_media: str = "\n",
    metadata: Metadata | None = None,
) -> Prompt:
    """A row as a prompt; paths of pictures are relative to `folder`, `system` is for the chat form, `after_media` of
    the template and `metadata`, which stand in front of a document, for the raw one.

    Raises:
        DataError: a picture cannot be read; there are more or fewer of them than `<image>` in the text.
        ConfigError: a system turn for the raw form, metadata for the chat form.
    """
    if system is not None and form == "raw":
        raise ConfigError("a system turn is for the chat form; give --chat with --system")
    if metadata is not None and form == "chat":
        raise ConfigError("metadata stand in front of documents, not of conversations; give --raw with --metadata")
    pictures = [read_picture(folder / image) for image in row.get("images", [])]
    text = row.get("prompt", "")
    if form == "chat":
        return chat_prompt(text, pictures, system)
    return (*(() if metadata is None else (metadata,)), *raw_prompt(text, pictures, after_media))


def form_of(config: Any) -> Form:
    """How a model that `mm.load` gave is asked unless somebody says: in the chat form if conversations trained it.

    That is what the sources of its run say, or of the packed set that it was trained on, if that is still there; a
    release says it itself (`Release.form`).
    """
    form: Form | None = getattr(config, "form", None)
    if form is not None:
        return form
    data = config.data
    kinds = {source.kind for source in data.sources}
    if data.packed is not None:
        with suppress(DataError):
            sources = PackedDataset(data.packed / "train").about["provenance"]["sources"]
            kinds = {source["kind"] for source in sources}
    return "chat" if "conversations" in kinds else "raw"


def answerer(
    system: GenerativeSystem,
    layout: Layout,
    prompt: Callable[[Row], Prompt],
    decoding: Decoding,
    seed: int,
    stream: Callable[[str], None] | None = None,
    precision: Precision = "fp32",
    drawing: Drawing | None = None,
) -> Answer:
    """A model as a function of rows. What is sampled depends on the seed, the first row's number and the batch."""

    def answer(rows: list[Row], first: int) -> list[Row]:
        torch.manual_seed(seed + first)
        prompts = [prompt(row) for row in rows]
        with autocast(system, precision):
            if drawing is None:
                return [{"answer": text} for text in generate(system, layout, prompts, decoding, stream=stream)]
            if drawing.first:
                prompts = [to_draw(one, layout) for one in prompts]
            found = decode(system, layout, prompts, decoding, stream=stream, pictures=True, guidance=drawing.guidance)
        return [
            {"answer": one.text, "pictures": [str(save_picture(picture, drawing.folder)) for picture in one.pictures]}
            for one in found
        ]

    return answer


def save_picture(pixels: np.ndarray, folder: Path) -> Path:
    """Write uint8 [H, W, 3] as a PNG file of a number that is free."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(len(list(folder.iterdir())) + 1):
        path = folder / f"{number:05}.png"
        with suppress(FileExistsError), open(path, "xb") as file:
            file.write(data.getbuffer())
            break
    return path


def answered(rows: Sequence[Row], answer: Answer, batch: int, first: int = 0) -> Iterator[list[Row]]:
    """Rows from the number `first` on with what is added to them, a batch at a time."""
    for start in range(first, len(rows), batch):
        part = list(rows[start : start + batch])
        yield [row | added for row, added in zip(part, answer(part, start), strict=True)]


def write_answers(
    out: Path,
    rows: Sequence[Row],
    answer: Answer,
    batch: int,
    about: object,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Answer all rows into the JSONL file `out`, which appears when it is whole.

    Args:
        about: what else decides the answers: model and weights, form, decoding, seed, precision. What a stopped call
            with the same has done is not done again.

    Raises:
        ConfigError: `out` is there.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    digest = hashlib.sha256(repr((about, batch, rows)).encode()).hexdigest()[:16]
    partial = out.with_name(f".{out.name}.partial-{digest}")
    with open(partial, "a+b") as file:
        file.seek(0)
        lines = [line for line in file if line.endswith(b"\n")]
        done = len(lines) // batch * batch
        file.truncate(sum(map(len, lines[:done])))
        for part in answered(rows, answer, batch, done):
            file.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in part).encode())
            file.flush()
            done += len(part)
            progress(done)
    fsync(partial)
    partial.replace(out)
