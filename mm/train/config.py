"""The `train:` and `evaluation:` sections of a run. No torch here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from mm.data.config import DataConfig
from mm.settings import Count, Number, Pattern, Section
from mm.train.engines.config import ENGINES, SingleConfig
from mm.train.optim.config import OPTIMIZERS, AdamWConfig, Role
from mm.train.schedules import SCHEDULES, CosineConfig


class ParamRule(Section):
    """Settings for the parameters whose whole name matches. Later rules override earlier ones, field by field."""

    match: Pattern
    """A regular expression for whole parameter names: `vision.*`, `.*bias`. One that matches nothing is an error."""
    freeze: bool | None = None
    """Do not train these."""
    lr_scale: Number | None = None
    """Multiplies the learning rate."""
    weight_decay: Number | None = None
    """Replaces the optimizer's."""
    role: Role | None = None
    """What optimizers that tell matrices from the rest take these for."""


class LoraRule(Section):
    """Low-rank adapters (Hu et al., 2106.09685) in the linear layers whose whole name matches, by peft."""

    match: Pattern
    """A regular expression for whole module names, such as `language.*(q|v)_proj`. One without a match is an error."""
    rank: int = Field(default=8, ge=1)
    """r: the rank of the update."""
    alpha: Number = Field(default=16, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Of the adapter's input."""


class CheckpointingConfig(Section):
    """Activation checkpointing: memory for time. What is recomputed in the backward pass is not kept."""

    mode: Literal["none", "full", "selective"] = "none"
    """`full`: only the input of each block is kept. `selective`: also the outputs of matrix products and attention, so
    that the cheap rest is recomputed."""
    match: list[Pattern] = []
    """Whole names of the modules to apply it to; by default the blocks of `train.blocks`."""


class GuardConfig(Section):
    """What to do about a step whose loss or gradient norm is not finite, or far outside what it was of late."""

    sigmas: Number = Field(default=6.0, ge=0)
    """Standard deviations above the mean of the window beyond which a step is skipped; 0: only what is not finite."""
    window: int = Field(default=128, ge=8)
    """Steps that mean and standard deviation are taken over. It judges from half full on."""
    rewind_after: Count = Field(default=3, ge=1)
    """Skipped steps in a row after which the run goes back to its newest checkpoint and passes over their packs."""
    max_rewinds: Count = Field(default=3, ge=0)
    """Rewinds after which the run ends instead."""


class EarlyStopConfig(Section):
    """Keep the best checkpoint by a logged number, and end when it has not improved for long."""

    metric: str = "validation_loss"
    """A key of metrics.jsonl that evaluation writes."""
    better: Literal["lower", "higher"] = "lower"
    patience: Count = Field(default=0, ge=0)
    """Evaluations without improvement after which the run ends; 0: never."""


class TrainConfig(Section):
    """The optimization, and what is written while it runs."""

    max_steps: Count | None = Field(default=None, ge=1)
    """Optimizer steps in all. Give this or `epochs`."""
    epochs: Number | None = Field(default=None, gt=0)
    """Passes over the packed training set (each visit that it holds is one)."""
    batch_tokens: Count = Field(default=65536, ge=1)
    """Tokens of a step, rounded down to whole rows of `data.context_length`."""
    micro_batch: int = Field(default=1, ge=1)
    """Rows in one forward and backward pass; the rest of the step is accumulated. It changes memory, not results."""
    engine: Annotated[Any, ENGINES] = SingleConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast over float32 weights."""
    init_from: Path | None = None
    """Weights to start from, taken over by name: a checkpoint, a run folder (its newest), or a published model
    (`weizhiwang/Open-Qwen2VL`, or a folder of that layout or LLaVA's)."""
    init_optimizer: bool = False
    """With `init_from`, a run or a checkpoint: the moments of the optimizer are taken over too, by name. The schedule
    begins anew."""
    branch: Path | None = None
    """Go on from this checkpoint of another run (a run folder: its newest), with all it had behind it, in a folder of
    its own. Settings are the other run's but for what may change when a run is resumed."""
    branch_data: Literal["carry_on", "anew"] = "carry_on"
    """Of `branch`. `carry_on`: the data go on where the other run left them. `anew`: they begin at their beginning, and
    may be others, in other rows: all of `data` and `batch_tokens` may change."""
    device: str = "auto"
    """`auto`: the GPU if there is one, else the CPU."""
    optimizer: Annotated[Any, OPTIMIZERS] = AdamWConfig()
    schedule: Annotated[Any, SCHEDULES] = CosineConfig()
    params: list[ParamRule] = []
    """Freezing, learning rates and decay by name, in order: `[{match: "vision.*", freeze: true}]`."""
    lora: list[LoraRule] = []
    """Adapters by module name, in order. Parameters outside adapters are trained as `params` says."""
    clip_norm: Number | None = Field(default=1.0, gt=0)
    """Scale gradients down to this global norm; null: do not."""
    guard: GuardConfig = GuardConfig()
    ema: Number = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which evaluation and export then use; 0: none."""
    blocks: list[Pattern] = [r".*\.(blocks|resblocks|layers|layer|h|stages)\.\d+"]
    """Whole names of the repeated modules that are sharded, compiled and recomputed one by one."""
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    compile: bool = False
    """torch.compile, block by block."""
    deterministic: bool = False
    """Only deterministic kernels: two runs are equal bit for bit, at some cost on a GPU."""
    log_every: Count = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""
    save_every: Count = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = Field(default=2, ge=1)
    """Checkpoints that are kept, newest first."""
    keep_every: Count = Field(default=0, ge=0)
    """Of the checkpoints, those whose step is a multiple of this are kept for good; 0: none."""
    async_save: bool = True
    """Write checkpoints from a copy while training goes on."""
    best: EarlyStopConfig | None = None
    """Keep the best checkpoint by a metric too, and stop early."""
    hang_timeout: Number = Field(default=1800, gt=0)
    """Seconds without progress after which a run of several processes ends and names the rank that did not come."""
    profile: tuple[int, int] | None = None
    """Trace these steps, first and last, with torch's profiler into `profile/`."""
    trackers: list[Literal["wandb"]] = []
    """Where metrics go beside metrics.jsonl and TensorBoard. `wandb` needs the extra of that name."""


class EvaluationConfig(Section):
    """What is measured on held-out data."""

    every: Count = Field(default=0, ge=0)
    """Steps between evaluations on `data.validation`; 0: none."""
    micro_batch: int = Field(default=8, ge=1)
    """Rows in one forward pass."""
    candidates: int = Field(default=32, ge=0)
    """Matching: the true caption among so many, over `data.test`; 0: leave it out. Chance is 1 in `candidates`."""
    samples: int = Field(default=24, ge=0)
    """Test pictures that are captioned for the report."""


class StageSettings(Protocol):
    """What a run says of a stage beside its settings."""

    @property
    def name(self) -> str: ...
    @property
    def convert(self) -> str | None: ...
    @property
    def carry_on(self) -> bool: ...
    @property
    def keep_optimizer(self) -> bool: ...
    @property
    def counts_on(self) -> bool: ...


class Run(Protocol):
    """The sections that a run, or a stage of one, is made of; `mm.config.RunConfig` is one."""

    @property
    def out(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def model(self) -> Any: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def stages(self) -> Sequence[StageSettings]: ...
    def resolved(self) -> dict[str, Any]: ...
    def stage_runs(self) -> Sequence["Run"]: ...
