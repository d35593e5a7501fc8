"""Experts in place of a language model's MLPs, in groups by modality (MoMa, 2407.21770 2.2).

A layer's attention and norms are shared; its MLP becomes a few for each modality. Each group chooses, weighs and adds
on its own (`mm.models.routing`), one after the other. Since all experts of a group take equally many tokens, a group is
two batched matrix products; where auxiliary routers choose, they do not, and it is two grouped ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm.errors import ConfigError
from mm.models.config import ExpertsConfig
from mm.models.routing import Record, Router, Routing, Share

Activation = Callable[[Tensor], Tensor]
Implementation = Literal["bmm", "grouped", "loop"]


class Experts(nn.Module):
    """Stands where the MLP of a layer was: [1, N, D] to [1, N, D], zeros for tokens that no expert took.

    `routing` is set for the time of the layer's call (`replace_mlps`).
    """

    routing: Routing | None = None

    def __init__(self, groups: dict[str, "ExpertGroup"], layer: int) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(groups)
        self.layer = str(layer)

    @torch.compiler.disable  # it depends on the batch, and would be compiled anew for each
    def forward(self, hidden: Tensor) -> Tensor:
        if self.routing is None:
            raise ValueError("a model with experts needs a `routing` in its call")
        flat = hidden.flatten(0, 1)
        out = torch.zeros_like(flat)
        for (name, group), share in zip(self.groups.items(), self.routing.shares, strict=True):
            group.add(out, flat, share, self.routing, self.layer, name)  # type: ignore[operator]
        return out.view_as(hidden)


class ExpertGroup(nn.Module):
    """The experts of one modality: gated MLPs, act(x W_gate) * (x W_up) W_down.

    gate_up: [E, 2 F, D]; down: [E, D, F], in the layout of transformers' experts. A single one has no router.
    """

    parallel: Any = None
    """What carries tokens to the ranks of their experts and back, where experts are divided over ranks."""

    def __init__(self, experts: int, width: int, hidden: int, act: Activation, config: ExpertsConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.router = Router(width, experts) if experts > 1 else None
        self.experts, self.act = experts, act
        self.capacity = config.capacity or 1 / experts
        self.normalize = config.normalize

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        for weight in self.parameters():
            weight.normal_(0, std)

    @torch.no_grad()
    def copy_from(self, mlp: Any) -> None:
        """Every expert becomes a copy of an MLP."""
        self.gate_up.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(self.gate_up))
        self.down.copy_(mlp.down_proj.weight.expand_as(self.down))

    def add(self, out: Tensor, flat: Tensor, share: Share, routing: Routing, layer: str, name: str) -> None:
        """Add what the experts give of their tokens among flat [N, D] to out [N, D].

        Where there are none, the same is done with none: weights get a gradient of zero, and ranks, of which others may
        have some, do the same things in the same order, whatever is gathered, sent or recomputed on the way.
        """
        places = share.places
        if self.router is None:
            given = self._run(flat.index_select(0, places), [len(places)], routing, name)
            out.index_add_(0, places, given.to(out.dtype))
        elif routing.auxiliary is None:
            self._add_chosen(out, flat, share, routing, layer, name)
        else:
            self._add_told(out, flat, places, routing, layer, name)

    def _add_chosen(self, out: Tensor, flat: Tensor, share: Share, routing: Routing, layer: str, name: str) -> None:
        """Each expert takes the tokens that it scores highest."""
        assert self.router is not None
        places, experts = share.places, self.experts
        scores = self.router(flat).index_select(0, places)
        if routing.noise is not None:
            noise = routing.noise.draw(f"{layer}.{name}", routing.origin[places], routing.positions, experts)
            scores = scores + noise.to(scores.dtype)
        chosen = share.choose(scores, self.capacity)  # e k
        token = chosen.flatten()
        weights = torch.sigmoid(scores).T.gather(1, chosen).flatten()
        given = self._run(flat.index_select(0, places[token]), [chosen.shape[1]] * experts, routing, name)
        self._combine(out, given, weights, token, places)
        if len(places):
            member = torch.zeros(experts, len(places), dtype=torch.bool, device=flat.device)
            member.scatter_(1, chosen, True)
            routing.records[layer, name] = Record(flat.detach() if routing.keep else None, places, member.T)

    def _add_told(self, out: Tensor, flat: Tensor, places: Tensor, routing: Routing, layer: str, name: str) -> None:
        """Auxiliary routers say which experts take a token; it weighs as much as the routers themselves say."""
        assert self.router is not None and routing.auxiliary is not None
        member = routing.auxiliary[layer][name](flat[places]) > 0
        if len(places):
            routing.records[layer, name] = Record(None, places, member)
        expert, token = member.T.nonzero().unbind(1)
        counts = torch.bincount(expert, minlength=self.experts).tolist()
        weights = torch.sigmoid(self.router(flat[places]))[token, expert]
        self._combine(out, self._run(flat[places[token]], counts, routing, name), weights, token, places)

    def _combine(self, out: Tensor, given: Tensor, weights: Tensor, token: Tensor, places: Tensor) -> None:
        """Add given [M, D] with weights [M], of tokens int64 [M] among the places."""
        if self.normalize:
            totals = weights.new_zeros(len(places)).index_add_(0, token, weights)
            weights = weights / totals.index_select(0, token).clamp(min=1e-30)
        out.index_add_(0, places[token], (given * weights[:, None]).to(out.dtype))

    def _run(self, x: Tensor, counts: list[int], routing: Routing, name: str) -> Tensor:
        if self.parallel is not None:
            # Experts choose as many tokens in every layer; auxiliary routers do not.
            asked = routing.asked if routing.auxiliary is None else {}
            return self.parallel(x, counts, self, asked, name)
        return expert_ffn(x, counts, self.gate_up, self.down, self.act)


def expert_ffn(
    x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, act: Activation,
    implementation: Implementation | None = None,
) -> Tensor:  # fmt: skip
    """What experts give of their tokens.

    Args:
        x: [sum of counts, D], the tokens of the first expert first. counts: of each expert.
        gate_up: [E, 2 F, D]; down: [E, D, F].
        implementation: `bmm`, for equal counts; `grouped`, by `F.grouped_mm`, which takes no float64, and widths of
            whole 16 bytes; `loop`, one expert after the other. None: the first of them that can.

    Returns:
        [sum of counts, D].
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # It does not know grouped products, nor what is inside of a function with a backward pass of its own.
        x, gate_up, down = (one.to(torch.get_autocast_dtype(device)) for one in (x, gate_up, down))
    run = IMPLEMENTATIONS[implementation or _choose(x, counts, gate_up, down)]
    return run(x, counts, gate_up, down, act)


def _choose(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Implementation:
    if len(set(counts)) == 1:
        return "bmm"
    wide = all(size * x.element_size() % 16 == 0 for size in (*gate_up.shape[1:], down.shape[2]))
    return "grouped" if wide and x.dtype != torch.float64 else "loop"


def _bmm(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, act: Activation) -> Tensor:
    given: Tensor = _EqualCounts.apply(x.view(len(counts), counts[0], x.shape[1]), gate_up, down, act)
    return given.flatten(0, 1)


class _EqualCounts(torch.autograd.Function):
    """The batched products of x [E, K, D].

    Its own backward pass keeps one activation, of 2 F a token, where autograd keeps it, the activated half and the
    product of both; and it makes gradients as the weights lie, which autograd would turn around in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, act: Activation) -> Tensor:
        inner = torch.bmm(x, gate_up.mT)  # e k 2f
        ctx.save_for_backward(x, gate_up, down, inner)
        ctx.act = act
        gate, up = inner.chunk(2, dim=2)
        return torch.bmm(act(gate) * up, down.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, inner = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        gate, up = inner.chunk(2, dim=2)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        product = activated.detach() * up
        of_product = torch.bmm(grad, down)
        of_inner = torch.empty_like(inner)
        of_gate, of_up = of_inner.chunk(2, dim=2)
        torch.mul(of_product, activated.detach(), out=of_up)
        of_gate.copy_(torch.autograd.grad(activated, gate, of_product.mul_(up))[0])
        return (
            torch.bmm(of_inner, gate_up) if wanted[0] else None,
            torch.bmm(of_inner.mT, x) if wanted[1] else None,
            torch.bmm(grad.mT, product) if wanted[2] else None,
            None,
        )


def _grouped(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, act: Activation) -> Tensor:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(x.device)
    gate, up = F.grouped_mm(x, gate_up.mT, offs=ends).chunk(2, dim=1)
    return F.grouped_mm(act(gate) * up, down.mT, offs=ends)


def _loop(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, act: Activation) -> Tensor:
    given = []
    for own, first, second in zip(x.split(counts), gate_up, down, strict=True):
        gate, up = F.linear(own, first).chunk(2, dim=1)
        given.append(F.linear(act(gate) * up, second))
    return torch.cat(given)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, list[int], Tensor, Tensor, Activation], Tensor]] = {
    "bmm": _bmm,
    "grouped": _grouped,
    "loop": _loop,
}


def replace_mlps(language: Any, config: ExpertsConfig, copies: bool) -> None:
    """Put experts where the MLPs of a causal language model of transformers are.

    copies: every expert begins as a copy of the MLP; else all are random, as the model's own layers are.
    Raises `ConfigError` for MLPs of another kind than Llama's.
    """
    for number, layer in enumerate(layers_of(language, "experts")):
        mlp = getattr(layer, "mlp", None)
        names = {name for name, _ in mlp.named_parameters()} if mlp is not None else set()
        if mlp is None or names != {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}:
            raise ConfigError(
                f"model.experts: the layers of {language.config.model_type} have no gated MLP without biases "
                "(gate_proj, up_proj, down_proj); choose a model like Llama, Qwen, Mistral or Chameleon"
            )
        inner, width = mlp.gate_proj.weight.shape
        if copies and config.hidden not in (None, inner):
            raise ConfigError(
                f"model.experts.hidden {config.hidden}: copies of MLPs that are {inner} wide; leave it out"
            )
        groups = {}
        with torch.device(mlp.gate_proj.weight.device):
            for name, experts in config.groups.items():
                group = ExpertGroup(experts, width, config.hidden or inner, mlp.act_fn, config)
                group.initialize(language.config.initializer_range)
                if copies:
                    group.copy_from(mlp)
                groups[name] = group
        layer.mlp = Experts(groups, number)
        layer.forward = partial(_routed, layer, layer.forward)


def layers_of(language: Any, key: str) -> nn.ModuleList:
    """The decoder layers of a causal language model. Raises `ConfigError` where they are not found."""
    layers = getattr(language.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"model.{key}: the layers of {language.config.model_type} are not known; choose another model"
        )
    return layers


def _routed(layer: Any, forward: Callable[..., Any], *args: Any, routing: Routing | None = None, **kwargs: Any) -> Any:
    """`forward` of a layer, whose MLP, which transformers calls with the hidden states alone, is told the routing."""
    layer.mlp.routing = routing
    try:
        return forward(*args, **kwargs)
    finally:
        layer.mlp.routing = None
