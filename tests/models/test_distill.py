"""Distillation: distances and gradients from their definition, an ensemble's geometric mean, chunks, and whole runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from ranks import Ranks
from torch import nn

from mm.cli import main
from mm.config import load_config
from mm.data.loader import one_pass
from mm.data.prepare import open_splits, skipped
from mm.errors import ConfigError
from mm.evals.ensemble import ensemble, write_table
from mm.fit import points_of
from mm.hub import ReleaseConfig, export, load
from mm.models.distill import distillation_losses, ensemble_log_probs, head_distillation_losses
from mm.train.estimate import estimate
from mm.train.trainer import Trainer, Unwatched

V = 37
LANGUAGE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


def test_distance_is_the_divergence_of_softened_distributions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, V, requires_grad=True)
    teacher, T = 2 * torch.randn(5, V), 1.7
    losses = distillation_losses(logits, [teacher], T)
    p, q = (teacher / T).softmax(1), (logits / T).softmax(1)
    torch.testing.assert_close(losses, T**2 * (p * (p / q).log()).sum(1))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient, T * (q - p).detach())
    assert distillation_losses(teacher, [teacher], T).abs().max() < 1e-5


def test_an_ensemble_is_the_geometric_mean() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(4, V) for _ in range(3)]
    product = torch.stack([one.softmax(1) for one in logits]).prod(0) ** (1 / 3)
    torch.testing.assert_close(ensemble_log_probs(logits).exp(), product / product.sum(1, keepdim=True))


@pytest.mark.parametrize("padded", [V, V + 5], ids=["same", "longer-head"])
def test_chunks_give_losses_and_gradients_of_whole_logits(padded: int) -> None:
    torch.manual_seed(0)
    head, others = nn.Linear(24, V), [nn.Linear(16, padded, bias=False), nn.Linear(8, V)]
    hidden = torch.randn(700, 24, requires_grad=True)  # three chunks
    seen = [torch.randn(700, 16), torch.randn(700, 8)]
    theirs = list(zip(seen, others, (1.0, 0.5), strict=True))
    losses = head_distillation_losses(hidden, head, 2.0, theirs, 1.3)
    said = [others[0](seen[0])[:, :V], others[1](seen[1]) * 0.5]
    whole = distillation_losses(head(hidden) * 2, said, 1.3)
    torch.testing.assert_close(losses, whole)
    inputs = (hidden, head.weight, head.bias)
    scale = torch.linspace(-1, 1, 700)
    found = torch.autograd.grad((losses * scale).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((whole * scale).sum(), inputs), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for other in others for parameter in other.parameters())


def text(cache: Path, **changes: Any) -> dict[str, Any]:
    source = [{"kind": "text", "path": str(Path(__file__).parents[2] / "CONTRIBUTING.md")}]
    return {
        "data": {
            "sources": source, "validation": source, "test": source, "context_length": 128, "too_long": "split",
            "workers": 0, "cache": str(cache),
        },
        "model": {"kind": "text_lm", "language": {"tokenizer": "builtin:emoji", "config": LANGUAGE}},
        "train": {
            "max_steps": 30, "batch_tokens": 512, "micro_batch": 4, "device": "cpu",
            "optimizer": {"kind": "adamw", "lr": 1e-2}, "schedule": {"kind": "constant", "warmup": 0}, "save_every": 4,
        },
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[Path]:
    """Runs of two seeds, and what they export."""
    folder, found = tmp_path_factory.mktemp("members"), []
    for seed in (0, 1):
        (folder / f"{seed}.yaml").write_text(
            json.dumps({**text(cache), "seed": seed, "out": str(folder / f"run-{seed}")})
        )
        Trainer(load_config(folder / f"{seed}.yaml"), Unwatched()).run()
        export(folder / f"run-{seed}", folder / f"exported-{seed}")
        found.append(folder / f"run-{seed}")
    return found


def distilled(members: list[Path], **more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    teachers = [str(run.parent / run.name.replace("run", "exported")) for run in members]

    def change(values: dict[str, Any]) -> dict[str, Any]:
        values["model"] = {**values["model"], "distill": {"teachers": teachers, **more}}
        return values

    return change


def test_an_ensemble_of_runs_is_better_and_equals_its_definition(members: list[Path], tmp_path: Path) -> None:
    found = ensemble(members, "test", "cpu")
    system, layout, config = load(members[0], "cpu")
    other, _, _ = load(members[1], "cpu")
    alone, both, probabilities, tokens = 0.0, 0.0, 0.0, 0
    for batch in one_pass(open_splits(config.data, layout, 0)["test"], layout, 2):
        keep = batch.learned()
        targets = batch.labels.flatten()[keep]
        with torch.no_grad():
            logits = [one.logits(batch, keep) for one in (system, other)]
        alone += float(F.cross_entropy(logits[0], targets, reduction="sum"))
        both += float(F.nll_loss(ensemble_log_probs(logits), targets, reduction="sum"))
        mean = torch.stack([one.softmax(1) for one in logits]).mean(0)
        probabilities += float(F.nll_loss(mean.log(), targets, reduction="sum"))
        tokens += len(keep)
    assert found["tokens"] == tokens
    assert found["members"][0][1] == pytest.approx(alone / tokens, rel=1e-5)
    one, two = found["sizes"]
    assert one["loss"] == pytest.approx(sum(loss for _, loss in found["members"]) / 2)
    assert two["loss"] == pytest.approx(both / tokens, rel=1e-5)
    assert two["probabilities"] == pytest.approx(probabilities / tokens, rel=1e-5)
    assert two["loss"] < one["loss"]
    write_table(tmp_path / "k.csv", found)
    assert points_of([tmp_path / "k.csv"], "K", "loss")[1][1:] == (2.0, pytest.approx(two["loss"]))


def test_documents_that_a_run_leaves_out_are_asked_of_no_ensemble(members: list[Path], tmp_path: Path) -> None:
    system, layout, config = load(members[0], "cpu")
    dataset = open_splits(config.data, layout, 0)["test"]
    (tmp_path / "skip.txt").write_text(dataset.text(0).segments[0].id + "\n")
    data = config.data.model_copy(update={"skip_ids": tmp_path / "skip.txt"})
    dataset.drop(skipped(data))
    batches = list(one_pass(dataset, layout, 2))
    with torch.no_grad():
        loss = sum(float(system.token_losses(batch).sum()) for batch in batches)
    copies = [tmp_path / run.name for run in members]
    for run, copy in zip(members, copies, strict=True):
        shutil.copytree(run, copy)
        values = yaml.safe_load((copy / "config.yaml").read_text())
        values["data"]["skip_ids"] = str(tmp_path / "skip.txt")
        (copy / "config.yaml").write_text(yaml.safe_dump(values))
    found = ensemble(copies, "test", "cpu")
    assert found["tokens"] == sum(batch.targets for batch in batches) < ensemble(members, "test", "cpu")["tokens"]
    assert found["members"][0][1] == pytest.approx(loss / found["tokens"], rel=1e-5)


def test_ensembles_refuse_what_is_none(
    members: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, layout, _ = load(members[0], "cpu")
    with pytest.raises(ConfigError, match="at least 2"):
        ensemble(members[:1])

    def run(name: str, model: dict[str, Any], test: bool = True) -> Path:
        values = {**text(cache), "model": model, "out": str(tmp_path / name)}
        values["train"]["max_steps"], values["train"]["save_every"] = 1, 1
        if not test:
            del values["data"]["test"]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        Trainer(load_config(tmp_path / f"{name}.yaml"), Unwatched()).run()
        return tmp_path / name

    model = text(cache)["model"]
    other = {**model, "language": {**model["language"], "added_tokens": ["<more>"]}}
    with pytest.raises(ConfigError, match=r"other: reads its data otherwise than .*run-0 \(tokenizer"):
        ensemble([members[0], run("other", other)], device="cpu")
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    template = {"bos": "<s>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    masked = {"kind": "masked_lm", "language": {"tokenizer": "builtin:emoji", "config": bert}, "template": template}
    with pytest.raises(ConfigError, match="masked: writes no text"):
        ensemble([members[0], run("masked", masked)], device="cpu")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="a published model has no data; name a run"):
        patch.setattr("mm.evals.ensemble.load", lambda *args: (system, layout, ReleaseConfig(None, None)))
        ensemble([members[0], members[1]], device="cpu")
    with pytest.raises(ConfigError, match=r"untested: its data have no test split; they have train, validation"):
        ensemble([run("untested", model, test=False), members[0]], device="cpu")


def test_teachers_with_other_tokens_or_too_few_positions_are_refused(
    members: list[Path], cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(members[0].parent / "exported-0", folder)

    def refused(words: str, **changes: Any) -> None:
        values = text(cache, out=str(tmp_path / "student"))
        values["model"]["distill"] = {"teachers": [str(folder)]}
        values["data"] |= changes
        (tmp_path / "student.yaml").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=words):
            estimate(load_config(tmp_path / "student.yaml"))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    refused("teacher: has 64 positions, rows have 128 tokens")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    a, b = list(tokens["model"]["vocab"])[300:302]
    tokens["model"]["vocab"] |= {a: tokens["model"]["vocab"][b], b: tokens["model"]["vocab"][a]}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    refused("2 of its 4,0.. tokens have no such id in builtin:emoji")
    (folder / "tokenizer.json").unlink()
    refused("teacher: nothing says what its tokens are")


def trained(path: Path, overrides: tuple[str, ...]) -> None:
    Trainer(load_config(path, overrides), Unwatched()).run()


def test_a_student_on_two_ranks_is_that_of_one_process(
    members: list[Path], cache: Path, tmp_path: Path, ranks: Ranks
) -> None:
    values = distilled(members[:1])(text(cache))
    del values["data"]["validation"], values["data"]["test"]
    values["train"] |= {"max_steps": 2, "optimizer": {"kind": "adamw", "lr": 1e-2, "eps": 1e-6}, "micro_batch": 2}
    (tmp_path / "student.yaml").write_text(json.dumps(values))
    trained(tmp_path / "student.yaml", (f"out={tmp_path / 'one'}",))
    overrides = ("train.engine={kind: fsdp}", f"out={tmp_path / 'two'}")
    ranks.run(trained, 2, tmp_path / "student.yaml", overrides)
    losses = [
        [(row["loss/distill"], row["loss/next_token"]) for row in map(json.loads, lines)]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    ]
    assert losses[1] == [pytest.approx(pair, rel=1e-5) for pair in losses[0]] and len(losses[0]) == 2
    one, two = (load(tmp_path / name, "cpu")[0].state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_student_learns_from_its_teachers(members: list[Path], cache: Path, tmp_path: Path) -> None:
    values = distilled(members, weight=1.0)(text(cache))
    (tmp_path / "student.yaml").write_text(json.dumps({**values, "seed": 7, "out": str(tmp_path / "student")}))
    config = load_config(tmp_path / "student.yaml")
    Trainer(config, Unwatched()).run()
    rows = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    first, last = rows[0]["loss/distill"], rows[-1]["loss/distill"]
    assert last < 0.5 * first
    system, _, _ = load(tmp_path / "student", "cpu")
    assert not [name for name, _ in system.named_parameters() if "teacher" in name]
    exported = members[0].parent / "exported-0"
    exported.rename(exported.with_name("away"))  # who only asks the student needs no teacher
    try:
        asked = ["eval", str(tmp_path / "student"), "--task", "perplexity=README.md", "--out", str(tmp_path / "asked")]
        assert main(asked) == 0
    finally:
        exported.with_name("away").rename(exported)
    traced = estimate(config)
    assert traced["flops_per_step"]["total"] > 0


def test_a_resumed_student_is_the_same(members: list[Path], cache: Path, tmp_path: Path) -> None:
    values = distilled(members)(text(cache))
    for name in ("whole", "halves"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**values, "out": str(tmp_path / name)}))
    Trainer(load_config(tmp_path / "whole.yaml", ["train.max_steps=8"]), Unwatched()).run()
    Trainer(load_config(tmp_path / "halves.yaml", ["train.max_steps=4"]), Unwatched()).run()
    Trainer(load_config(tmp_path / "halves.yaml", ["train.max_steps=8"]), Unwatched()).run(resume=True)
    whole, halves = (load(tmp_path / name, "cpu")[0].state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
