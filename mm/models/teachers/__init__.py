"""Teachers: frozen models that say what a student is to predict: a code of each of their codebooks for every position,
a frame of sound or a patch of a picture.

A teacher is data and no model: it is never a submodule of a system, is not trained, saved or sharded, and computes in
float32 whatever the student does. Its codes are made in the step, or ahead and once (`mm data encode`). An item's codes
depend on that item alone, but for rounding where two codes are equally near.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from mm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mm.data.layout import Layout


class Teacher(Protocol):
    """`medium`: of the items that it takes. `sizes`: codes of each codebook."""

    medium: str
    sizes: tuple[int, ...]

    def check(self, layout: "Layout") -> None:
        """Raise `ConfigError` where a student with this layout does not see or hear what the teacher does."""
        ...

    def codes(self, items: "list[Tensor]", lengths: list[int], layout: "Layout") -> "Tensor":
        """int64 [sum lengths, K], item after item, on the device of the items.

        Args:
            items: float32, as data decodes them for the student: recordings [T_i], pictures [3, H, W].
            lengths: the student's positions of each item.
            layout: the student's, one that `check` takes.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """All that decides the codes, in plain values, with `weights`, a digest."""
        ...


class PictureTeacher(Teacher, Protocol):
    """One codebook; the codes of a picture are its patches in raster order.

    `size`: pixels along the side of the squares that it takes, in values from -1 to 1. `positions`: codes of one.
    `decodes`: whether it can make pictures of codes.
    """

    size: int
    positions: int
    decodes: bool

    def pictures(self, codes: "Tensor") -> "Tensor":
        """int64 [N, positions] to float32 [N, 3, size, size], from -1 to 1. Raises `ConfigError` unless `decodes`."""
        ...


def aligned(found: "Tensor", frames: int, hop: int, own_hop: int) -> "Tensor":
    """Of a teacher's frames [F, ...] those of a student's `frames`: each takes the one that its middle lies in.

    Both begin with the clip and are `hop` and `own_hop` samples apart. Where that is the same, these are the first
    `frames` of the F, which are one or two more than a student without padding has: 374 of EnCodec's 375 for 5 s. Past
    the end it is the last.
    """
    import torch

    covering = (2 * torch.arange(frames, device=found.device) + 1) * hop // (2 * own_hop)
    return found[covering.clamp(max=len(found) - 1)]


def require_rate(layout: "Layout", sampling_rate: int) -> None:
    """Raise `ConfigError` unless a student hears recordings at so many Hz, as its teacher does. They are not resampled
    for it: those of a slower student lack what the teacher was trained on."""
    heard = layout.audio and layout.audio.sampling_rate
    if heard != sampling_rate:
        takes = "takes no recordings" if heard is None else f"{heard:,} Hz"
        raise ConfigError(
            f"model.teacher: it takes {sampling_rate:,} Hz, and the model {takes}; choose a teacher of that rate "
            "(mm data kmeans fits one), or set the model's sampling_rate to the teacher's"
        )


@contextlib.contextmanager
def in_float32(device: "torch.device") -> Iterator[None]:
    """In all digits: rounding moves codes that are nearly as near as another."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
