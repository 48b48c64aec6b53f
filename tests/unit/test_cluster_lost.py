"""The front end when workers are lost for good, on processes and messages that the test makes up."""

from types import SimpleNamespace

import pytest

from disagg import SamplingParams
from disagg.clock import ManualClock
from disagg.cluster import cluster as clusters
from disagg.cluster import entry
from disagg.cluster import messages as m
from disagg.cluster.cluster import Cluster
from disagg.config import Budget, Deployment, EngineSpec
from disagg.errors import RequestError, WorkerLost
from disagg.record import Facts
from disagg.request import FinishReason
from disagg.server.asked import FIELDS
from disagg.server.problems import problem_of
from disagg.transfer.layout import Layout

LAYOUT = Layout(model="abc", num_layers=1, num_kv_heads=1, page_size=16, head_dim=8, dtype="float32")
PARAMS = SamplingParams(temperature=0, max_tokens=3)
ASKED = ([1, 2, 3], PARAMS, None)


class World:
    """Mailbox, template and clock of a Cluster. `dying`: names of workers whose every process ends at once."""

    def __init__(self):
        self.clock, self.dying, self.waiting, self.sent, self.running = ManualClock(), set(), [], [], {}
        self.refuses = lambda to, message: False

    # a mailbox

    def receive(self, timeout_s):
        self.clock.advance(timeout_s)
        messages, self.waiting = self.waiting, []
        return messages, [fd for fd, process in self.running.items() if process.name in self.dying]

    def send(self, to, message):
        if self.refuses(to, message):
            raise OverflowError
        self.sent.append((to, message))

    def watch(self, fd):
        pass

    unwatch = forget = watch

    def close(self):
        pass

    # a template

    def ready(self, timeout_s):
        return True

    def fork(self, config):
        fd = 1000 + len(self.running) + len(self.sent)
        name, worker = config.spec.name, config.worker
        self.running = {fd: process for fd, process in self.running.items() if process.name != name}
        self.running[fd] = SimpleNamespace(
            name=name, config=config, exit_fd=fd, pid=fd, close=lambda *_: None, obituary=lambda: f"{name} died."
        )
        if name not in self.dying:
            self.waiting.append(m.Hello(worker, "", LAYOUT, 10))
        return self.running[fd]


@pytest.fixture
def world():
    return World()


@pytest.fixture
def cluster(world, monkeypatch):
    """2C whose workers say Hello and nothing else."""
    monkeypatch.setattr(clusters, "Mailbox", lambda folder, name: world)
    monkeypatch.setattr(clusters, "Template", lambda engine, folder: world)
    monkeypatch.setattr(clusters, "WallClock", lambda: world.clock)
    deployment = Deployment.parse("2C", Budget.parse("cpu:2", (0, 1)))
    with Cluster(deployment, EngineSpec(kv_bytes=1 << 26), supervise=True, silence_s=1e9) as running:
        yield running


def polled(cluster, turns=100):
    return [update for _ in range(turns) for update in cluster.poll(1.0)]


def test_what_needs_two_workers_ends_when_one_is_given_up_for_good(cluster, world):
    """At once, with a sentence that says what to do; others go on with the worker that is left."""
    forced = cluster.submit([1, 2], PARAMS, routing="disaggregated")
    other = cluster.submit([1, 2], PARAMS)
    world.dying = {"C1"}
    (ended,) = polled(cluster)
    assert ended.request_id == forced
    assert ended.record.finish_reason == "error"
    assert "Restart the deployment" in ended.record.error
    assert cluster.counters()["live"] == 1
    with pytest.raises(WorkerLost, match="Restart the deployment"):
        cluster.submit([1, 2], PARAMS, routing="disaggregated")
    assert cluster.abort(other).finish_reason == "abort"


def test_what_needs_two_workers_waits_while_a_second_may_come(cluster, world):
    """And is sent when it does."""
    forced = cluster.submit([1, 2], PARAMS, routing="disaggregated")
    world.dying = {"C1"}
    assert polled(cluster, 2) == []
    world.dying = set()
    polled(cluster)
    (submit,) = [message for _, message in world.sent if isinstance(message, m.Submit) and message.attempt == 1]
    assert submit.id == forced


def test_nobody_waits_for_workers_of_which_none_can_come(cluster, world):
    """Every call says so, also to who asks only then."""
    cluster.submit([1, 2], PARAMS)
    world.dying = {"C0", "C1"}
    for _ in range(2):
        with pytest.raises(WorkerLost, match=r"No worker could be kept alive.* died\."):
            polled(cluster)
        cluster.submit([1, 2], PARAMS)


def test_a_request_that_is_over_waits_for_nothing(cluster, world):
    """However it ended, it is not kept among those that wait for a worker."""
    ids = [cluster.submit([1, 2], PARAMS, routing="disaggregated", deadline_s=after_s) for after_s in (9, 99)]
    world.dying = {"C1"}
    polled(cluster, 1)
    assert list(cluster._parked) == ids
    cluster.abort(ids[1])
    polled(cluster, 10)
    assert list(cluster._parked) == []


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_are_taken_or_none_whatever_fails(cluster, world, failing):
    """Those before the one that could not be sent are called off; nothing is left of any."""
    sends = iter(range(3))
    world.refuses = lambda to, message: isinstance(message, m.Submit) and next(sends) == failing
    with pytest.raises(OverflowError):
        cluster.submit_all([ASKED] * 3)
    begun = [message.id for _, message in world.sent if isinstance(message, m.Submit)]
    called_off = [message.id for _, message in world.sent if isinstance(message, m.Abort)]
    assert len(begun) == failing
    assert set(begun) <= set(called_off)
    counters = cluster.counters()
    assert (counters["live"], counters["aborted"]) == (0, failing + 1)
    world.refuses = lambda to, message: False
    assert len(cluster.submit_all([ASKED] * 3)) == 3


def ended(request_id):
    """What a worker says that did all of a request in one step."""
    tokens = [m.NewToken(request_id, 0, place, 7, None, Facts("C0.0") if not place else None) for place in range(3)]
    end = m.Ended(request_id, 0, FinishReason.LENGTH, 3, Facts("C0.0"))
    return m.Progress("C0.0", tokens, [end])


def test_news_that_came_with_a_loss_are_told_before_it(cluster, world):
    """A request that ended in the same moment has its end; the loss is raised by the next call."""
    request_id = cluster.submit([1, 2], PARAMS)
    world.dying = {"C0", "C1"}
    for seat in cluster._supervisor.seats.values():
        seat.num_starts = 99
    world.waiting.append(ended(request_id))
    (update,) = cluster.poll(1.0)
    assert (update.tokens, update.record.finish_reason) == ([7, 7, 7], "length")
    with pytest.raises(WorkerLost):
        cluster.poll(1.0)


def test_news_that_came_during_an_audit_survive_its_failure(cluster, world):
    """They are for the next `poll`, whatever becomes of the audit."""
    request_id = cluster.submit([1, 2], PARAMS)
    world.waiting.append(ended(request_id))

    def receive(timeout_s, plain=world.receive, turns=iter(range(9))):  # noqa: B008
        if next(turns):
            raise OSError("broken")
        return plain(timeout_s)

    world.receive = receive
    with pytest.raises(OSError, match="broken"):
        cluster.audit()
    world.receive = type(world).receive.__get__(world)
    (update,) = cluster.poll(0.0)
    assert update.record.finish_reason == "length"


def test_a_route_that_cannot_be_had_is_blamed_on_its_field():
    """In OpenAI's format `param` names it."""
    alone = Deployment.parse("1C", Budget.parse("cpu:1", (0,)))
    with pytest.raises(RequestError) as caught:
        entry.check([([1], PARAMS, "disaggregated")], alone, EngineSpec(max_len=9), 10, 10)
    problem = problem_of(caught.value, FIELDS)
    assert (problem.status, problem.param) == (400, "disagg_route")
