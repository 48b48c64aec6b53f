"""One worker's loop body: plan, run, commit; and the ledger of what each request took.

The engine knows nothing of sockets or of other workers. What it hands back is what happened in one step.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from disagg.clock import Clock
from disagg.engine.batch import Batch, Output, TokenLogprobs
from disagg.engine.scheduler import Scheduler
from disagg.record import Facts, Span
from disagg.request import FinishReason, Request


class Runs(Protocol):
    """Computes a batch: the model on a device, or in the simulator a cost model that advances the clock."""

    def run(self, batch: Batch) -> Output:
        """One token for each of `batch.sampling()`."""
        ...


class Stepped(NamedTuple):
    """What one step did. `tokens` are in the order they were sampled, one per request at most."""

    batch: Batch
    tokens: list[tuple[Request, int, TokenLogprobs | None]]
    finished: list[Request]
    holding: list[Request]  # prompts done for another worker; their pages stay until the hand-off releases them


class Engine:
    """Scheduler and runner under one clock, with a Facts per live request in `ledger`."""

    def __init__(self, name: str, scheduler: Scheduler, runner: Runs, clock: Clock) -> None:
        self.name = name
        self.scheduler = scheduler
        self.ledger: dict[str, Facts] = {}
        self._runner = runner
        self._clock = clock

    def step(self, before: Callable[[Batch], None]) -> Stepped | None:
        """One step, or None when there is nothing to do. `before` sees the batch before it is computed."""
        batch = self.scheduler.plan()
        if batch is None:
            return None
        before(batch)
        start = self._clock.now()
        output = self._runner.run(batch)
        self._account(batch, start, self._clock.now())
        sampling = batch.sampling()
        committed = self.scheduler.commit(batch, output)
        tokens = [
            (request, token, logprobs)
            for request, token, logprobs in zip(sampling, output.tokens, output.logprobs, strict=True)
            if request.finish_reason is not FinishReason.ABORT
        ]
        return Stepped(batch, tokens, committed.finished, committed.holding)

    def _account(self, batch: Batch, start: float, end: float) -> None:
        """Split the step's time over its tokens. Requests aborted meanwhile have left the ledger."""
        share = (end - start) / batch.num_tokens
        ledger = self.ledger
        for request in batch.decodes:
            if (facts := ledger.get(request.id)) is not None:
                if facts.decode_start_at is None:
                    facts.decode_start_at = start
                facts.decode_busy_s += share
        for chunk in batch.chunks:
            if (facts := ledger.get(chunk.request.id)) is not None:
                if facts.prefill_start_at is None:
                    facts.prefill_start_at = start
                    facts.num_cached = chunk.request.num_cached
                facts.prefill_busy_s += share * chunk.length
                facts.spans.append(Span("prefill", self.name, start, end, chunk.length))
                if chunk.samples and facts.prefill_end_at is None:
                    facts.prefill_end_at = end
        for request in batch.preempted:
            if (facts := ledger.get(request.id)) is not None:
                facts.num_preemptions += 1
