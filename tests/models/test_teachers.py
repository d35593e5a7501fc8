"""Teachers against their references: transformers' EnCodec on each clip alone, the nearest centroid by brute force and
by scikit-learn; and frames of teacher and student beside each other in time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EncodecConfig as Published
from transformers import EncodecModel

from mm.errors import ConfigError
from mm.models.spectra import chroma, log_mel
from mm.models.systems.joint.config import JointConfig
from mm.models.systems.mert.config import MertConfig
from mm.models.teachers import aligned, kmeans
from mm.models.teachers.config import EncodecConfig, KMeansConfig, teacher_of
from mm.models.teachers.kmeans import Codebook, write

TINY = {
    "num_filters": 4, "hidden_size": 8, "codebook_size": 16, "num_lstm_layers": 1, "target_bandwidths": [0.6, 1.2],
}  # fmt: skip
HOP, WINDOW = 320, 400
LAYOUT = MertConfig().layout()
"""Of a student with such frames at 24,000 Hz."""
SLOWER = MertConfig.model_validate({"encoder": {"sampling_rate": 16_000}}).layout()


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An EnCodec of 4 codebooks with 16 random codes each, and the folder that transformers saved it in."""
    torch.manual_seed(0)
    model = EncodecModel(Published(**TINY)).eval()
    with torch.no_grad():
        heard = model.encoder(torch.randn(1, 1, 24_000) * 0.3)[0]
    for number, layer in enumerate(model.quantizer.layers):
        codes = torch.randn(16, 8) * heard.std(1) / (1 + number)
        layer.codebook.embed.copy_(codes if number else codes + heard.mean(1))
    folder = tmp_path_factory.mktemp("codec")
    model.save_pretrained(folder)
    return model, folder


def clips(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, generator=generator) * 0.3 for length in lengths]


def frames_of(clip: torch.Tensor) -> int:
    return (len(clip) - WINDOW) // HOP + 1


def test_codes_are_those_of_each_clip_alone(codec: tuple[Any, Path]) -> None:
    model, folder = codec
    teacher = EncodecConfig(name=str(folder), bandwidth=1.2).build()
    assert teacher.sizes == (16,) * 4
    teacher.check(LAYOUT)
    given = clips(12_000, 4_000, 12_000, 4_001, 12_000, 400)
    found = teacher.codes(given, [frames_of(clip) for clip in given], LAYOUT)
    with torch.no_grad():
        alone = [model.encode(clip[None, None], bandwidth=1.2).audio_codes[0, 0].T for clip in given]
    assert all(len(codes) > frames_of(clip) for clip, codes in zip(given, alone, strict=True))
    assert torch.equal(found, torch.cat([codes[: frames_of(clip)] for clip, codes in zip(given, alone, strict=True)]))
    assert all(len(column.unique()) > 4 for column in found.T), "codes that say something"
    backwards = teacher.codes(given[::-1], [frames_of(clip) for clip in given[::-1]], LAYOUT)
    assert torch.equal(backwards[-frames_of(given[0]) :], found[: frames_of(given[0])])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.codes(given, [frames_of(clip) for clip in given], LAYOUT), found)
    (few,) = EncodecConfig(name=str(folder), bandwidth=0.6).build().codes(given[:1], [1], LAYOUT)
    assert torch.equal(few, found[0, :2])


def test_the_teacher_of_a_part_is_found() -> None:
    music = {"kind": "mert", "teacher": {"kind": "encodec", "bandwidth": 3.0}}
    words = {"kind": "text_lm", "language": {"name": "Qwen/Qwen2.5-0.5B"}}
    assert teacher_of(MertConfig.model_validate(music)) == EncodecConfig(bandwidth=3.0)
    assert teacher_of(JointConfig.model_validate({"parts": {"words": words, "music": music}})).sizes() == (1024,) * 4
    assert teacher_of(JointConfig.model_validate({"parts": {"words": words}})) is None


def test_five_seconds_are_374_of_375_frames(codec: tuple[Any, Path]) -> None:
    model, folder = codec
    (clip,) = clips(120_000)
    with torch.no_grad():
        codes = model.encode(clip[None, None], bandwidth=1.2).audio_codes[0, 0].T
    assert len(codes) == 375 and frames_of(clip) == 374
    teacher = EncodecConfig(name=str(folder), bandwidth=1.2).build()
    assert torch.equal(teacher.codes([clip], [374], LAYOUT), codes[:374])


@pytest.mark.parametrize("hop", [320, 160, 240, 480, 640, 1000])
def test_a_frame_takes_the_one_that_covers_its_middle(hop: int) -> None:
    """Brute force, and the last past the end."""
    found, frames = torch.arange(40)[:, None], 40 * HOP // hop + 2
    covering = [min(39, int(hop * (frame + 0.5) // HOP)) for frame in range(frames)]
    assert aligned(found, frames, hop, HOP)[:, 0].tolist() == covering


def test_sizes_are_known_without_weights_or_torch(codec: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((codec[1] / "config.json").read_bytes())
    assert EncodecConfig(name=str(tmp_path), bandwidth=1.2).sizes() == (16,) * 4
    assert EncodecConfig(name=str(tmp_path), bandwidth=0.6).sizes() == (16,) * 2
    path = centroids(tmp_path / "k.safetensors")
    code = (
        "import sys; from mm.models.teachers.config import EncodecConfig, KMeansConfig; "
        f"print(EncodecConfig().sizes(), KMeansConfig(path={str(path)!r}).sizes(), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == f"{(1024,) * 8} (7, 5) False"


def test_the_sizes_of_the_published_codec_are_transformers_own() -> None:
    """Nothing is fetched to know them."""
    with torch.device("meta"):
        quantizer = EncodecModel(Published()).quantizer
    assert len(EncodecConfig().sizes()) == quantizer.get_num_quantizers_for_bandwidth(6.0) == 8
    assert quantizer.layers[0].codebook.embed.shape[0] == EncodecConfig().sizes()[0]


def test_old_names_of_weights_and_pickles_of_tensors_are_read(codec: tuple[Any, Path], tmp_path: Path) -> None:
    """As the published files have them; the decoder may be missing from none, but decides nothing."""
    _, folder = codec
    old = {"original0": "weight_g", "original1": "weight_v"}
    tensors = load_file(folder / "model.safetensors")
    spelt = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.") and tensor.is_floating_point():
            tensor = tensor + 1
        for new, legacy in old.items():
            name = name.replace(f"parametrizations.weight.{new}", legacy)
        spelt[name] = tensor
    assert spelt.keys() != tensors.keys()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(spelt, tmp_path / "pytorch_model.bin")
    one, other = (EncodecConfig(name=str(name), bandwidth=1.2).build() for name in (folder, tmp_path))
    assert one.describe() == other.describe() == json.loads(json.dumps(one.describe()))
    given = clips(4_000)
    assert torch.equal(one.codes(given, [11], LAYOUT), other.codes(given, [11], LAYOUT))


def test_what_decides_codes_is_described(codec: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = codec
    described = EncodecConfig(name=str(folder), bandwidth=1.2).build().describe()
    assert EncodecConfig(name=str(folder), bandwidth=0.6).build().describe() != described
    tensors = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    name = "quantizer.layers.3.codebook.embed"
    changed = {**tensors, name: tensors[name] + 1e-3}
    for number, (values, weights) in enumerate([(about | {"pad_mode": "constant"}, tensors), (about, changed)]):
        other = tmp_path / str(number)
        other.mkdir()
        (other / "config.json").write_text(json.dumps(values))
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        assert EncodecConfig(name=str(other), bandwidth=1.2).build().describe() != described
    # The fourth codebook is not used at this bandwidth.
    assert (
        EncodecConfig(name=str(tmp_path / "1"), bandwidth=0.6).build().describe()
        == EncodecConfig(name=str(folder), bandwidth=0.6).build().describe()
    )


def test_what_is_no_teacher_says_so(codec: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = codec
    with pytest.raises(ConfigError, match=r"model\.teacher\.bandwidth 6: .* has 0\.6, 1\.2"):
        EncodecConfig(name=str(folder)).sizes()
    with pytest.raises(ConfigError, match="there is no such folder"):
        EncodecConfig(name=str(tmp_path / "nowhere")).sizes()
    with pytest.raises(ConfigError, match=r"there is no config\.json"):
        EncodecConfig(name=str(tmp_path)).sizes()
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(ConfigError, match="of a hubert model; expected encodec"):
        EncodecConfig(name=str(tmp_path)).sizes()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="cannot be loaded"):
        EncodecConfig(name=str(tmp_path), bandwidth=1.2).build()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("quantizer.layers.0.codebook.embed")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"its weights lack quantizer\.layers\.0\.codebook\.embed"):
        EncodecConfig(name=str(tmp_path), bandwidth=1.2).build()
    stereo = tmp_path / "stereo"
    EncodecModel(Published(**TINY, audio_channels=2)).save_pretrained(stereo)
    with pytest.raises(ConfigError, match="takes 2 channels"):
        EncodecConfig(name=str(stereo), bandwidth=1.2).build()
    with pytest.raises(ConfigError, match="it takes 24,000 Hz, and the model 16,000 Hz"):
        EncodecConfig(name=str(folder), bandwidth=1.2).build().check(SLOWER)
    with pytest.raises(ConfigError, match="it takes 24,000 Hz, and the model takes no recordings"):
        EncodecConfig(name=str(folder), bandwidth=1.2).build().check(replace(LAYOUT, audio=None))


def centroids(path: Path, seed: int = 0) -> Path:
    """A file of 7 random centroids of log-mel frames and 5 of chroma."""
    generator = torch.Generator().manual_seed(seed)
    books = {
        name: Codebook(*(torch.rand(size, generator=generator) + least for size, least in sizes))
        for name, sizes in {
            "mel": ((80, -9.0), (80, 1.0), ((7, 80), -0.5)),
            "chroma": ((12, -0.5), (12, 0.5), ((5, 12), -0.5)),
        }.items()
    }
    described = [{"name": name, "clusters": len(book.centroids)} for name, book in books.items()]
    write(path, books, {"sampling_rate": 24_000, "hop": HOP, "codebooks": described})
    return path


def test_codes_are_the_nearest_centroids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = centroids(tmp_path / "k.safetensors")
    teacher = KMeansConfig(path=path).build()
    assert teacher.sizes == (7, 5)
    teacher.check(LAYOUT)
    given = [clip * gain for clip, gain in zip(clips(12_000, 4_000, 400), (1.0, 0.1, 0.0), strict=True)]
    frames = [frames_of(clip) for clip in given]
    found = teacher.codes(given, frames, LAYOUT)
    assert found.shape == (sum(frames), 2) and all(len(column.unique()) > 1 for column in found.T)
    tensors = load_file(path)
    for column, (name, spectrum) in zip(found.T, (("mel", log_mel), ("chroma", chroma)), strict=True):
        normal = [
            (spectrum(clip, 24_000, hop=HOP)[:count] - tensors[f"{name}.mean"]) / tensors[f"{name}.std"]
            for clip, count in zip(given, frames, strict=True)
        ]
        distances = torch.cdist(torch.cat(normal).double(), tensors[f"{name}.centroids"].double())
        assert torch.equal(column, distances.argmin(1))
    monkeypatch.setattr(kmeans, "AT_ONCE", 5)
    assert torch.equal(teacher.codes(given, frames, LAYOUT), found)
    assert torch.equal(teacher.codes(given[1:], frames[1:], LAYOUT), found[frames[0] :])
    assert teacher.describe() == KMeansConfig(path=centroids(tmp_path / "same.safetensors")).build().describe()
    assert teacher.describe() != KMeansConfig(path=centroids(tmp_path / "other.safetensors", 1)).build().describe()


def test_nearest_is_what_scikit_learn_predicts() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    frames = np.random.default_rng(0).normal(size=(4000, 20)).astype(np.float32)
    fitted = cluster.MiniBatchKMeans(30, n_init=1, random_state=0).fit(frames)
    book = Codebook(torch.zeros(20), torch.ones(20), torch.from_numpy(fitted.cluster_centers_))
    assert np.array_equal(book.nearest(torch.from_numpy(frames)).numpy(), fitted.predict(frames))


def test_a_file_that_holds_no_centroids_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; make it with `mm data kmeans"):
        KMeansConfig(path=tmp_path / "none").sizes()
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ConfigError, match="no file of centroids"):
        KMeansConfig(path=tmp_path / "text").sizes()
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="no file of centroids"):
        KMeansConfig(path=tmp_path / "other").build()
