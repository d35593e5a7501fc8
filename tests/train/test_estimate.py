"""The estimate against measurement: parameters of the built model, torch's counter over real passes, torch's profiler
over a real step, and settings that are said to make a run fit."""

import contextlib
import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import HubertConfig, HubertModel

from mm.cli import main
from mm.config import RunConfig, load_config
from mm.data.batch import PackedBatch, collate
from mm.data.config import DataConfig
from mm.data.layout import Layout, Template
from mm.data.prepare import open_splits
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError
from mm.models.audio import AudioEncoder
from mm.models.config import AudioEncoderConfig, LayoutConfig
from mm.models.system import System
from mm.models.systems.mert.model import Mert
from mm.models.teachers.config import FORMAT, FORMAT_VERSION
from mm.train.blocks import checkpoint_activations, find_blocks
from mm.train.config import TrainConfig
from mm.train.estimate import Model, _not_counted, estimate, on_gpu, show, usable
from mm.train.flops import register
from mm.train.packs import Packs, fullest_packs
from mm.train.params import freeze, parameter_groups

WIDE = "model.language.config={hidden_size: 128, intermediate_size: 344, num_hidden_layers: 4}"
FROZEN = "train.params=[{match: 'vision.*', freeze: true}]"
CONFIGS = {
    "vision and language": (WIDE,),
    "accumulated": (WIDE, "train.micro_batch=1"),
    "frozen tower, recomputed": (WIDE, FROZEN, "train.activation_checkpointing.mode=full"),
    "selectively recomputed": (WIDE, "train.activation_checkpointing.mode=selective"),
    "running attention, bfloat16": (WIDE, "data.isolate_segments=false", "train.precision=bf16"),
}
TEXT = {
    "data": {"sources": [{"kind": "text", "path": "*.md"}], "context_length": 256, "too_long": "split", "workers": 0},
    "model": {
        "kind": "text_lm",
        "language": {
            "tokenizer": "builtin:emoji",
            "config": {
                "model_type": "llama",
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        },
    },
    "train": {"max_steps": 4, "batch_tokens": 1024, "micro_batch": 2, "device": "cpu"},
}
MUSIC: dict[str, Any] = {
    "data": {
        "sources": [{"kind": "recordings", "path": "*.flac", "min_seconds": 0}],
        "context_length": 256,
        "workers": 0,
    },
    "model": {
        "kind": "mert",
        "encoder": {
            "config": {
                "conv_dim": [32] * 7,
                "hidden_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4,
                **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"), 0.0),
            }
        },
        "mixture": {"prob": 0},
    },
    "train": {"max_steps": 4, "batch_tokens": 1024, "micro_batch": 2, "device": "cpu"},
}
NAMES = ["text", "music", *CONFIGS]


@pytest.fixture
def named(tiny_config: Callable[..., RunConfig], tmp_path: Path, cache: Path) -> Callable[[str], RunConfig]:
    """A config by its name above, packed."""

    def make(name: str) -> RunConfig:
        if name == "music":
            noise = np.random.default_rng(0).uniform(-0.1, 0.1, (12, 48_000))
            for number, wave in enumerate(noise):
                soundfile.write(tmp_path / f"{number}.flac", wave[: 12_000 + 3_000 * number], 24_000)
            (tmp_path / "music.yaml").write_text(yaml.safe_dump(MUSIC))
            teacher = f"{{kind: kmeans, path: {centroids(tmp_path)}}}"
            config = load_config(
                tmp_path / "music.yaml",
                (f"data.cache={cache}", f"data.sources.0.path={tmp_path}/*.flac", f"model.teacher={teacher}"),
            )
        elif name != "text":
            config = tiny_config("data.validation=[]", "data.test=[]", *CONFIGS[name])
        else:
            words = np.random.default_rng(0).choice(["a", "few", "plain", "words.\n\n"], 6000)
            (tmp_path / "text.md").write_text(" ".join(words))
            (tmp_path / "text.yaml").write_text(yaml.safe_dump(TEXT))
            config = load_config(
                tmp_path / "text.yaml", (f"data.cache={cache}", f"data.sources.0.path={tmp_path}/*.md")
            )
        open_splits(config.data, config.model.layout(), config.seed)
        return config

    return make


def centroids(folder: Path) -> Path:
    """A k-means teacher's file without centroids: all that may be asked of it is how many there are."""
    about = {"format_version": FORMAT_VERSION, "codebooks": [{"clusters": 24}, {"clusters": 16}]}
    path = folder / "kmeans.safetensors"
    save_file({}, path, {FORMAT: json.dumps(about)})
    return path


def with_codes(batch: PackedBatch, model: Model) -> PackedBatch:
    """The batch with what a teacher would say, where there is one."""
    if not model.packs.codebooks:
        return batch
    audio = batch.media["audio"]
    codes = torch.zeros(audio.positions, model.packs.codebooks, dtype=torch.int32)
    return replace(batch, media={"audio": replace(audio, codes=codes)})


def kernels(system: System) -> list[Tensor]:
    """Of the constant-Q transform, where there is one: made once, and neither parameters nor buffers."""
    if not isinstance(system, Mert):
        return []
    bands = system._cqt._on(torch.device("cpu"))
    return [one for band in bands for one in (band.bins, band.rows, band.response, band.turn) if one is not None]


def traced(config: RunConfig) -> Model:
    layout = config.model.layout()
    with torch.device("meta"):
        system = config.model.build(weights=False)
    return Model(system, Packs.of(config, layout), config.train.batch_tokens // config.data.context_length)


def real(config: RunConfig) -> System:
    torch.manual_seed(0)
    system: System = config.model.build(weights=False)
    freeze(system, config.train.params)
    checkpoint_activations(system, config.train.activation_checkpointing, find_blocks(system, config.train.blocks))
    return system.train()


def passes(system: System, batch: PackedBatch, train: TrainConfig) -> None:
    with torch.autocast("cpu", torch.bfloat16) if train.precision == "bf16" else contextlib.nullcontext():
        output = system(batch)
    torch.stack(list(output.losses.values())).sum().backward()


def bytes_of(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak_allocated(function: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had given out during a call, over what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_flops_and_peak_are_those_of_a_real_step(name: str, named: Callable[[str], RunConfig]) -> None:
    config = named(name)
    train, model = config.train, traced(config)
    trace, packs = model._worst(train, 1)
    system = real(config)
    assert model.parameters(train) == {
        part: {
            "total": sum(p.numel() for p in module.parameters()),
            "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        for part, module in system.named_children()
    }

    layout = config.model.layout()
    batch = collate(packs, layout, config.data.context_length, config.data.isolate_segments)
    batch = with_codes(batch, model)
    optimizer = train.optimizer.build(parameter_groups(system, train.params, 0.0))
    trained = [p for p in system.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as counter:
        passes(system, batch, train)
    assert sum(trace.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (trace.flops["recompute"] > 0) == (train.activation_checkpointing.mode == "full")

    optimizer.step()  # makes its state
    if model.rows == len(packs):
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        passes(system, batch, train)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    state = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    grads = [p.grad for p in trained if p.grad is not None]
    media = [one.values for one in batch.media.values()]
    before = bytes_of([*system.parameters(), *system.buffers(), *state, *grads, *media, *kernels(system)])
    measured = before + peak_allocated(step)
    assert on_gpu(model.memory(train, 1)) == pytest.approx(measured, rel=0.15)
    assert trace.peak["optimizer"] == bytes_of(state)


def test_flops_of_a_step_are_those_of_the_mean_pack(named: Callable[[str], RunConfig]) -> None:
    """Every pack of the set run for real, on its own."""
    config = named("vision and language")
    layout, model, system = config.model.layout(), traced(config), real(config)
    dataset = open_splits(config.data, layout, config.seed)["train"]
    with FlopCounterMode(display=False) as counter:
        for number in range(len(dataset)):
            passes(system, collate([dataset.read(number)], layout, config.data.context_length), config.train)
    mean = counter.get_total_flops() / len(dataset)
    assert model.flops(config.train, 1)["total"] / model.rows == pytest.approx(mean, rel=0.01)
    # A step's tokens are the means of the index: natural mixtures visit every pack once an epoch.
    tokens, index = model.packs.tokens, dataset.index.to_pydict()
    assert tokens["loss"] == pytest.approx(np.mean(index["loss_tokens"]))
    assert tokens["image"] == pytest.approx(np.mean(index["image_tokens"]))
    assert tokens["text"] + tokens["image"] + tokens["padding"] == pytest.approx(config.data.context_length)


def test_an_unpacked_set_is_bounded_by_its_budgets(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """What nothing is known of takes at least what the packed set takes."""
    packed = tiny_config(WIDE)
    open_splits(packed.data, packed.model.layout(), packed.seed)
    unpacked = load_config(
        tmp_path / "tiny.yaml", (WIDE, f"data.cache={tmp_path}", "data.sources.0.path=/nowhere/0.tar")
    )
    found, bound = estimate(packed), estimate(unpacked)
    assert found["packs"]["from"].startswith(str(packed.data.cache)) and bound["packs"]["from"] == "budgets"
    assert bound["flops_per_step"]["total"] >= found["flops_per_step"]["total"]
    assert bound["memory"]["activations"] >= 0.95 * found["memory"]["activations"]
    assert bound["packs"]["worst"]["image_items"] == 2 * unpacked.data.budgets["image"]
    assert found["parameters"] == bound["parameters"] and found["steps"] == bound["steps"] == 8
    epochs = tiny_config(WIDE, "train.max_steps=null", "train.epochs=2")
    packs = len(open_splits(epochs.data, epochs.model.layout(), epochs.seed)["train"]) / 2  # of two visits
    assert estimate(epochs)["steps"] == np.ceil(2 * packs / 4)


@pytest.mark.parametrize(
    "budgets", [{}, {"image": 3, "audio_cost": 20, "video": 1}, {"image_cost": 50, "video_tokens": 40, "audio": 1}]
)
def test_the_fullest_pack_obeys_the_budgets(budgets: dict[str, int]) -> None:
    layout: Layout = LayoutConfig.model_validate(
        {
            "kind": "layout",
            "tokenizer": "builtin:emoji",
            "image": {"tokens": 4, "cost": 16},
            "audio": {"hop": 100},
            "video": {"tokens": 2, "cost": 8, "frames": 4},
        }
    ).layout()
    data = DataConfig.model_validate({"context_length": 128, "budgets": budgets})
    (pack,) = fullest_packs(layout, data)
    places = [at for one in pack.media for at in range(one.position, one.position + one.length)]
    assert len(pack.tokens) == 128 and len(places) == len({*places}) and max(places) < 127
    totals = {
        name: sum({"": 1, "_tokens": m.length, "_cost": m.cost}[name.removeprefix(m.kind)] for m in pack.media
                  if name.startswith(m.kind))
        for name in budgets
    }  # fmt: skip
    assert pack.media and all(totals[name] <= most for name, most in budgets.items())
    batch = Packs(layout, data).batch([pack, pack])
    for one in batch.media.values():
        assert len(one.values) == one.offsets[-1] == one.shapes.prod(1).sum()


@pytest.mark.parametrize("budgets", [{}, {"audio": 2}, {"audio_tokens": 100}, {"audio_cost": 70, "audio": 9}])
@pytest.mark.parametrize("seconds", [None, 1.0])
def test_rows_of_recordings_are_as_full_as_may_be(budgets: dict[str, int], seconds: float | None) -> None:
    """Each is a segment of its own, as long as the source cuts them, and the model takes as many frames of it."""
    encoder = AudioEncoderConfig(config=MUSIC["model"]["encoder"]["config"])
    layout = Layout(Tokenizer.load("builtin:none"), Template(None, None), 0, audio=encoder.layout())
    source = {"kind": "recordings", "path": "x", **({"seconds": seconds} if seconds else {})}
    data = DataConfig.model_validate({"sources": [source], "context_length": 256, "budgets": budgets})
    (pack,) = fullest_packs(layout, data)
    lengths = [one.length for one in pack.media]
    frames = encoder.frames(24_000) if seconds else 256
    most = min(
        256, budgets.get("audio_tokens", 256), budgets.get("audio_cost", 256), frames * budgets.get("audio", 256)
    )
    assert sum(lengths) == len(pack.tokens) == most and max(lengths) <= frames
    assert len(lengths) <= budgets.get("audio", len(lengths)) and lengths[:-1] == [frames] * (len(lengths) - 1)
    assert [(s.start, s.length) for s in pack.segments] == [(m.position, m.length) for m in pack.media]
    assert [encoder.frames(one.plan["samples"]) for one in pack.media] == lengths
    audio = Packs(layout, data, codebooks=3).batch([pack, pack]).media["audio"]
    assert audio.codes is not None and audio.codes.shape == (audio.positions, 3) == (2 * most, 3)
    assert len(audio.values) == audio.offsets[-1] == audio.shapes.sum()


def large(tmp_path: Path, layers: tuple[int, int], *overrides: str) -> RunConfig:
    """SigLIP so400m and Qwen2.5-1.5B with so many layers; nothing is packed."""
    language = {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": layers[1], "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }  # fmt: skip
    values = {
        "data": {"sources": [{"kind": "captions", "path": "/nowhere/{00000..00851}.tar"}], "budgets": {"image": 28}},
        "model": {
            "kind": "open_qwen2vl",
            "vision": {
                "name": "timm/vit_so400m_patch14_siglip_384",
                "pretrained": False,
                "options": {"depth": layers[0]},
            },
            "language": {"tokenizer": "builtin:emoji", "config": language},
        },
        "train": {"max_steps": 1000, "batch_tokens": "1M", "precision": "bf16"},
    }
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(values))
    return load_config(tmp_path / "large.yaml", overrides)


def test_a_full_size_model_takes_no_memory(tmp_path: Path) -> None:
    """Open-Qwen2VL's 2B parameters, 8 GB of weights: the same numbers come out, and the weights are never there."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = large(tmp_path, (27, 28), FROZEN)
    model = traced(config)
    parameters = model.parameters(config.train)
    # https://huggingface.co/Qwen/Qwen2.5-1.5B
    assert parameters["language"] == {"total": 1_543_714_304, "trained": 1_543_714_304}
    assert parameters["vision"]["trained"] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB; the probe of packed attention
    # Two FLOPs for a weight and token forward, without attention: 28 pictures of 729 patches, 4096 positions.
    flops = {name: n / model.rows for name, n in model.flops(config.train, 1).items()}
    blocks = 26 * (4 * 1152**2 + 2 * 1152 * 4304) * 729 * 28 + 28 * (1.31e9 / 28) * 4096
    assert 1.0 < flops["forward"] / (2 * blocks) < 1.25
    memory = model.memory(config.train, 1)
    assert memory["weights"] == pytest.approx(4 * sum(one["total"] for one in parameters.values()), rel=1e-4)
    assert memory["optimizer"] == pytest.approx(8 * sum(one["trained"] for one in parameters.values()), rel=1e-4)


def test_what_is_said_to_fit_fits(tmp_path: Path) -> None:
    """Each remedy, given as settings, is a run that stays within the memory of the card."""
    sizes = ("train.micro_batch=32", "train.batch_tokens=262144")
    config = large(tmp_path, (2, 2), *sizes)
    found = estimate(config)
    small = next(gpu for gpu in found["gpus"] if gpu["name"] == "RTX 4090")
    assert not small["fits"] and small["would_fit"]
    assert next(gpu for gpu in found["gpus"] if gpu["name"] == "H200")["fits"]
    model = traced(config)
    for remedy in small["would_fit"]:
        settings, _, gpus = remedy.removesuffix(" GPUs").partition(" on ")
        changed = large(tmp_path, (2, 2), *sizes, *re.split(r" (?=train\.)", settings))
        assert on_gpu(model.memory(changed.train, int(gpus or 1))) <= usable(23)


def test_sharding_divides_what_is_kept(tiny_config: Callable[..., RunConfig]) -> None:
    """Of weights, gradients and optimizer state a rank has its part, under whatever engine."""
    config = tiny_config(WIDE, "train.micro_batch=1", "train.batch_tokens=1024", "train.ema=0.9")
    model = traced(config)
    whole = model.memory(config.train, 1)

    def sharded(ranks: int, **engine: Any) -> dict[str, float]:
        return model.memory(TrainConfig.model_validate({**config.train.model_dump(), "engine": engine}), ranks)

    for kind in ("weights", "gradients", "optimizer", "averages"):
        assert sharded(4, kind="fsdp")[kind] == whole[kind] / 4
        assert sharded(4, kind="fsdp", shard_size=2)[kind] == whole[kind] / 2
    assert "weights" not in (offloaded := sharded(4, kind="fsdp", cpu_offload=True)) and offloaded["host"] > 0
    zero = [sharded(4, kind="deepspeed", stage=stage) for stage in range(4)]
    assert zero[0]["optimizer"] == whole["optimizer"] and zero[0]["weights"] == whole["weights"]
    totals = [one["optimizer"] + one["gradients"] + one["weights"] for one in zero]
    assert totals == sorted(totals, reverse=True)


def test_what_optimizers_do_beside_a_step_is_counted_or_said(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config()
    model = traced(config)

    def of(**optimizer: Any) -> tuple[dict[str, int], dict[str, float]]:
        train = TrainConfig.model_validate({**config.train.model_dump(), "optimizer": optimizer})
        return model.flops(train, 1), model.memory(train, 1)

    plain, memory = of(kind="sophia", every=4, share=0.5)
    passes = plain["forward"] + plain["backward"]
    assert plain["estimates"] == pytest.approx(passes / 8, abs=1) and plain["total"] == passes + plain["estimates"]
    twice, more = of(kind="sophia", every=4, share=0.5, estimator="hutchinson")
    assert twice["estimates"] == pytest.approx(passes / 4, abs=1)
    trained = sum(part["trained"] for part in model.parameters(config.train).values())
    assert more == {**memory, "estimates": 8 * trained}
    for kind in ("muon", "soap"):
        settings = f"train.optimizer={{kind: {kind}}}"
        assert not any("owners" in one for one in _not_counted(tiny_config(settings), model.packs))
        said = _not_counted(tiny_config(settings, "train.engine={kind: fsdp}"), model.packs)
        assert any("matrices on their way to their owners" in one for one in said)


def test_experts_that_are_divided_over_ranks_are_not_gathered(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(
        "model.experts={text: 4, image: 1}", "data.test=[]", "train.micro_batch=1", "train.batch_tokens=1024"
    )
    model = traced(config)

    def sharded(**engine: Any) -> dict[str, float]:
        values = {**config.train.model_dump(), "engine": {"kind": "fsdp", **engine}}
        return model.memory(TrainConfig.model_validate(values), 4)

    gathered, divided = sharded(), sharded(expert_parallel=2)
    half = 4 * (2 * 64 * 32 + 32 * 64) / 2
    # Of the two layers at work the weights, of one the gradients too, before and after they are summed.
    assert gathered["copies"] - divided["copies"] == (4 + 4 + 4 + 4) * half
    assert all(gathered[kind] == divided[kind] for kind in ("weights", "gradients", "optimizer"))
    with pytest.raises(ConfigError, match="expert_parallel 3 does not divide the 4 processes"):
        estimate(tiny_config("train.engine={kind: fsdp, expert_parallel: 3}"), 4)


def test_formulas_agree_with_the_products_they_stand_for() -> None:
    register()
    q, k, v = (torch.randn(2, heads, 24, 16, requires_grad=True) for heads in (4, 4, 4))

    def counted(function: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return int(counter.get_total_flops())

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    forward = counted(lambda: attend(SDPBackend.FLASH_ATTENTION))
    assert forward == counted(lambda: attend(SDPBackend.MATH)) == 2 * 2 * 2 * 4 * 24 * 24 * 16
    # The kernel makes the scores again: five products where the forward pass has two.
    assert counted(lambda: attend(SDPBackend.FLASH_ATTENTION).sum().backward()) == forward + 5 * forward // 2

    # Of a grouped convolution, each group is a convolution of its own; backwards, too.
    x, weight = torch.randn(2, 12, 50, requires_grad=True), torch.randn(16, 3, 7, requires_grad=True)
    grouped = counted(lambda: F.conv1d(x, weight, stride=2, groups=4).sum().backward())
    parts = list(zip(x.chunk(4, 1), weight.chunk(4), strict=True))
    assert grouped == counted(lambda: sum(F.conv1d(*part, stride=2).sum() for part in parts).backward())  # type: ignore[union-attr]
    assert grouped == 3 * 2 * 2 * 22 * 16 * 3 * 7

    ends = torch.tensor([8, 24, 32], dtype=torch.int32)
    a, b, c = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((32, 16), (3, 16, 48), (32, 48)))
    assert counted(lambda: F.grouped_mm(a, b, offs=ends)) == counted(
        lambda: [x @ b[0] for x in (a[:8], a[8:24], a[24:])]
    )
    assert counted(lambda: F.grouped_mm(a.T, c, offs=ends)) == counted(lambda: a.T @ c)
    assert counted(lambda: F.grouped_mm(a.view(2, 16, 16), c.view(2, 16, 48))) == counted(
        lambda: torch.bmm(a.view(2, 16, 16), c.view(2, 16, 48))
    )


def test_an_encoder_of_clips_takes_what_stock_hubert_takes_for_each() -> None:
    """And both what the formula says: 2 for every weight and place, and for scores and their products with values."""
    values = {**MUSIC["model"]["encoder"]["config"], "hidden_size": 96, "num_conv_pos_embedding_groups": 8}
    config = AudioEncoderConfig(config=values)
    register()
    encoder = AudioEncoder(config).eval()
    stock = HubertModel._from_config(HubertConfig(**config.values), attn_implementation="sdpa").eval()
    clips = [torch.randn(samples) for samples in (24_000, 12_345, 48_000)]

    def counted(function: Callable[[], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            function().sum().backward()
        return int(counter.get_total_flops())

    def by_hand(samples: int) -> int:
        """Of a forward pass."""
        channels, total = 1, 0
        for width, kernel, stride in zip(
            values["conv_dim"], (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True
        ):
            samples = (samples - kernel) // stride + 1
            total += samples * kernel * channels * width
            channels = width
        width, inner = values["hidden_size"], values["intermediate_size"]
        a_frame = channels * width + 16 * width * width // 8 + 3 * (4 * width**2 + 2 * width * inner)
        # With an even kernel the positional convolution gives one frame more, which is cut off.
        return 2 * (total + samples * a_frame + 16 * width * width // 8 + 3 * 2 * samples**2 * width)

    alone = [counted(lambda clip=clip: stock(clip[None]).last_hidden_state) for clip in clips]  # type: ignore[misc]
    # Backwards twice as much, without the first convolution's input; attention makes its scores once more.
    for clip, found in zip(clips, alone, strict=True):
        frames, first = config.frames(len(clip)), (len(clip) - 10) // 5 + 1
        scores = 3 * 2 * 2 * frames**2 * values["hidden_size"]
        assert found == 3 * by_hand(len(clip)) - 2 * first * 10 * 32 + scores // 2
    together = counted(lambda: encoder(clips).hidden)
    assert sum(alone) < together < 1.05 * sum(alone)  # seams between clips


def test_the_recipe_for_music_is_estimated_before_anything_is_packed() -> None:
    found = estimate(load_config(Path(__file__).parents[2] / "configs/mert/95m.yaml"))
    encoder = found["parameters"]["encoder"]
    assert encoder["total"] == encoder["trained"] == 94_371_712  # of the released file
    assert found["packs"]["from"] == "budgets" and found["steps"] == 400_000
    rows, tokens = found["rows_per_step"], found["tokens_per_step"]
    assert found["audio_seconds_per_step"] == pytest.approx(tokens["audio"] / 75) and tokens["text"] == 0
    assert 0.98 * rows * 6000 < tokens["audio"] <= rows * 6000
    # A student reads codes that are computed once; where it does not, the teacher is said to come on top.
    assert found["not_counted"] == [] and found["gpus"][0]["hours"] > 0
    text = Console(width=200)
    with text.capture() as captured:
        text.print(show(found))
    hours = 400_000 * found["audio_seconds_per_step"] / 3600
    assert "75 positions a second" in captured.get() and f"{hours:,.1f} h of sound" in captured.get()


def test_the_command(tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tiny())
    assert main(["estimate", config, "--json", "--ranks", "2", "train.engine.kind=fsdp", "train.precision=bf16"]) == 0
    (stage,) = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert stage["ranks"] == 2 and stage["memory"]["total"] == sum(stage["memory"].values()) - stage["memory"]["total"]
    hours = {gpu["name"]: gpu["hours"] for gpu in stage["gpus"]}
    total = stage["steps"] * stage["flops_per_step"]["total"]
    assert hours["A100 80GB"] == pytest.approx(total / (2 * 312e12 * 0.4) / 3600)
    text = Console(width=200)
    with text.capture() as captured:
        text.print(show(stage))
    assert all(part in captured.get() for part in ("RTX 4090", "activations", "language", "8: "))
    assert main(["estimate", config, "--ranks", "2"]) == 2
    assert "single is for one process" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not divide"):
        estimate(load_config(config, ("train.engine={kind: fsdp, shard_size: 2}",)), 3)
