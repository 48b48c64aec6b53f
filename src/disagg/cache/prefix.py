"""Which pages hold the same content: chained hashes, and the requests they belong to.

The hash of a page covers its tokens and the hash of the page before it, so equal hashes mean equal K and V: attention
is causal, and a page's content depends on every token before it. Only full pages have a hash.
"""

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from disagg.cache.pages import PageHash, PagePool
from disagg.request import Request

__all__ = ["PageHash", "PrefixCache", "extend_hashes", "page_hashes"]

_DIGEST_BYTES = 16


def page_hashes(tokens: Sequence[int], page_size: int) -> list[PageHash]:
    """Hashes of the full pages of `tokens`, the same in every process and on every machine."""
    hashes: list[PageHash] = []
    extend_hashes(hashes, tokens, page_size)
    return hashes


def extend_hashes(hashes: list[PageHash], tokens: Sequence[int], page_size: int) -> None:
    """Append to `hashes`, which cover the first pages of `tokens`, those of the pages that have become full since."""
    parent: bytes = hashes[-1] if hashes else blake2b(b"", digest_size=_DIGEST_BYTES).digest()
    pack = struct.Struct(f"<{page_size}q").pack  # fixed width and byte order: no two lists of tokens look alike
    for start in range(len(hashes) * page_size, len(tokens) - page_size + 1, page_size):
        content = pack(*tokens[start : start + page_size])
        parent = blake2b(parent + content, digest_size=_DIGEST_BYTES).digest()
        hashes.append(PageHash(parent))


class PrefixCache:
    """The page hashes of the requests on one worker, and their way into and out of the pool's index.

    `register` first, `forget` last; in between `match` before computing and `publish` after.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._hashes: dict[str, list[PageHash]] = {}
        self._given: set[str] = set()  # ids whose hashes came from outside and are not extended

    def register(self, request: Request, hashes: Iterable[PageHash] | None) -> None:
        """Start with `request`. `hashes`, if given, name its first full pages and no others are ever computed.

        That is for callers that know what is shared but not the text, such as the replay of a trace.
        """
        self._hashes[request.id] = list(hashes or ())
        if hashes is not None:
            self._given.add(request.id)

    def forget(self, request: Request) -> None:
        """Drop what is known of `request`; its published pages stay."""
        del self._hashes[request.id]
        self._given.discard(request.id)

    def match(self, request: Request) -> list[int]:
        """Pages that already hold the start of `request`; the caller becomes their user.

        Never all known tokens: the last one must be computed, since nothing else yields the next.
        """
        usable = (len(request.tokens) - 1) // self._pool.page_size
        return self._pool.lookup(self._known(request)[:usable])

    def publish(self, request: Request, start: int, stop: int) -> None:
        """Share the pages of `request` that became full when positions `start` to `stop` (excluded) were computed."""
        page_size = self._pool.page_size
        first, last = start // page_size, stop // page_size
        if first < last:
            for page, content in zip(request.pages[first:last], self._known(request)[first:last], strict=False):
                self._pool.publish(page, content)

    def _known(self, request: Request) -> list[PageHash]:
        hashes = self._hashes[request.id]
        if request.id not in self._given:
            extend_hashes(hashes, request.tokens, self._pool.page_size)
        return hashes
