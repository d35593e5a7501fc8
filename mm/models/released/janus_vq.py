"""A VQ model as transformers' `JanusVQVAE`: config.json and model.safetensors, of which `model.teacher` of the kind vq
makes a teacher.

Codes are written at length 1. So `JanusVQVAE.encode`, which takes the nearest code, gives the same as the model here,
which takes the one in a latent's direction.
"""

import copy
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file

BOOK = "quantize.embedding.weight"


def write(system: Any, out: Path) -> str:
    """Write into the folder `out`; returns what a user of it has to know."""
    about = copy.deepcopy(system.vqvae.config)
    about.architectures = ["JanusVQVAE"]
    about.save_pretrained(out)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in system.vqvae.state_dict().items()}
    save_file({**tensors, BOOK: F.normalize(tensors[BOOK], dim=1)}, out / "model.safetensors", {"format": "pt"})
    return f"it takes squares of {system.config.size} pixels in values from -1 to 1"
