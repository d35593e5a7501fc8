"""Runs of several processes: the same ids, step by step, whatever the ranks and workers, for all kinds of sources."""

import base64
import gzip
import io
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mm.data.config import DataConfig
from mm.data.layout import AudioLayout, ImageLayout, Layout, Template, VideoLayout
from mm.data.loader import PackedLoader
from mm.data.media import ImageTransform
from mm.data.mixture import MixtureConfig
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.data.tokenizer import Tokenizer

ROWS = 12
STEPS = 14
MIXTURE = {
    "weights": {"pairs": 3, "pages": 2, "books": 4, "speech": 2, "clips": 1, "ids": 1},
    "schedule": [{"step": 6, "weights": {"pairs": 1, "pages": 1, "books": 1, "speech": 6, "clips": 1, "ids": 0}}],
}
SQUARE = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop=0.5, flip=True)


def wave(number: int) -> bytes:
    file = io.BytesIO()
    seconds = 0.1 + 0.05 * (number % 5)
    samples = np.sin(np.arange(int(8000 * seconds)) * 0.05 * (number + 1)) * 0.5
    soundfile.write(file, samples, 8000, format="FLAC")
    return file.getvalue()


def clip(number: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in range(8):
            picture = np.full((32, 32, 3), (20 * frame + number) % 255, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def five_kinds(
    tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> Path:
    """Pairs, interleaved documents, text, sound, clips, and a file of token ids."""
    folder = tmp_path_factory.mktemp("kinds")
    words = "the cat sat under an umbrella and watched rain fall on the quiet town.".split()  # noqa: SIM905
    say = lambda n: " ".join(words[n % 4 : 5 + n % 9])  # noqa: E731
    write_shard(folder / "pairs.tar", {f"{n:03d}": {"png": picture(n), "txt": say(n)} for n in range(70)})
    pages = {}
    for n in range(40):
        encoded = {"image_base64": base64.b64encode(picture(n)).decode()}
        pages[f"{n:03d}"] = {"json": {"texts": [say(n), None, say(n + 1)], "image_info": [None, encoded, None]}}
    write_shard(folder / "pages.tar", pages)
    lines = [json.dumps({"text": " ".join(say(n + k) for k in range(n % 12)) or "rain"}) for n in range(90)]
    (folder / "books.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = [{"audio": {"bytes": wave(n), "path": f"{n}.flac"}, "sentence": say(n)} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "speech.parquet")
    write_shard(folder / "clips.tar", {f"{n:03d}": {"mp4": clip(n), "txt": say(n)} for n in range(40)})
    ids = np.concatenate([[*np.arange(3 + n % 30) + 300, 2] for n in range(80)]).astype(np.uint16)
    np.save(folder / "ids.npy", ids)
    return folder


def layout() -> Layout:
    tokenizer = Tokenizer.load("builtin:emoji")
    return Layout(
        tokenizer,
        Template("<s>", "<|im_end|>", "\n"),
        tokenizer.id("<|endoftext|>"),
        image=ImageLayout(4, 9, SQUARE),
        audio=AudioLayout(8000, 200),
        video=VideoLayout(2, 4, 6, SQUARE),
    )


@pytest.fixture(scope="module")
def dataset(five_kinds: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    sources: list[dict[str, Any]] = [
        {"kind": "captions", "name": "pairs", "path": "{root}/pairs.tar"},
        {"kind": "interleaved", "name": "pages", "path": "{root}/pages.tar"},
        {"kind": "text", "name": "books", "path": "{root}/books.jsonl.gz"},
        {"kind": "audio", "name": "speech", "path": "{root}/speech.parquet", "columns": {"text": "sentence"}},
        {"kind": "video", "name": "clips", "path": "{root}/clips.tar"},
        {"kind": "tokens", "name": "ids", "path": "{root}/ids.npy", "eos": 2},
    ]
    data = DataConfig.model_validate(
        {
            "root": str(five_kinds),
            "sources": sources,
            "context_length": 64,
            "too_long": "split",
            "budgets": {"image": 4},
        }
    )
    return PackedDataset(pack_split(data, "train", layout(), 0, tmp_path_factory.mktemp("packed") / "train"))


def make(dataset: PackedDataset, rank: int = 0, ranks: int = 1, workers: int = 0) -> PackedLoader:
    mixture = MixtureConfig.model_validate(MIXTURE)
    return PackedLoader(
        dataset, layout(), ROWS, micro_batch=2, seed=5, mixture=mixture, rank=rank, ranks=ranks, workers=workers
    )


def consumed(
    folder: Path, rank: int, ranks: int, workers: int, state: dict[str, Any] | None, steps: int, out: Any
) -> None:
    """What one process of a run sees: by step the ids of its rows and a digest of its media; then its state."""
    loader = make(PackedDataset(folder), rank, ranks, workers)
    if state is not None:
        loader.load_state_dict(state)
    seen = []
    for micro_batches in loader.steps(steps):
        rows = [
            (tuple(ids), int(t.sum())) for b in micro_batches for ids, t in zip(b.ids, b.input_ids, strict=True) if ids
        ]
        sums = {}
        for batch in micro_batches:
            for kind, media in batch.media.items():
                for number in range(len(media)):
                    values = media.values[media.offsets[number] : media.offsets[number + 1]]
                    key = (kind, batch.ids[int(media.row[number])][0], int(media.position[number]))
                    sums[key] = float(values.double().sum())
        seen.append((len(micro_batches), sorted(rows), sums))
    out.send((seen, loader.state_dict()))


def run(
    folder: Path, ranks: int, workers: int, state: dict[str, Any] | None, steps: int
) -> tuple[list[Any], dict[str, Any]]:
    """All processes of a run: by step the rows of all ranks together."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        process = context.Process(target=consumed, args=(folder, rank, ranks, workers, state, steps, theirs))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    seen, states = zip(*found, strict=True)
    assert all(one == states[0] for one in states), "every rank has the same state"
    assert all(len({count for count, _, _ in step}) == 1 for step in zip(*seen, strict=True)), "as many batches each"
    steps_seen = []
    for step in zip(*seen, strict=True):
        rows = sorted(row for _, of_rank, _ in step for row in of_rank)
        media = {key: value for _, _, sums in step for key, value in sums.items()}
        steps_seen.append((rows, media))
    return steps_seen, json.loads(json.dumps(states[0]))


@pytest.mark.parametrize("stop", [5, 8])
def test_stopped_and_continued_with_other_processes(dataset: PackedDataset, stop: int) -> None:
    whole, _ = run(dataset.folder, 1, 0, None, STEPS)
    assert [len(rows) for rows, _ in whole] == [ROWS] * STEPS
    kinds = {kind for _, media in whole for kind, _, _ in media}
    assert kinds == {"image", "audio", "video"}
    before, state = run(dataset.folder, 2, 1, None, stop)
    assert before == whole[:stop]
    for ranks, workers in ((1, 2), (3, 0), (4, 1), (5, 0)):
        after, _ = run(dataset.folder, ranks, workers, state, STEPS - stop)
        assert after == whole[stop:], f"{ranks} ranks"


def test_shares_of_tokens_are_those_of_the_weights(dataset: PackedDataset) -> None:
    """Up to the schedule's step every source is within one row of its share, and afterwards the new weights hold."""
    loader = make(dataset)
    given = dict.fromkeys(MIXTURE["weights"], 0)  # type: ignore[arg-type]
    total = 0
    for micro_batches in loader.steps(6):
        for batch in micro_batches:
            for ids, segments in zip(batch.ids, batch.segment_ids, strict=True):
                given[ids[0].split("/")[0]] += int((segments > 0).sum())
                total += int((segments > 0).sum())
                for name, weight in MIXTURE["weights"].items():  # type: ignore[attr-defined]
                    assert abs(given[name] - weight / 13 * total) < 64
    seen = {ids[0].split("/")[0] for step in loader.steps(6) for batch in step for ids in batch.ids}
    assert "ids" not in seen and "speech" in seen


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_finite_sequence_ends_on_all_ranks_with_everything_seen_once(dataset: PackedDataset, ranks: int) -> None:
    names = list(dataset.about["ledger"])
    once = MixtureConfig.model_validate({"max_epochs": dict.fromkeys(names, 1)})
    seen: list[str] = []
    lengths = set()
    for rank in range(ranks):
        loader = PackedLoader(dataset, layout(), 7, micro_batch=2, seed=1, mixture=once, rank=rank, ranks=ranks)
        steps = list(loader.steps(10_000))
        lengths.add((len(steps), sum(map(len, steps))))
        seen += [id for step in steps for batch in step for ids in batch.ids for id in ids]
    assert len(lengths) == 1, "all ranks have as many batches"
    everything = [segment.id for number in range(len(dataset)) for segment in dataset.read(number).segments]
    assert sorted(seen) == sorted(everything)


def test_ranks_share_the_encoder_cost_of_a_step(dataset: PackedDataset) -> None:
    """No rank waits long for another's pictures: the costs of a step differ by less than one row's."""
    costs: list[list[int]] = []
    for rank in range(2):
        loader = PackedLoader(dataset, layout(), ROWS, seed=2, rank=rank, ranks=2)
        costs.append([sum(int(m.cost.sum()) for m in batch.media.values()) for batch in loader.batches(10)])
    largest = int(dataset.encoder_costs().max())
    assert all(abs(a - b) <= largest for a, b in zip(*costs, strict=True))
    assert np.mean([abs(a - b) for a, b in zip(*costs, strict=True)]) < largest / 3
