"""One worker: an engine, its inbox, and both sides of the hand-off. Every worker can prefill and decode.

Started as `python -m disagg.cluster.worker` with one JSON line (WorkerConfig) on standard input, which then stays open:
when it closes, whoever started this worker is gone, and so is the worker.

    loop:  read the inbox ─▶ tick both hand-off sides ─▶ one step of the engine ─▶ tell the front end what happened

Nothing in the loop waits, except for the inbox when there is nothing else to do. Copies run beside it, in the
transport's thread.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from disagg.cache.pages import PagePool
from disagg.clock import WallClock
from disagg.cluster import messages as m
from disagg.cluster.handoff_decode import DecodeSide, Receiving
from disagg.cluster.handoff_prefill import PrefillSide, handoff_id
from disagg.cluster.mailbox import FRONT, Mailbox
from disagg.config import EngineSpec, WorkerSpec
from disagg.engine.batch import Batch
from disagg.engine.engine import Engine, Runs, Stepped
from disagg.engine.scheduler import Scheduler
from disagg.errors import DisaggError, InputError, RequestError
from disagg.record import Facts
from disagg.request import FinishReason, Request
from disagg.transfer.base import Transport

KV_DTYPE = "float32"  # of the cache on the CPU, whatever the weights are stored as
_IDLE_S = 0.05  # the longest nap of an idle loop: cleanup runs at least this often


class WorkerConfig(msgspec.Struct, frozen=True):
    """Everything a worker process needs to know."""

    spec: WorkerSpec
    epoch: int
    engine: EngineSpec
    folder: str  # of the mailboxes
    num_pages: int
    lease_s: float
    max_wait_s: float

    @property
    def worker(self) -> str:
        """The address: name.epoch."""
        return f"{self.spec.name}.{self.epoch}"


class Worker:
    """The loop. Everything that decides lies in the scheduler and the two hand-off sides; this connects them."""

    def __init__(
        self,
        config: WorkerConfig,
        hello: m.Hello,
        mailbox: Mailbox,
        runner: Runs,
        transport: Transport,
        checksum: Callable[[list[int]], list[int]] = lambda pages: [],
    ) -> None:
        self._hello = hello
        self._me = hello.worker
        self._mailbox = mailbox
        spec, clock = config.engine, WallClock()
        assert spec.max_len is not None
        self._scheduler = Scheduler(
            PagePool(config.num_pages, spec.page_size),
            max_batch_tokens=spec.max_batch_tokens,
            max_running=spec.max_running,
            max_len=spec.max_len,
            chunked_prefill=spec.chunked_prefill,
            prefix_caching=spec.prefix_caching,
        )
        self._engine = Engine(self._me, self._scheduler, runner, clock)
        self._clock = clock
        self.checksum = checksum
        lease_s, freed = config.lease_s, lambda request: self._forget(request.id)
        self._giving = PrefillSide(hello, clock, mailbox.send, self._scheduler, lease_s, freed, checksum)
        self._taking = DecodeSide(hello, clock, mailbox.send, transport, self._scheduler, self, config.max_wait_s)
        self._submits: dict[str, m.Submit] = {}  # of the requests in the scheduler
        self._offered: set[str] = set()  # of those, the ones whose decode worker was told
        self._outgoing = m.Progress(self._me, [], [])

    def run(self, parent_fd: int, wake_fd: int) -> bool:
        """Loop until told to stop (True) or until `parent_fd` closes because the front end is gone (False).

        `wake_fd` is an eventfd that ends the inbox's wait.
        """
        self._mailbox.watch(parent_fd)
        self._mailbox.watch(wake_fd)
        self._mailbox.send(FRONT, self._hello)
        busy = False
        while True:
            messages, readable = self._mailbox.receive(0 if busy else _IDLE_S)
            if parent_fd in readable:
                return False
            if wake_fd in readable:
                os.eventfd_read(wake_fd)
            for message in messages:
                if isinstance(message, m.Stop):
                    return True
                self._on_message(message)
            self._taking.tick()
            for orphan in self._giving.tick():
                self._end(orphan, FinishReason.ERROR, "its decode worker stopped renewing the lease", retryable=True)
            stepped = self._engine.step(self._offer)
            if stepped is not None:
                self._report(stepped)
            busy = stepped is not None
            self._flush()

    def _on_message(self, message: Any) -> None:
        if isinstance(message, m.Submit):
            self._submit(message)
        elif isinstance(message, m.Offer):
            self._taking.on_offer(message)
        elif isinstance(message, m.ChunkReady | m.Cancel | m.Renewed):
            self._taking.on_message(message)
        elif isinstance(message, m.PullDone | m.Dropped | m.Renew):
            self._giving.on_message(message)
        elif isinstance(message, m.Abort):
            self._abort(message.id)
        elif isinstance(message, m.Lost):
            self._giving.worker_lost(message.worker)
            self._taking.worker_lost(message.worker)
            self._mailbox.forget(message.worker)
        elif isinstance(message, m.Audit):
            self._mailbox.send(FRONT, self._audit(message.serial))

    def _submit(self, submit: m.Submit) -> None:
        request = _request(submit, elsewhere=submit.decode_on not in (None, self._me))
        self._start(submit, request, Facts(self._me, queued_at=self._clock.now()), self._scheduler.add)

    def _start(self, submit: m.Submit, request: Request, facts: Facts, enter: Callable[[Request], None]) -> None:
        """Let the request into the scheduler; if it cannot be served, it ends here and now."""
        self._engine.ledger[request.id] = facts
        self._submits[request.id] = submit
        try:
            enter(request)
        except RequestError as error:
            self._end(request, FinishReason.ERROR, str(error))

    def _abort(self, request_id: str) -> None:
        request = self._scheduler.abort(request_id)
        submit = self._submits.get(request_id)
        if submit is not None:
            self._giving.cancel(handoff_id(submit), "aborted")
        self._taking.abort(request_id)
        if request is not None:
            self._forget(request_id)

    # One step

    def _offer(self, batch: Batch) -> None:
        """Tell decode workers of the requests that get their first step now, so that they make room meanwhile."""
        for chunk in batch.chunks:
            request = chunk.request
            if request.decode_elsewhere and request.id not in self._offered:
                self._offered.add(request.id)
                self._giving.begin(self._submits[request.id], request)
        self._flush()

    def _report(self, stepped: Stepped) -> None:
        holding = {request.id for request in stepped.holding}
        for request, token, logprobs in stepped.tokens:
            submit = self._submits[request.id]
            facts = self._engine.ledger[request.id] if request.id in holding else None
            if facts is not None:  # the front end has these now; should the request stay here, the rest is added
                self._engine.ledger[request.id] = Facts(self._me)
            index = request.num_output - 1
            self._outgoing.tokens.append(m.NewToken(request.id, submit.attempt, index, token, logprobs, facts))
        self._flush()  # the first token is on its way to the client before its pages are announced
        for chunk in stepped.batch.chunks:
            if chunk.request.decode_elsewhere and chunk.request.finish_reason is None:
                self._giving.advanced(handoff_id(self._submits[chunk.request.id]))
        for request in stepped.finished:
            self._giving.cancel(handoff_id(self._submits[request.id]), "its first token was its last")
            assert request.finish_reason is not None
            self._end(request, request.finish_reason)

    def _end(self, request: Request, reason: FinishReason, error: str = "", retryable: bool = False) -> None:
        """The request is over on this worker: tell the front end, with all that is known of it."""
        submit = self._submits[request.id]
        facts = self._engine.ledger[request.id]
        ended = m.Ended(request.id, submit.attempt, reason, request.num_output, facts, error, retryable)
        self._outgoing.ended.append(ended)
        self._forget(request.id)

    def _forget(self, request_id: str) -> None:
        self._submits.pop(request_id, None)
        self._engine.ledger.pop(request_id, None)
        self._offered.discard(request_id)

    def _flush(self) -> None:
        if self._outgoing.tokens or self._outgoing.ended:
            self._mailbox.send(FRONT, self._outgoing)
            self._outgoing = m.Progress(self._me, [], [])

    # What the decode side asks of its worker (DecodeHost)

    def adopt(self, receiving: Receiving) -> None:
        """See DecodeHost."""
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

    def _audit(self, serial: int) -> m.AuditReport:
        pool = self._scheduler.pool
        holders = [m.Holder(h.request_id, "scheduler", h.status.value, len(h.pages)) for h in self._scheduler.audit()]
        for side, table in (("prefill", self._giving.held()), ("decode", self._taking.held())):
            holders += [m.Holder(handoff, side, state, len(pages)) for handoff, state, pages, _ in table]
        free, cached, held = pool.counts()
        return m.AuditReport(self._me, serial, pool.num_pages, free, cached, held, holders)


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


def build(config: WorkerConfig, mailbox: Mailbox, wake: Callable[[], None]) -> Worker:
    """Load the model, make the pages, compile the kernels. Raises ModelError and InputError."""
    import torch

    from disagg.cache.storage import KVStorage
    from disagg.engine.runner import Runner
    from disagg.model.load import load_model
    from disagg.transfer.layout import Layout
    from disagg.transfer.shm import SharedMemoryTransport

    torch.set_num_threads(len(config.spec.devices))
    engine = config.engine
    loaded = load_model(
        engine.model, dtype=engine.dtype, random_weights=engine.random_weights, seed=engine.weights_seed,
        max_len=engine.max_len,
    )  # fmt: skip
    spec = loaded.spec
    layout = Layout(
        model=loaded.fingerprint, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads,
        page_size=engine.page_size, head_dim=spec.head_dim, dtype=loaded.kv_dtype,
    )  # fmt: skip
    transport = SharedMemoryTransport(config.num_pages, layout.page_bytes, wake)
    runner = Runner(loaded, KVStorage(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        page_size=engine.page_size, num_pages=config.num_pages, dtype=loaded.kv_dtype, buffer=transport.pages,
    ))  # fmt: skip
    runner.warm_up()
    hello = m.Hello(config.worker, transport.address(), layout, config.num_pages)
    return Worker(config, hello, mailbox, runner, transport)


def main() -> None:
    """Entry point of the process."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    os.sched_setaffinity(0, config.spec.devices)  # before torch makes its threads
    mailbox = Mailbox(Path(config.folder), config.worker)
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        worker = build(config, mailbox, lambda: os.eventfd_write(wake_fd, 1))
    except DisaggError as error:
        mailbox.send(FRONT, m.StartFailed(config.worker, str(error), isinstance(error, InputError)))
        raise
    if not worker.run(sys.stdin.fileno(), wake_fd):
        shutil.rmtree(config.folder, ignore_errors=True)  # nobody else is left to do it


if __name__ == "__main__":
    main()
