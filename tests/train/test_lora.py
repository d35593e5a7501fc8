"""Adapters: invisible at first, learning in their low-rank form, and gone without a trace when merged."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mm.config import RunConfig
from mm.data.batch import PackedBatch, collate
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models.system import GenerativeSystem
from mm.train.config import LoraRule, ParamRule
from mm.train.lora import apply_lora, merge_lora, merged
from mm.train.params import freeze, parameter_groups

Q = "language.model.layers.0.self_attn.q_proj"
RULES = [
    LoraRule(match=r"language.*(q|v)_proj", rank=4, alpha=8),
    LoraRule(match=r"vision.*\.(qkv|fc1)", rank=2, alpha=2, dropout=0.5),
    LoraRule(match=r"connector\..*", rank=1, alpha=3),
]


@pytest.fixture
def built(tiny_config: Callable[..., RunConfig]) -> tuple[GenerativeSystem, PackedBatch]:
    torch.manual_seed(0)
    config = tiny_config()
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    return config.model.build(), collate([dataset.read(0), dataset.read(1)], layout, 128)


def train(system: GenerativeSystem, rules: list[ParamRule], batch: PackedBatch, steps: int = 3) -> set[str]:
    """A few steps of AdamW; returns the names of what was trained."""
    freeze(system, rules)
    groups = parameter_groups(system, rules, 0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(steps):
        system(batch).losses["next_token"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for group in groups for name in group["names"]}


def test_output_is_unchanged_at_first(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, batch = built
    before = system.eval().token_losses(batch)
    apply_lora(system, RULES)
    assert torch.equal(before, system.eval().token_losses(batch))


def test_adapters_learn_and_what_they_adapt_does_not(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, batch = built
    plain = dict(copy.deepcopy(system).named_parameters())
    rules = [ParamRule(match="(vision|language).*", freeze=True)]
    trained = train(system, [*rules, *apply_lora(system, RULES)], batch)
    adapted = {name.split(".base_layer.")[0] for name, _ in system.named_parameters() if ".base_layer." in name}
    assert len(adapted) == 2 * 2 + 2 * 2 + 2
    expected = {f"{name}.lora_{part}.default.weight" for name in adapted for part in "AB"}
    connector = {name for name in plain if name.startswith("connector.")}
    assert trained == expected | {name for name in connector if name.rpartition(".")[0] not in adapted}
    after = dict(system.named_parameters())
    for name, tensor in plain.items():
        layer, _, kind = name.rpartition(".")
        new = after[f"{layer}.base_layer.{kind}" if layer in adapted else name]
        assert torch.equal(tensor, new) is (name not in trained), name
    assert all(float(after[name].detach().abs().max()) > 0 for name in expected)


def test_the_rest_is_trained_as_it_was(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, _ = built
    system.vision.requires_grad_(False)
    before = {name: p.requires_grad for name, p in system.named_parameters()}
    apply_lora(system, RULES)
    for name, parameter in system.named_parameters():
        expected = "lora_" in name or (".base_layer." not in name and before[name])
        assert parameter.requires_grad is expected, name


def test_layers_compute_the_papers_formula(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    """W x + b + alpha / r B A x, outputs and gradients."""
    system, batch = built
    train(system, apply_lora(system, RULES), batch)
    layer = system.get_submodule(Q)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    assert a.shape == (4, 32) and b.shape == (32, 4)
    x = torch.randn(5, 32)

    def expected(a: Tensor, b: Tensor) -> Tensor:
        return x @ weight.T + bias + (8 / 4) * (x @ a.T) @ b.T

    torch.testing.assert_close(layer(x), expected(a, b))
    found = torch.autograd.grad(layer(x).square().sum(), (a, b))
    torch.testing.assert_close(found, torch.autograd.grad(expected(a, b).square().sum(), (a, b)), rtol=1e-4, atol=1e-4)


def test_merged_is_plain_and_computes_the_same(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, batch = built
    plain = copy.deepcopy(system)
    train(system, apply_lora(system, RULES), batch)
    adapted = system.eval().token_losses(batch)
    assert not torch.allclose(adapted, plain.eval().token_losses(batch), atol=1e-2)
    by_name = merged({name: tensor.detach().clone() for name, tensor in system.state_dict().items()}, RULES)
    merge_lora(system)
    assert by_name.keys() == system.state_dict().keys()
    assert all(torch.equal(by_name[name], tensor) for name, tensor in system.state_dict().items())
    assert list(system.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in system.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(system.token_losses(batch), adapted, rtol=1e-4, atol=1e-4)


def test_adapters_come_back_from_a_state_dict(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, batch = built
    other = copy.deepcopy(system)
    train(system, apply_lora(system, RULES), batch)
    apply_lora(other, RULES)
    other.load_state_dict(system.state_dict())
    assert torch.equal(system.eval().token_losses(batch), other.eval().token_losses(batch))


def test_the_last_rule_for_a_layer_holds(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, _ = built
    apply_lora(system, [LoraRule(match="language.*_proj", rank=2), LoraRule(match=r".*\.0\..*q_proj", rank=5, alpha=1)])
    ranks = {name: len(p) for name, p in system.named_parameters() if "lora_A" in name}
    assert ranks.pop(f"{Q}.lora_A.default.weight") == 5
    assert set(ranks.values()) == {2} and len(ranks) == 2 * 7 - 1
    assert system.get_submodule(Q).scaling == {"default": 1 / 5}


def test_rules_of_params_see_adapters(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, _ = built
    rules = [ParamRule(match=r"language.*lora_B\..*", lr_scale=16), ParamRule(match=".*", freeze=True)]
    rules += apply_lora(system, RULES[:1])
    freeze(system, rules)
    groups = parameter_groups(system, rules, 0.1)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales[f"{Q}.lora_B.default.weight"] == 16 and scales[f"{Q}.lora_A.default.weight"] == 1
    assert len(scales) == 8


def test_no_rules_no_adapters(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, _ = built
    names = list(system.state_dict())
    assert apply_lora(system, []) == [] and list(system.state_dict()) == names


def test_errors_name_what_is_near(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, _ = built
    with pytest.raises(ConfigError, match=r"train.lora: 'language.*q_prj' matches no linear layer; near.*q_proj"):
        apply_lora(system, [RULES[1], LoraRule(match="language.*q_prj")])
    with pytest.raises(ConfigError, match="matches no linear layer"):
        apply_lora(system, [LoraRule(match="language.model.norm")])
    assert not any("lora" in name for name in system.state_dict())  # nothing was changed by what failed


def test_a_shared_weight_is_refused(built: tuple[GenerativeSystem, PackedBatch]) -> None:
    system, _ = built
    with pytest.raises(ConfigError, match=r"language.lm_head, whose weight is also language.model.embed_tokens.weight"):
        apply_lora(system, [LoraRule(match="language.*")])


def test_layers_that_are_not_called_are_left_out() -> None:
    with pytest.raises(ConfigError, match="matches no linear layer"):
        apply_lora(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), [LoraRule(match=".*")])
