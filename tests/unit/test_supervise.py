"""Who may serve beside whom: the handshake of workers with the front end, when they start and when they start again."""

from types import SimpleNamespace

import msgspec
import pytest

from disagg.clock import ManualClock
from disagg.cluster import messages as m
from disagg.cluster.supervise import Supervisor
from disagg.cluster.worker import WorkerConfig
from disagg.config import EngineSpec, WorkerSpec
from disagg.errors import HandshakeError
from disagg.transfer.layout import Layout

LAYOUT = Layout(model="abc", num_layers=1, num_kv_heads=1, page_size=16, head_dim=8, dtype="float32")
OTHER = msgspec.structs.replace(LAYOUT, model="xyz")


class Started:
    """A process that never ends by itself, and a template that forks it."""

    exit_fd, pid = 99, 1234

    def __init__(self, config):
        self.config, self.closed = config, False

    def close(self, patience_s=0.0):
        self.closed = True


class Deployment:
    """P0 and D0, forked from nothing, that say Hello with these layouts."""

    def __init__(self, *layouts):
        self.waiting = [self.hello(worker, layout) for worker, layout in zip(("P0.0", "D0.0"), layouts, strict=True)]
        self.clock = ManualClock()
        ignore = lambda *_: None  # noqa: E731
        mailbox = SimpleNamespace(receive=self.receive, watch=ignore, unwatch=ignore, forget=ignore, send=ignore)
        template = SimpleNamespace(ready=lambda timeout_s: True, fork=Started, close=ignore)
        configs = [
            WorkerConfig(WorkerSpec(name, role, (0,)), 0, EngineSpec(), "", 10, 1.0, 1.0, 0.25)
            for name, role in (("P0", "prefill"), ("D0", "decode"))
        ]
        self.supervisor = Supervisor(configs, mailbox, self.clock, restart=True, silence_s=5.0, fork_from=template)

    def hello(self, worker, layout):
        return m.Hello(worker, "", layout, 10)

    def receive(self, timeout_s):
        messages, self.waiting = self.waiting, []
        return messages, []


def test_workers_whose_pages_differ_do_not_start():
    """The deployment is refused with a sentence that names the workers, what differs, and both values."""
    with pytest.raises(HandshakeError, match=r"D0\.0 .*P0\.0: model \(xyz here, abc there\)"):
        Deployment(LAYOUT, OTHER).supervisor.start(lambda names: None)


def test_a_successor_whose_pages_differ_does_not_serve():
    """It is killed with that sentence and started anew; one that fits again serves."""
    deployment = Deployment(LAYOUT, LAYOUT)
    supervisor = deployment.supervisor
    supervisor.start(lambda names: None)
    seat = supervisor.seats["D0"]
    supervisor._bury(seat, seat.process, deployment.clock.now())
    supervisor.check([])

    assert supervisor.hello(deployment.hello("D0.1", OTHER)) is seat
    assert not seat.up
    (death,) = supervisor.check([])
    assert death.worker == "D0.1"
    assert "model (xyz here, abc there)" in death.reason

    deployment.clock.advance(60)
    supervisor.heard("P0.0")
    assert supervisor.check([]) == []
    supervisor.hello(deployment.hello("D0.2", LAYOUT))
    assert supervisor.up == ["P0.0", "D0.2"]
