"""PagePool: every page is in exactly one place, whatever its users do."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg.cache.pages import PageCounts, PageHash, PagePool
from disagg.errors import InvariantError


def content(name: int) -> PageHash:
    return PageHash(name.to_bytes(4, "little"))


def published(pool: PagePool, names: list[int]) -> list[int]:
    """Pages with the contents `names`, held once."""
    pages = pool.allocate(len(names))
    assert pages is not None
    for page, name in zip(pages, names, strict=True):
        pool.publish(page, content(name))
    return pages


def test_pages_are_given_out_ascending_lowest_first() -> None:
    """Neighbours are given out together, also after holes were freed in any order: few runs for a hand-off."""
    pool = PagePool(8, 16)
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]
    pool.release([4])
    pool.release([1, 3])
    pool.release([2])
    assert pool.allocate(5) == [1, 2, 3, 4, 6]


def test_the_first_run_that_is_long_enough_is_taken() -> None:
    """A hole that is too short stays for smaller requests; where none is long enough, few long runs are taken."""
    pool = PagePool(12, 16)
    pool.allocate(12)
    pool.release([0, 1, 4, 5, 6, 9])
    assert pool.allocate(3) == [4, 5, 6]
    assert pool.allocate(1) == [0]
    pool.release([4, 5, 6])
    assert pool.allocate(4) == [1, 4, 5, 6]


def test_short_pool_answers_none_and_changes_nothing() -> None:
    """An allocation is whole or not at all."""
    pool = PagePool(4, 16)
    pool.allocate(2)
    assert pool.allocate(3) is None
    assert pool.counts() == PageCounts(free=2, cached=0, held=2)
    assert pool.allocate(0) == []


def test_page_is_free_when_its_last_user_releases_it() -> None:
    """References are counted."""
    pool = PagePool(1, 16)
    pages = pool.allocate(1)
    assert pages == [0]
    pool.retain(pages)
    pool.release(pages)
    assert (pool.num_free, pool.num_users(0)) == (0, 1)
    pool.release(pages)
    assert pool.counts() == PageCounts(free=1, cached=0, held=0)


@pytest.mark.parametrize("misuse", ["release", "retain", "publish"])
def test_using_a_page_nobody_holds_is_an_invariant_error(misuse: str) -> None:
    """A double release, or touching a page after the last release, is our bug and is said at once."""
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(InvariantError, match="nobody holds"):
        pool.publish(pages[0], content(1)) if misuse == "publish" else getattr(pool, misuse)(pages)
    pool.check()


def test_lookup_finds_the_longest_known_prefix_and_retains_it() -> None:
    """A hole ends the prefix; found pages get one user more, whether cached or held."""
    pool = PagePool(8, 16)
    pages = published(pool, [1, 2, 4])
    assert pool.lookup([content(1), content(2), content(3), content(4)]) == pages[:2]
    assert [pool.num_users(page) for page in pages] == [2, 2, 1]
    pool.release(pages)
    pool.release(pages[:2])
    assert pool.counts() == PageCounts(free=5, cached=3, held=0)
    assert pool.lookup([content(9)]) == []
    assert pool.lookup([content(1)]) == pages[:1]
    assert pool.counts() == PageCounts(free=5, cached=2, held=1)


def test_first_page_of_a_content_is_kept() -> None:
    """A second page with a known content is not shared and is free at once when released."""
    pool = PagePool(4, 16)
    first, second = published(pool, [1, 1])
    pool.release([second])
    assert pool.counts() == PageCounts(free=3, cached=0, held=1)
    assert pool.lookup([content(1)]) == [first]


def test_a_page_cannot_change_its_content() -> None:
    """Publishing again is harmless, publishing as something else is a bug."""
    pool = PagePool(4, 16)
    (page,) = published(pool, [1])
    pool.publish(page, content(1))
    with pytest.raises(InvariantError, match="different contents"):
        pool.publish(page, content(2))


def test_eviction_takes_the_least_recently_used_and_late_pages_first() -> None:
    """Cached pages count as free; of one request the tail goes first, of two requests the one released earlier."""
    pool = PagePool(4, 16)
    old, young = published(pool, [1, 2]), published(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    assert pool.num_free == 4
    pool.release(pool.lookup([content(1)]))  # used again: now the youngest
    assert pool.allocate(1) == [old[1]]
    assert pool.lookup([content(1), content(2)]) == [old[0]]
    assert pool.allocate(1) == [young[1]]
    assert pool.lookup([content(3), content(4)]) == [young[0]]
    assert pool.allocate(1) is None
    pool.check()


def test_forgotten_pages_are_not_found() -> None:
    """After a failed copy nobody may find the page; a held one stays held, a cached one becomes free."""
    pool = PagePool(4, 16)
    pages = published(pool, [1, 2])
    pool.forget([pages[0]])
    assert pool.lookup([content(1)]) == []
    assert pool.num_users(pages[0]) == 1
    pool.release(pages)
    assert pool.counts() == PageCounts(free=3, cached=1, held=0)
    pool.forget(range(4))
    assert pool.counts() == PageCounts(free=4, cached=0, held=0)


def test_check_compares_references_with_users() -> None:
    """A holder the pool does not know of, or a user who is nobody, is found."""
    pool = PagePool(4, 16)
    pages = pool.allocate(2)
    assert pages is not None
    pool.check(pages)
    for wrong in ([], [0], [0, 1, 1], [0, 1, 2]):
        with pytest.raises(InvariantError, match="users than holders"):
            pool.check(wrong)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._is_free.__setitem__(0, 1),
        lambda pool: pool._is_free.__setitem__(3, 0),
        lambda pool: pool._give_back(3),
        lambda pool: pool._cached.update({0: None}),
        lambda pool: pool._page_of.update({content(7): 1}),
        lambda pool: pool._users.__setitem__(3, -1),
    ],
)
def test_check_finds_damage(damage) -> None:
    """Each inconsistency of the books is an InvariantError."""
    pool = PagePool(4, 16)
    published(pool, [1, 2])
    pool.check()
    damage(pool)
    with pytest.raises(InvariantError):
        pool.check()


class PagePoolMachine(RuleBasedStateMachine):
    """Random users of one pool beside a model of it: a list of references, a map of contents."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7, 4)
        self.holders: list[list[int]] = []
        self.contents: dict[int, int] = {}  # page -> content, as long as it may be found

    @rule(n=st.integers(0, 8))
    def allocate(self, n: int) -> None:
        free_before = self.pool.num_free
        pages = self.pool.allocate(n)
        assert (pages is None) == (n > free_before)
        if pages is not None:
            assert pages == sorted(pages)
            assert not {page for holder in self.holders for page in holder} & set(pages)
            for page in pages:
                self.contents.pop(page, None)
            self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.holders))
        self.pool.retain(pages)
        self.holders.append(list(pages))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), name=st.integers(0, 5))
    def publish(self, data: st.DataObject, name: int) -> None:
        page = data.draw(st.sampled_from(sorted({page for holder in self.holders for page in holder})))
        if page in self.contents and self.contents[page] != name:
            with pytest.raises(InvariantError):
                self.pool.publish(page, content(name))
            return
        self.pool.publish(page, content(name))
        if name not in self.contents.values():
            self.contents[page] = name

    @rule(names=st.lists(st.integers(0, 5), max_size=4, unique=True))
    def lookup(self, names: list[int]) -> None:
        page_of = {name: page for page, name in self.contents.items()}
        expected = []
        for name in names:
            if name not in page_of:
                break
            expected.append(page_of[name])
        assert self.pool.lookup([content(name) for name in names]) == expected
        self.holders.append(expected)

    @rule(page=st.integers(0, 6))
    def forget(self, page: int) -> None:
        self.pool.forget([page])
        self.contents.pop(page, None)

    @invariant()
    def books_agree(self) -> None:
        references = [page for holder in self.holders for page in holder]
        self.pool.check(references)
        held, cached = set(references), set(self.contents) - set(references)
        assert self.pool.counts() == PageCounts(7 - len(held) - len(cached), len(cached), len(held))

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.release(holder)
        self.pool.forget(range(7))
        assert self.pool.counts() == PageCounts(7, 0, 0)


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
