"""Chameleon's language model: transformers' `ChameleonModel` without its VQ model, and a head that scores every token.

transformers' own `ChameleonForConditionalGeneration` builds the VQ encoder too, and puts the lowest number there is in
place of every picture token's logit, so that its loss on pictures is beyond use. Here pictures are tokens like others,
and what encodes them is a teacher of its own: `model.vqmodel.*` of published weights stays where it is. Layers (norms
of queries and keys, either order of norms by `swin_norm`), names and initialisation are transformers'.

Chameleon-7B was trained with dropout of 0.1 after attention and MLP (2405.09818, section 2.3). transformers' layers
have none there; `attention_dropout` is another one.
"""

import copy
import re
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ChameleonConfig, ChameleonModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.chameleon import modeling_chameleon as parts
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

VQ_MODEL = "model.vqmodel."
"""What the names of the VQ model's tensors begin with in published weights."""


class ChameleonDecoder(ChameleonModel):
    """The layers between embeddings and head, in the forward pass of `ChameleonModel`."""

    input_modalities = ("text",)

    def __init__(self, config: ChameleonConfig) -> None:
        super(ChameleonModel, self).__init__(config)  # not ChameleonModel's own, which builds the VQ model
        layer = parts.ChameleonSwinDecoderLayer if config.swin_norm else parts.ChameleonDecoderLayer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = parts.ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = parts.ChameleonRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class ChameleonForCausalLM(parts.ChameleonPreTrainedModel, GenerationMixin):
    """See the module. What `AutoModelForCausalLM` makes of a config or a folder with `model_type: chameleon`."""

    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # where `tie_word_embeddings` says so
    _keys_to_ignore_on_load_unexpected = [f"^{re.escape(VQ_MODEL)}"]

    def __init__(self, config: ChameleonConfig) -> None:
        config = copy.copy(config)
        config.vq_config = None  # transformers warns of a part without a module whenever attention is changed
        super().__init__(config)
        self.model = ChameleonDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Of a folder or hub name, in which every tensor has to be, in its shape, and no other but the VQ model's.

        Raises `ValueError` where that is not so, beside what transformers raises.
        """
        model, found = super().from_pretrained(*args, **options, output_loading_info=True, ignore_mismatched_sizes=True)
        wrong = [f"{name} is {what}" for what in ("missing", "unexpected") for name in sorted(found[f"{what}_keys"])]
        for name, shape, expected in sorted(found["mismatched_keys"]):
            wrong.append(f"{name} is {list(shape)}, expected {list(expected)}")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"its tensors do not fit its config: {', '.join(wrong[:3])}{more}")
        return model

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """As every causal language model of transformers.

        Args:
            input_ids: int64 [B, L], or `inputs_embeds` [B, L, D] in their place.
            logits_to_keep: the last so many positions, 0 for all; or which, int64 [K].
            options: reach every layer, and from there its attention (`packing`).

        Returns:
            `logits` [B, L or K, V], and the `cache`, where one is used.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden),
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoModelForCausalLM.register(ChameleonConfig, ChameleonForCausalLM, exist_ok=True)
