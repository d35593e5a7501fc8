"""The tagger's section and layout."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from mm.data.layout import Layout, Template
from mm.data.tokenizer import PAD, Tokenizer
from mm.models.config import AudioEncoderConfig
from mm.settings import KindSection, Number, nearest

if TYPE_CHECKING:
    from mm.models.systems.tagger.model import Tagger


def _read(labels: Any) -> Any:
    """What the file says, where one is named."""
    if not isinstance(labels, str | Path):
        return labels
    table, _, column = str(labels).rpartition(":")
    is_table = table.endswith((".csv", ".tsv"))
    try:
        with open(Path(table if is_table else labels).expanduser(), encoding="utf-8-sig", newline="") as file:
            if not is_table:
                return [line.strip() for line in file if line.strip()]
            rows = list(csv.DictReader(file, delimiter="\t" if table.endswith(".tsv") else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{labels}: cannot be read ({error}); give a list, a text file or TABLE.csv:COLUMN") from None
    if rows and column not in rows[0]:
        raise ValueError(f"{table}: no column {column!r}; {nearest(column, map(str, rows[0]))}")
    return sorted({label for row in rows for one in (row[column] or "").split(";") if (label := one.strip())})


LABELS = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}
Labels = Annotated[tuple[str, ...], BeforeValidator(_read), WithJsonSchema(LABELS)]
"""A list, or where it is read from; what a run keeps of its config has the list."""


class TaggerConfig(KindSection):
    """An audio encoder, its layers weighed, the mean over a recording's frames, and a small head."""

    kind: str = "tagger"
    released: str | None = None
    """A published MERT to start from, a folder or a hub name: `m-a-p/MERT-v1-95M`. It gives `encoder` and its weights;
    the head starts from random ones."""
    encoder: AudioEncoderConfig = AudioEncoderConfig()
    labels: Labels = Field(min_length=1)
    """What a recording can be: a list, a text file of one a line, or all that a column of a table holds,
    `songs/labels.csv:genre`. Samples with other labels are bad samples."""
    task: Literal["class", "tags"] = "class"
    """`class`: a recording has one label, by cross-entropy. `tags`: any number of them, each by a binary cross-entropy;
    the loss is the mean over all tags."""
    layers: Literal["all"] | int = "all"
    """`all`: a mean of the states in front of, between and behind the layers, its weights learned (equal at first). A
    number: one of these states; 0 is what enters the first layer."""
    hidden: int = Field(default=512, ge=0)
    """Units of the head's hidden layer (ReLU); 0: a linear head."""
    dropout: Number = Field(default=0.2, ge=0, lt=1)
    """In front of the head's last layer."""

    @field_validator("labels")
    @classmethod
    def _are_distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if wrong := [*twice, *(label for label in labels if label in (PAD, ""))]:
            raise ValueError(f"{wrong[0]!r}: a label is given once, and is not {PAD!r} or ''")
        return labels

    @model_validator(mode="before")
    @classmethod
    def _takes_what_is_released(cls, values: Any) -> Any:
        from mm.models.released import with_released

        return with_released(values, "mert", cls)

    def layout(self) -> Layout:
        """A recording's frames, then its labels: one token each, of which only the loss knows."""
        return Layout(Tokenizer.of_labels(self.labels), Template(None, None), 0, audio=self.encoder.layout())

    def build(self, weights: bool = True) -> "Tagger":
        from mm.models.systems.tagger.model import Tagger

        if self.released is None or not weights:
            return Tagger(self)
        from mm.models.released import fill, open_release

        return fill(Tagger(self), open_release(self.released, "mert"))
