"""A `LlavaForConditionalGeneration` folder, which stock transformers loads (and lmms-eval and vLLM, which build on it).

Where pictures are not pooled, Open-Qwen2VL is a LLaVA: a SigLIP tower's block, two linear layers, a language model. The
weights are the same under other names:

    connector.mlp.0, .2        model.multi_modal_projector.linear_1, linear_2
    language's base model      model.language_model;   language.lm_head    lm_head
    vision.featurizer          model.vision_tower, whose attention has q, k and v apart (`to_siglip`)

timm's towers use the exact GELU, transformers' SigLIP configs the tanh approximation; `hidden_act` says which.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mm.data.chat import END, SPELLINGS
from mm.errors import CheckpointError, ConfigError
from mm.models.released.release import Repository, fit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm.data.layout import Layout
    from mm.models.prompts import Form
    from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
    from mm.models.systems.open_qwen2vl.model import OpenQwen2VL

RENAMED = {
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "attn_pool.proj.": "head.attention.out_proj.",
    "attn_pool.norm.": "head.layernorm.",
    "attn_pool.mlp.": "head.mlp.",
}
IN_BLOCK = {"norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.proj.": "self_attn.out_proj.", "mlp.": "mlp."}
# The tower that a folder's `vision_config` is a variant of, and what of it may differ, by timm's names.
TOWER = "timm/vit_so400m_patch14_siglip_384"
TOWER_SIZES = {"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16}
TOWER_MLP = 4304
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names to timm's."""
VISION = "model.vision_tower."
NOTE = (
    "pixels are equal to ours bit for bit with AutoProcessor.from_pretrained(DIR, backend='pil'), and within a level "
    "of 255 with its default; texts that are no conversation have to begin with the template's begin of text"
)


def to_siglip(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """A SigLIP tower's tensors by timm's names to those of transformers' `SiglipVisionModel`.

    Raises `KeyError` with the name of a tensor that such a tower does not have.
    """
    import torch

    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "pos_embed":
            found["embeddings.position_embedding.weight"] = tensor[0]
        elif name == "attn_pool.latent":
            found["head.probe"] = tensor
        elif match := re.fullmatch(r"attn_pool\.(q|kv)\.(weight|bias)", name):
            parts = [tensors[f"attn_pool.{part}.{match[2]}"] for part in ("q", "kv")]
            found[f"head.attention.in_proj_{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                found[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = chunk.clone()
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.*)", name):
            found[f"encoder.layers.{match[1]}.{_renamed(match[2], IN_BLOCK)}"] = tensor
        else:
            found[_renamed(name, RENAMED)] = tensor
    return found


def from_siglip(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The inverse of `to_siglip`."""
    import torch

    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "embeddings.position_embedding.weight":
            found["pos_embed"] = tensor[None]
        elif name == "head.probe":
            found["attn_pool.latent"] = tensor
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", name):
            width = len(tensor) // 3
            found[f"attn_pool.q.{match[1]}"], found[f"attn_pool.kv.{match[1]}"] = tensor[:width], tensor[width:]
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):
            parts = [tensors[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] for part in "qkv"]
            found[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name):
            found[f"blocks.{match[1]}.{_renamed(match[2], {v: k for k, v in IN_BLOCK.items()})}"] = tensor
        else:
            found[_renamed(name, {v: k for k, v in RENAMED.items()})] = tensor
    return found


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(name)


@dataclass(frozen=True, slots=True)
class LlavaFolder:
    """A release in this layout; `about` is its config.json."""

    kind: ClassVar[str] = "open_qwen2vl"
    repository: Repository
    about: dict[str, Any]

    @property
    def form(self) -> "Form":
        form: Form = self.about.get("mm_form", "raw")
        return form

    def section(self) -> dict[str, Any]:
        about, where = self.about, f"{self.repository.name}/config.json"
        vision, text = about.get("vision_config", {}), dict(about.get("text_config", {}))
        for key, found, expected in (
            ("vision_config.model_type", vision.get("model_type"), "siglip_vision_model"),
            ("vision_config.layer_norm_eps", vision.get("layer_norm_eps", 1e-6), 1e-6),
            ("vision_feature_select_strategy", about.get("vision_feature_select_strategy"), "full"),
            ("multimodal_projector_bias", about.get("multimodal_projector_bias", True), True),
            ("projector_hidden_act", about.get("projector_hidden_act", "gelu"), "gelu"),
        ):
            if found != expected:
                raise CheckpointError(f"{where}: {key} is {found!r}; of LLaVA models those with {expected!r} are read")
        size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
        text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or about.get("tie_word_embeddings"))
        for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"):
            text.pop(key, None)
        pixels = self._pixels()
        tokenizer = str(self.repository.folder) if self.repository.is_folder else self.repository.name
        return {
            "vision": {
                "name": TOWER,
                "pretrained": False,
                "image_size": size,
                "block": self._block(where),
                "mean": pixels.get("image_mean", (0.5, 0.5, 0.5)),
                "std": pixels.get("image_std", (0.5, 0.5, 0.5)),
                "options": _tower_options(vision, where),
            },
            "connector": {"kind": "pool_mlp", "tokens": (size // patch) ** 2},
            "language": {"config": text, "tokenizer": tokenizer},
            "template": about.get("mm_template") or self._template(),
        }

    def _block(self, where: str) -> int:
        """transformers counts what enters the first block as layer 0."""
        layer = self.about.get("vision_feature_layer", -2)
        if not isinstance(layer, int) or layer == 0:
            raise CheckpointError(f"{where}: vision_feature_layer is {layer!r}; the output of one block is read here")
        return layer if layer < 0 else layer - 1

    def _template(self) -> dict[str, Any]:
        """Of a folder that others wrote: the tokenizer's special tokens."""
        about = self.repository.json("tokenizer_config.json")
        found = {name: about.get(f"{name}_token") for name in ("bos", "eos", "pad")}
        named = {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}
        return {**named, "pad": named["pad"] or named["eos"]}

    def _pixels(self) -> dict[str, Any]:
        """Of the image processor, wherever this version of transformers writes it."""
        try:
            return self.repository.json("preprocessor_config.json")
        except CheckpointError:
            found = self.repository.json("processor_config.json").get("image_processor", {})
            return found if isinstance(found, dict) else {}

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        from transformers import LlavaForConditionalGeneration

        where = self.repository.name
        source = self.repository.folder if self.repository.is_folder else where
        try:
            model, problems = LlavaForConditionalGeneration.from_pretrained(
                source, dtype="float32", use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{where}: transformers cannot load it ({reason})") from None
        wrong = [f"{what.removesuffix('_keys')}: {key}" for what, keys in problems.items() for key in sorted(keys)]
        if wrong:
            raise CheckpointError(f"{where}: not all of its tensors fit; nothing was loaded:\n  " + "\n  ".join(wrong))
        theirs = model.state_dict()
        language: Any = system.get_submodule("language")
        base = f"language.{language.base_model_prefix}."
        found: dict[str, Tensor] = {}
        for prefix, ours in (
            ("model.language_model.", base),
            ("model.multi_modal_projector.linear_1.", "connector.mlp.0."),
            ("model.multi_modal_projector.linear_2.", "connector.mlp.2."),
            ("lm_head.", f"language.{_name_of(language, language.get_output_embeddings())}."),
        ):
            found |= {ours + n.removeprefix(prefix): t for n, t in theirs.items() if n.startswith(prefix)}
        tower = {n.removeprefix(VISION): t for n, t in theirs.items() if n.startswith(VISION)}
        found |= {f"vision.featurizer.{name}": tensor for name, tensor in from_siglip(tower).items()}
        return fit(system, found, where)


def _tower_options(vision: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of timm that make its SigLIP so400m the tower of a `vision_config`."""
    names = {"patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}  # its defaults
    found = dict(zip(TOWER_SIZES, (vision.get(name, default) for name, default in names.items()), strict=True))
    options: dict[str, Any] = {name: value for name, value in found.items() if value != TOWER_SIZES[name]}
    width, hidden = found["embed_dim"], vision.get("intermediate_size", 3072)
    if (width, hidden) != (TOWER_SIZES["embed_dim"], TOWER_MLP):
        options["mlp_ratio"] = (hidden + 0.5) / width  # timm rounds the product down
    if (act := vision.get("hidden_act", "gelu_pytorch_tanh")) not in ACTIVATIONS:
        raise CheckpointError(f"{where}: vision_config.hidden_act {act!r}; known: {', '.join(ACTIVATIONS)}")
    if act != "gelu":
        options["act_layer"] = ACTIVATIONS[act]
    if not vision.get("vision_use_head", True):
        options["global_pool"] = ""
    return options


def write(system: "OpenQwen2VL", layout: "Layout", config: "OpenQwen2VLConfig", out: Path, form: "Form" = "raw") -> str:
    """Write the model with its tokenizer, processor and chat template into the folder `out`; `form`: how it is asked.

    `<image>` becomes a token of the tokenizer. It takes a spare row of the embeddings; where there is none, one is
    added, a copy of the pad token's, which no loss has ever raised, and generation suppresses it.

    Returns:
        What a user of the folder has to know.

    Raises:
        ConfigError: the model pools its pictures, or has parts that LLaVA does not.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import (
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        SiglipImageProcessor,
    )

    from mm.data.conversations import IMAGE
    from mm.models.released.chat_templates import jinja

    patches = _check(system, config)
    backend: Any = Tokenizer.from_str(layout.tokenizer.to_json())
    backend.add_special_tokens([IMAGE])
    image_id = backend.token_to_id(IMAGE)
    language = system.language
    state = {f"model.language_model.{name}": t for name, t in language.base_model.state_dict().items()}
    rows = language.get_input_embeddings().num_embeddings
    state["lm_head.weight"] = language.get_output_embeddings().weight.detach()
    embeddings = f"model.language_model.{_name_of(language.base_model, language.get_input_embeddings())}.weight"
    if image_id >= rows:
        for name in (embeddings, "lm_head.weight"):
            state[name] = torch.cat([state[name], state[name][layout.pad].expand(image_id + 1 - rows, -1)])
    for theirs, ours in (("linear_1", 0), ("linear_2", 2)):
        part = system.connector.mlp[ours].state_dict()
        state |= {f"model.multi_modal_projector.{theirs}.{name}": tensor for name, tensor in part.items()}
    vision, tower = _vision(system, config)
    state |= {f"{VISION}{name}": tensor for name, tensor in tower.items()}

    text = type(language.config).from_dict({**language.config.to_dict(), "vocab_size": max(rows, image_id + 1)})
    about = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=patches,
        vision_feature_layer=system.vision.block - vision.num_hidden_layers,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(about)
    _fits(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    template, tokenizer = layout.template, layout.tokenizer
    named = {"bos": template.bos, "eos": template.eos, "pad": tokenizer.token(layout.pad)}
    special = {name: token for name, token in named.items() if token is not None}
    named_ends = {template.eos, *({END} & set(SPELLINGS[template.chat].tokens))} - {None}
    ends = {backend.token_to_id(token) for token in named_ends} - {None}  # captioners may have no token of a chat
    model.generation_config = GenerationConfig(
        **{f"{name}_token_id": tokenizer.id(token) for name, token in special.items() if name != "eos"},
        eos_token_id=sorted(ends) or None,
        suppress_tokens=[image_id] if image_id >= rows else None,
    )
    model.save_pretrained(out, max_shard_size="5GB")
    _as_published(out)
    values = json.loads((out / "config.json").read_text())
    values |= {"mm_template": config.template.model_dump(mode="json"), "mm_form": form}
    values["text_config"].pop("_name_or_path", None)
    if theta := values["text_config"].get("rope_parameters", {}).get("rope_theta"):
        values["text_config"]["rope_theta"] = theta  # where versions before 5 look
    _write_json(out / "config.json", values)
    pixels = SiglipImageProcessor(
        size={"height": config.vision.image_size, "width": config.vision.image_size},
        image_mean=list(config.vision.mean),
        image_std=list(config.vision.std),
    )
    tokens = {f"{name}_token": token for name, token in special.items()}
    processor = LlavaProcessor(
        pixels,
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            model_max_length=getattr(text, "max_position_embeddings", None),
            **tokens,
        ),
        patch_size=config.vision.patch,
        vision_feature_select_strategy="full",
        chat_template=jinja(template),
        image_token=IMAGE,
    )
    processor.save_pretrained(out)
    # Versions before 5 look for preprocessor_config.json and do not know the class that tokenizers have since.
    pixels.save_pretrained(out)
    about = json.loads((out / "tokenizer_config.json").read_text())
    _write_json(out / "tokenizer_config.json", {**about, "tokenizer_class": "PreTrainedTokenizerFast"})
    return NOTE


def _check(system: "OpenQwen2VL", config: "OpenQwen2VLConfig") -> int:
    """The number of patches of a picture, all of which are tokens. Raises `ConfigError`."""
    from torch import nn

    vision, connector = config.vision, config.connector
    patches = vision.patches
    if connector.kind != "pool_mlp":
        raise ConfigError(f"hf-llava: LLaVA has no connector of kind {connector.kind}, only pool_mlp without pooling")
    if vision.resize != "square":
        raise ConfigError(f"hf-llava: LLaVA takes squares, this model has vision.resize {vision.resize}")
    if (tokens := connector.count(vision.side, vision.side)) != patches:
        raise ConfigError(
            f"hf-llava: LLaVA does not pool, and this model pools a picture's {patches} patches to {tokens} "
            f"tokens (model.connector.tokens): with --tokens {patches} the same weights are written without pooling; "
            "or keep the pooling with --to prismatic"
        )
    head = system.language.get_output_embeddings()
    if system.language.logit_factor != 1 or not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"hf-llava: a {system.language.config.model_type} model does more with its hidden states than a linear "
            "head without bias, which is all that LLaVA has"
        )
    return int(patches)


def _vision(system: "OpenQwen2VL", config: "OpenQwen2VLConfig") -> "tuple[Any, dict[str, Tensor]]":
    """The tower as a SiglipVisionConfig and its tensors. Raises `ConfigError` where it is no SigLIP."""
    from transformers import SiglipVisionConfig

    tower: Any = system.vision.featurizer
    refusal = f"hf-llava: {config.vision.name} is no vision transformer such as SigLIP's"
    try:
        tensors = to_siglip(tower.state_dict())
        block, act = tower.blocks[0], _activation(tower.blocks[0].mlp.act)
        about = SiglipVisionConfig(
            hidden_size=tower.embed_dim,
            intermediate_size=block.mlp.fc1.out_features,
            num_hidden_layers=len(tower.blocks),
            num_attention_heads=block.attn.num_heads,
            image_size=config.vision.image_size,
            patch_size=tower.patch_embed.patch_size[0],
            hidden_act=act,
            layer_norm_eps=block.norm1.eps,
            vision_use_head=tower.attn_pool is not None,
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{refusal} ({error}); --to prismatic takes the towers of that format") from None
    return about, tensors


def _activation(module: Any) -> str:
    """transformers' name of the function that a module computes. Raises `TypeError` for others than GELU."""
    import torch
    import torch.nn.functional as F

    x = torch.linspace(-4, 4, 101)
    for name, approximate in (("gelu", "none"), ("gelu_pytorch_tanh", "tanh")):
        if torch.equal(module(x), F.gelu(x, approximate=approximate)):
            return name
    raise TypeError(f"its activation is {type(module).__name__}")


def _fits(model: "nn.Module", state: "dict[str, Tensor]") -> None:
    """Raises `ConfigError` where LLaVA's structure is not the model's."""
    try:
        fit(model, state, "hf-llava")
    except CheckpointError as error:
        raise ConfigError(f"{error}\nLLaVA has no place for this structure") from None


def _name_of(parent: "nn.Module", child: "nn.Module") -> str:
    return next(name for name, module in parent.named_modules() if module is child)


def _as_published(out: Path) -> None:
    """Name the tower's tensors as published folders do, which transformers 5 reads but no longer writes."""
    from safetensors.torch import load_file, save_file

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        prefix = "vision_tower."
        return {re.sub(rf"^{prefix}(?!vision_model)", f"{prefix}vision_model.", k): v for k, v in values.items()}

    for path in out.glob("*.safetensors"):
        partial = path.with_suffix(".partial")
        save_file(renamed(load_file(path)), partial, {"format": "pt"})
        partial.replace(path)
    for path in out.glob("*.index.json"):
        values = json.loads(path.read_text())
        _write_json(path, {**values, "weight_map": renamed(values["weight_map"])})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
