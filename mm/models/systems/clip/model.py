"""CLIP and SigLIP: open_clip's own model, on packed rows of pairs.

The texts of a row stand one behind the other; they are cut out of it as open_clip's tokenizer would give them, begin
and end of text included. A causal text tower never looks behind the end of text, so texts are filled up to the longest
of the micro-batch there, and only else to the tower's whole length. Sources: Radford et al., 2103.00020; Zhai et al.,
2303.15343; open_clip, `model.py`, `tokenizer.py` and `open_clip_train/train.py`.
"""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from open_clip.factory import load_checkpoint
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn
from torch.func import functional_call

from mm.data.batch import IGNORE, MODALITIES, PackedBatch, with_dummies
from mm.errors import CheckpointError, ConfigError
from mm.models.contrastive import contrastive_sum, recalls
from mm.models.system import ALL, Output, PooledSystem
from mm.models.systems.clip.config import ClipConfig
from mm.models.vision import refuse_batch_norm

MOST = math.log(100)
"""Of the logarithm of the scale."""


class Clip(PooledSystem):
    """See the module. The submodule `clip` is open_clip's `CLIP` or `CustomTextCLIP`; its names of parameters are what
    patterns in configs match: `clip.visual.*`, `clip.transformer.*` (or `clip.text.*`), `clip.logit_scale`.

    The one objective, `contrastive`, is over pairs: pictures that could be read, alone in their sample, with text that
    is learned.
    """

    def __init__(self, config: ClipConfig, weights: bool = True) -> None:
        super().__init__()
        self.weights = {"contrastive": config.weight}
        self.loss: Literal["clip", "siglip"] = config.objective
        self.clip: Any = build_clip(config, weights)
        self._layout = config.layout()
        text, eos = config.text_cfg, self._layout.template.eos
        self._length: int = text.get("context_length", 77)
        self._end = None if eos is None else self._layout.tokenizer.id(eos)
        # Only then does what stands behind a text's end change nothing.
        causal = not (text.get("no_causal_mask") or "hf_model_name" in text)
        self._trims = causal and text.get("pool_type", "argmax") in ("argmax", "eos")

    @torch.no_grad()
    def begin_step(self, step: int, steps: int) -> None:
        """Bring the scale back to 100 at most, as open_clip does behind every update: here before the next one. What
        the last update left, and engines that keep weights of their own, the forward pass bounds in the same way.

        That of `siglip` is free: its published models have larger ones."""
        if self.loss == "clip":
            self.clip.logit_scale.clamp_(0, MOST)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        return {"contrastive": torch.tensor(len(pairs(batch)[0]))}

    def forward(self, batch: PackedBatch) -> Output:
        if "image" not in batch.media:
            batch = with_dummies(batch, self._layout)
        items, segments = pairs(batch)
        n = len(items)
        pixels = batch.media["image"].stacked()
        # Where there are no pairs, both towers run all the same, so that their weights are in the graph on every rank.
        image, text = self._encode(self.texts(batch, segments), pixels[items] if n else pixels[:1])
        log = self.clip.logit_scale
        if self.loss == "clip":
            log = log - (log - log.clamp(0, MOST)).detach()  # its gradient is there at the bound, too
        scale = log.exp()
        features = {"image": image[:n], "text": text[:n], "scale": scale.expand(n)}
        if self.clip.logit_bias is not None:
            features["bias"] = self.clip.logit_bias.expand(n)
        metrics = {"scale": scale.detach().mean()}
        return Output({}, {"contrastive": torch.tensor(n, device=image.device)}, metrics, features=features)

    def pooled_losses(self, features: dict[str, Tensor], own: slice = ALL) -> dict[str, Tensor]:
        """open_clip's loss times the number of pairs."""
        image, text, scale = (features[name] for name in ("image", "text", "scale"))
        return {"contrastive": contrastive_sum(image, text, scale, features.get("bias"), self.loss, own)}

    def pooled_scores(self, features: dict[str, Tensor]) -> dict[str, float]:
        """Recalls, of pairs each by itself: a picture with several captions counts its others as wrong."""
        return recalls(features["image"], features["text"])

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S], as `config.layout()` has them made, to [n, D] of length 1."""
        return F.normalize(self.clip.encode_image(pixels), dim=-1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """[n, D], of length 1."""
        tokenizer, template = self._layout.tokenizer, self._layout.template
        before, after = ([] if one is None else [tokenizer.id(one)] for one in (template.bos, template.eos))
        ids = [torch.tensor([*before, *tokenizer.encode(text), *after]) for text in texts]
        counts = torch.tensor([len(one) for one in ids])
        text = self._filled(torch.cat(ids), torch.repeat_interleave(counts), len(texts))
        return self._encode(text.to(self.clip.logit_scale.device))[1]

    def texts(self, batch: PackedBatch, segments: Tensor) -> Tensor:
        """int64 [n, T]: the text of each of these segments (numbered over all rows by `numbered`), as open_clip's
        tokenizer gives it; of none, one text that is an end alone."""
        if not len(segments):
            return self._filled(batch.input_ids.new_full((1,), self._end or 0), segments.new_zeros(1), 1)
        which = segments.new_full((batch.segment_ids.shape[0] * (batch.segment_ids.shape[1] + 1),), -1)
        which[segments] = torch.arange(len(segments), device=segments.device)
        text = which[numbered(batch)].where(batch.modality == MODALITIES["text"], -1).flatten()
        at = torch.nonzero(text >= 0)[:, 0]
        order = at[torch.argsort(text[at], stable=True)]
        return self._filled(batch.input_ids.flatten()[order], text[order], len(segments))

    def _filled(self, ids: Tensor, text: Tensor, n: int) -> Tensor:
        """int64 [n, T] of ids [K], the text of each in `text` [K], which rises: cut off at the tower's length with the
        end of text at the end, as open_clip does, and filled up."""
        lengths = torch.bincount(text, minlength=n)
        place = torch.arange(len(ids), device=ids.device) - (lengths.cumsum(0) - lengths)[text]
        width = min(int(lengths.max()), self._length) if self._trims else self._length
        filled = ids.new_full((n, width), self._layout.pad)
        kept = place < width
        filled[text[kept], place[kept]] = ids[kept]
        if self._end is not None:
            filled[lengths > width, -1] = self._end
        return filled

    def _encode(self, text: Tensor, pixels: Tensor | None = None) -> tuple[Any, Tensor]:
        """Features of length 1, of pictures too if there are any, by open_clip's forward; positions and mask are cut to
        the texts' length."""
        cut: dict[str, Tensor] = {}
        if self._trims:
            prefix, tower = ("text.", self.clip.text) if isinstance(self.clip, CustomTextCLIP) else ("", self.clip)
            length = text.shape[1]
            cut[f"{prefix}positional_embedding"] = tower.positional_embedding[:length]
            cut[f"{prefix}attn_mask"] = tower.attn_mask[:length, :length]
        found = functional_call(self.clip, cut, (pixels, text), tie_weights=False)
        return found[0], found[1]


def numbered(batch: PackedBatch) -> Tensor:
    """int64 [B, L]: segments, numbered over all rows: row * (L + 1) + number in the row."""
    rows, length = batch.segment_ids.shape
    return torch.arange(rows, device=batch.segment_ids.device)[:, None] * (length + 1) + batch.segment_ids


def pairs(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """int64 [n] each: the pictures that make a pair with the text of their segment, and these segments, by `numbered`.

    A pair is a segment with one picture, which could be read, and text that is learned.
    """
    media, device = batch.media.get("image"), batch.labels.device
    if media is None or media.dummy:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none
    segments = numbered(batch)
    of_item = segments[media.row, media.position]
    size = segments.shape[0] * (segments.shape[1] + 1)
    pictures = torch.bincount(of_item, minlength=size)
    learned = torch.bincount(segments[batch.labels != IGNORE], minlength=size)
    is_pair = (pictures[of_item] == 1) & (learned[of_item] > 0) & ~media.unreadable.to(device)
    items = torch.nonzero(is_pair)[:, 0]
    return items, of_item[items]


def build_clip(config: ClipConfig, weights: bool) -> nn.Module:
    """open_clip's model. Scale and bias are tensors of one element, since scalars cannot be sharded.

    Raises:
        ConfigError: open_clip knows no such model or weights, or the weights need other settings.
        CheckpointError: they cannot be had, or do not fit.
    """
    values = config.values
    whole = config.tag is not None or config.weights is not None
    own = weights and not whole  # towers may take weights of their own only where none of the whole model follow
    vision, text = values["vision_cfg"], values["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = own and config.vision.get("timm_model_pretrained", False)
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = own and config.text.get("hf_model_pretrained", "hf_model_name" in config.text)
    scales = {key: values[key] for key in ("init_logit_scale", "init_logit_bias") if key in values}
    if config.objective == "siglip":
        scales = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    kind = CustomTextCLIP if values.get("custom_text") else CLIP
    parts = values["embed_dim"], vision, text, values.get("quick_gelu", False)
    try:
        clip: nn.Module = kind(*parts, nonscalar_logit_scale=True, **scales)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.vision, model.text: open_clip makes no model of them ({error})") from None
    refuse_batch_norm(clip, f"model.name {config.name}" if config.name else "model.vision")
    if weights and whole:
        path = str(config.weights.expanduser()) if config.weights is not None else _published(config)
        try:
            load_checkpoint(clip, path, strict=True, weights_only=True)
        except Exception as error:  # torch, safetensors or open_clip, by what is wrong with the file
            raise CheckpointError(f"{path}: not the weights of this model of open_clip ({_line(error)})") from None
    if hasattr(clip.visual, "set_input_size"):  # a tower of timm, which is made for its own size
        clip.visual.set_input_size(config.image_size)  # type: ignore[operator]
    return clip


def _published(config: ClipConfig) -> str:
    """The file of a tag's weights, once the config says what they were trained with."""
    name = cast(str, config.name).removeprefix("open_clip/").partition(".")[0]
    about = get_pretrained_cfg(name, cast(str, config.tag))
    if not about:
        known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(f"model.name {config.name}: no such weights of {name}; there are: {known}")
    quick = about.get("quick_gelu", False)
    if quick != bool(config.values.get("quick_gelu")):
        raise ConfigError(f"model.quick_gelu: expected {quick} for the weights {config.tag}; set it")
    pictures = {"mean": config.mean, "std": config.std, "resize_mode": config.resize, "interpolation": "bicubic"}
    for key, value in pictures.items():
        expected = about.get(key, value)
        if (tuple(expected) if isinstance(value, tuple) else expected) != value:
            known = key.removesuffix("_mode")
            raise ConfigError(f"model.{known}: the weights {config.tag} were trained with {expected}, found {value}")
    try:
        path: str = download_pretrained(about)
    except Exception as error:  # the hub's client and urllib raise errors of a dozen kinds
        raise CheckpointError(f"model.name {config.name}: the weights cannot be had ({_line(error)})") from None
    return path


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
