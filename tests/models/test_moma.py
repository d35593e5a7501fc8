"""MoMa: what the language model reads and predicts, against a loop over samples and transformers' own forward pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from pydantic import ValidationError
from tiny_moma import CODES, LANGUAGE, POSITIONS, ROW, ROWS, SAMPLES, batch, codes_of, model, pack
from torch import Tensor

from mm.data.batch import IGNORE, MODALITIES, PackedBatch, collate, with_dummies
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Media, Text, Turn
from mm.data.tokens import make_segment
from mm.errors import DataError
from mm.models.backbone import ordinary_attention
from mm.models.system import Output
from mm.models.systems.moma.config import MomaConfig
from mm.models.systems.moma.model import Moma
from mm.train import checkpoint
from mm.train.stages import take_over

NAMES = [name for row in ROWS for name in row]
LLAMA = {**LANGUAGE, "config": {**LANGUAGE["config"], "model_type": "llama", "num_key_value_heads": 2}}
del LLAMA["config"]["swin_norm"]


def build(**changes: Any) -> Moma:
    torch.manual_seed(0)
    return model(**changes).build()


def expected(name: str, config: MomaConfig) -> tuple[list[int], list[bool], list[bool]]:
    """Of every position of a sample: the token, whether it is learned, and whether it belongs to a picture."""
    tokenizer, template = config.layout().tokenizer, config.template
    found: list[tuple[int, bool, bool]] = []
    if template.bos is not None:
        found.append((tokenizer.id(template.bos), False, False))
    for part in SAMPLES[name]:
        if isinstance(part, Media):
            first, last = template.around_image
            names = [first, *(f"<code:{code}>" for code in codes_of(part)), last]
            found += [(tokenizer.id(one), True, True) for one in names]
        else:
            assert isinstance(part, Text)
            found += [(id, part.loss, False) for id in tokenizer.encode(part.text)]
    assert template.eos is not None
    ids, learned, image = zip(*found, (tokenizer.id(template.eos), True, False), strict=True)
    return list(ids), list(learned), list(image)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"template": {"bos": None}},
        {"language": {**LANGUAGE, "added_tokens": ["<code:7>", "<eoi>", "<code:3>", "<other>"]}},
        {"template": {"around_image": ["<picture>", "</picture>"]}},
    ],
    ids=["", "at the very start", "ids in no order", "other names"],
)
def test_fused_tokens_are_those_of_a_loop_over_samples(changes: dict[str, Any]) -> None:
    config = model(**changes)
    system, packed = config.build(), batch(ROWS, config)
    fused = system.fused(packed)
    assert fused.media == {} and torch.equal(fused.modality, packed.modality)
    labels = torch.full((len(ROWS), ROW), IGNORE)
    for row, names in enumerate(ROWS):
        at = 0
        for name in names:
            ids, learned, image = expected(name, config)
            assert fused.input_ids[row, at : at + len(ids)].tolist() == ids, name
            assert (fused.modality[row, at : at + len(ids)] == MODALITIES["image"]).tolist() == image, name
            for position, (id, asked) in enumerate(zip(ids[1:], learned[1:], strict=True)):
                labels[row, at + position] = id if asked else IGNORE
            at += len(ids)
        assert set(fused.segment_ids[row, at:].tolist()) <= {0}
    assert torch.equal(fused.labels, labels) and fused.targets == int((labels != IGNORE).sum())


def test_codes_come_with_the_data_or_from_the_teacher() -> None:
    config = model()
    system, packed = config.build(), batch(ROWS)
    expected = system.fused(packed)
    media = packed.media["image"]
    codes = torch.tensor([code for name in NAMES for one in SAMPLES[name] if isinstance(one, Media)
                          for code in codes_of(one)])  # fmt: skip
    assert len(codes) == 6 * POSITIONS and len(set(codes.tolist())) > CODES // 2
    again = config.build()
    given = replace(packed, media={"image": replace(media, codes=codes[:, None].int())})
    found = again.fused(given)
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.labels, expected.labels)
    assert "teacher" not in again.__dict__, "it is not even made"


def test_a_picture_of_a_conversation_is_read_and_not_learned() -> None:
    config = model()
    layout, system = config.layout(), config.build()
    one = next(part for part in SAMPLES["picture first"] if isinstance(part, Media))
    turns = (Turn("user"), one, Text("what is it?", False), Turn("assistant"), Text("noise"))
    packed = collate([join_segments([("chat", "s", make_segment(turns, layout, "chat", Limits()))])], layout, 2 * ROW)
    fused = system.fused(packed)
    assert torch.equal(fused.labels, packed.labels) and int(fused.targets) > 0
    slots = packed.media["image"].slots(2 * ROW)
    names = [layout.tokenizer.token(id) for id in fused.input_ids.flatten()[slots].tolist()]
    assert names == [f"<code:{code}>" for code in codes_of(one)]
    assert int(system.counts(packed)["image"]) == 0


def test_no_loss_depends_on_a_picture_that_cannot_be_read() -> None:
    config = model()
    layout, system = config.layout(), build()
    whole = pack(["in the middle", "picture first"], layout)
    broken = replace(whole, media=(replace(whole.media[0], data=whole.media[0].data[:60]), whole.media[1]))
    packed = collate([broken], layout, ROW, quarantine=True)
    assert packed.media["image"].unreadable.tolist() == [True, False]
    fused = system.fused(packed)
    here = fused.segment_ids == 1
    assert bool((fused.labels[here] == IGNORE).all())
    output, alone = system(packed), system(batch([["picture first"]]))
    for name in system.weights:
        torch.testing.assert_close(output.losses[name], alone.losses[name], rtol=1e-5, atol=1e-5)
        assert int(output.counts[name]) == int(alone.counts[name]) == int(system.counts(packed)[name])


def test_dummies_change_nothing() -> None:
    system, packed = build(), batch([["no picture"], []])
    output = system(with_dummies(packed, model().layout()))
    assert torch.equal(output.losses["next_token"], system(packed).losses["next_token"])
    assert int(output.counts["image"]) == 0 and float(output.losses["image"]) == 0


Found = tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor]]


def step(system: Moma, batches: list[PackedBatch]) -> Found:
    """Sums of losses by objective, their counts, and gradients of the sum of `next_token`."""
    system.zero_grad()
    system.begin_step(0, 10)
    outputs: list[Output] = []
    for one in batches:
        counts = {name: int(count) for name, count in system.counts(one).items()}
        outputs.append(system(one))
        assert {name: int(count) for name, count in outputs[-1].counts.items()} == counts
        outputs[-1].losses["next_token"].backward()
    losses = {name: torch.stack([one.losses[name].detach() for one in outputs]).sum() for name in system.weights}
    counts = {name: sum(int(one.counts[name]) for one in outputs) for name in system.weights}
    return losses, counts, {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}


def assert_alike(found: Found, expected: Found, tolerance: float = 1e-5) -> None:
    assert found[1] == expected[1]
    for name, loss in expected[0].items():
        torch.testing.assert_close(found[0][name], loss, rtol=tolerance, atol=1e-4, msg=name)
    assert found[2].keys() == expected[2].keys() and found[2]
    for name, grad in expected[2].items():
        assert float((found[2][name] - grad).norm()) <= tolerance * max(1.0, float(grad.norm())), name


@pytest.mark.parametrize("language", [LANGUAGE, LLAMA], ids=["chameleon", "llama"])
def test_it_is_the_language_model_on_tokens_of_text_and_pictures(language: dict[str, Any]) -> None:
    """Against transformers, a sample at a time: losses, their parts by modality, and gradients, with the z-loss."""
    z = 1e-2
    system = build(language=language, z_loss=z).train()
    found = step(system, [batch(ROWS)])
    system.zero_grad()
    sums = {name: torch.zeros(()) for name in ("plain", "z", "image")}
    with ordinary_attention(system.language):
        for name in NAMES:
            ids, learned, image = expected(name, system.config)
            logits = system.language(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            asked = torch.tensor(learned[1:])
            losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none") * asked
            sums["plain"] = sums["plain"] + losses.sum()
            sums["image"] = sums["image"] + (losses * torch.tensor(image[1:])).sum()
            sums["z"] = sums["z"] + z * (logits.logsumexp(1).square() * asked).sum()
    (sums["plain"] + sums["z"]).backward()
    right = {
        "next_token": sums["plain"] + sums["z"], "text": sums["plain"] - sums["image"], "image": sums["image"],
    }  # fmt: skip
    grads = {name: p.grad for name, p in system.named_parameters() if p.grad is not None}
    assert_alike(found, (right, found[1], grads), 1e-4)
    assert found[1]["text"] + found[1]["image"] == found[1]["next_token"] and found[1]["image"] == 6 * (POSITIONS + 2)
    evaluated = system.eval()(batch(ROWS))
    torch.testing.assert_close(evaluated.losses["next_token"], sums["plain"], rtol=1e-5, atol=1e-4)
    assert system.weights == {"next_token": 1.0, "text": 0.0, "image": 0.0} and system.learned == ("next_token",)
    assert not evaluated.losses["text"].requires_grad and list(evaluated.rows) == ["next_token"]


@pytest.mark.parametrize("experts", [None, {"text": 1, "image": 1}, {"all": 1}], ids=["dense", "1t1i", "one for all"])
def test_packed_samples_cost_what_each_costs_alone(experts: dict[str, int] | None) -> None:
    system = build(experts=experts).train()
    assert_alike(step(system, [batch(ROWS)]), step(system, [batch([[name]]) for name in NAMES]))


EXPERTS: dict[str, Any] = {"text": 4, "image": 2, "noise": {"steps": 10}}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("depths", [None, {"capacity": 0.5}], ids=["", "depths"])
def test_however_rows_are_split_experts_choose_the_same(rows: int, depths: dict[str, Any] | None) -> None:
    """With noise, which is of the row; a row of padding among them."""
    system = build(experts={**EXPERTS, "routing_rows": rows}, depths=depths).train()
    split = [batch(ROWS[at : at + rows], first=at) for at in range(0, len(ROWS), rows)]
    assert_alike(step(system, split), step(system, [batch(ROWS)]))


def tensors(system: Moma) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in checkpoint.model_tensors(system).items()}


EXACT = {**LANGUAGE, "config": {**LANGUAGE["config"], "rms_norm_eps": 1e-12}}


@pytest.mark.parametrize(
    ("language", "normalize"), [(EXACT, False), (EXACT, True), (LLAMA, True)], ids=["swin", "swin normal", "pre-norm"]
)
def test_upcycled_is_its_seed(language: dict[str, Any], normalize: bool) -> None:
    """Dense, then one expert a modality, then several of which each takes every token: the same losses."""
    seed = build(language=language).train()
    right = step(seed, [batch(ROWS)])
    for experts in ({"text": 1, "image": 1}, {"text": 4, "image": 4, "capacity": 1.0, "normalize": normalize}):
        torch.manual_seed(1)
        grown = model(language=language, experts=experts).build().train()
        left = take_over(grown, tensors(seed), None, "the seed")
        assert all(".router." in one for one in left), left
        found = step(grown, [batch(ROWS)])
        for name, loss in right[0].items():
            torch.testing.assert_close(found[0][name], loss, rtol=1e-5, atol=1e-4, msg=f"{experts} {name}")
        seed = grown


def test_evaluation_needs_routers_that_do_not_look_ahead() -> None:
    """With auxiliary routers, what follows a token changes nothing before it; in training it does."""
    system = build(experts={"text": 4, "image": 4, "auxiliary": "along"})
    packed = batch([["in the middle"]])
    fused = system.fused(packed)
    other = replace(fused, input_ids=fused.input_ids.clone())
    last = int((fused.segment_ids[0] > 0).sum()) - 1
    other.input_ids[0, last] = 5
    for training in (True, False):
        system.train(training)
        with torch.no_grad():
            before, after = (system.token_losses(one)[:-1] for one in (fused, other))
        same = torch.allclose(before, after, atol=1e-6)
        assert same is not training
    assert float(system(packed).losses["routers"]) == 0


def test_a_published_model_grows_by_the_tokens_it_lacks(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **{
        **{key: value for key, value in LLAMA["config"].items() if key != "model_type"},
        "vocab_size": len(model().layout().tokenizer) - CODES - 2,
    })  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    system = build(language={"name": str(tmp_path), "tokenizer": "builtin:emoji"})
    own, before = system.language.get_input_embeddings().weight, theirs.get_input_embeddings().weight
    assert len(own) == len(before) + CODES + 2 and torch.equal(own[: len(before)], before)
    assert system.language.get_output_embeddings().weight.shape == own.shape
    assert torch.isfinite(system(batch(ROWS)).losses["next_token"])


# changes -> what the one line must say
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"code_token": "code"}, "expected a name with {} for the number, such as <code:{}>, or chameleon"),
    ({"teacher": {"kind": "kmeans", "path": "nowhere"}}, "teacher.kind kmeans: says no codes of pictures; expected vq"),
    ({"teacher": None}, "expected a mapping with a `kind`"),
    ({"template": {"around_image": None}}, "around_image"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_wrong_settings_are_said(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        model(**changes)
    assert line in str(error.value)


def test_names_of_codes_have_to_be_in_a_vocabulary_that_claims_them() -> None:
    with pytest.raises(DataError, match="there is no token 'IMGIMGAZ'"):
        model(code_token="chameleon", template={"around_image": ["<s>", "<|im_end|>"]}).build()


def test_experts_for_each_modality_are_asked_for(tmp_path: Path) -> None:
    from mm.errors import ConfigError

    with pytest.raises(ConfigError, match=r"the model takes image, and there are no experts for it; add image: 1"):
        build(experts={"text": 2})
