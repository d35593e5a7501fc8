"""Tokenizers are trained and extended by rules that a few lines repeat; nothing old changes, and text comes back."""

import gzip
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from mm.cli import main
from mm.config import load_config
from mm.data import builtin
from mm.data.builtin.train_tokenizer import train_texts
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.data.tokenizer import Tokenizer
from mm.data.train_tokenizer import (
    LEAST,
    SPECIAL,
    Kind,
    compression,
    merged,
    merges_of,
    text_sources,
    texts_in,
    texts_of,
    train,
    with_merges,
    with_words,
)  # fmt: skip
from mm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
TEXTS = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")]
HARD = "In 1987 it DIDN'T rain, naïve e\u0301;\r\n\n\t  x = 3.25e+10  # 傘 🙂\n"


def of(trained: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(trained.to_str()), "trained")


def test_the_shipped_tokenizer_comes_out_again() -> None:
    folder = builtin.folder("emoji")
    trained = train(train_texts(folder), 4096)
    shipped = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    assert json.loads(trained.to_str()) == shipped


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_comes_back_and_special_tokens_are_first(kind: Kind) -> None:
    trained = of(train(TEXTS, 500, ("<pad>", "<s>"), kind))
    assert len(trained) <= 500 and (trained.id("<pad>"), trained.id("<s>")) == (0, 1)
    assert len(trained.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())
    for text in (HARD, "<s> is text", *TEXTS):
        assert trained.decode(trained.encode(text)) == text and not {0, 1} & set(trained.encode(text))
    if kind == "bpe":
        assert of(train(TEXTS, 500, ("<pad>", "<s>"), kind)).fingerprint() == trained.fingerprint()


def test_a_vocabulary_is_filled_up_to_a_multiple() -> None:
    trained = of(train(["one two " * 9], 300, multiple=64))
    assert len(trained) == 320 and trained.decode(trained.encode("one two")) == "one two"
    filled = trained.id("<|reserved_0|>")
    assert [trained.token(id) for id in range(filled, 320)] == [f"<|reserved_{n}|>" for n in range(320 - filled)]
    assert len(of(train(TEXTS, 449, multiple=64))) == 512
    with pytest.raises(DataError, match="the bytes and the special tokens alone are 261"):
        train(TEXTS, 260)


def test_texts_of_files_and_what_they_compress_to(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("naïve")
    rows = [{"text": "one"}, {"text": "two words"}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = list(texts_of([str(tmp_path / "*.md"), str(tmp_path / "b.jsonl.gz")]))
    assert found == [(".md", "naïve"), (".jsonl.gz", "one"), (".jsonl.gz", "two words")]
    trained = train(["one"], 261)
    about = compression(trained, found)
    assert about[".md"] == {"characters": 5, "tokens": 6, "characters_per_token": 0.833, "bytes_per_token": 1}
    assert about[".jsonl.gz"]["characters"] == 12 == about[".jsonl.gz"]["tokens"]
    assert compression(trained, found, most=3)[".jsonl.gz"]["characters"] == 3


def by_hand(words: list[tuple[list[str], int]], known: set[str], count: int) -> list[tuple[str, str]]:
    """Counting all pairs anew before every merge."""
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter[tuple[str, str]]()
        for pieces, times in words:
            for pair in pairwise(pieces):
                pairs[pair] += times
        usable = [(-number, pair) for pair, number in pairs.items() if number >= LEAST and "".join(pair) not in known]
        if not usable:
            break
        _, pair = min(usable)
        merges.append(pair)
        known = known | {"".join(pair)}
        words = [(merged(pieces, pair), times) for pieces, times in words]
    return merges


def test_merges_go_on_as_counting_by_hand_says() -> None:
    rng = random.Random(0)
    words = [([*rng.choices("abc", k=rng.randint(1, 9))], rng.randint(1, 5)) for _ in range(60)]
    known = {"ab", "ca", "bcc", *"abc"}
    expected = by_hand(words, known, 200)
    assert 20 < len(expected) < 200 and merges_of(words, known, 200) == expected
    assert merges_of(words, known, 7) == expected[:7]
    assert merges_of([], known, 7) == [] and merges_of([(["a", "a", "a", "a"], 2)], [], 1) == [("a", "a")]


def test_learned_tokens_come_behind_and_old_ones_stay(tmp_path: Path) -> None:
    old = of(train(TEXTS[1:], 400))
    old = Tokenizer(tokenizers.Tokenizer.from_str(old.to_json()), "old")
    domain = ["glomerulonephritis and pyelonephritis, nephritis; naïve 傘" * 3, "the nephron " * 5]
    new = Tokenizer(tokenizers.Tokenizer.from_str(with_merges(old.to_json(), domain, 30)), "new")
    assert len(old) + 20 < len(new) <= len(old) + 30
    assert [new.id(old._backend.id_to_token(n)) for n in range(len(old))] == [*range(len(old))]
    for text in (*domain, HARD, *TEXTS, "<|im_end|>"):
        assert new.decode(new.encode(text)) == text
        assert len(new.encode(text)) <= len(old.encode(text))
        # A new token stands for what the old ones do in its place: old merges are done before.
        pieces = [piece for id in new.encode(text) for piece in spelt(old, new, id)]
        assert pieces == old.encode(text)
    assert len(new.encode(domain[0])) < 0.6 * len(old.encode(domain[0]))
    assert len(new) == 1 + max(max(new.encode(text)) for text in domain)
    assert new.id("<|im_end|>") == old.id("<|im_end|>") not in new.encode("<|im_end|>")


def spelt(old: Tokenizer, new: Tokenizer, id: int) -> list[int]:
    """A new token taken apart by its merges."""
    if id < len(old):
        return [id]
    merges = {"".join(pair): pair for pair in json.loads(new.to_json())["model"]["merges"]}
    one, other = (new.id(part) for part in merges[new._backend.id_to_token(id)])
    return [*spelt(old, new, one), *spelt(old, new, other)]


def test_learning_passes_special_tokens_outside_the_vocabulary_by() -> None:
    backend = train(TEXTS[1:], 300)
    backend.add_special_tokens(["<image>"])  # behind the vocabulary, as Qwen has its own
    old = of(backend)
    new = Tokenizer(tokenizers.Tokenizer.from_str(with_merges(old.to_json(), TEXTS[:1], 5)), "new")
    assert len(new) == len(old) + 5 and new.id("<image>") == old.id("<image>") == len(old) - 1
    assert new.id("<image>") not in new.encode("<image>") and new.decode(new.encode(TEXTS[0])) == TEXTS[0]
    kinds = json.loads(new.to_json())["model"]["vocab"]
    assert sorted(kinds.values()) == [*range(len(new))]


def test_words_are_tokens_where_they_stand_alone() -> None:
    old = of(train(TEXTS, 400))
    new = Tokenizer(
        tokenizers.Tokenizer.from_str(with_words(old.to_json(), ["nephron", "nephron", "glomerulus", "a"])), "new"
    )
    assert len(new) == len(old) + 2
    text = "A nephron, two nephrons. (glomerulus)"
    assert new.decode(new.encode(text)) == text
    assert [id for id in new.encode(text) if id >= len(old)] == [new.id("nephron"), new.id("glomerulus")]
    assert new.encode(TEXTS[0]) == old.encode(TEXTS[0])


def test_what_cannot_learn_is_said() -> None:
    unigram = train(TEXTS[1:], 300, kind="unigram").to_str()
    with pytest.raises(DataError, match="this tokenizer is Unigram"):
        with_merges(unigram, TEXTS, 3)
    state = json.loads(train(TEXTS[1:], 300).to_str())
    for change, words in (({"byte_fallback": True}, "BPE, byte_fallback"), ({}, "does not split texts into words")):
        changed = {**state, "model": {**state["model"], **change}, "pre_tokenizer": None}
        with pytest.raises(DataError, match=words):
            with_merges(json.dumps(changed), TEXTS, 3)


def test_what_a_run_is_trained_on_is_what_its_tokenizer_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`part` and `only` as packing has them, every source of every stage once; never what is held out."""
    rows = [{"text": f"text {n} " * 9, "language": "en" if n % 3 else "de"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "more.md").write_text("more")

    def source(path: str, **more: Any) -> dict[str, Any]:
        return {"kind": "text", "name": "a", "path": f"{{root}}/{path}", **more}

    train, later = source("rows.jsonl", only={"language": "en"}, part=[0, 0.5]), source("more.md", name="b")
    values = {
        "out": str(tmp_path / "run"),
        "data": {
            "root": str(tmp_path), "cache": str(tmp_path / "cache"), "sources": [train], "context_length": 128,
            "workers": 0, "validation": [source("rows.jsonl", only={"language": "en"}, part=[0.5, 1])],
        },
        "model": {"kind": "layout", "tokenizer": "builtin:emoji"},
        "train": {"max_steps": 1},
        "stages": [{"name": "first"}, {"name": "second", "data": {"sources": [train, later]}}],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    config = load_config(path)
    seen = [text for _, text in texts_in(text_sources(run.data for run in config.stage_runs()))]
    packed = PackedDataset(pack_split(config.data, "train", config.model.layout(), 0))
    ids = {int(one.id.split("/")[2]) for number in range(len(packed)) for one in packed.read(number).segments}
    assert seen == [rows[n]["text"] for n in sorted(ids)] + ["more"] and 10 < len(ids) < 30
    command = ["tokenizer", "train", str(path), "--vocab-size", "300", "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["compression"]
    assert found[".jsonl"]["characters"] == sum(map(len, seen[:-1])) and found[".md"]["characters"] == 4
    for wrong, words in (([], "give either"), ([str(path), "--files", str(path)], "give either")):
        assert main(["tokenizer", "train", *wrong, "--vocab-size", "300", "--out", str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no source of kind text"):
        text_sources([])


def test_from_the_command_line_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokenizer"
    command = ["tokenizer", "train", "--files", str(ROOT / "README.md"), str(ROOT / "CONTRIBUTING.md"), "--out"]
    assert main([*command, str(out), "--vocab-size", "512", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    characters = sum(map(len, TEXTS))
    assert result["entries"] == 512 and result["compression"][".md"]["characters"] == characters
    ours, theirs = Tokenizer.load(str(out)), AutoTokenizer.from_pretrained(out)
    assert result["compression"][".md"]["tokens"] == sum(len(ours.encode(text)) for text in TEXTS)
    assert theirs(HARD)["input_ids"] == ours.encode(HARD)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "<|im_end|>", "<|endoftext|>")
    assert theirs.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    assert main([*command, str(out), "--vocab-size", "512"]) == 2
    assert "is there already" in capsys.readouterr().err
