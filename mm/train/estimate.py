"""What a run will take, before anything is built: parameters, FLOPs, memory, hours, and what fits on which GPU.

What can be traced is not guessed by formulas: the model is made on the meta device, and one step of it runs on fake
tensors (`mm.train.trace`), with the most expensive packs of the set for memory and a cross-section of all packs for
FLOPs. Only what sharding does to the memory of one process is calculated, from the engine's settings.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mm.data.features import medium_of
from mm.data.layout import Layout
from mm.data.packed import Pack
from mm.errors import ConfigError
from mm.models.experts import ExpertGroup
from mm.models.system import System
from mm.train.accelerators import find
from mm.train.blocks import checkpoint_activations, find_blocks
from mm.train.config import Run, TrainConfig
from mm.train.engines.config import BUCKET, DeepSpeedConfig, FSDPConfig
from mm.train.features import Aside, tower_of
from mm.train.lora import apply_lora
from mm.train.optim.config import SophiaConfig
from mm.train.packs import Packs
from mm.train.params import freeze
from mm.train.trace import Trace, trace_step

GPUS = ("H200", "H100 SXM", "A100 80GB", "A100 40GB", "L40S", "RTX A6000", "RTX 4090", "RTX 3090")
SPARE = 0.08
"""Share of a GPU's memory that is left to what is no tensor: CUDA's context, NCCL, workspaces, fragmentation."""
LIVE = 1_000_000_000
"""Weights that DeepSpeed's stage 3 keeps gathered at most: its own default."""
RANKS = (2, 4, 8, 16, 32, 64)
"""Numbers of processes that are tried where one is too few."""

Memory = dict[str, float]


def estimate(config: Run, ranks: int = 1, utilisation: float = 0.4) -> dict[str, Any]:
    """What is known of a run, or of one stage of it, before it starts: bytes, FLOPs, tokens, hours; plain values.

    Args:
        ranks: processes, a GPU each.
        utilisation: share of the peak that is reached, for the hours.

    Raises `ConfigError` for a config that cannot run on so many processes, and `DataError` for a packed set that the
    config names and that does not fit the model.
    """
    if not getattr(config.model, "trains", True):
        raise ConfigError(f"model.kind {config.model.kind} packs and loads data; it has nothing to train")
    train = config.train
    _check(train, ranks)
    layout: Layout = config.model.layout()
    packs = Packs.of(config, layout)
    with torch.device("meta"):
        system: System = config.model.build(weights=False)
    if config.data.features:
        medium = medium_of(layout)
        packs.layout = replace(layout, features={medium: tower_of(system, medium).shape})
    model = Model(system, packs, train.batch_tokens // config.data.context_length)
    flops = model.flops(train, ranks)
    memory = model.memory(train, ranks)
    steps = packs.steps(train, model.rows)
    # In float32 the peak depends on whether products may use TF32.
    work = flops["total"] * steps if steps and train.precision == "bf16" else None
    gpus = []
    for gpu in (find(name) for name in GPUS):
        assert gpu is not None
        fits = on_gpu(memory) <= usable(gpu.memory)
        hours = work / (ranks * gpu.tflops * 1e12 * utilisation) / 3600 if work else None
        remedies = [] if fits else model.remedies(train, ranks, usable(gpu.memory))
        gpus.append(
            {"name": gpu.name, "memory": gpu.memory * 2**30, "fits": fits, "would_fit": remedies, "hours": hours}
        )
    return {
        "parameters": model.parameters(train),
        "packs": {"from": packs.origin, "worst": packs.describe(model.worst(train, ranks))},
        "rows_per_step": model.rows,
        "tokens_per_step": {name: round(count * model.rows) for name, count in packs.tokens.items()},
        "audio_seconds_per_step": _seconds(layout, packs.tokens.get("audio", 0.0) * model.rows),
        "steps": steps,
        "flops_per_step": flops,
        "not_counted": _not_counted(config, packs),
        "engine": train.engine.kind,
        "ranks": ranks,
        "memory": {kind: round(count) for kind, count in {**memory, "total": on_gpu(memory)}.items()},
        "utilisation": utilisation,
        "gpus": gpus,
    }


def _check(train: TrainConfig, ranks: int) -> None:
    engine = train.engine
    if ranks > 1 and engine.kind == "single":
        raise ConfigError(f"train.engine.kind single is for one process, not {ranks}; set fsdp or deepspeed")
    if isinstance(engine, FSDPConfig):
        engine.copies(ranks)


def _seconds(layout: Layout, frames: float) -> float:
    """Of sound in so many positions."""
    audio = layout.audio
    return frames * audio.hop / audio.sampling_rate if audio else 0.0


def _not_counted(config: Run, packs: Packs) -> list[str]:
    """What a step does beside all that is counted here."""
    left = []
    if packs.codebooks and not config.data.codes:
        left.append("the teacher that gives codes, its FLOPs and memory; with data.codes=true it does not run")
    if config.model.kind in ("clip", "cosmo"):
        left.append("similarities of the pairs of other micro-batches and ranks; a rank has its own pairs times all")
    if config.train.optimizer.kind == "soap":
        left.append("refreshes of SOAP's bases, once in train.optimizer.every steps")
    if config.train.optimizer.kind in ("muon", "soap") and config.train.engine.kind == "fsdp":
        left.append(
            "matrices on their way to their owners, 0.75 GiB, or more where one has over 128 MiB; their state is with "
            "their owners among all ranks, whatever shard_size, and not quite evenly"
        )
    return left


def usable(gib: int) -> float:
    """Bytes for tensors on a GPU with so many GiB."""
    return gib * 2**30 * (1 - SPARE)


def on_gpu(memory: Memory) -> float:
    return sum(count for kind, count in memory.items() if kind != "host")


def show(found: dict[str, Any]) -> Group:
    """What `estimate` found, for people."""
    parameters = _table("parameters", "total", "trained")
    for part, counts in found["parameters"].items():
        parameters.add_row(part, f"{counts['total']:,}", f"{counts['trained']:,}")
    tokens, flops, steps = found["tokens_per_step"], found["flops_per_step"], found["steps"]
    heard = found["audio_seconds_per_step"]
    media = ", ".join(
        f"{name} {count:,}" for name, count in tokens.items() if name not in ("loss", "padding") and count
    )
    learned = f"; {tokens['loss']:,} of them learned" if tokens["loss"] else ""
    unpacked = found["packs"]["from"] == "budgets"
    here = "the fullest pack allowed; nothing is packed yet" if unpacked else found["packs"]["from"]
    step = _table("a step", "")
    step.add_row("tokens", f"{media}{learned}, and {tokens['padding']:,} of padding")
    if heard:
        step.add_row("sound", f"{heard:,.1f} s, {tokens['audio'] / heard:,.4g} positions a second")
    step.add_row("FLOPs", ", ".join(f"{phase} {_short(count)}" for phase, count in flops.items() if count))
    step.add_row("rows", f"{found['rows_per_step']:,}, of {here}")
    if steps:
        every = sum(count for name, count in tokens.items() if name not in ("loss", "padding"))
        total = f"{_short(steps * every)} tokens, {_short(steps * flops['total'])} FLOPs"
        total += f", {steps * heard / 3600:,.1f} h of sound" if heard else ""
        step.add_row("steps", f"{steps:,}: {total}")
    else:
        step.add_row("steps", "not known before the data is packed; mm pack does it, or set train.max_steps")
    memory = _table("memory", f"of a rank; {found['engine']}, {found['ranks']} in all")
    for kind, count in sorted(found["memory"].items(), key=lambda one: one[0] == "host"):  # beside the total
        memory.add_row(kind, f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB")
    worst = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found["packs"]["worst"].items() if count)
    gpus = _table("GPU", "GiB", "fits", f"hours at {found['utilisation']:.0%} of peak")
    remedies: dict[str, list[str]] = {}
    for gpu in found["gpus"]:
        hours = "–" if gpu["hours"] is None else f"{gpu['hours']:,.1f}"
        gpus.add_row(gpu["name"], f"{gpu['memory'] // 2**30}", "yes" if gpu["fits"] else "no", hours)
        if not gpu["fits"]:
            text = "\n  or ".join(gpu["would_fit"]) or "nothing that is known here"
            remedies.setdefault(text, []).append(gpu["name"])
    lines = [Text(f"\nto fit on {', '.join(names)}:\n     {text}") for text, names in remedies.items()]
    if steps and found["gpus"][0]["hours"] is None:
        lines.append(Text("\nhours are known for train.precision=bf16 alone"))
    lines += [Text(f"\nnot counted: {what}") for what in found["not_counted"]]
    return Group(parameters, "", step, "", memory, Text(f"worst micro-batch: {worst}"), "", gpus, *lines)


NUMBERS = ("total", "trained", "GiB", "of a rank", "hours")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name.startswith(NUMBERS) else "left")
    return table


def _short(count: float) -> str:
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:.4g} {unit}"
    return f"{count:,.0f}"


class Model:
    """A system on the meta device with what was traced of it. `rows`: packs in a step, over all ranks."""

    def __init__(self, system: System, packs: Packs, rows: int) -> None:
        self.system, self.packs, self.rows = system, packs, rows
        self._adapted: dict[str, System] = {}
        self._aside: Aside | None = None
        self._traces: dict[tuple[Any, ...], tuple[Trace, list[Pack]]] = {}

    def adapted(self, train: TrainConfig) -> System:
        """With adapters, frozen and checkpointed as `train` says."""
        mode = train.activation_checkpointing.mode
        if mode not in self._adapted:
            system = copy.deepcopy(self.system)
            with torch.device("meta"):
                rules = apply_lora(system, train.lora)
            freeze(system, [*train.params, *rules])
            if self.packs.layout.features:
                self._aside = Aside.take(system, medium_of(self.packs.layout))
            checkpoint_activations(system, train.activation_checkpointing, find_blocks(system, train.blocks))
            self._adapted[mode] = system
        return self._adapted[mode]

    def parameters(self, train: TrainConfig) -> dict[str, dict[str, int]]:
        """By part, `total` and `trained`."""
        parts = [*self.adapted(train).named_children()]
        if self._aside:
            parts.append((self._aside.tower.name, self._aside.module))
        return {
            name: {
                "total": sum(p.numel() for p in part.parameters()),
                "trained": sum(p.numel() for p in part.parameters() if p.requires_grad),
            }
            for name, part in parts
        }

    def flops(self, train: TrainConfig, ranks: int) -> dict[str, int]:
        """Of a step over all ranks, by phase and `total`."""
        if self.packs.dataset is None:
            trace, packs = self._worst(train, ranks)
            traces = [trace]
        else:
            packs = self.packs.sample
            traces = [
                trace_step(self.adapted(train), self.packs.batch(group), train, self._several(train, ranks))
                for group in self.packs.alike(packs, train.micro_batch)
            ]
        scaled = {
            phase: round(sum(trace.flops[phase] for trace in traces) * self.rows / len(packs))
            for phase in traces[0].flops
        }
        passes = sum(count for phase, count in scaled.items() if phase != "update")
        scaled["update"] = traces[0].flops["update"]  # once, of however many rows
        if isinstance(train.optimizer, SophiaConfig):
            estimates = train.optimizer.share / train.optimizer.every
            scaled["estimates"] = round(estimates * passes * (1 if train.optimizer.estimator == "gnb" else 2))
        return {**scaled, "total": sum(scaled.values())}

    def _several(self, train: TrainConfig, ranks: int) -> bool:
        """Whether a rank has several micro-batches a step."""
        return math.ceil(self.rows / ranks) > train.micro_batch

    def worst(self, train: TrainConfig, ranks: int) -> list[Pack]:
        return self._worst(train, ranks)[1]

    def _worst(self, train: TrainConfig, ranks: int) -> tuple[Trace, list[Pack]]:
        """The trace of the micro-batch that takes the most memory, and its packs."""
        micro_batch = min(train.micro_batch, math.ceil(self.rows / ranks))
        several = self._several(train, ranks)
        key = (micro_batch, several, train.precision, train.activation_checkpointing.mode)
        if key not in self._traces:
            system = self.adapted(train)
            worst = self.packs.worst(micro_batch)
            found = [(trace_step(system, self.packs.batch(packs), train, several), packs) for packs in worst]
            self._traces[key] = max(found, key=lambda one: sum(one[0].peak.values()))
        return self._traces[key]

    def memory(self, train: TrainConfig, ranks: int) -> Memory:
        """Bytes on one rank by kind. `copies`: weights gathered or in another precision; `host`: not on the GPU."""
        trace, packs = self._worst(train, ranks)
        engine = train.engine
        trained = sum(4 * p.numel() for p in self.adapted(train).parameters() if p.requires_grad)
        kept = {"averages": float(trained)} if train.ema else {}
        if isinstance(train.optimizer, SophiaConfig) and train.optimizer.estimator == "hutchinson":
            kept["estimates"] = 2.0 * trained  # weights as they were, and the gradients at one side of them
        found = []
        for moment in trace.moments(accumulates=math.ceil(self.rows / ranks) > len(packs)):
            now: Memory = {**kept, **moment}
            if isinstance(engine, FSDPConfig):
                found.append(self._fsdp(train, engine, now, ranks))
            elif isinstance(engine, DeepSpeedConfig):
                found.append(self._deepspeed(train, engine, now, ranks))
            else:
                found.append({"copies" if kind == "casts" else kind: count for kind, count in now.items()})
        return max(found, key=on_gpu)

    def _fsdp(self, train: TrainConfig, engine: FSDPConfig, now: Memory, ranks: int) -> Memory:
        """Parts of everything; whole are the outermost unit, in float32, and the units at work.

        While one unit is at work the next is gathered; in the backward pass its gradients are whole before they are
        reduced in float32.
        """
        units = self._units(train, [*train.blocks, *engine.units], engine.expert_parallel)
        outer, outer_trained = units.pop("")
        size = {name: count * _bytes(name, train, engine) for name, (count, _) in units.items()}
        largest = sorted(size.values(), reverse=True)
        whole = sum(largest[:2] if engine.reshard_after_forward else largest) + 4 * outer
        gradients = [trained * (4 + _bytes(name, train, engine)) for name, (_, trained) in units.items()]
        in_float32 = outer + sum(count for name, (count, _) in units.items() if _bytes(name, train, engine) == 4)
        casts = now["casts"] * in_float32 / sum(p.numel() for p in self.adapted(train).parameters())
        copies = whole + 4 * outer_trained + max(gradients, default=0) + casts
        kept = {kind: count for kind, count in now.items() if kind not in ("casts", "activations")}
        parts = {kind: count / (engine.shard_size or ranks) for kind, count in kept.items()}
        rest = {"copies": copies, "activations": now["activations"]}
        return {**rest, "host": sum(parts.values())} if engine.cpu_offload else {**parts, **rest}

    def _units(self, train: TrainConfig, patterns: list[str], over: int) -> dict[str, tuple[int, int]]:
        """Parameters, and trained ones, of every module that is gathered as one; "" has what no other has. Of experts
        that are divided over ranks those of one rank."""
        system = self.adapted(train)
        named = [(name, module) for name, module in system.named_modules() if name]
        groups = [one for one in system.modules() if isinstance(one, ExpertGroup) and one.router is not None]
        divided = {id(p) for group in groups for p in group.parameters(recurse=False)}
        taken: set[int] = set()
        units: dict[str, tuple[int, int]] = {}
        for name, module in [*reversed(named), ("", system)]:
            if name and not any(re.fullmatch(pattern, name) for pattern in patterns):
                continue
            own = {id(p): p for p in module.parameters() if id(p) not in taken}
            taken |= own.keys()
            sizes = [(p.numel() // (over if key in divided else 1), p.requires_grad) for key, p in own.items()]
            units[name] = (sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))
        return units

    def _deepspeed(self, train: TrainConfig, engine: DeepSpeedConfig, now: Memory, ranks: int) -> Memory:
        """By stage the optimizer state, gradients and weights are in parts.

        Stages 1 and 2 update a copy of their part of the weights, from a copy of their part of the gradients; stage 3
        gathers weights ahead and keeps up to `LIVE` of them.
        """
        stage = engine.stage
        trained = 4.0 * sum(p.numel() for p in self.adapted(train).parameters() if p.requires_grad)
        part = trained / ranks
        gradients = {0: now["gradients"], 1: trained + part, 2: part, 3: 2 * part}[stage]
        optimizer = now["optimizer"] / (ranks if stage else 1) + (part if stage in (1, 2) else 0)
        found = {
            **now,
            "weights": now["weights"] / (ranks if stage == 3 else 1),
            "gradients": gradients,
            "optimizer": optimizer,
            "copies": now["casts"]
            + (4 * BUCKET if stage else 0)
            + (min(now["weights"], 4 * LIVE) if stage == 3 else 0),
        }
        del found["casts"]
        if engine.offload_optimizer:
            found["host"] = found.pop("gradients") + found.pop("optimizer")
        return found

    def remedies(self, train: TrainConfig, ranks: int, limit: float) -> list[str]:
        """Settings with which a rank stays within so many bytes, as alternatives: what does it alone, or else what it
        takes together, or else more ranks and the host's memory."""
        lighter = _lighter(train)
        alone = {text: changes for text, changes in lighter if self._fits(_with(train, changes), ranks, limit)}
        if alone:
            return [self._largest(train, ranks, limit) if "micro_batch" in alone[text] else text for text in alone]
        strongest = {key: (text, value) for text, changes in lighter for key, value in changes.items()}
        together = _with(train, {key: value for key, (_, value) in strongest.items()})
        names = [text for text, _ in strongest.values()]
        if self._fits(together, ranks, limit):
            return [" ".join(names)]
        found = []
        for settings, known in ((train, list[str]()), (together, names)):
            for text, changes, count in _spread(settings, ranks):
                if count <= self.rows and self._fits(_with(settings, changes), count, limit):
                    found.append(" ".join([*known, text]))
                    break
        return list(dict.fromkeys(found))

    def _largest(self, train: TrainConfig, ranks: int, limit: float) -> str:
        """The micro-batch to set, where one of 1 row fits."""
        one, now = (on_gpu(self.memory(_with(train, {"micro_batch": rows}), ranks)) for rows in (1, train.micro_batch))
        for rows in (n for n in range(train.micro_batch - 1, 1, -1) if train.micro_batch % n == 0):
            likely = one + (now - one) * (rows - 1) / (train.micro_batch - 1) <= limit  # saves most traces
            if likely and self._fits(_with(train, {"micro_batch": rows}), ranks, limit):
                return f"train.micro_batch={rows}"
        return "train.micro_batch=1"

    def _fits(self, train: TrainConfig, ranks: int, limit: float) -> bool:
        return on_gpu(self.memory(train, ranks)) <= limit


def _with(train: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    return train.model_copy(update=changes)


def _lighter(train: TrainConfig) -> list[tuple[str, dict[str, Any]]]:
    """Settings that take less memory on the same GPUs, the cheapest in time first."""
    found: list[tuple[str, dict[str, Any]]] = []
    if train.precision == "fp32":
        found.append(("train.precision=bf16", {"precision": "bf16"}))
    if train.micro_batch > 1:
        found.append(("train.micro_batch=1", {"micro_batch": 1}))
    mode = train.activation_checkpointing.mode
    for stronger in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[mode]:
        setting = train.activation_checkpointing.model_copy(update={"mode": stronger})
        found.append((f"train.activation_checkpointing.mode={stronger}", {"activation_checkpointing": setting}))
    return found


def _spread(train: TrainConfig, ranks: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Sharding over more GPUs, then the host's memory: (settings as text, changes, number of GPUs)."""
    engine = train.engine if isinstance(train.engine, FSDPConfig) else FSDPConfig()
    full = engine.model_copy(update={"shard_size": None})
    for count in RANKS:
        if count > ranks:
            yield f"train.engine.kind=fsdp on {count} GPUs", {"engine": full}, count
    if not engine.cpu_offload:
        setting = engine.model_copy(update={"cpu_offload": True})
        yield "train.engine={kind: fsdp, cpu_offload: true}", {"engine": setting}, ranks


def _bytes(unit: str, train: TrainConfig, engine: FSDPConfig) -> int:
    """Of a gathered weight of a unit."""
    precision: str = train.precision
    for rule in engine.precision:
        if re.fullmatch(rule.match, unit):
            precision = rule.weights
    return 2 if precision == "bf16" else 4
