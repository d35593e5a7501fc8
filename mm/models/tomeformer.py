"""TomeFormer: a BERT as a connector that merges features on the way (SimVLG/EVL_Gen, arXiv 2310.03291 section 3).

Features of a picture are read in place of word embeddings. Each layer, between its attention and its MLP, merges the r
of them that are most alike, so what comes out is a short prefix for a language model. The modules are transformers'
own, with their names; what is replaced is the `forward` of each layer. Source: github yiren-jian/EVLGen,
`lavis/models/blip2_models/{liptome_opt,modeling_bert}.py`.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.models.merging import match
from mm.models.tomeformer_config import TomeFormerConfig

NAME = "mm_merging"


class TomeFormer(nn.Module):
    """LayerNorm, Linear, a merging BERT, Linear. Submodules `norm`, `input`, `bert`, `output`; in LAVIS `ln_vision`,
    `VL_proj`, `VLconnector`, `opt_proj` or `llm_proj`.

    BERT's pooler is in the released checkpoints and is used for nothing: its tensors are buffers here, which no
    optimizer decays and no engine waits for.
    """

    def __init__(self, config: TomeFormerConfig, width: int, out_width: int, weights: bool = True) -> None:
        """`weights`: read those of `config.name`; else all are random."""
        super().__init__()
        self.r, self.weighted, self.proportional = config.r, config.weighted, config.proportional
        self.bert = _bert(config, weights)
        inner = self.bert.config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.input = nn.Linear(width, inner)
        self.output = nn.Linear(inner, out_width)
        for layer in self.bert.encoder.layer:
            layer.forward = partial(self._layer, layer)

    def forward(self, features: Tensor) -> Tensor:
        """[n, T, D] features of n pictures to [n, P, D_out] (`TomeFormerConfig.positions`)."""
        hidden = self.bert.embeddings(inputs_embeds=self.input(self.norm(features.float())))
        size = hidden.new_ones(hidden.shape[:2]) if self.weighted else None
        for layer in self.bert.encoder.layer:
            hidden, size = layer(hidden, size)
        return self.output(hidden)

    def _layer(self, layer: Any, hidden: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`forward` of a BertLayer: [n, T, D] to [n, T - r, D], and how many features each was made from [n, T - r]."""
        keys: list[Tensor] = []
        mask = size.log()[:, None, None] if self.proportional and size is not None else None
        hidden, _ = layer.attention(hidden, mask, keys=keys)
        if self.r:
            merge = match(keys[0], self.r, protected=1)
            hidden, size = merge.merge(hidden, size)
        return layer.output(layer.intermediate(hidden), hidden), size


def _bert(config: TomeFormerConfig, weights: bool) -> Any:
    """A BertModel without word embeddings, whose attention says what its keys were. Raises `ConfigError`."""
    transformers.AttentionInterface.register(NAME, _attend)
    values = config.values()
    if (kind := values.get("model_type", "bert")) != "bert":
        raise ConfigError(f"model.connector: its BERT is of the type {kind}; expected one of model_type bert")
    try:
        if config.name is not None and weights:
            bert: Any = transformers.BertModel.from_pretrained(config.name, dtype="float32")
        else:
            bert = transformers.BertModel(transformers.BertConfig.from_dict(values))
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.connector: its BERT cannot be built: {reason}") from None
    bert.config._attn_implementation = NAME
    del bert.embeddings.word_embeddings
    pooler = bert.pooler.dense
    for name, parameter in list(pooler.named_parameters()):
        delattr(pooler, name)
        pooler.register_buffer(name, parameter.detach())
    return bert


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, keys: list[Tensor],
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature. `keys`: is given the mean of the keys over heads, [n, T, D / heads]."""
    keys.append(key.detach().mean(1))
    mask = None if attention_mask is None else attention_mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
