"""What outputs mean: tables of examples, and VQA accuracy against leaving every answer out by hand."""

import random

import pytest

from mm.evals.parsing import (
    agreement,
    free_match,
    literal_list,
    normalised,
    number,
    parse_letter,
    parse_typed,
    parse_yes_no,
    typed_match,
)

ANIMALS = ["a red fox", "the owl", "fox", "a bear"]


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        (" b.", "B"),
        ("(C)", "C"),
        ("(d) a bear", "D"),
        ("**B**", "B"),
        ("B: the owl", "B"),
        ("A, because", "A"),
        ("A\nB", "A"),
        ("A a red fox", "A"),
        ("C fox", "C"),
        ("A cat sits there", None),
        ("The answer is (B).", "B"),
        ("I first thought of option C. But the answer is D", "D"),
        ("the correct choice: B", "B"),
        ("the answer is a bear", "D"),
        ("So (B) fits best", "B"),
        ("Either (B) or (C)", None),
        ("the owl.", "B"),
        ("It is the owl!", "B"),
        ("I see a red fox here", "A"),  # `fox` lies within it
        ("foxes", None),
        ("a bear and the owl", None),
        ("E", None),
        ("Because", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(output: str, letter: str | None) -> None:
    assert parse_letter(output, ANIMALS) == letter


def test_options_that_are_alike_are_not_told_apart_by_text() -> None:
    assert parse_letter("yes", ["yes", "yes"]) is None
    assert parse_letter("B", ["yes", "yes"]) == "B"
    assert parse_letter("C", ["yes", "no"]) is None
    nine = [f"word {n}" for n in "abcdefghi"]
    assert parse_letter("I think so", nine) is None and parse_letter("I", nine) == "I"
    assert parse_letter("I'm not sure", nine) is None and parse_letter("'I' it is", nine) == "I"


@pytest.mark.parametrize(
    ("output", "said"),
    [("Yes", "yes"), ("no, there is not", "no"), ("There is no dog: yes", "no"), ("nothing", None), ("", None)],
)
def test_yes_and_no(output: str, said: str | None) -> None:
    assert parse_yes_no(output) == said


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("zero", "0"),
        ("dont walk", "don't walk"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("St. John's", "st john 's"),
        ("3.14", "3.14"),
        ("3,000", "3000"),
        ("left-hand side", "left hand side"),
        ("yes / no", "yes no"),
        ("5:30 p.m.", "5:30 pm"),
        ("  a\tbig\ncat ", "big cat"),
        ("$5", "$5"),
    ],
)
def test_answers_are_normalised_as_evalai_does(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_agreement_equals_leaving_each_answer_out() -> None:
    rng = random.Random(0)
    for _ in range(300):
        answers = [rng.choice("abcd") for _ in range(rng.randint(2, 12))]
        for said in "abcde":
            single = []
            for left_out in range(len(answers)):
                others = answers[:left_out] + answers[left_out + 1 :]
                single.append(min(1.0, sum(other == said for other in others) / 3))
            assert agreement(said, answers) == pytest.approx(sum(single) / len(single), abs=1e-12)
    assert agreement("x", ["x"] * 3 + ["y"] * 7) == pytest.approx(0.9)
    assert agreement("x", ["x"]) == 1.0


@pytest.mark.parametrize(
    ("output", "answers", "right"),
    [
        ("7", ["7"], True),
        ("The result is 7.0", ["7"], True),
        ("x = 3\ny = 7", ["7"], True),
        ("it is 70", ["7"], False),
        ("1,234", ["1234"], True),
        ("about seven dogs", ["7", "seven"], True),
        ("B cells", ["b"], True),  # a single letter needs a space beside it
        ("abc", ["b"], False),
        ("", ["7"], False),
    ],
)
def test_free_answers_by_the_rules_of_mmmu(output: str, answers: list[str], right: bool) -> None:
    assert free_match(output, answers) is right


@pytest.mark.parametrize(
    ("output", "kind", "precision", "parsed", "answer", "right"),
    [
        ("14", "integer", 0, "14", "14", True),
        ("The number missing in the sequence is 14.", "integer", 0, "14", "14", True),
        ("2 + 12 = 14 apples", "integer", 0, "14", "14", True),
        ("fourteen", "integer", 0, None, "14", False),
        ("$1.45", "float", 2, "1.45", "1.45", True),
        ("1.4499", "float", 2, "1.45", "1.45", True),
        ("-0.5 or so", "float", 1, "-0.5", "0.5", False),
        ("2", "float", 1, "2.0", "2.0", True),
        ("1,200", "integer", 0, "1200", "1200", True),
        ("between [2007, 2008]", "list", 0, "[2007.0, 2008.0]", "[2007, 2008]", True),
        ("from 2007 to 2008", "list", 0, "[2007.0, 2008.0]", "[2007, 2008]", True),
        ("[2007]", "list", 0, "[2007.0]", "[2007, 2008]", False),
        ("Tokyo.", "text", 0, "tokyo", "Tokyo", True),
    ],
)
def test_typed_answers(output: str, kind: str, precision: int, parsed: str | None, answer: str, right: bool) -> None:
    found = parse_typed(output, kind, precision)
    assert found == parsed
    assert found is None or typed_match(found, answer, kind, precision) is right


def test_only_literals_are_read() -> None:
    assert literal_list("['a', \"it's\", 3]") == ["a", "it's", "3"]
    for text in ("__import__('os').getcwd()", "('a', 'b')", "[", "[a]", "{}", "[" * 5000):
        with pytest.raises(ValueError, match="not a list"):
            literal_list(text)
    assert number("nan") is None and number("1e400") is None and number("1,234.5") == 1234.5
