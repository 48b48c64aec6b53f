"""The prefill worker's side of a hand-off: who holds the pages of a prompt until its decode worker has them.

    begin ─▶ OFFERED ──chunk──▶ SENDING ──last chunk──▶ HOLDING ──PullDone, Dropped──▶ (pages released, forgotten)
                │                  │                       │
                ├──refused─────────┼──refused──────────────┼──▶ (the request goes on here, colocated)
                ├──lost, lease over┤                       └──lost, lease over──▶ (orphaned: the front end retries)
                │                  │                       │
                └─────abort, first token was the last──────┴──▶ QUIESCING ──PullDone, Dropped, lost, lease over──▶ (end)

Rules. Announcing a page takes a reference of this side's own, so nothing that happens to the request can free it under
the reader. The references are released exactly once: when the decode worker says it is done or dropped the hand-off,
when it is known to be dead, or when the lease is over. A decode worker whose lease is over throws away what it copied
(see handoff_decode), and its lease ends before ours: a late read is harmless.

Until the first token was announced the decode worker cannot run the request, so it may go on here whenever the hand-off
fails. From then on it may go on here only if the decode worker says so: it may be running there already, and two
workers must not write one text. If the decode worker says nothing, the front end decides, which sees the tokens.

A message about a hand-off that is not in the table is about one that ended: it is ignored. So is one from a worker,
or an epoch of it, that the hand-off was not meant for. Nothing here blocks, and `tick` runs on every turn of the
worker's loop, work or no work.
"""

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from disagg.clock import Clock
from disagg.cluster.messages import Cancel, ChunkReady, Dropped, Hello, Message, Offer, PullDone, Renew, Renewed, Submit
from disagg.engine.scheduler import Scheduler
from disagg.request import Request, Status

_GRACE = 0.5  # our lease is longer than the decode worker's by this share: for its last message to arrive
_TOMBSTONES = 10_000
_T = TypeVar("_T")


class SendState(enum.Enum):
    """See the drawing above."""

    OFFERED = "offered"
    SENDING = "sending"
    HOLDING = "holding"
    QUIESCING = "quiescing"


class Held(NamedTuple):
    """One line of `held`: a hand-off, the pages it has references to, and why it has them."""

    handoff: str
    state: str
    pages: list[int]
    lease_s: float  # left of the lease; negative when it is over
    age_s: float  # in this state
    reason: str


@dataclass(slots=True)
class Sending:
    """One hand-off as its prefill worker sees it."""

    request: Request
    to: str  # decode worker, name.epoch
    since: float  # in this state
    lease_until: float
    num_known: int  # tokens it came with; when it has more, its first token from here is known
    state: SendState = SendState.OFFERED
    pages: list[int] = field(default_factory=list)  # announced; one reference each is ours
    reason: str = ""  # why it holds pages, for the audit


class PrefillSide:
    """All hand-offs this worker gives away. Pure: driven by calls, messages and ticks.

    `freed(request)` is told when a request was handed over and nothing of it is left here.
    `checksum(pages)` gives one number per page, or nothing when integrity checking is off.
    `orphaned(request, reason)` is told when nobody computes a request any more: it has left the scheduler.
    `clock_name` says which processes read the same clock.

    `counts` has started, done, failed, expired and aborted; the last four and the table's length add up to the first.
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
        orphaned: Callable[[Request, str], None] = lambda request, reason: None,
        clock_name: str = "host",
    ) -> None:
        self._hello = hello
        self._me = hello.worker
        self._page_size = hello.layout.page_size
        self._clock = clock
        self._send = send
        self._scheduler = scheduler
        self._lease_s = lease_s
        self._freed = freed
        self._checksum = checksum
        self._orphaned = orphaned
        self._clock_name = clock_name
        self._table: dict[str, Sending] = {}
        self._lost: dict[str, None] = {}  # dead workers: a tombstone each
        self.counts: Counter[str] = Counter()

    def begin(self, submit: Submit, request: Request) -> None:
        """The request is about to get its first step here: tell its decode worker to make room.

        If that one is known to be dead, the request is decoded here.
        """
        assert submit.decode_on is not None
        handoff, now = handoff_id(submit), self._clock.now()
        if submit.decode_on in self._lost:
            request.decode_elsewhere = False
            return
        self.counts["started"] += 1
        self._table[handoff] = Sending(
            request, submit.decode_on, now, now + self._hold_s, len(submit.tokens), reason=f"for {submit.decode_on}"
        )
        offer = Offer(handoff, self._hello, submit, now, self._lease_s, self._clock_name)
        self._send(submit.decode_on, offer)

    def advanced(self, handoff: str, num_computed: int) -> None:
        """`num_computed` positions of this request's prompt were computed: announce the pages that are complete now.

        Not what is still being computed, which `Request.num_computed` counts too. With the first token sampled all
        pages are complete, the last one perhaps half full.
        """
        sending = self._table.get(handoff)
        if sending is None or sending.state not in (SendState.OFFERED, SendState.SENDING):
            return
        request, first_page = sending.request, len(sending.pages)
        last = len(request.tokens) > sending.num_known
        complete = len(request.pages) if last else num_computed // self._page_size
        pages = request.pages[first_page:complete]
        if not pages:
            return
        self._scheduler.pool.retain(pages)
        sending.pages += pages
        self._enter(sending, SendState.HOLDING if last else SendState.SENDING)
        first_token = request.tokens[-1] if last else None
        chunk = ChunkReady(self._me, handoff, first_page, pages, self._checksum(pages), first_token)
        self._send(sending.to, chunk)

    def cancel(self, handoff: str, reason: str) -> None:
        """Nobody needs the pages any more: the request ended here (abort, or its first token was its last)."""
        sending = self._table.get(handoff)
        if sending is not None and sending.state is not SendState.QUIESCING:
            self._enter(sending, SendState.QUIESCING)
            sending.reason = reason
            self._send(sending.to, Cancel(self._me, handoff, reason))

    def on_message(self, message: PullDone | Dropped | Renew) -> None:
        """What a decode worker says."""
        if isinstance(message, Renew):
            self._renew(message)
            return
        sending = self._table.get(message.handoff)
        if sending is None or sending.to != message.worker:
            return
        if sending.state is SendState.QUIESCING:
            self._close(message.handoff, "aborted")
        elif isinstance(message, Dropped) and message.refused:
            self._go_on_here(message.handoff, "failed")
        elif sending.state is SendState.HOLDING:
            self._close(message.handoff, "done" if isinstance(message, PullDone) else "failed")
        else:  # it was told of an abort that has not come here yet
            self._orphan(message.handoff, "failed", f"{sending.to} dropped it")

    def worker_lost(self, worker: str) -> None:
        """A decode worker died: it reads nothing any more."""
        remember(self._lost, worker, None)
        self._gone([handoff for handoff, s in self._table.items() if s.to == worker], "failed", f"{worker} died")

    def tick(self) -> None:
        """End what outlived its lease. Runs on every turn of the loop."""
        now = self._clock.now()
        expired = [handoff for handoff, sending in self._table.items() if sending.lease_until <= now]
        for handoff in expired:
            sending = self._table[handoff]
            self._send(sending.to, Cancel(self._me, handoff, "the lease is over"))
        self._gone(expired, "expired", "its decode worker stopped renewing the lease")

    def held(self) -> list[Held]:
        """For the audit and the conservation rule: every hand-off and the pages it has a reference to."""
        now = self._clock.now()
        return [
            Held(handoff, s.state.value, list(s.pages), s.lease_until - now, now - s.since, s.reason)
            for handoff, s in self._table.items()
        ]

    @property
    def _hold_s(self) -> float:
        return self._lease_s * (1 + _GRACE)

    def _enter(self, sending: Sending, state: SendState) -> None:
        if sending.state is not state:
            sending.state, sending.since = state, self._clock.now()

    def _renew(self, message: Renew) -> None:
        """More time for what it wants, and for what it only reads still. The answer names what it may still have."""
        until = self._clock.now() + self._hold_s
        handoffs, announced = [], []
        for handoff in message.handoffs:
            sending = self._table.get(handoff)
            if sending is None or sending.to != message.worker:
                continue
            sending.lease_until = until
            if sending.state is not SendState.QUIESCING:
                handoffs.append(handoff)
                announced.append(len(sending.pages))
        if message.worker not in self._lost:
            self._send(message.worker, Renewed(self._me, message.serial, handoffs, announced))

    def _gone(self, handoffs: list[str], outcome: str, reason: str) -> None:
        """Nothing more will be heard about these hand-offs."""
        for handoff in handoffs:
            state = self._table[handoff].state
            if state is SendState.QUIESCING:
                self._close(handoff, "aborted")
            elif state is SendState.HOLDING:
                self._orphan(handoff, outcome, reason)
            else:
                self._go_on_here(handoff, outcome)

    def _release(self, handoff: str, outcome: str) -> Request:
        """The only way out of the table."""
        self.counts[outcome] += 1
        sending = self._table.pop(handoff)
        self._scheduler.pool.release(sending.pages)
        return sending.request

    def _close(self, handoff: str, outcome: str) -> None:
        request = self._release(handoff, outcome)
        if request.status is Status.HOLDING:
            self._scheduler.release(request)
            self._freed(request)

    def _go_on_here(self, handoff: str, outcome: str) -> None:
        request = self._release(handoff, outcome)
        request.decode_elsewhere = False
        if request.status is Status.HOLDING:
            self._scheduler.adopt(request)

    def _orphan(self, handoff: str, outcome: str, reason: str) -> None:
        request = self._release(handoff, outcome)
        if request.status is Status.HOLDING:
            self._scheduler.release(request)
        else:
            self._scheduler.abort(request.id)
        self._orphaned(request, reason)


def handoff_id(submit: Submit) -> str:
    """Global and never reused: the same request resubmitted is another hand-off."""
    return f"{submit.id}/{submit.attempt}"


def remember(tombstones: dict[str, _T], name: str, value: _T) -> None:
    """Keep `name` among the last ten thousand: enough for messages that are late, and bounded."""
    tombstones.pop(name, None)
    tombstones[name] = value
    if len(tombstones) > _TOMBSTONES:
        del tombstones[next(iter(tombstones))]
