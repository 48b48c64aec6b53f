"""A relay between a load generator and the server, which stamps what passes: what the generator's numbers are held
against to learn how well it can tell time here.
"""

import asyncio
import re
import threading
import time
from dataclasses import dataclass

_LENGTH = re.compile(rb'"max_tokens": ?([0-9]+)')
_TEXT = re.compile(rb'"text":"(?!")')  # an event that brings text; the last one may bring none
_END = b"data: [DONE]"
_LONGEST = 16  # bytes: what of _TEXT and _END may lie across two reads


@dataclass
class Call:
    """One streamed completion as it passed. Seconds on the monotonic clock."""

    asked_at: float  # its first byte came from the client
    asked: bytes = b""
    first_at: float = 0.0  # its first and its last text came from the server
    last_at: float = 0.0
    tail: bytes = b""

    @property
    def length(self) -> int:
        """How many tokens were asked for."""
        found = _LENGTH.search(self.asked)
        return int(found[1]) if found else 0

    def take(self, data: bytes) -> bool:
        """Bytes of the answer. Returns whether it is complete."""
        now, seen = time.monotonic(), self.tail + data
        self.tail = seen[-_LONGEST:]
        if found := [*_TEXT.finditer(seen)]:
            self.first_at, self.last_at = self.first_at or now, now
            self.tail = seen[max(found[-1].end(), len(seen) - _LONGEST) :]  # what has been seen is not seen again
        return _END in seen


class Relay:
    """Passes bytes to the server at `port`. Clients use `url`; `calls` are the completions that are over."""

    def __init__(self, port: int) -> None:
        self.calls: list[Call] = []
        self._port = port
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _connection(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        call = Call(0.0)

        async def forth() -> None:
            nonlocal call
            while data := await client.read(1 << 16):
                if data.startswith((b"POST ", b"GET ")):
                    call = Call(time.monotonic())
                to_server.write(data)
                call.asked += data
            to_server.close()

        async def back() -> None:
            while data := await server.read(1 << 16):
                is_over = call.take(data)
                to_client.write(data)
                if is_over:
                    self.calls.append(call)
            to_client.close()

        await asyncio.gather(forth(), back(), return_exceptions=True)
