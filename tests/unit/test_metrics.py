import pytest

from disagg.config import SLO
from disagg.measure import metrics
from disagg.record import Record, Span


def _record(index=0, scheduled=100.0, tokens=(110.0, 112.0, 116.0), reason="length", **more):
    return Record(
        request_id=str(index),
        index=index,
        prompt_len=5,
        scheduled_at=scheduled,
        token_at=list(tokens),
        finish_reason=reason,
        **more,
    )


def test_by_eye():
    """Due at 100, tokens at 110, 112, 116: TTFT 10, gaps 2 and 4, TPOT 3, E2E 16."""
    records = [_record()]
    assert metrics.ttft(records).mean == 10
    assert metrics.itl(records).p50 == 3
    assert metrics.itl(records).num == 2
    assert metrics.tpot(records).mean == 3
    assert metrics.e2e(records).mean == 16


def test_percentiles():
    """Of 0..100 the p-th percentile is p."""
    stat = metrics.Stat.of(float(value) for value in range(101))
    assert (stat.mean, stat.p50, stat.p90, stat.p99, stat.num) == (50, 50, 90, 99, 101)
    assert metrics.Stat.of([None]) == metrics.Stat(None, None, None, None, 0)


def test_one_token_has_no_tpot():
    """It is left out, not counted as zero."""
    assert metrics.tpot([_record(), _record(tokens=(105.0,))]).num == 1
    assert metrics.itl([_record(tokens=(105.0,))]).num == 0


def test_failures_are_counted_not_averaged():
    """A failed request changes goodput and nothing in the latencies."""
    records = [_record(0), _record(1, tokens=(101.0,), reason="error")]
    assert metrics.ttft(records).num == 1
    assert len(metrics.completed(records)) == 1
    assert metrics.goodput(records, SLO(ttft_s=10)).share == 0.5


def test_goodput():
    """At 4 requests/s with 3 of 4 within TTFT 10 and TPOT 3: share 0.75, 3 good requests/s."""
    records = [
        _record(0, rate=4.0),
        _record(1, rate=4.0),
        _record(2, rate=4.0, tokens=(110.5, 112.0)),  # TTFT 10.5
        _record(3, rate=4.0, tokens=(105.0,)),  # one token: no TPOT to miss
    ]
    good = metrics.goodput(records, SLO(ttft_s=10, tpot_s=3))
    assert (good.share, good.rate, good.good, good.num) == (0.75, 3.0, 3, 4)
    assert metrics.goodput(records, SLO(e2e_s=15)).good == 2
    assert metrics.goodput(records, SLO()).share == 1.0


def test_throughput_and_span():
    """Two requests from 100 to 120: six tokens in 20 s. Two such repeats: the spans add up, the rate stays."""
    one = [_record(0), _record(1, tokens=(111.0, 113.0, 120.0))]
    two = [_record(i, scheduled=500.0, tokens=(510.0, 511.0, 520.0), repeat=1) for i in range(2)]
    assert metrics.span_s(one) == 20
    assert metrics.throughput(one) == pytest.approx(0.3)
    assert metrics.span_s(one + two) == 40
    assert metrics.throughput(one + two) == pytest.approx(0.3)
    assert metrics.throughput([]) == 0


def test_utilisation():
    """Over a span of 20 s: P0 computed prompts for 5 s, D0 decoded for 10 s."""
    record = _record(
        tokens=(110.0, 120.0), prefill_worker="P0", decode_worker="D0", prefill_busy_s=5.0, decode_busy_s=10.0
    )
    assert metrics.utilisation([record]) == {
        "D0": {"prefill": 0, "decode": 0.5},
        "P0": {"prefill": 0.25, "decode": 0},
    }


def test_a_prompt_computed_on_two_workers_is_billed_to_both():
    """By the tokens that each computed: P0 died after 30 of them, P1 then computed all 90."""
    spans = [Span("prefill", "P0.0", 1, 2, 30), Span("prefill", "P1.0", 3, 5, 90), Span("handoff", "D0.0", 5, 6, 999)]
    record = _record(tokens=(110.0, 120.0), prefill_worker="P1.0", spans=spans, prefill_busy_s=4.0)
    assert record.prefill_s_by_worker() == {"P0.0": 1.0, "P1.0": 3.0}
    used = metrics.utilisation([record])
    assert (used["P0.0"]["prefill"], used["P1.0"]["prefill"]) == (1 / 20, 3 / 20)


def test_parts_and_hand_off():
    """Prefill 3..6, copy 7..9, decode from 10: the hand-off cost 1 + 2 + 1; TTFT's parts sum to TTFT."""
    record = _record(
        scheduled=0.0,
        tokens=(6.5, 12.0),
        sent_at=1.0,
        queued_at=2.0,
        prefill_start_at=3.0,
        prefill_end_at=6.0,
        handoff_start_at=7.0,
        handoff_end_at=9.0,
        decode_start_at=10.0,
        handoff_bytes=400,
        handoff_busy_s=2.0,
    )
    assert metrics.handoff([record]).mean == 4
    assert metrics.part("decode", [record]).mean == 2
    assert metrics.ttft_parts([record]) == {"client": 1, "router": 1, "queue": 1, "prefill": 3, "reply": 0.5}
    assert sum(metrics.e2e_parts([record]).values()) == 12
    assert metrics.handoff_rate([record]) == 200
    assert metrics.handoff_rate([_record()]) is None
    assert metrics.handoff([_record()]).mean == 0


def test_lateness():
    """Sent at 100.25, due at 100."""
    assert metrics.lateness([_record(sent_at=100.25)]).p99 == 0.25


def test_blocks():
    """Same arm, phase, rate and repeat is one block."""
    records = [_record(0, arm="a"), _record(1, arm="a"), _record(0, arm="b"), _record(0, arm="a", repeat=1)]
    assert [len(block) for block in metrics.blocks(records)] == [2, 1, 1]
