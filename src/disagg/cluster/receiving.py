"""One hand-off as its decode worker sees it, and what that side asks of its worker. See handoff_decode.py."""

import enum
import math
from dataclasses import dataclass, field
from typing import Protocol

from disagg.cluster.messages import Offer
from disagg.record import Facts


class ReceiveState(enum.Enum):
    """See the drawing in handoff_decode.py."""

    WAIT_PAGES = "wait_pages"
    FILLING = "filling"
    QUIESCING = "quiescing"


@dataclass(slots=True)
class Receiving:
    """One hand-off as its decode worker sees it."""

    offer: Offer
    since: float  # in WAIT_PAGES; in FILLING, since the last progress: a chunk announced, a copy ended
    lease_until: float  # fail when it has passed
    facts: Facts
    state: ReceiveState = ReceiveState.WAIT_PAGES
    pages: list[int] = field(default_factory=list)  # reserved here
    theirs: list[int] = field(default_factory=list)  # announced, in order
    checksums: list[int] = field(default_factory=list)  # one per page of `theirs`, when they are checked
    num_asked: int = 0  # how many of `theirs` a pull was started for
    first_token: int | None = None
    tickets: set[int] = field(default_factory=set)
    copied_at: float = -math.inf  # when the last copy ended
    proven_until: float = -math.inf  # what was copied by then is what the source had
    source_lost: bool = False
    refused: str = ""  # why the prefill worker should go on with the request
    reason: str = ""  # why it holds pages, for the audit
    outcome: str = ""  # how it will be counted, once it is QUIESCING

    @property
    def source(self) -> str:
        """The prefill worker, name.epoch."""
        return self.offer.source.worker

    @property
    def num_computed(self) -> int:
        """How many positions the pages hold when all are filled."""
        return len(self.offer.request.tokens)


class DecodeHost(Protocol):
    """What this side asks of the worker it lives in. From each call on, the request is the worker's."""

    def adopt(self, receiving: Receiving) -> None:
        """All pages are filled and the first token is known: run the request. The pages are the worker's now."""
        ...

    def recompute(self, receiving: Receiving) -> None:
        """The pages did not come but the first token is known: compute all of it here. The pages stay this side's."""
        ...

    def give_up(self, receiving: Receiving, reason: str) -> None:
        """Neither pages nor first token will come: tell the front end."""
        ...

    def checksum(self, pages: list[int]) -> list[int]:
        """One number per page of this worker, as PrefillSide's `checksum`; nothing when pages are not checked."""
        ...
