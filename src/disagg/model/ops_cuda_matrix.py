"""The kernel for products of 2 to 128 rows with a weight: bound by the weight's bytes, so it is about keeping reads up.

A program takes some outputs and a part of the inputs, so that all programs together fit on the GPU at once and none of
them waits for another's turn. A weight's rows are the tall side of the tensor cores' tile (64 and more), the product's
few rows the short one. The last program to finish an output's parts adds them, always in the same order.
"""

from __future__ import annotations

import triton.language as tl

from disagg.model.ops_cuda_jit import after_previous, kernel, release_next


@kernel
def matrix_kernel(
    x, weight, bias, residual, out, parts, counters, rows, num_out, depth,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """OUTPUTS x ROWS numbers, `rows` of the ROWS are real, over one of PARTS parts of the inputs."""
    release_next(EARLY)
    block, part = tl.program_id(0), tl.program_id(1)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (output < num_out)[:, None]
    start = tl.minimum(output, num_out - 1).to(tl.int64)[:, None] * depth
    share = tl.cdiv(tl.cdiv(depth, INPUTS), PARTS) * INPUTS
    begin = part * share
    end = tl.minimum(begin + share, depth)
    row = tl.arange(0, ROWS)
    real = (row < rows)[:, None]
    lane = tl.arange(0, INPUTS)[None, :]
    up_weight = weight + num_out.to(tl.int64) * depth
    after_previous(EARLY)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    total_up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for first in tl.range(begin, end, INPUTS, num_stages=STAGES):
        k = first + lane
        value = tl.load(x + row[:, None] * depth + k, mask=real if EVEN else real & (k < end), other=0.0)
        value = tl.trans(value)
        total = tl.dot(at(weight + start + k, k, end, EVEN), value, total, input_precision="ieee")
        if GATED:
            total_up = tl.dot(at(up_weight + start + k, k, end, EVEN), value, total_up, input_precision="ieee")
    if PARTS > 1:
        SIZE: tl.constexpr = OUTPUTS * ROWS
        PLANES: tl.constexpr = 2 if GATED else 1
        mine = parts + block * (PARTS * PLANES * SIZE) + tl.arange(0, OUTPUTS)[:, None] * ROWS + row[None, :]
        tl.store(mine + part * (PLANES * SIZE), total)
        if GATED:
            tl.store(mine + (part * PLANES + 1) * SIZE, total_up)
        tl.debug_barrier()  # all threads' numbers are written before the count says so
        if tl.atomic_add(counters + block, 1, sem="acq_rel") != PARTS - 1:
            return
        tl.store(counters + block, 0)
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        total_up = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for other in tl.static_range(PARTS):
            total += tl.load(mine + other * (PLANES * SIZE), cache_modifier=".cg")
            if GATED:
                total_up += tl.load(mine + (other * PLANES + 1) * SIZE, cache_modifier=".cg")
    if HAS_BIAS:
        total += tl.load(bias + output[:, None], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            total_up += tl.load(bias + num_out + output[:, None], mask=inside, other=0.0).to(tl.float32)
    if GATED:
        total = total * tl.sigmoid(total) * total_up
    place = row[None, :].to(tl.int64) * num_out + output[:, None]
    written = (row < rows)[None, :] & inside
    if HAS_RESIDUAL:
        total += tl.load(residual + place, mask=written, other=0.0).to(tl.float32)
    tl.store(out + place, total, mask=written)


@kernel
def at(pointers, k, end, EVEN: tl.constexpr):
    """Numbers along the inputs, zero from `end` on; without a mask where no program reaches past it."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=k < end, other=0.0)
