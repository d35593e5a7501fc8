"""MERT as its authors released it, and HuBERT in a transformers folder: the encoder alone, without heads.

    config.json                               model_type `mert_model`, or `hubert`, as `mm export --to hf` writes it
    preprocessor_config.json                  the sampling rate, and whether a clip is normalised
    model.safetensors or pytorch_model.bin    the tensors by the names of transformers' `HubertModel`

The code in a release's folder is never run: with the switches as released it computes what `HubertModel` does, and with
`feature_extractor_cqt` a constant-Q transform is read beside the waveform. Other structures (DeepNorm) are refused by
name; `attention_relax` changes no result and is left out.

Whether a clip is brought to zero mean and unit variance is part of the model, though no weight depends on it:
`do_normalize` is false in one revision of the released preprocessor_config.json and true in another, training used none
(`task.normalize: false`) and MARBLE's probes do. What the folder says is taken, without such a file none, as in
training; `encoder.normalize` says otherwise.

Sources: github yizhilll/MERT, `scripts/mert_hf/{configuration,modeling}_MERT.py`, `scripts/convert_MERT_HF.py`,
`scripts/hf_config/*.json`, `mert_fairseq/config/pretrain/*.yaml`.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mm.errors import CheckpointError, ConfigError
from mm.models.released.release import WEIGHTS, Repository, fit, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm.models.config import AudioEncoderConfig

MODEL_TYPES = ("mert_model", "hubert")
PROCESSOR = "preprocessor_config.json"
ENCODER = "encoder.hubert"
"""The submodule that a release holds, of every system that has an `AudioEncoder`."""
FIELDS: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "do_stable_layer_norm": False, "initializer_range": 0.02,
    "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False, "feat_extract_norm": "group", "feat_extract_activation": "gelu", "feat_proj_layer_norm": True,
    "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
    "hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "feat_proj_dropout": 0.0,
    "final_dropout": 0.1, "layerdrop": 0.1,
    "apply_spec_augment": True, "mask_time_prob": 0.05, "mask_time_length": 10, "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0, "mask_feature_length": 10, "mask_feature_min_masks": 0,
}  # fmt: skip
"""What is taken from config.json, with the values that HuBERT and MERT have where it says nothing."""
UNKNOWN = ("deepnorm", "conv_pos_batch_norm", "adapter_attn_dim")
"""Switches of structures that are not built here."""
CQT_FIELDS = ("feature_extractor_cqt", "feature_extractor_cqt_bins")
BUFFERS = ("lenghts", "cqt_kernels_real", "cqt_kernels_imag")
"""Of nnAudio's transform, under `feature_extractor_cqt.`: kept in files, though they follow from its settings."""
LEGACY = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
"""torch's names of a convolution's normed weight, and those that it had when MERT was released."""


@dataclass(frozen=True, slots=True)
class MertFolder:
    """A release in this layout; `about` is its config.json."""

    kind: ClassVar[str] = "mert"
    repository: Repository
    about: dict[str, Any]

    @property
    def form(self) -> None:
        return None

    def section(self) -> dict[str, Any]:
        about, where = self.about, self.repository.name
        for key in UNKNOWN:
            if about.get(key):
                raise CheckpointError(f"{where}/config.json: {key} is {about[key]!r}; models with it are not run here")
        processor = self.repository.optional_json(PROCESSOR)
        rates = about.get("sample_rate"), (processor or {}).get("sampling_rate")
        known = {rate for rate in rates if rate is not None}
        if len(known) != 1:
            raise CheckpointError(
                f"{where}: sample_rate in config.json is {rates[0]}, sampling_rate in {PROCESSOR} {rates[1]}; expected "
                "one rate in one of them, or the same in both"
            )
        rate = known.pop()
        config = {name: about.get(name, default) for name, default in FIELDS.items()}
        if about.get("feature_extractor_cqt"):
            if (hop := math.prod(config["conv_stride"])) != rate // 50:
                raise CheckpointError(
                    f"{where}/config.json: feature_extractor_cqt is True, which gives 50 frames a second, and the "
                    f"convolutions give one in {hop} samples at {rate} Hz; they have to be the same"
                )
            config |= {name: about[name] for name in CQT_FIELDS if name in about}
        return {
            "encoder": {
                "config": config,
                "sampling_rate": rate,
                "normalize": processor is not None and bool(processor.get("do_normalize", True)),
            }
        }

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        path = self.repository.first(*WEIGHTS)
        found = read_tensors(path)
        encoder: Any = system.get_submodule("encoder")
        if encoder.config.cqt_bins:
            _drop_buffers(found, encoder.config, str(path))
        spelt = legacy_name if any(name.endswith(".weight_g") for name in found) else str
        fitted = fit(encoder.hubert, found, str(path), spelt)
        return {f"{ENCODER}.{name}": tensor for name, tensor in fitted.items()}


def legacy_name(name: str) -> str:
    """A parameter's name in today's `HubertModel` to that in the releases."""
    for ours, theirs in LEGACY.items():
        name = name.replace(ours, theirs)
    return name


def _drop_buffers(found: "dict[str, Tensor]", config: "AudioEncoderConfig", where: str) -> None:
    """Take out what nnAudio derived, once it is seen to be of the transform that is computed here."""
    from mm.models.spectra import CQT

    bins = config.cqt_bins
    lengths = CQT(config.sampling_rate, config.hop, bins=bins, bins_per_octave=bins // 7).lengths
    longest = 1 << (int(lengths.max()) - 1).bit_length()
    for name in BUFFERS:
        expected = [bins] if name == "lenghts" else [bins, 1, longest]
        tensor = found.pop(f"feature_extractor_cqt.{name}", None)
        if tensor is None:
            continue
        if list(tensor.shape) != expected:
            raise CheckpointError(f"{where}: feature_extractor_cqt.{name} is {list(tensor.shape)}, expected {expected}")
        if name == "lenghts" and abs(tensor.double().numpy() - lengths).max() > 1:
            raise CheckpointError(
                f"{where}: feature_extractor_cqt.lenghts are of another transform than the one from 32.7 Hz, "
                f"{bins // 7} bins an octave, that is computed here"
            )


def write(system: "nn.Module", out: Path) -> str | None:
    """Write the encoder into the folder `out`, for stock `HubertModel` and `AutoModel`, with the released names.

    Returns:
        What a user of the folder has to know, if anything: what of the model is not in it, and where stock transformers
        gives another last hidden state.

    Raises:
        ConfigError: the encoder reads a constant-Q transform, which `HubertModel` does not.
    """
    from safetensors.torch import save_file
    from transformers import Wav2Vec2FeatureExtractor

    encoder: Any = system.get_submodule("encoder")
    config, hubert = encoder.config, encoder.hubert
    if config.cqt_bins:
        raise ConfigError("transformers' HubertModel reads no CQT beside the waveform (feature_extractor_cqt)")
    about = copy.deepcopy(hubert.config)
    about.architectures = ["HubertModel"]
    if not (about.mask_time_prob or about.mask_feature_prob):
        # HubertModel has a place for the learned vector of masked frames where it may mask; here there always is one.
        about.mask_time_prob, about.apply_spec_augment = FIELDS["mask_time_prob"], False
    about.save_pretrained(out)
    Wav2Vec2FeatureExtractor(
        sampling_rate=config.sampling_rate, return_attention_mask=True, do_normalize=config.normalize
    ).save_pretrained(out)
    tensors = {legacy_name(name): tensor.cpu().contiguous() for name, tensor in hubert.state_dict().items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    notes = []
    if any(not name.startswith(f"{ENCODER}.") for name in system.state_dict()):
        notes.append("the encoder alone is written, no heads")
    if about.do_stable_layer_norm:
        notes.append(
            "transformers 5 gives the last of hidden_states before the final norm, here and in transformers 4 it comes "
            "after it, as last_hidden_state does: model.encoder.layer_norm(hidden_states[-1])"
        )
    return "; ".join(notes) or None
