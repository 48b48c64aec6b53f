"""What the measurement allows us to say: one of four things, as data; `sentences` puts it into words."""

from typing import Literal

import msgspec

from disagg.measure.stats import Interval, repeats_needed

MARGIN = 0.05  # differences below 5 % (or 5 points of a share) are of no practical interest

Kind = Literal["better", "worse", "equal", "open"]
# metric -> whether more of it is better
METRICS = {"e2e_s": False, "ttft_s": False, "tpot_s": False, "itl_p99_s": False, "throughput": True, "goodput": True}


class Verdict(msgspec.Struct, frozen=True):
    """Whether `other` does better than `base` by one metric.

    kind: better or worse (the interval leaves out zero); equal (it holds zero and lies within `margin`: no difference
    larger than `bound`); open (not resolved; about `n_more` repeats would do, None if no useful number would).
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
