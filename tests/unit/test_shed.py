"""A request that is aborted while a step computes it leaves that step: on cores, between two layers."""

from collections.abc import Callable

import pytest
import torch
from handoff_world import World

from disagg.cache.storage import KVStorage
from disagg.cluster import messages as m
from disagg.engine import runner as module
from disagg.engine.batch import Batch, Chunk, Output
from disagg.engine.runner import Runner
from disagg.model.load import Loaded, load_model
from disagg.model.ops import ReferenceOps
from disagg.request import Request, SamplingParams
from disagg.testing import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["fast", "reference", "seed"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    if request.param == "seed":
        return load_model("seed")
    folder = str(tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3")))
    return load_model(folder, ops=ReferenceOps() if request.param == "reference" else None)


def step_of(runner: Runner) -> Batch:
    """Two that decode, behind prompts computed before, and three prompts, one of which samples nothing yet."""
    params = SamplingParams(temperature=0, logprobs=3)
    requests = []
    for number, length in enumerate((20, 7, 30, 40, 25)):
        tokens = [(7 * number + 3 * place) % 250 for place in range(length)]
        pages = list(range(3 * number, 3 * number + 3))
        requests.append(
            Request(str(number), length, tokens, params, frozenset(), 0.0, num_computed=length, pages=pages)
        )
    decodes, prompts = requests[:2], requests[2:]
    runner.run(Batch(chunks=[Chunk(one, 0, len(one.tokens), True) for one in decodes]))
    for one in decodes:
        one.tokens.append(5)
        one.num_computed += 1
    return Batch(
        decodes, [Chunk(one, 0, len(one.tokens) - (one is prompts[2]), one is not prompts[2]) for one in prompts]
    )


def without(batch: Batch, names: str) -> None:
    batch.decodes = [one for one in batch.decodes if one.id not in names]
    batch.chunks = [chunk for chunk in batch.chunks if chunk.request.id not in names]


def run(loaded: Loaded, first: str = "", shed: Callable[[Batch], bool] | None = None) -> tuple[Output, torch.Tensor]:
    """What the step brings, and all pages, when requests are missing at `first` and some leave by `shed`."""
    spec = loaded.spec
    storage = KVStorage(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, page_size=16, num_pages=15
    )  # fmt: skip
    storage.pages.zero_()
    runner = Runner(loaded, storage)
    batch = step_of(runner)
    without(batch, first)
    if not batch.num_tokens:
        return Output([], []), storage.pages
    output = runner.launch(batch, None if shed is None else lambda: shed(batch))()
    assert len(output.tokens) == len(batch.sampling())
    return output, storage.pages


@pytest.mark.parametrize("leaving", ["2", "03", "4", "134", "01234"])
def test_those_that_are_left_get_the_same_bits(loaded: Loaded, leaving: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves, and before whichever layer: tokens, log-probabilities and pages are as if they had never come."""
    monkeypatch.setattr(module, "_LONG", 0)
    expected, pages = run(loaded, leaving)
    kept = [page for number in range(5) if str(number) not in leaving for page in range(3 * number, 3 * number + 3)]
    for layer in range(loaded.spec.num_layers):
        asked: list[bool] = []

        def shed(batch: Batch, layer: int = layer, asked: list[bool] = asked) -> bool:
            asked.append(len(asked) == layer)
            if asked[-1]:
                without(batch, leaving)
            return asked[-1]

        output, written = run(loaded, shed=shed)
        assert output == expected
        assert torch.equal(written[kept], pages[kept])
        assert len(asked) == (layer + 1 if len(leaving) == 5 else loaded.spec.num_layers), "given up, or to the end"


def test_a_step_that_loses_nobody_or_is_short_is_as_ever(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked between layers or not at all, the bits are the same; a short step asks nobody."""
    expected, pages = run(loaded)
    monkeypatch.setattr(module, "_LONG", 0)
    output, written = run(loaded, shed=lambda batch: False)
    assert output == expected
    assert torch.equal(written, pages)
    monkeypatch.setattr(module, "_LONG", 1e18)
    assert run(loaded, shed=lambda batch: pytest.fail("asked"))[0] == expected


def test_an_abort_amid_a_prompt_frees_its_pages_before_the_step_ends() -> None:
    """The other prompt of the step gets its tokens; what came behind the Abort is taken in, in order."""
    world = World(prompt=True, pages=8, max_batch_tokens=40)
    stays = world.submit(range(9), 3, prefill="P", decode="P")
    leaves = world.submit(range(20, 31), 3, prefill="P", decode="D")
    for _ in range(2):
        world.deliver_front("P.0")
    sim = world.sim("P")
    seen: list[tuple[int, list[str]]] = []
    arrivals = world.arrivals

    def look(name: str) -> list[object]:
        seen.append((sim.pool.num_free, sorted(sim.jobs)))
        return arrivals(name)

    world.arrivals = look
    world.abort(leaves)
    later, never = (
        world.submit(range(3), 1, prefill="P", decode="P"),
        world.submit(range(3), 1, prefill="P", decode="P"),
    )
    world.abort(never)
    sim.turn()
    assert seen == [(2, [stays, leaves]), (5, [stays, later])]
    world.arrivals = arrivals
    world.drain()
    assert [world.asks[one].outcome for one in (stays, leaves, later, never)] == ["length", "abort", "length", "abort"]


def test_both_workers_of_a_hand_off_free_what_is_aborted_amid_its_last_chunk() -> None:
    """Pages of earlier chunks are announced and copied; the step goes on for another prompt, and all are free."""
    world = World(prompt=True, pages=8, max_batch_tokens=8)
    leaves = world.submit(range(20), 3)
    world.calm(2)
    assert world.sim("P").giving.held()[0].state == "sending"
    assert world.sim("D").taking.held()
    stays = world.submit(range(20, 24), 3, prefill="P", decode="P")
    world.deliver_front("P.0")
    world.abort(leaves)
    world.deliver_front("D.0")  # it says at once that it dropped it
    freed: list[int] = []
    arrivals = world.arrivals
    world.arrivals = lambda name: (freed.append(world.sim("P").pool.num_free), arrivals(name))[1]
    world.sim("P").turn()
    assert freed == [8 - 5 - 1, 8 - 1]
    assert world.sim("P").pool.num_free == 8 - 1, "only what stays"
    assert world.sim("D").pool.num_free == 8
    world.arrivals = arrivals
    world.drain()
    assert world.asks[stays].outcome == "length"


def test_audits_and_what_is_refused_amid_a_step_are_told_before_its_end() -> None:
    """Nobody waits for a long step with a question or a request that has nothing to do with it."""
    world = World(prompt=True, pages=8)
    world.submit(range(9), 3, prefill="P", decode="P")
    world.deliver_front("P.0")
    sim = world.sim("P")
    world.submit(range(500), 3, prefill="P", decode="P")  # longer than anything here
    world.to_worker["P.0"].append(m.Audit(7))
    told: list[list[str]] = []
    arrivals = world.arrivals
    world.arrivals = lambda name: (told.append([type(one).__name__ for one in world.to_front["P.0"]]), arrivals(name))[
        1
    ]
    sim.turn()
    assert told[0] == []
    assert sorted(told[1]) == ["AuditReport", "Progress"], "after the first layer, before the second"


def test_stop_amid_a_step_ends_the_loop_after_it() -> None:
    """It is not lost because it came between two layers; what the step brought is told."""
    world = World(prompt=True)
    world.submit(range(5), 3, prefill="P", decode="P")
    sim = world.sim("P")
    mail = iter([world.to_worker["P.0"], [m.Stop()]])
    sim._mailbox.watch = lambda fd: None
    sim._mailbox.receive = lambda timeout_s: (next(mail, []), [])
    assert sim.run(-1, -2)
    assert [len(message.tokens) for message in world.to_front["P.0"] if isinstance(message, m.Progress)] == [1]
