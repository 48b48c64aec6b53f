"""The prefill worker's side of a hand-off: who holds the pages of a prompt until its decode worker has them.

    begin ─▶ OFFERED ──chunk ready──▶ SENDING ──last chunk ready──▶ HOLDING ──PullDone──▶ (pages released, forgotten)
                │                        │                             │
                └──────abort, finished early: Cancel sent──────────────┴──▶ QUIESCING ──Dropped, lease over──▶ (same)
                │                        │                             │
                └──────refused, decode worker lost─────────────────────┴──▶ the request goes on here, colocated

Rules. Announcing a page takes a reference of this side's own, so nothing that happens to the request can free it under
the reader. The references are released exactly once: when the decode worker says it is done or dropped the hand-off,
when it is known to be dead, or when the lease is over. A decode worker whose lease is over throws away what it copied
(see handoff_decode), so a late read is harmless. A message about a hand-off that is not in the table is about one that
ended: it is ignored. Nothing here blocks, and `tick` runs on every turn of the worker's loop, work or no work.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg.clock import Clock
from disagg.cluster.messages import Cancel, ChunkReady, Dropped, Hello, Message, Offer, PullDone, Renew, Renewed, Submit
from disagg.engine.scheduler import Scheduler
from disagg.request import Request, Status


class SendState(enum.Enum):
    """See the drawing above."""

    OFFERED = "offered"
    SENDING = "sending"
    HOLDING = "holding"
    QUIESCING = "quiescing"


@dataclass(slots=True)
class Sending:
    """One hand-off as its prefill worker sees it."""

    request: Request
    to: str  # decode worker, name.epoch
    state: SendState
    lease_until: float
    pages: list[int] = field(default_factory=list)  # announced; one reference each is ours


class PrefillSide:
    """All hand-offs this worker gives away. Pure: driven by calls, messages and ticks.

    `freed(request)` is told when a request was handed over and nothing of it is left here.
    `checksum(pages)` gives one number per page, or nothing when integrity checking is off.
    """

    def __init__(
        self,
        hello: Hello,
        clock: Clock,
        send: Callable[[str, Message], None],
        scheduler: Scheduler,
        lease_s: float,
        freed: Callable[[Request], None] = lambda request: None,
        checksum: Callable[[list[int]], list[int]] = lambda pages: [],
    ) -> None:
        self._hello = hello
        self._page_size = hello.layout.page_size
        self._clock = clock
        self._send = send
        self._scheduler = scheduler
        self._lease_s = lease_s
        self._freed = freed
        self._checksum = checksum
        self._table: dict[str, Sending] = {}

    def begin(self, submit: Submit, request: Request) -> None:
        """The request is about to get its first step here: tell its decode worker to make room."""
        assert submit.decode_on is not None
        now = self._clock.now()
        self._table[handoff_id(submit)] = Sending(request, submit.decode_on, SendState.OFFERED, now + self._lease_s)
        offer = Offer(handoff_id(submit), self._hello, submit, now, self._lease_s)
        self._send(submit.decode_on, offer)

    def advanced(self, handoff: str) -> None:
        """A chunk of this request's prompt was computed: announce the pages that are complete now.

        With the first token sampled all pages are complete, the last one perhaps half full.
        """
        sending = self._table.get(handoff)
        if sending is None or sending.state not in (SendState.OFFERED, SendState.SENDING):
            return
        request = sending.request
        last = request.num_output > 0
        complete = len(request.pages) if last else request.num_computed // self._page_size
        pages = request.pages[len(sending.pages) : complete]
        if not pages and not last:
            return
        self._scheduler.pool.retain(pages)
        sending.pages += pages
        sending.state = SendState.HOLDING if last else SendState.SENDING
        first_token = request.tokens[-1] if last else None
        chunk = ChunkReady(handoff, pages, request.num_computed, self._checksum(pages), first_token)
        self._send(sending.to, chunk)

    def cancel(self, handoff: str, reason: str) -> bool:
        """Nobody needs the pages any more (abort, or the first token was the last). False when there is none such."""
        sending = self._table.get(handoff)
        if sending is None:
            return False
        if sending.state is not SendState.QUIESCING:
            sending.state = SendState.QUIESCING
            self._send(sending.to, Cancel(handoff, reason))
        return True

    def on_message(self, message: PullDone | Dropped | Renew) -> None:
        """What a decode worker says."""
        if isinstance(message, Renew):
            self._renew(message)
            return
        sending = self._table.get(message.handoff)
        if sending is None:
            return
        if isinstance(message, Dropped) and message.refused and sending.state is not SendState.QUIESCING:
            self._go_on_here(message.handoff)
        else:
            self._free(message.handoff)

    def worker_lost(self, worker: str) -> None:
        """A decode worker died: it reads nothing any more, and what it was to decode is decoded here."""
        for handoff, sending in list(self._table.items()):
            if sending.to == worker:
                if sending.state is SendState.QUIESCING:
                    self._free(handoff)
                else:
                    self._go_on_here(handoff)

    def tick(self) -> list[Request]:
        """Free what outlived its lease. Returns the requests that nobody decodes now, for the front end to retry."""
        now = self._clock.now()
        expired = [handoff for handoff, sending in self._table.items() if sending.lease_until <= now]
        orphans = []
        for handoff in expired:
            sending = self._table[handoff]
            if sending.state is not SendState.QUIESCING:
                orphans.append(sending.request)
                self._send(sending.to, Cancel(handoff, "lease expired"))
            self._free(handoff)
        return orphans

    def held(self) -> list[tuple[str, str, list[int], float]]:
        """For the audit: (hand-off, state, pages, seconds of lease left)."""
        now = self._clock.now()
        return [(key, s.state.value, list(s.pages), s.lease_until - now) for key, s in self._table.items()]

    def _renew(self, message: Renew) -> None:
        now = self._clock.now()
        known = []
        for handoff in message.handoffs:
            sending = self._table.get(handoff)
            if sending is not None and sending.state is not SendState.QUIESCING:
                sending.lease_until = now + self._lease_s
                known.append(handoff)
        self._send(message.worker, Renewed(self._hello.worker, message.serial, known))

    def _free(self, handoff: str) -> None:
        sending = self._table.pop(handoff)
        self._scheduler.pool.release(sending.pages)
        if sending.request.status is Status.HOLDING:
            self._scheduler.release(sending.request)
            self._freed(sending.request)

    def _go_on_here(self, handoff: str) -> None:
        sending = self._table.pop(handoff)
        self._scheduler.pool.release(sending.pages)
        sending.request.decode_elsewhere = False
        if sending.request.status is Status.HOLDING:
            self._scheduler.adopt(sending.request)


def handoff_id(submit: Submit) -> str:
    """Global and never reused: the same request resubmitted is another hand-off."""
    return f"{submit.id}/{submit.attempt}"
