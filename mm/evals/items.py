"""What a benchmark is: items in, outputs judged, numbers out.

A task reads its published files as `Item`s, says how one is asked, what an output means and how good it is. How prompts
become tokens, how a model answers and where results lie is not its business, so a new benchmark is one small class.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any, Literal

from mm.data.sample import Media
from mm.data.sources import shortened
from mm.errors import DataError
from mm.evals.rows import Row, rows

Form = Literal["raw", "chat", "flamingo"]
"""How an item is asked: see `mm.evals.prompts`."""
Record = dict[str, Any]
"""What is kept of an item: id, prompt, output, parsed, answer, right (0 to 1), meta, scoring, seconds."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question, before anything is spelt. Media stay encoded, and files are read when they are needed."""

    id: str
    question: str
    media: tuple[Media, ...]
    answers: tuple[str, ...]
    """What is right: the letter of a choice, the answers that people gave, or the reference captions."""
    options: tuple[str, ...] = ()
    """The choices A, B, …; empty where the answer is free."""
    hint: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    """What results are grouped by. `question`: shared by items that ask the same (MMBench's rotations)."""

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(ascii_uppercase[: len(self.options)])


def question_of(item: Item) -> str:
    """What items share that ask the same, or are of one picture."""
    return str(item.meta.get("question", item.id))


class Task(ABC):
    """A benchmark. Its class docstring says where the format and the metric are published."""

    name: str
    version = 1
    """Of reading, parsing and scoring: a result says it, and it goes up when any of them changes."""
    metric = "accuracy"
    """The number that a table shows first."""
    groups: tuple[str, ...] = ("category",)
    """The fields of `meta` by which numbers are given too (`group_metrics`)."""
    labelled = False
    """In raw form the question is preceded by `Question: `."""
    lists_options = True
    """Options are listed under the question (else they stand in it)."""
    new_tokens = 16
    stops: str = ".,\n"
    """Characters whose tokens end an answer in raw form."""
    opening = "Question:"
    """What every example opens with in flamingo form; where the next one does, an answer is over."""
    flamingo_tokens = 5
    """`new_tokens` in flamingo form."""

    @abstractmethod
    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        """The items of a file, folder or glob, in order; `images`: where pictures lie that the file only names.

        Raises `DataError`: a row lacks a field, or is not what it should be; says which.
        """

    def instruction(self, item: Item) -> str:
        if item.options:
            return "Answer with the option's letter from the given choices directly."
        return "Answer the question using a single word or phrase."

    def text(self, item: Item, form: Form) -> str:
        """The whole question in one of the forms, without its media."""
        lines = [item.hint] if form == "chat" and item.hint else []
        lines.append(f"Question: {item.question}" if self.labelled and form == "raw" else item.question)
        if self.lists_options:
            lines += [f"{letter}. {option}" for letter, option in zip(item.letters, item.options, strict=True)]
        if form == "flamingo":
            return self.opening + "\n".join(lines) + " Short answer:"
        lines.append(self.instruction(item))
        return "\n".join([*lines, "Answer:"] if form == "raw" else lines)

    def placed(self, item: Item, form: Form) -> list[str | Media]:
        """Text and media in order: all media in front, a new line after each, but for flamingo form."""
        if form == "flamingo":
            return [*item.media, self.text(item, form)]
        parts: list[str | Media] = []
        for one in item.media:
            parts += [one, "\n"]
        return [*parts, self.text(item, form)]

    def shown(self, item: Item) -> str:
        """The answer as a solved example shows it."""
        return item.answers[0]

    def candidates(self, item: Item) -> Sequence[str]:
        """The answers among which the likeliest is taken where answers are scored by likelihood; none: generate."""
        return item.letters

    @abstractmethod
    def parse(self, item: Item, output: str) -> str | None:
        """The answer that an output gives; None where it gives none."""

    def right(self, item: Item, parsed: str | None) -> float:
        return float(parsed is not None and parsed in item.answers)

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """The numbers of a whole run; `records` is not empty."""
        return {"accuracy": fmean(record["right"] for record in records)}

    def group_metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """The numbers of one group."""
        return {"right": fmean(record["right"] for record in records)}


class RowTask(Task):
    """A benchmark whose items are the rows of its tables."""

    patterns: tuple[str, ...] = ()
    """Files of a folder that are taken, the first pattern that matches any; then any table."""

    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        for row in rows(path, images, self.patterns):
            try:
                item = self.item(row)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise DataError(
                    f"{row.where}: not laid out as {self.name} is ({type(error).__name__}: {shortened(error)})"
                ) from None
            if item is None:
                continue
            if item.options and item.answers[0] not in item.letters:
                answer, letters = shortened(item.answers[0]), ", ".join(item.letters)
                raise DataError(f"{row.where}: the answer {answer!r} is none of {letters}; are this split's published?")
            if len(item.options) > len(item.letters):
                raise DataError(f"{row.where}: {len(item.options)} options; at most {len(item.letters)} have a letter")
            yield item

    @abstractmethod
    def item(self, row: Row) -> Item | None:
        """The item of a row; None for a row that is no part of the benchmark."""
