"""Low-rank adapters (Hu et al., 2106.09685) in any linear layers of a system, by peft.

peft puts an adapter around a layer in its place; nothing else of the module tree changes. For a layer `NAME` there are

    NAME.base_layer.weight, NAME.base_layer.bias       what NAME.weight and NAME.bias were: frozen
    NAME.lora_A.default.weight [rank, in]              trained, random at first
    NAME.lora_B.default.weight [out, rank]             trained, zero at first: the output does not change

and the layer computes W x + (alpha / rank) B A dropout(x). Name patterns of `train.params` see these names.
"""

import re
import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from mm.errors import ConfigError
from mm.train.blocks import nothing_matches
from mm.train.config import LoraRule, ParamRule


def apply_lora(system: nn.Module, rules: list[LoraRule]) -> list[ParamRule]:
    """Put adapters into the linear layers whose whole name matches; of several rules for a layer the last one holds.

    Call it when weights are in place, before freezing and before blocks are wrapped or sharded, and hand what it
    returns to `freeze` and `parameter_groups` after the rules of `train.params`: adapters are trained, what they adapt
    is not, whatever those rules say of the tower; the rest is trained or not as it was. Linear layers inside
    `nn.MultiheadAttention` cannot be adapted: their weights are used without calling them.

    Raises:
        ConfigError: a rule matches no linear layer; a layer's weight is shared (a tied head); peft is not installed.
    """
    if not rules:
        return []
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("train.lora needs peft: pip install 'mm-pretrain[lora]'") from None
    linear = dict(_linear_layers(system))
    chosen: dict[str, LoraRule] = {}
    for rule in rules:
        found = [name for name in linear if re.fullmatch(rule.match, name)]
        if not found:
            raise nothing_matches("train.lora", rule.match, "linear layer", linear)
        chosen |= dict.fromkeys(found, rule)
    _refuse_shared(system, chosen)
    trained = {parameter: parameter.requires_grad for parameter in system.parameters()}
    for rule in {id(rule): rule for rule in chosen.values()}.values():
        names = [name for name, its in chosen.items() if its is rule]
        config = LoraConfig(
            r=rule.rank,
            lora_alpha=rule.alpha,  # type: ignore[arg-type]
            lora_dropout=rule.dropout,
            bias="none",
            target_modules="|".join(map(re.escape, names)),
        )
        with warnings.catch_warnings():
            # The same adapter in other layers, by design.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, system)
    # peft has frozen all of the system.
    for name, parameter in system.named_parameters():
        if parameter in trained:
            parameter.requires_grad_(trained[parameter] and ".base_layer." not in name)
    return [ParamRule(match=r".*\.base_layer\..*", freeze=True), ParamRule(match=r".*\.lora_[AB]\..*", freeze=False)]


def merge_lora(system: nn.Module) -> None:
    """Add the adapters to the weights that they adapt and leave plain layers under the plain names, in place.

    On whole weights: not sharded, nor compiled.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(system.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            system.set_submodule(name, module.get_base_layer())
    vars(system).pop("peft_config", None)


def merged(tensors: dict[str, Tensor], rules: list[LoraRule]) -> dict[str, Tensor]:
    """The weights of a system with adapters, given by name, as `merge_lora` would leave them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, adapted, kind = name.rpartition(".base_layer.")
        if adapted and kind == "weight":
            rule = next(rule for rule in reversed(rules) if re.fullmatch(rule.match, layer))
            a, b = (tensors[f"{layer}.lora_{one}.default.weight"] for one in "AB")
            tensor = tensor + (b @ a) * (rule.alpha / rule.rank)
        found[f"{layer}.{kind}" if adapted else name] = tensor
    return found


def _linear_layers(system: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in system.named_modules():
        parent = system.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and not isinstance(parent, nn.MultiheadAttention):
            yield name, module


def _refuse_shared(system: nn.Module, names: dict[str, LoraRule]) -> None:
    """A merge would change a weight for all that use it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in system.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for sharing in owners.values():
        for owner in sharing:
            name, _, kind = owner.rpartition(".")
            if len(sharing) > 1 and name in names and kind == "weight":
                other = next(one for one in sharing if one != owner)
                raise ConfigError(
                    f"train.lora: {names[name].match!r} matches {name}, whose weight is also {other}; leave it out"
                )
