"""Saving: seconds that training stands still for a checkpoint, written in the background and not.

A stack of linear layers trains with AdamW; weights and optimizer state are 287 MB (quick: 14 MB). In each repetition
each way of saving is measured in turn: some undisturbed steps, the save, then steps until it is written. `stands still`
is the call itself; `lost` adds what the steps beside it took longer than undisturbed ones. In one process, and on two
gloo ranks with FSDP2 (the slower rank counts). Each process computes with one thread: on two cores the first has a core
left for writing, as a machine with GPUs has, and the second has none.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.harness import Row, arguments, release, show
from mm.train.checkpoint import Checkpoints, model_tensors, optimizer_tensors

UNDISTURBED = 4
Save = Callable[[int, dict[str, Tensor]], Callable[[], bool]]
"""Starts a save; what it returns says whether that is written."""


def main() -> None:
    options = arguments(__doc__)
    width, repetitions = (256, 1) if options.quick else (1152, 5)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for ranks in (1, 2):
            folder = Path(name) / str(ranks)
            folder.mkdir()
            if ranks == 1:
                measure(0, 1, folder, width, repetitions)
            else:
                mp.spawn(measure, (ranks, folder, width, repetitions), nprocs=ranks)
            found = [torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)]
            size = sum(file.stat().st_size for file in (folder / "asynchronous").rglob("*.safetensors")) / 1e6
            rows += table(f"{ranks} process{'es' if ranks > 1 else ''}, {size:.0f} MB", found)
    show("checkpoint", rows, options.json)


def table(where: str, found: list[dict[str, dict[str, float]]]) -> list[Row]:
    def worst(way: str, what: str) -> float:
        return max(one[way][what] for one in found)

    peers = {"here, synchronous": "synchronous", f"{release('torch')} dcp.async_save": "dcp", release("torch"): "plain"}
    rows: list[Row] = []
    for what, about, unit in (
        ("still", "stands still", "s"),
        ("lost", "lost in all", "s"),
        ("written", "until it is written", "s"),
        ("slower", "steps meanwhile", "of an undisturbed step"),
    ):
        others = {peer: worst(way, what) for peer, way in peers.items() if way in found[0] and what in found[0][way]}
        row: Row = {"case": f"{where}: {about}", "unit": unit, "better": "lower"}
        rows.append({**row, "ours": worst("asynchronous", what), "peers": others})
        if what == "still":
            rows[-1]["limit"] = worst("synchronous", what) / 4
    row = {"case": f"{where}: stands still, first save", "unit": "s", "better": "lower", "peers": {}}
    return [*rows, {**row, "ours": worst("asynchronous", "first")}]


def measure(rank: int, ranks: int, folder: Path, width: int, repetitions: int) -> None:
    """Medians for each way of saving, into `rank-N.pt`."""
    mesh = None
    torch.set_num_threads(1)
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(18) for layer in (nn.Linear(width, width), nn.GELU())])
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = [{"params": list(model.parameters()), "names": [name for name, _ in model.named_parameters()]}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    inputs = torch.randn(64, width)

    def step() -> float:
        start = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    step()
    ways = ways_to_save(folder, ranks, rank)
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(repetitions + 1):
        for way, save in ways.items():
            tensors = {
                **{f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()},
                **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()},
            }
            usual = statistics.median(step() for _ in range(UNDISTURBED))
            start = time.perf_counter()
            written = save(number, tensors)
            still = time.perf_counter() - start
            beside = []
            while not all_ranks(written(), ranks):
                beside.append(step())
            one = {"still": still, "lost": still + sum(beside) - usual * len(beside)}
            one["written"] = time.perf_counter() - start
            if beside:
                one["slower"] = statistics.mean(beside) / usual
            seen[way].append(one)
    result = {
        way: {what: median([one.get(what) for one in runs[1:]]) for what in runs[1]} for way, runs in seen.items()
    }
    result["asynchronous"]["first"] = seen["asynchronous"][0]["still"]
    torch.save(result, folder / f"rank-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def median(values: list[Any]) -> float:
    return statistics.median(value for value in values if value is not None)


def all_ranks(done: bool, ranks: int) -> bool:
    """So that all take the same number of steps."""
    if ranks == 1:
        return done
    count = torch.tensor(int(done))
    dist.all_reduce(count)
    return int(count) == ranks


def ways_to_save(folder: Path, ranks: int, rank: int) -> dict[str, Save]:
    group = dist.new_group(backend="gloo") if ranks > 1 else None
    ours = {
        way: Checkpoints(folder / way, keep=1, asynchronous=way == "asynchronous", ranks=ranks, rank=rank)
        for way in ("asynchronous", "synchronous")
    }

    def save_ours(way: str) -> Save:
        def save(number: int, tensors: dict[str, Tensor]) -> Callable[[], bool]:
            ours[way].save(number, tensors, {})
            writing = ours[way]._writing
            return lambda: writing is None or writing.done()

        return save

    def save_dcp(number: int, tensors: dict[str, Tensor]) -> Callable[[], bool]:
        writer = dcp.FileSystemWriter(folder / "dcp")
        future: Any = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=ranks == 1)
        return lambda: bool(future.done())

    def save_plain(number: int, tensors: dict[str, Tensor]) -> Callable[[], bool]:
        torch.save(tensors, folder / "plain.pt")
        return lambda: True

    ways = {way: save_ours(way) for way in ours} | {"dcp": save_dcp}
    return ways | ({"plain": save_plain} if ranks == 1 else {})


if __name__ == "__main__":
    main()
