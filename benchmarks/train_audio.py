"""Training a masked-prediction model of music, 17 million parameters: seconds of sound a second, ours and the peers'.

The sound: pieces of 2 to 30 seconds, as many between 2 and 4 as between 15 and 30, each of clips of the rendered music
that follow one another in a seeded order.

    mm data build music --count 400 --out corpora/music

The model: MERT's front end, 256 channels wide instead of 512, 8 layers of width 384, and 8 codebooks of 1,024. Its
teacher gives codes without meaning and costs nothing. There is no constant-Q target, no noise, no dropout and no
feature penalty, so all do the same: cross-entropies of 8 codes on some 58 % of the frames.

Peers: Hugging Face's trainer on `HubertModel`, as it is, with the pieces of a batch filled up to the longest with zeros
and an attention mask, in random order or grouped by length; its masks are transformers' own, of the same spans. Each
way runs at the size that is fastest for it. What a piece gives depends there on what it is batched with: the GroupNorm
behind the first convolution averages over time, padding included. By how much is the last row.
"""

import io
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, arguments, release, show
from benchmarks.training import CACHE, Job, Watch, compare, learn, overhead, transformers_trainer
from mm.config import RunConfig
from mm.data.audio import decode_audio
from mm.data.layout import Layout
from mm.data.loader import PackedLoader
from mm.data.packed import PackedMedia
from mm.data.prepare import open_splits
from mm.settings import KindSection
from mm.train.distributed import resolve_device

RATE = 24_000
PIECES = 160
SECONDS = (2.0, 30.0)
SIZES = (1024,) * 8
CODE_DIM, TEMPERATURE = 64, 0.1
CONTEXT = 4096
ENCODER = {
    "conv_dim": [256] * 7,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"), 0.0),
}
"""The rest is MERT-v1-95M's."""
TRAIN = {
    "optimizer": {"kind": "adamw", "lr": 5e-4, "betas": [0.9, 0.98], "weight_decay": 0.01},
    "schedule": {"kind": "constant", "warmup": 0},
    "save_every": 1_000_000,
}


def main() -> None:
    options = arguments(__doc__, corpus="the music; by default corpora/music", device="cpu (default) or cuda")
    config = quick() if options.quick else full(Path(options.corpus or "corpora/music"))
    config["train"]["device"] = options.device or "cpu"
    repetitions, steps = (1, 2) if options.quick else (3, 4)
    sizes = {"ours": (1, 3), "padded": (1, 2, 4), "by length": (1, 4)}
    few = slice(-1, None) if options.quick else slice(None)
    candidates = {way: [Job(config, way, size) for size in some[few]] for way, some in sizes.items()}
    rows, runs = compare("pieces of mixed length", candidates, steps, repetitions)
    show("train_audio", [*rows, *overhead(runs), exactness(config)], options.json)


def full(corpus: Path) -> dict[str, Any]:
    shards = sorted(corpus.glob("*.tar"))
    if not shards:
        build = f"mm data build music --count 400 --out {corpus}"
        raise SystemExit(f"{corpus}: no corpus there; {build}, or --corpus FOLDER")
    path = CACHE / f"train_audio-{PIECES}.tar"
    if not path.exists():
        write_pieces(path, _clips(shards), PIECES, SECONDS)
    return config_of(path, ENCODER, CONTEXT, rows=3)


def quick() -> dict[str, Any]:
    """Noise, pieces of half a second to 3, and a model of a million parameters."""
    path = CACHE / "train_audio-quick.tar"
    if not path.exists():
        noise = np.random.default_rng(0).normal(0, 0.1, (40, RATE)).astype(np.float32)
        write_pieces(path, [*noise], 40, (0.5, 3.0))
    small = {**ENCODER, "conv_dim": [32] * 7, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2}
    return config_of(path, small, 512, rows=3)


def config_of(path: Path, encoder: dict[str, Any], context_length: int, rows: int) -> dict[str, Any]:
    return {
        "out": "unused",
        "data": {
            "sources": [{"kind": "audio", "name": "music", "path": str(path), "caption": ""}],
            "context_length": context_length,
            "workers": 0,
            "cache": str(CACHE),
        },
        "model": {
            "kind": "mert",
            "encoder": {"config": encoder},
            "teacher": {"kind": "benchmarks.train_audio:FreeCodesConfig"},
            "code_dim": CODE_DIM,
            "temperature": TEMPERATURE,
            "mixture": {"prob": 0},
            "weights": {"codes": 1, "cqt": 0, "feature_penalty": 0},
            "grad_mult": 1,
        },
        "train": {**TRAIN, "batch_tokens": rows * context_length},
    }


class FreeCodesConfig(KindSection):
    """Codes that cost nothing and mean nothing, always the same ones."""

    kind: str = "benchmarks.train_audio:FreeCodesConfig"

    def sizes(self) -> tuple[int, ...]:
        return SIZES

    def build(self) -> "FreeCodes":
        return FreeCodes()


class FreeCodes:
    """See `mm.models.teachers.Teacher`."""

    medium, sizes = "audio", SIZES

    def check(self, layout: Layout) -> None:
        """Of any recordings."""

    def codes(self, items: list[Tensor], lengths: list[int], layout: Layout) -> Tensor:
        """int64 [sum of lengths, 8]."""
        return free_codes(sum(lengths)).to(items[0].device)

    def describe(self) -> dict[str, Any]:
        return {"kind": "free"}


def free_codes(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(SIZES[0], (frames, len(SIZES)), generator=generator)


def _clips(shards: list[Path]) -> list[np.ndarray]:
    """All recordings of the shards, in a seeded order."""
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".flac"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(_decoded(file.read()))
    return [found[number] for number in np.random.default_rng(0).permutation(len(found))]


def _decoded(data: bytes) -> np.ndarray:
    import soundfile  # type: ignore[import-untyped]

    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == RATE
    return wave


def write_pieces(path: Path, clips: list[np.ndarray], count: int, seconds: tuple[float, float]) -> None:
    """A shard of so many pieces, their lengths log-uniform, of clips that follow one another."""
    import soundfile

    rng = np.random.default_rng(0)
    sound = np.concatenate(clips)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    at = 0
    with tarfile.open(partial, "w") as tar:
        for number in range(count):
            samples = int(RATE * math.exp(rng.uniform(*map(math.log, seconds))))
            piece = np.take(sound, range(at, at + samples), mode="wrap")
            at += samples
            file = io.BytesIO()
            soundfile.write(file, piece, RATE, format="FLAC", subtype="PCM_16")
            info = tarfile.TarInfo(f"{number:04d}.flac")
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
    partial.rename(path)


class Pieces(torch.utils.data.Dataset[dict[str, Any]]):
    """Those of the packs that ours would train on, shuffled within a step; decoded when they are asked for."""

    def __init__(self, config: RunConfig) -> None:
        layout = config.model.layout()
        dataset = open_splits(config.data, layout, config.seed)["train"]
        rows = config.train.batch_tokens // config.data.context_length
        mixture = PackedLoader(dataset, layout, rows, seed=config.seed, mixture=config.data.mixture).mixture
        mixture.start_step(0)
        rng = np.random.default_rng(config.seed)
        self.media: list[PackedMedia] = []
        for _ in range(config.train.max_steps or 0):
            draws = [mixture.next() for _ in range(rows)]
            step = [one for draw in draws if draw is not None for one in dataset.read(draw.pack).media]
            self.media += [step[number] for number in rng.permutation(len(step))]

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = self.media[index]
        wave = decode_audio(one.data, RATE, one.plan["samples"], "")
        return {"input_ids": wave, "codes": free_codes(one.length)}  # the name by which transformers finds lengths


def padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pieces filled up with zeros to the longest, and masks by transformers' own function."""
    from transformers.models.hubert.modeling_hubert import _compute_mask_indices

    waves = [torch.from_numpy(item["input_ids"]) for item in items]
    frames = [len(item["codes"]) for item in items]
    there = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    masked = _compute_mask_indices(tuple(there.shape), 0.8, 5, attention_mask=there.long(), min_masks=2)
    return {
        "values": nn.utils.rnn.pad_sequence(waves, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones(len(wave), dtype=torch.long) for wave in waves], True),
        "codes": nn.utils.rnn.pad_sequence([item["codes"] for item in items], batch_first=True),
        "masked": torch.from_numpy(masked) & there,
        "frames": torch.tensor(frames),
    }


class Padded(nn.Module):
    """`HubertModel` with MERT's heads over its last state, as transformers' trainer takes a model."""

    def __init__(self, encoder: dict[str, Any]) -> None:
        super().__init__()
        self.hubert = stock(encoder)
        self.project = nn.Linear(self.hubert.config.hidden_size, len(SIZES) * CODE_DIM)
        self.table = nn.Parameter(torch.randn(len(SIZES), SIZES[0], CODE_DIM))

    def forward(
        self, values: Tensor, attention_mask: Tensor, codes: Tensor, masked: Tensor, frames: Tensor
    ) -> dict[str, Tensor]:
        hidden = self.hubert(values, attention_mask=attention_mask, mask_time_indices=masked).last_hidden_state[masked]
        said = F.normalize(self.project(hidden).view(len(hidden), len(SIZES), CODE_DIM), dim=-1)
        logits = torch.einsum("nkd,kcd->nkc", said, F.normalize(self.table, dim=-1)) / TEMPERATURE
        return {"loss": len(SIZES) * F.cross_entropy(logits.flatten(0, 1), codes[masked].flatten())}


def stock(encoder: dict[str, Any]) -> Any:
    """transformers' `HubertModel` with its own attention. `mask_time_prob` only makes it have the learned vector."""
    from transformers import HubertConfig, HubertModel

    from mm.models.config import AudioEncoderConfig

    values = AudioEncoderConfig(config=encoder).values
    return HubertModel._from_config(HubertConfig(**values, mask_time_prob=0.8), attn_implementation="sdpa")


def measure_peer(job: Job, config: RunConfig, out: Path) -> dict[str, Any]:
    """See `benchmarks.training.measure`."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(config.seed)
    model, data = Padded(config.model.encoder.config), Pieces(config)
    hop = config.model.encoder.hop
    watch = Watch(resolve_device(config.train.device, 0), lambda inputs: inputs["frames"].sum() * hop / RATE)
    passes = len(data) / (config.train.max_steps or 1) / job.size
    return learn(transformers_trainer(job, config, out, model, data, padded, passes, watch), watch)


@torch.no_grad()
def exactness(config: dict[str, Any]) -> Row:
    """How far the last states of four pieces are from those that the stock model gives each alone, in one batch."""
    from mm.models.audio import AudioEncoder

    one = RunConfig.model_validate({**config, "seed": 0, "train": {**config["train"], "max_steps": 1}})
    torch.manual_seed(0)
    peer = stock(one.model.encoder.config).eval()
    ours = AudioEncoder(one.model.encoder).eval()
    ours.hubert.load_state_dict(peer.state_dict())
    data = Pieces(one)
    batch = padded([data[number] for number in range(4)])
    clips = [torch.from_numpy(data[number]["input_ids"]) for number in range(4)]
    alone = [peer(clip[None]).last_hidden_state[0] for clip in clips]
    packed = ours(clips).hidden.split([len(states) for states in alone])
    filled = peer(batch["values"], attention_mask=batch["attention_mask"]).last_hidden_state
    frames = batch["frames"].tolist()
    return {
        "case": "last states in a batch of 4 against each piece alone: largest difference of a piece, relative",
        "unit": "",
        "better": "lower",
        "ours": max(_distance(a, b) for a, b in zip(packed, alone, strict=True)),
        "peers": {
            f"{release('transformers')} (padded)": max(
                _distance(row[:n], b) for row, n, b in zip(filled, frames, alone, strict=True)
            )
        },
        "limit": 1e-4,
    }


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    from benchmarks import train_audio  # as that module, so that its teacher is found under one name

    train_audio.main()
