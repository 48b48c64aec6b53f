"""One answer to one request for tokens: whole or streamed, however it ends.

The status line waits for the first token, so that what fails before it has a status of its own. A client that goes
away, or a deadline, ends the exchange at once, and every worker frees its pages.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from disagg.errors import DisaggError
from disagg.record import Record
from disagg.server.answers import Events, Form, Whole, failure
from disagg.server.asked import FIELDS
from disagg.server.front import Exchange, Piece
from disagg.server.problems import Problem, answer, gone, problem_of
from disagg.server.state import State

_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip

_GRACE_S = 1.0  # the deployment ends what is not done by its deadline; an answer nobody reads is ended here


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
        started = complete = False
        try:
            async with asyncio.timeout_at(self.deadline_at + _GRACE_S):
                if self.stream:
                    first = await self._news(records)
                    started = True
                    await self._stream(first, records, send)
                else:
                    whole = await self._whole(records)
            complete = True
        except TimeoutError:
            limit_s = self.state.settings.deadline_s
            await self._fail(Problem(504, f"Not finished within {limit_s:g} s.", code="deadline"), started, send)
        except (Problem, DisaggError) as error:
            await self._fail(problem_of(error, FIELDS), started, send)
        finally:
            watch.cancel()
            if not complete:
                self.state.front.abort(self.exchange, gone())
        if complete and not self.stream:
            await answer(whole)(scope, receive, send)

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
                    raise TimeoutError
                if not piece.record.ok:
                    raise Problem(500, piece.record.error or "The request was ended by the server.")
        return news

    async def _whole(self, records: list[Record]) -> dict[str, Any]:
        whole = Whole(self.form, self.state.names)
        while len(records) < len(self.exchange.asks):
            for piece in await self._news(records):
                whole.add(piece)
        return whole.body(self.exchange.request_ids[0])

    async def _stream(self, news: list[Piece], records: list[Record], send: Send) -> None:
        """One event per piece; pieces that came while the client was read to are sent together."""
        events = Events(self.form, self.exchange.request_ids[0], self.state.names)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        while True:
            body = b"".join([events.event(piece) for piece in news])
            if len(records) == len(self.exchange.asks):
                break
            await send({"type": "http.response.body", "body": body, "more_body": True})
            news = await self._news(records)
        await send({"type": "http.response.body", "body": body + events.last(), "more_body": False})

    async def _fail(self, problem: Problem, started: bool, send: Send) -> None:
        if problem.status == gone().status:
            return
        if not started:
            raise problem
        await send({"type": "http.response.body", "body": failure(problem), "more_body": False})
