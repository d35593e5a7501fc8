"""The plan accounts for everything: its ledger against a recount from the raw tars by webdataset alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from mm.data.layout import Layout
from mm.data.packed import PackedDataset
from mm.data.plan import PackSettings, Plan, make_plan
from mm.data.sources import CaptionsConfig
from mm.errors import DataError


def raw_samples(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.tar")):
        yield from wds.WebDataset(str(path), shardshuffle=False)


def plan(layout: Layout, path: Path | str, source: dict[str, Any] | None = None, **settings: Any) -> Plan:
    config = CaptionsConfig(path=str(path), **{"name": "s", **(source or {})})
    base = {"context_length": 64, "budgets": {}, "visits": 1, "seed": 0, "too_long": "error", "max_bad_fraction": 0.0}
    return make_plan([config.build("")], layout, PackSettings(**{**base, "max_pixels": 10**8, **settings}))


def test_ledger_closes_against_a_recount(raw: Path, packed: PackedDataset, layout: Layout) -> None:
    """Three visits draw each of three captions once, so the sums are those over all captions."""
    encode = layout.tokenizer.encode
    masked = loss = pictures = 0
    for sample in raw_samples(raw):
        for caption in json.loads(sample["json"])["captions"]:
            pictures += 1
            masked += 1 + 4 + len(encode(f"\n{caption['language']}: "))
            loss += len(encode(caption["text"])) + 1
    (name, ledger), = packed.about["ledger"].items()  # fmt: skip
    assert name == "pictures"
    assert ledger == {
        "samples": 60, "quarantined": 0, "too_long": 0, "too_long_tokens": 0,
        "segments": pictures, "segment_tokens": masked + loss, "image": pictures, "image_tokens": 4 * pictures,
        "text_tokens": masked + loss - 4 * pictures, "loss_tokens": loss, "masked_tokens": masked,
    }  # fmt: skip
    about = packed.about
    assert about["tokens"] == masked + loss
    assert about["tokens"] + about["padding"] == about["row_tokens"] == 64 * about["packs"]
    assert about["fill"] == pytest.approx(about["tokens"] / about["row_tokens"], abs=1e-6)


def test_every_sample_once_a_visit_and_every_caption_once_in_all(
    raw: Path, packed: PackedDataset, layout: Layout
) -> None:
    seen: Counter[tuple[int, str]] = Counter()
    captions: Counter[tuple[str, str]] = Counter()
    for number in range(len(packed)):
        pack, visit = packed.read(number), packed.index["visit"][number].as_py()
        for segment in pack.segments:
            seen[visit, segment.id] += 1
            ((start, stop),) = segment.loss
            captions[segment.id, layout.tokenizer.decode(pack.tokens[start:stop].tolist())] += 1
    expected = {
        (f"pictures/{Path(sample['__url__']).stem}/{sample['__key__']}", caption["text"])
        for sample in raw_samples(raw)
        for caption in json.loads(sample["json"])["captions"]
    }
    assert set(captions) == expected and set(captions.values()) == {1}
    assert set(seen) == {(visit, id) for visit in range(3) for id, _ in expected} and set(seen.values()) == {1}


def test_budgets_hold_in_every_pack(packed: PackedDataset) -> None:
    tokens, images = packed.index["tokens"].to_numpy(), packed.index["image"].to_numpy()
    assert tokens.max() <= 64 and images.max() == 4
    assert tokens.sum() / (64 * len(tokens)) > 0.85, "or nothing was packed"
    table = pq.read_table(packed.folder / "plan.parquet")
    for name in ("tokens", "loss_tokens", "image", "image_cost"):
        sums = np.bincount(table["pack"].to_numpy(), weights=table[name].to_numpy())
        assert sums.tolist() == packed.index[name].to_pylist(), "the packs hold what was planned"


def test_the_plan_is_a_function_of_the_seed(raw: Path, layout: Layout) -> None:
    first, again, other = (plan(layout, raw / "*.tar", visits=2, seed=seed) for seed in (1, 1, 2))
    assert first.table.equals(again.table) and not first.table.equals(other.table)
    assert first.table["pack"].to_pylist() == sorted(first.table["pack"].to_pylist())
    assert sorted(first.table["id"].to_pylist()) == sorted(other.table["id"].to_pylist())


def test_samples_stand_in_a_drawn_order_in_their_rows(raw: Path, layout: Layout) -> None:
    """Packing puts the longest first; the order in the row is drawn, so that rows do not open with their longest."""
    first, other = (plan(layout, raw / "*.tar", {"captions": "all"}, seed=seed).table.to_pylist() for seed in (1, 2))
    packs = [{row["id"]: row["pack"] for row in table} for table in (first, other)]
    assert packs[0] == packs[1], "which samples go together is decided by their lengths"
    assert [row["id"] for row in first] != [row["id"] for row in other]
    by_pack: dict[int, list[int]] = {}
    for row in first:
        by_pack.setdefault(row["pack"], []).append(row["tokens"])
    mixed = [lengths for lengths in by_pack.values() if len(set(lengths)) > 1]
    longest_first = sum(lengths[0] == max(lengths) for lengths in mixed) / len(mixed)
    assert 0.1 < longest_first < 0.9


def test_each_caption_as_a_sample(raw: Path, layout: Layout) -> None:
    table = plan(layout, raw / "*.tar", {"captions": "all"}).table
    ids = {f"s/{n // 30:03d}/{n:06d}#{k}" for n in range(60) for k in range(3)}
    assert sorted(table["id"].to_pylist()) == sorted(ids)


@pytest.fixture
def damaged(tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]) -> Path:
    """Ten samples, of which 3 and 7 have no usable picture or caption."""
    samples: dict[str, dict[str, Any]] = {f"{n}": {"png": picture(n), "txt": f"cat {n}"} for n in range(10)}
    samples["3"]["png"] = b"no picture"
    samples["7"]["txt"] = b"\xff"
    return write_shard(tmp_path / "v1.0-000.tar", samples)


def test_bad_samples_end_the_plan_or_are_counted(damaged: Path, layout: Layout) -> None:
    with pytest.raises(DataError, match=r"s/v1\.0-000/3: not a readable"):
        plan(layout, damaged)
    found = plan(layout, damaged, max_bad_fraction=0.2, visits=2)
    assert [id for id, _ in found.bad] == ["s/v1.0-000/3", "s/v1.0-000/7"]
    assert "not UTF-8" in found.bad[1][1]
    ledger = found.ledger["s"]
    assert (ledger["samples"], ledger["quarantined"], ledger["segments"]) == (10, 2, 16)
    assert set(found.table["id"].to_pylist()) == {f"s/v1.0-000/{n}" for n in range(10) if n not in (3, 7)}


def test_too_many_bad_samples_name_the_first_of_their_source(
    damaged: Path, layout: Layout, write_shard: Callable[..., Path]
) -> None:
    worse = write_shard(damaged.parent / "worse.tar", {"0": {"txt": "no picture"}})
    sources = [CaptionsConfig(path=str(path), name=name).build("") for path, name in ((damaged, "a"), (worse, "b"))]
    settings = PackSettings(64, {}, 1, 0, "error", 0.2, 10**8)
    with pytest.raises(
        DataError, match=r"source b: 1 of 1 samples .*max_bad_fraction = 0\.2; the first: b/worse/0 in "
    ):
        make_plan(sources, layout, settings)


def test_the_plans_of_several_sources_stay_apart(damaged: Path, layout: Layout, raw: Path) -> None:
    sources = [CaptionsConfig(path=str(raw / "*.tar"), name="b"), CaptionsConfig(path=str(damaged), name="a")]
    settings = PackSettings(64, {}, 2, 0, "error", 0.2, 10**8)
    found = make_plan([source.build("") for source in sources], layout, settings)
    assert list(found.ledger) == ["b", "a"]
    of_pack: dict[int, set[tuple[int, int]]] = {}
    for row in found.table.to_pylist():
        of_pack.setdefault(row["pack"], set()).add((row["source"], row["visit"]))
    assert list(of_pack) == list(range(found.packs))
    assert all(len(kinds) == 1 for kinds in of_pack.values()), "a pack has one source and one visit"
    with pytest.raises(DataError, match="two data sources are called 'a'"):
        make_plan([sources[1].build("")] * 2, layout, settings)


@pytest.fixture
def long_ones(tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]) -> Path:
    """`a` fits in a row, `b` does in one of its two captions, `c` never does."""
    long = "cat " * 80
    captions = {"a": ["cat"], "b": ["dog", long], "c": [long, long]}
    return write_shard(
        tmp_path / "x.tar",
        {key: {"png": picture(), "json": {"captions": texts}} for key, texts in captions.items()},
    )


def test_samples_longer_than_a_row(long_ones: Path, layout: Layout) -> None:
    with pytest.raises(DataError, match=r"s/x/\w in .*x\.tar: \d+ tokens do not fit in data\.context_length = 64"):
        plan(layout, long_ones, visits=2, max_bad_fraction=1)
    found = plan(layout, long_ones, visits=2, too_long="drop")
    ledger = found.ledger["s"]
    assert ledger["too_long"] == 3 and ledger["quarantined"] == 0, "sound samples are not bad ones"
    assert 2 * ledger["samples"] == ledger["segments"] + ledger["too_long"]
    assert ledger["too_long_tokens"] > 3 * 64 and found.bad == []
    assert sorted(found.table["id"].to_pylist()) == ["s/x/a", "s/x/a", "s/x/b"]


def test_a_budget_that_a_single_sample_breaks(raw: Path, layout: Layout) -> None:
    with pytest.raises(DataError, match=r"s/000/000000 in .*: 1 image do not fit in data\.budgets\.image = 0"):
        plan(layout, raw / "*.tar", budgets={"image": 0})


def test_a_visit_may_have_nothing_left(
    tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes], layout: Layout
) -> None:
    captions = {"captions": ["dog", "cat " * 80]}
    path = write_shard(tmp_path / "x.tar", {"b": {"png": picture(), "json": captions}})
    found = plan(layout, path, visits=2, too_long="drop")
    assert found.packs == 1 and found.ledger["s"]["too_long"] == 1


def test_sources_that_give_nothing_are_named(
    tmp_path: Path, long_ones: Path, write_shard: Callable[..., Path], layout: Layout
) -> None:
    empty = write_shard(tmp_path / "empty.tar", {})
    with pytest.raises(DataError, match=r"source s: no usable sample in 1 shard\(s\), the first .*empty\.tar"):
        plan(layout, empty)
    with pytest.raises(DataError, match="no usable sample"):
        plan(layout, long_ones, too_long="drop", context_length=6)


def test_shards_of_one_name_would_share_ids(
    tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes], layout: Layout
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "000.tar", {"k": {"png": picture(), "txt": "cat"}})
    with pytest.raises(DataError, match="source s: 2 shards are called 000"):
        plan(layout, tmp_path / "*" / "000.tar")
