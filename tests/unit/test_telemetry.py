"""Traces: a Record's phases as spans, beside the Record itself."""

import sys

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from disagg.errors import InputError
from disagg.record import Record
from disagg.server.telemetry import Traces, traces

EPOCH_NS = 1_700_000_000_000_000_000


@pytest.fixture
def exported():
    return InMemorySpanExporter()


@pytest.fixture
def spans(exported):
    """A function from Records to their finished spans. The Records' clock shows 100 s at EPOCH_NS."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    made = Traces(provider, "seed", lambda: (EPOCH_NS, 100_000_000_000))

    def of(*records):
        for record in records:
            made.add(record)
        return exported.get_finished_spans()

    return of


def handed_over(**options):
    times = {
        "scheduled_at": 100.0, "sent_at": 100.0, "queued_at": 100.001, "prefill_start_at": 100.01,
        "prefill_end_at": 100.05, "handoff_start_at": 100.052, "handoff_end_at": 100.06, "decode_start_at": 100.061,
        "token_at": [100.051, 100.07, 100.2],
    }  # fmt: skip
    fields = {"request_id": "r", "index": 0, "prompt_len": 7, "output_len": 3, "finish_reason": "length"}
    return Record(**{**fields, "prefill_worker": "P0.0", "decode_worker": "D0.0", **times, **options})


def test_phases_are_the_children_of_the_request_and_fill_it(spans):
    """One span per phase that took time, in order, without a gap, on the wall clock; together as long as the root."""
    *phases, root = spans(handed_over())
    names = ["router", "queue", "prefill", "handoff_wait", "handoff_copy", "admission", "decode"]
    assert [span.name for span in phases] == names
    assert {span.parent.span_id for span in phases} == {root.context.span_id}
    ends = [root.start_time, *(span.end_time for span in phases)]
    assert [span.start_time for span in phases] == ends[:-1]
    assert (root.start_time, root.end_time) == (EPOCH_NS, ends[-1])
    assert root.end_time - root.start_time == pytest.approx(0.2e9, abs=10)


def test_spans_say_where_and_how_much_and_never_what(spans):
    """Workers, amounts and the outcome are attributes; no token is."""
    *phases, root = spans(handed_over(tokens=[4242, 4243, 4244]))
    where = {span.name: span.attributes.get("disagg.worker") for span in phases}
    assert (where["router"], where["prefill"], where["decode"]) == (None, "P0.0", "D0.0")
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert "424" not in str([dict(span.attributes) for span in (root, *phases)])


def test_a_failed_request_is_a_span_with_its_error(spans):
    """Without a token there are no phases; the root has the sentence."""
    (root,) = spans(handed_over(token_at=[], finish_reason="error", error="It was lost."))
    assert not root.status.is_ok
    assert root.status.description == "It was lost."


def test_every_request_is_a_trace_of_its_own(spans):
    """Two requests share no trace."""
    found = spans(handed_over(), handed_over())
    assert len({span.context.trace_id for span in found}) == 2


def test_traces_are_off_unless_asked_for_by_the_standard_variable(monkeypatch):
    """No variable, no traces; with it and without the packages: a sentence that says what to install."""
    assert traces("seed", {}) is None
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    made = traces("seed", asked)
    assert made is not None
    made.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"disagg\[otel\]"):
        traces("seed", asked)
