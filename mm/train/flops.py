"""Formulas for operators that torch's FlopCounterMode does not count, or counts wrongly.

Importing this module registers them.

Counted as torch counts: 2 FLOPs for a multiply and add, attention as full squares whether causal or not, recomputation
in backward kernels included. What has no formula (norms, activations, softmax, Fourier transforms) counts as nothing.
"""

from typing import Any

import torch
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

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


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: list[bool], **kwargs: Any,
) -> int:  # fmt: skip
    """Each product of the forward pass once for the input's gradient and once for the weight's.

    In place of torch's own formula, which takes a grouped convolution's weight for a full one: `groups` times as much.
    """
    return int(conv_flop_count(list(x), list(weight), list(grad), transposed) * (wanted[0] + wanted[1]))


def register() -> None:
    """Once in a process; torch refuses to register a formula twice."""
    if flop_registry[aten.convolution_backward].__wrapped__ is not _convolution_backward:
        del flop_registry[aten.convolution_backward]
    for target, formula in (
        (aten._scaled_dot_product_flash_attention_for_cpu, _attention),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
        (aten._grouped_mm, _grouped_mm),
        (aten.convolution_backward, _convolution_backward),
    ):
        if target not in flop_registry:
            register_flop_formula(target)(formula)


register()
