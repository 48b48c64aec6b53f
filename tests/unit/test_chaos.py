"""How a run with faults is judged: the counts, beside made-up clients and workers."""

from types import SimpleNamespace

import pytest

from disagg.cli.chaos import _table
from disagg.clock import ManualClock
from disagg.errors import InvariantError
from disagg.measure.chaos import Chaos, Outcome, Plan
from disagg.record import Record


class Silent:
    """A cluster that never answers a request. `faults`: what each audit finds."""

    info = SimpleNamespace(spec=SimpleNamespace(vocab_size=100))

    def __init__(self, faults=()):
        self.faults, self.num_sent = list(faults), 0

    def submit(self, prompt, params, **options):
        self.num_sent += 1
        return f"r{self.num_sent}"

    def abort(self, request_id):
        return Record(request_id=request_id, index=0, prompt_len=1, finish_reason="abort")

    def audit(self):
        return [SimpleNamespace(worker="P0.0", fault=self.faults.pop(0) if self.faults else "")]


def chaos(cluster, requests=10):
    made = Chaos(cluster, Plan(requests=requests, distinct=1), ManualClock(100.0))
    made._truth = [[1, 2, 3]]
    return made


def test_a_request_that_hangs_is_not_one_that_its_client_gave_up():
    """Each is counted once: those whose client would still wait hang, the others are aborted."""
    run = chaos(Silent())
    run._send()
    leaving = list(run._open.values())[:3]
    for client in leaving:
        client.leaves_at = 101.0
    run._leave(102.0)
    assert (run.outcome.hung, run.outcome.aborted) == (0, 3)
    run._leave(200.0)
    assert (run.outcome.hung, run.outcome.aborted) == (7, 3)
    assert not run._open


def test_books_are_checked_under_load():
    """About once a second; what is wrong ends the run at once, with the worker's name."""
    run = chaos(Silent(["", "page 3 has no holder"]))
    run._audit(100.0)
    run._audit(100.5)
    assert run.outcome.audits == 1
    with pytest.raises(InvariantError, match=r"P0\.0 are wrong: page 3"):
        run._audit(101.1)


def test_faults_have_a_row_of_their_own():
    """Retries are requests, faults are not: neither explains the other's number."""
    what, count, remark = _table(Outcome(retried=262, faults={"kill": 6, "stop": 7}, restarts=5), 1000).columns
    rows = dict(zip(what.cells, zip(count.cells, remark.cells, strict=True), strict=True))
    assert rows["faults"] == ("13", "6 kill, 7 stop; restarts: 5")
    assert rows["retried"] == ("262", "needed another attempt, however they ended")
