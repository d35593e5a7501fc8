"""Mixture of depths against transformers' own layer on the tokens of each segment that take part."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_loops import SMALL, batch, choice, share, text_lm
from torch import Tensor, nn

from mm.data.batch import IGNORE, PackedBatch
from mm.errors import ConfigError
from mm.models import attention, backbone
from mm.models.config import DepthsConfig
from mm.models.depths import NAME, stage_layers
from mm.models.routing import Routing

ROWS = ("ttiitttt|iiiit", "iitttttt", "tttttiiiiiiiii|t", "tt|i")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "chameleon": {"model_type": "chameleon", "num_key_value_heads": 4, "swin_norm": False},
    "chameleon, norms behind": {"model_type": "chameleon", "num_key_value_heads": 4, "swin_norm": True},
}


def dense(kind: str = "llama", layers: int = 1) -> Any:
    torch.manual_seed(0)
    values = {**SMALL, "vocab_size": 60, "num_hidden_layers": layers, **KINDS[kind]}
    return backbone.from_config(values, attention.register())


def staged(model: Any, capacity: float = 0.25, **depths: Any) -> Any:
    made = copy.deepcopy(model)
    torch.manual_seed(3)
    stage_layers(made, DepthsConfig(capacity=capacity, **depths))
    return made


def routing_of(packed: PackedBatch, together: int | None = None) -> Routing:
    count, length = packed.labels.shape
    pool = torch.arange(count).repeat_interleave(length) // (together or count)
    group = torch.where(packed.segment_ids.flatten() > 0, 0, -1)
    return Routing(("all",), group, pool, int(pool.max()) + 1, torch.arange(len(pool)), len(pool))


def layer_states(model: Any, packed: PackedBatch, embeddings: Tensor, routing: Routing | None = None) -> Tensor:
    """[N, D]: what the first layer gives."""
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    keep = torch.arange(1)
    backbone.run(
        model, embeddings, packed.segment_ids, packed.position_ids, keep, packed.isolate_segments, routing=routing
    )
    hook.remove()
    return seen[0][0]


def embeddings_of(packed: PackedBatch) -> Tensor:
    return torch.randn(*packed.labels.shape, SMALL["hidden_size"], generator=torch.Generator().manual_seed(4))


def by_segment(model: Any, router: Tensor, packed: PackedBatch, x: Tensor, pools: list[int], capacity: float) -> Tensor:
    """The first layer, staged, by transformers' ordinary attention on what of each segment takes part; x: [B, L, D]."""
    rows, length = packed.labels.shape
    flat, scope = x.flatten(0, 1), packed.segment_ids.flatten().tolist()
    real = [at for at in range(rows * length) if scope[at]]
    scores = [[float(flat[at].detach() @ router[0].detach())] for at in real]
    taken = choice(scores, [pools[at] for at in real], capacity)
    parts: dict[tuple[int, int], list[int]] = {}
    for at, (mine,) in zip(real, taken, strict=True):
        if mine:
            parts.setdefault((at // length, scope[at]), []).append(at)
    out = list(flat.unbind())
    layer = model.model.layers[0]
    for places in parts.values():
        own = flat[places][None]
        positions = packed.position_ids.flatten()[places][None]
        with backbone.ordinary_attention(model):
            angles = model.model.rotary_emb(own, positions)
            given = layer(own, attention_mask=None, position_ids=positions, position_embeddings=angles)
        given = (given[0] if isinstance(given, tuple) else given)[0]
        for number, at in enumerate(places):
            out[at] = flat[at] + torch.sigmoid(flat[at] @ router[0]) * (given[number] - flat[at])
    return torch.stack(out)


def gradients(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weighed = (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()
    return dict(zip(inputs, torch.autograd.grad(weighed, list(inputs.values())), strict=True))


@pytest.mark.parametrize("together", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quarter_takes_part_in_its_own_segment_at_its_own_positions(kind: str, together: int | None) -> None:
    """In outputs and in all gradients, the router's among them."""
    model, packed = dense(kind), batch(*ROWS)
    made, routing = staged(model), routing_of(packed, together)
    x = embeddings_of(packed).requires_grad_()
    out = layer_states(made, packed, x, routing)
    layer = {name: p for name, p in made.model.layers[0].named_parameters() if name != "depth_router.weight"}
    router = made.model.layers[0].depth_router.weight
    found = gradients(out, {"x": x, "router": router, **layer})

    y, own_router = x.detach().clone().requires_grad_(), router.detach().clone().requires_grad_()
    expected = by_segment(model, own_router, packed, y, routing.pool.tolist(), 0.25)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    right = gradients(expected, {"x": y, "router": own_router, **dict(model.model.layers[0].named_parameters())})
    assert found.keys() == right.keys() and float(right["router"].norm()) > 0.1
    for name, gradient in right.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("together", [None, 1])
def test_the_layer_runs_on_exactly_its_share_and_leaves_the_others_to_the_last_bit(together: int | None) -> None:
    packed = batch(*ROWS)
    made, routing, x = staged(dense()), routing_of(packed, together), embeddings_of(packed)
    ran: list[tuple[int, ...]] = []
    for part in (made.model.layers[0].self_attn.q_proj, made.model.layers[0].mlp):
        part.register_forward_pre_hook(lambda _, args: ran.append(tuple(args[0].shape)))
    out = layer_states(made, packed, x, routing)
    tokens = [int((row > 0).sum()) for row in packed.segment_ids]
    expected = sum(share(size, 0.25) for size in tokens) if together else share(sum(tokens), 0.25)
    assert ran == [(1, expected, SMALL["hidden_size"])] * 2
    record = routing.records["0", NAME]
    assert int(record.member.sum()) == expected
    part_taken = torch.zeros(len(out), dtype=torch.bool)
    part_taken[record.places[record.member[:, 0]]] = True
    assert not bool(part_taken[packed.segment_ids.flatten() == 0].any())
    same = (out == x.flatten(0, 1)).all(1)
    assert torch.equal(same, ~part_taken)


def test_everyone_at_full_weight_is_the_plain_layer() -> None:
    """A feature that every token has, and a router that looks at it alone, make every score 1."""
    model, packed = dense(layers=2), batch(*ROWS)
    x = embeddings_of(packed)
    x[..., 0] = 1.0
    made = staged(model, capacity=1.0)  # of two layers the first
    nn.init.zeros_(made.model.layers[0].depth_router.weight)
    made.model.layers[0].depth_router.weight.data[0, 0] = 1e4
    keep = (packed.segment_ids.flatten() > 0).nonzero()[:, 0]
    where = packed.segment_ids, packed.position_ids, keep, True
    found = backbone.run(made, x, *where, routing=routing_of(packed))
    torch.testing.assert_close(found, backbone.run(model, x, *where), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("depths", "layers"),
    [({}, [0, 2]), ({"first": 1}, [1, 3]), ({"every": 3}, [0, 3]), ({"every": 1, "first": 2}, [2, 3])],
)
def test_which_layers(depths: dict[str, int], layers: list[int]) -> None:
    made = staged(dense(layers=4), **depths)
    assert [number for number, layer in enumerate(made.model.layers) if hasattr(layer, "depth_router")] == layers


def test_a_layer_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match=r"depths\.first 4.*4 layers"):
        staged(dense(layers=4), first=4)


def test_of_the_tokens_that_take_part_experts_choose_theirs() -> None:
    """A quarter of all tokens, then of these those of each modality."""
    experts = {"text": 2, "image": 2}
    system, packed = text_lm(experts=experts, depths={}), batch(*ROWS)
    assert system.sparsity is not None
    routing = system.sparsity.routing(packed, choose=True)
    system.token_losses(packed, routing)
    modality = packed.modality.flatten()
    for layer in range(4):
        everyone = (packed.segment_ids.flatten() > 0).nonzero()[:, 0]
        if layer % 2 == 0:
            depth = routing.records[str(layer), NAME]
            assert depth.places.tolist() == everyone.tolist()
            everyone = everyone[depth.member[:, 0]]
            assert len(everyone) == share(len(depth.places), 0.25)
        for number, name in enumerate(experts):
            record = routing.records[str(layer), name]
            own = [place for place, at in enumerate(everyone if layer % 2 == 0 else range(len(modality)))
                   if modality[at] == number and packed.segment_ids.flatten()[at] > 0]  # fmt: skip
            assert record.places.tolist() == own
            assert record.member.sum(0).tolist() == [share(len(own), 0.5)] * 2


class Says(nn.Module):
    """An auxiliary router that says the same of every token."""

    def __init__(self, yes: bool) -> None:
        super().__init__()
        self.yes = yes

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.full((len(hidden), 1), 1.0 if self.yes else -1.0)


def test_auxiliary_routers_may_say_that_all_or_none_take_part() -> None:
    """None at all: the layer runs on nothing and changes nothing."""
    model, packed = dense(), batch(*ROWS)
    made, x = staged(model), embeddings_of(packed)
    told = {yes: replace(routing_of(packed), auxiliary={"0": {NAME: Says(yes)}}) for yes in (True, False)}
    nobody = layer_states(made, packed, x, told[False])
    assert torch.equal(nobody, x.flatten(0, 1))
    everyone = layer_states(made, packed, x, told[True])
    expected = by_segment(model, made.model.layers[0].depth_router.weight, packed, x, [0] * len(everyone), 1.0)
    torch.testing.assert_close(everyone, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [None, {"text": 2, "all": 2}], ids=["", "experts"])
def test_a_batch_of_padding_gives_gradients_of_zero(experts: Any) -> None:
    """As ranks with data expect of one without."""
    system, packed = text_lm(experts=experts, depths={}).train(), batch("tti", "ttt")
    nothing, unlearned = torch.zeros_like(packed.segment_ids), torch.full_like(packed.labels, IGNORE)
    system.token_losses(replace(packed, segment_ids=nothing, labels=unlearned, targets=-1)).sum().backward()
    for name, parameter in system.language.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
