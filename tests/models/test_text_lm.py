"""A language model alone: packed text costs what its documents cost in transformers; an export is the same model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import mm
from mm.cli import main
from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch
from mm.data.loader import one_pass
from mm.data.packed import PackedDataset
from mm.data.prepare import open_splits
from mm.models.backbone import ordinary_attention
from mm.models.released.transformers import SAMPLE, write
from mm.models.systems.text_lm.config import TextLMConfig

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TEXTS = [f"Text {n}.\n\n" + " ".join(f"word {n * k}" for k in range(n % 9 + 1)) for n in range(40)]


def language(kind: str, **settings: Any) -> dict[str, Any]:
    return {"tokenizer": "builtin:emoji", "config": {"model_type": kind, **SMALL, **settings}}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run on 40 short texts, 20 of them held out for the test."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{'train' if number % 2 else 'test'}-{number:02d}.md").write_text(text)
    values = {
        "out": str(tmp_path / "run"),
        "data": {
            **{
                split: [{"kind": "text", "name": split, "path": str(tmp_path / "texts" / f"{name}-*.md")}]
                for split, name in (("sources", "train"), ("validation", "test"), ("test", "test"))
            },
            "context_length": 64,
            "workers": 0,
            "cache": str(tmp_path / "cache"),
        },
        "model": {"kind": "text_lm", "language": language("llama")},
        "train": {"max_steps": 3, "batch_tokens": 256, "micro_batch": 2, "device": "cpu", "async_save": False},
        "evaluation": {"every": 2},
    }
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(values))
    return load_config(tmp_path / "text.yaml")


def batches(config: RunConfig, split: Any) -> list[PackedBatch]:
    layout = config.model.layout()
    dataset: PackedDataset = open_splits(config.data, layout, config.seed)[split]
    return list(one_pass(dataset, layout, 4))


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8}),
        ("mistral", {"head_dim": 8}),
        ("gpt2", NO_DROPOUT),
        ("gpt2", {**NO_DROPOUT, "tie_word_embeddings": False}),
    ],
)
def test_packed_text_costs_what_transformers_says_of_each_document(
    config: RunConfig, kind: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = TextLMConfig.model_validate({"language": language(kind, **settings)})
    system, layout = model.build(), model.layout()
    packed = batches(config, "train")
    assert any(int(batch.segment_ids.max()) > 1 for batch in packed) and not any(batch.media for batch in packed)
    outputs = [system(batch) for batch in packed]
    loss = torch.stack([output.losses["next_token"] for output in outputs]).sum()
    loss.backward()
    found = gradients(system.language)

    documents = [
        [layout.tokenizer.id("<s>"), *layout.tokenizer.encode(text), layout.tokenizer.id("<|im_end|>")]
        for text in TEXTS[1::2]
    ]
    with ordinary_attention(system.language):
        losses = [
            system.language(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)
            for ids in (torch.tensor([document]) for document in documents)
        ]
    expected = torch.stack(losses).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert sum(int(output.counts["next_token"]) for output in outputs) == sum(len(d) - 1 for d in documents)
    rows = torch.cat([output.rows["next_token"] for output in outputs])
    torch.testing.assert_close(rows.sum(), loss.detach(), rtol=1e-5, atol=1e-4)
    right = gradients(system.language)
    assert found.keys() == right.keys() and len(found) == len(list(system.language.parameters()))
    for name, gradient in right.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def logits(language: Any, ids: list[int]) -> Tensor:
    with ordinary_attention(language), torch.no_grad():
        return language(input_ids=torch.tensor([ids]), use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_an_exported_model_is_the_same_model(kind: str, tmp_path: Path) -> None:
    config = TextLMConfig.model_validate({"language": language(kind)})
    system, layout = config.build().eval(), config.layout()
    before = system.language.config.to_dict()
    assert write(system.language, layout, tmp_path / "out") is None
    assert system.language.config.to_dict() == before
    tokenizer, model = (auto.from_pretrained(tmp_path / "out") for auto in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer(SAMPLE)["input_ids"]
    assert ids == [layout.tokenizer.id("<s>"), *layout.tokenizer.encode(SAMPLE)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == SAMPLE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == layout.tokenizer.id("<|im_end|>")
    torch.testing.assert_close(logits(model, ids), logits(system.language, ids), rtol=0, atol=0)


def test_a_model_of_conversations_is_exported_with_their_template(tmp_path: Path) -> None:
    template = {"eos": "<|endoftext|>"}
    config = TextLMConfig.model_validate({"language": language("llama"), "template": template})
    system, layout = config.build().eval(), config.layout()
    write(system.language, layout, tmp_path, form="chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    said = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nHow many?<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")
    ends = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert ends == sorted(map(layout.tokenizer.id, ("<|endoftext|>", "<|im_end|>")))
    assert system.language.generation_config.eos_token_id != ends


def test_a_tokenizer_that_transformers_would_replace_is_said(tmp_path: Path) -> None:
    config = TextLMConfig.model_validate({"language": language("qwen2")})
    layout = config.layout()
    note = write(config.build().language, layout, tmp_path)
    assert note is not None and "Qwen2Tokenizer" in note and "PreTrainedTokenizerFast" in note
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path)(SAMPLE)["input_ids"]
    assert found[1:] == layout.tokenizer.encode(SAMPLE)


def test_train_evaluate_and_export(
    config: RunConfig, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(config.out), tmp_path / "exported"
    assert main(["train", str(tmp_path / "text.yaml")]) == 0
    results = json.loads((config.out / "eval.json").read_text())
    system, *_ = mm.load(run, device="cpu")
    with torch.no_grad():
        outputs = [system(batch) for batch in batches(config, "test")]
    total = sum(float(output.losses["next_token"]) for output in outputs)
    count = sum(int(output.counts["next_token"]) for output in outputs)
    assert results["test_loss"] == pytest.approx(total / count, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(results["test_loss"]))
    assert 0 < results["unigram_loss"] < results["test_loss"]  # three steps teach nothing yet

    assert main(["export", run, "--out", str(out)]) == 0
    ids = AutoTokenizer.from_pretrained(out)(TEXTS[0])["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(model, ids), logits(system.language, ids), rtol=0, atol=0)
    assert {path.name for path in tmp_path.iterdir() if "exported" in path.name} == {"exported"}
    capsys.readouterr()
    assert main(["export", run, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["train", str(tiny()), f"out={tmp_path / 'vlm'}", "train.max_steps=1", "data.test=[]"]) == 0
    assert main(["export", str(tmp_path / "vlm"), "--out", str(tmp_path / "no")]) == 2
    assert "open_qwen2vl" in capsys.readouterr().err and not (tmp_path / "no").exists()
