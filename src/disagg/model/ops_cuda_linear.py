"""Products of few rows with a weight, for `CudaOps`: bound by the bytes of the weight, which is read once.

While a GPU waits for a weight it can do more at no cost, so these kernels also add a residual and join gate and up,
and that of a single row norms its input: a layer of decoding is five kernels instead of ten. (With more rows each
program would norm all of them again, which costs more than a kernel of its own.) Sums are float32. Every output is the
work of one program and is summed in the same order in any batch of the same padded size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.ops_cuda_jit import INTERPRETED, after_previous, kernel, launch, overlaps
from disagg.model.ops_cuda_rows import add_rms_norm

_LINE = tl.constexpr(64)  # numbers of two bytes in a line of the cache
MAX_ROWS = 64
"""Most rows the kernels are written for."""
_WIDE = 65536  # outputs: a vocabulary


class Tile(NamedTuple):
    """What one program of a product takes at a time."""

    outputs: int
    inputs: int
    warps: int
    stages: int  # loads in flight
    ahead: int = 0  # inputs whose weights are fetched into the cache while the kernel before still runs


class Extras(NamedTuple):
    """What is done beside the product: norm before it, bias, residual or gate after it."""

    norm: Tensor | None = None  # [K], RMSNorm of x
    eps: float = 0.0
    bias: Tensor | None = None  # [N], for a gated product [2 N]
    residual: Tensor | None = None  # [T, N], added; may be the output itself
    gated: bool = False  # the weight is [2 N, K], gate rows then up rows; the result silu(gate) * up


def small_product(
    x: Tensor, weight: Tensor, extras: Extras, out_dtype: torch.dtype | None = None, tile: Tile | None = None
) -> Tensor:
    """x [T, K] times weight [N, K] transposed, with extras, for T up to MAX_ROWS. Returns [T, N]."""
    rows, depth = x.shape
    num_out = len(weight) // 2 if extras.gated else len(weight)
    out = torch.empty(rows, num_out, dtype=out_dtype or x.dtype, device=x.device)
    tile, early = tile or _tile(rows, num_out, depth, extras.gated), overlaps(x.device)
    flags: dict[str, Any] = {
        "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "STAGES": tile.stages, "EVEN": depth % tile.inputs == 0,
        "AHEAD": _ahead(tile.ahead, depth) if early else 0, "HAS_BIAS": extras.bias is not None,
        "HAS_RESIDUAL": extras.residual is not None, "GATED": extras.gated, "early": early, "warps": tile.warps,
    }  # fmt: skip
    beside = (extras.bias, extras.residual, out)
    grid = (triton.cdiv(num_out, tile.outputs),)
    if rows == 1:
        normed = extras.norm is not None
        launch(
            _vector_kernel, grid, x, weight, extras.norm, *beside, num_out, depth, extras.eps, HAS_NORM=normed, **flags
        )
    else:
        if extras.norm is not None:
            x, _ = add_rms_norm(x, None, extras.norm, extras.eps)
        padded = max(16, triton.next_power_of_2(rows))
        launch(_matrix_kernel, grid, x, weight, *beside, rows, num_out, depth, ROWS=padded, **flags)
    return out


def _ahead(wanted: int, depth: int) -> int:
    """A power of two that is whole lines."""
    least = min(wanted, depth)
    return 0 if least < _LINE.value else 1 << (least.bit_length() - 1)


def _tile(rows: int, num_out: int, depth: int, gated: bool) -> Tile:
    """The best of bench/gpu_products.py --sweep on an H100."""
    if INTERPRETED:
        return Tile(32, 64, 1, 1)
    if rows == 1:
        if depth < 4096:
            return Tile(4, 512, 4, 3, 4096)
        return Tile(2, 1024, 4, 3) if gated or depth > 8192 else Tile(4, 1024, 4, 3, 1024)
    if rows > 32:
        return Tile(32 if gated else 64, 128, 4, 3)
    if rows > 16:
        return Tile(32 if gated else 64, 128, 4, 4)
    if num_out > _WIDE:
        return Tile(64, 256, 4, 3)
    return Tile(32, 128, 4, 4) if gated else Tile(16, 256, 2, 4)


@kernel
def _vector_kernel(
    x, weight, norm, bias, residual, out, num_out, depth, eps,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """OUTPUTS numbers of a single row. The norm's scale is applied at the end: it is one number for the whole row."""
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
        value = _at(x + k, k, depth, EVEN).to(tl.float32)
        if HAS_NORM:
            square += value * value
            value *= _at(norm + k, k, depth, EVEN).to(tl.float32)
        at, known = start + k[None, :], k[None, :]
        total += _at(weight + at, known, depth, EVEN).to(tl.float32) * value[None, :]
        if GATED:
            total_up += _at(up_weight + at, known, depth, EVEN).to(tl.float32) * value[None, :]
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
def _matrix_kernel(
    x, weight, bias, residual, out, rows, num_out, depth,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS x OUTPUTS numbers, on tensor cores. `rows` of the ROWS are real."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < num_out
    start = tl.minimum(output, num_out - 1).to(tl.int64)[None, :] * depth
    row = tl.arange(0, ROWS)
    real = (row < rows)[:, None]
    lane = tl.arange(0, INPUTS)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    total_up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    up_weight = weight + num_out.to(tl.int64) * depth
    if AHEAD > 0:
        _fetch_ahead(weight, output, num_out, depth, AHEAD)
        if GATED:
            _fetch_ahead(up_weight, output, num_out, depth, AHEAD)
    after_previous(EARLY)
    for begin in tl.range(0, depth, INPUTS, num_stages=STAGES):
        k = begin + lane
        value = tl.load(x + row[:, None] * depth + k[None, :], mask=real & (k[None, :] < depth), other=0.0)
        at, known = start + k[:, None], k[:, None]
        total = tl.dot(value, _at(weight + at, known, depth, EVEN), total, input_precision="ieee")
        if GATED:
            total_up = tl.dot(value, _at(up_weight + at, known, depth, EVEN), total_up, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            total_up += tl.load(bias + num_out + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = total * tl.sigmoid(total) * total_up
    at = row[:, None] * num_out + output[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=real & inside[None, :], other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=real & inside[None, :])


@kernel
def _at(pointers, k, depth, EVEN: tl.constexpr):
    """Numbers along the inputs, zero past the end; without a mask where no program reaches past it."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=k < depth, other=0.0)


@kernel
def _fetch_ahead(weight, output, num_out, depth, AHEAD: tl.constexpr):
    """Ask for the first AHEAD weights of each output, into the second-level cache."""
    line = tl.arange(0, AHEAD // _LINE) * _LINE
    at = tl.minimum(output, num_out - 1).to(tl.int64)[:, None] * depth + line[None, :]
    address = (weight + at).to(tl.uint64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
