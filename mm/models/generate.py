"""Text for pictures and prompts: greedy or sampled continuation."""

from collections.abc import Sequence

import torch

from mm.data.batch import collate, with_dummies
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Media, Text
from mm.data.tokens import make_segment
from mm.models.backbone import ordinary_attention
from mm.models.system import GenerativeSystem


@torch.no_grad()
def generate(
    system: GenerativeSystem,
    layout: Layout,
    pictures: Sequence[Media | None],
    prompt: str = "",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    limits: Limits = Limits(),  # noqa: B008
    synced: bool = False,
) -> list[str]:
    """One continuation for each picture after the prompt; None is a prompt without a picture.

    Args:
        pictures: all are there, or none is: prompts of one call are equally long.
        prompt: text after the picture, as in training (`en: ` where the prompt template was `{language}: `).
        temperature: 0 takes the likeliest token; otherwise tokens are sampled with torch's RNG.
        synced: of several ranks, with weights in parts: towers run on all, and all go on until the last is done.

    Raises:
        DataError: a picture cannot be read.
    """
    text = Text(prompt, loss=False)
    parts = [(text,) if picture is None else (picture, text) for picture in pictures]
    segments = [make_segment(p, layout, f"picture {i}", limits, closed=False) for i, p in enumerate(parts)]
    packs = [join_segments([(f"picture {i}", "", segment)]) for i, segment in enumerate(segments)]
    device = next(system.parameters()).device
    batch = collate(packs, layout, row_length=max(len(segment) for segment in segments)).to(device)
    if synced:
        batch = with_dummies(batch, layout)
    was_training = system.training
    system.eval()
    with ordinary_attention(system.language):
        # All prompts are equally long (one text, pictures of a fixed size), so nothing has to be padded.
        ids = system.language.generate(
            inputs_embeds=system.embed(batch),
            attention_mask=(batch.segment_ids > 0).long(),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=None,
            top_k=None,
            eos_token_id=layout.template.eos and layout.tokenizer.id(layout.template.eos),
            pad_token_id=layout.pad,
            bos_token_id=None,
            synced_gpus=synced,
        )
    system.train(was_training)
    return [layout.tokenizer.decode(row).strip() for row in ids.tolist()]
