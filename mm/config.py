"""RunConfig: composes the sections that data, models and train define. YAML in, typed config out.

    extends: ../base.yaml          a file to start from; mappings merge, lists and other kinds replace
    data: …  model: …  train: …    sections
    mm train FILE train.max_steps=40 data.sources.0.path=…      the command line has the last word

Every error is one line: the file and line, the key's path, what was expected, the nearest valid name.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from mm.data.config import DataConfig
from mm.errors import ConfigError
from mm.models.config import ModelConfig
from mm.models.teachers.config import teacher_of
from mm.settings import Loader, Section, merge
from mm.train.config import EvaluationConfig, TrainConfig
from mm.train.engines.config import REFUSED
from mm.train.schedules import spans

Keys = tuple[str | int, ...]
WHOLE_RUN = (
    "engine", "device", "hang_timeout", "profile", "trackers", "save_every", "keep", "keep_every", "branch",
    "branch_data", "deterministic", "async_save",
)  # fmt: skip
"""Settings of `train` that stages have in common."""
BEGINNING = ("init_from", "init_optimizer")
"""Settings of `train` that a stage has no use for behind the first."""
STATE = ("precondition", "max_precond_dim", "block")
"""Settings of `train.optimizer`, besides its kind, that what it keeps of a parameter depends on."""


class StageConfig(Section):
    """A part of a run: what differs from the settings above. Weights go on from the stage before; the optimizer and the
    schedule start anew, unless they are to go on, too."""

    name: str
    """Shown in logs and reports."""
    data: dict[str, Any] = {}
    """Settings of `data`."""
    model: dict[str, Any] = {}
    """Settings of `model`, such as another resolution or number of tokens."""
    train: dict[str, Any] = {}
    """Settings of `train`, such as `max_steps` and `params`."""
    evaluation: dict[str, Any] = {}
    """Settings of `evaluation`."""
    convert: str | None = None
    """`package.module:function`, called with the tensors of the stage before by name and this stage's model; returns
    the tensors to load into it: to grow, upcycle or re-tokenise. By default tensors are taken over by name, and
    position embeddings of vision towers resampled."""
    carry_on: bool = False
    """The data go on where the stage before left them, rather than from their beginning: the same set and mixture, no
    pack again before all have been seen. The rows of a step may be others."""
    keep_optimizer: bool = False
    """The optimizer's moments (and the averages of `train.ema`) go on from the stage before, by name, and so does the
    schedule: it is one over the steps of all stages that keep it. Parameters that are new start anew."""
    rewarm: bool = False
    """With `keep_optimizer`: the schedule begins anew all the same, with its warm-up, over the steps from here on."""

    @property
    def counts_on(self) -> bool:
        """Whether the schedule is that of the stage before."""
        return self.keep_optimizer and not self.rewarm

    def settings(self) -> dict[str, Any]:
        return self.model_dump(include={"data", "model", "train", "evaluation"})


class RunConfig(Section):
    """One run."""

    out: Path
    """The folder that the run writes to; by default `runs/` and the name of the config file."""
    seed: int = 0
    """Everything drawn in a run derives from it."""
    data: DataConfig
    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    stages: list[StageConfig] = []
    """Parts of a run, one after the other, each with settings of its own over those above."""

    @field_validator("out")
    @classmethod
    def _may_be_at_home(cls, value: Path) -> Path:
        return value.expanduser()

    def resolved(self) -> dict[str, Any]:
        """Plain values that give this config again."""
        return self.model_dump(mode="json")

    def stage_runs(self) -> list["RunConfig"]:
        """The config of each stage as a whole; of a run without stages, its own."""
        if not self.stages:
            return [self]
        base = {key: value for key, value in self.resolved().items() if key != "stages"}
        return [RunConfig.model_validate(merge(base, stage.settings())) for stage in self.stages]


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides, and check it all. Raises `ConfigError`."""
    path = Path(path)
    tree, origins = _read(path, ())
    for override in overrides:
        _override(tree, origins, override)
    tree.setdefault("out", str(Path("runs") / path.stem))
    config = _validate(tree, path, origins)
    problems = [] if config.stages else contradictions(config, config.train.max_steps)
    problems += _problems_of_stages(config, path, origins)
    if problems:
        lines = [f"{_where(keys, path, origins)}: {text}" for keys, text in problems]
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return config


def _validate(tree: dict[str, Any], path: Path, origins: dict[Keys, str]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(one, path, origins) for one in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _problems_of_stages(config: RunConfig, path: Path, origins: dict[Keys, str]) -> list[tuple[Keys, str]]:
    stages = config.stages
    found: list[tuple[Keys, str]] = []
    if stages and stages[0].carry_on:
        found.append((("stages", 0, "carry_on"), "there is no stage before whose data it could go on with"))
    if stages and stages[0].keep_optimizer:
        found.append((("stages", 0, "keep_optimizer"), "there is no stage before whose optimizer it could go on with"))
        return found
    above = {key: value for key, value in config.resolved().items() if key != "stages"}
    runs: list[RunConfig] = []
    for number, stage in enumerate(stages):
        at = {**origins, **{keys[2:]: where for keys, where in origins.items() if keys[:2] == ("stages", number)}}
        runs.append(_validate(merge(above, stage.settings()), path, at))
        found += [
            (("stages", number, "train", key), "is the whole run's: set it above the stages")
            for key in WHOLE_RUN
            if key in stage.train
        ]
        found += [
            (
                ("stages", number, "train", key),
                "is for the beginning of a run: leave it out, or set it above the stages",
            )
            for key in BEGINNING
            if number and key in stage.train
        ]
        if stage.rewarm and not stage.keep_optimizer:
            found.append((("stages", number, "rewarm"), "the schedule begins anew without keep_optimizer anyway"))
        elif stage.keep_optimizer:
            found += [(("stages", number, *keys), text) for keys, text in _not_kept(stage, runs[-2], runs[-1])]
    lengths = [run.train.max_steps for run in runs]
    over = spans([stage.counts_on for stage in stages], [length or 0 for length in lengths])
    for run, (_, steps) in zip(runs, over, strict=True):
        found += contradictions(run, None if None in lengths else steps, last=run is runs[-1])
    return found


def _not_kept(stage: StageConfig, before: RunConfig, run: RunConfig) -> list[tuple[Keys, str]]:
    """Why the optimizer of the stage before cannot go on."""
    found: list[tuple[Keys, str]] = []
    kinds = [one.train.optimizer.kind for one in (before, run)]
    if kinds[0] != kinds[1]:
        found.append((("train", "optimizer"), f"{kinds[1]} cannot go on with the moments of {kinds[0]}"))
    for key in STATE if kinds[0] == kinds[1] else ():
        was, now = (getattr(one.train.optimizer, key, None) for one in (before, run))
        if was != now:
            text = f"is {now}, the moments of the stage before are of {was}: set it as there, or keep_optimizer=false"
            found.append((("train", "optimizer", key), text))
    if stage.convert is not None and run.train.engine.kind == "deepspeed":
        found.append((("keep_optimizer",), "deepspeed loads moments with the weights, which convert changes: use fsdp"))
    if before.train.lora or run.train.lora:
        found.append((("keep_optimizer",), "adapters are merged between stages, and their moments are of no more use"))
    if stage.counts_on and before.train.schedule != run.train.schedule:
        found.append((("train", "schedule"), "is another than in the stage before: with rewarm it begins anew"))
    return found


def contradictions(config: RunConfig, steps: int | None = None, last: bool = True) -> list[tuple[Keys, str]]:
    """Rules between settings, checked before anything is built: (key path, what is wrong).

    steps: that the schedule is over, where that is known. last: whether it is the stage that is tested in the end.
    """
    data, train, evaluation = config.data, config.train, config.evaluation
    rows = train.batch_tokens // data.context_length
    found: list[tuple[Keys, str]] = []

    def rule(broken: bool, key: str, text: str) -> None:
        if broken:
            found.append((tuple(key.split(".")), text))

    raw = bool(data.sources or data.validation or data.test)
    rule(
        data.packed is not None and raw,
        "data.packed",
        "contradicts data.sources, data.validation or data.test: give raw shards or a packed set, not both",
    )
    rule(
        data.packed is None and not data.sources,
        "data.sources",
        "nothing to train on: give sources, or data.packed",
    )
    trains = getattr(config.model, "trains", True)
    rule(
        trains and (train.max_steps is None) == (train.epochs is None),
        "train.max_steps",
        "give either train.max_steps or train.epochs" + (", not both" if train.epochs is not None else ""),
    )
    rule(
        trains and rows < 1,
        "train.batch_tokens",
        f"{train.batch_tokens} is less than one row of data.context_length = {data.context_length}",
    )
    rule(
        trains and rows >= 1 and rows % train.micro_batch != 0,
        "train.micro_batch",
        f"{train.micro_batch} does not divide the {rows} rows of a step "
        f"(train.batch_tokens {train.batch_tokens} / data.context_length {data.context_length})",
    )
    parts = getattr(config.model, "parts", {})
    for name, part in parts.items():
        rule(
            getattr(getattr(part, "routing", None), "routing_rows", None) is not None,
            f"model.parts.{name}",
            "routing_rows is not for a joint run, where a part sees some rows of a micro-batch: leave it out",
        )
    together = getattr(getattr(config.model, "routing", None), "routing_rows", None) or 1
    rule(
        trains and train.micro_batch % together != 0,
        "train.micro_batch",
        f"{train.micro_batch} is no multiple of the {together} rows that choose together (model's routing_rows)",
    )
    over = getattr(train.engine, "expert_parallel", 1)
    whole = {f"model.parts.{name}": part for name, part in parts.items()} or {"model": config.model}
    for place, part in whole.items():
        groups = getattr(getattr(part, "experts", None), "groups", {})
        rule(
            any(experts % over for experts in groups.values() if experts > 1),
            "train.engine.expert_parallel",
            f"{over} does not divide the experts of every group ({', '.join(f'{n}: {e}' for n, e in groups.items())})",
        )
        routing = getattr(part, "routing", None)
        unguided = routing is not None and routing.auxiliary == "none"
        unguided &= getattr(part, "depths", None) is not None or any(one > 1 for one in groups.values())
        for key, evaluated in (("evaluation.every", evaluation.every > 0), ("data.test", last and bool(data.test))):
            rule(
                unguided and evaluated,
                key,
                f"this model has no auxiliary routers, and nothing is evaluated without them: set {place}."
                f"{'experts' if groups else 'depths'}.auxiliary=along, add a stage that trains them, or leave this out",
            )
    rule(
        config.model.kind == "clip" and getattr(train.engine, "stage", 0) == 3,
        "train.engine.stage",
        "3 has no whole weights where a clip model cuts positions to the length of texts; set stage 2, or kind fsdp",
    )
    rule(
        train.engine.kind == "deepspeed" and train.optimizer.kind in REFUSED,
        "train.optimizer.kind",
        f"{train.optimizer.kind} under deepspeed: it {REFUSED.get(train.optimizer.kind)}",
    )
    rule(
        train.engine.kind == "deepspeed" and train.ema > 0 and train.engine.stage == 3,
        "train.ema",
        "not for train.engine.stage 3, which keeps no weights whole between steps; set stage 2, or train.engine.kind "
        "fsdp",
    )
    coarse = {train.precision, *(one.weights for one in getattr(train.engine, "precision", ()))} != {"fp32"}
    rule(
        coarse and getattr(train.optimizer, "estimator", None) == "hutchinson",
        "train.optimizer.estimator",
        "hutchinson takes small differences of gradients, for which bf16 is too coarse: set train.precision and "
        "train.engine.precision to fp32, or estimator gnb",
    )
    for key, text in train.schedule.problems(steps) if trains and steps else ():
        rule(True, f"train.schedule.{key}", text)
    rule(
        train.branch is None and train.branch_data == "anew",
        "train.branch_data",
        "anew is for a run with train.branch; name the checkpoint to branch off from, or leave it out",
    )
    rule(
        train.init_optimizer and train.init_from is None,
        "train.init_optimizer",
        "there is no train.init_from whose moments it could take over",
    )
    rule(
        train.init_optimizer and bool(train.lora),
        "train.init_optimizer",
        "adapters are new in every run, and have no moments to take over",
    )
    rule(
        evaluation.every > 0 and data.packed is None and not data.validation,
        "evaluation.every",
        "there is no data.validation to evaluate on; give it, or set evaluation.every=0",
    )
    rule(
        data.codes and teacher_of(config.model) is None,
        "data.codes",
        f"a {config.model.kind} model without model.teacher reads no codes; give it one, or set data.codes=false",
    )
    rule(
        data.codes and data.features,
        "data.codes",
        "contradicts data.features: media are read with codes beside them, or replaced by features",
    )
    connector = getattr(config.model, "connector", None)
    tokens = getattr(connector, "tokens", 0) if getattr(connector, "pool", None) is None else 0
    rule(
        tokens >= data.context_length,
        "data.context_length",
        f"{data.context_length} does not hold one picture of model.connector.tokens = {tokens}",
    )
    return found


def json_schema() -> dict[str, Any]:
    """A JSON schema of the YAML files, for editors (configs/schema.json)."""
    schema = RunConfig.model_json_schema()
    # A file may extend another and leave out what that one sets, at any depth; `out` has a default.
    for section in (schema, *schema["$defs"].values()):
        if "kind" not in section.get("required", ()):
            section.pop("required", None)
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A file to start from, relative to this one.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Keys, str]]:
    """A file's values with everything it extends, and where each key was set (`file:line`)."""
    here = path.resolve()
    if here in chain:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join(p.name for p in (*chain, here))}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    origins: dict[Keys, str] = {}
    tree = _plain(node, path, (), origins) if node is not None else {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found a {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    base, base_origins = _read(path.parent / str(parent), (*chain, here))
    return merge(base, tree), {**base_origins, **origins}


def _plain(node: yaml.Node, path: Path, keys: Keys, origins: dict[Keys, str]) -> Any:
    """A YAML node as plain values, noting the line of every key."""
    origins[keys] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in values:
                raise ConfigError(
                    f"{path}:{key_node.start_mark.line + 1}: {_dotted((*keys, key))}: set twice in this file"
                )
            values[key] = _plain(value_node, path, (*keys, key), origins)
            origins[(*keys, key)] = f"{path}:{key_node.start_mark.line + 1}"
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one, path, (*keys, index), origins) for index, one in enumerate(node.value)]
    try:
        return Loader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origins[keys]}: {_dotted(keys)}: {error}") from None


def _override(tree: dict[str, Any], origins: dict[Keys, str], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key):
        raise ConfigError(f"{text!r}: expected KEY.SUB=VALUE, such as train.max_steps=40")
    try:
        new = yaml.load(value, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: the value is not valid YAML: {getattr(error, 'problem', error)}") from None
    keys: list[str | int] = []
    at: Any = tree
    parts = key.split(".")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                raise ConfigError(
                    f"{text!r}: {_dotted(tuple(keys))} is a list of {len(at)}; expected a number below that"
                )
            step: str | int = int(part)
            there = at[int(part)]
        elif isinstance(at, dict):
            step, there = part, at.get(part)
        else:
            raise ConfigError(f"{text!r}: {_dotted(tuple(keys))} is a single value and has no {part!r}")
        keys.append(step)
        if last:
            at[step] = merge(there, new)
        else:
            if there is None:
                there = at[step] = {}
            at = there
        origins[tuple(keys)] = "command line"


def _explain(error: Any, path: Path, origins: dict[Keys, str]) -> str:
    keys: Keys = tuple(error["loc"])
    context = error.get("ctx") or {}
    if error["type"] == "unknown_key":
        keys = (*keys, context["key"])
        return f"{_where(keys, path, origins)}: unknown key; {context['hint']}"
    text = error["msg"].removeprefix("Value error, ")
    text = re.sub(r"^Input should be (a valid |an? )?", "expected ", text)
    if error["type"] == "missing":
        return f"{_where(keys, path, origins)}: missing; it has no default"
    found = json.dumps(error["input"], ensure_ascii=False, default=str)
    shown = "" if error["type"] == "value_error" and isinstance(error["input"], dict) else f", found {_short(found)}"
    return f"{_where(keys, path, origins)}: {text}{shown}"


def _where(keys: Keys, path: Path, origins: dict[Keys, str]) -> str:
    """`file:line: key.path`, by the nearest enclosing key that was set anywhere."""
    known = next((origins[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origins), str(path))
    return f"{known}: {_dotted(keys)}"


def _dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys) or "the file"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
