"""OpenTelemetry traces: one trace per request, with a span per phase, made from its Record when it is over.

On when the standard variable OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set; where to,
with which headers, name and sampling is said by the other OTEL_ variables, which the standard packages read. Those are
an extra: `pip install 'disagg[otel]'`.

The root span is the request, from its arrival to its last token, with the attributes of the GenAI conventions
(gen_ai.*) and our own (disagg.*). Its children are Record.e2e_parts: they follow one another without a gap. Prompts and
outputs are in no span.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from disagg.errors import InputError
from disagg.record import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_ON_DECODE = ("handoff_wait", "handoff_copy", "admission", "decode")


class Traces:
    """Turns Records into spans of `provider`. `now_ns`: nanoseconds since 1970, and on the clock of the Records."""

    def __init__(
        self,
        provider: "TracerProvider",
        model: str,
        now_ns: Callable[[], tuple[int, int]] = lambda: (time.time_ns(), time.monotonic_ns()),
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("disagg")
        self._model = model
        wall, ours = now_ns()
        self._offset_ns = wall - ours

    def add(self, record: Record) -> None:
        """A request is over: its spans are queued and sent by another thread."""
        from opentelemetry import trace

        start = record.scheduled_at
        root = self._tracer.start_span(
            f"request {self._model}",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            kind=trace.SpanKind.SERVER,
            start_time=self._ns(start),
            attributes=_attributes(record, self._model),
        )
        if record.error:
            root.set_status(trace.StatusCode.ERROR, record.error)
        inside = trace.set_span_in_context(root)
        at = start
        for name, seconds in (record.e2e_parts() or {}).items():
            if seconds > 0:
                worker = record.decode_worker if name in _ON_DECODE else record.prefill_worker
                where = {} if name in ("client", "router") else {"disagg.worker": worker}
                phase = self._tracer.start_span(name, context=inside, start_time=self._ns(at), attributes=where)
                phase.end(self._ns(at + seconds))
            at += seconds
        root.end(self._ns(at))

    def close(self) -> None:
        """Send what is queued, within the exporter's own limit of time."""
        self._provider.shutdown()

    def _ns(self, at: float) -> int:
        return round(at * 1e9) + self._offset_ns


def traces(model: str, environment: Mapping[str, str] = os.environ) -> Traces | None:
    """The traces of a server, or None when no variable asks for them. Raises InputError without the packages."""
    if not any(environment.get(name) for name in _SWITCHES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InputError(
            f"{_SWITCHES[0]} asks for traces and the packages are not installed: pip install 'disagg[otel]'."
        ) from None
    named = "OTEL_SERVICE_NAME" in environment
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "disagg"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider, model)


def _attributes(record: Record, model: str) -> dict[str, str | int | float | list[str]]:
    attributes: dict[str, str | int | float | list[str]] = {
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": [record.finish_reason],
        "gen_ai.usage.input_tokens": record.prompt_len,
        "gen_ai.usage.output_tokens": record.output_len,
        "disagg.prefill_worker": record.prefill_worker,
        "disagg.decode_worker": record.decode_worker,
        "disagg.num_cached": record.num_cached,
        "disagg.num_attempts": record.num_attempts,
        "disagg.handoff_bytes": record.handoff_bytes,
        "disagg.handoff_busy_s": record.handoff_busy_s,
    }
    if record.ttft_s is not None:
        attributes["disagg.ttft_s"] = record.ttft_s
    return attributes
