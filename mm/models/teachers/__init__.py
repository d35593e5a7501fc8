"""Teachers: frozen models that say what a student is to predict, a code of each of their codebooks for every frame.

A teacher is data and no model: it is never a submodule of a system, is not trained, saved or sharded, and computes in
float32 whatever the student does. Its codes are made in the step, or ahead and once (`mm data encode`). A clip's codes
depend on that clip alone, but for rounding where two codes are equally near.
"""

from typing import TYPE_CHECKING, Any, Protocol

from mm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class Teacher(Protocol):
    """`sizes`: codes of each codebook. `sampling_rate`: Hz of the clips that it takes."""

    medium: str
    sizes: tuple[int, ...]
    sampling_rate: int

    def codes(self, clips: "list[Tensor]", frames: list[int], hop: int) -> "Tensor":
        """int64 [sum frames, K], on the device of the clips.

        Args:
            clips: float [T_i] each, at `sampling_rate` Hz.
            frames: of the student, of each clip.
            hop: samples from one frame of the student to the next.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """All that decides the codes, in plain values, with `weights`, a digest."""
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


def require_rate(teacher: Teacher, sampling_rate: int) -> None:
    """Raise `ConfigError` unless a student at so many Hz hears what the teacher does. Clips are not resampled for it:
    those of a slower student lack what the teacher was trained on."""
    if teacher.sampling_rate != sampling_rate:
        raise ConfigError(
            f"model.teacher: it takes {teacher.sampling_rate:,} Hz, and the model {sampling_rate:,} Hz; choose a "
            "teacher of that rate (mm data kmeans fits one), or set the model's sampling_rate to the teacher's"
        )
