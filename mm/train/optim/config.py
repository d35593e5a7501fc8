"""The `train.optimizer` section. No torch here: `build` imports it.

`build` takes the groups of `mm.train.params.parameter_groups` and gives one torch Optimizer. Every kind has `lr`, the
peak that the schedule multiplies, and `weight_decay`, which the groups already hold.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mm.settings import Count, Kinds, KindSection, Number

if TYPE_CHECKING:
    from torch.optim import Optimizer

Role = Literal["matrix", "head", "embedding", "vector"]
Beta = Annotated[float, Field(ge=0, lt=1)]
"""The decay of a running mean: at 1 it would never move."""


class OptimizerConfig(KindSection):
    """What all kinds have."""

    lr: Number = Field(default=5e-5, gt=0)
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: Number = Field(default=0.01, ge=0)
    """Decoupled decay of matrices; biases, norms and other vectors are not decayed unless `train.params` says so."""

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        raise NotImplementedError


class AdamWConfig(OptimizerConfig):
    """torch's AdamW (Loshchilov & Hutter, 1711.05101), fused."""

    kind: str = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: Number = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class MuonConfig(OptimizerConfig):
    """torch's Muon (Jordan et al. 2024) for matrices, AdamW for the rest."""

    kind: str = "muon"
    momentum: Beta = 0.95
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Look a step ahead along the momentum."""
    iterations: int = Field(default=5, ge=1)
    """Newton-Schulz iterations."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Updates are scaled by 0.2 sqrt(max(rows, columns)), so that learning rate and decay are AdamW's; or by
    sqrt(max(1, rows / columns)), where rows are outputs, but of GPT-2's weights in transformers, which lie the other
    way."""
    adamw_lr: Number | None = Field(default=None, gt=0)
    """Peak learning rate of what is no matrix; by default `lr`."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW."""
    eps: Number = Field(default=1e-8, gt=0)
    """Of AdamW."""

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        from mm.train.optim.muon import build

        return build(self, groups)


class SophiaConfig(OptimizerConfig):
    """Sophia (Liu et al., 2305.14342): momentum over an estimate of the curvature, clipped coordinate by coordinate."""

    kind: str = "sophia"
    weight_decay: Number = Field(default=0.1, ge=0)
    """Decoupled decay of matrices."""
    estimator: Literal["gnb", "hutchinson"] = "gnb"
    """`gnb` (Sophia-G): squared gradients of the loss on labels that the model draws, times their number.
    `hutchinson` (Sophia-H): u * (H u) for random signs u, for any objective; in float32 only."""
    betas: tuple[Beta, Beta] = (0.965, 0.99)
    """Decay of the momentum and of the Hessian's estimate."""
    rho: Number = Field(default=0.04, gt=0)
    """What the estimate is multiplied by: larger ones clip less. The share that is not clipped is logged (`unclipped`);
    0.1 to 0.5 is wanted."""
    every: Count = Field(default=10, ge=1)
    """Steps between estimates."""
    share: Number = Field(default=1.0, gt=0, le=1)
    """Of a step's micro-batches, those that an estimate is made from: the first ones, on each rank at least one."""
    clip_estimate: Number | None = Field(default=None, gt=0)
    """Of `gnb`: scale the gradients of an estimate down to this norm first, as the released script does (1.0). It makes
    estimates too small."""

    @model_validator(mode="after")
    def _clips_what_it_squares(self) -> "SophiaConfig":
        if self.clip_estimate is not None and self.estimator == "hutchinson":
            raise ValueError("clip_estimate is for estimator gnb; leave it out")
        return self

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        from mm.train.optim.sophia import build

        return build(self, groups)


class SOAPConfig(OptimizerConfig):
    """SOAP (Vyas et al., 2409.11321): AdamW in the eigenbasis of Shampoo's preconditioner, for matrices."""

    kind: str = "soap"
    lr: Number = Field(default=3e-3, gt=0)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[Beta, Beta] = (0.95, 0.95)
    """Decay of the moments."""
    shampoo_beta: Beta | None = None
    """Decay of the preconditioner; by default the second of `betas`."""
    eps: Number = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    every: Count = Field(default=10, ge=1)
    """Steps between refreshes of the basis."""
    max_precond_dim: Count = Field(default=4096, ge=1)
    """A longer axis is not rotated: the other alone is."""
    precondition: tuple[Literal["matrix", "head", "embedding"], ...] = ("matrix",)
    """The roles that are rotated; the others take AdamW steps."""
    block: Count | None = Field(default=None, ge=1)
    """Cut axes longer than `max_precond_dim` into blocks of at most so many, each with bases of its own; by default
    they are not rotated."""
    normalize: bool = False
    """Bring every update to a root mean square of 1; for `every` about 100."""
    correct_bias: bool = True
    """Of the moments, as Adam."""

    @model_validator(mode="after")
    def _blocks_are_rotated(self) -> Self:
        if self.block is not None and self.block > self.max_precond_dim:
            raise ValueError(f"block is {self.block}, expected at most max_precond_dim, {self.max_precond_dim}")
        return self

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        from mm.train.optim.soap import build

        return build(self, groups)


OPTIMIZERS = Kinds(
    "optimizer",
    {
        "adamw": "mm.train.optim.config:AdamWConfig",
        "muon": "mm.train.optim.config:MuonConfig",
        "sophia": "mm.train.optim.config:SophiaConfig",
        "soap": "mm.train.optim.config:SOAPConfig",
    },
    default="adamw",
)
