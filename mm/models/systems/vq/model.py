"""A VQ model: a picture becomes a grid of latents, each of which takes the code in its direction, and is made again of
its codes.

The parameters are those of transformers' `JanusVQVAE`, so that a trained model is one of its checkpoints. Latents and
codes are of length 1 when they are compared and decoded. The gradient of a latent is that of its code (straight
through); the codebook learns from its own objective alone, in which every code is drawn to every latent, the nearest by
far the most. So codes that no latent takes come into use, and yet each loss is of one picture: nothing depends on what
else is in the batch or was before. Sources: van den Oord et al., 1711.00937 3.2; Yu et al., 2110.04627 3.2 (directions,
few dimensions); Martinetz et al., 1993 (neural gas: shares by distance).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from mm.data.batch import MediaBatch, PackedBatch, with_dummies
from mm.models.system import Output, System
from mm.models.systems.vq.config import VQConfig


class Encoded(NamedTuple):
    """latents: [N, D, h, w], of length 1. codes: int64 [N, h * w]. chosen: [N, D, h, w], codes in place of latents.
    cosines: [N, h * w, K] of latents and all codes, from which no gradient comes to latents."""

    latents: Tensor
    codes: Tensor
    chosen: Tensor
    cosines: Tensor


class VQ(System):
    """See the module. Submodule `vqvae`, with `encoder`, `quant_conv`, `quantize`, `post_quant_conv` and `decoder`, is
    what name patterns in configs match.

    Objectives, per position and summed: `reconstruction`, the error of a position's square, mean over its values;
    `codebook` and `commitment`, the squared distance of latent and code, mean over its dimensions, of which the first
    moves codes and the second latents. Metrics: `psnr` in dB, and `perplexity`, by use, of the codes of a batch.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.weights = {name: weight for name, weight in config.weights.model_dump().items() if weight}
        self.vqvae = JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=config.code_dim,
                num_embeddings=config.codes,
                latent_channels=config.channels * config.multipliers[-1],
                base_channels=config.channels,
                channel_multiplier=list(config.multipliers),
                num_res_blocks=config.blocks,
                num_patches=config.side,
            )
        )
        self._layout = config.layout()

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        media = batch.media.get("image")
        positions = 0 if media is None else int(_readable(media).sum()) * self.config.side**2
        return {name: torch.tensor(positions) for name in self.weights}

    def row_counts(self, batch: PackedBatch) -> Tensor:
        media, rows = batch.media.get("image"), torch.zeros(len(batch.input_ids), dtype=torch.int64)
        if media is None:
            return rows
        return rows.index_add(0, media.row.cpu(), _readable(media).cpu() * self.config.side**2)

    def forward(self, batch: PackedBatch) -> Output:
        media = with_dummies(batch, self._layout).media["image"]
        pictures, device = media.stacked(), media.values.device
        latents, codes, chosen, cosines = self.encode(pictures)
        again = self.decode(latents + (chosen - latents).detach())
        error = again - pictures
        square = error.square().flatten(1).mean(1)
        terms = {
            "reconstruction": error.abs().flatten(1).mean(1) + self.config.squared * square,
            "codebook": self._drawn(cosines).mean(1),
            "commitment": (chosen.detach() - latents).square().flatten(1).mean(1),
        }  # of each picture, the mean over its positions
        counted = _readable(media).to(device)
        losses = {name: torch.where(counted, terms[name], 0.0) * self.config.side**2 for name in self.weights}
        rows = losses["reconstruction"].new_zeros(len(batch.input_ids))
        rows.index_add_(0, media.row, losses["reconstruction"].detach())
        metrics = {
            "psnr": torch.where(counted, decibels(square.detach()), 0.0).sum() / counted.sum().clamp(min=1),
            "perplexity": perplexity(use_of(codes, self.config.codes, counted)),
        }
        return Output(
            {name: each.sum() for name, each in losses.items()},
            self.counts(batch),
            metrics,
            rows={"reconstruction": rows},
            predictions={} if self.training else {"codes": codes[_readable(media)]},
        )

    def scores(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Of the codes of a whole split: how many occur, and the perplexity of their use."""
        codes = predictions["codes"].long()
        used = use_of(codes, self.config.codes, torch.ones(len(codes)))
        return {"codes_used": float((used > 0).sum()), "code_perplexity": float(perplexity(used))}

    def encode(self, pictures: Tensor) -> Encoded:
        """Of [N, 3, H, W]."""
        latents = F.normalize(self.vqvae.quant_conv(self.vqvae.encoder(pictures)).float(), dim=1)
        # All of it, by a call: only inside one are weights whole that an engine keeps in parts.
        every = torch.arange(self.config.codes, device=latents.device)
        book = F.normalize(self.vqvae.quantize.embedding(every).float(), dim=1)
        with torch.autocast(latents.device.type, enabled=False):
            cosines = latents.detach().flatten(2).mT @ book.T
        codes = cosines.argmax(-1)
        return Encoded(latents, codes, book[codes].mT.reshape(latents.shape), cosines)

    def _drawn(self, cosines: Tensor) -> Tensor:
        """[N, h * w]: the squared distance of each latent to codes, each by its share, mean over dimensions."""
        if self.config.temperature:
            shares = (cosines.detach() / self.config.temperature).softmax(-1)
            nearness = (shares * cosines).sum(-1)
        else:
            nearness = cosines.amax(-1)
        return (2 - 2 * nearness) / self.config.code_dim  # |z - e|^2 of lengths 1

    def decode(self, chosen: Tensor) -> Tensor:
        """[N, D, h, w], codes of length 1, to pictures [N, 3, H, W] from about -1 to 1."""
        pictures: Tensor = self.vqvae.decoder(self.vqvae.post_quant_conv(chosen))
        return pictures.float()


def _readable(media: MediaBatch) -> Tensor:
    """bool [N], in host memory: items that losses are of."""
    return ~media.unreadable & (not media.dummy)


def decibels(square: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of mean squared errors of values from -1 to 1."""
    return 10 * torch.log10(4 / square.clamp(min=1e-10))


def use_of(codes: Tensor, size: int, counted: Tensor) -> Tensor:
    """float32 [size]: how often each code occurs in those [N, positions] of items that are counted [N]."""
    weights = counted.float()[:, None].expand_as(codes)
    return torch.zeros(size, device=codes.device).index_add_(0, codes.flatten(), weights.flatten())


def perplexity(used: Tensor) -> Tensor:
    """exp of the entropy of how often codes [K] are used; 1 of none."""
    return torch.special.entr(used / used.sum().clamp(min=1)).sum().exp()
