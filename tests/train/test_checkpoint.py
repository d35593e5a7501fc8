"""Checkpoints: the same tensors come back at any number of ranks; killed anywhere, the newest whole one loads."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mm.cli import main
from mm.errors import CheckpointError
from mm.train.checkpoint import (
    Checkpoints,
    complete,
    create_optimizer_state,
    described,
    load,
    model_tensors,
    newest,
    optimizer_tensors,
    pointed,
    read_state,
)
from mm.train.checkpoint_tools import listing, merge, verify
from mm.train.storage import Reader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Uneven(nn.Module):
    """Sizes that 2 and 4 do not divide, shards with nothing in them, buffers without dimensions, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1), nn.Linear(1, 5, bias=False))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.empty = nn.Buffer(torch.empty(0, 3))
        self.halves = nn.Buffer(torch.zeros(3, dtype=torch.bfloat16))
        self.used = nn.Buffer(torch.zeros(3, dtype=torch.bool))


def value(name: str, like: Tensor, seed: int = 0) -> Tensor:
    """The whole tensor that a name stands for."""
    generator = torch.Generator().manual_seed(seed + sum(name.encode()))
    return (torch.rand(like.shape, generator=generator) * 100).to(like.dtype)


def build(mesh: Any = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Model and AdamW state as a run has them, all zero."""
    model = Uneven()
    if mesh is not None:
        fully_shard(model.layers, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = [{"params": list(model.parameters()), "names": [name for name, _ in model.named_parameters()]}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    create_optimizer_state(optimizer, {name for name in groups[0]["names"] if name != "layers.0.bias"})
    tensors = {
        **{f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()},
        **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()},
    }
    for tensor in tensors.values():
        tensor.zero_()
    return model, tensors


def fill(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        whole = value(name, tensor, seed)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)
    return tensors


def check(tensors: dict[str, Tensor], seed: int = 0) -> None:
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, value(name, whole, seed)), name


def two_ranks(rank: int, ranks: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    _, tensors = build(mesh)
    # Saved by one process, loaded by two, and saved by two.
    state = load(folder / "one/step-00000001", tensors)
    assert state["ranks"] == 1 and state["cursor"] == {"position": 7}
    check(tensors)
    checkpoints = Checkpoints(folder / "two", keep=2, ranks=ranks, rank=rank)
    checkpoints.save(1, tensors, {"rank": rank})
    fill(tensors, seed=1)  # the copy was made before
    checkpoints.wait()
    # Whole tensors, each on one rank only, as an engine has them that does not use DTensor.
    whole = {name: value(name, tensor) for name, tensor in tensors.items()}
    mine = {name: tensor for number, (name, tensor) in enumerate(whole.items()) if number % 2 == rank}
    checkpoints.save(2, mine, {})
    checkpoints.wait()
    load(folder / "two/step-00000002", {name: tensor.zero_() for name, tensor in mine.items()})
    check(mine)
    # A write that fails on one rank fails on both, and leaves what was there.
    big = {f"model.{name}": torch.zeros(250_000) for name in ("a", "b")}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    checkpoints.save(3, big, {})
    with pytest.raises(OSError, match=r"File too large.*tensors-00001\.safetensors"):
        checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert sorted(path.name for path in (folder / "two").iterdir()) == ["latest", "step-00000001", "step-00000002"]
    # What one rank cannot load is raised on both.
    wrong = {"model.halves": torch.zeros(3 + rank)}
    with pytest.raises(CheckpointError, match=r"model\.halves is \[3\], the model's \[4\]"):
        load(folder / "two/step-00000002", wrong)
    checkpoints.close()


def four_ranks(rank: int, ranks: int, folder: Path) -> None:
    """Hybrid: two copies of the weights, each on two ranks; and four parts."""
    for name, mesh in (
        ("hybrid", init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))),
        ("four", init_device_mesh("cpu", (4,))),
    ):
        _, tensors = build(mesh)
        if name == "four" and rank:
            assert any(t.to_local().numel() == 0 for t in tensors.values() if isinstance(t, DTensor))
        load(folder / "two/step-00000001", tensors)
        check(tensors)
        checkpoints = Checkpoints(folder / name, keep=1, asynchronous=name == "four", ranks=ranks, rank=rank)
        checkpoints.save(1, tensors, {})
        checkpoints.close()


def start(case: Callable[[int, int, Path], None], folder: Path) -> None:
    dist.init_process_group("gloo")
    case(dist.get_rank(), dist.get_world_size(), folder)


def save_one(folder: Path, step: int, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    _, tensors = build()
    checkpoints = Checkpoints(folder, keep=9, **options)
    checkpoints.save(step, fill(tensors, seed), {"cursor": {"position": 7}})
    checkpoints.close()
    return tensors


def test_any_number_of_ranks_saves_and_loads(ranks: Ranks, tmp_path: Path) -> None:
    save_one(tmp_path / "one", 1)
    ranks.run(start, 2, two_ranks, tmp_path)
    ranks.run(start, 4, four_ranks, tmp_path)
    for name in ("two", "hybrid", "four"):
        checkpoint = tmp_path / name / "step-00000001"
        _, tensors = build()
        assert described(checkpoint) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        load(checkpoint, tensors)
        check(tensors)
        assert verify(checkpoint, print) == {str(checkpoint): []}
        # Merged, they are what one process would have saved.
        (merged,) = merge(checkpoint, tmp_path / f"{name}.safetensors", False, print)
        found = load_file(merged)
        assert found.keys() == {one.removeprefix("model.") for one in tensors if one.startswith("model.")}
        check({f"model.{name}": tensor for name, tensor in found.items()})
    # Copies are written once, each by one rank, and no rank has all the work.
    sizes = [file.stat().st_size for file in (tmp_path / "hybrid/step-00000001").glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < sum(sizes) / 2
    assert read_state(tmp_path / "two/step-00000001")["rank"] == 0


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    tensors = save_one(tmp_path, 1)
    found = load_file(tmp_path / "step-00000001/tensors-00000.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    files = {file.suffix for file in (tmp_path / "step-00000001").iterdir()}
    assert files == {".json", ".safetensors"}


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Tensors and state change while it is written, and the copies are used again by the next save."""
    tensor, state = torch.zeros(2_000_000), {"counts": [0]}
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in range(1, 4):
        tensor.fill_(step)
        state["counts"][0] = step
        checkpoints.save(step, {"model.a": tensor.t()}, state)
        tensor.fill_(-1)
        state["counts"][0] = -1
    checkpoints.close()
    for step, checkpoint in enumerate(complete(tmp_path), start=1):
        assert load(checkpoint, {"model.a": tensor})["counts"] == [step]
        assert bool((tensor == step).all())


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        checkpoints.save(step, {"model.a": torch.tensor(step)}, {}, best=step in (1, 6))
        checkpoints.wait()
        best = pointed(tmp_path, "best")
        assert best is not None and best.name == f"step-{6 if step >= 6 else 1:08d}"
    assert [int(path.name[-2:]) for path in complete(tmp_path)] == [4, 6, 8, 10, 11]
    assert newest(tmp_path) == tmp_path / "step-00000011"
    rows = listing(tmp_path)
    assert [(row["step"], row["marks"]) for row in rows if row["marks"]] == [(6, ["best"]), (11, ["latest"])]
    # The pointer counts; without it, or when what it names is gone, the highest step does.
    (tmp_path / "latest").write_text("step-00000008\n")
    assert newest(tmp_path) == tmp_path / "step-00000008"
    for text in ("step-00000007", "", "../secret"):
        (tmp_path / "latest").write_text(text)
        assert newest(tmp_path) == tmp_path / "step-00000011"
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == tmp_path / "step-00000011"
    assert newest(tmp_path / "none") is None
    checkpoints.close()


def killed_everywhere(folder: Path) -> None:
    """SIGKILL before each thing that a save does to files; `keep` is 1, and the second save replaces the first."""
    tensors = {"model.a": torch.ones(1000), "model.b": torch.ones(())}
    for again in (False, True):
        kill_at, ended = 1, False
        while not ended:
            run = folder / f"{again}-{kill_at}"
            before = Checkpoints(run, keep=1)
            before.save(1, tensors, {"value": 1})
            before.close()
            child = os.fork()
            if child == 0:
                save_and_die(run, kill_at, 1 if again else 2, {name: 2 * one for name, one in tensors.items()})
                os._exit(0)
            _, status = os.waitpid(child, 0)
            ended = status == 0
            assert ended or os.WTERMSIG(status) == signal.SIGKILL
            if not again:
                check_newest(run)  # a reader may come before the run goes on
            Checkpoints(run, keep=1).close()
            check_newest(run)
            assert not list(run.glob(".*"))
            kill_at += 1
            shutil.rmtree(run)
        assert kill_at > 20


def save_and_die(run: Path, kill_at: int, step: int, tensors: dict[str, Tensor]) -> None:
    checkpoints = Checkpoints(run, keep=1, asynchronous=kill_at % 2 == 0)
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    checkpoints.save(step, tensors, {"value": 2})
    checkpoints.wait()


def check_newest(run: Path) -> None:
    found = newest(run)
    assert found is not None
    tensors = {"model.a": torch.zeros(1000), "model.b": torch.zeros(())}
    state = load(found, tensors)
    assert all(bool((tensor == state["value"]).all()) for tensor in tensors.values())


def test_killed_anywhere_in_a_save_a_whole_checkpoint_is_there(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(killed_everywhere, 1, tmp_path)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, asynchronous: bool) -> None:
    """A limit on file size stands for the full disk: writing stops in the middle of a tensor."""
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=asynchronous)
    checkpoints.save(1, {"model.a": torch.ones(500_000)}, {})
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*tensors-00000\.safetensors"):
            checkpoints.save(2, {"model.a": torch.ones(500_000)}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    load(tmp_path / "step-00000001", {"model.a": torch.zeros(500_000)})
    checkpoints.save(3, {"model.a": torch.ones(500_000)}, {})
    checkpoints.close()
    assert [path.name for path in complete(tmp_path)] == ["step-00000003"]


def test_a_save_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever asks, after a while; and by the next one, until too many in a row have failed."""
    tensors = {"model.a": torch.ones(3)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    commit = Checkpoints._commit

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_commit", full)
    checkpoints.save(1, tensors, {})
    checkpoints.settle(60)
    assert not checkpoints.to_be_repeated()
    monkeypatch.setattr("mm.train.checkpoint.PATIENCE", 0)
    assert checkpoints.to_be_repeated()
    for step in range(2, 6):
        assert isinstance(checkpoints.ended(), OSError) and checkpoints.ended() is None
        checkpoints.save(step, tensors, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(6, tensors, {})
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(7, tensors, {})
    checkpoints.settle(60)
    monkeypatch.setattr(Checkpoints, "_commit", commit)
    checkpoints.save(8, tensors, {})
    checkpoints.settle(60)
    assert not checkpoints.to_be_repeated() and checkpoints.ended() is None
    monkeypatch.setattr(Checkpoints, "_commit", lambda *_: (_ for _ in ()).throw(CheckpointError("not shared")))
    checkpoints.save(9, tensors, {})
    checkpoints.settle(60)
    assert not checkpoints.to_be_repeated()  # that is no fault of the disk
    with pytest.raises(CheckpointError, match="not shared"):
        checkpoints.save(10, tensors, {})
    checkpoints.close()
    assert [path.name for path in complete(tmp_path)] == ["step-00000008"]


def test_an_old_checkpoint_that_somebody_reads_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks keep the files that are open, and the folder with them."""
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, {"model.a": torch.ones(3)}, {})
        checkpoints.wait()
    assert [path.name for path in complete(tmp_path)] == ["step-00000002"]
    monkeypatch.undo()
    checkpoints.save(3, {"model.a": torch.ones(3)}, {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    checkpoint = tmp_path / "step-00000001"
    _, tensors = build()
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    load(checkpoint, weights)  # the optimizer may be left out
    check(weights)
    for change, message in (
        ({"model.halves": torch.zeros(4)}, r"model\.halves is \[3\], the model's \[4\]$"),
        ({"model.other": torch.zeros(4)}, r"model\.other is missing$"),
        ({"model.halves": torch.zeros(4), "model.other": torch.zeros(4)}, r"model\.halves is .*\(and 1 more\)$"),
        ({"optimizer.halves.step": torch.zeros(())}, r"optimizer\.halves\.step is missing$"),
    ):
        with pytest.raises(CheckpointError, match=f"of another model: {message}"):
            load(checkpoint, {**weights, **change})
    with pytest.raises(CheckpointError, match=r"model\.halves is not in the model"):
        load(checkpoint, {name: tensor for name, tensor in weights.items() if name != "model.halves"})


def test_damage_is_said(tmp_path: Path) -> None:
    save_one(tmp_path / "run/checkpoints", 1)
    checkpoint = tmp_path / "run/checkpoints/step-00000001"
    file = checkpoint / "tensors-00000.safetensors"
    good, state = file.read_bytes(), json.loads((checkpoint / "state.json").read_text())
    _, tensors = build()
    assert verify(tmp_path / "run", print) == {str(checkpoint): []}

    file.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=r"damaged: tensors-00000\.safetensors has .* bytes, expected"):
        load(checkpoint, tensors)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load(checkpoint, tensors)
    file.write_bytes(good[:100] + b"\xff" + good[101:])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(checkpoint, tensors)
    for place in (3, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert "checksum" in verify(checkpoint, print)[str(checkpoint)][0]
        assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 2
    file.write_bytes(good)

    (checkpoint / "state.json").write_text(json.dumps({**state, "format_version": 2}))
    with pytest.raises(CheckpointError, match="checkpoint format 2, this version of mm reads 4"):
        load(checkpoint, tensors)
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_state(checkpoint)


def test_verify_finds_numbers_that_are_not_finite(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"model.a": torch.tensor([1.0, torch.nan, torch.inf]), "model.b": torch.tensor(1)}, {})
    checkpoints.close()
    assert verify(tmp_path, print) == {str(tmp_path / "step-00000001"): ["model.a: 2 numbers are not finite"]}


def test_merged_in_files_of_limited_size(tmp_path: Path) -> None:
    _, tensors = build()
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    average = {name.replace("model.", "ema."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    checkpoints.save(1, fill({**tensors, **average}), {})
    checkpoints.close()
    files = merge(tmp_path / "run", tmp_path / "out", True, print, max_bytes=200)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1 and found.keys() == index["weight_map"].keys()
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    check({f"ema.{name}": tensor for name, tensor in found.items()})
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        merge(tmp_path, tmp_path / "out", False, print)


def test_optimizer_state_is_made_for_sharded_parameters_and_only_where_it_was(tmp_path: Path) -> None:
    model, tensors = build()
    names = {name.removeprefix("optimizer.").rpartition(".")[0] for name in tensors if name.startswith("optimizer.")}
    assert names == {name for name, _ in model.named_parameters()} - {"layers.0.bias"}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    for step in (10, 20):
        checkpoints.save(step, {"model.a": torch.ones(1000)}, {"engine": "single"}, best=step == 10)
    checkpoints.close()
    shutil.copytree(run / "checkpoints/step-00000020", run / "checkpoints/.step-00000030.partial")
    assert main(["checkpoint", "ls", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"]
    assert [(row["step"], row["marks"], row["whole"]) for row in rows] == [
        (10, ["best"], True), (20, ["latest"], True), (30, [], False),
    ]  # fmt: skip
    assert rows[0]["ranks"] == 1 and rows[0]["engine"] == "single" and 4000 < rows[0]["bytes"] < 9000
    assert rows[0]["age"] < 600
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert "not whole" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["checkpoint", "merge", str(run), "--out", str(tmp_path / "weights")]) == 0
    assert torch.equal(load_file(tmp_path / "weights/model.safetensors")["a"], torch.ones(1000))
    assert main(["checkpoint", "merge", str(run), "--out", str(tmp_path / "weights"), "--ema"]) == 2
    assert "no moving average" in capsys.readouterr().err
    assert main(["checkpoint", "ls", str(tmp_path)]) == 2


def test_reader_puts_parts_together_one_at_a_time(tmp_path: Path) -> None:
    tensors = save_one(tmp_path, 1)
    reader = Reader(tmp_path / "step-00000001")
    for name, tensor in zip(tensors, reader.whole(tensors), strict=True):
        assert torch.equal(tensor, tensors[name]), name
