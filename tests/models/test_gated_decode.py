"""Decoding a model whose layers look at pictures: what is written with a cache, in batches, by beams, is what forward
passes over the whole say, one prompt after the other."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cosmo import build, picture
from torch import Tensor

from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Text
from mm.data.tokens import make_segment
from mm.models import backbone
from mm.models.beams import Beams
from mm.models.decode import decode
from mm.models.generate import generate, log_likelihoods, mean_losses
from mm.models.prompts import Decoding, Prompt, Reader
from mm.models.systems.cosmo.model import Cosmo

Built = tuple[Cosmo, Layout]
MODES: dict[str, dict[str, Any]] = {
    "immediate": {},
    "all before": {"immediate": False},
    "as released": {"immediate": False, "faithful": True, "interval": 2},
}
PROMPTS: list[Prompt] = [
    (picture(0), Text("Output:", False)),
    (Text("first ", False), picture(1), Text("a longer text", False), picture(2), Text("and its end", False)),
    (Text("only words", False),),
    (picture(3), picture(4)),
]
ANSWERS = ["a red fox", "x", "something of many words", "a blue hat"]


def built(mode: str = "immediate", gate: float | None = 0.5) -> Built:
    """A model whose pictures count: their features are as large as what the resampler adds them to."""
    system = build(gate, **MODES[mode]).eval()
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if parameter.ndim > 1 and ("resampler.layers" in name or ".gated.attn." in name):
                parameter.mul_(8)
    return system, system.config.layout()


def endless(layout: Layout) -> Layout:
    """Without a token that ends an answer."""
    return replace(layout, template=replace(layout.template, eos=None))


def row_of(layout: Layout, prompt: Prompt, written: list[int]) -> PackedBatch:
    segment = make_segment(prompt, layout, "prompt", Limits(), closed=False)
    whole = replace(segment, ids=np.concatenate([segment.ids, np.array(written, np.int32)]))
    return collate([join_segments([("x", "", whole)])], layout, len(whole))


@torch.no_grad()
def next_logits(system: Cosmo, layout: Layout, prompt: Prompt, written: list[int]) -> Tensor:
    """[V], of the token after a prompt and some tokens, by a forward pass over all of it."""
    row = row_of(layout, prompt, written)
    return system.logits(row, torch.tensor([row.input_ids.shape[1] - 1]))[0]


def likeliest(system: Cosmo, layout: Layout, prompt: Prompt, count: int) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        written.append(int(next_logits(system, layout, prompt, written).argmax()))
    return written


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_writes_what_each_prompt_says_token_by_token(mode: str) -> None:
    """Different lengths, numbers of pictures and times of being done. Pictures are encoded once."""
    system, layout = built(mode)
    ids = [likeliest(system, layout, prompt, 8) for prompt in PROMPTS]
    encoded: list[int] = []
    handle = system.resampler.register_forward_hook(lambda *_: encoded.append(1))
    found = generate(system, endless(layout), PROMPTS, Decoding(8))
    handle.remove()
    assert found == [layout.tokenizer.decode(one).strip() for one in ids] and len(encoded) == 1
    assert len(set(found)) == len(PROMPTS)
    ends = (ids[0][2], ids[1][5], ids[3][4])
    decoding = Decoding(8, stop_ids=ends)
    together = generate(system, endless(layout), PROMPTS, decoding)
    assert together == [generate(system, endless(layout), [prompt], decoding)[0] for prompt in PROMPTS]
    cut = [next((n for n, token in enumerate(one) if token in ends), 8) for one in ids]
    assert together == [layout.tokenizer.decode(one[:n]).strip() for one, n in zip(ids, cut, strict=True)]
    assert len(set(cut)) > 2


def test_what_is_written_depends_on_the_last_picture() -> None:
    system, layout = built()
    asked = [(picture(n), Text("Output:", False)) for n in range(12)]
    assert len(set(generate(system, endless(layout), asked, Decoding(6)))) > 6


@pytest.mark.parametrize("mode", MODES)
def test_beams_are_those_without_a_cache(mode: str) -> None:
    system, layout = built(mode)
    ends = tuple(likeliest(system, layout, prompt, 4)[3] for prompt in PROMPTS[:2])
    decoding = Decoding(6, beams=3, length_penalty=-2.0, stop_ids=ends)
    reader = Reader.of(layout, decoding, False)
    expected = []
    for prompt in PROMPTS:
        search = Beams.of(decoding, 99, reader)
        while not search.done:
            logits = [next_logits(system, layout, prompt, ids) for _, ids in search.running]
            search.take(torch.stack(logits).log_softmax(-1))
        expected.append(reader.text(search.finished[0][1]))
    assert generate(system, layout, PROMPTS, decoding) == expected


def test_with_shut_gates_it_is_the_language_model() -> None:
    """transformers' own `generate` on a model without gated blocks, which reads the token of a picture."""
    system, layout = built(gate=None)
    alone = backbone.load(system.config.language, len(layout.tokenizer)).eval()
    alone.load_state_dict({k: v for k, v in system.language.state_dict().items() if ".gated." not in k})
    for beams in (1, 3):
        found = generate(system, endless(layout), PROMPTS, Decoding(8, beams=beams))
        for prompt, text in zip(PROMPTS, found, strict=True):
            row = row_of(layout, prompt, [])
            ids = row.input_ids.clone()
            for media in row.media.values():
                ids[media.row, media.position] = layout.tokenizer.id("<visual>")
            with backbone.ordinary_attention(alone):
                written = alone.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=beams,
                    eos_token_id=None, pad_token_id=layout.pad,
                )  # fmt: skip
            assert text == layout.tokenizer.decode(written[0, ids.shape[1] :].tolist()).strip()


@pytest.mark.parametrize("mode", MODES)
def test_likelihoods_are_sums_of_a_softmax(mode: str) -> None:
    system, layout = built(mode)
    found = log_likelihoods(system, layout, PROMPTS, ANSWERS)
    means = mean_losses(system, layout, PROMPTS, ANSWERS)
    for prompt, answer, total, (mean, greedy) in zip(PROMPTS, ANSWERS, found, means, strict=True):
        ids = layout.tokenizer.encode(answer)
        steps = [next_logits(system, layout, prompt, ids[:n]).log_softmax(-1) for n in range(len(ids))]
        each = [float(step[token]) for step, token in zip(steps, ids, strict=True)]
        assert total == pytest.approx(sum(each), rel=1e-4)
        assert mean == pytest.approx(-sum(each) / len(each), rel=1e-4)
        assert greedy == all(int(step.argmax()) == token for step, token in zip(steps, ids, strict=True))
    other = (picture(9), *PROMPTS[0][1:])
    assert log_likelihoods(system, layout, [other], ANSWERS[:1])[0] != pytest.approx(found[0], rel=1e-3)


def test_an_answer_ends_where_its_chunk_does() -> None:
    """The end of a chunk ends a document; and where it does not, the name of its token can be given."""
    system, layout = built()
    (written,) = generate(system, endless(layout), PROMPTS[:1], Decoding(8))
    end = layout.tokenizer.id("<|endofchunk|>")
    third = likeliest(system, layout, PROMPTS[0], 3)[2]

    def run(tiny: Layout, decoding: Decoding) -> str:
        return decode(system, tiny, PROMPTS[:1], decoding)[0].text

    with torch.no_grad():  # the token is as likely as the third of what is written, and a bit more
        weight = system.language.get_input_embeddings().weight
        weight[end] = 1.01 * weight[third]
    assert len(run(layout, Decoding(8))) < len(written)
    assert run(layout, Decoding(8)) == run(endless(layout), Decoding(8, stop=("<|endofchunk|>",)))


def test_sampling_follows_the_seed() -> None:
    system, layout = built()

    def drawn(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return generate(system, endless(layout), PROMPTS, Decoding(6, temperature=1.0))

    assert drawn(1) == drawn(1) != drawn(2)


def test_text_comes_in_pieces() -> None:
    system, layout = built()
    pieces: list[str] = []
    stream: Callable[[str], None] = pieces.append
    (text,) = generate(system, endless(layout), PROMPTS[:1], Decoding(8), stream=stream)
    assert "".join(pieces) == text and len(pieces) > 2
