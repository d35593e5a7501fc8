"""The shipped emoji data set: complete, decodable, and without near-twins across its splits."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from transformers import AutoTokenizer

from mm.data.builtin import folder
from mm.data.builtin.build_emoji import LANGUAGES, SHARDS, SIZE, THRESHOLD, concept, key_of, pixel_distances
from mm.data.train_tokenizer import SPECIAL

# The threshold was applied before WebP encoding, which moves the distances of pairs near it by up to 1.9 and
# those of the closest pairs across splits by less than 0.5.
WEBP_MARGIN = 1.0


@dataclass
class Shipped:
    split: str
    key: str
    pixels: np.ndarray
    record: dict[str, Any]


@pytest.fixture(scope="module")
def shipped() -> list[Shipped]:
    found = []
    for path in sorted(folder("emoji").glob("*.tar.gz")):
        parts: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                parts[key][suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for key, files in parts.items():
            picture = Image.open(io.BytesIO(files["webp"]))
            assert picture.mode == "RGB"
            found.append(Shipped(path.name.split("-")[0], key, np.asarray(picture), json.loads(files["json"])))
    return found


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return json.loads((folder("emoji") / "manifest.json").read_text(encoding="utf-8"))


def test_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match="emoji"):
        folder("imagenet")


def test_folder_needs_no_heavy_import() -> None:
    code = "import sys, mm.data.builtin; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_every_sample_is_complete(shipped: list[Shipped]) -> None:
    assert len(shipped) == len({sample.key for sample in shipped}) == 1855
    for sample in shipped:
        assert sample.pixels.shape == (SIZE, SIZE, 3)
        assert (sample.record["height"], sample.record["width"]) == (SIZE, SIZE)
        assert sample.key == key_of(sample.record["emoji"])
        for caption in sample.record["captions"]:
            assert caption["text"] and caption["text"] not in caption["keywords"]
    assert min(sample.pixels.std() for sample in shipped) > 5, "a picture is blank"


def test_captions_cover_six_languages(shipped: list[Shipped], manifest: dict[str, Any]) -> None:
    for split in SHARDS:
        members = [sample for sample in shipped if sample.split == split]
        counts = Counter(caption["language"] for sample in members for caption in sample.record["captions"])
        assert counts == manifest["captions"][split]
        assert len(members) == manifest["pictures"][split]
    counts = Counter(caption["language"] for sample in shipped for caption in sample.record["captions"])
    assert set(counts) == set(LANGUAGES) and min(counts.values()) >= 1850


def test_shares_and_variety(shipped: list[Shipped]) -> None:
    shares = Counter(sample.split for sample in shipped)
    assert shares["train"] / 1855 == pytest.approx(0.83, abs=0.01)
    assert shares["test"] / 1855 == pytest.approx(0.12, abs=0.01)
    words = {
        word
        for sample in shipped
        if sample.split == "test"
        for word in [
            sample.record["captions"][0]["text"].split(":")[0],
            *sample.record["captions"][0]["keywords"],
        ]
    }
    assert {"flag", "face", "plant", "vehicle", "insect", "fruit", "clothing", "music", "tool"} <= words


def test_groups_and_concepts_stay_in_one_split(shipped: list[Shipped], manifest: dict[str, Any]) -> None:
    splits_of: dict[str, set[str]] = defaultdict(set)
    groups_of: dict[str, set[str]] = defaultdict(set)
    smallest: dict[str, str] = {}
    for sample in sorted(shipped, key=lambda sample: sample.key):
        splits_of[sample.record["group"]].add(sample.split)
        groups_of[concept(sample.record["emoji"])].add(sample.record["group"])
        smallest.setdefault(sample.record["group"], sample.key)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert all(len(groups) == 1 for groups in groups_of.values())
    assert all(group == key for group, key in smallest.items())
    sizes = Counter(sample.record["group"] for sample in shipped)
    assert dict(sizes.most_common(9)) == manifest["groups_kept_in_train"]


def test_no_near_twins_across_splits(shipped: list[Shipped]) -> None:
    distances = pixel_distances(np.stack([sample.pixels for sample in shipped]))
    splits = np.array([sample.split for sample in shipped])
    apart = splits[:, None] != splits[None]
    assert distances[apart].min() >= THRESHOLD - WEBP_MARGIN
    assert distances[~apart & ~np.eye(len(shipped), dtype=bool)].min() < 1, "the measure sees twins where they are"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("👩‍🚒", "🧑‍🚒"),
        ("🏃‍♀️", "🏃"),
        ("👨‍🦰", "🧑"),
        ("🧑‍🎄", "🤶"),
        ("👸", "🤴"),
        ("👨‍👩‍👧", "👪"),
        ("👭", "🧑‍🤝‍🧑"),
        ("💙", "❤️"),
    ],
)
def test_concept_joins(one: str, other: str) -> None:
    assert concept(one) == concept(other)


@pytest.mark.parametrize(("one", "other"), [("👩‍🚒", "👩‍🚀"), ("♀️", "♂️"), ("👶", "👦"), ("🏳️‍🌈", "🏳️"), ("😀", "😃")])
def test_concept_keeps_apart(one: str, other: str) -> None:
    assert concept(one) != concept(other)


def test_plain_webdataset_reads_the_shards() -> None:
    shards = sorted(map(str, folder("emoji").glob("*.tar.gz")))
    dataset = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("webp", "json")
    samples = list(dataset)
    assert len(samples) == 1855
    assert all(picture.size == (SIZE, SIZE) and picture.mode == "RGB" for picture, _ in samples)
    assert samples[0][1]["captions"][0]["language"] == "en"


def test_shards_are_small_and_match_the_manifest(manifest: dict[str, Any]) -> None:
    paths = sorted(folder("emoji").glob("*.tar.gz"))
    assert len(paths) == sum(SHARDS.values())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert digests == manifest["sha256"]["tar.gz"]
    assert sum(path.stat().st_size for path in folder("emoji").rglob("*")) < 3_000_000


def test_licences_are_there() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in (folder("emoji") / "licences").iterdir()}
    assert "SIL OPEN FONT LICENSE Version 1.1" in texts["OFL-1.1.txt"] and "Google" in texts["OFL-1.1.txt"]
    assert "UNICODE INC.'S" in texts["Unicode-DFS-2016.txt"] and "1991-2022" in texts["Unicode-DFS-2016.txt"]
    assert all(name in (folder("emoji") / "NOTICE").read_text(encoding="utf-8") for name in texts)


def test_tokenizer_round_trips_every_caption(shipped: list[Shipped]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder("emoji") / "tokenizer")
    assert len(tokenizer) == 4096
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 2, 4)
    captions = [caption for sample in shipped for caption in sample.record["captions"]]
    texts = [f"{caption['language']}: {caption['text']}" for caption in captions]
    texts += [", ".join(caption["keywords"]) for caption in captions] + [
        " \n\t🦄 ",
        "<|im_start|>a<|im_end|>",
    ]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert not {index for row in ids[:-1] for index in row} & set(range(len(SPECIAL)))


def test_shipped_set_is_what_the_packages_give() -> None:
    debs = os.environ.get("MM_EMOJI_DEBS")
    if not debs:
        pytest.skip("MM_EMOJI_DEBS names no folder with the two Debian packages")
    command = [
        sys.executable,
        "-m",
        "mm.data.builtin.build_emoji",
        "--debs",
        debs,
        "--check",
        folder("emoji"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_damaged_package_is_named(tmp_path: Path) -> None:
    from mm.data.builtin.build_emoji import read_deb

    (tmp_path / "x.deb").write_bytes(b"not a package")
    with pytest.raises(ValueError, match=r"x\.deb is not a Debian package"):
        read_deb(tmp_path / "x.deb", [])
