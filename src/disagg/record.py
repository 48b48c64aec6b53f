"""What happened: one Record per request, and the timeline all numbers are made from.

Every moment is on one monotonic clock (seconds). The milestones of a request, in order:

    scheduled ─client─▶ sent ─router─▶ queued ─queue─▶ prefill_start ─prefill─▶ prefill_end ─reply─▶ first token
                                                                                                      at the client
    prefill_end ─handoff_wait─▶ handoff_start ─handoff_copy─▶ handoff_end ─admission─▶ decode_start ─decode─▶ last token

The first row's five parts sum to TTFT, by construction. Together with the second row they cover the whole request:
E2E = client + router + queue + prefill + handoff_wait + handoff_copy + admission + decode. The hand-off runs beside
prefill, chunk by chunk; the parts above count only what the request waited for, after its prefill had ended, and
`handoff_busy_s` says how long copying took in all. A colocated request has no hand-off: those parts are zero.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

TTFT_PARTS = ("client", "router", "queue", "prefill", "reply")
E2E_PARTS = ("client", "router", "queue", "prefill", "handoff_wait", "handoff_copy", "admission", "decode")


class Span(msgspec.Struct, frozen=True, array_like=True):
    """What one worker did for one request: a prefill chunk or a hand-off copy."""

    kind: Literal["prefill", "handoff"]
    worker: str
    start_at: float
    end_at: float
    amount: int  # prefill: tokens; handoff: bytes


class Facts(msgspec.Struct, array_like=True):
    """What one worker knows of one request's timeline, named as in Record; the front end merges them into it."""

    worker: str
    queued_at: float | None = None
    prefill_start_at: float | None = None
    prefill_end_at: float | None = None
    handoff_start_at: float | None = None
    handoff_end_at: float | None = None
    decode_start_at: float | None = None
    handoff_bytes: int = 0
    handoff_busy_s: float = 0.0
    prefill_busy_s: float = 0.0
    decode_busy_s: float = 0.0
    num_cached: int = 0
    num_preemptions: int = 0
    spans: list[Span] = []


class Estimate(msgspec.Struct, frozen=True, array_like=True):
    """What the router expected of a route, in seconds. The first three are the request's own, in this order."""

    prefill_worker: str
    decode_worker: str
    queue_s: float  # until its prefill begins
    prefill_s: float
    handoff_s: float  # until it can go on where it decodes
    stall_s: float  # what requests that decode beside the prefill lose meanwhile, all together

    @property
    def total_s(self) -> float:
        """What routes are compared by."""
        return self.queue_s + self.prefill_s + self.handoff_s + self.stall_s


class Record(msgspec.Struct, kw_only=True):
    """One request's outcome. Times are seconds on the run's clock; None means it never came to that."""

    request_id: str
    index: int  # position in the workload: the same index is the same prompt in every arm
    prompt_len: int
    output_len: int = 0
    max_tokens: int = 0
    finish_reason: str = ""  # a FinishReason value, or "" while it runs
    error: str = ""
    arm: str = ""
    phase: str = ""  # which part of the comparison it belongs to: "sequential" or "concurrent"
    rate: float = 0.0  # requests/s asked for in that part; 0: one at a time
    repeat: int = 0
    prefill_worker: str = ""  # of the last attempt
    decode_worker: str = ""  # that which wrote the tokens, when the hand-off failed too
    num_attempts: int = 1  # how often it was sent to workers: more than once when one of them died
    estimates: list[Estimate] = []  # routes that a policy weighed by time, the one it took first

    scheduled_at: float = 0.0  # when the workload wanted it sent: latency counts from here
    sent_at: float | None = None  # when the client really sent it
    queued_at: float | None = None  # when it was put into the prefill worker's inbox
    prefill_start_at: float | None = None  # start of the first step that computed a part of it
    prefill_end_at: float | None = None  # end of the step that sampled its first token
    handoff_start_at: float | None = None  # start of the first copy
    handoff_end_at: float | None = None  # end of the last copy
    decode_start_at: float | None = None  # start of the first decode step it took part in
    token_at: list[float] = []  # when each token reached the client

    handoff_bytes: int = 0
    handoff_busy_s: float = 0.0  # time spent copying, overlapped or not
    prefill_busy_s: float = 0.0  # its share of the worker's step time, by tokens
    decode_busy_s: float = 0.0
    num_cached: int = 0
    num_preemptions: int = 0
    spans: list[Span] = []
    tokens: list[int] = []  # output token ids; kept where runs are compared for exactness, else empty

    def merge(self, facts: Facts) -> None:
        """Add what a worker knows. Amounts add up; of a moment the first counts, of the end of the copies the last.

        So a prompt computed again, after a preemption or on another worker, does not move the moments of its first
        token, which the client already has.
        """
        for name in facts.__struct_fields__:
            value, ours = getattr(facts, name), getattr(self, name, None)
            if name == "worker" or value is None:
                continue
            if name == "handoff_end_at":
                setattr(self, name, value if ours is None else max(ours, value))
            elif not name.endswith("_at"):
                setattr(self, name, ours + value)
            elif ours is None:
                setattr(self, name, value)

    @property
    def ok(self) -> bool:
        """Whether it ended as asked, by a stop or at its length."""
        return self.finish_reason in ("stop", "length")

    @property
    def ttft_s(self) -> float | None:
        """Time to first token at the client, from the scheduled arrival."""
        return self.token_at[0] - self.scheduled_at if self.token_at else None

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token at the client, from the scheduled arrival."""
        return self.token_at[-1] - self.scheduled_at if self.token_at else None

    @property
    def tpot_s(self) -> float | None:
        """Mean gap after the first token; None for an output of one token, which has no gap."""
        if len(self.token_at) < 2:
            return None
        return (self.token_at[-1] - self.token_at[0]) / (len(self.token_at) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Every gap between neighbouring tokens."""
        return [later - earlier for earlier, later in zip(self.token_at, self.token_at[1:], strict=False)]

    def prefill_s_by_worker(self) -> dict[str, float]:
        """`prefill_busy_s` by the tokens of the prompt that each worker computed; a retried one has several."""
        tokens: Counter[str] = Counter()
        for span in self.spans:
            tokens[span.worker] += span.amount if span.kind == "prefill" else 0
        total = tokens.total()
        if not total:
            return {self.prefill_worker: self.prefill_busy_s} if self.prefill_worker else {}
        return {worker: self.prefill_busy_s * num / total for worker, num in tokens.items() if num}

    def ttft_parts(self) -> dict[str, float] | None:
        """TTFT split by TTFT_PARTS; the values sum to `ttft_s`. None without a first token."""
        if not self.token_at:
            return None
        marks = (self.sent_at, self.queued_at, self.prefill_start_at, self.prefill_end_at, self.token_at[0])
        return _differences(TTFT_PARTS, self.scheduled_at, marks)

    def e2e_parts(self) -> dict[str, float] | None:
        """E2E split by E2E_PARTS; the values sum to `e2e_s`. None without a first token."""
        if not self.token_at:
            return None
        marks = (
            self.sent_at,
            self.queued_at,
            self.prefill_start_at,
            self.prefill_end_at,
            self.handoff_start_at,
            self.handoff_end_at,
            self.decode_start_at if self.handoff_end_at is not None else None,
            self.token_at[-1],
        )
        return _differences(E2E_PARTS, self.scheduled_at, marks)


def _differences(names: tuple[str, ...], start: float, marks: tuple[float | None, ...]) -> dict[str, float]:
    """Consecutive differences; a missing or earlier mark makes an empty part, so the sum is exact. The last mark holds.

    A mark may lie after the end (a worker stamps a token, the client has it later than the next mark): it is clamped.
    """
    end = marks[-1]
    assert end is not None
    parts: dict[str, float] = {}
    at = start
    for name, mark in zip(names, marks, strict=True):
        reached = at if mark is None else min(max(mark, at), end)
        parts[name] = reached - at
        at = reached
    return parts


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Append one JSON line per record."""
    with path.open("ab") as file:
        for record in records:
            file.write(_encoder.encode(record) + b"\n")


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order. A last line without its end is one whose writer was stopped: it is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)
