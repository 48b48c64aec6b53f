"""The routing policies: pure functions from a request and what is known of the workers to a Decision.

    round-robin        each phase's workers in turn
    least-outstanding  the prefill worker with the fewest tokens to compute, the decode worker with the fewest to write
    prefix-aware       likewise, but tokens a prefill worker has cached are none it has to compute
    conditional        prefix-aware, unless prefilling where the request decodes is expected to take less time than
                       prefilling elsewhere and handing over

and two for a single request that asks for it, on workers of any role: colocated and disaggregated.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

from disagg.cluster.router import Ask, Decision, Policy, Route, WorkerView
from disagg.config import Role
from disagg.errors import InputError
from disagg.record import Estimate

Routing = Literal["colocated", "disaggregated"]
DEFAULT = "least-outstanding"


def round_robin(ask: Ask, workers: Sequence[WorkerView]) -> Decision:
    """Each phase's workers in turn, whatever they have to do."""
    readers, writers = _able(workers, "prefill"), _able(workers, "decode")
    return Decision(_joined(readers[ask.serial % len(readers)], writers[ask.serial % len(writers)]))


def least_outstanding(ask: Ask, workers: Sequence[WorkerView]) -> Decision:
    """By tokens that are not done yet. Ties go to the first, so equal loads give the same routes in every run."""
    return Decision(_joined(min(_able(workers, "prefill"), key=_load), _least_writing(workers)))


def prefix_aware(ask: Ask, workers: Sequence[WorkerView]) -> Decision:
    """By tokens that would not be done yet: a cached prefix counts for a worker as much as the tokens it saves.

    So a popular prefix spreads to a second worker once the first has more to do than the prefix would cost there.
    """
    reader = min(_able(workers, "prefill"), key=lambda view: _load(view) + ask.uncached(view.name))
    return Decision(_joined(reader, _least_writing(workers)))


def conditional(ask: Ask, workers: Sequence[WorkerView]) -> Decision:
    """By expected time, of the best hand-over and of the best prefill where it decodes; equal times move nothing.

    Expected are the wait behind prompts that were sent before, the prefill of what is not cached, the hand-off, and
    what requests that decode on the prefilling worker lose while it prefills (each the whole prefill: without this
    term long prompts would go where they disturb most). Before both speeds are known it is prefix_aware.
    """
    usual = prefix_aware(ask, workers)
    rates = {view.name: view.prefill_rate for view in workers}
    known = ask.handoff_rate is not None and None not in rates.values()
    if not known or usual.route.prefill == usual.route.decode:
        return usual
    writer = _least_writing(workers)
    readers = [view for view in _able(workers, "prefill") if view.role == "prefill"]
    moved = min((_estimate(ask, reader, writer) for reader in readers), key=_total)
    kept = min((_estimate(ask, view, view) for view in _able(workers, "decode")), key=_total)
    first, second = sorted((kept, moved), key=_total)
    return Decision(Route(first.prefill_worker, first.decode_worker), (first, second))


def colocated(ask: Ask, workers: Sequence[WorkerView]) -> Decision:
    """The worker with the least to do does both phases, whatever the roles."""
    name = min(workers, key=_load).name
    return Decision(Route(name, name))


def disaggregated(ask: Ask, workers: Sequence[WorkerView]) -> Decision | None:
    """Two workers, of the right roles where there are such; never one, which the client asked not to have."""
    if len(workers) < 2:
        return None
    reader = min(_able(workers, "prefill"), key=_load)
    others = [view for view in workers if view is not reader]
    return Decision(Route(reader.name, _least_writing(others).name))


POLICIES: Mapping[str, Policy] = {
    DEFAULT: least_outstanding,
    "round-robin": round_robin,
    "prefix-aware": prefix_aware,
    "conditional": conditional,
}
ROUTINGS: Mapping[Routing, Policy] = {"colocated": colocated, "disaggregated": disaggregated}


def named(name: str) -> Policy:
    """The policy of this name. Raises InputError with the nearest one."""
    if name in POLICIES:
        return POLICIES[name]
    near = difflib.get_close_matches(name, POLICIES, 1)
    known = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(POLICIES)}."
    raise InputError(f"No policy {name!r}. {known}")


def _able(workers: Sequence[WorkerView], role: Role) -> list[WorkerView]:
    """Workers whose role covers a phase; when none is left, all of them: every worker can do both."""
    return [view for view in workers if view.role in (role, "both")] or list(workers)


def _least_writing(workers: Sequence[WorkerView]) -> WorkerView:
    return min(_able(workers, "decode"), key=lambda view: view.decode_tokens)


def _load(view: WorkerView) -> int:
    return view.prefill_tokens + view.decode_tokens


def _joined(prefill: WorkerView, decode: WorkerView) -> Route:
    """Nothing is handed over by a worker that decodes itself, nor to one that only stands in for a decode worker."""
    if prefill.role != "prefill" or decode.role == "prefill":
        return Route(prefill.name, prefill.name)
    return Route(prefill.name, decode.name)


def _estimate(ask: Ask, reader: WorkerView, writer: WorkerView) -> Estimate:
    """What a route is expected to take. Both rates are known."""
    assert reader.prefill_rate is not None
    assert ask.handoff_rate is not None
    prefill_s = ask.uncached(reader.name) / reader.prefill_rate
    return Estimate(
        reader.name,
        writer.name,
        queue_s=reader.prefill_tokens / reader.prefill_rate,
        prefill_s=prefill_s,
        handoff_s=0.0 if reader is writer else ask.prompt_len / ask.handoff_rate,
        stall_s=prefill_s * reader.num_decoding,
    )


def _total(estimate: Estimate) -> float:
    return estimate.total_s
