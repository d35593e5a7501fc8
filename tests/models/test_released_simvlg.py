"""SimVLG's checkpoints as LAVIS saves them: only what was trained, read strictly and written again; and EVA-CLIP's
tower from each of the three files that it was published in."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from tiny_cosmo import picture
from tiny_released import TOKENS, WIDTH, language, run_of, spread, write_language
from torch import Tensor, nn

import mm
from mm.cli import main
from mm.data.batch import MediaBatch, PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Text
from mm.data.tokens import make_segment
from mm.errors import CheckpointError, ConfigError
from mm.hub import export
from mm.models.config import VisionConfig
from mm.models.released import lavis
from mm.models.released.lavis import BLIP2, EVA, FAMILIES, TOWER, of_eva, released_name
from mm.models.systems.simvlg.config import SimVLGConfig
from mm.models.vision import VisionTower
from mm.train.config import ParamRule
from mm.train.params import freeze
from mm.train.stages import initial_tensors

SIDE, FEATURES, HIDDEN, BLOCKS, MERGED = 16, 5, 48, 2, 1
EVA_ARGS = {"patch_size": 8, "embed_dim": 32, "depth": BLOCKS, "num_heads": 4, "mlp_ratio": 2.0}
BERT: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 12,
}  # fmt: skip
NAMES = {"opt": "facebook/opt-2.7b", "llm": "lmsys/vicuna-7b-v1.1"}


class Theirs:
    """The parts of a SimVLG, each a library's module, by the names of the release."""

    def __init__(self, family: str, clips: bool = False) -> None:
        torch.manual_seed(1)
        # One block more than SimVLG runs, a final norm and a head, as published.
        self.eva: Any = timm.create_model(
            "eva_giant_patch14_clip_224", img_size=SIDE, num_classes=7, **{**EVA_ARGS, "depth": BLOCKS + 1}
        )
        spread(self.eva)
        self.bert = spread(transformers.BertModel(transformers.BertConfig(**BERT, vocab_size=9)))
        self.norm, self.input, self.output = nn.LayerNorm(32), nn.Linear(32, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        for part in (self.norm, self.input, self.output):
            spread(part)
        self.family = family
        # Vicuna's embeddings have no row for [PAD].
        self.language = language("opt" if family == "opt" else "llama", TOKENS + 12 if family == "opt" else TOKENS)
        names = {
            "key.weight": (256, 32),
            "key.bias": (256,),
            "query.weight": (256, 32),
            "query.bias": (256,),
            "alpha": (),
        }
        self.temporal = {
            f"visual_encoder.blocks.{block}.temporal_merge.{name}": torch.randn(shape)
            for block in range(BLOCKS if clips else 0)
            for name, shape in names.items()
        }

    def model(self) -> dict[str, Tensor]:
        parts = {
            "ln_vision": self.norm, "VL_proj": self.input, "VLconnector": self.bert,
            FAMILIES[self.family].projection: self.output,
        }  # fmt: skip
        found = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        del found["VLconnector.embeddings.word_embeddings.weight"]
        return {name: tensor.detach().clone() for name, tensor in {**found, **self.temporal}.items()}


def blip2_names(eva: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of transformers' Blip2VisionModel."""
    found = {}
    for name, tensor in eva.items():
        if name.startswith(("norm.", "head.", f"blocks.{BLOCKS}.")):
            continue
        name = name.replace("cls_token", "embeddings.class_embedding").replace(
            "pos_embed", "embeddings.position_embedding"
        )
        name = name.replace("patch_embed.proj", "embeddings.patch_embedding").replace("blocks.", "encoder.layers.")
        name = name.replace(".norm1", ".layer_norm1").replace(".norm2", ".layer_norm2")
        name = name.replace(".attn.proj", ".self_attn.projection").replace(".attn.", ".self_attn.")
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            value = eva[f"blocks.{name.split('.')[2]}.attn.v_bias"]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros_like(tensor), value])
        found[name] = tensor
    return found


def write_tower(folder: Path, eva: Any, source: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in eva.state_dict().items()}
    tower = folder / TOWER
    tower.mkdir(parents=True, exist_ok=True)
    (tower / "config.json").write_text(json.dumps({"model_args": EVA_ARGS}))
    if source == "timm":
        save_file(tensors, tower / "model.safetensors")
    elif source == "lavis":
        torch.save(tensors, folder / EVA)
    else:
        other = {"vision_model.post_layernorm.weight": torch.ones(32), "qformer.layernorm.weight": torch.ones(4)}
        inside = {f"vision_model.{name}": tensor.clone() for name, tensor in blip2_names(tensors).items()}
        (folder / BLIP2).mkdir(parents=True)
        save_file({**inside, **other}, folder / BLIP2 / "model.safetensors")


def write_release(folder: Path, theirs: Theirs, source: str = "lavis", model: dict[str, Tensor] | None = None) -> Path:
    """A folder with a checkpoint, and what stands for other repositories beside it."""
    family = FAMILIES[theirs.family]
    write_tower(folder, theirs.eva, source)
    write_language(folder / NAMES[theirs.family], theirs.language, weights=True)
    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased/config.json").write_text(json.dumps({**BERT, "layer_norm_eps": 1e-12}))
    about = {
        "arch": f"liptome_{theirs.family}", "num_layers": 2, "tome_r": MERGED, "image_size": SIDE, "beta": 0.0,
        family.model: "/mnt/cache_dir/vicuna-7b-1.1" if theirs.family == "llm" else NAMES["opt"],
    }  # fmt: skip
    checkpoint = {
        "model": theirs.model() if model is None else model,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1e-4}],
        },
        "config": {"run": {"init_lr": 1e-4, "train_splits": ["train"]}, "datasets": {}, "model": about},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "iters": 5000,
    }
    torch.save(checkpoint, folder / "checkpoint_5000.pth")
    return folder


def batch_of(layout: Layout, *texts: str) -> PackedBatch:
    packs = []
    for number, text in enumerate(texts):
        segment = make_segment((picture(number), Text(text)), layout, "test", Limits())
        packs.append(join_segments([(text, "pairs", segment)]))
    return collate(packs, layout, 40)


def state(system: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in system.state_dict().items()}


def saved(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("checkpoint_*.pth")
    return torch.load(path, weights_only=True)["model"]  # type: ignore[no-any-return]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module")
def opt() -> Theirs:
    return Theirs("opt")


@pytest.fixture(scope="module")
def kept(opt: Theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of pictures and OPT that tests only read."""
    return write_release(tmp_path_factory.mktemp("kept") / "release", opt)


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(kept, tmp_path / "release"))


@pytest.mark.parametrize("source", ["timm", "lavis", "blip2"])
def test_the_tower_is_that_of_each_file_of_it(source: str, opt: Theirs, tmp_path: Path) -> None:
    """Against transformers' Blip2VisionModel on the same weights."""
    system: Any = mm.load(write_release(tmp_path / "release", opt, source), "cpu")[0]
    eva = {name: tensor.detach() for name, tensor in opt.eva.state_dict().items()}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    about = transformers.Blip2VisionConfig(**sizes, image_size=SIDE, patch_size=8)
    blip2 = transformers.Blip2VisionModel(about).eval()
    blip2.load_state_dict({**blip2.state_dict(), **blip2_names(eva)})
    blip2.post_layernorm = nn.Identity()
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = blip2(pixels).last_hidden_state, system.vision.of_squares(pixels)
    assert found.shape == (3, FEATURES, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_read_of_the_full_tower_is_39_blocks_and_no_norm() -> None:
    with torch.device("meta"):
        config = VisionConfig(
            name=TOWER, pretrained=False, image_size=224, block=-1, class_token=True,
            options={"depth": 39, "use_post_transformer_norm": False},
        )  # fmt: skip
        own = VisionTower(config, weights=False).featurizer.state_dict()
        published = timm.create_model("eva_giant_patch14_clip_224", num_classes=1024).state_dict()
    assert config.features == 257
    found = of_eva(published, own)
    assert found.keys() == own.keys() and all(found[name].shape == own[name].shape for name in own)
    assert {name.split(".")[0] for name in published.keys() - found.keys()} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in published.keys() - found.keys() if name.startswith("blocks")} == {"39"}


def test_keys_of_blip2_with_a_bias_are_another_tower(opt: Theirs) -> None:
    tensors = blip2_names({name: tensor.detach() for name, tensor in opt.eva.state_dict().items()})
    tensors["encoder.layers.0.self_attn.qkv.bias"] = torch.ones(96)
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.self_attn\.qkv\.bias: keys have a bias"):
        of_eva(tensors, ["blocks.0.attn.q_bias"])


@pytest.mark.parametrize("family", ["opt", "llm"])
def test_it_is_read_and_written_as_it_was(family: str, tmp_path: Path) -> None:
    theirs = Theirs(family)
    release = write_release(tmp_path / "release", theirs)
    system: Any
    system, layout, config = mm.load(release, "cpu")
    own = state(system)
    assert_same({f"connector.{n}": own[f"connector.{n}"] for n in ("norm.weight", "norm.bias")},
                {f"connector.norm.{n}": t.detach() for n, t in theirs.norm.named_parameters()})  # fmt: skip
    rows = theirs.language.get_input_embeddings().weight.half().float()
    assert torch.equal(system.language.get_input_embeddings().weight[: len(rows)], rows)
    model, template = config.model, layout.template
    assert (model.connector.r, model.connector.positions(model.vision), model.image, model.video) == (1, 3, True, None)
    assert template.bos == "</s>" and template.bos_behind_media and template.after_media == ""
    pad = layout.tokenizer.token(layout.pad)
    assert (template.eos, pad) == (("Ċ", "<pad>") if family == "opt" else ("</s>", "[PAD]"))
    assert (len(layout.tokenizer), len(rows)) == ((TOKENS, TOKENS + 12) if family == "opt" else (TOKENS + 1, TOKENS))

    note = export(release, tmp_path / "out")
    assert note is not None and NAMES[family] in note
    assert_same(saved(tmp_path / "out"), saved(release))
    assert_same(state(mm.load(tmp_path / "out", "cpu")[0]), own)
    packed = batch_of(layout, "a red fox", "two hats", "snow")
    losses = system.train()(packed).losses["next_token"]
    losses.backward()
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if name.startswith("connector."):
                parameter.sub_(0.1 * parameter.grad)
    freeze(system, [ParamRule(match=r"vision\..*", freeze=True), ParamRule(match=r"language\..*", freeze=True)])
    (tmp_path / "trained").mkdir()
    lavis.write(system, model, tmp_path / "trained")
    trained, before = saved(tmp_path / "trained"), saved(release)
    assert trained.keys() == before.keys()
    untouched = {name for name in trained if torch.equal(trained[name], before[name])}
    # A bias of keys moves no attention: its gradient is rounding.
    assert {name for name in untouched if not name.endswith(".key.bias")} == {
        "VLconnector.pooler.dense.weight", "VLconnector.pooler.dense.bias",
    }  # fmt: skip
    assert_same(state(mm.load(tmp_path / "trained", "cpu")[0]), state(system))


def test_vicuna_is_read_with_llamas_tokenizer(tmp_path: Path) -> None:
    """Its own repository has a tokenizer.model alone."""
    release = write_release(tmp_path / "release", Theirs("llm"))
    expected = mm.load(release, "cpu")[1].fingerprint()
    other = release / "hf-internal-testing/llama-tokenizer"
    other.mkdir(parents=True)
    shutil.move(release / NAMES["llm"] / "tokenizer.json", other)
    _, layout, config = mm.load(release, "cpu")
    assert config.model.language.tokenizer == str(other) and layout.fingerprint() == expected
    shutil.rmtree(other)
    found = lavis.checkpoint(release)
    assert found is not None and found.section()["language"]["tokenizer"] == "hf-internal-testing/llama-tokenizer"


def test_what_comes_out_is_that_of_bert_where_nothing_merges(opt: Theirs, folder: Path) -> None:
    config = SimVLGConfig.model_validate({"released": str(folder), "connector": {"r": 0}})
    system = config.build().eval()
    features = torch.randn(2, FEATURES, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bert = opt.bert(inputs_embeds=opt.input(opt.norm(features))).last_hidden_state
        torch.testing.assert_close(system.connector(features), opt.output(bert), rtol=1e-5, atol=1e-5)


def test_clips(tmp_path: Path) -> None:
    theirs = Theirs("opt", clips=True)
    release = write_release(tmp_path / "release", theirs)
    system: Any
    system, layout, config = mm.load(release, "cpu")
    assert config.model.image is False and config.model.video.frames == 4 and layout.video is not None
    key = theirs.temporal["visual_encoder.blocks.1.temporal_merge.key.weight"]
    assert torch.equal(system.vision.temporal[1].key.weight, key)
    alpha = theirs.temporal["visual_encoder.blocks.0.temporal_merge.alpha"]
    assert torch.equal(system.vision.temporal[0].alpha, alpha[None])
    shape = (4, 3, SIDE, SIDE)
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten()
    clip = MediaBatch(
        values=one, shapes=torch.tensor([shape]), offsets=torch.tensor([0, len(one)]), row=torch.tensor([0]),
        position=torch.tensor([0]), length=torch.tensor([3]), cost=torch.tensor([16]),
    )  # fmt: skip
    system.connect("video", system.features("video", clip)).square().sum().backward()
    assert all(p.grad is not None for p in system.vision.temporal.parameters())
    assert export(release, tmp_path / "out")
    assert_same(saved(tmp_path / "out"), saved(release))


def test_trained_further_and_exported(kept: Path, cache: Path, tmp_path: Path) -> None:
    """In a run that freezes what the release froze, the checkpoint has the same names, and the frozen parts are the
    release's."""
    freezes = [{"match": "(vision|language).*", "freeze": True}]
    run = run_of(tmp_path, cache, {"kind": "simvlg", "released": str(kept)}, freezes)
    assert main(["train", str(run)]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    trained, before = saved(tmp_path / "out"), saved(kept)
    assert trained.keys() == before.keys()
    assert not any(torch.equal(trained[name], before[name]) for name in ("ln_vision.weight", "opt_proj.weight"))
    system, released = (state(mm.load(folder, "cpu")[0]) for folder in (tmp_path / "out", kept))
    assert_same(system, state(mm.load(tmp_path / "run", "cpu")[0]))
    parts = ("vision.", "language.", "connector.bert.pooler.")
    assert_same(*({n: t for n, t in one.items() if n.startswith(parts)} for one in (system, released)))


def test_a_model_of_clips_begins_from_a_checkpoint_of_pictures(kept: Path) -> None:
    """As MSR-VTT is fine-tuned: what joins frames is as it always begins."""
    system = SimVLGConfig.model_validate({"released": str(kept), "video": {"frames": 2}}).build()
    assert system.vision.temporal is not None
    assert all(float(module.alpha.detach()) == 0 for module in system.vision.temporal)  # type: ignore[arg-type, operator]
    assert torch.equal(system.connector.input.weight, saved(kept)["VL_proj.weight"])


@pytest.mark.parametrize("what", ["buffers", "the tied head", "no optimizer", "a file", "the best"])
def test_every_form_of_it_is_read(what: str, opt: Theirs, kept: Path, folder: Path) -> None:
    path = folder / "checkpoint_5000.pth"
    checkpoint = torch.load(path, weights_only=True)
    if what == "buffers":  # of older versions of transformers
        checkpoint["model"]["VLconnector.embeddings.position_ids"] = torch.arange(12)[None]
    elif what == "the tied head":  # no parameter for LAVIS, which counts it under its first name
        head = opt.language.get_output_embeddings().weight.detach().half()
        checkpoint["model"]["opt_model.lm_head.weight"] = head
    elif what == "no optimizer":
        checkpoint = {"model": checkpoint["model"], "config": checkpoint["config"]}
    elif what == "the best":
        torch.save({**checkpoint, "model": {"VL_proj.weight": torch.zeros(1)}}, folder / "checkpoint_90000.pth")
        path.unlink()
        path = folder / "checkpoint_best.pth"
    torch.save(checkpoint, path)
    expected = state(mm.load(kept, "cpu")[0])
    assert_same(state(mm.load(path if what == "a file" else folder, "cpu")[0]), expected)
    if what in ("buffers", "the tied head"):
        export(folder, folder.parent / "out")
        assert_same(saved(folder.parent / "out"), checkpoint["model"])


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda model: model.pop(name)


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda model: model.update({name: torch.zeros(shape)})


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (drop("ln_vision.bias"), r"missing +ln_vision\.bias +expected \[32\]"),
    "of bert": (drop("VLconnector.pooler.dense.bias"), r"missing +VLconnector\.pooler\.dense\.bias"),
    "words": (
        add("VLconnector.embeddings.word_embeddings.weight", 9, HIDDEN),
        r"unexpected +VLconnector\.embeddings\.word",
    ),
    "beta": (add("vision_proj.weight", 2, 2), r"unexpected +vision_proj\.weight +found \[2, 2\]"),
    "shape": (add("VL_proj.bias", 3), r"shape +VL_proj\.bias +found \[3\], expected \[48\]"),
    "a piece of the tower": (add("visual_encoder.cls_token", 1, 1, 32), r"missing +visual_encoder\.pos_embed"),
    "a piece of the language model": (
        add("opt_model.model.decoder.final_layer_norm.bias", WIDTH),
        r"missing +opt_model\.model\.decoder\.final_layer_norm\.weight",
    ),
    "another language model": (
        add("opt_model.lm_head.weight", TOKENS + 12, WIDTH),
        r"is that of another language model",
    ),
    "clips in part": (
        add("visual_encoder.blocks.1.temporal_merge.alpha"),
        r"missing +visual_encoder\.blocks\.\S*temporal_merge\.",
    ),
    "several alphas": (
        lambda model: model.update({"visual_encoder.blocks.0.temporal_merge.alpha": torch.zeros(2)}),
        r"shape +visual_encoder\.blocks\.0\.temporal_merge\.alpha +found \[2\]",
    ),
    "a flat projection": (add("opt_proj.weight", 4), r"opt_proj\.weight in its `model` is \[4\], expected 2 dim"),
    "both": (add("llm_proj.weight", 4, 4), r"expected either opt_proj or llm_proj"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(what: str, opt: Theirs, folder: Path) -> None:
    change, message = REFUSED[what]
    checkpoint = torch.load(folder / "checkpoint_5000.pth", weights_only=True)
    change(checkpoint["model"])
    torch.save(checkpoint, folder / "checkpoint_5000.pth")
    with pytest.raises(CheckpointError, match=message):
        mm.load(folder, "cpu")


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the code of a release was run",))


def test_nothing_of_it_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(folder / "checkpoint_5000.pth", weights_only=True)
    torch.save({**checkpoint, "config": Runs()}, folder / "checkpoint_5000.pth", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        mm.load(folder, "cpu")
    assert "was run" not in capsys.readouterr().out


def test_what_is_missing_around_it_is_said(folder: Path) -> None:
    (folder / EVA).unlink()
    with pytest.raises(CheckpointError, match=rf"put LAVIS' {EVA} into .*model\.safetensors of .* into .*BLIP-2's"):
        mm.load(folder, "cpu")
    checkpoint = torch.load(folder / "checkpoint_5000.pth", weights_only=True)
    del checkpoint["config"]
    torch.save(checkpoint, folder / "checkpoint_5000.pth")
    shutil.move(folder / NAMES["opt"], folder / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"32 wide.*facebook/opt-2\.7b with 2,560.*into {folder}/language"):
        mm.load(folder, "cpu")


@pytest.mark.parametrize("family", ["opt", "llm"])
def test_a_language_model_that_was_trained_is_in_the_checkpoint(family: str, cache: Path, tmp_path: Path) -> None:
    """Whoever trained it, and whatever the run froze that it comes from: what is left out is what is published."""
    theirs = Theirs(family)
    inside = FAMILIES[family].model
    same = {f"{inside}.{name}": tensor.half().float() for name, tensor in theirs.language.state_dict().items()}
    if family == "llm":  # with a row for [PAD]
        same |= {name: torch.cat([t, t.mean(0)[None]]) for name, t in same.items() if len(t) == TOKENS}
    other = {name: tensor + 1 if "norm" in name else tensor for name, tensor in same.items()}
    release = write_release(tmp_path / "release", theirs, model={**theirs.model(), **other})
    assert export(release, tmp_path / "out") is None
    assert_same(saved(tmp_path / "out"), saved(release))
    own = state(mm.load(release, "cpu")[0])
    assert_same(state(mm.load(tmp_path / "out", "cpu")[0]), own)

    freezes = [{"match": "(vision|language).*", "freeze": True}]
    run = run_of(tmp_path, cache, {"kind": "simvlg", "released": str(release)}, freezes)
    assert main(["train", str(run)]) == 0
    assert export(tmp_path / "run", tmp_path / "of a run") is None
    again = state(mm.load(tmp_path / "of a run", "cpu")[0])
    assert_same(again, state(mm.load(tmp_path / "run", "cpu")[0]))
    assert_same(*({n: t for n, t in one.items() if n.startswith("language.")} for one in (again, own)))

    whole = write_release(tmp_path / "whole", theirs, model={**theirs.model(), **same})
    note = export(whole, tmp_path / "without")
    assert note is not None and not any(name.startswith(f"{inside}.") for name in saved(tmp_path / "without"))
    assert_same(state(mm.load(tmp_path / "without", "cpu")[0]), state(mm.load(whole, "cpu")[0]))


def test_a_language_model_whose_weights_are_not_to_be_had_is_in_the_checkpoint(kept: Path, tmp_path: Path) -> None:
    system, _, config = mm.load(kept, "cpu")
    language = Path(shutil.copytree(kept / NAMES["opt"], tmp_path / "language"))
    (language / "model.safetensors").unlink()
    model = config.model.model_copy(
        update={"language": config.model.language.model_copy(update={"name": str(language)}), "released": None}
    )
    assert lavis.write(system, model, tmp_path) is None  # type: ignore[arg-type]
    assert_same(state(mm.load(tmp_path, "cpu")[0]), state(system))


@pytest.mark.parametrize("said", ["./vicuna-7b", "../..", "../opt", "a/..", "/nowhere"])
def test_a_path_is_no_name_on_the_hub(said: str, folder: Path) -> None:
    (folder.parent / "opt").mkdir()
    checkpoint = torch.load(folder / "checkpoint_5000.pth", weights_only=True)
    checkpoint["config"]["model"]["opt_model"] = said
    torch.save(checkpoint, folder / "checkpoint_5000.pth")
    found = lavis.checkpoint(folder)
    assert found is not None and found.section()["language"]["name"] == str(folder / NAMES["opt"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "expected a dict as its `config`"),
        ({"model": [1]}, "expected a dict as its `config`"),
        ({"mm": 1}, "expected a dict as its `config`"),
        ({"mm": {"vision": 1}}, "vision: "),
        ({"model": {"tome_r": "many"}}, "tome_r in its config is no number"),
        ({"model": {"image_size": [16]}}, "image_size in its config is no number"),
    ],
)
def test_damaged_configs_are_one_line(config: Any, message: str, folder: Path) -> None:
    checkpoint = torch.load(folder / "checkpoint_5000.pth", weights_only=True)
    torch.save({**checkpoint, "config": config}, folder / "checkpoint_5000.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        mm.load(folder, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["data/clips", "siglip"])
def test_a_file_is_read_wherever_it_lies(place: str, folder: Path) -> None:
    """Names with `clip` in them are asked for on the hub."""
    path = folder.parent / place / "release"
    shutil.copytree(folder, path)
    assert_same(*(state(mm.load(one / "checkpoint_5000.pth", "cpu")[0]) for one in (path, folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector": {"weighted": True}}, "plain means"),
        ({"video": {"temporal": "merge"}}, "attention or their mean"),
        ({"vision": {"merge": {"r": 1}}}, "merges nothing"),
    ],
)
def test_models_with_other_parts_are_not_written(
    changes: dict[str, Any], message: str, kept: Path, tmp_path: Path
) -> None:
    config = SimVLGConfig.model_validate({"released": str(kept), **changes})
    with pytest.raises(ConfigError, match=f"the lavis format takes .*{message}"):
        lavis.write(None, config, tmp_path)  # type: ignore[arg-type]


def test_runs_begin_from_it(kept: Path) -> None:
    tensors, _ = initial_tensors(kept)
    own = state(mm.load(kept, "cpu")[0])
    assert_same(tensors, {name: tensor for name, tensor in own.items() if name in tensors})


def test_names_of_a_full_size_checkpoint() -> None:
    """Of OPT-2.7B with bert-base: what LAVIS' code has with requires_grad, counted by hand."""
    with torch.device("meta"):
        config = SimVLGConfig.model_validate(
            {
                "vision": {"name": TOWER, "pretrained": False, "image_size": 224, "block": -1, "class_token": True},
                "connector": {"kind": "tomeformer", "config": {}},
                "language": {"config": {"model_type": "opt"}, "tokenizer": "builtin:emoji"},
                "video": {"frames": 4},
            }
        )
        connector = config.connector.build(1408, 2560)
    assert config.connector.positions(config.vision) == 29
    spelt = released_name(FAMILIES["opt"])
    names = [spelt(f"connector.{name}") for name in connector.state_dict()]
    inside = re.compile(r"(VLconnector\.\w+|\w+)\.")
    counts: dict[str, int] = {}
    for name in names:
        match = inside.match(name)
        assert match is not None
        counts[match[1]] = counts.get(match[1], 0) + 1
    assert counts == {
        "VLconnector.embeddings": 4, "VLconnector.encoder": 12 * 16, "VLconnector.pooler": 2, "ln_vision": 2,
        "VL_proj": 2, "opt_proj": 2,
    }  # fmt: skip
