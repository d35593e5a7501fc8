"""Codes read from disk are those of the very clip, beside its sound: whole or not at all, and gone where samples are
taken down. The teacher here is one that can be written down: the number of a position, and a number of its clip."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mm.data import plan
from mm.data.batch import MediaBatch, PackedBatch
from mm.data.features import CODES, FEATURES, Encoding, describe, find, require_same_each_time
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.packed import PackedDataset
from mm.data.takedown import take_down
from mm.errors import ConfigError, DataError

Pack = Callable[..., PackedDataset]
GONE = frozenset(f"sounds/sounds/{n}" for n in (3, 11, 12))


def coded(media: MediaBatch) -> Tensor:
    """int64 [positions, 2]."""
    found = []
    for values, length in zip(media.items(), media.length.tolist(), strict=True):
        of_clip = int(values.double().abs().sum() * 1e6) % 65536
        found.append(torch.stack([torch.arange(length), torch.full((length,), of_clip)], dim=1))
    return torch.cat(found)


def teacher(layout: Layout, medium: str = "audio", weights: str = "w", **settings: Any) -> dict[str, Any]:
    return describe(layout, medium, "exact", settings, weights)


def encoding(dataset: PackedDataset, layout: Layout, **options: Any) -> Encoding:
    options = {"role": CODES, "origin": teacher(layout), "width": 2, "encode": coded, **options}
    return Encoding(dataset, layout, about={}, **options)


def with_codes(folder: Path, layout: Layout, medium: str = "audio") -> PackedDataset:
    origin = teacher(layout, medium)
    assert encoding(PackedDataset(folder), layout, origin=origin).run()
    dataset = PackedDataset(folder)
    dataset.read_beside(find(dataset, CODES, origin))
    return dataset


@pytest.fixture(scope="session")
def heard(
    tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path], sound: Callable[..., bytes],
    picture: Callable[..., bytes], all_media: Layout, pack: Pack,
) -> PackedDataset:  # fmt: skip
    """24 recordings of 4 to 16 positions and 12 pictures, with their texts, in several packed shards."""
    folder = tmp_path_factory.mktemp("heard")
    sounds = {f"{n}": {"flac": sound(n, 0.4 + 0.3 * (n % 5)), "txt": f"sound {n}"} for n in range(24)}
    pictures = {f"{n}": {"png": picture(n), "txt": f"picture {n}"} for n in range(12)}
    write_shard(folder / "sounds.tar", sounds)
    write_shard(folder / "pictures.tar", pictures)
    sources = [
        {"kind": "audio", "path": str(folder / "sounds.tar"), "name": "sounds"},
        {"kind": "captions", "path": str(folder / "pictures.tar"), "name": "pictures"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "PACKS_PER_SHARD", 3)
        return pack(folder, folder / "train", all_media, sources=sources)


@pytest.fixture
def copy(heard: PackedDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(heard.folder, tmp_path / "train"))


def same(found: list[PackedBatch], expected: list[PackedBatch], medium: str = "audio") -> int:
    """Batches with codes are those without, and the codes those of the media beside them. How many items had some."""
    assert len(found) == len(expected)
    items = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids and ours.bad == theirs.bad and ours.media.keys() == theirs.media.keys()
        for field in dataclasses.fields(theirs):
            if isinstance(other := getattr(theirs, field.name), Tensor):
                assert torch.equal(getattr(ours, field.name), other), field.name
        for kind, media in theirs.media.items():
            given = ours.media[kind]
            for name in ("values", "shapes", "row", "position", "length", "cost", "unreadable"):
                assert torch.equal(getattr(given, name), getattr(media, name)), name
            if kind != medium:
                assert given.codes is None
                continue
            items += len(media)
            readable = torch.repeat_interleave(~media.unreadable, media.length)
            assert given.codes is not None and given.codes.dtype == torch.int32
            assert torch.equal(given.codes, (coded(media) * readable[:, None]).int())
    return items


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_with_codes_are_the_rows_without_and_their_codes(
    heard: PackedDataset, copy: Path, all_media: Layout, workers: int
) -> None:
    dataset = with_codes(copy, all_media)
    expected = PackedLoader(heard, all_media, 4, micro_batch=2, seed=2).batches(12)
    found = PackedLoader(dataset, all_media, 4, micro_batch=2, seed=2, workers=workers).batches(12)
    assert sum(same([one], [other]) for one, other in zip(found, expected, strict=True)) > 24
    assert same(list(one_pass(dataset, all_media, 3)), list(one_pass(heard, all_media, 3))) == 24
    number = next(n for n in range(len(heard)) if heard.read(n).media)
    text = dataset.text(number)
    assert np.array_equal(text.tokens, heard.read(number).tokens) and not any(one.data for one in text.media)


def test_the_files_are_safetensors_of_whole_numbers(copy: Path, all_media: Layout, heard: PackedDataset) -> None:
    beside = with_codes(copy, all_media).beside
    assert beside is not None and beside.folder.name.startswith("codes-")
    found = []
    for path in sorted(beside.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.append(file.get_tensor("audio"))
    assert len(found) > 1 and found[0].dtype == torch.uint16
    batches = [batch.media["audio"] for batch in one_pass(heard, all_media, 1) if "audio" in batch.media]
    assert torch.equal(torch.cat([one.int() for one in found]), torch.cat(list(map(coded, batches))).int())
    about = json.loads((beside.folder / "codes.json").read_text())
    assert about["items"] == 24 and about["rows"] == sum(map(len, found)) and about["width"] == 2


def test_other_media_are_not_decoded_for_them(heard: PackedDataset, copy: Path, all_media: Layout) -> None:
    asked = []

    def watched(media: MediaBatch) -> Tensor:
        asked.append(media.shapes.shape[1])
        return coded(media)

    job = encoding(PackedDataset(copy), replace(all_media, image=None), encode=watched)
    assert job.run() and set(asked) == {1}, "a layout without pictures could decode none"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_encoding_goes_on_and_slices_share_it(heard: PackedDataset, all_media: Layout, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed", "sliced")]
    datasets = [PackedDataset(Path(shutil.copytree(heard.folder, folder))) for folder in folders]
    jobs = [encoding(dataset, all_media) for dataset in datasets]
    assert jobs[0].missing() == jobs[0].size > 0 and jobs[0].run() and jobs[0].missing() == 0
    expected = files(jobs[0].folder)
    assert len([name for name in expected if name.endswith(".safetensors")]) > 1
    calls = iter(range(1))

    def dies(media: MediaBatch) -> Tensor:
        next(calls)
        return coded(media)

    with pytest.raises((StopIteration, RuntimeError)):
        encoding(datasets[1], all_media, encode=dies).run()
    assert 0 < jobs[1].missing() < jobs[1].size
    with pytest.raises(DataError, match="not whole"):
        find(datasets[1], CODES, teacher(all_media))
    assert jobs[1].run() and files(jobs[1].folder) == expected
    assert not jobs[2].run((0, 2)) and encoding(datasets[2], all_media, workers=1).run((1, 2))
    assert files(jobs[2].folder) == expected


def test_other_codes_are_refused_by_what_differs(copy: Path, all_media: Layout) -> None:
    dataset = PackedDataset(copy)
    with pytest.raises(DataError, match=r"has no codes of a teacher, or none that are whole; .*data\.codes=false"):
        find(dataset, CODES, teacher(all_media))
    (copy / "features-0").mkdir()
    with_codes(copy, all_media)
    with pytest.raises(DataError, match="has no features"):
        find(dataset, FEATURES, teacher(all_media))
    assert all_media.audio is not None
    other_hop = replace(all_media, audio=replace(all_media.audio, hop=500))
    for other, what in [
        (teacher(all_media, weights="v"), "other weights"),
        (teacher(all_media, bandwidth=6.0), "bandwidth null .the run has 6.0"),
        (teacher(other_hop), "layout.hop 1000 .the run has 500"),
    ]:
        with pytest.raises(DataError, match=f"its codes are of another teacher: {what}"):
            find(dataset, CODES, other)
    alone = replace(all_media, audio=replace(all_media.audio, alone=True))
    assert describe(alone, "audio", "fast", {}, "w") == teacher(all_media), "neither is of the sound"


def test_what_is_taken_down_is_erased_from_codes_and_features(
    heard: PackedDataset, copy: Path, all_media: Layout
) -> None:
    def means(media: MediaBatch) -> Tensor:
        return torch.ones(media.positions, 3, dtype=torch.bfloat16)

    with_codes(copy, all_media)
    tower = {"role": FEATURES, "width": 3, "encode": means}
    assert encoding(PackedDataset(copy), all_media, **tower).run()
    for _ in range(2):
        take_down(copy, GONE)
        dataset = PackedDataset(copy)
        dataset.read_beside(find(dataset, CODES, teacher(all_media)))
        listed = PackedDataset(heard.folder)
        listed.drop(GONE)
        assert same(list(one_pass(dataset, all_media, 4)), list(one_pass(listed, all_media, 4))) == 21
    featured = PackedDataset(copy)
    featured.read_beside(find(featured, FEATURES, teacher(all_media)))
    erased = 0
    for number in range(len(heard)):
        for read, name in ((dataset, "codes"), (featured, "features")):
            pack = read.read(number)
            for one in (one for one in pack.media if one.kind == "audio"):
                gone = pack.segments[one.segment].id in GONE
                assert getattr(one, name).any() != gone
                erased += gone
    assert erased == 2 * len(GONE)
    shutil.rmtree(dataset.beside.folder)  # type: ignore[union-attr]
    again = with_codes(copy, all_media)
    same(list(one_pass(again, all_media, 4)), list(one_pass(listed, all_media, 4)))


def test_damaged_recordings_have_codes_of_zeros_and_keep_their_reason(
    pack: Pack, write_shard: Callable[..., Path], sound: Callable[..., bytes], tmp_path: Path, all_media: Layout
) -> None:
    """The second of two recordings in one document: the first keeps its codes."""
    pages = {
        f"{n}": {
            "json": {"parts": [{"audio": "0.flac"}, {"audio": "1.flac"}, {"text": f"page {n}"}]},
            "0.flac": sound(n), "1.flac": sound(10 + n)[: -3000 if n == 2 else None],
        }
        for n in range(5)
    }  # fmt: skip
    write_shard(tmp_path / "pages.tar", pages)
    dataset = pack(tmp_path / "pages.tar", tmp_path / "train", all_media, {"kind": "interleaved", "name": "pages"})
    given = with_codes(dataset.folder, all_media)
    assert given.beside is not None and encoding(dataset, all_media).unreadable() == 1
    expected = list(one_pass(dataset, all_media, 2, quarantine=True))
    assert [id for batch in expected for id, _ in batch.bad] == ["pages/pages/2"]
    assert sum(int(batch.media["audio"].unreadable.sum()) for batch in expected) == 1
    assert same(list(one_pass(given, all_media, 2, quarantine=True)), expected) == 10
    with pytest.raises(DataError, match="pages/pages/2: the clip"):
        list(one_pass(given, all_media, 2))


def test_pictures_have_codes_too(heard: PackedDataset, copy: Path, all_media: Layout) -> None:
    dataset = with_codes(copy, all_media, "image")
    assert same(list(one_pass(dataset, all_media, 4)), list(one_pass(heard, all_media, 4)), "image") == 12
    assert all_media.image is not None
    drawn = replace(all_media.image, transform=replace(all_media.image.transform, flip=True))
    with pytest.raises(ConfigError, match=r"data\.codes: images are cut or mirrored anew"):
        require_same_each_time(replace(all_media, image=drawn), "image", CODES)
    with pytest.raises(ConfigError, match="a teacher of audio, and the model takes image"):
        require_same_each_time(replace(all_media, audio=None, video=None), "audio", CODES)
