"""Sending a workload to a deployment and collecting one Record per request, whatever happens.

Open loop: requests are sent at absolute times drawn beforehand, whether or not earlier ones have ended, and latency
counts from the scheduled moment. So a stalled server, or a client that falls behind, shows up as latency instead of
quietly lowering the load (coordinated omission).

Every request ends in exactly one Record. One that has not ended by its deadline is aborted and recorded as a miss.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import msgspec

from disagg.clock import Clock
from disagg.errors import DisaggError, InvariantError
from disagg.record import Record
from disagg.request import SamplingParams
from disagg.workload.workload import Row, Workload

POLL_S = 0.05  # the longest single wait for updates: keeps deadlines and Ctrl-C prompt
LEAD_S = 0.02  # between "now" and the first arrival, so that the first one is not late


class Update(Protocol):
    """News of one request."""

    @property
    def request_id(self) -> str: ...  # noqa: D102

    @property
    def tokens(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def record(self) -> Record | None:
        """Set when the request has ended, and then only."""


class Driven(Protocol):
    """What the driver needs of a running deployment; `Cluster` has it, and so has the tests' fake."""

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, scheduled_at: float | None = None, index: int = 0
    ) -> str:
        """Send a request now; `scheduled_at` is when it was due. Returns its id."""

    def poll(self, timeout_s: float) -> Sequence[Update]:
        """News, waiting up to `timeout_s` for the first. Raises WorkerLost."""

    def abort(self, request_id: str) -> Record | None:
        """End a request now. Its Record, or None when it is over already."""


class Label(msgspec.Struct, frozen=True):
    """Which part of the comparison a block belongs to: copied into each of its Records."""

    arm: str
    phase: str
    rate: float = 0.0
    repeat: int = 0


class _Flight:
    """The requests sent and not yet ended."""

    def __init__(self, cluster: Driven, clock: Clock, label: Label) -> None:
        self.cluster = cluster
        self.clock = clock
        self.label = label
        self.open: set[str] = set()
        self.num_tokens = 0
        self.done: list[Record] = []

    def send(self, row: Row, due_at: float) -> None:
        """Send `row` now; it was due at `due_at`."""
        self.open.add(self.cluster.submit(row.prompt, row.params(), scheduled_at=due_at, index=row.index))

    def collect(self, timeout_s: float) -> None:
        """Take the news of up to `timeout_s`."""
        for update in self.cluster.poll(max(0.0, min(timeout_s, POLL_S))):
            self.num_tokens += len(update.tokens)
            if update.record is not None:
                self._end(update.record)

    def collect_until(self, deadline_at: float) -> None:
        """Take news until all have ended or the deadline has come; then give up what is left."""
        while self.open and self.clock.now() < deadline_at:
            self.collect(deadline_at - self.clock.now())
        self.give_up("not finished before the deadline")

    def give_up(self, why: str) -> None:
        """Abort what is open; each leaves a Record that counts as a miss."""
        for request_id in sorted(self.open):
            record = self.cluster.abort(request_id)
            if record is None:
                raise InvariantError(f"Request {request_id} is over for the cluster and its Record never came.")
            record.error = record.error or why
            self._end(record)

    def _end(self, record: Record) -> None:
        self.open.remove(record.request_id)
        record.arm, record.phase = self.label.arm, self.label.phase
        record.rate, record.repeat = self.label.rate, self.label.repeat
        self.done.append(record)

    def in_order(self) -> list[Record]:
        """The Records of all requests that have ended, by index."""
        return sorted(self.done, key=lambda record: record.index)


def run_one_at_a_time(
    cluster: Driven, workload: Workload, clock: Clock, label: Label, timeout_s: float = 120.0
) -> list[Record]:
    """Each request alone, due when the one before has ended. `timeout_s` bounds each. Records by index."""
    flight = _Flight(cluster, clock, label)
    for row in workload.rows:
        now = clock.now()
        flight.send(row, now)
        flight.collect_until(now + timeout_s)
    return flight.in_order()


def run_open_loop(
    cluster: Driven, workload: Workload, clock: Clock, label: Label, drain_s: float = 30.0
) -> list[Record]:
    """Each request at its arrival. After the last one, `drain_s` seconds to end; the rest are misses.

    Times are absolute: a late send does not move the ones after it, and the lateness stays visible as
    `sent_at - scheduled_at`. Returns Records by index, as many as the workload has rows.
    """
    flight = _Flight(cluster, clock, label)
    start_at = clock.now() + LEAD_S
    for row in workload.rows:
        due_at = start_at + row.arrival_at
        while (wait_s := due_at - clock.now()) > 0:
            flight.collect(wait_s)
        flight.send(row, due_at)
    flight.collect_until(clock.now() + drain_s)
    return flight.in_order()


class Burst(msgspec.Struct, frozen=True):
    """What a saturated deployment delivered."""

    rate: float  # requests/s: output tokens/s / the workload's mean output length
    tokens_per_s: float
    window_s: float
    with_ramp: bool = False  # the window never opened: the ramp is in it


def run_saturated(
    cluster: Driven, workload: Workload, clock: Clock, in_flight: int, window_s: float, limit_s: float
) -> Burst:
    """Keep `in_flight` requests going, taking rows in a circle, and count the output tokens of a time window.

    The window opens when `in_flight` requests have ended, so the ramp is left out; it closes when as many more have
    ended and `window_s` seconds have passed. After `limit_s` seconds it closes in any case, and if no token had come
    since it opened, everything counts. What is open at the end is aborted: this run leaves no Records. Raises
    DisaggError when no token came at all.
    """
    flight = _Flight(cluster, clock, Label("", "capacity"))
    begun_at = opened_at = now = clock.now()
    num_before, ramping = 0, True
    rows = itertools.cycle(workload.rows)
    while now - begun_at < limit_s:
        while len(flight.open) < in_flight:
            flight.send(next(rows), clock.now())
        flight.collect(POLL_S)
        now = clock.now()
        if ramping and len(flight.done) >= in_flight:
            opened_at, num_before, ramping = now, flight.num_tokens, False
        if not ramping and now - opened_at >= window_s and len(flight.done) >= 2 * in_flight:
            break
    if flight.num_tokens == num_before:
        opened_at, num_before, ramping = begun_at, 0, True
    num_tokens = flight.num_tokens - num_before
    flight.give_up("the capacity run had ended")
    if num_tokens == 0:
        raise DisaggError(
            f"No token came within {now - begun_at:.0f} s with {in_flight} requests in flight, so no capacity can be "
            "measured: use a shorter --prompt-len (with a trace a smaller --length-scale) or a smaller --model."
        )
    mean_output = sum(row.max_tokens for row in workload.rows) / len(workload.rows)
    tokens_per_s = num_tokens / (now - opened_at)
    return Burst(tokens_per_s / mean_output, tokens_per_s, now - opened_at, ramping)
