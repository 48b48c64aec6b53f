"""What the device remembers of each request between steps: its pages and how it samples, a slot each.

The host keeps the same tables and tells the device what changed. A slot is a cache entry: when none is left, all that
the present step does not need are given away, and whoever comes back is written anew.
"""

from collections.abc import Sequence

import numpy as np

from disagg.engine.batch import needs_history
from disagg.engine.sampler import seed_of
from disagg.request import Request


class Slots:
    """Tables with a row for each slot. `count` must be at least the number of requests in a step."""

    def __init__(self, count: int, max_pages: int) -> None:
        self.pages = np.zeros((count, max_pages), np.int32)
        self.temperature = np.zeros(count, np.float32)
        self.seed = np.zeros(count, np.uint64)
        self.top_k = np.zeros(count, np.int32)
        self.top_p = np.zeros(count, np.float64)
        self.min_p = np.zeros(count, np.float32)
        self.adjusts = np.zeros(count, np.bool_)  # whether the host may have to change its logits
        self._of: dict[Request, int] = {}
        self._free = list(range(count))
        self._seen: list[list[int]] = [[] for _ in range(count)]  # the request's own list, which only ever grows
        self._num_seen = [0] * count
        self._changes: list[tuple[int, list[int]]] = []  # first entry of the flat page table, values

    def assign(self, requests: Sequence[Request]) -> np.ndarray:
        """Slots int64 [B] of these requests, their tables brought up to date."""
        of, seen, num_seen = self._of, self._seen, self._num_seen
        found = []
        for request in requests:
            slot = of.get(request)
            if slot is None:
                slot = self._enter(request, requests)
            pages = request.pages
            if pages is not seen[slot]:
                seen[slot], num_seen[slot] = pages, 0
            if len(pages) != num_seen[slot]:
                self._extend(slot, pages)
            found.append(slot)
        return np.array(found, np.int64)

    def changes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Entries of the flat page table that changed since the last call: places int64 [N], pages int32 [N]."""
        if not self._changes:
            return None
        places = [np.arange(first, first + len(pages)) for first, pages in self._changes]
        values = [page for _, pages in self._changes for page in pages]
        self._changes.clear()
        return np.concatenate(places), np.array(values, np.int32)

    def _enter(self, request: Request, keep: Sequence[Request]) -> int:
        if not self._free:
            kept = {r: self._of[r] for r in keep if r in self._of}
            self._free = sorted(set(self._of.values()) - set(kept.values()))
            self._of = kept
        slot = self._free.pop()
        self._of[request] = slot
        self._seen[slot], self._num_seen[slot] = request.pages, 0
        params = request.params
        self.temperature[slot] = params.temperature
        self.seed[slot] = seed_of(request)
        self.top_k[slot] = min(params.top_k, np.iinfo(np.int32).max)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.adjusts[slot] = needs_history(params) or bool(params.min_tokens and request.stop_ids)
        return slot

    def _extend(self, slot: int, pages: list[int]) -> None:
        start = self._num_seen[slot]
        fresh = pages[start:]
        self.pages[slot, start : len(pages)] = fresh
        self._changes.append((slot * self.pages.shape[1] + start, fresh))
        self._num_seen[slot] = len(pages)
