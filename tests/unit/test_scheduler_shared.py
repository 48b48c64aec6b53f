"""Scheduler: requests and pages that another worker, or another request, has a part in."""

import pytest
from fake_worker import VOCABULARY, FakeWorker, chunks, decodes, next_token, oracle, request

from disagg.cache.pages import PageHash
from disagg.cache.prefix import page_hashes
from disagg.errors import InvariantError, RequestError
from disagg.request import Status

# Two workers


def test_prefilled_request_holds_its_pages_until_released() -> None:
    """The first token comes from here; then it takes no part in plans and its pages stay as they are."""
    worker = FakeWorker(max_running=1)
    wanted = request("a", 6, 5, decode_elsewhere=True)
    worker.scheduler.add(wanted)
    worker.step()
    assert worker.holding == [wanted]
    assert (wanted.status, wanted.num_output, len(wanted.pages)) == (Status.HOLDING, 1, 2)
    assert worker.plan() is None
    worker.scheduler.add(request("b", 2, 1, order=1))
    assert chunks(worker.step()) == [("b", 0, 2, True)], "it takes no place among the running"
    assert worker.pool.counts().held == 2
    worker.release(wanted)
    assert (wanted.status, wanted.finish_reason, wanted.pages) == (Status.FINISHED, None, [])
    assert worker.pool.counts().held == 0
    with pytest.raises(InvariantError, match="not holding"):
        worker.scheduler.release(wanted)


@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset(range(VOCABULARY))])
def test_request_that_ends_with_its_first_token_is_not_handed_off(stop_ids: frozenset[int]) -> None:
    """One token wanted, or the first one stops: finished here, nothing is held."""
    worker = FakeWorker()
    worker.scheduler.add(request("a", 6, 9 if stop_ids else 1, stop_ids=stop_ids, decode_elsewhere=True))
    worker.step()
    assert worker.holding == []
    assert [r.id for r in worker.finished] == ["a"]
    assert worker.pool.num_free == 64


@pytest.mark.parametrize("num_output", [1, 3])
@pytest.mark.parametrize("length", [3, 4, 5])
def test_adopted_request_decodes_at_once(length: int, num_output: int) -> None:
    """No prefill: its next step is a decode, also at a page's end and when it has a page in hand."""
    worker = FakeWorker()
    wanted = request("a", length, 6)
    for _ in range(num_output):
        wanted.tokens.append(next_token(wanted.tokens))
    assert worker.adopt(wanted)
    assert wanted.status is Status.RUNNING
    assert decodes(worker.step()) == ["a"]
    assert len(wanted.pages) == worker.pool.num_pages_for(wanted.num_computed)
    worker.drain()
    assert wanted.tokens == oracle(wanted, 64)[0]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_held_request_nobody_came_for_goes_on_here(prefix_caching: bool) -> None:
    """A dead decode worker costs nothing that was computed; before the first token, unsetting the flag is enough."""
    worker = FakeWorker(max_batch_tokens=4, prefix_caching=prefix_caching)
    held, reading = (request(name, 6, 5, order=n, decode_elsewhere=True) for n, name in enumerate(("held", "reading")))
    worker.scheduler.add(held)
    worker.scheduler.add(reading)
    worker.step()
    worker.step()
    assert (held.status, reading.num_computed) == (Status.HOLDING, 2)
    with pytest.raises(InvariantError, match="cannot be adopted"):
        worker.scheduler.adopt(held)
    held.decode_elsewhere = reading.decode_elsewhere = False
    worker.scheduler.adopt(held)
    worker.holding.clear()
    batch = worker.step()
    assert (decodes(batch), chunks(batch)) == (["held"], [("reading", 2, 3, False)])
    worker.drain()
    assert [r.tokens for r in worker.finished] == [oracle(r, 64)[0] for r in (held, reading)]


def test_partly_copied_request_computes_the_rest() -> None:
    """A hand-off that broke off in the middle costs only what is missing."""
    worker = FakeWorker()
    wanted = request("a", 9, 3)
    worker.adopt(wanted, num_computed=4)
    assert chunks(worker.step()) == [("a", 4, 5, True)]
    worker.drain()
    assert wanted.tokens == oracle(wanted, 64)[0]


@pytest.mark.parametrize(("num_computed", "num_pages"), [(0, 2), (6, 2), (5, 1), (2, 1)])
def test_adoption_with_wrong_counts_is_an_invariant_error(num_computed: int, num_pages: int) -> None:
    """Nothing computed, everything computed, or too few pages: the pages stay the caller's."""
    worker = FakeWorker()
    wanted = request("a", 6)
    wanted.num_computed = num_computed
    wanted.pages = worker.pool.allocate(num_pages) or []
    with pytest.raises(InvariantError, match="cannot be adopted"):
        worker.scheduler.adopt(wanted)
    worker.scheduler.check(others=wanted.pages)


def test_running_request_cannot_be_adopted_again() -> None:
    """A repeated message is refused and changes nothing."""
    worker = FakeWorker()
    wanted = request("a", 6)
    worker.adopt(wanted, num_computed=5)
    with pytest.raises(RequestError, match="in use"):
        worker.scheduler.adopt(wanted)
    assert worker.scheduler.num_running == 1
    worker.scheduler.check()


# Prefix caching


def test_second_request_computes_only_what_differs() -> None:
    """Full pages of a common beginning are shared; at least one token is computed."""
    worker = FakeWorker(prefix_caching=True)
    one, two, same = request("one", [1] * 10), request("two", [1] * 8 + [2] * 3), request("same", [1] * 8)
    for wanted, expected in ((one, ("one", 0, 10, True)), (two, ("two", 8, 3, True)), (same, ("same", 4, 4, True))):
        worker.scheduler.add(wanted)
        assert chunks(worker.step()) == [expected]
        assert wanted.num_cached == expected[1]
    assert one.pages[:2] == two.pages[:2]
    worker.drain()
    assert [r.tokens for r in (one, two, same)] == [oracle(r, 64)[0] for r in (one, two, same)]


def test_output_is_shared_too() -> None:
    """The next turn of a conversation starts from the answer's pages."""
    worker = FakeWorker(prefix_caching=True)
    first = request("first", 5, 8)
    worker.scheduler.add(first)
    worker.drain()
    second = request("second", [*first.tokens, 1, 2])
    worker.scheduler.add(second)
    worker.step()
    assert second.num_cached == 12


def test_page_is_shared_only_when_its_step_is_committed() -> None:
    """A page in flight has no content yet."""
    worker = FakeWorker(prefix_caching=True)
    worker.scheduler.add(request("one", [1] * 9))
    worker.plan()
    worker.scheduler.add(request("two", [1] * 9, order=1))
    assert chunks(worker.plan()) == [("two", 0, 9, True)]
    worker.commit()
    worker.scheduler.add(request("three", [1] * 9, order=2))
    assert chunks(worker.plan()) == [("three", 8, 1, True)]
    worker.drain()


def test_preempted_request_finds_its_own_pages() -> None:
    """Recomputation starts after what is still cached."""
    worker = FakeWorker(num_pages=4, prefix_caching=True)
    old, young = request("old", 6, 6), request("young", 6, 6, order=1)
    worker.scheduler.add(old)
    worker.scheduler.add(young)
    worker.drain()
    assert young.num_preemptions == 1
    assert young.num_cached > 0
    assert [r.tokens for r in (old, young)] == [oracle(r, 64)[0] for r in (old, young)]


def test_adopted_pages_are_shared() -> None:
    """Copied pages are as good as computed ones."""
    worker = FakeWorker(prefix_caching=True)
    adopted = request("adopted", [3] * 9)
    worker.adopt(adopted)
    local = request("local", [3] * 9, order=1)
    worker.scheduler.add(local)
    worker.step()
    assert local.num_cached == 8
    worker.drain()
    assert local.tokens == oracle(local, 64)[0]


def test_opaque_hashes_need_no_text() -> None:
    """A replayed trace names its shared pages; its tokens are placeholders and never hashed."""
    worker = FakeWorker(prefix_caching=True)
    names = [PageHash(b"a"), PageHash(b"b")]
    worker.scheduler.add(request("one", [0] * 12), hashes=names)
    worker.step()
    other, same = request("other", [0] * 12, order=1), request("same", [0] * 12, order=2)
    worker.scheduler.add(other, hashes=[PageHash(b"c")])
    worker.scheduler.add(same, hashes=names)
    worker.step()
    assert (other.num_cached, same.num_cached) == (0, 8)
    assert worker.pool.lookup(page_hashes([0] * 4, 4)) == []
