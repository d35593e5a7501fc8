"""MERT: an encoder of music that predicts, in frames it does not see, what teachers say of them.

One teacher says codes, of several codebooks, which are told by the cosine of a frame with learned embeddings; the other
is the constant-Q transform. Both hear a clip as it is. The student may hear pieces of other clips of the row on top of
it, and spans of its frames are masked. Sources: Li et al., 2306.00107; github yizhilll/MERT, `mert_fairseq/models/mert/
mert_model.py` and `config/pretrain/*.yaml`; fairseq's HuBERT.

What is drawn in training comes from a key of the row (`PackedBatch.draws`) and the number of the clip in it, on the
host: so it is the same however the rows of a step are split, and which frames count is known before the first forward
pass. In evaluation keys are those of the samples, and masks are all that is drawn.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from mm.data.batch import MediaBatch, PackedBatch, with_dummies
from mm.data.sample import keyed_rng
from mm.errors import ConfigError
from mm.models.audio import AudioEncoder
from mm.models.masking import draw_noises, mix, span_mask
from mm.models.objectives import code_logits, code_losses, draw_labels, drawn_errors
from mm.models.spectra import CQT
from mm.models.system import Output, System
from mm.models.systems.mert.config import MertConfig
from mm.models.teachers import Teacher


@dataclass(frozen=True, slots=True)
class Clips:
    """What is known of the clips of a batch in host memory, and drawn for their frames.

    Of each clip: its row; the key of that row; its number among the row's clips; how many frames it has; and whether it
    is data that could be read. Of all frames in order: masked, bool [N]; counted, bool [N], those of clips that are.
    """

    row: list[int]
    key: list[int]
    number: list[int]
    frames: list[int]
    readable: list[bool]
    masked: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        return np.repeat(self.readable, self.frames)

    def learned(self, objective: str) -> np.ndarray:
        """bool [N]: the frames that an objective is a sum over."""
        return self.counted if objective == "feature_penalty" else self.masked


class Mert(System):
    """See the module. Submodules `encoder`, `code_head` and `cqt_head` are what name patterns in configs match.

    Objectives, if of a weight above 0: `codes` and `cqt`, of masked frames; `feature_penalty`, of all frames.
    """

    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.config = config
        self.weights = {name: weight for name, weight in config.weights.model_dump().items() if weight}
        self.encoder = AudioEncoder(config.encoder, config.grad_mult)
        if "codes" in self.weights and config.teacher is not None:
            self.code_head = CodeHead(config, self.encoder.width, config.teacher.sizes())
        if "cqt" in self.weights:
            cqt = config.cqt
            self.cqt_head = nn.Linear(self.encoder.width, cqt.bins)
            self._cqt = CQT(config.encoder.sampling_rate, config.encoder.hop, cqt.fmin, cqt.bins, cqt.bins_per_octave)
        self._layout = config.layout()

    @cached_property
    def teacher(self) -> Teacher:
        """Made when it is first asked. It is no submodule: it belongs to the data."""
        assert self.config.teacher is not None
        teacher: Teacher = self.config.teacher.build()
        teacher.check(self._layout)
        return teacher

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Raises `ConfigError` where nothing says what codes there are."""
        self._require_codes()
        media = batch.media.get("audio")
        if media is None:
            return {name: torch.tensor(0) for name in self.weights}
        return self._counts(self._drawn(media, batch.draws))

    def row_counts(self, batch: PackedBatch) -> Tensor:
        rows = len(batch.input_ids)
        media = batch.media.get("audio")
        if media is None:
            return torch.zeros(rows, dtype=torch.int64)
        clips = self._drawn(media, batch.draws)
        learned = clips.learned(next(iter(self.weights)))
        return torch.from_numpy(np.bincount(np.repeat(clips.row, clips.frames)[learned], minlength=rows))

    @property
    def drawn(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def drawn_losses(self, batch: PackedBatch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        return self._output(batch, generators).losses

    def forward(self, batch: PackedBatch) -> Output:
        self._require_codes()
        return self._output(batch)

    def _output(self, batch: PackedBatch, generators: Sequence[torch.Generator] | None = None) -> Output:
        """`generators`: one for each row, to draw what is predicted instead of asking teachers."""
        if "audio" not in batch.media:
            batch = with_dummies(batch, self._layout)
        media = batch.media["audio"]
        device, clean = media.values.device, media.items()
        clips = self._drawn(media, batch.draws)

        def moved(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        heard, mixed = self._mixed(clean, clips)
        kept = self._kept(clips)
        encoded = self.encoder(heard, moved(clips.masked), kept=None if kept is None else moved(kept))
        at = {name: np.flatnonzero(clips.learned(name)) for name in self.weights}
        row_of = np.repeat(clips.row, clips.frames)
        rows = {name: np.bincount(row_of[places], minlength=len(batch.ids)).tolist() for name, places in at.items()}
        losses: dict[str, Tensor] = {}  # of the frames that count
        metrics = {
            "masked_frames": torch.tensor(clips.masked.sum() / max(clips.counted.sum(), 1)),
            "mixed_clips": torch.tensor(mixed / max(sum(clips.readable), 1)),
        }
        if "codes" in at:
            places = moved(at["codes"])
            hidden = encoded.hidden[places]
            if generators is None:
                codes = self._codes(media, clips.frames)[places]
            else:
                codes = self.code_head.draw(hidden, rows["codes"], generators)
            losses["codes"], right = self.code_head(hidden, codes)
            metrics["code_accuracy"] = right.sum() / max(right.numel(), 1)
        if "cqt" in at:
            places = moved(at["cqt"])
            predicted = self.cqt_head(encoded.hidden[places]).float()
            if generators is None:
                target = torch.cat([one[:n] for one, n in zip(self._cqt(clean), clips.frames, strict=True)])
                errors = predicted - target[places]
            else:
                errors = drawn_errors(predicted, rows["cqt"], generators)
            losses["cqt"] = errors.square().mean(1)
        if "feature_penalty" in at:
            features = encoded.features.float()[moved(at["feature_penalty"])]
            if generators is not None:
                features = drawn_errors(features, rows["feature_penalty"], generators)
            losses["feature_penalty"] = features.square().mean(1)
        first = next(iter(at))
        by_row = losses[first].new_zeros(len(batch.input_ids))
        by_row.index_add_(0, moved(row_of[at[first]]), losses[first].detach())
        return Output(
            {name: each.sum() for name, each in losses.items()},
            self._counts(clips),
            {name: value.to(device, torch.float32, non_blocking=True) for name, value in metrics.items()},
            rows={first: by_row},
        )

    def _require_codes(self) -> None:
        if "codes" in self.weights and self.config.teacher is None:
            raise ConfigError(
                "model.teacher is missing: it says what codes there are, and computes those that are not read with the "
                "data (data.codes); set it, or model.weights.codes=0"
            )

    def _counts(self, clips: Clips) -> dict[str, Tensor]:
        return {name: torch.tensor(int(clips.learned(name).sum())) for name in self.weights}

    def _drawn(self, media: MediaBatch, draws: Tensor) -> Clips:
        """The same wherever the batch is, on the host or on a device."""
        mask, encoder = self.config.mask, self.config.encoder
        row, frames = media.row.tolist(), [encoder.frames(samples) for samples in media.shapes[:, 0].tolist()]
        key = [int(draws[one]) for one in row]
        met: Counter[int] = Counter()
        number = []
        for one in row:
            number.append(met[one])
            met[one] += 1
        readable = [not (media.dummy or bad) for bad in media.unreadable.tolist()]
        masked = [
            span_mask(count, mask.prob, mask.length, mask.least, keyed_rng("mask", *clip))
            if learned
            else np.zeros(count, dtype=bool)
            for count, learned, *clip in zip(frames, readable, key, number, strict=True)
        ]
        return Clips(row, key, number, frames, readable, np.concatenate(masked))

    def _mixed(self, clean: list[Tensor], clips: Clips) -> tuple[list[Tensor], int]:
        """The clips as the student hears them, and how many of them have others on top."""
        settings, rate = self.config.mixture, self.config.encoder.sampling_rate
        if not (self.training and settings.prob):
            return clean, 0
        least, most = (round(seconds * rate) for seconds in settings.seconds)
        of_row: dict[int, list[int]] = {row: [] for row in clips.row}
        for clip, (row, readable) in enumerate(zip(clips.row, clips.readable, strict=True)):
            if readable:
                of_row[row].append(clip)
        heard = list(clean)
        mixed = 0
        for together in of_row.values():
            for clip in together if len(together) > 1 else ():
                rng = keyed_rng("mixture", clips.key[clip], clips.number[clip])
                if rng.random() < settings.prob:
                    others = [clean[other] for other in together if other != clip]
                    noises = draw_noises(len(clean[clip]), sum(map(len, others)), settings.number, (least, most), rng)
                    heard[clip] = mix(clean[clip], others, noises, settings.gain)
                    mixed += 1
        return heard, mixed

    def _kept(self, clips: Clips) -> np.ndarray | None:
        """bool [layers, N]: layer drop (1909.11556), drawn for each row; None where nothing is dropped."""
        drop = self.encoder.hubert.config.layerdrop
        if not (self.training and drop):
            return None
        kept = [keyed_rng("layers", key).random(self.encoder.layers) >= drop for key in clips.key]
        return np.repeat(np.stack(kept, axis=1), clips.frames, axis=1)

    def _codes(self, media: MediaBatch, frames: list[int]) -> Tensor:
        """int64 [N, codebooks]: read with the data, or as the teacher says now."""
        if media.codes is not None:
            return media.codes.long()
        if media.dummy:
            return torch.zeros(sum(frames), len(self.code_head.sizes), dtype=torch.int64, device=media.values.device)
        with torch.no_grad(), torch.autocast(media.values.device.type, enabled=False):
            return self.teacher.codes(media.items(), frames, self._layout)


class CodeHead(nn.Module):
    """Frames beside codes: a projection for each codebook, and an embedding for each of its codes."""

    def __init__(self, config: MertConfig, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.special, self.temperature = config.special_codes, config.temperature
        self.sizes = [self.special + size for size in sizes]
        self.projection = nn.Linear(width, len(sizes) * config.code_dim)
        # As in fairseq: one tensor, and numbers from 0 to 1 at first.
        self.embeddings = nn.Parameter(torch.empty(sum(self.sizes), config.code_dim).uniform_())

    def forward(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """[M, D] and int64 [M, K] to what `code_losses` gives."""
        return code_losses(
            self._queries(hidden), self.embeddings.split(self.sizes), codes + self.special, self.temperature
        )

    @torch.no_grad()
    def draw(self, hidden: Tensor, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Codes as the frames [M, D] say they are, int64 [M, K]; see `draw_labels`. One in front of a codebook is a
        number below 0."""
        queries, books = self._queries(hidden), self.embeddings.split(self.sizes)
        drawn = [
            draw_labels(code_logits(query, embeddings, self.temperature).__getitem__, rows, generators)
            for query, embeddings in zip(queries.unbind(1), books, strict=True)
        ]
        return torch.stack(drawn, dim=1) - self.special

    def _queries(self, hidden: Tensor) -> Tensor:
        return self.projection(hidden).unflatten(1, (len(self.sizes), -1))
