"""What a deployment is doing now and did in the last minutes: data for people who watch it, made cheaply.

Workers push a Snapshot with every heartbeat; requests that ended leave a Row and their share of two time series. None
of it decides anything. Times are seconds on the host's monotonic clock unless a name says otherwise.
"""

import math
import threading
from collections import Counter, deque

import msgspec

from disagg.config import Role
from disagg.record import Record

STEP_S = 2.0  # one point of a series
WINDOW_S = 300.0  # how far the series go back
_NUM_STEPS = int(WINDOW_S / STEP_S)
_LONGEST_GAP_S = 60.0  # a longer pause between two ends says nothing
_ROWS = 60  # the last requests that are shown one by one
_BINS_PER_DECADE = 48  # of a latency histogram: neighbours differ by 5 %
_SMALLEST_S = 1e-6


class Snapshot(msgspec.Struct, frozen=True):
    """A worker at one moment."""

    at: float
    pages: dict[str, int]  # the terms of the conservation rule, which add up to its pool; see conserve.count
    num_waiting: int  # requests that hold no page yet
    num_running: int
    num_giving: int  # hand-offs in flight to other workers
    num_taking: int  # hand-offs in flight from other workers
    num_steps: int  # since it started, as the two below
    num_tokens: int  # positions those steps computed
    pulled_bytes: int  # of hand-offs that were adopted here
    step_s: float  # how long the last step took
    handoffs: dict[str, dict[str, int]]  # those given away ("prefill") and taken ("decode"), as in AuditReport


class WorkerLine(msgspec.Struct, frozen=True):
    """One worker as the front end sees it. `snapshot` is None until its first heartbeat, and without supervision."""

    name: str
    address: str  # name.epoch
    role: Role
    up: bool
    silent: bool  # missed several heartbeats
    snapshot: Snapshot | None


class Row(msgspec.Struct, frozen=True):
    """One request that is over. `parts` are Record.e2e_parts and sum to `e2e_s`; empty without a token."""

    request_id: str
    end_at: float
    prefill_worker: str
    decode_worker: str
    prompt_len: int
    output_len: int
    num_cached: int
    num_attempts: int
    handoff_bytes: int
    finish_reason: str
    error: str
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    parts: dict[str, float]


class Series(msgspec.Struct, frozen=True):
    """Points `step_s` apart, the first at `start_at`; None where nothing happened. Seconds, 5 % resolution."""

    start_at: float
    step_s: float
    ended: list[int]  # requests that ended in the step
    tokens: list[int]  # tokens that clients got in it
    ttft_p50: list[float | None]
    ttft_p99: list[float | None]
    itl_p50: list[float | None]
    itl_p99: list[float | None]


class Status(msgspec.Struct, frozen=True):
    """All of it. `counters` are Cluster.counters."""

    at: float
    deployment: str
    model: str  # as it was given: perhaps a path of this machine
    policy: str
    num_pages: int  # of each worker
    page_size: int  # tokens
    page_bytes: int
    workers: list[WorkerLine]
    counters: dict[str, int]
    series: Series
    rows: list[Row]  # newest first


class Histogram:
    """Latencies in bins that grow by 5 %: quantiles to that resolution in a memory that does not grow."""

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()

    def add(self, value_s: float) -> None:
        """One more sample; less than a microsecond counts as one."""
        self.bins[math.floor(_BINS_PER_DECADE * math.log10(max(value_s, _SMALLEST_S)))] += 1

    def quantile(self, share: float) -> float | None:
        """The value that `share` of the samples do not exceed (nearest rank), seconds. None without samples."""
        rank = math.ceil(share * self.bins.total())
        for place in sorted(self.bins):
            rank -= self.bins[place]
            if rank <= 0:
                return float(10 ** ((place + 0.5) / _BINS_PER_DECADE))
        return None


class _Step:
    """What is known of one step of the series. The four quantiles are kept until something is added."""

    def __init__(self) -> None:
        self.ended = self.tokens = 0
        self.ttft, self.itl = Histogram(), Histogram()
        self._quantiles: tuple[float | None, ...] | None = None

    def touch(self) -> "_Step":
        self._quantiles = None
        return self

    def quantiles(self) -> tuple[float | None, ...]:
        if self._quantiles is None:
            self._quantiles = tuple(each.quantile(share) for each in (self.ttft, self.itl) for share in (0.5, 0.99))
        return self._quantiles


class Recent:
    """The last minutes. Latencies come from Records, so those of a request appear when it is over.

    May be read from another thread than the one that adds.
    `end_gap_s`: the usual time between two requests that ended well, a running average; 0 before there were two.
    """

    def __init__(self) -> None:
        self.end_gap_s = 0.0
        self._last_end_at: float | None = None
        self._rows: deque[Row] = deque(maxlen=_ROWS)
        self._steps: dict[int, _Step] = {}
        self._lock = threading.Lock()

    def add(self, record: Record, now: float) -> None:
        """A request ended at `now`."""
        if record.ok:
            self._note_end(now)
        with self._lock:
            self._rows.appendleft(_row(record, now))
            self._step(now).ended += 1
            if (ttft_s := record.ttft_s) is not None:
                self._step(record.token_at[0]).ttft.add(ttft_s)
            place, step = None, _Step()
            for at, gap_s in zip(record.token_at[1:], record.itl_s, strict=True):
                if _place(at) != place:  # looked up once a step, not once a token
                    place, step = _place(at), self._step(at)
                step.itl.add(gap_s)

    def _note_end(self, now: float) -> None:
        """The first gap counts as it is: an average that began at nothing would take long to come near it."""
        if self._last_end_at is not None:
            gap_s = min(now - self._last_end_at, _LONGEST_GAP_S)
            self.end_gap_s += (0.1 if self.end_gap_s else 1.0) * (gap_s - self.end_gap_s)
        self._last_end_at = now

    def deliver(self, num_tokens: int, now: float) -> None:
        """Clients got so many tokens at `now`."""
        with self._lock:
            self._step(now).tokens += num_tokens

    def rows(self) -> list[Row]:
        """The last requests, newest first."""
        with self._lock:
            return list(self._rows)

    def series(self, now: float) -> Series:
        """The last WINDOW_S until `now`."""
        last = _place(now)
        places = range(last - _NUM_STEPS + 1, last + 1)
        with self._lock:
            steps = [self._steps.get(place) or _Step() for place in places]
            quantiles = [step.quantiles() for step in steps]
        ttft_p50, ttft_p99, itl_p50, itl_p99 = (list(column) for column in zip(*quantiles, strict=True))
        return Series(
            places[0] * STEP_S, STEP_S, [step.ended for step in steps], [step.tokens for step in steps],
            ttft_p50, ttft_p99, itl_p50, itl_p99,
        )  # fmt: skip

    def _step(self, at: float) -> _Step:
        place = _place(at)
        step = self._steps.get(place)
        if step is None:
            step = self._steps[place] = _Step()
            newest = max(self._steps)
            self._steps = {each: kept for each, kept in self._steps.items() if each > newest - _NUM_STEPS}
        return step.touch()


def _place(at: float) -> int:
    return int(at // STEP_S)


def _row(record: Record, now: float) -> Row:
    return Row(
        record.request_id, now, record.prefill_worker, record.decode_worker, record.prompt_len, record.output_len,
        record.num_cached, record.num_attempts, record.handoff_bytes, record.finish_reason, record.error,
        record.ttft_s, record.tpot_s, record.e2e_s, record.e2e_parts() or {},
    )  # fmt: skip
