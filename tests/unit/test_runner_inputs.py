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
from disagg.engine.batch import Batch, Chunk
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
        assert rows > limits.padded or chunks > MOST_CHUNKS, f"{rows, decodes, chunks} has no graph"
        assert decodes in {places for _, places, _ in known}
    assert (shapes <= known) == (limits is FEW), "not all steps of many have graphs"


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
    """All steps that there can be, but long ones and those with many chunks, find their shape among the captured."""
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
                assert decodes <= shape.decodes <= shape.rows
                assert decodes + length <= shape.rows
                assert decodes + chunks <= shape.logits <= running
                if decodes + length <= min(rows, 512):
                    assert shape.rows <= rows
                    found.add(shape)
                else:
                    assert shape.rows == decodes + length
        found |= {shapes.of(decodes, 0, decodes) for decodes in range(1, running + 1)}
        assert found == set(known)
        assert shapes.of(0, MOST_CHUNKS + 1, MOST_CHUNKS + 1).chunks == MOST_CHUNKS + 1


class Recorder(CudaRunner):
    """Without a model, padded as on a GPU, for prompts of up to 64 tokens."""

    def __init__(self, running: int, tokens: int) -> None:
        self.ran: set[Shape] = set()
        super().__init__(
            SimpleNamespace(spec=None, model=None, device="cpu"), SimpleNamespace(page_size=PAGE_SIZE),
            max_running=running, max_batch_tokens=tokens, max_len=MAX_LEN,
        )  # fmt: skip
        self._shapes = Shapes(running, tokens)

    def _forward(self, packed: Packed) -> torch.Tensor:
        self.ran.add(packed.shape)
        return torch.zeros(packed.shape.logits, VOCABULARY)


def kernel_of(rows: int) -> int:
    """Kernels for products are compiled for one row, and for the next power of two of up to 128; above, a library's."""
    return 1 if rows == 1 else min(256, max(16, 1 << (rows - 1).bit_length()))


@pytest.mark.parametrize("tokens", [17, 40, 512, 600, 8192])
@pytest.mark.parametrize("running", [1, 12, 24, 64, 256, 700])
def test_whatever_kernels_are_compiled_for_was_run_in_the_warm_up(running, tokens):
    """Attention of decodes is compiled for their places, beside chunks and alone, products for rows and for logits.

    Of every step there can be. (For how many places each kernel is, is a matter of the model's heads.)
    """
    runner = Recorder(running, tokens)
    runner.warm_up(sizes=())
    shapes, most = Shapes(running, tokens), min(running, tokens)
    alone = {shapes.of(decodes, 0, decodes) for decodes in range(1, most + 1)}
    assert alone <= runner.ran
    beside = {shape.decodes for shape in runner.ran if shape.chunks}
    rows_of, logits_of = ({kernel_of(shape[place]) for shape in runner.ran} for place in (0, 3))
    some = {*range(1, 130), *range(159, 530, 32), 160, 512, 513, 514, 600, 699, 700, 701, 1000, tokens}
    found = set()
    for decodes in range(min(running - 1, tokens) + 1):
        for chunks in {1, 2, MOST_CHUNKS, MOST_CHUNKS + 1, running - decodes}:
            if decodes + chunks <= running:
                found |= {shapes.of(decodes, chunks, rows) for rows in some if rows >= decodes + chunks}
    for shape in found:
        assert shape.decodes in beside, shape
        assert shape.decodes <= shape.rows, shape
        if shape.rows <= tokens:  # longer ones only when prompts are not cut
            assert kernel_of(shape.rows) in rows_of, shape
            assert kernel_of(shape.logits) in logits_of, shape
    assert len(beside) < 20


@pytest.mark.parametrize("decodes", [0, 1, 17, 63])
def test_the_largest_steps_fit_the_buffer(decodes):
    """As many requests as there can be, each new, with all its pages; decodes that need more places than they are."""
    runner = Recorder(64, 100)
    held = list(range(MAX_LEN // PAGE_SIZE))
    params = SamplingParams(top_k=3)
    requests = [Request(str(n), 9, [0] * 10, params, frozenset(), 0.0, num_computed=10, pages=held) for n in range(64)]
    chunks = [Chunk(request, 9, 1, True) for request in requests[decodes:]]
    chunks[-1] = Chunk(requests[-1], 0, 10, True)
    assert len(runner.launch(Batch(requests[:decodes], chunks))().tokens) == 64


def test_ladder_ends_at_the_largest_batch():
    """Ascending, without repeats, dense where padding would cost, and never beyond what can run."""
    for largest in (1, 3, 64, 100, 256, 512):
        sizes = ladder(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert all(above <= 2 * below for below, above in itertools.pairwise(sizes))
