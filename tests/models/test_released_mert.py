"""MERT's released layout: read strictly and without its code, exported for stock transformers, trained further."""

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

import mm
from mm.cli import main
from mm.errors import CheckpointError, ConfigError
from mm.hub import export
from mm.models import released
from mm.models.config import SYSTEMS, AudioEncoderConfig
from mm.models.released import mert
from mm.models.released.mert import FIELDS, legacy_name
from mm.models.spectra import CQT
from mm.models.systems.mert.config import MertConfig
from mm.models.teachers.kmeans import Codebook, write
from mm.train.stages import initial_tensors, take_over

# config.json of MERT-v1-95M, and what of it is another in 330M.
BASE = {
    "activation_dropout": 0.0,
    "apply_spec_augment": True,
    "architectures": ["MERTModel"],
    "attention_dropout": 0.1,
    "attention_relax": -1.0,
    "auto_map": {"AutoConfig": "configuration_MERT.MERTConfig", "AutoModel": "modeling_MERT.MERTModel"},
    "bos_token_id": 1,
    "conv_bias": False,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "deepnorm": False,
    "do_stable_layer_norm": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.1,
    "feat_proj_layer_norm": True,
    "feature_extractor_cqt": False,
    "feature_extractor_cqt_bins": 336,
    "final_dropout": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "layerdrop": 0.05,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_prob": 0.05,
    "model_type": "mert_model",
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "sample_rate": 24000,
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.24.0",
    "vocab_size": 32,
}
LARGE = {
    **BASE,
    **dict.fromkeys(("attention_dropout", "feat_proj_dropout", "final_dropout", "hidden_dropout", "layerdrop"), 0.0),
    "attention_relax": 32.0,
    "do_stable_layer_norm": True,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "mask_time_prob": 0.075,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
SMALL = {
    "conv_dim": [32] * 7, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
POST, PRE = {**BASE, **SMALL}, {**LARGE, **SMALL}
PROCESSOR = {
    "do_normalize": False, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
    "padding_side": "right", "padding_value": 0, "return_attention_mask": True, "sampling_rate": 24000,
}  # fmt: skip
REMOTE = "raise SystemExit('the code of a release was run')\n"
LENGTHS = (400, 24_000, 9_999)


def hubert(about: dict[str, Any]) -> Any:
    """Transformers' own model of a config, with weights of which none is as it was initialised."""
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**{name: about[name] for name in FIELDS if name in about})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_release(
    folder: Path, about: dict[str, Any], tensors: dict[str, Tensor], processor: dict[str, Any] | None = PROCESSOR
) -> Path:
    """A folder as the authors published them, with code that must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for name in ("configuration_MERT.py", "modeling_MERT.py"):
        (folder / name).write_text(REMOTE)
    torch.save({legacy_name(name): tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    return folder


def clips(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 + 0.3 * torch.randn(length, generator=generator) for length in lengths]


@torch.no_grad()
def states_of(model: Any, clip: Tensor, normalize: bool = False) -> list[Tensor]:
    """All hidden states [T, D] of one clip by transformers, the last one after the final norm, as transformers 4 had
    it."""
    if normalize:
        clip = (clip - clip.mean()) / (clip.var(correction=0) + 1e-7).sqrt()
    out = model(clip[None], output_hidden_states=True)
    states = [state[0] for state in out.hidden_states]
    if model.config.do_stable_layer_norm:
        states[-1] = model.encoder.layer_norm(states[-1])
    torch.testing.assert_close(states[-1], out.last_hidden_state[0], rtol=0, atol=0)
    return states


def assert_states_equal(system: Any, model: Any, normalize: bool = False) -> None:
    """One clip alone, and several of different lengths at once."""
    for some in (clips(24_000), clips(*LENGTHS)):
        expected = [torch.cat(each) for each in zip(*(states_of(model, clip, normalize) for clip in some), strict=True)]
        with torch.no_grad():
            found = system.encoder(some, states=True).states
        assert len(found) == len(expected) == model.config.num_hidden_layers + 1
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def encoder_of(system: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in system.encoder.hubert.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module")
def post() -> Any:
    return hubert(POST)


@pytest.fixture(scope="module")
def kept(post: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of the 95M's structure, which tests only read."""
    return write_release(tmp_path_factory.mktemp("kept") / "release", POST, post.state_dict())


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(kept, tmp_path / "release"))


@pytest.mark.parametrize(
    ("about", "normalize", "file"),
    [(POST, False, "bin"), (PRE, False, "bin"), (POST, True, "safetensors"), (PRE, True, "safetensors")],
)
def test_hidden_states_are_those_of_hubert(about: dict[str, Any], normalize: bool, file: str, tmp_path: Path) -> None:
    """With both orders of norms, both files and both spellings of a normed weight."""
    model = hubert(about)
    write_release(tmp_path, about, model.state_dict(), {**PROCESSOR, "do_normalize": normalize})
    if file == "safetensors":
        (tmp_path / "pytorch_model.bin").unlink()
        save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    system, layout, config = mm.load(tmp_path, "cpu")
    assert_same(encoder_of(system), model.state_dict())
    assert_states_equal(system, model, normalize)
    assert layout.audio is not None and (layout.audio.sampling_rate, layout.audio.hop) == (24_000, 320)
    assert config.form is None and config.model.kind == "mert" and config.model.teacher is None


def full_size(about: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a released file, with their shapes."""
    width, inner, channels = about["hidden_size"], about["intermediate_size"], 512
    shapes: dict[str, tuple[int, ...]] = {
        "masked_spec_embed": (width,),
        "feature_projection.layer_norm.weight": (channels,),
        "feature_projection.layer_norm.bias": (channels,),
        "feature_projection.projection.weight": (width, channels),
        "feature_projection.projection.bias": (width,),
        "encoder.pos_conv_embed.conv.bias": (width,),
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, 128),
        "encoder.pos_conv_embed.conv.weight_v": (width, width // 16, 128),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
        "feature_extractor.conv_layers.0.layer_norm.weight": (channels,),
        "feature_extractor.conv_layers.0.layer_norm.bias": (channels,),
    }
    for number, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        shapes[f"feature_extractor.conv_layers.{number}.conv.weight"] = (channels, channels if number else 1, kernel)
    linear = {f"attention.{part}_proj": (width, width) for part in "kvq"} | {"attention.out_proj": (width, width)}
    linear |= {"feed_forward.intermediate_dense": (inner, width), "feed_forward.output_dense": (width, inner)}
    for layer in range(about["num_hidden_layers"]):
        at = f"encoder.layers.{layer}"
        for name, shape in linear.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("layer_norm", "final_layer_norm"):
            shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
    return shapes


@pytest.mark.parametrize(("about", "count", "values"), [(BASE, 211, 94_371_712), (LARGE, 403, 315_428_992)])
def test_names_and_shapes_at_full_size(about: dict[str, Any], count: int, values: int, tmp_path: Path) -> None:
    """A file of one number for each of the tensors, and a model on the meta device."""
    shapes = full_size(about)
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())) == (count, values)
    write_release(tmp_path, about, {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 1_000_000
    release = released.open_release(tmp_path, "mert")
    found = released.tensors_of(release)
    assert {legacy_name(name).removeprefix("encoder.hubert."): (*t.shape,) for name, t in found.items()} == shapes


def test_defaults_are_those_of_the_95m() -> None:
    values = AudioEncoderConfig().values
    assert values == {name: BASE[name] for name in values}
    stock, ours = HubertConfig(**values).to_dict(), HubertConfig(**{n: BASE[n] for n in FIELDS if n in BASE}).to_dict()
    assert stock == ours


def test_defaults_of_what_a_config_leaves_out_are_huberts() -> None:
    theirs = HubertConfig().to_dict()
    assert {name: list(value) if isinstance(value := theirs[name], tuple) else value for name in FIELDS} == FIELDS


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.made,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(how: str, folder: Path, tmp_path: Path) -> None:
    path, made = folder / "pytorch_model.bin", tmp_path / "made"
    values = {"masked_spec_embed": Hostile(made)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(values))
    else:
        torch.save(values, path)
    for load in (lambda: mm.load(folder, "cpu"), lambda: initial_tensors(folder)):
        with pytest.raises(CheckpointError, match=r"was not loaded and nothing in it was run") as caught:
            load()
        assert not made.exists() and "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Hostile(made)))
    assert made.exists()  # it would have


def test_damaged_files_are_one_line(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    with pytest.raises(CheckpointError, match="damaged, or not saved by torch") as caught:
        mm.load(folder, "cpu")
    assert "\n" not in str(caught.value)
    torch.save({"model": {"masked_spec_embed": torch.zeros(48)}}, path)
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        mm.load(folder, "cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or pytorch_model\.bin in this folder"):
        mm.load(folder, "cpu")
    (folder / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="damaged, or no safetensors"):
        mm.load(folder, "cpu")


def test_all_that_does_not_fit_is_in_one_table(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    for layer in range(3):
        del tensors[f"encoder.layers.{layer}.attention.q_proj.weight"]
    tensors["encoder.pos_conv_embed.conv.weight_v"] = torch.zeros(48, 48, 16)
    tensors["final_proj.weight"] = torch.zeros(7, 48)
    torch.save(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        mm.load(folder, "cpu")
    head, *rows = [re.split(r" {2,}", line.strip()) for line in str(caught.value).splitlines()]
    assert "nothing was loaded" in head[0]
    assert sorted(rows) == [
        ["missing", "encoder.layers.*.attention.q_proj.weight (3 tensors)", "expected [48, 48]"],
        ["shape", "encoder.pos_conv_embed.conv.weight_v", "found [48, 48, 16], expected [48, 12, 16]"],
        ["unexpected", "final_proj.weight", "found [7, 48]"],
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"deepnorm": True}, r"config\.json: deepnorm is True; models with it are not run here"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is 16"),
        ({"feature_extractor_cqt": True}, "convolutions give one in 320 samples at 24000 Hz"),
        ({"sample_rate": 16_000}, r"is 16000, sampling_rate in preprocessor_config\.json 24000; expected one rate"),
        ({"model_type": "data2vec-audio"}, r"nor of MERT \(model_type: mert_model, or hubert\)"),
    ],
)
def test_what_is_not_run_here_is_refused_by_name(change: dict[str, Any], words: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**POST, **change}))
    with pytest.raises(CheckpointError, match=words):
        mm.load(folder, "cpu")


def test_normalisation_is_as_the_folder_says_or_the_config(folder: Path) -> None:
    """None where nothing is said, as in training; what the feature extractor does by default where only that is not."""
    path = folder / "preprocessor_config.json"

    def normalize(**encoder: Any) -> bool:
        return MertConfig.model_validate({"released": str(folder), "encoder": encoder}).encoder.normalize

    assert not normalize() and normalize(normalize=True)
    path.write_text(json.dumps({**PROCESSOR, "do_normalize": True}))
    assert normalize() and not normalize(normalize=False)
    path.write_text(json.dumps({name: value for name, value in PROCESSOR.items() if name != "do_normalize"}))
    assert normalize()
    path.unlink()
    assert not normalize()


def test_a_16_khz_release(tmp_path: Path) -> None:
    """As MERT-v0 is."""
    about = {**POST, "sample_rate": 16_000}
    write_release(tmp_path, about, hubert(about).state_dict(), {**PROCESSOR, "sampling_rate": 16_000})
    _, layout, config = mm.load(tmp_path, "cpu")
    assert layout.audio is not None and layout.audio.sampling_rate == config.model.encoder.sampling_rate == 16_000


def with_cqt(**buffers: Tensor) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A model that reads a constant-Q transform of 84 bins too, its config, and the tensors of its file with nnAudio's
    buffers."""
    about = {**POST, "sample_rate": 16_000, "feature_extractor_cqt": True, "feature_extractor_cqt_bins": 84}
    model = hubert(about)
    model.feature_projection.layer_norm = nn.LayerNorm(32 + 84)
    model.feature_projection.projection = nn.Linear(32 + 84, 48)
    lengths = np.ceil(16_000 / (2 ** (1 / 12) - 1) / (32.7 * 2 ** (np.arange(84) / 12)))
    derived = {
        "lenghts": torch.from_numpy(lengths).float(),
        "cqt_kernels_real": torch.zeros(1).expand(84, 1, 16_384),
        "cqt_kernels_imag": torch.zeros(1).expand(84, 1, 16_384),
        **buffers,
    }
    return model, about, {**model.state_dict(), **{f"feature_extractor_cqt.{n}": t for n, t in derived.items()}}


@torch.no_grad()
def test_a_release_that_reads_a_cqt_too(tmp_path: Path) -> None:
    """As MERT's modelling code does it: the transform beside the convolutions' output, cut to its frames."""
    model, about, tensors = with_cqt()
    write_release(tmp_path, about, tensors, {**PROCESSOR, "sampling_rate": 16_000})
    system: Any = mm.load(tmp_path, "cpu")[0]
    some = clips(*LENGTHS)
    expected = []
    for clip in some:
        features = model.feature_extractor(clip[None]).transpose(1, 2)
        (cqt,) = CQT(16_000, 320, bins=84, bins_per_octave=12)([clip])
        read = torch.cat([features, cqt[None, : features.shape[1]]], dim=2)
        expected.append(model.encoder(model.feature_projection(read)).last_hidden_state[0])
    torch.testing.assert_close(system.encoder(some).hidden, torch.cat(expected), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="HubertModel reads no CQT"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("buffers", "words"),
    [
        ({"lenghts": torch.full((84,), 7.0)}, "lenghts are of another transform"),
        ({"cqt_kernels_imag": torch.zeros(84, 1, 4)}, r"cqt_kernels_imag is \[84, 1, 4\], expected \[84, 1, 16384\]"),
    ],
)
def test_another_cqt_is_refused(buffers: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    _, about, tensors = with_cqt(**buffers)
    write_release(tmp_path, about, tensors, {**PROCESSOR, "sampling_rate": 16_000})
    with pytest.raises(CheckpointError, match=words):
        mm.load(tmp_path, "cpu")


def test_a_release_section_gives_way_to_what_is_set(kept: Path) -> None:
    values = {"released": str(kept), "encoder": {"config": {"hidden_dropout": 0.3, "layerdrop": 0.0}}}
    config = MertConfig.model_validate(values)
    set_here = {name: config.encoder.config[name] for name in ("hidden_dropout", "layerdrop", "hidden_size")}
    assert set_here == {"hidden_dropout": 0.3, "layerdrop": 0.0, "hidden_size": 48}
    # What a run keeps is whole: the release is not asked again.
    again = MertConfig.model_validate({**config.model_dump(), "released": "nobody/nothing"})
    assert again.encoder == config.encoder


def test_another_kind_of_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match="a release of the kind open_qwen2vl, expected one of the kind mert"):
        MertConfig.model_validate({"released": str(tmp_path)})


def test_a_model_without_text_has_no_template_or_picture_tokens(kept: Path) -> None:
    with pytest.raises(ConfigError, match="template: a mert model writes no text"):
        mm.load(kept, "cpu", template="chatml")
    with pytest.raises(ConfigError, match="tokens: a mert model takes no pictures"):
        mm.load(kept, "cpu", tokens=144)


@pytest.mark.parametrize("about", [POST, PRE], ids=["post", "pre"])
def test_export_is_a_folder_of_stock_transformers(
    about: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hubert(about)
    write_release(tmp_path / "release", about, model.state_dict(), {**PROCESSOR, "do_normalize": True})
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "release"), "--out", str(out), "--to", "hf"]) == 0
    assert ("before the final norm" in capsys.readouterr().out) == about["do_stable_layer_norm"]
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    written = json.loads((out / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("hubert", ["HubertModel"])
    assert {name: written[name] for name in FIELDS if name in about} == {n: about[n] for n in FIELDS if n in about}
    for loader in (HubertModel, AutoModel):
        stock, problems = loader.from_pretrained(out, output_loading_info=True)
        assert not any(problems.values()), problems
        assert type(stock) is HubertModel
        assert_same(stock.state_dict(), model.state_dict())
    extractor = AutoFeatureExtractor.from_pretrained(out)
    assert (extractor.sampling_rate, extractor.do_normalize) == (24_000, True)
    # Read again it is the same model; its features are what stock transformers makes of the same recording.
    before, after = mm.load(tmp_path / "release", "cpu"), mm.load(out, "cpu")
    assert_same(encoder_of(after[0]), encoder_of(before[0]))
    assert after[2].model.encoder == before[2].model.encoder and after[1].fingerprint() == before[1].fingerprint()
    (clip,) = clips(8_000)
    (values,) = extractor(clip.numpy(), sampling_rate=24_000, return_tensors="pt")["input_values"]
    with torch.no_grad():
        ours = after[0].encoder([clip]).hidden  # type: ignore[operator]
        theirs = stock(values[None]).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_vector_of_masked_frames_is_exported_where_transformers_masks_nothing(tmp_path: Path) -> None:
    config = {**SMALL, "mask_time_prob": 0.0}
    system: Any = MertConfig.model_validate({"encoder": {"config": config}}).build()
    mert.write(system, tmp_path)
    stock, problems = HubertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()) and not stock.config.apply_spec_augment
    assert_same(stock.state_dict(), encoder_of(system))


def test_hubert_as_transformers_writes_it(post: Any, tmp_path: Path) -> None:
    """Its config has no sampling rate; that of the feature extractor is taken, and none is made up."""
    post.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is None, sampling_rate in preprocessor_config\.json None; expected one"
    ):
        mm.load(tmp_path, "cpu")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    system, layout, config = mm.load(tmp_path, "cpu")
    assert_same(encoder_of(system), post.state_dict())
    assert layout.audio is not None and layout.audio.sampling_rate == 16_000 and config.model.encoder.normalize


def test_export_without_a_fitting_format_is_refused(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of the kind mert is not for --to hf-llava: it can be written as hf"):
        export(kept, tmp_path / "out", to="hf-llava")


@pytest.mark.parametrize("kind", ["mert", "tagger"])
def test_init_from_takes_the_encoder_and_leaves_heads(kind: str, kept: Path, post: Any, tmp_path: Path) -> None:
    """Which are not exported either."""
    found, where = initial_tensors(kept)
    section = released.open_release(kept, "mert").section()
    more: dict[str, Any] = {"teacher": {"kind": "encodec"}} if kind == "mert" else {"labels": ["a", "b"]}
    system: Any = SYSTEMS.resolve(kind).model_validate({**section, **more}).build()  # type: ignore[attr-defined]
    heads = {name: t.clone() for name, t in system.state_dict().items() if not name.startswith("encoder.hubert.")}
    said = take_over(system, found, None, where)
    assert_same(encoder_of(system), post.state_dict())
    assert heads and {line.split()[0] for line in said} == set(heads)
    assert_same(heads, {name: system.state_dict()[name] for name in heads})
    (tmp_path / "out").mkdir()
    assert mert.write(system, tmp_path / "out") == "the encoder alone is written, no heads"
    assert_same(encoder_of(mm.load(tmp_path / "out", "cpu")[0]), post.state_dict())


RUN = """
out: {folder}/run
data:
  sources: [{{kind: recordings, path: "{folder}/notes"}}]
  context_length: 256
  workers: 0
  cache: {folder}/cache
model:
  kind: mert
  {model}
  cqt: {{bins: 84, bins_per_octave: 12}}
  weights: {{codes: 0}}
train: {{max_steps: 2, batch_tokens: 512, device: cpu, optimizer: {{lr: 1e-3}}}}
"""


def train(tmp_path: Path, model: str, *overrides: str) -> Path:
    """Continued pre-training on a few notes, without a teacher."""
    (tmp_path / "notes").mkdir()
    for number in range(8):
        wave = np.sin(np.arange(24_000 + 4_000 * number) * 0.02 * (number + 1))
        soundfile.write(tmp_path / f"notes/{number}.flac", 0.5 * wave, 24_000)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, model=model))
    assert main(["train", str(path), *overrides]) == 0
    return tmp_path / "run"


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_trained_further_and_exported(kept: Path, post: Any, tmp_path: Path) -> None:
    run = train(tmp_path, f"released: {kept}")
    trained, layout, config = mm.load(run, "cpu")
    after = encoder_of(trained)
    assert len(moved(post.state_dict(), after)) > len(after) / 2
    assert layout.audio is not None and config.model.encoder.config["hidden_size"] == 48
    export(run, tmp_path / "out")
    stock, problems = HubertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values())
    assert_same(stock.state_dict(), after)
    assert_states_equal(mm.load(tmp_path / "out", "cpu")[0], stock)


def test_init_from_a_release_in_a_run(kept: Path, post: Any, tmp_path: Path) -> None:
    """A frozen encoder remains the release's; what else there is learns."""
    section = released.open_release(kept, "mert").section()
    model = yaml.safe_dump(section, default_flow_style=True, width=float("inf")).strip()[1:-1]
    frozen = "train.params=[{match: 'encoder.*', freeze: true}]"
    run = train(tmp_path, model, f"train.init_from={kept}", frozen)
    assert_same(encoder_of(mm.load(run, "cpu")[0]), post.state_dict())


def test_a_run_without_its_teacher(tmp_path: Path) -> None:
    """What it has learned loads where the centroids are not; other centroids under their name are refused."""

    path = tmp_path / "centroids"

    def centroids(**clusters: int) -> None:
        bins = {"mel": 80, "chroma": 12}
        books = {
            name: Codebook(torch.zeros(bins[name]), torch.ones(bins[name]), torch.randn(count, bins[name]))
            for name, count in clusters.items()
        }
        described = [{"name": name, "clusters": count} for name, count in clusters.items()]
        write(path, books, {"sampling_rate": 24_000, "hop": 320, "codebooks": described})

    centroids(mel=7, chroma=5)
    small = ", ".join(f"{name}: {value}" for name, value in SMALL.items())
    model = f"teacher: {{kind: kmeans, path: {path}}}\n  encoder: {{config: {{{small}}}}}"
    run = train(tmp_path, model, "model.weights={codes: 1, cqt: 0}")
    before = mm.load(run, "cpu")[0].state_dict()
    assert before["code_head.embeddings"].shape == (12, 64)
    path.unlink()
    system, _, config = mm.load(run, "cpu")
    assert_same(dict(system.state_dict()), dict(before))
    assert config.model.teacher.sizes() == (7, 5)
    with pytest.raises(ConfigError, match="no such file"):
        config.model.teacher.build()
    centroids(mel=9, chroma=5)
    with pytest.raises(ConfigError, match=r"codebooks \[7, 5\]: the teacher has \[9, 5\] now"):
        config.model.teacher.build()


def test_a_name_on_the_hub(kept: Path, tmp_path: Path) -> None:
    """From the hub's cache, as it lies after a download; reading what it says imports no torch."""
    snapshot = tmp_path / "hub/models--m-a-p--MERT-v1-95M/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(kept / name, snapshot)
    code = (
        "import sys; from mm.models.released import find; release = find('m-a-p/MERT-v1-95M')\n"
        "print((release.section(), 'torch' in sys.modules))"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True, env=env).stdout
    assert ast.literal_eval(out) == (released.open_release(kept, "mert").section(), False)
    # Offline it cannot be known whether there is such a file, so nothing is made up about normalisation.
    (snapshot / "preprocessor_config.json").unlink()
    error = subprocess.run(run, check=False, capture_output=True, text=True, env=env).stderr
    assert "does not give its preprocessor_config.json" in error


PUBLISHED = os.environ.get("MM_MERT_95M", "")
SHA256 = "a2b8b747f72c06e0595aeae41ae5473f4364938c6b39b2c58be38c48e6bd3fcd"


@pytest.mark.skipif(not PUBLISHED, reason="MM_MERT_95M names no folder of m-a-p/MERT-v1-95M")
def test_the_published_file() -> None:
    """Of whoever has it: the digest that others found, and the hidden states of stock transformers."""
    path = Path(PUBLISHED) / "pytorch_model.bin"
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    model = hubert(BASE)
    model.load_state_dict(torch.load(path, weights_only=True))
    system, _, config = mm.load(PUBLISHED, "cpu")
    assert_states_equal(system, model, config.model.encoder.normalize)
