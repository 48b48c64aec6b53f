from types import SimpleNamespace

import pytest
from fake_cluster import FakeCluster

from disagg.clock import ManualClock
from disagg.config import Budget, Deployment, EngineSpec
from disagg.errors import DisaggError
from disagg.measure import metrics, stages
from disagg.measure.drive import LEAD_S, Label, run_one_at_a_time, run_open_loop, run_saturated
from disagg.measure.run import Arm, Settings
from disagg.workload.traces import Trace, TraceRow
from disagg.workload.workload import Limits, Row, Workload

BUDGET = Budget("cpu", (0, 1))


def _fake(clock, deployment="2C", **options):
    return FakeCluster(Deployment.parse(deployment, BUDGET), EngineSpec(), clock, **options)


def _workload(*arrivals, max_tokens=3):
    return Workload(0, 1.0, 0, tuple(Row(i, at, (1, 2, i + 10), max_tokens) for i, at in enumerate(arrivals)))


def test_one_at_a_time_takes_the_sum_of_its_parts():
    """Each request is sent when the one before has ended: TTFT 10 ms, two gaps of 2 ms, E2E 14 ms, to the digit."""
    clock = ManualClock(100.0)
    records = run_one_at_a_time(_fake(clock), _workload(0, 0, 0), clock, Label("2C", "sequential"))
    assert [record.ttft_s for record in records] == pytest.approx([0.010] * 3)
    assert [record.e2e_s for record in records] == pytest.approx([0.014] * 3)
    assert [record.scheduled_at for record in records] == pytest.approx([100.0, 100.014, 100.028])
    assert clock.now() == pytest.approx(100.042)


def test_the_hand_off_delays_the_second_token_only():
    """1P1D has the same TTFT; the hand-off's 3 ms lie between first and second token."""
    clock = ManualClock()
    (record,) = run_one_at_a_time(_fake(clock, "1P1D"), _workload(0), clock, Label("1P1D", "sequential"))
    assert record.ttft_s == pytest.approx(0.010)
    assert record.itl_s == pytest.approx([0.005, 0.002])
    assert metrics.handoff([record]).mean == pytest.approx(0.003)


def test_open_loop_sends_on_time_and_counts_from_the_schedule():
    """Requests due at 0, 1 and 1.001 s are sent then; the third waits for the second's prefill, and that is latency."""
    clock = ManualClock()
    fake = _fake(clock)
    records = run_open_loop(fake, _workload(0, 1, 1.001), clock, Label("2C", "concurrent", 1.5, 4))
    assert [at for _, at in fake.sent] == pytest.approx([LEAD_S, LEAD_S + 1, LEAD_S + 1.001])
    assert metrics.lateness(records).p99 == pytest.approx(0.0)
    assert [record.ttft_s for record in records] == pytest.approx([0.010, 0.010, 0.019])
    assert {(record.arm, record.phase, record.rate, record.repeat) for record in records} == {
        ("2C", "concurrent", 1.5, 4)
    }


def test_a_slow_client_shows_as_lateness_and_does_not_shift_the_schedule():
    """Sending costs 5 ms and five requests are due at once: the last is 20 ms late, and its latency includes that."""
    clock = ManualClock()
    fake = _fake(clock, submit_s=0.005, prefill_s=0.001)
    records = run_open_loop(fake, _workload(0, 0, 0, 0, 0, 1.0), clock, Label("2C", "concurrent"))
    late = [record.sent_at - record.scheduled_at for record in records]
    assert late == pytest.approx([0, 0.005, 0.010, 0.015, 0.020, 0])
    assert records[4].ttft_s == pytest.approx(0.021)
    assert records[5].scheduled_at == pytest.approx(LEAD_S + 1.0)


def test_what_never_ends_is_a_recorded_miss():
    """A stuck request is aborted when the drain is over; it has a Record, and the run ends."""
    clock = ManualClock()
    fake = _fake(clock, stuck=frozenset({1}))
    records = run_open_loop(fake, _workload(0, 0.1, 0.2), clock, Label("2C", "concurrent"), drain_s=3.0)
    assert [record.index for record in records] == [0, 1, 2]
    assert [record.finish_reason for record in records] == ["length", "abort", "length"]
    assert records[1].error == "not finished before the deadline"
    assert clock.now() == pytest.approx(LEAD_S + 0.2 + 3.0, abs=0.06)


def test_a_stuck_request_does_not_stop_the_ones_after_it():
    """One at a time, the timeout bounds each request."""
    clock = ManualClock()
    fake = _fake(clock, stuck=frozenset({0}))
    records = run_one_at_a_time(fake, _workload(0, 0), clock, Label("2C", "sequential"), timeout_s=2.0)
    assert [record.ok for record in records] == [False, True]


def test_a_failure_is_recorded_with_its_reason():
    """The deployment's own error text stays."""
    clock = ManualClock()
    records = run_open_loop(_fake(clock, failing=frozenset({0})), _workload(0), clock, Label("2C", "concurrent"))
    assert (records[0].finish_reason, records[0].error) == ("error", "out of luck")


def test_saturated_capacity_is_the_servers():
    """A prefill of 10 ms, one after the other, is 100 requests/s, found within 3 %, however many are in flight."""
    clock = ManualClock()
    fake = _fake(clock)
    burst = run_saturated(fake, _workload(0, 0, 0), clock, 8, 2.0, 30.0)
    assert burst.rate == pytest.approx(100, rel=0.03)
    assert burst.tokens_per_s == pytest.approx(3 * burst.rate)
    assert burst.window_s >= 2.0


def test_saturation_is_bounded():
    """When nothing ends within the limit, the run stops all the same and counts the tokens there were."""
    clock = ManualClock()
    burst = run_saturated(_fake(clock, prefill_s=4.0), _workload(0), clock, 8, 2.0, 10.0)
    assert burst.window_s == pytest.approx(10.0, abs=0.06)
    assert burst.tokens_per_s == pytest.approx(0.6, abs=0.01)  # two requests of three tokens
    assert burst.with_ramp


def test_no_token_is_no_capacity():
    """A rate of zero would divide by zero later: it is refused, with what to do."""
    clock = ManualClock()
    with pytest.raises(DisaggError, match=r"No token came within 10 s .*--prompt-len.*\.$"):
        run_saturated(_fake(clock, prefill_s=40.0), _workload(0), clock, 8, 2.0, 10.0)


def test_a_capacity_with_its_ramp_says_so():
    """The note is there when the window did not open, and only then; then no less than two workers do is taken."""
    source = SimpleNamespace(alone=lambda num: _workload(*[0] * num))
    arm = Arm("2C", Deployment.parse("2C", BUDGET), EngineSpec())
    for prefill_s, rate, keys in ((0.01, 100, []), (4.0, 2 / 4.0, ["capacity_ramp"])):
        clock = ManualClock()
        fake = _fake(clock, prefill_s=prefill_s)
        found, notes = stages.measure_capacity(fake, arm, source, clock, prefill_s, 3.0, 9.0)
        assert found.rate == pytest.approx(rate, rel=0.03)
        assert [note.key for note in notes] == keys
        assert clock.now() < 10


def test_a_traces_lengths_fit_the_time():
    """The median request may take 1/120 of the time budget; a fast model keeps what fits the context."""

    class Slow(FakeCluster):
        """Takes 10 ms for each token of a prompt."""

        def submit(self, prompt, *args, **options):
            self.prefill_s = self.token_s * len(prompt)
            return super().submit(prompt, *args, **options)

    trace = Trace("t", tuple(TraceRow(float(at), 50 * (at + 1), 1) for at in range(9)))
    limits, settings = Limits(1000, 512, frozenset({7})), Settings(time_budget_s=120.0)
    for token_s, scale, keys in ((0.010, 100 / 250, ["length_time"]), (0.001, 1.0, [])):
        clock = ManualClock()
        slow = Slow(Deployment.parse("1C", BUDGET), EngineSpec(), clock)
        slow.token_s = token_s
        found, notes = stages.fit_lengths(slow, trace, limits, clock, settings)
        assert found == pytest.approx(scale, rel=0.02)
        assert [note.key for note in notes] == keys
        assert clock.now() < 3 * 2.5
