"""Probes: what a small classifier can read off a frozen encoder, in the manner of MARBLE.

A recording is the mean over time of every layer (`mm.evals.embed`), computed once and kept. A probe is a softmax over
the layers, learned with a linear map or an MLP of one hidden layer; learning rate, number of epochs and all else are
chosen on the validation split, and the test split is looked at once. Pieces (`group`) are in one split only. Baselines
go through the very same probe.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.data.recordings import Recordings
from mm.data.sample import keyed_seed
from mm.errors import ConfigError, DataError
from mm.evals import probing_metrics as metrics
from mm.evals.embed import Bad, Embedder, Embeddings, describe, digest, embed, open_embedder, recordings, source_of
from mm.evals.probing_metrics import Metric, bootstrap
from mm.files import atomic
from mm.models.prompts import Precision
from mm.settings import nearest
from mm.train.distributed import resolve_device

Task = Literal["auto", "classes", "tags", "regression"]
Kind = Literal["linear", "mlp"]
Split = Literal["train", "validation", "test"]
Fields = dict[str, Any]
Result = dict[str, Any]
Watch = Callable[[str, int], None]

RATES = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
"""Learning rates, of which the validation split chooses: those of MERT's and MARBLE's papers."""
HIDDEN, DROPOUT = 512, 0.2
BATCH, EPOCHS = 64, 100
PLATEAU, PATIENCE = 5, 20
"""Epochs without a better validation score until the learning rate is halved, and until training ends."""
SHARES = (0.7, 0.8)
"""Where the training split ends, and where the validation split does."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPELLINGS: dict[str, Split] = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
TEMPI = ("tempo", "bpm")
"""Labels that are tempi."""
PREDICTIONS = ".predictions.jsonl"
FEW = 50
"""Whole numbers of more values than these are no classes, but measured."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How labels are probed.

    split: the field that says which split a recording is in; None: `split`, if all have one, or else by `group`, hashed
        with `split_seed`.
    layers: `weighted`, a learned sum of all, or the number of one.
    """

    task: Task = "auto"
    probe: Kind = "mlp"
    layers: str = "weighted"
    group: str | None = None
    split: str | None = None
    split_seed: int = 0
    seeds: int = 3


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be read off: of n recordings classes int64 [n], tags bool [n, names] or numbers float64 [n]."""

    label: str
    task: Literal["classes", "tags", "regression"]
    names: tuple[str, ...]
    values: np.ndarray
    is_key: bool = False

    @property
    def outputs(self) -> int:
        return len(self.names) or 1

    def metrics(self) -> dict[str, Metric]:
        """What is reported; the first one chooses on the validation split."""
        if self.task == "tags":
            return {"roc_auc": metrics.roc_auc, "average_precision": metrics.average_precision}
        is_tempo = self.label.rpartition(".")[2].lower() in TEMPI
        if self.task == "regression":
            return {"r2": metrics.r2, **({"tempo_accuracy": metrics.tempo_accuracy} if is_tempo else {})}
        found: dict[str, Metric] = {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1}
        if self.is_key:
            return {"key_score": metrics.key_score, **found}
        if is_tempo and all(_number(name) is not None for name in self.names):
            found["tempo_accuracy"] = partial(_class_tempo, np.array([float(name) for name in self.names]))
        return found

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """What metrics compare with `values`, from a probe's outputs [n, outputs]."""
        if self.task == "classes":
            return outputs.argmax(1)
        return outputs if self.task == "tags" else outputs[:, 0]

    def constant(self, train: np.ndarray) -> np.ndarray:
        """What one says of all n without listening: of the training split the commonest class, shares, or mean."""
        if self.task == "classes":
            return np.full_like(self.values, np.bincount(self.values[train]).argmax())
        return np.broadcast_to(self.values[train].mean(0), self.values.shape)


def _class_tempo(tempi: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> float:
    return metrics.tempo_accuracy(tempi[truth], tempi[predicted])


def _number(value: object) -> float | None:
    """A number or its text; None for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def target_of(label: str, values: Sequence[Any], task: Task = "auto") -> Target:
    """A field's values as a target.

    `auto`: lists (in a table `rock;live`) are tags; numbers with a fraction or of over 50 values are regression; the
    rest are classes. Classes that are all keys (`E♭ major`) become the 24 keys, however they are spelt.

    Raises:
        DataError: they do not fit the task.
    """
    if task == "auto":
        task = _task_of(values)
    if task == "regression":
        numbers = [_number(value) for value in values]
        for value, number in zip(values, numbers, strict=True):
            if number is None:
                raise DataError(f"{label}: {str(value)[:40]!r} is no number, so it is no target of regression")
        return Target(label, task, (), np.array(numbers, dtype=np.float64))
    if task == "tags":
        sets = [{str(one).strip() for one in _listed(value)} for value in values]
        names = sorted(set().union(*sets))
        if not names:
            raise DataError(f"{label}: no recording has a tag")
        return Target(label, task, tuple(names), np.array([[name in some for name in names] for some in sets]))
    keys = [metrics.parse_key(value) for value in values]
    if all(key is not None for key in keys):
        return Target(label, "classes", metrics.KEYS, np.array(keys, dtype=np.int64), is_key=True)
    texts = [str(value).strip() for value in values]
    is_numeric = all(_number(text) is not None for text in texts)
    names = sorted(set(texts), key=lambda text: (float(text), text) if is_numeric else (0.0, text))
    place = {name: number for number, name in enumerate(names)}
    return Target(label, "classes", tuple(names), np.array([place[text] for text in texts], dtype=np.int64))


def _task_of(values: Sequence[Any]) -> Literal["classes", "tags", "regression"]:
    if any(isinstance(value, list) or (isinstance(value, str) and ";" in value) for value in values):
        return "tags"
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        whole = all(number == int(number) for number in numbers if number is not None)
        return "classes" if whole and len(set(numbers)) <= FEW else "regression"
    return "classes"


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [one for one in str(value).split(";") if one.strip()]


@dataclass(frozen=True, slots=True)
class Data:
    """Recordings, and what is known of each by its id. `path`: as it was given."""

    path: str
    source: Recordings
    fields: dict[str, Fields]

    @classmethod
    def open(cls, path: str, table: Path | None = None) -> "Data":
        """Recordings with a JSON beside each (shards), or those that the lines of a `table` name in a folder.

        Raises:
            DataError: there is no such file, or nothing is known of any.
        """
        source = source_of(path, table)
        fields = {one.id: one.fields for one in recordings(source) if not isinstance(one, Bad)}
        if table is not None and Path(path).is_dir():
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
                missing = [row["file"] for row in rows if not (Path(path) / row["file"]).is_file()]
            if missing:
                others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
                raise DataError(f"{table}: {missing[0]}{others}: not in {path}; files are named as seen from there")
        if not any(fields.values()):
            raise DataError(f"{path}: nothing is known of any recording; give a JSON beside each, or --table FILE.csv")
        return cls(path, source, fields)

    def labelled(self, label: str) -> list[str]:
        """The ids of recordings that have the label. Raises `ConfigError` where there is none."""
        found = [id for id, fields in self.fields.items() if fields.get(label) not in (None, "", [])]
        if not found:
            names = Counter(name for fields in self.fields.values() for name in fields)
            raise ConfigError(f"{self.path}: no recording has a label {label!r}; {nearest(label, names)}")
        return found

    def splits(self, settings: Settings) -> dict[str, Split]:
        """Every recording's split: what it says itself, or else all of its group's.

        Raises:
            ConfigError: there is no such field.
            DataError: a recording lacks it or it is no name of a split, or there are too few groups.
        """
        if settings.split is not None or all("split" in fields for fields in self.fields.values()):
            return self._stated(settings.split or "split", settings)
        groups = self.groups(settings.group)
        return {id: split for id, split in zip(groups, hashed(list(groups.values()), settings.split_seed), strict=True)}

    def groups(self, field: str | None) -> dict[str, str]:
        """What each recording belongs to; without a field it stands for itself."""
        if field is None:
            return {id: id for id in self.fields}
        self.labelled(field)
        for id, fields in self.fields.items():
            if fields.get(field) in (None, ""):
                raise DataError(f"{self.path}: {id} has no {field!r}, so it is not known what it belongs to")
        return {id: str(fields[field]) for id, fields in self.fields.items()}

    def _stated(self, field: str, settings: Settings) -> dict[str, Split]:
        self.labelled(field)
        found: dict[str, Split] = {}
        for id, fields in self.fields.items():
            said = str(fields.get(field, "")).strip().lower()
            name = SPELLINGS.get(said, said)
            if name not in SPLITS:
                raise DataError(f"{self.path}: the {field} of {id} is {said!r}; expected train, validation or test")
            found[id] = name
        if "validation" not in found.values():  # then an eighth of the training groups
            groups = self.groups(settings.group)
            train = [id for id, split in found.items() if split == "train"]
            order = _ordered({groups[id] for id in train}, settings.split_seed)
            held = set(order[: max(1, len(order) // 8)])
            found |= {id: "validation" for id in train if groups[id] in held}
        return found


def hashed(groups: Sequence[str], seed: int) -> list[Split]:
    """A split for each of n recordings by its group: 70 % of the groups, in an order that the seed decides, are for
    training, 10 % for validation and the rest for test, and at least one for each. Raises `DataError` below three."""
    order = _ordered(set(groups), seed)
    if len(order) < 3:
        raise DataError(f"{len(order)} groups cannot be split into training, validation and test; expected 3 or more")
    first = min(max(1, round(SHARES[0] * len(order))), len(order) - 2)
    second = min(max(first + 1, round(SHARES[1] * len(order))), len(order) - 1)
    place = {group: number for number, group in enumerate(order)}
    return ["train" if place[g] < first else "validation" if place[g] < second else "test" for g in groups]


def _ordered(groups: Iterable[str], seed: int) -> list[str]:
    return sorted(groups, key=lambda group: (keyed_seed("split", seed, group), group))


class Probe(nn.Module):
    """[B, layers, width] to [B, outputs]: a weighted sum of the layers, then a linear map or an MLP."""

    def __init__(self, layers: int, width: int, outputs: int, kind: Kind) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers))
        if kind == "linear":
            self.head: nn.Module = nn.Linear(width, outputs)
        else:
            hidden = (nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT))
            self.head = nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.head(torch.einsum("l,bld->bd", self.mix.softmax(0), features))
        return out


Rank = tuple[float, float]
"""On the validation split: the score, and for equal ones the loss, negative; by it alone where scores are undefined."""


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def _rank(score: float, loss: float) -> Rank:
    return float("-inf") if np.isnan(score) else score, -loss


@dataclass(frozen=True, slots=True)
class Fitted:
    """A probe after training: its rank, the weights of the layers [layers], what it predicts of the test split."""

    rank: Rank
    weights: np.ndarray
    predicted: np.ndarray


def fit(features: Tensor, target: Target, split: dict[Split, np.ndarray], kind: Kind, rate: float, seed: int) -> Fitted:
    """Train a probe on rows [n, layers, width] and keep the epoch that is best on the validation split.

    Numbers to be predicted are brought to mean 0 and variance 1 over the training split meanwhile.
    """
    device = features.device
    train, validation, test = (torch.from_numpy(split[name]).to(device) for name in SPLITS)
    truth, shift, scale = _numbers(target, split["train"], device)
    held, metric = target.values[split["validation"]], next(iter(target.metrics().values()))
    best, since = (float("-inf"), float("-inf")), 0
    weights: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = Probe(features.shape[1], features.shape[2], target.outputs, kind).to(device)
        optimizer = torch.optim.Adam(probe.parameters(), rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=PLATEAU)
        for _ in range(EPOCHS):
            probe.train()
            for rows in train[torch.randperm(len(train)).to(device)].split(BATCH):
                optimizer.zero_grad()
                _loss(target, probe(features[rows]), truth[rows]).backward()
                optimizer.step()
            probe.eval()
            with torch.no_grad():
                outputs = probe(features[validation])
            loss = float(_loss(target, outputs, truth[validation]))
            score = metric(held, target.predicted(outputs.cpu().double().numpy() * scale + shift))
            scheduler.step(-loss if np.isnan(score) else score)
            since += 1
            if _rank(score, loss) > best or not weights:
                best, since = _rank(score, loss), 0
                weights = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
            elif since >= PATIENCE:
                break
    probe.load_state_dict(weights)
    with torch.no_grad():
        outputs = probe(features[test]).cpu().double().numpy() * scale + shift
    return Fitted(best, probe.mix.detach().softmax(0).cpu().numpy(), target.predicted(outputs))


def _numbers(target: Target, train: np.ndarray, device: torch.device) -> tuple[Tensor, float, float]:
    """What a probe is trained to give, and by which shift and scale its outputs become the label's numbers again."""
    if target.task == "classes":
        return torch.from_numpy(target.values).to(device), 0.0, 1.0
    if target.task == "tags":
        return torch.from_numpy(target.values).float().to(device), 0.0, 1.0
    shift, scale = float(target.values[train].mean()), float(target.values[train].std()) or 1.0
    return torch.from_numpy((target.values - shift) / scale).float().to(device), shift, scale


def _loss(target: Target, outputs: Tensor, truth: Tensor) -> Tensor:
    if target.task == "classes":
        return F.cross_entropy(outputs, truth)
    if target.task == "tags":
        return F.binary_cross_entropy_with_logits(outputs, truth)
    return F.mse_loss(outputs[:, 0], truth)


def parted(target: Target, splits: Sequence[Split]) -> dict[Split, np.ndarray]:
    """The rows of each split. Raises `DataError` where it has none, or a probe could learn or show nothing in it."""
    split = {name: np.flatnonzero([one == name for one in splits]) for name in SPLITS}
    for name, rows in split.items():
        if not len(rows):
            raise DataError(f"{target.label}: no recording with it in the {name} split; give more, or another --split")
        if name != "validation" and len(np.unique(target.values[rows], axis=0)) < 2:
            raise DataError(
                f"{target.label}: the same for all {len(rows)} recordings of the {name} split; expected two values"
            )
    return split


def probe_label(
    features: Tensor,
    target: Target,
    splits: Sequence[Split],
    groups: Sequence[str],
    settings: Settings,
    progress: Callable[[int], None] = lambda probes: None,
) -> tuple[Result, list[np.ndarray]]:
    """Probe one label with every learning rate and seed; the rate is chosen by its mean over seeds on validation.

    Every feature is brought to mean 0 and variance 1 over the training split.

    Args:
        features: float32 [n, layers, width]; splits, groups: of the same n recordings.

    Returns:
        Numbers on the test split with intervals over its groups, and what was predicted of it with every seed.

    Raises:
        DataError: see `parted`.
    """
    split = parted(target, splits)
    train = features[torch.from_numpy(split["train"]).to(features.device)]
    features = (features - train.mean(0)) / train.std(0, correction=0).clamp_min(1e-6)
    fitted: dict[float, list[Fitted]] = {rate: [] for rate in RATES}
    for rate, some in fitted.items():
        for seed in range(settings.seeds):
            some.append(fit(features, target, split, settings.probe, rate, seed))
            progress(sum(map(len, fitted.values())))
    chosen = max(RATES, key=lambda rate: tuple(np.mean([one.rank for one in fitted[rate]], 0)))
    predictions, constant = [one.predicted for one in fitted[chosen]], target.constant(split["train"])[split["test"]]
    truth, of = target.values[split["test"]], [groups[row] for row in split["test"]]
    numbers = {
        name: {
            **asdict(bootstrap(metric, truth, predictions, of)),
            "seeds": [metric(truth, one) for one in predictions],
            "constant": metric(truth, constant),
        }
        for name, metric in target.metrics().items()
    }
    return {
        "label": target.label,
        "task": target.task,
        "names": list(target.names),
        "recordings": {name: len(rows) for name, rows in split.items()},
        "groups": {name: len({groups[row] for row in rows}) for name, rows in split.items()},
        "learning_rate": chosen,
        "validation": {f"{rate:g}": [_finite(one.rank[0]) for one in some] for rate, some in fitted.items()},
        "layer_weights": np.mean([one.weights for one in fitted[chosen]], 0, dtype=float).round(4).tolist(),
        "metrics": numbers,
    }, predictions


def run(
    path: str,
    data: Data,
    labels: Sequence[str],
    settings: Settings = Settings(),
    out: Path | None = None,
    seconds: float | None = None,
    batch_seconds: float = 60.0,
    device: str = "auto",
    precision: Precision = "fp32",
    against: Path | None = None,
    watch: Watch = lambda what, count: None,
) -> list[Result]:
    """Probe a model, or a baseline (`mm.evals.embed.open_embedder`), for every label.

    Of each label `out` gets NAME.json, settings and numbers, and NAME.predictions.jsonl, a recording of the test split
    a line. Embeddings are kept there too, and are found again by every call with the same model and data.

    Args:
        seconds: recordings that are longer are embedded in windows of so many; the recording is their mean.
        against: where the same labels were probed on the same test split with another model: the difference from it.

    Raises:
        ConfigError: there is no such label, field or layer, or `out` holds results of another model.
        DataError: the data cannot be read or split, or a label says nothing.
    """
    out = out or Path("probe-" + re.sub(r"[^\w.]+", "-", path).strip("-"))
    splits, groups = data.splits(settings), data.groups(settings.group)
    targets = {}
    for label in labels:  # what is wrong with them is said before anything is embedded
        ids = data.labelled(label)
        target = target_of(label, [data.fields[id][label] for id in ids], settings.task)
        parted(target, [splits[id] for id in ids])
        targets[label] = (ids, target)
    embedder = open_embedder(path, device=device, precision=precision)
    about, number = embedder.describe(), _layer(settings.layers, embedder.layers)
    places = {label: _place(out, label, settings, about) for label in labels}
    out.mkdir(parents=True, exist_ok=True)
    embeddings = _embedded(embedder, data, out, seconds, batch_seconds, watch)
    vectors = recording_vectors(embeddings)
    results = []
    for label, (all, target) in targets.items():
        rows = [row for row, id in enumerate(all) if id in vectors]
        ids = [all[row] for row in rows]
        target = replace(target, values=target.values[rows])
        features = torch.stack([vectors[id] for id in ids]).to(resolve_device(device))
        if number is not None:
            features = features[:, number : number + 1]
        split, group = [splits[id] for id in ids], [groups[id] for id in ids]
        test, file = np.flatnonzero([one == "test" for one in split]), places[label]
        tested = Tested([ids[row] for row in test], [group[row] for row in test], target.values[test])
        other = tested.read(target, (against / file.name).with_suffix(PREDICTIONS)) if against else []
        found, predictions = probe_label(features, target, split, group, settings, partial(watch, f"probing {label}"))
        result = {
            **about,
            **({} if number is None else {"layers": [embedder.layers[number]]}),
            "data": data.path,
            "seconds": seconds,
            **{key: value for key, value in asdict(settings).items() if key not in ("task", "layers")},
            **found,
            "unlabelled": len(data.fields) - len(all),
            "unreadable": len({(one["id"], one["file"]) for one in embeddings.bad}),
        }
        if against is not None:
            result["against"] = {"folder": str(against)}
            for name, metric in target.metrics().items():
                result["against"][name] = asdict(bootstrap(metric, tested.truth, predictions, tested.groups, other))
        with atomic(file.with_suffix(PREDICTIONS)) as out_file:
            out_file.write(tested.lines(target, predictions))
        with atomic(file) as out_file:
            out_file.write(json.dumps(result, indent=2, ensure_ascii=False).encode())
        results.append(result)
    return results


def _place(out: Path, label: str, settings: Settings, about: dict[str, Any]) -> Path:
    """The file of a label's results. Raises `ConfigError` where there are another model's."""
    name = re.sub(r"[^\w.-]", "_", f"{label}-{settings.probe}-{settings.layers}")
    file = out / f"{name}.json"
    found = json.loads(file.read_bytes()) if file.exists() else about
    for key in ("model", "weights"):
        if found.get(key) != about.get(key):
            raise ConfigError(f"{file}: holds results with {key} {found.get(key)!r}; choose another --out")
    return file


def _embedded(
    embedder: Embedder, data: Data, out: Path, seconds: float | None, batch_seconds: float, watch: Watch
) -> Embeddings:
    folder = out / f"embeddings-{digest(describe(embedder, data.source, 'clip', seconds, batch_seconds))}"
    if folder.exists():
        return Embeddings.open(folder)
    return embed(embedder, data.source, folder, "clip", seconds, batch_seconds, partial(watch, "embedding clips"))


def recording_vectors(embeddings: Embeddings) -> dict[str, Tensor]:
    """float32 [layers, width] by the id of a recording: the mean over its clips by their lengths."""
    rows = torch.cat([part.float() for part in embeddings.parts()])
    sums: dict[str, Tensor] = {}
    lengths: dict[str, float] = {}
    for row, clip in zip(rows, embeddings.clips, strict=True):
        id, seconds = clip["id"], clip["seconds"]
        sums[id] = sums[id] + row * seconds if id in sums else row * seconds
        lengths[id] = lengths.get(id, 0.0) + seconds
    return {id: total / lengths[id] for id, total in sums.items()}


def _layer(layers: str, names: Sequence[str]) -> int | None:
    if layers == "weighted":
        return None
    if layers not in names:
        raise ConfigError(f"layers {layers!r}: expected weighted, or one of {', '.join(names)}")
    return names.index(layers)


@dataclass(frozen=True, slots=True)
class Tested:
    """The test split of a label: n ids, what each belongs to, and what is true of it."""

    ids: list[str]
    groups: list[str]
    truth: np.ndarray

    def lines(self, target: Target, predictions: Sequence[np.ndarray]) -> bytes:
        """JSON lines: id, group, truth, and what was predicted with each seed."""
        rows = [
            {"id": id, "group": self.groups[row], "truth": _said(target, self.truth[row])}
            | {"predicted": [_said(target, one[row]) for one in predictions]}
            for row, id in enumerate(self.ids)
        ]
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()

    def read(self, target: Target, file: Path) -> list[np.ndarray]:
        """What another probe predicted. Raises `DataError` where that was for other recordings or labels."""
        try:
            rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: no predictions to compare with ({error}); probe the same labels there") from None
        if [(row["id"], row["truth"]) for row in rows] != [
            (id, _said(target, true)) for id, true in zip(self.ids, self.truth, strict=True)
        ]:
            raise DataError(f"{file}: of other recordings or labels; expected the same test split (--split-seed)")
        seeds = zip(*(row["predicted"] for row in rows), strict=True)
        return [np.array([_heard(target, one) for one in predicted]) for predicted in seeds]


def _said(target: Target, value: Any) -> Any:
    """A value of the target, or a prediction of it, in JSON."""
    if target.task == "classes":
        return target.names[int(value)]
    if target.task == "regression":
        return float(value)
    if value.dtype == bool:
        return [name for name, there in zip(target.names, value, strict=True) if there]
    return dict(zip(target.names, value.tolist(), strict=True))


def _heard(target: Target, said: Any) -> Any:
    """A prediction as it was before `_said`."""
    if target.task == "classes":
        return target.names.index(said)
    return said if target.task == "regression" else [said[name] for name in target.names]


def tables(results: Sequence[Result]) -> Any:
    """The numbers for a terminal: of each label a line and a table, for `rich`."""
    from rich.console import Group
    from rich.table import Table

    shown: list[Any] = []
    for result in results:
        weights = dict(zip(result["layers"], result["layer_weights"], strict=True))
        heaviest = sorted(weights, key=lambda name: -weights[name])[:3]
        layers = ", ".join(f"{name} ({weights[name]:.2f})" for name in heaviest)
        shown.append(
            f"{result['label']}: {result['recordings']['test']:,} recordings in {result['groups']['test']:,} groups, "
            f"learning rate {result['learning_rate']:g}, layers {layers}"
        )
        against = result.get("against")
        columns = ("", "mean", "95 %", "constant", *(["difference, 95 %"] if against else []))
        shown.append(table := Table(*columns, box=None, padding=(0, 1)))
        for name, one in result["metrics"].items():
            difference = [f"{against[name]['value']:+.3f}, {_ends(against[name])}"] if against else []
            table.add_row(name, f"{one['value']:.3f}", _ends(one), f"{one['constant']:.3f}", *difference)
    return Group(*shown)


def _ends(interval: dict[str, Any]) -> str:
    return "–" if interval["low"] is None else f"{interval['low']:.3f} … {interval['high']:.3f}"
