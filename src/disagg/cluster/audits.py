"""Audits under way: which workers were asked, what they answered, and who is told when all have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from disagg.cluster.messages import AuditReport
from disagg.errors import WorkerLost

Tell = Callable[[list[AuditReport] | WorkerLost], None]


@dataclass(slots=True)
class _UnderWay:
    workers: Sequence[str]
    limit_s: float
    until: float
    tell: Tell
    reports: dict[str, AuditReport] = field(default_factory=dict)  # by worker


class Audits:
    """Several may be under way at a time. Pure: who sends and receives is the Cluster's business."""

    def __init__(self) -> None:
        self._serial = 0
        self._under_way: dict[int, _UnderWay] = {}

    def begin(self, workers: Sequence[str], now: float, limit_s: float, tell: Tell) -> int:
        """These workers are being asked; returns the number that their reports must carry."""
        self._serial += 1
        self._under_way[self._serial] = _UnderWay(workers, limit_s, now + limit_s, tell)
        return self._serial

    def take(self, report: AuditReport) -> None:
        """A worker has answered; one that took too long is not heard."""
        if (audit := self._under_way.get(report.serial)) is not None:
            audit.reports[report.worker] = report

    def settle(self, now: float, up: Sequence[str]) -> None:
        """Tell of those to which all have answered who still live, and of those that have waited too long."""
        for serial, audit in list(self._under_way.items()):
            missing = [worker for worker in audit.workers if worker in up and worker not in audit.reports]
            if missing and now <= audit.until:
                continue
            del self._under_way[serial]
            if missing:
                audit.tell(WorkerLost(f"{', '.join(missing)} did not answer an audit within {audit.limit_s:g} s."))
            else:
                audit.tell([audit.reports[worker] for worker in audit.workers if worker in audit.reports])
