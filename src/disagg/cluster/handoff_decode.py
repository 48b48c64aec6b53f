"""The decode worker's side of a hand-off: pages are reserved first, filled chunk by chunk, then the request runs here.

    Offer ─▶ WAIT_PAGES ──room──▶ FILLING ──all chunks copied, first token known──▶ (request adopted, PullDone sent)
                │                    │
                │                    ├──abort, cancel, copy failed, lease over──▶ QUIESCING ──copies ended──▶ (Dropped)
                └──abort, cancel, refused────────────────────────────────────────────────────────────▶ (Dropped)

Rules. A target page belongs to this side from its reservation until the request is adopted or the page is released,
and it is not released while a copy into it is in flight. Reservations are made for whole prompts, first come first
served, so two half-filled requests cannot starve each other. What was copied counts only if the lease still held when
the copy ended: later, the source may have been reused. A failed hand-off whose first token is known is recomputed
here from its tokens; otherwise the prefill worker is asked to keep it (`Dropped.refused`), and if that one is dead the
front end hears of it.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from disagg.clock import Clock
from disagg.cluster.messages import Cancel, ChunkReady, Dropped, Hello, Message, Offer, PullDone, Renew, Renewed
from disagg.engine.scheduler import Scheduler
from disagg.errors import HandshakeError
from disagg.record import Facts, Span
from disagg.transfer.base import Pulled, Transport

_TOMBSTONES = 10_000  # aborted request ids remembered, so that an Offer that comes after its Abort is not taken


class ReceiveState(enum.Enum):
    """See the drawing above."""

    WAIT_PAGES = "wait_pages"
    FILLING = "filling"
    QUIESCING = "quiescing"


@dataclass(slots=True)
class Receiving:
    """One hand-off as its decode worker sees it."""

    offer: Offer
    lease_until: float
    waiting_since: float
    facts: Facts
    state: ReceiveState = ReceiveState.WAIT_PAGES
    pages: list[int] = field(default_factory=list)  # reserved here
    theirs: list[int] = field(default_factory=list)  # announced, in order
    checksums: list[int] = field(default_factory=list)  # one per page of `theirs`, when checked
    num_asked: int = 0  # how many of `theirs` a pull was started for
    num_computed: int = 0
    first_token: int | None = None
    tickets: set[int] = field(default_factory=set)
    source_lost: bool = False
    refused: str = ""  # why the prefill worker should keep the request


class DecodeHost(Protocol):
    """What this side asks of the worker it lives in."""

    def adopt(self, receiving: Receiving) -> None:
        """All pages are filled and the first token is known: run the request."""
        ...

    def recompute(self, receiving: Receiving) -> None:
        """The pages did not come but the first token is known: compute all of it here."""
        ...

    def give_up(self, receiving: Receiving, reason: str) -> None:
        """Neither pages nor first token will come: tell the front end."""
        ...

    def checksum(self, pages: list[int]) -> list[int]:
        """One number per page of this worker, as PrefillSide's `checksum`."""
        ...


class DecodeSide:
    """All hand-offs this worker takes. Pure: driven by messages and ticks.

    `max_wait_s` bounds the wait for room: after it the prefill worker is asked to keep the request.
    """

    def __init__(
        self,
        hello: Hello,
        clock: Clock,
        send: Callable[[str, Message], None],
        transport: Transport,
        scheduler: Scheduler,
        host: DecodeHost,
        max_wait_s: float,
    ) -> None:
        self._hello = hello
        self._clock = clock
        self._send = send
        self._transport = transport
        self._scheduler = scheduler
        self._host = host
        self._max_wait_s = max_wait_s
        self._table: dict[str, Receiving] = {}  # in order of arrival
        self._by_ticket: dict[int, str] = {}
        self._aborted: dict[str, None] = {}  # request ids, oldest first
        self._renewals: dict[int, float] = {}  # serial -> when it was sent
        self._serial = 0
        self._renew_at = 0.0

    def on_offer(self, offer: Offer) -> None:
        """A prefill worker wants to hand over a request."""
        refused = ""
        if offer.request.id in self._aborted:
            self._send(offer.source.worker, Dropped(offer.handoff))
            return
        if difference := self._hello.layout.difference(offer.source.layout):
            refused = f"{self._hello.worker} cannot take pages of {offer.source.worker}: they differ in {difference}"
        else:
            try:
                self._transport.connect(offer.source.address)
            except HandshakeError as error:
                refused = str(error)
        if refused:
            self._send(offer.source.worker, Dropped(offer.handoff, refused))
            return
        facts = Facts(self._hello.worker)
        receiving = Receiving(offer, offer.sent_at + offer.lease_s, self._clock.now(), facts)
        self._table[offer.handoff] = receiving
        self._reserve()

    def on_message(self, message: ChunkReady | Cancel | Renewed) -> None:
        """What a prefill worker says about a hand-off it offered."""
        if isinstance(message, Renewed):
            self._renewed(message)
            return
        receiving = self._table.get(message.handoff)
        if receiving is None:  # it ended here: an abort crossed this message, or it is a duplicate
            return
        if isinstance(message, Cancel):
            self._drop(message.handoff)
        elif receiving.first_token is None and message.num_computed > receiving.num_computed:
            receiving.theirs += message.pages
            receiving.checksums += message.checksums
            receiving.num_computed = message.num_computed
            receiving.first_token = message.first_token
            self._pull(receiving)

    def abort(self, request_id: str) -> None:
        """The client is gone. Remembered, so that an Offer still on its way is not taken."""
        self._aborted[request_id] = None
        if len(self._aborted) > _TOMBSTONES:
            del self._aborted[next(iter(self._aborted))]
        for handoff, receiving in list(self._table.items()):
            if receiving.offer.request.id == request_id:
                self._drop(handoff)

    def worker_lost(self, worker: str) -> None:
        """A prefill worker died: nothing more comes from it; copies in flight still end."""
        for handoff, receiving in list(self._table.items()):
            if receiving.offer.source.worker == worker:
                receiving.source_lost = True
                if receiving.state is not ReceiveState.QUIESCING:
                    self._fail(handoff, f"{worker} died")
                self._transport.disconnect(receiving.offer.source.address)

    def tick(self) -> None:
        """Collect copies, find room, renew leases, end what waited too long. Runs on every turn of the loop."""
        for pulled in self._transport.poll():
            self._copied(pulled)
        now = self._clock.now()
        for handoff, receiving in list(self._table.items()):
            if receiving.state is ReceiveState.QUIESCING:
                continue
            if receiving.lease_until <= now:
                self._fail(handoff, "the lease was over before the copy was")
            elif receiving.state is ReceiveState.WAIT_PAGES and now - receiving.waiting_since > self._max_wait_s:
                self._fail(handoff, f"{self._hello.worker} found no room in {self._max_wait_s:g} s")
        self._reserve()
        if now >= self._renew_at:
            self._renew(now)

    def held(self) -> list[tuple[str, str, list[int], float]]:
        """For the audit: (hand-off, state, pages, seconds of lease left)."""
        now = self._clock.now()
        return [(key, r.state.value, list(r.pages), r.lease_until - now) for key, r in self._table.items()]

    def _reserve(self) -> None:
        """Give pages to those that wait, first come first served: the first that finds no room holds up the rest."""
        for handoff, receiving in list(self._table.items()):
            if receiving.state is not ReceiveState.WAIT_PAGES:
                continue
            pool = self._scheduler.pool
            needed = pool.num_pages_for(len(receiving.offer.request.tokens) + 1)
            if needed > pool.num_pages:
                self._fail(handoff, f"{self._hello.worker} has {pool.num_pages} pages and the prompt needs {needed}")
            elif self._has_room(needed) and (pages := pool.allocate(needed)) is not None:
                receiving.pages = pages
                receiving.state = ReceiveState.FILLING
                self._pull(receiving)
            else:
                return

    def _has_room(self, needed: int) -> bool:
        """Whether another request may come: every running one keeps a page to grow into, and none is owed a place."""
        scheduler = self._scheduler
        filling = sum(receiving.state is ReceiveState.FILLING for receiving in self._table.values())
        if scheduler.num_running + filling == 0:
            return True
        return (
            scheduler.num_waiting == 0
            and scheduler.num_running + filling < scheduler.max_running
            and scheduler.pool.num_free - needed >= scheduler.num_running
        )

    def _pull(self, receiving: Receiving) -> None:
        """Start copying what was announced and not asked for yet, if there is room for it."""
        if receiving.state is not ReceiveState.FILLING:
            return
        theirs = receiving.theirs[receiving.num_asked :]
        if theirs:
            ours = receiving.pages[receiving.num_asked : receiving.num_asked + len(theirs)]
            ticket = self._transport.pull(receiving.offer.source.address, theirs, ours)
            receiving.num_asked += len(theirs)
            receiving.tickets.add(ticket)
            self._by_ticket[ticket] = receiving.offer.handoff

    def _copied(self, pulled: Pulled) -> None:
        handoff = self._by_ticket.pop(pulled.ticket)
        receiving = self._table[handoff]
        receiving.tickets.discard(pulled.ticket)
        facts = receiving.facts
        facts.handoff_start_at = pulled.start_at if facts.handoff_start_at is None else facts.handoff_start_at
        facts.handoff_end_at = pulled.end_at
        facts.handoff_bytes += pulled.num_bytes
        facts.handoff_busy_s += pulled.end_at - pulled.start_at
        facts.spans.append(Span("handoff", self._hello.worker, pulled.start_at, pulled.end_at, pulled.num_bytes))
        if receiving.state is ReceiveState.QUIESCING:
            self._drop(handoff)
        elif pulled.error:
            self._fail(handoff, pulled.error)
        elif pulled.end_at > receiving.lease_until:
            self._fail(handoff, "the lease was over before the copy was")
        else:
            self._finish(handoff)

    def _finish(self, handoff: str) -> None:
        """Adopt the request if everything is here and right."""
        receiving = self._table[handoff]
        if receiving.first_token is None or receiving.tickets or receiving.num_asked < len(receiving.theirs):
            return
        if receiving.checksums:
            ours = self._host.checksum(receiving.pages[: receiving.num_asked])
            if wrong := sum(mine != theirs for mine, theirs in zip(ours, receiving.checksums, strict=True)):
                self._fail(handoff, f"{wrong} page(s) arrived damaged")
                return
        del self._table[handoff]
        self._send(receiving.offer.source.worker, PullDone(handoff))
        self._host.adopt(receiving)

    def _fail(self, handoff: str, reason: str) -> None:
        """This hand-off will not succeed; find out who computes the request instead."""
        receiving = self._table[handoff]
        if receiving.first_token is not None:
            self._host.recompute(receiving)
            self._drop(handoff)
        elif receiving.source_lost:
            self._host.give_up(receiving, reason)
            self._drop(handoff)
        else:
            self._drop(handoff, refused=reason)

    def _drop(self, handoff: str, refused: str = "") -> None:
        """Let go: at once, or when the copies in flight have ended."""
        receiving = self._table[handoff]
        if refused:
            receiving.refused = refused
        if receiving.tickets:
            receiving.state = ReceiveState.QUIESCING
            return
        del self._table[handoff]
        self._scheduler.pool.release(receiving.pages)
        self._send(receiving.offer.source.worker, Dropped(handoff, receiving.refused))

    def _renew(self, now: float) -> None:
        """Ask for more time for everything still wanted, one message per prefill worker."""
        wanted: dict[str, list[str]] = {}
        soonest = float("inf")
        for handoff, receiving in self._table.items():
            if receiving.state is not ReceiveState.QUIESCING:
                wanted.setdefault(receiving.offer.source.worker, []).append(handoff)
                soonest = min(soonest, receiving.offer.lease_s)
        for worker, handoffs in wanted.items():
            self._serial += 1
            self._renewals[self._serial] = now
            self._send(worker, Renew(self._hello.worker, self._serial, handoffs))
        if wanted:
            self._renew_at = now + soonest / 4
            self._renewals = {serial: at for serial, at in self._renewals.items() if now - at < soonest}

    def _renewed(self, message: Renewed) -> None:
        """The lease runs anew from when it was asked for: the prefill worker counts from later, so it outlives ours."""
        asked_at = self._renewals.pop(message.serial, None)
        if asked_at is None:
            return
        for handoff in message.handoffs:
            if (receiving := self._table.get(handoff)) is not None:
                receiving.lease_until = max(receiving.lease_until, asked_at + receiving.offer.lease_s)
