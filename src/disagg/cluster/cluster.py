"""The front end: a Deployment as live processes, requests in, tokens and Records out.

    submit ─▶ router picks workers ─▶ Submit to the prefill worker
    poll   ◀─ first token from the prefill worker, the others from the decode worker, in order ◀─

Supervised, it outlives its workers: one that dies is started again, and every request that needed it is sent again,
with the tokens the client already has, after the attempt that is left of it was called off. Not thread safe: one
thread submits and polls, and what is said of workers here happens while it polls.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from disagg.cache.prefix import page_hashes
from disagg.clock import WallClock
from disagg.cluster import canary, entry, limits, policies
from disagg.cluster import messages as m
from disagg.cluster.audits import Audits, Tell
from disagg.cluster.entry import Asked
from disagg.cluster.launch import Template, make_folder, remove_folder
from disagg.cluster.ledger import Ledger, Live
from disagg.cluster.ledger import Update as Update
from disagg.cluster.mailbox import FRONT, Mailbox
from disagg.cluster.prefix_map import PrefixMap
from disagg.cluster.router import Route, Router, WorkerView
from disagg.cluster.status import Recent, Snapshot, Status, WorkerLine
from disagg.cluster.supervise import Death, Supervisor
from disagg.cluster.supervise import WorkerStatus as WorkerStatus
from disagg.cluster.worker import WorkerConfig
from disagg.config import Deployment, EngineSpec, Role
from disagg.errors import Overloaded, WorkerLost
from disagg.record import Record
from disagg.request import FinishReason, SamplingParams

MOST_ATTEMPTS = 5  # of one request: one that kills every worker it meets must not do so for ever
_HEARTBEAT_S = 0.25
_AUDIT_S = 5.0  # how long a worker may take to answer, the step that it is in included


class Cluster:
    """Workers of one deployment. A context manager: leaving it leaves no process, file, socket or memory behind.

    supervise: restart dead workers and retry their requests; else a death raises WorkerLost from `poll`. A supervised
        deployment whose requests are handed over serves only if its canary agrees (canary.py).
    lease_s: how long pages wait for a decode worker that does not ask for them. max_wait_s: bounds each wait of a
        hand-off. silence_s: a supervised worker that says nothing for so long is killed; well above its longest step.
    max_outstanding: requests at a time; `submit` refuses more.
    policy: one of policies.POLICIES.

    `num_pages` is what each worker's KV cache holds. Raises ModelError, BudgetError, WorkerLost and DisaggError from
    the constructor, after cleaning up; HandshakeError when workers cannot exchange pages.
    """

    def __init__(
        self,
        deployment: Deployment,
        engine: EngineSpec,
        *,
        policy: str = policies.DEFAULT,
        supervise: bool = False,
        lease_s: float = 10.0,
        max_wait_s: float = 60.0,
        silence_s: float = 30.0,
        max_outstanding: int = 10_000,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        from disagg.model.load import load_info

        pick = policies.named(policy)
        limits.check_devices(deployment.budget)
        self.info = load_info(engine.model, engine.max_len)
        self.engine = limits.resolved(engine, self.info.spec.max_len)
        self.deployment = deployment
        self._eos = frozenset(self.info.spec.eos_ids)
        self.num_pages = limits.pages_per_worker(self.engine, self.info.spec, deployment)
        self._max_outstanding = max_outstanding
        self._clock, self._policy = WallClock(), policy
        self._ledger, self._recent = Ledger(self._over), Recent()
        self._snapshots: dict[str, Snapshot] = {}  # by address: the last one of each worker
        self._parked: dict[str, None] = {}  # requests that wait for a worker to come up, oldest first
        self._untold: list[Update] = []  # news for the next `poll`
        self._audits = Audits()
        self._open = contextlib.ExitStack()  # what `close` has to undo, whatever it came to
        try:
            folder = make_folder()
            self._open.callback(remove_folder, folder)
            self._mailbox = Mailbox(folder, FRONT)
            self._open.callback(self._mailbox.close)
            beat_s = _HEARTBEAT_S if supervise else None
            common = (self.engine, str(folder), self.num_pages, lease_s, max_wait_s, beat_s)
            configs = [WorkerConfig(spec, 0, *common) for spec in deployment.workers]
            self._supervisor = Supervisor(
                configs, self._mailbox, self._clock, restart=supervise, silence_s=silence_s,
                fork_from=Template(self.engine, folder) if limits.forked(deployment, restart=supervise) else None,
            )  # fmt: skip
            self._open.callback(self._supervisor.close)
            self._supervisor.start(lambda names: progress(f"{deployment.name}: waiting for {', '.join(sorted(names))}"))
            self.num_pages = min(seat.hello.num_pages for seat in self._supervisor.seats.values() if seat.hello)
            prefixes = PrefixMap(self.engine.page_size, self.num_pages) if self.engine.prefix_caching else None
            self._router = Router(pick, prefixes=prefixes)
            for seat in self._supervisor.seats.values():
                self._router.add(WorkerView(seat.worker, seat.config.spec.role))
            if supervise and deployment.disaggregated:
                canary.require(self, lambda: progress(f"{deployment.name}: canary"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        scheduled_at: float | None = None,
        index: int = 0,
        route: Route | None = None,
        routing: policies.Routing | None = None,
        deadline_s: float = math.inf,
    ) -> str:
        """Send one request of token ids; returns its id.

        `scheduled_at`: when it should have been sent, if not now. `route`: the names of the workers to use, for its
        first attempt. `routing`: whether one worker or two shall serve it, instead of what the policy says.
        `deadline_s`: it ends with an error when it is not done so long after now. Raises what `submit_all` raises.
        """
        asked = (prompt, params, routing)
        self._check([asked])
        pinned = None if route is None else Route(*(self._supervisor.named(name).worker for name in route))
        (one,) = self._admit([asked], scheduled_at=scheduled_at, deadline_s=deadline_s, index=index, pinned=pinned)
        return one

    def submit_all(
        self, asked: Sequence[Asked], *, scheduled_at: float | None = None, deadline_s: float = math.inf
    ) -> list[str]:
        """Send all of these, as `submit` does, or none; returns their ids.

        Raises RequestError for what can never be served, Overloaded when there is no room for all of them now, and
        WorkerLost when one asks for two workers and fewer are up.
        """
        self._check(asked)
        return self._admit(asked, scheduled_at=scheduled_at, deadline_s=deadline_s)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, error: str = "") -> Record | None:
        """End a request now; returns its Record, or None when it is over already. Its pages are freed behind us."""
        return self._cut_off(request_id, reason, error)

    def poll(self, timeout_s: float) -> list[Update]:
        """What happened since the last call, after waiting up to `timeout_s` for the first news.

        Raises WorkerLost when a worker process has died and nobody restarts it, or no worker can be kept alive; what
        came before that is returned first.
        """
        try:
            self._turn(0.0 if self._untold else timeout_s)
        except WorkerLost:
            if not self._untold:
                raise  # else by the next call
        told, self._untold = self._untold, []
        return told

    def watch(self, fd: int) -> None:
        """Let `poll` return early while this file descriptor is readable: another thread has something to say."""
        self._mailbox.watch(fd)

    def workers(self) -> list[WorkerStatus]:
        """Every worker of the deployment, dead or alive."""
        return self._supervisor.workers()

    def set_role(self, name: str, role: Role) -> None:
        """Give the worker `name` another role. Only routing changes: requests under way end where they are.

        Raises InputError for an unknown name.
        """
        seat = self._supervisor.named(name, must_be_up=False)
        seat.config = msgspec.structs.replace(seat.config, spec=msgspec.structs.replace(seat.config.spec, role=role))
        self._router.set_role(seat.worker, role)

    def drain(self, name: str) -> None:
        """Let the worker `name` finish what needs it, then end it; supervised, its successor takes over."""
        seat = self._supervisor.named(name)
        seat.draining = True
        self._router.remove(seat.worker)

    def withhold(self, name: str, for_s: float) -> None:
        """Fault injection: the worker `name` has no free page for `for_s` seconds."""
        self._send(self._supervisor.named(name).worker, m.Withhold(for_s))

    def counters(self) -> dict[str, int]:
        """started == done + failed + expired + aborted + live. `retried` requests needed a second attempt or more."""
        return {**self._ledger.counts, "live": len(self._ledger), "restarts": self._supervisor.num_restarts}

    def status(self) -> Status:
        """What the deployment does now and did in the last minutes, as far as workers told by themselves.

        Does not block and may be called from any thread. Workers without supervision tell nothing.
        """
        now, told = self._clock.now(), self._snapshots
        lines = [WorkerLine(w.name, w.address, w.role, w.up, w.silent, told.get(w.address)) for w in self.workers()]
        return Status(
            now, self.deployment.name, self.engine.model, self._policy, self.num_pages, self.engine.page_size,
            self._supervisor.page_bytes, lines, self.counters(), self._recent.series(now), self._recent.rows(),
        )  # fmt: skip

    def begin_audit(self, tell: Tell) -> None:
        """Ask every worker where its pages are. `poll` calls `tell`: with the reports, or with WorkerLost."""
        asked = self._supervisor.up
        serial = self._audits.begin(asked, self._clock.now(), _AUDIT_S, tell)
        for worker in asked:
            self._send(worker, m.Audit(serial))

    def audit(self) -> list[m.AuditReport]:
        """Where every page of every worker is. Tokens that come meanwhile are kept for the next `poll`.

        Raises WorkerLost when a worker does not answer.
        """
        told: list[list[m.AuditReport] | WorkerLost] = []
        self.begin_audit(told.append)
        while not told:
            self._turn(0.1)
        if isinstance(answer := told[0], WorkerLost):
            raise answer
        return answer

    def close(self) -> None:
        """Stop the workers and remove every trace. May be called twice."""
        self._open.close()

    # Sending

    def _check(self, asked: Sequence[Asked]) -> None:
        """Raise unless all of these can be taken now. See `submit_all`."""
        entry.check(asked, self.deployment, self.engine, self.info.spec.vocab_size, self.num_pages)
        try:
            entry.check_room(asked, len(self._ledger), self._max_outstanding, self._recent.end_gap_s)
            entry.check_routes(asked, len(self._router.workers), self._supervisor.num_left)
        except (Overloaded, WorkerLost):
            self._ledger.counts["refused"] += len(asked)
            raise

    def _admit(self, asked: Sequence[Asked], **rest: Any) -> list[str]:
        """Take all of these, which have been checked, or none. `rest`: see `entry.opened`."""
        now, arm = self._clock.now(), self.deployment.name
        lives = [entry.opened(one, now, arm=arm, eos=self._eos, **rest) for one in asked]
        try:
            for live in lives:
                self._ledger.open(live)
                self._place(live)
        except BaseException:
            for live in lives:
                self.abort(live.record.request_id)
            raise
        return [live.record.request_id for live in lives]

    def _send(self, worker: str, message: m.Message) -> None:
        """To a worker that lives; what a dead one should have done is done for it."""
        if self._supervisor.seat_of(worker) is not None:
            self._mailbox.send(worker, message)

    def _place(self, live: Live) -> None:
        """Send the request's present attempt, now or when there are the workers for it."""
        record, num_known = live.record, len(live.record.tokens)
        if live.pinned is not None and not set(live.pinned) <= set(self._supervisor.up):
            live.pinned = None  # it waited, and a worker that it was meant for has died
        prompt_len, owed = len(live.prompt) + num_known, live.params.max_tokens - num_known
        caching = self.engine.prefix_caching
        decision = self._router.route(
            record.request_id, prompt_len, owed,
            hashes=page_hashes(live.prompt + record.tokens, self.engine.page_size) if caching else (),
            pinned=live.pinned,
            policy=policies.ROUTINGS[live.routing] if live.routing else None,
        )  # fmt: skip
        if decision is None:
            self._parked[record.request_id] = None
            return
        self._parked.pop(record.request_id, None)
        live.route, record.estimates = decision.route, list(decision.estimates)
        record.prefill_worker, record.decode_worker = live.route
        self._mailbox.send(live.route.prefill, live.submit())

    def _retry(self, request_id: str, reason: str, updates: list[Update]) -> None:
        """Call off what is left of this attempt and start the next, if there is anything left to compute."""
        live = self._ledger[request_id]
        for worker in {*(live.route or ())}:
            self._send(worker, m.Abort(request_id, live.attempt))
        self._router.ended(request_id)
        assert self.engine.max_len is not None
        if (finish := live.reason_to_end(self.engine.max_len)) is not None:
            self._end(request_id, finish, "", updates)
        elif live.attempt + 1 >= MOST_ATTEMPTS:
            error = f"Given up after {MOST_ATTEMPTS} attempts; the last one failed because {reason}"
            self._end(request_id, FinishReason.ERROR, error, updates)
        else:
            self._ledger.counts["retried"] += live.attempt == 0
            live.next_attempt()
            self._place(live)

    def _end(self, request_id: str, reason: FinishReason, error: str, updates: list[Update]) -> None:
        live = self._ledger.close(request_id, reason, error)
        assert live is not None
        updates.append(Update(request_id, [], [], live.record))

    def _cut_off(
        self, request_id: str, reason: FinishReason, error: str = "", *, expired: bool = False
    ) -> Record | None:
        """End a request that workers may still compute; None when it is over already."""
        live = self._ledger.close(request_id, reason, error, expired=expired)
        if live is None:
            return None
        for worker in {*(live.route or ())}:
            self._send(worker, m.Abort(request_id))
        return live.record

    def _over(self, record: Record) -> None:
        """A request is over, however it ended."""
        self._parked.pop(record.request_id, None)
        self._router.ended(record.request_id)
        self._router.observe(record)
        self._recent.add(record, self._clock.now())

    # Receiving

    def _turn(self, timeout_s: float) -> None:
        """Take in what there is, after waiting for it, and do what is due; for the caller it goes into `_untold`."""
        messages, readable = self._mailbox.receive(timeout_s)
        now, updates = self._clock.now(), self._untold
        for message in messages:
            self._on_message(message, now, updates)
        self._mourn(self._supervisor.check(readable), updates)
        self._give_up(updates)
        for request_id in self._ledger.overdue(now):
            record = self._cut_off(request_id, FinishReason.ERROR, "It was not done by its deadline.", expired=True)
            updates.append(Update(request_id, [], [], record))
        for worker, silent in self._supervisor.silent().items():
            self._router.set_silent(worker, silent)
        self._supervisor.dismiss(lambda worker: not self._ledger.that_need(worker))
        self._audits.settle(now, self._supervisor.up)

    def _on_message(self, message: Any, now: float, updates: list[Update]) -> None:
        if isinstance(message, m.Progress):
            self._progress(message, now, updates)
        elif isinstance(message, m.Hello):
            self._welcome(message)
        elif isinstance(message, m.Heartbeat):
            self._beat(message)
        elif isinstance(message, m.AuditReport):
            self._audits.take(message)

    def _progress(self, message: m.Progress, now: float, updates: list[Update]) -> None:
        news = self._ledger.take(message, now)
        for request_id in news.prefilled:
            self._router.prefilled(request_id)
        self._recent.deliver(sum(len(update.tokens) for update in news.updates), now)
        updates += news.updates
        for request_id, reason in news.retry:
            self._retry(request_id, reason, updates)

    def _beat(self, message: m.Heartbeat) -> None:
        """A sign of life, with what the worker does, and perhaps with the wish to end."""
        self._supervisor.heard(message.worker)
        seat = self._supervisor.seat_of(message.worker)
        if seat is not None and seat.up:
            self._snapshots[message.worker] = message.snapshot
            if message.draining:
                self.drain(message.worker.rpartition(".")[0])

    def _welcome(self, message: m.Hello) -> None:
        """A restarted worker is ready."""
        seat = self._supervisor.hello(message)
        if seat is not None and seat.up:
            self._router.add(WorkerView(message.worker, seat.config.spec.role))
            for request_id in list(self._parked):
                self._place(self._ledger[request_id])

    def _mourn(self, deaths: list[Death], updates: list[Update]) -> None:
        """Tell those who are left, then send again what needed the dead."""
        for death in deaths:
            self._router.remove(death.worker)
            self._snapshots.pop(death.worker, None)
            for worker in self._supervisor.up:
                self._mailbox.send(worker, m.Lost(death.worker))
        for worker, reason in deaths:
            for request_id in self._ledger.that_need(worker):
                self._retry(request_id, reason, updates)

    def _give_up(self, updates: list[Update]) -> None:
        """End what waits for two workers and will never have them. That none is left at all, `poll` raises."""
        for request_id in list(self._parked) if self._supervisor.num_left < 2 else ():
            if self._ledger[request_id].routing == "disaggregated":
                self._end(request_id, FinishReason.ERROR, entry.NO_PAIR, updates)
