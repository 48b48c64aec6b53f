"""One worker: an engine, its inbox, and both sides of the hand-off. Every worker can prefill and decode.

    loop:  read the inbox ─▶ tick both hand-off sides ─▶ one step of the engine ─▶ tell the front end what happened

The loop waits for its device at the end of a step, and for the inbox when there is nothing else to do or it is early to
plan the next one. Copies run beside it, in the transport's thread. During a long step on cores the inbox is read, too,
between layers: of what is aborted then nothing more is computed, and its pages are free at once.

A request may come more than once: when a worker dies the front end calls off the attempt and sends the next one.
Messages of different senders overtake one another, so what counts is the number: a later attempt ends earlier ones.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from disagg.cache.pages import PagePool
from disagg.clock import Clock
from disagg.cluster import conserve
from disagg.cluster import messages as m
from disagg.cluster.handoff_decode import DecodeSide, Receiving
from disagg.cluster.handoff_prefill import PrefillSide, handoff_id
from disagg.cluster.mailbox import FRONT, Mailbox
from disagg.cluster.status import Snapshot
from disagg.config import EngineSpec, WorkerSpec
from disagg.engine.batch import Batch
from disagg.engine.engine import Engine, Runs, Stepped
from disagg.engine.scheduler import Scheduler
from disagg.errors import InvariantError, RequestError
from disagg.record import Facts
from disagg.request import FinishReason, Request
from disagg.transfer.base import Transport

KV_DTYPE = "float32"  # of the cache on the CPU, whatever the weights are stored as
_OUTCOMES = ("started", "done", "failed", "expired", "aborted")
_WATCH_S = 0.001  # between looks at whether a device that was expected to be busy still is
_IDLE_S = 0.05  # the longest nap of an idle loop; a busy one cleans up once a step


class WorkerConfig(msgspec.Struct, frozen=True):
    """Everything a worker process needs to know. `heartbeat_s` None: nobody listens for heartbeats."""

    spec: WorkerSpec
    epoch: int
    engine: EngineSpec
    folder: str  # of the mailboxes
    num_pages: int  # of its pool; 0: as many as its GPU has left
    lease_s: float
    max_wait_s: float
    heartbeat_s: float | None = None

    @property
    def worker(self) -> str:
        """The address: name.epoch."""
        return f"{self.spec.name}.{self.epoch}"


@dataclass(slots=True)
class _Job:
    """A request in this worker's scheduler, and how it was asked for."""

    submit: m.Submit
    request: Request
    offered: bool = False  # whether its decode worker was told


class Worker:
    """The loop. Everything that decides lies in the scheduler and the two hand-off sides; this connects them."""

    def __init__(
        self,
        config: WorkerConfig,
        hello: m.Hello,
        mailbox: Mailbox,
        runner: Runs,
        transport: Transport,
        clock: Clock,
        checksum: Callable[[list[int]], list[int]] = lambda pages: [],
        clock_name: str = "host",
    ) -> None:
        """`clock_name`: which workers read the same clock; see PrefillSide."""
        self._hello = hello
        self._me = hello.worker
        self._mailbox = mailbox
        spec = config.engine
        assert spec.max_len is not None
        self._scheduler = Scheduler(
            PagePool(hello.num_pages, spec.page_size),
            max_batch_tokens=spec.max_batch_tokens,
            max_mixed_tokens=spec.max_mixed_tokens,
            enough_tokens=spec.enough_tokens,
            max_running=spec.max_running,
            max_len=spec.max_len,
            chunked_prefill=spec.chunked_prefill,
            prefix_caching=spec.prefix_caching,
        )
        self._engine = Engine(self._me, self._scheduler, runner, clock, self._meanwhile)
        self._clock = clock
        self.checksum = checksum
        self._giving = PrefillSide(
            hello, clock, mailbox.send, self._scheduler, config.lease_s, self._handed_over, checksum, self._orphaned,
            clock_name,
        )  # fmt: skip
        self._taking = DecodeSide(
            hello, clock, mailbox.send, transport, self._scheduler, self, config.max_wait_s, clock_name
        )
        self._jobs: dict[str, _Job] = {}
        self._outgoing = m.Progress(self._me, [], [])
        self._heartbeat_s = config.heartbeat_s
        self._heartbeat_at = 0.0
        self._stopped = False
        self._withheld: list[int] = []
        self._withheld_until = 0.0
        self._draining = False
        self._num_steps = self._num_tokens = self._pulled_bytes = 0

    def run(self, parent_fd: int, wake_fd: int) -> bool:
        """Loop until told to stop (True) or until `parent_fd` closes because the front end is gone (False).

        `wake_fd` is an eventfd that ends the inbox's wait.
        """
        self._mailbox.watch(parent_fd)
        self._mailbox.watch(wake_fd)
        self._mailbox.send(FRONT, self._hello)
        busy = False
        while True:
            messages, readable = self._mailbox.receive(min(self._engine.slack_s(), _WATCH_S) if busy else _IDLE_S)
            if parent_fd in readable:
                return False
            if wake_fd in readable:
                os.eventfd_read(wake_fd)
            if self._stopped or any(isinstance(message, m.Stop) for message in messages):
                return True
            busy = self.turn(messages)

    def turn(self, messages: Iterable[Any]) -> bool:
        """Take in what has come, clean up, and do one step when it is time. Whether there was anything to compute."""
        self._take_in(messages)
        if self._engine.launch(self._offer):
            self._flush()
            return True
        stepped = self._engine.collect()
        if stepped is not None:
            self._num_steps, self._num_tokens = self._num_steps + 1, self._num_tokens + stepped.batch.num_tokens
            self._report(stepped)
        self._flush()
        return stepped is not None

    def drain(self) -> None:
        """Ask the front end for leave. Safe to call from a signal handler."""
        self._draining = True

    def _on_message(self, message: Any) -> None:
        if isinstance(message, m.Submit):
            self._submit(message)
        elif isinstance(message, m.Offer):
            self._abort_before(message.request)
            self._taking.on_offer(message)
        elif isinstance(message, m.ChunkReady | m.Cancel | m.Renewed):
            self._taking.on_message(message)
        elif isinstance(message, m.PullDone | m.Dropped | m.Renew):
            self._giving.on_message(message)
        elif isinstance(message, m.Abort):
            self._abort(message.id, message.attempt)
        elif isinstance(message, m.Lost):
            self._worker_lost(message.worker)
        elif isinstance(message, m.Audit):
            self._mailbox.send(FRONT, self._audit(message.serial))
        elif isinstance(message, m.Withhold):
            self._withheld += self._scheduler.pool.allocate(self._scheduler.pool.num_free) or []
            self._withheld_until = self._clock.now() + message.for_s
        elif isinstance(message, m.Stop):
            self._stopped = True

    def _take_in(self, messages: Iterable[Any]) -> None:
        for message in messages:
            self._on_message(message)
        self._tick()

    def _meanwhile(self) -> None:
        """During a long step: what else would wait for its end. Nothing here depends on whether a step is in flight."""
        messages, _ = self._mailbox.receive(0)
        self._take_in(messages)
        self._flush()

    def _tick(self) -> None:
        """What is done on every turn, and during long steps; work or no work."""
        self._taking.tick()
        self._giving.tick()
        now = self._clock.now()
        if self._withheld and now >= self._withheld_until:
            self._scheduler.pool.release(self._withheld)
            self._withheld = []
        if self._heartbeat_s is not None and now >= self._heartbeat_at:
            self._heartbeat_at = now + self._heartbeat_s
            self._mailbox.send(FRONT, m.Heartbeat(self._me, self._snapshot(now), self._draining))

    # Requests come and go

    def _submit(self, submit: m.Submit) -> None:
        self._abort_before(submit)
        request = _request(submit, elsewhere=submit.decode_on not in (None, self._me))
        # queued since it was sent: a worker reads its inbox between steps, and that wait is queueing too
        self._start(submit, request, Facts(self._me, queued_at=submit.order), self._scheduler.add)

    def _abort_before(self, submit: m.Submit) -> None:
        """A later attempt ends the earlier ones, should their Abort not be here yet."""
        if submit.attempt > 0:
            self._abort(submit.id, submit.attempt - 1)

    def _start(self, submit: m.Submit, request: Request, facts: Facts, enter: Callable[[Request], None]) -> None:
        """Let the request into the scheduler; if it cannot be served, it ends here and now, with its pages."""
        self._engine.ledger[request.id] = facts
        self._jobs[request.id] = job = _Job(submit, request)
        try:
            enter(request)
        except RequestError as error:
            self._scheduler.pool.release(request.pages)
            self._end(job, FinishReason.ERROR, str(error))

    def _abort(self, request_id: str, attempt: int | None) -> None:
        """Free this attempt of a request and older ones (None: all), and take nothing of them that is under way."""
        job = self._jobs.get(request_id)
        if job is not None and (attempt is None or job.submit.attempt <= attempt):
            self._giving.cancel(handoff_id(job.submit), "aborted")
            self._scheduler.abort(request_id)
            self._forget(request_id)
        self._taking.abort(request_id, attempt)

    def _worker_lost(self, worker: str) -> None:
        self._giving.worker_lost(worker)
        self._taking.worker_lost(worker)
        self._mailbox.forget(worker)

    def _handed_over(self, request: Request) -> None:
        """Its decode worker has it: it has left our scheduler."""
        if (job := self._job_of(request)) is not None:
            self._forget(job.submit.id)

    def _orphaned(self, request: Request, reason: str) -> None:
        """Nobody computes it any more, and it has left our scheduler: the front end tries again."""
        if (job := self._job_of(request)) is not None:
            self._end(job, FinishReason.ERROR, reason, retryable=True)

    def _job_of(self, request: Request) -> _Job | None:
        """Not that of a later attempt under the same id."""
        job = self._jobs.get(request.id)
        return job if job is not None and job.request is request else None

    # One step

    def _offer(self, batch: Batch) -> None:
        """Tell decode workers of the requests that get their first step now, so that they make room meanwhile."""
        for chunk in batch.chunks:
            job = self._jobs[chunk.request.id]
            if chunk.request.decode_elsewhere and not job.offered:
                job.offered = True
                self._giving.begin(job.submit, chunk.request)
        self._flush()

    def _report(self, stepped: Stepped) -> None:
        holding = {request.id for request in stepped.holding}
        for request, token, logprobs in stepped.tokens:
            submit = self._jobs[request.id].submit
            facts = self._engine.ledger[request.id] if request.id in holding else None
            if facts is not None:  # the front end has these now; should the request stay here, the rest is added
                self._engine.ledger[request.id] = Facts(self._me)
            index = request.num_output - 1
            self._outgoing.tokens.append(m.NewToken(request.id, submit.attempt, index, token, logprobs, facts))
        self._flush()  # the first token is on its way to the client before its pages are announced
        for chunk in stepped.batch.chunks:
            if chunk.request.decode_elsewhere and chunk.request.finish_reason is None:
                handoff = handoff_id(self._jobs[chunk.request.id].submit)
                self._giving.advanced(handoff, chunk.start + chunk.length)
        for request in stepped.finished:
            job = self._jobs[request.id]
            self._giving.cancel(handoff_id(job.submit), "its first token was its last")
            assert request.finish_reason is not None
            self._end(job, request.finish_reason)

    def _end(self, job: _Job, reason: FinishReason, error: str = "", retryable: bool = False) -> None:
        """The request is over on this worker: tell the front end, with all that is known of it."""
        request_id = job.submit.id
        facts = self._engine.ledger.get(request_id) or Facts(self._me)
        num_output = job.request.num_output
        ended = m.Ended(request_id, job.submit.attempt, reason, num_output, facts, error, retryable)
        self._outgoing.ended.append(ended)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._jobs.pop(request_id, None)
        self._engine.ledger.pop(request_id, None)

    def _flush(self) -> None:
        if self._outgoing.tokens or self._outgoing.ended:
            self._mailbox.send(FRONT, self._outgoing)
            self._outgoing = m.Progress(self._me, [], [])

    # What the decode side asks of its worker (DecodeHost)

    def adopt(self, receiving: Receiving) -> None:
        """See DecodeHost."""
        self._pulled_bytes += receiving.facts.handoff_bytes
        request = _taken(receiving)
        request.pages, request.num_computed = receiving.pages, receiving.num_computed
        self._start(receiving.offer.request, request, receiving.facts, self._scheduler.adopt)

    def recompute(self, receiving: Receiving) -> None:
        """See DecodeHost."""
        self._start(receiving.offer.request, _taken(receiving), receiving.facts, self._scheduler.add)

    def give_up(self, receiving: Receiving, reason: str) -> None:
        """See DecodeHost."""
        submit = receiving.offer.request
        ended = m.Ended(submit.id, submit.attempt, FinishReason.ERROR, 0, receiving.facts, reason, retryable=True)
        self._outgoing.ended.append(ended)

    # What others see of it

    def _snapshot(self, now: float) -> Snapshot:
        scheduler = self._scheduler
        given, taken = self._giving.held(), self._taking.held()
        return Snapshot(
            now, conserve.count(scheduler, given, taken, len(self._withheld))._asdict(), scheduler.num_waiting,
            scheduler.num_running, len(given), len(taken), self._num_steps, self._num_tokens, self._pulled_bytes,
            self._engine.step_s, self._handoffs(len(given), len(taken)),
        )  # fmt: skip

    def _handoffs(self, num_given: int, num_taken: int) -> dict[str, dict[str, int]]:
        """How hand-offs ended, and how many are `open`."""
        sides = {"prefill": (self._giving.counts, num_given), "decode": (self._taking.counts, num_taken)}
        return {
            side: {**{outcome: counts[outcome] for outcome in _OUTCOMES}, "open": num_open}
            for side, (counts, num_open) in sides.items()
        }

    def _audit(self, serial: int) -> m.AuditReport:
        scheduler, now = self._scheduler, self._clock.now()
        given, taken = self._giving.held(), self._taking.held()
        holders = [m.Holder("", "withheld", "", len(self._withheld), None, "fault injection")] if self._withheld else []
        for one in scheduler.audit():
            job = self._jobs.get(one.request_id)
            age_s = now - job.submit.order if job is not None else None
            holders.append(m.Holder(one.request_id, "scheduler", one.status.value, len(one.pages), age_s))
        for side, table in (("prefill", given), ("decode", taken)):
            holders += [m.Holder(h.handoff, side, h.state, len(h.pages), h.age_s, h.reason) for h in table]
        places, fault = {}, ""
        try:
            places = conserve.conserve(scheduler, given, taken, self._withheld)._asdict()
        except InvariantError as error:
            fault = str(error)
        pool = scheduler.pool
        handoffs = self._handoffs(len(given), len(taken))
        return m.AuditReport(self._me, serial, pool.num_pages, *pool.counts(), holders, places, handoffs, fault)


def _request(submit: m.Submit, elsewhere: bool) -> Request:
    return Request(
        submit.id, submit.prompt_len, list(submit.tokens), submit.params, frozenset(submit.stop_ids), submit.order,
        decode_elsewhere=elsewhere,
    )  # fmt: skip


def _taken(receiving: Receiving) -> Request:
    """The request of a hand-off as it goes on here: with its first token."""
    request = _request(receiving.offer.request, elsewhere=False)
    assert receiving.first_token is not None
    request.tokens.append(receiving.first_token)
    return request
