"""The recipes of configs/open_qwen2vl on data in the published folders and formats, with a small model."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_release import LANGUAGE, TOWER_OPTIONS

from mm.cli import main

CONFIGS = Path(__file__).parents[2] / "configs/open_qwen2vl"
CAPTIONS = ("ccs_webdataset", "datacomp_medium_mlm_filter_su_85_union_dfn_webdataset")
SMALL: dict[str, Any] = {
    "model": {
        "vision": {"pretrained": False, "options": TOWER_OPTIONS},
        "language": {"name": None, "tokenizer": "builtin:emoji", "config": {"model_type": "qwen2", **LANGUAGE}},
    },
    "train": {"epochs": None, "max_steps": 2, "device": "cpu", "engine": {"kind": "single"}, "micro_batch": 1},
}


def picture(number: int, format: str) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few samples of the published data sets, as img2dataset and MAmmoTH-VL's authors lay them out."""
    root = tmp_path_factory.mktemp("published")
    for name in CAPTIONS:
        folder = root / "Open-Qwen2VL-Data" / name
        folder.mkdir(parents=True)
        with tarfile.open(folder / "00000000.tar", "w") as tar:
            for number in range(40):
                key, caption = f"{number:09d}", f"a caption of picture {number}"
                about = {"key": key, "uid": f"{number:032x}", "caption": caption, "status": "success"}
                members = {"jpg": picture(number, "JPEG"), "txt": caption.encode(), "json": json.dumps(about).encode()}
                for ext, data in members.items():
                    entry = tarfile.TarInfo(f"{key}.{ext}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    folder = root / "MAmmoTH-VL-Instruct-12M"
    (folder / "single_image_data/set").mkdir(parents=True)
    rows = []
    for number in range(12):
        name = f"set/{number}.png"
        (folder / "single_image_data" / name).write_bytes(picture(number, "PNG"))
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": f"Noise {number}. " * number + "."},
        ]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "mammoth_si_10M.json").write_text(json.dumps(rows))
    return root


def run(tmp_path: Path, recipe: str, root: Path, **changes: Any) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a recipe with a small model, and shorter steps."""
    small = {**SMALL, "train": {**SMALL["train"], **changes.pop("train", {})}}
    path = tmp_path / f"{recipe}.yaml"
    data = {"root": str(root), "cache": str(tmp_path / "cache"), "workers": 0}
    out = {"out": str(tmp_path / recipe)}
    path.write_text(
        yaml.safe_dump({"extends": str(CONFIGS / f"{recipe}.yaml"), **small, "data": data, **out, **changes})
    )
    assert main(["train", str(path)]) == 0
    return [json.loads(line) for line in (tmp_path / recipe / "metrics.jsonl").read_text().splitlines()]


def test_pre_training_then_fine_tuning(tmp_path: Path, published: Path) -> None:
    rows = run(tmp_path, "pretrain", published / "Open-Qwen2VL-Data", train={"batch_tokens": 8192})
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["tokens/image"] % 144 == 0
    rows = run(
        tmp_path,
        "sft",
        published / "MAmmoTH-VL-Instruct-12M",
        train={"batch_tokens": 4 * 4096, "micro_batch": 2, "init_from": str(tmp_path / "pretrain")},
    )
    assert rows[0]["tokens/image"] == 4 * 729, "four conversations a step, whatever their length"
    assert rows[0]["pack_fill"] > 0.9, "rows are no longer than their micro-batch needs"


def test_both_as_one_run(tmp_path: Path, published: Path) -> None:
    stages = yaml.safe_load((CONFIGS / "staged.yaml").read_text())["stages"]
    stages[1]["train"] |= {"batch_tokens": 4 * 4096}
    rows = run(tmp_path, "staged", published, train={"batch_tokens": 8192, "max_steps": 1}, stages=stages)
    assert [(row["stage"], row["step"]) for row in rows] == [(0, 1), (1, 2)]
    assert rows[1]["tokens/image"] - rows[0]["tokens/image"] == 4 * 729
