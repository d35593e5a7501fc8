"""The `train.engine:` section. No torch here."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mm.errors import ConfigError
from mm.settings import Count, Kinds, KindSection, Pattern, Section

if TYPE_CHECKING:
    from mm.train.distributed import World
    from mm.train.engines.single import SingleEngine


BUCKET = 50_000_000
"""Elements that DeepSpeed reduces or gathers at a time: 200 MB in float32. Its own 2 GB are for larger machines."""


_WHOLE = "works on whole matrices and would see flat pieces of them; use train.engine.kind fsdp, or adamw"
REFUSED = {
    "muon": _WHOLE,
    "soap": _WHOLE,
    "sophia": "takes extra passes, which are not wired under DeepSpeed; use train.engine.kind fsdp, or adamw",
}
"""Kinds of optimizers that DeepSpeed does not get, and why."""


class SingleConfig(KindSection):
    """One process."""

    kind: str = "single"

    def build(self, world: "World", train: Any) -> "SingleEngine":
        from mm.train.engines.single import SingleEngine

        return SingleEngine(world, train)


class PrecisionRule(Section):
    """The precision that the weights of modules whose whole name matches are gathered and used in."""

    match: Pattern
    """A regular expression for whole names of units and blocks, such as `vision.*`; the empty one for the outermost."""
    weights: Literal["fp32", "bf16"]


class FSDPConfig(KindSection):
    """torch FSDP2 (`fully_shard`): weights, gradients and optimizer state in parts, gathered block by block."""

    kind: str = "fsdp"
    shard_size: Count | None = Field(default=None, ge=1)
    """Ranks that hold one copy of the weights between them: all of them by default (full sharding); fewer is hybrid
    sharding, such as the 8 GPUs of a node; 1 keeps whole copies and only reduces gradients."""
    expert_parallel: Count = Field(default=1, ge=1)
    """Ranks that the experts of a group are divided over, such as the 8 GPUs of a node: tokens travel instead of
    weights. It divides the experts of every group with several; a group of one stays in parts like other weights."""
    units: list[Pattern] = [r"[^.]*(vision|audio|video|connector|resampler|projector)[^.]*"]
    """Whole names of modules that are gathered as one beside the blocks of `train.blocks`. What neither names is kept
    together as the outermost unit: embeddings and head of the language model."""
    precision: list[PrecisionRule] = []
    """Precision of gathered weights by unit, in order, over `train.precision`. Sharded weights are always float32."""
    reshard_after_forward: bool = True
    """Free gathered weights after the forward pass and gather them again in the backward pass."""
    cpu_offload: bool = False
    """Keep shards and optimizer state in host memory."""

    def copies(self, ranks: int) -> int:
        """Of the weights, among so many processes. Raises `ConfigError` where these do not divide."""
        size = self.shard_size or ranks
        if ranks % size:
            raise ConfigError(f"train.engine.shard_size {size} does not divide the {ranks} processes of the run")
        if size % self.expert_parallel:
            raise ConfigError(
                f"train.engine.expert_parallel {self.expert_parallel} does not divide the {size} processes that hold a "
                "copy of the weights between them (train.engine.shard_size, or all of the run)"
            )
        return ranks // size

    def build(self, world: "World", train: Any) -> "SingleEngine":
        from mm.train.engines.fsdp import FSDPEngine

        return FSDPEngine(world, train)


class DeepSpeedConfig(KindSection):
    """DeepSpeed ZeRO."""

    kind: str = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 2
    """What is in parts: 1 the optimizer state, 2 also gradients, 3 also weights; 0 nothing."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory (stages 1 to 3)."""
    raw: dict[str, Any] = {}
    """Settings of DeepSpeed's own config, merged over the generated one. What other settings here decide, such as batch
    sizes, optimizer and precision, may not be among them."""

    def build(self, world: "World", train: Any) -> "SingleEngine":
        from mm.train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(world, train)


ENGINES = Kinds(
    "engine",
    {
        "single": "mm.train.engines.config:SingleConfig",
        "fsdp": "mm.train.engines.config:FSDPConfig",
        "deepspeed": "mm.train.engines.config:DeepSpeedConfig",
    },
    default="single",
)
