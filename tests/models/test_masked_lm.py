"""Masked language models: transformers' own loss on each document alone; what is drawn, by counting."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mm.config import load_config
from mm.data.batch import IGNORE, PackedBatch, collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import Pack, join_segments
from mm.data.sample import Metadata, Text, keyed_rng
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import Segment, make_segment
from mm.errors import ConfigError
from mm.models.masking import SPANS, Vocabulary, choose_text, corrupt, words_of
from mm.models.released.transformers import write
from mm.models.systems.masked_lm import encoder
from mm.models.systems.masked_lm.config import MaskedLMConfig
from mm.models.systems.masked_lm.model import MaskedLM

TEXTS = [
    "The unfathomable cat, said Dr. Smith-Jones, didn't sit.", "Two words.",
    "Internationalisation of 12 antidisestablishmentarian co-operatives: naïve façades (really) !", "A",
]  # fmt: skip
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {"initializer_range": 0.2, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "roberta": {"initializer_range": 0.2, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "modernbert": {"global_attn_every_n_layers": 1, "initializer_range": 0.2},
    "electra": {"embedding_size": 16, "initializer_range": 0.2, "hidden_dropout_prob": 0,
                "attention_probs_dropout_prob": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small tokenizers that were learned from the texts: WordPiece, byte-level BPE, Unigram."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    made: dict[str, tuple[Any, Any]] = {
        "wordpiece": (
            models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=90, special_tokens=special)
        ),
        "bytes": (
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
            ),
        ),
        "unigram": (
            models.Unigram(), trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="[UNK]")
        ),
    }  # fmt: skip
    folders = {}
    for name, (model, trainer) in made.items():
        backend = tokenizers.Tokenizer(model)
        if name == "wordpiece":
            backend.normalizer = normalizers.BertNormalizer()
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            backend.decoder = decoders.WordPiece()
        elif name == "bytes":
            backend.pre_tokenizer, backend.decoder = (
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                decoders.ByteLevel(),
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            backend.decoder = decoders.Metaspace()
        backend.train_from_iterator(TEXTS * 3, trainer)
        folder = tmp_path_factory.mktemp(name)
        backend.save(str(folder / "tokenizer.json"))
        folders[name] = str(folder)
    return folders


def section(pieces: dict[str, str], kind: str = "bert", tokenizer: str = "wordpiece", **values: Any) -> MaskedLMConfig:
    config = {"model_type": kind, "max_position_embeddings": 128, **WIDTH, **KINDS[kind], **values.pop("config", {})}
    language = {"tokenizer": pieces[tokenizer], "config": config}
    return MaskedLMConfig.model_validate({"language": language, **values})


def build(config: MaskedLMConfig) -> tuple[MaskedLM, Layout]:
    torch.manual_seed(0)
    return config.build(), config.layout()


def documents(layout: Layout, texts: list[str] = TEXTS) -> list[Segment]:
    return [make_segment((Text(text),), layout, "text", Limits()) for text in texts]


def rows(layout: Layout, *rows: list[Segment], padding: int = 3) -> PackedBatch:
    packs = [join_segments([(f"a/{n}", "a", one) for n, one in enumerate(row)]) for row in rows]
    draws = [(0, number) for number in range(len(rows))]
    return collate(packs, layout, max(len(pack.tokens) for pack in packs) + padding, draws=draws)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_cost_what_transformers_says_of_each(pieces: dict[str, str], kind: str) -> None:
    """The same ids and labels, each document in a call of its own with transformers' own attention and positions."""
    system, layout = build(section(pieces, kind, masking={"rate": 0.4}))
    batch = rows(layout, documents(layout), documents(layout)[2:], documents(layout)[::-1])
    masked = system.masked(batch)
    output = system(batch)
    output.losses["masked"].backward()
    found = gradients(system.language)

    labels = np.full(batch.input_ids.shape, IGNORE)
    labels.ravel()[masked.places] = masked.targets
    language = copy.deepcopy(system.language)
    language.base_model._forward_hooks.clear()
    language.set_attn_implementation("eager")
    total = torch.zeros(())
    for row, segments in enumerate(batch.segment_ids.tolist()):
        for segment in {*segments} - {0}:
            own = np.array(segments) == segment
            here = torch.from_numpy(labels[row, own])[None]
            if count := int((here != IGNORE).sum()):
                ids = torch.from_numpy(masked.ids[row, own])[None]
                total = total + count * language(input_ids=ids, labels=here).loss
    total.backward()
    torch.testing.assert_close(output.losses["masked"], total, rtol=1e-5, atol=1e-5)
    assert int(output.counts["masked"]) == int(system.counts(batch)["masked"]) == len(masked.places) > 10
    right = gradients(language)
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        scale = max(1.0, float(gradient.abs().max()))  # the gradient of a key's bias is zero but for rounding
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-5 * scale, msg=name)


def test_the_head_runs_on_what_is_masked_alone(pieces: dict[str, str]) -> None:
    system, layout = build(section(pieces))
    batch = rows(layout, documents(layout))
    seen: list[int] = []
    system.language.cls.predictions.transform.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    system(batch)
    assert seen == [len(system.masked(batch).places)]


def test_a_batch_of_padding_gives_zeros(pieces: dict[str, str]) -> None:
    """A loss of zero and a gradient of zero for every weight, as on a rank without data."""
    system, layout = build(section(pieces))
    output = system(collate([Pack(np.empty(0, np.int32), (), ())], layout, 16))
    assert not output.losses["masked"].any() and int(output.counts["masked"]) == 0
    output.losses["masked"].backward()
    assert output.rows["masked"].tolist() == [0]
    found = gradients(system)
    assert found.keys() == dict(system.named_parameters()).keys() and not any(one.any() for one in found.values())


def test_encoders_that_look_around_are_refused(pieces: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="language nobody: cannot be built"):
        section(pieces, config={"model_type": "nobody"}).build()
    with pytest.raises(ConfigError, match="the tokenizer has 90 tokens, the model 60"):
        section(pieces, config={"vocab_size": 60}).build()
    with pytest.raises(ConfigError, match="language mpnet: "):  # relative positions of their own
        section(pieces, config={"model_type": "mpnet", "pad_token_id": 0}).build()
    system, layout = build(section(pieces, config={"max_position_embeddings": 20}))
    with pytest.raises(ConfigError, match=r"a document has \d+ tokens, the model 20 positions"):
        system(rows(layout, documents(layout)))


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text cut as `words_of` says, without blanks that are words of their own."""
    ids = np.array(tokenizer.encode(text))
    number = words_of(ids, np.ones(len(ids)), Vocabulary.of(tokenizer))
    starts = tokenizer.encode_placed(text)[1]()
    places = [starts[np.flatnonzero(number == n)[0]] for n in range(number.max() + 1)]
    found = (text[a:b].strip(" ") for a, b in zip(places, [*places[1:], len(text)], strict=True))
    return [one for one in found if one]


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_words_are_what_blanks_and_punctuation_leave(pieces: dict[str, str], kind: str) -> None:
    tokenizer = Tokenizer.load(pieces[kind])
    contraction = ["'t"] if kind == "bytes" else ["'", "t"]  # one token of GPT-2's
    assert words(tokenizer, TEXTS[0]) == [
        "The", "unfathomable", "cat", ",", "said", "Dr", ".", "Smith", "-", "Jones", ",", "didn", *contraction, "sit",
        ".",
    ]  # fmt: skip
    assert words(tokenizer, TEXTS[2]) == [
        "Internationalisation", "of", "12", "antidisestablishmentarian", "co", "-", "operatives", ":", "naïve",
        "façades", "(", "really", ")", "!",
    ]  # fmt: skip


def test_special_tokens_are_words_of_their_own_and_never_masked(pieces: dict[str, str]) -> None:
    system, layout = build(section(pieces, masking={"rate": 1, "unit": "word", "corruption": [1, 0, 0]}))
    batch = rows(layout, documents(layout), documents(layout)[1:])
    masked = system.masked(batch)
    special = [layout.tokenizer.id(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")]
    is_special = torch.isin(batch.input_ids, torch.tensor(special))
    assert masked.places.tolist() == (~is_special).flatten().nonzero()[:, 0].tolist(), "at a rate of 1 all others are"
    assert (masked.ids == np.where(is_special, batch.input_ids, special[3])).all()
    assert (masked.targets == batch.input_ids.flatten().numpy()[masked.places]).all()


def test_what_is_not_learned_is_not_masked(pieces: dict[str, str]) -> None:
    system, layout = build(section(pieces, masking={"rate": 1}))
    segment = make_segment((Text("Two words. ", loss=False), Text("A cat")), layout, "text", Limits())
    masked = system.masked(rows(layout, [segment]))
    assert masked.targets.tolist() == layout.tokenizer.encode("A cat")


def test_what_a_document_without_begin_of_text_opens_with_is_not_masked(pieces: dict[str, str]) -> None:
    """Metadata or a prompt, of one token or more: no label says of the first whether it is learned."""
    system, layout = build(section(pieces, masking={"rate": 1}, template={"bos": None}))
    encode = layout.tokenizer.encode
    for front in ("12", "Two words. "):
        for before in (Text(front, loss=False), Metadata(front)):
            segment = make_segment((before, Text("A cat")), layout, "text", Limits())
            masked = system.masked(rows(layout, [segment, segment], [segment]))
            assert masked.targets.tolist() == encode("A cat") * 3
    masked = system.masked(rows(layout, documents(layout)[:2]))
    assert masked.targets.tolist() == encode(TEXTS[0])[1:] + encode(TEXTS[1])[1:]


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_shares_are_those_that_were_asked_for(pieces: dict[str, str], unit: Any) -> None:
    """Of 2,000 rows: tokens that are predicted, what stands in their place, and words as a whole."""
    tokenizer = Tokenizer.load(pieces["wordpiece"])
    vocabulary = Vocabulary.of(tokenizer)
    text = " ".join(TEXTS * 2)
    ids = np.array([tokenizer.id("[CLS]"), *tokenizer.encode(text), tokenizer.id("[SEP]")])
    segments, mask = np.ones(len(ids)), tokenizer.id("[MASK]")
    eligible, number = ~vocabulary.special[ids], words_of(ids, np.ones(len(ids)), vocabulary)
    kinds: Counter[str] = Counter()
    drawn: Counter[int] = Counter()
    chosen = cut = 0
    for row in range(2000):
        rng = keyed_rng("test", row)
        piece = choose_text(eligible, number, segments, 0.2, unit, rng)
        found = corrupt(ids, piece, (0.7, 0.2, 0.1), mask, vocabulary, rng)
        at = piece >= 0
        assert not (at & ~eligible).any() and (found[~at] == ids[~at]).all()
        chosen += int(at.sum())
        for one in np.unique(piece[at]):
            own = piece == one
            kind = "mask" if (found[own] == mask).all() else "same" if (found[own] == ids[own]).all() else "other"
            kinds[kind] += 1
            drawn.update(found[own].tolist() if kind == "other" else [])
            if unit != "span":
                assert own.sum() == 1
        cut += sum(0 < at[number == one].sum() < (number == one).sum() for one in np.unique(number[at]))
    assert chosen / (2000 * eligible.sum()) == pytest.approx(0.2, abs=0.005)
    total = sum(kinds.values())
    # Of the tokens that are drawn some are the token itself, and then it looks as if it stayed.
    assert kinds["mask"] / total == pytest.approx(0.7, abs=0.02)
    assert kinds["other"] / total == pytest.approx(0.2, abs=0.02)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.02)
    assert {*drawn} == {*range(len(tokenizer))} - {*np.flatnonzero(vocabulary.special)}, "all but special ones"
    if unit == "token":
        assert cut > 1000
    elif unit == "word":
        assert cut == 0
    else:
        assert cut <= 2000, "the last span of a row may end inside a word"


def test_spans_are_as_long_as_published() -> None:
    """In words of one token, far apart enough: 3.8 on average, none over 10; and none reaches over what is not text."""
    assert SPANS @ np.arange(1, 11) == pytest.approx(3.8, abs=0.01)
    n = 4000
    eligible = np.arange(n) % 1000 > 0
    segments = np.arange(n) // 2000
    lengths: list[int] = []
    for row in range(40):
        piece = choose_text(eligible, np.arange(n), segments, 0.02, "span", keyed_rng("spans", row))
        for one in range(piece.max() + 1):
            places = np.flatnonzero(piece == one)
            assert (np.diff(places) == 1).all() and len({*segments[places]}) == 1
            lengths.append(len(places))
    assert max(lengths) == 10 and np.mean(lengths) == pytest.approx(3.8, abs=0.25)


def test_masks_are_of_the_row_alone(pieces: dict[str, str]) -> None:
    """However many rows and how much padding are beside it; another key, other masks."""
    for unit in ("token", "word", "span"):
        system, layout = build(section(pieces, masking={"unit": unit, "rate": 0.3}))
        both = rows(layout, documents(layout), documents(layout)[::-1])
        masked = system.masked(both)
        length = both.input_ids.shape[1]
        one = rows(layout, documents(layout), padding=20)
        alone = system.masked(one)
        assert alone.places.tolist() == masked.places[masked.places < length].tolist()
        assert alone.ids[0, :length].tolist() == masked.ids[0].tolist()
        again = system.masked(replace(one, draws=one.draws + 1))
        assert again.places.tolist() != alone.places.tolist()


def test_packed_is_unpacked_given_the_masks(pieces: dict[str, str]) -> None:
    system, layout = build(section(pieces, masking={"rate": 0.4}))
    batch = rows(layout, documents(layout))
    masked = system.masked(batch)
    together = system.token_losses(batch, masked)
    apart = []
    for number, segment in enumerate(documents(layout), 1):
        own = np.flatnonzero(batch.segment_ids[0] == number)
        start = own[0]
        mine = np.isin(masked.places, own)
        alone = rows(layout, [segment], padding=0)
        part = replace(masked, places=masked.places[mine] - start, targets=masked.targets[mine], ids=masked.ids[:, own])
        apart.append(system.token_losses(alone, part))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_labels_that_the_model_draws_are_as_likely_as_it_says(pieces: dict[str, str]) -> None:
    """For optimizers that ask for them: the mean loss over draws is the entropy of what the model says."""
    system, layout = build(section(pieces, masking={"rate": 0.4}))
    system.eval()
    batch = rows(layout, documents(layout), documents(layout)[1:])
    masked = system.masked(batch)
    ids, places = torch.from_numpy(masked.ids), torch.from_numpy(masked.places)
    with torch.no_grad():
        logs = encoder.run(system.language, ids, batch.segment_ids, batch.position_ids, places).log_softmax(-1)
        entropy = float(-(logs.exp() * logs).sum())
        drawn = [
            float(
                system.drawn_losses(batch, [torch.Generator().manual_seed(2 * n + row) for row in range(2)])["masked"]
            )
            for n in range(100)
        ]
    assert system.drawn == ("masked",)
    assert np.mean(drawn) == pytest.approx(entropy, abs=4 * np.std(drawn) / 10)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_exported_model_is_the_same_model_and_is_read_by_name(
    pieces: dict[str, str], kind: str, tmp_path: Path
) -> None:
    system, layout = build(section(pieces, kind))
    system.eval()
    write(system.language, layout, tmp_path / "out", "[MASK]")
    model: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == layout.pad
    batch = rows(layout, documents(layout, TEXTS[:1]), padding=0)
    places = torch.arange(batch.input_ids.numel())
    with torch.no_grad():
        ours = encoder.run(system.language, batch.input_ids, batch.segment_ids, batch.position_ids, places)
        torch.testing.assert_close(model(input_ids=batch.input_ids).logits[0], ours, rtol=1e-4, atol=1e-4)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXTS[0])["input_ids"] == batch.input_ids[0].tolist()
    assert (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token) == ("[MASK]", "[CLS]", "[SEP]")

    named = MaskedLMConfig.model_validate({"language": {"name": str(tmp_path / "out")}}).build()
    for name, tensor in system.state_dict().items():
        assert torch.equal(named.state_dict()[name], tensor), name
    added = {"name": str(tmp_path / "out"), "added_tokens": ["<new>"]}
    with pytest.raises(ConfigError, match="new_rows"):
        MaskedLMConfig.model_validate({"language": added}).build()
    grown = MaskedLMConfig.model_validate({"language": {**added, "new_rows": "mean"}}).build()
    assert grown.language.get_input_embeddings().num_embeddings == len(layout.tokenizer) + 1


def test_settings_that_do_not_fit() -> None:
    language = {"tokenizer": "builtin:emoji", "config": {"model_type": "bert"}}
    for values, expected in (
        ({"language": language, "masking": {"corruption": [0.8, 0.1, 0.2]}}, "sum to 1"),
        ({"language": {**language, "name": "bert"}}, "either `name`"),
        ({"language": {"config": {"model_type": "bert"}}}, "`tokenizer` beside it"),
    ):
        with pytest.raises(ValueError, match=expected):
            MaskedLMConfig.model_validate(values)


def test_the_shipped_curriculum_is_that_of_bioptimus() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/text_lm/masked.yaml")
    found = [
        (run.model.masking.unit, run.model.masking.rate, run.model.masking.corruption) for run in config.stage_runs()
    ]
    full, none = (0.8, 0.1, 0.1), (1, 0, 0)
    assert found == [("token", 0.15, full), ("word", 0.15, full), ("word", 0.2, full), ("word", 0.2, none)]
