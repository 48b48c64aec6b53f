"""Attention of prompts and chunks on Hopper GPUs, for `CudaOps`: what ops_cuda_prefill.py defines, about half as long.

Triton's own schedule lets the tensor cores wait for the softmax. Here the order of a turn is written out
(FlashAttention-3: Shah et al., 2024): the scores of this turn and the sum over values of the turn before are started
together, and while the second runs, the softmax of the first is computed. Written in Gluon, Triton's lower language,
where layouts, copies and waits are explicit.
"""

from __future__ import annotations

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from disagg.model.ops_cuda_jit import kernel

_SEARCH = gl.constexpr(256)  # sequences looked at together to find a program's own


@partial(kernel, jit=gluon.jit)
def hopper_kernel(
    q, pages, page_table, query_start, context_len, out, first, num_sequences, table_width, layer, scale,
    NUM_HEADS: gl.constexpr, NUM_KV: gl.constexpr, SIZE: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PAGE_STRIDE: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One tile of query rows over all keys they may see; rows past a sequence's end repeat its last one."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV
    KV_STRIDE: gl.constexpr = NUM_KV * PAGE_SIZE * SIZE
    dtype: gl.constexpr = q.dtype.element_ty
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIZE, SIZE // 8], [WARPS, 1], [1, 0])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIZE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    kv_head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # the last tiles see most keys: start with them
    query_start += first
    sequence = _sequence_of(tile, query_start, num_sequences, TOKENS, WARPS)
    begin = gl.load(query_start + sequence)
    num_rows = gl.load(query_start + sequence + 1) - begin
    context = gl.load(context_len + first + sequence)
    first_token = (tile - (begin - gl.load(query_start)) // TOKENS - sequence) * TOKENS
    if first_token >= num_rows:
        return
    table = page_table + (first + sequence).to(gl.int64) * table_width
    base = pages + layer * (2 * KV_STRIDE) + kv_head * (PAGE_SIZE * SIZE)
    past = context - num_rows
    seen_by_all = past + first_token + 1
    turns = gl.cdiv(gl.minimum(past + first_token + TOKENS, context), KEYS)

    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, SIZE], dtype)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, SIZE], shared)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, SIZE], shared)
    at = _places(begin, first_token, num_rows, kv_head, NUM_HEADS, GROUP, TOKENS, SIZE, ROWS, copied)
    # in registers: from shared memory they would be read again each turn, as many bytes as the keys
    queries = gl.convert_layout(gl.load(q + at), gl.DotOperandLayout(0, scores, 2))
    for turn in gl.static_range(STAGES - 2):
        page = _pages(turn, context, table, PAGE_SIZE, KEYS, copied)
        _copy(keys, values, turn, turn, turns, context, page, base, PAGE_SIZE, PAGE_STRIDE, KV_STRIDE, SIZE, KEYS,
              copied)  # fmt: skip
    page = _pages(STAGES - 2, context, table, PAGE_SIZE, KEYS, copied)

    scale_2 = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores))
    position = past + gl.minimum(first_token + row // GROUP, num_rows - 1)
    highest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, scores))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, scores))
    result = gl.zeros([ROWS, SIZE], gl.float32, layout=sums)
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout=scores)

    async_copy.wait_group(STAGES - 3)
    fence_async_shared()
    gl.thread_barrier()
    score = warpgroup_mma(queries, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=(score,))
    score = _masked(score, 0, position, KEYS, scores)
    highest, total, share, fade = _softmax(score, highest, total, scale_2)
    share = gl.convert_layout(share.to(dtype), left)
    unmasked = gl.maximum(gl.minimum(seen_by_all // KEYS, turns), 1)
    summing, used = warpgroup_mma_init(result), share
    for turn in range(1, unmasked):
        summing, used, share, fade, highest, total, page = _turn(
            queries, keys, values, summing, used, share, fade, highest, total, nothing, turn, turns, context, table,
            page, base, position, scale_2, PAGE_SIZE, PAGE_STRIDE, KV_STRIDE, SIZE, KEYS, STAGES, copied, scores, sums,
            left, False,
        )  # fmt: skip
    for turn in range(unmasked, turns):
        summing, used, share, fade, highest, total, page = _turn(
            queries, keys, values, summing, used, share, fade, highest, total, nothing, turn, turns, context, table,
            page, base, position, scale_2, PAGE_SIZE, PAGE_STRIDE, KV_STRIDE, SIZE, KEYS, STAGES, copied, scores, sums,
            left, True,
        )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    result, used = warpgroup_mma_wait(0, deps=(summing, used))
    result *= gl.convert_layout(fade, gl.SliceLayout(1, sums))[:, None]
    summing = warpgroup_mma(share, values.index((turns - 1) % STAGES), result, is_async=True)
    result, share = warpgroup_mma_wait(0, deps=(summing, share))
    result = result / gl.convert_layout(total, gl.SliceLayout(1, sums))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, copied))
    real = (row // GROUP < TOKENS) & (first_token + row // GROUP < num_rows)
    at = _places(begin, first_token, num_rows, kv_head, NUM_HEADS, GROUP, TOKENS, SIZE, ROWS, copied)
    gl.store(out + at, gl.convert_layout(result.to(dtype), copied), mask=real[:, None])


@gluon.jit
def _sequence_of(tile, query_start, num_sequences, TOKENS: gl.constexpr, WARPS: gl.constexpr):
    """The sequence a tile belongs to: b's tiles begin at query_start[b] // TOKENS + b, counted from the first."""
    origin = gl.load(query_start)
    before = 0
    for first in range(0, num_sequences, _SEARCH):
        index = first + gl.arange(0, _SEARCH, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        known = index < num_sequences
        start = (gl.load(query_start + index, mask=known, other=0) - origin) // TOKENS + index
        before += gl.sum((known & (start <= tile)).to(gl.int32), axis=0)
    return before - 1


@gluon.jit
def _places(
    begin, first_token, num_rows, kv_head, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    SIZE: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Where the tile's rows lie in q and out; a row that is none lies where the sequence's last one does."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))
    token = begin + gl.minimum(first_token + row // GROUP, num_rows - 1)
    return (token.to(gl.int64) * (NUM_HEADS * SIZE) + (kv_head * GROUP + row % GROUP) * SIZE)[:, None] + channel[
        None, :
    ]


@gluon.jit
def _pages(turn, context, table, PAGE_SIZE: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr):
    """The page of each key of a turn, of keys that there are not, of the last one."""
    key = gl.minimum(turn * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout)), context - 1)
    return gl.load(table + key // PAGE_SIZE)


@gluon.jit
def _copy(
    keys, values, turn, place, turns, context, page, base, PAGE_SIZE: gl.constexpr, PAGE_STRIDE: gl.constexpr,
    KV_STRIDE: gl.constexpr, SIZE: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Start copying a turn's keys and values, as a group of copies, an empty one past the last turn."""
    if turn < turns:
        channel = gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))
        key = gl.minimum(turn * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout)), context - 1)
        at = (page.to(gl.int64) * PAGE_STRIDE + key % PAGE_SIZE * SIZE)[:, None] + channel[None, :]
        async_copy.async_copy_global_to_shared(keys.index(place), base + at)
        async_copy.async_copy_global_to_shared(values.index(place), base + KV_STRIDE + at)
    async_copy.commit_group()


@gluon.jit
def _turn(
    queries, keys, values, summing, used, share, fade, highest, total, nothing, turn, turns, context, table, page,
    base, position, scale_2,
    PAGE_SIZE: gl.constexpr, PAGE_STRIDE: gl.constexpr, KV_STRIDE: gl.constexpr, SIZE: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, copied: gl.constexpr, scores: gl.constexpr, sums: gl.constexpr,
    left: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of this turn's keys, and the sum over the values of the turn before with its `share` of each.

    The sum is still being computed at the end, from the `share` that is then called `used`: its wait comes after the
    next turn's barrier, because ahead of it the compiler would move it before the softmax.
    """
    async_copy.wait_group(STAGES - 4)
    fence_async_shared()
    gl.thread_barrier()  # also: every thread has waited for the sum of three turns ago, whose place is filled again
    _copy(keys, values, turn + STAGES - 3, (turn + STAGES - 3) % STAGES, turns, context, page, base, PAGE_SIZE,
          PAGE_STRIDE, KV_STRIDE, SIZE, KEYS, copied)  # fmt: skip
    page = _pages(turn + STAGES - 2, context, table, PAGE_SIZE, KEYS, copied)
    result, used = warpgroup_mma_wait(0, deps=(summing, used))
    result *= gl.convert_layout(fade, gl.SliceLayout(1, sums))[:, None]
    score = warpgroup_mma(queries, keys.index(turn % STAGES).permute((1, 0)), nothing, use_acc=False, is_async=True)
    summing = warpgroup_mma(share, values.index((turn - 1) % STAGES), result, is_async=True)
    score = warpgroup_mma_wait(1, deps=(score,))
    if MASKED:
        score = _masked(score, turn * KEYS, position, KEYS, scores)
    highest, total, next_share, fade = _softmax(score, highest, total, scale_2)
    return summing, share, gl.convert_layout(next_share.to(share.dtype), left), fade, highest, total, page


@gluon.jit
def _masked(score, first_key, position, KEYS: gl.constexpr, layout: gl.constexpr):
    """Scores of keys that a row may not see are -inf."""
    key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
    return gl.where(key[None, :] <= position[:, None], score, float("-inf"))


@gluon.jit
def _softmax(score, highest, total, scale_2):
    """One step of the online softmax: (highest, total, share, by how much what was summed before fades)."""
    higher = gl.maximum(highest, gl.max(score, axis=1) * scale_2)
    share = gl.exp2(score * scale_2 - higher[:, None])
    fade = gl.exp2(highest - higher)
    return higher, total * fade + gl.sum(share, axis=1), share, fade
