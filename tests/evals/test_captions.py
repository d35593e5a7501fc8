"""CIDEr and BLEU against the numbers of COCO's evaluation code, and what must hold of them."""

import math
import random

import pytest

from mm.evals.captions import bleu, cider, words

CAPTIONS = [
    (
        "a man rides a red bike down the street",
        ["a man riding a bike on a street", "the man rides his red bike", "someone on a red bike in the street"],
    ),
    ("a dog and a cat sleep", ["two cats sleep on a sofa", "a cat sleeps next to a dog"]),
    ("people", ["a group of people stands around a table", "people at a table with food"]),
    ("a red red red bus", ["a red bus stops at the station"]),
    ("", ["an empty plate on a table", "a plate"]),
]
SAID = [words(one) for one, _ in CAPTIONS]
REFERENCES = [list(map(words, some)) for _, some in CAPTIONS]


def test_numbers_of_cocos_code() -> None:
    """By pycocoevalcap 1.2 on these captions. It adds 1e-9 where there are no matches, which BLEU-4 shows."""
    assert cider(SAID, REFERENCES) == pytest.approx(1.1361626709592172, rel=1e-9)
    assert list(bleu(SAID, REFERENCES).values()) == pytest.approx(
        [0.5530751040175224, 0.447266211025001, 0.21372379445399606, 2.790487661074755e-05], abs=1e-4
    )


def test_captions_that_are_the_references() -> None:
    rng = random.Random(0)
    said = [tuple(rng.choice("abcdefghijkl") for _ in range(rng.randint(6, 9))) for _ in range(20)]
    assert cider(said, [[one] for one in said]) == pytest.approx(10.0)
    assert list(bleu(said, [[one] for one in said]).values()) == pytest.approx([1.0] * 4)
    order = rng.sample(range(20), 20)
    shuffled = [said[n] for n in order], [[said[n]] for n in order]
    assert cider(*shuffled) == pytest.approx(10.0)
    assert cider(said[::-1], [[one] for one in said]) < 2.0


def test_length_is_held_against_a_caption() -> None:
    """One unigram in common, of weight log 2: what is left is the cosine and exp(-(difference)^2 / 72)."""
    one, two = ("x",), ("x", *"abcdef")
    weights = math.log(2) * math.sqrt(7)
    expected = 10 * math.log(2) ** 2 / (math.log(2) * weights) / 4 * math.exp(-36 / 72) / 2
    assert cider([one, ("nothing",)], [[two], [("else",)]]) == pytest.approx(expected)


def test_words() -> None:
    assert words("A man, who doesn't smile – he's the dog's friend!") == (
        *("a", "man", "who", "does", "n't", "smile", "he", "'s", "the", "dog", "'s", "friend"),
    )
    assert words("T-shirt no. 3.5 (red)…") == ("t-shirt", "no", "3.5", "red")
    assert words("猫の顔") == ("猫", "の", "顔") and words("can’t") == ("ca", "n't") and words("...") == ()
