"""A tagger: audio encoder -> weights over layers -> mean over a recording's frames -> a linear layer or two.

The labels of a recording stand behind its frames in the row, a token each, with the loss on them. Nothing predicts them
from the row: they are read from the batch's labels, and are the targets of the recording whose segment they are in.
Source of the form: MARBLE's probes (Yuan et al., 2306.10548), here with the encoder trained too unless it is frozen.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.data.batch import PackedBatch
from mm.errors import ConfigError, DataError
from mm.models.audio import AudioEncoder
from mm.models.scores import average_precision, roc_auc
from mm.models.system import Output, System
from mm.models.systems.tagger.config import TaggerConfig


class Tagger(System):
    """See the module. Submodules `encoder` and `head`, and `layer_weights`, are what name patterns in configs match.

    The one objective, `tags`, is over recordings that have labels.
    """

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        self.weights = {"tags": 1.0}
        self.task, self.labels, self.layers = config.task, config.labels, config.layers
        self.encoder = AudioEncoder(config.encoder)
        states = self.encoder.layers + 1
        if self.layers == "all":
            self.layer_weights = nn.Parameter(torch.zeros(states))
        elif not 0 <= self.layers < states:
            raise ConfigError(f"model.layers {self.layers}: the encoder has the states 0 to {states - 1}")
        width = self.encoder.width
        hidden = [nn.Linear(width, config.hidden), nn.ReLU()] if config.hidden else []
        last = nn.Linear(config.hidden or width, len(self.labels))
        self.head = nn.Sequential(*hidden, nn.Dropout(config.dropout), last)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Raises `DataError` for several labels of a recording that is to have one."""
        targets = self.targets(batch)
        if self.task == "class" and bool((several := targets.sum(1) > 1).any()):
            media = batch.media["audio"]
            row, position = (int(where[several][0]) for where in (media.row, media.position))
            name = batch.ids[row][int(batch.segment_ids[row, position]) - 1]
            raise DataError(f"{name}: has several labels; set model.task=tags, or give it one")
        return {"tags": targets.any(1).sum()}

    def forward(self, batch: PackedBatch) -> Output:
        logits, targets = self.logits(batch), self.targets(batch)
        labelled = targets.any(1)
        if self.task == "class":
            losses = F.cross_entropy(logits, targets.argmax(1), reduction="none")
        else:
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        hits, count = found_among_most_likely(logits, targets).sum(), labelled.sum()
        metrics = {"accuracy" if self.task == "class" else "hits": hits / count.clamp(min=1)}
        seen = {} if self.training else {"logits": logits.detach()[labelled], "targets": targets[labelled]}
        return Output({"tags": (losses * labelled).sum()}, {"tags": count}, metrics, predictions=seen)

    def scores(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Of tags, means over those that some recordings have and others have not."""
        if self.task == "class":
            return {}
        truth, logits = predictions["targets"].numpy() > 0, predictions["logits"].numpy()
        found = {"roc_auc": roc_auc(truth, logits), "average_precision": average_precision(truth, logits)}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def logits(self, batch: PackedBatch) -> Tensor:
        """float32 [N, labels], of every recording; of none, where the batch has none."""
        media = batch.media.get("audio")
        if media is None:
            return self.head(torch.zeros(0, self.encoder.width, device=batch.labels.device)).float()
        encoded = self.encoder(media.items(), states=True)
        states = encoded.states if self.layers == "all" else [encoded.states[self.layers]]
        means = torch.stack([means_of(state, encoded.lengths) for state in states])  # s n d
        if self.layers == "all":
            means = torch.einsum("s,snd->nd", self.layer_weights.float().softmax(0), means)
        return self.head(means.view(len(media), -1)).float()

    def targets(self, batch: PackedBatch) -> Tensor:
        """float32 [N, labels]: 1 where a recording has a label."""
        media = batch.media.get("audio")
        device, length = batch.labels.device, batch.labels.shape[1]
        if media is None or media.dummy:
            return torch.zeros(0 if media is None else len(media), len(self.labels), device=device)
        at = batch.learned()
        segment_of_label = at // length * (length + 1) + batch.segment_ids.flatten()[at]
        segment_of_item = media.row * (length + 1) + batch.segment_ids[media.row, media.position]
        its = segment_of_item[:, None] == segment_of_label  # n k
        label = F.one_hot(batch.labels.flatten()[at] - 1, len(self.labels))  # k c; token 0 is padding
        return (its.float() @ label.float()).clamp(max=1)


def means_of(state: Tensor, lengths: list[int]) -> Tensor:
    """[sum lengths, D] to float32 [N, D]: the mean of each run of frames."""
    frames = torch.tensor(lengths, device=state.device)
    run = torch.repeat_interleave(torch.arange(len(lengths), device=state.device), frames, output_size=len(state))
    sums = state.new_zeros(len(lengths), state.shape[1], dtype=torch.float32).index_add(0, run, state.float())
    return sums / frames[:, None]


def found_among_most_likely(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 [N]: of a recording's k labels, the share that is among its k most likely; 0 where k is 0.

    For one label that is whether it is the most likely. Over many recordings the mean is known as R-precision.
    """
    number = targets.sum(1, keepdim=True)
    rank = logits.detach().argsort(1, descending=True).argsort(1)
    return ((rank < number) * targets).sum(1) / number[:, 0].clamp(min=1)
