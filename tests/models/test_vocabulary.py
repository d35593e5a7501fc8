"""Rows for new tokens begin as they should, and every row that was there is the same, bit for bit."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm.cli import main
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError, DataError
from mm.models import attention, backbone
from mm.models.config import LanguageConfig
from mm.models.released.transformers import write
from mm.models.systems.masked_lm import encoder
from mm.models.systems.masked_lm.config import EncoderConfig
from mm.models.systems.text_lm.config import TextLMConfig
from mm.models.vocabulary import Init, add_rows, contextual, extend, pieces_of

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2,
}  # fmt: skip
INITS: tuple[Init, ...] = ("mean", "normal", "subtokens", "contextual")
DOMAIN = (
    "The glomerulus filters. A nephron has one glomerulus!\nNephrons and the glomerulus; a glomerulus: nephritis.\n"
)


def make(kind: str, **values: Any) -> Any:
    torch.manual_seed(0)
    return backbone.from_config({"model_type": kind, "vocab_size": 50, **SMALL, **values}, attention.register()).eval()


def tables(model: Any) -> list[Tensor]:
    return [part.weight.detach().clone() for part in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["mean", "normal", "subtokens"])
def test_added_rows_and_nothing_else_changes(init: Init, tied: bool) -> None:
    model = make("gpt_neox", tie_word_embeddings=tied)
    embeddings, ids = torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.int32)
    where = (embeddings, ids, torch.arange(6)[None], torch.arange(6), True)
    weights, logits = tables(model), backbone.run(model, *where)
    pieces = [[3, 4, 4], [7], [], *([1, 2] for _ in range(3997))]
    add_rows(model, 4050, init, pieces)
    torch.testing.assert_close(backbone.run(model, *where)[:, :50], logits)
    grown = tables(model)
    assert model.get_input_embeddings().weight.shape == (4050, 32) and model.config.vocab_size == 4050
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for before, after in zip(weights, grown, strict=True):
        assert torch.equal(after[:50], before)
        new, mean = after[50:], before.mean(0)
        if init == "mean":
            torch.testing.assert_close(new, mean.expand_as(new))
        elif init == "subtokens":
            expected = [(before[3] + 2 * before[4]) / 3, before[7], mean, (before[1] + before[2]) / 2]
            torch.testing.assert_close(new[:4], torch.stack(expected))
        else:
            spread = float(before.std())
            torch.testing.assert_close(new.mean(0), mean, rtol=0, atol=5 * spread / 4000**0.5)
            torch.testing.assert_close(
                new.T.cov(correction=0), before.T.cov(correction=0), rtol=0, atol=0.1 * spread**2
            )


@pytest.mark.parametrize("init", INITS)
def test_spare_rows_stay_and_only_rows_that_fill_up_are_the_mean(init: Init) -> None:
    """40 tokens and 10 spare rows; three tokens are new, and with a multiple of 64 there are 14 rows more."""
    model = make("gpt_neox", tie_word_embeddings=False)
    weights = tables(model)
    add_rows(model, 64, init, [[1], [2], [3]], first=40, count=3, contexts=torch.ones(3, 32))
    for before, after in zip(weights, tables(model), strict=True):
        assert torch.equal(after[:40], before[:40]) and torch.equal(after[43:50], before[43:])
        torch.testing.assert_close(after[50:], before[:40].mean(0).expand(14, 32))
        assert not torch.isclose(after[40:43], before[40:43]).all(1).any()


def test_a_tokenizer_that_lacks_tokens_of_the_model_is_refused(tmp_path: Path) -> None:
    """An older one would never give the new tokens, another one would read old rows as others; more tokens may be."""
    folder = published(tmp_path, tied=True)
    (tmp_path / "words.txt").write_text("glomerulus\nnephron\n")
    extend(str(folder), tmp_path / "more", "mean", tmp_path / "words.txt")
    config = {"name": str(tmp_path / "more"), "tokenizer": str(folder)}
    with pytest.raises(ConfigError, match=r"2 of the \d,\d+ tokens of .*/more have no such id in it.*tokenizer=null"):
        TextLMConfig.model_validate({"language": config}).build()
    with pytest.raises(ConfigError, match="'glomerulus' for one"):
        encoder.load(EncoderConfig.model_validate(config), 4096, 0)
    config = {"name": str(folder), "tokenizer": str(tmp_path / "more"), "new_rows": "mean"}
    TextLMConfig.model_validate({"language": config}).build()


def test_what_transformers_draws_is_the_mean() -> None:
    """Its covariance is that of the rows times 1e-9: `mean` to four digits, where ours has the covariance itself."""
    model, theirs = make("llama", vocab_size=400), make("llama", vocab_size=400)
    assert torch.equal(tables(model)[0], tables(theirs)[0])
    theirs.resize_token_embeddings(500, mean_resizing=True)
    add_rows(model, 500, "mean")
    for ours, other in zip(tables(model), tables(theirs), strict=True):
        torch.testing.assert_close(other[400:], ours[400:], rtol=0, atol=1e-5)


def test_names_of_special_tokens_are_spelt_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    folder = published(tmp_path, tied=False)
    config = LanguageConfig(name=str(folder), added_tokens=("<picture>", "<|im_end|>", "<sound>"), new_rows="subtokens")
    old = Tokenizer.load(str(folder))
    before, model = tables(AutoModelForCausalLM.from_pretrained(folder)), backbone.load(config, len(old) + 2)
    for had, has in zip(before, tables(model), strict=True):
        assert torch.equal(has[: len(old)], had)
        expected = [had[old.encode(name)].mean(0) for name in ("<picture>", "<sound>")]
        torch.testing.assert_close(has[len(old) :], torch.stack(expected))


@pytest.mark.parametrize("spare", [1, 5])
def test_new_tokens_begin_on_spare_rows_too(spare: int, tmp_path: Path) -> None:
    folder = published(tmp_path, tied=False, spare=spare)
    old, before = Tokenizer.load(str(folder)), tables(AutoModelForCausalLM.from_pretrained(folder))
    assert before[0].shape[0] == len(old) + spare
    names = {"name": str(folder), "added_tokens": ("<picture>", "<sound>")}
    model = backbone.load(LanguageConfig.model_validate({**names, "new_rows": "subtokens"}), len(old) + 2)
    for had, has in zip(before, tables(model), strict=True):
        assert len(has) == len(old) + max(2, spare) and torch.equal(has[: len(old)], had[: len(old)])
        expected = [had[old.encode(name)].mean(0) for name in ("<picture>", "<sound>")]
        torch.testing.assert_close(has[len(old) : len(old) + 2], torch.stack(expected))
        assert torch.equal(has[len(old) + 2 :], had[len(old) + 2 :])
    if spare == 5:
        kept = backbone.load(LanguageConfig.model_validate(names), len(old) + 2)
        assert all(torch.equal(had, has) for had, has in zip(before, tables(kept), strict=True))


def published(folder: Path, tied: bool, kind: str = "llama", spare: int = 0) -> Path:
    """A folder as one finds it on the hub."""
    values = {"model_type": kind, **SMALL, "tie_word_embeddings": tied, "max_position_embeddings": 128}
    if spare:
        values["vocab_size"] = len(Tokenizer.load("builtin:emoji")) + spare
    config = TextLMConfig.model_validate({"language": {"tokenizer": "builtin:emoji", "config": values}})
    torch.manual_seed(0)
    language = config.build().language
    write(language, config.layout(), folder / "published")
    return folder / "published"


def test_contextual_rows_are_means_over_sentences(tmp_path: Path) -> None:
    folder = published(tmp_path, tied=True)
    old = Tokenizer.load(str(folder))
    new = Tokenizer.load(str(folder), added=())
    new._backend.add_tokens(["glomerulus", "nephron", "absent"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found, counts = contextual(model, old, new, len(old), [DOMAIN])
    assert counts == [4, 1, 0] and not found[2].any()
    sums = [torch.zeros(32), torch.zeros(32)]
    for sentence in ("The glomerulus filters.", "A nephron has one glomerulus!", DOMAIN.splitlines()[1]):
        ids = old.encode(sentence)
        starts = [len(old.decode(ids[:n])) for n in range(len(ids) + 1)]
        with torch.no_grad():
            states = model.model(torch.tensor([[old.id("<s>"), *ids]])).last_hidden_state[0, 1:]
        for number, word in enumerate(("glomerulus", "nephron")):
            at = sentence.find(word)
            while at >= 0:
                own = [n for n, (a, b) in enumerate(pairwise(starts)) if a < at + len(word) and b > at]
                sums[number] += states[own].mean(0)
                at = sentence.find(word, at + 1)
    torch.testing.assert_close(found[:2], torch.stack([sums[0] / 4, sums[1]]))


def test_contexts_are_no_longer_than_the_model(tmp_path: Path) -> None:
    folder = published(tmp_path, tied=True, kind="gpt2")
    old, new = Tokenizer.load(str(folder)), Tokenizer.load(str(folder), added=())
    new._backend.add_tokens(["glomerulus"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.max_position_embeddings == 128
    found, counts = contextual(model, old, new, len(old), ["A glomerulus " + "and one more " * 200])
    assert counts == [1] and found[0].any()


@pytest.mark.parametrize("tied", [True, False])
def test_extended_models_are_the_old_ones_with_more_rows(tied: bool, tmp_path: Path) -> None:
    folder = published(tmp_path, tied)
    (tmp_path / "domain.md").write_text(DOMAIN * 3)
    (tmp_path / "words.txt").write_text("glomerulus\n\nnephron\nabsent\n")
    old, before = Tokenizer.load(str(folder)), AutoModelForCausalLM.from_pretrained(folder).eval()
    known = tables(before)
    for init in INITS:
        out, domain = tmp_path / init, [str(tmp_path / "domain.md")]
        found = extend(str(folder), out, init, tmp_path / "words.txt", corpus=domain, multiple=64)
        rows = -(-(len(old) + 3) // 64) * 64
        assert found == {
            "tokens": 3, "found": 2 * (init == "contextual"), "first": len(old), "rows": rows, "note": None
        }  # fmt: skip
        new, model = Tokenizer.load(str(out)), AutoModelForCausalLM.from_pretrained(out).eval()
        assert len(new) == len(old) + 3 and model.config.vocab_size == rows
        pieces = pieces_of(old, new, range(len(old), len(new)))
        assert pieces == [old.encode(word) for word in ("glomerulus", "nephron", "absent")]
        for had, has in zip(known, tables(model), strict=True):
            assert torch.equal(has[: len(old)], had) and has.shape == (rows, 32)
            torch.testing.assert_close(has[len(new) :], had.mean(0).expand(rows - len(new), 32))
            by_pieces = torch.stack([had[ids].mean(0) for ids in pieces])
            ours = has[len(old) : len(new)]
            if init == "subtokens":
                torch.testing.assert_close(ours, by_pieces)
            elif init == "contextual":
                torch.testing.assert_close(ours[2], by_pieces[2])  # it does not occur
                torch.testing.assert_close(ours[:2].norm(dim=1), had.norm(dim=1).mean().expand(2))
                assert not torch.allclose(ours[:2], by_pieces[:2], atol=1e-2)
        ids = torch.tensor([old.encode("the same text as before")])
        torch.testing.assert_close(model(ids).logits[..., : len(old)], before(ids).logits)
        assert AutoTokenizer.from_pretrained(out)("a nephron")["input_ids"][-1] == len(old) + 1
        system = TextLMConfig.model_validate({"language": {"name": str(out)}}).build()
        assert torch.equal(tables(system.language)[0], tables(model)[0])


def test_learned_tokens_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = published(tmp_path, tied=True), tmp_path / "domain.md"
    text.write_text(DOMAIN * 3)
    command = ["tokenizer", "extend", str(folder), "--train-on", str(text), "--rows", "9", "--init", "contextual"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    old, new = Tokenizer.load(str(folder)), Tokenizer.load(str(tmp_path / "out"))
    assert found["tokens"] == 9 == len(new) - len(old) and 1 <= found["found"] <= 9
    assert len(new.encode(DOMAIN)) < len(old.encode(DOMAIN)) and new.decode(new.encode(DOMAIN)) == DOMAIN
    assert {path.name for path in tmp_path.iterdir() if "out" in path.name} == {"out"}
    for wrong, words in (
        (["--train-on", str(text)], "--rows"),
        (["--add", str(text), "--train-on", str(text), "--rows", "2"], "either"),
        (["--add", str(text), "--init", "contextual"], "--corpus"),
        (["--add", str(tmp_path / "no")], "no such file"),
    ):
        assert main(["tokenizer", "extend", str(folder), *wrong, "--out", str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists()
    (tmp_path / "old.txt").write_text("a\n")
    with pytest.raises(DataError, match="nothing in it"):
        extend(str(folder), tmp_path / "no", "mean", tmp_path / "old.txt")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_scaled_weights_write_less_to_the_residual(kind: str) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    shape = {"n_layer": 8, "n_embd": 64, "n_head": 4} if kind == "gpt2" else shape
    config = {"model_type": kind, **shape, "initializer_range": 0.1}

    def made(init: Any) -> Any:
        return backbone.load(LanguageConfig(tokenizer="builtin:emoji", config=config, init=init), 4096)

    torch.manual_seed(0)
    plain = dict(made("default").named_parameters())
    scaled = dict(made("scaled").named_parameters())
    writes = {n for n in scaled if n.endswith(".weight") and n.split(".")[-2] in backbone.WRITES}
    assert len(writes) == 16
    for name in scaled:
        if name in writes:
            assert float(scaled[name].detach().std()) == pytest.approx(0.1 / 16**0.5, rel=0.1), name
            assert float(plain[name].detach().std()) == pytest.approx(0.025 if kind == "gpt2" else 0.1, rel=0.1)
        elif scaled[name].ndim > 1:
            assert float(scaled[name].detach().std()) == pytest.approx(0.1, rel=0.1), name


def test_what_init_is_not_for_is_said() -> None:
    with pytest.raises(ValueError, match="`init` is for the random weights"):
        LanguageConfig(name="a", init="scaled")
    with pytest.raises(ValueError, match="needs a `name`"):
        LanguageConfig(tokenizer="a", config={"model_type": "llama"}, new_rows="subtokens")
    with pytest.raises(ConfigError, match="it is not known which matrices"):
        backbone.scale_residuals(make("opt", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64), "opt")
