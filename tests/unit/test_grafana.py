"""docs/grafana.json asks for what the server exports."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from disagg.cluster.status import Recent, Snapshot, Status, WorkerLine
from disagg.record import Record
from disagg.server.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
PLACES = ("free", "cached", "running", "holding", "sending", "quiescing")
EVENTS = ("started", "done", "failed", "expired", "aborted", "open")


def samples():
    """Every series a server exports that has served one request of each route: name -> the labels it has."""
    handoffs = {side: dict.fromkeys(EVENTS, 0) for side in ("prefill", "decode")}
    snapshot = Snapshot(0.0, dict.fromkeys(PLACES, 1), 0, 0, 0, 0, 0, 0, 0, 0.0, handoffs)
    lines = [WorkerLine("P0", "P0.0", "prefill", True, False, snapshot)]
    status = Status(0.0, "1P1D", "seed", "conditional", 6, 16, 1, lines, {"live": 0}, Recent().series(0.0), [])
    metrics = Metrics(lambda: status)
    metrics.http.labels("/", "200").inc()
    for decode_worker in ("P0.0", "D0.0"):
        metrics.add(Record(
            request_id="r", index=0, prompt_len=1, finish_reason="stop", prefill_worker="P0.0", token_at=[1.0, 2.0],
            decode_worker=decode_worker, handoff_busy_s=1.0, handoff_bytes=1,
        ))  # fmt: skip
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def expressions():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_every_panel_asks_for_series_that_exist():
    """Each name of each expression is exported, with the labels it selects and groups by, and the values it names."""
    exported = samples()
    assert len(expressions()) > 30
    for expression in expressions():
        names = re.findall(r"disagg_\w+", expression)
        assert names
        for name in names:
            assert name in exported, name
            for labels in re.findall(r"by \(([\w, ]+)\)", expression):
                assert set(labels.split(", ")) <= set(exported[name][0]), (name, labels)
            for label, value in re.findall(r'(\w+)="(\w+)"', expression):
                assert any(each.get(label) == value for each in exported[name]), (name, label, value)


def test_legends_name_labels_that_the_expression_keeps():
    """`{{label}}` of a legend is grouped by, or there is no grouping and the series has it."""
    exported = samples()
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            kept = set(exported[re.search(r"disagg_\w+", target["expr"])[0]][0])
            if grouped := re.findall(r"(?:sum|max|min) by \(([\w, ]+)\)", target["expr"]):
                kept = set(grouped[0].split(", "))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept


def test_panels_do_not_overlap():
    """The grid has 24 columns and every place in it one panel at most."""
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        places = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not places & taken
        taken |= places
