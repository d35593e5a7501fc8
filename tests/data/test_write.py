"""What comes out of packing is the same bytes whoever does it, in whatever order, however often it is killed."""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import mm.data.write as module
from mm.data.config import DataConfig
from mm.data.layout import Layout
from mm.data.packed import PackedDataset, join_segments
from mm.data.prepare import Workers, pack_split
from mm.errors import DataError

SETTINGS = {"context_length": 64, "budgets": {"image": 4}, "visits": 2, "max_bad_fraction": 0.1, "too_long": "split"}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> Path:
    """Pictures in tars and a tar.gz, and texts, some of them too long or bad."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "pictures").mkdir()
    for shard in range(5):
        samples: dict[str, Any] = {
            f"{n:03d}": {"png": picture(100 * shard + n), "json": {"captions": [f"cat {n}", f"Katze {n}"]}}
            for n in range(20)
        }
        write_shard(folder / "pictures" / f"{shard}.tar", samples)
    plain = folder / "pictures" / "4.tar"
    (folder / "pictures" / "4.tar.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    rows = [{"text": f"A cat sat on mat {n}. " * (n % 30)} for n in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sources(mixed: Path) -> list[dict[str, Any]]:
    return [
        {"kind": "captions", "path": str(mixed / "pictures" / "*"), "name": "pictures"},
        {"kind": "text", "path": str(mixed / "text.jsonl"), "name": "text"},
    ]


@pytest.fixture(scope="module")
def pack_mixed(mixed: Path, layout: Layout) -> Iterator[Callable[..., Path | None]]:
    """Pack `mixed` into a folder, a hundred packs a shard."""

    def run(out: Path, **options: Any) -> Path | None:
        data = DataConfig.model_validate({"sources": sources(mixed), **SETTINGS})
        return pack_split(data, "train", layout, 0, out, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm.data.plan.PACKS_PER_SHARD", 100)
        yield run


@pytest.fixture(scope="module")
def expected(pack_mixed: Callable[..., Path | None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every file of the set a digest, packed by one process without disturbance."""
    folder = pack_mixed(tmp_path_factory.mktemp("expected") / "train")
    assert folder is not None
    ledger = PackedDataset(folder).about["ledger"]["text"]
    assert ledger["quarantined"] > 0 and ledger["pieces"] > 0
    found = digests(folder)
    assert len(found) > 8 and {"dataset.json", "index.parquet", "plan.parquet", "quarantine.jsonl"} < {*found}
    return found


@pytest.mark.parametrize("workers", [2])
def test_processes_give_the_same_bytes(
    pack_mixed: Callable[..., Path | None], expected: dict[str, str], tmp_path: Path, workers: int
) -> None:
    folder = pack_mixed(tmp_path / "x", workers=Workers(workers))
    assert folder == tmp_path / "x" and digests(folder) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "nothing else is left"


@pytest.mark.parametrize("seed", [0, 1])
def test_slices_in_any_order_give_the_same_bytes(
    pack_mixed: Callable[..., Path | None], expected: dict[str, str], tmp_path: Path, seed: int
) -> None:
    """None until the last one is done; slices that have nothing left to do are no trouble."""
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(4):
        for number in rng.permutation(3).tolist():
            results.append(pack_mixed(tmp_path / "x", workers=Workers(1 + number % 2, slice=(number, 3))))
    done = results.index(tmp_path / "x")
    assert 3 <= done <= 9 and results == [None] * done + [tmp_path / "x"] * (12 - done)
    assert digests(tmp_path / "x") == expected


def test_ray_gives_the_same_bytes(
    pack_mixed: Callable[..., Path | None], expected: dict[str, str], tmp_path: Path, layout: Layout
) -> None:
    ray = pytest.importorskip("ray")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        pytest.skip(f"ray cannot start here: {error}")
    try:
        assert pack_mixed(tmp_path / "x", workers=Workers(2, "ray")) == tmp_path / "x"
        assert digests(tmp_path / "x") == expected
        (tmp_path / "no").write_bytes(b"")
        data = DataConfig.model_validate({"sources": [{"kind": "text", "path": str(tmp_path / "no")}]})
        with pytest.raises(DataError, match=r"truncated|not a whole tar"):
            pack_split(data, "train", layout, 0, tmp_path / "y", workers=Workers(2, "ray"))
    finally:
        ray.shutdown()


def test_media_are_read_with_few_files_open(
    pack_mixed: Callable[..., Path | None], expected: dict[str, str], tmp_path: Path, mixed: Path, monkeypatch: Any
) -> None:
    seen = []

    def counting(items: Any) -> Any:
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        seen.append(sum(link.is_symlink() and link.readlink().is_relative_to(mixed) for link in links))
        return join_segments(items)

    monkeypatch.setattr(module, "OPEN_FILES", 2)
    monkeypatch.setattr(module, "join_segments", counting)
    assert digests(pack_mixed(tmp_path / "x") or tmp_path) == expected
    assert max(seen) == 2 and len(seen) > 50


def during(what: str, do: Callable[[], Any]) -> Callable[[str, int], None]:
    """A progress callback that does something once, when a step is reported."""
    left = [do]

    def progress(doing: str, number: int) -> None:
        if doing.startswith(what) and left:
            left.pop()()

    return progress


def test_a_shard_that_changes_before_it_is_written_is_noticed(
    raw: Path, tmp_path: Path, layout: Layout, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    path = write_shard(tmp_path / "x.tar", {"a": {"png": picture(), "txt": "cat cat"}})
    source = {"kind": "captions", "path": str(path), "name": "s"}
    data = DataConfig.model_validate({"sources": [source], "context_length": 64})
    changed = {"a": {"png": picture(1), "txt": "cat dog"}}
    with pytest.raises(DataError, match=r"x\.tar: was changed after it had been scanned; pack the data set again"):
        pack_split(data, "train", layout, 0, tmp_path / "out", during("packing", lambda: write_shard(path, changed)))
    assert not (tmp_path / "out").exists()
    folder = pack_split(data, "train", layout, 0, tmp_path / "out")
    assert folder is not None and PackedDataset(folder).read(0).media[0].data == picture(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.tar"], "the first attempt's folder is gone"


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 1000), lambda path: path.touch()])
def test_a_shard_that_changes_while_it_is_written_is_noticed(
    tmp_path: Path, layout: Layout, mixed: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    shutil.copytree(mixed, tmp_path / "mixed")
    data = DataConfig.model_validate({"sources": sources(tmp_path / "mixed"), **SETTINGS})

    def cutting(items: Any) -> Any:
        change(tmp_path / "mixed" / "pictures" / "0.tar")
        return join_segments(items)

    monkeypatch.setattr(module, "join_segments", cutting)
    with pytest.raises(DataError, match=r"0\.tar: (ends before byte|was changed)"):
        pack_split(data, "train", layout, 0, tmp_path / "out")


@pytest.mark.parametrize("most", [1_000, 10_000, 60_000, 100_000, 200_000])
def test_a_full_disk_leaves_nothing_that_looks_complete(
    pack_mixed: Callable[..., Path | None],
    expected: dict[str, str],
    tmp_path: Path,
    file_size_limit: Callable[[int], contextlib.AbstractContextManager[None]],
    most: int,
) -> None:
    """Writing fails in a scan, in the plan, in a packed shard: an OSError that names the file; later it goes on."""
    out = tmp_path / "deep" / "train"
    with file_size_limit(most), pytest.raises(OSError, match="File too large") as caught:
        pack_mixed(out)
    folders = (str(tmp_path / "deep" / ".train.work-"), tempfile.gettempdir())  # where gzip is decompressed
    assert str(caught.value.filename).startswith(folders)
    assert not out.exists() and not list((tmp_path / "deep").rglob("dataset.json"))
    assert pack_mixed(out) == out and digests(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["train"]


def test_two_that_pack_the_same_set_at_once(
    pack_mixed: Callable[..., Path | None], expected: dict[str, str], tmp_path: Path
) -> None:
    """Whenever the other one finishes first, both have the set, and nothing is left over."""
    for what in ("scanning pictures", "scanning shards", "packing", "writing"):
        out = tmp_path / what.replace(" ", "-") / "train"
        progress = during(what, lambda out=out: pack_mixed(out))
        assert pack_mixed(out, progress=progress) == out, what
        assert digests(out) == expected and [path.name for path in out.parent.iterdir()] == ["train"], what


def test_another_set_in_the_place_is_refused(
    pack_mixed: Callable[..., Path | None], raw: Path, layout: Layout, tmp_path: Path
) -> None:
    """Also where it came there while this one was being packed."""
    source = {"kind": "captions", "path": str(raw / "*.tar"), "name": "pictures"}
    data = DataConfig.model_validate({"sources": [source], "context_length": 64})
    progress = during("writing", lambda: pack_split(data, "train", layout, 0, tmp_path / "x"))
    with pytest.raises(DataError, match="holds a set packed from other shards or settings"):
        pack_mixed(tmp_path / "x", progress=progress)
    assert PackedDataset(tmp_path / "x").about["ledger"].keys() == {"pictures"}


def test_work_goes_on_from_another_folder(
    mixed: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    """Relative paths mean the same files after the work has moved to another process with another working folder."""
    shutil.copytree(mixed, tmp_path / "mixed")
    for place, slice in ((tmp_path, (0, 2)), (tmp_path / "mixed", (1, 2)), (tmp_path, (0, 2)), (tmp_path, (1, 2))):
        monkeypatch.chdir(place)
        data = DataConfig.model_validate({"sources": sources(mixed), **SETTINGS})
        out = Path(os.path.relpath(tmp_path / "out"))
        pack_split(data, "train", layout, 0, out, workers=Workers(1, slice=slice))
    assert digests(tmp_path / "out") == expected


# A real run, killed.

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> Path:
    """A config whose set takes seconds: 5,100 short samples in eight shards, rows of 16."""
    import webdataset as wds

    folder = tmp_path_factory.mktemp("big")
    png = picture(0, size=(4, 4))
    for shard in range(6):
        with wds.TarWriter(str(folder / f"{shard}.tar"), mtime=0) as writer:
            for n in range(600):
                writer.write({"__key__": f"{n:04d}", "png": png, "txt": f"cat {n} in {shard}"})
    for shard in range(2):
        rows = [json.dumps({"text": f"{n} dogs. " * (n % 5 + 1)}) for n in range(750)]
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    data = {
        "sources": [
            {"kind": "captions", "path": str(folder / "*.tar"), "name": "pictures"},
            {"kind": "text", "path": str(folder / "*.jsonl.gz"), "name": "texts"},
        ],
        "validation": [],
        "test": [],
        "context_length": 16,
        "too_long": "split",
        "visits": 1,
    }
    config = {"extends": str(QUICKSTART), "data": data, "evaluation": {"every": 0}}
    (folder / "big.yaml").write_text(yaml.safe_dump(config))
    return folder / "big.yaml"


def start(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """`mm pack`, in a process group of its own."""
    command = [sys.executable, "-m", "mm", "pack", str(config), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def undisturbed(big: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Digests of the set, and the seconds that it takes."""
    out, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    finish(start(big, out, "--workers", "2"))
    found = digests(out / "train")
    assert sum(name.startswith("packs-") for name in found) >= 5
    return found, time.monotonic() - began


def finished(out: Path) -> dict[str, int]:
    """The items of a work folder, or of the set, that are done for good: name and time of change."""
    found = {}
    for work in out.glob(".train.work-*"):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            for scan in (work / "scans").glob("[0-9]*.json"):
                found |= {path.name: path.stat().st_mtime_ns for path in (scan, scan.with_suffix(".arrow"))}
            for part in (work / "parts").glob("[0-9]*.index"):
                tar = work / "out" / f"packs-{part.stem}.tar"
                found |= {path.name: path.stat().st_mtime_ns for path in (part, tar)}
    return found | {tar.name: tar.stat().st_mtime_ns for tar in (out / "train").glob("packs-*.tar")}


def test_killed_again_and_again_it_comes_to_the_same_end(
    big: Path, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    """A few items further on each time; what is finished is not done again. `MM_SOAK_KILLS`: how often it is killed."""
    expected, seconds = undisturbed
    rng = np.random.default_rng(int(os.environ.get("MM_SOAK_SEED", "0")))
    done: dict[str, int] = {}
    kills = 0
    for _ in range(int(os.environ.get("MM_SOAK_KILLS", "5"))):
        process = start(big, tmp_path, "--workers", "2")
        items, pause = int(rng.integers(0, 12)), rng.uniform(0, 0.2)
        while process.poll() is None and len(finished(tmp_path)) < len(done) + items:
            time.sleep(0.01)
        time.sleep(pause if items else rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL and len(finished(tmp_path)) > len(done)
        now = finished(tmp_path)
        assert (tmp_path / "train").exists() or done.items() <= now.items(), "finished items were done again"
        assert {name: now[name] for name in done.keys() & now.keys()}.items() <= done.items()
        done = now
        if (tmp_path / "train").exists():
            assert digests(tmp_path / "train") == expected
            shutil.rmtree(tmp_path / "train")
            done = {}
    assert kills > 0, "none in the middle of the work"
    finish(start(big, tmp_path, "--workers", "2"))
    last = finished(tmp_path)
    assert {name: last[name] for name in done.keys() & last.keys()}.items() <= done.items()
    assert digests(tmp_path / "train") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def children(pid: int) -> Iterator[int]:
    """Processes that descend from one, by /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(stat.parent.name)
                yield from children(int(stat.parent.name))


def alive(pids: set[int]) -> set[int]:
    def state(pid: int) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "X"

    return {pid for pid in pids if state(pid) not in "XZ"}


def test_workers_end_with_a_parent_that_is_killed(big: Path, tmp_path: Path) -> None:
    process = start(big, tmp_path, "--workers", "2")
    deadline = time.monotonic() + 60
    family: set[int] = set()
    while len(family) < 4 and time.monotonic() < deadline:  # forkserver, resource tracker, two workers
        time.sleep(0.05)
        family = {*children(process.pid)}
    assert len(family) >= 4, "the workers were not seen"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (left := alive(family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_two_commands_at_once_come_to_the_same_end(
    big: Path, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    both = [start(big, tmp_path, "--workers", "1") for _ in range(2)]
    for process in both:
        finish(process)
    assert digests(tmp_path / "train") == undisturbed[0]
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
