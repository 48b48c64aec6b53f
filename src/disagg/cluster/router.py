"""Who prefills and who decodes a request. Disaggregation is this decision and nothing else.

A policy (policies.py) is a pure function of the request and of what the router knows of the workers. The same worker
picked twice is a colocated request; a deployment is `2C` or `1P1D` only by the roles its workers have here. So a role
changes while requests are under way, and when a phase has no worker left, the workers of the other phase do both.

All that policies decide by is kept here: what every worker still has to do, how fast it was so far (speeds.py), and
which prompts it has probably cached (prefix_map.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from disagg.cache.pages import PageHash
from disagg.cluster.prefix_map import PrefixMap
from disagg.cluster.speeds import Speeds
from disagg.config import Role
from disagg.record import Estimate, Record


@dataclass(slots=True)
class WorkerView:
    """What the router knows of a worker: its role, and the work it gave it that is not done."""

    name: str  # name.epoch
    role: Role
    prefill_tokens: int = 0  # prompt tokens to compute of requests without a first token yet
    decode_tokens: int = 0  # most tokens that requests decoding here may still produce
    num_decoding: int = 0  # requests that have their first token and are written on here
    prefill_rate: float | None = None  # prompt tokens/s while it computes prompts; None: nothing is known yet
    silent: bool = False  # not heard of for a while: gets nothing while another worker can have it


class Route(NamedTuple):
    """Both names; equal for a colocated request."""

    prefill: str
    decode: str


class Ask(NamedTuple):
    """What the router knows of a request."""

    serial: int  # how many were routed before it
    prompt_len: int
    max_tokens: int
    cached: Mapping[str, int] = {}  # worker -> how many of its first tokens are probably cached there; absent: none
    handoff_rate: float | None = None  # prompt tokens/s by what hand-offs delayed their requests; None: not known

    def uncached(self, worker: str) -> int:
        """How many prompt tokens this worker would have to compute."""
        return self.prompt_len - self.cached.get(worker, 0)


class Decision(NamedTuple):
    """A route, and where routes were weighed by time, what was expected of them, the chosen one first."""

    route: Route
    estimates: tuple[Estimate, ...] = ()


class Policy(Protocol):
    """Picks workers, without side effects: the same question has the same answer."""

    def __call__(self, ask: Ask, workers: Sequence[WorkerView]) -> Decision | None:
        """`workers` holds at least one, and every worker can do both phases. None: it takes more of them."""
        ...


@dataclass(slots=True)
class _Booked:
    """A request under way, and what it still costs its workers."""

    route: Route
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decoding: bool = False


class Router:
    """Routes requests by a policy and keeps the books of what every worker still has to do.

    Workers come and go; books about one that is gone are dropped with it. `prefixes` None: no worker caches prompts.
    """

    def __init__(
        self, policy: Policy, workers: Sequence[WorkerView] = (), *, prefixes: PrefixMap | None = None
    ) -> None:
        self._policy = policy
        self._workers = {view.name: view for view in workers}
        self._booked: dict[str, _Booked] = {}  # by request id
        self._prefixes = prefixes
        self._speeds = Speeds()
        self._serial = 0

    @property
    def workers(self) -> list[WorkerView]:
        """All that may be given work."""
        return list(self._workers.values())

    def add(self, view: WorkerView) -> None:
        """From now on this worker may be given work."""
        self._workers[view.name] = view

    def remove(self, worker: str) -> None:
        """From now on it gets none; unknown names are ignored."""
        self._workers.pop(worker, None)
        self._speeds.forget(worker)
        if self._prefixes is not None:
            self._prefixes.forget(worker)

    def set_role(self, worker: str, role: Role) -> None:
        """Requests routed from now on see the new role; those under way stay where they are."""
        if (view := self._workers.get(worker)) is not None:
            view.role = role

    def set_silent(self, worker: str, silent: bool) -> None:
        """Whether to spare this worker while another can have the work."""
        if (view := self._workers.get(worker)) is not None:
            view.silent = silent

    def route(
        self,
        request_id: str,
        prompt_len: int,
        max_tokens: int,
        *,
        hashes: Sequence[PageHash] = (),
        pinned: Route | None = None,
        policy: Policy | None = None,
    ) -> Decision | None:
        """Pick workers and book the work. None: there are not the workers for it at the moment.

        `hashes` name the full pages of the prompt. `pinned`: take these workers. `policy`: ask this one instead.
        """
        workers = self.workers
        if not workers:
            return None
        cached = {} if self._prefixes is None else self._prefixes.cached(self._workers, hashes, prompt_len)
        if pinned is not None:
            decision: Decision | None = Decision(pinned)
        else:
            heard = [view for view in workers if not view.silent] or workers
            for view in heard:
                view.prefill_rate = self._speeds.prefill_rate(view.name)
            ask = Ask(self._serial, prompt_len, max_tokens, cached, self._speeds.handoff_rate())
            pick = policy or self._policy
            decision = pick(ask, heard) or pick(ask, workers)
            self._serial += 1
        if decision is None:
            return None
        route = decision.route
        self._booked[request_id] = _Booked(route)
        self._owe(request_id, prompt_len - cached.get(route.prefill, 0), max_tokens, decoding=False)
        if self._prefixes is not None:
            for worker in {*route} & self._workers.keys():
                self._prefixes.note(worker, hashes)
        return decision

    def prefilled(self, request_id: str) -> None:
        """The first token is out."""
        if (booked := self._booked.get(request_id)) is not None:
            self._owe(request_id, 0, booked.decode_tokens, decoding=True)

    def ended(self, request_id: str) -> None:
        """The request is over on these workers, however."""
        if request_id in self._booked:
            self._owe(request_id, 0, 0, decoding=False)
            del self._booked[request_id]

    def observe(self, record: Record) -> None:
        """Learn from a request that is over how fast workers and hand-offs are."""
        self._speeds.observe(record)

    def _owe(self, request_id: str, prefill_tokens: int, decode_tokens: int, *, decoding: bool) -> None:
        """Book what a request still costs its workers, in place of what it cost so far."""
        booked = self._booked[request_id]
        if (view := self._workers.get(booked.route.prefill)) is not None:
            view.prefill_tokens += prefill_tokens - booked.prefill_tokens
        if (view := self._workers.get(booked.route.decode)) is not None:
            view.decode_tokens += decode_tokens - booked.decode_tokens
            view.num_decoding += decoding - booked.decoding
        self._booked[request_id] = _Booked(booked.route, prefill_tokens, decode_tokens, decoding)
