"""How correct and how fast each GPU operation is: python bench/gpu_ops.py [--check-only] [--sweep] [--out FILE]

First every operation is compared with the float32 reference at real shapes. Then each is timed inside a CUDA graph,
rotating among copies of its data so that nothing is found in the cache that a model would not find there, beside the
time in which the device can move the bytes or do the arithmetic (ceilings measured first). --sweep checks nothing and
times other tiles of attention, compiled beforehand in processes of their own. Products have a file of their own,
gpu_products.py. The last line of output is JSON.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from disagg.model.ops import LayerWeights, ReferenceOps, Rope, Step

DTYPE = torch.bfloat16
PAGE_SIZE = 16


class Shape(NamedTuple):
    """The widths of a model."""

    hidden: int
    heads: int
    kv_heads: int
    size: int
    mlp: int
    layers: int
    vocab: int
    tied: bool

    @property
    def qkv(self) -> int:
        """Outputs of the merged projection."""
        return (self.heads + 2 * self.kv_heads) * self.size


MODELS = {
    "qwen3-8b": Shape(4096, 32, 8, 128, 12288, 36, 151936, False),
    "qwen3-0.6b": Shape(1024, 16, 8, 128, 3072, 28, 151936, True),
}


class Line(NamedTuple):
    """One measurement."""

    name: str
    ms: float
    num_bytes: float
    flop: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing to check or time.")
        return
    torch.manual_seed(torch.seed() % 2**31)
    failed = [] if args.sweep else check()
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "failed": failed}
    if not args.check_only:
        bandwidth, peak = ceilings()
        print(f"ceilings: {bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s")
        if args.sweep:
            compile_tiles()
        timed = itertools.chain(time_rows(), time_prefill_attention(args.sweep), time_decode_attention(args.sweep))
        lines = print_lines(timed, bandwidth, peak)
        result |= {"bandwidth": bandwidth, "peak": peak, "lines": [line._asdict() for line in lines]}
    text = json.dumps(result)
    if args.out:
        args.out.write_text(text)
    print(text if len(text) < 4000 else json.dumps({key: value for key, value in result.items() if key != "lines"}))
    sys.exit(1 if failed else 0)


def print_lines(lines: Iterator[Line] | Sequence[Line], bandwidth: float, peak: float) -> list[Line]:
    """Each as it comes; returns them."""
    print(f"{'':66}{'us':>9}{'GB/s':>8}{'TFLOP/s':>9}{'limit us':>10}{'of limit':>9}")
    kept = []
    for line in lines:
        limit = max(line.num_bytes / bandwidth, line.flop / peak) * 1e6
        us = line.ms * 1e3
        print(f"{line.name:66}{us:9.1f}{line.num_bytes / us / 1e3:8.0f}{line.flop / us / 1e6:9.1f}"
              f"{limit:10.1f}{limit / us:9.0%}", flush=True)  # fmt: skip
        kept.append(line)
    return kept


def ceilings() -> tuple[float, float]:
    """(bytes/s of memory, by reading or by a copy, whichever is faster; FLOP/s of a product of 8192 cubed)."""
    big = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    other = torch.empty_like(big)
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    copy_ms, read_ms = graph_ms([lambda: other.copy_(big)] * 5), graph_ms([lambda: torch.amax(big)] * 5)
    product_ms = graph_ms([lambda: torch.mm(x, y)] * 5)
    return big.nbytes / min(copy_ms / 2, read_ms) * 1e3, 2 * 8192**3 / product_ms * 1e3


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 10) -> float:
    """Milliseconds of one call, replaying a CUDA graph of all of them: median of `repeats`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / len(calls)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(DTYPE)


def make_step(sequences: Sequence[tuple[int, int]], decodes: int = 0) -> tuple[Step, int]:
    """A Step of (new tokens, context) pairs on shuffled pages, and the number of pages."""
    counts = [-(-context // PAGE_SIZE) for _, context in sequences]
    total = sum(counts)
    order = torch.randperm(total).int()
    table = torch.full((len(sequences), max(counts)), total, dtype=torch.int32)
    at, starts, positions, slots = 0, [0], [], []
    for row, ((new, context), count) in enumerate(zip(sequences, counts, strict=True)):
        table[row, :count] = order[at : at + count]
        at += count
        place = torch.arange(context - new, context)
        starts.append(starts[-1] + new)
        positions.append(place)
        slots.append(table[row].long()[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE)
    tensors = (
        torch.zeros(starts[-1], dtype=torch.int64), torch.cat(positions), torch.cat(slots),
        torch.tensor(starts, dtype=torch.int32), torch.tensor([c for _, c in sequences], dtype=torch.int32), table,
    )  # fmt: skip
    step = Step(
        *(tensor.cuda() for tensor in tensors), last=None, max_query_len=max(new for new, _ in sequences),
        max_context_len=4096, num_decodes=decodes,
    )  # fmt: skip
    return step, total


def make_rope(size: int) -> Rope:
    angles = torch.outer(torch.arange(8192), 1e6 ** (-torch.arange(0, size, 2) / size)).cuda()
    return Rope(angles.cos(), angles.sin())


def make_layer(shape: Shape) -> LayerWeights:
    def weight(outputs: int, inputs: int) -> Tensor:
        return draw(outputs, inputs, scale=inputs**-0.5)

    def norm(length: int) -> Tensor:
        return draw(length, scale=0.1) + 1

    return LayerWeights(
        norm(shape.hidden), weight(shape.qkv, shape.hidden), weight(shape.hidden, shape.heads * shape.size),
        norm(shape.hidden), weight(2 * shape.mlp, shape.hidden), weight(shape.hidden, shape.mlp),
        q_norm=norm(shape.size), k_norm=norm(shape.size),
    )  # fmt: skip


def widened(layer: LayerWeights) -> LayerWeights:
    return LayerWeights(**{name: None if value is None else value.float() for name, value in vars(layer).items()})


# correctness


def check() -> list[str]:
    """Names of the operations that missed their bound."""
    failed = []
    for name, bound, ours, expected in checked():
        error = ((ours.float() - expected).norm() / expected.norm()).item()
        right = error <= bound
        print(f"{'ok  ' if right else 'FAIL'} {name:60} error {error:.1e}, bound {bound:.0e}", flush=True)
        if not right:
            failed.append(name)
    return failed


def checked() -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """(name, bound, ours, expected) of every operation at the sizes of both models."""
    from disagg.model.ops_cuda import CudaOps
    from disagg.model.ops_cuda_linear import Extras, small_product

    ops, reference = CudaOps(DTYPE), ReferenceOps()
    for name, shape in MODELS.items():
        for rows in (1, 2, 8, 16, 32, 64, 128):
            x, norm = draw(rows, shape.hidden, scale=3), draw(shape.hidden)
            weight, residual = draw(2 * shape.mlp, shape.hidden, scale=shape.hidden**-0.5), draw(rows, shape.mlp)
            wide, _ = reference.add_rms_norm(x.float(), None, norm.float(), 1e-6)
            expected = reference.silu_mul(reference.linear(weight.float())(wide)) + residual.float()
            ours = small_product(x, weight, Extras(norm, 1e-6, None, residual, True))
            yield f"{name} product, norm, gate, residual, {rows} rows", 8e-3, ours, expected
            expected = reference.linear(weight.float())(x.float())
            yield f"{name} product, {rows} rows", 8e-3, small_product(x, weight, Extras(), torch.float32), expected
        for title, sequences in SCENES.items():
            step, num_pages = make_step(sequences, decodes=sum(new == 1 for new, _ in sequences))
            pages = draw(num_pages, 2, 2, shape.kv_heads, PAGE_SIZE, shape.size)
            q = draw(len(step.tokens), shape.heads, shape.size)
            scale = shape.size**-0.5
            expected = reference.attend(q.float(), 1, pages.float(), step, scale)
            yield f"{name} attend, {title}", 8e-3, ops.attend(q, 1, pages, step, scale), expected
            layers, rope = [make_layer(shape) for _ in range(2)], make_rope(shape.size)
            x, expected_pages = draw(len(step.tokens), shape.hidden), pages.float()
            wide_layers = [widened(layer) for layer in layers]
            expected = reference.decoder(wide_layers, rope, 1e-6)(x.float(), step, expected_pages)
            ours = ops.decoder(layers, rope, 1e-6)(x, step, pages)
            yield f"{name} two layers, {title}", 2e-2, ours, expected
            yield f"{name} pages of two layers, {title}", 2e-2, pages, expected_pages


def _lengths(count: int, low: int, high: int) -> list[tuple[int, int]]:
    return [(1, int(n)) for n in torch.randint(low, high, (count,))]


SCENES = {
    "1 decode": [(1, 300)],
    "8 decodes": _lengths(8, 1, 2000),
    "40 decodes": _lengths(40, 1, 600),
    "prompt of 1000": [(1000, 1000)],
    "5 decodes, 3 chunks": [*_lengths(5, 1, 900), (37, 37), (300, 1100), (129, 640)],
}


# timing


def time_rows() -> Iterator[Line]:
    """Operations bound by memory, at the widths of the 8B model."""
    from disagg.model.ops_cuda import CudaOps

    ops, shape, rows = CudaOps(DTYPE), MODELS["qwen3-8b"], 8192
    norm, q_norm, rope = draw(shape.hidden), draw(shape.size), make_rope(shape.size)
    x, qkv, gate_up = draw(rows, shape.hidden), draw(rows, shape.qkv), draw(rows, 2 * shape.mlp)
    step, num_pages = make_step([(2048, 2048)] * 4)
    pages = draw(num_pages, 1, 2, shape.kv_heads, PAGE_SIZE, shape.size)
    yield Line("norm, 8192 rows", graph_ms([lambda: ops.add_rms_norm(x, None, norm, 1e-6)] * 10), 2 * x.nbytes, 0)
    ms = graph_ms([lambda: ops.rotate_and_store(qkv, step, 0, pages, rope, q_norm, q_norm)] * 10)
    yield Line("rotate and store, 8192 rows", ms, 2 * qkv.nbytes, 0)
    yield Line("silu, 8192 rows", graph_ms([lambda: ops.silu_mul(gate_up)] * 10), 1.5 * gate_up.nbytes, 0)


# keys, warps, most programs, programs that read about equally much, turns copied ahead (none: Triton's kernel)
DECODE_TILES = [
    (32, 2, 1024, 396), (32, 1, 1024, 396, 4), (32, 1, 528, 528, 3), (32, 1, 1024, 528, 3), (32, 1, 2112, 1056, 3),
    (32, 1, 1024, 792, 2), (32, 1, 2112, 1584, 2), (64, 1, 1024, 528, 2),
]  # fmt: skip
DECODES = {
    "1 x 256": [(1, 256)], "8 x 256": [(1, 256)] * 8, "32 x 256": [(1, 256)] * 32, "128 x 256": [(1, 256)] * 128,
    "32 x 2048": [(1, 2048)] * 32, "20 x 1000 to 3090": [(1, 1000 + 110 * index) for index in range(20)],
    "144 x 100 to 1100": [(1, 100 + 7 * index) for index in range(144)],
    "180 x 100 to 2000": [(1, 100 + 1900 * index // 180) for index in range(180)],
}  # fmt: skip
PREFILL_TILES = [(128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 3), (64, 64, 4, 5)]
PREFILLS = [[(2048, 2048)] * 4, [(2048, 2048)], [(8192, 8192)], [(512, 4096)] * 4, [(128, 128)]]


def compile_tiles() -> None:
    """Fill Triton's cache: each job runs a kernel once, in a process of its own."""
    from disagg.model.ops_cuda_decode import DecodeTile, parts_of

    jobs: dict[tuple[object, ...], tuple[str, str | None, tuple[int, ...]]] = {}
    for tile in PREFILL_TILES:
        jobs[tile] = ("qwen3-8b", None, tile)
    for (name, shape), (title, sequences), tile in itertools.product(MODELS.items(), DECODES.items(), DECODE_TILES):
        parts = parts_of(len(sequences), shape.kv_heads, 4096, DecodeTile(*tile))  # compiled for each number of them
        jobs[(name, parts, *tile)] = (name, title, tile)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_tile, jobs.values(), chunksize=2))


def _compile_tile(job: tuple[str, str | None, tuple[int, ...]]) -> None:
    name, title, tile = job
    try:
        if title is None:
            prefill_calls(MODELS[name], [(128, 128)])(tile)
        else:
            decode_calls(MODELS[name], DECODES[title], layers=1)(tile, 0)
        torch.cuda.synchronize()
    except Exception as error:  # a tile may need more shared memory than there is; timing says so again
        print(f"{job}: {str(error).splitlines()[0]}")


def decode_calls(
    shape: Shape, sequences: Sequence[tuple[int, int]], layers: int
) -> Callable[[tuple[int, ...] | None, int], None]:
    """A call of decode attention with norm, rotation and page write: (tile, layer) -> None."""
    from disagg.model.ops_cuda_decode import DecodeTile, Fused, attend_decodes

    batch = len(sequences)
    step, num_pages = make_step(sequences)
    pages = draw(num_pages, layers, 2, shape.kv_heads, PAGE_SIZE, shape.size)
    qkv, out, norm = draw(batch, shape.qkv), draw(batch, shape.heads * shape.size), draw(shape.size)
    fused = Fused(make_rope(shape.size), norm, norm, 1e-6)

    def call(tile: tuple[int, ...] | None, layer: int) -> None:
        chosen = {} if tile is None else {"tile": DecodeTile(*tile)}
        attend_decodes(qkv, layer, pages, step, 0.1, out, batch, fused, **chosen)

    return call


def time_decode_attention(sweep: bool) -> Iterator[Line]:
    """One layer of eight after the other, so that each call finds its pages in memory."""
    layers = 8
    for name, shape in MODELS.items():
        for title, sequences in DECODES.items():
            call = decode_calls(shape, sequences, layers)
            num_bytes = sum(context for _, context in sequences) * 2 * shape.kv_heads * shape.size * 2.0
            timed = []
            for tile in DECODE_TILES if sweep else [None]:
                ms = graph_ms([lambda layer=layer, tile=tile: call(tile, layer) for layer in range(layers)] * 4)  # noqa: B023
                timed.append(Line(f"{name} decode attention, {title}, {tile or 'ours'}", ms, num_bytes, 0))
            yield from sorted(timed, key=lambda line: line.ms)[:5]


def prefill_calls(shape: Shape, sequences: Sequence[tuple[int, int]]) -> Callable[[tuple[int, ...] | None], None]:
    """A call of prefill attention: (tile) -> None."""
    from disagg.model.ops_cuda_prefill import PrefillTile, attend_chunks

    step, num_pages = make_step(sequences)
    pages = draw(num_pages, 1, 2, shape.kv_heads, PAGE_SIZE, shape.size)
    q = draw(len(step.tokens), shape.heads, shape.size)
    out = torch.empty(len(q), shape.heads * shape.size, device="cuda", dtype=DTYPE)
    return lambda tile: attend_chunks(q, 0, pages, step, 0.1, out, 0, PrefillTile(*tile) if tile else None)


def time_prefill_attention(sweep: bool) -> Iterator[Line]:
    """Causal attention of whole prompts and of a chunk, beside what torch has for whole prompts."""
    shape = MODELS["qwen3-8b"]
    for sequences in PREFILLS:
        call = prefill_calls(shape, sequences)
        flop = 4.0 * shape.heads * shape.size * sum(new * (2 * context - new + 1) / 2 for new, context in sequences)
        title = f"prefill attention, {len(sequences)} x {sequences[0]}"
        for tile in PREFILL_TILES if sweep else [None]:
            try:
                ms = graph_ms([lambda tile=tile: call(tile)] * 5)  # noqa: B023
            except Exception as error:  # a tile may need more shared memory than there is
                print(f"{title}, {tile}: {str(error).splitlines()[0]}")
                continue
            yield Line(f"{title}, {tile or 'ours'}", ms, 0, flop)
        if sequences[0][0] == sequences[0][1]:
            yield from _torch_attention(shape, sequences, title, flop)


def _torch_attention(shape: Shape, sequences: Sequence[tuple[int, int]], title: str, flop: float) -> Iterator[Line]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, length = len(sequences), sequences[0][0]
    q, k, v = (draw(batch, length, heads, shape.size).transpose(1, 2)
               for heads in (shape.heads, shape.kv_heads, shape.kv_heads))  # fmt: skip
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                ms = graph_ms([lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)] * 5)
            yield Line(f"{title}, torch {backend.name}", ms, 0, flop)
        except Exception as error:  # a backend may refuse the shape
            print(f"{title}, torch {backend.name}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
