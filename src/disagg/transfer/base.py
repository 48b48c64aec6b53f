"""How pages move: the Transport seam, in prose first.

Runs in the worker. A page is one contiguous range of `page_bytes` bytes, so a hand-off is a list of page numbers and a
pull is a few large copies.

1. A worker makes its transport; the transport owns the memory of the worker's page pool (`pages`), because how memory
   is allocated decides who else can read it.
2. `address()` says how a peer reaches those pages. It travels in the Offer of a hand-off.
3. The decode worker calls `connect(address)` once per peer, then `pull(address, theirs, ours)` for every chunk. A pull
   returns at once with a ticket; the engine goes on with its next step.
4. `poll()` gives the tickets that ended since the last call, each exactly once, failed ones included. A transport that
   copies beside the engine is given a `wake` callback when made, so that an idle worker can sleep.
5. `disconnect(address)` forgets a peer; pulls in flight end first, as failed or done. `close()` frees everything.

Who owns what: the transport never decides whether a page may be read or written. The holder of the source pages keeps
them until its peer says it is done or dropped them; the puller keeps its target pages reserved until the ticket ended.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Pulled(NamedTuple):
    """A pull that ended. Times are seconds on the host's monotonic clock; `error` is empty when it succeeded."""

    ticket: int
    num_bytes: int
    start_at: float
    end_at: float
    error: str = ""


class Transport(Protocol):
    """See the module's text. The reference is `transfer.inprocess`; every other passes the same tests."""

    def address(self) -> str:
        """How peers reach this worker's pages."""
        ...

    def connect(self, address: str) -> None:
        """Map a peer's pages; does nothing when already mapped. Raises HandshakeError when they cannot be reached."""
        ...

    def pull(self, address: str, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """Start copying the peer's pages `theirs` into `ours`, pairwise. Returns a ticket, unique in this worker."""
        ...

    def poll(self) -> list[Pulled]:
        """Every pull that ended since the last call."""
        ...

    def disconnect(self, address: str) -> None:
        """Unmap a peer once its pulls in flight have ended."""
        ...

    def close(self) -> None:
        """End the pulls in flight and free the memory."""
        ...


def runs(theirs: Sequence[int], ours: Sequence[int]) -> list[tuple[int, int, int]]:
    """Merge pairwise copies into runs of neighbouring pages: (their first page, our first page, number of pages).

    A call costs more than a page on fast links, so neighbours travel together.
    """
    merged: list[tuple[int, int, int]] = []
    for source, target in zip(theirs, ours, strict=True):
        if merged:
            first, ours_first, count = merged[-1]
            if source == first + count and target == ours_first + count:
                merged[-1] = (first, ours_first, count + 1)
                continue
        merged.append((source, target, 1))
    return merged


def run_table(theirs: Sequence[int], ours: Sequence[int], num_theirs: int, num_ours: int) -> "np.ndarray[Any, Any]":
    """The runs as int64 [n, 3], for pools of so many pages. Raises IndexError for a page outside of either."""
    table = np.array(runs(theirs, ours), np.int64).reshape(-1, 3)
    ends = table[:, :2] + table[:, 2:]
    if (table < 0).any() or (ends > (num_theirs, num_ours)).any():
        raise IndexError("a run of pages lies outside of its pool")
    return table
