"""Every number this project prints about requests, as a function of Records. Formula and unit in each docstring.

Latency counts from the scheduled arrival. Latency statistics are over completed requests; the failed ones are counted
beside them and are misses in goodput, so leaving them out of the percentiles cannot flatter anyone unseen.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from disagg.config import SLO
from disagg.record import E2E_PARTS, TTFT_PARTS, Record


class Stat(msgspec.Struct, frozen=True):
    """A distribution in four numbers; None where there is nothing to describe. Percentiles interpolate linearly."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    num: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Stat":
        """The statistics of the values that are not None."""
        kept = [value for value in values if value is not None]
        if not kept:
            return cls(None, None, None, None, 0)
        p50, p90, p99 = (float(value) for value in np.percentile(kept, (50, 90, 99)))
        return cls(float(np.mean(kept)), p50, p90, p99, len(kept))


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met every limit of the SLO. Failures and timeouts are misses."""

    share: float  # good / all requests sent
    rate: float  # good requests/s: share * the arrival rate asked for
    good: int
    num: int


def blocks(records: Iterable[Record]) -> list[list[Record]]:
    """Records by (arm, phase, rate, repeat): one list per block, a block being what ran without a break."""
    groups: dict[tuple[str, str, float, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.arm, record.phase, record.rate, record.repeat].append(record)
    return list(groups.values())


def completed(records: Iterable[Record]) -> list[Record]:
    """Requests that ended as asked (`Record.ok`)."""
    return [record for record in records if record.ok]


def ttft(records: Iterable[Record]) -> Stat:
    """Time to first token, seconds: first token at the client - scheduled arrival."""
    return Stat.of(record.ttft_s for record in completed(records))


def tpot(records: Iterable[Record]) -> Stat:
    """Time per output token, seconds: (last token - first token) / (tokens - 1), one value per request.

    Outputs of one token have no gap and are left out.
    """
    return Stat.of(record.tpot_s for record in completed(records))


def itl(records: Iterable[Record]) -> Stat:
    """Inter-token latency, seconds: every single gap between neighbouring tokens of a request, all requests pooled."""
    return Stat.of(gap for record in completed(records) for gap in record.itl_s)


def e2e(records: Iterable[Record]) -> Stat:
    """End-to-end latency, seconds: last token at the client - scheduled arrival."""
    return Stat.of(record.e2e_s for record in completed(records))


def lateness(records: Iterable[Record]) -> Stat:
    """How late the client sent, seconds: sent - scheduled. A guard reads it: this is our fault, not the server's."""
    return Stat.of(record.sent_at - record.scheduled_at for record in records if record.sent_at is not None)


def part(name: str, records: Iterable[Record]) -> Stat:
    """One of E2E_PARTS, seconds, over completed requests."""
    return Stat.of(parts[name] for record in completed(records) if (parts := record.e2e_parts()) is not None)


def handoff(records: Iterable[Record]) -> Stat:
    """What the hand-off cost a request, seconds: handoff_wait + handoff_copy + admission, after its prefill had ended.

    Copying that overlaps prefill costs nothing and is not in it (`Record.handoff_busy_s` has it all). Colocated: zero.
    """
    parts = [record.e2e_parts() for record in completed(records)]
    return Stat.of(each["handoff_wait"] + each["handoff_copy"] + each["admission"] for each in parts if each)


def ttft_parts(records: Iterable[Record]) -> dict[str, float | None]:
    """The mean of each of TTFT_PARTS, seconds; they sum to the mean TTFT."""
    parts = [each for record in completed(records) if (each := record.ttft_parts()) is not None]
    return {name: Stat.of(each[name] for each in parts).mean for name in TTFT_PARTS}


def e2e_parts(records: Iterable[Record]) -> dict[str, float | None]:
    """The mean of each of E2E_PARTS, seconds; they sum to the mean E2E."""
    parts = [each for record in completed(records) if (each := record.e2e_parts()) is not None]
    return {name: Stat.of(each[name] for each in parts).mean for name in E2E_PARTS}


def span_s(records: Sequence[Record]) -> float:
    """Seconds that blocks ran: from the first scheduled arrival to the last token, summed over the blocks."""
    total = 0.0
    for block in blocks(records):
        ends = [record.token_at[-1] for record in block if record.token_at]
        if ends:
            total += max(ends) - min(record.scheduled_at for record in block)
    return total


def throughput(records: Sequence[Record]) -> float:
    """Output tokens/s: tokens of completed requests / span_s. The drain after the last arrival is in the span."""
    seconds = span_s(records)
    return sum(len(record.token_at) for record in completed(records)) / seconds if seconds > 0 else 0.0


def is_good(record: Record, slo: SLO) -> bool:
    """Completed, and within every limit that is set. A one-token output has no TPOT and meets that limit."""
    pairs = ((slo.ttft_s, record.ttft_s), (slo.tpot_s, record.tpot_s), (slo.e2e_s, record.e2e_s))
    return record.ok and all(limit is None or value is None or value <= limit for limit, value in pairs)


def goodput(records: Sequence[Record], slo: SLO) -> Goodput:
    """Good requests / all requests, and that share of the rate asked for (0 where requests run one at a time)."""
    good = sum(is_good(record, slo) for record in records)
    share = good / len(records) if records else 0.0
    return Goodput(share, share * records[0].rate if records else 0.0, good, len(records))


def utilisation(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Of each worker: its prefill time and its decode time / span_s. The rest is idle, waiting or copying.

    A step's time is divided over its requests by their tokens (`prefill_busy_s`, `decode_busy_s`), so the sum over
    requests is the time of the steps.
    """
    seconds = span_s(records)
    busy: dict[str, dict[str, float]] = defaultdict(lambda: {"prefill": 0.0, "decode": 0.0})
    for record in records:
        for worker, busy_s in record.prefill_s_by_worker().items():
            busy[worker]["prefill"] += busy_s
        if record.decode_worker or record.prefill_worker:
            busy[record.decode_worker or record.prefill_worker]["decode"] += record.decode_busy_s
    if seconds <= 0:
        return {}
    return {name: {kind: value / seconds for kind, value in kinds.items()} for name, kinds in sorted(busy.items())}


def lane_of(worker: str) -> str:
    """A worker's name as people are shown it: without the epoch, so that a restarted one keeps its place."""
    return worker.partition(".")[0]


def handoff_rate(records: Iterable[Record]) -> float | None:
    """Bytes/s while copying: sum of hand-off bytes / sum of copying time. None without a hand-off."""
    pairs = [(record.handoff_bytes, record.handoff_busy_s) for record in records]
    seconds = sum(busy for _, busy in pairs)
    return sum(moved for moved, _ in pairs) / seconds if seconds > 0 else None
