"""A worker with a fake model, by which a request's tokens are a function of its prompt.

The model has real pages: it writes each computed position into them when the step is committed and reads all earlier
ones back, so a page that is reused early, shared wrongly or not computed at all changes the tokens.
"""

import random
import zlib
from collections import deque
from dataclasses import dataclass

from disagg.cache.pages import PagePool
from disagg.engine.batch import Batch, Committed, Output
from disagg.engine.scheduler import Scheduler
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

    def shed(self) -> bool:
        """The device computes nothing more of requests that ended."""
        shed = self.scheduler.shed()
        for batch, launched in self.flying:
            left = {*batch.decodes, *(chunk.request for chunk in batch.chunks)}
            launched[:] = [work for work in launched if work.request in left]
        return shed

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
