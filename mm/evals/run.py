"""A model on benchmarks: prompts in batches, every item kept as it is answered, numbers at the end.

Of each task the folder `out` holds `NAME.json`, settings and numbers, and `NAME.items.jsonl`, an item a line. Items
that are there are not run again, so a run that was stopped goes on, and one with a larger `limit` adds to it; a folder
of other settings, prompts or weights is refused, since its items would be another run's.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mm import hub
from mm.data.layout import Layout
from mm.data.sample import keyed_rng
from mm.errors import ConfigError, DataError
from mm.evals import TASKS
from mm.evals.items import Form, Item, Record, Task, question_of
from mm.evals.perplexity import Perplexity, run_perplexity
from mm.evals.prompts import VERSION, answer_text, build, decoding, spelt
from mm.evals.results import Progress, Result, chunks, claim, prepared, write
from mm.evals.zero_shot import FEATURE_TASKS, Classify, Encodes, FeatureTask, run_features
from mm.files import atomic
from mm.models.generate import generate, log_likelihoods
from mm.models.prompts import Decoding, Precision, Prompt, autocast
from mm.models.system import GenerativeSystem, System, weights_digest
from mm.settings import nearest

Scoring = Literal["generate", "likelihood"]
POOL = 512  # examples that a file is drawn down to before those of a question are drawn


@dataclass(frozen=True, slots=True)
class Settings:
    """How items are asked and scored, whatever the task.

    scoring: `generate` an answer and parse it, or take the candidate of the largest `likelihood`; where a task (or an
    item of it) has no candidates, an answer is generated all the same, and the item says so.
    shots: solved examples before each question, drawn anew for each by its id, or (`fixed_shots`) the same for all.
    text_shots: so many more, in front of those, without their media. `--text-shots 2` alone is the "0-shot" of the
    Flamingo literature.
    decoding: what is not the task's own way of decoding, by the names of `Decoding`: `{"beams": 5}`.
    """

    form: Form = "raw"
    scoring: Scoring = "generate"
    shots: int = 0
    text_shots: int = 0
    fixed_shots: bool = False
    seed: int = 0
    precision: Precision = "fp32"
    decoding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("shots", "text_shots"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)}: expected 0 or more")

    def decoding_of(self, task: Task, layout: Layout) -> Decoding:
        """How answers to a task are written."""
        return replace(decoding(task, self.form, layout), **self.decoding)


@dataclass(frozen=True, slots=True)
class Source:
    """A task and its files."""

    task: Task | FeatureTask | Perplexity
    path: str
    images: Path | None = None
    """Where pictures lie that the file only names."""
    examples: str | None = None
    """Where solved examples come from; None: the file itself, never the question that is asked."""
    example_images: Path | None = None
    """Where the pictures of `examples` lie; None: where those of the task do."""


def sources(
    tasks: Sequence[str],
    images: Sequence[str] = (),
    examples: Sequence[str] = (),
    example_images: Sequence[str] = (),
    classes: str | None = None,
    templates: str | None = None,
) -> list[Source]:
    """Tasks by `NAME=PATH`, with `NAME=PATH` of their pictures and examples; `classes` and `templates` of `Classify`.

    Raises `ConfigError`.
    """
    paths, folders, solved, theirs = (_by_name(given) for given in (tasks, images, examples, example_images))
    for name in [*folders, *solved, *theirs]:
        if name not in paths:
            raise ConfigError(
                f"{name}: pictures or examples for a task that is not among --task; {nearest(name, paths)}"
            )
    if (classes or templates) and "classify" not in paths:
        raise ConfigError("names of classes and templates are for --task classify=…, which is not among --task")
    return [
        Source(
            _task(name, classes, templates),
            path,
            Path(folders[name]) if name in folders else None,
            solved.get(name),
            Path(theirs[name]) if name in theirs else None,
        )
        for name, path in paths.items()
    ]


def _task(name: str, classes: str | None, templates: str | None) -> Task | FeatureTask | Perplexity:
    if name in TASKS:
        return TASKS[name]()
    if name == Perplexity.name:
        return Perplexity()
    return Classify(classes, templates) if name == "classify" else FEATURE_TASKS[name]()


def _by_name(given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"{text}: expected NAME=PATH, such as pope=POPE/coco_pope_random.json")
        if name not in (known := [*TASKS, *FEATURE_TASKS, Perplexity.name]):
            raise ConfigError(f"{name}: no such task; {nearest(name, known)}")
        if name in found:
            raise ConfigError(f"{name}: given twice; evaluate a second file into another --out")
        found[name] = path
    return found


def evaluate(
    model: str,
    tasks: Sequence[Source],
    settings: Settings = Settings(),
    out: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress = lambda what, count: None,
    template: str | None = None,
    tokens: int | None = None,
) -> list[Result]:
    """Load a model (a run, a released folder, a hub name) and run it on all tasks; results into `out`.

    `template`, `tokens`: another chat template and number of positions a picture, as `hub.load` takes them.

    Raises:
        ConfigError: the model does not write text or has no features, whichever a task needs; `out` holds results of
            other settings.
        DataError: a file of a task cannot be read.
    """
    system, layout, config = hub.load(model, template=template, tokens=tokens)
    for task in (source.task for source in tasks):
        if isinstance(task, Perplexity) and limit is not None:
            raise ConfigError("perplexity: is over all of its files; leave out --limit")
        if isinstance(task, Task | Perplexity) and not isinstance(system, GenerativeSystem):
            raise ConfigError(f"{model}: does not write text, so it cannot be asked")
        if isinstance(task, FeatureTask) and not isinstance(system, Encodes):
            raise ConfigError(
                f"{model}: has no features of pictures and texts to compare; --task {task.name} is for models with a "
                "contrastive objective (kinds clip and cosmo)"
            )
    out = out or Path(f"eval-{Path(model).resolve().name}")
    about = {
        "model": model,
        "weights": weights_digest(system),
        "template": layout.template.chat,
        "picture": layout.image and layout.image.describe(),
    }
    if isinstance(system, GenerativeSystem):
        own = Perplexity.of(config, system)
        tasks = [replace(one, task=own) if isinstance(one.task, Perplexity) else one for one in tasks]
    return [run_task(system, layout, source, settings, out, about, limit, batch, progress) for source in tasks]


def run_task(
    system: System,
    layout: Layout,
    source: Source,
    settings: Settings,
    out: Path,
    about: dict[str, Any],
    limit: int | None = None,
    batch: int = 8,
    progress: Progress = lambda what, count: None,
) -> Result:
    """One task from its first item without a record to its numbers."""
    task = source.task
    if isinstance(task, FeatureTask):
        given = (task, source.path, source.images, settings.precision)
        return run_features(system, layout, *given, out, about, limit, batch, progress)
    assert isinstance(system, GenerativeSystem)
    if isinstance(task, Perplexity):
        return run_perplexity(system, layout, task, source.path, settings.precision, out, about, batch, progress)
    asked = {
        **about,
        "task": task.name,
        "task_version": task.version,
        "files": source.path,
        "images": source.images and str(source.images),
        "examples": source.examples,
        "example_images": source.example_images and str(source.example_images),
        "prompt": f"{settings.form}-{VERSION}",
        **{key: value for key, value in asdict(settings).items() if key != "form"},
        "decoding": asdict(settings.decoding_of(task, layout)),
    }
    lines = prepared(out, source.path) / f"{task.name}.items.jsonl"
    known = read_records(lines)
    claim(out / f"{task.name}.json", asked, bool(known))
    pool = _pool(task, source, settings)
    ask = _Asker(system, layout, task, settings, pool, batch)
    records: list[Record] = []
    seen: set[str] = set()
    with open(lines, "a", encoding="utf-8") as file:
        for some in chunks(islice(task.items(source.path, source.images), limit), batch):
            for item in some:
                if item.id in seen:
                    raise DataError(f"{source.path}: two items have the id {item.id}; give each file of a task alone")
                seen.add(item.id)
            answered = iter(ask([item for item in some if item.id not in known]))
            for item in some:
                record = known.get(item.id)
                if record is not None and not ask.knows(item, record):
                    raise ConfigError(
                        f"{lines}: {item.id} has another prompt or other answers than when it was answered; choose "
                        f"another --out, or remove {lines.name}, and its items are run again"
                    )
                if record is None:
                    record = next(answered)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                records.append({key: value for key, value in record.items() if key != "prompt"})
            file.flush()
            progress(task.name, len(records))
    if not records:
        raise DataError(f"{source.path}: no items of {task.name} in it")
    result = {**asked, **summary(task, records)}
    write(out / f"{task.name}.json", result)
    return result


def summary(task: Task, records: Sequence[Record]) -> Result:
    """Metrics over all records, and numbers by what the task groups them by."""
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name in task.groups:
            if (value := record["meta"].get(name)) is not None:
                groups[name][str(value)].append(record)
    return {
        "n": len(records),
        "answered": sum(record["parsed"] is not None for record in records),
        "scored": dict(sorted(Counter(record["scoring"] for record in records).items())),
        "metric": task.metric,
        "metrics": task.metrics(records),
        "by": {
            name: {value: {"n": len(some), **task.group_metrics(some)} for value, some in sorted(values.items())}
            for name, values in groups.items()
        },
        "seconds": round(sum(record["seconds"] for record in records), 3),
    }


def read_records(lines: Path) -> dict[str, Record]:
    """Items that were answered, by id. A line that was cut off is taken away from the file."""
    if not lines.exists():
        return {}
    data = lines.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with atomic(lines) as file:
            file.write(whole)
    try:
        return {record["id"]: record for record in map(json.loads, whole.splitlines())}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{lines}: damaged ({error}); remove it, and its items are run again") from None


class _Asker:
    """Answers items, in batches of prompts or of prompts with candidates."""

    def __init__(
        self, system: GenerativeSystem, layout: Layout, task: Task, settings: Settings, pool: list[Item], batch: int
    ) -> None:
        self._system, self._layout, self._task = system, layout, task
        self._settings, self._pool, self._batch = settings, pool, batch
        self._decoding = settings.decoding_of(task, layout)

    def __call__(self, items: Sequence[Item]) -> list[Record]:
        """Their records, in order."""
        if not items:
            return []
        start = time.perf_counter()
        task, form = self._task, self._settings.form
        prompts = [build(task, item, form, self._layout, *self._shots(item)) for item in items]
        candidates = [task.candidates(item) if self._settings.scoring == "likelihood" else () for item in items]
        free = [n for n, some in enumerate(candidates) if not some]
        records: list[Record] = [{} for _ in items]
        try:
            with autocast(self._system, self._settings.precision):
                outputs = generate(self._system, self._layout, [prompts[n] for n in free], self._decoding)
                scored = list(self._likelihoods(items, prompts, candidates))
            for n, output in zip(free, outputs, strict=True):
                parsed = task.parse(items[n], output)
                records[n] = {"output": output, "parsed": parsed, "scoring": "generate"}
            for n, scores in scored:
                best = max(scores, key=lambda one: scores[one])
                records[n] = {"output": best, "parsed": best, "scoring": "likelihood", "log_likelihoods": scores}
        except DataError as error:
            raise DataError(f"{task.name}, items {items[0].id} to {items[-1].id}: {error}") from None
        seconds = round((time.perf_counter() - start) / len(items), 4)
        return [
            {
                "id": item.id,
                "prompt": spelt(prompt, self._layout),
                **record,
                "answer": list(item.answers),
                "right": task.right(item, record["parsed"]),
                "meta": item.meta,
                "seconds": seconds,
            }
            for item, prompt, record in zip(items, prompts, records, strict=True)
        ]

    def knows(self, item: Item, record: Record) -> bool:
        """Whether a record is of this very item, as far as text goes."""
        prompt = build(self._task, item, self._settings.form, self._layout, *self._shots(item))
        return record["prompt"] == spelt(prompt, self._layout) and record["answer"] == list(item.answers)

    def _shots(self, item: Item) -> tuple[list[Item], list[Item]]:
        """The first of the pool's permutation that ask something else: shots, and then those of text alone."""
        settings = self._settings
        wanted = settings.shots + settings.text_shots
        if not wanted:
            return [], []
        key = () if settings.fixed_shots else (item.id,)
        order = keyed_rng(settings.seed, "shots", *key).permutation(len(self._pool)).tolist()
        others = list(islice((one for n in order if not _same(one := self._pool[n], item)), wanted))
        if len(others) < wanted:
            raise ConfigError(f"{wanted} shots: there are {len(others)} examples for item {item.id}")
        return others[: settings.shots], others[settings.shots : wanted]

    def _likelihoods(
        self, items: Sequence[Item], prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Of every item with candidates its number, and log p(candidate | prompt) in nats."""
        pairs = [(n, one) for n, some in enumerate(candidates) for one in some]
        found: dict[int, dict[str, float]] = defaultdict(dict)
        for some in chunks(pairs, self._batch):
            texts = [answer_text(self._task, items[n], self._settings.form, one) for n, one in some]
            values = log_likelihoods(self._system, self._layout, [prompts[n] for n, _ in some], texts)
            for (n, one), value in zip(some, values, strict=True):
                found[n][one] = round(value, 5)
        yield from found.items()


def _same(example: Item, item: Item) -> bool:
    """Whether an example is the question itself: by its name, or because it asks the same of the same media."""
    if question_of(example) == question_of(item):
        return True
    return (example.question, len(example.media)) == (item.question, len(item.media)) and all(
        one.size == other.size and one.read() == other.read()
        for one, other in zip(example.media, item.media, strict=True)
    )


def _pool(task: Task, source: Source, settings: Settings) -> list[Item]:
    """The examples to draw from: a seeded sample of those in their file, in one pass over it."""
    if not settings.shots + settings.text_shots:
        return []
    rng = keyed_rng(settings.seed, "pool")
    pool: list[Item] = []
    own = source.examples in (None, source.path)
    images = source.images if source.example_images is None else source.example_images
    for number, item in enumerate(task.items(source.examples or source.path, images)):
        # An example of another file that has the id of a question is not that question.
        one = item if own else replace(item, meta={**item.meta, "question": f"example {item.id}"})
        if len(pool) < POOL:
            pool.append(one)
        elif (place := int(rng.integers(number + 1))) < POOL:
            pool[place] = one
    return pool


def table(results: Sequence[Result]) -> Any:
    """The numbers of some tasks for a terminal, a row each: a `rich` table."""
    from rich.table import Column, Table

    metric, number = Column("metric", overflow="fold"), Column("", min_width=5)  # on a narrow terminal no number is cut
    rest_of = ("prompt", "scoring", "shots", Column("other numbers", overflow="fold"))
    shown = Table(Column("task", no_wrap=True), "items", metric, number, *rest_of, box=None, pad_edge=False)
    for result in results:
        metrics = dict(result["metrics"])
        first = metrics.pop(result["metric"])
        rest = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        shots = str(result.get("shots", ""))
        if result.get("text_shots"):
            shots += f" + {result['text_shots']} of text"
        shown.add_row(
            result["task"],
            f"{result['n']:,}",
            result["metric"],
            f"{first:.3f}",
            result.get("prompt", ""),
            ", ".join(result.get("scored", ["features"])),
            shots,
            rest,
        )
    return shown
