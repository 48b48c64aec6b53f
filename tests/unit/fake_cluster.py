"""A deployment that knows the truth: one prefill server, unlimited decode, fixed times, on a clock it moves itself."""

import heapq
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from disagg.clock import ManualClock
from disagg.config import Deployment, EngineSpec
from disagg.record import Record
from disagg.request import SamplingParams


class Update(NamedTuple):
    request_id: str
    tokens: list[int]
    record: Record | None


class FakeCluster:
    """Prefill takes `prefill_s`, one request after the other; then the hand-off; then a token every `gap_s`.

    Token number i of a prompt is (sum of the prompt + i) modulo the vocabulary, on every arm, unless `wrong_tokens`.
    `submit_s` is what sending costs the client. Requests whose index is in `stuck` never end; those in `failing` fail.
    """

    def __init__(
        self,
        deployment: Deployment,
        engine: EngineSpec,
        clock: ManualClock,
        *,
        prefill_s: float = 0.010,
        gap_s: float = 0.002,
        handoff_s: float = 0.003,
        submit_s: float = 0.0,
        stuck: frozenset[int] = frozenset(),
        failing: frozenset[int] = frozenset(),
        wrong_tokens: bool = False,
    ) -> None:
        self.info = SimpleNamespace(spec=SimpleNamespace(vocab_size=1000, max_len=512, eos_ids=(7,)))
        self.engine = EngineSpec(max_len=512, max_batch_tokens=engine.max_batch_tokens)
        self.asked = engine
        self.num_pages = 1000
        self.deployment, self.clock = deployment, clock
        self.prefill_s, self.gap_s, self.submit_s = prefill_s, gap_s, submit_s
        self.handoff_s = handoff_s if deployment.disaggregated else 0.0
        self.stuck, self.failing, self.wrong_tokens = stuck, failing, wrong_tokens
        self.sent: list[tuple[int, float]] = []  # what was submitted, and when: (index, moment)
        self.closed = False
        self._live: dict[str, Record] = {}
        self._events: list[tuple[float, int, str]] = []
        self._free_at = 0.0

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, scheduled_at: float | None = None, index: int = 0
    ) -> str:
        assert params.greedy
        assert params.ignore_eos
        assert 7 not in prompt
        now = self.clock.now()
        self.clock.advance(self.submit_s)
        request_id = f"{self.deployment.name}-{len(self.sent)}"
        self.sent.append((index, now))
        start_at = max(now, self._free_at)
        self._free_at = prefill_end = start_at + self.prefill_s
        first = sum(prompt) + self.wrong_tokens
        record = Record(
            request_id=request_id,
            index=index,
            prompt_len=len(prompt),
            max_tokens=params.max_tokens,
            prefill_worker=self.deployment.workers[0].name,
            decode_worker=self.deployment.workers[-1].name,
            scheduled_at=now if scheduled_at is None else scheduled_at,
            sent_at=now,
            queued_at=now,
            prefill_start_at=start_at,
            prefill_end_at=prefill_end,
            prefill_busy_s=self.prefill_s,
        )
        if self.handoff_s:
            record.handoff_start_at = prefill_end
            record.handoff_end_at = record.decode_start_at = prefill_end + self.handoff_s
            record.handoff_busy_s, record.handoff_bytes = self.handoff_s, 1000 * len(prompt)
        self._live[request_id] = record
        if index in self.stuck:
            return request_id
        for number in range(params.max_tokens):
            at = prefill_end + number * self.gap_s + (self.handoff_s if number else 0)
            heapq.heappush(self._events, (at, (first + number) % 1000, request_id))
        return request_id

    def poll(self, timeout_s: float) -> list[Update]:
        until = self.clock.now() + timeout_s
        if self._events:
            until = min(until, max(self._events[0][0], self.clock.now()))
        self.clock.sleep_until(until)
        updates = []
        while self._events and self._events[0][0] <= self.clock.now():
            at, token, request_id = heapq.heappop(self._events)
            if request_id in self._live:
                updates.append(self._token(request_id, at, token))
        return updates

    def _token(self, request_id: str, at: float, token: int) -> Update:
        record = self._live[request_id]
        if record.index in self.failing:
            record.finish_reason, record.error = "error", "out of luck"
        else:
            record.token_at.append(at)
            record.tokens.append(token)
            if len(record.tokens) == record.max_tokens:
                record.finish_reason, record.output_len = "length", len(record.tokens)
                record.decode_busy_s = record.token_at[-1] - record.token_at[0]
        over = bool(record.finish_reason)
        return Update(request_id, [token], self._live.pop(request_id) if over else None)

    def abort(self, request_id: str) -> Record | None:
        record = self._live.pop(request_id, None)
        if record is not None:
            record.finish_reason = "abort"
            self._free_at = max((each.prefill_end_at or 0 for each in self._live.values()), default=0.0)
        return record

    def close(self) -> None:
        self.closed = True
