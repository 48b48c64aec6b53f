"""Pages in shared memory, pulled by a thread beside the engine.

The pool lies in an anonymous memory file (memfd): it has no name, so nothing is left behind, whoever is killed when.
A peer on the same host and of the same user opens it through /proc/<pid>/fd/<fd>, read only. A mapped pool outlives
its owner's death until it is unmapped, so a copy in flight never faults.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from disagg.clock import WallClock
from disagg.errors import HandshakeError
from disagg.transfer.base import Pulled, run_table
from disagg.transfer.beside import Copied, CopyThread, Order
from disagg.transfer.copy import copy_runs


class SharedMemoryTransport:
    """Pages in a memfd, uint8 [num_pages, page_bytes]; one copying thread, which holds no GIL while it copies."""

    def __init__(self, num_pages: int, page_bytes: int, wake: Callable[[], None] = lambda: None) -> None:
        """`wake`: see CopyThread."""
        self._page_bytes = page_bytes
        self._fd = os.memfd_create("disagg-pages", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, num_pages * page_bytes)
        # populate: a page fault per 4 KiB on first touch would be billed to the first requests
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._map = mmap.mmap(self._fd, num_pages * page_bytes, flags=flags)
        self.pages = np.frombuffer(self._map, dtype=np.uint8).reshape(num_pages, page_bytes)
        self._peers: dict[str, np.ndarray[Any, Any]] = {}
        self._clock = WallClock()
        self._thread = CopyThread(self._copy, wake)

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
            # not populated: that holds the engine's thread up for tens of milliseconds per GB; the copying thread
            # takes the faults as it reads
            view = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._peers[address] = np.frombuffer(view, dtype=np.uint8).reshape(-1, self._page_bytes)

    def pull(self, address: str, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """See Transport."""
        return self._thread.pull(address, theirs, ours)

    def poll(self) -> list[Pulled]:
        """See Transport."""
        return self._thread.poll()

    def disconnect(self, address: str) -> None:
        """See Transport. The mapping goes when the copying thread drops its last reference to it."""
        self._peers.pop(address, None)

    def close(self) -> None:
        """See Transport."""
        self._thread.close()
        self._peers.clear()
        os.close(self._fd)

    def _copy(self, order: Order) -> Copied:
        start = self._clock.now()
        source = self._peers.get(order.address)
        if source is None:
            raise HandshakeError(f"not connected to {order.address}")
        copy_runs(self.pages, source, run_table(order.theirs, order.ours, len(source), len(self.pages)))
        return len(order.ours) * self._page_bytes, start, self._clock.now()
