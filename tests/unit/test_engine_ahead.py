"""The engine with steps launched ahead: the same tokens as one step at a time, whatever the device does meanwhile.

The runner for GPUs runs here on a CPU: all of its code but the kernels and the graphs.
"""

import random
from collections.abc import Callable

import pytest
from torch import Tensor

from disagg.cache.pages import PagePool
from disagg.cache.storage import KVStorage
from disagg.clock import ManualClock, WallClock
from disagg.engine.batch import Batch, Output
from disagg.engine.engine import Engine
from disagg.engine.graphs import Shapes
from disagg.engine.runner import Runner
from disagg.engine.runner_cuda import CudaRunner
from disagg.engine.scheduler import Scheduler
from disagg.model.load import Loaded, load_model
from disagg.model.ops import ReferenceOps, Step
from disagg.request import FinishReason, Request, SamplingParams
from disagg.testing import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_PAGES, MAX_LEN, MAX_RUNNING, CHUNK = 13, 96, 6, 40


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    return load_model(str(tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))))


def storage(loaded: Loaded) -> KVStorage:
    spec = loaded.spec
    return KVStorage(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, page_size=16,
        num_pages=NUM_PAGES,
    )  # fmt: skip


def ahead(loaded: Loaded) -> CudaRunner:
    runner = CudaRunner(loaded, storage(loaded), max_running=MAX_RUNNING, max_batch_tokens=CHUNK, max_len=MAX_LEN)
    runner.warm_up()
    return runner


def wishes(seed: int) -> list[Request]:
    """Short and long, greedy and drawn, filtered, penalised, stopping early, with and without log-probabilities."""
    rng = random.Random(seed)
    kinds: list[dict] = [
        {"temperature": 0}, {"temperature": 0.8}, {"top_k": 20}, {"top_p": 0.7, "min_p": 0.01},
        {"temperature": 0, "repetition_penalty": 1.3}, {"temperature": 0, "logprobs": 3}, {"frequency_penalty": 0.4},
    ]  # fmt: skip
    found = []
    for number in range(14):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 60))]
        stops = frozenset(rng.sample(range(300), 40)) if number % 3 == 0 else frozenset()
        params = SamplingParams(**kinds[number % len(kinds)], max_tokens=rng.randint(1, 30), min_tokens=1, seed=number)
        found.append(Request(str(number), len(prompt), prompt, params, stops, float(number)))
    return found


def serve(runner: Runner | CudaRunner, requests: list[Request], abort: str | None = None):
    """Tokens, finish reasons and log-probabilities of all requests, in the order they were reported."""
    pool = PagePool(NUM_PAGES, 16)
    scheduler = Scheduler(pool, max_batch_tokens=CHUNK, max_running=MAX_RUNNING, max_len=MAX_LEN)
    engine = Engine("test", scheduler, runner, WallClock())
    for request in requests:
        scheduler.add(request)
    reported: dict[str, list[int]] = {request.id: [] for request in requests}
    logprobs = {}
    while (stepped := engine.step(lambda batch: None)) is not None:
        for request, token, found in stepped.tokens:
            reported[request.id].append(token)
            if found is not None:
                logprobs[request.id, len(reported[request.id])] = found
        if abort is not None and len(reported[abort]) == 2:
            scheduler.abort(abort)
        scheduler.check()
    assert scheduler.is_idle
    assert pool.counts().held == 0
    assert all(request.tokens[request.prompt_len :] == reported[request.id] for request in requests)
    return reported, {request.id: request.finish_reason for request in requests}, logprobs


def test_tokens_are_those_of_one_step_at_a_time(loaded):
    """Greedy and seeded, with stops, penalties, filters, chunks and preemption: launching ahead changes no token."""
    runner, plain = ahead(loaded), Runner(loaded, storage(loaded))
    preempted = 0
    for seed in range(2):
        ours, theirs = wishes(seed), wishes(seed)
        tokens, reasons, logprobs = serve(runner, ours)
        expected, why, numbers = serve(plain, theirs)
        assert tokens == expected
        assert reasons == why
        assert FinishReason.STOP in reasons.values()
        assert logprobs.keys() == numbers.keys()
        for key, found in logprobs.items():
            assert found.chosen == pytest.approx(numbers[key].chosen, abs=1e-4)
            assert [token for token, _ in found.top] == [token for token, _ in numbers[key].top]
        preempted += sum(request.num_preemptions for request in ours)
    assert preempted > 0, "the pool was meant to be too small"


def test_padding_changes_no_token(tmp_path):
    """Steps padded as on a GPU, where rows belong to nobody and sequences have none: the tokens of the plain runner.

    With the reference operations, because those for CPUs take no padding.
    """
    loaded = load_model(str(tiny_checkpoint("qwen3", tmp_path)), ops=ReferenceOps())
    places = 2 * MAX_RUNNING  # with those for chunks more than there are rows in the smallest shape
    runner = CudaRunner(loaded, storage(loaded), max_running=places, max_batch_tokens=CHUNK, max_len=MAX_LEN)
    runner._shapes = Shapes(places, CHUNK - 3)
    runner.warm_up(sizes=())
    seen = set()
    forward = loaded.model.forward

    def watched(step: Step, pages: Tensor) -> Tensor:
        several = (step.context_len[step.num_decodes :] > 0).sum() > 1
        seen.add((len(step.tokens), step.num_decodes, bool(several)))
        return forward(step, pages)

    loaded.model.forward = watched
    ours, theirs = wishes(3), wishes(3)
    tokens, reasons, _ = serve(runner, ours)
    loaded.model.forward = forward
    expected, why, _ = serve(Runner(loaded, storage(loaded)), theirs)
    assert (tokens, reasons) == (expected, why)
    assert sum(request.num_preemptions for request in ours) > 0
    assert {(16, places, False), (32, places, False), (37, places, True)} <= seen, "one chunk and several"
    assert CHUNK in {rows for rows, _, _ in seen}, "some steps are not padded"


def test_abort_in_the_middle_leaves_the_others_alone(loaded):
    """A request that is aborted while two of its steps are in flight takes nothing with it."""
    tokens, reasons, _ = serve(ahead(loaded), wishes(7), abort="1")
    expected, _, _ = serve(Runner(loaded, storage(loaded)), wishes(7))
    assert (len(tokens["1"]), reasons["1"]) == (2, FinishReason.ABORT)
    assert {name: got for name, got in tokens.items() if name != "1"} == {
        name: got for name, got in expected.items() if name != "1"
    }


class Device:
    """Steps end one after the other; `took_s` says how long each takes."""

    ahead = True

    def __init__(self, clock: ManualClock, took_s: Callable[[Batch], float]) -> None:
        self._clock, self._took_s, self._ends, self.idle_s = clock, took_s, 0.0, 0.0

    def launch(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Callable[[], Output]:
        self.idle_s += max(0.0, self._clock.now() - self._ends)
        self._ends = end = max(self._ends, self._clock.now()) + self._took_s(batch)

        def collect() -> Output:
            self._clock.sleep_until(end)
            count = len(batch.sampling())
            return Output([7] * count, [None] * count)

        return collect

    def busy(self) -> bool:
        return self._clock.now() < self._ends


class Served:
    """An engine on a Device, and what was planned when."""

    def __init__(self, took_s: Callable[[Batch], float]) -> None:
        self.clock = ManualClock()
        self.device = Device(self.clock, took_s)
        self.scheduler = Scheduler(PagePool(640, 16), max_batch_tokens=1024, max_running=8, max_len=2048)
        self.engine = Engine("test", self.scheduler, self.device, self.clock)
        self.planned: list[tuple[float, list[str]]] = []

    def add(self, name: str, prompt_len: int, max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.scheduler.add(Request(name, prompt_len, [1] * prompt_len, params, frozenset(), self.clock.now()))

    def step(self) -> bool:
        """As a worker does it, which looks again every millisecond."""
        while self.engine.launch(self._before):
            self.clock.advance(min(self.engine.slack_s(), 0.001))
        return self.engine.collect() is not None

    def _before(self, batch: Batch) -> None:
        names = [request.id for request in (*batch.decodes, *(chunk.request for chunk in batch.chunks))]
        self.planned.append((self.clock.now(), names))


def test_a_request_that_comes_during_a_step_is_in_the_next_one() -> None:
    """While a step runs, the next is not planned before it must be; then it has the request, and the device no gap."""
    served = Served(lambda batch: 0.010)
    served.add("early", 3, 12)
    assert served.engine.slack_s() == 0
    for _ in range(3):
        served.step()
    assert served.engine.step_s == pytest.approx(0.010)
    start = served.clock.now()
    slack = served.engine.slack_s()
    assert 0 < slack < 0.010
    served.clock.advance(slack / 2)
    served.add("late", 3, 12)
    served.step()
    assert served.planned[-1][1] == ["early", "late"]
    assert start < served.planned[-1][0] < start + 0.020
    while served.step():
        pass
    assert served.device.idle_s == 0


def test_a_plan_waits_for_no_step_that_has_ended() -> None:
    """Whatever is expected, after steps a hundred times slower and of all lengths, a gap is 1 ms at most."""
    slow = iter([1.0] * 6)
    served = Served(lambda batch: next(slow, 0.005 + 20e-6 * batch.num_tokens))
    served.add("first", 3, 300)
    for number in range(200):
        if number % 9 == 0:
            served.add(f"more {number}", 1 + 131 * number % 1900, 2)
        before = served.device.idle_s
        served.step()
        assert served.device.idle_s - before < 0.0011
    assert served.device.idle_s < 0.010
