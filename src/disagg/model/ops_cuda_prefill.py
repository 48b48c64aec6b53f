"""Attention of prompts and chunks for `CudaOps`: many query rows a sequence, bound by arithmetic.

FlashAttention-2's loop (Dao, 2023) over keys and values in pages. The rows of a tile are neighbouring tokens of one
sequence times the query heads that share a key/value head. Any mix of sequence lengths is one launch: a program finds
its sequence in `query_start` itself, so the host need not know the lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.ops import Step
from disagg.model.ops_cuda_jit import (
    INTERPRETED,
    after_previous,
    is_hopper,
    kernel,
    launch,
    multiprocessors,
    overlaps,
    release_next,
)
from disagg.model.ops_cuda_prefill_hopper import HOPPER_ROWS, boxes, hopper_prefill_kernel

_SEARCH = tl.constexpr(256)  # sequences looked at together to find a program's own


class PrefillTile(NamedTuple):
    """What one program takes: rows of queries, and keys at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


def prefill_tile(size: int, dtype: torch.dtype) -> PrefillTile:
    """The tile for a head size; float32 has half the room."""
    if INTERPRETED:
        return PrefillTile(32, 32, 1, 1)
    if dtype == torch.float32:
        return PrefillTile(32, 32, 4, 2)
    return PrefillTile(128, 128, 8, 3) if size > 64 else PrefillTile(128, 64, 4, 3)


def attend_chunks(
    q: Tensor, layer: int, pages: Tensor, step: Step, scale: float, out: Tensor, first: int,
    tile: PrefillTile | None = None,
) -> None:  # fmt: skip
    """Write the rows of out [T, Hq * D] that belong to sequences first, first + 1, ... of the step."""
    num_kv, page_size, size = pages.shape[3:]
    num_heads = q.shape[1]
    num_sequences = len(step.context_len) - first
    share = num_heads // num_kv  # of a key/value head
    tensors = (step.page_table, step.query_start, step.context_len, out)
    numbers = (first, num_sequences, step.page_table.stride(0), layer, scale)
    early = overlaps(q.device)
    fits = size == 128 and page_size in (16, 32, 64, 128) and share <= HOPPER_ROWS
    if tile is None and fits and is_hopper(q.device, q.dtype):
        tokens = HOPPER_ROWS // share
        num_tiles = _most_tiles(len(q), num_sequences, tokens) * num_kv
        launch(
            hopper_prefill_kernel, (min(num_tiles, multiprocessors(q.device)),), q, boxes(pages), *tensors, *numbers,
            num_tiles, NUM_HEADS=num_heads, NUM_KV=num_kv, PAGE_SIZE=page_size,
            PAGE_ROWS=pages.stride(0) // size, TOKENS=tokens, KEYS=128, STAGES=2, early=early,
        )  # fmt: skip
        return
    tile = tile or prefill_tile(size, q.dtype)
    tokens = tile.rows // share
    launch(
        _prefill_kernel, (num_kv, _most_tiles(len(q), num_sequences, tokens)), q, pages, *tensors, *numbers,
        NUM_HEADS=num_heads, NUM_KV=num_kv, SIZE=size, SIZE_BLOCK=triton.next_power_of_2(size), PAGE_SIZE=page_size,
        PAGE_STRIDE=pages.stride(0), TOKENS=tokens, ROWS=tile.rows, KEYS=tile.keys, STAGES=tile.stages,
        warps=tile.warps, early=early,
    )  # fmt: skip


def _most_tiles(num_rows: int, num_sequences: int, tokens: int) -> int:
    """Of sequences that share up to `num_rows` rows; each one's last tile may be a partial one.

    Fewer of the sequences before them may have a row than there are (see Step), so none of a step's rows is left out.
    """
    return num_rows // tokens + num_sequences


@kernel
def _prefill_kernel(
    q, pages, page_table, query_start, context_len, out, first, num_sequences,
    table_width, layer, scale,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of query rows over all keys they may see."""
    release_next(EARLY)
    after_previous(EARLY)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV
    KV_STRIDE: tl.constexpr = NUM_KV * PAGE_SIZE * SIZE
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last tiles see most keys: start with them
    query_start += first
    sequence = _sequence_of(tile, query_start, num_sequences, TOKENS)
    begin = tl.load(query_start + sequence)
    num_rows = tl.load(query_start + sequence + 1) - begin
    context = tl.load(context_len + first + sequence)
    first_token = (tile - (begin - tl.load(query_start)) // TOKENS - sequence) * TOKENS
    if first_token >= num_rows:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    channel = tl.arange(0, SIZE_BLOCK)
    real = (row // GROUP < TOKENS) & (token < num_rows)
    at = (begin + token).to(tl.int64) * (NUM_HEADS * SIZE) + (kv_head * GROUP + row % GROUP) * SIZE
    at = at[:, None] + channel[None, :]
    inside = real[:, None] & (channel < SIZE)[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    past = context - num_rows
    position = past + token
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, SIZE_BLOCK], tl.float32)
    table = page_table + (first + sequence).to(tl.int64) * table_width
    base = pages + layer * (2 * KV_STRIDE) + kv_head * (PAGE_SIZE * SIZE)
    scale_2 = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has

    seen_by_all = (past + first_token + 1) // KEYS * KEYS
    for key in tl.range(0, seen_by_all, KEYS, num_stages=STAGES):
        highest, total, result = _turn(
            queries, highest, total, result, key, position, context, table, base, scale_2,
            SIZE, SIZE_BLOCK, PAGE_SIZE, PAGE_STRIDE, KV_STRIDE, KEYS, False,
        )  # fmt: skip
    seen_by_any = tl.minimum(past + first_token + TOKENS, context)
    for key in tl.range(seen_by_all, seen_by_any, KEYS, num_stages=1):
        highest, total, result = _turn(
            queries, highest, total, result, key, position, context, table, base, scale_2,
            SIZE, SIZE_BLOCK, PAGE_SIZE, PAGE_STRIDE, KV_STRIDE, KEYS, True,
        )  # fmt: skip
    tl.store(out + at, result / total[:, None], mask=inside)


@kernel
def _sequence_of(tile, query_start, num_sequences, TOKENS: tl.constexpr):
    """The sequence a tile belongs to: b's tiles begin at query_start[b] // TOKENS + b, counted from the first."""
    origin = tl.load(query_start)
    before = 0
    for first in range(0, num_sequences, _SEARCH):
        index = first + tl.arange(0, _SEARCH)
        known = index < num_sequences
        start = (tl.load(query_start + index, mask=known, other=0) - origin) // TOKENS + index
        before += tl.sum((known & (start <= tile)).to(tl.int32))
    return before - 1


@kernel
def _turn(
    queries, highest, total, result, first_key, position, context, table,
    base, scale_2,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    KV_STRIDE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over KEYS keys; MASKED where some rows may not see some of them."""
    key = first_key + tl.arange(0, KEYS)
    channel = tl.arange(0, SIZE_BLOCK)
    known = (channel < SIZE)[None, :]
    if MASKED:
        known = known & (key < context)[:, None]
        page = tl.load(table + key // PAGE_SIZE, mask=key < context, other=0).to(tl.int64)
    else:
        page = tl.load(table + key // PAGE_SIZE).to(tl.int64)
    at = base + (page * PAGE_STRIDE + key % PAGE_SIZE * SIZE)[:, None] + channel[None, :]
    if MASKED or SIZE < SIZE_BLOCK:
        keys = tl.load(at, mask=known, other=0.0)
        values = tl.load(at + KV_STRIDE, mask=known, other=0.0)
    else:
        keys = tl.load(at)
        values = tl.load(at + KV_STRIDE)
    score = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if MASKED:
        score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
    higher = tl.maximum(highest, tl.max(score, axis=1) * scale_2)
    share = tl.exp2(score * scale_2 - higher[:, None])  # one instruction before exp2
    fade = tl.exp2(highest - higher)
    total = total * fade + tl.sum(share, axis=1)
    result = tl.dot(share.to(values.dtype), values, result * fade[:, None], input_precision="ieee")
    return higher, total, result
