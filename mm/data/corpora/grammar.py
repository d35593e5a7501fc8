"""A probabilistic context-free grammar in levels, and exact inference in it (the study of arXiv 2504.17562).

A rule takes a symbol of one level to two or three symbols of the next, from the root on level 0 to the terminals on
level D. Each level has two tables of rules, and a document's latents j_0 … j_{D-1} say which table it uses on each.
Since nothing ever returns to its own level, a symbol of level i covers 2^(D-i) to 3^(D-i) terminals and no more: inside
probabilities are [position, length] arrays joined once a rule, bottom up, and one pass of forward probabilities, top
down, gives P(next token | prefix) at every position.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.sample import keyed_rng
from mm.errors import DataError

CHOICES = 2
"""Tables of rules a level: the paper's probes of latents are binary."""
NOTHING, OTHER = -1, -2
"""In strings of terminals: behind the end; a token that is no terminal."""
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """The right side of a rule, symbols of the level below by number, and its probability among those of its symbol."""

    symbols: tuple[int, ...]
    probability: float


Table = tuple[tuple[Rule, ...], ...]
"""Of each symbol of a level its rules."""


@dataclass(frozen=True)
class Grammar:
    """`tables[level][choice]`; there is one symbol, the root, on level 0 and `symbols` on each of the others.

    Strings of terminals are int arrays [B, N] with `NOTHING` behind their ends. Sets of latents have an axis J = 2^D,
    in the order of `latents`.
    """

    symbols: int
    tables: tuple[tuple[Table, ...], ...]

    @classmethod
    def draw(cls, depth: int, symbols: int, rules: int, seed: int) -> "Grammar":
        """A grammar whose tables depend on the seed alone.

        Right sides have two or three symbols with equal chance; no two of a table are the same, so that within a level
        a table tells which symbol stood there. Probabilities of a symbol's rules are uniform on the simplex. There are
        at most symbols + symbols^2 rules a symbol.
        """
        return cls(
            symbols,
            tuple(
                tuple(
                    _table(symbols if level else 1, symbols, rules, keyed_rng("pcfg", seed, "table", level, choice))
                    for choice in range(CHOICES)
                )
                for level in range(depth)
            ),
        )

    @property
    def depth(self) -> int:
        return len(self.tables)

    @property
    def longest(self) -> int:
        """Terminals of the longest document; the shortest has 2^depth."""
        return 3**self.depth

    @cached_property
    def latents(self) -> np.ndarray:
        """int64 [J, D]: all sets of latents, the last one changing fastest."""
        return np.array(list(product(range(CHOICES), repeat=self.depth)))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "depth": self.depth, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> "Grammar":
        """What `to_json` gave, in a file. Raises `DataError`."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["format"]
            if found == FORMAT:
                tables = tuple(
                    tuple(
                        tuple(tuple(Rule(tuple(rule["symbols"]), rule["probability"]) for rule in one) for one in table)
                        for table in choices
                    )
                    for choices in values["tables"]
                )
                return cls(values["symbols"], tables)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path}: not the grammar of a pcfg corpus ({type(error).__name__}); build one with mm data build pcfg"
            ) from None
        raise DataError(f"{path}: format {found}, expected {FORMAT}; build the corpus anew with mm data build pcfg")

    def write(self, latents: Sequence[int], rng: np.random.Generator) -> list[int]:
        """The terminals of a document."""
        symbols = [0]
        for level, choice in enumerate(latents):
            table, limits = self.tables[level][choice], self._limits[level][choice]
            drawn = rng.random(len(symbols)).tolist()
            symbols = [
                child
                for symbol, number in zip(symbols, drawn, strict=True)
                for child in table[symbol][bisect_right(limits[symbol], number)].symbols
            ]
        return symbols

    @cached_property
    def _limits(self) -> list[list[list[list[float]]]]:
        """Of each symbol's rules but the last the sums of probabilities up to it."""
        return [
            [[[*accumulate(rule.probability for rule in one[:-1])] for one in table] for table in choices]
            for choices in self.tables
        ]

    def next_tokens(self, strings: np.ndarray) -> np.ndarray:
        """P(a document begins with the first n terminals of the string, and t comes next | j).

        float64 [J, B, N + 1 (n), T + 1 (t)], of T terminals; the last t is the end of the document. The sum over t is
        the probability of the prefix; there are zeros where n is past the end of the string.
        """
        batch, length = strings.shape
        found = np.zeros((len(self.latents), batch, length + 1, self.symbols + 1))
        inside = self._inside(strings)
        for number, latents in enumerate(map(tuple, self.latents.tolist())):
            # Forward: starts[s][b, n] is the probability that the first n terminals are these and s begins behind them.
            starts = np.zeros((1, batch, length + 1))
            starts[0, :, 0] = 1
            for level, choice in enumerate(latents):
                below = inside[latents[level + 1 :]]
                begun = np.zeros((self.symbols, batch, length + 1))
                for symbol, rules in enumerate(self.tables[level][choice]):
                    for rule in rules:
                        place = rule.probability * starts[symbol]
                        for child in rule.symbols[:-1]:
                            begun[child] += place
                            place = _advance(place, below[child])
                        begun[rule.symbols[-1]] += place
                        if level == 0:
                            found[number, :, :, -1] += _advance(place, below[rule.symbols[-1]])
                starts = begun
            found[number, :, :, :-1] = np.moveaxis(starts, 0, -1)
        return found

    def _inside(self, strings: np.ndarray) -> dict[tuple[int, ...], list[np.ndarray]]:
        """Of each symbol of a level P(it becomes the l terminals from a on), [B, N + 1 (a), most terminals + 1 (l)], by
        the latents of that level and those below; all levels but the root's."""
        batch, length = strings.shape
        terminals = [np.zeros((batch, length + 1, 2)) for _ in range(self.symbols)]
        for symbol, one in enumerate(terminals):
            one[:, :length, 1] = strings == symbol
        inside: dict[tuple[int, ...], list[np.ndarray]] = {(): terminals}
        known: list[tuple[int, ...]] = [()]
        for level in range(self.depth - 1, 0, -1):
            known = [(choice, *lower) for choice in range(CHOICES) for lower in known]
            for latents in known:
                below = inside[latents[1:]]
                inside[latents] = []
                for rules in self.tables[level][latents[0]]:
                    total = np.zeros((batch, length + 1, 3 ** (self.depth - level) + 1))
                    for rule in rules:
                        joined = _joined([below[child] for child in rule.symbols])
                        total[:, :, : joined.shape[2]] += rule.probability * joined
                    inside[latents].append(total)
        return inside

    def allowed(self, latents: np.ndarray, known: int) -> np.ndarray:
        """The sets that agree with the first `known` of a document's latents, int [B, D]: bool [J, B]."""
        agrees: np.ndarray = (self.latents[:, None, :known] == latents[None, :, :known]).all(-1)
        return agrees

    def members(self, strings: np.ndarray) -> np.ndarray:
        """Whether a string is a whole document of the grammar, for every set of latents: bool [J, B]."""
        lengths = (strings != NOTHING).sum(1)
        ends: np.ndarray = self.next_tokens(strings)[:, np.arange(len(strings)), lengths, -1]
        return ends > 0

    def go_on(self, prefixes: np.ndarray, latents: np.ndarray, known: int, rng: np.random.Generator) -> np.ndarray:
        """What one who knows the grammar and the first `known` latents writes behind prefixes, int [B, n].

        The whole strings, [B, longest], each drawn from the exact P(document | prefix, what is known).
        """
        batch, begun = prefixes.shape
        strings = np.full((batch, self.longest), NOTHING)
        strings[:, :begun] = prefixes
        allowed = self.allowed(latents, known)
        going = np.arange(batch)
        for place in range(begun, self.longest + 1):
            joint = self.next_tokens(strings[going, :place])[:, :, place]
            limits = predicted(joint[:, :, None], allowed[:, going])[:, 0].cumsum(-1)
            drawn = (limits > rng.random(len(going))[:, None] * limits[:, -1:]).argmax(-1)
            going, drawn = going[drawn < self.symbols], drawn[drawn < self.symbols]
            if not len(going):
                break
            strings[going, place] = drawn
        return strings


def posterior(joint: np.ndarray) -> np.ndarray:
    """P(j | the first n terminals), [J, B, N + 1], of `Grammar.next_tokens`; zeros past the end.

    Before anything is read, all sets of latents are equally likely.
    """
    prefix = joint.sum(-1)
    total = prefix.sum(0)
    return np.divide(prefix, total, out=np.zeros_like(prefix), where=total > 0)


def predicted(joint: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The Bayes-optimal P(next token | the first n terminals, what is known), [B, N + 1, T + 1]; zeros past the end.

    joint: `Grammar.next_tokens`; allowed: bool [J, B], the sets of latents that what is known leaves.
    """
    mixed = np.einsum("jbnt,jb->bnt", joint, allowed.astype(joint.dtype))
    total = mixed.sum(-1, keepdims=True)
    return np.divide(mixed, total, out=np.zeros_like(mixed), where=total > 0)


def targets_of(strings: np.ndarray, symbols: int) -> np.ndarray:
    """The token behind every prefix, int [B, N + 1]: terminals, then `symbols` for the end, then `NOTHING`."""
    batch, length = strings.shape
    targets = np.full((batch, length + 1), NOTHING)
    targets[:, :length] = strings
    targets[np.arange(batch), (strings != NOTHING).sum(1)] = symbols
    return targets


def losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(target) in nats, [B, N + 1]; 0 where there is none."""
    taken = np.take_along_axis(probabilities, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return -np.log(np.where(targets == NOTHING, 1.0, taken))


def _table(symbols: int, below: int, rules: int, rng: np.random.Generator) -> Table:
    used = set[tuple[int, ...]]()

    def fresh() -> tuple[int, ...]:
        while (drawn := tuple(rng.integers(below, size=2 + rng.integers(2)).tolist())) in used:
            pass
        used.add(drawn)
        return drawn

    return tuple(
        tuple(Rule(fresh(), probability) for probability in rng.dirichlet(np.ones(rules)).tolist())
        for _ in range(symbols)
    )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Of inside probabilities [B, N + 1, W_i] those of the symbols in a row: [B, N + 1, sum of (W_i - 1), and 1]."""
    found = parts[0]
    for part in parts[1:]:
        batch, places, wide = found.shape
        joined = np.zeros((batch, places, wide + part.shape[2] - 1))
        for length in range(1, min(wide, places)):
            first = found[:, : places - length, length, None]
            joined[:, : places - length, length : length + part.shape[2]] += first * part[:, length:]
        found = joined
    return found


def _advance(starts: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """[B, N + 1] where a symbol begins -> where what stands behind it does."""
    ends = np.zeros_like(starts)
    for length in range(1, min(inside.shape[2], starts.shape[1])):
        ends[:, length:] += starts[:, :-length] * inside[:, :-length, length]
    return ends
