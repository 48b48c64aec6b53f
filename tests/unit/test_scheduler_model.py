"""Scheduler: whatever it does with budget, pages and neighbours, a request's tokens are a function of its prompt."""

from fake_worker import VOCABULARY, FakeWorker, next_token, oracle, request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg.request import FinishReason, Request, Status

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

    @precondition(lambda self: self.worker.flying)
    @rule()
    def shed(self) -> None:
        """Afterwards nothing holds a page but what is alive."""
        ended = [holder for holder in self.worker.scheduler.audit() if holder.status is Status.FINISHED]
        assert self.worker.shed() == bool(ended)
        assert all(holder.status is not Status.FINISHED for holder in self.worker.scheduler.audit())

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
