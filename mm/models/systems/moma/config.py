"""MoMa's section and layout."""

from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from mm.data.layout import ImageLayout, Layout
from mm.data.media import ImageTransform
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError
from mm.models.config import BackboneSection, LanguageConfig, TemplateConfig
from mm.models.teachers.config import TeacherConfig
from mm.settings import Number

if TYPE_CHECKING:
    from mm.models.systems.moma.model import Moma

CENTRED = (0.5, 0.5, 0.5)
"""Mean and deviation that bring pixels from 0…1 to -1…1, as all teachers of pictures take them."""


class FusedTemplateConfig(TemplateConfig):
    """How documents are spelt where a picture is a run of tokens between two others."""

    around_image: tuple[str, str] = ("<boi>", "<eoi>")
    """The tokens before and behind a picture; they belong to it. Chameleon's are `<racm3:break>` and `<eoss>`."""
    after_media: str = ""
    """Put before text that follows a picture."""


class MomaConfig(BackboneSection):
    """A causal language model of text and of pictures, which are tokens of its own vocabulary: the codes of a teacher.
    With `experts` by modality it is MoMa (2407.21770), without any it is Chameleon (2405.09818)."""

    kind: str = "moma"
    language: LanguageConfig
    """Its vocabulary has a token for each code of the teacher, besides those that are around pictures. Embeddings of a
    published model grow by the tokens that it lacks."""
    teacher: TeacherConfig
    """Whose codes pictures are. It computes those that the data does not hold (`data.codes`), and paints those that are
    written, if it can."""
    template: FusedTemplateConfig = FusedTemplateConfig()
    code_token: str = "<code:{}>"
    """What the vocabulary calls a code: `{}` stands for its number, from 0 on. Names that the tokenizer lacks are
    appended to it, and so are those of `template.around_image`. `chameleon`: as Chameleon's own tokenizer calls them,
    which has them all."""
    z_loss: Number = Field(default=1e-5, ge=0)
    """Factor of the square of log Z, the logarithm of the softmax's denominator, which is added to the loss of a token
    in training (2405.09818 2.2); validation and losses by modality are without it."""

    @field_validator("code_token")
    @classmethod
    def _names_each(cls, name: str) -> str:
        if name != "chameleon" and name.count("{}") != 1:
            raise ValueError("expected a name with {} for the number, such as <code:{}>, or chameleon")
        return name

    @model_validator(mode="after")
    def _has_a_teacher_of_pictures(self) -> "MomaConfig":
        if not hasattr(self.teacher, "positions"):
            raise ValueError(
                f"teacher.kind {self.teacher.kind}: says no codes of pictures; expected vq, chameleon, janus or emu3"
            )
        return self

    def codes(self) -> list[str]:
        """The name of every code. Raises `ConfigError` where the teacher cannot be asked, or has several codebooks."""
        sizes = self.teacher.sizes()
        if len(sizes) != 1:
            raise ConfigError(f"model.teacher: has {len(sizes)} codebooks; a position of a picture is one token")
        if self.code_token == "chameleon":
            from mm.data.tokenizer import chameleon_code

            return [chameleon_code(number) for number in range(sizes[0])]
        return [self.code_token.replace("{}", str(number)) for number in range(sizes[0])]

    def tokenizer(self) -> Tokenizer:
        """With all that stands for pictures. Raises `DataError` and `ConfigError`."""
        language = self.language
        added = () if self.code_token == "chameleon" else (*self.template.around_image, *self.codes())
        return Tokenizer.load(language.tokenizer_name, (*language.added_tokens, *added))

    def layout(self) -> Layout:
        positions = self.teacher.positions()
        transform = ImageTransform(self.teacher.size, CENTRED, CENTRED)
        return self.template.layout(self.tokenizer(), image=ImageLayout(positions, positions, transform, learned=True))

    def build(self, weights: bool = True) -> "Moma":
        from mm.models.systems.moma.model import Moma

        return Moma(self, weights)
