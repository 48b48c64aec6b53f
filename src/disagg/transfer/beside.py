"""A thread that copies beside the engine: what every transport with real copies has in common."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from disagg.clock import WallClock
from disagg.transfer.base import Pulled


class Order(NamedTuple):
    """One pull as asked for: the peer's pages `theirs` into `ours`, pairwise."""

    address: str
    theirs: list[int]
    ours: list[int]


Copied = tuple[int, float, float]
"""Bytes, start and end of a copy; the times are seconds on the host's monotonic clock."""


class CopyThread:
    """Carries out orders one after the other. Every order gets a ticket, and every ticket ends once, also in failure.

    `copy` carries out one order and raises what went wrong; `wake` is told from the thread when a pull has ended, so
    that a sleeping owner comes to poll.
    """

    def __init__(self, copy: Callable[[Order], Copied], wake: Callable[[], None]) -> None:
        self._work: queue.SimpleQueue[tuple[int, Order] | Callable[[], None] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Pulled] = queue.SimpleQueue()
        self._next_ticket = 0
        self._clock = WallClock()
        # arguments, not attributes: an owner that is closed must not live on in a circle of references
        self._thread = threading.Thread(target=self._run, args=(copy, wake), name="disagg-pull", daemon=True)
        self._thread.start()

    def pull(self, address: str, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """See Transport."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._work.put((ticket, Order(address, list(theirs), list(ours))))
        return ticket

    def then(self, action: Callable[[], None]) -> None:
        """Do something in the thread once the pulls asked for so far have ended."""
        self._work.put(action)

    def poll(self) -> list[Pulled]:
        """See Transport."""
        ended = []
        while True:
            try:
                ended.append(self._ended.get_nowait())
            except queue.Empty:
                return ended

    def close(self) -> None:
        """End the pulls in flight, then the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self, copy: Callable[[Order], Copied], wake: Callable[[], None]) -> None:
        while (work := self._work.get()) is not None:
            if callable(work):
                work()
            else:
                self._ended.put(self._carry_out(copy, *work))
                wake()

    def _carry_out(self, copy: Callable[[Order], Copied], ticket: int, order: Order) -> Pulled:
        start = self._clock.now()
        try:
            return Pulled(ticket, *copy(order))
        except Exception as error:  # whatever it was: a ticket that never ends would hold its pages for ever
            return Pulled(ticket, 0, start, start, str(error) or repr(error))
