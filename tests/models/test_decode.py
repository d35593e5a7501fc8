"""Decoding with a cache of our own: what is written token by token is what forward passes over the whole say.

The oracles: the model on the whole sequence without a cache, for the logits of every step; transformers' `generate` for
dense models; loops without a cache for guidance and likelihoods.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moma
import torch
import yaml
from PIL import Image
from ranks import Ranks
from tiny_moma import CODES, POSITIONS, Brightness, picture
from torch import Tensor

import mm
from mm.cli import main
from mm.data.batch import IGNORE, MODALITIES, PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import Pack, PackedSegment, join_segments
from mm.data.prepare import open_splits
from mm.data.sample import Text, Turn
from mm.data.tokens import Segment, make_segment
from mm.errors import ConfigError, DataError
from mm.models.beams import Beams
from mm.models.decode import CachedPacking, decode, draws, to_draw
from mm.models.generate import generate, log_likelihoods, mean_losses
from mm.models.prompts import Decoding, Prompt, Reader, autocast, chat_prompt, raw_prompt
from mm.models.system import GenerativeSystem
from mm.models.systems.text_lm.config import TextLMConfig
from mm.train import evaluate
from mm.train.config import TrainConfig
from mm.train.distributed import World
from mm.train.engines.single import SingleEngine
from mm.train.params import parameter_groups

Built = tuple[GenerativeSystem, Layout]

LLAMA: dict[str, Any] = {
    "tokenizer": "builtin:emoji",
    "config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    },
}  # fmt: skip
FOUR_LAYERS = {**tiny_moma.LANGUAGE, "config": {**tiny_moma.LANGUAGE["config"], "num_hidden_layers": 4}}
EXPERTS = {"text": 3, "image": 2, "auxiliary": "along"}
DEPTHS = {"auxiliary": "along"}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": EXPERTS},
    "one for all": {"experts": {"all": 4, "normalize": True, "auxiliary": "along"}},
    "depths": {"depths": DEPTHS},
    "both": {"experts": EXPERTS, "depths": {"every": 1}},
}


def text_lm(kind: str, **language: Any) -> Built:
    torch.manual_seed(0)
    config = TextLMConfig.model_validate({"language": {**LLAMA, **language}, **KINDS[kind]})
    return config.build().eval(), config.layout()


def moma(kind: str, **changes: Any) -> Built:
    torch.manual_seed(0)
    config = tiny_moma.model(**{"language": FOUR_LAYERS, **KINDS[kind], **changes})
    return config.build().eval(), config.layout()


TEXTS: list[Prompt] = [
    raw_prompt("A red apple, a green apple and"),
    (Text("x", loss=False),),
    chat_prompt("What is this?", system="Be short."),
    raw_prompt("en: "),
]
PICTURES: list[Prompt] = [
    raw_prompt("en: ", [picture(0)], ""),
    raw_prompt("first <image> then <image> last", [picture(1), picture(2)], ""),
    *TEXTS[:2],
]


def endless(layout: Layout) -> Layout:
    """Without a token that ends an answer."""
    return replace(layout, template=replace(layout.template, eos=None))


def segment_of(prompt: Prompt, layout: Layout) -> Segment:
    return make_segment(prompt, layout, "prompt", Limits(), closed=False)


Calls = list[tuple[PackedBatch, Tensor, list[int]]]


@contextlib.contextmanager
def calls_of(system: GenerativeSystem) -> Iterator[Calls]:
    """What the model is given, the logits that it gives, and how many positions each layer remembers then."""
    calls: Calls = []
    logits = system.logits

    def noted(batch: PackedBatch, keep: Tensor, packing: CachedPacking, media: None) -> Tensor:
        found = logits(batch, keep, packing, media)
        kept = [int(one.length.sum()) for one in packing.memory.layers.values()]
        calls.append((batch, found.clone(), kept))
        return found

    vars(system)["logits"] = noted
    try:
        yield calls
    finally:
        del vars(system)["logits"]


def row_of(system: GenerativeSystem, layout: Layout, segment: Segment) -> PackedBatch:
    """A prompt alone in a row, its pictures as tokens where they are."""
    batch = collate([join_segments([("x", "", segment)])], layout, len(segment))
    return system.fused(batch) if draws(system) else batch  # type: ignore[operator]


def longer(batch: PackedBatch, ids: list[int], modality: list[int]) -> PackedBatch:
    """With some tokens behind it."""
    start = batch.input_ids.shape[1]
    more = {
        "input_ids": torch.tensor([ids], dtype=torch.int64),
        "labels": torch.full((1, len(ids)), IGNORE),
        "segment_ids": torch.ones(1, len(ids), dtype=torch.int32),
        "position_ids": torch.arange(start, start + len(ids))[None],
        "modality": torch.tensor([modality], dtype=torch.uint8),
    }
    return replace(batch, **{name: torch.cat([getattr(batch, name), end], 1) for name, end in more.items()}, targets=-1)


@torch.no_grad()
def next_logits(system: GenerativeSystem, batch: PackedBatch) -> Tensor:
    """[V]: behind all of a row, without a cache."""
    return system.logits(batch, torch.tensor([batch.input_ids.shape[1] - 1]))[0]


def codes_in(pixels: np.ndarray) -> list[int]:
    """What the teacher says of a picture that was written."""
    values = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    return Brightness().codes([values], [POSITIONS], None)[:, 0].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [text_lm, moma])
def test_logits_of_every_step_are_those_of_the_whole_sequence(make: Callable[[str], Built], kind: str) -> None:
    system, layout = make(kind)
    layout = endless(layout)
    prompts = [prompt for prompt in (PICTURES if make is moma else TEXTS) if prompt is not TEXTS[2]]
    if make is moma:
        prompts = [prompts[0], *(to_draw(prompt, layout) for prompt in prompts[1:])]
    with calls_of(system) as calls:
        decode(system, layout, prompts, Decoding(12, temperature=1.0), pictures=make is moma)
    assert len(calls) >= 12
    (_, first, _), steps = calls[0], calls[1:12]
    for place, prompt in enumerate(prompts):
        ids = [int(batch.input_ids[0, place]) for batch, _, _ in steps]
        modality = [int(batch.modality[0, place]) for batch, _, _ in steps]
        segment = segment_of(prompt, layout)
        if ids[0] == segment.ids[-1]:  # a picture was asked for: its begin is the first token that is written
            segment = replace(segment, ids=segment.ids[:-1])
        whole = longer(row_of(system, layout, segment), ids, modality)
        with torch.no_grad():
            expected = system.logits(whole, torch.arange(len(segment) - 1, whole.input_ids.shape[1]))
        found = torch.stack([first[place], *(logits[place] for _, logits, _ in steps)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    kept = steps[-1][2]
    if KINDS[kind].get("depths"):  # such layers remember what went through them
        everything = sum(batch.tokens for batch, _, _ in calls[:12])
        every = KINDS[kind]["depths"].get("every", 2)
        assert all(0 < count < everything for count in kept[::every])
        assert every == 1 or set(kept[1::2]) == {everything}
    else:
        assert len(set(kept)) == 1 and len(kept) == 4


def test_a_dense_model_writes_what_transformers_lets_it_write() -> None:
    system, layout = text_lm("dense")
    with calls_of(system) as calls:
        (found,) = decode(system, layout, TEXTS[:1], Decoding(8))
    assert len(found.text) > 8
    for decoding in (
        Decoding(10),
        Decoding(10, stop=(found.text[5:7], "no such text")),
        Decoding(10, stop_ids=(tokens_of(calls)[4],)),
        Decoding(1),
    ):
        expected = generate(system, layout, TEXTS, decoding)
        assert [one.text for one in decode(system, layout, TEXTS, decoding)] == expected
    for decoding in (
        Decoding(10, temperature=0.8), Decoding(10, temperature=1.5, top_k=7), Decoding(10, temperature=1.0, top_p=0.4),
    ):  # fmt: skip
        for prompt in TEXTS:
            torch.manual_seed(3)
            expected = generate(system, layout, [prompt], decoding)
            torch.manual_seed(3)
            assert [one.text for one in decode(system, layout, [prompt], decoding)] == expected


def ends_of(system: GenerativeSystem, layout: Layout) -> tuple[int, ...]:
    """Tokens that are written after some of the texts, at different times."""
    with calls_of(system) as calls:
        decode(system, endless(layout), TEXTS, Decoding(9))
    return tuple(int(calls[at][0].input_ids[0, place]) for place, at in ((0, 3), (1, 7), (3, 5)))


@pytest.mark.parametrize(("penalty", "least"), [(1.0, 0), (-2.0, 6), (0.0, 0)])
def test_beams_are_those_of_transformers(penalty: float, least: int) -> None:
    """Of prompts together and alone, whatever ends a text: a token, a string, its length, the model's last position."""
    system, layout = text_lm("dense")
    ends = ends_of(system, layout)
    (written,) = generate(system, layout, TEXTS[:1], Decoding(9))
    several = Decoding(9, beams=3, length_penalty=penalty, stop_ids=ends, min_new_tokens=least)
    greedy = generate(system, layout, TEXTS, Decoding(9, stop_ids=ends, min_new_tokens=least))
    for decoding in (several, replace(several, beams=5, stop=(written[4:6],)), replace(several, max_new_tokens=6)):
        expected = [generate(system, layout, [prompt], decoding)[0] for prompt in TEXTS]
        assert [one.text for one in decode(system, layout, TEXTS, decoding)] == expected
        assert [decode(system, layout, [prompt], decoding)[0].text for prompt in TEXTS] == expected
        assert expected != greedy
    system.language.config.max_position_embeddings = len(segment_of(TEXTS[0], layout)) + 4
    expected = generate(system, layout, TEXTS[:1], several)
    assert [one.text for one in decode(system, layout, TEXTS[:1], several)] == expected


@pytest.mark.parametrize("kind", ["experts", "both"])
def test_beams_of_a_model_that_routes_are_those_without_a_cache(kind: str) -> None:
    system, layout = text_lm(kind)
    decoding = Decoding(6, beams=3, stop_ids=ends_of(system, layout))
    reader = Reader.of(layout, decoding, False)
    expected = []
    for prompt in TEXTS:
        row = row_of(system, layout, segment_of(prompt, layout))
        search = Beams.of(decoding, 99, reader)
        while not search.done:
            rows = [longer(row, ids, [0] * len(ids)) for _, ids in search.running]
            search.take(torch.stack([next_logits(system, one) for one in rows]).log_softmax(-1))
        expected.append(reader.text(search.finished[0][1]))
    assert generate(system, layout, TEXTS, decoding) == expected


def test_an_answer_of_at_least_so_many_tokens() -> None:
    system, layout = text_lm("dense")
    ends = ends_of(system, layout)
    short, long = Decoding(9, stop_ids=ends), Decoding(9, stop_ids=ends, min_new_tokens=8)
    expected = generate(system, layout, TEXTS, long)
    with calls_of(system) as calls:
        assert [one.text for one in decode(system, layout, TEXTS, long)] == expected
    assert [len(logits) for _, logits, _ in calls[:8]] == [len(TEXTS)] * 8
    assert expected != generate(system, layout, TEXTS, short)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_what_each_prompt_alone_does(kind: str) -> None:
    """Prompts are done at different times."""
    system, layout = moma(kind)
    prompts = [*PICTURES, TEXTS[2]]
    with calls_of(system) as calls:
        generate(system, endless(layout), prompts[:4], Decoding(12))
    ends = tuple(int(calls[at][0].input_ids[0, place]) for place, at in ((0, 4), (1, 7), (2, 2)))
    decoding = Decoding(12, stop_ids=ends)
    with calls_of(system) as calls:
        together = generate(system, layout, prompts, decoding)
    assert together == [generate(system, layout, [prompt], decoding)[0] for prompt in prompts]
    widths = [len(logits) for _, logits, _ in calls]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) > 1
    assert len(set(together)) > 2


def test_sampling_follows_the_seed() -> None:
    system, layout = moma("both")
    prompts = [to_draw(prompt, layout) for prompt in PICTURES]

    def drawn(seed: int) -> list[tuple[str, list[bytes]]]:
        torch.manual_seed(seed)
        found = decode(system, layout, prompts, Decoding(6, temperature=1.0), pictures=True)
        return [(one.text, [picture.tobytes() for picture in one.pictures]) for one in found]

    assert drawn(1) == drawn(1) != drawn(2)


def eager(system: GenerativeSystem, layout: Layout) -> None:
    """Make it begin pictures again and again, sampled about half of the time: of text its head knows nothing else."""
    head, seen = system.language.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda _, hidden: seen.append(hidden[0].flatten(0, -2)))
    generate(system, layout, PICTURES, Decoding(4))
    handle.remove()
    direction = torch.cat(seen).mean(0)
    with torch.no_grad():
        codes = head.weight[system.vocabulary].clone()  # type: ignore[index]
        head.weight.zero_()
        head.weight[system.vocabulary] = codes  # type: ignore[index]
        head.weight[layout.tokenizer.id("<boi>")] = np.log(len(head.weight)) * direction / direction.square().sum()


def tokens_of(calls: Calls) -> list[int]:
    """Of a single prompt: all that was written, but for the last token."""
    return [int(batch.input_ids[0, 0]) for batch, _, _ in calls[1:]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("asked", [False, True])
def test_pictures_are_whole_and_codes_are_nowhere_else(asked: bool, seed: int) -> None:
    system, layout = moma("experts")
    eager(system, layout)
    tokenizer = layout.tokenizer
    codes = [tokenizer.id(f"<code:{n}>") for n in range(CODES)]
    begin, end = tokenizer.id("<boi>"), tokenizer.id("<eoi>")
    torch.manual_seed(seed)
    prompt = to_draw(PICTURES[0], layout) if asked else PICTURES[0]
    with calls_of(system) as calls:
        (found,) = decode(system, endless(layout), [prompt], Decoding(9, temperature=1.0), pictures=True)
    ids = [*tokens_of(calls), int(layout.pad)]  # what came last is not known here
    expected: list[list[int]] = []
    at = counted = 0
    while at < len(ids):
        counted += 1
        if ids[at] == begin and at + POSITIONS + 1 < len(ids):
            drawn = ids[at + 1 : at + 1 + POSITIONS]
            assert set(drawn) <= set(codes)
            assert ids[at + 1 + POSITIONS] == end or at + 2 + POSITIONS == len(ids)
            expected.append([codes.index(token) for token in drawn])
            at += POSITIONS + 2
        else:
            assert ids[at] not in {*codes, end}
            at += 1
    assert counted == 9, "a picture counts as one token"
    assert [codes_in(picture) for picture in found.pictures] == expected
    assert all(picture.shape == (8, 8, 3) and picture.dtype == np.uint8 for picture in found.pictures)
    assert found.text.count("<image>") == len(expected) and "<code" not in found.text
    modality = [int(batch.modality[0, 0]) for batch, _, _ in calls[1:]]
    image = MODALITIES["image"]
    assert [one == image for one in modality] == [token in {*codes, begin, end} for token in ids[:-1]]
    if asked:
        assert ids[0] == begin
    elif seed == 0:
        assert len(expected) > 1


def test_no_picture_is_begun_where_it_may_not_be_or_does_not_fit() -> None:
    system, layout = moma("experts")
    eager(system, layout)
    for prompt in PICTURES:
        (found,) = decode(system, layout, [prompt], Decoding(9))
        assert found.pictures == () and "<image>" not in found.text
    length = len(segment_of(PICTURES[0], layout))
    for spare, pictures in ((POSITIONS + 1, 1), (POSITIONS, 0), (2 * POSITIONS + 3, 2)):
        # The begin and all codes take a position, and the end, as the last token, none.
        system.language.config.max_position_embeddings = length + spare
        with calls_of(system) as calls:
            found = decode(system, endless(layout), [PICTURES[0]], Decoding(99), pictures=True)[0]
        assert len(found.pictures) <= pictures
        last = calls[-1][0]
        assert int(last.position_ids.max()) == length + spare - 1
    system.language.config.max_position_embeddings = length + POSITIONS + 1
    asked = to_draw(PICTURES[0], layout)
    assert len(decode(system, layout, [asked], Decoding(1), pictures=True)[0].pictures) == 1
    system.language.config.max_position_embeddings -= 1
    with pytest.raises(DataError, match=r"prompt 0: .* tokens with a picture of 4 are more than the model's"):
        decode(system, layout, [asked], pictures=True)


@pytest.mark.parametrize("kind", ["dense", "both"])
def test_guidance_is_a_loop_of_two_prompts_without_a_cache(kind: str) -> None:
    """Several pictures, one after the other: what they are guided against forgets those before."""
    system, layout = moma(kind)
    eager(system, layout)
    layout = endless(layout)
    assert layout.template.bos is not None
    prompts = [to_draw(PICTURES[0], layout), PICTURES[2]]
    begin, end = layout.tokenizer.id("<boi>"), layout.tokenizer.id("<eoi>")
    codes = system.vocabulary.tolist()  # type: ignore[union-attr, operator]
    text = [token for token in range(len(layout.tokenizer)) if token not in {*codes, end}]
    image = MODALITIES["image"]
    found = decode(system, layout, prompts, Decoding(4), pictures=True, guidance=3.0)
    plain = decode(system, layout, prompts, Decoding(4), pictures=True)
    assert [picture.tobytes() for one in found for picture in one.pictures] != [
        picture.tobytes() for one in plain for picture in one.pictures
    ]
    total = 0
    for prompt, one in zip(prompts, found, strict=True):
        segment = segment_of(prompt, layout)
        asked = int(segment.ids[-1]) == begin
        row = row_of(system, layout, replace(segment, ids=segment.ids[: len(segment) - asked]))
        drawn: list[list[int]] = []
        for number in range(4):
            token = begin if asked and not number else text[int(next_logits(system, row)[text].argmax())]
            row = longer(row, [token], [image if token == begin else 0])
            if token != begin:
                continue
            nothing = Segment(np.array([layout.tokenizer.id(layout.template.bos)], np.int32), (), ())
            alone = longer(row_of(system, layout, nothing), [begin], [image])
            chosen: list[int] = []
            for _ in range(POSITIONS):
                u, c = next_logits(system, alone), next_logits(system, row)
                code = int((u + 3.0 * (c - u))[codes].argmax())
                chosen.append(code)
                row, alone = (longer(batch, [codes[code]], [image]) for batch in (row, alone))
            row = longer(row, [end], [image])
            drawn.append(chosen)
        assert [codes_in(picture) for picture in one.pictures] == drawn
        total += len(drawn)
    assert total > 2


def test_streamed_pieces_are_the_text() -> None:
    system, layout = moma("experts")
    for prompt in (to_draw(PICTURES[1], layout), TEXTS[2], PICTURES[0]):
        pieces: list[str] = []
        decoding = Decoding(16, temperature=1.0, stop=("zzz",))
        torch.manual_seed(0)
        (found,) = decode(system, layout, [prompt], decoding, stream=pieces.append, pictures=True)
        assert "".join(pieces) == found.text
        torch.manual_seed(0)
        assert decode(system, layout, [prompt], decoding, pictures=True)[0].text == found.text


def test_likelihoods_go_by_routers_that_do_not_look_ahead() -> None:
    system, layout = moma("both")
    answers = ["a cat", "a much longer answer, with a comma", " dog", "A"]
    sums = log_likelihoods(system, layout, PICTURES, answers)
    means = mean_losses(system, layout, PICTURES, answers)
    for prompt, answer, total, (mean, greedy) in zip(PICTURES, answers, sums, means, strict=True):
        row = row_of(system, layout, segment_of(prompt, layout))
        by_hand, likeliest = 0.0, True
        for token in layout.tokenizer.encode(answer):
            logits = next_logits(system, row).double()
            by_hand += float(logits[token] - logits.logsumexp(0))
            likeliest &= int(logits.argmax()) == token
            row = longer(row, [token], [0])
        assert total == pytest.approx(by_hand, abs=1e-4, rel=1e-5) and greedy is likeliest
        assert mean == pytest.approx(-by_hand / len(layout.tokenizer.encode(answer)), abs=1e-4, rel=1e-5)


def test_bfloat16_decodes_too() -> None:
    system, layout = moma("both")
    with autocast(system, "bf16"):
        found = decode(system, layout, [to_draw(PICTURES[0], layout)], Decoding(4), pictures=True, guidance=2.0)
    assert len(found) == 1 and len(found[0].pictures) == 1
    assert {parameter.dtype for parameter in system.parameters()} == {torch.float32}


def by_ranks(lengths: list[int]) -> list[str]:
    """What each rank writes, with weights in parts; they are done at different times."""
    values = {"device": "cpu", "engine": {"kind": "fsdp"}, "optimizer": {"kind": "adamw", "lr": 1e-3}}
    train = TrainConfig.model_validate(values)
    world = World.from_environment()
    engine = train.engine.build(world, train)
    world.start(engine.device, 60, engine.group)
    try:
        system, layout = moma("both")
        engine.prepare(system, lambda prepared: parameter_groups(prepared, [], 0.1), 1)
        decoding = Decoding(lengths[world.rank])
        prompts = [PICTURES[world.rank]]
        return engine.call(generate, engine.system, endless(layout), prompts, decoding, synced=True)
    finally:
        engine.close()
        world.stop()


def test_ranks_wait_for_the_last_one(ranks: Ranks) -> None:
    found = ranks.run(by_ranks, 2, [2, 5])
    system, layout = moma("both")
    for rank, (written, length) in enumerate(zip(found, (2, 5), strict=True)):
        assert written == generate(system, endless(layout), [PICTURES[rank]], Decoding(length))


def test_training_mode_is_what_it_was() -> None:
    system, layout = moma("both")
    system.train()
    found = generate(system, layout, TEXTS, Decoding(4))
    assert system.training and system.language.training
    assert generate(system.eval(), layout, TEXTS, Decoding(4)) == found


BEAMS, SAMPLED = Decoding(beams=2), Decoding(beams=2, temperature=0.5)


def test_what_cannot_be_done_is_refused_in_one_line() -> None:
    system, layout = moma("experts")
    dense, words = text_lm("dense")
    assert decode(system, layout, []) == []
    asked = to_draw(PICTURES[0], layout)
    bare = replace(layout, template=replace(layout.template, bos=None))
    refused: list[tuple[str, type[Exception], Callable[[], Any]]] = [
        ("4 beams: a model whose pictures", ConfigError, lambda: generate(system, layout, TEXTS, Decoding(beams=4))),
        ("2 beams: only one prompt without", ConfigError, lambda: decode(dense, words, TEXTS[:1], BEAMS, stream=print)),
        ("2 beams: this model samples from one", ConfigError, lambda: decode(dense, words, TEXTS, SAMPLED)),
        ("4 prompts, 1 beams: only one", ConfigError, lambda: decode(system, layout, TEXTS, stream=print)),
        ("prompt 0 begins a picture, and the model may not", ConfigError, lambda: generate(system, layout, [asked])),
        ("pictures: this model draws none", ConfigError, lambda: decode(dense, words, TEXTS, pictures=True)),
        ("has no token that begins a picture", ConfigError, lambda: to_draw(TEXTS[0], words)),
        ("prompt 0 is empty", DataError, lambda: decode(system, bare, [()])),
        ("a picture's begin alone", DataError, lambda: decode(system, bare, [to_draw((), layout)], pictures=True)),
    ]
    for line, error, call in refused:
        with pytest.raises(error, match=line) as raised:
            call()
        assert "\n" not in str(raised.value)
    untold, layout = moma("dense", experts={"text": 2, "image": 2})
    with pytest.raises(ConfigError, match="no auxiliary routers"):
        generate(untold, layout, TEXTS)
    window = {"config": {**LLAMA["config"], "model_type": "mistral", "sliding_window": 8}}
    system, layout = text_lm("experts", **window)
    with pytest.raises(DataError, match="more than the model's 8 positions"):
        generate(system, layout, [raw_prompt("a long prompt " * 8)])
    with calls_of(system) as calls:
        generate(system, endless(layout), [TEXTS[1]], Decoding(99))
    assert int(calls[-1][0].position_ids.max()) == 7


SOURCE = {"kind": "captions", "prompt": "{language}: ", "path": "builtin:emoji/validation-*.tar.gz"}


@pytest.fixture(scope="module")
def moma_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("moma")
    values = {
        "out": str(folder / "run"),
        "data": {
            "sources": [{**SOURCE, "text_first": 0.5}], "test": [SOURCE], "context_length": 64, "workers": 0,
            "cache": str(cache),
        },
        "model": {**tiny_moma.MODEL, "experts": {"text": 2, "image": 2, "auxiliary": "along"}},
        "train": {
            "max_steps": 1, "batch_tokens": 128, "micro_batch": 2, "device": "cpu",
            "optimizer": {"kind": "adamw", "lr": 1e-3},
        },
        "evaluation": {"candidates": 4, "samples": 3},
    }  # fmt: skip
    path = folder / "moma.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    return folder / "run"


def test_a_run_is_evaluated_and_asked_to_draw(
    moma_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moma_run
    scores = json.loads((run / "eval.json").read_text())
    assert scores["match_chance"] == 0.25 and 0 <= scores["match_accuracy"] <= 1
    assert scores["caption_loss"] > 0 and scores["caption_loss"] != scores["shuffled_loss"]
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 3 and all(sample["true"] for sample in samples)

    def result(*arguments: str, status: int = 0) -> Any:
        capsys.readouterr()
        assert main(["generate", str(run), *arguments, "--max-new-tokens", "3", "--json"]) == status
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    folder = tmp_path / "drawn"
    draw = ["--pictures", str(folder), "--draw"]
    (row,) = result("--prompt", "en: a red fox", *draw)["answers"]
    assert row["pictures"] == [str(folder / "00001.png")] and row["answer"].startswith("<image>")
    (again,) = result("--prompt", "en: a red fox", *draw)["answers"]
    assert again["pictures"] == [str(folder / "00002.png")], "what is there stays"
    first, second = (np.asarray(Image.open(one["pictures"][0])) for one in (row, again))
    assert first.shape == (8, 8, 3) and np.array_equal(first, second)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "en: a"}\n{"prompt": "de: b", "n": 2}\n')
    result("--prompts", str(prompts), "--out", str(out), "--guidance", "2", *draw)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["pictures"]) for row in rows] == [1, 1] and rows[1]["n"] == 2
    assert len(list(folder.iterdir())) == 4
    (words,) = result("--prompt", "en: a red fox")["answers"]
    assert "pictures" not in words and "<image>" not in words["answer"]
    for arguments, line in (
        (["--prompt", "a", "--draw"], "give --pictures FOLDER with them"),
        (["--prompt", "a", *draw, "--guidance", "-1"], "guidance -1.0: expected 0 or more"),
        (["--pictures", str(folder)], "give --prompt, --image or both"),
        (["--prompt", "a", "--beams", "2"], "2 beams"),
    ):
        assert line in result(*arguments, status=2)["error"]
    assert result(*draw)["answers"][0]["pictures"] == [str(folder / "00005.png")]


def test_turns_may_be_drawn_in() -> None:
    """A picture that is asked for opens the assistant's turn."""
    system, layout = moma("experts")
    prompt = to_draw((Turn("user"), Text("a red fox", loss=False), Turn("assistant")), layout)
    (found,) = decode(system, layout, [prompt], Decoding(3), pictures=True)
    assert len(found.pictures) == 1 and found.text.startswith("<image>")


def test_captions_are_matched_by_what_they_cost_behind_their_picture(moma_run: Path) -> None:
    """Pictures are tokens, and there are experts: against each caption in a row of its own, as in training."""
    system, layout, config = mm.load(moma_run, "cpu")
    engine = SingleEngine(World.from_environment(), config.train)
    engine.system = system
    test = open_splits(config.data, layout, config.seed)["test"]
    items = next(evaluate.blocks(evaluate.captioned_pictures(test, layout, 0), 3))[:5]
    assert all(layout.tokenizer.id("<eoi>") in item.before and len(item.caption) > 1 for item in items)
    fused = evaluate.fuse_pictures(engine, layout, items)
    scores = evaluate.caption_scores(engine, layout, fused, None)
    for i, shown in enumerate(items):
        for j, said in enumerate(items):
            tokens = np.concatenate([shown.before, said.caption])
            learned = ((len(shown.before), len(tokens)),)
            pack = Pack(tokens, (PackedSegment("x", "", 0, len(tokens), learned),), (replace(shown.media, segment=0),))
            with torch.no_grad():
                losses = system.token_losses(collate([pack], layout, len(tokens)))
            assert len(losses) == len(said.caption)
            assert scores[i, j] == pytest.approx(-float(losses.sum()), rel=1e-5)
