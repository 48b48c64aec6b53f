"""`Fp8Ops`: `CudaOps` with products in eight bits on Hopper GPUs. fp8.py says what is computed.

Where a weight's bytes are what a step waits for, half of them take half the time: up to MAX_ROWS rows the products are
those of ops_cuda_hopper.py, above them CUTLASS's, as torch has it. The scale of a row of activations needs the whole
row, so it is found by a kernel before each product, which also does what comes before: the norm, or the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.fp8 import FP8, LARGEST, LEAST_SCALE, Scaled, quantise
from disagg.model.ops import Decoder, LayerWeights, Linear, Rope, Step
from disagg.model.ops_cuda import CudaOps
from disagg.model.ops_cuda_decode import Fused
from disagg.model.ops_cuda_hopper import hopper_kernel
from disagg.model.ops_cuda_jit import after_previous, counters_on, kernel, launch, overlaps, release_next
from disagg.model.ops_cuda_linear import Tile, in_parts

MAX_ROWS = 128
"""Most rows of a product that is done by a kernel of our own."""
_WIDE = 16_384  # outputs that keep the library's larger tiles busy with more than 64 rows
_LARGEST, _LEAST_SCALE = tl.constexpr(LARGEST), tl.constexpr(LEAST_SCALE)


class _Layer(NamedTuple):
    """A layer as it is run; see LayerWeights."""

    attention_norm: Tensor
    qkv: Scaled
    qkv_bias: Tensor | None
    fused: Fused
    out: Scaled
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Scaled
    gate_up_bias: Tensor | None
    down: Scaled
    down_bias: Tensor | None


class Fp8Ops(CudaOps):
    """See the module docstring. Activations and pages are bfloat16. Raises ValueError for another kind of GPU."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(torch.bfloat16)
        if torch.cuda.get_device_capability(device) != (9, 0):
            raise ValueError(f"products in eight bits need a Hopper GPU, not {torch.cuda.get_device_name(device)}")

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """With `out_dtype` it is the output projection, which is not rounded."""
        if out_dtype is not None:
            return super().linear(weight, bias, out_dtype)
        packed = quantise(weight)
        return lambda x: scaled_product(quantise_rows(x), packed, bias)

    def decoder(self, layers: Sequence[LayerWeights], rope: Rope | None, eps: float) -> Decoder:
        """Nine kernels a layer, and those of attention."""
        stack = [_pack(w, rope, eps) for w in layers]

        def run(hidden: Tensor, step: Step, pages: Tensor, layers: range | None = None) -> Tensor:
            assert layers is None
            x = hidden
            for index, w in enumerate(stack):
                normed = quantise_rows(x, w.attention_norm, eps, early=index > 0)
                qkv = scaled_product(normed, w.qkv, w.qkv_bias)
                attended = quantise_rows(self.attention(qkv, w.fused, step, index, pages))
                x = scaled_product(attended, w.out, w.out_bias, x)
                gate_up = scaled_product(quantise_rows(x, w.mlp_norm, eps), w.gate_up, w.gate_up_bias)
                x = scaled_product(quantise_rows(gate_up, gated=True), w.down, w.down_bias, x)
            return x

        return run


def _pack(w: LayerWeights, rope: Rope | None, eps: float) -> _Layer:
    return _Layer(
        w.attention_norm, quantise(w.qkv), w.qkv_bias, Fused(rope, w.q_norm, w.k_norm, eps), quantise(w.out),
        w.out_bias, w.mlp_norm, quantise(w.gate_up), w.gate_up_bias, quantise(w.down), w.down_bias,
    )  # fmt: skip


@kernel
def _quantise_kernel(
    x, norm, values, scales, size, eps,
    BLOCK: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One row of `size` numbers."""
    release_next(EARLY)
    after_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = row * (2 * size if GATED else size) + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value *= tl.sigmoid(value) * tl.load(x + at + size, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value) / size + eps) * weight
    scale = tl.maximum(tl.max(tl.abs(value)) / _LARGEST, _LEAST_SCALE)
    tl.store(scales + row, scale)
    tl.store(values + row * size + column, (value / scale).to(values.dtype.element_ty), mask=inside)


def quantise_rows(
    x: Tensor, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False, early: bool = True
) -> Scaled:
    """x [T, K] bfloat16, normed by `norm` [K] if there is one; gated: x is [T, 2 K], and silu(first half) * second."""
    rows, size = len(x), x.shape[1] // 2 if gated else x.shape[1]
    found = Scaled(x.new_empty(rows, size, dtype=FP8), x.new_empty(rows, dtype=torch.float32))
    block = triton.next_power_of_2(size)
    launch(
        _quantise_kernel, (rows,), x, norm, *found, size, eps, warps=min(16, max(1, block // 512)), BLOCK=block,
        HAS_NORM=norm is not None, GATED=gated, early=early and overlaps(x.device),
    )  # fmt: skip
    return found


def scaled_product(
    x: Scaled, weight: Scaled, bias: Tensor | None = None, residual: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """x [T, K] @ weight [N, K] transposed + bias + residual [T, N], bfloat16; K and N are multiples of 16."""
    rows, depth = x.values.shape
    num_out = len(weight.values)
    tile = tile or _tile(rows, num_out, depth)
    if tile is None:
        out = library_product(x, weight, bias)
        return out if residual is None else out.add_(residual)
    out = torch.empty(rows, num_out, dtype=torch.bfloat16, device=x.values.device)
    padded, blocks = max(16, triton.next_power_of_2(rows)), triton.cdiv(num_out, tile.outputs)
    parts, counters = out, out  # not touched when there is one part
    if tile.parts > 1:
        parts = torch.empty(blocks * tile.parts * tile.outputs * padded, dtype=torch.float32, device=out.device)
        counters = counters_on(out.device)
    launch(
        hopper_kernel, (blocks, tile.parts), x.values, weight.values, bias, residual, out, parts, counters, x.scale,
        weight.scale, rows, num_out, depth, warps=tile.warps, ROWS=padded, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        PARTS=tile.parts, STAGES=tile.stages, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=False,
        SCALED=True, early=True,
    )  # fmt: skip
    return out


def library_product(x: Scaled, weight: Scaled, bias: Tensor | None = None) -> Tensor:
    """The same by CUTLASS, without a residual."""
    scales = x.scale[:, None], weight.scale[None, :]
    return torch._scaled_mm(
        x.values, weight.values.t(), *scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _tile(rows: int, num_out: int, depth: int) -> Tile | None:
    """By bench/gpu_products.py on an H100. None: the library's product, for many rows or outputs, or odd shapes."""
    if rows > MAX_ROWS or depth % 64 or (rows > 64 and num_out >= _WIDE):
        return None
    inputs = next(size for size in (256, 128, 64) if depth % size == 0)
    return in_parts(Tile(64, inputs if rows <= 64 else min(inputs, 128), 4, 6), num_out, depth)
