"""Blocks: the repeated modules of a system, recomputed, compiled and sharded one by one.

What is done to a block replaces its `forward`, never the module: names of parameters stay what they are, so name
patterns, checkpoints and sharding do not notice. Hooks (FSDP2's) stay outside of it and do not run again when a block
is recomputed. The order is

    checkpoint_activations -> compile_blocks -> sharding

Copy a system (`copy.deepcopy`) before it is compiled: a compiled `forward` keeps using the weights it was made for.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm.errors import ConfigError
from mm.train.config import CheckpointingConfig, TrainConfig

DEFAULT_PATTERNS: list[str] = TrainConfig.model_fields["blocks"].default

aten, higher_order = torch.ops.aten, torch.ops.higher_order
KEPT = {
    # Matrix products.
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.linear.default,
    aten._scaled_mm.default,
    aten._grouped_mm.default,
    aten.convolution.default,
    # Attention, under all the names that it has.
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    higher_order.flex_attention,
    # flex_attention that was compiled with `wrap_inductor_compiled_regions`; without, it is recomputed.
    higher_order.inductor_compiled_code,
}
"""Operations whose outputs selective checkpointing keeps."""


def find_blocks(system: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """The modules whose whole name matches one of the patterns, by name, in the order of the system.

    Of modules inside one another the innermost are taken: the blocks of a stage rather than the stage. Raises
    `ConfigError` for a pattern that matches nothing; only the default patterns may, in a model without blocks.
    """
    return _match(system, patterns, "train.blocks", required=patterns != DEFAULT_PATTERNS)


def checkpoint_activations(system: nn.Module, config: CheckpointingConfig, blocks: Mapping[str, nn.Module]) -> None:
    """Make blocks, or the modules that `config.match` names, forget their activations and compute them again.

    Outputs and gradients are the same to the last bit, dropout included. Raises `ConfigError` for a pattern that
    matches nothing.
    """
    if config.mode == "none":
        return
    if config.match:
        blocks = _match(system, config.match, "train.activation_checkpointing.match", required=True)
    options = {}
    if config.mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks.values():
        # A partial of a bound method: unlike a closure, it is copied along with its module.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def compile_blocks(blocks: Mapping[str, nn.Module], backend: str = "inductor") -> None:
    """torch.compile of each block; blocks of the same code share what is compiled.

    It is `forward` that is compiled and not, by `Module.compile`, the call around it: the latter would trace hooks,
    and leaves a checkpointed block uncompiled without a word (torch 2.14). So does a graph break inside a checkpointed
    block (`TORCH_LOGS=graph_breaks` shows them): the CPU's packed attention has one, it depends on the batch.
    """
    for block in blocks.values():
        block.forward = torch.compile(block.forward, backend=backend)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Not the list itself: Dynamo would look into it, and not every operation is one that it knows.
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def nothing_matches(where: str, pattern: str, what: str, names: Iterable[str]) -> ConfigError:
    """The error for a pattern without a match. Suggests names near to it, as patterns: numbers of layers as `\\d+`."""
    general = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", r".\\d+", name) for name in names))
    near = difflib.get_close_matches(pattern, general, n=3, cutoff=0.0)
    return ConfigError(f"{where}: {pattern!r} matches no {what}; near to it: {', '.join(near) or 'there are none'}")


def _match(system: nn.Module, patterns: list[str], where: str, required: bool) -> dict[str, nn.Module]:
    modules = {name: module for name, module in system.named_modules() if name}
    found = set()
    for pattern in patterns:
        here = {name for name in modules if re.fullmatch(pattern, name)}
        if required and not here:
            raise nothing_matches(where, pattern, "module", modules)
        found |= here
    outer = {name[: end.start()] for name in found for end in re.finditer(r"\.", name)}
    return {name: module for name, module in modules.items() if name in found - outer}
