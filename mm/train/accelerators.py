"""Accelerators that we know the peak of: what MFU is measured against, and what `mm estimate` plans for.

Peaks are the makers' figures for dense bfloat16 matrix products with float32 accumulation (many data sheets print twice
that, for 2:4 sparsity). A card that is not in the table, or a slice of one, has no known peak, and then no MFU is
stated: a wrong denominator is worse than none.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A kind of card. `find(its own name)` finds it too, so users may name it."""

    name: str
    pattern: str
    """Matches somewhere in `torch.cuda.get_device_name()`."""
    tflops: float
    """Peak of dense bfloat16, in 10^12 FLOP/s."""
    memory: int
    """GiB that torch can have, rounded down: `total_memory` of the device properties."""


ACCELERATORS = (
    # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703
    Accelerator("B200", r"\bB200", 2250, 178),
    # https://www.nvidia.com/en-us/data-center/h200/
    Accelerator("H200 NVL", r"\bH200 NVL", 835, 139),
    Accelerator("H200", r"\bH200", 989, 139),
    Accelerator("GH200 480GB", r"\bGH200 480GB", 989, 94),
    # https://www.nvidia.com/en-us/data-center/h100/
    Accelerator("H100 NVL", r"\bH100 NVL", 835, 93),
    Accelerator("H100 PCIe", r"\bH[18]00 PCIe", 756, 79),
    Accelerator("H100 SXM", r"\bH[18]00", 989, 79),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    Accelerator("A100 80GB", r"\bA[18]00.*80GB", 312, 79),
    Accelerator("A100 40GB", r"\bA[18]00.*40GB", 312, 39),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413 ; https://www.nvidia.com/en-us/data-center/l4/
    Accelerator("L40S", r"\bL40S", 362, 44),
    Accelerator("L40", r"\bL40\b", 181, 44),
    Accelerator("L4", r"\bL4\b", 121, 22),
    # https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf
    Accelerator("A40", r"\bA40\b", 149.7, 44),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf
    Accelerator("A10", r"\bA10\b", 125, 22),
    # Not an A10: https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf
    Accelerator("A10G", r"\bA10G\b", 70, 22),
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    Accelerator("RTX A6000", r"\bRTX A6000", 154.8, 47),
    Accelerator("RTX 3090", r"\bRTX 3090(?! Ti)", 71, 23),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    Accelerator("RTX 6000 Ada", r"\bRTX 6000 Ada", 364.2, 47),
    Accelerator("RTX 4090", r"\bRTX 4090(?! D| Laptop)", 165.2, 23),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    Accelerator("RTX 5090", r"\bRTX 5090(?! D| Laptop)", 209.5, 31),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    Accelerator("MI300X", r"\bMI300X", 1307.4, 191),
    # https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html; each of its two dies is a device
    Accelerator("MI250X", r"\bMI250X", 191.5, 63),
)


def find(device_name: str) -> Accelerator | None:
    """The kind of card that `torch.cuda.get_device_name()` or a user calls so; None if unknown, or a MIG slice."""
    if " MIG " in device_name:
        return None
    return next((one for one in ACCELERATORS if re.search(one.pattern, device_name)), None)


def peak_flops(device: "torch.device", precision: str) -> float | None:
    """FLOP/s that the device could do at most in `train.precision`; None where that is not known.

    Only bf16 is: what float32 can reach depends on whether its products may use TF32.
    """
    import torch

    if device.type != "cuda" or precision != "bf16":
        return None
    known = find(torch.cuda.get_device_name(device))
    return known.tflops * 1e12 if known else None
