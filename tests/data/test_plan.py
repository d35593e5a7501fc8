"""The plan accounts for everything: its ledger against a recount from the raw tars by webdataset alone."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.pack import pack
from mm.data.packed import PackedDataset
from mm.data.plan import JITTER, Plan, _near, _shards, make_plan
from mm.data.sample import keyed_rng
from mm.data.scan import PackSettings, Scan, scan_shard
from mm.data.shards import stem
from mm.data.sources import CaptionsConfig, FilesConfig, TextConfig
from mm.errors import DataError


def raw_samples(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.tar")):
        yield from wds.WebDataset(str(path), shardshuffle=False)


SETTINGS = PackSettings(64, {}, 1, 0, "error", 0.0, Limits())


@dataclass
class Planned:
    """A plan with what was scanned: `rows` in the order of packs and of places in them."""

    plan: Plan
    rows: list[dict[str, Any]]
    bad: list[dict[str, str]]

    @property
    def ledger(self) -> dict[str, dict[str, int]]:
        return self.plan.ledger

    @property
    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows]


@pytest.fixture
def plan_sources(tmp_path_factory: pytest.TempPathFactory, layout: Layout) -> Callable[..., Planned]:
    def run(configs: list[FilesConfig], settings: PackSettings) -> Planned:
        work = tmp_path_factory.mktemp("work")
        scans: dict[str, list[Path]] = {}
        for config in configs:
            source = config.build("")
            for path in source.shards():
                scan = work / f"{source.name}-{stem(path)}.arrow"
                scan_shard(scan, source, Path(path), stem(path), True, layout, settings)
                scans.setdefault(source.name, []).append(scan)
        make_plan(work / "plan.arrow", scans, settings, lambda what, n: None)
        plan = Plan.read(work / "plan.arrow")
        found = [(name, Scan(path)) for name, paths in scans.items() for path in paths]
        rows = []
        for place in plan.table.to_pylist():
            name, scanned = found[place["scan"]]
            (row,) = scanned.segments.slice(place["row"], 1).to_pylist()
            rows.append({**row, "pack": place["pack"], "source": name})
        return Planned(plan, rows, [one for _, scanned in found for one in scanned.bad])

    return run


@pytest.fixture
def plan(plan_sources: Callable[..., Planned]) -> Callable[..., Planned]:
    """`plan(path, {"captions": "all"}, visits=2)`: one source `s`, `PackSettings` by name."""

    def run(path: Path | str, source: dict[str, Any] | None = None, **settings: Any) -> Planned:
        config = CaptionsConfig(path=str(path), **{"name": "s", **(source or {})})
        return plan_sources([config], replace(SETTINGS, **settings))

    return run


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
        "samples": 60, "filtered": 0, "quarantined": 0, "left_out": 0, "no_metadata": 0, "pieces": 0, "too_long": 0,
        "too_long_tokens": 0, "unlearned": 0, "unlearned_tokens": 0, "metadata_tokens": 0,
        "segments": pictures, "segment_tokens": masked + loss, "text_tokens": masked + loss - 4 * pictures,
        "image": pictures, "image_tokens": 4 * pictures, "audio": 0, "audio_tokens": 0, "video": 0, "video_tokens": 0,
        "audio_samples": 0,
        "inserted_tokens": 2 * pictures, "loss_tokens": loss, "masked_tokens": masked,
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


def test_the_plan_is_a_function_of_the_seed(raw: Path, plan: Callable[..., Planned]) -> None:
    first, again, other = (plan(raw / "*.tar", visits=2, seed=seed) for seed in (1, 1, 2))
    assert first.plan.table.equals(again.plan.table) and not first.plan.table.equals(other.plan.table)
    assert first.plan.table["pack"].to_pylist() == sorted(first.plan.table["pack"].to_pylist())
    assert sorted(first.ids) == sorted(other.ids)


def test_samples_stand_in_a_drawn_order_in_their_rows(raw: Path, plan: Callable[..., Planned]) -> None:
    """Packing puts the longest first; the order in the row is drawn, so that rows do not open with their longest."""
    first, other = (plan(raw / "*.tar", {"captions": "all"}, seed=seed) for seed in (1, 2))
    shapes = [Counter(tuple(sorted(lengths)) for lengths in by_pack(planned).values()) for planned in (first, other)]
    assert shapes[0] == shapes[1], "which lengths go together is decided by the lengths"
    assert first.ids != other.ids
    mixed = [lengths for lengths in by_pack(first).values() if len(set(lengths)) > 1]
    longest_first = sum(lengths[0] == max(lengths) for lengths in mixed) / len(mixed)
    assert 0.1 < longest_first < 0.9


def by_pack(planned: Planned) -> dict[int, list[int]]:
    """The lengths of each pack's segments, in their order."""
    found: dict[int, list[int]] = {}
    for row in planned.rows:
        found.setdefault(row["pack"], []).append(row["tokens"])
    return found


def test_each_caption_as_a_sample(raw: Path, plan: Callable[..., Planned]) -> None:
    ids = {f"s/{n // 30:03d}/{n:06d}#{k}" for n in range(60) for k in range(3)}
    assert sorted(plan(raw / "*.tar", {"captions": "all"}).ids) == sorted(ids)


@pytest.fixture
def damaged(tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]) -> Path:
    """Ten samples, of which 3 and 7 have no usable picture or caption."""
    samples: dict[str, dict[str, Any]] = {f"{n}": {"png": picture(n), "txt": f"cat {n}"} for n in range(10)}
    samples["3"]["png"] = b"no picture"
    samples["7"]["txt"] = b"\xff"
    return write_shard(tmp_path / "v1.0-000.tar", samples)


def test_bad_samples_end_the_plan_or_are_counted(damaged: Path, plan: Callable[..., Planned]) -> None:
    with pytest.raises(DataError, match=r"s/v1\.0-000/3: not a readable"):
        plan(damaged)
    found = plan(damaged, max_bad_fraction=0.2, visits=2)
    assert [one["id"] for one in found.bad] == ["s/v1.0-000/3", "s/v1.0-000/7"]
    assert "not UTF-8" in found.bad[1]["reason"]
    ledger = found.ledger["s"]
    assert (ledger["samples"], ledger["quarantined"], ledger["segments"]) == (10, 2, 16)
    assert {*found.ids} == {f"s/v1.0-000/{n}" for n in range(10) if n not in (3, 7)}


def test_too_many_bad_samples_name_the_first_of_their_source(
    damaged: Path, plan_sources: Callable[..., Planned], write_shard: Callable[..., Path]
) -> None:
    worse = write_shard(damaged.parent / "worse.tar", {"0": {"txt": "no picture"}})
    configs = [CaptionsConfig(path=str(path), name=name) for path, name in ((damaged, "a"), (worse, "b"))]
    with pytest.raises(
        DataError, match=r"source b: 1 of 1 samples .*max_bad_fraction = 0\.2; the first: b/worse/0 in "
    ):
        plan_sources(configs, replace(SETTINGS, max_bad_fraction=0.2))


def test_the_plans_of_several_sources_stay_apart(
    damaged: Path, plan_sources: Callable[..., Planned], raw: Path
) -> None:
    configs = [CaptionsConfig(path=str(raw / "*.tar"), name="b"), CaptionsConfig(path=str(damaged), name="a")]
    found = plan_sources(configs, replace(SETTINGS, visits=2, max_bad_fraction=0.2))
    assert list(found.ledger) == ["b", "a"]
    of_pack: dict[int, set[tuple[str, int]]] = {}
    for row in found.rows:
        of_pack.setdefault(row["pack"], set()).add((row["source"], row["visit"]))
    assert list(of_pack) == list(range(found.plan.packs))
    assert all(len(kinds) == 1 for kinds in of_pack.values()), "a pack has one source and one visit"


def test_two_sources_of_one_name_are_refused(
    raw: Path, tmp_path: Path, layout: Layout, pack: Callable[..., PackedDataset]
) -> None:
    source = {"kind": "captions", "path": str(raw / "*.tar"), "name": "a"}
    with pytest.raises(DataError, match="two data sources are called 'a'"):
        pack("", tmp_path / "x", layout, sources=[source, source])


@pytest.fixture
def long_ones(tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]) -> Path:
    """`a` fits in a row, `b` does in one of its two captions, `c` never does."""
    long = "cat " * 80
    captions = {"a": ["cat"], "b": ["dog", long], "c": [long, long]}
    return write_shard(
        tmp_path / "x.tar",
        {key: {"png": picture(), "json": {"captions": texts}} for key, texts in captions.items()},
    )


def test_samples_longer_than_a_row(long_ones: Path, plan: Callable[..., Planned]) -> None:
    with pytest.raises(DataError, match=r"s/x/\w: \d+ tokens do not fit in data\.context_length = 64"):
        plan(long_ones, visits=2, max_bad_fraction=1.0)
    found = plan(long_ones, visits=2, too_long="drop")
    ledger = found.ledger["s"]
    assert ledger["too_long"] == 3 and ledger["quarantined"] == 0, "sound samples are not bad ones"
    assert 2 * ledger["samples"] == ledger["segments"] + ledger["too_long"]
    assert ledger["too_long_tokens"] > 3 * 64 and found.bad == []
    assert sorted(found.ids) == ["s/x/a", "s/x/a", "s/x/b"]


def test_a_budget_that_a_single_sample_breaks(raw: Path, plan: Callable[..., Planned]) -> None:
    with pytest.raises(DataError, match=r"s/000/000000: 1 image do not fit in data\.budgets\.image = 0"):
        plan(raw / "*.tar", budgets={"image": 0})


@pytest.mark.parametrize("too_long", ["drop", "split"])
def test_a_medium_over_a_budget_of_its_own_is_too_long_and_not_bad(
    raw: Path, plan: Callable[..., Planned], write_shard: Callable[..., Path], tmp_path: Path, too_long: str
) -> None:
    with pytest.raises(DataError, match=r"source s: no usable sample in 2 shard\(s\)"):
        plan(raw / "*.tar", budgets={"image_cost": 8}, too_long=too_long)


def test_a_visit_may_have_nothing_left(
    tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes], plan: Callable[..., Planned]
) -> None:
    captions = {"captions": ["dog", "cat " * 80]}
    path = write_shard(tmp_path / "x.tar", {"b": {"png": picture(), "json": captions}})
    found = plan(path, visits=2, too_long="drop")
    assert found.plan.packs == 1 and found.ledger["s"]["too_long"] == 1


def test_sources_that_give_nothing_are_named(
    tmp_path: Path, long_ones: Path, write_shard: Callable[..., Path], plan: Callable[..., Planned]
) -> None:
    empty = write_shard(tmp_path / "empty.tar", {})
    with pytest.raises(DataError, match=r"source s: no usable sample in 1 shard\(s\), the first .*empty\.tar"):
        plan(empty)
    with pytest.raises(DataError, match="no usable sample"):
        plan(long_ones, too_long="drop", context_length=6)


def test_shards_of_one_name_would_share_ids(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    picture: Callable[..., bytes],
    layout: Layout,
    pack: Callable[..., PackedDataset],
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "000.tar", {"k": {"png": picture(), "txt": "cat"}})
    with pytest.raises(DataError, match="source pictures: 2 shards are called 000"):
        pack(tmp_path / "*" / "000.tar", tmp_path / "x", layout)


def recount(planned: Planned, capacities: dict[str, int]) -> None:
    """What can be said of a plan without knowing how it was made."""
    places = [(place["scan"], place["row"]) for place in planned.plan.table.to_pylist()]
    assert len({*places}) == len(places), "no segment twice"
    totals: dict[int, Counter[str]] = {}
    for row in planned.rows:
        totals.setdefault(row["pack"], Counter()).update({name: row[name] for name in capacities})
    assert list(totals) == list(range(planned.plan.packs)), "dense, in order, none empty"
    assert all(total[name] <= most for total in totals.values() for name, most in capacities.items())
    for name, ledger in planned.ledger.items():
        mine = [row for row in planned.rows if row["source"] == name]
        assert ledger["segments"] == len(mine)
        for count, column in (("segment_tokens", "tokens"), ("loss_tokens", "loss_tokens"), ("image", "image")):
            assert ledger[count] == sum(row[column] for row in mine)
    assert planned.plan.shards[-1] == planned.plan.packs and planned.plan.shards == sorted({*planned.plan.shards})


def test_plans_recounted(
    raw: Path,
    tmp_path: Path,
    plan_sources: Callable[..., Planned],
    write_shard: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mm.data.plan.PACKS_PER_SHARD", 7)
    long = {f"{n}": {"txt": "a cat sat on a mat. " * n} for n in range(1, 30)}
    text = TextConfig(path=str(write_shard(tmp_path / "long.tar", long)), name="long")
    configs = [CaptionsConfig(path=str(raw / "*.tar"), name="b", captions="all"), text]
    for capacities in ({"tokens": 64}, {"tokens": 64, "image": 2}, {"tokens": 80, "image_cost": 20, "image_tokens": 9}):
        budgets = {name: most for name, most in capacities.items() if name != "tokens"}
        settings = replace(
            SETTINGS, context_length=capacities["tokens"], budgets=budgets, visits=2, too_long="split", seed=3
        )
        found = plan_sources(configs, settings)
        recount(found, capacities)
        assert len(found.rows) == 2 * (180 + 29) + sum(ledger["pieces"] for ledger in found.ledger.values())
        assert found.ledger["long"]["pieces"] > 20 and len(found.plan.shards) > 3
        assert len(found.plan.of_shard(1)) == sum(row["pack"] in range(7, 14) for row in found.rows)


def spread(packs: np.ndarray) -> np.ndarray:
    """How far apart in the source the segments of each pack lie."""
    place = np.arange(len(packs))
    first, last = np.full(packs.max() + 1, len(packs)), np.zeros(packs.max() + 1, dtype=np.int64)
    np.minimum.at(first, packs, place)
    np.maximum.at(last, packs, place)
    return last - first


def test_the_samples_of_a_pack_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 alike: within about `JITTER` of each other; the bins hold what they held."""
    costs = np.full((200_000, 1), 100)
    bins = pack(costs, [1000])
    near = _near(bins, costs, keyed_rng("test"))
    assert np.array_equal(np.bincount(near), np.full(20_000, 10))
    assert spread(near).max() < 1.01 * JITTER and np.median(spread(near)) > 0.5 * JITTER
    middles = np.bincount(near, np.arange(len(near))) / 10
    assert abs(middles - np.arange(20_000) * 10).max() < JITTER, "packs stand in the order of their samples"
    assert not np.array_equal(near, _near(bins, costs, keyed_rng("another"))), "and still are drawn"


def test_segments_change_places_only_with_their_like() -> None:
    rng = np.random.default_rng(0)
    costs = np.stack([rng.integers(20, 400, 200_000), rng.integers(0, 3, 200_000)], axis=1)
    bins = pack(costs, [1024, 5])
    near = _near(bins, costs, keyed_rng("test"))

    def contents(packs: np.ndarray) -> Counter[bytes]:
        order = np.lexsort((costs[:, 1], costs[:, 0], packs))
        return Counter(part.tobytes() for part in np.split(costs[order], np.cumsum(np.bincount(packs))[:-1]))

    assert contents(near) == contents(bins), "bins and fill are unchanged"
    place = near / near.max() * len(near)
    assert np.quantile(abs(place - np.arange(len(near))), 0.95) < JITTER, "though kinds are 1,140, each near its place"


def test_few_segments_and_none() -> None:
    for count in (0, 1, 2):
        costs = np.full((count, 1), 10)
        assert sorted(_near(pack(costs, [10]), costs, keyed_rng("test")).tolist()) == list(range(count))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 2500, [1000, 2000, 2500]),
        ([1] * 1000, [1000]),
        ([400 << 20] * 5, [2, 4, 5]),
        ([1 << 30, 1, 1], [1, 3]),
        ([3 << 30, 3 << 30, 1], [1, 2, 3]),
        ([1, 1 << 30], [1, 2]),
        ([0], [1]),
    ],
)
def test_packed_shards_end_at_a_thousand_packs_or_a_gigabyte(sizes: list[int], expected: list[int]) -> None:
    assert _shards(np.array(sizes)) == expected


MILLION = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, pyarrow as pa
from mm.data.limits import Limits
from mm.data.plan import Plan, make_plan
from mm.data.scan import LEDGER, SEGMENTS, PackSettings

folder, scans, each = Path(sys.argv[1]), 200, 5000
rng = np.random.default_rng(0)
for number in range(scans):
    columns = {name: np.ones(each, dtype=np.int32) for name in SEGMENTS.names}
    columns["id"] = [f"s/{number}/{n}" for n in range(each)]
    columns["visit"] = np.zeros(each, dtype=np.int32)
    columns["tokens"] = rng.integers(20, 2048, each, dtype=np.int32)
    columns["ids"] = columns["loss"] = columns["metadata"] = columns["media"] = [[]] * each
    table = pa.table([pa.array(columns[f.name], type=f.type) for f in SEGMENTS], schema=SEGMENTS)
    with pa.ipc.new_file(str(folder / f"{number}.arrow"), SEGMENTS) as out:
        out.write_table(table)
    about = {"shard": "x", "state": [], "bad": [], "ledger": {**dict.fromkeys(LEDGER, 0), "segments": each}}
    (folder / f"{number}.json").write_text(json.dumps(about))

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
before, start = peak(), time.time()
settings = PackSettings(4096, {"image": 64}, 1, 0, "error", 0.0, Limits())
make_plan(folder / "plan", {"s": [folder / f"{n}.arrow" for n in range(scans)]}, settings, lambda what, n: None)
plan = Plan.read(folder / "plan")
assert len(plan.table) == 1_000_000 and plan.packs > 250_000, plan.packs
print(json.dumps({"megabytes": peak() - before, "seconds": time.time() - start}))
"""


def test_a_million_segments_are_planned_in_bounded_memory_with_few_files_open(tmp_path: Path) -> None:
    """200 scans where 64 files may be open."""
    result = subprocess.run([sys.executable, "-c", MILLION, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["megabytes"] < 600, result.stdout
