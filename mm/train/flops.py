"""Formulas for operators that torch's FlopCounterMode does not count. Importing this module registers them.

Counted as torch counts: 2 FLOPs for a multiply and add, attention as full squares whether causal or not, recomputation
in backward kernels included. What has no formula (norms, activations, softmax) counts as nothing.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
Shape = torch.Size


def _attention(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


def _grouped_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    """Groups share the rows (2D x 3D), the columns (3D x 2D) or the inner dimension (2D x 2D); or each has its own.

    Whichever it is, the groups' products sum to the plain product of the dimensions that are not the group's.
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * groups * a[-2] * a[-1] * b[-1])


def register() -> None:
    """Once in a process; torch refuses to register a formula twice."""
    for target, formula in (
        (aten._scaled_dot_product_flash_attention_for_cpu, _attention),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
        (aten._grouped_mm, _grouped_mm),
    ):
        if target not in flop_registry:
            register_flop_formula(target)(formula)


register()
