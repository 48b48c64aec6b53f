"""The reference transport: peers in one process, copies made when polled. It defines what the others must do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from disagg.clock import Clock, WallClock
from disagg.errors import HandshakeError
from disagg.transfer.base import Pulled, runs

_pools: dict[str, np.ndarray[Any, Any]] = {}  # address -> pages of every open in-process transport


class InProcessTransport:
    """Pages in ordinary memory, uint8 [num_pages, page_bytes], found by address in a table of this process."""

    def __init__(self, name: str, num_pages: int, page_bytes: int, clock: Clock | None = None) -> None:
        self.pages = np.zeros((num_pages, page_bytes), dtype=np.uint8)
        self._address = f"inprocess://{name}"
        self._clock = clock or WallClock()
        self._connected: set[str] = set()
        self._waiting: list[tuple[int, str, list[int], list[int]]] = []
        self._next_ticket = 0
        _pools[self._address] = self.pages

    def address(self) -> str:
        """See Transport."""
        return self._address

    def connect(self, address: str) -> None:
        """See Transport."""
        peer = _pools.get(address)
        if peer is None:
            raise HandshakeError(f"No worker shares its pages at {address}: it has stopped or never started.")
        if peer.shape[1] != self.pages.shape[1]:
            raise HandshakeError(f"Pages at {address} have {peer.shape[1]} bytes, ours have {self.pages.shape[1]}.")
        self._connected.add(address)

    def pull(self, address: str, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """See Transport."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting.append((ticket, address, list(theirs), list(ours)))
        return ticket

    def poll(self) -> list[Pulled]:
        """See Transport. Copies happen here."""
        waiting, self._waiting = self._waiting, []
        return [self._copy(*pull) for pull in waiting]

    def _copy(self, ticket: int, address: str, theirs: list[int], ours: list[int]) -> Pulled:
        start = self._clock.now()
        source = _pools.get(address)
        if address not in self._connected or source is None:
            return Pulled(ticket, 0, start, start, f"not connected to {address}")
        for first, target, count in runs(theirs, ours):
            self.pages[target : target + count] = source[first : first + count]
        return Pulled(ticket, len(ours) * self.pages.shape[1], start, self._clock.now())

    def disconnect(self, address: str) -> None:
        """See Transport."""
        self._connected.discard(address)

    def close(self) -> None:
        """See Transport."""
        _pools.pop(self._address, None)
        self._connected.clear()
