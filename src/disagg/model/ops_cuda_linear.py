"""Products of few rows with a weight, for `CudaOps`: bound by the bytes of the weight, which is read once.

While a GPU waits for a weight it can do more at no cost, so these kernels also add a residual and join gate and up,
and that of a single row, which is here, norms its input: a layer of decoding is five kernels instead of ten. (With more
rows each program would norm all of them again, which costs more than a kernel of its own.) Those of more rows are in
ops_cuda_matrix.py and, for Hopper, ops_cuda_hopper.py. Sums are float32. Every output is summed in the same
order in any batch of the same padded size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.ops_cuda_hopper import hopper_kernel
from disagg.model.ops_cuda_jit import (
    INTERPRETED,
    after_previous,
    counters_on,
    is_hopper,
    kernel,
    launch,
    overlaps,
    release_next,
)
from disagg.model.ops_cuda_matrix import at, matrix_kernel
from disagg.model.ops_cuda_rows import add_rms_norm

_LINE = tl.constexpr(64)  # numbers of two bytes in a line of the cache
MAX_ROWS = 64
"""Most rows the kernels are written for."""
_PROGRAMS = 128  # nearly one for each of 132 multiprocessors
_MANY, _DEEP = 48, 4096  # so many blocks are cut only if they have so many inputs


class Tile(NamedTuple):
    """What one program of a product takes at a time."""

    outputs: int
    inputs: int
    warps: int
    stages: int  # loads in flight
    ahead: int = 0  # inputs whose weights are fetched into the cache while the kernel before still runs
    parts: int = 1  # of the inputs, each the work of another program; one for a single row


class Extras(NamedTuple):
    """What is done beside the product: norm before it, bias, residual or gate after it."""

    norm: Tensor | None = None  # [K], RMSNorm of x
    eps: float = 0.0
    bias: Tensor | None = None  # [N], for a gated product [2 N]
    residual: Tensor | None = None  # [T, N], added; may be the output itself
    gated: bool = False  # the weight is [2 N, K], gate rows then up rows; the result silu(gate) * up
    early: bool = True  # may start before the kernel before it has ended; not so the first kernel of a step


def small_product(
    x: Tensor, weight: Tensor, extras: Extras, out_dtype: torch.dtype | None = None, tile: Tile | None = None
) -> Tensor:
    """x [T, K] times weight [N, K] transposed, with extras, for T up to MAX_ROWS. Returns [T, N]."""
    rows, depth = x.shape
    num_out = len(weight) // 2 if extras.gated else len(weight)
    out = torch.empty(rows, num_out, dtype=out_dtype or x.dtype, device=x.device)
    early, hopper = extras.early and overlaps(x.device), is_hopper(x.device, weight.dtype)
    tile = tile or _tile(rows, num_out, depth, extras.gated, hopper)
    flags: dict[str, Any] = {
        "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "STAGES": tile.stages, "HAS_BIAS": extras.bias is not None,
        "EVEN": depth % (tile.inputs * tile.parts) == 0, "HAS_RESIDUAL": extras.residual is not None,
        "GATED": extras.gated, "warps": tile.warps,
    }  # fmt: skip
    beside = (extras.bias, extras.residual, out)
    blocks = triton.cdiv(num_out, tile.outputs)
    if rows == 1:
        launch(
            _vector_kernel, (blocks,), x, weight, extras.norm, *beside, num_out, depth, extras.eps,
            AHEAD=_ahead(tile.ahead, depth) if early else 0, HAS_NORM=extras.norm is not None, early=early, **flags,
        )  # fmt: skip
        return out
    if extras.norm is not None:
        x, _ = add_rms_norm(x, None, extras.norm, extras.eps, early)
        early = overlaps(x.device)
    padded = max(16, triton.next_power_of_2(rows))
    parts, counters = out, out  # not touched when there is one part
    if tile.parts > 1:
        planes = 2 if extras.gated else 1
        parts = torch.empty(blocks * tile.parts * planes * tile.outputs * padded, dtype=torch.float32, device=x.device)
        counters = counters_on(x.device)
    arguments, sizes = (x, weight, *beside, parts, counters), (rows, num_out, depth)
    flags |= {"ROWS": padded, "PARTS": tile.parts}
    if flags["EVEN"] and tile.outputs in (64, 128) and tile.warps == 4 and hopper:
        del flags["EVEN"]
        launch(hopper_kernel, (blocks, tile.parts), *arguments, None, None, *sizes, SCALED=False, early=early, **flags)
    else:
        launch(matrix_kernel, (blocks, tile.parts), *arguments, *sizes, early=early, **flags)
    return out


def _ahead(wanted: int, depth: int) -> int:
    """A power of two that is whole lines."""
    least = min(wanted, depth)
    return 0 if least < _LINE.value else 1 << (least.bit_length() - 1)


def _tile(rows: int, num_out: int, depth: int, gated: bool, hopper: bool) -> Tile:
    """The best of bench/gpu_products.py --sweep on an H100."""
    if INTERPRETED:
        return Tile(32, 64, 1, 1)
    if rows == 1:
        if depth < 4096:
            return Tile(4, 512, 4, 3, 4096)
        return Tile(2, 1024, 4, 3) if gated or depth > 8192 else Tile(4, 1024, 4, 3, 1024)
    if not hopper or depth % 64:  # as much as fits anywhere, in any dtype
        return in_parts(Tile(32, 64, 4, 3), num_out, depth)
    return in_parts(Tile(64, 64 if depth % 128 else 128, 4, 4 if gated or rows > 16 else 6), num_out, depth)


def in_parts(tile: Tile, num_out: int, depth: int) -> Tile:
    """Cut the inputs of a product with few outputs, so that every multiprocessor has something to read."""
    parts, blocks = 1, triton.cdiv(num_out, tile.outputs)
    while (
        2 * parts * blocks <= _PROGRAMS
        and depth % (2 * parts * tile.inputs) == 0
        and (blocks < _MANY or depth // parts >= _DEEP)
    ):
        parts *= 2
    return tile._replace(parts=parts)


@kernel
def _vector_kernel(
    x, weight, norm, bias, residual, out, num_out, depth, eps,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """OUTPUTS numbers of a single row. The norm's scale is applied at the end: it is one number for the whole row."""
    release_next(EARLY)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < num_out
    start = tl.minimum(output, num_out - 1).to(tl.int64)[:, None] * depth
    lane = tl.arange(0, INPUTS)
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    total_up = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    square = tl.zeros([INPUTS], tl.float32)
    up_weight = weight + num_out.to(tl.int64) * depth
    if AHEAD > 0:
        _fetch_ahead(weight, output, num_out, depth, AHEAD)
        if GATED:
            _fetch_ahead(up_weight, output, num_out, depth, AHEAD)
    after_previous(EARLY)
    for begin in tl.range(0, depth, INPUTS, num_stages=STAGES):
        k = begin + lane
        value = at(x + k, k, depth, EVEN).to(tl.float32)
        if HAS_NORM:
            square += value * value
            value *= at(norm + k, k, depth, EVEN).to(tl.float32)
        place, known = start + k[None, :], k[None, :]
        total += at(weight + place, known, depth, EVEN).to(tl.float32) * value[None, :]
        if GATED:
            total_up += at(up_weight + place, known, depth, EVEN).to(tl.float32) * value[None, :]
    result = tl.sum(total, axis=1)
    result_up = tl.sum(total_up, axis=1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(square) / depth + eps)
        result *= scale
        result_up *= scale
    if HAS_BIAS:
        result += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            result_up += tl.load(bias + num_out + output, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        result = result * tl.sigmoid(result) * result_up
    if HAS_RESIDUAL:
        result += tl.load(residual + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + output, result, mask=inside)


@kernel
def _fetch_ahead(weight, output, num_out, depth, AHEAD: tl.constexpr):
    """Ask for the first AHEAD weights of each output, into the second-level cache."""
    line = tl.arange(0, AHEAD // _LINE) * _LINE
    place = tl.minimum(output, num_out - 1).to(tl.int64)[:, None] * depth + line[None, :]
    address = (weight + place).to(tl.uint64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
