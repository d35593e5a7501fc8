"""The levelled grammar: exact inference against every derivation written out; the corpus says what was drawn."""

import doctest
import gzip
import json
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.cli import main
from mm.data.chat import is_chat
from mm.data.corpora import pcfg
from mm.data.corpora.build import build_corpus
from mm.data.corpora.grammar import NOTHING, OTHER, Grammar, Rule, losses, posterior, predicted, targets_of
from mm.data.layout import Layout, Template
from mm.data.limits import Limits
from mm.data.sample import keyed_rng
from mm.data.sources import TextConfig
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import make_segment
from mm.errors import ConfigError, DataError

Strings = dict[tuple[int, ...], float]


def all_strings(grammar: Grammar, latents: tuple[int, ...], level: int = 0, symbol: int = 0) -> Strings:
    """Every string that a symbol becomes, with its probability: all derivations, one by one."""
    if level == grammar.depth:
        return {(symbol,): 1.0}
    found: Strings = {}
    for rule in grammar.tables[level][latents[level]][symbol]:
        for parts in product(*(all_strings(grammar, latents, level + 1, child).items() for child in rule.symbols)):
            whole = sum((string for string, _ in parts), ())
            likely = rule.probability * float(np.prod([probability for _, probability in parts]))
            found[whole] = found.get(whole, 0) + likely
    return found


def array_of(strings: list[tuple[int, ...]]) -> np.ndarray:
    found = np.full((len(strings), max(map(len, strings))), NOTHING)
    for row, string in zip(found, strings, strict=True):
        row[: len(string)] = string
    return found


def drawn(grammar: Grammar, count: int, key: object = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents (strings, latents)."""
    rng = keyed_rng("documents", key)
    latents = rng.integers(2, size=(count, grammar.depth))
    return array_of([tuple(grammar.write(one, rng)) for one in latents.tolist()]), latents


@pytest.fixture(scope="module", params=[(1, 3, 4, 0), (2, 2, 2, 1), (2, 3, 3, 2)], ids=str)
def tiny_grammar(request: pytest.FixtureRequest) -> tuple[Grammar, list[Strings]]:
    """A grammar, and for each set of latents all its strings."""
    grammar = Grammar.draw(*request.param)
    return grammar, [all_strings(grammar, tuple(latents)) for latents in grammar.latents.tolist()]


def test_next_tokens_are_those_of_all_strings_written_out(tiny_grammar: tuple[Grammar, list[Strings]]) -> None:
    grammar, known = tiny_grammar
    some = sorted(set().union(*known))
    strings = [*some[:: max(1, len(some) // 60)], (0,), (grammar.symbols - 1,) * grammar.longest, some[-1][:-1]]
    joint = grammar.next_tokens(array_of(strings))
    for string, of_string in zip(strings, joint.swapaxes(0, 1), strict=True):
        for j, of_latents in enumerate(known):
            expected = np.zeros((len(string) + 1, grammar.symbols + 1))
            for whole, probability in of_latents.items():
                for n in range(len(string) + 1):
                    if whole[:n] == string[:n] and len(whole) >= n:
                        expected[n, whole[n] if len(whole) > n else -1] += probability
            np.testing.assert_allclose(of_string[j, : len(string) + 1], expected, rtol=1e-12, atol=1e-15)
    past = np.arange(joint.shape[2]) > np.array([len(string) for string in strings])[:, None]
    assert not joint[:, past].any()


def test_all_strings_together_have_probability_one(tiny_grammar: tuple[Grammar, list[Strings]]) -> None:
    grammar, known = tiny_grammar
    strings = sorted(set().union(*known))
    array = array_of(strings)
    ends = grammar.next_tokens(array)[:, np.arange(len(array)), [len(string) for string in strings], -1]
    np.testing.assert_allclose(ends.sum(1), 1, rtol=1e-12)
    expected = [[string in of_latents for string in strings] for of_latents in known]
    assert (grammar.members(array) == expected).all()
    np.testing.assert_allclose(grammar.next_tokens(array[:, :0]).sum(-1), 1)  # the empty prefix


def test_all_strings_of_three_levels_too() -> None:
    grammar = Grammar.draw(3, 2, 2, 1)
    known = all_strings(grammar, (0, 1, 1))
    strings = sorted(known)[:: max(1, len(known) // 500)]
    assert sum(known.values()) == pytest.approx(1)
    ends = grammar.next_tokens(array_of(strings))[3, np.arange(len(strings)), [len(string) for string in strings], -1]
    np.testing.assert_allclose(ends, [known[string] for string in strings], rtol=1e-11)


def test_the_posterior_is_that_of_bayes(tiny_grammar: tuple[Grammar, list[Strings]]) -> None:
    grammar, known = tiny_grammar
    strings, latents = drawn(grammar, 20)
    found = posterior(grammar.next_tokens(strings))
    for b, string in enumerate(strings.tolist()):
        for n in range(len(string) + 1 - string.count(NOTHING)):
            likely = [sum(p for whole, p in some.items() if [*whole[:n]] == string[:n]) for some in known]
            np.testing.assert_allclose(found[:, b, n], np.array(likely) / sum(likely), rtol=1e-11)
    allowed = grammar.allowed(latents, 1)
    assert (allowed.sum(0) == 2 ** (grammar.depth - 1)).all()
    assert all((grammar.latents[allowed[:, b]][:, 0] == latents[b, 0]).all() for b in range(20))


def test_the_next_token_is_a_ratio_of_prefixes_and_a_better_guess_the_more_is_known() -> None:
    grammar = Grammar.draw(3, 4, 2, 5)
    strings, latents = drawn(grammar, 3000)
    joint, targets = grammar.next_tokens(strings), targets_of(strings, grammar.symbols)
    real = targets != NOTHING
    means, marginals = [], np.bincount(targets[real], minlength=grammar.symbols + 1) / real.sum()
    for known in range(grammar.depth + 1):
        allowed = grammar.allowed(latents, known)
        guess = predicted(joint, allowed)
        np.testing.assert_allclose(guess.sum(-1)[real], 1)
        prefix = (joint.sum(-1) * allowed[:, :, None]).sum(0)
        taken = np.take_along_axis(guess, np.maximum(targets, 0)[..., None], -1)[..., 0]
        longer = real[:, 1:]  # behind a terminal there is a prefix that is one longer
        np.testing.assert_allclose(taken[:, :-1][longer], (prefix[:, 1:] / np.where(real, prefix, 1)[:, :-1])[longer])
        lost = losses(guess, targets)
        assert not lost[~real].any()
        means.append(lost.sum(1))
        if known == grammar.depth:
            # The entropy of what was drawn: the exact mean of -log p(next) at each place, and what was seen.
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = np.where(guess > 0, -guess * np.log(guess), 0).sum(-1)
            gap = lost.sum(1) - entropy.sum(1)
            assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))
    for worse, better in pairwise(means):
        gain = worse - better
        assert gain.mean() > -4 * gain.std() / np.sqrt(len(gain)) and worse.mean() > better.mean()
    unigram = -np.log(marginals)[targets[real]].mean()
    assert means[0].sum() / real.sum() < unigram - 0.05


def test_whatever_is_written_is_a_member_and_what_is_changed_mostly_not() -> None:
    grammar = Grammar.draw(3, 4, 2, 3)
    strings, latents = drawn(grammar, 400)
    own = grammar.allowed(latents, 3)
    members = grammar.members(strings)
    assert (members & own).any(0).all()
    short = strings.copy()
    short[np.arange(400), (strings != NOTHING).sum(1) - 1] = NOTHING
    strange = strings.copy()
    strange[:, 2] = OTHER
    twice = np.concatenate([np.where(strings == NOTHING, 0, strings), strings], axis=1)  # longer than any document
    assert not grammar.members(strange).any()
    assert not grammar.members(twice[:, : grammar.longest + 1]).any()
    rng = keyed_rng("changed")
    changed = strings.copy()
    place = (rng.random(400) * (strings != NOTHING).sum(1)).astype(int)
    changed[np.arange(400), place] = (changed[np.arange(400), place] + 1 + rng.integers(3, size=400)) % 4
    # Nothing is said of one string, but few neighbours of a document are documents of the same latents.
    for some in (short, changed):
        assert (grammar.members(some) & own).any(0).mean() < 0.4


def test_one_who_knows_the_grammar_goes_on_as_it_does(tiny_grammar: tuple[Grammar, list[Strings]]) -> None:
    grammar, known = tiny_grammar
    count = 4000
    latents = np.repeat(grammar.latents[-1:], count, 0)
    written = grammar.go_on(np.zeros((count, 0), dtype=int), latents, grammar.depth, keyed_rng("on"))
    seen = Counter(tuple(token for token in row if token != NOTHING) for row in written.tolist())
    assert set(seen) <= set(known[-1])
    total = sum((seen[string] / count - p) ** 2 / (p * (1 - p) / count + 1e-9) for string, p in known[-1].items())
    assert total < len(known[-1]) + 6 * np.sqrt(2 * len(known[-1])) + 30  # a chi-square, rare strings in its tail
    begun, _ = drawn(grammar, 50, "begun")
    free = grammar.go_on(begun[:, :2], latents[:50], 0, keyed_rng("free"))
    assert (free[:, :2] == begun[:, :2]).all() and grammar.members(free).any(0).all()


def test_rules_are_as_settings_say_and_depend_on_the_seed_alone() -> None:
    grammar = Grammar.draw(3, 4, 3, 7)
    assert grammar == Grammar.draw(3, 4, 3, 7) and grammar != Grammar.draw(3, 4, 3, 8)
    for level, choices in enumerate(grammar.tables):
        assert len(choices) == 2 and choices[0] != choices[1]
        for table in choices:
            assert len(table) == (4 if level else 1)
            sides = [rule.symbols for rules in table for rule in rules]
            assert len(set(sides)) == len(sides) and {*map(len, sides)} <= {2, 3}
            assert all(abs(sum(rule.probability for rule in rules) - 1) < 1e-12 and len(rules) == 3 for rules in table)
    full = Grammar.draw(2, 2, 6, 0).tables[1][0]  # as many as there are
    assert {rule.symbols for rules in full for rule in rules} == {
        *product((0, 1), repeat=2),
        *product((0, 1), repeat=3),
    }


def test_documents_come_as_often_as_they_should() -> None:
    grammar = Grammar(2, (((((Rule((0, 1), 0.25), Rule((1, 1, 0), 0.75)),),) * 2),))
    rng = keyed_rng("often")
    seen = Counter(tuple(grammar.write([0], rng)) for _ in range(4000))
    assert set(seen) == {(0, 1), (1, 1, 0)} and abs(seen[0, 1] / 4000 - 0.25) < 0.03


# The corpus

OPTIONS = {"count": 300, "depth": 2, "symbols": 3, "rules": 2, "seed": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pcfg") / "corpus"
    build_corpus("pcfg", folder, OPTIONS)
    return folder


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{split}-000000.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_the_folder_says_all_that_was_drawn(corpus: Path) -> None:
    about = json.loads((corpus / "corpus.json").read_text())
    assert {path.name for path in corpus.iterdir()} == {"corpus.json", *about["files"]}
    assert about["counts"]["train documents"] == 300 and about["counts"]["test documents"] == 15
    grammar = Grammar.read(corpus / "grammar.json")
    assert grammar == Grammar.draw(2, 3, 2, 4)
    assert json.loads((corpus / "grammar.json").read_text())["options"] == {**OPTIONS, "conditioned": 0.5}
    told = 0
    for split in ("train", "validation", "test"):
        rows = rows_of(corpus, split)
        strings, latents = pcfg.read_split(corpus, split)
        assert (grammar.members(strings) & grammar.allowed(latents, 2)).any(0).all()
        for row, string, j in zip(rows, strings.tolist(), latents.tolist(), strict=True):
            assert row["text"].split() == [pcfg.TERMINALS[token] for token in string if token != NOTHING]
            full = [f"j{level}={choice}" for level, choice in enumerate(j)] if row["conditioned"] else ["<mask>"] * 2
            assert row["metadata_0"].split() == ["<mask>"] * 2 and row["metadata_2"].split() == full
            assert row["metadata_1"].split() == [full[0], "<mask>"]
        told += sum(row["conditioned"] for row in rows)
    assert 120 < told < 210  # of 330


def test_the_same_settings_give_the_same_bytes_and_more_documents_the_same_ones(corpus: Path, tmp_path: Path) -> None:
    build_corpus("pcfg", tmp_path / "again", OPTIONS)
    for path in corpus.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    build_corpus("pcfg", tmp_path / "more", {**OPTIONS, "count": 400})
    assert rows_of(tmp_path / "more", "train")[:300] == rows_of(corpus, "train")
    assert rows_of(tmp_path / "more", "test")[:15] == rows_of(corpus, "test")


def test_loss_is_on_terminals_and_the_end_alone(corpus: Path) -> None:
    tokenizer = Tokenizer.load(str(corpus))
    layout = Layout(tokenizer, Template(None, pcfg.EOS), tokenizer.id(pcfg.PAD))
    source = TextConfig(path=str(corpus / "test-*.jsonl.gz"), prompt="{metadata_1}").build("")
    (path,) = source.shards()
    with source.open(path, Limits()) as shard:
        for group, row in zip(shard.groups(), rows_of(corpus, "test"), strict=True):
            (sample,) = source.samples(group, Limits())  # type: ignore[arg-type]
            assert not is_chat(sample.parts)  # type: ignore[arg-type]
            segment = make_segment(sample.parts, layout, "here", Limits())  # type: ignore[arg-type]
            words = [tokenizer.token(token) for token in segment.ids.tolist()]
            assert words == [*row["metadata_1"].split(), *row["text"].split(), pcfg.EOS]
            assert segment.loss == ((2, len(words)),)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--depth", "0"], "pcfg: depth is 0; expected 1 to 4"),
        (["--symbols", "27"], "pcfg: symbols is 27; expected 2 to 26"),
        (["--symbols", "2", "--rules", "7"], "pcfg: rules is 7; expected 1 to 6"),
        (["--conditioned", "1.5"], "pcfg: conditioned is 1.5; expected 0 to 1"),
        (["--count", "0"], "pcfg: count is 0"),
        (["--seconds", "5"], "pcfg: has no option 'seconds'"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "build", "pcfg", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert text in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_corpus_is_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"test-000000.jsonl.gz: no documents of a pcfg corpus \(FileNotFoundError"):
        pcfg.read_split(tmp_path, "test")
    with pytest.raises(DataError, match=r"grammar.json: not the grammar"):
        Grammar.read(tmp_path / "grammar.json")
    values = json.loads((corpus / "grammar.json").read_text())
    (tmp_path / "grammar.json").write_text(json.dumps({**values, "format": 0}))
    with pytest.raises(DataError, match=r"format 0, expected 1"):
        Grammar.read(tmp_path / "grammar.json")
    with pytest.raises(ConfigError, match="no such corpus"):
        build_corpus("pcgf", tmp_path / "x")


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(pcfg).attempted and not doctest.testmod(pcfg).failed
