"""Pictures and texts in one space: the losses that bring pairs together, and what is measured of the space.

The losses are those of open_clip's `ClipLoss` and `SigLipLoss`, from the features of all pairs of a step, which the
trainer has gathered (`PooledSystem`). So nothing here knows of ranks or micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # queries that are compared with all candidates at a time


def contrastive_sum(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    loss: Literal["clip", "siglip"],
    own: slice = slice(None),
) -> Tensor:
    """[]: the loss of n pairs, summed over them. `clip` (2103.00020) is the mean of the cross-entropies of a picture
    among all texts and of a text among all pictures; `siglip` (2303.15343) is over all n * n combinations.

    Args:
        image, text: [n, D], of length 1; a picture's partner has the same number.
        scale: what similarities are multiplied by, [], or [n] equal ones as the step gathers them.
        bias: added to them, alike; `siglip` needs it.
        own: what these pairs contribute, with `siglip` their pictures, compared with all: what open_clip's `local_loss`
            works out on a rank.
    """
    pairs = torch.arange(len(image), device=image.device)[own]
    if not len(pairs):  # zero, in reach of all that may need a gradient
        return 0.0 * torch.stack([one.sum() for one in (image, text, scale, bias) if one is not None]).sum()
    scale, bias = scale.mean(), None if bias is None else bias.mean()
    logits = scale * image[own] @ text.T
    if loss == "siglip":
        assert bias is not None
        is_pair = pairs[:, None] == torch.arange(len(text), device=text.device)
        return -F.logsigmoid((logits + bias) * torch.where(is_pair, 1, -1)).sum()
    back = scale * text[own] @ image.T
    return (F.cross_entropy(logits, pairs, reduction="sum") + F.cross_entropy(back, pairs, reduction="sum")) / 2


def recalls(
    image: Tensor, text: Tensor, groups: Tensor | None = None, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Retrieval both ways: `image_to_text_recall@k` is the share of pictures with one of their own texts among the k
    most similar, `text_to_image_recall@k` that of texts with their picture among these.

    Args:
        image: [N, D]; text: [M, D]; of length 1.
        groups: int64 [M], the picture of each text; by default text i is that of picture i. Every picture has a text.

    Where similarities are equal, a query counts with its chance over all orders of the equal ones. Of nothing there are
    no recalls.
    """
    if not len(image):
        return {}
    owner = torch.arange(len(text), device=text.device) if groups is None else groups.to(text.device)
    pictures = torch.arange(len(image), device=image.device)
    return {
        **_found("image_to_text_recall", image, text, pictures, owner, at),
        **_found("text_to_image_recall", text, image, owner, pictures, at),
    }


def zero_shot(
    encode_texts: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """float32 [classes, D]: a classifier, each row the direction of the mean of a class's texts (2103.00020 3.1.4).

    Args:
        encode_texts: texts to [n, D] of length 1.
        templates: what is said of a class, its name in the place of `{}`: `a photo of a {}.`
    """
    rows = [encode_texts([one.replace("{}", name) for one in templates]).float().mean(0) for name in classes]
    return F.normalize(torch.stack(rows), dim=1)


def accuracies(image: Tensor, classifier: Tensor, targets: Tensor, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """`accuracy@k`: the share of pictures [N, D] whose class, int64 [N], is among the k most similar [classes, D]."""
    classes = torch.arange(len(classifier), device=classifier.device)
    return _found("accuracy", image.float(), classifier, targets.to(image.device), classes, at)


def _found(
    name: str, queries: Tensor, candidates: Tensor, own: Tensor, of: Tensor, at: Sequence[int]
) -> dict[str, float]:
    """By k, how many of the queries find a candidate of theirs (`own[query] == of[candidate]`) among the k best."""
    sums = torch.zeros(len(at), dtype=torch.float64)
    for part, mine in zip(queries.split(CHUNK), own.split(CHUNK), strict=True):
        similar = part @ candidates.T
        is_own = mine[:, None] == of
        best = similar.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        rivals = similar.masked_fill(is_own, -torch.inf)
        above, equal = (rivals > best).sum(1), (rivals == best).sum(1)
        for number, k in enumerate(at):
            sums[number] += ((k - above) / (equal + 1)).clamp(0, 1).sum().item()
    return {f"{name}@{k}": float(total) / max(len(queries), 1) for k, total in zip(at, sums, strict=True)}
