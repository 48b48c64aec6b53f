"""Who prefills and who decodes a request. Disaggregation is this decision and nothing else.

A policy is a pure function of the request and of what the router knows of the workers. The same worker picked twice is
a colocated request; a deployment is `2C` or `1P1D` only by the roles its workers have here. So a role changes while
requests are under way, and when a phase has no worker left, the workers of the other phase do both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from disagg.config import Role


@dataclass(slots=True)
class WorkerView:
    """What the router knows of a worker: its role, and the work it gave it that is not done."""

    name: str  # name.epoch
    role: Role
    prefill_tokens: int = 0  # prompt tokens of requests without a first token yet
    decode_tokens: int = 0  # most tokens that requests decoding here may still produce
    silent: bool = False  # not heard of for a while: gets nothing while another worker can have it


class Route(NamedTuple):
    """Both names; equal for a colocated request."""

    prefill: str
    decode: str


class Policy(Protocol):
    """Picks workers. Raises nothing: `workers` holds at least one, and every worker can do both phases."""

    def pick(self, prompt_len: int, max_tokens: int, workers: Sequence[WorkerView]) -> Route:
        """The route of one request."""
        ...


class LeastOutstanding:
    """The prefill worker with the fewest prompt tokens to read, the decode worker with the fewest tokens to write."""

    def pick(self, prompt_len: int, max_tokens: int, workers: Sequence[WorkerView]) -> Route:
        """See Policy. Ties go to the first, so equal loads give the same routes in every run."""
        prefill = min(_able(workers, "prefill"), key=lambda view: view.prefill_tokens + view.decode_tokens)
        return _with_decode(prefill, min(_able(workers, "decode"), key=lambda view: view.decode_tokens))


class RoundRobin:
    """Each phase's workers in turn, whatever they have to do."""

    def __init__(self) -> None:
        self._count = 0

    def pick(self, prompt_len: int, max_tokens: int, workers: Sequence[WorkerView]) -> Route:
        """See Policy."""
        count, self._count = self._count, self._count + 1
        readers, writers = _able(workers, "prefill"), _able(workers, "decode")
        return _with_decode(readers[count % len(readers)], writers[count % len(writers)])


def _able(workers: Sequence[WorkerView], role: Role) -> list[WorkerView]:
    """Workers whose role covers a phase; when none is left, all of them: every worker can do both."""
    return [view for view in workers if view.role in (role, "both")] or list(workers)


def _with_decode(prefill: WorkerView, decode: WorkerView) -> Route:
    """Nothing is handed over by a worker that decodes itself, nor to one that only stands in for a decode worker."""
    if prefill.role != "prefill" or decode.role == "prefill":
        return Route(prefill.name, prefill.name)
    return Route(prefill.name, decode.name)


class Router:
    """Routes requests by a policy and keeps the books of what every worker still has to do.

    Workers come and go; books about one that is gone are dropped with it.
    """

    def __init__(self, policy: Policy, workers: Sequence[WorkerView] = ()) -> None:
        self._policy = policy
        self._workers = {view.name: view for view in workers}
        self._routes: dict[str, tuple[Route, int, int]] = {}  # request id -> route, prompt and output tokens owed

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

    def set_role(self, worker: str, role: Role) -> None:
        """Requests routed from now on see the new role; those under way stay where they are."""
        if (view := self._workers.get(worker)) is not None:
            view.role = role

    def set_silent(self, worker: str, silent: bool) -> None:
        """Whether to spare this worker while another can have the work."""
        if (view := self._workers.get(worker)) is not None:
            view.silent = silent

    def route(self, request_id: str, prompt_len: int, max_tokens: int, pinned: Route | None = None) -> Route | None:
        """Pick workers, unless they are `pinned`, and book the work. None: there is no worker at the moment."""
        workers = self.workers
        if not workers:
            return None
        heard = [view for view in workers if not view.silent] or workers
        route = pinned or self._policy.pick(prompt_len, max_tokens, heard)
        self._routes[request_id] = (route, 0, 0)
        self._owe(request_id, prompt_len, max_tokens)
        return route

    def prefilled(self, request_id: str) -> None:
        """The first token is out."""
        if (entry := self._routes.get(request_id)) is not None:
            self._owe(request_id, 0, entry[2])

    def ended(self, request_id: str) -> None:
        """The request is over on these workers, however."""
        if request_id in self._routes:
            self._owe(request_id, 0, 0)
            del self._routes[request_id]

    def _owe(self, request_id: str, prompt_len: int, max_tokens: int) -> None:
        """Book what a request still costs its workers, in place of what it cost so far."""
        route, old_prompt, old_output = self._routes[request_id]
        if (view := self._workers.get(route.prefill)) is not None:
            view.prefill_tokens += prompt_len - old_prompt
        if (view := self._workers.get(route.decode)) is not None:
            view.decode_tokens += max_tokens - old_output
        self._routes[request_id] = (route, prompt_len, max_tokens)
