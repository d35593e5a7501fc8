"""A model of open_clip in the layout of its hub repositories, which `open_clip.create_model("local-dir:FOLDER")` loads.

    open_clip_config.json                                     `model_cfg`, the structure, and `preprocess_cfg`
    open_clip_model.safetensors or open_clip_pytorch_model.bin    the state dict
    tokenizer.json, tokenizer_config.json                     where the model has another tokenizer than CLIP's

Source: open_clip 3, `push_to_hf_hub.py` and `factory.py`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mm.data.tokenizer import file_of
from mm.errors import CheckpointError
from mm.models.released.release import Repository, fit, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SCALES = ("logit_scale", "logit_bias")
"""Scalars there, tensors of one element here."""
POSITIONS = "text.transformer.embeddings.position_ids"
"""A buffer that transformers no longer keeps in checkpoints."""


def found(repository: Repository) -> "OpenClipFolder | None":
    """The release that is there, if it is one of open_clip. On the hub only names with `clip` or `siglip` in
    them are asked."""
    if Path(repository.name).expanduser().is_file():
        return None
    if not repository.is_folder and not re.search("clip|siglip", repository.name.lower()):
        return None
    about = repository.optional_json(CONFIG)
    return None if about is None else OpenClipFolder(repository, about)


@dataclass(frozen=True, slots=True)
class OpenClipFolder:
    """A release in this layout; `about` is its open_clip_config.json."""

    kind: ClassVar[str] = "clip"
    repository: Repository
    about: dict[str, Any]

    @property
    def form(self) -> None:
        return None

    def section(self) -> dict[str, Any]:
        model, pictures = self.about.get("model_cfg"), self.about.get("preprocess_cfg") or {}
        towers = [model.get(part) for part in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
        if not isinstance(model, dict) or "embed_dim" not in model or not all(isinstance(one, dict) for one in towers):
            raise CheckpointError(
                f"{self.repository.name}/{CONFIG}: expected a model_cfg with embed_dim and two towers"
            )
        if not isinstance(pictures, dict):
            raise CheckpointError(f"{self.repository.name}/{CONFIG}: expected an object as its preprocess_cfg")
        if pictures.get("interpolation", "bicubic") != "bicubic":
            raise CheckpointError(f"{self.repository.name}/{CONFIG}: pictures by another filter than bicubic")
        vision, text = without_pretrained(model["vision_cfg"]), without_pretrained(model["text_cfg"])
        if "hf_tokenizer_name" in text and self.repository.has(TOKENIZER[0]):
            text = {**text, "hf_tokenizer_name": str(self.repository.folder)}
        return {
            "embed_dim": model["embed_dim"],
            "vision": vision,
            "text": text,
            "quick_gelu": model.get("quick_gelu", False),
            "custom_text": model.get("custom_text", False),
            "loss": "clip" if model.get("init_logit_bias") is None else "siglip",
            "resize": pictures.get("resize_mode") or "shortest",
            **{key: pictures[key] for key in ("mean", "std") if pictures.get(key) is not None},
        }

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        path = self.repository.first(*WEIGHTS)
        tensors = {name: tensor for name, tensor in read_tensors(path).items() if name != POSITIONS}
        tensors |= {name: tensors[name][None] for name in SCALES if name in tensors and tensors[name].ndim == 0}
        return fit(system, tensors, str(path), lambda name: name.removeprefix("clip."))


def write(system: Any, config: Any, out: Path) -> str:
    """Write a `Clip` with its `ClipConfig` into the folder `out`; returns what a user of it has to know."""
    from safetensors.torch import save_file

    values = config.values
    values |= {part: without_pretrained(values[part]) for part in ("vision_cfg", "text_cfg")}
    if name := values["text_cfg"].get("hf_tokenizer_name"):
        for file in TOKENIZER:
            (out / file).write_bytes(file_of(name, (file,)).read_bytes())
    if system.clip.logit_bias is not None:
        values["init_logit_bias"] = -10
    pictures = {"mean": config.mean, "std": config.std, "interpolation": "bicubic", "resize_mode": config.resize}
    (out / CONFIG).write_text(json.dumps({"model_cfg": values, "preprocess_cfg": pictures}, indent=2))
    tensors = {name: tensor.cpu().contiguous() for name, tensor in system.clip.state_dict().items()}
    tensors |= {name: tensors[name].reshape(()) for name in SCALES if name in tensors}
    save_file(tensors, out / WEIGHTS[0], {"format": "pt"})
    return "open_clip.create_model_and_transforms takes the folder as local-dir:FOLDER"


def without_pretrained(tower: dict[str, Any]) -> dict[str, Any]:
    """Of a tower's settings those that do not ask for weights of its own, which the state dict has."""
    return {key: value for key, value in tower.items() if not key.endswith("_pretrained")}
