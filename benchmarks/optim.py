"""What a step of an optimizer takes: ours and torch's, and pytorch-optimizer's, on the same weights and gradients.

Models shaped as GPT-2, float32 on a CPU: 10 million parameters (6 layers of width 320, a vocabulary of 8,192) and 50
million (8, 640, 16,384), on one thread and on two. Gradients are random, new ones every step, which all optimizers take
in turn. SOAP and Muon have the weights of linear layers, fused AdamW has the rest: ours and the peers' alike.

- SOAP: *ordinary*, the median of all steps but the first, which makes the bases; *refresh*, the longest of ten;
  *cycle*, the mean of ten. Medians over cycles. *In blocks*: of the model's width, which is another algorithm.
- Sophia: the step between estimates; what taking up an estimate costs, its extra pass apart, with the count of what is
  not clipped, which is logged; the mean of ten steps with one of these.

Then the same in % of the forward and backward pass that a step is made of, at 2,048 and 16,384 tokens: costs of an
optimizer do not depend on tokens. Sophia's has a tenth of a forward and backward pass in it, for an estimate every 10
steps from all tokens. CPU time counts all threads, and other work on the machine counts little in it.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.cqt import PEERS
from benchmarks.experts import row
from benchmarks.harness import Row, arguments, release, show
from mm.train.optim.config import AdamWConfig, MuonConfig, SOAPConfig, SophiaConfig
from mm.train.optim.sophia import compiled
from mm.train.optim.split import Split
from mm.train.params import parameter_groups

SIZES: dict[str, tuple[int, int, int, int]] = {"10M": (6, 320, 8192, 3), "50M": (8, 640, 16384, 1)}
"""Layers, width, vocabulary, cycles."""
QUICK = {"quick": (2, 64, 512, 1)}
TOKENS = (2048, 16384)
CYCLE = 10
LENGTH = 1024  # of a row
ROWS = 2  # of a micro-batch
PEER = release("pytorch-optimizer")
BLOCKS = "SOAP in blocks"
Spent = dict[str, list[tuple[float, float]]]
"""Seconds elapsed, and seconds of all threads, of each optimizer in every step."""
sys.path.append(str(PEERS))


def main() -> None:
    options = arguments(__doc__, threads="1,2 by default", sizes="10M,50M by default")
    sizes = QUICK if options.quick else {size: SIZES[size] for size in (options.sizes or "10M,50M").split(",")}
    rows: list[Row] = []
    for size, (layers, width, vocabulary, cycles) in sizes.items():
        for threads in map(int, (options.threads or "1,2").split(",")):
            torch.set_num_threads(threads)
            model = model_of(layers, width, vocabulary)
            optimizers, missing = candidates(model, width)
            spent = in_turn(optimizers, model, cycles)
            estimate = [timed(take_up, optimizers["Sophia"]) for _ in range(CYCLE)]
            del optimizers
            passes = {tokens: forward_and_backward(model, tokens) for tokens in TOKENS[: 1 if options.quick else 2]}
            for number, unit in enumerate(("ms", "CPU ms")):
                times = {name: [1e3 * both[number] for both in some] for name, some in spent.items()}
                taken = 1e3 * statistics.median(both[number] for both in estimate)
                about = f"{size}, {threads} thread{'s' if threads > 1 else ''}"
                rows += costs(about, unit, times, taken, missing)
                for tokens, took in passes.items():
                    rows += shares(f"{about}, {tokens:,} tokens", unit, 1e3 * took[number], times, taken, missing)
    show("optim", rows, options.json)
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", file=sys.stderr)


def costs(about: str, unit: str, times: dict[str, list[float]], taken: float, missing: dict[str, str]) -> list[Row]:
    ordinary = {name: statistics.median(some[1:]) for name, some in times.items()}
    refresh = {name: of_cycles(max, some) for name, some in times.items()}
    cycle = {name: of_cycles(statistics.mean, some) for name, some in times.items()}
    first = {name: some[0] for name, some in times.items()}
    fused = {"AdamW, fused": ordinary["AdamW"]}

    def one(case: str, figures: dict[str, float], name: str, *peers: str, **others: float) -> Row:
        there = {peer: figures[peer] for peer in peers if peer in figures}
        absent = missing if len(there) < len(peers) else {}
        return row(f"{about}: {case}", unit, {"ours": figures[name], **there, **others}, absent)

    rows = [
        one("AdamW (fused)", ordinary, "AdamW", "AdamW, torch's default"),
        one("Muon", ordinary, "Muon", f"Muon, {PEER}", **fused),
        one("Sophia, ordinary", ordinary, "Sophia", f"SophiaH, {PEER}", **fused),
        row(f"{about}: Sophia, an estimate taken up", unit, {"ours": taken, **fused}, {}),
        one("SOAP, first", first, "SOAP", f"SOAP, {PEER}"),
        one("SOAP, ordinary", ordinary, "SOAP", f"SOAP, {PEER}", **fused),
        one("SOAP, refresh", refresh, "SOAP", f"SOAP, {PEER}"),
        one("SOAP, cycle", cycle, "SOAP", f"SOAP, {PEER}", **fused),
        one("SOAP, cycle, long axes in blocks", cycle, BLOCKS, **fused),
    ]
    over = {"ours": (ordinary["Sophia"] + taken / CYCLE) / ordinary["AdamW"]}
    limit = 1.8 if compiled("cpu") else 4.3
    rows.append({**row(f"{about}: Sophia's cycle over fused AdamW", f"times, {unit}", over, {}), "limit": limit})
    if not missing:
        faster = {"ours": cycle[f"SOAP, {PEER}"] / cycle["SOAP"]}
        rows.append(
            {
                **row(f"{about}: SOAP's cycle, {PEER}'s over ours", f"times, {unit}", faster, {}),
                "better": "higher",
                "limit": 1.5,
            }
        )
    return rows


def shares(
    about: str, unit: str, passes: float, times: dict[str, list[float]], taken: float, missing: dict[str, str]
) -> list[Row]:
    cycle = {name: of_cycles(statistics.mean, some) for name, some in times.items()}
    cycle["Sophia"] += (taken + passes) / CYCLE
    share = {name: 100 * one / passes for name, one in cycle.items()}
    rows = [row(f"{about}: forward and backward", unit, {"ours": passes}, {})]
    for name in ("AdamW", "Muon", "Sophia", "SOAP"):
        peer = {"AdamW": "AdamW, torch's default", "Muon": f"Muon, {PEER}", "SOAP": f"SOAP, {PEER}"}.get(name)
        figures = {"ours": share[name], **({peer: share[peer]} if peer in share else {})}
        rows.append(row(f"{about}: {name}", f"% of that, {unit}", figures, {} if peer in (None, *share) else missing))
    return rows


def of_cycles(summary: Callable[[list[float]], float], times: list[float]) -> float:
    """Median over cycles, the first step apart. A refresh is somewhere in each."""
    steps = times[1:]
    return statistics.median(summary(steps[start : start + CYCLE]) for start in range(0, len(steps), CYCLE))


def model_of(layers: int, width: int, vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=width // 64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def candidates(model: nn.Module, width: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Optimizers of the model's weights by name, and why others are not there."""

    def groups(*roles: str) -> list[dict[str, Any]]:
        made = parameter_groups(model, [], 0.1)  # new ones, since optimizers write into them
        return [group for group in made if not roles or group["role"] in roles]

    def rest() -> AdamW:
        return AdamW(groups("head", "embedding", "vector"), lr=1e-4, fused=True)

    found: dict[str, Optimizer] = {
        "AdamW": AdamWConfig(lr=1e-4).build(groups()),
        "AdamW, torch's default": AdamW(groups(), lr=1e-4),
        "Muon": MuonConfig(lr=1e-4).build(groups()),
        "Sophia": SophiaConfig(lr=1e-4).build(groups()),
        "SOAP": SOAPConfig(lr=1e-4).build(groups()),
        BLOCKS: SOAPConfig(lr=1e-4, max_precond_dim=width, block=width).build(groups()),
    }
    try:
        import pytorch_optimizer as peer  # type: ignore[import-not-found]
    except ImportError as error:
        return found, {PEER: f'not there ({error}); pip install -e ".[bench]"'}
    muon = [{"params": group["params"], "use_muon": True} for group in groups("matrix")]
    found[f"Muon, {PEER}"] = Split([peer.Muon(muon, lr=1e-4), rest()])
    # It counts from 0, where an estimate would be due.
    sophia = [{**group, "step": 1} for group in groups()]
    found[f"SophiaH, {PEER}"] = peer.SophiaH(sophia, lr=1e-4, update_period=1_000_000)
    found[f"SOAP, {PEER}"] = Split([peer.SOAP(groups("matrix"), lr=1e-4, precondition_frequency=CYCLE), rest()])
    return found, {}


class Estimate:
    """Stands for `mm.train.step.Passes`: what is in `.grad` is of labels that the model drew."""

    def first(self, share: float) -> "Estimate":
        return self

    def drawn(self) -> int:
        return TOKENS[0]

    def clip(self, limit: float | None) -> Tensor:
        return torch.ones(())


def take_up(sophia: Any) -> None:
    """What a run does once in `every` steps, if it logs them."""
    sophia.extra(Estimate())
    for number in sophia.shares().values():
        number.tolist()


def in_turn(optimizers: dict[str, Optimizer], model: nn.Module, cycles: int) -> Spent:
    """A first step, which makes state, and `cycles` times `CYCLE` more. All of them move the same weights."""
    spent: Spent = {name: [] for name in optimizers}
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    for _ in range(1 + cycles * CYCLE):
        gradients = [1e-3 * torch.randn_like(parameter) for parameter in parameters]
        for name, optimizer in optimizers.items():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(gradient)  # some write into it
            spent[name].append(timed(optimizer.step))
    return spent


def timed(run: Callable[..., Any], *args: Any) -> tuple[float, float]:
    start = time.perf_counter(), time.process_time()
    run(*args)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def forward_and_backward(model: Any, tokens: int) -> tuple[float, float]:
    """Median seconds of a step's passes, in micro-batches of `ROWS` rows."""

    def passes() -> None:
        for _ in range(tokens // (ROWS * LENGTH)):
            ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH))
            model(ids, labels=ids).loss.backward()

    model.zero_grad()
    took = [timed(passes) for _ in range(4 if tokens == TOKENS[0] else 2)][1:]
    return statistics.median(both[0] for both in took), statistics.median(both[1] for both in took)


if __name__ == "__main__":
    main()
