"""Parameter groups against closed forms."""

from typing import Any

import open_clip
import pytest
import torch
from pydantic import ValidationError
from test_engines import UNTIED
from test_expert_parallel import MODELS
from torch import nn

from mm.errors import ConfigError
from mm.train.config import ParamRule
from mm.train.engines.single import scale_down
from mm.train.optim.config import OPTIMIZERS, AdamWConfig
from mm.train.params import freeze, parameter_groups, roles


def model() -> nn.Module:
    return nn.ModuleDict({"vision": nn.Linear(3, 3), "language": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))})


def settings(rules: list[ParamRule]) -> dict[str, tuple[float, float]]:
    net = model()
    freeze(net, rules)
    groups = parameter_groups(net, rules, 0.1)
    return {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}


def test_vectors_are_not_decayed_by_default() -> None:
    assert settings([]) == {
        "vision.weight": (1, 0.1), "vision.bias": (1, 0), "language.0.weight": (1, 0.1), "language.0.bias": (1, 0),
        "language.1.weight": (1, 0), "language.1.bias": (1, 0),
    }  # fmt: skip


def test_later_rules_override_field_by_field() -> None:
    rules = [
        ParamRule(match="vision.*", freeze=True),
        ParamRule(match="vision.weight", freeze=False, lr_scale=0.1),
        ParamRule(match=".*bias", weight_decay=0.5),
    ]
    found = settings(rules)
    assert "vision.bias" not in found
    assert found["vision.weight"] == (0.1, 0.1) and found["language.0.bias"] == (1, 0.5)


def test_frozen_parameters_get_no_gradient() -> None:
    net = model()
    freeze(net, [ParamRule(match="vision.*", freeze=True)])
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["vision.weight", "vision.bias"]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'visoin\..*' matches no parameter; names start with language, vision"):
        settings([ParamRule(match="visoin.*", freeze=True)])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        settings([ParamRule(match=".*", freeze=True)])


def test_adamw_is_torchs() -> None:
    """Fused, with our groups, against torch's plain loop on one parameter."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 4)), None
    b = nn.Parameter(a.detach().clone())
    ours = AdamWConfig(lr=1e-2, weight_decay=0.1).build([{"params": [a], "names": ["a"], "weight_decay": 0.1}])
    theirs = torch.optim.AdamW([b], lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    for _ in range(5):
        gradient = torch.randn(4, 4)
        a.grad, b.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("values", [
    {"kind": "adamw", "betas": [1.0, 0.9]}, {"kind": "muon", "momentum": 1.0}, {"kind": "muon", "betas": [0.9, -0.1]},
    {"kind": "sophia", "betas": [0.9, 1.5]}, {"kind": "soap", "betas": [0.95, 1.0]},
    {"kind": "soap", "shampoo_beta": 1.0},
], ids=str)  # fmt: skip
def test_a_mean_that_would_never_move_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"less than 1|greater than or equal to 0"):
        OPTIMIZERS.resolve(values["kind"]).model_validate(values)


def test_auxiliary_routers_are_clipped_by_themselves() -> None:
    parts = {
        "language": [torch.full((4,), 3.0)],
        "routers": [torch.full((4,), 4.0)],
        "auxiliary_routers": [torch.full((1,), 50.0)],
    }
    squares = torch.tensor([float(grads[0].square().sum()) for grads in parts.values()])
    norms = scale_down(parts, squares, 1.0)
    assert {name: float(norm) for name, norm in norms.items()} == {
        "language": 6, "routers": 8, "auxiliary_routers": 50, "total": 10,
    }  # fmt: skip
    for name, scale in (("language", 3 / 10), ("routers", 4 / 10), ("auxiliary_routers", 1.0)):
        torch.testing.assert_close(parts[name][0], torch.full_like(parts[name][0], scale))
    alone = {"auxiliary_routers": [torch.full((1,), 50.0)]}
    assert float(scale_down(alone, torch.tensor([2500.0]), None)["total"]) == 50


def test_roles_are_told_by_modules_and_not_by_shapes() -> None:
    system = MODELS["two groups"].build()
    found = roles(system)
    tower, layer = "vision.featurizer", "language.model.layers.0"
    group = f"{layer}.mlp.groups.text"
    expected = {
        f"{tower}.patch_embed.proj.weight": "embedding", f"{tower}.pos_embed": "embedding",
        f"{tower}.blocks.0.attn.qkv.weight": "matrix", f"{tower}.blocks.0.attn.qkv.bias": "vector",
        "language.model.embed_tokens.weight": "embedding", f"{layer}.self_attn.q_proj.weight": "matrix",
        f"{layer}.input_layernorm.weight": "vector", f"{group}.gate_up": "matrix", f"{group}.down": "matrix",
        f"{group}.router.weight": "matrix",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert all((role == "vector") == (system.get_parameter(name).ndim < 2) for name, role in found.items())
    assert roles(UNTIED.build())["language.lm_head.weight"] == "head"


def test_projections_without_layers_are_matrices() -> None:
    """As attention of torch and open_clip has them."""
    tiny = {"width": 16, "layers": 1, "heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    clip = roles(open_clip.create_model("ViT-B-32", vision_cfg=vision, text_cfg={**tiny, "vocab_size": 50}))
    for block in ("visual.transformer.resblocks.0", "transformer.resblocks.0"):
        assert clip[f"{block}.attn.in_proj_weight"] == clip[f"{block}.attn.out_proj.weight"] == "matrix"
        assert clip[f"{block}.attn.in_proj_bias"] == "vector"
    assert clip["token_embedding.weight"] == clip["positional_embedding"] == clip["visual.conv1.weight"] == "embedding"
    found = roles(nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True))
    assert {name for name, role in found.items() if role == "matrix"} == {
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight",
    }  # fmt: skip
    assert found["bias_k"] == "embedding"


def test_a_rule_may_set_a_role() -> None:
    rules = [ParamRule(match="language.*weight", role="head"), ParamRule(match="vision.weight", role="embedding")]
    groups = parameter_groups(nn.ModuleDict({"vision": nn.Linear(3, 3), "language": nn.Linear(3, 3)}), rules, 0.1)
    found = {name: group["role"] for group in groups for name in group["names"]}
    assert found == {
        "vision.weight": "embedding", "vision.bias": "vector", "language.weight": "head", "language.bias": "vector",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"vision\.bias has 1 axes and can only be a vector"):
        parameter_groups(model(), [ParamRule(match="vision.*", role="matrix")], 0.1)
