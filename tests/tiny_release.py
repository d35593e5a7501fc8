"""Open-Qwen2VL as its repository builds it, by hand and tiny, and a release of it; the oracle that tests compare with.

The tower is timm's SigLIP so400m at 384 pixels with its 27 x 27 patches, narrow and three blocks deep; the language
model a Qwen2 with tied embeddings and spare rows.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from mm.data import builtin
from mm.data.sample import Media
from mm.data.tokens import Segment

TOWER = "vit_so400m_patch14_siglip_384"
TOWER_OPTIONS = {"embed_dim": 48, "depth": 3, "num_heads": 4}
LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4224, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
IMAGE = -200


class Prismatic:
    """Tower, projector and language model of an Open-Qwen2VL, run as `prismatic.py`'s `forward` does."""

    def __init__(self, tokens: int, pad: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.tokens, self.pad = tokens, pad
        self.tower: Any = timm.create_model(TOWER, num_classes=0, img_size=384, **TOWER_OPTIONS)
        self.projector = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 32))
        self.language = Qwen2ForCausalLM(Qwen2Config(**LANGUAGE))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)  # so that logits are of some size
            else:
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)

    def parameters(self) -> list[nn.Parameter]:
        return [p for part in (self.tower, self.projector, self.language) for p in part.parameters()]

    def pictures(self, pixels: Tensor) -> Tensor:
        """[N, 3, 384, 384] to [N, tokens, D]."""
        (patches,) = self.tower.get_intermediate_layers(pixels, n=[len(self.tower.blocks) - 2])
        side = int(self.tokens**0.5)
        grid = patches.transpose(1, 2).reshape(len(patches), -1, 27, 27)
        return self.projector(F.adaptive_avg_pool2d(grid, (side, side)).flatten(2).transpose(1, 2))

    def forward(self, rows: list[list[int]], labels: list[list[int]], pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The sum of the losses, and the logits of each row, [its length, V]. `IMAGE` in a row is the next picture."""
        pictures = list(self.pictures(pixels)) if len(pixels) else []
        embed = self.language.get_input_embeddings()
        embedded, targets = [], []
        for ids, wanted in zip(rows, labels, strict=True):
            parts, goals = [], []
            for token, label in zip(ids, wanted, strict=True):
                if token == IMAGE:
                    parts.append(pictures.pop(0))
                    goals += [-100] * self.tokens
                else:
                    parts.append(embed(torch.tensor([token])))
                    goals.append(label)
            embedded.append(torch.cat(parts))
            targets.append(torch.tensor(goals))
        assert not pictures
        length = max(map(len, embedded))
        inputs = torch.stack([F.pad(one, (0, 0, 0, length - len(one))) for one in embedded])
        mask = torch.stack([(torch.arange(length) < len(one)).long() for one in embedded])
        logits = self.language(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        wanted = torch.stack([F.pad(one, (0, length - len(one)), value=-100) for one in targets])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), reduction="sum")
        return loss, [row[: len(one)] for row, one in zip(logits, embedded, strict=True)]

    def greedy(self, ids: list[int], pixels: Tensor, count: int, end: int) -> list[int]:
        """The likeliest tokens, the whole row run anew for each."""
        written: list[int] = []
        with torch.no_grad():
            while len(written) < count and end not in written:
                row = ids + written
                _, (logits,) = self.forward([row], [row], pixels)
                written.append(int(logits[-1].argmax()))
        return [token for token in written if token != end]

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """As a released checkpoint names them."""
        projector = {f"mlp_projector.{n}": t for n, t in self.projector.state_dict().items()}
        language = {f"llm.{n}": t for n, t in self.language.state_dict().items()}
        tower = {f"featurizer.{n}": t for n, t in self.tower.state_dict().items()}
        return {"projector": projector, "llm_backbone": language, "vision_backbone": tower}

    def gradients(self) -> dict[str, Tensor]:
        """By the names of this framework."""
        return {
            **{f"vision.featurizer.{n}": p.grad for n, p in self.tower.named_parameters() if p.grad is not None},
            **{f"connector.mlp.{n}": p.grad for n, p in self.projector.named_parameters() if p.grad is not None},
            **{f"language.{n}": p.grad for n, p in self.language.named_parameters() if p.grad is not None},
        }


def write_release(folder: Path, model: Prismatic, vision: bool = True, **about: Any) -> Path:
    """A release without network: what it takes from other repositories stands in folders of their names.

    `vision` is whether the checkpoint has the tower, which otherwise is where timm's published weights go.
    """
    modules = model.modules()
    tower = modules["vision_backbone"] if vision else modules.pop("vision_backbone")
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"model": modules}, folder / "checkpoints/latest-checkpoint.pt")
    settings = {
        "model_id": "tiny",
        "vision_backbone_id": "siglip-vit-so400m-384px",
        "image_resize_strategy": "resize-naive",
        "llm_backbone_id": "qwen2.5-1.5b-instruct",
        "llm_max_length": 4096,
        "arch_specifier": "no-align+avgpool" if model.tokens == 144 else f"full-align+{model.tokens}-avgpool",
    }
    values = {"model": settings, "mount_path": "Qwen", "stage": "large-finetune", "seed": 7, **about}
    (folder / "config.json").write_text(json.dumps(values))
    language, timms = folder / "Qwen/Qwen2.5-1.5B-Instruct", folder / f"timm/{TOWER}.webli"
    model.language.config.save_pretrained(language)
    (language / "tokenizer.json").write_text(json.dumps(qwen_like_tokenizer()))
    timms.mkdir(parents=True)
    (timms / "config.json").write_text(json.dumps({"architecture": TOWER, "model_args": TOWER_OPTIONS}))
    if not vision:
        save_file({name.removeprefix("featurizer."): t for name, t in tower.items()}, timms / "model.safetensors")
    return folder


def qwen_like_tokenizer(lacking: tuple[str, ...] = ("<s>", "<|endofchunk|>")) -> dict[str, Any]:
    """The shipped tokenizer without some of its special tokens, by default those that Qwen's comes without."""
    values: dict[str, Any] = json.loads((builtin.folder("emoji") / "tokenizer/tokenizer.json").read_text())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in lacking]
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {f"[{t}]" if t in lacking else t: number for t, number in vocabulary.items()}
    return values


def picture(seed: int, width: int = 90, height: int = 70) -> Media:
    """A PNG of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return Media("image", file.getvalue(), "png")


def row_of(segment: Segment) -> tuple[list[int], list[int]]:
    """A segment as prismatic's ids, with `IMAGE` for a picture, and labels."""
    learned = {position for start, stop in segment.loss for position in range(start, stop)}
    inside = {m.position + n: n for m in segment.media for n in range(m.length)}
    ids, labels = [], []
    for position, token in enumerate(segment.ids.tolist()):
        if inside.get(position, 0) == 0:
            ids.append(IMAGE if position in inside else token)
            labels.append(token if position in learned else -100)
    return ids, labels
