"""Metadata conditioning and cool-down as one run; what conditioning costs and gives, against sums masked by hand."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mm
from mm.cli import main
from mm.config import RunConfig, load_config
from mm.data.loader import one_pass
from mm.data.metadata import MetadataConfig
from mm.data.packed import PackedDataset
from mm.data.prepare import open_splits
from mm.data.sample import Text
from mm.errors import ConfigError, DataError
from mm.evals.conditioned import conditioned_losses
from mm.hub import metadata_of
from mm.models.backbone import ordinary_attention
from mm.models.generate import generate, log_likelihoods
from mm.models.prompts import Decoding
from mm.models.systems.text_lm.config import TextLMConfig
from mm.train.metrics import read_metrics
from mm.train.signals import Interrupted
from mm.train.trainer import Trainer, Unwatched

HOSTS = ("north.org", "south.org")
TEXTS = [f"Text {n}. " + " ".join(f"word {n * k}" for k in range(n % 6 + 3)) for n in range(120)]
SMALL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
LANGUAGE = {"tokenizer": "builtin:emoji", "config": SMALL}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of two hosts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": text, "url": f"https://{HOSTS[n % 2]}/{n}"} for n, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def meco(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Callable[..., RunConfig]:
    """`meco(out)`: 6 steps on documents with metadata, 3 on plain ones of another part."""
    folder = tmp_path_factory.mktemp("runs")

    def source(part: list[float], **more: Any) -> dict[str, Any]:
        return {"kind": "text", "name": "texts", "path": str(texts), "part": part, **more}

    def config(out: str = "run", **settings: Any) -> RunConfig:
        values = {
            "out": str(folder / out),
            "data": {
                "sources": [source([0, 0.7], metadata={})],
                "test": [source([0.9, 1], metadata={})],
                "context_length": 64,
                "workers": 0,
                "cache": str(texts.parent / "cache"),
            },
            "model": {"kind": "text_lm", "language": LANGUAGE},
            "train": {
                "batch_tokens": 256, "micro_batch": 2, "device": "cpu", "async_save": False, "save_every": 2,
                "optimizer": {"kind": "adamw", "lr": 3e-3}, "schedule": {"kind": "cosine", "warmup": 2},
            },
            "stages": [
                {"name": "conditioned", "train": {"max_steps": 6}},
                {
                    "name": "cool-down",
                    "keep_optimizer": True,
                    "data": {"sources": [source([0.7, 0.9])]},
                    "train": {"max_steps": 3},
                },
            ],
            **settings,
        }  # fmt: skip
        path = folder / f"{out}.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_config(path)

    return config


def run(config: RunConfig, resume: bool = False) -> Trainer:
    trainer = Trainer(config, Unwatched())
    trainer.run(resume)
    return trainer


@pytest.fixture(scope="module")
def whole(meco: Callable[..., RunConfig]) -> Trainer:
    return run(meco("whole"))


def ids_of(dataset: PackedDataset) -> set[str]:
    return {one.id for number in range(len(dataset)) for one in dataset.read(number).segments}


def test_conditioned_then_plain_under_one_schedule(whole: Trainer) -> None:
    rows = read_metrics(whole.config.out / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [0] * 6 + [1] * 3
    rates = [row["lr"] for row in rows]
    assert all(a > b for a, b in pairwise(rates[2:])), "no second warm-up"
    conditioned, plain = (stage.splits["train"] for stage in whole.stages)
    ledgers = [dataset.about["ledger"]["texts"] for dataset in (conditioned, plain)]
    assert ledgers[0]["metadata_tokens"] > 0 == ledgers[1]["metadata_tokens"]
    held_out = whole.stages[1].splits["test"]
    pools = [ids_of(dataset) for dataset in (conditioned, plain, held_out)]
    assert sum(map(len, pools)) == len(set.union(*pools)) == 120, "no document is seen twice"


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_stopped_anywhere_and_resumed(meco: Callable[..., RunConfig], whole: Trainer, stop: int) -> None:
    out = f"stopped-{stop}"

    class Stop(Unwatched):
        def step(self, row: dict[str, Any], steps: int) -> None:
            trainer.signals.seen = 2 if row["step"] == stop else 0

    trainer = Trainer(meco(out), Stop())
    with pytest.raises(Interrupted):
        trainer.run()
    resumed = run(meco(out), resume=True)
    losses = [[row["loss"] for row in read_metrics(one.config.out / "metrics.jsonl")] for one in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    for one, other in zip(whole.system.parameters(), resumed.system.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def conditioned(meco: Callable[..., RunConfig]) -> tuple[Any, Any, PackedDataset, RunConfig]:
    """An untrained model, its layout, and the training documents with metadata."""
    config = meco().stage_runs()[0]
    torch.manual_seed(0)
    model = TextLMConfig.model_validate({"language": LANGUAGE})
    layout = model.layout()
    return model.build().eval(), layout, open_splits(config.data, layout, 0)["train"], config


def nats_by_hand(system: Any, layout: Any, front: str, text: str) -> float:
    """-log p of a document and its end behind a text, by transformers, one document at a time."""
    encode, special = layout.tokenizer.encode, layout.tokenizer.id
    before = [special("<s>"), *(encode(front) if front else [])]
    ids = torch.tensor([[*before, *encode(text), special("<|im_end|>")]])
    labels = ids.clone()
    labels[0, : len(before)] = -100
    with ordinary_attention(system.language), torch.no_grad():
        loss = system.language(input_ids=ids, labels=labels, use_cache=False).loss
    return float(loss) * (ids.shape[1] - len(before))


def test_packed_documents_cost_what_they_cost_alone_with_metadata_masked_by_hand(
    conditioned: tuple[Any, Any, PackedDataset, RunConfig],
) -> None:
    system, layout, dataset, _ = conditioned
    with torch.no_grad():
        outputs = [system(batch) for batch in one_pass(dataset, layout, 4)]
    found = sum(float(output.losses["next_token"]) for output in outputs)
    numbers = [int(id.split("/")[2]) for id in ids_of(dataset)]
    expected = [nats_by_hand(system, layout, f"URL: {HOSTS[n % 2]}\n\n", TEXTS[n]) for n in numbers]
    assert found == pytest.approx(sum(expected), rel=1e-5)
    count = sum(int(output.counts["next_token"]) for output in outputs)
    assert count == sum(len(layout.tokenizer.encode(TEXTS[n])) + 1 for n in numbers)


def test_right_wrong_and_no_metadata(conditioned: tuple[Any, Any, PackedDataset, RunConfig]) -> None:
    """Each document by hand: with its own host, with that of the other, with none, with an invented one."""
    system, layout, dataset, config = conditioned
    invented = {"made up": config.data.sources[0].metadata.spelt("made.up.example.com")}
    found = conditioned_losses(system, layout, dataset, rows=3, invented=invented)
    assert set(found.ids) == ids_of(dataset) and set(found.nats) == {"right", "wrong", "none", "made up"}
    for place, id in enumerate(found.ids):
        number = int(id.split("/")[2])
        text = TEXTS[number]
        assert found.tokens[place] == len(layout.tokenizer.encode(text)) + 1
        fronts = {
            "right": f"URL: {HOSTS[number % 2]}\n\n",
            "wrong": f"URL: {HOSTS[1 - number % 2]}\n\n",
            "none": "",
            "made up": "URL: made.up.example.com\n\n",
        }
        for name, front in fronts.items():
            assert found.nats[name][place] == pytest.approx(nats_by_hand(system, layout, front, text), rel=1e-4), name
    with torch.no_grad():
        total = sum(float(system(batch).losses["next_token"]) for batch in one_pass(dataset, layout, 4))
    assert found.nats["right"].sum() == pytest.approx(total, rel=1e-5), "right is what training sees"
    assert found.means()["right"] == pytest.approx(total / found.tokens.sum(), rel=1e-5)


def test_likelihoods_of_texts_behind_metadata(conditioned: tuple[Any, Any, PackedDataset, RunConfig]) -> None:
    """The prompt of metadata alone: log p of a document without its end."""
    system, layout, _, config = conditioned
    metadata = config.data.sources[0].metadata.spelt(HOSTS[0])
    alone = log_likelihoods(system, layout, [(metadata,), ()], [TEXTS[3]] * 2)
    end = layout.tokenizer.id("<|im_end|>")
    for front, found in zip((f"URL: {HOSTS[0]}\n\n", ""), alone, strict=True):
        ids = [layout.tokenizer.id("<s>"), *(layout.tokenizer.encode(front) if front else [])]
        ids = torch.tensor([[*ids, *layout.tokenizer.encode(TEXTS[3])]])
        with ordinary_attention(system.language), torch.no_grad():
            last = system.language(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[end]
        assert -found == pytest.approx(nats_by_hand(system, layout, front, TEXTS[3]) + float(last), rel=1e-4)


def test_a_conditioned_model_is_asked_with_metadata(
    meco: Callable[..., RunConfig], whole: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the cool-down too, whose own sources have none; of a run without any it is said."""
    path = str(whole.config.out)
    metadata = metadata_of(path)
    assert (metadata.prefix, metadata.suffix) == ("URL: ", "\n\n")
    system, layout, _ = mm.load(path, "cpu")
    prompts = [(metadata.spelt("made.up"), Text("Text", loss=False)), (metadata.spelt("made.up"), Text("", loss=False))]
    expected = [generate(system, layout, [prompt], Decoding(5))[0] for prompt in prompts]
    for prompt, answer in zip((["--prompt", "Text"], []), expected, strict=True):
        asked = ["generate", path, "--metadata", "made.up", *prompt, "--max-new-tokens", "5", "--json"]
        assert main(asked) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["answers"][0]["answer"] == answer
    assert main(["generate", path, "--metadata", "https:///page", "--prompt", "Text"]) == 2
    assert "take: host, which leaves nothing of it" in capsys.readouterr().err
    assert main(["generate", path, "--chat", "--metadata", "made.up", "--prompt", "Text"]) == 2
    assert "give --raw with --metadata" in capsys.readouterr().err

    file = meco("plain").out.with_suffix(".yaml")
    values = yaml.safe_load(file.read_text())
    del values["data"]["sources"][0]["metadata"], values["data"]["test"]
    values["train"]["max_steps"], values["stages"] = 2, []
    file.write_text(yaml.safe_dump(values))
    plain = load_config(file)
    run(plain)
    with pytest.raises(ConfigError, match="no document that it was trained on has metadata"):
        metadata_of(plain.out)
    assert main(["generate", str(plain.out), "--metadata", "a.org", "--prompt", "Text"]) == 2
    written = yaml.safe_load((plain.out / "config.yaml").read_text())

    def asked(*sources: dict[str, Any]) -> str:
        """As a run would whose sources have such metadata."""
        written["data"] |= {"root": str(plain.out), "sources": [
            {"kind": "text", "name": str(n), "path": "a", "metadata": one} for n, one in enumerate(sources)
        ]}  # fmt: skip
        (plain.out / "config.yaml").write_text(yaml.safe_dump(written))
        return metadata_of(plain.out).asked("https://a.org/page").text

    (plain.out / "hosts.txt").write_text("b.org\n")
    assert asked({"known": "{root}/hosts.txt"}) == "URL: unknown\n\n"
    assert asked({"fixed": "a topic"}) == "URL: https://a.org/page\n\n", "any text might have been fixed"
    assert asked({"fixed": "a topic"}, {}) == "URL: a.org\n\n"
    with pytest.raises(ConfigError, match=r"metadata of 2 kinds: 'URL: ' hash .*; 'URL: ' host "):
        asked({"take": "hash"}, {})
    with pytest.raises(DataError, match="no document has metadata"):
        conditioned_losses(system, layout, open_splits(plain.data, layout, 0)["train"])


def test_one_metadata_for_all_has_no_wrong_one(
    conditioned: tuple[Any, Any, PackedDataset, RunConfig], tmp_path: Path
) -> None:
    system, layout, _, config = conditioned
    fixed = MetadataConfig(fixed="a.org")
    source = config.data.sources[0].model_copy(update={"metadata": fixed})
    data = config.data.model_copy(update={"sources": [source], "test": [], "cache": tmp_path})
    with pytest.raises(DataError, match="all its documents have the same metadata"):
        conditioned_losses(system, layout, open_splits(data, layout, 0)["train"])


def test_other_metadata_may_be_longer_than_the_row(
    conditioned: tuple[Any, Any, PackedDataset, RunConfig],
) -> None:
    system, layout, dataset, config = conditioned
    long = config.data.sources[0].metadata.spelt("a.very.long.host." * 12)
    assert len(layout.tokenizer.encode(long.text)) > 64
    found = conditioned_losses(system, layout, dataset, invented={"long": long})
    assert np.isfinite(found.nats["long"]).all()


def test_the_published_recipe_in_small_is_a_config(tmp_path: Path) -> None:
    """configs/text_lm/meco.yaml: parts that share nothing, one schedule, plain data in the end."""
    config = load_config(Path(__file__).parents[2] / "configs/text_lm/meco.yaml")
    first, second = config.stage_runs()
    assert config.stages[1].keep_optimizer and first.data.isolate_segments
    assert first.train.max_steps == 9 * second.train.max_steps
    (conditioned,), (plain,), (held_out,) = first.data.sources, second.data.sources, second.data.validation
    assert conditioned.metadata is not None and plain.metadata is None and held_out.metadata is None
    assert [one.part for one in (conditioned, plain, held_out)] == [(0, 0.86), (0.86, 0.98), (0.98, 1)]
    assert len({one.path for one in (conditioned, plain, held_out)}) == 1
