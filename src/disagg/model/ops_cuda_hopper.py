"""Products of few rows with a weight on Hopper GPUs: for `CudaOps` what ops_cuda_matrix.py defines, sooner done; for
`Fp8Ops` the same in eight bits, scaled by row.

A product of few rows takes as long as its weight takes to be read, and the memory idles between two of them: the end of
one, the start of the next, the first answers. So a program asks for its first STAGES - 1 tiles of the weight before it
waits for the kernel before it, and is small enough for programs of three kernels to share a multiprocessor. In Gluon,
because Triton's own pipeline would begin after the wait.
"""

from __future__ import annotations

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from disagg.model.ops_cuda_jit import kernel


@partial(kernel, jit=gluon.jit)
def hopper_kernel(  # noqa: C901 - most branches are decided when it is compiled
    x, weight, bias, residual, out, parts, counters, x_scale, weight_scale, rows, num_out, depth,
    ROWS: gl.constexpr, OUTPUTS: gl.constexpr, INPUTS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr, SCALED: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """OUTPUTS x ROWS numbers, `rows` of the ROWS are real, over one of PARTS parts of the inputs; four warps."""
    if EARLY:
        gdc_launch_dependents()
    dtype: gl.constexpr = weight.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    PIECE: gl.constexpr = 128 // BITS  # numbers of one copy: 16 bytes
    copied: gl.constexpr = gl.BlockedLayout([1, PIECE], [32 * PIECE // INPUTS, INPUTS // PIECE], [4, 1], [1, 0])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 256 // BITS])
    PLANES: gl.constexpr = 2 if GATED else 1
    block, part = gl.program_id(0), gl.program_id(1)
    turns = depth // (PARTS * INPUTS)
    share = turns * INPUTS
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([OUTPUTS, INPUTS], dtype)
    weights = gl.allocate_shared_memory(dtype, [STAGES * PLANES, OUTPUTS, INPUTS], wide)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, INPUTS], dtype)
    inputs = gl.allocate_shared_memory(dtype, [STAGES, ROWS, INPUTS], narrow)

    output = gl.minimum(block * OUTPUTS + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, copied)), num_out - 1)
    lane = part * share + gl.arange(0, INPUTS, layout=gl.SliceLayout(0, copied))
    from_weight = weight + output.to(gl.int64)[:, None] * depth + lane[None, :]
    from_up = from_weight + num_out.to(gl.int64) * depth
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, copied))
    real = (row < rows)[:, None]  # to read the last row again instead would keep all waiting for the same lines
    from_x = x + row[:, None] * depth + lane[None, :]
    for turn in gl.static_range(STAGES - 1):
        if turn < turns:
            _copy_weight(weights, from_weight, from_up, turn, turn, INPUTS, PLANES)
        async_copy.commit_group()
    if EARLY:
        gdc_wait()
    for turn in gl.static_range(STAGES - 1):
        if turn < turns:
            async_copy.async_copy_global_to_shared(inputs.index(turn), from_x + turn * INPUTS, real)
        async_copy.commit_group()

    total = gl.zeros([OUTPUTS, ROWS], gl.float32, layout=summed)
    total_up = gl.zeros([OUTPUTS, ROWS], gl.float32, layout=summed)
    for turn in range(0, turns):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()  # also: every thread is done with the turn before, whose place is filled again
        ahead = turn + STAGES - 1
        if ahead < turns:
            _copy_weight(weights, from_weight, from_up, ahead, ahead % STAGES, INPUTS, PLANES)
            async_copy.async_copy_global_to_shared(inputs.index(ahead % STAGES), from_x + ahead * INPUTS, real)
        async_copy.commit_group()
        place = turn % STAGES
        value = inputs.index(place).permute((1, 0))
        total = warpgroup_mma(weights.index(place * PLANES), value, total, is_async=True)
        if GATED:
            total_up = warpgroup_mma(weights.index(place * PLANES + 1), value, total_up, is_async=True)
            total, total_up = warpgroup_mma_wait(0, deps=(total, total_up))
        else:
            total = warpgroup_mma_wait(0, deps=(total,))

    stored: gl.constexpr = gl.BlockedLayout([4, 1], [OUTPUTS // 4, 128 // OUTPUTS], [1, 4], [0, 1])
    total = gl.convert_layout(total, stored)
    total_up = gl.convert_layout(total_up, stored)
    output = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, stored))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, stored))
    if PARTS > 1:
        SIZE: gl.constexpr = OUTPUTS * ROWS
        mine = parts + block * (PARTS * PLANES * SIZE) + row[None, :] * OUTPUTS + output[:, None]
        gl.store(mine + part * (PLANES * SIZE), total)
        if GATED:
            gl.store(mine + (part * PLANES + 1) * SIZE, total_up)
        gl.thread_barrier()  # all threads' numbers are written before the count says so
        if gl.atomic_add(counters + block, 1, sem="acq_rel") != PARTS - 1:
            return
        gl.store(counters + block, 0)
        total = gl.zeros([OUTPUTS, ROWS], gl.float32, layout=stored)
        total_up = gl.zeros([OUTPUTS, ROWS], gl.float32, layout=stored)
        for other in gl.static_range(PARTS):
            total += gl.load(mine + other * (PLANES * SIZE), cache_modifier=".cg")
            if GATED:
                total_up += gl.load(mine + (other * PLANES + 1) * SIZE, cache_modifier=".cg")
    output += block * OUTPUTS
    inside = (output < num_out)[:, None]
    if SCALED:
        by_row = gl.load(x_scale + row[None, :], mask=(row < rows)[None, :], other=0.0)
        total *= gl.load(weight_scale + output[:, None], mask=inside, other=0.0) * by_row
    if HAS_BIAS:
        total += gl.load(bias + output[:, None], mask=inside, other=0.0).to(gl.float32)
    if GATED:
        if HAS_BIAS:
            total_up += gl.load(bias + num_out + output[:, None], mask=inside, other=0.0).to(gl.float32)
        total = total / (1.0 + gl.exp(-total)) * total_up
    written = inside & (row < rows)[None, :]
    place = row.to(gl.int64)[None, :] * num_out + output[:, None]
    if HAS_RESIDUAL:
        total += gl.load(residual + place, mask=written, other=0.0).to(gl.float32)
    gl.store(out + place, total.to(out.dtype.element_ty), mask=written)


@gluon.jit
def _copy_weight(weights, from_weight, from_up, turn, place, INPUTS: gl.constexpr, PLANES: gl.constexpr):
    """Start copying a turn's tile of the weight; of a gated product's, both."""
    async_copy.async_copy_global_to_shared(weights.index(place * PLANES), from_weight + turn * INPUTS)
    if PLANES == 2:
        async_copy.async_copy_global_to_shared(weights.index(place * PLANES + 1), from_up + turn * INPUTS)
