"""Which prompts a worker has probably cached: what a front end can know without asking.

A worker that was given a prompt has its pages, until it needs the room. Their names are the hash chain of
cache/prefix.py, so the leading pages two prompts share are found without comparing tokens. Approximate on purpose: a
worker evicts earlier than this map (its own output needs room too) or was never sent the rest of a prompt that was
aborted. A wrong guess costs time, never a wrong token: what is not cached is computed.
"""

from collections.abc import Iterable, Sequence

from disagg.cache.pages import PageHash


class PrefixMap:
    """Pages of `page_size` tokens by worker, at most `capacity` each (a worker has no more), least recently used out.

    Forgets late pages of a prompt before early ones, without which they could not be found.
    """

    def __init__(self, page_size: int, capacity: int) -> None:
        self._page_size = page_size
        self._capacity = capacity
        self._pages: dict[str, dict[PageHash, None]] = {}  # ordered sets: least recently used first

    def cached(self, workers: Iterable[str], hashes: Sequence[PageHash], prompt_len: int) -> dict[str, int]:
        """For each worker that has any: how many first tokens of this prompt. Never all: the last one is computed."""
        usable = hashes[: (prompt_len - 1) // self._page_size]
        found = {worker: self._leading(worker, usable) * self._page_size for worker in workers}
        return {worker: num_tokens for worker, num_tokens in found.items() if num_tokens}

    def note(self, worker: str, hashes: Sequence[PageHash]) -> None:
        """This worker gets a prompt with these pages."""
        pages = self._pages.setdefault(worker, {})
        for content in reversed(hashes):
            pages.pop(content, None)
            pages[content] = None
        while len(pages) > self._capacity:
            del pages[next(iter(pages))]

    def forget(self, worker: str) -> None:
        """It is gone, and its cache with it."""
        self._pages.pop(worker, None)

    def _leading(self, worker: str, hashes: Sequence[PageHash]) -> int:
        pages = self._pages.get(worker, {})
        return next((place for place, content in enumerate(hashes) if content not in pages), len(hashes))
