"""Backbones: every causal LM with standard attention packs; one that would leak is refused by name."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.batch import IGNORE, PackedBatch
from mm.errors import ConfigError
from mm.models import attention, backbone

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
GOOD: dict[str, dict[str, Any]] = {
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "head_dim": 8},
    "olmo2": LLAMA_LIKE,
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "granite": LLAMA_LIKE,
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
}
LEAKS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},  # ALiBi over the whole row
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4},  # recurrent
    "gpt_oss": {**LLAMA_LIKE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},  # attention sinks
}


def make(kind: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return backbone.from_config({"model_type": kind, **values}, attention.register())


@pytest.mark.parametrize("kind", GOOD)
def test_packed_equals_apart_in_logits_and_gradients(kind: str) -> None:
    """Against transformers' own attention on each segment alone."""
    model = make(kind, GOOD[kind]).eval()
    backbone.probe(model, kind)
    embeddings, ids, positions = rows(6, 3, 8, width=model.get_input_embeddings().embedding_dim)
    spans = [(0, 6), (6, 9), (9, 17)]
    keep = torch.arange(17)
    packed = backbone.run(model, embeddings, ids, positions, keep, isolate=True)
    packed.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with backbone.ordinary_attention(model):
        alone = [model(inputs_embeds=embeddings[:, a:b], use_cache=False).logits[0] for a, b in spans]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.cat(alone).square().sum().backward()
    assert grads
    for name, parameter in model.named_parameters():
        if name in grads:
            scale = float(grads[name].abs().max())
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5 * max(scale, 1), msg=name)


def rows(*lengths: int, row: int = 20, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings [1, row, width] of segments so long, with their segment and position ids."""
    ids = torch.zeros(1, row, dtype=torch.int32)
    positions = torch.zeros(1, row, dtype=torch.int64)
    start = 0
    for number, n in enumerate(lengths, 1):
        ids[0, start : start + n], positions[0, start : start + n] = number, torch.arange(n)
        start += n
    return torch.randn(1, row, width), ids, positions


# What models do with their head's output: nothing, scale it, or more than that.
HEADS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    **{kind: (kind, values, 1.0) for kind, values in GOOD.items()},
    "phi, with a bias": ("phi", LLAMA_LIKE, 1.0),
    "tied": ("qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}, 1.0),
    "scaled granite": ("granite", {**LLAMA_LIKE, "logits_scaling": 7.0}, 1 / 7),
    "scaled cohere": ("cohere", {**LLAMA_LIKE, "logit_scale": 0.0625, "pad_token_id": 0}, 0.0625),
    "gemma2, capped": (
        "gemma2", {**LLAMA_LIKE, "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 30.0}, None
    ),
}  # fmt: skip


def batch_of(segment_ids: Tensor, position_ids: Tensor, labels: Tensor) -> PackedBatch:
    nothing = torch.zeros_like(labels)
    return PackedBatch(nothing, labels, segment_ids, position_ids, nothing.byte(), {}, [])


@pytest.mark.parametrize("name", HEADS)
def test_losses_without_whole_logits_equal_those_of_the_models_own(name: str) -> None:
    kind, values, factor = HEADS[name]
    model = make(kind, values).eval()
    model.logit_factor = backbone.probe(model, kind)
    assert model.logit_factor == (factor if factor is None else pytest.approx(factor, rel=1e-5))
    torch.nn.init.normal_(model.get_output_embeddings().weight)  # logits of some size
    embeddings, ids, positions = rows(6, 3, 8)
    labels = torch.where(torch.rand(1, 20) < 0.6, torch.randint(50, (1, 20)), IGNORE)
    keep = (labels[0] != IGNORE).nonzero()[:, 0]
    outcomes = []
    for way in ("chunks", "whole"):
        if way == "chunks":
            losses = backbone.token_losses(model, embeddings, batch_of(ids, positions, labels))
        else:
            logits = backbone.run(model, embeddings, ids, positions, keep, isolate=True)
            losses = F.cross_entropy(logits, labels[0, keep], reduction="none")
        model.zero_grad()
        losses.sum().backward()
        outcomes.append((losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (losses, grads), (expected, right) = outcomes
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == right.keys() and grads
    for parameter in grads:
        scale = max(1.0, float(right[parameter].abs().max()))
        torch.testing.assert_close(grads[parameter], right[parameter], rtol=1e-3, atol=1e-5 * scale, msg=parameter)
    assert "forward" not in vars(model.get_output_embeddings())  # the head is a head again


def test_weights_that_are_there_only_in_the_heads_call_are_enough() -> None:
    """As DeepSpeed's ZeRO-3 has it: hooks around a module's call fetch its weights and take them away again."""
    model = make("qwen2", {**LLAMA_LIKE, "tie_word_embeddings": False})
    model.logit_factor = backbone.probe(model, "qwen2")
    embeddings, ids, positions = rows(6, 3, 8)
    labels = torch.randint(50, (1, 20))

    def losses() -> Tensor:
        return backbone.token_losses(model, embeddings, batch_of(ids, positions, labels))

    expected = losses()
    expected.sum().backward()
    head = model.get_output_embeddings()
    whole, gradient = head.weight.data, head.weight.grad.clone()
    model.zero_grad()

    def fetch(*_: Any) -> None:
        head.weight.data = whole

    def free(*_: Any) -> None:
        head.weight.data = torch.empty(0)

    free()
    head.register_forward_pre_hook(fetch)
    head.register_forward_hook(free)
    found = losses()
    assert head.weight.numel() == 0
    fetch()  # hooks on the outputs do so in the backward pass
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(head.weight.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LEAKS)
def test_a_model_that_would_leak_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"model.language {kind}: "):
        backbone.probe(make(kind, LEAKS[kind]), kind)


def test_probe_does_not_touch_the_global_rng() -> None:
    model = make("qwen2", GOOD["qwen2"])
    before = torch.get_rng_state()
    backbone.probe(model, "qwen2")
    assert torch.equal(before, torch.get_rng_state())


def test_segments_longer_than_a_sliding_window_are_refused() -> None:
    model = make("mistral", {**GOOD["mistral"], "sliding_window": 4}).eval()
    embeddings = torch.randn(1, 12, 32)
    short = torch.tensor([[1] * 4 + [2] * 4 + [0] * 4])
    positions = torch.arange(12)[None] % 4
    backbone.run(model, embeddings, short, positions, torch.arange(8), isolate=True)
    with pytest.raises(ValueError, match="longer than the sliding window of 4"):
        backbone.run(model, embeddings, torch.ones(1, 12).int(), positions, torch.arange(8), isolate=True)


def test_checkpointed_layers_recompute_with_the_same_scope() -> None:
    model = make("llama", GOOD["llama"]).train()
    ids = torch.tensor([[1] * 5 + [2] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    embeddings = torch.randn(1, 12, 32, requires_grad=True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits = backbone.run(model, embeddings, ids, positions, torch.arange(12), isolate=True)
        grads.append(torch.autograd.grad(logits.square().sum(), embeddings)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_unknown_model_type_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model\.language\.config: .*nosuch"):
        backbone.from_config({"model_type": "nosuch"}, attention.register())
