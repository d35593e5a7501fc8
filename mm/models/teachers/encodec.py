"""EnCodec as a teacher, by transformers: the codes of its residual vector quantiser, 75 frames a second.

Clips of one length are encoded together. Shorter ones are never padded, since EnCodec reflects what is beyond the end
and its LSTM runs through all of a clip.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.data.features import digest_tensors
from mm.data.layout import Layout
from mm.errors import ConfigError
from mm.models.teachers import aligned, in_float32, require_rate
from mm.models.teachers.config import EncodecConfig

SAMPLES = 1 << 21
"""That are encoded at once, and those of a longer clip: its first layer makes 32 numbers, 128 bytes, of each."""
DECIDING = ("dilation_growth_rate", "normalize", "pad_mode", "use_causal_conv", "upsampling_ratios")
"""Settings that decide the codes, and cannot be seen from the weights."""


class Encodec:
    """See `Teacher`. Raises `ConfigError` where the model cannot be loaded, or takes more than one channel."""

    medium = "audio"

    def __init__(self, config: EncodecConfig) -> None:
        self.sizes, self.bandwidth = config.sizes(), config.bandwidth
        self._model = _load(config.name)
        about = self._model.config
        if about.audio_channels != 1 or about.chunk_length_s is not None:
            raise ConfigError(
                f"model.teacher.name {config.name}: takes {about.audio_channels} channels, in chunks of "
                f"{about.chunk_length_s} s; expected one channel and no chunks, as facebook/encodec_24khz has"
            )
        self.sampling_rate, self.hop = int(about.sampling_rate), int(about.hop_length)

    def check(self, layout: Layout) -> None:
        """See `Teacher`."""
        require_rate(layout, self.sampling_rate)

    @torch.no_grad()
    def codes(self, items: list[Tensor], lengths: list[int], layout: Layout) -> Tensor:
        """See `Teacher`."""
        assert layout.audio is not None
        device = items[0].device
        self._model.to(device)
        by_length: dict[int, list[int]] = {}
        for number, clip in enumerate(items):
            by_length.setdefault(len(clip), []).append(number)
        found: list[Tensor] = [torch.empty(0)] * len(items)
        with in_float32(device):
            for length, numbers in by_length.items():
                most = max(1, SAMPLES // length)
                for some in (numbers[at : at + most] for at in range(0, len(numbers), most)):
                    values = torch.stack([items[number].float() for number in some])[:, None]
                    (codes,) = self._model.encode(values, bandwidth=self.bandwidth).audio_codes
                    for number, one in zip(some, codes, strict=True):  # [K, F]
                        found[number] = aligned(one.T, lengths[number], layout.audio.hop, self.hop)
        return torch.cat(found)

    def describe(self) -> dict[str, Any]:
        """See `Teacher`."""
        about = self._model.config
        quantizer = self._model.quantizer.layers[: len(self.sizes)]
        tensors = {f"encoder.{name}": tensor for name, tensor in self._model.encoder.state_dict().items()}
        tensors |= {f"quantizer.{number}": layer.codebook.embed for number, layer in enumerate(quantizer)}
        return {
            "kind": "encodec",
            "bandwidth": self.bandwidth,
            "codec": {name: getattr(about, name) for name in DECIDING},
            "weights": digest_tensors(tensors),
        }


def _load(name: str) -> Any:
    """The model without its decoder. Raises `ConfigError`."""
    from transformers import EncodecModel

    where = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        with torch.random.fork_rng(devices=[]):  # nothing that a run draws depends on when this is loaded
            model, found = EncodecModel.from_pretrained(
                where, dtype=torch.float32, weights_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers and the hub's client raise errors of a dozen libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.teacher.name {name}: cannot be loaded ({reason}); give a folder with its config.json and "
            "model.safetensors"
        ) from None
    if found["missing_keys"]:
        raise ConfigError(f"model.teacher.name {name}: its weights lack {min(found['missing_keys'])}")
    model.decoder = nn.Identity()
    return model.eval().requires_grad_(False)
