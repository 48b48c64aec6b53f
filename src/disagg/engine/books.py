"""The scheduler's books, compared both ways: every page has its holders, every request its place."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from disagg.errors import InvariantError
from disagg.request import Status

if TYPE_CHECKING:
    from disagg.engine.scheduler import Scheduler


def check_books(scheduler: "Scheduler", others: Iterable[int] = ()) -> None:
    """Raise InvariantError unless every reference to every page has its holder and every request its place.

    `others`: the pages held by anyone else (reservations, reads by other workers), once for each reference.
    """
    waiting, behind, ready = scheduler._waiting, scheduler._behind, scheduler._ready
    scheduler.pool.check([*others, *(page for holder in scheduler.audit() for page in holder.pages)])
    sampled = {request for batch in scheduler._flying for request in batch.sampling()}
    places = Counter((*waiting, *behind, *ready, *(sampled - set(scheduler._ended))))
    live = [r for r in scheduler._requests.values() if r.status is not Status.HOLDING]
    page_size = scheduler.pool.page_size
    faults = (
        (places != Counter(live), "a request is in no queue or in two"),
        (scheduler.num_running != sum(r.status is Status.RUNNING for r in live), "num_running is wrong"),
        (waiting != sorted(waiting, key=lambda r: (r.order, r.id)), "the waiting requests are out of order"),
        (any(r.pages or r.num_computed for r in waiting), "a waiting request holds something"),
        (any(r.num_computed != len(r.tokens) - 1 for r in ready), "a ready request is not one behind"),
        (any(r.num_computed > len(r.tokens) + 1 for r in live), "a request is too far ahead"),
        (any(r.num_computed > len(r.pages) * page_size for r in live), "a request outgrew its pages"),
    )
    for broken, fault in faults:
        if broken:
            raise InvariantError(f"Scheduler: {fault} ({scheduler.audit()}).")
