"""What an output says, and whether that is right: pure functions of text.

Everything here is rules. Where a benchmark's own protocol asks a language model to read answers (MathVista, MMBench),
the rules stand in for it, and nothing is guessed: an output that gives no answer is wrong.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase

_OPEN, _CLOSE = r"[(\[\"'*]*", r"(?:[)\].,:;\"*]|'(?!\w))"


def parse_letter(output: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an output chooses, or None.

    The first of these that holds:

    1. it opens with a letter and punctuation, or is a letter alone: `B`, `b.`, `(B) a cat`, `B: a cat`, `**B**`;
    2. it opens with a letter and the text of that option, or with a letter that is no word (A, I) and a space;
    3. it says `answer is B`, `option B`, `choice: (B)`; the last time counts;
    4. one letter alone stands in brackets: `… so (B) fits`;
    5. it is the text of an option, or contains that of one alone (of two, one within the other, the longer).
    """
    letters = ascii_uppercase[: len(options)]
    text = output.strip()
    either = f"[{letters}{letters.lower()}]"
    if match := re.match(rf"{_OPEN}({either})(?:{_CLOSE}|\s*$|\s*\n)", text):
        return match[1].upper()
    if match := re.match(rf"([{letters}])\s+(.*)", text, re.DOTALL):
        option = options[letters.index(match[1])]
        if match[1] not in "AI" or plain(match[2]).startswith(plain(option)):
            return match[1]
    said = (
        rf"(?:answer|option|choice)(?:\s+(?:is|would be|should be))?\s*:?\s*{_OPEN}([{letters}])(?![\w'])(?!\s+[a-z])"
    )
    if found := re.findall(said, text, re.IGNORECASE):
        return str(found[-1]).upper()
    if len(bracketed := set(re.findall(rf"[(\[]([{letters}])[)\]]", text))) == 1:
        return str(bracketed.pop())
    return _by_text(plain(text), [plain(option) for option in options], letters)


def _by_text(output: str, options: Sequence[str], letters: str) -> str | None:
    if output in options:
        return letters[options.index(output)] if options.count(output) == 1 else None
    within = {option for option in options if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", output)}
    within = {one for one in within if not any(one != other and one in other for other in within)}
    if len(within) != 1 or options.count(option := within.pop()) != 1:
        return None
    return letters[options.index(option)]


def plain(text: str) -> str:
    """For comparing texts: lower case, single spaces, no punctuation at either end."""
    return " ".join(text.lower().split()).strip(" .,:;!?\"'`*()[]")


def parse_yes_no(output: str) -> str | None:
    """`yes` or `no`, whichever is said first."""
    match = re.search(r"\b(yes|no)\b", output.lower())
    return match[1] if match else None


_NUMBERS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(max(0, number - 1)) for number, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _ONE.split()}
for _word in _TWO.split():
    _first, _second = (m.start() for m in re.finditer("'", _word))
    _CONTRACTIONS |= {_word[:at] + _word[at + 1 :]: _word for at in (_first, _second)}
# As they stand in the published table, slips included.
_CONTRACTIONS |= {
    "somebody'd": "somebodyd", "y'allll": "y'all'll", "yall'd've": "y'all'd've", "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
}  # fmt: skip


def normalised(answer: str) -> str:
    """An answer as VQA metrics compare it: the EvalAI normalisation (facebookresearch/mmf, `EvalAIAnswerProcessor`).

    Lower case; punctuation and articles dropped; numbers up to ten as digits; apostrophes put back into contractions.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if alone else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_DIGITS.get(word, word) for word in cleaned.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def agreement(said: str, answers: Sequence[str]) -> float:
    """Agreement with the answers that people gave, all `normalised` (Antol et al., 1505.00468; TextVQA, 1904.08920).

    The mean over leaving each answer out of min(1, matches among the others / 3): of `total` answers of which `same`
    match, each of the matching ones leaves same - 1 others, each of the rest all of them.
    """
    same, total = answers.count(said), len(answers)
    if total == 1:
        return float(same)
    return (same * min(1.0, (same - 1) / 3) + (total - same) * min(1.0, same / 3)) / total


def most_common(answers: Sequence[str]) -> str:
    """The answer that most people gave; of several the first."""
    return Counter(answers).most_common(1)[0][0]


_THOUSANDS = r"-?\b\d{1,3}(?:,\d{3})+\b"
_SCIENTIFIC = r"-?\d+(?:\.\d+)?[eE][+-]?\d+"
_SIMPLE = r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def number(text: str) -> float | None:
    """A number as people write it (`1,234.5`), or None."""
    try:
        found = float(text.strip().replace(",", ""))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _comparable(text: str) -> list[str | float]:
    """A number to two decimals; other text in lower case, a single character with a space on either side."""
    text = text.strip()
    if (value := number(text)) is not None:
        return [round(value, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def free_answers(output: str) -> list[str | float]:
    """What a free answer may mean: the shortest end of each line behind a cue (`is`, `answer`, …; `=` in the last), or
    all of it, and the numbers in these (the rules of MMMU's `eval_utils.py`, `parse_open_response`)."""
    lines = output.strip().rstrip(".").lower().split("\n")
    ends = []
    for at, line in enumerate(lines):
        cues = (*_CUES, "=") if at == len(lines) - 1 else _CUES
        shortest = ""
        for cue in cues:
            if cue in line and (not shortest or len(line.rpartition(cue)[2].strip()) < len(shortest)):
                shortest = line.rpartition(cue)[2].strip()
        if shortest and shortest not in list(":,.!?;'"):
            ends.append(shortest)
    ends = ends or [output.strip().rstrip(".").lower()]
    for end in list(ends):
        for pattern in (_THOUSANDS, _SCIENTIFIC, _SIMPLE):
            ends += re.findall(pattern, end)
    return [value for end in ends for value in _comparable(end)]


def free_match(output: str, answers: Sequence[str]) -> bool:
    """Whether any meaning of a free answer is one of the right ones: numbers equal, texts contained (MMMU's
    `eval_open`)."""
    wanted = [value for answer in answers for value in _comparable(answer)]
    for said in free_answers(output):
        if isinstance(said, float):
            if said in wanted:
                return True
        elif any(isinstance(one, str) and one in said for one in wanted):
            return True
    return False


def parse_typed(output: str, kind: str, precision: int) -> str | None:
    """A free answer of MathVista by its `answer_type`: `integer`, `float` (rounded), `list`, else `text`.

    Of several numbers the last behind `is`, `=` or `:` counts, else the last.
    """
    text = output.strip()
    if kind == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        values = _numbers(lists[-1] if lists else text)
        return str(values) if values else None
    if kind not in ("integer", "float"):
        return plain(text) or None
    behind = re.split(r"\bis\b|=|:", text)[-1]
    values = _numbers(behind) or _numbers(text)
    if not values:
        return None
    return str(int(values[-1])) if kind == "integer" else str(round(float(values[-1]), precision))


def _numbers(text: str) -> list[float]:
    found = re.findall(rf"{_THOUSANDS}|{_SCIENTIFIC}|-?(?:\d+\.\d+|\.\d+|\d+)", text)
    return [value for one in found if (value := number(one)) is not None]


def typed_match(parsed: str, answer: str, kind: str, precision: int) -> bool:
    """Whether a parsed answer is the right one: numbers are compared as numbers at their precision."""
    if kind == "list":
        return parsed == parse_typed(answer, "list", precision)
    if kind in ("integer", "float") and (right := number(answer)) is not None:
        said = float(parsed)
        return round(said, precision) == round(right, precision) if kind == "float" else said == right
    return parsed == plain(answer)


def literal_list(text: str) -> list[str]:
    """The options of MMMU, a list written as a Python literal. Raises `ValueError` for anything else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ValueError(f"not a list: {text[:40]!r}") from None
    if not isinstance(found, list):
        raise ValueError(f"a {type(found).__name__}, not a list")
    return [str(one) for one in found]
