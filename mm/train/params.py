"""Freezing and parameter groups from one ordered list of name patterns."""

import re
from typing import Any

from torch import nn

from mm.errors import ConfigError
from mm.train.config import ParamRule


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
    """The trained parameters by (lr_scale, weight_decay), each group with the `names` of its `params`.

    Vectors (norms, biases) are not decayed unless a rule says so.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = 1.0, weight_decay if parameter.ndim > 1 else 0.0
        for rule in rules:
            if re.fullmatch(rule.match, name):
                scale = scale if rule.lr_scale is None else rule.lr_scale
                decay = decay if rule.weight_decay is None else rule.weight_decay
        new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
