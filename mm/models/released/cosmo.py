"""COSMO as its authors released it: the state dict of their whole model, much of it under several names.

    config.json, or a YAML file of theirs     of a run, what it was configured by: its `model_params`
    pytorch_model.bin or model.safetensors    the tensors, in one file or several; of a run in its newest checkpoint-N

The repositories on the hub have weights alone, as far as is known, so what names and shapes of the tensors say is taken
from them; which language model it is follows from its size. Its config.json and tokenizer are not in the release but in
the repository of its name.

Each decoder layer is there twice and each gated block too (`released_names`), for their language model keeps its layers
in lists beside the one that it runs. In a file of torch's these are one and the same; where they are not, they have to
be equal. Of CLIP the text tower is there as well, which nothing of COSMO runs.

Sources: github showlab/cosmo, `src/multimodal_model/{model_architecture,load_model}.py`, `language_model/*.py`,
`vision_model/*.py`, `src/main_pretrain.py`, `src/config/train_server/base_180m.yaml`.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import yaml

from mm.data.tokenizer import Tokenizer
from mm.errors import CheckpointError, ConfigError
from mm.models.released.release import Repository, fit, read_tensors, weight_files
from mm.settings import merge

if TYPE_CHECKING:
    from torch import Tensor

    from mm.models.prompts import Form
    from mm.models.systems.cosmo.config import CosmoConfig
    from mm.models.systems.cosmo.model import Cosmo


@dataclass(frozen=True, slots=True)
class Family:
    """Language models that are alike: where a state dict has their decoder layers, embeddings and head, which of them
    COSMO was released with, its width and layers, and the token that its tokenizer puts in front of a text.

    The release has the characters `<s>` besides, which are no token of OPT's or NeoX's, and of Mistral's the same one
    twice; that is not reproduced.
    """

    layers: str
    embeddings: str
    head: str
    names: tuple[str, ...]
    size: tuple[int, int]
    bos: str | None


FAMILIES = {
    "opt": Family(
        "model.decoder.layers", "model.decoder.embed_tokens.weight", "lm_head.weight",
        ("facebook/opt-iml-max-1.3b", "facebook/opt-iml-1.3b"), (2048, 24), "</s>",
    ),
    "gpt_neox": Family(
        "gpt_neox.layers", "gpt_neox.embed_in.weight", "embed_out.weight",
        ("togethercomputer/RedPajama-INCITE-Base-3B-v1",), (2560, 32), None,
    ),
    "mistral": Family(
        "model.layers", "model.embed_tokens.weight", "lm_head.weight",
        ("mistralai/Mistral-7B-v0.1",), (4096, 32), "<s>",
    ),
}  # fmt: skip
ADDED_TOKENS = ("<|endofchunk|>", "<visual>", "<|beginofchunk|>", "<human>", "<gpt>", "<PAD>")
"""Appended to the language model's tokenizer in this order, and as many rows to its embeddings."""
ANY_LANGUAGE = "language"
"""A folder in a local release that stands for a language model of any name."""
# ImageNet's, though the tower is CLIP's: in training and evaluation.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FRAMES = 3
ARCH, TAG = "ViT-L-14", "openai"
HEAD_WIDTH = 64
INNER = 8 * HEAD_WIDTH
NAMES = {
    "vision.featurizer.": "vision_encoder.visual.",
    "resampler.": "perceiver.",
    "text_query.latent": "text_latent",
    "text_query.attn.": "text_learn_attnetion_layer.",
    "text_query.ff.": "text_learn_ff.",
    "text_query.norm.weight": "text_cls_norm.gamma",
    "image_projection.": "img_to_latents.to_latents.",
    "text_projection.": "text_to_latents.to_latents.",
    "temperature": "temperature",
    "language.": "lang_model.",
}
"""Beginnings of names here, and there."""
LAYER = re.compile(r"language\.(\D+)\.(\d+)\.(gated\.)?(.+)")
BLOCK = re.compile(r"lang_model\.(?:gated_cross_attn_layers\.(\d+)|\D+\.(\d+)\.gated_cross_attn_layer)\.")
DECODER = re.compile(r"lang_model\.(?:old_decoder_blocks\.(\d+)|\D+\.(\d+)\.decoder_layer)\.")
ZEROS = "text_cls_norm.beta"
"""A buffer: the norm has no bias."""
UNUSED = re.compile(
    r"vision_encoder\.(positional_embedding|text_projection|logit_scale|attn_mask|token_embedding\.weight"
    r"|ln_final\.(weight|bias)|transformer\.resblocks\.\d+\.(ln_[12]\.(weight|bias)|attn\.in_proj_(weight|bias)"
    r"|attn\.out_proj\.(weight|bias)|mlp\.c_(fc|proj)\.(weight|bias)))"
    r"|lang_model\..+\.(attention|self_attn)\.(bias|masked_bias|rotary_emb\.inv_freq)"
)
"""CLIP's text tower, and what attention derives from a config, which older versions of transformers saved."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
NEW = "new_tokens."
"""Of a model that trains the rows of added tokens by themselves; a release has them in its embeddings and head."""
NOT_SETTINGS = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True)
class CosmoFolder:
    """A release in this layout. `about`: its config.json, empty where it has none; `paths`: the files of weights."""

    kind: ClassVar[str] = "cosmo"
    repository: Repository
    about: dict[str, Any]
    paths: tuple[Path, ...]

    @property
    def form(self) -> "Form":
        return "raw"

    def section(self) -> dict[str, Any]:
        tensors = read_tensors(*self.paths)
        family = self._family(tensors)
        language = self._language(tensors, family)
        if "mm" in self.about:
            if not isinstance(self.about["mm"], dict):
                raise CheckpointError(f"{self.where}: expected an object as the mm of its config.json")
            return merge({"language": language}, self.about["mm"])
        params = self._params("multimodality_model")
        if params.get("qv_norm"):
            raise CheckpointError(f"{self.where}: qv_norm is true in its config.json; models with it are not run here")
        blocks, layers = _numbers(tensors, BLOCK), _count(tensors, DECODER)
        if not blocks:
            raise CheckpointError(f"{self.where}: there is no gated block (lang_model.gated_cross_attn_layers.N)")
        interval = blocks[1] - blocks[0] if len(blocks) > 1 else max(1, layers - blocks[0])
        if blocks != list(range(blocks[0], layers, interval)):
            raise CheckpointError(
                f"{self.where}: gated blocks stand before layers {', '.join(map(str, blocks))} of {layers}; expected "
                f"one before every so many, from the first of them to the end"
            )
        queries = [name for name in tensors if BLOCK.match(name) and name.endswith(".attn.to_q.weight")]
        query = next(iter(queries), f"lang_model.gated_cross_attn_layers.{blocks[0]}.attn.to_q.weight")
        return {
            "vision": self._vision(tensors),
            "language": language,
            "template": {"bos": family.bos, "chat": "plain"},
            "frames": FRAMES,
            "resampler": {
                "latents": self._shape(tensors, "perceiver.latents")[0] - 1,
                "depth": _count(tensors, re.compile(r"perceiver\.layers\.(\d+)\.")),
                "heads": self._shape(tensors, "perceiver.layers.0.0.to_q.weight")[0] // HEAD_WIDTH,
            },
            "unimodal": blocks[0],
            "interval": interval,
            "ratio": INNER // self._shape(tensors, query)[0],
            "immediate": params.get("only_attend_immediate_media", True),
            "contrastive": {"width": self._shape(tensors, "img_to_latents.to_latents.weight")[0]},
            "faithful": True,
        }

    def tensors(self, system: Any) -> "dict[str, Tensor]":
        import torch

        found = read_tensors(*self.paths)
        for name in [name for name in found if UNUSED.fullmatch(name)]:
            del found[name]
        zeros = found.pop(ZEROS, None)
        if zeros is not None and zeros.any():
            raise CheckpointError(f"{self.where}: {ZEROS} is not all zeros; the norm has no bias here")
        family = self._family(found)
        neox = family is FAMILIES["gpt_neox"]
        unequal = []
        for name in system.state_dict():
            present = [alias for alias in released_names(name, neox) if alias in found]
            tensors = [found.pop(alias) for alias in present]
            for alias, tensor in zip(present[1:], tensors[1:], strict=True):
                alike = tensor.dtype == tensors[0].dtype and tensor.shape == tensors[0].shape
                same = tensor.data_ptr() == tensors[0].data_ptr()
                if not alike or not (same or torch.equal(tensor, tensors[0])):
                    unequal.append(f"  {alias} and {present[0]}")
            if tensors:
                found[released_names(name, neox)[0]] = tensors[0]
        if unequal:
            raise CheckpointError(
                f"{self.where}: what should be one tensor under two names differs; nothing was loaded:\n"
                + "\n".join(unequal)
            )
        tables = [found[f"lang_model.{n}"] for n in (family.embeddings, family.head) if f"lang_model.{n}" in found]
        if system.new_tokens is not None and tables:
            first, tokens = system.new_tokens.first, len(system.new_tokens.embedding)
            own = system.new_tokens.state_dict()
            found |= {f"{NEW}{name}": tables[name == "head"][first : first + tokens] for name in own}
        return fit(system, found, self.where, lambda name: released_names(name, neox)[0])

    def unused(self) -> "dict[str, Tensor]":
        """What is there and has no place in a model here, by its name there."""
        return {name: tensor for name, tensor in read_tensors(*self.paths).items() if UNUSED.fullmatch(name)}

    @property
    def where(self) -> str:
        """For errors."""
        return str(self.paths[0]) if len(self.paths) == 1 else self.repository.name

    def _params(self, part: str) -> dict[str, Any]:
        """What its config says of a part of the model; nothing where it has none."""
        params = self.about.get("model_params", {})
        found = params.get(part, {}) if isinstance(params, dict) else None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.where}: expected an object as model_params.{part} of its config")
        return found

    def _shape(self, tensors: "dict[str, Tensor]", name: str, dimensions: int = 2) -> list[int]:
        if name not in tensors:
            raise CheckpointError(f"{self.where}: there is no {name}, which every release of COSMO has")
        shape = list(tensors[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(f"{self.where}: {name} is {shape}, expected {dimensions} dimensions")
        return shape

    def _family(self, tensors: "dict[str, Tensor]") -> Family:
        if any(name.startswith("lang_model.base_model.") for name in tensors):
            raise CheckpointError(
                f"{self.where}: its language model has adapters (lang_model.base_model.…); merge them with "
                "peft's `merge_and_unload` first"
            )
        for family in FAMILIES.values():
            # Mistral's beginning is the shortest and comes last.
            inside = f"lang_model.{family.layers.removesuffix('layers')}"
            if any(name.startswith(inside) for name in tensors):
                return family
        raise CheckpointError(
            f"{self.where}: its language model is of no known family; expected one of {', '.join(FAMILIES)} under "
            "lang_model"
        )

    def _language(self, tensors: "dict[str, Tensor]", family: Family) -> dict[str, Any]:
        """What config.json and tokenizer of the language model say, with as many rows as there are here."""
        # Tied ones may be there under the second name alone.
        tables = [name for name in (family.embeddings, family.head) if f"lang_model.{name}" in tensors]
        rows, width = self._shape(tensors, f"lang_model.{(tables or [family.embeddings])[0]}")
        name = self._language_name(family, width, _count(tensors, DECODER))
        config = Repository(name).json("config.json")
        kept = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
        return {"config": {**kept, "vocab_size": rows}, "tokenizer": name, "added_tokens": ADDED_TOKENS}

    def _language_name(self, family: Family, width: int, layers: int) -> str:
        """A folder (inside the release, or where its config.json says), else a name on the hub."""
        for name in (*family.names, ANY_LANGUAGE):
            if (folder := self.repository.inner(name)) is not None:
                return str(folder)
        path = self._params("lang_model").get("lang_model_path")
        if not isinstance(path, str | None):
            raise CheckpointError(f"{self.where}: lang_model_path in its config is no path but {path}")
        if path and Path(path).is_dir():
            return str(Path(path).resolve())
        if (width, layers) == family.size:
            return family.names[0]
        place = self.repository.folder / ANY_LANGUAGE if self.repository.is_folder else f"{ANY_LANGUAGE}/ of a copy"
        raise CheckpointError(
            f"{self.where}: its language model is {width:,} wide with {layers} layers, and the known one of that "
            f"family, {family.names[0]}, is {family.size[0]:,} wide with {family.size[1]}: put config.json and "
            f"tokenizer.json of the language model into {place}"
        )

    def _vision(self, tensors: "dict[str, Tensor]") -> dict[str, Any]:
        params = self._params("vision_encoder")
        if (encoder := params.get("vision_encoder_name", "clip")) != "clip":
            raise CheckpointError(f"{self.where}: its vision encoder is {encoder}; those of CLIP are read here")
        arch, tag = params.get("vision_encoder_arch", ARCH), params.get("vision_encoder_pretrained", TAG)
        width, _, patch, _ = self._shape(tensors, "vision_encoder.visual.conv1.weight", 4)
        side = round((self._shape(tensors, "vision_encoder.visual.positional_embedding")[0] - 1) ** 0.5)
        layers = _count(tensors, re.compile(r"vision_encoder\.visual\.transformer\.resblocks\.(\d+)\."))
        return {
            # OpenAI's weights came with QuickGELU, which open_clip then took without being asked.
            "name": f"open_clip/{arch}{'-quickgelu' if tag == TAG else ''}.{tag}",
            "image_size": side * patch,
            "block": -1,
            "norm": True,
            "mean": MEAN,
            "std": STD,
            "options": {"width": width, "layers": layers, "patch_size": patch},
        }


def found(name: Path | str) -> CosmoFolder | None:
    """The release in a folder, a file or a repository of the hub; None where it is another's. Raises
    `CheckpointError`."""
    file = Path(name).expanduser()
    alone = file.is_file() and file.suffix in SUFFIXES
    repository = Repository(str(file.parent if alone else name))
    about = repository.optional_json("config.json")
    if about is not None and "model_params" not in about:
        return None
    paths = [file] if alone else weight_files(repository)
    if not paths and about is not None and repository.is_folder:
        checkpoints = sorted(
            repository.folder.glob("checkpoint-*"), key=lambda path: int("0" + re.sub(r"\D", "", path.name))
        )
        paths = weight_files(Repository(str(checkpoints[-1]))) if checkpoints else []
    parts = {name.partition(".")[0] for name in read_tensors(*paths)} if paths else set()
    if not {"perceiver", "lang_model"} <= parts:
        return None
    return CosmoFolder(repository, about or _configured(repository), tuple(paths))


def _configured(repository: Repository) -> dict[str, Any]:
    """What a YAML file in the folder says, of those that COSMO's runs are started with; nothing where there is none."""
    for path in sorted(repository.folder.glob("*.yaml")) if repository.is_folder else []:
        with suppress(OSError, ValueError, yaml.YAMLError):
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and "model_params" in values:
                return values
    return {}


def released_names(name: str, neox: bool) -> tuple[str, ...]:
    """A parameter's name here to all that it has there; `neox`: the language model is a GPT-NeoX."""
    if name.startswith(NEW):
        return (name,)
    if (match := LAYER.fullmatch(name)) is not None:
        layers, number, gated, rest = match.groups()
        if gated:
            within, beside = "gated_cross_attn_layer", "gated_cross_attn_layers"
        else:
            within, beside = "decoder_layer", "old_decoder_blocks"
        return f"lang_model.{layers}.{number}.{within}.{rest}", f"lang_model.{beside}.{number}.{rest}"
    if neox and name == "language.lm_head.weight":
        return (f"lang_model.{FAMILIES['gpt_neox'].head}",)
    ours, theirs = next(((ours, theirs) for ours, theirs in NAMES.items() if name.startswith(ours)), ("", ""))
    return (theirs + name.removeprefix(ours),)


def _numbers(tensors: "dict[str, Tensor]", pattern: re.Pattern[str]) -> list[int]:
    """Those that a pattern's group finds in the names."""
    matches = [match for name in tensors if (match := pattern.match(name))]
    return sorted({int(next(group for group in match.groups() if group is not None)) for match in matches})


def _count(tensors: "dict[str, Tensor]", pattern: re.Pattern[str]) -> int:
    """How many of them there are, counted from 0."""
    return 1 + max(_numbers(tensors, pattern), default=-1)


def write(system: "Cosmo", config: "CosmoConfig", out: Path) -> str | None:
    """Write the release into the folder `out`: all names of each tensor, and a config.json as of a run of COSMO's.

    Their code builds the language model and its tokenizer from the repositories that config.json names. Here both are
    described in a folder of that name inside `out`, the tokenizer without the tokens that the model appends, and what
    their config has no place for stands in config.json under `mm`, a key that they do not read.

    Returns:
        What a user of the folder has to know, if anything.

    Raises:
        ConfigError: the model has parts that COSMO's has no place for.
    """
    import torch

    kind, tower = system.language.config.model_type, cast(Any, system.vision.featurizer)
    family = FAMILIES.get("mistral" if kind == "llama" else kind)
    wrong = None
    if family is None:
        wrong = f"language models of the families {', '.join(FAMILIES)}, this model's is {kind}"
    elif not config.vision.name.startswith("open_clip/") or not hasattr(tower, "conv1"):
        wrong = f"a vision transformer of open_clip, this model has {config.vision.name}"
    elif (
        config.vision.merge is not None
        or config.vision.class_token
        or not config.vision.norm
        or system.vision.block + 1 < tower.transformer.layers
    ):
        wrong = "every patch behind the final norm (vision: no merge, no class_token, norm: true, block: -1)"
    elif config.contrastive.loss != "clip":
        wrong = f"CLIP's loss, this model has {config.contrastive.loss}"
    if family is None or wrong is not None:
        raise ConfigError(f"the cosmo format takes {wrong}")
    state: dict[str, Tensor] = {}
    for name, tensor in system.state_dict().items():
        state |= dict.fromkeys(released_names(name, kind == "gpt_neox"), tensor.cpu())
    if (new := system.new_tokens) is not None:
        tied = new.head is None
        for name, rows in new.state_dict().items():
            del state[f"{NEW}{name}"]
            tables = [family.head] if name == "head" else [family.embeddings, *([family.head] if tied else [])]
            table = state[f"lang_model.{tables[0]}"].clone()
            table[new.first : new.first + len(rows)] = rows.cpu()
            state |= {f"lang_model.{table_name}": table for table_name in tables}
    state[ZEROS] = torch.zeros_like(state["text_cls_norm.gamma"])
    unused = _unused(config)
    torch.save({**state, **unused}, out / "pytorch_model.bin")

    name, tag = config.vision.name.removeprefix("open_clip/").partition(".")[::2]
    language = family.names[0]
    about = {
        "model_params": {
            "vision_encoder": {
                "vision_encoder_name": "clip",
                "vision_encoder_arch": name.removesuffix("-quickgelu"),
                "vision_encoder_pretrained": tag,
            },
            "lang_model": {
                "name": language.partition("/")[2],
                "lang_model_path": language,
                "tokenizer_path": language,
                "unimodal_depth": config.unimodal,
                "interval_layer": config.interval,
                "use_memory_layer": False,
            },
            "multimodality_model": {
                "latent_dim": config.contrastive.width,
                "use_contrastive_loss": config.contrastive.weight > 0,
                "contrastive_temperature": config.initial_temperature,
                "contrastive_loss_weight": config.contrastive.weight,
                "contrastive_gather_way": "all_nodes",
                "cross_attention_compress_ratio": config.ratio,
                "only_attend_immediate_media": config.immediate,
                "qv_norm": False,
            },
        },
        "mm": {
            **config.model_dump(mode="json", exclude={"released", "language", "train_new_tokens"}),
            "language": {"added_tokens": config.language.added_tokens},
        },
    }
    (out / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    folder = out / language
    system.language.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(Tokenizer.load(config.language.tokenizer_name).to_json(), encoding="utf-8")
    notes = [] if unused else ["CLIP's text tower, which COSMO keeps and never runs, is not in it"]
    if not config.faithful:
        notes.append(
            "COSMO's code compares the text of one layer less, and scales cross-attention for heads 64 wide whatever "
            "they are: what it computes is what model.faithful computes here"
        )
    return "; ".join(notes) or None


def _unused(config: "CosmoConfig") -> "dict[str, Tensor]":
    """What the release that the model began as has besides, if it is still there."""
    try:
        release = found(config.released) if config.released else None
    except CheckpointError:
        return {}
    return release.unused() if release else {}
