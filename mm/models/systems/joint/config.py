"""The joint system's section, and the layout that its parts share."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator, model_validator

from mm.data.layout import Layout
from mm.errors import ConfigError
from mm.models.config import SYSTEMS
from mm.settings import Kinds, KindSection, Number, nearest

if TYPE_CHECKING:
    from mm.models.systems.joint.model import Joint

PARTS = Kinds("part", {name: path for name, path in SYSTEMS.names.items() if name not in ("joint", "layout")})


class JointConfig(KindSection):
    """Several systems in one run: sources of all of them in one mixture, one step, one checkpoint. A row of the batch
    goes to the part that takes its media."""

    kind: str = "joint"
    parts: dict[str, Annotated[Any, PARTS]] = Field(min_length=1)
    """Systems by names of your own, which names of parameters and objectives then begin with. One of them at most reads
    text, and no two take the same medium."""
    weights: dict[str, Number] = {}
    """Factors of the parts in the total loss, beside those of their objectives; 1 by default."""

    @field_validator("parts")
    @classmethod
    def _are_names(cls, parts: dict[str, Any]) -> dict[str, Any]:
        for name in parts:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name for a part; expected letters, digits and _, such as `music`")
        return parts

    @model_validator(mode="after")
    def _weighs_what_there_is(self) -> "JointConfig":
        for name in self.weights:
            if name not in self.parts:
                raise ValueError(f"weights.{name}: there is no such part; {nearest(name, self.parts)}")
        return self

    def layout(self) -> Layout:
        """Tokenizer and template of the part that reads text, the media of all; a recording for a part without text
        stands alone in its segment.

        Raises `ConfigError` where two parts want the same.
        """
        return union({name: part.layout() for name, part in self.parts.items()})

    @property
    def teacher(self) -> Any:
        """Of the part that has one; whose codes may lie beside the data."""
        return next((found for part in self.parts.values() if (found := getattr(part, "teacher", None))), None)

    def build(self, weights: bool = True) -> "Joint":
        from mm.models.systems.joint.model import Joint

        return Joint(self, weights)


def reads_text(layout: Layout) -> bool:
    """Whether there is any token besides padding."""
    return len(layout.tokenizer) > 1


def union(layouts: dict[str, Layout]) -> Layout:
    """See `JointConfig.layout`."""
    reading = [name for name, layout in layouts.items() if reads_text(layout)]
    if len(reading) > 1:
        raise ConfigError(
            f"model.parts: {' and '.join(reading)} both read text, and rows have one tokenizer; leave one of them out"
        )
    whole = layouts[reading[0] if reading else next(iter(layouts))]
    owners: dict[str, str] = {}
    for name, layout in layouts.items():
        for medium in layout.media():
            if medium in owners:
                raise ConfigError(
                    f"model.parts: {owners[medium]} and {name} both take {medium}; a row could not tell whose it is"
                )
            owners[medium] = name
            whole = replace(whole, **{medium: getattr(layout, medium)})
    if whole.audio is not None and owners["audio"] not in reading:
        whole = replace(whole, audio=replace(whole.audio, alone=True))
    return whole
