"""Parameter groups from one ordered list of name patterns."""

import re
from typing import Any

from torch import nn

from mm.errors import ConfigError
from mm.train.config import ParamRule


def parameter_groups(model: nn.Module, rules: list[ParamRule], weight_decay: float) -> list[dict[str, Any]]:
    """Freeze what the rules freeze and group the rest by (lr_scale, weight_decay).

    Vectors (norms, biases) are not decayed unless a rule says so. Each group lists its parameters' `names`. Raises
    `ConfigError` for a rule that matches nothing, and when everything is frozen.
    """
    named = dict(model.named_parameters())
    for rule in rules:
        if not any(re.fullmatch(rule.match, name) for name in named):
            parts = sorted({name.split(".")[0] for name in named})
            raise ConfigError(f"train.params: {rule.match!r} matches no parameter; names start with {', '.join(parts)}")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named.items():
        freeze, scale, decay = False, 1.0, weight_decay if parameter.ndim > 1 else 0.0
        for rule in rules:
            if re.fullmatch(rule.match, name):
                freeze = freeze if rule.freeze is None else rule.freeze
                scale = scale if rule.lr_scale is None else rule.lr_scale
                decay = decay if rule.weight_decay is None else rule.weight_decay
        parameter.requires_grad_(not freeze)
        if freeze:
            continue
        new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("train.params: every parameter is frozen; nothing is left to train")
    return list(groups.values())
