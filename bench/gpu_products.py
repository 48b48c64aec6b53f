"""How fast products of few rows are: python bench/gpu_products.py [--sweep] [--rows N ...] [--out FILE]

Ours with residual or gate, and for a single row norm, as a layer has them, beside cuBLAS's bare product and the time in
which the device can read the weight; then both in eight bits, but for the head, which has them never. --sweep times a
list of tiles for each, from which the table in ops_cuda_linear.py was made; each kernel is compiled beforehand in
processes of their own. The last line of output is JSON.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_ops import MODELS, Line, Shape, ceilings, draw, graph_ms, print_lines
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 128])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing to time.")
        return
    bandwidth, peak = ceilings()
    print(f"ceilings: {bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s")
    lines = print_lines(time_products(args.sweep, args.rows), bandwidth, peak)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bandwidth": bandwidth, "peak": peak,
              "lines": [line._asdict() for line in lines]}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result))
    print(json.dumps({key: value for key, value in result.items() if key != "lines" or not args.sweep}))


class Product(NamedTuple):
    """A product of a layer: its weight's shape and what is done beside it."""

    name: str
    outputs: int
    inputs: int
    norm: bool = False
    residual: bool = False
    gated: bool = False


def products(shape: Shape) -> list[Product]:
    return [
        Product("qkv", shape.qkv, shape.hidden, norm=True),
        Product("out", shape.hidden, shape.heads * shape.size, residual=True),
        Product("gate_up", 2 * shape.mlp, shape.hidden, norm=True, gated=True),
        Product("down", shape.hidden, shape.mlp, residual=True),
        Product("head", shape.vocab, shape.hidden),
    ]


# outputs, inputs, warps, stages and, where a fifth is given, inputs fetched ahead
VECTOR_TILES = [
    (2, 1024, 4, 3), (4, 512, 4, 3), (4, 512, 2, 4), (4, 1024, 4, 3), (4, 1024, 4, 3, 1024), (8, 512, 4, 4),
    (4, 512, 4, 3, 4096), (16, 256, 4, 5), (8, 512, 2, 4),
]  # fmt: skip
# outputs, inputs, warps, stages
MATRIX_TILES = {
    16: [(16, 256, 2, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 6), (64, 64, 4, 6)],
    32: [(64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6), (64, 64, 4, 8)],
    64: [(64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4)],
    128: [(64, 64, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4)],
}
PROGRAMS = (128, 272, 400)  # at most so many at once: one, two or three a multiprocessor


def matrix_tiles(padded: int, product: Product) -> list[tuple[int, ...]]:
    """Each tile in one part and in as many as still run at once; nothing fetched ahead."""
    found = []
    for outputs, inputs, warps, stages in MATRIX_TILES.get(padded, []):
        blocks = -(-product.outputs // (outputs * (2 if product.gated else 1)))
        parts = {1} | {1 << max(0, (most // blocks).bit_length() - 1) for most in PROGRAMS}
        whole = [number for number in sorted(parts) if product.inputs % (inputs * number) == 0]
        found += [(outputs, inputs, warps, stages, 0, n) for n in whole]
    return found


def tiles_of(rows: int, product: Product) -> list[tuple[int, ...]]:
    """Candidates; a gated product's tile of a single row holds two weights."""
    padded = 1 if rows == 1 else max(16, 1 << (rows - 1).bit_length())
    if padded > 1:
        return matrix_tiles(padded, product)
    return [(max(1, n // 2) if product.gated else n, k, *rest) for n, k, *rest in VECTOR_TILES if product.inputs >= k]


def _operands(product: Product, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = product.outputs // 2 if product.gated else product.outputs
    weight = draw(product.outputs, product.inputs, scale=product.inputs**-0.5)
    return draw(rows, product.inputs), weight, draw(product.inputs), draw(rows, outputs)


def compile_tile(job: tuple[Product, int, tuple[int, ...]]) -> None:
    """Fill Triton's cache, in a process of its own."""
    product, rows, tile = job
    operands = _operands(product._replace(outputs=256), rows)
    try:
        _call(product, *operands, tile)()
    except Exception as error:  # a tile may need more shared memory than there is; timing says so again
        print(f"{job}: {str(error).splitlines()[0]}")


def _call(
    product: Product,
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    residual: Tensor,
    tile: tuple[int, ...] | None,
    then: Tensor | None = None,
) -> Callable[[], Tensor]:
    from disagg.model.ops_cuda_linear import Extras, Tile, small_product

    normed = product.norm and len(x) == 1  # with more rows a kernel of its own does it
    extras = Extras(norm if normed else None, 1e-6, None, residual if product.residual else None, product.gated)
    dtype = torch.float32 if product.name == "head" else None
    return lambda: small_product(x, weight, extras, dtype, Tile(*tile) if tile else None)


def time_products(sweep: bool, batches: Sequence[int]) -> Iterator[Line]:
    """Every product of both models, ours with its extras, beside cuBLAS's product alone."""
    jobs = [(product, rows, tile) for shape in MODELS.values() for product in products(shape) for rows in batches
            for tile in (tiles_of(rows, product) if sweep else ())]  # fmt: skip
    if jobs:
        distinct = {(job[0]._replace(outputs=0), job[1], job[2]): job for job in jobs}
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_tile, distinct.values(), chunksize=2))
    for name, shape in MODELS.items():
        for product in products(shape):
            copies = max(2, min(24, (256 << 20) // (product.outputs * product.inputs * 2) + 1))
            operands = [_operands(product, 1) for _ in range(copies)]
            for rows in batches:
                yield from _time_product(name, product, rows, operands, sweep)


def _time_product(
    name: str, product: Product, rows: int, operands: list[tuple[Tensor, Tensor, Tensor, Tensor]], sweep: bool
) -> Iterator[Line]:
    weights = [weight for _, weight, _, _ in operands]
    x, _, norm, residual = _operands(product._replace(outputs=2), rows)
    residual = draw(rows, product.outputs)
    num_bytes = 2.0 * (product.outputs * product.inputs + rows * (product.inputs + product.outputs))
    flop = 2.0 * rows * product.outputs * product.inputs
    title = f"{name} {product.name}, {rows} rows"
    ms = graph_ms([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])
    yield Line(f"{title}, cuBLAS alone", ms, num_bytes, flop)
    timed = []
    for tile in tiles_of(rows, product) if sweep else [None]:
        try:
            ms = graph_ms([_call(product, x, w, norm, residual, tile) for w in weights])
        except Exception as error:  # a tile may need more shared memory than there is
            print(f"{title}, {tile}: {str(error).splitlines()[0]}")
            continue
        timed.append(Line(f"{title}, {tile or 'ours'}", ms, num_bytes, flop))
    yield from sorted(timed, key=lambda line: line.ms)[:4]
    if product.name != "head":
        yield from _in_eight_bits(title, x, residual, weights, num_bytes / 2, flop / 2)


def _in_eight_bits(
    title: str, x: Tensor, residual: Tensor, weights: list[Tensor], num_bytes: float, flop: float
) -> Iterator[Line]:
    """Half the bytes, and a FLOP in half the time."""
    from disagg.model.fp8 import quantise
    from disagg.model.ops_cuda_fp8 import library_product, quantise_rows, scaled_product

    few, many = quantise_rows(x), [quantise(weight) for weight in weights]
    for name, run in (("CUTLASS", library_product), ("ours", partial(scaled_product, residual=residual))):
        yield Line(f"{title}, fp8, {name}", graph_ms([partial(run, few, weight) for weight in many]), num_bytes, flop)


if __name__ == "__main__":
    main()
