"""Systems with experts and mixture of depths: who may look ahead, what auxiliary routers learn, growth from a seed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_loops import VOCABULARY, batch, share, text_lm
from torch import Tensor

from mm.data.batch import PackedBatch, select_rows
from mm.errors import ConfigError
from mm.models import backbone
from mm.models.depths import NAME
from mm.models.objectives import linear_cross_entropy_losses, next_token_losses
from mm.models.routing import Record, Routing
from mm.models.sparse import Sparsity
from mm.models.system import Output
from mm.models.systems.text_lm.config import TextLMConfig
from mm.models.systems.text_lm.model import TextLM
from mm.train.blocks import DEFAULT_PATTERNS, checkpoint_activations, find_blocks
from mm.train.config import CheckpointingConfig
from mm.train.stages import take_over

ROWS = ("ttiitttt|iiiit", "iitaaaat", "tttttiiiiiiiii|t", "aat|iiit")
EXPERTS: dict[str, Any] = {"text": 3, "image": 2, "all": 2}
KINDS: dict[str, dict[str, Any]] = {
    "experts": {"experts": {**EXPERTS, "auxiliary": "along"}},
    "8 shared": {"experts": {"all": 8, "auxiliary": "along"}},
    "depths": {"depths": {"auxiliary": "along"}},
    "both": {"experts": {**EXPERTS, "auxiliary": "along"}, "depths": {}},
}


def sparsity(system: TextLM) -> Sparsity:
    assert system.sparsity is not None
    return system.sparsity


def step(system: TextLM, batches: list[PackedBatch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Means of the objectives, and gradients of their sum, as the trainer has them."""
    system.zero_grad()
    outputs = [system(one) for one in batches]
    counts = {name: sum(float(one.counts[name]) for one in outputs) for name in system.weights}
    losses = {name: torch.stack([one.losses[name] for one in outputs]).sum() / counts[name] for name in system.weights}
    torch.stack([system.weights[name] * loss for name, loss in losses.items()]).sum().backward()
    grads = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, grads


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    most = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) <= tolerance * max(float(grad.norm()), 1e-3 * most), name


def losses_of(system: TextLM, packed: PackedBatch) -> Tensor:
    with torch.no_grad():
        return system.token_losses(packed)


def edited(packed: PackedBatch, row: int, first: int) -> PackedBatch:
    """Other tokens in a row from a position on."""
    ids = packed.input_ids.clone()
    ids[row, first:] = (ids[row, first:] + 7) % VOCABULARY
    return replace(packed, input_ids=ids)


@pytest.mark.parametrize("kind", KINDS)
def test_training_looks_ahead_and_auxiliary_routers_do_not(kind: str) -> None:
    """Of other tokens at the end of a row, targets before and in other rows know in training and not in evaluation."""
    system, packed = text_lm(**KINDS[kind]), batch(*ROWS)
    row, first = 0, 5
    place = packed.learned()
    before = (place // packed.labels.shape[1] != row) | (place % packed.labels.shape[1] < first)
    for training in (True, False):
        system.train(training)
        found, other = (losses_of(system, one)[before] for one in (packed, edited(packed, row, first)))
        largest = float((found - other).abs().max())
        assert largest > 1e-3 if training else largest < 1e-5
    routing = sparsity(system).routing(packed, choose=False)
    with torch.no_grad():
        system.token_losses(packed, routing)
    shares = [float(record.member.float().mean()) for record in routing.records.values()]
    assert not shares or 0.05 < sum(shares) / len(shares) < 0.95  # neither all nor none


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_rows_do_not_know_of_each_other(kind: str) -> None:
    system, packed = text_lm(**KINDS[kind]).eval(), batch(*ROWS)
    together = losses_of(system, packed)
    apart = [losses_of(system, select_rows(packed, [row])) for row in range(len(ROWS))]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_without_auxiliary_routers_nothing_is_evaluated() -> None:
    packed = batch(*ROWS)
    with pytest.raises(ConfigError, match="auxiliary=along"):
        text_lm(experts=EXPERTS).eval()(packed)
    with pytest.raises(ConfigError, match="auxiliary=along"):
        text_lm(depths={}).eval()(packed)
    alone = text_lm(experts={"text": 1, "image": 1, "all": 1})  # which chooses nothing
    torch.testing.assert_close(losses_of(alone.eval(), packed), losses_of(alone.train(), packed), rtol=0, atol=0)


class Recalls(torch.nn.Module):
    """An auxiliary router that says what was chosen."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def forward(self, hidden: Tensor) -> Tensor:
        return self.record.member.to(hidden.dtype) - 0.5


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize("kind", KINDS)
def test_routers_that_know_what_is_chosen_give_the_training_forward(kind: str, normalize: bool) -> None:
    """In losses and gradients: weights are those of the routers themselves."""
    settings = {name: {**one} for name, one in KINDS[kind].items()}
    if "experts" in settings:
        settings["experts"]["normalize"] = normalize
    system, packed = text_lm(**settings), batch(*ROWS)
    chooses = sparsity(system).routing(packed, choose=True)
    expected, right = language_step(system, packed, chooses)
    # Of a modality that no token of a staged layer has, nothing was chosen, and nothing is asked.
    told = {
        layer: {
            name: Recalls(chooses.records[layer, name]) if (layer, name) in chooses.records else router
            for name, router in groups.items()
        }
        for layer, groups in sparsity(system).routers.items()
    }
    losses, grads = language_step(system, packed, replace(chooses, auxiliary=told, records={}))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert_alike(grads, right)


def language_step(system: TextLM, packed: PackedBatch, routing: Routing) -> tuple[Tensor, dict[str, Tensor]]:
    system.zero_grad()
    losses = system.token_losses(packed, routing)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in system.language.named_parameters()}


def traced(system: TextLM, packed: PackedBatch) -> tuple[Output, Routing]:
    """A forward pass in training, and the routing that it had."""
    routing = system.routing(packed)
    assert routing is not None
    return system.output(packed, system.token_losses(packed, routing), routing), routing


@pytest.mark.parametrize("kind", KINDS)
def test_auxiliary_routers_learn_who_was_chosen(kind: str) -> None:
    """Every expert of a pool has as many ones among its targets as it took; the loss is a loop over them."""
    settings = {name: {**one, "routing_rows": 2} for name, one in KINDS[kind].items()}
    system, packed = text_lm(**settings).train(), batch(*ROWS)
    output, routing = traced(system, packed)
    length, total, layers = packed.labels.shape[1], torch.zeros((), dtype=torch.float64), set()
    for (layer, group), record in routing.records.items():
        router = sparsity(system).routers[layer][group]
        w1, w2 = router.inner.weight.double(), router.outer.weight.double()
        assert record.hidden is not None and not record.hidden.requires_grad
        for place, taken in zip(record.places.tolist(), record.member.tolist(), strict=True):
            said = torch.sigmoid(F.silu(record.hidden[place].double() @ w1.T) @ w2.T)
            for p, yes in zip(said, taken, strict=True):
                total = total - (p if yes else 1 - p).log() / len(taken)
        layers.add(layer)
        if int(layer) % 2 == 0 and kind == "both" and group != NAME:
            continue  # these chose from the tokens that take part
        pools = (record.places // length // 2).tolist()
        capacity = 0.25 if group == NAME else 1 / record.member.shape[1]
        for pool in (0, 1):
            ones = sum(int(taken[0]) for taken, of in zip(record.member, pools, strict=True) if of == pool)
            each = record.member[torch.tensor(pools) == pool].sum(0).tolist()
            assert each == [share(pools.count(pool), capacity)] * record.member.shape[1] and ones == each[0]
    assert layers == set(sparsity(system).routers)
    torch.testing.assert_close(output.losses["routers"].double(), total / len(layers), rtol=1e-5, atol=0)
    assert int(output.counts["routers"]) == packed.tokens == int(system.counts(packed)["routers"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_does_not_notice_routers_that_learn_along(kind: str) -> None:
    packed = batch(*ROWS)
    settings = {name: {**one, "auxiliary": "none"} for name, one in KINDS[kind].items()}
    system, without = text_lm(**KINDS[kind]).train(), text_lm(**settings).train()
    without.load_state_dict({n: t for n, t in system.state_dict().items() if not n.startswith("sparsity")})
    losses, grads = step(system, [packed])
    expected, right = step(without, [packed])
    assert losses["next_token"] == expected["next_token"] and "routers" not in expected
    assert all(torch.equal(grads[name], grad) for name, grad in right.items())
    ours = {name for name, _ in system.named_parameters() if name.startswith("sparsity")}
    assert ours == grads.keys() - right.keys() and all(grads[name].any() for name in ours)
    system.eval()
    output = system(packed)
    assert int(output.counts["routers"]) == 0 and float(output.losses["routers"]) == 0


def test_routers_that_learn_alone_leave_the_model_as_it_is() -> None:
    system = text_lm(experts={**EXPERTS, "auxiliary": "alone"}, depths={}).train()
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in system.named_parameters() if name.startswith("sparsity.")}
    before, packed = copy.deepcopy(system.state_dict()), batch(*ROWS)
    optimizer = torch.optim.AdamW([p for p in system.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        found, grads = step(system, [packed])
        assert grads.keys() == trained
        optimizer.step()
        losses.append(found["routers"])
    assert losses[-1] < 0.6 * losses[0]
    for name, tensor in system.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trained), name


@pytest.mark.parametrize("kind", KINDS)
def test_with_rows_that_choose_together_a_step_is_the_same_however_it_is_split(kind: str) -> None:
    """Noise and auxiliary routers among it. With the rows of a micro-batch, as published, it is another step."""
    packed = batch(*ROWS)
    noise = {"noise": {"steps": 10}} if "experts" in KINDS[kind] else {}
    for rows in (1, 2, None):
        settings = {name: {**one, "routing_rows": rows} for name, one in KINDS[kind].items()}
        if noise:
            settings["experts"].update(noise)
        system = text_lm(**settings).train()
        losses, grads = step(system, [packed])
        apart = [select_rows(packed, some) for some in ([0, 1], [2, 3])]
        split, others = step(system, apart)
        if rows is None:
            assert split["next_token"] != pytest.approx(losses["next_token"], rel=1e-4)
            continue
        assert split == pytest.approx(losses, rel=1e-5)
        assert_alike(others, grads)
        if rows == 1:
            each, others = step(system, [select_rows(packed, [row]) for row in (3, 0, 2, 1)])
            assert each == pytest.approx(losses, rel=1e-5)
            assert_alike(others, grads)
        if noise:
            settings["experts"]["noise"] = None
            assert step(text_lm(**settings).train(), [packed])[0]["next_token"] != losses["next_token"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_layers_give_the_same_losses_and_gradients(kind: str, mode: Any) -> None:
    settings = {name: {**one} for name, one in KINDS[kind].items()}
    if "experts" in settings:
        settings["experts"]["noise"] = {"steps": 5}
    system, packed = text_lm(**settings).train(), batch(*ROWS)
    recomputed = copy.deepcopy(system)
    checkpoint_activations(recomputed, CheckpointingConfig(mode=mode), find_blocks(recomputed, DEFAULT_PATTERNS))
    expected, right = step(system, [packed])
    found, grads = step(recomputed, [packed])
    assert found == expected and grads.keys() == right.keys()
    assert all(torch.equal(grads[name], grad) for name, grad in right.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_system_is_another_system(kind: str) -> None:
    system, packed = text_lm(**KINDS[kind]), batch(*ROWS)
    twin = copy.deepcopy(system)
    for training in (True, False):
        expected = losses_of(system.train(training), packed)
        assert torch.equal(losses_of(twin.train(training), packed), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".mlp." in name or "depth_router" in name:
                parameter.zero_()
    assert torch.equal(losses_of(system, packed), expected)
    assert not torch.allclose(losses_of(twin, packed), expected)


def test_gradients_are_there_whatever_modalities_a_batch_has() -> None:
    """Ranks add them up by their place."""
    system = text_lm(experts={**EXPERTS, "audio": 1, "auxiliary": "along"}, depths={}).train()
    for rows in (("ttt", "tt"), ("iii", "i"), ("t", "aaa"), ("vvv|t", "i")):
        _, grads = step(system, [batch(*rows)])
        assert grads.keys() == dict(system.named_parameters()).keys()
        assert all(bool(grad.isfinite().all()) for grad in grads.values())
        metrics = system(batch(*rows)).metrics
        assert metrics.keys() == {
            "output_norm", *(f"{what}/{name}" for what in ("unrouted", "once", "more", "busiest") for name in EXPERTS)
        }  # fmt: skip


def test_autocast_trains() -> None:
    system, packed = text_lm(experts={**EXPERTS, "auxiliary": "along"}, depths={}).train(), batch(*ROWS)
    expected, _ = step(system, [packed])
    with torch.autocast("cpu", torch.bfloat16):
        found, grads = step(system, [packed])
        system.eval()(packed)
    assert found == pytest.approx(expected, rel=0.1)
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads.values())


def test_metrics_count_experts_of_tokens_and_tokens_of_experts() -> None:
    system, packed = text_lm(experts={**EXPERTS, "auxiliary": "along"}).train(), batch(*ROWS)
    output, routing = traced(system, packed)
    for group in EXPERTS:
        each = [record.member.long().tolist() for (_, name), record in routing.records.items() if name == group]
        assert len(each) == 4
        numbers = [[sum(token) for token in layer] for layer in each]
        for name, fits in (("unrouted", lambda n: n == 0), ("once", lambda n: n == 1), ("more", lambda n: n > 1)):
            expected = sum(sum(map(fits, layer)) / len(layer) for layer in numbers) / 4
            assert float(output.metrics[f"{name}/{group}"]) == pytest.approx(expected), name
        assert float(output.metrics[f"busiest/{group}"]) == pytest.approx(1)  # experts choose equally many
        assert int(output.metric_counts[f"once/{group}"]) == 4 * len(each[0])
    states: list[Tensor] = []
    hook = system.language.model.layers[-1].register_forward_hook(
        lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    traced(system, packed)
    hook.remove()
    real = packed.segment_ids.flatten() > 0
    expected = states[0].detach().reshape(-1, 32)[real].double().norm(dim=1).mean()
    assert float(output.metrics["output_norm"]) == pytest.approx(float(expected), rel=1e-5)


def grown(system: TextLM, tensors: dict[str, Tensor]) -> set[str]:
    """Names that begin anew, after the system took over tensors of another."""
    notes = take_over(system, tensors, None, "the seed")
    assert not [note for note in notes if "has no place" in note], notes
    return {note.partition(" ")[0] for note in notes}


def test_dense_to_one_expert_a_modality_to_several() -> None:
    """Each is the one before where every token is covered and weights sum to 1. Routers alone begin anew."""
    packed, whole = batch(*ROWS), {"capacity": 1, "normalize": True}
    dense = text_lm()
    seed = text_lm(experts={"text": 1, "image": 1, "all": 1})
    several = text_lm(experts={"text": 4, "image": 2, "all": 3, **whole})
    more = text_lm(experts={"text": 8, "image": 2, "all": 3, "audio": 6, "auxiliary": "along", **whole})
    expected = losses_of(dense, packed)
    for system in (seed, several, more):
        with torch.no_grad():
            for parameter in system.parameters():
                parameter.mul_(3)
    assert grown(seed, dense.state_dict()) == set()
    torch.testing.assert_close(losses_of(seed.train(), packed), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the modalities drift apart
        for name, parameter in seed.named_parameters():
            if ".groups." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = losses_of(seed, packed)
    routers = {name for name, _ in several.named_parameters() if "router" in name}
    assert grown(several, seed.state_dict()) == routers
    torch.testing.assert_close(losses_of(several.train(), packed), expected, rtol=1e-5, atol=1e-5)
    anew = {n for n, _ in more.named_parameters() if ".text.router" in n or ".audio.router" in n or "sparsity." in n}
    assert grown(more, several.state_dict()) == anew
    torch.testing.assert_close(losses_of(more.train(), packed), expected, rtol=1e-5, atol=1e-5)
    kept = [n for n, _ in more.named_parameters() if ".image.router" in n]
    assert kept and all(torch.equal(more.state_dict()[n], several.state_dict()[n]) for n in kept)


def test_experts_that_all_shared_become_those_of_each_modality() -> None:
    shared, several = text_lm(experts={"all": 4}), text_lm(experts={"text": 4, "image": 8, "all": 4})
    notes = take_over(several, shared.state_dict(), None, "the seed")
    assert {note.partition(" ")[0] for note in notes} == {
        name for name, _ in several.named_parameters() if "text.router" in name or "image.router" in name
    }
    tensors, before = several.state_dict(), shared.state_dict()
    start = "language.model.layers.2.mlp.groups."
    for part in ("gate_up", "down"):
        old = before[f"{start}all.{part}"]
        assert torch.equal(tensors[f"{start}text.{part}"], old)
        assert torch.equal(tensors[f"{start}image.{part}"], torch.cat([old, old]))


def test_auxiliary_routers_stay_with_the_experts_that_they_learned() -> None:
    learned = text_lm(experts={**EXPERTS, "auxiliary": "alone"})
    again = text_lm(experts={**EXPERTS, "auxiliary": "along"})
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert grown(again, learned.state_dict()) == set()
    assert all(torch.equal(tensor, learned.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("reduce", [torch.sum, lambda losses: losses.square().sum()], ids=["sum", "weighted"])
@pytest.mark.parametrize("z", [1e-5, 0.3])
def test_z_loss_is_the_square_of_log_z_and_its_gradient_that_times_softmax(
    z: float, reduce: Callable[[Tensor], Tensor]
) -> None:
    """Against autograd on whole logits in float64, and the gradient against the closed form."""
    draw = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(size, generator=draw) for size in ((300, 8), (50, 8), (50,)))
    targets = torch.randint(50, (300,), generator=draw)
    given = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
    losses = linear_cross_entropy_losses(*given, targets, z)
    reduce(losses).backward()
    exact = [one.double().requires_grad_() for one in (hidden, weight, bias)]
    logits = F.linear(*exact)
    log_z = logits.exp().sum(1).log()
    expected = log_z - logits[torch.arange(300), targets] + z * log_z.square()
    reduce(expected).backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next_token_losses(logits.float(), targets, z).double(), expected, rtol=1e-5, atol=1e-5)
    for one, right in zip(given, exact, strict=True):
        scale = float(right.grad.abs().max())
        torch.testing.assert_close(one.grad.double(), right.grad, rtol=1e-4, atol=1e-5 * scale)
    if reduce is torch.sum:
        softmax = logits.softmax(1)
        closed = (softmax - F.one_hot(targets, 50) + 2 * z * log_z[:, None] * softmax).sum(0)
        torch.testing.assert_close(given[2].grad.double(), closed, rtol=1e-4, atol=1e-4)


def test_z_loss_reaches_the_model() -> None:
    system, packed = text_lm(experts=EXPERTS), batch(*ROWS)
    embeddings = system.embed(packed)
    plain, with_z = (
        backbone.token_losses(system.language, embeddings, packed, system.routing(packed), z) for z in (0.0, 0.1)
    )
    keep = packed.learned()
    where = packed.segment_ids, packed.position_ids, keep, True
    logits = backbone.run(system.language, embeddings, *where, routing=system.routing(packed))
    torch.testing.assert_close(with_z - plain, 0.1 * torch.logsumexp(logits, 1).square(), rtol=1e-4, atol=1e-4)


def test_a_model_without_experts_for_a_medium_is_refused() -> None:
    language = {"tokenizer": "builtin:emoji", "config": {"model_type": "llama"}}
    section = TextLMConfig.model_validate({"language": language, "experts": {"text": 2}})
    with pytest.raises(ConfigError, match="image: 1 or more"):
        Sparsity(None, section, copies=False, media=("image",))
