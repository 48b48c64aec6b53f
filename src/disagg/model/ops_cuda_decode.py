"""Attention of decodes for `CudaOps`: one query row a sequence, bound by reading keys and values once.

A program takes one sequence, one key/value head with all query heads that share it, and a part of the context
(FlashDecoding: Dao et al., 2023). The most parts there can be are fixed when the kernel is launched, so a CUDA graph
can hold it; how many are used, and how long they are, follows from the lengths of all contexts, read on the device. The
program that finishes a sequence's last part joins them, which saves a kernel.

In a step of decodes alone the same kernel also norms and rotates query and key and writes the new key and value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.ops import Rope, Step
from disagg.model.ops_cuda_decode_hopper import head_boxes, hopper_decode_kernel
from disagg.model.ops_cuda_jit import after_previous, counters_on, is_hopper, kernel, launch, overlaps, release_next
from disagg.model.ops_cuda_rows import only_finite

_MAX_PARTS = 32
_SEEN = tl.constexpr(64)  # contexts looked at together
_MIN_TILE = 16  # rows, and inputs, of a tensor core's tile


class DecodeTile(NamedTuple):
    """How the work is cut."""

    keys: int  # of one turn of the loop
    warps: int
    programs: int  # the most that contexts are cut into, while that is more than one a context
    goal: int  # how many of them read about equally much: some for each of 132 multiprocessors
    stages: int = 0  # turns that are copied ahead; 0: the next one, into registers, by Triton's kernel


_TILE = DecodeTile(32, 2, 1024, 396)
# on Hopper, by bench/gpu_ops.py --sweep
_FEW, _MANY = DecodeTile(32, 1, 1024, 396, 4), DecodeTile(32, 1, 2112, 1584, 2)
_FEWEST_OF_MANY = 40  # sequences


class Fused(NamedTuple):
    """What the kernel does before attention: see `Ops.rotate_and_store`."""

    rope: Rope | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


def decode_tile(pages: Tensor, group: int, num_sequences: int) -> DecodeTile:
    """The tile for a pool, for so many query heads that share a key/value head, and for so many sequences."""
    page_size, size = pages.shape[4:]
    if size == 128 and page_size in (16, 32) and group <= _MIN_TILE and is_hopper(pages.device, pages.dtype):
        return _FEW if num_sequences < _FEWEST_OF_MANY else _MANY
    return _TILE


def parts_of(num_sequences: int, num_kv: int, max_context_len: int, tile: DecodeTile) -> int:
    """Into how many parts a context is cut at most: enough to fill the GPU, none shorter than a turn of the loop.

    A power of two, because each number is a kernel of its own, to be compiled before anything is served.
    """
    wanted = triton.cdiv(tile.programs, num_sequences * num_kv)
    most = max(1, min(wanted, _MAX_PARTS, triton.cdiv(max_context_len, tile.keys)))
    return 1 << (most.bit_length() - 1)


def attend_decodes(
    source: Tensor, layer: int, pages: Tensor, step: Step, scale: float, out: Tensor, num_sequences: int,
    fused: Fused | None = None, tile: DecodeTile | None = None,
) -> None:  # fmt: skip
    """Write out[:num_sequences] [Hq * D] of sequences with one row each, which is the row of their own number.

    `source` is q [T, Hq, D] with keys and values already in the pages, or with `fused` the rows of the merged
    projection [T, (Hq + 2 Hkv) * D]; then no kernel launched early may have written keys and values of the past.
    """
    num_kv, page_size, size = pages.shape[3:]
    num_heads, counters = out.shape[1] // size, counters_on(out.device)
    if num_sequences * num_kv > len(counters):
        raise ValueError(f"{num_sequences} sequences of {num_kv} heads need more than {len(counters)} counters")
    longest = step.max_context_len or step.page_table.shape[1] * page_size
    group = num_heads // num_kv
    tile = tile or decode_tile(pages, group, num_sequences)
    parts = parts_of(num_sequences, num_kv, longest, tile)
    shape = (num_sequences, num_kv, parts, group)
    partial, peak, weight = out, out, out  # not touched when there is one part
    if parts > 1:
        partial = torch.empty(*shape, size, dtype=torch.float32, device=out.device)
        peak, weight = torch.empty(2, *shape, dtype=torch.float32, device=out.device)
    rope, q_norm, k_norm, eps = fused or Fused(None, None, None, 0.0)
    cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
    grid = (num_sequences, num_kv, parts)
    tensors = (pages, step.page_table, step.context_len, cos, sin, q_norm, k_norm, out, partial, peak, weight, counters)
    numbers = (step.page_table.stride(0), layer, scale, eps)
    flags: dict[str, Any] = {
        "NUM_HEADS": num_heads, "NUM_KV": num_kv, "PAGE_SIZE": page_size, "PAGE_STRIDE": pages.stride(0),
        "PARTS": parts, "GOAL": tile.goal, "FUSED": fused is not None, "HAS_ROPE": rope is not None,
        "HAS_NORM": q_norm is not None, "warps": tile.warps, "early": overlaps(out.device),
    }  # fmt: skip
    if tile.stages:
        boxes = head_boxes(pages)
        flags |= {"PAGES": tile.keys // page_size, "STAGES": tile.stages}
        launch(hopper_decode_kernel, grid, source, boxes, *tensors, *numbers, **flags)
        return
    launch(
        _decode_kernel, grid, source, *tensors, *numbers, SIZE=size, KEYS=tile.keys,
        HALF_BLOCK=max(_MIN_TILE, triton.next_power_of_2(size // 2)),
        GROUP_BLOCK=max(_MIN_TILE, triton.next_power_of_2(group)), **flags,
    )  # fmt: skip


@kernel
def _decode_kernel(  # noqa: C901 - most branches are decided when it is compiled
    source, pages, page_table, context_len, cos, sin, q_norm, k_norm,
    out, partial, peak, weight, counters, table_width, layer, scale, eps,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, SIZE: tl.constexpr, HALF_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, GOAL: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, FUSED: tl.constexpr, HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One sequence, one key/value head, one part of the context. Halves of a head are kept apart, as rotation does.

    Keys and values of a turn are asked for a turn before, those of the first before the previous kernel has ended.
    """
    release_next(EARLY)
    if not FUSED:
        after_previous(EARLY)  # it wrote keys and values
    HALF: tl.constexpr = SIZE // 2
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV
    KV_STRIDE: tl.constexpr = NUM_KV * PAGE_SIZE * SIZE
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV) * SIZE if FUSED else NUM_HEADS * SIZE
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_len + sequence)
    member = tl.arange(0, GROUP_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    channel = tl.arange(0, 2 * HALF_BLOCK)
    in_half, in_head = half < HALF, channel < SIZE
    out_row = out + sequence.to(tl.int64) * (NUM_HEADS * SIZE) + kv_head * (GROUP * SIZE)
    at_group = member[:, None] * SIZE + channel[None, :]
    in_group = (member < GROUP)[:, None] & in_head[None, :]
    if length == 0:  # a row of padding
        if part == 0:
            if FUSED:
                after_previous(EARLY)
            tl.store(out_row + at_group, tl.zeros([GROUP_BLOCK, 2 * HALF_BLOCK], tl.float32), mask=in_group)
        return

    past = length - 1 if FUSED else length  # keys to be read
    turns = tl.cdiv(past, KEYS)
    turns_of_part, parts = turns, 1
    if PARTS > 1:  # parts of long and short contexts are about equally long, so that they end together
        wanted = tl.maximum(tl.cdiv(_turns_of_all(context_len, KEYS) * NUM_KV, GOAL), 1)
        pieces = tl.minimum(tl.maximum((turns + wanted // 2) // wanted, 1), PARTS)
        turns_of_part = tl.maximum(tl.cdiv(turns, pieces), 1)
        parts = tl.maximum(tl.cdiv(turns, turns_of_part), 1)
        if part >= parts:
            return

    begin = part * turns_of_part * KEYS
    end = tl.minimum(begin + turns_of_part * KEYS, past)
    table = page_table + sequence.to(tl.int64) * table_width
    kv_base = pages + layer * (2 * KV_STRIDE) + kv_head * (PAGE_SIZE * SIZE)
    lane = tl.arange(0, KEYS)
    key = begin + lane
    page = tl.load(table + key // PAGE_SIZE, mask=key < end, other=0).to(tl.int64)
    keys_first, keys_second, values = _keys_and_values(
        kv_base + page * PAGE_STRIDE + key % PAGE_SIZE * SIZE, key < end, half, channel, HALF, SIZE, KV_STRIDE
    )
    page = tl.load(table + (key + KEYS) // PAGE_SIZE, mask=key + KEYS < end, other=0).to(tl.int64)

    if FUSED:
        after_previous(EARLY)
    row = source + sequence.to(tl.int64) * WIDTH
    at = (kv_head * GROUP + member)[:, None] * SIZE + half[None, :]
    in_query = (member < GROUP)[:, None] & in_half[None, :]
    q_first = tl.load(row + at, mask=in_query, other=0.0)
    q_second = tl.load(row + at + HALF, mask=in_query, other=0.0)
    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    result = tl.zeros([GROUP_BLOCK, 2 * HALF_BLOCK], tl.float32)
    scale_2 = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has
    if FUSED:
        at_key = (NUM_HEADS + kv_head) * SIZE
        k_first = tl.load(row + at_key + half, mask=in_half, other=0.0).to(tl.float32)
        k_second = tl.load(row + at_key + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        value = tl.load(row + at_key + NUM_KV * SIZE + channel, mask=in_head, other=0.0)
        wide_first, wide_second = q_first.to(tl.float32), q_second.to(tl.float32)
        if HAS_NORM:
            square = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
            q_scale = tl.rsqrt(square / SIZE + eps)[:, None]
            wide_first *= q_scale * tl.load(q_norm + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
            wide_second *= q_scale * tl.load(q_norm + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
            k_scale = tl.rsqrt((tl.sum(k_first * k_first) + tl.sum(k_second * k_second)) / SIZE + eps)
            k_first *= k_scale * tl.load(k_norm + half, mask=in_half, other=0.0).to(tl.float32)
            k_second *= k_scale * tl.load(k_norm + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        if HAS_ROPE:
            c = tl.load(cos + past * HALF + half, mask=in_half, other=0.0)
            s = tl.load(sin + past * HALF + half, mask=in_half, other=0.0)
            wide_first, wide_second = (
                wide_first * c[None, :] - wide_second * s[None, :],
                wide_second * c[None, :] + wide_first * s[None, :],
            )
            k_first, k_second = k_first * c - k_second * s, k_second * c + k_first * s
        # rounded as they are where the pages hold them
        q_first, q_second = wide_first.to(q_first.dtype), wide_second.to(q_second.dtype)
        k_first, k_second = k_first.to(q_first.dtype), k_second.to(q_first.dtype)
        if part == 0:
            own_page = tl.load(table + past // PAGE_SIZE).to(tl.int64)
            place = kv_base + own_page * PAGE_STRIDE + past % PAGE_SIZE * SIZE
            tl.store(place + half, k_first, mask=in_half)
            tl.store(place + HALF + half, k_second, mask=in_half)
            tl.store(place + KV_STRIDE + channel, only_finite(value), mask=in_head)
        own = tl.sum(q_first.to(tl.float32) * k_first.to(tl.float32)[None, :], axis=1)
        own += tl.sum(q_second.to(tl.float32) * k_second.to(tl.float32)[None, :], axis=1)
        highest = tl.where(part == 0, own * scale_2, float("-inf"))
        total = tl.where(part == 0, 1.0, 0.0) + tl.zeros([GROUP_BLOCK], tl.float32)
        result += tl.where(part == 0, value.to(tl.float32), 0.0)[None, :]

    for first_key in tl.range(begin, end, KEYS, num_stages=1):
        key = first_key + KEYS + lane
        next_first, next_second, next_values = _keys_and_values(
            kv_base + page * PAGE_STRIDE + key % PAGE_SIZE * SIZE, key < end, half, channel, HALF, SIZE, KV_STRIDE
        )
        page = tl.load(table + (key + KEYS) // PAGE_SIZE, mask=key + KEYS < end, other=0).to(tl.int64)
        score = tl.dot(q_first, tl.trans(keys_first), input_precision="ieee")
        score = tl.dot(q_second, tl.trans(keys_second), score, input_precision="ieee")
        score = tl.where((first_key + lane < end)[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1) * scale_2)
        share = tl.exp2(score * scale_2 - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(share, axis=1)
        result = tl.dot(share.to(values.dtype), values, result * fade[:, None], input_precision="ieee")
        highest = higher
        keys_first, keys_second, values = next_first, next_second, next_values

    if PARTS == 1:
        tl.store(out_row + at_group, result / total[:, None], mask=in_group)
    else:
        if parts == 1:
            tl.store(out_row + at_group, result / total[:, None], mask=in_group)
            return
        group_of = (sequence * NUM_KV + kv_head).to(tl.int64) * PARTS
        in_members = member < GROUP
        tl.store(partial + (group_of + part) * (GROUP * SIZE) + at_group, result, mask=in_group)
        tl.store(peak + (group_of + part) * GROUP + member, highest, mask=in_members)
        tl.store(weight + (group_of + part) * GROUP + member, total, mask=in_members)
        tl.debug_barrier()  # all threads' parts are written before the count says so
        counter = counters + sequence * NUM_KV + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
            tl.store(counter, 0)
            _join(
                out_row, partial + group_of * (GROUP * SIZE), peak + group_of * GROUP, weight + group_of * GROUP, parts,
                channel, GROUP, SIZE, PARTS,
            )  # fmt: skip


@kernel
def _turns_of_all(context_len, KEYS: tl.constexpr):
    """The turns that all sequences of the launch take."""
    total = 0
    for first in range(0, tl.num_programs(0), _SEEN):
        sequence = first + tl.arange(0, _SEEN)
        length = tl.load(context_len + sequence, mask=sequence < tl.num_programs(0), other=0)
        total += tl.sum(tl.cdiv(length, KEYS))
    return total


@kernel
def _keys_and_values(
    place, known, half, channel, HALF: tl.constexpr, SIZE: tl.constexpr, KV_STRIDE: tl.constexpr
):  # fmt: skip
    """Both halves of keys [KEYS, HALF], and values [KEYS, SIZE], of one turn."""
    seen = known[:, None] & (half < HALF)[None, :]
    keys_first = tl.load(place[:, None] + half[None, :], mask=seen, other=0.0)
    keys_second = tl.load(place[:, None] + HALF + half[None, :], mask=seen, other=0.0)
    all_seen = known[:, None] & (channel < SIZE)[None, :]
    return keys_first, keys_second, tl.load(place[:, None] + KV_STRIDE + channel[None, :], mask=all_seen, other=0.0)


@kernel
def _join(
    out_row, partial, peak, weight, parts, channel,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """The result of a sequence's `parts` parts, whatever the order in which they were finished."""
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)
    BLOCK: tl.constexpr = PARTS if PARTS < 8 else 8
    member = tl.arange(0, MEMBERS)
    in_members = (member < GROUP)[None, :]
    every = tl.arange(0, PARTS)[:, None]
    place = peak + every * GROUP + member[None, :]
    peaks = tl.load(place, mask=in_members & (every < parts), other=-1e30, cache_modifier=".cg")
    highest = tl.max(peaks, axis=0)
    total = tl.zeros([MEMBERS], tl.float32)
    result = tl.zeros([MEMBERS, channel.shape[0]], tl.float32)
    in_head = (channel < SIZE)[None, None, :]
    for first in tl.static_range(0, PARTS, BLOCK):
        if first < parts:
            one = first + tl.arange(0, BLOCK)[:, None]
            known, each = in_members & (one < parts), one * GROUP + member[None, :]
            fade = tl.load(peak + each, mask=known, other=-1e30, cache_modifier=".cg")
            share = tl.load(weight + each, mask=known, other=0.0, cache_modifier=".cg")
            at = each[:, :, None] * SIZE + channel[None, None, :]
            part = tl.load(partial + at, mask=known[:, :, None] & in_head, other=0.0, cache_modifier=".cg")
            fade = tl.exp2(fade - highest[None, :])
            total += tl.sum(fade * share, axis=0)
            result += tl.sum(fade[:, :, None] * part, axis=0)
    at = member[:, None] * SIZE + channel[None, :]
    total = tl.where(member < GROUP, total, 1.0)
    tl.store(out_row + at, result / total[:, None], mask=(member < GROUP)[:, None] & (channel < SIZE)[None, :])
