"""What the runner for GPUs tells the model, with a model that believes nothing else.

It keeps each position's token in the slot it is told, reads a request's tokens back through the page table it is told,
and refuses a step whose arrays contradict each other. Its next token depends on all of them.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from disagg.cache.pages import PagePool
from disagg.clock import WallClock
from disagg.engine.engine import Engine
from disagg.engine.graphs import ladder
from disagg.engine.runner_cuda import CudaRunner
from disagg.engine.scheduler import Scheduler
from disagg.model.ops import Step
from disagg.request import Request, SamplingParams

VOCABULARY, PAGE_SIZE, MAX_LEN = 50, 4, 64


def next_token(tokens: list[int]) -> int:
    return sum((place + 1) * (token + 1) for place, token in enumerate(tokens)) % VOCABULARY


class Believer:
    """The model. Poisoned slots are -1."""

    def __init__(self, num_pages: int) -> None:
        self.kept = torch.full((num_pages * PAGE_SIZE,), -1)
        self.steps: list[Step] = []

    def forward(self, step: Step, pages: object) -> torch.Tensor:
        self.steps.append(step)
        real = step.slots >= 0
        self.kept[step.slots[real]] = step.tokens[real]
        starts, contexts = step.query_start.tolist(), step.context_len.tolist()
        assert starts[-1] == len(step.tokens)
        assert max(contexts) <= step.max_context_len
        assert max(b - a for a, b in itertools.pairwise(starts)) <= step.max_query_len
        found = {}
        for row, context in enumerate(contexts):
            rows = range(starts[row], starts[row + 1])
            if context == 0:
                assert not real[rows].any(), "a padded row writes nothing"
                continue
            assert step.positions[rows].tolist() == list(range(context - len(rows), context))
            table = step.page_table[row].tolist()
            places = [table[n // PAGE_SIZE] * PAGE_SIZE + n % PAGE_SIZE for n in range(context)]
            assert step.slots[rows].tolist() == places[context - len(rows) :]
            seen = self.kept[places].tolist()
            assert -1 not in seen, "a position is read that was not written"
            found[rows[-1]] = next_token(seen)
        wanted = range(len(step.tokens)) if step.last is None else step.last.tolist()
        logits = torch.zeros(len(wanted), VOCABULARY)
        for index, row in enumerate(wanted):
            logits[index, found.get(row, 0)] = 1.0
        return logits


def oracle(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_model_is_told_the_truth(seed):
    """Chunks, decodes, preemption, slots that are given away and padding to a ladder: the tokens are the oracle's."""
    rng = random.Random(seed)
    num_pages, max_running = 24, 5
    model = Believer(num_pages)
    runner = CudaRunner(
        SimpleNamespace(spec=None, model=model, device="cpu"),
        SimpleNamespace(page_size=PAGE_SIZE, pages=None),
        max_running=max_running, max_batch_tokens=13, max_len=MAX_LEN,
    )  # fmt: skip
    runner._graphs.sizes = [2, 4, 5]  # as on a GPU: steps are padded to these
    pool = PagePool(num_pages, PAGE_SIZE)
    scheduler = Scheduler(pool, max_batch_tokens=13, max_running=max_running, max_len=MAX_LEN)
    engine = Engine("test", scheduler, runner, WallClock())
    wanted = []
    for number in range(25):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 25))
        wanted.append(Request(str(number), len(prompt), prompt, params, frozenset(), float(number)))
    expected = {r.id: oracle(r.tokens, r.params.max_tokens) for r in wanted}
    waiting = list(wanted)
    while not scheduler.is_idle or waiting:
        if waiting and rng.random() < 0.5:
            scheduler.add(waiting.pop(0))
        engine.step(lambda batch: None)
    assert {r.id: r.tokens for r in wanted} == expected
    assert sum(r.num_preemptions for r in wanted) > 0
    assert {len(step.context_len) for step in model.steps if step.max_query_len == 1 and step.last is None} <= {2, 4, 5}


def test_ladder_ends_at_the_largest_batch():
    """Ascending, without repeats, dense where padding would cost, and never beyond what can run."""
    for largest in (1, 3, 64, 100, 256, 512):
        sizes = ladder(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert all(above <= 2 * below for below, above in itertools.pairwise(sizes))
