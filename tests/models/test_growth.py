"""A wider model computes what the narrow one did, in float64; a deeper one has copies of its layers."""

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import CheckpointError
from mm.models import attention, backbone
from mm.models.growth import grow, grow_evenly, layer_sources
from mm.models.system import System
from mm.train.stages import take_over

LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 24, "vocab_size": 50,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 32}
WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "n_embd", "n_head")


class Alone(System):
    """As the trainer has it: a system with a language model."""

    def __init__(self, kind: str, values: dict[str, Any], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.language = backbone.from_config({"model_type": kind, **values}, attention.register()).double().eval()
        for parameter in self.language.parameters():  # biases and norms say something, too
            nn.init.normal_(parameter, std=0.3)
        for part in self.language.modules():
            if hasattr(part, "variance_epsilon"):  # transformers' own goes through float32
                part.forward = partial(_rms_norm, part)

    def logits(self, ids: Tensor) -> Tensor:
        with backbone.ordinary_attention(self.language):
            found: Tensor = self.language(input_ids=ids, use_cache=False).logits
        return found


def _rms_norm(part: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, part.weight.shape, part.weight, part.variance_epsilon)


def wider(values: dict[str, Any], times: int) -> dict[str, Any]:
    return {key: value * times if key in WIDTHS else value for key, value in values.items()}


def parameters(system: System) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in system.named_parameters()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "tied llama": ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", {key: value for key, value in LLAMA.items() if key != "head_dim"}),
    "qwen3": ("qwen3", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "untied gpt2": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("how", [grow, grow_evenly])
@pytest.mark.parametrize("case", CASES)
def test_a_wider_model_computes_the_same(case: str, how: Any, times: int) -> None:
    kind, values = CASES[case]
    small, large = Alone(kind, values), Alone(kind, wider(values, times), seed=1)
    ids = torch.randint(50, (3, 20))
    expected = small.logits(ids)
    path = f"mm.models.growth:{how.__name__}"
    assert take_over(large, parameters(small), path, "small") == []
    torch.testing.assert_close(large.logits(ids), expected, rtol=1e-11, atol=1e-11)
    heads = (large.language.get_output_embeddings().weight, large.language.get_input_embeddings().weight)
    assert (heads[0] is heads[1]) == (("untied" not in case and kind == "gpt2") or case == "tied llama")


def test_widths_may_grow_by_themselves_and_heads_come_untied() -> None:
    small = Alone("llama", {**LLAMA, "tie_word_embeddings": True})
    ids = torch.randint(50, (3, 20))
    for values in (
        {"intermediate_size": 72},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"hidden_size": 32, "tie_word_embeddings": False},
    ):
        large = Alone("llama", {**LLAMA, "tie_word_embeddings": True, **values}, seed=1)
        assert take_over(large, parameters(small), "mm.models.growth:grow", "small") == []
        torch.testing.assert_close(large.logits(ids), small.logits(ids), rtol=1e-11, atol=1e-11)


def test_copies_stay_equal_only_where_shares_are() -> None:
    kind, values = CASES["llama"]
    ids = torch.randint(50, (3, 20))
    equal = {}
    for how in (grow, grow_evenly):
        large = Alone(kind, wider(values, 2))
        take_over(large, parameters(Alone(kind, values)), f"mm.models.growth:{how.__name__}", "small")
        large.logits(ids).log_softmax(-1)[..., 0].sum().backward()
        gate = large.language.model.layers[0].mlp.gate_proj.weight
        assert torch.equal(*gate.detach().chunk(2)) == (how is grow_evenly)
        one, other = gate.grad.chunk(2)
        equal[how] = torch.allclose(one, other, rtol=1e-9, atol=1e-12 * float(one.abs().max()))
    assert equal == {grow: False, grow_evenly: True}


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [2, 3, 4, 5])
def test_a_deeper_model_has_the_layers_stacked(case: str, layers: int) -> None:
    kind, values = CASES[case]
    small = Alone(kind, values)
    large = Alone(kind, {**values, "n_layer" if kind == "gpt2" else "num_hidden_layers": layers}, seed=1)
    assert take_over(large, parameters(small), "mm.models.growth:grow", "small") == []
    origin = {2: [0, 1], 3: [0, 1, 1], 4: [0, 1, 0, 1], 5: [0, 1, 0, 1, 1]}[layers]
    assert layer_sources(2, layers) == origin and layer_sources(4, 6) == [0, 1, 2, 3, 2, 3]
    given = parameters(small)
    for name, tensor in parameters(large).items():
        source = re.sub(r"(layers|h)\.(\d+)", lambda found: f"{found[1]}.{origin[int(found[2])]}", name)
        assert torch.equal(tensor, given[source]), name


def test_both_at_once_is_the_stack_made_wider() -> None:
    kind, values = CASES["llama"]
    small, deep = Alone(kind, values), Alone(kind, {**values, "num_hidden_layers": 3})
    large = Alone(kind, wider({**values, "num_hidden_layers": 3}, 2))
    ids = torch.randint(50, (3, 20))
    take_over(deep, parameters(small), "mm.models.growth:grow", "small")
    take_over(large, parameters(small), "mm.models.growth:grow", "small")
    torch.testing.assert_close(large.logits(ids), deep.logits(ids), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 24}, "24 is no multiple of 16"),
        ({"hidden_size": 64, "head_dim": 16}, "no whole heads of 16, and heads stay as large"),
        ({"vocab_size": 100}, "the vocabulary, and the positions, must be the same"),
        ({"num_attention_heads": 8}, "2 times the heads of queries and 1 times those of keys"),
        ({"num_hidden_layers": 1}, "from 2 layers to 1"),
        ({"tie_word_embeddings": True}, "set tie_word_embeddings: false"),
        ({"attention_bias": True}, "the smaller model has no language.model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_what_cannot_be_grown_is_said(change: dict[str, Any], words: str) -> None:
    kind, values = CASES["llama"]
    with pytest.raises(CheckpointError, match=re.escape(words)):
        grow(parameters(Alone(kind, values)), Alone(kind, {**values, **change}))


def test_heads_and_kinds_must_be_the_same() -> None:
    with pytest.raises(CheckpointError, match="heads must stay as large"):
        grow(parameters(Alone("qwen3", LLAMA)), Alone("qwen3", {**LLAMA, "head_dim": 8}))
    with pytest.raises(CheckpointError, match="no whole heads of 32"):
        grow(parameters(Alone("gpt2", GPT2)), Alone("gpt2", {**GPT2, "n_embd": 32, "n_head": 1}))
    with pytest.raises(CheckpointError, match="this one's is phi3"):
        grow({}, Alone("phi3", {**LLAMA, "pad_token_id": 0}))
