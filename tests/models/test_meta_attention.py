"""Meta-attention against a dense mask over whole layers; packed, recomputed, decoded; what it leaves alone."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from ranks import Ranks
from torch import Tensor, nn

import mm
from mm.cli import main
from mm.config import load_config
from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import one_pass
from mm.data.packed import join_segments
from mm.data.prepare import open_splits
from mm.data.sample import Special, Text, keyed_rng
from mm.data.tokens import Segment, make_segment, with_meta_tokens
from mm.errors import ConfigError
from mm.models import backbone
from mm.models.decode import decode
from mm.models.generate import generate, log_likelihoods
from mm.models.prompts import Decoding, lay_out, raw_prompt
from mm.models.systems.text_lm.config import TextLMConfig
from mm.models.systems.text_lm.model import TextLM
from mm.train import checkpoint
from mm.train.blocks import checkpoint_activations, compile_blocks, find_blocks
from mm.train.config import CheckpointingConfig
from mm.train.estimate import estimate
from mm.train.metrics import read_metrics
from mm.train.trainer import Trainer, Unwatched

Built = tuple[TextLM, Layout]

WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16, "initializer_range": 0.2},
    "gpt2": {"initializer_range": 0.2, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
    "gpt_neox": {"use_parallel_residual": False, "intermediate_size": 48, "initializer_range": 0.2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0},
}


def section(kind: str = "llama", **meta: Any) -> dict[str, Any]:
    config = {"model_type": kind, **WIDTH, **KINDS[kind]}
    return {"language": {"tokenizer": "builtin:emoji", "config": config}, "meta_tokens": {"rate": 0.3, **meta}}


def build(kind: str = "llama", **meta: Any) -> Built:
    config = TextLMConfig.model_validate(section(kind, **meta))
    torch.manual_seed(0)
    return config.build(), config.layout()


def documents(layout: Layout, number: int = 4) -> list[Segment]:
    texts = ["A first text, of some length.", "Two.", "And then a third one with more words in it.", "The last."]
    segments = [make_segment((Text(text),), layout, "text", Limits()) for text in texts[:number]]
    return [with_meta_tokens(one, layout, keyed_rng("test", n)) for n, one in enumerate(segments)]


def rows(layout: Layout, *rows: list[Segment]) -> PackedBatch:
    packs = [join_segments([(f"a/{n}", "a", one) for n, one in enumerate(row)]) for row in rows]
    return collate(packs, layout, row_length=max(len(pack.tokens) for pack in packs) + 3)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))  # the gradient of a key's bias is zero but for rounding
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def dense(module: Any, x: Tensor, is_meta: Tensor, scope: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """What meta-attention adds to x [N, D], by scores of all positions under the mask M + P of the paper, whose empty
    rows are set to zero."""
    own = F.rms_norm(x, (x.shape[1],), module.norm.weight, module.norm.eps)
    q, k, v = (
        F.linear(own, projection.weight).unflatten(1, (-1, module.head_width)).transpose(0, 1)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if rotary is not None:
        cos, sin = (one[0] for one in rotary)
        width, half = cos.shape[1], cos.shape[1] // 2
        q, k = (
            torch.cat([
                one[..., :half] * cos[:, :half] - one[..., half:width] * sin[:, :half],
                one[..., half:width] * cos[:, half:] + one[..., :half] * sin[:, half:],
                one[..., width:],
            ], dim=-1)
            for one in (q, k)
        )  # fmt: skip
    k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
    n = len(x)
    causal = torch.ones(n, n, dtype=torch.bool).tril() & (scope[:, None] == scope)
    allowed = causal & is_meta[:, None] & is_meta & (scope > 0)
    scores = (q @ k.transpose(1, 2) / module.head_width**0.5).masked_fill(~allowed, -torch.inf)
    weights = torch.where(allowed.any(1)[:, None], scores, 0.0).softmax(-1) * allowed.any(1)[:, None]
    return F.linear((weights @ v).transpose(0, 1).flatten(1), module.o_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_that_of_a_dense_mask(kind: str) -> None:
    """Outputs and gradients of whole models of several families, on two packed rows with padding: against the same
    layers, whose attention is followed by the dense reference."""
    system, layout = build(kind)
    batch = rows(layout, documents(layout, 3), documents(layout, 2))
    reference = copy.deepcopy(system)
    is_meta = (batch.input_ids == layout.meta_tokens.id).flatten()  # type: ignore[union-attr]
    row = torch.arange(len(batch.segment_ids))[:, None]
    scope = torch.where(batch.segment_ids > 0, 100 * row + batch.segment_ids, 0).flatten()

    def replaced(module: Any) -> None:
        module.forward = lambda hidden, meta, rotary: dense(module, hidden[0], is_meta, scope, rotary)[None]

    for module in reference.modules():
        if type(module).__name__ == "MetaAttention":
            replaced(module)
    losses, expected = (model.token_losses(batch) for model in (system, reference))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    expected.sum().backward()
    found = gradients(system)
    assert_close(found, gradients(reference))
    assert sum(".meta." in name for name in found) == 3 * 5
    for name, gradient in found.items():
        if ".meta." in name:  # what the last layer gives meta-tokens nothing is predicted from
            assert gradient.any() == (".2.meta." not in name), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_meta_tokens_the_model_is_the_one_without_meta_attention(kind: str) -> None:
    """To the last bit, outputs and gradients; its own weights have gradients, of zero."""
    system, layout = build(kind)
    plain = copy.deepcopy(section(kind))
    del plain["meta_tokens"]
    other = TextLMConfig.model_validate(
        {**plain, "language": {**plain["language"], "added_tokens": ["<meta>"]}}
    ).build()
    other.load_state_dict({name: value for name, value in system.state_dict().items() if ".meta." not in name})
    bare = replace(layout, meta_tokens=None)
    batch = rows(layout, [make_segment((Text("No such tokens."),), bare, "text", Limits())] * 2)
    losses, expected = system.token_losses(batch), other.token_losses(batch)
    assert torch.equal(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    found, wanted = gradients(system), gradients(other)
    for name, gradient in found.items():
        assert not gradient.any() if ".meta." in name else torch.equal(gradient, wanted[name]), name
    assert len(found) == len(wanted) + 3 * 5


def test_only_meta_tokens_are_changed_by_a_layer() -> None:
    system, layout = build()
    batch = rows(layout, documents(layout))
    is_meta = (batch.input_ids == layout.meta_tokens.id).flatten()  # type: ignore[union-attr]
    given: list[Tensor] = []
    for layer in system.language.model.layers:
        layer.meta.register_forward_hook(lambda module, args, out: given.append(out[0]))
    system.token_losses(batch)
    assert len(given) == 3 and 0 < is_meta.sum() < len(is_meta) / 3
    for one in given:
        assert not one[~is_meta].any() and one[is_meta].any(1).all() and torch.isfinite(one).all()


def test_packed_is_unpacked() -> None:
    """Losses and gradients, of documents together and one by one."""
    system, layout = build()
    packed = system.token_losses(rows(layout, documents(layout, 3), documents(layout)[3:]))
    packed.sum().backward()
    together = gradients(system)
    apart = torch.cat([system.token_losses(rows(layout, [one])) for one in documents(layout)])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    apart.sum().backward()
    assert_close(together, gradients(system))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_comes_later_changes_nothing_before(kind: str) -> None:
    """Another token, or one more or fewer meta-token, further on."""
    system, layout = build(kind)
    meta = layout.meta_tokens.id  # type: ignore[union-attr]
    batch = rows(layout, documents(layout))
    before = system.logits(batch, torch.arange(batch.input_ids.numel())).detach()
    for place in (3, 9, 20):
        for token in (meta, 300):
            ids = batch.input_ids.clone()
            ids[0, place] = token
            after = system.logits(replace(batch, input_ids=ids), torch.arange(place))
            torch.testing.assert_close(after, before[:place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_is_not_recomputed(mode: str) -> None:
    system, layout = build()
    batch = rows(layout, documents(layout))
    again = copy.deepcopy(system)
    checkpoint_activations(again, CheckpointingConfig(mode=mode), find_blocks(again, [r".*\.layers\.\d+"]))  # type: ignore[arg-type]
    for model in (system, again):
        model(batch).losses["next_token"].backward()
    found, expected = gradients(again), gradients(system)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_is_not_compiled() -> None:
    system, layout = build()
    batch = rows(layout, documents(layout))
    compiled = copy.deepcopy(system)
    compile_blocks(find_blocks(compiled, [r".*\.layers\.\d+"]), backend="eager")
    for model in (system, compiled):
        model(batch).losses["next_token"].backward()
    assert_close(gradients(compiled), gradients(system))


def test_experts_stand_behind_it() -> None:
    """They are the layer's MLP, whatever is in front: packed is unpacked with one expert, which takes every token."""
    torch.manual_seed(0)
    system = TextLMConfig.model_validate({**section(), "experts": {"text": 1}}).build()
    layout = build()[1]
    packed = system.token_losses(rows(layout, documents(layout)))
    apart = torch.cat([system.token_losses(rows(layout, [one])) for one in documents(layout)])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    assert all(hasattr(layer.mlp, "groups") and hasattr(layer, "meta") for layer in system.language.model.layers)


def test_models_without_a_place_for_it_are_refused() -> None:
    """Parallel blocks, and norms behind attention; not without attention of their own."""
    for kind in ("gpt_neox", "gemma2"):
        config = section()
        config["language"]["config"] = {
            "model_type": kind, **WIDTH, "intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2,
            "attn_logit_softcapping": None, "sliding_window": 4096,
        }  # fmt: skip
        with pytest.raises(ConfigError, match=f"layers of {kind} have no place"):
            TextLMConfig.model_validate(config).build()
        config["meta_tokens"]["attention"] = False
        assert not TextLMConfig.model_validate(config).build().meta_attention
    with pytest.raises(ConfigError, match="gpt2 does not rotate"):
        build("gpt2", zero_positions=True)
    with pytest.raises(ValueError, match="leave out `depths`"):
        TextLMConfig.model_validate({**section(), "depths": {"auxiliary": "along"}})


@pytest.mark.parametrize(("init", "expected"), [("default", 0.1), ("scaled", 0.05)])
def test_what_writes_to_the_residual_begins_as_small_as_the_models_own(init: str, expected: float) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "initializer_range": 0.1,
    }  # fmt: skip
    language = {"tokenizer": "builtin:emoji", "config": config, "init": init}
    system = TextLMConfig.model_validate({"language": language, "meta_tokens": {"rate": 0.1}}).build()
    for layer in system.language.model.layers:
        for part in (layer.meta.o_proj, layer.self_attn.o_proj):
            assert part.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert layer.meta.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_call_without_places_says_so() -> None:
    system, layout = build()
    with pytest.raises(ValueError, match="needs `meta`"):
        backbone.token_losses(system.language, torch.zeros(1, 4, 32), rows(layout, documents(layout, 1)))


PROMPTS = ["The cat<meta> sat<meta><meta> on", "<meta>A", "Nothing here", "One<meta>"]


@pytest.mark.parametrize(("kind", "zero"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_decoding_with_a_cache_is_the_whole_forward_pass(kind: str, zero: bool) -> None:
    """Prompts with meta-tokens in given places and without, as one batch; meta-tokens that are written, too."""
    system, layout = build(kind, zero_positions=zero)
    system.eval()
    meta = layout.meta_tokens.id  # type: ignore[union-attr]
    prompts = [raw_prompt(text) for text in PROMPTS]
    decoding = Decoding(max_new_tokens=12, min_new_tokens=12)
    head = system.language.get_output_embeddings().weight
    last = rows(layout, *[[lay_out(prompt, layout, "", Limits())] for prompt in prompts])
    with (
        torch.no_grad()
    ):  # a meta-token is written wherever the token that is likeliest behind the first prompt would be
        head[meta] = 1.1 * head[system.logits(last, last.segment_ids[0].count_nonzero()[None] - 1).argmax()]
    found = decode(system, layout, prompts, decoding)
    assert generate(system, layout, prompts, decoding) == [one.text for one in found]
    written: list[bool] = []
    for prompt, text in zip(PROMPTS, found, strict=True):
        parts: list[Any] = [Special("<s>")]
        for piece in prompt.replace("<meta>", "\0<meta>\0").split("\0"):
            parts += [Special("<meta>")] if piece == "<meta>" else [Text(piece)]
        ids = make_segment(tuple(parts[1:]), layout, "prompt", Limits(), closed=False).ids.tolist()
        assert ids.count(meta) == prompt.count("<meta>")
        start = len(ids)
        for _ in range(12):
            batch = rows(layout, [Segment(torch.tensor(ids).int().numpy(), (), ())])
            # Behind a prompt it is its last token of another kind that says what comes, as in training.
            last_of = max(n for n, id in enumerate(ids) if id != meta) if len(ids) == start else len(ids) - 1
            logits = system.logits(batch, torch.tensor([last_of]))[0]
            logits[layout.tokenizer.id("<|im_end|>")] = -torch.inf
            ids.append(int(logits.argmax()))
        assert layout.tokenizer.decode(ids[start:]).strip() == text.text
        written.append(meta in ids[start:])
    assert written[0]


def test_without_positions_only_where_it_is_asked_for() -> None:
    """In evaluation a meta-token has the rotation of position 0; in training its own."""
    system, layout = build(zero_positions=True)
    plain, _ = build()
    batch = rows(layout, documents(layout))
    assert torch.equal(system.token_losses(batch), plain.token_losses(batch))
    system.eval(), plain.eval()
    moved = batch.position_ids.masked_fill(batch.input_ids == layout.meta_tokens.id, 0)  # type: ignore[union-attr]
    expected = plain.token_losses(replace(batch, position_ids=moved))
    assert torch.equal(system.token_losses(batch), expected)
    assert not torch.allclose(plain.token_losses(batch), expected)


def test_likelihoods_of_answers() -> None:
    system, layout = build()
    system.eval()
    found = log_likelihoods(system, layout, [raw_prompt(text) for text in PROMPTS], [" the mat"] * 4)
    for text, value in zip(PROMPTS, found, strict=True):
        (alone,) = log_likelihoods(system, layout, [raw_prompt(text)], [" the mat"])
        assert value == pytest.approx(alone, rel=1e-5)
    without = log_likelihoods(system, layout, [raw_prompt(PROMPTS[0].replace("<meta>", ""))], [" the mat"])
    assert without[0] != pytest.approx(found[0], rel=1e-4)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """The config of a run on 30 short texts."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        text = f"Text {number}.\n\n" + " ".join(f"word {number * k}" for k in range(number % 9 + 1))
        (tmp_path / "texts" / f"{number:02d}.md").write_text(text)
    source = [{"kind": "text", "name": "texts", "path": str(tmp_path / "texts" / "*.md")}]

    def write(name: str = "run", **sections: Any) -> Path:
        values = {
            "out": str(tmp_path / name),
            "data": {
                "sources": source, "validation": source, "context_length": 64, "workers": 0,
                "cache": str(tmp_path / "cache"),
            },
            "model": {"kind": "text_lm", **section()},
            "train": {
                "max_steps": 2, "batch_tokens": 256, "micro_batch": 2, "device": "cpu", "save_every": 2,
                "optimizer": {"kind": "adamw", "lr": 3e-3, "eps": 1e-6},
            },
            "evaluation": {"every": 2},
            **sections,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_a_run_is_read_again_and_its_export_refused(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arm without meta-attention is a plain model, and exported as such."""
    assert main(["train", str(written())]) == 0
    system, layout, config = mm.load(tmp_path / "run", device="cpu")
    dataset = open_splits(config.data, layout, config.seed)["validation"]
    with torch.no_grad():
        losses = torch.cat([system.token_losses(batch) for batch in one_pass(dataset, layout, 4)])
    rows = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "validation_loss" in line]
    assert float(losses.mean()) == pytest.approx(yaml.safe_load(rows[-1])["validation_loss"], rel=1e-5)
    saved = checkpoint.described(checkpoint.newest(tmp_path / "run" / "checkpoints"))  # type: ignore[arg-type]
    assert "model.language.model.layers.0.meta.q_proj.weight" in saved
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "meta-attention" in capsys.readouterr().err and not (tmp_path / "out").exists()

    arm = written("arm", model={"kind": "text_lm", **section(attention=False)})
    assert main(["train", str(arm)]) == 0
    assert main(["export", str(tmp_path / "arm"), "--out", str(tmp_path / "out")]) == 0


def test_what_a_step_takes_is_told_before_it_runs(written: Callable[..., Path]) -> None:
    arm = {"kind": "text_lm", **section(attention=False)}
    with_it, without = (estimate(load_config(path)) for path in (written(), written("arm", model=arm)))
    assert with_it["flops_per_step"]["total"] > without["flops_per_step"]["total"]


def train(path: Path, overrides: tuple[str, ...]) -> None:
    Trainer(load_config(path, overrides), Unwatched()).run()


def test_two_ranks_are_one(written: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    """Sharded with its layers, under names of its own; in bfloat16, weights are gathered as that."""
    for name, processes, engine in (("one", 1, "single"), ("two", 2, "fsdp")):
        settings = f"train.engine={{kind: {engine}}}", "train.precision=bf16", "train.micro_batch=1"
        ranks.run(train, processes, written(name), settings)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for row, other in zip(two, one, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


def test_the_shipped_config_fits() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/text_lm/meta_tokens.yaml")
    system, layout = config.model.build(), config.model.layout()
    assert system.meta_attention and layout.meta_tokens.rate == 0.1
