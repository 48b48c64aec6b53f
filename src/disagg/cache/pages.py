"""Who holds which page of the KV cache: numbers only, no bytes.

Every page is in exactly one of three places:

    free ──allocate──▶ held ──last user releases──▶ free            its content was never published
     ▲                  │ ▲                          or
     │                  │ └──────lookup────── cached                published: kept while nobody needs the room
     └──evicted, least recently used first──────┘

A request gets neighbouring pages wherever so many are free side by side, else few long runs: a hand-off copies a run at
once, and many short copies take the device up to three times as long.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NewType

from disagg.errors import InvariantError

PageHash = NewType("PageHash", bytes)  # names a page's content and all that precedes it; opaque here
_FREE, _USED = b"\1", b"\0"


class PageCounts(NamedTuple):
    """Where the pages are; the three sum to `PagePool.num_pages`."""

    free: int
    cached: int  # published content, no user: given out when `free` runs out
    held: int


class PagePool:
    """`num_pages` pages of `page_size` positions each, with one count of users per page."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._is_free = bytearray(_FREE * num_pages)  # one byte a page, so that a run is found by a search for bytes
        self._num_unused = num_pages
        self._users = [0] * num_pages
        self._cached: dict[int, None] = {}  # an ordered set: least recently used first
        self._page_of: dict[PageHash, int] = {}
        self._hash_of: dict[int, PageHash] = {}  # the inverse of _page_of

    @property
    def num_free(self) -> int:
        """How many pages `allocate` could give out now; cached ones count, for they can be evicted."""
        return self._num_unused + len(self._cached)

    def counts(self) -> PageCounts:
        """Free, cached and held pages."""
        return PageCounts(self._num_unused, len(self._cached), self.num_pages - self.num_free)

    def num_users(self, page: int) -> int:
        """How many references `page` has; 0 when it is free or cached."""
        return self._users[page]

    def num_pages_for(self, num_positions: int) -> int:
        """How many pages hold `num_positions` positions."""
        return -(-num_positions // self.page_size)

    def allocate(self, n: int) -> list[int] | None:
        """Take `n` pages, ascending, each with one user. None, and nothing changes, when fewer are free or cached.

        Being short is an everyday answer (the scheduler waits or preempts), hence a value and not an exception.
        """
        if n > self._num_unused:
            if n > self.num_free:
                return None
            self.forget([page for page, _ in zip(self._cached, range(n - self._num_unused), strict=False)])
        pages = self._take(n)
        for page in pages:
            self._users[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add a user to each page, all of which must have one already. Raises InvariantError otherwise.

        Whoever lets another worker read pages takes a reference of its own, so that nothing that happens to the
        request can free them under the reader.
        """
        for page in pages:
            if self._users[page] == 0:
                raise InvariantError(f"Page {page} was retained although nobody holds it.")
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take a user from each page; the last one frees it, or leaves it cached if it was published.

        Raises InvariantError for a page nobody holds. Goes backwards, so that of one request the late pages are
        evicted before the early ones, without which they could not be found.
        """
        users = self._users
        for page in reversed(pages):
            left = users[page] - 1
            if left < 0:
                raise InvariantError(f"Page {page} was released although nobody holds it.")
            users[page] = left
            if left == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._give_back(page)

    def lookup(self, hashes: Iterable[PageHash]) -> list[int]:
        """The pages with these contents, up to the first that is not known; the caller becomes a user of each."""
        found: list[int] = []
        for content in hashes:
            page = self._page_of.get(content)
            if page is None:
                break
            self._cached.pop(page, None)
            self._users[page] += 1
            found.append(page)
        return found

    def publish(self, page: int, content: PageHash) -> None:
        """Say that a held page is complete and may be shared. The first page published for a content is kept.

        Raises InvariantError if nobody holds the page or if it was published as something else.
        """
        if self._users[page] == 0:
            raise InvariantError(f"Page {page} was published although nobody holds it.")
        if self._hash_of.get(page, content) != content:
            raise InvariantError(f"Page {page} was published twice, with different contents.")
        if content not in self._page_of:
            self._page_of[content] = page
            self._hash_of[page] = content

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody shall find these pages any more (evicted, or their copy failed); held ones stay with their users."""
        for page in pages:
            content = self._hash_of.pop(page, None)
            if content is None:
                continue
            del self._page_of[content]
            if self._users[page] == 0:
                del self._cached[page]
                self._give_back(page)

    def _take(self, n: int) -> list[int]:
        """`n` unused pages: the first run that is long enough, else runs of half the length, and so on."""
        pages: list[int] = []
        length, end = n, 0
        while len(pages) < n:
            length = min(length, n - len(pages))
            first = self._is_free.find(_FREE * length, end)
            if first < 0:
                if length == 1 and end == 0:
                    raise InvariantError("Page pool: fewer pages are free than were counted.")
                length, end = max(1, length // 2), 0
                continue
            end = first + length
            self._is_free[first:end] = _USED * length
            pages += range(first, end)
        self._num_unused -= n
        pages.sort()
        return pages

    def _give_back(self, page: int) -> None:
        self._is_free[page] = 1
        self._num_unused += 1

    def check(self, references: Iterable[int] | None = None) -> None:
        """Raise InvariantError unless every page is in exactly one place and the index is consistent.

        `references`, if given: the pages of all users together, a page once for each of them, to compare with.
        """
        held = {page for page, users in enumerate(self._users) if users > 0}
        free, cached = {page for page, is_free in enumerate(self._is_free) if is_free}, set(self._cached)
        expected = self._users if references is None else [0] * self.num_pages
        for page in references or ():
            expected[page] += 1
        wrong = [page for page, users in enumerate(self._users) if users != expected[page]]
        faults = (
            (bool(wrong), f"pages {wrong[:8]} have more or fewer users than holders"),
            (min(self._users, default=0) < 0, "a page has a negative number of users"),
            (len(free) != self._num_unused, "a page is free twice"),
            (bool(free & cached or free & held or cached & held), "a page is in two places"),
            (len(free) + len(cached) + len(held) != self.num_pages, "free + cached + held is not the total"),
            (not free | cached | held <= set(range(self.num_pages)), "a page lies outside the pool"),
            (not cached <= self._hash_of.keys(), "a cached page is not in the index"),
            (bool(free & self._hash_of.keys()), "a free page is in the index"),
            (
                {page: content for content, page in self._page_of.items()} != self._hash_of,
                "the index disagrees with itself",
            ),
        )
        for broken, fault in faults:
            if broken:
                raise InvariantError(f"Page pool: {fault} ({self.counts()}).")
