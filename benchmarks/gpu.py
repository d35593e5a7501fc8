"""Training on one GPU in bfloat16 with torch.compile: loss-bearing tokens a second and MFU, ours and the peers'.

A Qwen2 of 1.5 billion parameters, alone and behind a frozen SigLIP so400m (144 positions a picture), random weights, in
rows of 4,096 tokens. Text and pictures are those of `benchmarks.train_lm` and `benchmarks.train_vlm`. Every way runs at
the micro-batch, and packed peers with the attention (FlashAttention 2 where it is installed, else flex; SDPA), that are
fastest for it; peers that do not gain from torch.compile run without.

MFU counts what the documents need, padding left out: 6 FLOPs for a weight of the language model's layers and a token,
and for one of the head and a loss-bearing token; 6 n^2 for a document of n tokens and a channel of attention, being
causal; for towers what FlopCounterMode counts in a forward pass, three times that where they learn. It is over the
dense bfloat16 peak of `mm.train.accelerators`.

`--quick --device cpu` tries all of it out on tiny shapes, in float32 and not compiled.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_lm, train_vlm
from benchmarks.harness import Row, arguments, show
from benchmarks.training import Job, compare, documents
from mm.config import RunConfig
from mm.data.batch import IGNORE
from mm.train import flops  # noqa: F401  registers formulas that FlopCounterMode lacks
from mm.train.accelerators import peak_flops

QWEN = {  # Qwen2.5-1.5B's config.json
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SIGLIP = {"name": "timm/vit_so400m_patch14_siglip_384", "pretrained": False, "image_size": 384, "block": -2}


def main() -> None:
    options = arguments(
        __doc__, device="cuda (default) or cpu", corpora="the folder of debian-text and gimp-help; by default corpora"
    )
    device = options.device or "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --quick --device cpu tries the benchmark out without one")
    corpora = Path(options.corpora or "corpora")
    rows: list[Row] = []
    for what, config in cases(corpora, device, options.quick).items():
        rows += case(what, config, options.quick)
    show("gpu", rows, options.json)


def cases(corpora: Path, device: str, quick: bool) -> dict[str, dict[str, Any]]:
    lm = train_lm.quick() if quick else train_lm.full(corpora / "debian-text")
    vlm = train_vlm.quick() if quick else train_vlm.full(corpora / "gimp-help")
    if not quick:
        lm["model"]["language"]["config"] = vlm["model"]["language"]["config"] = QWEN
        vlm["model"] |= {"vision": SIGLIP, "connector": {"kind": "pool_mlp", "tokens": 144}}
        vlm["data"] |= {"context_length": 4096, "budgets": {"image": 28}, "workers": 8}
    for config in (lm, vlm):
        config["train"] |= {"device": device, "compile": device == "cuda"}
        config["train"] |= {"precision": "bf16"} if device == "cuda" else {}
        config["train"] |= {} if quick else {"batch_tokens": 65_536}
    vlm["train"]["params"] = [{"match": "vision.*", "freeze": True}]
    return {"language model": lm, "vision-language model": vlm}


def case(what: str, config: dict[str, Any], quick: bool) -> list[Row]:
    variants = [config]
    if config["train"]["compile"]:
        variants.append({**config, "train": {**config["train"], "compile": False}})
    flattens = ["sdpa"] if quick else [fast_attention(), "sdpa"]
    sizes = (2,) if quick else (1, 2, 4, 8)
    candidates = {"ours": [Job(config, "ours", size) for size in sizes[:3]]}
    for way in ("padded", "by length"):
        candidates[way] = [Job(one, way, size) for one in variants for size in sizes]
    for way in ("flattened", "trl" if config["model"]["kind"] == "text_lm" else "rows"):
        some = sizes if way == "flattened" else sizes[:3]
        candidates[way] = [
            Job(one, way, size, attention) for one in variants for attention in flattens for size in some
        ]
    rows, _ = compare(what, candidates, 2 if quick else 10, 1 if quick else 3)
    return [mfu(config, rows[0]), *rows]


def fast_attention() -> str:
    """The best that transformers has here for documents in one row."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "flex_attention"


def mfu(config: dict[str, Any], speeds: Row) -> Row:
    """Of the rates in a row."""
    peak = peak_flops(torch.device(config["train"]["device"]), "bf16")
    cost = flops_of_a_loss_token(config)

    def of(rate: Any) -> Any:
        if isinstance(rate, str):
            return rate
        return 100 * rate * cost / peak if peak else f"{rate * cost / 1e12:.3g} TFLOP/s; the device's peak is not known"

    peers = {name: of(rate) for name, rate in speeds["peers"].items()}
    return {**speeds, "unit": "% MFU", "ours": of(speeds["ours"]), "peers": peers, "limit": 50.0}


def flops_of_a_loss_token(config: dict[str, Any]) -> float:
    """All operations that documents need, over the tokens that are learned; see the module."""
    run = RunConfig.model_validate({**config, "train": {**config["train"], "max_steps": 4}})
    with torch.device("meta"):
        system = run.model.build(weights=False)
    language = system.language
    weights = sum(p.numel() for p in language.base_model.layers.parameters())
    heads = language.config.num_attention_heads
    channels = getattr(language.config, "head_dim", None) or language.config.hidden_size // heads
    attention = language.config.num_hidden_layers * heads * channels
    head = language.get_output_embeddings().weight.numel()
    a_picture = tower_flops(system, run) if hasattr(system, "vision") else 0
    total = learned = 0.0
    for one in documents(run, whole=False)[0]:
        n, targets = len(one.tokens), int((one.labels != IGNORE).sum())
        total += 6 * weights * n + 6 * attention * n**2 + 6 * head * targets + a_picture * len(one.pictures)
        learned += targets
    return total / learned


def tower_flops(system: Any, run: RunConfig) -> int:
    """Of a picture: the tower forwards, backwards too if it learns, and the connector both ways."""
    size = run.model.vision.image_size
    frozen = any(rule.freeze and rule.match == "vision.*" for rule in run.train.params)
    with torch.device("meta"), torch.no_grad():
        with FlopCounterMode(display=False) as tower:
            features = system.vision.of_squares(torch.empty(1, 3, size, size))[0]
        with FlopCounterMode(display=False) as connector:
            system.connector(system.connector.pool(features, [(run.model.vision.side,) * 2]))
    return int(tower.get_total_flops() * (1 if frozen else 3) + 3 * connector.get_total_flops())


if __name__ == "__main__":
    main()
