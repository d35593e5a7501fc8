"""The mixture: which source gives the next pack of the endless global sequence, and which of its packs that is.

Shares of tokens are kept the way a network shares a line among flows. In the ideal sequence every source would flow
all the time at its weight; a pack may be given once the ideal has begun it, and among those packs the one that the
ideal finishes first is next. So every source stays within one pack of its share, however many there are: see `Mixture`.

All accounts are integers, in tokens x 2^-32: states are exact, small, and equal on every machine.
"""

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from mm.data.sample import keyed_rng
from mm.errors import CheckpointError, ConfigError, DataError
from mm.settings import Count, Number, Section, nearest

ONE = 1 << 32
"""What integer weights sum to."""
NEVER = 1 << 62
"""A number of packs that is not reached."""

Share = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Epochs = Annotated[Number, Field(gt=0, allow_inf_nan=False)]


class WeightsFrom(Section):
    """Weights that hold from a step on."""

    step: Count = Field(ge=0)
    """The first optimizer step whose packs they decide."""
    weights: dict[str, Share]
    """As in `mixture.weights`."""

    @field_validator("weights")
    @classmethod
    def _some_are_above_zero(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("expected at least one weight above 0")
        return weights


class MixtureConfig(Section):
    """How sources are mixed.

    By default *naturally*: every epoch holds every pack of every source exactly once, the sources interleaved evenly,
    so that all finish their epochs together. Weights, a temperature, a schedule or a policy mix by shares of tokens;
    then each source has epochs of its own.
    """

    weights: dict[str, Share] = {}
    """Shares of the tokens (padding not counted) by source; their sum does not matter. Name every source: 0 leaves one
    out."""
    temperature: Number | None = Field(default=None, gt=0)
    """Instead of weights: shares in proportion to (tokens of the source in an epoch)^(1/temperature). 1 is as the data
    are, more is closer to equal shares."""
    schedule: list[WeightsFrom] = []
    """Weights from given steps on. Before the first of them `weights` or `temperature` hold, or temperature 1."""
    max_epochs: dict[str, Epochs] = {}
    """At most so many epochs of a source; then it is exhausted and gives no more. Of a last epoch of 0.5, half of the
    packs are given, rounded down."""
    stop: Literal["never", "first", "all"] = "never"
    """When sources are exhausted: `never` goes on with the others, their weights scaled up, until none is left.
    `first` ends after the pack that exhausts the first of those in `max_epochs` or, without these, the first to
    complete an epoch; a natural mixture still completes that epoch. `all` repeats sources until each that has a weight
    here or in the schedule has completed an epoch, or has been exhausted before, and ends after the pack with which
    the last one has."""

    @field_validator("schedule")
    @classmethod
    def _steps_rise(cls, schedule: list[WeightsFrom]) -> list[WeightsFrom]:
        for before, after in pairwise(schedule):
            if after.step <= before.step:
                raise ValueError(f"expected rising steps, found {after.step} after {before.step}")
        return schedule

    @model_validator(mode="after")
    def _weights_have_one_origin(self) -> "MixtureConfig":
        given = [name for name in ("weights", "temperature") if getattr(self, name)]
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights: expected at least one above 0")
        if len(given) > 1:
            raise ValueError("give weights or a temperature, not both")
        if given and self.schedule and self.schedule[0].step == 0:
            raise ValueError(f"the schedule starts at step 0, so {given[0]} would never hold: leave one of them out")
        return self


class SourceOrder:
    """Position in a source's own endless sequence -> pack number.

    Epoch e holds the packs of visit e modulo the number of visits, each once, in an order drawn by (seed, name, e).
    Packs as they lie on disk are cut into blocks (the last takes what is over, so none is short); blocks are put in
    random order, and packs are shuffled within each window of consecutive blocks. So a reader moves through few regions
    of the disk at a time: any `block` consecutive packs of an epoch come from at most 2 x `window` blocks.

    Any position costs O(blocks + one window); going on from it costs next to nothing.
    """

    def __init__(self, visits: Sequence[np.ndarray], seed: int, name: str, block: int = 256, window: int = 8) -> None:
        if not visits or any(not len(visit) for visit in visits):
            raise DataError(f"source {name!r}: expected at least one pack in every visit")
        self._visits = visits
        self._ends = np.cumsum([len(visit) for visit in visits]).tolist()
        self._key = seed, name
        self._block, self._window = block, window
        self._epoch = -1  # the one whose blocks are drawn
        self._blocks = self._starts = np.empty(0, dtype=np.int64)
        self._packs = np.empty(0, dtype=np.int64)  # the window that is drawn,
        self._first = 0  # and the position of its first pack

    def __getitem__(self, position: int) -> int:
        return self.place(position)[1]

    def place(self, position: int) -> tuple[int, int]:
        """(epoch, pack)."""
        at = position - self._first
        if not 0 <= at < len(self._packs):
            at = self._draw(*self.locate(position), position)
        return self._epoch, int(self._packs[at])

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index in that epoch)."""
        rounds, rest = divmod(int(position), self._ends[-1])
        visit = bisect_right(self._ends, rest)
        return rounds * len(self._ends) + visit, rest - (self._ends[visit - 1] if visit else 0)

    def start(self, epoch: int) -> int:
        """Position of an epoch's first pack."""
        rounds, visit = divmod(epoch, len(self._ends))
        return rounds * self._ends[-1] + (self._ends[visit - 1] if visit else 0)

    def _draw(self, epoch: int, index: int, position: int) -> int:
        """Draw the window that holds `index`; returns the index in it."""
        visit = self._visits[epoch % len(self._visits)]
        last = max(1, len(visit) // self._block) - 1
        if epoch != self._epoch:
            self._blocks = keyed_rng(*self._key, epoch).permutation(last + 1)
            sizes = np.where(self._blocks == last, len(visit) - last * self._block, self._block)
            before = np.concatenate([[0], np.cumsum(sizes)])
            self._starts = before[: -1 : self._window]
            self._epoch = epoch
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        blocks = self._blocks[number * self._window : (number + 1) * self._window].tolist()
        parts = [visit[b * self._block : None if b == last else (b + 1) * self._block] for b in blocks]
        self._packs = keyed_rng(*self._key, epoch, number).permutation(np.concatenate(parts))
        at = index - int(self._starts[number])
        self._first = position - at
        return at


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A source of a packed data set."""

    name: str
    visits: Sequence[np.ndarray]
    """Numbers of its packs, visit by visit, as they lie on disk."""
    tokens: np.ndarray
    """Tokens, without padding, by pack number: one array for all sources."""


class Draw(NamedTuple):
    """One pack of the sequence."""

    source: int
    pack: int
    position: int
    """In the whole sequence. It keys what is drawn at random when the pack is read."""
    epoch: int
    """Of the source."""


class Progress(NamedTuple):
    """What a source has given so far."""

    packs: int
    tokens: int
    epochs: float
    lag: float
    """Tokens that it is short of its share; negative when it is ahead."""


class Policy(Protocol):
    """Sets weights while training goes on."""

    def weights(self, step: int, mixture: "Mixture") -> Mapping[str, float] | None:
        """Weights for all sources from this step on, or None to leave them as they are."""


class Mixture:
    """The global sequence of packs over all sources.

        mixture = Mixture(sources, MixtureConfig(weights={"web": 3, "books": 1}), seed=0)
        mixture.start_step(0)
        draw = mixture.next()                # Draw(source=0, pack=4711, position=0, epoch=0)

    A source's target is its weight times all tokens so far, summed piece by piece over changes of the weights; its lag
    is target minus tokens given. Lags sum to 0. A pack may be given when its source's lag is 0 or more; of these packs
    the one with the earliest deadline is next: the first token count at which the target covers it. This is WF2Q
    (Bennett & Zhang, INFOCOM 1996, theorem 1); for packs of one size, a form of Tijdeman's answer to the chairman
    assignment problem (1980). With L the tokens of the largest pack of any source:

    - While weights are those of the start, |lag| < L at every point, for any number of sources and any sizes. *Ahead*:
      a pack begun at lag >= 0 leaves a lag of at least -(1 - weight) L. *Behind*: let a pack of `size` be due at D, and
      let t be the last time before D at which one due later was begun. From the end of that one, at most t + L, until
      our pack is complete, all that is given is begun by the ideal after t and due by D, thus less than D - t. So our
      pack is begun before D + L - size, when the lag is below size + weight (L - size) <= L.
      (The largest lag first is not enough: with five sources it reaches 1.5 L.)
    - Deadlines beyond a change of weights cannot be known. Whatever the rule, changes made to hurt, which give the
      weight to those that happen to be behind, raise a lag to about log2(sources) / 2 packs. The earliest deadline
      alone does worse (6 L seen with 40 sources); so while some lag is above L, the largest goes first. Then, while all
      weights are above 0, -L < lag <= L (1 + 1 + 1/2 + ... + 1/(sources - 1)), whatever the changes: with B(k) for that
      bound with the sum from 1/k on, the mean of the k largest lags stays within B(k). (Either all were at most L and
      their mean rises by at most L/k, or the largest goes first: the mean of those k does not rise, or they were among
      k + 1 with a mean within B(k + 1), and it rises by at most L/k.) With changes at random, lags above L are rare;
      they were never seen to last: weights left alone, all are within L again after a few packs.
    - A source that is at weight 0 or exhausted is never drawn. Its lag rests, and counts again when it returns;
      meanwhile the others, which sum to minus that, share it equally. No bound is proven for this case; in searches
      with random weights and limits |lag| stayed below 2 L.

    A natural mixture counts packs instead of tokens, with the numbers of packs in the epoch as weights, so that by the
    first of these bounds all lags are 0 when the epoch ends, and every pack has been given.

    `log` holds (step, integer weights) wherever weights changed: the sequence is a function of (seed, log), given that
    `start_step` is called at the same positions. Used as a schedule it brings the same sequence. A natural mixture has
    an empty log.

    Raises `ConfigError` where the config does not fit the sources, `DataError` for sources without packs or tokens.
    """

    def __init__(
        self, sources: Sequence[SourceInfo], config: MixtureConfig, seed: int, policy: Policy | None = None
    ) -> None:
        self.names = [source.name for source in sources]
        self.position = 0
        self.log: list[tuple[int, dict[str, int]]] = []
        self._config = config
        self._policy = policy
        self._orders = [SourceOrder(source.visits, seed, source.name) for source in sources]
        self._tokens = [source.tokens for source in sources]
        self._check(policy)
        ranges = [_token_range(source) for source in sources]
        self._natural = not (config.weights or config.temperature or config.schedule or policy)
        self._largest = 1 if self._natural else max(most for most, _ in ranges)
        self._limits = [self._limit(name, order) for name, order in zip(self.names, self._orders, strict=True)]
        self._whole = [min(order.start(1), limit) for order, limit in zip(self._orders, self._limits, strict=True)]
        self._epochs = self._natural_epochs()
        self._scheduled = {name for entry in config.schedule for name, weight in entry.weights.items() if weight}
        self._now = 0
        self._given = [0] * len(sources)  # packs
        self._given_tokens = [0] * len(sources)
        if not self._natural:
            weights: Mapping[str, float] = config.weights
            if config.schedule and config.schedule[0].step == 0:
                weights = config.schedule[0].weights
            elif not weights:
                most = max(mean for _, mean in ranges)
                power = 1 / (config.temperature or 1)
                weights = {n: (mean / most) ** power for n, (_, mean) in zip(self.names, ranges, strict=True)}
            self._set(0, weights, "data.mixture.weights")
        self._begin([0] * len(sources))

    def _check(self, policy: Policy | None) -> None:
        if doubled := {name for name in self.names if self.names.count(name) > 1}:
            raise ConfigError(f"data.sources: two sources are called {min(doubled)!r}: name them apart")
        if not self.names:
            raise DataError("a mixture needs at least one source")
        if policy and self._config.schedule:
            raise ConfigError("data.mixture: give a schedule or a policy, not both")
        if self._config.weights:
            self._knows(self._config.weights, "data.mixture.weights")
        for number, entry in enumerate(self._config.schedule):
            self._knows(entry.weights, f"data.mixture.schedule.{number}.weights")
        self._knows(self._config.max_epochs, "data.mixture.max_epochs", complete=False)

    def _knows(self, given: Mapping[str, float], where: str, complete: bool = True) -> None:
        for name in given:
            if name not in self.names:
                raise ConfigError(f"{where}: there is no source {name!r}; {nearest(name, self.names)}")
        if complete and (missing := [name for name in self.names if name not in given]):
            raise ConfigError(f"{where}: source {missing[0]!r} is missing; give its weight, or 0 to leave it out")

    def _limit(self, name: str, order: SourceOrder) -> int:
        """Packs after which a source is exhausted."""
        limits = self._config.max_epochs
        if name not in limits:
            return order.start(1) if self._config.stop == "first" and not limits else NEVER
        epochs, rest = divmod(Fraction(str(limits[name])), 1)  # exact in decimal digits: 2.3 times 10 packs is 23
        start = order.start(epochs)
        return start + math.floor(rest * (order.start(epochs + 1) - start))

    def _natural_epochs(self) -> int:
        """Epochs after which a natural mixture ends."""
        if self._config.stop == "all":
            return 1
        ends = [
            NEVER if limit == NEVER else order.locate(limit - 1)[0] + 1  # 0 when it gives none at all
            for order, limit in zip(self._orders, self._limits, strict=True)
        ]
        return (min if self._config.stop == "first" else max)(ends)

    def _until(self, source: int, epoch: int) -> int:
        """Packs that a source of a natural mixture gives before an epoch."""
        return min(self._limits[source], self._orders[source].start(epoch))

    # The sequence

    def next(self) -> Draw | None:
        """The next pack; None at the end. (If some are left at weight 0, a later step may raise it and go on.)"""
        best, first, now = -1, 0, self._now
        release, deadline = self._release, self._deadline
        for source in self._live:
            if release[source] <= now and (best < 0 or deadline[source] < first):
                best, first = source, deadline[source]
        if best < 0:
            return None
        if first <= now:
            behind = max(self._live, key=self._ideal_lag)
            if self._ideal_lag(behind) > self._largest * self._sum:
                best = behind
        epoch, pack = self._places[best]
        draw = Draw(best, pack, self.position, epoch)
        size = self._sizes[best]
        self.position += 1
        self._given[best] += 1
        self._given_tokens[best] += int(self._tokens[best][pack])
        self._now = now + size
        self._base[best] -= self._sum * size
        if self._given[best] in (self._whole[best], self._limits[best]) or self.position == self._end_of_epoch:
            self._begin(self._lags())
        else:
            self._book(best)
        return draw

    def _begin(self, lags: list[int]) -> None:
        """Begin a piece of constant weights. Beginning anew within a piece changes nothing."""
        self._rest = lags  # of those that are not live; the live ones' move on
        self._now = 0  # tokens (natural: packs) since the piece began
        self._end_of_epoch: int = -1
        count = len(self.names)
        self._weights = self._epoch_weights() if self._natural else self._token_weights()
        self._sum: int = sum(self._weights)
        self._live: list[int] = [source for source in range(count) if self._weights[source]]
        # What rests is shared equally by the others, so that their ideal lags sum to 0 and one may always be drawn.
        self._shift, resting = [0] * count, -sum(lags[source] for source in self._live)
        for index, source in enumerate(self._live):
            self._shift[source] = (resting + index) // len(self._live)
        # The ideal lag is base + weight x now, in 1 / sum of a token.
        self._base: list[int] = [lag + shift for lag, shift in zip(lags, self._shift, strict=True)]
        self._places: list[tuple[int, int]] = [(0, 0)] * count  # (epoch, pack) of every source's next pack,
        self._sizes: list[int] = [0] * count  # its tokens (natural: 1), and from when and until when it should be given
        self._release: list[int] = [0] * count
        self._deadline: list[int] = [0] * count
        for source in self._live:
            self._book(source)

    def _token_weights(self) -> list[int]:
        """The weights of the log, without exhausted sources; all 0 at the end."""
        stop, given = self._config.stop, self._given
        nothing = [0] * len(given)
        weights = list(self.log[-1][1].values())
        if stop == "first" and any(packs >= limit for packs, limit in zip(given, self._limits, strict=True)):
            return nothing
        if stop == "all" and not self._unseen():
            return nothing
        left = [w if packs < limit else 0 for w, packs, limit in zip(weights, given, self._limits, strict=True)]
        return quantise(left) if any(left) else nothing

    def _epoch_weights(self) -> list[int]:
        """The packs of each source in the present epoch; all 0 at the end."""
        sources = range(len(self.names))
        left = [source for source in sources if self._given[source] < self._limits[source]]
        epoch = min((self._orders[source].locate(self._given[source])[0] for source in left), default=NEVER)
        if epoch >= self._epochs:
            return [0] * len(self.names)
        self._end_of_epoch = sum(self._until(source, epoch + 1) for source in sources)
        return [self._until(source, epoch + 1) - self._until(source, epoch) for source in sources]

    def _unseen(self) -> list[int]:
        """Sources with a weight, now or before or in the schedule, that have not completed an epoch."""
        weighted = self._scheduled.union(*({n for n, weight in entry.items() if weight} for _, entry in self.log))
        return [i for i, name in enumerate(self.names) if name in weighted and self._given[i] < self._whole[i]]

    def _book(self, source: int) -> None:
        """When the source's next pack may be given (`release`) and when it is due, as first token counts."""
        place = self._orders[source].place(self._given[source])
        size = 1 if self._natural else int(self._tokens[source][place[1]])
        base, weight = self._base[source], self._weights[source]
        self._places[source], self._sizes[source] = place, size
        self._release[source] = -(base // weight)
        self._deadline[source] = -((base - self._sum * size) // weight)

    def _ideal_lag(self, source: int) -> int:
        return self._base[source] + self._weights[source] * self._now

    def _lags(self) -> list[int]:
        lags = list(self._rest)
        for source in self._live:
            lags[source] = self._ideal_lag(source) - self._shift[source]
        return lags

    # Weights

    def start_step(self, step: int) -> None:
        """To be called before the first pack of every step: the one place where weights change."""
        if self._policy:
            if (weights := self._policy.weights(step, self)) is not None:
                self._change(step, weights, f"the policy's weights at step {step}")
        elif number := bisect_right(self._config.schedule, step, key=lambda entry: entry.step):
            self._change(step, self._config.schedule[number - 1].weights, f"data.mixture.schedule.{number - 1}.weights")

    def _change(self, step: int, weights: Mapping[str, float], where: str) -> None:
        if self._set(step, weights, where):
            self._begin(self._lags())

    def _set(self, step: int, weights: Mapping[str, float], where: str) -> bool:
        """Log weights; False when they are as before."""
        self._knows(weights, where)
        values = [weights[name] for name in self.names]
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise ConfigError(f"{where}: expected numbers from 0 on, one of them above 0; found {dict(weights)}")
        exact = dict(zip(self.names, quantise(values), strict=True))
        if self.log and self.log[-1][1] == exact:
            return False
        if self.log and self.log[-1][0] == step:
            self.log.pop()
        self.log.append((step, exact))
        return True

    @property
    def weights(self) -> dict[str, float]:
        """The present weights, summing to 1: of tokens, in a natural mixture of packs. All 0 at the end."""
        return {name: weight / (self._sum or 1) for name, weight in zip(self.names, self._weights, strict=True)}

    def progress(self) -> dict[str, Progress]:
        """What every source has given so far."""
        found = {}
        for source, lag in enumerate(self._lags()):
            order, packs = self._orders[source], self._given[source]
            epoch, index = order.locate(packs)
            epochs = epoch + index / (order.start(epoch + 1) - order.start(epoch))
            lag_tokens = lag / (self._sum or ONE)
            found[self.names[source]] = Progress(packs, self._given_tokens[source], epochs, lag_tokens)
        return found

    # Length

    def epoch_packs(self, epoch: int) -> int:
        """Packs in an epoch of a natural mixture; ValueError for others."""
        if not self._natural:
            raise ValueError("only a natural mixture has epochs of its own: with weights each source has")
        if epoch >= self._epochs:
            return 0
        return sum(self._until(i, epoch + 1) - self._until(i, epoch) for i in range(len(self.names)))

    def total(self) -> int | None:
        """Packs from the start to the end, if weights stay as they are; None when there is no end."""
        left = self.packs_left()
        return None if left is None else self.position + left

    def packs_left(self) -> int | None:
        """Packs until the end, if weights stay as they are; None when there is no end.

        With weights and `stop` other than `never` this runs ahead: a few seconds per million packs.
        """
        if self._natural:
            if self._epochs >= NEVER:
                return None
            return sum(self._until(source, self._epochs) for source in range(len(self.names))) - self.position
        live, stop = self._live, self._config.stop
        limited = [source for source in live if self._limits[source] < NEVER]
        finite = len(limited) == len(live)
        if stop == "never":
            return sum(self._limits[source] - self._given[source] for source in live) if finite else None
        if not finite and not (limited if stop == "first" else set(self._unseen()) <= set(live)):
            return None
        ahead = copy.copy(self)
        ahead.load_state_dict(self.state_dict())
        while ahead.next():
            pass
        return ahead.position - self.position

    # State

    def state_dict(self) -> dict[str, Any]:
        """Integers and strings, of one size but for the log."""
        columns = zip(self.names, self._given, self._given_tokens, self._lags(), strict=True)
        return {
            "position": self.position,
            "sources": {name: {"packs": p, "tokens": t, "lag": lag} for name, p, t, lag in columns},
            "log": [[step, dict(weights)] for step, weights in self.log],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, without replay. Raises `CheckpointError` if it is of other sources or another kind."""
        rows = state["sources"]
        if set(rows) != set(self.names):
            raise CheckpointError(f"the saved mixture is of {', '.join(rows)}; this one is of {', '.join(self.names)}")
        if self._natural == bool(state["log"]):
            kinds = ("natural", "weighted")
            raise CheckpointError(
                f"the saved mixture is {kinds[self._natural]}; this one is {kinds[not self._natural]}"
            )
        self.position = state["position"]
        self.log = [(step, {name: weights[name] for name in self.names}) for step, weights in state["log"]]
        self._given = [rows[name]["packs"] for name in self.names]
        self._given_tokens = [rows[name]["tokens"] for name in self.names]
        self._begin([rows[name]["lag"] for name in self.names])


def quantise(weights: Sequence[float]) -> list[int]:
    """Integers in proportion to weights that sum to 2^32, by largest remainder; none above 0 becomes 0.

    Integers with that sum stay as they are.
    """
    shares = [Fraction(weight) for weight in weights]
    scale = ONE / sum(shares)
    exact = [share * scale for share in shares]
    whole = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: ONE - sum(whole)]:
        whole[i] += 1
    for i, share in enumerate(exact):
        if share and not whole[i]:
            whole[whole.index(max(whole))] -= 1
            whole[i] = 1
    return whole


def _token_range(source: SourceInfo) -> tuple[int, float]:
    """(tokens of the largest pack, mean tokens of an epoch)."""
    most, total = 0, 0
    for visit in source.visits:
        tokens = source.tokens[visit]
        if tokens.min() < 1:
            raise DataError(f"source {source.name!r}: pack {int(visit[tokens.argmin()])} has no tokens")
        most = max(most, int(tokens.max()))
        total += int(tokens.sum(dtype=np.int64))
    return most, total / len(source.visits)
