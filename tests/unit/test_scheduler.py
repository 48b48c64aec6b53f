"""Scheduler: who is planned when, with how much, and who gives way. Each test names one rule."""

import pytest
from fake_worker import VOCABULARY, FakeWorker, chunks, decodes, oracle, request

from disagg.cache.pages import PageCounts
from disagg.engine.batch import Output
from disagg.errors import InvariantError, RequestError
from disagg.request import FinishReason, Request, Status

# Catching up


def test_life_of_a_request() -> None:
    """Prompt in one chunk, then one position a step; the last sampled token is never computed."""
    worker = FakeWorker()
    wanted = request("a", 6, max_tokens=3)
    worker.scheduler.add(wanted)
    assert wanted.status is Status.WAITING
    assert chunks(worker.step()) == [("a", 0, 6, True)]
    assert (wanted.status, wanted.num_computed, wanted.num_output) == (Status.RUNNING, 6, 1)
    assert decodes(worker.step()) == ["a"]
    assert decodes(worker.step()) == ["a"]
    assert worker.plan() is None
    assert (wanted.status, wanted.finish_reason, wanted.num_computed) == (Status.FINISHED, FinishReason.LENGTH, 8)
    assert worker.finished == [wanted]
    assert wanted.pages == []
    assert wanted.tokens == oracle(wanted, 64)[0]


def test_long_prompt_is_cut_into_chunks_beside_decodes() -> None:
    """Decodes come first and count; the rest of the budget goes to chunks, and only the last one samples."""
    worker = FakeWorker(max_batch_tokens=5)
    worker.scheduler.add(request("a", 2, order=0))
    worker.step()
    worker.scheduler.add(request("b", 9, order=1))
    batches = [worker.step() for _ in range(3)]
    assert [decodes(batch) for batch in batches] == [["a"]] * 3
    assert [chunks(batch) for batch in batches] == [[("b", 0, 4, False)], [("b", 4, 4, False)], [("b", 8, 1, True)]]


def test_beside_decodes_chunks_have_their_own_limit() -> None:
    """`max_mixed_tokens` counts decodes and chunks of a step that has both; alone each has `max_batch_tokens`."""
    worker = FakeWorker(max_batch_tokens=8, max_mixed_tokens=4)
    worker.scheduler.add(request("a", 8, max_tokens=4, order=0))
    assert chunks(worker.step()) == [("a", 0, 8, True)]
    worker.scheduler.add(request("b", 17, order=1))
    batches = [worker.step() for _ in range(5)]
    assert [decodes(batch) for batch in batches] == [["a"]] * 3 + [[], ["b"]]
    lengths = [[chunk[2] for chunk in chunks(batch)] for batch in batches]
    assert lengths == [[3], [3], [3], [8], []]


def test_a_step_with_enough_begins_no_other_prompt() -> None:
    """`enough_tokens` ends a step between prompts, never within one."""
    worker = FakeWorker(max_batch_tokens=16, enough_tokens=6)
    for name, length, order in (("a", 4, 0), ("b", 9, 1), ("c", 3, 2), ("d", 20, 3)):
        worker.scheduler.add(request(name, length, max_tokens=1, order=order))
    batches = [worker.step() for _ in range(3)]
    assert [chunks(batch) for batch in batches] == [
        [("a", 0, 4, True), ("b", 0, 9, True)],
        [("c", 0, 3, True), ("d", 0, 13, False)],
        [("d", 13, 7, True)],
    ]


def test_first_come_first_served_by_order() -> None:
    """`order` decides, then the id; not the time of add."""
    worker = FakeWorker(max_batch_tokens=6)
    for name, order in (("c", 2.0), ("b", 1.0), ("a", 1.0)):
        worker.scheduler.add(request(name, 4, order=order))
    assert chunks(worker.plan()) == [("a", 0, 4, True), ("b", 0, 2, False)]


def test_nobody_overtakes_the_oldest_that_lacks_pages() -> None:
    """A small request behind a large one waits with it."""
    worker = FakeWorker(num_pages=4)
    worker.scheduler.add(request("a", 12, max_tokens=1))
    worker.plan()
    worker.scheduler.add(request("b", 8, order=1))
    worker.scheduler.add(request("c", 1, order=2))
    assert worker.plan() is None
    worker.commit()
    assert chunks(worker.plan()) == [("b", 0, 8, True), ("c", 0, 1, True)]


def test_admission_takes_all_pages_at_once() -> None:
    """Whole-request credit: a half-read prompt already has the pages of its other half."""
    worker = FakeWorker(num_pages=5, max_batch_tokens=4)
    worker.scheduler.add(request("a", 12))
    worker.scheduler.add(request("b", 12, order=1))
    worker.step()
    assert worker.pool.counts() == PageCounts(free=2, cached=0, held=3)
    assert worker.scheduler.num_waiting == 1


def test_max_running_limits_admission() -> None:
    """Others wait until one ends."""
    worker = FakeWorker(max_running=2)
    for n in range(3):
        worker.scheduler.add(request(f"r{n}", 3, max_tokens=2, order=n))
    assert [name for name, *_ in chunks(worker.step())] == ["r0", "r1"]
    assert chunks(worker.step()) == []
    assert chunks(worker.step()) == [("r2", 0, 3, True)]


def test_adopted_beyond_the_limits_take_turns_by_age() -> None:
    """A step never computes more than `max_running` requests or `max_batch_tokens` positions; the oldest go first."""
    for limits in ({"max_running": 2}, {"max_batch_tokens": 2}):
        worker = FakeWorker(**limits)
        for n in (3, 1, 2):
            worker.adopt(request(f"r{n}", 3, max_tokens=3, order=n))
        assert decodes(worker.step()) == ["r1", "r2"]
        worker.drain()
        assert {r.id: r.tokens for r in worker.finished} == {r.id: oracle(r, 64)[0] for r in worker.finished}


def test_without_chunked_prefill_a_prompt_is_computed_whole() -> None:
    """The first prompt of a step goes whole whatever its length; more only within the budget; none overtakes."""
    worker = FakeWorker(chunked_prefill=False, max_batch_tokens=8)
    for name, length, order in (("a", 11, 0), ("b", 4, 1), ("c", 6, 2), ("d", 1, 3)):
        worker.scheduler.add(request(name, length, order=order))
    assert chunks(worker.step()) == [("a", 0, 11, True)]
    assert chunks(worker.step()) == [("b", 0, 4, True)]
    assert chunks(worker.step()) == [("c", 0, 6, True)]
    assert chunks(worker.step()) == [("d", 0, 1, True)]


# Ending


def test_stop_id_ends_a_request_but_not_before_min_tokens() -> None:
    """The stop token is kept; `min_tokens` counts it."""
    for min_tokens in (0, 3, 6):
        wanted = request("a", [1, 2, 3], 12, stop_ids=frozenset(range(VOCABULARY)), min_tokens=min_tokens)
        worker = FakeWorker()
        worker.scheduler.add(wanted)
        worker.drain()
        assert (wanted.num_output, wanted.finish_reason) == (max(1, min_tokens), FinishReason.STOP)


def test_stop_is_preferred_to_length() -> None:
    """A stop token that is also the last allowed one is a stop."""
    wanted = request("a", 3, 1, stop_ids=frozenset(range(VOCABULARY)))
    worker = FakeWorker()
    worker.scheduler.add(wanted)
    worker.drain()
    assert wanted.finish_reason is FinishReason.STOP


def test_max_len_ends_a_request() -> None:
    """Prompt and output together never exceed the context."""
    wanted = request("a", 5, 100)
    worker = FakeWorker(max_len=8)
    worker.scheduler.add(wanted)
    worker.drain()
    assert (len(wanted.tokens), wanted.finish_reason) == (8, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (request("a", 0), "must have 1 to 15"),
        (request("a", 16), "must have 1 to 15"),
        (request("a", 4, 10), "need 4 pages of 4 tokens and this worker has 3"),
        (request("taken", 1), "is in use"),
    ],
)
def test_what_can_never_be_served_is_refused(wanted: Request, sentence: str) -> None:
    """Too long for the context or the pool, empty, or a name in use: refused at once, and nothing is kept."""
    worker = FakeWorker(num_pages=3, max_len=16)
    worker.scheduler.add(request("taken", 1))
    with pytest.raises(RequestError, match=sentence):
        worker.scheduler.add(wanted)
    assert worker.scheduler.num_waiting == 1


def test_largest_servable_request_is_served() -> None:
    """The bound of refusal is exact: the last token needs no position. Decoding elsewhere does not widen it."""
    worker = FakeWorker(num_pages=3)
    worker.scheduler.add(request("a", 4, 9))
    worker.drain()
    with pytest.raises(RequestError, match="need 4 pages"):
        worker.scheduler.add(request("b", 4, 10, decode_elsewhere=True))


# Growing and preemption


def test_decode_takes_a_page_at_a_time() -> None:
    """A page is taken when its first position is computed, not before."""
    worker = FakeWorker()
    wanted = request("a", 3, 8)
    worker.scheduler.add(wanted)
    assert [(worker.step(), len(wanted.pages))[1] for _ in range(7)] == [1, 1, 2, 2, 2, 2, 3]


def test_youngest_is_preempted_and_comes_back_with_its_age() -> None:
    """It loses its pages, computes prompt and output again, emits nothing twice, and goes before younger ones."""
    worker = FakeWorker(num_pages=4)
    old, young, later = (request(name, 6, 6, order=n) for n, name in enumerate(("old", "young", "later")))
    worker.scheduler.add(old)
    worker.scheduler.add(young)
    worker.step()
    worker.step()
    worker.step()
    worker.scheduler.add(later)
    batch = worker.step()
    assert (batch.preempted, decodes(batch)) == ([young], ["old"])
    assert (young.status, young.num_computed, young.pages, young.num_preemptions) == (Status.WAITING, 0, [], 1)
    assert young.num_output == 3
    seen = []
    while not worker.scheduler.is_idle:
        seen += chunks(worker.step())
    assert seen[0] == ("young", 0, 9, True)
    assert [r.tokens for r in (old, young, later)] == [oracle(r, 64)[0] for r in (old, young, later)]


def test_half_read_prompt_may_be_preempted() -> None:
    """The youngest is the youngest, whether it decodes or still reads."""
    worker = FakeWorker(num_pages=4, max_batch_tokens=4)
    worker.scheduler.add(request("a", 4, 6))
    worker.step()
    reading = request("b", 12, 1, order=1)
    worker.adopt(reading, num_computed=2)
    assert worker.plan().preempted == [reading]
    assert reading.status is Status.WAITING
    worker.commit()
    worker.drain()
    assert reading.tokens == oracle(reading, 64)[0]


def test_request_in_flight_is_not_preempted() -> None:
    """A step planned ahead may not take pages that the step before still writes: the next youngest gives way."""
    worker = FakeWorker(num_pages=5, max_batch_tokens=5)
    old, young, reading = request("old", 4, 3), request("young", 4, 3, order=1), request("reading", 12, 1, order=2)
    worker.adopt(old, num_computed=3)
    worker.adopt(young, num_computed=3)
    worker.scheduler.add(reading)
    worker.plan()
    assert worker.plan() is not None  # only `reading`: the tokens of the others are still to come
    worker.commit()
    batch = worker.plan()
    assert (batch.preempted, decodes(batch)) == ([young], ["old"])
    worker.drain()
    assert [r.tokens for r in (old, young, reading)] == [oracle(r, 64)[0] for r in (old, young, reading)]


def test_request_for_another_worker_is_never_preempted() -> None:
    """Its announced pages may be being read: the next youngest that decodes here gives way instead."""
    worker = FakeWorker(num_pages=6, max_batch_tokens=9)
    old, young = request("old", 4, 6), request("young", 4, 6, order=1)
    elsewhere = request("elsewhere", 16, 6, order=2, decode_elsewhere=True)
    for wanted in (old, young, elsewhere):
        worker.scheduler.add(wanted)
    assert chunks(worker.step())[2] == ("elsewhere", 0, 1, False)
    assert worker.pool.num_free == 0
    batch = worker.step()
    assert (batch.preempted, decodes(batch)) == ([young], ["old"])
    worker.drain()
    assert elsewhere.num_preemptions == 0


def test_decode_gives_way_to_a_prefill_for_another_worker() -> None:
    """With all other pages announced, the decoding request preempts itself and goes on when they are released."""
    worker = FakeWorker(num_pages=4)
    here, elsewhere = request("here", 4, 6), request("elsewhere", 12, 2, order=1, decode_elsewhere=True)
    worker.scheduler.add(here)
    worker.scheduler.add(elsewhere)
    worker.step()
    assert worker.holding == [elsewhere]
    assert worker.plan() is None
    assert (here.status, here.num_preemptions) == (Status.WAITING, 1)
    worker.release(elsewhere)
    batch = worker.step()
    assert batch.preempted == [here], "a preemption in a step that computed nothing is reported with the next"
    worker.drain()
    assert here.tokens == oracle(here, 64)[0]


# Contracts at the border


def test_request_with_a_token_to_come_is_not_planned_again() -> None:
    """A step planned ahead leaves it out, and goes on with chunks that do not sample."""
    worker = FakeWorker(max_batch_tokens=4)
    worker.scheduler.add(request("a", 2))
    worker.scheduler.add(request("b", 7, order=1))
    first, second, third = worker.plan(), worker.plan(), worker.plan()
    assert chunks(first) == [("a", 0, 2, True), ("b", 0, 2, False)]
    assert chunks(second) == [("b", 2, 4, False)]
    assert chunks(third) == [("b", 6, 1, True)]
    assert worker.plan() is None
    worker.commit()
    assert decodes(worker.plan()) == ["a"]
    worker.drain()
    assert {r.id: r.tokens for r in worker.finished} == {r.id: oracle(r, 64)[0] for r in worker.finished}


def test_commit_refuses_what_was_not_planned_next() -> None:
    """Out of order, twice, or with a wrong number of tokens: an InvariantError before anything changes."""
    worker = FakeWorker(max_batch_tokens=4)
    worker.scheduler.add(request("a", 7))
    first, second = worker.plan(), worker.plan()
    scheduler = worker.scheduler
    with pytest.raises(InvariantError, match="before an older one"):
        scheduler.commit(second, Output([1], [None]))
    scheduler.commit(first, Output([], []))
    with pytest.raises(InvariantError, match="committed twice"):
        scheduler.commit(first, Output([], []))
    with pytest.raises(InvariantError, match="samples 1 tokens brought 2"):
        scheduler.commit(second, Output([1, 1], [None, None]))
    scheduler.commit(second, Output([1], [None]))
    scheduler.check()


def test_check_finds_a_page_without_holder_and_a_lost_request() -> None:
    """The books are compared both ways; references of others must be named."""
    worker = FakeWorker()
    worker.scheduler.add(request("a", 3))
    worker.step()
    reserved = worker.pool.allocate(2)
    with pytest.raises(InvariantError, match="users than holders"):
        worker.scheduler.check()
    worker.scheduler.check(others=reserved)
    worker.scheduler._ready.clear()
    with pytest.raises(InvariantError, match="in no queue or in two"):
        worker.scheduler.check(others=reserved)
