"""Where every page of a worker is; none is lost. free + cached + running + holding + sending + quiescing == total.

A page may have several holders at once: its request and the hand-off that announced it, or several requests with the
same beginning. It is counted once, under the first of these that applies:

    sending     on its way: announced while the prompt is still computed, or reserved for pages to come
    holding     of a prompt that is computed, until its decode worker has it
    running     of a request that is computed here
    quiescing   of something that ended, until nobody reads or writes it any more
    cached      nobody's, but its content may be wanted
    free        nobody's
"""

from collections.abc import Iterable
from typing import NamedTuple

from disagg.cluster.handoff_prefill import Held, SendState
from disagg.cluster.receiving import ReceiveState
from disagg.engine.scheduler import Scheduler
from disagg.errors import InvariantError
from disagg.request import Status

_PLACES = ("sending", "holding", "running", "quiescing")
_OF_STATE = {
    SendState.OFFERED.value: "sending",
    SendState.SENDING.value: "sending",
    SendState.HOLDING.value: "holding",
    SendState.QUIESCING.value: "quiescing",
    ReceiveState.WAIT_PAGES.value: "sending",
    ReceiveState.FILLING.value: "sending",
    ReceiveState.QUIESCING.value: "quiescing",
}
_OF_STATUS = {
    Status.RUNNING: "running",
    Status.HOLDING: "holding",
    Status.FINISHED: "quiescing",  # aborted, and a step in flight may still write its pages
    Status.WAITING: "running",  # it holds nothing; the scheduler's own check says so
}


class Conserved(NamedTuple):
    """The terms of the rule, in pages."""

    free: int
    cached: int
    running: int
    holding: int
    sending: int
    quiescing: int


def count(scheduler: Scheduler, given: Iterable[Held], taken: Iterable[Held], others: int = 0) -> Conserved:
    """As `conserve`, without looking at single pages: cheap enough for every heartbeat.

    A page that two hand-offs share may be counted under the first place of both. It checks nothing.
    """
    free, cached, left = scheduler.pool.counts()
    counts = {"sending": 0, "holding": others, "quiescing": 0}
    for one in (*given, *taken):
        counts[_OF_STATE[one.state]] += len(one.pages)
    for place, pages in counts.items():
        counts[place] = min(pages, left)
        left -= counts[place]
    return Conserved(free, cached, left, counts["holding"], counts["sending"], counts["quiescing"])


def conserve(
    scheduler: Scheduler, given: Iterable[Held], taken: Iterable[Held], others: Iterable[int] = ()
) -> Conserved:
    """The counts of one worker, from its scheduler and `held()` of its two hand-off sides.

    `others`: pages held by anyone else, counted as holding. Raises InvariantError when a reference to a page has no
    holder, a holder no reference, or the terms do not add up.
    """
    held, others = [*given, *taken], list(others)
    scheduler.check([*others, *(page for one in held for page in one.pages)])
    where: dict[str, set[int]] = {place: set() for place in _PLACES}
    where["holding"].update(others)
    for one in held:
        where[_OF_STATE[one.state]].update(one.pages)
    for holder in scheduler.audit():
        where[_OF_STATUS[holder.status]].update(holder.pages)
    seen: set[int] = set()
    counts = {}
    for place in _PLACES:
        counts[place] = len(where[place] - seen)
        seen |= where[place]
    free, cached, _ = scheduler.pool.counts()
    conserved = Conserved(free, cached, counts["running"], counts["holding"], counts["sending"], counts["quiescing"])
    if sum(conserved) != scheduler.pool.num_pages:
        raise InvariantError(f"{conserved} does not add up to {scheduler.pool.num_pages} pages.")
    return conserved
