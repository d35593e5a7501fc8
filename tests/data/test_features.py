"""Features read from disk stand for pictures: the same rows without the pictures, whole or not at all, and gone where
samples are taken down. The tower here is one that can be written down: means of quarters of a picture."""

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from mm.data import plan
from mm.data.batch import MediaBatch, PackedBatch, collate, with_dummies
from mm.data.features import FEATURES, Encoding, describe, find, medium_of
from mm.data.layout import FeatureShape, Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.packed import PackedDataset
from mm.data.takedown import take_down
from mm.errors import ConfigError, DataError

Pack = Callable[..., PackedDataset]
WIDTH = 3
GONE = frozenset(f"pictures/000/{n:06d}" for n in (3, 11, 12)) | {"pictures/001/000044"}


def means(media: MediaBatch) -> Tensor:
    """[4 N, 3] bfloat16: the mean colour of each quarter."""
    quarters = F.avg_pool2d(media.stacked(), 4)
    return quarters.flatten(2).transpose(1, 2).flatten(0, 1).to(torch.bfloat16)


def tower(layout: Layout, weights: str = "w", **settings: Any) -> dict[str, Any]:
    return describe(layout, "image", "exact", settings, weights)


def encoding(dataset: PackedDataset, layout: Layout, **options: Any) -> Encoding:
    options = {"role": FEATURES, "origin": tower(layout), "width": WIDTH, "encode": means, **options}
    return Encoding(dataset, layout, about={}, **options)


@pytest.fixture
def copy(packed: PackedDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "train"))


@pytest.fixture
def shards(pack: Pack, raw: Path, tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> PackedDataset:
    """In several packed shards."""
    monkeypatch.setattr(plan, "PACKS_PER_SHARD", 3)
    source = {"prompt": "{language}: "}
    return pack("{root}/*.tar", tmp_path / "shards", layout, source, root=str(raw), budgets={"image": 4})


def with_features(folder: Path, layout: Layout) -> PackedDataset:
    assert encoding(PackedDataset(folder), layout).run()
    dataset = PackedDataset(folder)
    dataset.read_beside(find(dataset, FEATURES, tower(layout)))
    return dataset


def same(found: list[PackedBatch], expected: list[PackedBatch]) -> None:
    """The rows of batches on features are those of batches on pictures, and the features those of the pictures."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for field in dataclasses.fields(theirs):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(other, Tensor):
                assert torch.equal(one, other), field.name
        assert ours.ids == theirs.ids and ours.sources == theirs.sources and ours.bad == theirs.bad
        assert ours.media.keys() == theirs.media.keys()
        if not theirs.media:
            continue
        given, media = ours.media["image"], theirs.media["image"]
        assert given.values.numel() == 0 and given.features is not None
        for name in ("row", "position", "length", "cost"):
            assert torch.equal(getattr(given, name), getattr(media, name)), name
        assert given.features.dtype == torch.bfloat16 and torch.equal(given.features, means(media))


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_with_features_are_the_rows_with_pictures(
    packed: PackedDataset, copy: Path, layout: Layout, workers: int
) -> None:
    dataset = with_features(copy, layout)
    expected = list(PackedLoader(packed, layout, 8, micro_batch=2, seed=2).batches(20))
    found = PackedLoader(dataset, layout, 8, micro_batch=2, seed=2, workers=workers).batches(20)
    same([replace(batch, media={k: _cloned(m) for k, m in batch.media.items()}) for batch in found], expected)
    same(list(one_pass(dataset, layout, 3)), list(one_pass(packed, layout, 3)))


def _cloned(media: MediaBatch) -> MediaBatch:
    assert media.features is not None
    return replace(media, features=media.features.clone())


def test_no_byte_of_a_picture_is_read(packed: PackedDataset, copy: Path, layout: Layout) -> None:
    """Every picture is overwritten after the features were made; reading them as pictures then fails."""
    dataset = with_features(copy, layout)
    for shard in copy.glob("*.tar"):
        data = shard.read_bytes()
        for number in range(len(packed)):
            for one in packed.read(number).media:
                data = data.replace(one.data, bytes(len(one.data)))
        shard.write_bytes(data)
    same(list(one_pass(dataset, layout, 4)), list(one_pass(packed, layout, 4)))
    with pytest.raises(DataError, match="checksum differs"):
        list(one_pass(PackedDataset(copy), layout, 4))


def test_the_files_are_safetensors(copy: Path, layout: Layout, packed: PackedDataset) -> None:
    folder = with_features(copy, layout).beside.folder  # type: ignore[union-attr]
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        found = file.get_tensor("image")
    batches = list(one_pass(packed, layout, 1))
    assert torch.equal(found, torch.cat([means(b.media["image"]) for b in batches if b.media]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_encoding_goes_on_and_slices_share_it(shards: PackedDataset, layout: Layout, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed", "sliced")]
    datasets = [PackedDataset(Path(shutil.copytree(shards.folder, folder))) for folder in folders]
    jobs = [encoding(dataset, layout) for dataset in datasets]
    assert jobs[0].missing() == jobs[0].size == jobs[0].items * 4 * WIDTH * 2
    assert jobs[0].run() and jobs[0].missing() == 0
    expected = files(jobs[0].folder)
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3

    calls = iter(range(2))

    def dies(media: MediaBatch) -> Tensor:
        next(calls)
        return means(media)

    with pytest.raises((StopIteration, RuntimeError)):
        encoding(datasets[1], layout, encode=dies).run()
    assert 0 < jobs[1].missing() < jobs[1].size
    with pytest.raises(DataError, match="not whole"):
        find(datasets[1], FEATURES, tower(layout))
    done = {name: data for name, data in files(jobs[1].folder).items() if name.endswith(".safetensors")}
    assert done.items() <= expected.items()
    assert jobs[1].run() and files(jobs[1].folder) == expected

    assert not jobs[2].run((0, 2)) and not jobs[2].run((0, 2))
    assert encoding(datasets[2], layout, workers=1).run((1, 2)) and files(jobs[2].folder) == expected


def test_a_disk_that_is_or_would_be_full(
    shards: PackedDataset,
    layout: Layout,
    file_size_limit: Callable[[int], AbstractContextManager[None]],
) -> None:
    with pytest.raises(DataError, match="to be written and the disk has"):
        encoding(shards, layout, width=10**12).run()
    job = encoding(shards, layout)
    with file_size_limit(200), pytest.raises(DataError, match=r"the disk is full; 0 of .* run the same command again"):
        job.run()
    assert not list(job.folder.glob("*.safetensors")) and job.run()


def test_what_is_taken_down_is_erased_from_features(packed: PackedDataset, copy: Path, layout: Layout) -> None:
    before = with_features(copy, layout)
    half_done = before.folder / "features-0"
    (half_done / "parts").mkdir(parents=True)
    for _ in range(2):
        take_down(copy, GONE)
        dataset = PackedDataset(copy)
        features = find(dataset, FEATURES, tower(layout))
        dataset.read_beside(features)
        listed = PackedDataset(packed.folder)
        listed.drop(GONE)
        same(list(one_pass(dataset, layout, 4)), list(one_pass(listed, layout, 4)))
    assert not half_done.exists()
    erased = 0
    for number in range(len(packed)):
        then, now = packed.read(number), dataset.read(number)
        for one, other in zip(then.media, now.media, strict=True):
            gone = then.segments[one.segment].id in GONE
            assert other.features is not None and bool(other.features.any()) != gone
            erased += gone
    assert erased == 12, "in each of three visits"
    shutil.rmtree(features.folder)
    again = with_features(copy, layout)
    same(list(one_pass(again, layout, 4)), list(one_pass(listed, layout, 4)))


@pytest.mark.parametrize("quarantine", [True, False])
def test_a_damaged_picture_fares_as_it_would_without_features(
    pack: Pack, write_shard: Callable[..., Path], picture: Callable[..., bytes], tmp_path: Path, layout: Layout,
    quarantine: bool,
) -> None:  # fmt: skip
    samples = {
        f"{n}": {"png": picture(n)[: -400 if n == 4 else None], "json": {"captions": [{"text": f"a {n}"}]}}
        for n in range(9)
    }
    write_shard(tmp_path / "a.tar", samples)
    dataset = pack(tmp_path / "a.tar", tmp_path / "train", layout)
    given = with_features(dataset.folder, layout)
    assert given.beside is not None and given.beside.about["unreadable"] == 1
    if quarantine:
        expected = list(one_pass(dataset, layout, 2, quarantine=True))
        assert [bad for batch in expected for bad in batch.bad], "the picture is damaged"
        same(list(one_pass(given, layout, 2, quarantine=True)), expected)
    else:
        with pytest.raises(DataError, match="pictures/a/4: the picture is damaged") as expected_error:
            list(one_pass(dataset, layout, 2))
        with pytest.raises(DataError) as error:
            list(one_pass(given, layout, 2))
        assert str(error.value) == str(expected_error.value)


def test_other_features_are_refused_by_what_differs(copy: Path, layout: Layout, make_layout: Any) -> None:
    dataset = PackedDataset(copy)
    with pytest.raises(
        DataError, match="has no features of a frozen tower, or none that are whole; make them with `mm data encode"
    ):
        find(dataset, FEATURES, tower(layout))
    (copy / "features-0").mkdir()
    with pytest.raises(DataError, match="has no features"):
        find(dataset, FEATURES, tower(layout))
    with_features(copy, layout)
    for other, what in [
        (tower(layout, weights="v"), "other weights"),
        (tower(layout, block=-2), "block null"),
        (describe(layout, "image", "fast", {}, "w"), 'decoder "exact" .the run has "fast"'),
        (tower(make_layout(tokens=9)), "layout.tokens 4"),
    ]:
        with pytest.raises(DataError, match=f"of another tower: {what}"):
            find(dataset, FEATURES, other)


def test_damage_is_found_when_it_is_read(copy: Path, layout: Layout) -> None:
    dataset = with_features(copy, layout)
    (path,) = dataset.beside.folder.glob("*.safetensors")  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged .* make it again with `mm data encode`"):
        list(one_pass(dataset, layout, 4))
    path.write_bytes(data[:-40])
    with pytest.raises(DataError, match="truncated"):
        list(one_pass(dataset, layout, 4))
    dataset.read_beside(None)
    assert all(batch.media["image"].features is None for batch in one_pass(dataset, layout, 4))


def test_models_that_cannot_read_features_say_so(layout: Layout, all_media: Layout) -> None:
    assert medium_of(layout) == "image" and layout.image is not None
    with pytest.raises(ConfigError, match="takes image, audio, video"):
        medium_of(all_media)
    with pytest.raises(ConfigError, match="takes none"):
        medium_of(replace(layout, image=None))
    for drawn in ({"crop": 0.5}, {"flip": True}):
        transform = replace(layout.image.transform, **drawn)
        with pytest.raises(ConfigError, match="cut or mirrored anew"):
            medium_of(replace(layout, image=replace(layout.image, transform=transform)))


def test_a_dummy_has_features_where_they_are_read(packed: PackedDataset, layout: Layout) -> None:
    text = replace(packed.read(0), media=())
    (media,) = with_dummies(
        collate([text], layout, 64), replace(layout, features={"image": FeatureShape(WIDTH)})
    ).media.values()
    assert media.dummy and media.values.numel() == 0
    assert media.features is not None and media.features.shape == (4, WIDTH) and not media.features.any()
