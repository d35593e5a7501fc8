"""The optimizer's moments of another stage or run: taken over by name, where they are of the same algorithm.

A parameter that is new, has another shape, or of which the optimizer keeps something else now, starts anew.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.train import checkpoint
from mm.train.ema import EMA
from mm.train.engines.single import SingleEngine
from mm.train.stages import Stage, settings_of


def take_moments(engine: SingleEngine, stage: Stage, folder: Path, ema: EMA | None = None) -> str:
    """Fill the optimizer of a stage from a checkpoint of another, and with it the averages of its weights; every rank
    has to call this. Returns what was taken over, for people to read.

    Raises `ConfigError` where the optimizer or the engine cannot go on with them.
    """
    state, kind = checkpoint.read_state(folder), stage.config.train.optimizer.kind
    if (was := settings_of(state)["optimizer"]["kind"]) != kind:
        raise ConfigError(
            f"train.init_optimizer: {kind} cannot go on with the moments of {was} in {folder}; set "
            f"train.optimizer.kind={was}, or train.init_optimizer=false"
        )
    saved = checkpoint.described(folder)
    kept, new = having_moments(engine.system, saved)
    deepspeed = engine.kind == "deepspeed"
    if deepspeed and (new or stage.convert):
        # It has one count of steps for all parameters of a flat tensor, and loads the weights along.
        raise ConfigError(
            "train.engine.kind deepspeed takes over the moments of all trained parameters or of none: "
            + (f"{new[0]} has none in {folder}" if new else "stages.convert changes the model")
            + "; use fsdp"
        )
    moments = {name for name in saved if name.startswith("optimizer.") and parameter_of(name) in kept}
    tensors = engine.tensors_to_load(moments)
    if not deepspeed:
        made = {name: tuple(one.shape) for name, one in tensors.items() if name.startswith("optimizer.")}
        others = set().union(*engine.world.gather(unlike(made, saved)))
        forget(engine.optimizer, others)
        kept, new = kept - others, [*new, *sorted(others)]
        tensors = {name: one for name, one in tensors.items() if name in moments and parameter_of(name) in kept}
    averages: dict[str, Tensor] = {}
    if ema is not None and not stage.convert:  # which may have changed values, too
        averages = {name: one for name, one in ema.tensors().items() if saved.get(name) == tuple(one.shape)}
    checkpoint.load(folder, tensors | averages, all_of_a_kind=False)
    engine.loaded(tensors)
    if ema is not None and averages:
        ema.go_on(state["ema"], {name.removeprefix("ema.") for name in averages})
    left = f"; {len(new)} start anew: {new[0]}" if new else ""
    return f"the moments of {len(kept)} parameters go on from {folder}{left}"


def having_moments(system: nn.Module, saved: dict[str, tuple[int, ...]]) -> tuple[set[str], list[str]]:
    """The trained parameters that a checkpoint has moments for, by name and shape, and those that start anew.

    saved: shapes of the checkpoint's tensors by name.
    """
    known = {parameter_of(name) for name in saved if name.startswith("optimizer.")}
    kept: set[str] = set()
    new: list[str] = []
    for name, parameter in system.named_parameters():
        if parameter.requires_grad:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed empties what it divides
            if name in known and saved[f"model.{name}"] == shape:
                kept.add(name)
            else:
                new.append(name)
    return kept, new


def unlike(moments: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]]) -> set[str]:
    """The parameters whose moments have other names or shapes than those saved of them: another algorithm's.

    Both by `optimizer.NAME.MOMENT`; of parameters that have none here nothing is said.
    """
    mine, theirs = set(moments.items()), set(saved.items())
    known = {parameter_of(name) for name in moments}
    return {name for one, _ in mine ^ theirs if one.startswith("optimizer.") and (name := parameter_of(one)) in known}


def forget(optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Let these parameters start anew: their state is made again at their next gradient."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in names:
                optimizer.state.get(parameter, {}).clear()


def parameter_of(moment: str) -> str:
    """The parameter of `optimizer.NAME.MOMENT`."""
    return moment.removeprefix("optimizer.").rpartition(".")[0]
