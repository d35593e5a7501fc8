"""The expert layer, forward and backward, beside a dense layer of as many FLOPs, Mixtral's experts and a plain loop.

Each group of tokens has experts, and each of these takes its share of them, so there are as many pairs of token and
expert as tokens: the FLOPs of one dense SwiGLU layer that is as wide as an expert. In turn, in every repetition:

- dense: transformers' `LlamaMLP` on all tokens;
- Mixtral: for each group a `MixtralSparseMoeBlock` of transformers, top 1, with as many experts as the group. It gets
  the group's tokens gathered, so there are as many pairs, chosen by the tokens. Every implementation that needs no
  further packages; `batched_mm` copies weights for every token, so it runs with `--quick` alone;
- loop: what ours does, an expert at a time. Outputs and gradients of both are compared first.

*times …*: median of the ratios within a repetition. CPU time counts all threads, and other work on the machine
counts little in it. *kept*: what the graph holds for the backward pass, beside weights and input.
"""

import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.harness import Row, arguments, release, show
from mm.models.config import ExpertsConfig
from mm.models.experts import ExpertGroup, Experts
from mm.models.routing import Routing

CASES: dict[str, tuple[dict[str, int], float]] = {
    "4 text + 4 image experts": ({"text": 4, "image": 4}, 0.5),
    "4 text + 4 image experts, a quarter of the tokens text": ({"text": 4, "image": 4}, 0.25),
    "1 text + 1 image expert": ({"text": 1, "image": 1}, 0.5),
    "8 shared experts": ({"all": 8}, 1.0),
}
"""Experts of each group, and the share of tokens that are in the first."""
SIZES = {"cpu": (4096, 512, 1408), "cuda": (24576, 1024, 2816), "quick": (256, 64, 128)}
"""Tokens, width, inner width of an expert: MoMa's 90M and 435M, 8/3 of the width rounded up to whole 128s."""
PIECE = 64  # tokens of a group in a row
DENSE, LOOP = "dense layer", "plain loop"
MIXTRAL = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    options = arguments(
        __doc__,
        device="cpu (float32) or cuda (bfloat16 autocast)",
        threads="2 by default; 1 where others use the machine, since threads that wait for one another use CPU time",
    )
    device = options.device or "cpu"
    torch.set_num_threads(int(options.threads or 2))
    tokens, width, inner = SIZES["quick" if options.quick else device]
    size = f"{tokens:,} tokens, {width} wide, experts of {inner}"
    rows: list[Row] = []
    for case, (groups, first) in CASES.items():
        torch.manual_seed(0)
        layers, missing = candidates(groups, grouped(tokens, first), width, inner, options.quick)
        x, grad = torch.randn(2, tokens, width, device=device)
        runs = {name: Run(layer.to(device), x, grad) for name, layer in layers.items()}
        check(runs["ours"], runs[LOOP])
        spent = in_turn(1 if options.quick else 9, runs)
        for number, unit in enumerate(("ms", "CPU ms") if device == "cpu" else ("ms",)):
            times = {name: [each[number] for each in some] for name, some in spent.items()}
            figures = {name: 1e3 * statistics.median(some) for name, some in times.items()}
            rows.append(row(f"{case}; {size}", unit, figures, missing))
            dense = {name: ratio(some, times[DENSE]) for name, some in times.items()}
            rows.append({**row(case, f"times dense, {unit}", dense, missing), "limit": 1.15})
            fastest = min((name for name in figures if name not in ("ours", DENSE)), key=figures.__getitem__)
            against = {"ours": ratio(times["ours"], times[fastest]), fastest: 1.0}
            rows.append({**row(case, f"times the fastest peer, {unit}", against, {}), "limit": 1.0})
        kept = {name: run.kept() / tokens for name, run in runs.items()}
        rows.append(row(case, "bytes kept per token", kept, missing))
    show("experts", rows, options.json)
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", file=sys.stderr)


def ratio(some: list[float], others: list[float]) -> float:
    """Median over repetitions."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def row(case: str, unit: str, figures: dict[str, float], missing: dict[str, str]) -> Row:
    peers: dict[str, Any] = {name: figure for name, figure in figures.items() if name != "ours"}
    return {"case": case, "unit": unit, "better": "lower", "ours": figures["ours"], "peers": {**peers, **missing}}


def grouped(tokens: int, first: float) -> Tensor:
    """int64 [tokens], the number of each token's group: pieces of the first and the second, mixed."""
    second = torch.arange(tokens // PIECE) >= round(first * tokens / PIECE)
    return second[torch.randperm(len(second))].long().repeat_interleave(PIECE)


def candidates(
    groups: dict[str, int], group: Tensor, width: int, inner: int, quick: bool
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers by name, and why others are not there."""
    config = ExpertsConfig(**groups)
    experts = Experts({name: ExpertGroup(n, width, inner, F.silu, config) for name, n in groups.items()}, 0)
    for one in experts.groups.values():
        one.initialize(0.02)
    members = [(group == number).nonzero()[:, 0] for number in range(len(groups))]
    layers: dict[str, nn.Module] = {
        "ours": Ours(experts, tuple(groups), group),
        DENSE: LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=inner)),
        LOOP: Loop(experts, members),
    }
    missing = {}
    for implementation in MIXTRAL:
        name = f"{release('transformers')}, Mixtral, {implementation}"
        if implementation == "batched_mm" and not quick:
            missing[name] = (
                f"not run: {len(group) * 3 * width * inner * 4 / 1e9:.0f} GB for copies of weights, in float32"
            )
        else:
            sizes = [len(one) for one in members]
            layers[name] = Mixtral([*groups.values()], sizes, width, inner, implementation)
    return layers, missing


class Ours(nn.Module):
    """With what the routing of a batch takes, which many layers share in a model."""

    group: Tensor
    place: Tensor

    def __init__(self, experts: Experts, groups: tuple[str, ...], group: Tensor) -> None:
        super().__init__()
        self.experts, self.names = experts, groups
        self.register_buffer("group", group)
        self.register_buffer("place", torch.arange(len(group)))

    def forward(self, x: Tensor) -> Tensor:
        pool = torch.zeros_like(self.place)
        self.experts.routing = Routing(self.names, self.group, pool, 1, self.place, len(pool))
        out: Tensor = self.experts(x[None])[0]
        return out


class Loop(nn.Module):
    """The mathematics of our layer, with its weights, an expert at a time."""

    def __init__(self, experts: Experts, members: list[Tensor]) -> None:
        super().__init__()
        self.experts = experts
        for number, places in enumerate(members):
            self.register_buffer(f"members_{number}", places)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, group in enumerate(self.experts.groups.values()):
            places = self.get_buffer(f"members_{number}")
            own = x[places]
            weights = torch.ones_like(own[:, :1]) if group.router is None else group.router(own).sigmoid()
            take = len(own) // weights.shape[1]
            for expert, (gate_up, down) in enumerate(zip(group.gate_up.unbind(), group.down.unbind(), strict=True)):
                weight, chosen = weights[:, expert].topk(take)
                gate, up = F.linear(own[chosen], gate_up).chunk(2, dim=1)
                given = weight[:, None] * F.linear(F.silu(gate) * up, down)
                out = out.index_add(0, places[chosen], given.to(out.dtype))
        return out


class Mixtral(nn.Module):
    """A block for the tokens of each group, which stand together."""

    def __init__(self, groups: list[int], sizes: list[int], width: int, inner: int, implementation: str) -> None:
        super().__init__()
        self.sizes = sizes
        self.blocks = nn.ModuleList()
        for experts in groups:
            config = MixtralConfig(
                hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=1
            )
            config._experts_implementation = implementation
            self.blocks.append(MixtralSparseMoeBlock(config))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        parts = x[None].split(self.sizes, dim=1)
        return torch.cat([block(part)[0] for block, part in zip(self.blocks, parts, strict=True)])


class Run:
    """Forward and backward passes of a layer."""

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        self.layer, self.x, self.grad = layer, x.clone().requires_grad_(), grad

    def forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.x.is_cuda):
            out: Tensor = self.layer(self.x)
        return out

    def __call__(self) -> Tensor:
        self.layer.zero_grad()
        self.x.grad = None
        out = self.forward()
        out.backward(self.grad.to(out.dtype))
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return out.detach()

    def kept(self) -> int:
        """Bytes that the graph holds behind the forward pass, beside weights and input."""
        known = {one.untyped_storage().data_ptr() for one in (self.x, *self.layer.parameters())}
        held: dict[int, Tensor] = {}  # the tensors too, lest memory be given out twice

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(one.untyped_storage().nbytes() for address, one in held.items() if address not in known)


def check(ours: Run, loop: Run) -> None:
    """Both have the same weights."""
    found = [ours(), ours.x.grad, *(p.grad for p in ours.layer.parameters())]
    expected = [loop(), loop.x.grad, *(p.grad for p in loop.layer.parameters())]
    tolerance = 5e-2 if ours.x.is_cuda else 1e-4
    for one, right in zip(found, expected, strict=True):
        assert one is not None and right is not None
        torch.testing.assert_close(one, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def in_turn(repetitions: int, runs: dict[str, Run]) -> dict[str, list[tuple[float, float]]]:
    """Seconds elapsed, and seconds of all threads, of each run in every repetition."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return spent


if __name__ == "__main__":
    main()
