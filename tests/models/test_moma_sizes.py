"""The recipes of MoMa's table 1: parameters on the meta device, and FLOPs by the counter of `mm estimate`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.config import RunConfig, load_config
from mm.data.batch import MODALITIES, PackedBatch
from mm.models.system import System
from mm.train.config import TrainConfig
from mm.train.trace import trace_step

CONFIGS = Path(__file__).parents[2] / "configs/moma"
# A vocabulary that is in this repository; the embeddings are those of the recipe.
HERE = (
    "model.language.tokenizer=builtin:emoji", "model.code_token='<code:{}>'",
    "model.template={bos: <s>, eos: <|im_end|>, pad: <|endoftext|>, around_image: [<boi>, <eoi>]}",
)  # fmt: skip
# Parameters as table 1 has them; layers, width, heads; experts of text and pictures in all; mixture of depths.
TABLE: dict[str, tuple[float, int, int, int, int, bool]] = {
    "dense_90m": (90e6, 8, 512, 8, 1, False),
    "dense_435m": (435e6, 24, 1024, 16, 1, False),
    "dense_1.4b": (1.4e9, 24, 2048, 16, 1, False),
    "moe_90m": (210e6, 8, 512, 8, 8, False),
    "moe_435m": (1.9e9, 24, 1024, 16, 8, False),
    "moe_1.4b": (7.1e9, 24, 2048, 16, 8, False),
    "mod_90m": (110e6, 14, 512, 8, 1, True),
    "mod_435m": (635e6, 40, 1024, 16, 1, True),
    "mod_1.4b": (2.3e9, 32, 2304, 18, 1, True),
    "mode_90m": (317e6, 14, 512, 8, 8, True),
    "mode_435m": (3e9, 40, 1024, 16, 8, True),
    "mode_1.4b": (12e9, 32, 2304, 18, 8, True),
}
VOCABULARY = 65_536


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", (*HERE, *overrides)).stage_runs()[0]


def on_meta(config: RunConfig) -> System:
    with torch.device("meta"):
        system: System = config.model.build(weights=False)
    return system


def inner(width: int) -> int:
    """8/3 of the width, to a multiple of 8."""
    return 8 * round(width / 3)


@pytest.mark.parametrize("size", ["90m", "435m", "1.4b"])
@pytest.mark.parametrize("kinds", [("dense", "moe"), ("mod", "mode")], ids=" ".join)
def test_parameters_are_those_of_the_table(kinds: tuple[str, str], size: str) -> None:
    """Both models of a shape are grown from one, since probing its attention takes the time."""
    dense: Any = on_meta(recipe(f"{kinds[0]}_{size}", "model.depths=null"))
    for kind in kinds:
        published, layers, width, heads, experts, depths = TABLE[f"{kind}_{size}"]
        config = recipe(f"{kind}_{size}")
        assert config.model.language == dense.config.language
        system = copy.deepcopy(dense)
        with torch.device("meta"):
            system.sparsify(config.model, ("image",))
        found = sum(p.numel() for p in system.parameters())
        assert found == pytest.approx(published, rel=0.06)
        routers = (experts if experts > 1 else 0) * width * layers + depths * width * layers // 2
        # Per layer: attention, experts, two norms, scales and shifts of queries and keys.
        each = 4 * width**2 + 3 * experts * width * inner(width) + 2 * width + 4 * width
        assert found == 2 * VOCABULARY * width + layers * each + width + routers
        about = config.model.language.config
        assert (about["num_attention_heads"], about["swin_norm"]) == (heads, True)


def test_training_is_as_published() -> None:
    for name in TABLE:
        train = recipe(name).train
        assert train.max_steps is not None
        assert train.max_steps * train.batch_tokens == pytest.approx(1.0066e12, rel=1e-4)
        assert (train.optimizer.lr, train.optimizer.betas, train.optimizer.eps) == (1e-4, (0.9, 0.95), 1e-5)
        rates = [train.optimizer.lr * train.schedule.factor(step, train.max_steps) for step in (3999, train.max_steps)]
        assert rates == pytest.approx([1e-4, 1e-6])


N, LEARNED = 128, 127


def tokens() -> PackedBatch:
    """A row of one sample, half text and half picture."""
    ids = torch.zeros(1, N, dtype=torch.int64)
    labels = ids.clone()
    labels[:, LEARNED:] = -100
    modality = torch.full((1, N), MODALITIES["text"], dtype=torch.uint8)
    modality[:, N // 2 :] = MODALITIES["image"]
    return PackedBatch(ids, labels, torch.ones(1, N, dtype=torch.int32), torch.arange(N)[None], modality, {}, [["a"]])


def of_two_layers(name: str) -> dict[str, int]:
    """FLOPs of two layers of a recipe, forward and backward: what four take more than two."""
    found = []
    for layers in (4, 2):
        config = recipe(name, f"model.language.config.num_hidden_layers={layers}")
        found.append(trace_step(on_meta(config), tokens(), TrainConfig()).flops)
    return {phase: found[0][phase] - found[1][phase] for phase in found[0]}


def closed_form(name: str) -> dict[str, float]:
    """Forward FLOPs of two layers: 2 a multiply and add; of `attention` the squares alone, `mlps`, projections and all
    else that is `linear`, `routers`."""
    _, _, width, _, experts, depths = TABLE[name]
    shares = (0.25, 1.0) if depths else (1.0, 1.0)
    rows = [N * share for share in shares]
    return {
        "linear": sum(2 * n * (4 * width**2 + 3 * width * inner(width)) for n in rows),
        "attention": sum(4 * n**2 * width for n in rows),
        "routers": sum(2 * n * width * experts for n in rows if experts > 1) + depths * 2 * N * width,
    }


@pytest.mark.parametrize("name", ["dense_90m", "moe_90m", "mod_90m", "mode_90m"])
def test_flops_are_counted_to_the_last(name: str) -> None:
    flops = of_two_layers(name)
    assert flops["forward"] == sum(closed_form(name).values())
    # Twice as much backward, but for attention, whose scores the kernel makes again.
    assert flops["backward"] == pytest.approx(2 * flops["forward"], rel=0.05)


def test_flops_match_the_dense_model_of_the_size() -> None:
    """The products of tokens with weights, as the table is accounted: experts take as many as the MLP that they stand
    for, layers that most tokens pass by 1.04 to 1.09 times those of the dense model. Routers come to it."""
    for size in ("90m", "435m", "1.4b"):
        per_token = {}
        for kind in ("dense", "moe", "mod", "mode"):
            counts = closed_form(f"{kind}_{size}")
            per_token[kind] = {what: count * TABLE[f"{kind}_{size}"][1] / 2 / N for what, count in counts.items()}
        linear = {kind: counts["linear"] / per_token["dense"]["linear"] for kind, counts in per_token.items()}
        assert linear["moe"] == 1 and linear["mode"] == linear["mod"]
        assert 1.04 < linear["mod"] < 1.095
        for kind, counts in per_token.items():
            assert counts["routers"] < 0.002 * counts["linear"], (size, kind)
