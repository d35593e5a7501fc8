"""The sections that teachers are configured by. No torch here: `sizes` reads headers, `build` reads weights."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from mm.errors import CheckpointError, ConfigError
from mm.settings import Kinds, KindSection, Number

if TYPE_CHECKING:
    from mm.models.teachers import Teacher

PUBLISHED = "facebook/encodec_24khz"
FORMAT = "kmeans"
FORMAT_VERSION = 1


class _Teacher(KindSection):
    codebooks: tuple[int, ...] | None = None
    """Codes of each codebook. Null: as the teacher's own file says, which a run keeps, so that its model can be read
    where the teacher is not."""

    @model_validator(mode="after")
    def _keeps_sizes(self) -> "_Teacher":
        if self.codebooks is None and self._is_here():
            with suppress(ConfigError):  # which is said when the teacher is needed
                object.__setattr__(self, "codebooks", self._sizes())
        return self

    def sizes(self) -> tuple[int, ...]:
        """Codes of each codebook. Raises `ConfigError`."""
        return self._sizes() if self.codebooks is None else self.codebooks

    def _require_sizes(self) -> None:
        """Raise `ConfigError` where the teacher has become another than the one whose sizes were kept."""
        if (found := self._sizes()) != self.sizes():
            raise ConfigError(
                f"model.teacher.codebooks {list(self.sizes())}: the teacher has {list(found)} now; give the one that "
                "the run was begun with, or take codebooks out of the config"
            )

    def _is_here(self) -> bool:
        """Whether nothing has to be fetched to know its sizes."""
        raise NotImplementedError

    def _sizes(self) -> tuple[int, ...]:
        """By its own file. Raises `ConfigError`."""
        raise NotImplementedError


class EncodecConfig(_Teacher):
    """EnCodec (Défossez et al., 2210.13438), the teacher of MERT-v1: its codebooks, each on what those before leave."""

    kind: str = "encodec"
    name: str = PUBLISHED
    """A name on the hub, or a folder as transformers writes it."""
    bandwidth: Number = Field(default=6.0, gt=0)
    """kbit/s, one of the model's: it says how many codebooks there are, 8 at 6.0."""

    def _is_here(self) -> bool:
        return self.name == PUBLISHED or Path(self.name).expanduser().is_dir()

    def _sizes(self) -> tuple[int, ...]:
        about = self._about()
        bandwidths, size = about.get("target_bandwidths", [1.5, 3.0, 6.0, 12.0, 24.0]), about.get("codebook_size", 1024)
        if self.bandwidth not in bandwidths:
            has = ", ".join(f"{one:g}" for one in bandwidths)
            raise ConfigError(f"model.teacher.bandwidth {self.bandwidth:g}: {self.name} has {has}")
        hop = math.prod(about.get("upsampling_ratios", [8, 5, 4, 2]))
        frame_rate = math.ceil(about.get("sampling_rate", 24_000) / hop)
        return (size,) * max(1, int(self.bandwidth * 1000 // (math.log2(size) * frame_rate)))

    def _about(self) -> dict[str, Any]:
        if self.name == PUBLISHED and not Path(PUBLISHED).is_dir():
            return {}  # transformers' defaults are its values, so that nothing has to be fetched to know its sizes
        from mm.models.released.release import Repository

        try:
            about = Repository(self.name).json("config.json")
        except CheckpointError as error:
            raise ConfigError(f"model.teacher.name {error}") from None
        if (kind := about.get("model_type")) != "encodec":
            raise ConfigError(f"model.teacher.name {self.name}: its config.json is of a {kind} model; expected encodec")
        return about

    def build(self) -> "Teacher":
        from mm.models.teachers.encodec import Encodec

        self._require_sizes()
        return Encodec(self)


class KMeansConfig(_Teacher):
    """Nearest centroids of log-mel frames, and of chroma: one codebook each (`mm data kmeans`)."""

    kind: str = "kmeans"
    path: Path
    """The file of centroids."""

    def about(self) -> dict[str, Any]:
        """What the file says of itself: `sampling_rate`, `hop`, `codebooks`, …. Raises `ConfigError`."""
        from safetensors import SafetensorError, safe_open

        path = self.path.expanduser()
        if not path.is_file():
            raise ConfigError(
                f"model.teacher.path {path}: no such file; make it with `mm data kmeans CONFIG --out {path}`"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})[FORMAT])
            version = about["format_version"]
        except (SafetensorError, LookupError, ValueError, TypeError) as error:
            raise ConfigError(
                f"model.teacher.path {path}: no file of centroids ({type(error).__name__}: {error}); make it with "
                "`mm data kmeans`"
            ) from None
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"model.teacher.path {path}: of format {version}, this version of mm reads {FORMAT_VERSION}; make it "
                "again with `mm data kmeans`"
            )
        return about

    def _is_here(self) -> bool:
        return self.path.expanduser().is_file()

    def _sizes(self) -> tuple[int, ...]:
        return tuple(book["clusters"] for book in self.about()["codebooks"])

    def build(self) -> "Teacher":
        from mm.models.teachers.kmeans import KMeans

        self._require_sizes()
        return KMeans(self)


TEACHERS = Kinds(
    "teacher",
    {
        "encodec": "mm.models.teachers.config:EncodecConfig",
        "kmeans": "mm.models.teachers.config:KMeansConfig",
    },
)
TeacherConfig = Annotated[Any, TEACHERS]


def teacher_of(model: Any) -> Any:
    """The section of the teacher of a system's config, or of one of its parts; None where there is none."""
    systems = (model, *getattr(model, "parts", {}).values())
    return next((one.teacher for one in systems if getattr(one, "teacher", None) is not None), None)
