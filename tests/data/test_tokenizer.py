"""Tokenizers are found or refused in one line, and known by what they do rather than by name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from mm.data import builtin
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError

FILE = builtin.folder("emoji") / "tokenizer" / "tokenizer.json"


def test_fingerprint_is_of_the_rules_and_not_of_the_name(tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    shipped = Tokenizer.load("builtin:emoji")
    assert Tokenizer.load(str(tmp_path)).fingerprint() == shipped.fingerprint()
    rules = json.loads(FILE.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules, indent=3))
    assert Tokenizer.load(str(tmp_path)).fingerprint() == shipped.fingerprint()
    rules["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    assert Tokenizer.load(str(tmp_path)).fingerprint() != shipped.fingerprint()


def test_added_tokens_come_after_the_vocabulary() -> None:
    plain = Tokenizer.load("builtin:emoji")
    more = Tokenizer.load("builtin:emoji", added=("<s>", "<image>", "<|im_end|>"))
    assert len(more) == len(plain) + 1 and more.id("<image>") == len(plain) and more.id("<s>") == plain.id("<s>")
    assert len(plain) not in more.encode("<image>"), "text does not spell it"


@pytest.mark.parametrize("text", ["a cat", "  two  spaces ", "зонт под дождем", "傘と雨", "☔🇳🇱", "a\tb\nc", "café́"])
def test_decoding_gives_the_text_again(text: str) -> None:
    tokenizer = Tokenizer.load("builtin:emoji")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe", FILE.read_bytes()[:5000]])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="damaged or of another version") as caught:
        Tokenizer.load(str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(DataError, match="no shipped data set is called 'nothing'"):
        Tokenizer.load("builtin:nothing")
    words = r"no token '<image>'; add it to model\.language\.added_tokens, or, .* model\.template\.bos, eos, pad or aro"
    with pytest.raises(DataError, match=words):
        Tokenizer.load("builtin:emoji").id("<image>")


def test_labels_are_one_token_each_and_no_text() -> None:
    labels = Tokenizer.of_labels(["alto saxophone", "piano", "C♯ minor"])
    assert [labels.id(name) for name in ("<pad>", "alto saxophone", "piano", "C♯ minor")] == [0, 1, 2, 3]
    assert len(labels) == 4 and labels.token(3) == "C♯ minor"
    assert labels.fingerprint() != Tokenizer.of_labels(["piano"]).fingerprint()
    with pytest.raises(DataError, match="takes no text, found 'piano'"):
        labels.encode("piano")
    with pytest.raises(DataError, match="no label 'harp' among the 3"):
        labels.id("harp")


def test_a_model_without_text_has_a_tokenizer_of_padding() -> None:
    none = Tokenizer.load("builtin:none")
    assert len(none) == 1 and none.id("<pad>") == 0
    with pytest.raises(DataError, match="takes no text"):
        none.encode_placed("a")
    copy = pickle.loads(pickle.dumps(none))
    assert copy.fingerprint() == none.fingerprint()
