"""The decode worker's side of a hand-off: pages are reserved first, filled chunk by chunk, then the request runs here.

    Offer ─▶ WAIT_PAGES ──room──▶ FILLING ──all pages copied and right, lease proven──▶ PullDone, the request runs here
                │                    │
                └──────abort, cancel, failure─────▶ QUIESCING ──copies ended──▶ Dropped

A failure is: no room or no news for `max_wait_s`, a chunk lost or malformed, a copy failed or damaged, the lease over,
the prefill worker dead. Then the request goes on where it costs least:

    the prefill worker lives and the lease holds     there, with the pages it has: Dropped says `refused`
    else, the first token is known                   here, computed anew from its tokens: `recompute`
    else, the prefill worker is dead                 nowhere: `give_up`, and the front end retries
    else                                             there, if it lives; if it does not, the front end retries

Rules. A target page belongs to this side from its reservation until the request is adopted or the page is released,
and it is not released while a copy into it is in flight. Reservations are made for whole prompts, first come first
served, so two half-filled requests cannot starve each other. A request is adopted only while the lease holds, and only
what was copied while it held counts: later, the source may have been reused. A hand-off that ended leaves a tombstone,
so that no late or doubled message opens it again.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from disagg.clock import Clock
from disagg.cluster.handoff_prefill import Held, remember
from disagg.cluster.messages import Cancel, ChunkReady, Dropped, Hello, Message, Offer, PullDone, Renew, Renewed
from disagg.cluster.receiving import DecodeHost, ReceiveState
from disagg.cluster.receiving import Receiving as Receiving
from disagg.engine.scheduler import Scheduler
from disagg.errors import HandshakeError
from disagg.record import Facts, Span
from disagg.transfer.base import Pulled, Transport

_RENEWALS = 4  # per lease: three may be late or lost


class Pull(NamedTuple):
    """A copy in flight: which pages of which hand-off."""

    handoff: str
    first: int
    stop: int


class Asked(NamedTuple):
    """A Renew whose answer may still come."""

    at: float
    worker: str
    handoffs: list[str]


class DecodeSide:
    """All hand-offs this worker takes. Pure: driven by messages and ticks.

    `max_wait_s` bounds every wait of one hand-off: for room, for the next chunk, for a copy. `clock_name` says which
    processes read the same clock.

    `counts` has started, done, failed, expired and aborted; the last four and the table's length add up to the first.
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
        clock_name: str = "host",
    ) -> None:
        self._hello = hello
        self._me = hello.worker
        self._clock = clock
        self._send = send
        self._transport = transport
        self._scheduler = scheduler
        self._host = host
        self._max_wait_s = max_wait_s
        self._clock_name = clock_name
        self._table: dict[str, Receiving] = {}  # in order of arrival
        self._pulls: dict[int, Pull] = {}
        self._asked: dict[int, Asked] = {}  # by serial
        self._serial = 0
        self._renew_at = math.inf
        self._sources: dict[str, str] = {}  # prefill worker -> address of its pages, mapped
        self._ended: dict[str, None] = {}  # hand-offs: a tombstone each
        self._aborted: dict[str, float] = {}  # request id -> the last attempt nobody wants: tombstones
        self._lost: dict[str, None] = {}  # dead workers: a tombstone each
        self.counts: Counter[str] = Counter()

    def on_offer(self, offer: Offer) -> None:
        """A prefill worker wants to hand over a request. A later attempt ends the earlier ones."""
        handoff, source, request = offer.handoff, offer.source.worker, offer.request
        if handoff in self._table or handoff in self._ended or source in self._lost:
            return
        if request.attempt <= self._aborted.get(request.id, -1):
            remember(self._ended, handoff, None)
            self._send(source, Dropped(self._me, handoff))
            return
        if request.attempt:
            self.abort(request.id, request.attempt - 1)
        now = self._clock.now()
        shared = offer.clock == self._clock_name
        lease_until = (offer.sent_at if shared else now) + offer.lease_s
        if refused := self._objection(offer) or ("the offer came too late" if lease_until <= now else ""):
            remember(self._ended, handoff, None)
            self._send(source, Dropped(self._me, handoff, refused))
            return
        self.counts["started"] += 1
        receiving = self._table[handoff] = Receiving(offer, now, lease_until, Facts(self._me), reason=f"from {source}")
        if shared:
            receiving.proven_until = lease_until
        self._renew_at = min(self._renew_at, now + offer.lease_s / _RENEWALS if shared else now)
        self._reserve()

    def on_message(self, message: ChunkReady | Cancel | Renewed) -> None:
        """What a prefill worker says about a hand-off it offered."""
        if isinstance(message, Renewed):
            self._renewed(message)
            return
        receiving = self._table.get(message.handoff)
        if receiving is not None and receiving.source != message.worker:
            return
        if isinstance(message, Cancel):
            if receiving is not None:
                self._drop(message.handoff, "aborted", message.reason)
            elif message.worker not in self._lost:  # the answer was lost, or the Offer is still to come
                remember(self._ended, message.handoff, None)
                self._send(message.worker, Dropped(self._me, message.handoff))
        elif receiving is not None and receiving.state is not ReceiveState.QUIESCING:
            self._announced(receiving, message)

    def abort(self, request_id: str, attempt: int | None = None) -> None:
        """Nobody wants this request up to `attempt` (None: ever). Remembered: its Offer may still be on its way."""
        last = math.inf if attempt is None else attempt
        remember(self._aborted, request_id, max(last, self._aborted.get(request_id, -1)))
        for handoff, receiving in list(self._table.items()):
            if receiving.offer.request.id == request_id and receiving.offer.request.attempt <= last:
                self._drop(handoff, "aborted", "aborted")

    def worker_lost(self, worker: str) -> None:
        """A prefill worker died. Its memory stays mapped: what it announced whole may still be copied, in its lease."""
        remember(self._lost, worker, None)
        for handoff, receiving in list(self._table.items()):
            if receiving.source == worker:
                receiving.source_lost = True
                if receiving.state is not ReceiveState.QUIESCING and receiving.first_token is None:
                    self._fail(handoff, f"{worker} died")
        self._unmap(worker)

    def tick(self) -> None:
        """Collect copies, end what waited too long, find room, renew leases. Runs on every turn of the loop."""
        for pulled in self._transport.poll():
            self._copied(pulled)
        now = self._clock.now()
        for handoff, receiving in list(self._table.items()):
            if receiving.state is ReceiveState.QUIESCING:
                continue
            if receiving.lease_until <= now:
                self._fail(handoff, "the lease was over before the copy was", "expired")
            elif now - receiving.since > self._max_wait_s:
                lacks = "room" if receiving.state is ReceiveState.WAIT_PAGES else "the next page"
                self._fail(handoff, f"{self._me} waited {self._max_wait_s:g} s for {lacks}")
        self._reserve()
        if now >= self._renew_at:
            self._renew(now)

    def held(self) -> list[Held]:
        """For the audit and the conservation rule: every hand-off and the pages reserved for it."""
        now = self._clock.now()
        return [
            Held(handoff, r.state.value, list(r.pages), r.lease_until - now, now - r.since, r.reason)
            for handoff, r in self._table.items()
        ]

    # Offered: may it come?

    def _objection(self, offer: Offer) -> str:
        """Why this hand-off can never work, as a sentence; empty if it can. Maps the peer's pages."""
        source, pool = offer.source, self._scheduler.pool
        if difference := self._hello.layout.difference(source.layout):
            return f"{self._me} cannot take pages of {source.worker}: they differ in {difference}."
        needed = pool.num_pages_for(len(offer.request.tokens) + 1)
        if needed > pool.num_pages:
            return f"{self._me} has {pool.num_pages} pages and the prompt needs {needed}."
        try:
            self._transport.connect(source.address)
        except HandshakeError as error:
            return str(error)
        self._sources[source.worker] = source.address
        return ""

    def _reserve(self) -> None:
        """Give pages to those that wait, first come first served: the first that finds no room holds up the rest."""
        pool = self._scheduler.pool
        for receiving in list(self._table.values()):
            if receiving.state is not ReceiveState.WAIT_PAGES:
                continue
            needed = pool.num_pages_for(receiving.num_computed + 1)
            if not self._has_room(needed) or (pages := pool.allocate(needed)) is None:
                return
            receiving.pages = pages
            receiving.state = ReceiveState.FILLING
            receiving.since = self._clock.now()
            self._pull(receiving)

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

    # Chunks and copies

    def _announced(self, receiving: Receiving, chunk: ChunkReady) -> None:
        """Take in a chunk: once, in order, and only if it is what it must be. The first token is good in any case."""
        have, stop = len(receiving.theirs), chunk.first_page + len(chunk.pages)
        if chunk.first_page < have:
            return  # a duplicate
        if chunk.first_token is not None:
            receiving.first_token = chunk.first_token
        total = self._scheduler.pool.num_pages_for(receiving.num_computed)
        if chunk.first_page > have:
            self._fail(chunk.handoff, f"pages {have} to {chunk.first_page} were never announced")
        elif not chunk.pages or stop > total or (stop == total) != (chunk.first_token is not None):
            self._fail(chunk.handoff, f"{len(chunk.pages)} pages from {have} of {total} cannot be a chunk")
        else:
            receiving.theirs += chunk.pages
            receiving.checksums += chunk.checksums
            if receiving.state is ReceiveState.FILLING:
                receiving.since = self._clock.now()
                self._pull(receiving)

    def _pull(self, receiving: Receiving) -> None:
        """Start copying what was announced and not asked for yet. There is room for it."""
        first, stop = receiving.num_asked, len(receiving.theirs)
        if first < stop:
            address = receiving.offer.source.address
            ticket = self._transport.pull(address, receiving.theirs[first:stop], receiving.pages[first:stop])
            receiving.num_asked = stop
            receiving.tickets.add(ticket)
            self._pulls[ticket] = Pull(receiving.offer.handoff, first, stop)

    def _copied(self, pulled: Pulled) -> None:
        handoff, first, stop = self._pulls.pop(pulled.ticket)
        receiving = self._table[handoff]  # it is not let go before its copies have ended
        receiving.tickets.discard(pulled.ticket)
        receiving.copied_at = max(receiving.copied_at, pulled.end_at)
        receiving.since = self._clock.now()
        _note(receiving.facts, pulled)
        if receiving.state is ReceiveState.QUIESCING:
            self._leave(handoff)
        elif pulled.error:
            self._fail(handoff, pulled.error)
        elif (ours := self._host.checksum(receiving.pages[first:stop])) and ours != receiving.checksums[first:stop]:
            self._fail(handoff, f"pages {first} to {stop} arrived damaged")
        else:
            self._finish(handoff)

    def _finish(self, handoff: str) -> None:
        """Adopt the request if everything is here, and was read and is taken while the source was surely kept."""
        receiving = self._table[handoff]
        complete = receiving.state is ReceiveState.FILLING and receiving.first_token is not None
        if not complete or receiving.tickets or receiving.num_asked < len(receiving.theirs):
            return
        if max(receiving.copied_at, self._clock.now()) >= receiving.proven_until:
            return  # a renewal may prove it yet; if none comes, the lease ends it
        self._forget(handoff, "done")
        if not receiving.source_lost:
            self._send(receiving.source, PullDone(self._me, handoff))
        self._host.adopt(receiving)

    # The ways out

    def _fail(self, handoff: str, reason: str, outcome: str = "failed") -> None:
        """This hand-off will not succeed; see the module's text for who computes the request instead."""
        receiving = self._table[handoff]
        refused = ""
        if not receiving.source_lost and (receiving.first_token is None or receiving.lease_until > self._clock.now()):
            refused = reason
        elif receiving.first_token is not None:
            self._host.recompute(receiving)
        else:
            self._host.give_up(receiving, reason)
        self._drop(handoff, outcome, reason, refused)

    def _drop(self, handoff: str, outcome: str, reason: str, refused: str = "") -> None:
        """Let go: at once, or when the copies in flight have ended. Only the first reason counts."""
        receiving = self._table[handoff]
        if receiving.state is ReceiveState.QUIESCING:
            return
        receiving.state = ReceiveState.QUIESCING
        receiving.since = self._clock.now()
        receiving.refused, receiving.reason, receiving.outcome = refused, reason, outcome
        self._leave(handoff)

    def _leave(self, handoff: str) -> None:
        receiving = self._table[handoff]
        if receiving.tickets:
            return
        self._scheduler.pool.release(receiving.pages)
        self._forget(handoff, receiving.outcome)
        if not receiving.source_lost:
            self._send(receiving.source, Dropped(self._me, handoff, receiving.refused))

    def _forget(self, handoff: str, outcome: str) -> None:
        """The only way out of the table."""
        receiving = self._table.pop(handoff)
        remember(self._ended, handoff, None)
        self.counts[outcome] += 1
        if receiving.source_lost:
            self._unmap(receiving.source)

    def _unmap(self, worker: str) -> None:
        """A dead worker's memory goes when nothing is copied from it any more."""
        if all(receiving.source != worker for receiving in self._table.values()) and worker in self._sources:
            self._transport.disconnect(self._sources.pop(worker))

    # Leases

    def _renew(self, now: float) -> None:
        """Ask for more time for everything still wanted or still read, one message per prefill worker."""
        wanted: dict[str, list[str]] = {}
        lease_s = math.inf
        for handoff, receiving in self._table.items():
            if not receiving.source_lost:
                wanted.setdefault(receiving.source, []).append(handoff)
                lease_s = min(lease_s, receiving.offer.lease_s)
        for worker, handoffs in wanted.items():
            self._serial += 1
            self._asked[self._serial] = Asked(now, worker, handoffs)
            self._send(worker, Renew(self._me, self._serial, handoffs))
        self._renew_at = now + lease_s / _RENEWALS
        self._asked = {serial: asked for serial, asked in self._asked.items() if now - asked.at < lease_s}

    def _renewed(self, message: Renewed) -> None:
        """The lease runs anew from when it was asked for: the prefill worker counts from later, so it outlives ours."""
        asked = self._asked.get(message.serial)
        if asked is None or asked.worker != message.worker:
            return
        del self._asked[message.serial]
        granted = dict(zip(message.handoffs, message.announced, strict=False))
        for handoff in asked.handoffs:
            receiving = self._table.get(handoff)
            if receiving is None or receiving.state is ReceiveState.QUIESCING:
                continue
            if handoff not in granted:
                self._drop(handoff, "aborted", "the prefill worker does not have it any more")
            elif granted[handoff] > len(receiving.theirs):
                self._fail(handoff, "a chunk was lost")
            else:
                receiving.proven_until = max(receiving.proven_until, asked.at + receiving.offer.lease_s)
                receiving.lease_until = max(receiving.lease_until, receiving.proven_until)
                self._finish(handoff)


def _note(facts: Facts, pulled: Pulled) -> None:
    """A copy that ended, for the record."""
    facts.handoff_start_at = pulled.start_at if facts.handoff_start_at is None else facts.handoff_start_at
    facts.handoff_end_at = pulled.end_at
    facts.handoff_bytes += pulled.num_bytes
    facts.handoff_busy_s += pulled.end_at - pulled.start_at
    facts.spans.append(Span("handoff", facts.worker, pulled.start_at, pulled.end_at, pulled.num_bytes))
