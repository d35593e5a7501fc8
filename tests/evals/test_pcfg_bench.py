"""The bench of known grammars: losses, states and samples are those of single documents; a model that was trained for a
moment lies between chance and the optimum."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("sklearn")

from mm import hub
from mm.cli import main
from mm.data.corpora.build import build_corpus
from mm.data.corpora.grammar import NOTHING, OTHER, Grammar, losses, predicted, targets_of
from mm.data.corpora.pcfg import TERMINALS, metadata, read_split
from mm.data.sample import Text
from mm.errors import ConfigError
from mm.evals import pcfg
from mm.evals.pcfg import Documents, Reader
from mm.models import backbone
from mm.models.generate import log_likelihoods

OPTIONS = {"count": 4000, "depth": 2, "symbols": 3, "seed": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "pcfg"
    build_corpus("pcfg", folder, OPTIONS)
    return folder


def train(corpus: Path, folder: Path, *overrides: str) -> Path:
    source = {"kind": "text", "path": str(corpus / "train-*.jsonl.gz"), "prompt": "{metadata_2}"}
    held_out = {**source, "path": str(corpus / "validation-*.jsonl.gz")}
    config = {
        "out": str(folder / "run"),
        "data": {
            "sources": [source], "validation": [held_out], "context_length": 128, "workers": 0,
            "cache": str(folder / "cache"),
        },
        "model": {
            "kind": "text_lm",
            "language": {
                "tokenizer": str(corpus),
                "config": {
                    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
                    "initializer_range": 0.1,
                },
            },
            "template": {"bos": None, "eos": "<eos>", "pad": "<pad>"},
        },
        "train": {
            "max_steps": 80, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu", "save_every": 80,
            "optimizer": {"kind": "adamw", "lr": 1e-2},
        },
        "evaluation": {"every": 80},
    }  # fmt: skip
    (folder / "pcfg.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "pcfg.yaml"), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(corpus, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loaded(corpus: Path, trained: Path) -> tuple[Any, Any, Reader, Grammar, Documents]:
    """System, layout, reader, grammar and the test split."""
    system, layout, _ = hub.load(trained, "cpu")
    grammar = Grammar.read(corpus / "grammar.json")
    return (
        system,
        layout,
        Reader(system, layout, corpus, grammar, "run"),
        grammar,
        Documents(*read_split(corpus, "test")),
    )


def test_losses_are_those_of_single_documents(loaded: tuple[Any, Any, Reader, Grammar, Documents]) -> None:
    system, layout, reader, _, documents = loaded
    some = documents[:40]
    for told in (0, 1, 2):
        found = reader.losses(some, told)
        lengths = some.lengths
        prompts = [(Text(metadata(latents, told), loss=False),) for latents in some.latents.tolist()]
        texts = [" ".join(TERMINALS[token] for token in row if token != NOTHING) for row in some.strings.tolist()]
        expected = -np.array(log_likelihoods(system, layout, prompts, texts))
        end = found[np.arange(40), lengths]
        np.testing.assert_allclose(found.sum(1) - end, expected, rtol=1e-5)
        assert (end > 0).all() and not found[np.arange(found.shape[1]) > lengths[:, None]].any()


def test_losses_of_a_split_are_those_of_the_trainer(
    loaded: tuple[Any, Any, Reader, Grammar, Documents], trained: Path, corpus: Path
) -> None:
    _, _, reader, _, _ = loaded
    documents = Documents(*read_split(corpus, "validation"))
    with gzip.open(corpus / "validation-000000.jsonl.gz", "rt") as file:
        conditioned = np.array([json.loads(line)["conditioned"] for line in file])
    losses = np.where(conditioned, reader.losses(documents, 2).sum(1), reader.losses(documents, 0).sum(1))
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert losses.sum() / (documents.lengths + 1).sum() == pytest.approx(last["validation_loss"], rel=1e-5)


def test_states_are_those_of_single_documents(loaded: tuple[Any, Any, Reader, Grammar, Documents]) -> None:
    system, layout, reader, _, documents = loaded
    states = reader.states(documents)
    assert len(states) == 3 and states[0].shape == (len(documents), documents.strings.shape[1] + 1, 32)
    for b in (0, 7):
        words = ["<mask>"] * 2 + [TERMINALS[token] for token in documents.strings[b].tolist() if token != NOTHING]
        with torch.no_grad(), backbone.ordinary_attention(system.language):
            hidden = system.language(
                input_ids=torch.tensor([[layout.tokenizer.id(word) for word in words]]), output_hidden_states=True
            ).hidden_states
        for ours, theirs in zip(states, hidden, strict=True):
            np.testing.assert_allclose(ours[b, : len(words) - 1], theirs[0, 1:].numpy(), atol=1e-5)


def test_samples_come_as_often_as_the_model_says(loaded: tuple[Any, Any, Reader, Grammar, Documents]) -> None:
    _, _, reader, grammar, documents = loaded
    count = 2000
    one = documents[documents.lengths >= 3][:1]
    prefixes = Documents(np.repeat(one.strings[:, :3], count, 0), np.repeat(one.latents, count, 0))
    written = reader.go_on(prefixes, 2, seed=3)
    assert written.shape == (count, grammar.longest + 1) and (written[:, :3] == prefixes.strings).all()
    assert (written == reader.go_on(prefixes, 2, seed=3)).all() and (written != reader.go_on(prefixes, 2, seed=4)).any()
    for token in range(grammar.symbols):
        longer = Documents(np.concatenate([one.strings[:, :3], [[token]]], 1), one.latents)
        probability = np.exp(-reader.losses(longer, 2)[0, 3])
        assert abs((written[:, 3] == token).mean() - probability) < 4 * np.sqrt(probability / count)
    behind = np.maximum.accumulate(written == NOTHING, 1)
    assert (written[behind] == NOTHING).all() and set(np.unique(written)) <= {OTHER, NOTHING, 0, 1, 2}


def test_the_ideal_reader_is_the_exact_one(loaded: tuple[Any, Any, Reader, Grammar, Documents]) -> None:
    _, _, _, grammar, documents = loaded
    ideal, sure = pcfg.bayes(grammar, documents, [0, 2])
    joint, targets = grammar.next_tokens(documents.strings), targets_of(documents.strings, grammar.symbols)
    for told, found in ideal.items():
        np.testing.assert_allclose(found, losses(predicted(joint, grammar.allowed(documents.latents, told)), targets))
    inside = np.arange(sure.shape[1]) <= documents.lengths[:, None]
    assert (sure[:, 0] == 0.5).all() and (sure[inside] >= 0.5).all() and (sure[inside] <= 1 + 1e-12).all()
    assert sure[np.arange(len(documents)), documents.lengths].mean() > sure[:, 1].mean()


def test_a_moment_of_training_lies_between_chance_and_the_optimum(
    trained: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["pcfg", str(trained), "--data", str(corpus), "--out", str(tmp_path / "out"), "--samples", "100", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["told"] == 2 and [one["told"] for one in found["loss"]] == [0, 2]
    free, told = found["loss"]
    for one in (free, told):
        assert one["bayes"] - 0.02 < one["model"] < one["bayes"] + 0.5 * (np.log(4) - one["bayes"])
        assert len(one["model_by_position"]) == len(one["bayes_by_position"]) == len(found["reached"])
    assert told["bayes"] < free["bayes"]
    accuracy, ideal = np.array(found["probes"]["accuracy"]), np.array(found["probes"]["bayes"])
    assert accuracy.shape == (3, *ideal.shape) and ideal.shape[1] == 2
    assert (abs(accuracy[:, 0] - 0.5) < 0.15).all()  # nothing is known yet
    assert (accuracy < ideal + 0.12).all() and accuracy[1:, -1].max() > 0.6
    for one in found["grammatical"]:
        assert one["prompts"][0] == 0 and min(one["documents"]) >= pcfg.FEW
        assert all(own <= whole for own, whole in zip(one["own"], one["any"], strict=True))
    assert np.allclose(found["grammatical"][1]["bayes"], 1)  # all latents told: every sample is of that grammar
    assert found["grammatical"][0]["bayes"][0] < 0.9
    page = (tmp_path / "out/pcfg.html").read_text()
    assert page.count('<svg class="chart"') == 2 + 2 + 2 and page.count("</html>") == 1
    kept = json.loads((tmp_path / "out/pcfg.json").read_text())
    assert kept == {key: value for key, value in found.items() if key != "folder"}
    assert main([*asked[:-1], "--told", "0"]) == 0
    assert "loss, nothing told: " in capsys.readouterr().out
    again = json.loads((tmp_path / "out/pcfg.json").read_text())
    for name in ("loss", "grammatical"):
        assert again[name] == kept[name][:1]
    assert again["probes"] == kept["probes"]


def test_what_was_told_is_read_from_all_stages_and_from_packed_sets(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    assert pcfg._trained_with(str(trained), 2) == 2
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    sources = values["data"]["sources"]
    plain = [{**sources[0], "prompt": ""}]
    stages = [{"name": "told", "data": {"sources": sources}}, {"name": "plain"}]
    alone = {**values, "data": {**values["data"], "sources": plain}}
    (run / "config.yaml").write_text(yaml.safe_dump({**alone, "stages": stages}))
    assert pcfg._trained_with(str(run), 2) == 2
    assert main(["pack", str(trained.parent / "pcfg.yaml"), "--out", str(tmp_path / "packed")]) == 0
    packed = {**values["data"], "sources": [], "validation": [], "packed": str(tmp_path / "packed")}
    (run / "config.yaml").write_text(yaml.safe_dump({**values, "data": packed}))
    assert pcfg._trained_with(str(run), 2) == 2
    (run / "config.yaml").write_text(yaml.safe_dump(alone))
    with pytest.raises(ConfigError, match="nothing says how many latents it was told"):
        pcfg._trained_with(str(run), 2)


def test_what_does_not_fit_is_one_line(
    trained: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_corpus("pcfg", tmp_path / "other", {**OPTIONS, "symbols": 4, "count": 1000})
    build_corpus("pcfg", tmp_path / "small", {**OPTIONS, "count": 60})
    for data, more, text in (
        (tmp_path / "other", (), "its tokenizer is not that of"),
        (tmp_path / "small", (), "under 50 documents"),
        (tmp_path / "nothing", (), "grammar.json: not the grammar"),
        (corpus, ("--told", "3"), "have 2 latents; expected 0 to that"),
        (corpus, ("--out", str(corpus / "out")), "lies within"),
    ):
        assert main(["pcfg", str(trained), "--data", str(data), *more]) == 2
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1, said
