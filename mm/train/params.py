"""Freezing, and parameter groups by role and by one ordered list of name patterns."""

import re
from typing import Any

from torch import nn

from mm.errors import ConfigError
from mm.models.experts import ExpertGroup
from mm.train.config import ParamRule
from mm.train.optim.config import Role

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Of `nn.MultiheadAttention` and open_clip's attention, which have the weights of linear layers and not the layers."""


def freeze(model: nn.Module, rules: list[ParamRule]) -> None:
    """Set `requires_grad` as the rules say; what none names stays as it is.

    Raises `ConfigError` for a rule that matches nothing, and when everything is frozen.
    """
    named = dict(model.named_parameters())
    for rule in rules:
        matching = [parameter for name, parameter in named.items() if re.fullmatch(rule.match, name)]
        if not matching:
            parts = sorted({name.split(".")[0] for name in named})
            raise ConfigError(f"train.params: {rule.match!r} matches no parameter; names start with {', '.join(parts)}")
        for parameter in matching:
            parameter.requires_grad_(parameter.requires_grad if rule.freeze is None else not rule.freeze)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("train.params: every parameter is frozen; nothing is left to train")


def parameter_groups(model: nn.Module, rules: list[ParamRule], weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters by (lr_scale, weight_decay, role), each group with the `names` of its `params`.

    Vectors (norms, biases) are not decayed unless a rule says so.
    """
    groups: dict[tuple[float, float, Role], dict[str, Any]] = {}
    found = roles(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay, role = 1.0, weight_decay if parameter.ndim > 1 else 0.0, found[name]
        for rule in rules:
            if re.fullmatch(rule.match, name):
                scale = scale if rule.lr_scale is None else rule.lr_scale
                decay = decay if rule.weight_decay is None else rule.weight_decay
                role = role if rule.role is None else rule.role
        if parameter.ndim < 2 and role != "vector":
            raise ConfigError(f"train.params: {name} has {parameter.ndim} axes and can only be a vector")
        new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay, "role": role}
        group = groups.setdefault((scale, decay, role), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def roles(model: nn.Module) -> dict[str, Role]:
    """What every parameter is to an optimizer that tells matrices from the rest. The shape alone does not say.

    matrix: weights of linear layers, those of attention that has them without the layers, and stacks of these, such as
    experts. head: the output weights of a language model, where they are not its embeddings too. vector: fewer than two
    axes. embedding: all else (tables, patch embeddings, convolutions).
    """
    from transformers.pytorch_utils import Conv1D

    heads = set()
    matrices = set()
    for module in model.modules():
        if callable(get := getattr(module, "get_output_embeddings", None)) and (head := get()) is not None:
            heads |= {id(parameter) for parameter in head.parameters()}
        if isinstance(module, nn.Linear | Conv1D | ExpertGroup):
            matrices |= {id(parameter) for parameter in module.parameters(recurse=False)}
        matrices |= {id(one) for name, one in module.named_parameters(recurse=False) if name in PROJECTIONS}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def role(parameter: nn.Parameter) -> Role:
        if parameter.ndim < 2:
            return "vector"
        if id(parameter) in tables:
            return "embedding"
        return "head" if id(parameter) in heads else "matrix" if id(parameter) in matrices else "embedding"

    return {name: role(parameter) for name, parameter in model.named_parameters()}
