"""One answer to one request for tokens: whole or streamed, however it ends.

The status line waits for the first token, so that what fails before it has a status of its own. A client that goes
away, or a deadline, ends the exchange at once, and every worker frees its pages; a client that does not read neither
delays that nor keeps its connection.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send

from disagg.record import Record
from disagg.server.answers import Events, Form, Whole, failure
from disagg.server.asked import FIELDS
from disagg.server.exchange import Exchange, Piece
from disagg.server.http import HTTP, Http
from disagg.server.problems import Problem, answer, gone, late, told
from disagg.server.state import State

_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip

_GRACE_S = 1.0  # the deployment ends what is not done by its deadline; an answer nobody reads is ended here
_LAST_WORDS_S = 1.0  # how long a client that was not reading may take to hear why its answer ends


@dataclass(slots=True)
class Reply:
    """An ASGI application that answers from an exchange."""

    state: State
    exchange: Exchange
    form: Form
    stream: bool
    deadline_at: float  # on the event loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises Problem while nothing has been sent."""
        watch = asyncio.create_task(self._watch(receive))
        records: list[Record] = []
        scope["disagg.records"] = records
        started = False
        whole: dict[str, Any] = {}
        problem: Problem | None = gone()  # unless it comes to an end
        try:
            async with asyncio.timeout_at(self.deadline_at + _GRACE_S) as limit:
                self.exchange.on_failure = partial(_hasten, limit)
                if self.stream:
                    first = await self._news(records)
                    events = Events(self.form, self.exchange.request_ids[0], self.state.names)
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
                    started = True
                    await self._stream(events, first, records, scope.get(HTTP), send)
                else:
                    whole = await self._whole(records)
            problem = None
        except TimeoutError:
            problem = told(self.exchange.failure or self._late(), scope, FIELDS)
        except Exception as error:  # also what is nobody's mistake but ours
            problem = told(error, scope, FIELDS)
        finally:
            self.exchange.on_failure, self.exchange.shortcut = lambda: None, lambda news: False
            if problem is not None:
                self.state.front.abort(self.exchange, gone())  # frees the pages, however long the client takes
            if problem is None or not started:
                watch.cancel()
        if problem is None and not self.stream:
            await answer(whole)(scope, receive, send)
        elif problem is not None and started:
            scope["disagg.problem"] = problem
            await self._last_words(problem, scope, send, watch)
        elif problem is not None and problem.status != gone().status:
            raise problem

    async def _last_words(self, problem: Problem, scope: Scope, send: Send, watch: "asyncio.Task[None]") -> None:
        """End a stream that has begun: with an error for who still reads, by cutting the connection otherwise."""
        last = {"type": "http.response.body", "body": failure(problem), "more_body": False}
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await send(last)
        except TimeoutError:
            scope[HTTP].cut()
            await watch  # the connection is gone when this has noticed
        finally:
            watch.cancel()

    def _late(self) -> Problem:
        return late(self.state.settings.deadline_s)

    async def _watch(self, receive: Receive) -> None:
        """End the exchange when the client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.state.front.abort(self.exchange, gone())

    async def _news(self, records: list[Record]) -> list[Piece]:
        """The next pieces. Raises Problem when a choice failed."""
        news = await self.exchange.next()
        for piece in news:
            if piece.record is not None:
                records.append(piece.record)
                if not piece.record.ok and asyncio.get_running_loop().time() >= self.deadline_at:
                    raise self._late()
                if not piece.record.ok:
                    raise Problem(500, piece.record.error or "The request was ended by the server.")
        return news

    async def _whole(self, records: list[Record]) -> dict[str, Any]:
        whole = Whole(self.form, self.state.names)
        while len(records) < len(self.exchange.asks):
            for piece in await self._news(records):
                whole.add(piece)
        return whole.body(self.exchange.request_ids[0])

    async def _stream(
        self, events: Events, news: list[Piece], records: list[Record], http: Http | None, send: Send
    ) -> None:
        """One event per token; tokens that came while the loop was busy or the client was not reading share a write.

        News that end no choice go straight to the connection when all before them have gone: waking this task for
        every token would cost more than the token.
        """

        def shortcut(news: list[Piece]) -> bool:
            if http is None or not http.ready or any(piece.record is not None for piece in news):
                return False
            http.chunk(events.events(news))
            return True

        self.exchange.shortcut = shortcut
        while True:
            body = events.events(news)
            if len(records) == len(self.exchange.asks):
                break
            await send({"type": "http.response.body", "body": body, "more_body": True})
            news = await self._news(records)
        await send({"type": "http.response.body", "body": body + events.last(), "more_body": False})


def _hasten(limit: asyncio.Timeout) -> None:
    """The exchange has failed. Who waits for news hears it at once; who waits for the client does so no longer."""
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time() + _LAST_WORDS_S)
