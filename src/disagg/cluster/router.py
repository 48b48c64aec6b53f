"""Who prefills and who decodes a request. Disaggregation is this decision and nothing else.

A policy is a pure function of the request and of what the router knows of the workers. The same worker picked twice is
a colocated request; a deployment is `2C` or `1P1D` only by the roles its workers have here.
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


class Route(NamedTuple):
    """Both names; equal for a colocated request."""

    prefill: str
    decode: str


class Policy(Protocol):
    """Picks workers. Raises nothing: `workers` always holds one that can do what is asked."""

    def pick(self, prompt_len: int, max_tokens: int, workers: Sequence[WorkerView]) -> Route:
        """The route of one request."""
        ...


class LeastOutstanding:
    """The prefill worker with the fewest prompt tokens to read, the decode worker with the fewest tokens to write."""

    def pick(self, prompt_len: int, max_tokens: int, workers: Sequence[WorkerView]) -> Route:
        """See Policy. Ties go to the first, so equal loads give the same routes in every run."""
        prefill = min(_able(workers, "prefill"), key=lambda view: view.prefill_tokens + view.decode_tokens)
        if prefill.role == "both":
            return Route(prefill.name, prefill.name)
        decode = min(_able(workers, "decode"), key=lambda view: view.decode_tokens)
        return Route(prefill.name, decode.name)


class RoundRobin:
    """Each phase's workers in turn, whatever they have to do."""

    def __init__(self) -> None:
        self._count = 0

    def pick(self, prompt_len: int, max_tokens: int, workers: Sequence[WorkerView]) -> Route:
        """See Policy."""
        count, self._count = self._count, self._count + 1
        readers = _able(workers, "prefill")
        prefill = readers[count % len(readers)]
        if prefill.role == "both":
            return Route(prefill.name, prefill.name)
        writers = _able(workers, "decode")
        return Route(prefill.name, writers[count % len(writers)].name)


def _able(workers: Sequence[WorkerView], role: Role) -> list[WorkerView]:
    """Workers whose role covers a phase; when none is left, all of them: every worker can do both."""
    return [view for view in workers if view.role in (role, "both")] or list(workers)


class Router:
    """Routes requests by a policy and keeps the books of what every worker still has to do."""

    def __init__(self, policy: Policy, workers: Sequence[WorkerView]) -> None:
        self._policy = policy
        self._workers = {view.name: view for view in workers}
        self._routes: dict[str, tuple[Route, int, int]] = {}  # request id -> route, prompt and output tokens owed

    def route(self, request_id: str, prompt_len: int, max_tokens: int) -> Route:
        """Pick workers and book the work."""
        route = self._policy.pick(prompt_len, max_tokens, list(self._workers.values()))
        self._workers[route.prefill].prefill_tokens += prompt_len
        self._workers[route.decode].decode_tokens += max_tokens
        self._routes[request_id] = (route, prompt_len, max_tokens)
        return route

    def prefilled(self, request_id: str) -> None:
        """The first token is out."""
        if (entry := self._routes.get(request_id)) is not None:
            route, prompt_len, max_tokens = entry
            self._workers[route.prefill].prefill_tokens -= prompt_len
            self._routes[request_id] = (route, 0, max_tokens)

    def ended(self, request_id: str) -> None:
        """The request is over, however."""
        if (entry := self._routes.pop(request_id, None)) is not None:
            route, prompt_len, max_tokens = entry
            self._workers[route.prefill].prefill_tokens -= prompt_len
            self._workers[route.decode].decode_tokens -= max_tokens
