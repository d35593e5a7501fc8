"""The audio encoder against stock `HubertModel`: a clip among others gives what it gives alone."""

from typing import Any

import numpy as np
import pytest
import torch
from music_run import HUBERT, wave
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from mm.errors import ConfigError, DataError
from mm.models.audio import AudioEncoder
from mm.models.config import AudioEncoderConfig
from mm.models.spectra import CQT

LENGTHS = [9000, 400, 24_000, 719, 7203, 9000]
CLIPS = [torch.from_numpy(wave(number, length)) for number, length in enumerate(LENGTHS)]
ORDERS = [{"do_stable_layer_norm": False}, {"do_stable_layer_norm": True}]
LAYER_NORMS = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}


def encoder(grad_mult: float = 1.0, normalize: bool = False, **fields: Any) -> AudioEncoder:
    torch.manual_seed(0)
    made = AudioEncoder(AudioEncoderConfig(config={**HUBERT, **fields}, normalize=normalize), grad_mult).eval()
    for name, parameter in made.named_parameters():  # transformers starts norms and biases from ones and zeros
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return made


def stock(ours: AudioEncoder) -> Any:
    """transformers' own model with its own attention and the same weights."""
    values = {**ours.config.values, "attn_implementation": "eager"}
    model = HubertModel(HubertConfig(**values)).eval()
    model.load_state_dict(ours.hubert.state_dict())
    return model


def states(model: Any, clip: Tensor, masked: Tensor | None = None) -> list[Tensor]:
    """[T, D] each, the last as transformers 4 gave it: of pre-norm models, behind the last norm."""
    found = model(clip[None], mask_time_indices=None if masked is None else masked[None], output_hidden_states=True)
    *before, last = found.hidden_states
    if model.config.do_stable_layer_norm:
        last = model.encoder.layer_norm(last)
    torch.testing.assert_close(last, found.last_hidden_state)
    return [state[0] for state in (*before, last)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    most = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        # The gradient of a key's bias is zero but for rounding.
        assert float((found[name] - grad).norm()) < tolerance * max(float(grad.norm()), 1e-3 * most), name


@pytest.mark.parametrize("fields", [*ORDERS, LAYER_NORMS], ids=["post-norm", "pre-norm", "layer norms"])
def test_packed_clips_are_those_of_the_stock_model_alone(fields: dict[str, Any]) -> None:
    ours = encoder(**fields)
    theirs = stock(ours)
    masked = [torch.rand(ours.config.frames(len(clip)), generator=torch.manual_seed(3)) < 0.4 for clip in CLIPS]
    expected = [states(theirs, clip, mask) for clip, mask in zip(CLIPS, masked, strict=True)]
    together = [torch.cat(each) for each in zip(*expected, strict=True)]
    found = ours(CLIPS, torch.cat(masked), states=True)
    assert found.lengths == [len(one[0]) for one in expected] and len(found.states) == ours.layers + 1
    for state, other in zip(found.states, together, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.hidden, found.states[-1])
    features = torch.cat([theirs.feature_extractor(clip[None])[0].T for clip in CLIPS])
    torch.testing.assert_close(found.features, features, rtol=1e-5, atol=1e-5)
    # A weight for every number, so that no two of them can stand for one another.
    weights = [torch.randn(one.shape, generator=torch.manual_seed(4)) for one in (*together, features)]
    for outputs in ([*found.states, found.features], [*together, features]):
        torch.stack([(one * weight).sum() for one, weight in zip(outputs, weights, strict=True)]).sum().backward()
    assert_alike(gradients(ours.hubert), gradients(theirs))


@pytest.mark.parametrize("fields", ORDERS, ids=["post-norm", "pre-norm"])
def test_a_clip_does_not_depend_on_the_others(fields: dict[str, Any]) -> None:
    """In outputs, and in gradients."""
    ours = encoder(**fields)
    alone = torch.cat([ours([clip]).hidden for clip in CLIPS])
    torch.testing.assert_close(ours(CLIPS).hidden, alone, rtol=1e-5, atol=1e-5)
    clips = [clip.clone().requires_grad_() for clip in CLIPS]
    first = ours.config.frames(len(clips[0]))
    ours(clips).hidden[:first].square().sum().backward()
    assert float(clips[0].grad.abs().max()) > 0
    assert all(clip.grad is None or not clip.grad.any() for clip in clips[1:])


def test_normalising_is_that_of_the_feature_extractor() -> None:
    ours = encoder(normalize=True)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=24_000, do_normalize=True)
    quiet = [0.003 * clip + 0.1 for clip in CLIPS]  # the GroupNorm undoes scale, but not of so little
    normed = [extractor(clip.numpy(), sampling_rate=24_000, return_tensors="pt").input_values[0] for clip in quiet]
    torch.testing.assert_close(ours(quiet).hidden, encoder()(normed).hidden, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(quiet).hidden, encoder()(quiet).hidden, atol=1e-2)


def test_gradients_of_the_front_end_are_scaled() -> None:
    found = []
    for grad_mult in (1.0, 0.1):
        ours = encoder(grad_mult)
        encoded = ours(CLIPS[:2])
        (encoded.hidden.square().sum() + encoded.features.square().sum()).backward()
        found.append(gradients(ours))
    for name, grad in found[0].items():
        factor = 0.1 if "feature_extractor" in name else 1.0
        torch.testing.assert_close(found[1][name], factor * grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("fields", ORDERS, ids=["post-norm", "pre-norm"])
def test_layers_that_are_dropped_are_passed_by(fields: dict[str, Any]) -> None:
    """Each clip goes through its own: as a stock model that has no others."""
    ours = encoder(**fields, num_hidden_layers=3)
    through = [[0, 1, 2], [1], [0, 2], [], [2], [0, 1]]
    frames = [ours.config.frames(len(clip)) for clip in CLIPS]
    kept = torch.tensor([[layer in some for some in through] for layer in range(3)])
    found = ours(CLIPS, kept=kept.repeat_interleave(torch.tensor(frames), dim=1)).hidden.split(frames)
    for clip, some, hidden in zip(CLIPS, through, found, strict=True):
        theirs = stock(ours)
        theirs.encoder.layers = nn.ModuleList(theirs.encoder.layers[layer] for layer in some)
        torch.testing.assert_close(hidden, theirs(clip[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)


def test_a_spectrum_beside_the_waveform() -> None:
    """MERT's `feature_extractor_cqt`: concatenated in front of the projection's norm."""
    ours = encoder(feature_extractor_cqt=True, feature_extractor_cqt_bins=42)
    assert ours.hubert.feature_projection.layer_norm.normalized_shape == (16 + 42,)
    theirs = HubertModel(HubertConfig(**{**ours.config.values, "attn_implementation": "eager"})).eval()
    for part in ("feature_extractor", "encoder"):
        getattr(theirs, part).load_state_dict(getattr(ours.hubert, part).state_dict())
    expected = []
    for clip in CLIPS:
        features = theirs.feature_extractor(clip[None])[0].T
        (spectrum,) = CQT(24_000, 320, bins=42, bins_per_octave=6)([clip])
        read = torch.cat([features, spectrum[: len(features)]], dim=1)
        expected.append(theirs.encoder(ours.hubert.feature_projection(read[None]))[0][0])
    torch.testing.assert_close(ours(CLIPS).hidden, torch.cat(expected), rtol=1e-5, atol=1e-5)


SIZES = {
    "95M": ({}, 211, 94_371_712),
    "330M": (
        {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "do_stable_layer_norm": True,
        },
        403, 315_428_992,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_released_names_and_shapes_load_strictly(size: str) -> None:
    """At full size, on the meta device, with the released names of the positional convolution's normed weight."""
    fields, tensors, values = SIZES[size]
    with torch.device("meta"):
        ours = AudioEncoder(AudioEncoderConfig(config=fields))
        released = HubertModel(HubertConfig(**ours.config.values)).state_dict()
    assert {tensor.device.type for tensor in ours.state_dict().values()} == {"meta"}
    normed = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    for ours_name, name in ((f"{normed}0", "weight_g"), (f"{normed}1", "weight_v")):
        released[f"encoder.pos_conv_embed.conv.{name}"] = released.pop(ours_name)
    assert len(released) == tensors and sum(tensor.numel() for tensor in released.values()) == values
    ours.hubert.load_state_dict(released, strict=True, assign=True)


def test_frames() -> None:
    config = AudioEncoderConfig()
    assert (config.hop, config.window) == (320, 400)
    assert [config.frames(n) for n in (400, 719, 720, 24_000, 120_000, 122_880)] == [1, 1, 2, 74, 374, 383]
    layout = config.layout()
    assert [layout.count(n)[0] for n in (400, 120_000)] == [1, 374] and layout.sampling_rate == 24_000
    odd = AudioEncoderConfig(config={"conv_dim": [8] * 3, "conv_kernel": [7, 4, 3], "conv_stride": [3, 2, 2]})
    for length in range(odd.window, 200):
        conv = length
        for kernel, stride in zip(odd.values["conv_kernel"], odd.values["conv_stride"], strict=True):
            conv = (conv - kernel) // stride + 1
        assert odd.frames(length) == conv


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"hiden_size": 3}, r"encoder\.config\.hiden_size: unknown key; did you mean 'hidden_size'"),
        ({"hidden_size": 33}, r"encoder\.config: cannot be built: "),
        ({"conv_pos_batch_norm": True}, r"would depend on the others of its micro-batch"),
        ({"deepnorm": True}, r"config\.deepnorm: no published MERT has it"),
        ({"conv_dim": [16]}, r"expected one number for each convolution"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=line) as error:
        encoder(**fields)
    assert not isinstance(error.value, ConfigError) or "\n" not in str(error.value)


def test_a_clip_without_a_frame_is_refused() -> None:
    with pytest.raises(DataError, match="a clip of 399 samples: the encoder takes 400 at once"):
        encoder()([CLIPS[0], torch.from_numpy(np.zeros(399, dtype=np.float32))])
