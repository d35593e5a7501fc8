"""A step of one sample a row gives the update of the same samples packed."""

import math
from collections.abc import Callable

import pytest
import torch

from mm.config import RunConfig
from mm.data.loader import one_pass
from mm.data.prepare import open_splits
from mm.models.system import GenerativeSystem


def test_loss_and_gradients_do_not_depend_on_packing(tiny_config: Callable[..., RunConfig]) -> None:
    found = []
    for packing in ("full", "single"):
        config = tiny_config(f"data.packing={packing}", "data.budgets={}", "data.visits=1", "model.vision.crop=1")
        layout = config.model.layout()
        torch.manual_seed(0)
        system: GenerativeSystem = config.model.build()
        total = 0.0
        for batch in one_pass(open_splits(config.data, layout, 0)["train"], layout, 16):
            loss = system(batch).losses["next_token"]
            loss.backward()
            total += loss.item()
        found.append((total, {name: p.grad for name, p in system.named_parameters()}))
    (full, gradients), (single, others) = found
    assert single == pytest.approx(full, rel=1e-6)
    for name, gradient in gradients.items():
        if gradient is None:
            assert others[name] is None
            continue
        assert torch.allclose(others[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name
    assert math.isfinite(full)
