"""One worker's loop body: plan, launch, collect, commit; and the ledger of what each request took.

The engine knows nothing of sockets or of other workers. What it hands back is what happened in one step.

With a runner that can run `ahead`, the next step is launched before the tokens of the last one are collected, so that
the device need not wait for the host:

    host      plan 2, launch 2 | collect 1, commit 1, report | slack: messages | plan 3, launch 3 | collect 2 ...
    device    ...... step 1 ...| step 2 .........................................................| step 3 ...

A prompt that arrives after a plan was made waits for that step, too. So the plan is made as late as the device allows:
`slack_s` says how long the caller may do other things first.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from disagg.clock import Clock
from disagg.engine.batch import Batch, Output, TokenLogprobs
from disagg.engine.scheduler import Scheduler
from disagg.record import Facts, Span
from disagg.request import Request, Status

Collect = Callable[[], Output]
"""Waits for a launched batch: one token for each of its `sampling()`. Called once, in the order of the launches."""


class Runs(Protocol):
    """Computes batches: the model on a device, or in the simulator a cost model that advances the clock.

    `ahead`: whether it can start a batch on tokens that the one before is still sampling, without waiting for them.
    """

    ahead: bool

    def launch(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Collect:
        """Start `batch`, as its requests are now.

        `shed` may be called while it is computed, by the thread that launched it. True: requests have left `batch`,
        which must not be computed any more, since their pages are free.
        """
        ...

    def busy(self) -> bool:
        """Whether the batch launched last is still being computed; asked only of those that run `ahead`."""
        ...


_LEAD_S = 0.001  # a step is launched this long before the one ahead of it is expected to end
_SURE = 0.9  # the share of a step's expected time that is counted on


class _Flight(NamedTuple):
    batch: Batch
    num_tokens: int  # as it was launched: requests may leave it
    collect: Collect
    launched_at: float


class Stepped(NamedTuple):
    """What one step did, the oldest in flight. `tokens` are in the order they were sampled, one per request at most."""

    batch: Batch
    tokens: list[tuple[Request, int, TokenLogprobs | None]]
    finished: list[Request]
    holding: list[Request]  # prompts done for another worker; their pages stay until the hand-off releases them


def _kind(batch: Batch) -> tuple[bool, int]:
    """Steps that take about equally long: with or without chunks, and the power of two of their positions."""
    return bool(batch.chunks), batch.num_tokens.bit_length()


class Engine:
    """Scheduler and runner under one clock, with a Facts per live request in `ledger`."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        runner: Runs,
        clock: Clock,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`meanwhile()` is called now and then during a long step, if the runner can shed: it may abort requests."""
        self.name = name
        self.scheduler = scheduler
        self.ledger: dict[str, Facts] = {}
        self._runner = runner
        self._clock = clock
        self._meanwhile = meanwhile
        self._flying: deque[_Flight] = deque()
        self._collected_at = -math.inf
        self._pace: dict[tuple[bool, int], float] = {}  # seconds of steps of a kind, see `_kind`
        self._launch_s = 0.0  # the host took to plan and launch the last step
        self.step_s = 0.0  # of the last step collected

    def slack_s(self) -> float:
        """Seconds for which the next plan had better wait, because the device is busy and a request may come."""
        if not self._runner.ahead or len(self._flying) != 1 or not self._runner.busy():
            return 0.0
        batch, _, _, launched_at = self._flying[0]
        expected_s = self._pace.get(_kind(batch), 0.0)
        due = max(launched_at, self._collected_at) + _SURE * expected_s - self._launch_s - _LEAD_S
        return max(0.0, due - self._clock.now())

    def step(self, before: Callable[[Batch], None]) -> Stepped | None:
        """One step, or None when there is nothing to do: for a caller to whom nothing comes meanwhile."""
        self.launch(before, late=False)
        return self.collect()

    def launch(self, before: Callable[[Batch], None], late: bool = True) -> bool:
        """Plan and start what there is room for in flight; if `late`, not before it is time (`slack_s`).

        `before` sees each batch before it is launched. True: it is not time yet, and there is nothing to collect.
        """
        scheduler, runner, flying = self.scheduler, self._runner, self._flying
        while len(flying) <= runner.ahead:
            if late and self.slack_s() > 0:
                return True
            begun_at = self._clock.now()
            if (batch := scheduler.plan(runner.ahead)) is None:
                break
            before(batch)
            launched_at = self._clock.now()
            flying.append(_Flight(batch, batch.num_tokens, runner.launch(batch, self._shed), launched_at))
            self._launch_s = self._clock.now() - begun_at
        return False

    def _shed(self) -> bool:
        """What was aborted since the step began leaves it. Whether there was any."""
        self._meanwhile()
        return self.scheduler.shed()

    def collect(self) -> Stepped | None:
        """Wait for the oldest step in flight; None if there is none."""
        if not self._flying:
            return None
        batch, num_tokens, collect, launched_at = self._flying.popleft()
        output = collect()
        start, self._collected_at = max(launched_at, self._collected_at), self._clock.now()
        self.step_s = self._collected_at - start
        # towards the fastest of late: a plan that comes too early costs little, one too late lets the device idle
        self._pace[_kind(batch)] = min(self.step_s, 1.1 * self._pace.get(_kind(batch), self.step_s))
        self._account(batch, num_tokens, start, self._collected_at)
        tokens = [
            (request, token, logprobs)
            for request, token, logprobs in zip(batch.sampling(), output.tokens, output.logprobs, strict=True)
            if request.status is Status.RUNNING  # others ended while it was in flight
        ]
        committed = self.scheduler.commit(batch, output)
        return Stepped(batch, tokens, committed.finished, committed.holding)

    def _account(self, batch: Batch, num_tokens: int, start: float, end: float) -> None:
        """Split the step's time over its tokens. Requests that ended meanwhile have left the ledger, or the batch."""
        share = (end - start) / num_tokens
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
