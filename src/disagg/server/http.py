"""uvicorn's HTTP, and what ASGI has no words for: a piece of an answer without a task, an end without a farewell.

Before a request's headers are complete nobody knows whose it is: their bytes, their time and the number of connections
are limited.
"""

import asyncio
import resource
import socket
import struct
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from disagg.server.problems import Problem

HTTP = "disagg.http"  # in the scope of a request: its connection
MOST_HEAD = 1 << 16  # bytes of URL and headers
HEAD_S = 10.0  # that they may take, from the connection or from the first byte of a later request
_TOO_LARGE = Problem(431, f"URL and headers are larger than the {MOST_HEAD} bytes this server takes.")
_FILES = 256  # open files that are for others than clients


def most_connections() -> int:
    """How many there may be at a time: what the limit of open files leaves."""
    return max(64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES))


class Http(HttpToolsProtocol):
    """A connection."""

    def __init__(self, *arguments: Any, most: int = 4096, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._most = most
        self._head_len = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse(Problem(503, f"{self._most} connections are open: retry later.", code="overloaded"))
        else:
            self._timer = self.loop.call_later(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """A client is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_len += len(data)
            if self._timer is None and self._is_idle:
                self._timer = self.loop.call_later(HEAD_S, self._late)
        super().data_received(data)
        if self._in_head and self._head_len > MOST_HEAD:
            self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope[HTTP] = self  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        """URL and headers are there."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MOST_HEAD:
            raise ValueError  # the parser tells data_received that it is no good, which calls send_400_response
        self._in_head, self._head_len = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is complete: what follows is the head of another."""
        super().on_message_complete()
        self._in_head, self._head_len = True, 0

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read."""
        is_large = self._in_head and self.headers is not None and self._head_len > MOST_HEAD
        self._refuse(_TOO_LARGE if is_large else Problem(400, msg))

    def _late(self) -> None:
        self._timer = None
        if self._head_len:
            self._refuse(Problem(408, f"The headers did not come within {HEAD_S:g} s."))
        else:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer what is not yet a request, and close the connection."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._is_idle:  # else this would come amid another answer
            body = msgspec.json.encode(problem.body())
            head = (
                f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\nContent-Type: application/json\r\n"
            )
            self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def ready(self) -> bool:
        """Whether `chunk` may be called: the client is there and reads."""
        return not (self.flow.write_paused or self.transport.is_closing())

    def chunk(self, body: bytes) -> None:
        """Send a piece of an answer that has begun and has no length, from anywhere on the event loop."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def cut(self) -> None:
        """End the connection at once; neither we nor the kernel go on trying to send what its client does not read."""
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
