"""Chameleon's released layouts, transformers' and Meta's: read strictly, nothing in them run, the same model from both.

Meta's is compared with its formulas written out here: complex numbers turn queries and keys, and what the parts of a
model give is summed up, so that no reading of ours is on both sides.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, ChameleonConfig, ChameleonForConditionalGeneration

import mm
from mm.data.tokenizer import chameleon_code
from mm.errors import CheckpointError, ConfigError
from mm.hub import export
from mm.models import backbone, released
from mm.models.config import LanguageConfig
from mm.models.released.chameleon import ROPE, consolidated
from mm.models.systems.text_lm.config import TextLMConfig
from mm.train.stages import initial_tensors, take_over

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<racm3:break>", "<eoss>", *"abcdefghij"]
VOCABULARY = {name: n for n, name in enumerate([*WORDS, *(chameleon_code(n) for n in range(16))])}
ROWS = 40  # of embeddings, some to spare
PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "vocab_size": ROWS, "multiple_of": 24, "norm_eps": 1e-5,
    "rope_theta": 500.0, "qk_normalization": True,
}  # fmt: skip
INNER = 96  # 8 / 3 of 32, rounded up to a multiple of 24
VQ = {
    "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8,
    "num_embeddings": 16, "resolution": 16,
}  # fmt: skip
IDS = torch.randint(ROWS, (11,), generator=torch.Generator().manual_seed(3))


def write_tokenizer(path: Path) -> None:
    Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>")).save(str(path))


def meta_parts(params: dict[str, Any], number: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Random weights of a model cut into so many parts, by Meta's names."""
    generator = torch.Generator().manual_seed(2)
    width, size = params["dim"], params["dim"] // params["n_heads"]
    q, kv = (size * params[name] // number for name in ("n_heads", "n_kv_heads"))
    inner, rows = INNER // number, ROWS // number

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + 0.2 * torch.randn(shape, generator=generator)).to(dtype)

    parts: list[dict[str, Tensor]] = [{} for _ in range(number)]
    for part in parts:
        part["tok_embeddings.weight"] = draw(ROWS, width // number)
        part["output.weight"] = draw(rows, width)
        part["rope.freqs"] = draw(size // 2)
        for layer in range(params["n_layers"]):
            for name, shape in (
                ("attention.wq", (q, width)), ("attention.wk", (kv, width)), ("attention.wv", (kv, width)),
                ("attention.wo", (width, q)), ("feed_forward.w1", (inner, width)), ("feed_forward.w3", (inner, width)),
                ("feed_forward.w2", (width, inner)),
            ):  # fmt: skip
                part[f"layers.{layer}.{name}.weight"] = draw(*shape)
            for name in ("q_normalization", "k_normalization"):  # of each part its own
                part[f"layers.{layer}.attention.{name}.weight"] = draw(size, mean=1)
                part[f"layers.{layer}.attention.{name}.bias"] = draw(size)
    layers = [f"layers.{n}.{norm}_norm" for n in range(params["n_layers"]) for norm in ("attention", "ffn")]
    for name in ["norm", *layers]:
        same = draw(width, mean=1)
        for part in parts:
            part[f"{name}.weight"] = same.clone()
    return parts


def meta_logits(parts: list[dict[str, Tensor]], params: dict[str, Any], ids: Tensor) -> Tensor:
    """[N, V] of ids [N]."""
    eps, size = params["norm_eps"], params["dim"] // params["n_heads"]
    speed = params["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(len(ids)), speed)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # n 1 size/2

    def normed(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * parts[0][f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def attention(x: Tensor, layer: int) -> Tensor:
        total = torch.zeros_like(x)
        for part in parts:
            w = {name.removeprefix(f"layers.{layer}.attention."): tensor for name, tensor in part.items()}
            q, k, v = (F.linear(x, w[f"w{name}.weight"]).unflatten(-1, (-1, size)) for name in "qkv")
            q, k = (
                turned(F.layer_norm(y, (size,), w[f"{name}_normalization.weight"], w[f"{name}_normalization.bias"]))
                for name, y in (("q", q), ("k", k))
            )
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
            scores = torch.einsum("nhd,mhd->hnm", q, k) / size**0.5
            scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
            mixed = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)
            total = total + F.linear(mixed.flatten(1), w["wo.weight"])
        return total

    def mlp(x: Tensor, layer: int) -> Tensor:
        total = torch.zeros_like(x)
        for part in parts:
            w1, w2, w3 = (part[f"layers.{layer}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
            total = total + F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
        return total

    h = torch.cat([part["tok_embeddings.weight"][ids] for part in parts], -1)
    for layer in range(params["n_layers"]):
        first, second = f"layers.{layer}.attention_norm", f"layers.{layer}.ffn_norm"
        if params["swin_norm"]:
            h = h + normed(attention(h, layer), first)
            h = h + normed(mlp(h, layer), second)
        else:
            h = h + attention(normed(h, first), layer)
            h = h + mlp(normed(h, second), layer)
    return torch.cat([F.linear(normed(h, "norm"), part["output.weight"]) for part in parts], -1)


def write_meta(folder: Path, parts: list[dict[str, Any]], params: dict[str, Any]) -> Path:
    """`folder/models/7b` and `folder/tokenizer`, as they are downloaded."""
    here = folder / "models/7b"
    here.mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (here / "params.json").write_text(json.dumps({"model": params, "model_parallel_size": 1, "seed": 4}))
    (here / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": len(parts)}))
    (here / "checklist.chk").write_text("")
    for rank, part in enumerate(parts):
        torch.save(part, here / ("consolidated.pth" if len(parts) == 1 else f"consolidated.{rank:02}.pth"))
    write_tokenizer(folder / "tokenizer/text_tokenizer.json")
    return here


def joined(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Meta's model saves itself: projections that share an input in one."""
    out = {name: tensor for name, tensor in part.items() if name.split(".")[-2] not in ("wq", "wk", "wv", "w1", "w3")}
    for layer in range(PARAMS["n_layers"]):
        for place, whole, names in (("attention", "wqkv", ("wq", "wk", "wv")), ("feed_forward", "w13", ("w1", "w3"))):
            prefix = f"layers.{layer}.{place}"
            out[f"{prefix}.{whole}.weight"] = torch.cat([part[f"{prefix}.{name}.weight"] for name in names])
    return out


def load(folder: Path | str, weights: bool = True) -> Any:
    return backbone.load(LanguageConfig(name=str(folder)), len(VOCABULARY), weights).eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    with backbone.ordinary_attention(model):
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("swin", [False, True])
def test_metas_layout_gives_what_metas_formulas_give(number: int, swin: bool, tmp_path: Path) -> None:
    params = {**PARAMS, "swin_norm": swin}
    parts = meta_parts(params, number)
    model = load(write_meta(tmp_path, parts, params))
    expected = meta_logits(parts, params, IDS)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-4, atol=1e-5)


def test_without_groups_of_heads_and_with_an_mlp_sized_by_a_factor(tmp_path: Path) -> None:
    params = {**PARAMS, "swin_norm": False, "n_kv_heads": None, "ffn_dim_multiplier": 0.6, "multiple_of": INNER}
    parts = meta_parts({**params, "n_kv_heads": params["n_heads"]}, 2)
    model = load(write_meta(tmp_path, parts, params))
    torch.testing.assert_close(logits_of(model, IDS), meta_logits(parts, params, IDS), rtol=1e-4, atol=1e-5)


def test_joined_projections_and_files_of_others(tmp_path: Path) -> None:
    """Both spellings that Meta's code reads; a `rope.freqs` that is None."""
    params = {**PARAMS, "swin_norm": True}
    parts = meta_parts(params, 2, torch.bfloat16)
    plain = load(write_meta(tmp_path / "a", parts, params))
    changed: list[dict[str, Any]] = [{**joined(part), ROPE: None} for part in parts]
    assert len(changed[0]) < len(parts[0])
    found = load(write_meta(tmp_path / "b", changed, params)).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, found[name]) and tensor.dtype == torch.float32, name


def test_norms_that_drifted_apart_are_averaged(tmp_path: Path) -> None:
    params = {**PARAMS, "swin_norm": False}
    parts = meta_parts(params, 2)
    parts[1]["norm.weight"] += 1
    model = load(write_meta(tmp_path, parts, params))
    torch.testing.assert_close(model.base_model.norm.weight.detach(), parts[0]["norm.weight"] + 0.5)


def test_the_config_alone_reads_no_weights(tmp_path: Path) -> None:
    folder = write_meta(tmp_path, [{}], {**PARAMS, "swin_norm": True})
    (folder / "consolidated.pth").unlink()
    config = load(folder, weights=False).config
    assert (config.intermediate_size, config.num_key_value_heads, config.swin_norm) == (INNER, 4, True)
    assert config.rope_parameters["rope_theta"] == 500.0 and not config.tie_word_embeddings


def test_the_7bs_sizes_are_transformers_defaults(tmp_path: Path) -> None:
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 65_536, "qk_normalization": True}
    release = consolidated(write_meta(tmp_path, [{}], params))
    assert release is not None
    values = release.config()
    found, expected = ChameleonConfig(**{n: v for n, v in values.items() if n != "model_type"}), ChameleonConfig()
    for name in values:
        assert getattr(found, name) == getattr(expected, name), name


def test_meta_and_transformers_layouts_are_taken_over_and_loaded(tmp_path: Path, hf: Path) -> None:
    params = {**PARAMS, "swin_norm": False}
    parts = meta_parts(params, 2)
    meta = write_meta(tmp_path, parts, params)
    for folder, expected in ((meta, meta_logits(parts, params, IDS)), (hf, logits_of(load(hf), IDS))):
        system, layout, config = mm.load(folder, device="cpu")
        torch.testing.assert_close(logits_of(system.language, IDS), expected, rtol=1e-4, atol=1e-5)
        assert layout.template.bos == "<s>" and layout.pad == VOCABULARY["<pad>"] and config.form == "raw"
        release = released.find(folder)
        assert release is not None and release.kind == "text_lm"
        values = {"name": None, "config": load(folder, weights=False).config.to_dict(), "tokenizer": str(folder)}
        other = TextLMConfig.model_validate({"language": values}).build()
        before = logits_of(other.language, IDS)
        found, where = initial_tensors(folder)
        assert take_over(other, found, None, where) == []
        assert not torch.allclose(before, expected, atol=0.1)
        torch.testing.assert_close(logits_of(other.language, IDS), expected, rtol=1e-4, atol=1e-5)


def test_either_is_a_seed_for_experts(tmp_path: Path, hf: Path) -> None:
    """Named as the language model, or taken over: every expert begins as a copy of the layer's MLP."""
    params = {**PARAMS, "swin_norm": True}
    meta = write_meta(tmp_path, list(meta_parts(params, 2)), params)
    for folder in (meta, hf):
        found, where = initial_tensors(folder)
        experts = {"experts": {"text": 1, "image": 2}}
        named = TextLMConfig.model_validate({"language": {"name": str(folder)}, **experts}).build()
        taking = TextLMConfig.model_validate({"language": {"name": str(folder)}, **experts}).build(weights=False)
        assert all("router" in note for note in take_over(taking, found, None, where))
        for system in (named, taking):
            groups: Any = system.language.base_model.layers[1].mlp.groups
            mlp = "language.model.layers.1.mlp"
            both = torch.cat([found[f"{mlp}.gate_proj.weight"], found[f"{mlp}.up_proj.weight"]])
            assert torch.equal(groups["text"].gate_up[0], both)
            for expert in range(2):
                assert torch.equal(groups["image"].gate_up[expert], both)
                assert torch.equal(groups["image"].down[expert], found[f"{mlp}.down_proj.weight"])


def test_an_exported_folder_is_read_by_transformers_and_again_here(tmp_path: Path, hf: Path) -> None:
    note = export(hf, tmp_path / "out", to="transformers")
    assert note is not None and "VQ model" in note
    expected = logits_of(load(hf), IDS)
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load(tmp_path / "out")):
        with torch.no_grad():
            torch.testing.assert_close(logits_of(model, IDS), expected, rtol=0, atol=1e-6)


def damage(what: str, parts: list[dict[str, Any]], params: dict[str, Any]) -> None:
    match what:
        case "missing":
            for part in parts:
                del part["layers.1.attention.wo.weight"]
        case "missing in one":
            del parts[1]["layers.1.attention.wo.weight"]
        case "extra":
            for part in parts:
                part["layers.1.attention.gate.weight"] = torch.zeros(3)
        case "a number among the tensors":
            parts[0]["step"] = 3
        case "misshapen":
            for part in parts:
                part["layers.0.feed_forward.w2.weight"] = torch.zeros(32, 7)
        case "unequal parts":
            parts[1]["output.weight"] = torch.zeros(7, 32)
        case "misshapen norm":
            for part in parts:
                part["layers.0.attention.q_normalization.bias"] = torch.zeros(3)
        case "no norms":
            params["qk_normalization"] = False
        case "no width":
            del params["dim"]
        case "another layer":
            params["n_layers"] = 4


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "layers.1.attention.wo.weight"),
        ("missing in one", "01.pth: layers.1.attention.wo.weight is in this part or in consolidated.00.pth"),
        ("extra", "layers.1.attention.gate.weight"),
        ("a number among the tensors", "00.pth: expected tensors by name"),
        ("misshapen", r"layers.0.feed_forward.w2.weight +found \[32, 14\], expected \[32, 96\]"),
        ("unequal parts", r"output.weight is \[20, 32\], \[7, 32\] in the parts"),
        ("misshapen norm", r"layers.0.attention.q_normalization.bias +found \[8, 3\], expected \[8, 4\]"),
        ("no norms", "qk_normalization is False"),
        ("no width", "params.json: dim is None; expected a whole number"),
        ("another layer", "layers.3.attention_norm.weight"),
    ],
)
def test_what_does_not_fit_metas_layout_is_refused_by_name(what: str, says: str, tmp_path: Path) -> None:
    params = {**PARAMS, "swin_norm": False}
    parts: list[dict[str, Any]] = [dict(part) for part in meta_parts(params, 2)]
    damage(what, parts, params)
    with pytest.raises(CheckpointError, match=says):
        load(write_meta(tmp_path, parts, params))


def test_parts_that_are_not_there_are_missed(tmp_path: Path) -> None:
    params = {**PARAMS, "swin_norm": False}
    folder = write_meta(tmp_path, list(meta_parts(params, 4)), params)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"model_parallel_size 4 expected consolidated.00.pth … consolidated.03"):
        load(folder)
    (folder / "consolidate_params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model_parallel_size 1 expected consolidated.pth"):
        load(folder)
    (folder / "consolidate_params.json").unlink()
    assert consolidated(folder) is None


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.made,))


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    params, made = {**PARAMS, "swin_norm": False}, tmp_path / "made"
    parts: list[dict[str, Any]] = [dict(part) for part in meta_parts(params, 1)]
    parts[0]["norm.weight"] = Hostile(made)
    folder = write_meta(tmp_path, parts, params)
    for read in (load, initial_tensors):
        with pytest.raises(CheckpointError, match="holds something else than tensors"):
            read(folder)
    assert not made.exists()


def write_hf(folder: Path, shard: str = "5GB") -> Path:
    """transformers' own model with its VQ model, saved by transformers."""
    config = ChameleonConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, swin_norm=True, vq_config=VQ, vocabulary_map={**VOCABULARY, "<image>": 39},
    )  # fmt: skip
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf")


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_transformers_layout_without_its_vq_model(shard: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", shard)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert any(name.startswith("model.vqmodel.") for name in stored)
    model = load(folder)
    expected = {name: tensor for name, tensor in stored.items() if not name.startswith("model.vqmodel.")}
    tensors = initial_tensors(folder)[0]
    assert model.state_dict().keys() == expected.keys() == {name.removeprefix("language.") for name in tensors}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]) and torch.equal(tensor, tensors[f"language.{name}"])
    theirs = ChameleonForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        right = theirs.lm_head(theirs.model(IDS[None]).last_hidden_state[0])
    torch.testing.assert_close(logits_of(model, IDS), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["missing", "extra", "misshapen"])
def test_what_does_not_fit_transformers_layout_is_refused_by_name(what: str, hf: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(hf / "model.safetensors")
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        name = "model.layers.1.mlp.gate.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(48, 31)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"^model.language.name .*{name}") as error:
        load(hf)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=name):
        initial_tensors(hf)


def test_an_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", "20KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="names of files beside it"):
        initial_tensors(folder)
