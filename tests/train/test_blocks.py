"""Blocks: recomputed and compiled ones compute the same as plain ones, under the same names, with less memory."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from mm.config import RunConfig
from mm.data.batch import PackedBatch, collate
from mm.data.prepare import open_splits
from mm.errors import ConfigError
from mm.models import attention
from mm.models.system import GenerativeSystem
from mm.train.blocks import DEFAULT_PATTERNS, checkpoint_activations, compile_blocks, find_blocks
from mm.train.config import CheckpointingConfig

Built = tuple[GenerativeSystem, PackedBatch]
BLOCKS = [
    "vision.featurizer.blocks.0", "vision.featurizer.blocks.1", "language.model.layers.0", "language.model.layers.1",
]  # fmt: skip


@pytest.fixture
def built(tiny_config: Callable[..., RunConfig]) -> Built:
    """With dropout in every block."""
    torch.manual_seed(0)
    config = tiny_config(
        "model.vision.options.proj_drop_rate=0.1", "model.vision.options.drop_path_rate=0.2",
        "model.language.config.attention_dropout=0.1",
    )  # fmt: skip
    layout = config.model.layout()
    dataset = open_splits(config.data, layout, config.seed)["train"]
    return config.model.build().train(), collate([dataset.read(0), dataset.read(1)], layout, 128)


def run(system: nn.Module, batch: Any, **options: Any) -> dict[str, Tensor]:
    """The output and the gradients of one pass, dropout seeded."""
    torch.manual_seed(1)
    output = system(batch, **options)
    loss = output.losses["next_token"] if hasattr(output, "losses") else output.square().sum()
    loss.backward()
    found = {"output": loss.detach()}
    for name, parameter in system.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
            parameter.grad = None
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 1
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def recompute(system: nn.Module, mode: str, **options: Any) -> None:
    config = CheckpointingConfig(mode=mode, **options)
    checkpoint_activations(system, config, find_blocks(system, DEFAULT_PATTERNS))


def test_default_patterns_find_the_blocks_of_all_towers(built: Built) -> None:
    found = find_blocks(built[0], DEFAULT_PATTERNS)
    assert list(found) == BLOCKS
    assert all(module is built[0].get_submodule(name) for name, module in found.items())


def test_innermost_of_nested_blocks_are_taken() -> None:
    tower = nn.ModuleDict({"vision": timm.create_model("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 8, 8, 8))})
    assert list(find_blocks(tower, DEFAULT_PATTERNS)) == [
        "vision.stages.0.blocks.0", "vision.stages.1.blocks.0", "vision.stages.1.blocks.1",
        "vision.stages.2.blocks.0", "vision.stages.3.blocks.0",
    ]  # fmt: skip
    assert list(find_blocks(tower, [r"vision\.stages\.[01]"])) == ["vision.stages.0", "vision.stages.1"]


def test_only_default_patterns_may_match_nothing(built: Built) -> None:
    assert find_blocks(nn.Linear(2, 2), DEFAULT_PATTERNS) == {}
    with pytest.raises(
        ConfigError, match=r"train.blocks: 'language.layer.\\\\d\+' matches no module; near to it: .*layers.\\d\+"
    ):
        find_blocks(built[0], [*DEFAULT_PATTERNS, r"language.layer.\d+"])
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing\.match: 'x' matches no module"):
        recompute(built[0], "full", match=["x"])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_equals_plain_to_the_last_bit(built: Built, mode: str) -> None:
    """Packing reaches the layers as a keyword, dropout draws the same masks again."""
    system, batch = built
    expected = run(system, batch)
    torch.manual_seed(2)
    other = system(batch).losses["next_token"]
    assert other != expected["output"]  # dropout is at work
    names = [list(system.state_dict()), [name for name, _ in system.named_modules()]]
    recompute(system, mode)
    assert names == [list(system.state_dict()), [name for name, _ in system.named_modules()]]
    assert_equal(run(system, batch), expected)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(system(batch).losses["next_token"], expected["output"])


def test_frozen_blocks_pass_gradients_on(built: Built) -> None:
    """A frozen language model lets the connector learn through it; a frozen tower costs nothing."""
    system, batch = built
    for name, parameter in system.named_parameters():
        parameter.requires_grad_(name.startswith("connector."))
    expected = run(system, batch)
    assert set(expected) == {"output", *(name for name, _ in system.named_parameters() if name.startswith("connector"))}
    recompute(system, "full")
    assert_equal(run(system, batch), expected)


def test_under_autocast(built: Built) -> None:
    system, batch = built
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(system, batch)
        recompute(system, "full")
        assert_equal(run(system, batch), expected)


def test_a_copy_uses_its_own_weights(built: Built) -> None:
    system, batch = built
    recompute(system, "full")
    other = copy.deepcopy(system)
    with torch.no_grad():
        other.language.model.layers[0].mlp.down_proj.weight.zero_()
    assert run(other, batch)["output"] != run(system, batch)["output"]


def test_match_chooses_what_is_recomputed(built: Built) -> None:
    system, _ = built
    recompute(system, "full", match=[r"language.*layers\.1", r"vision\.featurizer"])
    changed = [name for name, module in system.named_modules() if "forward" in vars(module)]
    assert changed == ["vision.featurizer", "language.model.layers.1"]
    recompute(system, "none")
    assert changed == [name for name, module in system.named_modules() if "forward" in vars(module)]


class Block(nn.Module):
    """A residual MLP with a keyword that it cannot do without."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x + scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"layers": nn.ModuleList(Block(width) for _ in range(depth))})

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        for block in self.net["layers"]:
            x = block(x, scale=scale)
        return x


def kept_bytes(system: nn.Module, inputs: Tensor) -> int:
    """Allocated minus freed during the forward pass: what is kept for the backward pass, and the output."""
    scale = torch.ones(())
    with profile(profile_memory=True) as found:
        output = system(inputs, scale=scale)
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in found.key_averages())


def test_less_is_kept() -> None:
    """Of each block: its input (full), and the outputs of both products (selective); input, norm, up, GELU (plain)."""
    rows, width, depth = 4096, 32, 4
    kept = {}
    for mode in ("none", "full", "selective"):
        system = Stack(depth, width)
        recompute(system, mode)
        kept[mode] = kept_bytes(system, torch.randn(rows, width))
    one = rows * width * 4
    # The first block's input is the caller's; the last one's output takes its place.
    assert kept["full"] == pytest.approx(depth * one, rel=0.05)
    assert kept["selective"] == pytest.approx(depth * (1 + 4 + 1) * one, rel=0.05)
    assert kept["none"] == pytest.approx(depth * (1 + 1 + 4 + 4) * one, rel=0.05)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_recomputed_compiled_and_sharded_together(fresh_compiler: None, group: None, mode: str) -> None:
    """Compiled down to ATen's own kernels, which every machine has; all blocks share their graphs."""
    inputs, scale = torch.randn(8, 32, requires_grad=True), torch.tensor(0.5)
    expected = run(Stack(), inputs, scale=scale)
    system = Stack()
    blocks = find_blocks(system, DEFAULT_PATTERNS)
    checkpoint_activations(system, CheckpointingConfig(mode=mode), blocks)
    compile_blocks(blocks, backend="aot_eager")
    mesh = init_device_mesh("cpu", (1,))
    for block in blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(system, mesh=mesh)
    for _ in range(2):
        found = run(system, inputs, scale=scale)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert graphs() == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_a_packed_layer_compiles(fresh_compiler: None, built: Built) -> None:
    """In one piece, for all layers, recomputed too, where nothing depends on what is in the batch."""
    system, batch = built
    language = system.eval().language
    embeddings = system.embed(batch).detach()
    packing = attention.packing(batch.segment_ids, implementation="dense")
    assert packing.dense_mask.any()  # made before the layers run, as on a GPU the block mask must be

    def outputs() -> dict[str, Tensor]:
        out = language(
            inputs_embeds=embeddings.flatten(0, 1)[None],
            position_ids=batch.position_ids.reshape(1, -1),
            use_cache=False,
            packing=packing,
        ).logits
        out.square().mean().backward()
        found = {name: p.grad for name, p in language.named_parameters()}
        language.zero_grad()
        return {"output": out.detach(), **found}

    expected = outputs()
    blocks = find_blocks(system, [r"language\.model\.layers\.\d+"])
    checkpoint_activations(system, CheckpointingConfig(mode="full"), blocks)
    compile_blocks(blocks, backend="aot_eager")
    for name, value in outputs().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert 1 <= graphs() <= 2 and not torch._dynamo.utils.counters["graph_break"]
