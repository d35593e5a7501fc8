"""Open-Qwen2VL's section and layout."""

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from mm.data.layout import ImageLayout, Layout, NativeLayout
from mm.data.tokenizer import Tokenizer
from mm.models.config import (
    BackboneSection,
    ConnectorConfig,
    LanguageConfig,
    PoolMLPConfig,
    TemplateConfig,
    VisionConfig,
    check_connector,
)

if TYPE_CHECKING:
    from mm.models.systems.open_qwen2vl.model import OpenQwen2VL


class OpenQwen2VLConfig(BackboneSection):
    """A vision tower, a pooling connector and a causal language model, trained on next tokens (2504.00595 2.2)."""

    kind: str = "open_qwen2vl"
    released: str | None = None
    """A published model to start from, a folder or a hub name: `weizhiwang/Open-Qwen2VL`, or a LLaVA folder with a
    SigLIP tower. It gives the weights, and every setting below that is not set here."""
    vision: VisionConfig
    connector: ConnectorConfig = PoolMLPConfig()
    language: LanguageConfig
    template: TemplateConfig = TemplateConfig()

    @model_validator(mode="before")
    @classmethod
    def _takes_what_is_released(cls, values: Any) -> Any:
        from mm.models.released import with_released

        return with_released(values, "open_qwen2vl", cls)

    def layout(self) -> Layout:
        tokenizer = Tokenizer.load(self.language.tokenizer_name, self.language.added_tokens)
        vision, connector = self.vision, self.connector
        if vision.resize == "native":
            return self.template.layout(tokenizer, image=NativeLayout(connector.pool, vision.transform()))
        tokens = connector.positions(vision)
        return self.template.layout(tokenizer, image=ImageLayout(tokens, vision.patches, vision.transform()))

    @model_validator(mode="after")
    def _connects(self) -> "OpenQwen2VLConfig":
        check_connector(self.vision, self.connector)
        return self

    def build(self, weights: bool = True) -> "OpenQwen2VL":
        from mm.models.systems.open_qwen2vl.model import OpenQwen2VL

        if self.released is None or not weights:
            return OpenQwen2VL(self, weights)
        from mm.models.released import fill, open_release

        return fill(OpenQwen2VL(self, weights=False), open_release(self.released, "open_qwen2vl"))
