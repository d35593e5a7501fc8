"""A run on codes that were computed ahead is the run whose teacher computes them in the step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import EncodecConfig, EncodecModel

from mm.cli import main
from mm.config import load_config
from mm.errors import ConfigError, DataError
from mm.models.teachers.encodec import Encodec
from mm.models.teachers.kmeans import KMeans
from mm.train.features import encode
from mm.train.metrics import read_metrics
from mm.train.trainer import Trainer, Unwatched

soundfile = pytest.importorskip("soundfile")
ON = "data.codes=true"
TRAIN = ("data.validation=[]", "data.test=[]", "evaluation.every=0")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = EncodecModel(
        EncodecConfig(num_filters=4, hidden_size=8, codebook_size=16, num_lstm_layers=1, target_bandwidths=[0.6, 1.2])
    )
    with torch.no_grad():
        heard = model.encoder(torch.randn(1, 1, 24_000) * 0.2)[0]
    for number, layer in enumerate(model.quantizer.layers):
        codes = torch.randn(16, 8) * heard.std(1) / (1 + number)
        layer.codebook.embed.copy_(codes if number else codes + heard.mean(1))
    folder = tmp_path_factory.mktemp("codec")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve recordings of 0.5 to 1.3 s, 36 to 96 frames: chords that come and go, in noise."""
    folder = tmp_path_factory.mktemp("music")
    for number in range(12):
        rng = np.random.default_rng(number)
        time = np.arange(12_000 + 1_800 * (number % 11)) / 24_000
        tones = [np.sin(2 * np.pi * 220 * 2 ** (rng.integers(24) / 12) * time) * (time > t) for t in (0, 0.1, 0.3)]
        soundfile.write(folder / f"{number}.wav", 0.2 * sum(tones) + rng.normal(0, 0.02, len(time)), 24_000)
    return folder


@pytest.fixture
def config(tmp_path: Path, music: Path, codec: Path) -> Callable[..., Path]:
    """Writes the config of a small MERT; `model` over its section."""

    def write(**model: Any) -> Path:
        source = {"kind": "recordings", "path": str(music), "name": "music", "min_seconds": 0.2}
        small = {
            "conv_dim": [8] * 7, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        }  # fmt: skip
        values = {
            "out": str(tmp_path / "run"),
            "data": {
                "sources": [source], "validation": [source], "test": [source], "context_length": 128, "workers": 0,
                "cache": str(tmp_path / "cache"),
            },
            "model": {
                "kind": "mert", "encoder": {"config": small}, "code_dim": 8, "weights": {"cqt": 0},
                "teacher": {"kind": "encodec", "name": str(codec), "bandwidth": 1.2}, **model,
            },
            "train": {"max_steps": 2, "batch_tokens": 256, "micro_batch": 1, "device": "cpu"},
            "evaluation": {"every": 2},
        }  # fmt: skip
        path = tmp_path / "mert.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def run(path: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what is of the clock."""
    Trainer(load_config(path, [*overrides, f"out={out}"]), Unwatched()).run()
    rows = read_metrics(out / "metrics.jsonl")
    if (out / "eval.json").exists():
        rows.append(json.loads((out / "eval.json").read_text()))
    kept = ("loss", "norm", "accuracy")
    return [{k: v for k, v in row.items() if any(one in k for one in kept) and "second" not in k} for row in rows]


def test_it_is_the_run_with_the_teacher(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config()
    expected = run(path, tmp_path / "teacher")
    assert main(["data", "encode", str(path), ON, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])["encoded"]
    assert {one["split"] for one in found.values()} == {"train", "validation", "test"}
    assert all(one["role"] == "codes" and one["finished"] and one["items"] == 12 for one in found.values())
    assert "12 recordings, " in said.err and "bytes of codes each" in said.err
    monkeypatch.setattr(Encodec, "codes", None)  # nothing calls the teacher
    assert run(path, tmp_path / "codes", ON, "data.workers=1") == expected
    assert {"loss", "loss/codes", "validation_loss", "code_accuracy"} <= {key for row in expected for key in row}
    assert main(["data", "encode", str(path), ON]) == 0 and "all there" in capsys.readouterr().err


def test_resumed_with_codes_equals_never_stopped(config: Callable[..., Path], tmp_path: Path) -> None:
    """The codes may have been computed while the run went on with the teacher."""
    path, settings = config(), ("train.schedule={kind: constant, warmup: 0}", *TRAIN)
    encode(load_config(path, [*settings, ON]), [], None, (0, 1), Unwatched())
    for out, parts in (("whole", [(2, ON)]), ("parts", [(1, "data.codes=false"), (2, ON)])):
        for steps, codes in parts:
            ended = (*settings, codes, f"train.max_steps={steps}", f"out={tmp_path / out}")
            Trainer(load_config(path, ended), Unwatched()).run(resume=True)
    whole, parts = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("whole", "parts"))
    assert len(whole) == 2 and [row["loss"] for row in parts] == [row["loss"] for row in whole]


def test_the_command_names_a_teacher(
    config: Callable[..., Path], codec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config(teacher=None))
    command = ["data", "encode", path, f"model.teacher.name={codec}", "model.teacher.bandwidth=1.2"]
    assert main([*command, "--teacher", "encodec", "--split", "train", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out.splitlines()[-1])["encoded"].values()
    assert one["role"] == "codes" and one["split"] == "train"
    assert main([*command, "--teacher", "codec"]) == 2 and "unknown teacher kind 'codec'" in capsys.readouterr().err
    assert main(["data", "encode", path]) == 2 and "data.codes=true where there is a teacher" in capsys.readouterr().err
    assert main(["data", "encode", path, ON]) == 2
    assert "data.codes: a mert model without model.teacher reads no codes" in capsys.readouterr().err


def test_what_makes_codes_wrong_is_refused(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    with pytest.raises(DataError, match="has no codes of a teacher"):
        run(path, tmp_path / "none", ON)
    encode(load_config(path, [ON, *TRAIN]), [], None, (0, 1), Unwatched())
    with pytest.raises(DataError, match=r"codes are of another teacher: bandwidth 1\.2 .the run has 0\.6"):
        run(path, tmp_path / "other", ON, *TRAIN, "model.teacher.bandwidth=0.6")
    with pytest.raises(ConfigError, match="contradicts data"):
        load_config(path, [ON, "data.features=true"])
    with pytest.raises(ConfigError, match="it takes 24,000 Hz, and the model 16,000 Hz"):
        encode(load_config(path, [ON, "model.encoder.sampling_rate=16000"]), [], None, (0, 1), Unwatched())


def test_centroids_are_fitted_and_teach(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    path, files = str(config()), [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        sizes = ["--mel", "8", "--chroma", "4", "--frames", "400", "--seed", seed]
        assert main(["data", "kmeans", path, "--out", str(file), *sizes, "--json"]) == 0
        about = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert about["frames"] == 400 and [book["clusters"] for book in about["codebooks"]] == [8, 4]
    for book in about["codebooks"]:
        # Normalised frames without clusters would be as far from their mean as they have bins that change.
        assert 0 < book["inertia"] < 0.8 * book["bins"]
        assert book["empty"] == 0 and 1 < book["entropy"] <= np.log2(book["clusters"])
    mapped = Path(config(teacher={"kind": "kmeans", "path": str(files[0])}))
    expected = run(mapped, tmp_path / "teacher", *TRAIN)
    assert main(["data", "encode", str(mapped), ON, *TRAIN]) == 0
    monkeypatch.setattr(KMeans, "codes", None)
    assert run(mapped, tmp_path / "codes", ON, *TRAIN) == expected
    with pytest.raises(DataError, match="other weights"):
        run(config(teacher={"kind": "kmeans", "path": str(files[2])}), tmp_path / "other", ON, *TRAIN)
    assert main(["data", "kmeans", path, "--out", str(tmp_path / "k"), "--mel", "2000"]) == 2
    assert "fewer than the 2,000 clusters" in capsys.readouterr().err and not (tmp_path / "k").exists()


def test_fitting_without_clusters_or_into_a_folder_is_refused(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "kmeans", str(config()), "--out", str(tmp_path)]
    assert main([*command, "--mel", "0", "--chroma", "0"]) == 2 and "give --mel or --chroma" in capsys.readouterr().err
    assert main(command) == 2 and "is a folder" in capsys.readouterr().err
