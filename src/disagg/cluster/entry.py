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
from disagg.errors import RequestError
from disagg.record import Record
from disagg.request import SamplingParams

Asked = tuple[Sequence[int], SamplingParams, Routing | None]


def check(asked: Sequence[Asked], deployment: Deployment, engine: EngineSpec, vocab_size: int, num_pages: int) -> None:
    """Raise RequestError when one of these can never be served here."""
    for prompt, params, routing in asked:
        limits.validate(prompt, params, engine, vocab_size, num_pages)
        if routing == "disaggregated" and len(deployment.workers) < 2:
            raise RequestError(
                f"disagg_route cannot be disaggregated on {deployment.name}: it has one worker, so nothing can be "
                "handed over. Leave it out, or deploy two."
            )


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
