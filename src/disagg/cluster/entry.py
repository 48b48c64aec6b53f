"""How a request enters a deployment: what it must be, and what the front end writes down of it."""

import math
from collections.abc import Sequence, Set
from uuid import uuid4

import msgspec

from disagg.cluster import limits
from disagg.cluster.ledger import Live
from disagg.cluster.policies import Routing
from disagg.cluster.router import Route
from disagg.config import Deployment, EngineSpec
from disagg.errors import Overloaded, RequestError, WorkerLost
from disagg.record import Record
from disagg.request import SamplingParams

Asked = tuple[Sequence[int], SamplingParams, Routing | None]

_LONGEST_RETRY_AFTER_S = 60.0
NO_PAIR = (
    "Fewer than two workers are left, and none is started again after failing five times in a row: nothing can be "
    "handed over. Restart the deployment, or let this request be colocated."
)


def check(asked: Sequence[Asked], deployment: Deployment, engine: EngineSpec, vocab_size: int, num_pages: int) -> None:
    """Raise RequestError when one of these can never be served here."""
    for prompt, params, routing in asked:
        limits.validate(prompt, params, engine, vocab_size, num_pages)
        if routing == "disaggregated" and len(deployment.workers) < 2:
            raise RequestError(
                f"disagg_route cannot be disaggregated on {deployment.name}: it has one worker, so nothing can be "
                "handed over. Leave it out, or deploy two."
            )


def check_room(asked: Sequence[Asked], num_live: int, most: int, end_gap_s: float) -> None:
    """Raise when there is no room for all of these: RequestError if there never is, Overloaded while there is none.

    `most`: requests at a time. `end_gap_s`: between the ends of two.
    """
    if len(asked) > most:
        raise RequestError(f"{len(asked)} at a time are more than the {most} that may be queued.")
    if num_live + len(asked) > most:
        raise Overloaded(min(max(end_gap_s, 0.1), _LONGEST_RETRY_AFTER_S))


def check_routes(asked: Sequence[Asked], num_up: int, num_left: int) -> None:
    """Raise WorkerLost when one of these asks for two workers and fewer are up, or may come back at all."""
    if num_up < 2 and any(routing == "disaggregated" for _, _, routing in asked):
        hope = "Fewer than two workers are up, so nothing can be handed over: retry later."
        raise WorkerLost(hope if num_left > 1 else NO_PAIR)


def opened(
    asked: Asked,
    now: float,
    *,
    arm: str,
    eos: Set[int],
    scheduled_at: float | None = None,
    deadline_s: float = math.inf,
    index: int = 0,
    pinned: Route | None = None,
) -> Live:
    """A request as the ledger keeps it, with a seed where its tokens are drawn and it brought none."""
    prompt, params, routing = asked
    if params.seed is None and not params.greedy:
        params = msgspec.structs.replace(params, seed=uuid4().int >> 65)
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    record = Record(
        request_id=uuid4().hex,
        index=index,
        prompt_len=len(prompt),
        max_tokens=params.max_tokens,
        arm=arm,
        scheduled_at=now if scheduled_at is None else scheduled_at,
        sent_at=now,
    )
    return Live(record, list(prompt), params, sorted(stop_ids), now, pinned, routing=routing, deadline=now + deadline_s)
