"""Sparsity: what a generative system has besides its backbone when that has experts or mixture of depths.

It makes the routing of a batch, holds the auxiliary routers and their objective, and says in metrics what routers do.
The auxiliary routers stand here and not in the layers: they learn from hidden states that the layers leave behind,
after them, so the model is not disturbed, and a frozen or sharded layer has nothing of theirs to hand on.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.data.batch import MODALITIES, PackedBatch
from mm.errors import ConfigError
from mm.models import depths, experts
from mm.models.config import BackboneSection
from mm.models.routing import AuxiliaryRouter, Noise, Record, Router, Routing

MLP = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class Sparsity(nn.Module):
    """See the module. `routers`: the auxiliary ones, by layer and group.

    Args:
        language: a dense causal language model of transformers; experts and depths are put into it.
        copies: experts begin as copies of its MLPs; else they are random.
        media: the media that the system takes.
    """

    def __init__(self, language: Any, config: BackboneSection, copies: bool, media: tuple[str, ...]) -> None:
        super().__init__()
        self.experts, self.depths = config.experts, config.depths
        assert config.routing is not None
        self.auxiliary, self.rows = config.routing.auxiliary, config.routing.routing_rows
        self.step = 0
        names = tuple(config.experts.groups) if config.experts else ("all",)
        for medium in ("text", *media):
            if medium not in names and "all" not in names:
                raise ConfigError(
                    f"model.experts: the model takes {medium}, and there are no experts for it; add {medium}: 1 or "
                    "more, or all"
                )
        self.names = names
        self._group = [names.index(one if one in names else "all") if {one, "all"} & {*names} else -1
                       for one in MODALITIES]  # fmt: skip
        if config.experts:
            experts.replace_mlps(language, config.experts, copies)
        if config.depths:
            depths.stage_layers(language, config.depths)
        layers = experts.layers_of(language, "experts")
        layers[-1].register_forward_hook(_note_norm, with_kwargs=True)
        width = language.get_input_embeddings().embedding_dim
        self.routed = {
            str(number): {name: router.out_features for name, router in _routers(layer)}
            for number, layer in enumerate(layers)
        }
        """Columns of every router, by layer and group."""
        self.routers = nn.ModuleDict()
        if self.auxiliary != "none":
            for number, groups in self.routed.items():
                made = {name: AuxiliaryRouter(width, columns) for name, columns in groups.items()}
                if made:
                    self.routers[number] = nn.ModuleDict(made)

    @property
    def learns(self) -> bool:
        """Whether auxiliary routers are trained."""
        return len(self.routers) > 0

    def routing(self, batch: PackedBatch, choose: bool) -> Routing:
        """That of a batch: experts choose, as in training, or auxiliary routers say.

        Raises `ConfigError` where these are needed and there are none.
        """
        rows, length = batch.segment_ids.shape
        device = batch.segment_ids.device
        group = torch.tensor(self._group, device=device)[batch.modality.long()]
        row = torch.arange(rows, device=device)[:, None].expand(rows, length)
        together = self.rows or rows
        noise = None
        if choose and (scale := self._noise()):
            noise = Noise(scale, batch.draws.tolist())
        return Routing(
            self.names,
            torch.where(batch.segment_ids > 0, group, -1).flatten(),
            (row // together).flatten(),
            -(-rows // together),
            torch.arange(rows * length, device=device),
            rows * length,
            auxiliary=None if choose else self.told(),
            noise=noise,
            keep=choose and self.learns,
        )

    def told(self) -> Any:
        """The auxiliary routers, to route by. Raises `ConfigError` where the model needs some and has none."""
        if not self.learns and any(self.routed.values()):
            raise ConfigError(
                "this model has no auxiliary routers, and without them a token's experts depend on the tokens behind "
                "it: nothing can be evaluated or generated. Set model.experts.auxiliary=along (model.depths.auxiliary, "
                "without experts), or train them in a stage of their own (alone); or evaluation.every=0, without "
                "data.test"
            )
        return self.routers

    def _noise(self) -> float:
        noise = self.experts.noise if self.experts else None
        if noise is None or self.step >= noise.steps:
            return 0.0
        return 1 - self.step / noise.steps if noise.decay else 1.0

    def loss(self, routing: Routing) -> Tensor:
        """Sum over tokens of the auxiliary routers' binary cross-entropy, in nats, the mean over layers and experts,
        against what was chosen (MoMa 2.4)."""
        losses = []
        for layer, groups in self.routers.items():
            for name, router in groups.items():  # type: ignore[operator]
                record = routing.records.get((layer, name))
                if record is None:  # no such token in the batch; other ranks may have some
                    nothing = torch.zeros(1, router.inner.in_features, device=routing.group.device)
                    losses.append(0 * router(nothing).sum())
                    continue
                assert record.hidden is not None
                said = router(record.hidden[record.places])
                target = record.member.to(said.dtype)
                each = F.binary_cross_entropy_with_logits(said, target, reduction="sum")
                losses.append(each / said.shape[1])
        return torch.stack(losses).sum() / len(self.routers)

    def metrics(self, routing: Routing) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What routers did, and of how many tokens each number is a mean.

        Of each group the shares of its tokens that no expert took (`unrouted/GROUP`), one (`once/GROUP`), or more
        (`more/GROUP`), and the tokens of the busiest expert over those of the mean one (`busiest/GROUP`); means over
        the tokens of all layers. `output_norm`: of what the last layer gives a token. Its growth without end comes long
        before divergence (Chameleon, 2405.09818 2.2).
        """
        device = routing.group.device
        values: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        columns = {name for groups in self.routed.values() for name in groups if name != depths.NAME}
        for name in sorted(columns):
            records = [record for (_, group), record in routing.records.items() if group == name]
            tokens = sum(len(record.places) for record in records)
            found = sum((len(record.places) * _seen(record) for record in records), torch.zeros(4, device=device))
            for key, value in zip(("unrouted", "once", "more", "busiest"), found / max(tokens, 1), strict=True):
                values[f"{key}/{name}"] = value
                counts[f"{key}/{name}"] = torch.tensor(float(tokens), device=device)
        values["output_norm"] = routing.notes["output_norm"]
        return values, counts


def _seen(record: Record) -> Tensor:
    taken = record.member.float()
    experts = taken.sum(1)
    loads = taken.sum(0)
    return torch.stack([
        (experts == 0).float().mean(), (experts == 1).float().mean(), (experts > 1).float().mean(),
        loads.max() / loads.mean().clamp(min=1e-9),
    ])  # fmt: skip


def _routers(layer: Any) -> list[tuple[str, Router]]:
    """Of a decoder layer, by group."""
    groups = layer.mlp.groups.items() if isinstance(layer.mlp, experts.Experts) else []
    found = [(name, group.router) for name, group in groups if group.router is not None]
    return [*found, *([(depths.NAME, layer.depth_router)] if hasattr(layer, "depth_router") else [])]


def _note_norm(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Leave behind how long what the last layer gives of a token is, on average."""
    routing: Routing | None = kwargs.get("routing")
    if routing is not None:
        hidden = (out[0] if isinstance(out, tuple) else out).detach()[0]
        real = (routing.group >= 0).float()
        norms = torch.linalg.vector_norm(hidden.float(), dim=1)
        routing.notes["output_norm"] = (norms * real).sum() / real.sum().clamp(min=1)


def adopt(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of another model, by name, as this one's (upcycling; MoMa 2.5).

    An MLP, or a group with fewer experts, becomes a group: its experts are copies, in turn. A group that the other
    model has not takes those of `all`. Routers for another number of experts, auxiliary ones too, begin anew.

    Args:
        own: the tensors of this model by name, for their shapes.
    """
    found = dict(tensors)
    used: set[str] = set()
    for name, tensor in own.items():
        if name.startswith("sparsity.") and name in tensors and tensors[name].shape != tensor.shape:
            del found[name]
        before, dot, group = name.partition(".mlp.groups.")
        if not dot or (name in tensors and tensors[name].shape == tensor.shape):
            continue
        group, _, part = group.partition(".")
        sources = [name, f"{before}.mlp.groups.all.{part}"]
        dense = [f"{before}.mlp.{one}" for one in MLP]
        there = next((one for one in sources if one in tensors), None)
        if part == "router.weight":
            found.pop(name, None)
        elif there is not None:
            found[name] = _in_turn(tensors[there], tensor)
            used |= {there} - {name}
        elif all(one in tensors for one in dense):
            gate, up, down = (tensors[one] for one in dense)
            found[name] = _in_turn((torch.cat([gate, up]) if part == "gate_up" else down)[None], tensor)
            used |= {*dense}
    return {name: tensor for name, tensor in found.items() if name not in used or name in own}


def _in_turn(given: Tensor, wanted: Tensor) -> Tensor:
    """[E', …] as [E, …]: copies in turn. As it is, to be refused by its shape, where E is no multiple."""
    if len(wanted) % len(given) or given.shape[1:] != wanted.shape[1:]:
        return given
    return given.repeat(len(wanted) // len(given), *[1] * (given.ndim - 1))
