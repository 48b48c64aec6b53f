"""Attention of decodes on Hopper GPUs, for `CudaOps`: what ops_cuda_decode.py defines, nearer to the memory's speed.

How fast keys and values are read is how many of them are on their way at any time. In Triton's kernel they arrive in
registers, which hold few. Here the hardware's copies of boxes (TMA) bring them into shared memory, STAGES turns ahead:

    a program, one warp    pages of turn t + STAGES ─▶ the places that turn t has left
                           scores and sums of turn t, from its places, when their bytes have arrived

Three to six programs share a multiprocessor, by their shared memory, and none waits for another. Written in Gluon,
Triton's lower language, where layouts, copies and waits are explicit. Heads of 128 channels, each kept as two halves of
64; a box is what a page has of one head: keys and values, both halves of them.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from disagg.model.ops_cuda_jit import Memory, kernel

_SEEN = gl.constexpr(256)  # contexts looked at together
_ROWS = gl.constexpr(16)  # of the tensor core's tile: the query heads that share a key/value head, and nothing
_HALF = gl.constexpr(64)  # channels of half a head


def head_boxes(pages: Tensor) -> TensorDescriptor:
    """The pool [P, L, 2, H, page_size, 128] as boxes [2, 2, page_size, 64] of one head: keys or values, half, row."""
    num_pages, num_layers, _, num_kv, page_size, _ = pages.shape
    return _boxes(Memory(pages.data_ptr(), pages.dtype), num_pages * num_layers * 2, num_kv, page_size)


@functools.lru_cache(maxsize=16)
def _boxes(memory: Memory, planes: int, num_kv: int, page_size: int) -> TensorDescriptor:
    half, rows = _HALF.value, num_kv * page_size
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape, strides = [planes, 2, rows, half], [rows * 2 * half, half, 2 * half, 1]
    return TensorDescriptor(memory, shape, strides, [2, 2, page_size, half], layout)


@functools.partial(kernel, jit=gluon.jit)
def hopper_decode_kernel(  # noqa: C901 - most branches are decided when it is compiled
    source, boxes, pages, page_table, context_len, cos, sin, q_norm, k_norm, out, partial, peak, weight, counters,
    table_width, layer, scale, eps,
    NUM_HEADS: gl.constexpr, NUM_KV: gl.constexpr, PAGE_SIZE: gl.constexpr, PAGE_STRIDE: gl.constexpr,
    PAGES: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GOAL: gl.constexpr, FUSED: gl.constexpr,
    HAS_ROPE: gl.constexpr, HAS_NORM: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One sequence, one key/value head, one part of the context: see `attend_decodes`. A single warp.

    PAGES pages a turn. `boxes`: the pool, see `head_boxes`; `pages`: its memory, for the new key and value.
    """
    if EARLY:
        gdc_launch_dependents()
        if not FUSED:
            gdc_wait()  # the kernel before wrote keys and values
    SIZE: gl.constexpr = 2 * _HALF
    KEYS: gl.constexpr = PAGES * PAGE_SIZE
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV
    KV_STRIDE: gl.constexpr = NUM_KV * PAGE_SIZE * SIZE
    LAYERS: gl.constexpr = PAGE_STRIDE // (2 * KV_STRIDE)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    sequence, kv_head, part = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    length = gl.load(context_len + sequence)
    out_row = out + sequence.to(gl.int64) * (NUM_HEADS * SIZE) + kv_head * (GROUP * SIZE)
    if length == 0:  # a row of padding
        if part == 0:
            if EARLY and FUSED:
                gdc_wait()
            nothing = gl.zeros([_ROWS, _HALF], gl.float32, layout=tile)
            _store_rows(out_row, nothing, nothing, GROUP, tile)
        return

    past = length - 1 if FUSED else length  # keys to be read
    turns = gl.cdiv(past, KEYS)
    turns_of_part, parts = turns, 1
    if PARTS > 1:
        turns_of_part, parts = _cut(turns, context_len, KEYS, NUM_KV, PARTS, GOAL)
        if part >= parts:
            return

    places = gl.allocate_shared_memory(boxes.dtype, [STAGES * PAGES, 2, 2, PAGE_SIZE, _HALF], boxes.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    table = page_table + sequence.to(gl.int64) * table_width
    last_page = (length - 1) // PAGE_SIZE
    begin = part * turns_of_part
    count = gl.minimum(turns_of_part, turns - begin)
    for stage in gl.static_range(STAGES):
        if stage < count:
            first = _pages(table, begin + stage, last_page, PAGES)
            _copy(boxes, first, layer, kv_head, places, stage, bars.index(stage), LAYERS, PAGE_SIZE, PAGES)

    if EARLY and FUSED:
        gdc_wait()
    member = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, rows))
    half = gl.arange(0, _HALF, layout=gl.SliceLayout(0, rows))
    WIDTH: gl.constexpr = (NUM_HEADS + 2 * NUM_KV) * SIZE if FUSED else NUM_HEADS * SIZE
    row = source + sequence.to(gl.int64) * WIDTH
    at = (kv_head * GROUP + member)[:, None] * SIZE + half[None, :]
    in_query = (member < GROUP)[:, None]
    q_first = gl.load(row + at, mask=in_query, other=0.0)
    q_second = gl.load(row + at + _HALF, mask=in_query, other=0.0)
    highest = gl.full([_ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, tile))
    total = gl.zeros([_ROWS], gl.float32, layout=gl.SliceLayout(1, tile))
    sum_first = gl.zeros([_ROWS, _HALF], gl.float32, layout=tile)
    sum_second = gl.zeros([_ROWS, _HALF], gl.float32, layout=tile)
    scale_2 = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has
    if FUSED:
        at_key = row + (NUM_HEADS + kv_head) * SIZE + half
        k_first, k_second = gl.load(at_key).to(gl.float32), gl.load(at_key + _HALF).to(gl.float32)
        v_first, v_second = gl.load(at_key + NUM_KV * SIZE), gl.load(at_key + NUM_KV * SIZE + _HALF)
        wide_first, wide_second = q_first.to(gl.float32), q_second.to(gl.float32)
        if HAS_NORM:
            wide_first, wide_second, k_first, k_second = _normed(
                wide_first, wide_second, k_first, k_second, q_norm + half, k_norm + half, eps
            )
        if HAS_ROPE:
            cosine, sine = gl.load(cos + past * _HALF + half), gl.load(sin + past * _HALF + half)
            wide_first, wide_second = _rotated(wide_first, wide_second, cosine[None, :], sine[None, :])
            k_first, k_second = _rotated(k_first, k_second, cosine, sine)
        # rounded as they are where the pages hold them
        q_first, q_second = wide_first.to(q_first.dtype), wide_second.to(q_second.dtype)
        k_first, k_second = k_first.to(q_first.dtype), k_second.to(q_first.dtype)
        v_first, v_second = _only_finite(v_first), _only_finite(v_second)
        if part == 0:
            own_page = gl.load(table + past // PAGE_SIZE).to(gl.int64)
            own_row = (layer * 2 * NUM_KV + kv_head) * PAGE_SIZE + past % PAGE_SIZE
            own_place = pages + own_page * PAGE_STRIDE + own_row * SIZE + half
            _store_halves(own_place, k_first, k_second)
            _store_halves(own_place + KV_STRIDE, v_first, v_second)
            own = gl.sum(q_first.to(gl.float32) * k_first.to(gl.float32)[None, :], axis=1)
            own += gl.sum(q_second.to(gl.float32) * k_second.to(gl.float32)[None, :], axis=1)
            highest = gl.convert_layout(own, gl.SliceLayout(1, tile)) * scale_2
            total += 1.0
            sum_first += gl.convert_layout(v_first, gl.SliceLayout(0, tile)).to(gl.float32)[None, :]
            sum_second += gl.convert_layout(v_second, gl.SliceLayout(0, tile)).to(gl.float32)[None, :]
    q_first, q_second = gl.convert_layout(q_first, left), gl.convert_layout(q_second, left)

    for turn in range(0, count):
        stage_of_turn = turn % STAGES
        ahead = _pages(table, begin + turn + STAGES, last_page, PAGES)
        mbarrier.wait(bars.index(stage_of_turn), turn // STAGES & 1)
        highest, total, sum_first, sum_second = _turn(
            q_first, q_second, places, stage_of_turn, highest, total, sum_first, sum_second,
            past - (begin + turn) * KEYS, scale_2, PAGE_SIZE, PAGES, tile,
        )  # fmt: skip
        gl.thread_barrier()  # all lanes have read the places that are filled again
        if turn + STAGES < count:
            _copy(
                boxes, ahead, layer, kv_head, places, stage_of_turn, bars.index(stage_of_turn), LAYERS, PAGE_SIZE, PAGES
            )  # fmt: skip

    if parts == 1:
        whole = total[:, None]
        _store_rows(out_row, sum_first / whole, sum_second / whole, GROUP, tile)
        return
    if PARTS > 1:
        group_of = (sequence * NUM_KV + kv_head).to(gl.int64) * PARTS
        _store_rows(partial + (group_of + part) * (GROUP * SIZE), sum_first, sum_second, GROUP, tile)
        member = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, tile))
        gl.store(peak + (group_of + part) * GROUP + member, highest, mask=member < GROUP)
        gl.store(weight + (group_of + part) * GROUP + member, total, mask=member < GROUP)
        gl.thread_barrier()  # all lanes' parts are written before the count says so
        counter = counters + sequence * NUM_KV + kv_head
        if gl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
            gl.store(counter, 0)
            _join(
                out_row, partial + group_of * (GROUP * SIZE), peak + group_of * GROUP, weight + group_of * GROUP, parts,
                GROUP, PARTS,
            )  # fmt: skip


@gluon.jit
def _cut(turns, context_len, KEYS: gl.constexpr, NUM_KV: gl.constexpr, PARTS: gl.constexpr, GOAL: gl.constexpr):
    """Turns of a part, and parts: of long and short contexts they are about equally long, so that they end together."""
    wanted = gl.maximum(gl.cdiv(_turns_of_all(context_len, KEYS) * NUM_KV, GOAL), 1)
    pieces = gl.minimum(gl.maximum((turns + wanted // 2) // wanted, 1), PARTS)
    turns_of_part = gl.maximum(gl.cdiv(turns, pieces), 1)
    return turns_of_part, gl.maximum(gl.cdiv(turns, turns_of_part), 1)


@gluon.jit
def _normed(q_first, q_second, k_first, k_second, q_norm, k_norm, eps):
    """Queries [rows, 64] twice and a key [64] twice, by RMSNorm; `q_norm`, `k_norm`: of the first halves."""
    q_square = gl.sum(q_first * q_first, axis=1) + gl.sum(q_second * q_second, axis=1)
    q_scale = gl.rsqrt(q_square / (2 * _HALF) + eps)[:, None]
    q_first *= q_scale * gl.load(q_norm).to(gl.float32)[None, :]
    q_second *= q_scale * gl.load(q_norm + _HALF).to(gl.float32)[None, :]
    k_scale = gl.rsqrt((gl.sum(k_first * k_first, axis=0) + gl.sum(k_second * k_second, axis=0)) / (2 * _HALF) + eps)
    k_first *= k_scale * gl.load(k_norm).to(gl.float32)
    k_second *= k_scale * gl.load(k_norm + _HALF).to(gl.float32)
    return q_first, q_second, k_first, k_second


@gluon.jit
def _rotated(first, second, cosine, sine):
    """Both halves of a head, rotated."""
    return first * cosine - second * sine, second * cosine + first * sine


@gluon.jit
def _store_halves(place, first, second):
    """Both halves of a head."""
    gl.store(place, first)
    gl.store(place + _HALF, second)


@gluon.jit
def _turns_of_all(context_len, KEYS: gl.constexpr):
    """The turns that all sequences of the launch take."""
    total = 0
    for first in range(0, gl.num_programs(0), _SEEN):
        sequence = first + gl.arange(0, _SEEN, layout=gl.BlockedLayout([1], [32], [1], [0]))
        length = gl.load(context_len + sequence, mask=sequence < gl.num_programs(0), other=0)
        total += gl.sum(gl.cdiv(length, KEYS), axis=0)
    return total


@gluon.jit
def _only_finite(value):
    """See ops_cuda_rows.only_finite."""
    return gl.where(gl.abs(value.to(gl.float32)) < float("inf"), value.to(gl.float32), 0.0).to(value.dtype)


@gluon.jit
def _pages(table, turn, last_page, PAGES: gl.constexpr):
    """The pages of a turn; past a context its last page again."""
    pages = ()
    for index in gl.static_range(PAGES):
        pages += (gl.load(table + gl.minimum(turn * PAGES + index, last_page)),)  # type: ignore[assignment]
    return pages


@gluon.jit
def _copy(
    boxes, pages, layer, kv_head, places, stage, there, LAYERS: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PAGES: gl.constexpr,
):  # fmt: skip
    """Start copying a turn's pages into the places of its stage; `there` counts the bytes that arrive."""
    mbarrier.expect(there, PAGES * 4 * PAGE_SIZE * _HALF * (boxes.dtype.primitive_bitwidth // 8))
    for index in gl.static_range(PAGES):
        at = [(pages[index] * LAYERS + layer) * 2, 0, kv_head * PAGE_SIZE, 0]
        tma.async_copy_global_to_shared(boxes, at, there, places.index(stage * PAGES + index))


@gluon.jit
def _turn(
    q_first, q_second, places, stage, highest, total, sum_first, sum_second, known, scale_2,
    PAGE_SIZE: gl.constexpr, PAGES: gl.constexpr, tile: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over a turn's keys, of which the first `known` are the sequence's."""
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, tile, 2)
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # [key or value, half] of each place one after the other
    halves = places._reinterpret(places.dtype, [4 * places.shape[0], PAGE_SIZE, _HALF], half)
    key = gl.arange(0, PAGE_SIZE, layout=gl.SliceLayout(0, tile))
    higher = highest
    scores = ()
    for index in gl.static_range(PAGES):
        at = 4 * (stage * PAGES + index)
        score = gl.zeros([_ROWS, PAGE_SIZE], gl.float32, layout=tile)
        score = mma_v2(q_first, halves.index(at).permute((1, 0)).load(right), score)
        score = mma_v2(q_second, halves.index(at + 1).permute((1, 0)).load(right), score)
        score = gl.where((index * PAGE_SIZE + key < known)[None, :], score * scale_2, float("-inf"))
        higher = gl.maximum(higher, gl.max(score, axis=1))
        scores += (score,)  # type: ignore[assignment]
    fade = gl.exp2(highest - higher)
    total *= fade
    sum_first *= fade[:, None]
    sum_second *= fade[:, None]
    for index in gl.static_range(PAGES):
        at = 4 * (stage * PAGES + index)
        share = gl.exp2(scores[index] - higher[:, None])
        total += gl.sum(share, axis=1)
        share = gl.convert_layout(share.to(places.dtype), left)
        sum_first = mma_v2(share, halves.index(at + 2).load(right), sum_first)
        sum_second = mma_v2(share, halves.index(at + 3).load(right), sum_second)
    return higher, total, sum_first, sum_second


@gluon.jit
def _store_rows(target, first, second, GROUP: gl.constexpr, tile: gl.constexpr):
    """The real rows of both halves, to [GROUP, 128]."""
    member = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, tile))
    half = gl.arange(0, _HALF, layout=gl.SliceLayout(0, tile))
    at = target + member[:, None] * (2 * _HALF) + half[None, :]
    dtype: gl.constexpr = target.dtype.element_ty
    gl.store(at, first.to(dtype), mask=(member < GROUP)[:, None])
    gl.store(at + _HALF, second.to(dtype), mask=(member < GROUP)[:, None])


@gluon.jit
def _join(out_row, partial, peak, weight, parts, GROUP: gl.constexpr, PARTS: gl.constexpr):
    """The result of a sequence's `parts` parts, whatever the order in which they were finished."""
    SIZE: gl.constexpr = 2 * _HALF
    MEMBERS: gl.constexpr = 1 if GROUP == 1 else 2 if GROUP == 2 else 4 if GROUP <= 4 else 8 if GROUP <= 8 else 16
    BLOCK: gl.constexpr = PARTS if PARTS * MEMBERS <= 32 else 32 // MEMBERS
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 1, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(2, cube)
    member = gl.arange(0, MEMBERS, layout=gl.SliceLayout(0, flat))
    channel = gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    in_members = (member < GROUP)[None, :]
    every = gl.arange(0, PARTS, layout=gl.SliceLayout(1, flat))[:, None]
    all_known = in_members & (every < parts)
    peaks = gl.load(peak + every * GROUP + member[None, :], mask=all_known, other=-1e30, cache_modifier=".cg")
    highest = gl.max(peaks, axis=0)
    total = gl.zeros([MEMBERS], gl.float32, layout=gl.SliceLayout(0, flat))
    result = gl.zeros([MEMBERS, SIZE], gl.float32, layout=gl.SliceLayout(0, cube))
    for first in range(0, parts, BLOCK):
        one = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, flat))[:, None]
        known, each = in_members & (one < parts), one * GROUP + member[None, :]
        fade = gl.load(peak + each, mask=known, other=-1e30, cache_modifier=".cg")
        share = gl.load(weight + each, mask=known, other=0.0, cache_modifier=".cg")
        at = each[:, :, None] * SIZE + channel[None, None, :]
        part = gl.load(partial + at, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
        fade = gl.exp2(fade - highest[None, :])
        total += gl.sum(fade * share, axis=0)
        result += gl.sum(fade[:, :, None] * part, axis=0)
    total = gl.convert_layout(gl.where(member < GROUP, total, 1.0), gl.SliceLayout(1, gl.SliceLayout(0, cube)))
    row = gl.arange(0, MEMBERS, layout=gl.SliceLayout(1, gl.SliceLayout(0, cube)))[:, None]
    column = gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(0, cube)))[None, :]
    gl.store(out_row + row * SIZE + column, (result / total[:, None]).to(out_row.dtype.element_ty), mask=row < GROUP)
