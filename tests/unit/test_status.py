"""What people who watch a deployment are told: quantiles, series and page counts, beside their definitions."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.cluster.status import STEP_S, WINDOW_S, Histogram, Recent
from disagg.record import Record

seconds = st.floats(1e-5, 1e3)


@given(st.lists(seconds, min_size=1, max_size=300), st.floats(0.01, 1))
def test_quantiles_are_right_to_five_per_cent(values, share):
    """Of any samples: the nearest rank's value, to the resolution of the bins."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = np.quantile(values, share, method="inverted_cdf")
    assert histogram.quantile(share) == pytest.approx(exact, rel=0.05)


def test_no_samples_have_no_quantile():
    """Nothing happened is not zero seconds."""
    assert Histogram().quantile(0.5) is None


def record(token_at, scheduled_at=None, **options):
    at = scheduled_at if scheduled_at is not None else (token_at[0] - 0.5 if token_at else 0.0)
    fields = {"request_id": "r", "index": 0, "prompt_len": 3, "finish_reason": "length", **options}
    return Record(scheduled_at=at, sent_at=at, token_at=token_at, **fields)


gaps = st.lists(st.floats(1e-4, 5), min_size=1, max_size=30)


@settings(max_examples=50)
@given(st.lists(gaps, min_size=1, max_size=10))
def test_series_count_every_token_and_request_of_the_window(requests):
    """Of records that all lie in the window: no token and no end is lost or counted twice."""
    recent = Recent()
    now = 1000.0
    for each in requests:
        end = now - 1
        start = end - sum(each)
        recent.add(record([start, *(start + sum(each[: i + 1]) for i in range(len(each)))]), end)
        recent.deliver(len(each) + 1, end)
    series = recent.series(now)
    assert len(series.tokens) == WINDOW_S / STEP_S
    assert sum(series.tokens) == sum(len(each) + 1 for each in requests)
    assert sum(series.ended) == len(requests)
    itl = [value for value in (*series.itl_p50, *series.itl_p99) if value is not None]
    every = [gap for each in requests for gap in each]
    assert min(every) * 0.94 <= min(itl) <= max(itl) <= max(every) * 1.06


def test_a_point_of_the_series_is_where_it_happened():
    """TTFT counts when the first token came, a gap when it ended, an end when it ended; other points are empty."""
    recent = Recent()
    recent.add(record([100.0, 103.0], scheduled_at=99.0), 103.5)
    series = recent.series(110.0)
    at = {STEP_S * math.floor(t / STEP_S): t for t in (100.0, 103.0)}
    place = {start: round((start - series.start_at) / STEP_S) for start in at}
    assert series.ttft_p50[place[100.0]] == pytest.approx(1.0, rel=0.05)
    assert series.itl_p99[place[102.0]] == pytest.approx(3.0, rel=0.05)
    assert [series.ttft_p50.count(None), series.itl_p50.count(None)] == [len(series.ttft_p50) - 1] * 2
    assert [i for i, count in enumerate(series.ended) if count] == [place[102.0]]


def test_the_past_is_dropped():
    """What is older than the window is in no series, and no memory is kept for it; the last rows stay."""
    recent = Recent()
    for hour in range(100):
        recent.add(record([3600.0 * hour]), 3600.0 * hour)
    assert sum(recent.series(3600.0 * 99).ended) == 1
    assert len(recent._steps) == 1
    rows = recent.rows()
    assert (len(rows), rows[0].end_at) == (60, 3600.0 * 99)


def test_a_request_without_a_token_is_shown_too():
    """Failed and aborted requests have a row, with what is known of them."""
    recent = Recent()
    recent.add(record([], finish_reason="error", error="lost"), 5.0)
    (row,) = recent.rows()
    assert (row.error, row.ttft_s, row.parts) == ("lost", None, {})
    assert sum(recent.series(5.0).ended) == 1


def test_reading_while_another_thread_adds():
    """The server's event loop reads what the cluster's thread writes."""
    recent, failures = Recent(), []

    def read():
        try:
            for i in range(300):
                recent.series(float(i))
                recent.rows()
        except RuntimeError as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(3000):
        recent.add(record([float(i % 300)]), float(i % 300))
    reader.join()
    assert failures == []


def test_the_usual_gap_is_right_from_the_start():
    """The first end says nothing of gaps, the second is taken as it is, then comes the average. Failures count not."""
    recent = Recent()
    recent.add(record([1e6]), 1e6)
    assert recent.end_gap_s == 0
    recent.add(record([], finish_reason="error"), 1e6 + 1)
    recent.add(record([1e6]), 1e6 + 2)
    assert recent.end_gap_s == 2
    recent.add(record([1e6]), 1e6 + 3)
    assert recent.end_gap_s == pytest.approx(1.9)
