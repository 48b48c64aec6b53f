"""Real faults on a real deployment under load, and the count of what went wrong with the requests.

Every so many finished requests one fault hits one worker at a random moment: it is killed, stopped for longer than its
leases, or left without a free page; some clients go away too. Before the first fault each distinct prompt is run once,
colocated, which gives the true tokens. Whatever happens then, every request must end, with those tokens or with a clear
error, and every page must come back.
"""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from disagg.clock import Clock
from disagg.cluster.cluster import Cluster, WorkerStatus
from disagg.cluster.ledger import Update
from disagg.cluster.limits import bytes_for
from disagg.cluster.router import Route
from disagg.config import Deployment, EngineSpec
from disagg.errors import InvariantError
from disagg.model.load import load_info
from disagg.record import Record
from disagg.request import SamplingParams

FAULTS = ("kill", "stop", "full")
LEASE_S = 1.0  # short, so that a worker can be stopped for longer without holding everybody up
SILENCE_S = 2.0
MAX_WAIT_S = 3.0
PAGES_PER_WORKER = 64
PAGE_SIZE = 16
CHUNK = 64  # positions a step may compute: below the longest prompt, so that chunks travel
_POLL_S = 0.02
_HANG_S = 60.0  # a request that takes longer hangs
_LONGEST_PROMPT = 100
_LONGEST_OUTPUT = 24
_DELAY_S = 0.3  # a fault comes at a random moment within this time of being due
_STOP_LEASES = (1.2, 3.0)  # a worker is stopped for so many leases: some are replaced meanwhile, some come back
_FULL_S = (0.2, 2.0)
_ABORTED = 0.03  # share of the clients that go away
_AUDIT_EVERY_S = 1.0
_SETTLE_S = 20.0  # the longest that cleaning up may take, once nothing is asked any more


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do; the same plan draws the same prompts, clients and faults (when they hit depends on the machine)."""

    requests: int = 1000
    fault_every: int = 50
    seed: int = 0
    distinct: int = 64  # prompts
    concurrency: int = 24


class Outcome(msgspec.Struct, kw_only=True):
    """The counts. `hung`, `leaked` and `different` must be zero."""

    completed: int = 0
    retried: int = 0  # requests that needed another attempt, however they ended
    failed: int = 0  # with an error that says why
    hung: int = 0  # did not end
    leaked: int = 0  # pages that nobody freed, and pages whose books were wrong
    different: int = 0  # requests whose tokens are not the true ones, or whose client had a token twice
    aborted: int = 0  # by their client
    audits: int = 0  # of all workers, under load: each found every page where the books say
    faults: dict[str, int] = {}
    restarts: int = 0
    errors: list[str] = []  # one example of each
    duration_s: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether the three zeroes hold."""
        return self.hung == self.leaked == self.different == 0


def deploy(deployment: Deployment, model: str, progress: Callable[[str], None]) -> Cluster:
    """A supervised deployment with little memory, short leases and checksums on. Raises as Cluster does."""
    spec = load_info(model).spec
    engine = EngineSpec(
        model=model,
        kv_bytes=bytes_for(spec, PAGES_PER_WORKER * len(deployment.workers), PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_batch_tokens=CHUNK,
        checksum=True,
    )
    return Cluster(
        deployment,
        engine,
        supervise=True,
        lease_s=LEASE_S,
        max_wait_s=MAX_WAIT_S,
        silence_s=SILENCE_S,
        progress=progress,
    )


@dataclass(slots=True)
class _Client:
    """One request as its client sees it."""

    prompt: int  # which of the distinct ones
    max_tokens: int
    sent_at: float
    leaves_at: float
    hung: bool = False
    tokens: list[int] = field(default_factory=list)


class Chaos:
    """One run of a plan on a cluster that serves nobody else. `finished` is told whenever a request has ended."""

    def __init__(self, cluster: Cluster, plan: Plan, clock: Clock, finished: Callable[[], None] = lambda: None) -> None:
        self.outcome = Outcome(faults=dict.fromkeys(FAULTS, 0))
        self._cluster = cluster
        self._plan = plan
        self._clock = clock
        self._finished = finished
        self._random = random.Random(plan.seed)
        vocab_size = cluster.info.spec.vocab_size
        self._prompts = [
            [self._random.randrange(vocab_size) for _ in range(self._random.randint(1, _LONGEST_PROMPT))]
            for _ in range(plan.distinct)
        ]
        self._truth: list[list[int]] = []
        self._open: dict[str, _Client] = {}
        self._num_sent = self._num_ended = 0
        self._due: list[float] = []  # moments of faults to come
        self._bag: list[str] = []  # their kinds: every kind comes before one comes twice
        self._audit_at = 0.0  # when the next is due
        self._stopped: list[tuple[float, WorkerStatus]] = []  # when to let them go on

    def run(self) -> Outcome:
        """Do all of it."""
        started_at = self._clock.now()
        self._learn()
        before = self._cluster.counters()
        while self._num_ended < self._plan.requests:
            self._send()
            now = self._clock.now()
            self._break_something(now)
            self._leave(now)
            self._audit(now)
            for update in self._cluster.poll(_POLL_S):
                self._take(update)
        self._settle()
        after = self._cluster.counters()
        if after["started"] != after["done"] + after["failed"] + after["expired"] + after["aborted"] + after["live"]:
            raise InvariantError(f"The counters do not add up: {after}.")
        outcome = self.outcome
        outcome.retried, outcome.restarts = after["retried"] - before["retried"], after["restarts"]
        outcome.duration_s = self._clock.now() - started_at
        return outcome

    def _learn(self) -> None:
        """The true tokens of every prompt: colocated, without faults, turn by turn on all workers."""
        names = [worker.name for worker in self._cluster.workers()]
        ids = {}
        for number, prompt in enumerate(self._prompts):
            name = names[number % len(names)]
            ids[self._cluster.submit(prompt, _greedy(_LONGEST_OUTPUT), route=Route(name, name))] = number
        truth: dict[int, list[int]] = {}
        until = self._clock.now() + _HANG_S * 10
        while len(truth) < len(ids):
            if self._clock.now() > until:
                raise InvariantError("The fault-free run did not end.")
            for update in self._cluster.poll(_POLL_S):
                if update.record is not None:
                    truth[ids[update.request_id]] = update.record.tokens
        self._truth = [truth[number] for number in range(len(self._prompts))]

    # Clients

    def _send(self) -> None:
        draw = self._random
        while len(self._open) < self._plan.concurrency and self._num_sent < self._plan.requests:
            self._num_sent += 1
            prompt, max_tokens = draw.randrange(len(self._prompts)), draw.randint(1, _LONGEST_OUTPUT)
            patience_s = draw.uniform(0.0, 1.0) if draw.random() < _ABORTED else _HANG_S * 10
            now = self._clock.now()
            request_id = self._cluster.submit(self._prompts[prompt], _greedy(max_tokens))
            self._open[request_id] = _Client(prompt, max_tokens, now, now + patience_s)

    def _leave(self, now: float) -> None:
        """Clients that go away, and requests that hang."""
        for request_id, client in list(self._open.items()):
            if now >= client.leaves_at or now - client.sent_at > _HANG_S:
                client.hung = now < client.leaves_at
                record = self._cluster.abort(request_id)
                if record is None:
                    raise InvariantError(f"Request {request_id} is over and its client was not told.")
                self._over(request_id, record)

    def _take(self, update: Update) -> None:
        self._open[update.request_id].tokens += update.tokens
        if update.record is not None:
            self._over(update.request_id, update.record)

    def _over(self, request_id: str, record: Record) -> None:
        """Judge a request that ended."""
        client, outcome = self._open.pop(request_id), self.outcome
        expected = self._truth[client.prompt][: client.max_tokens]
        if record.ok:
            outcome.completed += 1
            outcome.different += client.tokens != expected
        else:
            outcome.different += client.tokens != expected[: len(client.tokens)]
            if record.error:
                outcome.failed += 1
                if len(outcome.errors) < 10:
                    outcome.errors.append(record.error)
            else:
                outcome.hung += client.hung
                outcome.aborted += not client.hung
        self._num_ended += 1
        if self._num_ended % self._plan.fault_every == 0:
            self._due.append(self._clock.now() + self._random.uniform(0.0, _DELAY_S))
        self._finished()

    # Faults

    def _break_something(self, now: float) -> None:
        for until, worker in list(self._stopped):
            if now >= until:
                self._resume(until, worker)
        for due_at in [due_at for due_at in self._due if due_at <= now]:
            workers = [worker for worker in self._cluster.workers() if worker.up]
            if not workers:
                return  # nothing left to break: later
            self._due.remove(due_at)
            self._break(self._random.choice(workers), now)

    def _break(self, worker: WorkerStatus, now: float) -> None:
        self._bag = self._bag or self._random.sample(FAULTS, len(FAULTS))
        fault = self._bag.pop()
        self.outcome.faults[fault] += 1
        assert worker.process is not None
        if fault == "kill":
            worker.process.send_signal(signal.SIGKILL)
        elif fault == "stop":
            worker.process.send_signal(signal.SIGSTOP)
            self._stopped.append((now + LEASE_S * self._random.uniform(*_STOP_LEASES), worker))
        else:
            self._cluster.withhold(worker.name, self._random.uniform(*_FULL_S))

    def _resume(self, until: float, worker: WorkerStatus) -> None:
        self._stopped.remove((until, worker))
        if any(now.address == worker.address for now in self._cluster.workers()):  # it was not replaced
            assert worker.process is not None
            worker.process.send_signal(signal.SIGCONT)

    def _audit(self, now: float) -> None:
        """About once a second, see whether the rule of conservation holds in the middle of it all.

        Not while a worker is stopped: it could not answer, and nothing would let it go on meanwhile.
        """
        if now < self._audit_at or self._stopped:
            return
        self._audit_at = now + _AUDIT_EVERY_S
        for report in self._cluster.audit():
            if report.fault:
                raise InvariantError(f"The books of {report.worker} are wrong: {report.fault}")
        self.outcome.audits += 1

    # Afterwards

    def _settle(self) -> None:
        """Let everything come back and count the pages that do not."""
        for until, worker in list(self._stopped):
            self._resume(until, worker)
        until = self._clock.now() + _SETTLE_S
        while True:
            self._cluster.poll(_POLL_S)
            if all(worker.up for worker in self._cluster.workers()):
                reports = self._cluster.audit()
                wrong = sum(report.total for report in reports if report.fault)
                self.outcome.leaked = sum(report.held for report in reports) + wrong
                if self.outcome.leaked == 0 and len(reports) == len(self._cluster.workers()):
                    return
            if self._clock.now() > until:
                missing = sum(not worker.up for worker in self._cluster.workers())
                self.outcome.leaked += missing * PAGES_PER_WORKER
                return


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
