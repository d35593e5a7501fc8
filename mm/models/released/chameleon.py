"""Chameleon as it was released, in transformers' folders or in Meta's own: the language model, from which to train on.

    config.json                              transformers': model_type `chameleon`
    model.safetensors, or several            `model.*` and `lm_head.weight`; `model.vqmodel.*` is left to the teacher

    params.json, consolidate_params.json     Meta's (`models/7b`, `models/30b`): sizes, and how many parts there are
    consolidated.pth                         in one part, or `consolidated.00.pth`, … of a model cut for tensor
                                             parallelism: heads, inner width and vocabulary side by side

The two compute the same with numbers in another order. Meta's rotary embedding turns the neighbours (2i, 2i + 1) of a
head together, transformers' i and i + half of them, so rows of the query and key projections move, and with them what
their norms scale by. Each part of Meta's has norms of its own for queries and keys, which its heads share; transformers
keeps one for every head. Norms of whole hidden states are in every part; their mean is taken.

Sources: github facebookresearch/chameleon, `chameleon/inference/{loader,transformer}.py`, `chameleon/download_data.py`;
github huggingface/transformers, `models/chameleon/convert_chameleon_weights_to_hf.py`.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mm.errors import CheckpointError
from mm.models.released.release import Repository, fit, read_pickle, read_tensors, weight_files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm.models.prompts import Form

TEMPLATE = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "after_media": "", "chat": "plain"}
"""How Chameleon spells a document, by the names of its own tokens."""
POSITIONS = 4096
"""What it was trained on; Meta's files do not say."""
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "self_attn.q_norm.weight": "attention.q_normalization.weight",
    "self_attn.q_norm.bias": "attention.q_normalization.bias",
    "self_attn.k_norm.weight": "attention.k_normalization.weight",
    "self_attn.k_norm.bias": "attention.k_normalization.bias",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}
"""transformers' names to Meta's, those of a layer without the layer."""
ROTATED = ("wq", "wk", "q_normalization", "k_normalization")
ROPE = "rope.freqs"
"""In Meta's files, and not read by its code either."""


@dataclass(frozen=True, slots=True)
class ChameleonFolder:
    """A folder or hub name in transformers' layout."""

    kind: ClassVar[str] = "text_lm"
    repository: Repository

    @property
    def form(self) -> "Form":
        return "raw"

    def section(self) -> dict[str, Any]:
        return _section(self.repository)

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        from mm.models.chameleon import VQ_MODEL

        found = read_tensors(*weight_files(self.repository) or [self.repository.file("model.safetensors")])
        found = {name: tensor for name, tensor in found.items() if not name.startswith(VQ_MODEL)}
        fitted = fit(system.get_submodule("language"), found, self.repository.name)
        return {f"language.{name}": tensor for name, tensor in fitted.items()}


@dataclass(frozen=True, slots=True)
class ConsolidatedFolder:
    """A local folder in Meta's layout. `params`: what its two JSON files say."""

    kind: ClassVar[str] = "text_lm"
    repository: Repository
    params: dict[str, Any]

    @property
    def form(self) -> "Form":
        return "raw"

    def section(self) -> dict[str, Any]:
        return _section(self.repository)

    def config(self) -> dict[str, Any]:
        """The language model as a transformers config. Raises `CheckpointError`."""
        width = self._number("dim")
        if self.params.get("qk_normalization") is not True:
            raise CheckpointError(
                f"{self._params}: qk_normalization is {self.params.get('qk_normalization')!r}; Chameleon normalises "
                "queries and keys, and other models of this layout are not read"
            )
        # The MLP's inner width, as Meta's code works it out.
        inner = int((self.params.get("ffn_dim_multiplier") or 1) * int(8 * width / 3))
        multiple = self._number("multiple_of", 256)
        return {
            "model_type": "chameleon",
            "vocab_size": self._number("vocab_size"),
            "hidden_size": width,
            "intermediate_size": -(-inner // multiple) * multiple,
            "num_hidden_layers": self._number("n_layers"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._key_heads,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": float(self.params.get("norm_eps") or 1e-5),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.params.get("rope_theta") or 1e4)},
            "swin_norm": bool(self.params.get("swin_norm", False)),
        }

    def language(self, implementation: str, weights: bool = True) -> Any:
        """The transformers model in float32, with attention of this name. Raises `CheckpointError`.

        Without `weights` they are random. With them, no more than one parameter beside the model is in memory at a
        time: the parts are mapped.
        """
        import torch
        from transformers.initialization import no_init_weights

        from mm.models.backbone import from_config

        with no_init_weights() if weights else nullcontext():
            model = from_config(self.config(), implementation)
        if weights:
            own = model.state_dict(keep_vars=True)
            with torch.no_grad():
                for name, tensor in self._parameters(model):
                    own[name].copy_(tensor)
        return model

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        return {f"language.{name}": tensor for name, tensor in self._parameters(system.get_submodule("language"))}

    def _parameters(self, language: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
        """Of all parts together, by the language model's names; the first only once all are seen to fit."""
        paths = self._paths()
        parts = [self._read(path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if odd := sorted(part.keys() ^ parts[0].keys()):
                raise CheckpointError(f"{path}: {odd[0]} is in this part or in {paths[0].name}, and not in both")
        shapes = {name: self._joined(name, [part[name].to("meta") for part in parts]) for name in parts[0]}
        fit(language, shapes, self.repository.name, released_name)
        for ours in language.state_dict():
            name = released_name(ours)
            yield ours, self._turned(name, self._joined(name, [part[name] for part in parts]))

    def _paths(self) -> list[Path]:
        """The parts, in order."""
        folder = self.repository.folder
        found = sorted(path.name for path in folder.glob("consolidated*.pth"))
        number = self._number("model_parallel_size", 1)
        many = [f"consolidated.{rank:02}.pth" for rank in range(number)]
        if found != many and (number > 1 or found != ["consolidated.pth"]):
            expected = "consolidated.pth" if number == 1 else f"{many[0]} … {many[-1]}"
            raise CheckpointError(
                f"{folder}: holds {', '.join(found) or 'no consolidated*.pth'}; for model_parallel_size {number} "
                f"expected {expected}"
            )
        return [folder / name for name in found]

    def _read(self, path: Path) -> "dict[str, Tensor]":
        """One part, with projections apart that Meta's code joins when it saves. Raises `CheckpointError`."""
        import torch

        part = read_pickle(path)
        if isinstance(part, dict):
            part.pop(ROPE, None)  # None in files that others wrote
        if not isinstance(part, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in part.items()
        ):
            raise CheckpointError(f"{path}: expected tensors by name, as torch saves a model's state_dict")
        heads, key_heads = self._heads, self._key_heads
        for joined, names, shares in (
            ("wqkv", ("wq", "wk", "wv"), (heads // key_heads, 1, 1)),
            ("w13", ("w1", "w3"), (1, 1)),
        ):
            for name in [name for name in part if name.endswith(f".{joined}.weight")]:
                rows, over = divmod(part[name].shape[:1].numel(), sum(shares))
                if not over:
                    pieces = part.pop(name).split([rows * share for share in shares])
                    part |= {name.replace(joined, one): piece for one, piece in zip(names, pieces, strict=True)}
        return part

    def _joined(self, name: str, parts: "list[Tensor]") -> "Tensor":
        """A tensor of the whole model from those of its parts. Raises `CheckpointError` where they are not alike."""
        import torch

        what = name.split(".")[-2] if "." in name else name
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise CheckpointError(f"{self.repository.name}: {name} is {shapes} in the parts; expected equal ones")
        if what in ("q_normalization", "k_normalization"):
            heads = self._heads if what == "q_normalization" else self._key_heads
            return torch.stack(parts).repeat_interleave(heads // len(parts), 0)
        if len(parts) == 1 or not parts[0].ndim:
            return parts[0]
        if what.endswith("norm"):
            return torch.stack(parts).float().mean(0).to(parts[0].dtype)
        return torch.cat(parts, dim=parts[0].ndim - 1 if what in ("wo", "w2", "tok_embeddings") else 0)

    def _turned(self, name: str, tensor: "Tensor") -> "Tensor":
        """In transformers' order of the numbers of a head: those with even numbers first."""
        from einops import rearrange

        what = name.split(".")[-2]
        if what not in ROTATED:
            return tensor
        half = self._number("dim") // self._heads // 2
        if what.endswith("normalization"):
            return rearrange(tensor, "h (i two) -> h (two i)", i=half)
        return rearrange(tensor, "(h i two) d -> (h two i) d", i=half, two=2)

    @property
    def _params(self) -> Path:
        return self.repository.folder / "params.json"

    @property
    def _heads(self) -> int:
        return self._number("n_heads")

    @property
    def _key_heads(self) -> int:
        return self._number("n_kv_heads", self._heads)

    def _number(self, key: str, default: int | None = None) -> int:
        value = self.params.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self._params}: {key} is {value!r}; expected a whole number above 0")
        return value


def consolidated(name: Path | str) -> ConsolidatedFolder | None:
    """The release in a folder of Meta's layout; None where it is no such folder. Raises `CheckpointError`."""
    repository = Repository(str(name))
    if not (repository.has("params.json") and repository.has("consolidate_params.json")):
        return None
    params, cut = repository.json("params.json"), repository.json("consolidate_params.json")
    inner = params.get("model")
    return ConsolidatedFolder(repository, {**params, **(inner if isinstance(inner, dict) else {}), **cut})


def released_name(name: str) -> str:
    """A parameter's name in transformers to that in Meta's files."""
    layer = re.match(r"model\.(layers\.\d+\.)", name)
    return f"{layer[1]}{NAMES[name[layer.end() :]]}" if layer else NAMES[name]


def _section(repository: Repository) -> dict[str, Any]:
    name = str(repository.folder) if repository.is_folder else repository.name
    return {"language": {"name": name}, "template": TEMPLATE}
