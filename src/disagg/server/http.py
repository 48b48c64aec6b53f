"""uvicorn's HTTP, and what ASGI has no words for: a piece of an answer without a task, an end without a farewell."""

import socket
import struct

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HTTP = "disagg.http"  # in the scope of a request: its connection


class Http(HttpToolsProtocol):
    """A connection."""

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope[HTTP] = self  # type: ignore[literal-required]

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
