"""One at a time, the shortest first."""

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator


class Turns:
    """A lock that goes to the shortest of those that wait. A long one is overtaken only by what comes before as much
    work as its own has begun: it waits longer, not for ever.
    """

    def __init__(self) -> None:
        self._held = False
        self._begun = 0  # lengths of all that has had its turn
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._number = itertools.count()  # among equals who came first

    @contextlib.asynccontextmanager
    async def turn(self, length: int) -> AsyncIterator[None]:
        """Wait for it, and have it."""
        if self._held:
            await self._wait(length)
        self._held = True
        self._begun += length
        try:
            yield
        finally:
            self._next()

    async def _wait(self, length: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self._begun + length, next(self._number), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had just come
                self._next()
            raise

    def _next(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._held = False
