"""Text runs from end to end: recipes of the published sizes, losses by source against brute force, models that grow."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from ranks import Ranks

import mm
from mm.cli import main
from mm.config import RunConfig, load_config
from mm.data.sources import TextConfig
from mm.evals.perplexity import sources_of
from mm.models import attention, backbone
from mm.train.trainer import Trainer, Unwatched

ROOT = Path(__file__).parents[2]
# Of the published models: https://huggingface.co/MODEL, by their safetensors; of MobileLLM, its table of sizes.
SIZES = {
    "llama_125m": 124_635_456, "llama_350m": 345_355_200, "llama_1b": 1_235_814_400, "llama_8b": 8_030_261_248,
    "qwen_0.5b": 494_032_768, "qwen_8b": 8_190_735_360, "mistral_7b": 7_248_023_552, "gpt2_124m": 124_439_808,
    "smoke_1m": 1_115_008,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_recipes_have_the_published_sizes(name: str) -> None:
    config = load_config(ROOT / "configs/text_lm" / f"{name}.yaml")
    language = config.model.language
    with torch.device("meta"):
        model = backbone.from_config({"vocab_size": 4096, **language.config}, attention.register())
        backbone.scale_residuals(model, name)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]
    train, optimizer = config.train, config.train.optimizer
    assert (optimizer.betas, optimizer.weight_decay, train.clip_norm) == ((0.9, 0.95), 0.1, 1)
    if name != "smoke_1m":
        assert model.config.max_position_embeddings >= config.data.context_length
        assert train.max_steps * train.batch_tokens == pytest.approx(20 * SIZES[name], rel=0.01)


SMALL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two domains, of different lengths."""
    for domain, words in (("numbers", ["one", "zwei", "три"]), ("letters", ["alpha", "b", "ç", "d"])):
        for split, count in (("train", 12), ("held", 5)):
            rows = [" ".join(words[(n + k) % len(words)] for k in range(2 + 3 * n % 11)) for n in range(count)]
            lines = "\n".join(json.dumps({"text": row}) for row in rows)
            (tmp_path / f"{domain}-{split}.jsonl").write_text(lines)
    return tmp_path


@pytest.fixture
def config(files: Path) -> Callable[..., RunConfig]:
    def load(*overrides: str, **sections: Any) -> RunConfig:
        def sources(split: str) -> list[dict[str, Any]]:
            names = ("numbers", "letters")
            return [{"kind": "text", "name": name, "path": str(files / f"{name}-{split}.jsonl")} for name in names]

        values: dict[str, Any] = {
            "out": str(files / "run"),
            "data": {
                "sources": sources("train"), "validation": sources("held"), "test": sources("held"),
                "context_length": 32, "workers": 0, "cache": str(files / "cache"), "too_long": "split",
            },
            "model": {"kind": "text_lm", "language": {"tokenizer": "builtin:emoji", "config": SMALL}},
            "train": {"max_steps": 2, "batch_tokens": 64, "micro_batch": 2, "device": "cpu", "async_save": False},
            "evaluation": {"every": 1},
            **sections,
        }  # fmt: skip
        (files / "run.yaml").write_text(yaml.safe_dump(values))
        return load_config(files / "run.yaml", overrides)

    return load


def by_hand(run: str, file: Path, row: int = 32) -> tuple[float, int, int]:
    """(nats, tokens, bytes) of a file's texts, one document after the other, by transformers' own loss."""
    system, layout, _ = mm.load(run, device="cpu")
    nats, tokens, size = 0.0, 0, 0
    for line in file.read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [layout.tokenizer.id("<s>"), *layout.tokenizer.encode(text), layout.tokenizer.id("<|im_end|>")]
        assert len(ids) <= row
        with backbone.ordinary_attention(system.language), torch.no_grad():
            logits = system.language(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        nats += float(F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="sum"))
        tokens, size = tokens + len(ids) - 1, size + len(text.encode())
    return nats, tokens, size


def test_losses_by_source_are_those_of_each_source_alone(
    config: Callable[..., RunConfig], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(config().out)
    assert main(["train", str(files / "run.yaml")]) == 0
    result = json.loads((files / "run" / "eval.json").read_text())
    last = [json.loads(line) for line in (files / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    hands = {name: by_hand(run, files / f"{name}-held.jsonl") for name in ("numbers", "letters")}
    for name, (nats, tokens, size) in hands.items():
        assert result[f"test_loss/{name}"] == pytest.approx(nats / tokens, rel=1e-5)
        assert last[f"validation_loss/{name}"] == pytest.approx(nats / tokens, rel=1e-5)
        assert result[f"perplexity/{name}"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert result[f"bits_per_byte/{name}"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    nats, tokens, size = (sum(column) for column in zip(*hands.values(), strict=True))
    assert result["test_loss"] == pytest.approx(nats / tokens, rel=1e-5) == last["validation_loss"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)

    capsys.readouterr()
    command = ["eval", run, "--task", f"perplexity={files}/*-held.jsonl", "--out", str(files / "eval")]
    for _ in range(2):  # what is packed is used again
        assert main([*command, "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
        assert found["metrics"]["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
        assert found["metrics"]["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)
        assert (found["n"], found["tokens"]) == (10, tokens)
        for name, (nats_of, tokens_of, _) in hands.items():
            one = found["by"]["file"][f"{name}-held"]
            assert (one["n"], one["loss"]) == (tokens_of, pytest.approx(nats_of / tokens_of, rel=1e-5))
            assert one["bits_per_byte"] == pytest.approx(result[f"bits_per_byte/{name}"], rel=1e-5)
    assert main(command) == 0 and "perplexity" in capsys.readouterr().out
    assert main([*command, "--limit", "3"]) == 2 and "leave out --limit" in capsys.readouterr().err
    assert main(["eval", run, "--task", f"perplexity={files}/numbers-held.jsonl", "--out", str(files / "eval")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def trained(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    return Trainer(load_config(path, overrides), Unwatched()).run()


def test_losses_by_source_are_the_same_on_any_number_of_ranks(
    config: Callable[..., RunConfig], files: Path, ranks: Ranks
) -> None:
    """With batches of two sources on different ranks, and a row of padding where packs do not divide."""
    config()
    settings = ("evaluation.micro_batch=2", "train.optimizer={lr: 1e-3, eps: 1e-6}")
    one = trained(files / "run.yaml", (*settings, f"out={files / 'one'}"))
    two = ranks.run(trained, 2, files / "run.yaml", (*settings, "train.engine={kind: fsdp}", f"out={files / 'two'}"))
    names = [name for name in one if name.startswith(("test_loss", "perplexity", "bits_per_byte"))]
    assert len(names) == 9 and one.keys() == two[0].keys()
    for name in names:
        assert two[0][name] == two[1][name] == pytest.approx(one[name], rel=1e-5), name
    rows = [json.loads((files / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("one", "two")]
    for name in ("validation_loss", "validation_loss/numbers", "validation_loss/letters"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name


def test_files_are_told_apart_up_to_a_number(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.md").write_text("text")
    assert [one.name for one in sources_of(f"{tmp_path}/*/text.md")] == ["a-text", "b-text"]
    for number in range(60):
        (tmp_path / "a" / f"{number}.md").write_text("text")
    assert sources_of(f"{tmp_path}/a/*.md") == [TextConfig(path=f"{tmp_path}/a/*.md", name="all")]


def test_a_stage_that_grows_begins_where_the_small_model_was(config: Callable[..., RunConfig], files: Path) -> None:
    large = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    stages = [
        {"name": "small", "train": {"max_steps": 2, "optimizer": {"lr": 1e-2}}},
        {
            "name": "large",
            "convert": "mm.models.growth:grow",
            "model": {"language": {"config": large}},
            "train": {"max_steps": 1, "optimizer": {"lr": 1e-12}},
        },
    ]
    config(stages=stages)
    assert main(["train", str(files / "run.yaml")]) == 0
    rows = [json.loads(line) for line in (files / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["validation_loss"] == pytest.approx(rows[1]["validation_loss"], rel=1e-5)
    assert rows[1]["validation_loss"] < rows[0]["validation_loss"]
    parts = json.loads((files / "run" / "run.json").read_text())["parameters"]
    assert parts["language"]["total"] > 2 * 4096 * 32


@pytest.mark.parametrize("name", ["grown", "tiny", "smoke_1m"])
def test_small_recipes_build(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/text_lm" / f"{name}.yaml", ["model.language.tokenizer=builtin:emoji"])
    for run in config.stage_runs():
        system = run.model.build()
        assert 1e6 < sum(parameter.numel() for parameter in system.parameters()) < 5e6
