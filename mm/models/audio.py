"""Audio encoders with the structure of HuBERT (MERT's too), on clips of any lengths in one row, without padding.

transformers' `HubertModel` holds the parameters, so that released weights fit it by name; its modules are run here.
What a clip gives does not depend on the clips beside it:

- The convolutions of the front end take one after the other, for the GroupNorm behind the first averages over time.
- For the positional convolution, clips stand in a row as far apart as it reaches, with zeros between them.
- Attention is bidirectional inside a clip (`mm.models.attention`).

Each module is called once a batch, the front end as one, whatever the clips are: where weights are sharded, no rank
waits for another.
Source of the structure: transformers' `modeling_hubert.py`; Hsu et al., 2106.07447.
"""

from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from mm.errors import ConfigError, DataError
from mm.models import attention
from mm.models.config import AudioEncoderConfig
from mm.models.spectra import CQT
from mm.settings import nearest

OF_MERT = ("feature_extractor_cqt", "feature_extractor_cqt_bins", "attention_relax", "deepnorm")
"""Fields of MERT's config that HuBERT's has not. `attention_relax` takes the maximum off scores that are scaled down,
and scales them up again, against overflow in float16; what comes of it is a softmax, which attention here is anyway."""


class Encoded(NamedTuple):
    """All frames of all clips, in order. A tuple, in which DeepSpeed finds the tensors.

    features: [N, C], what the convolutions give. hidden: [N, D], the last state. states: [N, D] each, if asked for:
    what enters the first layer, then what each layer gives, the last being `hidden`. lengths: frames of each clip.
    """

    features: Tensor
    hidden: Tensor
    states: list[Tensor]
    lengths: list[int]


class AudioEncoder(nn.Module):
    """See the module. `width` of a state; `layers`, their number.

    Args:
        grad_mult: what gradients of the convolutions' output are multiplied by (fairseq's `feature_grad_mult`).
    """

    def __init__(self, config: AudioEncoderConfig, grad_mult: float = 1.0) -> None:
        super().__init__()
        self.config, self.grad_mult = config, grad_mult
        known = (*HubertConfig.__dataclass_fields__, *OF_MERT)
        for name in config.config:
            if name not in known:
                raise ConfigError(f"encoder.config.{name}: unknown key; {nearest(name, known)}")
        try:
            values = HubertConfig(**config.values)
            values._attn_implementation = attention.register()
            self.hubert: Any = HubertModel(values)
        except Exception as error:  # transformers, and torch below it, raise errors of many kinds
            raise ConfigError(f"encoder.config: cannot be built: {' '.join(str(error).split())}") from None
        self.width, self.layers = values.hidden_size, values.num_hidden_layers
        # Also where transformers' own masking is off; and on the meta device, where transformers makes a real one.
        self.hubert.masked_spec_embed = nn.Parameter(torch.empty(self.width).uniform_())
        extractor = self.hubert.feature_extractor
        extractor.forward = partial(_convolved, extractor)
        if config.cqt_bins:
            self._cqt = CQT(
                config.sampling_rate, config.hop, bins=config.cqt_bins, bins_per_octave=config.cqt_bins // 7
            )
            projection, inner = self.hubert.feature_projection, values.conv_dim[-1] + config.cqt_bins
            if values.feat_proj_layer_norm:
                projection.layer_norm = nn.LayerNorm(inner, eps=values.layer_norm_eps)
            projection.projection = nn.Linear(inner, self.width)
            nn.init.normal_(projection.projection.weight, std=values.initializer_range)
            nn.init.zeros_(projection.projection.bias)
        for module in self.hubert.modules():
            if isinstance(module, nn.LayerNorm):
                module.forward = partial(_normed, module)  # type: ignore[method-assign]

    def forward(
        self, clips: list[Tensor], masked: Tensor | None = None, states: bool = False, kept: Tensor | None = None
    ) -> Encoded:
        """Encode clips as one batch.

        Args:
            clips: float32 [T_i] each, at `config.sampling_rate`, at least `config.window` samples long.
            masked: bool [N], frames that the learned vector stands for.
            states: give the states of all layers.
            kept: bool [layers, N], the layers that a frame goes through; it passes the others by (layer drop).

        Raises:
            DataError: a clip is too short for a frame.
        """
        lengths = [self.config.frames(len(clip)) for clip in clips]
        if min(lengths) < 1:
            raise DataError(
                f"a clip of {min(map(len, clips))} samples: the encoder takes {self.config.window} at once; leave such "
                "clips out, or fill them up"
            )
        if self.config.normalize:
            clips = [(clip - clip.mean()) / torch.sqrt(clip.var(correction=0) + 1e-7) for clip in clips]
        features = self.hubert.feature_extractor(clips)
        if self.grad_mult != 1 and features.requires_grad:
            features.register_hook(lambda grad: grad * self.grad_mult)
        read = features
        if self.config.cqt_bins:
            read = torch.cat([features, self._spectrum(clips, lengths).to(features.dtype)], dim=1)
        encoder, stand_in = self.hubert.encoder, self.hubert.masked_spec_embed
        hidden = self.hubert.feature_projection(read[None]).to(stand_in.dtype)  # the residual stream, not autocast's
        if masked is not None:
            hidden = torch.where(masked[:, None], stand_in, hidden)  # 1 n d
        hidden = hidden + self._positions(hidden, lengths)
        norm_first = self.hubert.config.do_stable_layer_norm
        hidden = encoder.dropout(hidden if norm_first else encoder.layer_norm(hidden))
        clip_of = torch.repeat_interleave(torch.arange(1, len(clips) + 1), torch.tensor(lengths)).to(hidden.device)
        packing = attention.packing(clip_of[None], causal=False)
        seen: list[Tensor] = []
        for number, layer in enumerate(encoder.layers):
            if states:
                seen.append(hidden[0])
            after = layer(hidden, packing=packing)
            hidden = after if kept is None else torch.where(kept[number][:, None], after, hidden)
        if norm_first:
            # Before it is a state: so in transformers 4, by which the features of MERT are published.
            hidden = encoder.layer_norm(hidden)
        return Encoded(features, hidden[0], [*seen, hidden[0]] if states else [], lengths)

    def _positions(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """[1, N, D] to [1, N, D]: the positional convolution."""
        apart = self.hubert.config.num_conv_pos_embeddings // 2
        starts = accumulate((length + apart for length in lengths), initial=0)
        runs = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
        places = torch.cat(runs).to(hidden.device)
        spread = hidden.new_zeros(1, sum(lengths) + apart * len(lengths), self.width).index_copy(1, places, hidden)
        return self.hubert.encoder.pos_conv_embed(spread).index_select(1, places)

    def _spectrum(self, clips: list[Tensor], lengths: list[int]) -> Tensor:
        """[N, bins]: the constant-Q transform of each clip, cut to the frames that the convolutions give."""
        return torch.cat([one[:length] for one, length in zip(self._cqt(clips), lengths, strict=True)])


def _convolved(self: Any, clips: list[Tensor]) -> Tensor:
    """transformers' `HubertFeatureEncoder.forward` of clips [T_i], one after the other: [N, C].

    Together they would be no faster: on a CPU, what a layer gives of a clip is read from the cache by the next. The
    layers' parts are used and not called, for ranks have other numbers of clips, and a call may gather weights.
    """
    found = []
    for clip in clips:
        hidden = clip[None, None]
        for layer in self.conv_layers:
            conv, norm = layer.conv, getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                hidden = _convolved_and_normed(conv, norm, hidden)
            else:
                hidden = F.conv1d(hidden, conv.weight, conv.bias, conv.stride)
            if isinstance(norm, nn.LayerNorm):
                hidden = F.layer_norm(hidden.mT, norm.normalized_shape, norm.weight, norm.bias, norm.eps).mT
            hidden = layer.activation.forward(hidden)
        found.append(hidden[0].T)
    return torch.cat(found)


def _convolved_and_normed(conv: nn.Conv1d, norm: nn.GroupNorm, clip: Tensor) -> Tensor:
    """`norm(conv(clip))` of a clip [1, 1, T], for a norm over time of each channel: [1, C, L].

    As one convolution. Mean and variance of w * x over time follow from the mean m and the covariance S of what the
    kernel sees, w m and w S w: so nothing has to be worked out, and kept, from the output, which is a hundred times as
    large. In float64, because w S w is the small rest of large numbers where neighbouring samples are nearly alike.
    A bias of the convolution would be taken off again.
    """
    with torch.autocast(clip.device.type, enabled=False):
        seen = clip[0, 0].double().unfold(0, conv.kernel_size[0], conv.stride[0])  # l k
        mean = seen.mean(0)
        centred = seen - mean
        weight = conv.weight[:, 0].double()
        variance = (weight @ (centred.T @ centred / len(seen)) * weight).sum(1)
        weight = weight * (norm.weight.double() * torch.rsqrt(variance + norm.eps))[:, None]
        bias = norm.bias.double() - weight @ mean
    return F.conv1d(clip, weight[:, None].float(), bias.float(), conv.stride)


def _normed(self: nn.LayerNorm, x: Tensor) -> Tensor:
    """`nn.LayerNorm.forward` in the wider of both types. The residual stream is float32, and sharding
    gathers weights in bfloat16: autocast makes float32 of both on a GPU, on a CPU they are an error."""
    dtype = torch.promote_types(x.dtype, self.weight.dtype)
    return F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)
