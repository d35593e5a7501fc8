"""Stages whose data go on where the stage before left them: one sequence of packs, whatever happens between."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch
from mm.data.loader import PackedLoader
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.train.distributed import World
from mm.train.signals import Interrupted
from mm.train.stages import Stage, open_stages
from mm.train.step import Counted
from mm.train.trainer import Trainer, Unwatched

TEXTS = [f"Text {n}. " + " ".join(f"word {n * k}" for k in range(n % 9 + 3)) for n in range(90)]
SMALL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SEED = {"name": "seed", "train": {"max_steps": 3}}
GO_ON = {"name": "go on", "carry_on": True, "train": {"max_steps": 4, "batch_tokens": 128}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


@pytest.fixture
def staged(tmp_path: Path, texts: Path) -> Callable[..., RunConfig]:
    """`staged([stage, …], mixture={…})`: a run of 4 rows a step on short texts."""

    def config(stages: list[dict[str, Any]], **data: Any) -> RunConfig:
        values = {
            "out": str(tmp_path / "run"),
            "data": {
                "sources": [{"kind": "text", "name": "texts", "path": str(texts)}],
                "context_length": 64,
                "workers": 0,
                "cache": str(texts.parent / "cache"),
                **data,
            },
            "model": {"kind": "text_lm", "language": {"tokenizer": "builtin:emoji", "config": SMALL}},
            "train": {"batch_tokens": 256, "micro_batch": 2, "device": "cpu", "async_save": False},
            "stages": stages,
        }
        path = tmp_path / "staged.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_config(path)

    return config


class Seeing(Trainer):
    """Notes the samples of every row it trains on, by stage; stops after step `stop`."""

    def __init__(self, config: RunConfig, stop: int = 0) -> None:
        super().__init__(config, Events())
        self.rows: dict[int, list[tuple[str, ...]]] = {}
        self.stop = stop

    def _agree(self, stage: Stage, batches: list[PackedBatch], error: Any) -> Counted:
        rows = [tuple(ids) for batch in batches for ids in batch.ids if ids]
        self.rows.setdefault(stage.number, []).extend(rows)
        if self.stop and self.progress.step + 1 == self.stop:
            self.signals.seen = 2
        return super()._agree(stage, batches, error)


class Events(Unwatched):
    def __init__(self) -> None:
        self.said: list[str] = []

    def event(self, text: str) -> None:
        self.said.append(text)


def sequence(config: RunConfig, count: int) -> list[tuple[str, ...]]:
    """The first packs of the data, as a loader of one row gives them."""
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    loader = PackedLoader(dataset, layout, rows=1, seed=config.seed, mixture=config.data.mixture)
    return [tuple(ids) for batch in loader.batches(count) for ids in batch.ids]


MIXTURES = [{}, {"weights": {"texts": 1}}, {"schedule": [{"step": 4, "weights": {"texts": 2}}]}]


@pytest.mark.parametrize("mixture", MIXTURES, ids=["natural", "weighted", "scheduled"])
def test_the_sequence_goes_on(staged: Callable[..., RunConfig], mixture: dict[str, Any]) -> None:
    """3 steps of 4 rows, then 4 of 2, then 2 of 8: no pack twice, none left out."""
    larger = {"name": "larger", "carry_on": True, "train": {"max_steps": 2, "batch_tokens": 512}}
    config = staged([SEED, GO_ON, larger], mixture=mixture)
    expected = sequence(config, 36)
    trainer = Seeing(config)
    trainer.run()
    assert [len(trainer.rows[stage]) for stage in range(3)] == [12, 8, 16]
    ends = [0, 12, 20, 36]
    for stage in range(3):
        assert sorted(trainer.rows[stage]) == sorted(expected[ends[stage] : ends[stage + 1]]), stage


@pytest.mark.parametrize("stop", [2, 3, 5, 6])
def test_killed_and_resumed_in_either_stage(staged: Callable[..., RunConfig], stop: int) -> None:
    config = staged([SEED, GO_ON])
    first = Seeing(config, stop)
    with pytest.raises(Interrupted):
        first.run()
    second = Seeing(config)
    second.run(resume=True)
    seen = [first.rows.get(stage, []) + second.rows.get(stage, []) for stage in (0, 1)]
    expected = sequence(config, 20)
    assert sorted(seen[0]) == sorted(expected[:12]) and sorted(seen[1]) == sorted(expected[12:])


def test_without_it_a_stage_begins_anew(staged: Callable[..., RunConfig]) -> None:
    config = staged([SEED, {**GO_ON, "carry_on": False}])
    trainer = Seeing(config)
    trainer.run()
    assert sorted(trainer.rows[1]) == sorted(sequence(config, 8))


def opened(config: RunConfig, rank: int = 0, ranks: int = 1) -> list[Stage]:
    return open_stages(config, World(rank, ranks), False, lambda what, count: None)


def test_a_finite_mixture_is_for_all_stages_together(staged: Callable[..., RunConfig]) -> None:
    once = {"max_epochs": {"texts": 1}}
    packs = len(opened(staged([SEED]))[0].splits["train"])
    assert packs > 20
    left = packs - 12
    opened(staged([SEED, {**GO_ON, "train": {"max_steps": left // 2, "batch_tokens": 128}}], mixture=once))
    more = {**GO_ON, "train": {"max_steps": left // 2 + 2, "batch_tokens": 128}}
    words = rf"ends after {packs}, 12 of them in stages before: set at most {-(-left // 2)} steps"
    with pytest.raises(ConfigError, match=words):
        opened(staged([SEED, more], mixture=once))
    opened(staged([SEED, {**more, "carry_on": False}], mixture=once))


def test_epochs_are_cut_with_a_word_and_not_to_nothing(staged: Callable[..., RunConfig]) -> None:
    once = {"max_epochs": {"texts": 1}}
    epoch = {**GO_ON, "train": {"epochs": 1}}
    config = staged([SEED, epoch], mixture=once)
    expected = sequence(config, 1000)
    trainer = Seeing(config)
    trainer.run()
    assert sorted(trainer.rows[1]) == sorted(expected[12:])
    steps = -(-(len(expected) - 12) // 4)
    assert any(f"train.epochs 1 cut to {steps} steps, where data.mixture ends" == text for text in trainer.watcher.said)
    with pytest.raises(ConfigError, match=r"train\.epochs 1 .* in stages before: set at most 0 steps"):
        opened(staged([{"name": "all", "train": {"epochs": 1}}, epoch], mixture=once))


def test_another_sequence_is_refused(staged: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"staged\.yaml:\d+: stages\.0\.carry_on: there is no stage before"):
        staged([{**SEED, "carry_on": True}])
    with pytest.raises(ConfigError, match=r"go on\.carry_on: its data are another packed set .* than those of seed"):
        opened(staged([SEED, {**GO_ON, "data": {"visits": 2}}]))
    weighted = {"mixture": {"weights": {"texts": 1}}}
    with pytest.raises(ConfigError, match=r"go on\.carry_on: its data\.mixture is another than that of seed"):
        opened(staged([SEED, {**GO_ON, "data": weighted}]))


def test_rows_that_choose_together_stay_together(staged: Callable[..., RunConfig]) -> None:
    """What `routing_rows` asks of the loader: pairs of packs that follow each other, on whatever rank."""
    experts = {"experts": {"text": 2, "image": 2, "routing_rows": 2}}
    stage = {"name": "experts", "model": experts, "train": {"max_steps": 3}}
    config = staged([stage])
    expected = sequence(config, 12)
    pairs = []
    for rank in range(2):
        loader = opened(config, rank, 2)[0].loader
        for batches in loader.steps(3):
            pairs += [tuple(tuple(ids) for ids in batch.ids) for batch in batches]
    assert sorted(pairs) == sorted((expected[n], expected[n + 1]) for n in range(0, 12, 2))
    odd = {**stage, "train": {"max_steps": 3, "micro_batch": 1}}
    with pytest.raises(ConfigError, match=r"train\.micro_batch: 1 is no multiple of the 2 rows that choose together"):
        staged([odd])
