"""One HTTP request with all its choices, as it crosses from the deployment's thread to the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from disagg.cluster.policies import Routing
from disagg.engine.batch import TokenLogprobs
from disagg.record import Record
from disagg.request import SamplingParams

MOST_UNREAD = 4096  # tokens of one exchange; a client that lags so far behind has stopped reading


class Ask(NamedTuple):
    """One choice of an exchange: what the Cluster is asked for."""

    prompt: list[int]
    params: SamplingParams
    routing: Routing | None = None  # against the policy


class Piece(NamedTuple):
    """News of one choice: tokens, each with the text that it completed. With `record` the choice is over, and `finish`
    says why in the API's words.
    """

    choice: int
    texts: list[str]  # one a token; without tokens one, which had been held back
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    finish: str
    record: Record | None
    offsets: Sequence[int] = ()  # with log-probabilities: where in the choice's text each token begins


class Exchange:
    """One HTTP request with all its choices, as the event loop sees it. Made by Front.open."""

    def __init__(
        self, asks: Sequence[Ask], received_at: float, deadline_s: float, overflow: Callable[["Exchange"], None]
    ) -> None:
        self.asks = asks
        self.received_at = received_at  # on the cluster's clock; latency counts from here
        self.deadline_s = deadline_s
        self.request_ids: list[str] = []  # of the Cluster, one per choice; the front thread's
        self.failure: Exception | None = None  # what ended it early
        self.on_failure: Callable[[], None] = lambda: None  # for a reader that is busy elsewhere
        self.shortcut: Callable[[list[Piece]], bool] = lambda news: False  # takes news for a reader that waits
        self._overflow = overflow
        self._unread: list[Piece] = []
        self._num_unread = 0  # texts in them
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[Piece]:
        """All news since the last call, in order; waits for the first. Raises what ended the exchange early."""
        if not self._unread and self.failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.failure is not None:
            raise self.failure
        return self._take()

    def put(self, piece: Piece) -> None:
        """Take news, of which `tell` tells the reader."""
        if self.failure is None:
            self._unread.append(piece)
            self._num_unread += len(piece.texts)

    def tell(self) -> None:
        """All news that there are now have been put."""
        waits = self._waiter is not None and not self._waiter.done()
        if not self._unread:
            return
        if waits and self.shortcut(self._unread):
            self._take()
            return
        self._wake()
        if self._num_unread > MOST_UNREAD:
            self._overflow(self)

    def fail(self, error: Exception) -> None:
        """End it for the reader. The first failure counts."""
        if self.failure is None:
            self.failure = error
            self._take()
            self._wake()
            self.on_failure()

    def _take(self) -> list[Piece]:
        news, self._unread, self._num_unread = self._unread, [], 0
        return news

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
