"""What is installed, and whether it fits together: read from package metadata first, so that a broken torch is told of
rather than stumbled over."""

import importlib
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

PACKAGES = (
    "torch", "torchvision", "transformers", "tokenizers", "timm", "open_clip_torch", "deepspeed", "webdataset",
    "einops", "pydantic", "numpy", "pyarrow", "pillow", "safetensors", "ray", "wandb",
)  # fmt: skip
OPTIONAL = {"ray", "wandb"}
REINSTALL = "reinstall both together: pip install --force-reinstall torch torchvision"


def diagnose() -> dict[str, Any]:
    """`{"packages": {name: version or None}, "machine": {…}, "problems": [line, …]}`."""
    packages = {name: _version(name) for name in PACKAGES}
    problems = [
        f"{name} is not installed; run `make setup`"
        for name, v in packages.items()
        if v is None and name not in OPTIONAL
    ]
    problems += torch_mismatch(packages["torch"], packages["torchvision"], _wanted_torch())
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }
    if packages["torch"] is not None:
        try:
            machine |= _accelerator()
        except Exception as error:
            problems.append(f"torch does not work: {_first(error)}; {REINSTALL}")
        else:
            for name in ("torchvision", "timm", "open_clip", "transformers"):
                try:
                    importlib.import_module(name)
                except Exception as error:
                    hint = f"; {REINSTALL}" if "torchvision" in str(error) or name == "torchvision" else ""
                    problems.append(f"{name} cannot be imported: {_first(error)}{hint}")
    return {"packages": packages, "machine": machine, "problems": list(dict.fromkeys(problems))}


def torch_mismatch(torch: str | None, torchvision: str | None, wanted: str | None) -> list[str]:
    """Whether torchvision was built for this torch; PyPI's wheels of it also need a torch with CUDA libraries.

    Args:
        torch, torchvision: installed versions; wanted: the torch version that torchvision's metadata pins.
    """
    if torch is None or torchvision is None:
        return []
    if wanted is not None and torch.split("+")[0] != wanted:
        return [f"torchvision {torchvision} was built for torch {wanted}, but torch {torch} is installed; {REINSTALL}"]
    if "+cpu" in torch and "+cpu" not in torchvision:
        return [
            f"torch {torch} is a CPU-only build, but torchvision {torchvision} is PyPI's and needs the ordinary one "
            f'("operator torchvision::nms does not exist"); {REINSTALL}'
        ]
    return []


def _wanted_torch() -> str | None:
    try:
        for requirement in requires("torchvision") or ():
            if match := re.match(r"torch\s*\(?==\s*([\d.]+)", requirement):
                return match[1]
    except PackageNotFoundError:
        pass
    return None


def _accelerator() -> dict[str, Any]:
    import torch

    from mm.models.attention import choose_implementation

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    return {
        "accelerator": torch.cuda.get_device_name(0) if cuda else "none; the CPU is used",
        "accelerators": torch.cuda.device_count() if cuda else 0,
        "threads": torch.get_num_threads(),
        "attention": {"segments": "SDPA, segment by segment", "flex": "flex_attention"}[choose_implementation(device)],
        "bf16": bool(torch.cuda.is_bf16_supported()) if cuda else "by autocast (slow without AMX or AVX512-BF16)",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
