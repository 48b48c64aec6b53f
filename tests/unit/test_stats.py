import math

import numpy as np
import pytest

from disagg.measure.stats import (
    Interval,
    mean_interval,
    paired_difference,
    paired_ratio,
    repeats_needed,
    t_factor,
)


def test_t_interval_by_hand():
    """1, 2, 3: mean 2, s 1, t(2) 4.3027, half-width 4.3027 / sqrt(3)."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.estimate, interval.spread, interval.num) == (2, 1, 3)
    assert interval.high - interval.estimate == pytest.approx(4.302653 / math.sqrt(3))
    assert t_factor(5) == pytest.approx(2.776445)


def test_one_repeat_allows_no_interval():
    """It says so instead of inventing one."""
    assert mean_interval([5.0]) == Interval(5.0, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_pairing_removes_what_repeats_share():
    """Repeats differ tenfold, the arms by exactly 10 % in each: the interval is that 10 %."""
    base = [1.0, 10.0, 3.0]
    ratio = paired_ratio(base, [1.1 * value for value in base])
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference(base, [value + 1 for value in base]).low == pytest.approx(1)


def test_pairs_must_match():
    """A repeat without its partner is the caller's mistake, not something to drop."""
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])


def test_coverage_is_near_nominal():
    """2,000 experiments of 5 paired repeats with a known ratio: the 95 % interval holds it 93.5 to 96.5 % of the time.

    Repeats share a strong common factor, as traffic and machine give it, and have noise of their own.
    """
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        shared = rng.lognormal(0, 1.0, 5)
        base = shared * rng.lognormal(0, 0.1, 5)
        other = 0.8 * shared * rng.lognormal(0, 0.1, 5)
        interval = paired_ratio(base.tolist(), other.tolist())
        held += interval.low <= -0.2 <= interval.high
    assert 0.935 <= held / 2000 <= 0.965


def _waits(load, num, rng):
    """Waiting times of an M/D/1 queue with unit service, from empty (Lindley's recursion)."""
    gaps = rng.exponential(1 / load, num)
    waits, wait = [], 0.0
    for gap in gaps:
        waits.append(wait)
        wait = max(0.0, wait + 1.0 - gap)
    return waits


def test_repeats_cover_where_requests_do_not():
    """M/D/1 at load 0.8, 400 requests, truth from long runs: an interval over 5 repeats holds it about as promised;
    one that treats the requests of a run as independent does not come near.
    """
    rng = np.random.default_rng(6)
    runs = [_waits(0.8, 400, rng) for _ in range(1500)]
    truth = float(np.mean(runs))  # the mean of a run of 400 from empty: what a block of the experiment estimates
    means = [float(np.mean(run)) for run in runs]
    by_repeats = [mean_interval(means[i : i + 5]) for i in range(0, 1500, 5)]
    by_requests = [mean_interval(run) for run in runs[:300]]
    covered = [np.mean([each.low <= truth <= each.high for each in kind]) for kind in (by_repeats, by_requests)]
    assert covered[0] >= 0.85  # the means are skewed near capacity, so five repeats fall a little short of 0.95
    assert covered[1] <= 0.5


def test_repeats_needed():
    """Estimate 10 %, spread 20 %: 18 repeats make the half-width fall below 10 %; 5 are there."""
    needed = repeats_needed(Interval(0.1, -0.15, 0.35, 5, 0.2), margin=0.05)
    assert needed == 13
    assert t_factor(18) * 0.2 / math.sqrt(18) < 0.1 <= t_factor(17) * 0.2 / math.sqrt(17)
    assert repeats_needed(Interval(0.0, None, None, 1), 0.05) == 4
    assert repeats_needed(Interval(0.025, -90, 90, 2, 30.0), 0.05) is None
