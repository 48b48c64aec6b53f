"""Attention of prompts and chunks on Hopper GPUs, for `CudaOps`: what ops_cuda_prefill.py defines, faster.

Triton's own schedule lets the tensor cores wait for the softmax. Here the warps of a program have roles
(FlashAttention-3: Shah et al., 2024), and meet nowhere but at the places that keys and values pass through:

    copying    1 warp                 page table ─▶ keys, values ─▶ a place in shared memory, as soon as it is free
    computing  2 times 4 warps        scores of this turn, and sums over the values of the turn before, by one half
               64 rows of the tile    while the other is at its softmax

A program takes one tile after the other, so that the first keys of the next arrive while the last is written. Written
in Gluon, Triton's lower language, where layouts, copies and waits are explicit.

Heads of 128 channels, each kept as two halves of 64: a page's half is then one piece of shared memory, which the
hardware's copies of boxes (TMA) need.
"""

from __future__ import annotations

import functools
from functools import partial

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from disagg.model.ops_cuda_jit import Memory, kernel

_SEARCH = gl.constexpr(256)  # sequences looked at together to find a tile's own
_ROWS = gl.constexpr(64)  # of a tile, for each of the two groups of computing warps
_HALF = gl.constexpr(64)  # channels of half a head
HOPPER_ROWS = 128  # of a tile


def boxes(pages: Tensor) -> TensorDescriptor:
    """The pool [P, L, 2, H, page_size, 128] as the kernel copies it: half heads of one page at a time."""
    *_, page_size, size = pages.shape
    return _boxes(Memory(pages.data_ptr(), pages.dtype), pages.numel() // size, size, page_size)


@functools.lru_cache(maxsize=16)
def _boxes(memory: Memory, num_rows: int, size: int, page_size: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(memory, [num_rows, size], [size, 1], [page_size, size // 2], layout)


@partial(kernel, jit=gluon.jit)
def hopper_prefill_kernel(
    q, pages, page_table, query_start, context_len, out, first, num_sequences, table_width, layer, scale, num_tiles,
    NUM_HEADS: gl.constexpr, NUM_KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PAGE_ROWS: gl.constexpr,
    TOKENS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + num_programs, ... of the step; TOKENS tokens of a sequence a tile.

    `pages`: boxes of PAGE_SIZE rows and half a head out of the pool, seen as rows of a head; PAGE_ROWS of them a page.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    dtype: gl.constexpr = q.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [2 * STAGES, KEYS, _HALF], pages.layout)
    values = gl.allocate_shared_memory(dtype, [2 * STAGES, KEYS, _HALF], pages.layout)
    queries = gl.allocate_shared_memory(dtype, [4, _ROWS, _HALF], pages.layout)
    bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES + 2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(bars.index(place), count=1)  # keys are there
        mbarrier.init(bars.index(STAGES + place), count=1)  # values are there
        mbarrier.init(bars.index(2 * STAGES + place), count=2)  # neither group reads the keys any more
        mbarrier.init(bars.index(3 * STAGES + place), count=2)  # nor the values
    for group in gl.static_range(2):
        mbarrier.init(bars.index(4 * STAGES + group), count=1)  # the other group has started its products
    table = page_table + first.to(gl.int64) * table_width
    query_start += first
    context_len += first
    gl.warp_specialize(
        [
            (_compute, (q, out, queries, keys, values, bars, query_start, context_len, num_sequences, scale, num_tiles,
                        NUM_HEADS, NUM_KV, TOKENS, KEYS, STAGES, 0)),
            (_compute, (q, out, queries, keys, values, bars, query_start, context_len, num_sequences, scale, num_tiles,
                        NUM_HEADS, NUM_KV, TOKENS, KEYS, STAGES, 1)),
            (_copy, (pages, layer, table, keys, values, bars, query_start, context_len, num_sequences, table_width,
                     num_tiles, NUM_KV, PAGE_SIZE, PAGE_ROWS, TOKENS, KEYS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _tile(
    index, query_start, context_len, num_sequences, NUM_KV: gl.constexpr, TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """A tile's sequence, that one's first row, number of rows and context, the tile's first token, and its head.

    Sequence b's tiles begin at query_start[b] // TOKENS + b, counted from the first; its last ones may be empty.
    """
    tile = index // NUM_KV
    origin = gl.load(query_start)
    before = 0
    for start in range(0, num_sequences, _SEARCH):
        other = start + gl.arange(0, _SEARCH, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        known = other < num_sequences
        at = (gl.load(query_start + other, mask=known, other=0) - origin) // TOKENS + other
        before += gl.sum((known & (at <= tile)).to(gl.int32), axis=0)
    sequence = before - 1
    begin = gl.load(query_start + sequence)
    num_rows = gl.load(query_start + sequence + 1) - begin
    first_token = (tile - (begin - origin) // TOKENS - sequence) * TOKENS
    return sequence, begin, num_rows, gl.load(context_len + sequence), first_token, index % NUM_KV


@gluon.jit
def _turns(num_rows, context, first_token, TOKENS: gl.constexpr, KEYS: gl.constexpr):
    """Of KEYS keys each, up to the last one that a row of the tile may see; none if the tile has no row."""
    turns = gl.cdiv(gl.minimum(context - num_rows + first_token + TOKENS, context), KEYS)
    return gl.where(first_token < num_rows, turns, 0)


@gluon.jit
def _copy(
    pages, layer, table, keys, values, bars, query_start, context_len, num_sequences, table_width, num_tiles,
    NUM_KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PAGE_ROWS: gl.constexpr, TOKENS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: all turns of all tiles of the program. Past a context its last page is copied again."""
    count = 0
    for number in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        sequence, _begin, num_rows, context, first_token, kv_head = _tile(
            num_tiles - 1 - number, query_start, context_len, num_sequences, NUM_KV, TOKENS, 1
        )
        mine = table + sequence.to(gl.int64) * table_width
        first_row = (layer * 2 * NUM_KV + kv_head) * PAGE_SIZE
        for turn in range(_turns(num_rows, context, first_token, TOKENS, KEYS)):
            place, round_before = count % STAGES, (count // STAGES & 1) ^ 1
            mbarrier.wait(bars.index(2 * STAGES + place), round_before)
            _copy_turn(
                pages, mine, turn, context, first_row, keys, place, bars.index(place), PAGE_SIZE, PAGE_ROWS, KEYS
            )
            mbarrier.wait(bars.index(3 * STAGES + place), round_before)
            _copy_turn(
                pages, mine, turn, context, first_row + NUM_KV * PAGE_SIZE, values, place, bars.index(STAGES + place),
                PAGE_SIZE, PAGE_ROWS, KEYS,
            )  # fmt: skip
            count += 1


@gluon.jit
def _copy_turn(
    pages, table, turn, context, first_row, target, place, there, PAGE_SIZE: gl.constexpr, PAGE_ROWS: gl.constexpr,
    KEYS: gl.constexpr,
):  # fmt: skip
    """Start copying the keys, or the values, of one turn into their place; `there` counts the bytes that arrive."""
    NUM_PAGES: gl.constexpr = KEYS // PAGE_SIZE
    num_bytes: gl.constexpr = 2 * target.dtype.primitive_bitwidth // 8 * KEYS * _HALF
    mbarrier.expect(there, num_bytes)
    for index in gl.static_range(NUM_PAGES):
        page = gl.load(table + gl.minimum(turn * NUM_PAGES + index, (context - 1) // PAGE_SIZE))
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                pages, [page * PAGE_ROWS + first_row, half * _HALF], there,
                target.index(2 * place + half).slice(index * PAGE_SIZE, PAGE_SIZE),
            )  # fmt: skip


@gluon.jit
def _compute(
    q, out, queries, keys, values, bars, query_start, context_len, num_sequences, scale, num_tiles,
    NUM_HEADS: gl.constexpr, NUM_KV: gl.constexpr, TOKENS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One of the two groups of computing warps: rows 64 * GROUP and on of each tile of the program."""
    SHARING: gl.constexpr = NUM_HEADS // NUM_KV
    dtype: gl.constexpr = q.dtype.element_ty
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HALF, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    scale_2 = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has
    nothing = gl.zeros([_ROWS, KEYS], gl.float32, layout=scores)
    q_first, q_second = queries.index(2 * GROUP), queries.index(2 * GROUP + 1)
    count, phase = 0, 0
    for number in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _sequence, begin, num_rows, context, first_token, kv_head = _tile(
            num_tiles - 1 - number, query_start, context_len, num_sequences, NUM_KV, TOKENS, 4
        )
        turns = _turns(num_rows, context, first_token, TOKENS, KEYS)
        if turns > 0:
            past = context - num_rows
            at = _places(begin, first_token, num_rows, kv_head, NUM_HEADS, SHARING, GROUP, rows)
            q_first.store(gl.load(q + at))
            q_second.store(gl.load(q + _HALF + at))
            row = GROUP * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, scores))
            position = past + gl.minimum(first_token + row // SHARING, num_rows - 1)
            highest = gl.full([_ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, scores))
            total = gl.zeros([_ROWS], gl.float32, layout=gl.SliceLayout(1, scores))
            sum_first = gl.zeros([_ROWS, _HALF], gl.float32, layout=sums)
            sum_second = gl.zeros([_ROWS, _HALF], gl.float32, layout=sums)
            fence_async_shared()

            place, before = count % STAGES, (count + turns - 1) % STAGES
            mbarrier.wait(bars.index(place), count // STAGES & 1)
            _take_turn(bars, phase, STAGES, GROUP)
            score = _scores(q_first, q_second, keys, place, nothing)
            _pass_on(bars, STAGES, GROUP)
            score = warpgroup_mma_wait(0, deps=(score,))
            mbarrier.arrive(bars.index(2 * STAGES + place), count=1)
            score = _masked(score, 0, position, KEYS, scores)
            highest, total, share, _fade = _softmax(score, highest, total, scale_2)
            share = gl.convert_layout(share.to(dtype), left)
            unmasked = gl.maximum(gl.minimum((past + first_token + 1) // KEYS, turns), 1)
            for turn in range(1, unmasked):
                highest, total, share, sum_first, sum_second = _turn(
                    q_first, q_second, keys, values, bars, highest, total, share, sum_first, sum_second, nothing, turn,
                    count + turn, phase + turn, position, scale_2, KEYS, STAGES, GROUP, scores, sums, left, False,
                )  # fmt: skip
            for turn in range(unmasked, turns):
                highest, total, share, sum_first, sum_second = _turn(
                    q_first, q_second, keys, values, bars, highest, total, share, sum_first, sum_second, nothing, turn,
                    count + turn, phase + turn, position, scale_2, KEYS, STAGES, GROUP, scores, sums, left, True,
                )  # fmt: skip
            count, phase = count + turns, phase + turns + 1
            mbarrier.wait(bars.index(STAGES + before), (count - 1) // STAGES & 1)
            _take_turn(bars, phase - 1, STAGES, GROUP)
            sum_first = warpgroup_mma(share, values.index(2 * before), sum_first, is_async=True)
            sum_second = warpgroup_mma(share, values.index(2 * before + 1), sum_second, is_async=True)
            _pass_on(bars, STAGES, GROUP)
            sum_first, sum_second, share = warpgroup_mma_wait(0, deps=(sum_first, sum_second, share))
            mbarrier.arrive(bars.index(3 * STAGES + before), count=1)
            row = GROUP * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, rows))
            real = (row // SHARING < TOKENS) & (first_token + row // SHARING < num_rows)
            whole = gl.convert_layout(total, gl.SliceLayout(1, sums))[:, None]
            at = _places(begin, first_token, num_rows, kv_head, NUM_HEADS, SHARING, GROUP, rows)
            gl.store(out + at, gl.convert_layout((sum_first / whole).to(dtype), rows), mask=real[:, None])
            gl.store(out + _HALF + at, gl.convert_layout((sum_second / whole).to(dtype), rows), mask=real[:, None])


@gluon.jit
def _places(
    begin, first_token, num_rows, kv_head, NUM_HEADS: gl.constexpr, SHARING: gl.constexpr, GROUP: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Where the rows' first halves lie in q and out; a row that is none lies where the sequence's last one does."""
    row = GROUP * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, _HALF, layout=gl.SliceLayout(0, layout))
    token = begin + gl.minimum(first_token + row // SHARING, num_rows - 1)
    at = (token.to(gl.int64) * NUM_HEADS + kv_head * SHARING + row % SHARING) * (2 * _HALF)
    return at[:, None] + channel[None, :]


@gluon.jit
def _take_turn(bars, phase, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """Wait until the other group has started its products, so that ours run while that one is at its softmax."""
    mbarrier.wait(bars.index(4 * STAGES + GROUP), (phase + GROUP + 1) & 1)


@gluon.jit
def _pass_on(bars, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """It is the other group's turn."""
    mbarrier.arrive(bars.index(4 * STAGES + 1 - GROUP), count=1)


@gluon.jit
def _scores(q_first, q_second, keys, place, nothing):
    """Start queries [64, 128] times keys [KEYS, 128] transposed."""
    score = warpgroup_mma(q_first, keys.index(2 * place).permute((1, 0)), nothing, use_acc=False, is_async=True)
    return warpgroup_mma(q_second, keys.index(2 * place + 1).permute((1, 0)), score, is_async=True)


@gluon.jit
def _turn(
    q_first, q_second, keys, values, bars, highest, total, share, sum_first, sum_second, nothing, turn, count, phase,
    position, scale_2,
    KEYS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, scores: gl.constexpr, sums: gl.constexpr,
    left: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of this turn's keys, and the sums over the values of the turn before with its `share` of each."""
    place, before = count % STAGES, (count - 1) % STAGES
    mbarrier.wait(bars.index(place), count // STAGES & 1)
    mbarrier.wait(bars.index(STAGES + before), (count - 1) // STAGES & 1)
    _take_turn(bars, phase, STAGES, GROUP)
    score = _scores(q_first, q_second, keys, place, nothing)
    sum_first = warpgroup_mma(share, values.index(2 * before), sum_first, is_async=True)
    sum_second = warpgroup_mma(share, values.index(2 * before + 1), sum_second, is_async=True)
    _pass_on(bars, STAGES, GROUP)
    score = warpgroup_mma_wait(2, deps=(score,))
    mbarrier.arrive(bars.index(2 * STAGES + place), count=1)
    if MASKED:
        score = _masked(score, turn * KEYS, position, KEYS, scores)
    highest, total, next_share, fade = _softmax(score, highest, total, scale_2)
    sum_first, sum_second, share = warpgroup_mma_wait(0, deps=(sum_first, sum_second, share))
    mbarrier.arrive(bars.index(3 * STAGES + before), count=1)
    fade = gl.convert_layout(fade, gl.SliceLayout(1, sums))[:, None]
    next_share = gl.convert_layout(next_share.to(keys.dtype), left)
    return highest, total, next_share, sum_first * fade, sum_second * fade


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
