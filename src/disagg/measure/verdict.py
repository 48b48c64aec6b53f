"""What the measurement allows us to say: one of five things, as data; `sentences` puts it into words."""

from typing import Literal

import msgspec

from disagg.measure.stats import Interval, repeats_needed

MARGIN = 0.05  # differences below 5 % (or 5 points of a share) are of no practical interest

Kind = Literal["better", "worse", "equal", "open", "unexplained"]
# metric -> whether more of it is better
METRICS = {"e2e_s": False, "ttft_s": False, "tpot_s": False, "itl_p99_s": False, "throughput": True, "goodput": True}


class Verdict(msgspec.Struct, frozen=True):
    """Whether `other` does better than `base` by one metric.

    kind: better or worse (the interval leaves out zero); equal (it holds zero and lies within `margin`: no difference
    larger than `bound`); open (not resolved; about `n_more` repeats would do, None if no useful number would);
    unexplained (see `explain`; `handoff` is what the hand-off accounts for, in the unit of `estimate`).
    estimate, low, high: relative difference other / base - 1, or the difference of the shares for goodput.
    """

    kind: Kind
    metric: str
    base: str
    other: str
    estimate: float
    low: float | None
    high: float | None
    repeats: int
    margin: float
    bound: float | None = None
    n_more: int | None = None
    handoff: float | None = None


def judge(metric: str, base: str, other: str, interval: Interval, margin: float = MARGIN) -> Verdict:
    """The verdict that a paired interval of `other` against `base` allows."""
    low, high = interval.low, interval.high
    kind: Kind = "open"
    bound, n_more = None, None
    if low is None or high is None:
        n_more = repeats_needed(interval, margin)
    elif low > 0 or high < 0:
        kind = "better" if (low > 0) == METRICS[metric] else "worse"
    elif max(-low, high) <= margin:
        kind, bound = "equal", max(-low, high)
    else:
        n_more = repeats_needed(interval, margin)
    return Verdict(
        kind, metric, base, other, interval.estimate, low, high, interval.num, margin, bound=bound, n_more=n_more
    )


def explain(verdict: Verdict, handoff: float) -> Verdict:
    """The verdict on latency one request at a time, where splitting the phases can add the hand-off and nothing else.

    `handoff` is the measured hand-off relative to the latency of `base`. A resolved difference of which it is less than
    half, a gain in any case, does not come from the split: it may not be told as better or worse.
    """
    if verdict.kind not in ("better", "worse") or 2 * handoff >= verdict.estimate > 0:
        return verdict
    return msgspec.structs.replace(verdict, kind="unexplained", handoff=handoff)
