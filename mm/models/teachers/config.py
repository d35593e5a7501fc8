"""The sections that teachers are configured by. No torch here: `sizes` reads headers, `build` reads weights."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

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


class _PictureTeacher(_Teacher):
    """What the teachers of pictures have in common: a VQ model of transformers, of which the file of its config is read
    here. A code stands for a square of `patch` pixels; the codes of a picture are these squares in raster order."""

    resolution: int | None = Field(default=None, ge=1)
    """Pixels along the side of the square that a picture becomes, a multiple of `patch`. Null: as the teacher was
    trained; its networks take other sizes too."""
    patch: int | None = Field(default=None, ge=1)
    """Pixels along the side of the square that a code stands for. Null: as the teacher's own file says, which a run
    keeps."""

    model_types: ClassVar[tuple[str, str]]
    """Of a checkpoint of the whole model, and of one of its VQ model alone."""
    published: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]]
    """transformers' of what is read here, which are those of the published model."""

    @property
    def where(self) -> str:
        """A folder, or a name on the hub."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Pixels along the side of the squares that are encoded. Raises `ConfigError`."""
        return self.resolution or self._trained_size()

    def positions(self) -> int:
        """Codes of a picture. Raises `ConfigError`."""
        patch = self.patch or self._patch()
        if self.size % patch:
            raise ConfigError(f"model.teacher.resolution {self.size}: expected a multiple of {patch}, a code's square")
        return (self.size // patch) ** 2

    def vq(self) -> dict[str, Any]:
        """What transformers' config of the VQ model is made from, by its names. Raises `ConfigError`."""
        if self.where == self.published and not Path(self.where).is_dir():
            return {**self.defaults, **self._inner({})}  # nothing has to be fetched to know its sizes
        from mm.models.released.release import Repository

        whole, alone = self.model_types
        try:
            about = Repository(self.where).json("config.json")
        except CheckpointError as error:
            raise ConfigError(f"model.teacher: {error}") from None
        if (kind := about.get("model_type")) not in self.model_types:
            raise ConfigError(
                f"model.teacher: {self.where}/config.json is of a {kind} model; expected {whole}, or {alone}, "
                "its VQ model"
            )
        return {**self.defaults, **(self._inner(about) if kind == whole else about)}

    def _inner(self, about: dict[str, Any]) -> dict[str, Any]:
        """The config of the VQ model in that of the whole model."""
        return about.get("vq_config") or {}

    def _trained_size(self) -> int:
        raise NotImplementedError

    def _patch(self) -> int:
        return 1 << len(self.vq()["channel_multiplier"]) - 1

    def _sizes(self) -> tuple[int, ...]:
        return (self.vq()["num_embeddings"],)

    def _is_here(self) -> bool:
        return self.where == self.published or Path(self.where).expanduser().is_dir()

    @model_validator(mode="after")
    def _keeps_geometry(self) -> "_PictureTeacher":
        if (self.resolution is None or self.patch is None) and self._is_here():
            with suppress(ConfigError):  # which is said when the teacher is needed
                object.__setattr__(self, "patch", self.patch or self._patch())
                object.__setattr__(self, "resolution", self.size)
        return self

    def _require_geometry(self) -> None:
        self._require_sizes()
        if (found := self._patch()) != (self.patch or found):
            raise ConfigError(f"model.teacher.patch {self.patch}: a code of this teacher stands for {found} pixels")


class ChameleonConfig(_PictureTeacher):
    """Chameleon's image tokenizer (2405.09818 2.1, after Make-A-Scene): 8,192 codes, 1,024 of them for a picture of 512
    pixels. The one that Meta released beside the model, `vqgan.yaml` and `vqgan.ckpt` in a folder, can decode too;
    transformers' Chameleon has no decoder."""

    kind: str = "chameleon"
    name: str = "facebook/chameleon-7b"
    """A name on the hub, or a folder: as transformers writes Chameleon, or its `ChameleonVQVAE` alone, or with Meta's
    `vqgan.yaml` and `vqgan.ckpt`."""

    model_types: ClassVar[tuple[str, str]] = ("chameleon", "chameleon_vqgan")
    published: ClassVar[str] = "facebook/chameleon-7b"
    defaults: ClassVar[dict[str, Any]] = {
        "num_embeddings": 8192, "channel_multiplier": [1, 1, 2, 2, 4], "resolution": 512,
    }  # fmt: skip

    @property
    def where(self) -> str:
        return self.name

    @property
    def is_vqgan(self) -> bool:
        """Whether it is a folder in the layout of Meta, which is that of taming-transformers."""
        return (Path(self.name).expanduser() / "vqgan.yaml").is_file()

    def vq(self) -> dict[str, Any]:
        """See above. Of a `vqgan.yaml` with `out_channels` too, which is a decoder's."""
        if not self.is_vqgan:
            return super().vq()
        import yaml

        path = Path(self.name).expanduser() / "vqgan.yaml"
        try:
            params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
            values = {**params, **params["ddconfig"]}
            return {"dropout": 0.0, **{ours: values[theirs] for ours, theirs in VQGAN_FIELDS.items()}}
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
            raise ConfigError(
                f"model.teacher.name {path}: expected model.params with ddconfig, n_embed and embed_dim, as "
                f"taming-transformers writes them ({type(error).__name__}: {error})"
            ) from None

    def _trained_size(self) -> int:
        return int(self.vq()["resolution"])

    def build(self) -> "Teacher":
        from mm.models.teachers.pictures import Chameleon

        self._require_geometry()
        return Chameleon(self)


VQGAN_FIELDS = {
    "num_embeddings": "n_embed", "embed_dim": "embed_dim", "channel_multiplier": "ch_mult", "base_channels": "ch",
    "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions", "resolution": "resolution",
    "in_channels": "in_channels", "out_channels": "out_ch", "latent_channels": "z_channels",
    "double_latent": "double_z",
}  # fmt: skip
"""transformers' names of the fields of a `vqgan.yaml`."""


class _JanusVQVAE(_PictureTeacher):
    model_types: ClassVar[tuple[str, str]] = ("janus", "janus_vqgan")
    defaults: ClassVar[dict[str, Any]] = {
        "num_embeddings": 16384, "channel_multiplier": [1, 1, 2, 2, 4], "num_patches": 32,
    }  # fmt: skip

    def _inner(self, about: dict[str, Any]) -> dict[str, Any]:
        vision = {"image_size": 384, "patch_size": 16, **(about.get("vision_config") or {})}
        return {**(about.get("vq_config") or {}), "num_patches": vision["image_size"] // vision["patch_size"]}

    def _trained_size(self) -> int:
        return int(self.vq()["num_patches"]) * self._patch()

    def build(self) -> "Teacher":
        from mm.models.teachers.pictures import Janus

        self._require_geometry()
        return Janus(self)


class JanusConfig(_JanusVQVAE):
    """Janus' image tokenizer (2410.13848, LlamaGen's VQ-16): 16,384 codes, 576 of them for a picture of 384 pixels; it
    decodes. A latent takes the code nearest to its direction, as in Janus' own code. transformers' `JanusVQVAE.encode`
    leaves latents and codes as long as they are, which is the same where codes are of one length."""

    kind: str = "janus"
    name: str = "deepseek-community/Janus-Pro-1B"
    """A name on the hub, or a folder, as transformers writes Janus, or its `JanusVQVAE` alone."""

    published: ClassVar[str] = "deepseek-community/Janus-Pro-1B"

    @property
    def where(self) -> str:
        return self.name


class VQTeacherConfig(_JanusVQVAE):
    """An image tokenizer that was trained here (model.kind vq)."""

    kind: str = "vq"
    path: Path
    """The folder that `mm export RUN --to janus-vq --out FOLDER` writes."""

    @property
    def where(self) -> str:
        return str(self.path)

    def vq(self) -> dict[str, Any]:
        """See above."""
        if not (self.path.expanduser() / "config.json").is_file():
            raise ConfigError(
                f"model.teacher.path {self.path}: holds no exported model; make it with "
                f"`mm export RUN --to janus-vq --out {self.path}`"
            )
        return super().vq()


class Emu3Config(_PictureTeacher):
    """Emu3's image tokenizer (2409.18869 2.2): 32,768 codes, 4,096 of them for a picture of 512 pixels; it decodes. A
    picture is a clip in which nothing moves."""

    kind: str = "emu3"
    name: str = "Emu3-community/Emu3-Chat-hf"
    """A name on the hub, or a folder, as transformers writes Emu3, or its `Emu3VQVAE` alone."""

    model_types: ClassVar[tuple[str, str]] = ("emu3", "emu3_vqgan")
    published: ClassVar[str] = "Emu3-community/Emu3-Chat-hf"
    defaults: ClassVar[dict[str, Any]] = {"codebook_size": 32768, "channel_multiplier": [1, 2, 2, 4]}

    @property
    def where(self) -> str:
        return self.name

    def _trained_size(self) -> int:
        return 512

    def _sizes(self) -> tuple[int, ...]:
        return (self.vq()["codebook_size"],)

    def build(self) -> "Teacher":
        from mm.models.teachers.pictures import Emu3

        self._require_geometry()
        return Emu3(self)


TEACHERS = Kinds(
    "teacher",
    {
        "encodec": "mm.models.teachers.config:EncodecConfig",
        "kmeans": "mm.models.teachers.config:KMeansConfig",
        "chameleon": "mm.models.teachers.config:ChameleonConfig",
        "janus": "mm.models.teachers.config:JanusConfig",
        "emu3": "mm.models.teachers.config:Emu3Config",
        "vq": "mm.models.teachers.config:VQTeacherConfig",
    },
)
TeacherConfig = Annotated[Any, TEACHERS]


def teacher_of(model: Any) -> Any:
    """The section of the teacher of a system's config, or of one of its parts; None where there is none."""
    systems = (model, *getattr(model, "parts", {}).values())
    return next((one.teacher for one in systems if getattr(one, "teacher", None) is not None), None)
