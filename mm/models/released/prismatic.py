"""Open-Qwen2VL as its authors released it: the layout of prismatic run folders.

    config.json                       the dump of a run's config; of `model` and `mount_path` the model is built
    checkpoints/latest-checkpoint.pt  torch pickle: {"model": {projector, llm_backbone[, vision_backbone]: tensors}}

The language model's config and tokenizer, and a frozen tower's weights, are not in it but in the repositories that it
names. The pickle is read by torch's restricted unpickler, which makes tensors and plain containers and runs nothing.
Sources: github Victorwz/Open-Qwen2VL, `prismatic/models/{load,materialize}.py`, `models/vlms/prismatic.py`,
`models/backbones/llm/qwen2.py`, `models/backbones/vision/siglip_vit.py`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mm.data.tokenizer import Tokenizer
from mm.errors import CheckpointError, ConfigError, DataError
from mm.models.released.release import Repository, fetch, fit, read_pickle

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm.data.layout import Layout
    from mm.models.prompts import Form
    from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
    from mm.models.systems.open_qwen2vl.model import OpenQwen2VL

CHECKPOINT = "checkpoints/latest-checkpoint.pt"
# By vision_backbone_id: a tower of timm with its weights, and pixels. All with mean and std 0.5; the block before the
# last, without the final norm.
TOWERS = {
    "siglip-vit-b16-224px": ("vit_base_patch16_siglip_224.webli", 224),
    "siglip-vit-b16-256px": ("vit_base_patch16_siglip_256.webli", 256),
    "siglip-vit-b16-384px": ("vit_base_patch16_siglip_384.webli", 384),
    "siglip-vit-so400m": ("vit_so400m_patch14_siglip_224.webli", 224),
    "siglip-vit-so400m-384px": ("vit_so400m_patch14_siglip_384.webli", 384),
}
# By llm_backbone_id: the last part of its name on the hub; `mount_path` is what stands before it.
LANGUAGE_MODELS = {
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
    "qwen2.5-1.5b-instruct": "Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen2.5-3B",
    "qwen2.5-7b-instruct": "Qwen2.5-7B-Instruct",
}
OWNER = "Qwen"
ADDED_TOKENS = ("<|endofchunk|>", "<s>")
"""Appended to Qwen's tokenizer in this order; the models have spare rows for them."""
MODULES = {"projector": "connector.", "llm_backbone": "language.", "vision_backbone": "vision."}
RENAMED = {"projector": ("mlp_projector.", "mlp."), "llm_backbone": ("llm.", ""), "vision_backbone": ("", "")}


@dataclass(frozen=True, slots=True)
class PrismaticFolder:
    """A release in this layout; `about` is its config.json."""

    kind: ClassVar[str] = "open_qwen2vl"
    repository: Repository
    about: dict[str, Any]

    @property
    def form(self) -> "Form":
        form: Form = self.about.get("form", "raw" if self._is_base() else "chat")
        return form

    def section(self) -> dict[str, Any]:
        model, where = self.about["model"], f"{self.repository.name}/config.json"
        tower, size = TOWERS[_known(model, "vision_backbone_id", TOWERS, where)]
        language = LANGUAGE_MODELS[_known(model, "llm_backbone_id", LANGUAGE_MODELS, where)]
        if (strategy := model.get("image_resize_strategy")) != "resize-naive":
            raise CheckpointError(
                f"{where}: model.image_resize_strategy is {strategy!r}; pictures are resized to a square here, which "
                "is 'resize-naive'"
            )
        return {
            "vision": {
                "name": f"timm/{tower}",
                "image_size": size,
                "block": -2,
                "options": self._tower_options(tower),
            },
            "connector": {"kind": "pool_mlp", "tokens": _tokens(model.get("arch_specifier"), where)},
            "language": {"name": self._language(language), "added_tokens": ADDED_TOKENS},
            "template": self.about.get("template", {"chat": "chatml" if self._is_base() else "release"}),
        }

    def tensors(self, system: "nn.Module") -> "dict[str, Tensor]":
        path = self.repository.file(CHECKPOINT)
        found = {f"{module} {name}": tensor for module, part in _read(path).items() for name, tensor in part.items()}
        if not any(name.startswith("vision_backbone ") for name in found):
            found |= {f"vision_backbone featurizer.{name}": t for name, t in self._tower_weights().items()}
        return fit(system, found, str(path), released_name)

    def _is_base(self) -> bool:
        """Pre-trained alone, so that no template of a chat has been learned."""
        return str(self.about.get("stage", "")).endswith("pretrain")

    def _language(self, name: str) -> str:
        """A folder (inside the release, or where `mount_path` says), else a name on the hub."""
        mount = str(self.about.get("mount_path") or OWNER)
        for owner in dict.fromkeys((mount, OWNER)):
            if (folder := self.repository.inner(f"{owner}/{name}")) is not None:
                return str(folder)
        if (folder := Path(mount).expanduser().resolve() / name).is_dir():
            return str(folder)
        owner = mount if re.fullmatch(r"[\w.-]+", mount) else OWNER
        return f"{owner}/{name}"

    def _tower_options(self, tower: str) -> dict[str, Any]:
        """Of a tower that is another than timm's of that name: `model_args`, as timm writes them."""
        inner = self.repository.inner(f"timm/{tower}")
        if inner is None or not (inner / "config.json").is_file():
            return {}
        return dict(Repository(str(inner)).json("config.json").get("model_args", {}))

    def _tower_weights(self) -> "dict[str, Tensor]":
        """timm's published ones, by its names, for a release that kept its tower frozen and left it out."""
        from safetensors.torch import load_file

        tower, _ = TOWERS[self.about["model"]["vision_backbone_id"]]
        repository = f"timm/{tower}"
        inner = self.repository.inner(repository)
        if inner is not None and (inner / "model.safetensors").is_file():
            return load_file(inner / "model.safetensors")
        try:
            return load_file(fetch(repository, "model.safetensors"))
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.repository.name}: the release has no vision_backbone, so the tower's weights are timm's, and "
                f"they are not to be had: {error}; without network, put model.safetensors of "
                f"https://huggingface.co/{repository} into {self._place(repository)}"
            ) from None

    def _place(self, repository: str) -> str:
        """Where a file of another repository is looked for first, for people to read."""
        if self.repository.is_folder:
            return f"{self.repository.folder / repository}/"
        return f"the folder {repository}/ of a local copy of the release"


def _known(model: dict[str, Any], key: str, names: dict[str, Any], where: str) -> str:
    found = str(model.get(key))
    if found not in names:
        raise CheckpointError(f"{where}: model.{key} {found!r} is unknown here; known: {', '.join(names)}")
    return found


def _tokens(specifier: Any, where: str) -> int:
    """`no-align+avgpool` is 144, `full-align+729-avgpool` 729."""
    match = re.fullmatch(r"(?:[^+]*\+)*(?:(\d+)-)?avgpool", str(specifier))
    if match is None:
        raise CheckpointError(
            f"{where}: model.arch_specifier {specifier!r} is unknown here; known: …+avgpool (144 tokens) and "
            "…+N-avgpool, such as full-align+729-avgpool"
        )
    return int(match[1] or 144)


def released_name(name: str) -> str:
    """A parameter's name here to `MODULE NAME` there."""
    for module, prefix in MODULES.items():
        if name.startswith(prefix):
            theirs, ours = RENAMED[module]
            return f"{module} {theirs}{name.removeprefix(prefix).removeprefix(ours)}"
    raise AssertionError(name)


def _read(path: Path) -> "dict[str, dict[str, Tensor]]":
    """The tensors of a checkpoint by module and name. Runs nothing of it."""
    import torch

    loaded = read_pickle(path)
    modules = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(modules, dict) or not all(
        isinstance(part, dict) and all(isinstance(tensor, torch.Tensor) for tensor in part.values())
        for part in modules.values()
    ):
        raise CheckpointError(
            f"{path}: expected {{'model': {{'projector': tensors, 'llm_backbone': tensors}}}}, as prismatic writes it"
        )
    return modules


def write(
    system: "OpenQwen2VL", layout: "Layout", config: "OpenQwen2VLConfig", out: Path, model_id: str, form: "Form"
) -> None:
    """Write the release into the folder `out`, with the tower; `form`: how the model is asked.

    A tower, language model or tokenizer that differs from the published one of its name is described in a folder of
    that name inside `out`, which prismatic reads for the language model (`mount_path` is relative then), and mm for
    both. The template and the form in which the model is asked, which prismatic has no place for, stand in config.json
    under `template` and `form`, keys that it ignores.

    Raises:
        ConfigError: the model has no name in this format, or no embedding rows for the tokens that the format adds.
    """
    import torch

    vision, language, tokens = config.vision, config.language, config.connector.tokens
    tower = next((tower for tower, (name, size) in TOWERS.items() if _is_tower(vision, name, size)), None)
    if tower is None or vision.block != -2 or set(vision.mean + vision.std) != {0.5}:
        raise ConfigError(
            "the prismatic format takes the towers "
            + ", ".join(f"timm/{name} at {size} pixels" for name, size in TOWERS.values())
            + f" with block -2, mean and std 0.5; this model has {vision.name} at {vision.image_size}, block "
            f"{vision.block}: export it with --to hf-llava"
        )
    connector, model_type = config.connector, system.language.config.model_type
    if connector.kind != "pool_mlp" or connector.pool is not None or vision.resize != "square" or model_type != "qwen2":
        raise ConfigError(
            "the prismatic format takes square pictures (vision.resize), a pool_mlp connector with a number of tokens, "
            f"and a Qwen2 language model; this model has {vision.resize}, {connector.kind} with pool {connector.pool}, "
            f"and {model_type}"
        )
    own = (language.name or "").rpartition("/")[2]
    llm = next((key for key, theirs in LANGUAGE_MODELS.items() if theirs == own), "qwen2.5-1.5b-instruct")
    published = f"{OWNER}/{LANGUAGE_MODELS[llm]}"
    about = {
        "model": {
            "model_id": model_id,
            "vision_backbone_id": tower,
            "image_resize_strategy": "resize-naive",
            "llm_backbone_id": llm,
            "llm_max_length": 4096,
            "arch_specifier": "no-align+avgpool" if tokens == 144 else f"full-align+{tokens}-avgpool",
        },
        "mount_path": OWNER,
        "template": config.template.model_dump(mode="json"),
        "form": form,
    }
    (out / CHECKPOINT).parent.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    if language.name != published or not _is_published(layout.tokenizer, published):
        folder = out / published
        system.language.config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(layout.tokenizer.to_json())
        rows = system.language.get_input_embeddings().num_embeddings
        if (needed := len(Tokenizer.load(str(folder), ADDED_TOKENS))) > rows:
            raise ConfigError(
                f"the prismatic format adds {' and '.join(ADDED_TOKENS)} to a tokenizer that lacks them, which gives "
                f"{needed:,} tokens, and the model has {rows:,} embedding rows: export it with --to hf-llava"
            )
    if vision.options:
        folder = out / "timm" / TOWERS[tower][0]
        folder.mkdir(parents=True)
        values = {"architecture": TOWERS[tower][0].partition(".")[0], "model_args": vision.options}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    modules: dict[str, dict[str, Tensor]] = {module: {} for module in MODULES}
    for name, tensor in system.state_dict().items():
        module, _, theirs = released_name(name).partition(" ")
        modules[module][theirs] = tensor.cpu()
    torch.save({"model": modules}, out / CHECKPOINT)


def _is_published(tokenizer: Tokenizer, name: str) -> bool:
    """Whether a reader gets this tokenizer by the name alone. No, where that cannot be known for lack of network."""
    try:
        return Tokenizer.load(name, ADDED_TOKENS).fingerprint() == tokenizer.fingerprint()
    except DataError:
        return False


def _is_tower(vision: Any, name: str, size: int) -> bool:
    ours = vision.name.removeprefix("timm/")
    return ours in (name, name.partition(".")[0]) and vision.image_size == size
