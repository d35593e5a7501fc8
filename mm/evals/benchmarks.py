"""The benchmarks: how each is read from its published files, asked and scored.

Wording in raw form is that of the harness that Open-Qwen2VL was evaluated with (Victorwz/Open-Qwen2VL,
`vlm-evaluation/vlm_eval/tasks/harnesses/`, called OQ here); field names are those of the published files. Where we
differ from it on purpose, docs/evaluation.md says so.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from mm.data.sample import Media
from mm.data.sources import shortened
from mm.errors import DataError
from mm.evals.items import Form, Item, Record, RowTask
from mm.evals.parsing import (
    agreement,
    free_match,
    literal_list,
    most_common,
    normalised,
    parse_letter,
    parse_typed,
    parse_yes_no,
    typed_match,
)
from mm.evals.rows import Row, rows


class Choices(RowTask):
    """Multiple choice: the answer is a letter."""

    version = 2
    contains = False
    """Also report how often the output merely contains the right letter, the rule of OQ."""

    def parse(self, item: Item, output: str) -> str | None:
        return parse_letter(output, item.options)

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        found = super().metrics(records)
        if self.contains and all(record["scoring"] == "generate" for record in records):
            found["contains"] = fmean(self.is_contained(one["answer"][0], one["output"]) for one in records)
        return found

    @staticmethod
    def is_contained(answer: str, output: str) -> bool:
        return answer.lower() in output.lower()


class MMBench(Choices):
    """MMBench (Liu et al., 2307.06281) from `mmbench_dev_*.tsv`: index, question, hint, A to D, answer, category,
    l2-category, image (base64, or the index of the row that has it); parquet of lmms-lab alike.

    A question stands in the file once for each rotation of its options, at index + k 1,000,000. `accuracy` is over all
    rows, as OQ counts it; `circular` asks for every rotation of a question to be right (CircularEval).
    """

    name = "mmbench"
    groups = ("category", "l2-category")
    contains = True
    patterns = ("**/*[dD][eE][vV]*.tsv", "**/dev*.parquet")

    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        # Some files have a picture once, and its row's index in the place of the others.
        pictures = (str(row.get("image") or "") for row in rows(path, None, self.patterns))
        self._borrowed = {name for name in pictures if name.isdigit()}
        self._kept: dict[str, Media] = {}
        yield from super().items(path, images)

    def item(self, row: Row) -> Item:
        index, picture, hint = row.text("index"), row.text("image"), str(row.get("hint") or "")
        if picture in self._borrowed and picture not in self._kept:
            raise DataError(
                f"{row.where}: its picture is that of row {shortened(picture)}, which does not stand before it"
            )
        media = self._kept[picture] if picture in self._kept else row.picture("image")
        if index in self._borrowed:
            self._kept[index] = media
        meta = {
            "category": row.get("category"),
            "l2-category": row.get("l2-category", "L2-category"),
            "question": str(int(index) % 1_000_000),
        }
        return Item(index, row.text("question"), (media,), (row.text("answer"),), row.options(), hint, meta)

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        found = super().metrics(records)
        rotations: dict[str, list[float]] = defaultdict(list)
        for record in records:
            rotations[record["meta"]["question"]].append(record["right"])
        if any(len(group) > 1 for group in rotations.values()):
            found["circular"] = fmean(min(group) for group in rotations.values())
        return found


class SeedBench(Choices):
    """SEED-Bench (Li et al., 2307.16125), its image part, from `SEED-Bench.json` and the picture folder.

    `questions`: question, choice_a to choice_d, answer (a letter), data_type, data_id (a file name without extension),
    question_id, question_type_id; parquet of lmms-lab alike, with pictures in `image`.
    """

    name = "seedbench"
    patterns = ("**/SEED-Bench.json",)
    contains = True

    def item(self, row: Row) -> Item | None:
        if row.text("data_type") != "image":
            return None
        options = tuple(row.text(f"choice_{letter}") for letter in "abcd")
        meta = {"category": row.get("question_type", "question_type_id")}
        media = (row.picture("image", "data_id"),)
        return Item(row.text("question_id"), row.text("question"), media, (row.text("answer"),), options, meta=meta)


class MMStar(Choices):
    """MMStar (Chen et al., 2403.20330) from `mmstar.parquet` or `MMStar.tsv`: index, question, image, answer (a
    letter), category, l2_category. The options stand in the question (`Options: A: …, B: …`); a file that has them in
    columns gets them written there.

    `average` is the mean over the six categories, each the mean over its kinds (lmms-eval, `mmstar_aggregate_results`).
    """

    name = "mmstar"
    patterns = ("**/mmstar.parquet", "**/MMStar.tsv", "**/val*.parquet")
    groups = ("category", "l2_category")
    labelled = True
    lists_options = False
    contains = True

    def item(self, row: Row) -> Item:
        question, options = row.text("question"), row.options()
        if options:
            question += "\nOptions: " + ", ".join(f"{k}: {v}" for k, v in zip(ascii_uppercase, options, strict=False))
        else:
            listed = re.split(r"\b[A-D]: ", question.rpartition("Options:")[2])[1:]
            options = tuple(text.rstrip(" ,.\n") for text in listed)
        if not options:
            raise DataError(f"{row.where}: its question lists no options; expected `Options: A: …, B: …`")
        meta = {group: row.get(group) for group in self.groups}
        return Item(
            row.text("index", "id"), question, (row.picture("image"),), (row.text("answer"),), options, meta=meta
        )

    @staticmethod
    def is_contained(answer: str, output: str) -> bool:
        return answer in output

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            kinds[record["meta"]["category"]][record["meta"]["l2_category"]].append(record["right"])
        average = fmean(fmean(map(fmean, kind.values())) for kind in kinds.values())
        return {**super().metrics(records), "average": average}


class AI2D(Choices):
    """AI2D (Kembhavi et al., 1603.07396), test split as lmms-lab publishes it: question, options (a list), answer (a
    place in it, from 0), image; or VLMEvalKit's TSV: index, question, A to D, answer (a letter), category, image."""

    name = "ai2d"
    patterns = ("**/test*.parquet", "**/*TEST*.tsv")

    def item(self, row: Row) -> Item:
        options, answer = row.options(), row.text("answer")
        if row.get("options") is not None:
            options = row.texts("options")
            answer = ascii_uppercase[int(answer)]
        id = str(row.get("index", "question_id", "id") or f"{row.file.stem}/{row.number}")
        meta = {"category": row.get("category")}
        return Item(id, row.text("question"), (row.picture("image"),), (answer,), options, meta=meta)


class MathVista(Choices):
    """MathVista (Lu et al., 2310.02255), testmini, from parquet or `testmini.json`: pid, question, image (a path),
    decoded_image, choices, unit, precision, answer, question_type (multi_choice or free_form), answer_type (text,
    integer, float, list), metadata.

    The benchmark's own protocol lets a language model read answers out of free text; here rules do
    (`parsing.parse_typed`), as in OQ, so numbers are not those of its leaderboard. `mmmu_rules` is OQ's reading of free
    answers instead, with the same letters.
    """

    name = "mathvista"
    groups = ("task", "question_type", "answer_type")
    patterns = ("**/testmini*.parquet", "**/testmini*.json")

    def item(self, row: Row) -> Item:
        kind, answer = row.text("question_type"), row.text("answer")
        details = row.get("metadata") or {}
        meta: dict[str, Any] = {
            "question_type": kind,
            "answer_type": row.text("answer_type"),
            "precision": int(float(row.get("precision") or 0)),
            **{key: details.get(key) for key in ("task", "category", "context", "grade", "source")},
        }
        options: tuple[str, ...] = ()
        if kind == "multi_choice":
            options = row.texts("choices")
            if answer not in options:
                raise DataError(
                    f"{row.where}: the answer {shortened(answer)!r} is none of the choices {shortened(options)}"
                )
            answer = ascii_uppercase[options.index(answer)]
        question = row.text("question")
        picture = row.picture("decoded_image", "image")
        return Item(row.text("pid"), question, (picture,), (answer,), options, meta=meta)

    def parse(self, item: Item, output: str) -> str | None:
        if item.options:
            return parse_letter(output, item.options)
        return parse_typed(output, item.meta["answer_type"], item.meta["precision"])

    def right(self, item: Item, parsed: str | None) -> float:
        if item.options or parsed is None:
            return super().right(item, parsed)
        return float(typed_match(parsed, item.answers[0], item.meta["answer_type"], item.meta["precision"]))

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        free = [one for one in records if one["meta"]["question_type"] != "multi_choice"]
        by_rules = sum(free_match(one["output"], one["answer"]) for one in free)
        rest = sum(one["right"] for one in records if one["meta"]["question_type"] == "multi_choice")
        return {**super().metrics(records), "mmmu_rules": (by_rules + rest) / len(records)}


class MMMU(Choices):
    """MMMU (Yue et al., 2311.16502) from parquet: id, question, options (a list as a Python literal), answer,
    image_1 to image_7, question_type (multiple-choice or open), subfield, topic_difficulty.

    Question and options name pictures as `<image 1>`; each stands where it is named. Accuracy by subject, the middle of
    the id. Free answers are read by MMMU's own rules (`parsing.free_match`).
    """

    name = "mmmu"
    groups = ("subject",)
    patterns = ("**/validation*.parquet", "**/val*.parquet")
    PLACE = re.compile(r"<image\s*(\d+)>")

    def item(self, row: Row) -> Item:
        id, question, answer = row.text("id"), row.text("question"), row.text("answer")
        options: tuple[str, ...] = ()
        try:
            if row.text("question_type") == "multiple-choice":
                options = tuple(literal_list(row.text("options")))
                answers = [answer]
            else:
                answers = literal_list(answer) if answer.startswith("[") else [answer]
        except ValueError as error:
            raise DataError(f"{row.where}: its options or answer cannot be read: {shortened(error)}") from None
        named = list(map(int, self.PLACE.findall("\n".join([question, *options]))))
        present = [n for n in range(1, 8) if row.get(f"image_{n}") is not None]
        if missing := sorted(set(named) - set(present)):
            raise DataError(f"{row.where}: it names <image {missing[0]}>, and has no image_{missing[0]}")
        numbers = named or present
        media = tuple(row.picture(f"image_{number}") for number in numbers)
        meta = {"subject": id.split("_", 1)[-1].rpartition("_")[0], "subfield": str(row.get("subfield") or "")}
        return Item(id, question, media, tuple(answers), options, meta=meta)

    def text(self, item: Item, form: Form) -> str:
        text = super().text(item, form)
        if form == "raw":  # one more space than there should be, as in OQ
            subject = "".join(f" {word}" for word in item.meta["subfield"].split("_"))
            text = f"The following are multiple choice questions about {subject}.\n\n{text}"
        return text

    def placed(self, item: Item, form: Form) -> list[str | Media]:
        pieces = self.PLACE.split(self.text(item, form))[::2]
        if len(pieces) == 1:
            return super().placed(item, form)
        parts: list[str | Media] = [pieces[0]]
        for one, text in zip(item.media, pieces[1:], strict=True):
            parts += [one, text if form == "flamingo" else f"\n{text}"]
        return parts

    def parse(self, item: Item, output: str) -> str | None:
        return parse_letter(output, item.options) if item.options else output.strip() or None

    def right(self, item: Item, parsed: str | None) -> float:
        if item.options or parsed is None:
            return super().right(item, parsed)
        return float(free_match(parsed, item.answers))


class POPE(RowTask):
    """POPE (Li et al., 2305.10355): `coco_pope_{random,popular,adversarial}.json`, one object a line with question_id,
    image (a file name), text, label (yes or no); parquet of lmms-lab: question_id, question, answer, category, image.

    A file's split is the end of its name, or `category`. Yes is the positive class; an output that says neither counts
    as wrong and as no yes (POPE's own script counts it as a yes).
    """

    name = "pope"
    groups = ("split",)
    patterns = ("**/*pope*.json", "**/*pope*.jsonl")
    labelled = True

    def item(self, row: Row) -> Item:
        split = row.get("category") or re.split(r"[_.-]", row.file.name)[-2]
        label = row.text("label", "answer").lower()
        if label not in ("yes", "no"):
            raise DataError(f"{row.where}: the label {shortened(label)!r} is neither yes nor no")
        id = f"{split}/{row.text('question_id')}"
        return Item(id, row.text("text", "question"), (row.picture("image"),), (label,), meta={"split": split})

    def candidates(self, item: Item) -> Sequence[str]:
        return ("yes", "no")

    def parse(self, item: Item, output: str) -> str | None:
        return parse_yes_no(output)

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        splits: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            splits[record["meta"]["split"]].append(record)
        f1s = [yes_no_metrics(some)["f1"] for some in splits.values()]
        return {**yes_no_metrics(records), "mean_f1": fmean(f1s)}

    def group_metrics(self, records: Sequence[Record]) -> dict[str, float]:
        return yes_no_metrics(records)


def yes_no_metrics(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of yes, and how often yes was said."""
    said = [one["parsed"] == "yes" for one in records]
    true = [one["answer"][0] == "yes" for one in records]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    precision, recall = hits / max(sum(said), 1), hits / max(sum(true), 1)
    return {
        "accuracy": fmean(one["right"] for one in records),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": sum(said) / len(records),
    }


class VQA(RowTask):
    """Short answers against those of ten people: VQAv2 (1612.00837), OK-VQA (1906.00067), VizWiz (1802.08218).

    A folder with a `*questions*.json` and an `*annotations*.json`, joined by question_id (where some are named `val`,
    only these), or one file that holds both.
    Fields: question_id, question, image_id or image, answers (texts, or objects with an `answer`), answer_type.
    """

    name = "vqa"
    version = 2
    groups: tuple[str, ...] = ("answer_type",)
    labelled = True
    file_names: tuple[str, ...] = ("{}", "COCO_val2014_{:0>12}", "COCO_train2014_{:0>12}", "{:0>12}")
    """What the picture of an `image_id` may be called."""
    patterns: tuple[str, ...] = (
        "**/*val*questions*.json",
        "**/*questions*.json",
        "**/val*.json",
        "**/validation*.parquet",
    )

    def items(self, path: str, images: Path | None = None) -> Iterator[Item]:
        folder = Path(path)
        of_names = (sorted(folder.glob(name)) for name in ("*val*annotations*.json", "*annotations*.json"))
        files = next(filter(None, of_names), []) if folder.is_dir() else []
        self._given = {row.text("question_id"): self._answers(row) for file in files for row in rows(str(file))}
        yield from super().items(path, images)

    def item(self, row: Row) -> Item:
        id = str(row.get("question_id") or Path(row.text("image")).stem)
        if self._given and id not in self._given:
            raise DataError(f"{row.where}: no answers for question {shortened(id)} in the *annotations*.json beside it")
        answers, kind = self._given[id] if self._given else self._answers(row)
        return Item(id, row.text("question"), (self._picture(row),), answers, meta={"answer_type": kind})

    @staticmethod
    def _answers(row: Row) -> tuple[tuple[str, ...], str | None]:
        """What people answered, and the kind of answer."""
        given = row.need("answers")
        listed = given if isinstance(given, list) else []
        answers = [one.get("answer") if isinstance(one, dict) else one for one in listed]
        if not answers or None in answers:
            raise DataError(f"{row.where}: no list of 'answers'; expected a split whose answers are published")
        return tuple(map(str, answers)), row.get("answer_type")

    def _picture(self, row: Row) -> Media:
        if row.get("image") is not None:
            return row.picture("image")
        names = [form.format(row.text("image_id")) for form in self.file_names]
        for name in names[:-1]:
            try:
                return row.load(name)
            except DataError:
                continue  # the last one's error is raised
        return row.load(names[-1])

    def shown(self, item: Item) -> str:
        return most_common(item.answers)

    def candidates(self, item: Item) -> Sequence[str]:
        return ()

    def parse(self, item: Item, output: str) -> str | None:
        return normalised(output) or None

    def right(self, item: Item, parsed: str | None) -> float:
        return agreement(parsed or "", [normalised(answer) for answer in item.answers])


class TextVQA(VQA):
    """TextVQA (Singh et al., 1904.08920): `TextVQA_0.5.1_val.json` (`data`: question, question_id, image_id, answers)
    and the folder of `IMAGE_ID.jpg`; parquet of lmms-lab alike. Questions are asked without OCR tokens."""

    name = "textvqa"
    groups = ()
    patterns = ("**/TextVQA_[0-9]*val.json", "**/*val.json", "**/validation*.parquet")
    file_names = ("{}",)
