"""How sure we are. The unit is the repeat, not the request: requests of one run share a queue, so they depend on it.

Near capacity an interval that treats requests as independent covers the truth 10 to 30 % of the time instead of 95 %
(measured for M/D/1 at loads 0.8 and 0.9). A paired t-interval over repeats, each with its own seed and all arms meeting
the same arrivals, does not have that fault; the unit test simulates its coverage.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
MAX_REPEATS = 10_000  # beyond this "n more repeats" says nothing useful


class Interval(msgspec.Struct, frozen=True):
    """An estimate and its confidence interval. `spread` is the standard deviation between repeats.

    `low` and `high` are None when one repeat or none was made, which allows no interval.
    """

    estimate: float
    low: float | None
    high: float | None
    num: int  # repeats
    spread: float | None = None


def t_factor(num: int, confidence: float = CONFIDENCE) -> float:
    """Half-width of a two-sided t-interval from `num` values, in standard errors."""
    return float(stdtrit(num - 1, (1 + confidence) / 2))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean ± t(n - 1) * s / sqrt(n). The values must be independent: one per repeat. Raises ValueError without any."""
    if not values:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    spread = float(np.std(values, ddof=1))
    half = t_factor(len(values), confidence) * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values), spread)


def paired_difference(base: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """other - base, repeat by repeat, as `mean_interval`. For shares: they may be zero and differ by 1 at most."""
    found = mean_interval([theirs - ours for ours, theirs in zip(base, other, strict=True)], confidence)
    if found.low is None or found.high is None:
        return found
    return msgspec.structs.replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0))


def paired_ratio(base: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """other / base - 1: the geometric mean of the repeats' ratios, from a paired t-interval of their logarithms.

    +0.1 reads "10 % more than base". All values must be above 0. `spread` is that of the logarithms.
    """
    logs = [math.log(theirs / ours) for ours, theirs in zip(base, other, strict=True)]
    inner = mean_interval(logs, confidence)
    low, high = (None if bound is None else math.expm1(bound) for bound in (inner.low, inner.high))
    return Interval(math.expm1(inner.estimate), low, high, inner.num, inner.spread)


def repeats_needed(interval: Interval, margin: float, confidence: float = CONFIDENCE) -> int | None:
    """How many repeats more would settle it, if estimate and spread stay what they are. None: too many to be of use.

    Settled is when the interval leaves out zero, or lies within ±`margin`: when its half-width is below
    max(|estimate|, margin - |estimate|). With a single repeat the spread is unknown; four more make the usual five.
    """
    if interval.spread is None:
        return 4
    size = abs(interval.estimate)
    wanted = max(size, margin - size)
    for num in range(2, MAX_REPEATS):
        if t_factor(num, confidence) * interval.spread / math.sqrt(num) < wanted:
            return max(1, num - interval.num)
    return None
