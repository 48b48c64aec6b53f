"""Page hashes: equal exactly when everything up to the end of the page is equal."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from disagg.cache.pages import PageCounts, PagePool
from disagg.cache.prefix import PageHash, PrefixCache, extend_hashes, page_hashes
from disagg.request import Request, SamplingParams

TOKENS = st.lists(st.integers(0, 3), max_size=20)


def request(tokens: list[int]) -> Request:
    return Request("r", len(tokens), tokens, SamplingParams(), frozenset(), 0.0)


def test_only_full_pages_have_a_hash() -> None:
    """A page that may still grow cannot be shared."""
    assert [len(page_hashes(range(n), 4)) for n in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_hashes_agree_as_far_as_the_tokens_do(left: list[int], right: list[int], page_size: int) -> None:
    """Equal up to the last page of the common prefix, different in every page after it."""
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    pairs = list(zip(page_hashes(left, page_size), page_hashes(right, page_size), strict=False))
    assert [a == b for a, b in pairs] == [n < common // page_size for n in range(len(pairs))]


@given(TOKENS, st.integers(0, 20), st.integers(1, 5))
def test_growing_a_list_gives_the_hashes_of_the_whole(tokens: list[int], cut: int, size: int) -> None:
    """Extension in any two steps is the same as hashing once."""
    hashes = page_hashes(tokens[:cut], size)
    extend_hashes(hashes, tokens, size)
    assert hashes == page_hashes(tokens, size)


def test_hashes_are_stable_across_processes() -> None:
    """Unlike Python's `hash`: another process, with another hash seed, finds the same names."""
    code = "from disagg.cache.prefix import page_hashes; print([h.hex() for h in page_hashes(range(9), 4)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([h.hex() for h in page_hashes(range(9), 4)])


def test_match_leaves_at_least_one_token_to_compute() -> None:
    """A prompt whose pages are all cached is computed from its last page on: nothing else yields the next token."""
    pool = PagePool(4, 4)
    prefix, first = PrefixCache(pool), request(list(range(8)))
    prefix.register(first, None)
    first.pages = pool.allocate(2) or []
    prefix.publish(first, 0, 8)
    prefix.forget(first)
    for length, expected in ((8, first.pages[:1]), (9, first.pages), (4, []), (5, first.pages[:1])):
        again = request(list(range(length)))
        prefix.register(again, None)
        assert prefix.match(again) == expected
        pool.release(expected)
        prefix.forget(again)


def test_publish_shares_the_pages_a_step_has_filled() -> None:
    """Chunk boundaries inside a page are remembered by nobody: the step that fills the page publishes it."""
    pool = PagePool(4, 4)
    prefix, one = PrefixCache(pool), request(list(range(12)))
    prefix.register(one, None)
    one.pages = pool.allocate(3) or []
    hashes = page_hashes(one.tokens, 4)
    found = []
    for start, stop in ((0, 3), (3, 4), (4, 11), (11, 12)):
        prefix.publish(one, start, stop)
        found.append(len(pages := pool.lookup(hashes)))
        pool.release(pages)
    assert found == [0, 1, 2, 3]


def test_given_hashes_are_opaque_and_never_extended() -> None:
    """A trace that names shared pages but has no text: its names are used, its placeholder tokens are not."""
    pool = PagePool(4, 4)
    prefix, traced = PrefixCache(pool), request([0] * 12)
    prefix.register(traced, [PageHash(b"one"), PageHash(b"two")])
    traced.pages = pool.allocate(3) or []
    prefix.publish(traced, 0, 12)
    pool.release(traced.pages)
    assert pool.counts() == PageCounts(free=2, cached=2, held=0)
    assert pool.lookup(page_hashes(traced.tokens, 4)) == []
    assert pool.lookup([PageHash(b"one"), PageHash(b"two")]) == traced.pages[:2]
