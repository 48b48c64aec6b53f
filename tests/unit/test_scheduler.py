"""Scheduler: whatever it does with budget, pages and neighbours, a request's tokens are a function of its prompt.

The fake model has real pages: it writes each computed position into them when the step is committed and reads all
earlier ones back, so a page that is reused early, shared wrongly or not computed at all changes the tokens.
"""

import random
import zlib
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg.cache.pages import PageCounts, PageHash, PagePool
from disagg.cache.prefix import page_hashes
from disagg.engine.batch import Batch, Committed, Output
from disagg.engine.scheduler import Scheduler
from disagg.errors import InvariantError, RequestError
from disagg.request import FinishReason, Request, SamplingParams, Status

VOCABULARY = 8


def next_token(tokens: list[int]) -> int:
    """The model: any change of any earlier token changes the next one, one time in eight unseen."""
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def request(
    name: str,
    prompt: list[int] | int,
    max_tokens: int = 4,
    *,
    order: float = 0.0,
    stop_ids: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    decode_elsewhere: bool = False,
    presence_penalty: float = 0.0,
) -> Request:
    """A request; a prompt given as a number has that many tokens, different for each name."""
    if isinstance(prompt, int):
        prompt = random.Random(name).choices(range(VOCABULARY), k=prompt)
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, presence_penalty=presence_penalty)
    return Request(name, len(prompt), list(prompt), params, stop_ids, order, decode_elsewhere)


def oracle(wanted: Request, max_len: int) -> tuple[list[int], FinishReason]:
    """All tokens of a request and why it ends, computed without scheduler and pages."""
    tokens = wanted.tokens[: wanted.prompt_len]
    while True:
        tokens.append(next_token(tokens))
        num_output = len(tokens) - wanted.prompt_len
        if tokens[-1] in wanted.stop_ids and num_output >= wanted.params.min_tokens:
            return tokens, FinishReason.STOP
        if num_output == wanted.params.max_tokens or len(tokens) == max_len:
            return tokens, FinishReason.LENGTH


@dataclass
class Work:
    """What a step was told to compute for one request, as a device would remember it. Tokens may be still to come."""

    request: Request
    pages: list[int]
    start: int
    stop: int
    samples: bool


class FakeWorker:
    """A scheduler and a model with pages; steps are launched by `plan` and take effect in `commit`.

    `ahead`: steps are planned on tokens to come, as a device does that keeps them.
    """

    def __init__(self, num_pages: int = 64, page_size: int = 4, ahead: bool = False, **options) -> None:
        self.ahead = ahead
        self.pool = PagePool(num_pages, page_size)
        self.scheduler = Scheduler(self.pool, **({"max_batch_tokens": 64, "max_running": 8, "max_len": 64} | options))
        self.storage = [[-1] * page_size for _ in range(num_pages)]
        self.flying: deque[tuple[Batch, list[Work]]] = deque()
        self.planned: dict[str, int] = {}  # id -> positions planned since admission
        self.finished: list[Request] = []
        self.holding: list[Request] = []

    def plan(self) -> Batch | None:
        scheduler = self.scheduler
        batch = scheduler.plan(self.ahead)
        if batch is None:
            return None
        assert batch.num_tokens > 0
        assert len(batch.decodes) + len(batch.chunks) <= scheduler.max_running
        if scheduler.chunked_prefill:
            assert batch.num_tokens <= scheduler.max_batch_tokens
        for preempted in batch.preempted:
            self.planned.pop(preempted.id, None)
        last = self.flying[-1][0].sampling() if self.flying else []
        for decoding in batch.decodes:
            early = decoding.num_computed == len(decoding.tokens) + 1
            assert not early or (self.ahead and decoding in last), "a token to come is one that the last step samples"
        work = [(r, r.num_computed - 1, r.num_computed, True) for r in batch.decodes]
        work += [(c.request, c.start, c.start + c.length, c.samples) for c in batch.chunks]
        launched = []
        for wanted, start, stop, samples in work:
            assert start == self.planned.get(wanted.id, wanted.num_cached), "positions are computed in order, once"
            assert samples == (stop >= len(wanted.tokens))
            assert wanted.num_computed == stop
            self.planned[wanted.id] = stop
            launched.append(Work(wanted, list(wanted.pages), start, stop, samples))
        self.flying.append((batch, launched))
        return batch

    def run(self, work: Work) -> int:
        """Write positions from `start`, read all back through the pages; garbage for a request that has ended."""
        size = self.pool.page_size
        for position in range(work.start, work.stop):
            alive = work.request.status is not Status.FINISHED
            self.storage[work.pages[position // size]][position % size] = work.request.tokens[position] if alive else -1
        seen = [self.storage[work.pages[n // size]][n % size] for n in range(work.stop)]
        return next_token(seen) if -1 not in seen else 0

    def commit(self) -> Committed:
        batch, launched = self.flying.popleft()
        tokens = [token for work, token in [(work, self.run(work)) for work in launched] if work.samples]
        done = self.scheduler.commit(batch, Output(tokens, [None] * len(tokens)))
        self.finished += done.finished
        self.holding += done.holding
        for wanted in done.finished:
            del self.planned[wanted.id]
        return done

    def step(self) -> Batch:
        """One step; with `ahead`, one more is planned before it is committed, and stays in flight."""
        batch = self.plan()
        assert batch is not None
        while len(self.flying) > self.ahead:
            self.commit()
        self.scheduler.check()
        return batch

    def adopt(self, wanted: Request, num_computed: int | None = None) -> bool:
        """As a hand-off does: reserve pages, copy the content, adopt. False without room."""
        wanted.num_computed = len(wanted.tokens) - 1 if num_computed is None else num_computed
        pages = self.pool.allocate(self.pool.num_pages_for(len(wanted.tokens)))
        if pages is None:
            return False
        wanted.pages = pages
        size = self.pool.page_size
        for position in range(wanted.num_computed):
            self.storage[pages[position // size]][position % size] = wanted.tokens[position]
        self.planned[wanted.id] = wanted.num_computed
        self.scheduler.adopt(wanted)
        return True

    def abort(self, request_id: str) -> Request | None:
        self.planned.pop(request_id, None)
        self.holding = [wanted for wanted in self.holding if wanted.id != request_id]
        return self.scheduler.abort(request_id)

    def release(self, wanted: Request) -> None:
        self.planned.pop(wanted.id, None)
        self.holding.remove(wanted)
        self.scheduler.release(wanted)

    def drain(self) -> None:
        """Until nothing is left. Fails if the scheduler is stuck or leaves a page behind."""
        while not self.scheduler.is_idle:
            idle = self.plan() is None
            if idle and not self.flying:
                assert self.holding, "nothing in flight, nothing to wait for, nothing planned"
                self.release(self.holding[0])
            while len(self.flying) > (self.ahead and not idle):
                self.commit()
            self.scheduler.check()
        assert self.pool.counts().held == 0
        assert self.scheduler.audit() == []
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)


def chunks(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(c.request.id, c.start, c.length, c.samples) for c in batch.chunks]


def decodes(batch: Batch) -> list[str]:
    return [r.id for r in batch.decodes]


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


# Aborting


def test_abort_of_a_request_that_is_not_in_flight_frees_at_once() -> None:
    """Waiting, running or holding; an unknown id is nobody's fault."""
    worker = FakeWorker(max_running=2)
    waiting, running = request("waiting", 4, order=3), request("running", 4, order=1)
    holding = request("holding", 4, decode_elsewhere=True, order=0)
    for wanted in (holding, running, waiting):
        worker.scheduler.add(wanted)
    worker.scheduler.add(request("other", 4, order=2))
    worker.step()
    for wanted in (waiting, running, holding):
        assert worker.abort(wanted.id) is wanted
        assert (wanted.status, wanted.finish_reason, wanted.pages) == (Status.FINISHED, FinishReason.ABORT, [])
        assert worker.abort(wanted.id) is None
        worker.scheduler.check()
    worker.drain()
    assert [r.id for r in worker.finished] == ["other"]


def test_abort_in_flight_keeps_the_pages_until_commit() -> None:
    """The step may still write them; its token is dropped; the request is not reported a second time."""
    worker = FakeWorker(num_pages=2)
    victim = request("victim", 5)
    worker.scheduler.add(victim)
    worker.plan()
    worker.abort("victim")
    assert victim.status is Status.FINISHED
    assert worker.scheduler.audit() == [("victim", Status.FINISHED, [0, 1])]
    worker.scheduler.check()
    successor = request("victim", 5, order=1)  # the name is free again
    worker.scheduler.add(successor)
    assert worker.plan() is None
    assert worker.commit() == Committed([], [])
    assert victim.num_output == 0
    assert chunks(worker.plan()) == [("victim", 0, 5, True)]
    worker.commit()
    worker.drain()
    assert successor.tokens == oracle(successor, 64)[0]


def test_pages_wait_for_the_last_of_several_steps_in_flight() -> None:
    """With steps planned ahead, two of them may write the same request's pages."""
    worker = FakeWorker(num_pages=2, max_batch_tokens=4)
    worker.scheduler.add(request("a", 7, 1))
    worker.plan()
    worker.plan()
    worker.abort("a")
    worker.commit()
    assert worker.pool.num_free == 0
    worker.commit()
    assert worker.pool.num_free == 2


def test_abort_may_give_another_reason() -> None:
    """A stop string is found outside, an error is not the client's wish."""
    worker = FakeWorker()
    worker.scheduler.add(request("a", 3))
    ended = worker.scheduler.abort("a", FinishReason.STOP)
    assert ended is not None
    assert ended.finish_reason is FinishReason.STOP


# Running ahead


def test_next_step_is_planned_before_the_last_token_is_known() -> None:
    """Prompt and decode alike; a request that cannot go on by count is left out, so nothing is computed in vain."""
    worker = FakeWorker(ahead=True)
    worker.scheduler.add(request("a", 6, max_tokens=3))
    assert chunks(worker.plan()) == [("a", 0, 6, True)]
    assert decodes(worker.plan()) == ["a"]
    assert worker.plan() is None, "two of its tokens are to come"
    worker.commit()
    assert decodes(worker.plan()) == ["a"]
    worker.commit()
    assert worker.plan() is None, "its third token is its last"
    worker.commit()
    assert [r.num_output for r in worker.finished] == [3]
    assert worker.scheduler.is_idle


def test_request_that_stops_early_drops_its_extra_step() -> None:
    """The token of the step planned on its last one is dropped, and its pages stay held until that is committed."""
    worker = FakeWorker(ahead=True)
    wanted = request("a", 6, max_tokens=9, stop_ids=frozenset(range(VOCABULARY)))
    worker.scheduler.add(wanted)
    worker.plan()
    assert decodes(worker.plan()) == ["a"]
    assert worker.commit().finished == [wanted]
    assert worker.scheduler.audit() == [("a", Status.FINISHED, [0, 1])]
    worker.scheduler.check()
    assert not worker.scheduler.is_idle
    assert worker.commit() == Committed([], [])
    assert wanted.num_output == 1
    assert worker.pool.counts().held == 0
    assert worker.scheduler.is_idle


def test_request_with_penalties_waits_for_its_tokens() -> None:
    """The host needs all earlier tokens for them; others go on beside it."""
    worker = FakeWorker(ahead=True)
    worker.scheduler.add(request("penalised", 3, presence_penalty=1.0))
    worker.scheduler.add(request("plain", 3, order=1))
    worker.plan()
    assert decodes(worker.plan()) == ["plain"]
    worker.commit()
    assert decodes(worker.plan()) == ["penalised", "plain"]
    worker.drain()


def test_prefill_for_another_worker_does_not_run_ahead_of_its_first_token() -> None:
    """Its pages are handed over as they are; told to stay here meanwhile, it goes on as any other."""
    worker = FakeWorker(ahead=True)
    elsewhere, staying = (request(name, 3, decode_elsewhere=True) for name in ("elsewhere", "staying"))
    worker.scheduler.add(elsewhere)
    worker.scheduler.add(staying)
    worker.plan()
    staying.decode_elsewhere = False
    assert decodes(worker.plan()) == ["staying"]
    assert worker.commit().holding == [elsewhere]
    worker.drain()
    assert staying.tokens == oracle(staying, 64)[0]


def test_lack_of_pages_ends_running_ahead_so_that_the_youngest_gives_way() -> None:
    """While everybody is in flight nobody can be preempted; then it is the youngest, not whoever is not in flight."""
    worker = FakeWorker(num_pages=4, ahead=True)
    old, young = request("old", 6, 6), request("young", 6, 6, order=1)
    worker.scheduler.add(old)
    worker.scheduler.add(young)
    worker.plan()
    worker.plan()
    worker.commit()
    worker.plan()
    worker.commit()
    assert worker.plan() is None, "position 8 of both needs a page, and there is none"
    worker.commit()
    batch = worker.plan()
    assert (batch.preempted, decodes(batch)) == ([young], ["old"])
    worker.drain()
    assert [r.tokens for r in (old, young)] == [oracle(r, 64)[0] for r in (old, young)]


def test_abort_with_two_steps_in_flight() -> None:
    """Both tokens are dropped and the pages are kept until the second is committed."""
    worker = FakeWorker(ahead=True)
    worker.scheduler.add(request("a", 3, max_tokens=9))
    worker.plan()
    worker.plan()
    victim = worker.abort("a")
    worker.commit()
    assert worker.pool.counts().held == 1
    worker.commit()
    assert (worker.pool.counts().held, victim.num_output) == (0, 0)


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


# Anything, in any order

OPTIONS = st.fixed_dictionaries(
    {
        "num_pages": st.integers(6, 14),
        "max_batch_tokens": st.integers(1, 16),
        "max_mixed_tokens": st.none() | st.integers(1, 16),
        "max_running": st.integers(1, 6),
        "chunked_prefill": st.booleans(),
        "prefix_caching": st.booleans(),
        "ahead": st.booleans(),
    }
)
PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=14),
    st.integers(1, 14).map(lambda length: [1] * length),  # often the same beginning
)
MAX_LEN = 24  # six pages: any one request fits the smallest pool


WISHES = st.tuples(PROMPTS, st.integers(1, 10), st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2))


@given(OPTIONS, st.lists(WISHES, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_tokens_do_not_depend_on_scheduling(options: dict, wishes: list[tuple[list[int], int, frozenset[int]]]) -> None:
    """Chunk size, budget, preemption, sharing, company and running ahead change when a token comes, never which."""
    worker = FakeWorker(max_len=MAX_LEN, **options)
    wanted = [request(f"r{n}", *wish[:2], order=n, stop_ids=wish[2]) for n, wish in enumerate(wishes)]
    for one in wanted:
        worker.scheduler.add(one)
    worker.drain()
    assert sorted(r.id for r in worker.finished) == [r.id for r in wanted]
    assert [(r.tokens, r.finish_reason) for r in wanted] == [oracle(r, MAX_LEN) for r in wanted]


class SchedulerMachine(RuleBasedStateMachine):
    """Everything a server, two workers and a device may do to a scheduler, with up to two steps in flight."""

    @initialize(options=OPTIONS)
    def start(self, options: dict) -> None:
        self.worker = FakeWorker(max_len=MAX_LEN, **options)
        self.requests: list[Request] = []
        self.aborted: set[str] = set()

    def make(self, prompt: list[int], order: float, **options) -> Request:
        wanted = request(f"r{len(self.requests)}", prompt, order=order, **options)
        self.requests.append(wanted)
        return wanted

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 10),
        order=st.integers(0, 9),
        stop_ids=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=1),
        decode_elsewhere=st.booleans(),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    )
    def add(self, prompt: list[int], order: float, **options) -> None:
        self.worker.scheduler.add(self.make(prompt, order, **options))

    @rule(prompt=PROMPTS, order=st.integers(0, 9), cut=st.integers(1, 13))
    def adopt(self, prompt: list[int], order: float, cut: int) -> None:
        """Copied whole, with its first token, or in part."""
        wanted = self.make(prompt, order)
        if cut >= len(prompt):
            wanted.tokens.append(next_token(prompt))
        if not self.worker.adopt(wanted, min(cut, len(prompt))):
            self.requests.remove(wanted)

    @precondition(lambda self: len(self.worker.flying) < 2)
    @rule()
    def plan(self) -> None:
        self.worker.plan()

    @precondition(lambda self: self.worker.flying)
    @rule()
    def commit(self) -> None:
        self.worker.commit()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(self.requests))
        alive = wanted.status is not Status.FINISHED
        assert (self.worker.abort(wanted.id) is wanted) == alive
        if alive:
            self.aborted.add(wanted.id)

    @precondition(lambda self: self.worker.holding)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(self.worker.holding))
        self.worker.release(wanted)

    @precondition(lambda self: self.worker.holding)
    @rule(data=st.data())
    def go_on_here(self, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(self.worker.holding))
        wanted.decode_elsewhere = False
        self.worker.scheduler.adopt(wanted)
        self.worker.holding.remove(wanted)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "worker"):
            self.worker.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "worker"):
            return
        self.worker.drain()
        assert self.worker.pool.num_free == self.worker.pool.num_pages
        finished = [r.id for r in self.worker.finished]
        assert len(finished) == len(set(finished))
        for wanted in self.requests:
            assert wanted.status is Status.FINISHED
            tokens, reason = oracle(wanted, MAX_LEN)
            assert wanted.tokens == tokens[: len(wanted.tokens)]
            assert (wanted.id in finished) == (wanted.finish_reason not in (None, FinishReason.ABORT))
            assert (wanted.id in self.aborted) == (wanted.finish_reason is FinishReason.ABORT)
            if wanted.id in finished:
                assert (wanted.tokens, wanted.finish_reason) == (tokens, reason)
            elif wanted.id not in self.aborted:
                assert wanted.decode_elsewhere
                assert wanted.num_output == 1


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
