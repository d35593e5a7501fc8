"""What masked prediction teaches a small model of music, with and without the CQT term and the noise mixture.

MERT's recipe (arXiv 2306.00107) on a student of 2.4 million parameters, its front end 128 channels wide, and clips of
5 seconds rendered from scores: instrument and tempo are known exactly, the key is music21's estimate for the piece.
The teacher of MERT-v1, EnCodec, is not at hand here, so codes are those of the k-means models: 300 clusters of
log-mel frames and 200 of chroma, fitted to the training pieces.

    mm data build music --count 1500 --out corpora/music

All clips of a piece are in one split: trained on, validated on or tested on. Students are frozen and probed for key,
instrument and tempo (`mm.evals.probe`: a learned sum over layers, an MLP of one hidden layer, learning rates chosen on
the validation pieces, three seeds), as are the same network untrained and the statistics of log-mel and CQT frames over
time. Intervals are 95 %, by a bootstrap over test pieces; differences are from the untrained network of the same seed,
in pairs. Seeds are the outer loop.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import Config, Row, Run, Study
from benchmarks.training import CACHE
from mm.config import RunConfig
from mm.data.config import Split
from mm.data.prepare import Workers, cores, pack_split
from mm.evals import probe
from mm.models.teachers.kmeans import fit
from mm.train.features import encode
from mm.train.trainer import Unwatched

CORPUS = Path("corpora/music")
DATA = CACHE / "study-mert"
CENTROIDS = DATA / "kmeans.safetensors"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SEEDS = (0, 1)
LABELS = {"key": "key_score", "instrument": "accuracy", "tempo": "accuracy"}
"""What is probed for, with the metric that is shown."""
CLUSTERS = {"mel": 300, "chroma": 200}
CLIP = 374  # frames of 5 s
CONTEXT = 6 * CLIP
STEPS = 800
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-cqt": {"weights": {"cqt": 0}},
    "no-noise": {"mixture": {"prob": 0}},
}
ENCODER = {
    "conv_dim": [128] * 7,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"), 0.0),
}


def prepare() -> None:
    """Shards of the splits, by piece; what is packed of them; centroids of the training pieces; and all codes."""
    if not DATA.exists():
        write_splits()
    raw = RunConfig.model_validate({**config("full"), "data": raw_data(), "out": "unused"})
    for split in SPLITS:
        pack_split(raw.data, split, raw.model.layout(), 0, DATA / "packed" / split, workers=Workers(cores()))
    run = RunConfig.model_validate({**config("full"), "out": "unused"})
    if not CENTROIDS.exists():
        fit(run.data, run.model.layout(), run.seed, CENTROIDS, CLUSTERS, 500_000, seed=0)
    encode(run, [], "cpu", (0, 1), Unwatched())


def write_splits() -> None:
    """The folder appears when all are written."""
    shards = sorted(CORPUS.glob("*.tar"))
    if not shards:
        raise SystemExit(f"{CORPUS}: not there; mm data build music --count 1500 --out {CORPUS}")
    unfinished = DATA.with_name(f".{DATA.name}.partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    outs = {split: tarfile.open(unfinished / f"{split}.tar", "w") for split in SPLITS}
    for shard in shards:
        about: dict[str, dict[str, Any]] = {}
        sound: dict[str, bytes] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, _, ext = member.name.rpartition(".")
                if ext == "json":
                    about[key] = json.loads(file.read())
                else:
                    sound[key] = file.read()
        for key, fields in about.items():
            split = split_of(fields["source"])
            add(outs[split], f"{key}.flac", sound[key])
            add(outs[split], f"{key}.json", json.dumps({**fields, "split": split}).encode())
    for out in outs.values():
        out.close()
    unfinished.rename(DATA)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def split_of(piece: str) -> str:
    """20 % of the pieces to test on, 10 % to validate on."""
    place = hashlib.sha256(piece.encode()).digest()[0] / 256
    return "test" if place < 0.2 else "validation" if place < 0.3 else "train"


def raw_data() -> dict[str, Any]:
    of = {split: [{"kind": "recordings", "name": "music", "path": str(DATA / f"{split}.tar")}] for split in SPLITS}
    return {"sources": of["train"], "validation": of["validation"], "test": of["test"], "context_length": CONTEXT}


def config(arm: str, rows: Sequence[Row] = ()) -> Config:
    return {
        "data": {"packed": str(DATA / "packed"), "codes": True, "context_length": CONTEXT, "workers": 0},
        "model": {
            "kind": "mert",
            "encoder": {"config": ENCODER},
            "teacher": {"kind": "kmeans", "path": str(CENTROIDS)},
            **ARMS[arm],
        },
        "train": {
            "max_steps": STEPS,
            "batch_tokens": 2 * CONTEXT,
            "micro_batch": 2,
            "optimizer": {"kind": "adamw", "lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01},
            "schedule": {"kind": "linear", "warmup": 0.08},
            "clip_norm": 10,
            "log_every": 10,
            "save_every": 100,
            "device": "cpu",
        },
        "evaluation": {"every": 100, "candidates": 0, "samples": 0},
    }


def probed(folder: Path, model: str, against: str | None = None) -> dict[str, Any]:
    """What can be read off a model, on the test pieces; `against`: the folder of the run that it is compared with."""
    data = probe.Data.open(str(DATA / "*.tar"))
    other = folder.parent / against / "probe" if against else None
    settings = probe.Settings(group="source")
    results = probe.run(model, data, [*LABELS], settings, folder / "probe", device="cpu", against=other)
    kept = ("recordings", "groups", "learning_rate", "layer_weights", "metrics", "against")
    return {"probes": {one["label"]: {key: one[key] for key in kept if key in one} for one in results}}


def trained(folder: Path, seed: int) -> dict[str, Any]:
    return probed(folder, str(folder / "run"), f"untrained-{seed}")


def untrained(folder: Path, seed: int) -> dict[str, Any]:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**config("full"), "seed": seed, "out": str(folder / "run")}))
    return probed(folder, f"untrained:{path}")


RUNS = [
    *(Run(name, 0, 3, None, partial(probed, model=f"builtin:{name}")) for name in ("log-mel", "cqt")),
    *(
        run
        for seed in SEEDS
        for run in (
            Run("untrained", seed, 3, None, partial(untrained, seed=seed)),
            *(Run(arm, seed, 23, partial(config, arm), partial(trained, seed=seed)) for arm in ARMS),
        )
    ),
]


def show(rows: list[Row]) -> str:
    """Two tables: what each run can do, and how far that is from the untrained network."""
    lines = [
        "| run | seed | steps | training, s | codes, nats a frame | key, MIREX score | instrument | tempo |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        probes, codes = row["result"]["probes"], row["result"].get("test_codes")
        cells = [row["run"], str(row["seed"])]
        cells += [f"{row['steps']}", f"{row['seconds']:.0f}"] if "steps" in row else ["", ""]
        cells.append("" if codes is None else f"{codes:.3f}")
        cells += [interval(probes[label]["metrics"][metric], ".3f") for label, metric in LABELS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    if rows:
        probes = rows[0]["result"]["probes"]
        known = [f"{label} {probes[label]['metrics'][metric]['constant']:.3f}" for label, metric in LABELS.items()]
        about = next(iter(probes.values()))
        lines += ["", f"{about['recordings']['test']} clips of {about['groups']['test']} test pieces. Best constant: "
                  f"{', '.join(known)}."]  # fmt: skip
    compared = [row for row in rows if any("against" in one for one in row["result"]["probes"].values())]
    if compared:
        lines += ["", "| less the untrained network | seed | key | instrument | tempo |", "|---|---|---|---|---|"]
    for row in compared:
        probes = row["result"]["probes"]
        differences = [interval(probes[label]["against"][metric], "+.3f") for label, metric in LABELS.items()]
        lines.append(f"| {' | '.join([row['run'], str(row['seed']), *differences])} |")
    return "\n".join(lines)


def interval(one: dict[str, Any], form: str) -> str:
    """`value (low to high)`."""
    if one["low"] is None:
        return f"{one['value']:{form}}"
    return f"{one['value']:{form}} ({one['low']:{form}} to {one['high']:{form}})"


STUDY = Study(
    "mert",
    "masked prediction of music: with and without the CQT term and the noise mixture, against untrained and spectra",
    prepare,
    RUNS,
    show,
)
