"""Every message between processes: one frozen struct each, grouped by who sends it to whom.

A worker is addressed as `name.epoch` ("D0.1"): a restarted worker has a new epoch, so a message meant for its
predecessor cannot reach it, and one from its predecessor is told apart. Times are seconds on the host's monotonic
clock. Encoded with msgspec (MessagePack), decoded into these types or refused: never pickle.
"""

from typing import Any

import msgspec

from disagg.cluster.status import Snapshot
from disagg.engine.batch import TokenLogprobs
from disagg.record import Facts
from disagg.request import SamplingParams
from disagg.transfer.layout import Layout


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Root of all messages."""


# ---- front end -> worker


class Submit(Message, frozen=True):
    """Compute this request. `decode_on` names the worker that decodes it; None: the receiver does both phases.

    `tokens` is the prompt and any output the client already has; `attempt` counts resubmissions from 0.
    """

    id: str
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    stop_ids: list[int]
    order: float
    attempt: int = 0
    decode_on: str | None = None


class Abort(Message, frozen=True):
    """Free everything this request holds and take nothing of it that is still on its way.

    `attempt` None: the client no longer wants it. Else this attempt and older ones are replaced by a later one.
    """

    id: str
    attempt: int | None = None


class Lost(Message, frozen=True):
    """This worker is dead; nothing it promised will come and it reads nothing any more."""

    worker: str


class Audit(Message, frozen=True):
    """Say where every page is; `serial` comes back in the answer."""

    serial: int


class Stop(Message, frozen=True):
    """Leave the loop and exit with code 0."""


class Withhold(Message, frozen=True):
    """Fault injection: keep all pages that are free now to yourself for `for_s` seconds."""

    for_s: float


# ---- worker -> front end


class Hello(Message, frozen=True):
    """I am ready. `address` is my transport's; `layout` is compared before pages travel."""

    worker: str
    address: str
    layout: Layout
    num_pages: int


class StartFailed(Message, frozen=True):
    """I could not start; `reason` is a sentence. `input_error`: the caller can mend it."""

    worker: str
    reason: str
    input_error: bool


class Heartbeat(Message, frozen=True):
    """My loop still turns, and this is what it does. Only from supervised workers.

    `draining`: I was asked to end (SIGTERM): give me nothing new, and stop me when nothing needs me any more.
    """

    worker: str
    snapshot: Snapshot
    draining: bool = False


class NewToken(msgspec.Struct, frozen=True, array_like=True):
    """Output token number `index` (from 0) of a request. `facts` come with the first token of a hand-off."""

    id: str
    attempt: int
    index: int
    token: int
    logprobs: TokenLogprobs | None = None
    facts: Facts | None = None


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """A request is over on this worker. `reason` is a FinishReason; `num_output` tokens were sent for it in all."""

    id: str
    attempt: int
    reason: str
    num_output: int
    facts: Facts
    error: str = ""
    retryable: bool = False


class Holder(msgspec.Struct, frozen=True, array_like=True):
    """One holder of pages: a request in the scheduler, or a hand-off given away ("prefill") or taken ("decode").

    `age_s` counts from when the client sent the request, or from when the hand-off came into this state.
    """

    id: str
    side: str  # "scheduler", "prefill", "decode" or "withheld"
    state: str
    num_pages: int
    age_s: float | None = None
    reason: str = ""


class AuditReport(Message, frozen=True):
    """Where every page of a worker is: free + cached + held == total, and held == the last four of `places`.

    `places` are the terms of the conservation rule (see conserve.py). `handoffs` counts those given away ("prefill")
    and taken ("decode"): started == done + failed + expired + aborted + open. `fault` is a sentence when the rule is
    broken: a bug in this package.
    """

    worker: str
    serial: int
    total: int
    free: int
    cached: int
    held: int
    holders: list[Holder]
    places: dict[str, int]
    handoffs: dict[str, dict[str, int]]
    fault: str = ""


class Progress(Message, frozen=True):
    """What a step, or a hand-off that ended, produced."""

    worker: str
    tokens: list[NewToken]
    ended: list[Ended]


# ---- prefill worker -> decode worker. `handoff` is "request id/attempt": global, never reused.
# `worker` is the sender, name.epoch: what another worker, or another epoch of the same one, says is not believed.


class Offer(Message, frozen=True):
    """A request is about to be prefilled here for you: reserve pages for its tokens; chunks follow.

    The first lease runs from `sent_at` if `clock` names the receiver's clock too; otherwise from the first Renew.
    """

    handoff: str
    source: Hello
    request: Submit
    sent_at: float
    lease_s: float
    clock: str


class ChunkReady(Message, frozen=True):
    """These pages are complete; the first of them is page number `first_page` of the request, so a hole shows.

    The last chunk, and no other, carries the first token, which the client already has.
    """

    worker: str
    handoff: str
    first_page: int
    pages: list[int]
    checksums: list[int] = []  # one per page when integrity checking is on
    first_token: int | None = None


class Cancel(Message, frozen=True):
    """There will be nothing (more) to pull; answer with Dropped once no copy is in flight."""

    worker: str
    handoff: str
    reason: str


class Renewed(Message, frozen=True):
    """Answers Renew `serial`: the lease of these hand-offs runs anew since it was sent; those left out are gone.

    `announced` says for each how many pages were announced so far, so that a lost chunk shows.
    """

    worker: str
    serial: int
    handoffs: list[str]
    announced: list[int]


# ---- decode worker -> prefill worker


class Renew(Message, frozen=True):
    """I still want these hand-offs, or still read their pages: let their lease run anew."""

    worker: str
    serial: int
    handoffs: list[str]


class PullDone(Message, frozen=True):
    """Every page is copied and the request runs here; the source pages are yours again."""

    worker: str
    handoff: str


class Dropped(Message, frozen=True):
    """I no longer touch this hand-off's pages. `refused` is a sentence when the request is yours again: go on with it.

    Without it the request is over, or goes on here without the pages.
    """

    worker: str
    handoff: str
    refused: str = ""


AnyMessage = (
    Submit | Abort | Lost | Audit | Stop | Withhold | Hello | StartFailed | Heartbeat | Progress | AuditReport
    | Offer | ChunkReady | Cancel | Renew | PullDone | Dropped | Renewed
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Bytes of one message."""
    return _encoder.encode(message)


def decode(data: bytes) -> Any:
    """The message in `data`. Raises msgspec.ValidationError when it is none of ours."""
    return _decoder.decode(data)
