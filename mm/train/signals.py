"""Ctrl-C and SIGTERM: the first lets the step end and saves, on all ranks together; a second one ends at once."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mm.errors import MMError

NUMBERS = (int(signal.SIGINT), int(signal.SIGTERM))
IMPATIENCE = 30
"""Seconds in which a further SIGTERM is the same one: schedulers and launchers both send it."""


class Interrupted(MMError):
    """Ctrl-C or SIGTERM: the run was saved and can be resumed. `signal` says which."""

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal


class Signals:
    """Which one came to this process, and which one all ranks know of and stop for."""

    def __init__(self) -> None:
        self.seen = 0
        self.agreed = 0

    def counts(self) -> list[float]:
        """Of this process, by `NUMBERS`: for a sum over ranks."""
        return [float(self.seen == number) for number in NUMBERS]

    def agree(self, sums: Sequence[float]) -> bool:
        """Take the sums of `counts` over all ranks; True where the run is to stop and did not know before."""
        came = next((number for number, some in zip(NUMBERS, sums, strict=True) if some), 0)
        news = bool(came) and not self.agreed
        self.agreed = self.agreed or came
        return news

    @contextlib.contextmanager
    def caught(self, say: Callable[[str], None]) -> Iterator[None]:
        """Instead of ending the process, a signal is `seen`, once."""

        def note(number: int, frame: Any) -> None:
            if self.seen == signal.SIGTERM == number and time.monotonic() - first[0] < IMPATIENCE:
                return
            if self.seen == number:
                signal.signal(number, before[number])
                signal.raise_signal(number)
                return
            self.seen, first[0] = number, time.monotonic()
            say("stopping after this step; again to stop at once")

        first = [0.0]
        before: dict[int, Any] = {}
        for number in NUMBERS:
            with contextlib.suppress(ValueError):  # signals belong to the main thread; a library user may be elsewhere
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
