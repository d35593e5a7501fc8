"""Generation: batches say what each prompt alone says, and that is what one forward pass a token says.

The oracle is a loop of packed forward passes without a cache; for beams it is transformers' own search, called by hand.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY
from torch import Tensor
from transformers import GenerationConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mm.cli import main
from mm.config import RunConfig
from mm.data.batch import PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Media, Text, Tokens, Turn
from mm.data.tokens import Segment, make_segment
from mm.errors import ConfigError, DataError
from mm.hub import ReleaseConfig
from mm.models import answers, backbone
from mm.models.generate import generate, log_likelihoods, mean_losses
from mm.models.prompts import Decoding, Prompt, Reader, Streamer, autocast, chat_prompt, raw_prompt
from mm.models.system import GenerativeSystem
from mm.models.systems.open_qwen2vl.config import OpenQwen2VLConfig
from mm.models.systems.text_lm.config import TextLMConfig
from mm.settings import merge

Built = tuple[GenerativeSystem, Layout]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
LANGUAGES: dict[str, dict[str, Any]] = {
    "qwen2": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "head_dim": 8},
    "gemma": {**LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": False},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}


def picture(seed: int, height: int = 24, width: int = 24) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return Media("image", data.getvalue(), "png")


def build(kind: str, *, change: dict[str, Any] | None = None, **settings: Any) -> Built:
    """A model with a random language model whose likeliest tokens are well apart."""
    torch.manual_seed(0)
    language = {"tokenizer": "builtin:emoji", "config": {"model_type": kind, **LANGUAGES[kind], **settings}}
    config = OpenQwen2VLConfig.model_validate({**merge(TINY["model"], change or {}), "language": language})
    system = config.build()
    with torch.no_grad():
        for parameter in system.language.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return system.eval(), config.layout()


@pytest.fixture(scope="module")
def qwen2() -> Built:
    return build("qwen2")


PROMPTS: list[Prompt] = [
    raw_prompt("en: ", [picture(0)]),
    raw_prompt("A red apple, a green apple and"),
    raw_prompt("first <image> then <image>\nlast <image>: what is it?", [picture(1), picture(2), picture(3)]),
    chat_prompt("What is this?", [picture(4)], system="Be short."),
    (Text("x", loss=False),),
]


def laid_out(prompt: Prompt, layout: Layout) -> Segment:
    return make_segment(prompt, layout, "prompt", Limits(), closed=False)


def row(segment: Segment, layout: Layout) -> PackedBatch:
    return collate([join_segments([("x", "", segment)])], layout, len(segment))


@torch.no_grad()
def next_logits(system: GenerativeSystem, layout: Layout, prompt: Prompt, written: list[int]) -> Tensor:
    """[V]: of the token after a prompt and some tokens, by a packed forward pass over all of it."""
    segment = laid_out(prompt, layout)
    batch = row(replace(segment, ids=np.concatenate([segment.ids, np.array(written, np.int32)])), layout)
    keep = torch.tensor([batch.input_ids.shape[1] - 1])
    return backbone.run(
        system.language, system.embed(batch), batch.segment_ids, batch.position_ids, keep, isolate=True
    )[0]


def likeliest(system: GenerativeSystem, layout: Layout, prompt: Prompt, count: int) -> list[int]:
    """Token ids, up to the end of text."""
    written: list[int] = []
    while len(written) < count:
        token = int(next_logits(system, layout, prompt, written).argmax())
        if token == layout.tokenizer.id("<|im_end|>"):
            break
        written.append(token)
    return written


@pytest.mark.parametrize("kind", LANGUAGES)
def test_a_batch_says_what_each_prompt_says_token_by_token(kind: str) -> None:
    system, layout = build(kind)
    decoding = Decoding(max_new_tokens=8)
    together = generate(system, layout, PROMPTS, decoding)
    assert together == [generate(system, layout, [prompt], decoding)[0] for prompt in PROMPTS]
    ids = [likeliest(system, layout, prompt, 8) for prompt in PROMPTS]
    assert together == [layout.tokenizer.decode(one).strip() for one in ids]
    assert len(set(together)) == len(PROMPTS)


def test_pictures_of_several_sizes_share_a_batch() -> None:
    native = {"vision": {"resize": "native", "max_patches": 36}, "connector": {"pool": 2}}
    system, layout = build("qwen2", change=native)
    prompts = [
        raw_prompt("en: ", [picture(0, 20, 60)]),
        raw_prompt("<image> or <image>", [picture(1, 48, 48), picture(2, 9, 9)]),
    ]
    assert len({one.length for prompt in prompts for one in laid_out(prompt, layout).media}) > 1
    together = generate(system, layout, prompts, Decoding(max_new_tokens=6))
    ids = [likeliest(system, layout, prompt, 6) for prompt in prompts]
    assert together == [layout.tokenizer.decode(one).strip() for one in ids]


def test_a_language_model_alone_reads_text_and_takes_no_picture() -> None:
    torch.manual_seed(0)
    language = {"tokenizer": "builtin:emoji", "config": {"model_type": "llama", **LLAMA_LIKE}}
    config = TextLMConfig.model_validate({"language": language})
    system, layout = config.build().eval(), config.layout()
    prompts = [raw_prompt("A red apple"), raw_prompt("")]
    ids = [likeliest(system, layout, prompt, 5) for prompt in prompts]
    assert generate(system, layout, prompts, Decoding(5)) == [layout.tokenizer.decode(one).strip() for one in ids]
    with pytest.raises(DataError, match="prompt 0: the model takes no image"):
        generate(system, layout, [PROMPTS[0]])


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_beams_are_transformers_beams(kind: str) -> None:
    system, layout = build(kind)
    found = generate(system, layout, PROMPTS, Decoding(max_new_tokens=6, beams=3))
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad(), backbone.ordinary_attention(system.language):
            (ids,) = system.language.generate(
                inputs_embeds=system.embed(row(laid_out(prompt, layout), layout)),
                max_new_tokens=6,
                num_beams=3,
                do_sample=False,
                eos_token_id=layout.tokenizer.id("<|im_end|>"),
                pad_token_id=layout.pad,
            )
        expected.append(layout.tokenizer.decode(ids.tolist()).strip())
    assert found == expected
    assert found != generate(system, layout, PROMPTS, Decoding(max_new_tokens=6))


def test_sampling_follows_the_softmax_and_the_seed(qwen2: Built) -> None:
    system, layout = qwen2
    prompt, temperature, count = PROMPTS[4], 0.5, 2000
    decoding = Decoding(max_new_tokens=1, temperature=temperature)

    def drawn(decoding: Decoding) -> list[str]:
        torch.manual_seed(1)
        return [text for _ in range(count // 500) for text in generate(system, layout, [prompt] * 500, decoding)]

    texts = drawn(decoding)
    assert texts == drawn(decoding)
    shares = (next_logits(system, layout, prompt, []) / temperature).softmax(-1)
    likely = shares.topk(400)
    expected: dict[str, float] = {}
    for token, share in enumerate(shares.tolist()):
        text = layout.tokenizer.decode([token]).strip()
        expected[text] = expected.get(text, 0) + share
    for text in {layout.tokenizer.decode([token]).strip() for token in likely.indices[:3].tolist()}:
        deviation = (expected[text] * (1 - expected[text]) / count) ** 0.5
        assert texts.count(text) / count == pytest.approx(expected[text], abs=4 * deviation)
    assert len(set(texts)) > 60  # transformers' default would leave the 50 likeliest
    best = {layout.tokenizer.decode([token]).strip() for token in likely.indices[:4].tolist()}
    assert set(drawn(replace(decoding, top_k=4))) == best
    nucleus = int((shares.sort(descending=True).values.cumsum(0) < 0.2).sum()) + 1
    inside = {layout.tokenizer.decode([token]).strip() for token in likely.indices[:nucleus].tolist()}
    assert nucleus < 400 and set(drawn(replace(decoding, top_p=0.2))) <= inside
    greedy = generate(system, layout, [prompt], Decoding(max_new_tokens=6))
    assert generate(system, layout, [prompt], Decoding(max_new_tokens=6, temperature=0.7, top_k=1)) == greedy


@contextlib.contextmanager
def passes(system: GenerativeSystem) -> Iterator[list[int]]:
    """The number of forward passes of the language model, as the length of a list."""
    made: list[int] = []
    handle = system.language.register_forward_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def test_an_answer_ends_at_a_stop_string_which_is_cut_off(qwen2: Built) -> None:
    system, layout = qwen2
    prompt = PROMPTS[0]
    ids = likeliest(system, layout, prompt, 12)
    texts = [layout.tokenizer.decode(ids[:n]) for n in range(13)]
    stop = texts[-1][len(texts[4]) - 2 : len(texts[5]) + 1]  # from inside one token to inside another
    assert stop not in texts[4]
    long = Decoding(max_new_tokens=12, stop=("no such text", stop))
    with passes(system) as made:
        (found,) = generate(system, layout, [prompt], long)
    needed = next(n for n, text in enumerate(texts) if stop in text)
    assert found == texts[-1][: texts[-1].index(stop)].strip() and len(made) == needed < 12
    others = [generate(system, layout, [other], long)[0] for other in PROMPTS]
    assert generate(system, layout, PROMPTS, long) == others and others[0] == found
    beams = replace(long, beams=2)
    assert generate(system, layout, PROMPTS, beams) == [generate(system, layout, [p], beams)[0] for p in PROMPTS]
    ends = Decoding(max_new_tokens=12, stop_ids=(ids[6],))
    assert generate(system, layout, [prompt], ends) == [layout.tokenizer.decode(ids[: ids.index(ids[6])]).strip()]


def test_special_tokens_end_an_answer_by_name(qwen2: Built) -> None:
    _, layout = qwen2
    layout = replace(layout, template=replace(layout.template, eos=None))
    encode, special = layout.tokenizer.encode, layout.tokenizer.id
    ids = [*encode("a cat"), special("<|endofchunk|>"), *encode("a dog"), special("<|im_end|>"), *encode("an ox")]
    for decoding, chat, text in (
        (Decoding(), False, "a cata dogan ox"),
        (Decoding(stop=("<|endofchunk|>",)), False, "a cat"),
        (Decoding(), True, "a cata dog"),
        (Decoding(stop=("dog",)), True, "a cata"),
    ):
        reader = Reader.of(layout, decoding, chat)
        assert reader.text(ids) == text and reader.text(ids[:3], going_on=True) == "a cat"[: len(text)]


@pytest.mark.parametrize("stop", [(), ("the end",), ("\n", "zzz"), ("傘",)])
@pytest.mark.parametrize(
    "text", ["naïve 傘 🙂 – it ends, the end", " two\n\nlines ", "the enough the end of it", "🙂", ""]
)
def test_streamed_text_is_the_text_and_never_taken_back(text: str, stop: tuple[str, ...], qwen2: Built) -> None:
    _, layout = qwen2
    reader = Reader.of(layout, Decoding(stop=stop), chat=False)
    pieces: list[str] = []
    streamer = Streamer(reader, pieces.append)
    # A token a byte: characters come in parts.
    ids = [layout.tokenizer.id(bytes_to_unicode()[byte]) for byte in text.encode()]
    streamer.put(torch.empty(1, 0, dtype=torch.int64))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    cut = min([text.index(one) for one in stop if one in text], default=len(text))
    assert "".join(pieces) == reader.text(ids) == text[:cut].strip()
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3 or len(text) < 20


def test_streaming_is_for_one_prompt_without_beams(qwen2: Built) -> None:
    system, layout = qwen2
    pieces: list[str] = []
    (text,) = generate(system, layout, PROMPTS[:1], Decoding(max_new_tokens=10), stream=pieces.append)
    assert "".join(pieces) == text == generate(system, layout, PROMPTS[:1], Decoding(max_new_tokens=10))[0]
    assert len(pieces) > 3
    with pytest.raises(ConfigError, match="5 prompts, 1 beams: only one prompt"):
        generate(system, layout, PROMPTS, stream=pieces.append)
    with pytest.raises(ConfigError, match="1 prompts, 2 beams: only one prompt"):
        generate(system, layout, PROMPTS[:1], Decoding(beams=2), stream=pieces.append)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_model_goes_on_to_its_last_position_and_no_further(kind: str) -> None:
    system, layout = build(kind, max_position_embeddings=24)
    long: Prompt = (Tokens(np.arange(100, 120, dtype=np.int32), loss=False),)
    (text,) = generate(system, layout, [long], Decoding(max_new_tokens=50))
    assert text == layout.tokenizer.decode(likeliest(system, layout, long, 4)).strip()
    with pytest.raises(DataError, match="prompt 1: 26 tokens are more than the model's 24 positions"):
        generate(system, layout, [long, (Tokens(np.arange(25, dtype=np.int32)),)])
    with pytest.raises(DataError, match="prompt 0: 31 tokens are more than the model's 24 positions"):
        log_likelihoods(system, layout, [long], ["a cat and a dog and an ox"])


def test_what_a_published_model_says_of_generation_is_not_done_and_not_lost(qwen2: Built) -> None:
    system, layout = qwen2
    expected = generate(system, layout, PROMPTS, Decoding(max_new_tokens=6))
    language = system.language
    before = language.generation_config
    published = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1, eos_token_id=[100, 200]
    )
    language.generation_config = published
    system.train()
    try:
        assert generate(system, layout, PROMPTS, Decoding(max_new_tokens=6)) == expected
        assert language.generation_config is published and system.training and language.training
        assert language.config._attn_implementation == "mm_packed"
    finally:
        language.generation_config = before
        system.eval()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature -1.0: expected 0 or more"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p 1.5: expected a share"),
        ({"top_k": 5}, "give a temperature above 0"),
        ({"beams": 0}, "beams 0: expected a number from 1 on"),
        ({"stop": ("",)}, "stop .*: expected texts that are not empty"),
        ({"min_new_tokens": 65}, "min_new_tokens 65: expected 0 to max_new_tokens"),
        ({"length_penalty": -2.0}, "length_penalty -2.0: expected beams with it"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoding(**settings)


ANSWERS = ["a cat", "a much longer answer, with a comma", " dog", "傘", "A"]


def test_likelihoods_are_sums_of_a_softmax_by_hand(qwen2: Built) -> None:
    system, layout = qwen2
    chat = laid_out(PROMPTS[3], layout)
    few_shot = (*PROMPTS[3], Text("An apple."), Turn("user"), picture(5), Text("And this?"), Turn("assistant"))
    prompts = [*PROMPTS[:4], few_shot]
    found = log_likelihoods(system, layout, prompts, ANSWERS)
    for prompt, answer, value in zip(prompts, ANSWERS, found, strict=True):
        ids = layout.tokenizer.encode(answer)
        by_hand = 0.0
        for place, token in enumerate(ids):
            logits = next_logits(system, layout, prompt, ids[:place]).double()
            by_hand += float(logits[token] - logits.exp().sum().log())
        assert value == pytest.approx(by_hand, abs=1e-5, rel=1e-5)
        assert log_likelihoods(system, layout, [prompt], [answer]) == [pytest.approx(value, abs=1e-5, rel=1e-5)]
    assert len(laid_out(few_shot, layout)) > len(chat) + 10
    learned = [(Text("A red apple, "),), (Text("A red apple, ", loss=False),)]
    assert len({*log_likelihoods(system, layout, learned, ["and"] * 2)}) == 1
    assert log_likelihoods(system, layout, [], []) == [] == generate(system, layout, [])


@pytest.mark.parametrize("chat", ["chatml", "release", "fixed", "plain"])
def test_likelihoods_of_answers_in_every_chat_form(chat: str, qwen2: Built) -> None:
    """An answer's tokens are those that the closed conversation has there, without the end of the turn."""
    system, layout = qwen2
    layout = replace(layout, template=replace(layout.template, chat=chat))
    for pictures in ([], [picture(0)], [picture(0), picture(1)]):
        prompt = chat_prompt("What is this?", pictures)
        (found,) = log_likelihoods(system, layout, [prompt], ["a red apple"])
        asked = laid_out(prompt, layout).ids.tolist()
        whole = make_segment((*prompt, Text("a red apple")), layout, "whole", Limits()).ids.tolist()
        assert whole[: len(asked)] == asked
        answer = whole[len(asked) :]
        answer = answer[: answer.index(layout.tokenizer.id("<|im_end|>"))]
        assert layout.tokenizer.decode(answer).strip() == "a red apple"
        logits = [next_logits(system, layout, prompt, answer[:n]).log_softmax(-1) for n in range(len(answer))]
        assert found == pytest.approx(sum(float(row[t]) for row, t in zip(logits, answer, strict=True)), abs=1e-5)


def test_mean_losses_and_whether_greedy_decoding_writes_an_answer(qwen2: Built) -> None:
    system, layout = qwen2
    prompts: list[Prompt] = []
    texts: list[str] = []
    for prompt in PROMPTS:
        written = [layout.tokenizer.decode(likeliest(system, layout, prompt, n)) for n in (1, 2)]
        some = [text for text in (*ANSWERS, *written, f"{written[0]} cat") if text]
        prompts, texts = [*prompts, *([prompt] * len(some))], [*texts, *some]
    values = log_likelihoods(system, layout, prompts, texts)
    found = mean_losses(system, layout, prompts, texts)
    for prompt, text, value, (loss, greedy) in zip(prompts, texts, values, found, strict=True):
        ids = layout.tokenizer.encode(text)
        assert loss == pytest.approx(-value / len(ids), abs=1e-4, rel=1e-5)
        assert greedy is all(
            int(next_logits(system, layout, prompt, ids[:n]).argmax()) == token for n, token in enumerate(ids)
        )
    assert {greedy for _, greedy in found} == {True, False} and mean_losses(system, layout, [], []) == []


def test_bfloat16_changes_numbers_a_little_and_no_weights(qwen2: Built) -> None:
    system, layout = qwen2
    exact = log_likelihoods(system, layout, PROMPTS, ANSWERS)
    with autocast(system, "bf16"):
        rounded = log_likelihoods(system, layout, PROMPTS, ANSWERS)
        texts = generate(system, layout, PROMPTS, Decoding(max_new_tokens=4))
    with autocast(system, "fp32"):
        assert log_likelihoods(system, layout, PROMPTS, ANSWERS) == exact
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.1)
    asked = answers.answerer(system, layout, lambda row: PROMPTS[row["n"]], Decoding(4), 0, precision="bf16")
    assert asked([{"n": n} for n in range(len(PROMPTS))], 0) == [{"answer": text} for text in texts]
    assert {parameter.dtype for parameter in system.parameters()} == {torch.float32}


def test_the_likeliest_answer_is_the_one_that_is_written(qwen2: Built) -> None:
    system, layout = qwen2
    written = [layout.tokenizer.decode(likeliest(system, layout, prompt, 1)) for prompt in PROMPTS[:2]]
    for prompt in PROMPTS[:2]:
        others = [text for text in (*ANSWERS, *written)]
        scores = log_likelihoods(system, layout, [prompt] * len(others), others)
        assert others[int(np.argmax(scores))] == layout.tokenizer.decode(likeliest(system, layout, prompt, 1))


def test_pictures_stand_where_they_are_marked() -> None:
    a, b = picture(0), picture(1)
    assert raw_prompt("x", [a, b]) == (a, b, Text("x", loss=False))
    assert raw_prompt("x <image>\ny<image>", [a, b]) == (
        Text("x ", loss=False), a, Text("y", loss=False), b, Text("", loss=False),
    )  # fmt: skip
    assert raw_prompt("<image>\n<image>\nx", [a, b]) == (a, Text("", loss=False), b, Text("x", loss=False))
    assert chat_prompt("<image>\nx", [a], "s") == (
        Turn("system"), Text("s", loss=False), Turn("user"), a, Text("\nx", loss=False), Turn("assistant"),
    )  # fmt: skip
    assert chat_prompt("x", [a]) == (Turn("user"), a, Text("x", loss=False), Turn("assistant"))
    for text, pictures in (("<image><image>", [a]), ("<image>", []), ("<image> x", [a, b])):
        with pytest.raises(DataError, match=f"{text.count('<image>')} <image> for {len(pictures)} pictures"):
            raw_prompt(text, pictures)


def test_published_raw_prompts_are_token_for_token(qwen2: Built) -> None:
    """`<image>`, newline, question (Open-Qwen2VL's harness): one newline behind each picture, not two and not none,
    whatever the template puts there."""
    _, layout = qwen2
    text = "<image>\nQuestion: Is there a dog?\nAnswer:"
    ids = laid_out(raw_prompt(text, [picture(0)]), layout).ids.tolist()
    assert ids == [
        layout.tokenizer.id("<s>"), *[layout.pad] * 4, *layout.tokenizer.encode(text.removeprefix("<image>")),
    ]  # fmt: skip
    assert laid_out(raw_prompt(text.removeprefix("<image>\n"), [picture(0)]), layout).ids.tolist() == ids
    encode, slots = layout.tokenizer.encode, [layout.pad] * 4
    for after_media in ("\n", ""):
        one = replace(layout, template=replace(layout.template, after_media=after_media))
        prompt = raw_prompt("<image>\n<image>\nQ", [picture(0), picture(1)], after_media)
        ids = laid_out(prompt, one).ids.tolist()
        assert ids == [layout.tokenizer.id("<s>"), *slots, *encode("\n"), *slots, *encode("\nQ")]


def rows(count: int) -> list[answers.Row]:
    return [{"prompt": f"p{n}", "images": [], "id": n} for n in range(count)]


def test_stopped_answers_go_on_and_are_the_same(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(part: list[answers.Row], first: int) -> list[answers.Row]:
        asked.append(first)
        return [{"answer": f"{row['prompt']} after {first}\n"} for row in part]

    def stopping(part: list[answers.Row], first: int) -> list[answers.Row]:
        if first >= 6:
            raise KeyboardInterrupt
        return answer(part, first)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answers.write_answers(whole, rows(10), answer, 3, "model")
    found = [json.loads(line) for line in whole.read_text().splitlines()]
    assert found[8:] == [
        {**row, "answer": f"{row['prompt']} after {n}\n"} for row, n in zip(rows(10)[8:], (6, 9), strict=True)
    ]
    with pytest.raises(KeyboardInterrupt):
        answers.write_answers(out, rows(10), stopping, 3, "model")
    (partial,) = tmp_path.glob(".out*")
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "p6", "ans')  # it was killed while writing
    asked.clear()
    answers.write_answers(out, rows(10), answer, 3, "model")
    assert asked == [6, 9] and out.read_bytes() == whole.read_bytes()
    with pytest.raises(ConfigError, match=r"out\.jsonl: is there already"):
        answers.write_answers(out, rows(10), answer, 3, "model")
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        answers.write_answers(out, rows(10), stopping, 3, "model")
    asked.clear()
    answers.write_answers(out, rows(10), answer, 3, "another model")
    assert asked == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: expected"),
        ('"text"', "line 2: expected"),
        ('{"prompt": 3}', "line 2: expected"),
        ('{"images": "a.png"}', "line 2: expected"),
        ('{"images": ["nowhere.png"]}', r"line 2: there is no file .*nowhere\.png"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_answered(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(DataError, match=words):
        answers.read_rows(file)


def test_the_form_is_that_of_what_trained_the_model(
    tiny: Callable[..., Path], tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    assert answers.form_of(tiny_config()) == "raw"
    assert answers.form_of(tiny_config("data.sources=[{kind: conversations, path: x.json}]")) == "chat"
    assert main(["pack", str(tiny()), "--out", str(tmp_path / "packed")]) == 0
    packed = tiny_config(f"data.packed={tmp_path / 'packed'}", "data.sources=[]", "data.validation=[]", "data.test=[]")
    assert answers.form_of(packed) == "raw"
    about = tmp_path / "packed/train/dataset.json"
    about.write_text(about.read_text().replace('"kind": "captions"', '"kind": "conversations"'))
    assert answers.form_of(packed) == "chat"
    about.unlink()
    assert answers.form_of(packed) == "raw"
    assert answers.form_of(ReleaseConfig(packed.model, "chat")) == "chat"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tiny: Callable[..., Path], tmp_path: Path) -> str:
    assert main(["train", str(tiny()), "train.max_steps=1", "evaluation.candidates=0", "data.test=[]"]) == 0
    (tmp_path / "a.png").write_bytes(picture(0).read())
    return str(tmp_path / "run")


def test_the_command_line(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, prompts, out = str(tmp_path / "a.png"), tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    few = ["--max-new-tokens", "4"]

    def result(*arguments: str, status: int = 0) -> Any:
        capsys.readouterr()
        assert main(["generate", run, *arguments, "--json"]) == status
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = result("--image", image, *few)
    assert found["form"] == "raw"  # its sources are captions
    (alone,) = found["answers"]
    assert alone["images"] == [image] and alone["prompt"] == ""
    asked = [{"images": ["a.png"], "n": 1}, {"prompt": "en: ", "n": 2}, {"prompt": "<image> and <image>", "n": 3}]
    asked[2]["images"] = ["a.png", "a.png"]
    prompts.write_text("\n".join(json.dumps(row) for row in asked))
    many = result("--prompts", str(prompts), "--batch", "2", *few)["answers"]
    assert [row["n"] for row in many] == [1, 2, 3] and many[0]["answer"] == alone["answer"]
    assert result("--prompts", str(prompts), "--out", str(out), *few) == {"form": "raw", "answers": 3, "out": str(out)}
    assert [json.loads(line) for line in out.read_text().splitlines()] == many
    assert "is there already" in result("--prompts", str(prompts), "--out", str(out), status=2)["error"]
    chat = result("--prompt", "Hello", "--system", "Be short.", "--chat", *few)
    assert chat["form"] == "chat"
    sampled = ["--prompt", "en: ", "--temperature", "2", "--seed"]
    assert result(*sampled, "1", *few) == result(*sampled, "1", *few) != result(*sampled, "2", *few)
    for arguments, words in (
        ([], "give --prompt, --image or both"),
        (["--prompt", "x", "--system", "y"], "give --chat"),
        (["--prompt", "<image>"], "1 <image> for 0 pictures"),
        (["--image", str(prompts)], "prompts.jsonl: not a readable"),
        (["--image", str(tmp_path)], "directory"),
    ):
        assert words in result(*arguments, status=2)["error"]
    with contextlib.redirect_stdout(Terminal()) as terminal:
        assert main(["generate", run, "--image", image, *few]) == 0
    assert terminal.getvalue().strip() == alone["answer"]


def test_a_file_begun_with_other_weights_is_not_gone_on_with(
    run: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")  # ends the command after its first batch
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"images": ["a.png"]}\n{"images": ["bad.png"]}\n')
    command = ["generate", run, "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--batch", "1"]

    def begun() -> int:
        assert main([*command, "--max-new-tokens", "2"]) == 2
        return len(list(tmp_path.glob(".out.jsonl.partial-*")))

    assert (begun(), begun()) == (1, 1)
    shutil.rmtree(run)
    short = ["train.max_steps=1", "evaluation.candidates=0", "data.test=[]", "seed=1"]
    assert main(["train", str(tiny()), *short]) == 0
    assert begun() == 2
