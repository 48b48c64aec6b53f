"""What the front end knows of every request: its tokens, its attempts, and what is still to come of it.

Pure: messages in, news out; who sends what to whom is the Cluster's business.

Messages of two workers may overtake one another, so tokens are put in order by their index, and a request is over when
it was said to be, all its tokens are here and every worker that had a part in it has told its part. A request that is
sent again has a higher attempt number; whatever still comes of an older attempt is ignored. Its tokens would be the
same (sampling depends on seed and tokens only), and each is given to the client once.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from disagg.cluster import messages as m
from disagg.cluster.policies import Routing
from disagg.cluster.router import Route
from disagg.engine.batch import TokenLogprobs
from disagg.record import Record
from disagg.request import FinishReason, SamplingParams


class Update(NamedTuple):
    """News of one request: tokens that are new to the client, and the Record when it is over."""

    request_id: str
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    record: Record | None


class News(NamedTuple):
    """What a message of a worker brought."""

    updates: list[Update]
    prefilled: list[str]  # requests whose first token of this attempt is out
    retry: list[tuple[str, str]]  # requests that need another attempt, and why


@dataclass(slots=True)
class Live:
    """A request the client still waits for."""

    record: Record
    prompt: list[int]
    params: SamplingParams
    stop_ids: list[int]
    order: float
    pinned: Route | None = None  # where the client wants its first attempt
    routing: Routing | None = None  # how the client wants it, at every attempt
    deadline: float = math.inf  # when it is ended, done or not
    route: Route | None = None  # None: it waits for a worker
    attempt: int = 0
    num_known: int = 0  # output tokens this attempt began with
    writer: str = ""  # the worker that sent a token beyond this attempt's first: it has all that is needed
    early: dict[int, m.NewToken] = field(default_factory=dict)  # came before one with a smaller index
    ended: m.Ended | None = None
    told: set[str] = field(default_factory=set)  # workers whose facts are in the record

    def submit(self) -> m.Submit:
        """This attempt as a message: prompt and all tokens the client has."""
        assert self.route is not None
        return m.Submit(
            self.record.request_id, self.prompt + self.record.tokens, len(self.prompt), self.params, self.stop_ids,
            self.order, self.attempt, self.route.decode if self.route.decode != self.route.prefill else None,
        )  # fmt: skip

    def needs(self, worker: str) -> bool:
        """Whether this attempt cannot end well without this worker."""
        if self.route is None:
            return False
        if self.writer and len(self.record.token_at) > self.num_known:
            return worker == self.writer
        return worker in self.route

    def next_attempt(self) -> None:
        """Forget what was to come of this attempt; the next begins with the tokens the client has."""
        self.attempt += 1
        self.record.num_attempts += 1
        self.num_known = len(self.record.tokens)
        self.route, self.pinned, self.ended, self.writer = None, None, None, ""
        self.early.clear()
        self.told.clear()

    def reason_to_end(self, max_len: int) -> FinishReason | None:
        """Why no further token will come, should the last one have come and its worker died before it could say so."""
        tokens, params = self.record.tokens, self.params
        if tokens and tokens[-1] in self.stop_ids and len(tokens) >= params.min_tokens:
            return FinishReason.STOP
        if len(tokens) >= params.max_tokens or len(self.prompt) + len(tokens) >= max_len:
            return FinishReason.LENGTH
        return None


class Ledger:
    """All live requests. `over` is told the complete Record of each that ends, once, however it ends.

    `counts`: started == done + failed + expired + aborted + len(ledger); how many were retried; and how many were
    `refused`, that is never opened, which the caller counts.
    """

    def __init__(self, over: Callable[[Record], None] = lambda record: None) -> None:
        self._live: dict[str, Live] = {}
        self._over = over
        self._deadlines: list[tuple[float, str]] = []  # a heap; requests that have none are not in it
        names = ("started", "done", "failed", "expired", "aborted", "retried", "refused")
        self.counts: Counter[str] = Counter(dict.fromkeys(names, 0))

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def __getitem__(self, request_id: str) -> Live:
        return self._live[request_id]

    def open(self, live: Live) -> None:
        """A request begins."""
        self._live[live.record.request_id] = live
        self.counts["started"] += 1
        if live.deadline < math.inf:
            heappush(self._deadlines, (live.deadline, live.record.request_id))

    def close(self, request_id: str, reason: FinishReason, error: str = "", *, expired: bool = False) -> Live | None:
        """The request is over: its record is complete. None when it was over already."""
        live = self._live.pop(request_id, None)
        if live is None:
            return None
        outcome = {FinishReason.ABORT: "aborted", FinishReason.ERROR: "failed"}.get(reason, "done")
        self.counts["expired" if expired else outcome] += 1
        live.record.finish_reason, live.record.error = reason, error
        live.record.output_len = len(live.record.token_at)
        self._over(live.record)
        return live

    def overdue(self, now: float) -> list[str]:
        """Requests whose deadline has passed; each is named once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heappop(self._deadlines)
            if request_id in self._live:
                late.append(request_id)
        return late

    def that_need(self, worker: str) -> list[str]:
        """Requests that cannot go on without this worker, oldest first."""
        return [request_id for request_id, live in self._live.items() if live.needs(worker)]

    def take(self, message: m.Progress, now: float) -> News:
        """What a worker's steps brought, at time `now`."""
        news = News([], [], [])
        fresh: dict[str, list[m.NewToken]] = {}
        for token in message.tokens:
            live = self._live.get(token.id)
            if live is not None and token.attempt == live.attempt:
                fresh.setdefault(token.id, []).extend(_in_order(live, token, message.worker, now))
                if len(live.record.token_at) > live.num_known >= token.index:
                    news.prefilled.append(token.id)
        over = self._endings(message.worker, message.ended, news)
        for request_id in {**fresh, **dict.fromkeys(over)}:
            tokens = fresh.get(request_id, [])
            record = self._finished(self._live[request_id])
            if tokens or record is not None:
                update = Update(request_id, [t.token for t in tokens], [t.logprobs for t in tokens], record)
                news.updates.append(update)
        return news

    def _endings(self, worker: str, endings: Iterable[m.Ended], news: News) -> list[str]:
        """Note what ended on a worker; returns the requests concerned."""
        over = []
        for ended in endings:
            live = self._live.get(ended.id)
            if live is None or ended.attempt != live.attempt:
                continue
            if ended.retryable and live.writer in ("", worker):
                news.retry.append((ended.id, ended.error))
                continue
            live.record.merge(ended.facts)
            live.told.add(worker)
            if not ended.retryable:  # else it goes on at its writer
                live.ended = ended
            over.append(ended.id)
        return over

    def _finished(self, live: Live) -> Record | None:
        """The Record, if all that will come has come."""
        ended, record = live.ended, live.record
        if ended is None or live.route is None:
            return None
        reason = FinishReason(ended.reason)
        complete = len(record.token_at) >= ended.num_output and live.route.prefill in live.told
        if not complete and reason is not FinishReason.ERROR:
            return None
        self.close(record.request_id, reason, ended.error)
        return record


def _in_order(live: Live, token: m.NewToken, worker: str, now: float) -> list[m.NewToken]:
    """Take in a token; returns those the client can have now."""
    record = live.record
    if token.facts is not None:
        record.merge(token.facts)
        live.told.add(worker)
    if token.index > live.num_known:
        live.writer = record.decode_worker = worker
    live.early[token.index] = token
    ready = []
    while (token_now := live.early.pop(len(record.token_at), None)) is not None:
        record.token_at.append(now)
        record.tokens.append(token_now.token)
        ready.append(token_now)
    return ready
