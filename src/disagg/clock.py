"""The only pure file that may import `time`: everything that decides asks a Clock."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. On one host every process reads the same clock, so times may be compared."""

    def now(self) -> float:
        """Seconds since an arbitrary origin, never decreasing."""
        ...

    def sleep_until(self, at: float) -> None:
        """Return no earlier than `at` (seconds on this clock); at once if that moment has passed."""
        ...


class WallClock:
    """CLOCK_MONOTONIC, which on Linux is shared by all processes of a host."""

    def now(self) -> float:
        """See Clock."""
        return time.monotonic()

    def sleep_until(self, at: float) -> None:
        """See Clock."""
        delay = at - time.monotonic()
        if delay > 0:
            time.sleep(delay)


class ManualClock:
    """A clock that moves only when told to: for tests and for the simulator."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """See Clock."""
        return self._now

    def sleep_until(self, at: float) -> None:
        """Jump to `at`; the past is left alone."""
        self._now = max(self._now, at)

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (at least 0)."""
        self._now += seconds
