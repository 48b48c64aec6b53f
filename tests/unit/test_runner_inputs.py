"""What the runner for GPUs tells the model, with a model that believes nothing else.

It keeps each position's token in the slot it is told, reads a request's tokens back through the page table it is told,
and refuses a step whose arrays contradict each other. Its next token depends on all of them.
"""

import itertools
import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from disagg.cache.pages import PagePool
from disagg.clock import WallClock
from disagg.engine.engine import Engine
from disagg.engine.graphs import MOST_CHUNKS, Shape, Shapes, ladder
from disagg.engine.packing import Packed
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
        assert starts[-1] <= len(step.tokens)
        assert not real[starts[-1] :].any(), "a row of nobody writes nothing"
        assert max(contexts) <= step.max_context_len
        assert 0 <= max(b - a for a, b in itertools.pairwise(starts)) <= (step.max_query_len or len(step.tokens))
        assert starts == list(range(len(starts))) or step.max_query_len != 1
        assert step.num_decodes <= len(step.tokens), "attention of decodes writes so many rows"
        found = {}
        for row, context in enumerate(contexts):
            rows = range(starts[row], starts[row + 1])
            if context == 0:
                assert not real[rows].any(), "a padded row writes nothing"
                continue
            assert row >= step.num_decodes or rows == range(row, row + 1)
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


class Limits(NamedTuple):
    running: int
    tokens: int
    padded: int  # most rows of a padded step with chunks
    longest: int  # prompt
    rush: float  # how likely it is that another request comes before the next step


FEW, MANY = Limits(5, 13, 13, 20, 0.4), Limits(20, 40, 33, 12, 0.95)


def serve(seed: int, limits: Limits, padded: bool, kind: type[CudaRunner] = CudaRunner) -> list[Step]:
    """The model's steps of a few requests on too few pages, when all tokens were the oracle's."""
    rng = random.Random(seed)
    num_pages = 24
    model = Believer(num_pages)
    runner = kind(
        SimpleNamespace(spec=None, model=model, device="cpu"),
        SimpleNamespace(page_size=PAGE_SIZE, pages=None),
        max_running=limits.running, max_batch_tokens=limits.tokens, max_len=MAX_LEN,
    )  # fmt: skip
    if padded:  # as on a GPU
        runner._shapes = Shapes(limits.running, limits.padded)
    pool = PagePool(num_pages, PAGE_SIZE)
    scheduler = Scheduler(pool, max_batch_tokens=limits.tokens, max_running=limits.running, max_len=MAX_LEN)
    engine = Engine("test", scheduler, runner, WallClock())
    wanted = []
    for number in range(25):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, limits.longest))]
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 25))
        wanted.append(Request(str(number), len(prompt), prompt, params, frozenset(), float(number)))
    expected = {r.id: oracle(r.tokens, r.params.max_tokens) for r in wanted}
    waiting = list(wanted)
    while not scheduler.is_idle or waiting:
        if waiting and rng.random() < limits.rush:
            scheduler.add(waiting.pop(0))
            continue
        engine.step(lambda batch: None)
    assert {r.id: r.tokens for r in wanted} == expected
    assert sum(r.num_preemptions for r in wanted) > 0
    return model.steps


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("limits", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("seed", range(4))
def test_model_is_told_the_truth(seed, limits, padded):
    """Chunks, decodes, preemption, slots that are given away and padding to a ladder: the tokens are the oracle's."""
    steps = serve(seed, limits, padded)
    if not padded:
        return
    alone = {len(step.context_len) for step in steps if step.max_query_len == 1}
    assert alone <= set(ladder(limits.running))
    mixed = [step for step in steps if step.max_query_len != 1]
    known = {shape[:3] for shape in Shapes(limits.running, limits.padded).all()}
    shapes = {(len(step.tokens), step.num_decodes, len(step.context_len) - step.num_decodes) for step in mixed}
    assert len(shapes & known) > 1
    for rows, decodes, chunks in shapes - known:
        assert rows > limits.padded or chunks > MOST_CHUNKS, f"{rows, decodes, chunks} should be padded"
    assert (shapes <= known) == (limits is FEW), "not all steps of many are padded"


def test_what_a_graph_reads_stays_in_its_place():
    """Whatever is in a step, its arrays lie where those of any other step of its shape lie."""
    places: dict[Shape, set[tuple]] = {}
    counts: dict[Shape, int] = {}

    class Watched(CudaRunner):
        def _forward(self, packed: Packed) -> torch.Tensor:
            found = tuple((place.at, place.shape, place.dtype) for place in packed[1:])
            places.setdefault(packed.shape, set()).add(found)
            counts[packed.shape] = counts.get(packed.shape, 0) + 1
            return super()._forward(packed)

    serve(0, MANY, True, Watched)
    assert all(len(found) == 1 for found in places.values())
    assert max(counts[shape] for shape in counts if shape.chunks) > 5


def test_every_shape_is_captured_and_holds_its_steps():
    """Of all steps that there can be, the padded ones find their shape among those that are captured."""
    for running, rows in ((1, 1), (3, 20), (16, 16), (40, 512), (100, 128), (256, 8192)):
        shapes = Shapes(running, rows)
        known = shapes.all()
        assert len(set(known)) == len(known)
        found = set()
        for decodes in range(running):
            for chunks, length in itertools.product((1, 2, MOST_CHUNKS), (*range(1, 40), *range(40, 520, 8))):
                if decodes + chunks > running or chunks > length:
                    continue
                shape = shapes.of(decodes, chunks, decodes + length)
                if shape is None:
                    assert decodes + length > min(rows, 512)
                    continue
                assert decodes <= shape.decodes <= shape.rows
                assert decodes + length <= shape.rows <= rows
                assert shape.logits == shape.decodes + shape.chunks
                found.add(shape)
        found |= {shapes.of(decodes, 0, decodes) for decodes in range(1, running + 1)}
        assert found == set(known)
        assert shapes.of(0, MOST_CHUNKS + 1, MOST_CHUNKS + 1) is None


def test_ladder_ends_at_the_largest_batch():
    """Ascending, without repeats, dense where padding would cost, and never beyond what can run."""
    for largest in (1, 3, 64, 100, 256, 512):
        sizes = ladder(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert all(above <= 2 * below for below, above in itertools.pairwise(sizes))
