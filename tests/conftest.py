"""A small real run that many tests share: emoji pictures, a few thousand parameters, seconds to train."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import Ranks

from mm.config import RunConfig, load_config

SOURCE = {"kind": "captions", "prompt": "{language}: "}
TINY: dict[str, Any] = {
    "data": {
        "sources": [{**SOURCE, "path": "builtin:emoji/validation-*.tar.gz"}],
        "validation": [{**SOURCE, "path": "builtin:emoji/validation-*.tar.gz"}],
        "test": [{**SOURCE, "path": "builtin:emoji/validation-*.tar.gz", "captions": "all"}],
        "context_length": 128,
        "budgets": {"image": 8},
        "visits": 2,
        "workers": 0,
    },
    "model": {
        "kind": "open_qwen2vl",
        "vision": {
            "name": "timm/vit_tiny_patch16_224",
            "pretrained": False,
            "image_size": 32,
            "crop": 0.6,
            "block": -1,
            "options": {
                "patch_size": 8,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "class_token": False,
                "global_pool": "",
            },
        },
        "connector": {"kind": "pool_mlp", "tokens": 4},
        "language": {
            "tokenizer": "builtin:emoji",
            "config": {
                "model_type": "qwen2",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        },
    },
    "train": {
        "max_steps": 8,
        "batch_tokens": 512,
        "micro_batch": 2,
        "device": "cpu",
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "save_every": 4,
    },
    "evaluation": {"candidates": 4, "samples": 2},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of packed sets for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for tests of several ranks."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    """Writes `tiny.yaml` into the test's folder; the run goes to `run/` beside it."""

    def write(name: str = "tiny", **sections: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        values = {"out": str(tmp_path / "run"), **TINY, **sections}
        values["data"] = {**values["data"], "cache": str(cache)}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def tiny_config(tiny: Callable[..., Path]) -> Callable[..., RunConfig]:
    """The tiny run's config with overrides: `tiny_config("train.max_steps=2")`."""
    return lambda *overrides: load_config(tiny(), overrides)
