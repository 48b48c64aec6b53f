"""Audits: all who live have answered, or who did not is named; whatever else comes meanwhile."""

from disagg.cluster.audits import Audits
from disagg.cluster.messages import AuditReport
from disagg.errors import WorkerLost

UP = ["P0.0", "D0.0"]


def report(worker, serial):
    return AuditReport(worker, serial, 0, 0, 0, 0, [], {}, {})


def test_two_audits_at_a_time_each_get_their_own_reports():
    """Whichever order workers answer in: each is told once, with the reports of its number, in the workers' order."""
    audits, told = Audits(), {1: [], 2: []}
    for serial in (1, 2):
        assert audits.begin(UP, 0.0, 5.0, told[serial].append) == serial
    for worker, serial in (("D0.0", 2), ("D0.0", 1), ("P0.0", 1)):
        audits.take(report(worker, serial))
        audits.settle(1.0, UP)
    assert told == {1: [[report("P0.0", 1), report("D0.0", 1)]], 2: []}
    audits.take(report("P0.0", 2))
    audits.settle(1.0, UP)
    audits.settle(9.0, UP)
    assert [len(answers) for answers in told.values()] == [1, 1]


def test_who_dies_meanwhile_is_not_waited_for():
    """The others' reports are the answer."""
    audits, told = Audits(), []
    audits.begin(UP, 0.0, 5.0, told.append)
    audits.take(report("P0.0", 1))
    audits.settle(1.0, ["P0.0", "D0.1"])
    assert told == [[report("P0.0", 1)]]


def test_who_does_not_answer_in_time_is_named():
    """Once; a report that comes later is dropped."""
    audits, told = Audits(), []
    audits.begin(UP, 0.0, 5.0, told.append)
    audits.take(report("P0.0", 1))
    audits.settle(5.0, UP)
    assert told == []
    audits.settle(5.1, UP)
    audits.take(report("D0.0", 1))
    audits.settle(6.0, UP)
    (error,) = told
    assert isinstance(error, WorkerLost)
    assert "D0.0 did not answer" in str(error)
