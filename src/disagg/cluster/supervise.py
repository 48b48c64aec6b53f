"""Who keeps workers alive: starts them, notices within a moment that one is dead, and starts its successor.

A process that ends is noticed by its pidfd, at once. One that lives but says nothing (stopped, or stuck) is noticed by
its missing heartbeats; after `silence_s` it is killed and counts as dead. Its successor has the same name and the next
epoch, so nothing meant for the one reaches the other.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from disagg.clock import Clock
from disagg.cluster import messages as m
from disagg.cluster.launch import Process, Template, spawn
from disagg.cluster.mailbox import Mailbox
from disagg.cluster.worker import WorkerConfig
from disagg.config import Role
from disagg.errors import DisaggError, HandshakeError, InputError, WorkerLost

START_S = 180.0  # the longest a worker may take to load its model and compile its kernels
_TURN_S = 0.5
_BACKOFF_S = 0.5  # before the second attempt to start a worker, doubled for each further one
_MOST_STARTS = 5  # attempts in a row before a worker is given up
_KILL_S = 0.0  # no patience with a process that does not answer


class Death(NamedTuple):
    """A worker that is no more."""

    worker: str  # name.epoch
    reason: str  # a sentence


@dataclass(slots=True)
class Seat:
    """One worker of the deployment, whichever process fills its place at the moment."""

    config: WorkerConfig  # of that process, or of the next
    process: Process | None = None
    up: bool = False  # it said Hello and has not died since
    hello: m.Hello | None = None  # the last one said
    draining: bool = False
    since: float = 0.0  # when it was started, heard of last, or when it may be started again
    num_starts: int = 0  # without a Hello
    objection: str = ""  # why it must not serve, as a sentence

    @property
    def worker(self) -> str:
        """The address: name.epoch."""
        return self.config.worker


class WorkerStatus(NamedTuple):
    """One worker of the deployment as the front end sees it."""

    name: str
    address: str  # name.epoch
    role: Role
    up: bool
    process: Process | None
    silent: bool = False  # up, and not heard of for several heartbeats


class Supervisor:
    """The processes of a deployment. Without `restart`, a death is an error: WorkerLost from `check`.

    `fork_from` starts workers; None: each loads its own model.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        mailbox: Mailbox,
        clock: Clock,
        *,
        restart: bool,
        silence_s: float,
        fork_from: Template | None,
    ) -> None:
        self.seats = {config.spec.name: Seat(config) for config in configs}
        self.num_restarts = 0
        self._first: m.Hello | None = None  # what all others are compared with
        self._mailbox = mailbox
        self._clock = clock
        self._restart = restart
        self._silence_s = silence_s
        self._template = fork_from
        self._checked_at = clock.now()
        self._last_death = ""  # why, as a sentence

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, of every worker; 0 before the first has said Hello."""
        return self._first.layout.page_bytes if self._first is not None else 0

    @property
    def up(self) -> list[str]:
        """Workers that can be sent work."""
        return [seat.worker for seat in self.seats.values() if seat.up]

    @property
    def num_left(self) -> int:
        """How many workers are up, or may still come up."""
        return sum(seat.process is not None or seat.num_starts < _MOST_STARTS for seat in self.seats.values())

    def start(self, waiting_for: Callable[[list[str]], None]) -> None:
        """Start every worker and return when all are ready. `waiting_for` is told now and then which are not.

        Raises what a worker says keeps it from starting, HandshakeError when workers cannot exchange pages, and
        WorkerLost.
        """
        until = self._clock.now() + START_S
        names = list(self.seats)
        while self._template is not None and not self._template.ready(_TURN_S):
            waiting_for(names)
            if self._clock.now() > until:
                raise WorkerLost(f"The model was not loaded after {START_S:g} s.")
        for seat in self.seats.values():
            self._launch(seat)
        while waiting := [seat.worker for seat in self.seats.values() if not seat.up]:
            waiting_for(waiting)
            messages, readable = self._mailbox.receive(_TURN_S)
            for message in messages:
                if isinstance(message, m.StartFailed):
                    raise (InputError if message.input_error else DisaggError)(message.reason)
                if isinstance(message, m.Hello) and (said := self.hello(message)) and said.objection:
                    raise HandshakeError(said.objection)
            for seat in self.seats.values():
                if seat.process is not None and seat.process.exit_fd in readable:
                    raise WorkerLost(seat.process.obituary())
            if self._clock.now() > until:
                raise WorkerLost(f"Worker {waiting[0]} was not ready after {START_S:g} s.")
        self._checked_at = self._clock.now()

    def hello(self, message: m.Hello) -> Seat | None:
        """A worker is ready; it is up unless it has an `objection`. None: it is not the one we wait for.

        One whose pages differ from those of the first (its model's files were replaced meanwhile, say) is killed.
        """
        seat = self.seat_of(message.worker)
        if seat is None:
            return None
        self._first = self._first or message
        if difference := message.layout.difference(self._first.layout):
            seat.objection = f"Worker {message.worker} cannot exchange pages with {self._first.worker}: {difference}."
        else:
            seat.up, seat.hello, seat.num_starts, seat.since = True, message, 0, self._clock.now()
        return seat

    def heard(self, worker: str) -> None:
        """A worker gave a sign of life."""
        if (seat := self.seat_of(worker)) is not None:
            seat.since = self._clock.now()

    def seat_of(self, worker: str) -> Seat | None:
        """Where this very process (name.epoch) sits; None when it is dead."""
        seat = self.seats.get(worker.rpartition(".")[0])
        return seat if seat is not None and seat.worker == worker and seat.process is not None else None

    def named(self, name: str, must_be_up: bool = True) -> Seat:
        """Where the worker `name` sits. Raises InputError when there is none, or when it is not up and has to be."""
        seat = self.seats.get(name)
        if seat is None:
            near = difflib.get_close_matches(name, self.seats, 1)
            hint = f"Did you mean {near[0]}?" if near else ", ".join(self.seats) + "."
            raise InputError(f"No worker {name!r}. {hint}")
        if must_be_up and not seat.up:
            raise InputError(f"Worker {name} is not up at the moment: try again.")
        return seat

    def workers(self) -> list[WorkerStatus]:
        """Every worker, dead or alive."""
        silent = self.silent()
        return [
            WorkerStatus(name, s.worker, s.config.spec.role, s.up, s.process, silent.get(s.worker, False))
            for name, s in self.seats.items()
        ]

    def silent(self) -> dict[str, bool]:
        """For each worker that is up and sends heartbeats: whether it missed several."""
        now = self._clock.now()
        beating = [seat for seat in self.seats.values() if seat.up and seat.config.heartbeat_s is not None]
        return {seat.worker: now - seat.since > self._silence_s / 4 for seat in beating}

    def check(self, readable: Sequence[int]) -> list[Death]:
        """Notice the dead, given the file descriptors that are readable now, and start what is to be started.

        Without restarts a death raises WorkerLost; with them it is raised while no worker is left to hope for.
        """
        now = self._clock.now()
        self._excuse(now)
        deaths = []
        for seat in self.seats.values():
            process = seat.process
            if process is not None and (reason := self._cause_of_death(seat, process, readable, now)):
                if not self._restart:
                    raise WorkerLost(reason)
                self._bury(seat, process, now)
                deaths.append(Death(process.config.worker, reason))
                self._last_death = reason
        for seat in self.seats.values():
            if seat.process is None and now >= seat.since and seat.num_starts < _MOST_STARTS:
                self._launch(seat)
        if not self.num_left:
            raise WorkerLost(f"No worker could be kept alive; the last one: {self._last_death}")
        return deaths

    def dismiss(self, is_free: Callable[[str], bool]) -> None:
        """End the workers that are to end, once nothing needs them any more."""
        for seat in self.seats.values():
            if seat.draining and is_free(seat.worker):
                self._mailbox.send(seat.worker, m.Stop())
                seat.draining = False  # said; should it not have heard, its next heartbeat starts anew

    def close(self) -> None:
        """Stop all processes."""
        seats = [seat for seat in self.seats.values() if seat.process is not None]
        for seat in seats:
            self._mailbox.send(seat.worker, m.Stop())
        for seat in seats:
            if seat.process is not None:
                seat.process.close()
                seat.process = None
        if self._template is not None:
            self._template.close()

    def _excuse(self, now: float) -> None:
        """While nobody asked, nobody was heard: time in which the front end itself was busy is no silence."""
        away_s = now - self._checked_at
        self._checked_at = now
        if away_s > self._silence_s / 4:
            for seat in self.seats.values():
                seat.since += away_s if seat.up else 0.0

    def _cause_of_death(self, seat: Seat, process: Process, readable: Sequence[int], now: float) -> str:
        """A sentence when this process is dead, or must be; empty when it may live."""
        quiet_s = now - seat.since
        if process.exit_fd in readable:
            return process.obituary()
        if seat.objection:
            return seat.objection
        if seat.up and seat.config.heartbeat_s is not None and quiet_s > self._silence_s:
            return f"Worker {seat.worker} (pid {process.pid}) said nothing for {quiet_s:.1f} s and was killed."
        if not seat.up and quiet_s > START_S:
            return f"Worker {seat.worker} (pid {process.pid}) was not ready after {quiet_s:.0f} s and was killed."
        return ""

    def _bury(self, seat: Seat, process: Process, now: float) -> None:
        """Make sure that it is dead, and prepare its successor."""
        self._mailbox.unwatch(process.exit_fd)
        self._mailbox.forget(process.config.worker)
        process.close(_KILL_S)
        backoff_s = _BACKOFF_S * 2 ** (seat.num_starts - 1) if seat.num_starts else 0.0
        seat.process, seat.up, seat.draining, seat.objection, seat.since = None, False, False, "", now + backoff_s
        seat.config = msgspec.structs.replace(seat.config, epoch=seat.config.epoch + 1)

    def _launch(self, seat: Seat) -> None:
        self.num_restarts += seat.config.epoch > 0 and seat.num_starts == 0
        seat.num_starts += 1
        seat.process = self._template.fork(seat.config) if self._template is not None else spawn(seat.config)
        seat.since = self._clock.now()
        self._mailbox.watch(seat.process.exit_fd)
