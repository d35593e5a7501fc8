"""SimVLG, also EVLGen, as its authors' fork of LAVIS saves it: what was trained, and nothing of what was frozen.

    checkpoint_best.pth, checkpoint_250000.pth    torch pickle: {model, optimizer, config, scaler, iters or epoch}
    eva_vit_g.pth                                 LAVIS' file of the vision tower, where it is put beside it

`model` holds the parameters with `requires_grad` and all buffers: `ln_vision`, `VL_proj`, `VLconnector` (a BERT without
word embeddings), `opt_proj` or `llm_proj`; of clips also `visual_encoder.blocks.N.temporal_merge`. So what is missing
has to be exactly the vision tower and the language model, which come from where they were published, unless `model` has
them because they were trained. `config` is a plain dict, of which `model` is used; the optimizer's state is not looked
at.

The tower is EVA-CLIP's ViT-g without its last block and final norm. There are three files of the same weights, by the
same or other names (`of_eva`): timm's, LAVIS' and, in the folders of BLIP-2 of transformers, `vision_model`.

Sources: github yiren-jian/EVLGen, `lavis/models/blip2_models/liptome_{opt,vicuna,video_opt}.py`, `modeling_bert.py`,
`lavis/models/eva_vit_g.py`, `lavis/runners/runner_iter.py`, `lavis/configs/models/liptome/*.yaml`; github
salesforce/LAVIS, `lavis/common/config.py`, `lavis/processors/blip_processors.py`.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mm.errors import CheckpointError, ConfigError
from mm.models.released.release import Repository, fetch, fit, read_pickle, read_tensors, weight_files

if TYPE_CHECKING:
    from torch import Tensor

    from mm.models.prompts import Form
    from mm.models.systems.simvlg.config import SimVLGConfig
    from mm.models.systems.simvlg.model import SimVLG

TOWER = "timm/eva_giant_patch14_clip_224.laion400m"
EVA = "eva_vit_g.pth"
BLIP2 = "Salesforce/blip2-opt-2.7b"
BERT = ("google-bert/bert-base-uncased", "bert-base-uncased")
VISION, LANGUAGE = "vision.featurizer.", "language."
HEAD = "lm_head.weight"
"""LAVIS keeps it where it is tied to the embeddings: a parameter counts under the first of its names alone, and what is
no parameter is kept as a buffer is."""
ANY_LANGUAGE = "language"
"""A folder beside a checkpoint that stands for a language model of any name."""
BERT_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "type_vocab_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip
HEAD_WIDTH = 64
"""Of a BERT that no config.json describes."""
# CLIP's.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FRAMES = 4
R = 19


@dataclass(frozen=True, slots=True)
class Family:
    """Language models that are called `model` in a checkpoint, with a projection `projection` into their width; those
    that SimVLG was released with by width, and how a text is spelt for them."""

    model: str
    projection: str
    names: dict[int, str]
    template: dict[str, Any]
    added_tokens: tuple[str, ...] = ()
    tokenizer: str | None = None
    """Where a language model's own repository has none that is read here: the same one."""


FAMILIES = {
    # OPT's tokenizer opens every text with </s>; a caption ends with a line break, which its vocabulary calls Ċ.
    "opt": Family(
        "opt_model", "opt_proj", {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"},
        {"bos": "</s>", "eos": "Ċ", "pad": "<pad>"},
    ),
    # Begin, end and unknown are all </s>, and the padding is a token of its own, whose row nothing looks at.
    "llm": Family(
        "llm_model", "llm_proj", {4096: "lmsys/vicuna-7b-v1.1", 5120: "lmsys/vicuna-13b-v1.1"},
        {"bos": "</s>", "eos": "</s>", "pad": "[PAD]"}, ("[PAD]",), "hf-internal-testing/llama-tokenizer",
    ),
}  # fmt: skip
TEMPLATE = {"after_media": "", "chat": "plain", "bos_behind_media": True}
NAMES = {
    "connector.norm.": "ln_vision.",
    "connector.input.": "VL_proj.",
    "connector.bert.": "VLconnector.",
    "vision.featurizer.": "visual_encoder.",
}
"""Beginnings of names here, and there."""
TEMPORAL = re.compile(r"vision\.temporal\.(\d+)\.(.+)")
BUFFERS = re.compile(
    r"VLconnector\.embeddings\.(position_ids|token_type_ids)"
    r"|(opt|llm)_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""What follows from a config, and versions of transformers before 4.31 or so kept."""
IN_BLIP2 = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "encoder.layers.": "blocks.",
}
IN_BLIP2_BLOCK = {"layer_norm1.": "norm1.", "layer_norm2.": "norm2.", "self_attn.projection.": "attn.proj."}


@dataclass(frozen=True, slots=True)
class LavisCheckpoint:
    """A checkpoint in this layout; what is in the file, and of `config` the part `model`."""

    kind: ClassVar[str] = "simvlg"
    path: Path
    found: "dict[str, Tensor]"
    about: dict[str, Any]

    @property
    def form(self) -> "Form":
        return "raw"

    @property
    def repository(self) -> Repository:
        return Repository(str(self.path.parent))

    def section(self) -> dict[str, Any]:
        if "mm" in self.about:
            return dict(self.about["mm"])
        family = self._family()
        language = self._language(family)
        clips = any(".temporal_merge." in name for name in self.found)
        return {
            "vision": {
                "name": TOWER,
                "image_size": self._number("image_size", 224),
                "block": -1,
                "class_token": True,
                "mean": MEAN,
                "std": STD,
                "options": self._tower_options(),
            },
            "connector": {
                "kind": "tomeformer",
                "config": self._bert(),
                "r": self._number("tome_r", R),
            },
            "language": {
                "name": language,
                "tokenizer": self._tokenizer(family, language),
                "added_tokens": family.added_tokens,
                "new_rows": "mean" if family.added_tokens else None,
            },
            "template": {**family.template, **TEMPLATE},
            "image": not clips,
            "video": {"frames": FRAMES, "temporal": "attention"} if clips else None,
        }

    def tensors(self, system: Any) -> "dict[str, Tensor]":
        family = self._family()
        spelt = released_name(family)
        found = {name: tensor for name, tensor in self.found.items() if not BUFFERS.fullmatch(name)}
        found |= {name: tensor[None] for name, tensor in found.items() if name.endswith(".alpha") and tensor.ndim == 0}
        own = system.state_dict()
        # Only a whole part is taken from elsewhere: of one that is there in pieces `fit` says what is missing.
        if not any(name.startswith("visual_encoder.") and ".temporal_merge." not in name for name in found):
            tower = self._tower([name.removeprefix(VISION) for name in own if name.startswith(VISION)])
            found |= {f"visual_encoder.{name}": tensor for name, tensor in tower.items()}
        head = found.pop(f"{family.model}.{HEAD}", None) if system.language.config.tie_word_embeddings else None
        if not any(name.startswith(f"{family.model}.") for name in found):
            language = published(system.language, system.language.config.name_or_path)
            if head is not None and not (head.shape == language[HEAD].shape and (head == language[HEAD]).all()):
                raise CheckpointError(
                    f"{self.path}: {family.model}.{HEAD} is that of another language model than "
                    f"{system.language.config.name_or_path}; set model.language.name"
                )
            found |= {f"{family.model}.{name}": tensor for name, tensor in language.items()}
        elif head is not None:
            found[f"{family.model}.{HEAD}"] = head
        joins = {}
        if not any(".temporal_merge." in name for name in found):
            # A checkpoint of pictures says nothing of how frames are joined; that begins as it always does.
            joins = {name: tensor for name, tensor in own.items() if name.startswith(("vision.temporal.", "temporal."))}
        fitted = fit(system, found | {spelt(name): tensor for name, tensor in joins.items()}, str(self.path), spelt)
        return {name: tensor for name, tensor in fitted.items() if name not in joins}

    def kept(self) -> "dict[str, Tensor]":
        """What is there and has no place in a model here, or only by another name, by its name there: buffers, and the
        head of a language model of which nothing else is there."""
        inside = f"{self._family().model}."
        found = {name: tensor for name, tensor in self.found.items() if BUFFERS.fullmatch(name)}
        language = [name for name in self.found if name.startswith(inside) and name not in found]
        if language == [f"{inside}{HEAD}"]:
            found[language[0]] = self.found[language[0]]
        return found

    def _family(self) -> Family:
        there = [family for family in FAMILIES.values() if f"{family.projection}.weight" in self.found]
        if len(there) != 1:
            raise CheckpointError(
                f"{self.path}: expected either opt_proj or llm_proj in its `model`, found {len(there)}"
            )
        return there[0]

    def _language(self, family: Family) -> str:
        """A folder (beside the checkpoint, or where its config says), else a name on the hub."""
        width = self._shape(f"{family.projection}.weight")[0]
        said = str(self.about.get(family.model) or "")
        hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", said)  # which leads out of no folder
        known = family.names.get(width)
        for name in (said if hub else None, known, *family.names.values(), ANY_LANGUAGE):
            if name is not None and (folder := self.repository.inner(name)) is not None:
                return str(folder)
        if Path(said).is_absolute() and Path(said).is_dir():
            return said
        if hub:
            return said
        if known is None:
            raise CheckpointError(
                f"{self.path}: its language model is {width:,} wide, and the known ones are "
                + ", ".join(f"{name} with {size:,}" for size, name in family.names.items())
                + f": put the language model into {self.repository.folder / ANY_LANGUAGE}"
            )
        return known

    def _tokenizer(self, family: Family, language: str) -> str | None:
        """None where the language model's own is read."""
        if family.tokenizer is None or (Path(language) / "tokenizer.json").is_file():
            return None
        return str(self.repository.inner(family.tokenizer) or family.tokenizer)

    def _bert(self) -> dict[str, Any]:
        """The connector's structure: a BertConfig, of which the tensors say the sizes."""
        folders = [folder for name in BERT if (folder := self.repository.inner(name)) is not None]
        published = Repository(str(folders[0])).json("config.json") if folders else {}
        positions, width = self._shape("VLconnector.embeddings.position_embeddings.weight")
        layers = [
            int(match[1])
            for name in self.found
            if (match := re.match(r"VLconnector\.encoder\.layer\.(\d+)\.", name)) is not None
        ]
        return {
            "num_attention_heads": max(1, width // HEAD_WIDTH),
            **{name: published[name] for name in BERT_FIELDS if name in published},
            "hidden_size": width,
            "num_hidden_layers": 1 + max(layers, default=-1),
            "intermediate_size": self._shape("VLconnector.encoder.layer.0.intermediate.dense.weight")[0],
            "max_position_embeddings": positions,
            "type_vocab_size": self._shape("VLconnector.embeddings.token_type_embeddings.weight")[0],
        }

    def _shape(self, name: str) -> list[int]:
        """Of a matrix."""
        if name not in self.found:
            raise CheckpointError(f"{self.path}: there is no {name} in its `model`, which every SimVLG has")
        shape = list(self.found[name].shape)
        if len(shape) != 2:
            raise CheckpointError(f"{self.path}: {name} in its `model` is {shape}, expected 2 dimensions")
        return shape

    def _number(self, setting: str, default: int) -> int:
        """Of its config."""
        value = self.about.get(setting, default)
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise CheckpointError(f"{self.path}: {setting} in its config is no number but {value!r}") from None

    def _tower_options(self) -> dict[str, Any]:
        """Without what LAVIS leaves out, and, of a tower that is another than timm's of that name, its `model_args`."""
        options = {"depth": 39, "use_post_transformer_norm": False}
        inner = self.repository.inner(TOWER)
        if inner is not None and (inner / "config.json").is_file():
            given = Repository(str(inner)).json("config.json").get("model_args", {})
            if not isinstance(given, dict):
                raise CheckpointError(f"{inner}/config.json: expected an object as its model_args")
            options |= given
        return options

    def _tower(self, names: list[str]) -> "dict[str, Tensor]":
        """The weights of the frozen tower by timm's names, from the first of the places where they may be."""
        if self.repository.has(EVA):
            return of_eva(read_tensors(self.repository.file(EVA)), names)
        for name in (TOWER, BLIP2):
            folder = self.repository.inner(name)
            if folder is not None and (paths := weight_files(Repository(str(folder)))):
                return of_eva(read_tensors(*paths), names)
        try:
            return of_eva(read_tensors(fetch(TOWER, "model.safetensors")), names)
        except CheckpointError as error:
            folder = self.repository.folder
            raise CheckpointError(
                f"{self.path}: its vision tower was frozen and is not in it, and timm's weights are not to be had: "
                f"{error}; without network, put LAVIS' {EVA} into {folder}/, or model.safetensors of "
                f"https://huggingface.co/{TOWER} into {folder / TOWER}/, or BLIP-2's weights into {folder / BLIP2}/"
            ) from None


def checkpoint(name: Path | str) -> LavisCheckpoint | None:
    """The release in a file, or in a folder that holds one (`checkpoint_best.pth`, else the furthest); None where it is
    none. Raises `CheckpointError`."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        saved = sorted(path.glob("checkpoint_*.pth"), key=lambda file: int("0" + re.sub(r"\D", "", file.stem)))
        others = [file for file in path.glob("*.pth") if file.name != EVA]
        best = [file for file in saved if file.stem == "checkpoint_best"]
        chosen = best or saved[-1:] or (others if len(others) == 1 else [])
        if not chosen:
            return None
        path = chosen[0]
    elif path.suffix != ".pth" or not path.is_file():
        return None
    import torch

    loaded = read_pickle(path)
    found = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(found, dict) or not any(str(name).startswith("VLconnector.") for name in found):
        return None
    if odd := [name for name, one in found.items() if not (isinstance(name, str) and isinstance(one, torch.Tensor))]:
        raise CheckpointError(f"{path}: {odd[0]} in its `model` is no tensor by name")
    config = loaded.get("config") or {}
    about = (config.get("model") or {}) if isinstance(config, dict) else None
    ours = {"mm": config["mm"]} if isinstance(config, dict) and "mm" in config else {}
    if not (isinstance(about, dict) and all(isinstance(values, dict) for values in ours.values())):
        raise CheckpointError(f"{path}: expected a dict as its `config`, and in it as `model`")
    return LavisCheckpoint(path.resolve(), found, {**about, **ours})


def published(language: Any, name: str) -> "dict[str, Tensor]":
    """The weights of a published model whose structure the language model has, with as many rows. Raises
    `ConfigError`."""
    from mm.models import backbone
    from mm.models.config import LanguageConfig
    from mm.models.vocabulary import add_rows

    rows, model = language.get_input_embeddings().num_embeddings, backbone.load(LanguageConfig(name=name), 0)
    if model.get_input_embeddings().num_embeddings < rows:
        add_rows(model, rows, "mean")
    found: dict[str, Tensor] = model.state_dict()
    return found


def _is_published(language: Any, name: str) -> bool:
    """Whether reading would find the same weights again; not where the published ones cannot be had."""
    import torch

    try:
        theirs = published(language, name)
    except ConfigError:
        return False
    own = language.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[part].cpu(), theirs[part]) for part in own)


def released_name(family: Family) -> Callable[[str], str]:
    """A function of a parameter's name here that gives the one there."""
    names = {**NAMES, "connector.output.": f"{family.projection}.", "language.": f"{family.model}."}

    def spelt(name: str) -> str:
        if (match := TEMPORAL.fullmatch(name)) is not None:
            return f"visual_encoder.blocks.{match[1]}.temporal_merge.{match[2]}"
        ours = next((ours for ours in names if name.startswith(ours)), "")
        return names.get(ours, "") + name.removeprefix(ours)

    return spelt


def of_eva(found: "dict[str, Tensor]", names: Collection[str]) -> "dict[str, Tensor]":
    """Those of a tower's parameters that a file of EVA-CLIP's has, by timm's names.

    Args:
        found: timm's file, LAVIS' (the same names), or one of BLIP-2 in transformers.
        names: of the tower's parameters. What a file has besides, such as the last block, which SimVLG and BLIP-2
            leave out, is left out.
    """
    inside = "vision_model."
    if any(name.startswith(inside) for name in found):
        found = {name.removeprefix(inside): tensor for name, tensor in found.items() if name.startswith(inside)}
    if "embeddings.class_embedding" in found:
        found = _of_blip2(found)
    return {name: found[name] for name in names if name in found}


def _of_blip2(found: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """By timm's names. Biases of queries, keys and values are one tensor there; those of keys are zeros."""
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in found.items():
        begins = next((begins for begins in IN_BLIP2 if theirs.startswith(begins)), None)
        if begins is None:
            continue  # post_layernorm, which BLIP-2 trained
        name = IN_BLIP2[begins] + theirs.removeprefix(begins)
        for inner, timm in IN_BLIP2_BLOCK.items():
            name = name.replace(f".{inner}", f".{timm}")
        name = name.replace(".self_attn.", ".attn.")
        if name.endswith(".attn.qkv.bias"):
            query, key, value = tensor.chunk(3)
            if key.any():
                raise CheckpointError(
                    f"{theirs}: keys have a bias, which EVA's attention does not; this is another tower"
                )
            stem = name.removesuffix("qkv.bias")
            renamed |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        else:
            renamed[name] = tensor
    return renamed


def write(system: "SimVLG", config: "SimVLGConfig", out: Path) -> str | None:
    """Write the checkpoint into the folder `out`, as LAVIS does: without the tower, unless something of it has
    `requires_grad`, and without the language model where it is the published one, number for number.

    A frozen tower is written beside it as LAVIS' file of it, so that it is there whatever was done to it. What LAVIS'
    config has no place for stands in the checkpoint's `config` under `mm`, a key that LAVIS does not read.

    Returns:
        What a user of the folder has to know, if anything.

    Raises:
        ConfigError: the model has parts that SimVLG's has no place for.
    """
    import torch

    connector, video = config.connector, config.video
    wrong = None
    if connector.kind != "tomeformer" or connector.weighted:
        wrong = "a tomeformer that takes plain means (model.connector)"
    elif video is not None and video.temporal == "merge":
        wrong = "clips whose frames are joined by attention or their mean (model.video.temporal)"
    elif config.vision.merge is not None:
        wrong = "a tower that merges nothing (model.vision.merge)"
    elif config.language.name is None:
        wrong = "language models that were published: their weights are read from where model.language.name says"
    if wrong is not None:
        raise ConfigError(f"the lavis format takes {wrong}")
    family = FAMILIES["opt" if system.language.config.model_type == "opt" else "llm"]
    spelt = released_name(family)
    language = str(config.language.name)
    if Path(language).expanduser().is_dir():
        language = str(Path(language).expanduser().resolve())
    frozen = not any(parameter.requires_grad for parameter in system.vision.featurizer.parameters())
    left_out = [VISION] * frozen + [LANGUAGE] * _is_published(system.language, language)
    own = {name: tensor.cpu() for name, tensor in system.state_dict().items()}
    state = {spelt(name): tensor for name, tensor in own.items() if not name.startswith(tuple(left_out))}
    state |= {name: tensor.reshape(()) for name, tensor in state.items() if name.endswith(".alpha")}
    if VISION in left_out:
        torch.save({name.removeprefix(VISION): own[name] for name in own if name.startswith(VISION)}, out / EVA)
    about = {
        "arch": f"liptome_{'video_' if video else ''}{'opt' if family is FAMILIES['opt'] else 'vicuna'}",
        "image_size": config.vision.image_size,
        "num_layers": system.connector.bert.config.num_hidden_layers,
        "tome_r": connector.r,
        "freeze_vit": True,
        family.model: language,
    }
    # The structure of the connector, whatever it began as.
    values = system.connector.bert.config.to_dict()
    bert = {name: values[name] for name in BERT_FIELDS}
    mm = config.model_dump(mode="json", exclude={"released"})
    mm["connector"] |= {"name": None, "config": bert}
    mm["language"] |= {"name": language}
    saved = {"model": {**_kept(config), **state}, "config": {"model": about, "mm": mm}, "scaler": None, "iters": 0}
    torch.save(saved, out / "checkpoint_0.pth")
    return f"the language model is not in it: it is read from {language}" if LANGUAGE in left_out else None


def _kept(config: "SimVLGConfig") -> "dict[str, Tensor]":
    """What the release that the model began as has besides, if it is still there."""
    try:
        release = checkpoint(config.released) if config.released else None
    except CheckpointError:
        return {}
    return release.kept() if release else {}
