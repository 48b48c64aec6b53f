"""Prometheus metrics: vLLM's names, with the prefix `disagg_`, where vLLM has them; our own for what it has not.

Counters and histograms grow with every Record, in the front thread. Gauges are read from the deployment's Status when
somebody asks. `docs/serve.md` explains them all.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from disagg.cluster.status import Status
from disagg.config import Role
from disagg.record import Record
from disagg.request import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)
_SPEEDS = (1e8, 2.5e8, 5e8, 1e9, 2.5e9, 5e9, 1e10, 2.5e10, 5e10, 1e11, 2e11, 4e11)

_Family = CounterMetricFamily | GaugeMetricFamily


class Metrics:
    """The metrics of a server. `status` is asked for the gauges; None: there is no deployment, and so no gauge.

    `roles`: of the workers at the moment, by name.
    """

    def __init__(
        self, status: Callable[[], Status | None], roles: Callable[[], Mapping[str, Role]] = lambda: {}
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a moment of creation per series, which nobody asks for
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"disagg_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"disagg_{name}", text, labels, buckets=buckets, registry=registry)

        self.http = counter("http_requests", "Answers, by path and status.", ("path", "status"))
        self._success = counter("request_success", "Requests that ended, by reason.", ("finished_reason",))
        self._amounts = {
            "prompt_len": counter("prompt_tokens", "Prompt tokens of requests that ended."),
            "output_len": counter("generation_tokens", "Output tokens of requests that ended."),
            "num_cached": counter("prefix_cache_hits", "Prompt tokens found in a prefix cache."),
            "num_preemptions": counter("num_preemptions", "Times a request gave up its pages and began again."),
            "handoff_bytes": counter("handoff_bytes", "Bytes of KV cache copied between workers."),
            "handoff_busy_s": counter("handoff_copy_seconds", "Time spent copying them, overlapped or not."),
        }
        self._roles = roles
        self._busy = counter(
            "worker_busy_seconds", "Step time by phase, shared out by tokens.", ("worker", "role", "phase")
        )
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in a prefix cache.")
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._itl = _Gaps("disagg_inter_token_latency_seconds", "Every gap between tokens.")
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean gap of each request.", _GAPS)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS)
        self._prompt_len = histogram("request_prompt_tokens", "Length of prompts.", _TOKENS)
        self._output_len = histogram("request_generation_tokens", "Length of outputs.", _TOKENS)
        self._phases = histogram(
            "request_phase_seconds",
            "End-to-end latency split into phases that sum to it.",
            _SECONDS,
            ("phase", "route"),
        )
        self._speed = histogram("handoff_bytes_per_second", "Copy speed of each request's hand-off.", _SPEEDS)
        registry.register(self._itl)
        registry.register(_Gauges(status))

    def add(self, record: Record) -> None:
        """A request is over. Any thread may call this."""
        self._success.labels(record.finish_reason).inc()
        if record.finish_reason == FinishReason.REFUSED or not record.prompt_len:
            return  # it was never sent, or its client left before its prompt was known: there is nothing to measure
        for name, counter in self._amounts.items():
            counter.inc(getattr(record, name))
        if record.prefill_start_at is not None:
            self._queries.inc(record.prompt_len)
        for worker, busy_s in record.prefill_s_by_worker().items():
            self._add_busy(worker, "prefill", busy_s)
        if record.decode_worker:
            self._add_busy(record.decode_worker, "decode", record.decode_busy_s)
        self._prompt_len.observe(record.prompt_len)
        self._output_len.observe(record.output_len)
        if record.handoff_busy_s > 0:
            self._speed.observe(record.handoff_bytes / record.handoff_busy_s)
        self._observe_latency(record)

    def _add_busy(self, worker: str, phase: str, busy_s: float) -> None:
        name = worker.rpartition(".")[0]  # without its epoch, which a restart would turn into another series
        self._busy.labels(name, self._roles().get(name, ""), phase).inc(busy_s)

    def _observe_latency(self, record: Record) -> None:
        for histogram, value in ((self._ttft, record.ttft_s), (self._tpot, record.tpot_s), (self._e2e, record.e2e_s)):
            if value is not None:
                histogram.observe(value)
        self._itl.add(record.itl_s)
        route = "colocated" if record.prefill_worker == record.decode_worker else "disaggregated"
        for phase, seconds in (record.e2e_parts() or {}).items():
            self._phases.labels(phase, route).observe(seconds)

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gaps(Collector):
    """A histogram that takes many values at a time: one per token is too many for a lock each."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(_GAPS) + 1)
        self._sum_s = 0.0

    def add(self, gaps_s: Sequence[float]) -> None:
        """Count them. From one thread only."""
        for gap_s in gaps_s:
            self._counts[bisect_left(_GAPS, gap_s)] += 1
        self._sum_s += sum(gaps_s)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """See Collector."""
        return (HistogramMetricFamily(self._name, self._text),)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See Collector."""
        names = [*(f"{bound:g}" for bound in _GAPS), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum_s)


class _Gauges(Collector):
    """What the deployment does at the moment of asking."""

    def __init__(self, status: Callable[[], Status | None]) -> None:
        self._status = status

    def describe(self) -> Iterable[_Family]:
        """Nothing: names are known when there is a deployment."""
        return ()

    def collect(self) -> Iterator[_Family]:
        """One family after the other."""
        status = self._status()
        if status is None:
            return
        about = _gauge("deployment_info", "What is served.", ("deployment", "model_name", "policy"))
        about.add_metric((status.deployment, status.model, status.policy), 1)
        yield about
        yield _gauge("requests_outstanding", "Requests that are not over.", value=status.counters["live"])
        for name, text in (
            ("retried", "Requests that needed another attempt."),
            ("restarts", "Workers started again."),
            ("refused", "Requests refused because too many were outstanding."),
        ):
            yield CounterMetricFamily(f"disagg_{name}", text, value=status.counters.get(name, 0))
        yield from _of_workers(status)


def _of_workers(status: Status) -> Iterator[_Family]:
    labels = ("worker", "role")
    up = _gauge("worker_up", "1 when it can be given work.", labels)
    running = _gauge("num_requests_running", "Requests that hold pages and take part in steps.", labels)
    waiting = _gauge("num_requests_waiting", "Requests that hold no page yet.", labels)
    usage = _gauge("kv_cache_usage_perc", "Share of the pages that is neither free nor only cached; 1 is all.", labels)
    step = _gauge("last_step_seconds", "How long the last step took.", labels)
    pages = _gauge("kv_pages", "Pages by what holds them; they sum to the pool.", (*labels, "place"))
    flights = _gauge("handoffs_in_flight", "Hand-offs under way.", (*labels, "side"))
    handoffs = CounterMetricFamily("disagg_handoffs", "Hand-offs by how they went.", labels=(*labels, "side", "event"))
    for line in status.workers:
        named = (line.name, line.role)
        up.add_metric(named, line.up)
        if (snapshot := line.snapshot) is None:
            continue
        running.add_metric(named, snapshot.num_running)
        waiting.add_metric(named, snapshot.num_waiting)
        step.add_metric(named, snapshot.step_s)
        idle = snapshot.pages.get("free", 0) + snapshot.pages.get("cached", 0)
        usage.add_metric(named, 1 - idle / status.num_pages)
        for place, count in snapshot.pages.items():
            pages.add_metric((*named, place), count)
        flights.add_metric((*named, "prefill"), snapshot.num_giving)
        flights.add_metric((*named, "decode"), snapshot.num_taking)
        for side, events in snapshot.handoffs.items():
            for event, count in events.items():
                if event != "open":
                    handoffs.add_metric((*named, side, event), count)
    yield from (up, running, waiting, usage, step, pages, flights, handoffs)


def _gauge(name: str, text: str, labels: Sequence[str] = (), value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"disagg_{name}", text, value, labels or None)
