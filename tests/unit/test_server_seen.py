"""What operators see: health beside hung workers, metrics across restarts, a file for Records that cannot be."""

import signal
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from disagg.cli.main import run
from disagg.cluster.supervise import WorkerStatus
from disagg.record import Record
from disagg.server.app import create_app
from disagg.server.guards import Keys
from disagg.server.metrics import Metrics
from disagg.server.state import Settings, State


@pytest.mark.parametrize(("silent", "status", "code"), [(1, "degraded", 200), (2, "unavailable", 503)])
def test_a_worker_that_hangs_is_not_healthy(silent, status, code):
    """A worker that is up and sends no heartbeats counts as one that is not up, by name."""
    workers = [WorkerStatus(f"C{n}", f"C{n}.0", "both", True, None, n < silent) for n in range(2)]
    front = SimpleNamespace(workers=workers, progress="", cluster=None)
    state = State(Settings(model="m"), front, Metrics(lambda: None))
    answer = TestClient(create_app(state, Keys([]), frozenset({"testserver"}))).get("/health")
    assert (answer.status_code, answer.json()["status"]) == (code, status)
    assert len(answer.json()["reasons"]) == silent
    assert "C0" in answer.json()["reasons"][0]


def samples(metrics, name):
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    return families[name].samples


def test_a_worker_keeps_its_series_when_it_is_started_again():
    """Busy time is by name and role, as the gauges are; one that no worker ever had adds no series and no look-up."""
    metrics = Metrics(lambda: None, lambda: {"C0": "both"})
    for epoch in range(2):
        record = Record(request_id=str(epoch), index=epoch, prompt_len=3, output_len=1, finish_reason="stop")
        record.prefill_worker = record.decode_worker = f"C0.{epoch}"
        record.prefill_start_at, record.prefill_busy_s, record.decode_busy_s = 1.0, 0.5, 0.25
        metrics.add(record)
    metrics.add(Record(request_id="never", index=2, prompt_len=5, output_len=0, finish_reason="abort"))
    busy = {tuple(sorted(s.labels.items())): s.value for s in samples(metrics, "disagg_worker_busy_seconds")}
    who = (("role", "both"), ("worker", "C0"))
    assert busy == {(("phase", "prefill"), *who): 1.0, (("phase", "decode"), *who): 0.5}
    assert [s.value for s in samples(metrics, "disagg_prefix_cache_queries")] == [6]


def test_records_that_cannot_be_written_are_refused_before_anything_starts(tmp_path, capsys):
    """One sentence that names the option, and exit code 2."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        code = run(["serve", "--model", "seed", "--records", str(tmp_path / "none" / "x.jsonl")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1)
    assert "--records" in said
    assert "No such file or directory" in said
