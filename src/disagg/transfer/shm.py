"""Pages in shared memory, pulled by a thread beside the engine.

The pool lies in an anonymous memory file (memfd): it has no name, so nothing is left behind, whoever is killed when.
A peer on the same host and of the same user opens it through /proc/<pid>/fd/<fd>, read only. A mapped pool outlives
its owner's death until it is unmapped, so a copy in flight never faults.
"""

import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from disagg.clock import WallClock
from disagg.errors import HandshakeError
from disagg.transfer.base import Pulled, runs
from disagg.transfer.copy import copy_runs


class SharedMemoryTransport:
    """Pages in a memfd, uint8 [num_pages, page_bytes]; one copying thread, which holds no GIL while it copies.

    `wake` is called from that thread when a pull has ended, so that a sleeping owner comes to poll.
    """

    def __init__(self, num_pages: int, page_bytes: int, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._page_bytes = page_bytes
        self._fd = os.memfd_create("disagg-pages", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, num_pages * page_bytes)
        # populate: a page fault per 4 KiB on first touch would be billed to the first requests
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._map = mmap.mmap(self._fd, num_pages * page_bytes, flags=flags)
        self.pages = np.frombuffer(self._map, dtype=np.uint8).reshape(num_pages, page_bytes)
        self._peers: dict[str, np.ndarray[Any, Any]] = {}
        self._orders: queue.SimpleQueue[tuple[int, str, list[int], list[int]] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Pulled] = queue.SimpleQueue()
        self._next_ticket = 0
        self._clock = WallClock()
        self._thread = threading.Thread(target=self._work, name="disagg-pull", daemon=True)
        self._thread.start()

    def address(self) -> str:
        """See Transport."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def connect(self, address: str) -> None:
        """See Transport."""
        if address in self._peers:
            return
        try:
            fd = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            message = f"The pages at {address} cannot be opened ({error.strerror}): is its worker alive?"
            raise HandshakeError(message) from error
        try:
            size = os.fstat(fd).st_size
            if size == 0 or size % self._page_bytes:
                raise HandshakeError(f"The pool at {address} is not made of pages of {self._page_bytes} bytes.")
            view = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._peers[address] = np.frombuffer(view, dtype=np.uint8).reshape(-1, self._page_bytes)

    def pull(self, address: str, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """See Transport."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._orders.put((ticket, address, list(theirs), list(ours)))
        return ticket

    def poll(self) -> list[Pulled]:
        """See Transport."""
        ended = []
        while True:
            try:
                ended.append(self._ended.get_nowait())
            except queue.Empty:
                return ended

    def disconnect(self, address: str) -> None:
        """See Transport. The mapping goes when the copying thread drops its last reference to it."""
        self._peers.pop(address, None)

    def close(self) -> None:
        """See Transport."""
        self._orders.put(None)
        self._thread.join()
        self._peers.clear()
        os.close(self._fd)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            self._ended.put(self._copy(*order))
            self._wake()

    def _copy(self, ticket: int, address: str, theirs: list[int], ours: list[int]) -> Pulled:
        start = self._clock.now()
        source = self._peers.get(address)
        if source is None:
            return Pulled(ticket, 0, start, start, f"not connected to {address}")
        try:
            copy_runs(self.pages, source, runs(theirs, ours))
        except IndexError as error:
            return Pulled(ticket, 0, start, start, str(error))
        return Pulled(ticket, len(ours) * self._page_bytes, start, self._clock.now())
