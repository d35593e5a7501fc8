"""Experts against loops over tokens and experts, and against the dense models that they are made from."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_loops import SMALL, Weights, batch, expert_layer, share, swiglu, text_lm
from torch import Tensor, nn

from mm.data.batch import PackedBatch
from mm.errors import ConfigError
from mm.models import attention, backbone
from mm.models.config import ExpertsConfig
from mm.models.experts import Activation, ExpertGroup, Experts, Implementation, expert_ffn, replace_mlps
from mm.models.routing import Routing

WIDTH, INNER = 16, 24
ROWS = ("ttiitttt|iiiit", "iitaaaat", "tttttiiiiiiiii", "aat|i")
GROUPS: list[dict[str, int]] = [
    {"text": 4, "image": 4, "all": 1}, {"all": 8}, {"text": 3, "image": 1, "audio": 2}, {"text": 1, "all": 2},
]  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "head_dim": 8},
    "chameleon": {"model_type": "chameleon", "num_key_value_heads": 4, "swin_norm": False},
    "chameleon, norms behind": {"model_type": "chameleon", "num_key_value_heads": 4, "swin_norm": True},
}


def experts_of(groups: dict[str, int], **settings: Any) -> Experts:
    """A layer in float64."""
    torch.manual_seed(1)
    config = ExpertsConfig.model_validate({**groups, **settings})
    made = {name: ExpertGroup(number, WIDTH, INNER, F.silu, config) for name, number in groups.items()}
    for group in made.values():
        group.initialize(0.5)
    return Experts(made, 0).double()


def routing_of(rows: tuple[str, ...], groups: dict[str, int], together: int | None = None) -> Routing:
    """Of rows as in `sparse_loops.batch`, in which experts choose."""
    packed = batch(*rows)
    names = tuple(groups)
    letters = {0: "text", 1: "image", 2: "audio"}
    of = [names.index(letters[m] if letters[m] in names else "all") for m in packed.modality.flatten().tolist()]
    group = torch.where(packed.segment_ids.flatten() > 0, torch.tensor(of), -1)
    count, length = packed.labels.shape
    pool = torch.arange(count).repeat_interleave(length) // (together or count)
    return Routing(names, group, pool, int(pool.max()) + 1, torch.arange(len(pool)), len(pool))


def run(layer: Experts, hidden: Tensor, routing: Routing) -> Tensor:
    """[N, D] to [N, D]."""
    layer.routing = routing
    try:
        return layer(hidden[None])[0]
    finally:
        layer.routing = None


def hidden_of(routing: Routing) -> Tensor:
    return torch.randn(routing.positions, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a sum of outputs that weighs each differently."""
    weighed = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    found = torch.autograd.grad(weighed, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs.items(), found, strict=True)
    }


def leaves(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Weights]:
    """Copies, to differentiate by."""
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    return hidden.detach().double().requires_grad_(), weights


def names_of(routing: Routing) -> list[str | None]:
    return [None if number < 0 else routing.groups[number] for number in routing.group.tolist()]


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize("together", [None, 1, 2])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_a_layer_is_a_loop_over_pools_experts_and_tokens(
    groups: dict[str, int], together: int | None, normalize: bool
) -> None:
    """In outputs, in who took what, and in the gradients of inputs, routers and experts."""
    layer, routing = experts_of(groups, normalize=normalize), routing_of(ROWS, groups, together)
    hidden = hidden_of(routing).requires_grad_()
    out = run(layer, hidden, routing)
    x, weights = leaves(layer, hidden)
    expected, members = expert_layer(x, groups, names_of(routing), routing.pool.tolist(), weights, normalize=normalize)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert {name: record.member.tolist() for (_, name), record in routing.records.items()} == members
    found = gradients(out, {"hidden": hidden, **dict(layer.named_parameters())})
    right = gradients(expected, {"hidden": x, **weights})
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_every_expert_takes_its_share_of_its_own_tokens_and_none_of_others_or_of_padding(
    groups: dict[str, int],
) -> None:
    layer, routing = experts_of(groups), routing_of(ROWS, groups, 2)
    out = run(layer, hidden_of(routing), routing)
    of = names_of(routing)
    assert out[[at for at, name in enumerate(of) if name is None]].eq(0).all()
    for (_, name), record in routing.records.items():
        own = [at for at, group in enumerate(of) if group == name]
        assert record.places.tolist() == own
        sizes = [sum(int(routing.pool[at]) == pool for at in own) for pool in range(2)]
        each = sum(share(size, 1 / groups[name]) for size in sizes)
        assert record.member.sum(0).tolist() == [each] * groups[name]
    assert {name for _, name in routing.records} == {name for name, number in groups.items() if number > 1}


def test_pools_choose_apart() -> None:
    groups = GROUPS[0]
    layer, whole = experts_of(groups), routing_of(ROWS, groups, 2)
    hidden = hidden_of(whole)
    together = run(layer, hidden, whole)
    length = len(hidden) // len(ROWS)
    for first in (0, 2):
        part = routing_of((*ROWS[first : first + 2], ROWS[2]), groups, 2)  # a third row, for the length
        here = slice(first * length, (first + 2) * length)
        alone = run(layer, torch.cat([hidden[here], hidden[:length]]), part)[: 2 * length]
        torch.testing.assert_close(alone, together[here], rtol=1e-12, atol=1e-12)


def test_rows_in_another_order_give_the_same_in_that_order() -> None:
    groups, order = GROUPS[0], [2, 0, 3, 1]
    layer, routing = experts_of(groups), routing_of(ROWS, groups)
    moved = routing_of(tuple(ROWS[row] for row in order), groups)
    hidden = hidden_of(routing).view(len(ROWS), -1, WIDTH)
    out = run(layer, hidden.flatten(0, 1), routing).view_as(hidden)
    found = run(layer, hidden[order].flatten(0, 1), moved).view_as(hidden)
    torch.testing.assert_close(found, out[order], rtol=1e-12, atol=1e-14)


def test_other_pictures_do_not_change_what_text_experts_do() -> None:
    groups = GROUPS[0]
    layer, routing, again = experts_of(groups), routing_of(ROWS, groups), routing_of(ROWS, groups)
    hidden = hidden_of(routing)
    out = run(layer, hidden, routing)
    pictures = torch.tensor([name == "image" for name in names_of(routing)])
    changed = torch.where(pictures[:, None], torch.randn_like(hidden), hidden)
    found = run(layer, changed, again)
    assert torch.equal(found[~pictures], out[~pictures]) and not torch.equal(found[pictures], out[pictures])
    assert torch.equal(again.records["0", "text"].member, routing.records["0", "text"].member)
    assert not torch.equal(again.records["0", "image"].member, routing.records["0", "image"].member)


def test_of_equal_scores_the_first_tokens_are_taken() -> None:
    groups = {"all": 4}
    layer, routing = experts_of(groups), routing_of(ROWS, groups, 1)
    nn.init.zeros_(layer.groups["all"].router.weight)
    run(layer, hidden_of(routing), routing)
    member = routing.records["0", "all"].member
    expected = []
    for row in ROWS:
        tokens = len(row.replace("|", ""))
        expected += [[at < share(tokens, 1 / 4)] * 4 for at in range(tokens)]
    assert member.tolist() == expected


def test_groups_without_tokens_have_gradients_of_zero() -> None:
    """As other ranks, whose batches have such tokens, expect it."""
    groups = {"text": 1, "image": 4, "audio": 1, "video": 2}
    rows = ("ttt|t", "tt")
    for layer in (experts_of(groups), experts_of(groups, normalize=True)):
        hidden = hidden_of(routing_of(rows, groups)).requires_grad_()
        out = run(layer, hidden, routing_of(rows, groups))
        out.square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == name.startswith("groups.text"), name
        x, weights = leaves(layer, hidden)
        expected, _ = expert_layer(x, groups, names_of(routing_of(rows, groups)), [0] * len(x), weights)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_a_batch_of_padding_gives_zeros_and_gradients_of_zero() -> None:
    layer, routing = experts_of(GROUPS[0]), routing_of(("", "t"), GROUPS[0])
    hidden = hidden_of(routing)[:1]
    out = run(layer, hidden, routing.select(torch.tensor([0])))
    out.sum().backward()
    assert out.eq(0).all()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


COUNTS = {"equal": [5, 5, 5], "unequal": [7, 0, 4], "one": [6], "none": [0, 0], "the last": [0, 0, 0, 9]}
ALLOWED: list[tuple[str, Implementation | None]] = [
    *((name, which) for name in COUNTS for which in ("grouped", "loop", None)), ("equal", "bmm"), ("one", "bmm"),
    ("none", "bmm"),
]  # fmt: skip


def by_loop(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    expert = [number for number, count in enumerate(counts) for _ in range(count)]
    given = [swiglu(one, gate_up[number], down[number]) for one, number in zip(x, expert, strict=True)]
    return torch.stack(given) if given else x * gate_up.sum() * down.sum()


@pytest.mark.parametrize(("name", "which"), ALLOWED)
def test_implementations_are_one_function(name: str, which: Implementation | None) -> None:
    """Against loops over tokens in float64, in outputs and all gradients."""
    counts, draw = COUNTS[name], torch.Generator().manual_seed(3)
    sizes = (sum(counts), WIDTH), (len(counts), 2 * INNER, WIDTH), (len(counts), WIDTH, INNER)
    inputs = {
        key: 0.5 * torch.randn(size, generator=draw) for key, size in zip(("x", "gate_up", "down"), sizes, strict=True)
    }
    given = {key: one.requires_grad_() for key, one in inputs.items()}
    out = expert_ffn(given["x"], counts, given["gate_up"], given["down"], F.silu, which)
    exact = {key: one.detach().double().requires_grad_() for key, one in inputs.items()}
    expected = by_loop(exact["x"], counts, exact["gate_up"], exact["down"])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    found, right = gradients(out, given), gradients(expected, exact)
    for key, gradient in right.items():
        torch.testing.assert_close(found[key].double(), gradient, rtol=1e-5, atol=1e-4, msg=key)


@pytest.mark.parametrize("act", [F.silu, F.gelu, torch.tanh], ids=["silu", "gelu", "tanh"])
@pytest.mark.parametrize(("counts", "which"), [([2, 2], "bmm"), ([3, 0, 1], "loop"), ([3, 0, 1], None)])
def test_gradients_are_those_of_finite_differences(
    counts: list[int], which: Implementation | None, act: Activation
) -> None:
    def ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return expert_ffn(x, counts, gate_up, down, act, which)

    sizes = (sum(counts), 3), (len(counts), 4, 3), (len(counts), 3, 2)
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(ffn, [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes])


def test_widths_that_grouped_products_do_not_take_are_looped_over() -> None:
    """Rows of 13 floats are no whole 16 bytes."""
    counts, x, gate_up, down = [4, 1], torch.randn(5, 13), torch.randn(2, 14, 13), torch.randn(2, 13, 7)
    found = expert_ffn(x, counts, gate_up, down, F.silu)
    torch.testing.assert_close(found, by_loop(x, counts, gate_up, down), rtol=1e-5, atol=1e-5)


def test_rows_that_are_whole_16_bytes_in_float32_alone_are_looped_over_in_bfloat16() -> None:
    counts, x, gate_up, down = [4, 1], torch.randn(5, 12), torch.randn(2, 24, 12), torch.randn(2, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = expert_ffn(x, counts, gate_up, down, F.silu)
    expected = by_loop(x, counts, gate_up, down)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("which", ["bmm", "grouped", "loop"])
@pytest.mark.parametrize("frozen", ["x", "gate_up", "down"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own(which: Implementation, frozen: str) -> None:
    counts, draw = [4, 4], torch.Generator().manual_seed(3)
    sizes = {"x": (8, WIDTH), "gate_up": (2, 2 * INNER, WIDTH), "down": (2, WIDTH, INNER)}
    given = {name: torch.randn(size, generator=draw, requires_grad=True) for name, size in sizes.items()}
    some = {name: one.detach().requires_grad_(name != frozen) for name, one in given.items()}
    for inputs in (given, some):
        expert_ffn(inputs["x"], counts, inputs["gate_up"], inputs["down"], F.gelu, which).square().sum().backward()
    for name, one in some.items():
        assert (one.grad is None) == (name == frozen)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, given[name].grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", ["bmm", "grouped", "loop"])
def test_products_are_bfloat16_under_autocast(which: Implementation) -> None:
    counts, x, gate_up, down = [4, 4], torch.randn(8, 16), torch.randn(2, 32, 16), torch.randn(2, 16, 16)
    weights = [gate_up.requires_grad_(), down.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        found = expert_ffn(x, counts, *weights, F.silu, which)
    expected = expert_ffn(x, counts, *weights, F.silu, which).detach()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    found.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)


def dense(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    values = {**SMALL, "vocab_size": 60, "num_hidden_layers": 2, **FAMILIES[family], **changes}
    return backbone.from_config(values, attention.register())


def sparse(model: Any, **experts: Any) -> Any:
    made = copy.deepcopy(model)
    replace_mlps(made, ExpertsConfig.model_validate(experts), copies=True)
    return made


def logits(model: Any, packed: PackedBatch, routing: Routing | None = None) -> Tensor:
    keep = (packed.segment_ids.flatten() > 0).nonzero()[:, 0]
    embeddings = model.get_input_embeddings()(packed.input_ids)
    return backbone.run(model, embeddings, packed.segment_ids, packed.position_ids, keep, True, routing=routing)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_a_modality_is_the_dense_model(family: str) -> None:
    """In logits, and in gradients: those of an MLP are the sums of its copies'."""
    model, packed = dense(family), batch(*ROWS)
    groups = {"text": 1, "image": 1, "all": 1}
    grown, routing = sparse(model, **groups), routing_of(ROWS, groups)
    expected, found = logits(model, packed), logits(grown, packed, routing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not routing.records
    for one in (expected, found):
        one.square().mean().backward()
    grads = {name: p.grad for name, p in grown.named_parameters()}
    for name, parameter in model.named_parameters():
        before, mlp, part = name.partition(".mlp.")
        if not mlp:
            gradient = grads[name]
        else:
            here = "down" if part.startswith("down") else "gate_up"
            gradient = torch.stack([grads[f"{before}.mlp.groups.{group}.{here}"][0] for group in groups]).sum(0)
            if here == "gate_up":
                gradient = gradient.chunk(2)[0 if part.startswith("gate") else 1]
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_experts_that_take_everything_are_the_dense_model(family: str) -> None:
    """With weights that sum to 1, whatever the routers say; and, of two experts, at scores of a half each."""
    model, packed = dense(family), batch(*ROWS)
    groups = {"text": 4, "image": 2, "all": 3}
    found = logits(sparse(model, **groups, capacity=1, normalize=True), packed, routing_of(ROWS, groups))
    torch.testing.assert_close(found, logits(model, packed), rtol=1e-5, atol=1e-5)
    halves = sparse(model, all=2, capacity=1)
    for name, parameter in halves.named_parameters():
        if "router" in name:
            nn.init.zeros_(parameter)
    found = logits(halves, packed, routing_of(ROWS, {"all": 2}))
    torch.testing.assert_close(found, logits(model, packed), rtol=1e-5, atol=1e-5)


def states(model: Any, packed: PackedBatch, routing: Routing | None = None) -> tuple[Tensor, Tensor]:
    """Of a model's first layer, what stands between attention and MLP, and what comes out: [N, D] both."""
    seen = {}
    layer = model.model.layers[0]
    norm = layer.post_attention_layernorm
    behind = getattr(model.config, "swin_norm", False)
    hooks = [
        (layer.mlp if behind else norm).register_forward_pre_hook(lambda _, args: seen.update(between=args[0][0])),
        layer.register_forward_hook(
            lambda _, args, out: seen.update(out=(out[0] if isinstance(out, tuple) else out)[0])
        ),
    ]
    logits(model, packed, routing)
    for hook in hooks:
        hook.remove()
    return seen["between"], seen["out"]


@pytest.mark.parametrize(
    ("family", "normalize"), [("chameleon, norms behind", False), ("llama", True), ("chameleon", True)]
)
def test_upcycled_is_the_seed_for_tokens_with_an_expert_and_passes_the_others_by(family: str, normalize: bool) -> None:
    """A norm behind the experts takes off the scale of published weights; with one in front they have to sum to 1."""
    groups = {"text": 4, "image": 4, "all": 4}
    model, packed, routing = dense(family, rms_norm_eps=1e-12), batch(*ROWS), routing_of(ROWS, groups)
    between, seed = states(model, packed)
    _, grown = states(sparse(model, **groups, normalize=normalize), packed, routing)
    taken = torch.zeros(len(seed), dtype=torch.bool)
    for name in groups:
        record = routing.records["0", name]
        taken[record.places[record.member.any(1)]] = True
    real = routing.group >= 0
    assert 0.4 < float(taken[real].float().mean()) < 0.95  # (3 / 4)^4 have none, where experts do not agree
    torch.testing.assert_close(grown[taken], seed[taken], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grown[real & ~taken], between[real & ~taken], rtol=0, atol=0)
    assert float((grown - seed).detach()[real & ~taken].abs().amax(1).min()) > 1e-3


def test_norms_in_front_keep_the_scale_of_published_weights() -> None:
    groups = {"text": 4, "image": 4, "all": 4}
    model, packed, routing = dense("llama"), batch(*ROWS), routing_of(ROWS, groups)
    seed, grown = logits(model, packed), logits(sparse(model, **groups, capacity=1), packed, routing)
    assert float((grown - seed).detach().abs().max()) > 1e-2


def test_behind_a_norm_a_router_learns_from_tokens_of_several_experts_alone() -> None:
    """The norm takes off a single expert's weight, and with it nearly all of the gradient."""
    groups = {"all": 4}
    layer, routing = experts_of(groups), routing_of(ROWS, groups)
    hidden = hidden_of(routing)
    experts = run(layer, hidden, routing)
    member = routing.records["0", "all"].member
    count = torch.zeros(len(hidden), dtype=torch.int64)
    count[routing.records["0", "all"].places] = member.sum(1)
    router = layer.groups["all"].router.weight
    target = torch.randn_like(hidden)

    def gradient(tokens: Tensor, normed: bool) -> float:
        out = F.rms_norm(experts, (WIDTH,), eps=1e-12) if normed else experts
        (found,) = torch.autograd.grad((out * target)[tokens].sum(), router, retain_graph=True)
        return float(found.norm())

    once, more = count == 1, count > 1
    assert int(once.sum()) > 3 and int(more.sum()) > 3
    assert gradient(more, normed=True) > 0.1 and gradient(once, normed=False) > 0.1
    assert gradient(once, normed=True) < 1e-9 * gradient(more, normed=True)
    with torch.no_grad():
        for name in ("gate_up", "down"):
            weight = getattr(layer.groups["all"], name)
            weight.copy_(weight[:1].expand_as(weight))
    experts = run(layer, hidden, routing)
    assert gradient(more, normed=True) < 1e-9 * gradient(more, normed=False)  # copies of one: nobody learns


def test_autocast_routes_as_float32_and_computes_in_bfloat16() -> None:
    groups = GROUPS[0]
    layer, routing, again = experts_of(groups).float(), routing_of(ROWS, groups), routing_of(ROWS, groups)
    hidden = hidden_of(routing).float()
    expected = run(layer, hidden, routing)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(layer, hidden, again)
    assert all(torch.equal(again.records[key].member, one.member) for key, one in routing.records.items())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model_type": "gpt_neox"}, "gated MLP"), ({"model_type": "phi3", "pad_token_id": 0}, "gated MLP")],
)
def test_other_mlps_are_refused(values: dict[str, Any], message: str) -> None:
    model = backbone.from_config({**SMALL, "vocab_size": 60, **values}, attention.register())
    with pytest.raises(ConfigError, match=message):
        replace_mlps(model, ExpertsConfig(all=2), copies=True)


def test_copies_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.hidden 40"):
        replace_mlps(dense("llama"), ExpertsConfig(all=2, hidden=40), copies=True)


def test_random_experts_differ_and_have_the_width_asked_for() -> None:
    system = text_lm(experts={"text": 2, "image": 3, "all": 1, "hidden": 40})
    shapes = {name: list(p.shape) for name, p in system.named_parameters() if ".layers.1.mlp." in name}
    start = "language.model.layers.1.mlp.groups."
    assert shapes == {
        **{f"{start}{name}.gate_up": [number, 80, 32] for name, number in (("text", 2), ("image", 3), ("all", 1))},
        **{f"{start}{name}.down": [number, 32, 40] for name, number in (("text", 2), ("image", 3), ("all", 1))},
        f"{start}text.router.weight": [2, 32],
        f"{start}image.router.weight": [3, 32],
    }
    for name, p in system.named_parameters():
        if ".mlp." in name:
            assert float(p.std()) == pytest.approx(0.2, rel=0.25), name
        if name.endswith(("gate_up", "down")) and len(p) > 1:
            assert not torch.isclose(p[0], p[1]).all(), name
