"""Contrastive losses and measures against closed forms, brute force and open_clip."""

import itertools
from typing import Literal

import open_clip
import pytest
import torch
import torch.nn.functional as F
from pairs_run import MODEL
from torch import Tensor

from mm.models.contrastive import accuracies, contrastive_sum, recalls, zero_shot
from mm.models.systems.clip.config import ClipConfig


def directions(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_losses_are_those_of_the_papers(loss: Literal["clip", "siglip"]) -> None:
    """By a loop over pairs, with gradients."""
    image, text = directions(5, 3).requires_grad_(), directions(5, 3, seed=1).requires_grad_()
    scale, bias = torch.tensor(7.0, dtype=torch.float64, requires_grad=True), torch.tensor(-3.0, dtype=torch.float64)
    inputs = (image, text, scale)
    logits = scale * image @ text.T + bias
    expected = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(5), range(5)):
        if loss == "siglip":
            expected = expected + F.softplus(-logits[i, j] if i == j else logits[i, j])
        elif i == j:
            expected = expected + (logits[i].logsumexp(0) + logits[:, i].logsumexp(0)) / 2 - logits[i, i]
    found = contrastive_sum(image, text, scale.expand(5), bias.expand(5), loss)
    torch.testing.assert_close(found, expected)
    parts = [contrastive_sum(image, text, scale, bias, loss, own) for own in (slice(0, 2), slice(2, 2), slice(2, 9))]
    torch.testing.assert_close(torch.stack(parts).sum(), expected)
    grads = torch.autograd.grad(expected, inputs, retain_graph=True)
    for given in (found, torch.stack(parts).sum()):
        for one, other in zip(torch.autograd.grad(given, inputs), grads, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_no_pairs_are_a_zero_that_all_can_be_reached_from(loss: Literal["clip", "siglip"]) -> None:
    inputs = [torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)]
    inputs += [torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)]
    found = contrastive_sum(*inputs, loss)  # type: ignore[arg-type, misc]
    assert found == 0 and all(grad.numel() == 0 for grad in torch.autograd.grad(found, inputs))


def test_recalls_are_those_of_a_brute_force_search() -> None:
    """Several texts for a picture; more queries than are compared at a time."""
    image, text = directions(700, 6), directions(1500, 6, seed=1)
    owner = torch.randint(700, (1500,), generator=torch.Generator().manual_seed(2))
    owner[:700] = torch.arange(700)
    similar = image @ text.T
    by_picture, by_text = similar.argsort(1, descending=True), similar.T.argsort(1, descending=True)
    found = recalls(image, text, owner)
    for k in (1, 5, 10):
        right = [bool((owner[by_picture[i, :k]] == i).any()) for i in range(700)]
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(sum(right) / 700)
        right = [int(owner[j]) in by_text[j, :k].tolist() for j in range(1500)]
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(sum(right) / 1500)


def test_what_is_equal_is_found_by_chance() -> None:
    """So a model that gives all pictures one feature has no recall but that of chance."""
    same = torch.ones(20, 4)
    assert recalls(same, same)["image_to_text_recall@5"] == pytest.approx(5 / 20)
    assert accuracies(same, same[:8], torch.arange(20) % 8)["accuracy@1"] == pytest.approx(1 / 8)


def test_a_zero_shot_classifier_is_open_clips() -> None:
    config = ClipConfig.model_validate(MODEL)
    torch.manual_seed(0)
    system = config.build().eval()
    classes, templates = ["cat", "a {dog}", "tree house"], ["a photo of a {}.", "{}", "many {}"]
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    asked = [lambda name, one=one: one.replace("{}", name) for one in templates]
    expected = open_clip.build_zero_shot_classifier(system.clip, tokenizer, classes, asked).T
    with torch.no_grad():
        found = zero_shot(system.encode_texts, classes, templates)
    torch.testing.assert_close(found, expected)
    pictures, targets = directions(50, 16).float(), torch.arange(50) % 3
    best = (pictures @ expected.T).argsort(1, descending=True)
    right = accuracies(pictures, found, targets, at=(1, 2))
    for k in (1, 2):
        assert right[f"accuracy@{k}"] == pytest.approx(float((best[:, :k] == targets[:, None]).any(1).float().mean()))
