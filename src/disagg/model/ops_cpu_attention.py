"""Paged attention on CPU, as a phase that a team of threads shares out.

`pages` is [num_pages, num_layers, 2, Hkv, page_size, D]. A head is a multiple of 16 wide, so that one row of K or V is
whole registers.
"""

from __future__ import annotations

import numpy as np

from disagg.model.ops_cpu_jit import finish_item, finish_phase, kernel, next_item
from disagg.model.ops_cpu_rows import Where
from disagg.model.ops_cpu_tile import PANEL, TILE_ROWS, dot, exp, tile

_ROWS = 96  # query rows (tokens x heads of a group) of one block: 24 KiB at D = 64
_KEYS = 64  # keys of one block: K and V of it take 32 KiB at D = 64
_LOWEST = np.float32(-1e30)  # instead of -inf, which would make inf - inf on an empty row


@kernel
def attend_phase(
    sync: np.ndarray, phase: int, q: np.ndarray, where: Where, layer: int, pages: np.ndarray, scale: float,
    out: np.ndarray,
) -> None:  # fmt: skip
    """out [T, Hq * D] = causal attention of q [T, Hq, D]. One item is one block of query rows of one key head.

    A sequence with one new token goes through `_attend_one`, a chunk through `_attend_block`; the two sum in another
    order, so a token's result depends on which of them computed it, but never on the other sequences of the step.
    """
    query_start, context_len, page_table = where.query_start, where.context_len, where.page_table
    num_kv = pages.shape[3]
    block = max(1, _ROWS // (q.shape[1] // num_kv))
    num_blocks = 0
    for b in range(len(context_len)):
        num_blocks += (query_start[b + 1] - query_start[b] + block - 1) // block
    longest = 0
    for b in range(len(context_len)):
        longest = max(longest, context_len[b])
    size = q.shape[2]
    group = q.shape[1] // num_kv
    scores = np.empty((group, longest), np.float32)
    scratch = _scratch(block * group, size)
    while True:
        item = next_item(sync, phase)
        if item >= num_blocks * num_kv:
            break
        head, left = item % num_kv, num_blocks - 1 - item // num_kv  # last block first: it sees the most keys
        b = 0
        while left >= (query_start[b + 1] - query_start[b] + block - 1) // block:
            left -= (query_start[b + 1] - query_start[b] + block - 1) // block
            b += 1
        first = query_start[b] + left * block
        n = min(block, query_start[b + 1] - first)
        if query_start[b + 1] - query_start[b] == 1:
            _attend_one(q, first, head, page_table[b], context_len[b], layer, pages, scale, scores, out)
        else:
            position = context_len[b] - (query_start[b + 1] - first)
            _attend_block(q, first, n, position, head, page_table[b], layer, pages, scale, scratch, out)
        finish_item(sync, phase)
    finish_phase(sync, phase, num_blocks * num_kv)


@kernel
def _scratch(rows: int, size: int) -> tuple[np.ndarray, ...]:
    """What one thread needs for _attend_block: queries, keys, values, weights, sums, highest, totals.

    Columns beyond the last row of a panel are computed and ignored; they start as zeros to stay finite.
    """
    panels = (rows + PANEL - 1) // PANEL
    return (
        np.zeros((panels, size, PANEL), np.float32),
        np.empty((_KEYS, size), np.float32),
        np.empty((_KEYS, size), np.float32),
        np.empty((_KEYS, panels * PANEL), np.float32),
        np.empty((panels * PANEL, size), np.float32),
        np.empty(panels * PANEL, np.float32),
        np.empty(panels * PANEL, np.float32),
    )


@kernel
def _attend_one(
    q: np.ndarray, t: int, head: int, table: np.ndarray, length: int, layer: int, pages: np.ndarray, scale: float,
    scores: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """One token's query heads of one key head over `length` keys; scores [group, >= length] is scratch."""
    num_layers, num_kv, page_size, size = pages.shape[1], pages.shape[3], pages.shape[4], pages.shape[5]
    group, row = scores.shape
    at = (t * q.shape[1] + head * group) * size
    for g in range(group):
        for i in range(size):
            out[t, (head * group + g) * size + i] = np.float32(0.0)
    for start in range(0, length, page_size):
        k_at = ((table[start // page_size] * num_layers + layer) * 2 * num_kv + head) * page_size * size
        for i in range(min(page_size, length - start)):
            for g in range(group):
                scores[g, start + i] = dot(q, at + g * size, pages, k_at + i * size, size) * np.float32(scale)
    for g in range(group):
        softmax_row(scores[g, :length])
    for start in range(0, length, page_size):
        v_at = (((table[start // page_size] * num_layers + layer) * 2 + 1) * num_kv + head) * page_size * size
        depth = min(page_size, length - start)
        for g in range(0, group, TILE_ROWS):
            n = min(TILE_ROWS, group - g)
            for d in range(0, size, PANEL):
                c_at = at + g * size + d
                tile(n, scores, g * row + start, row, 1, pages, v_at + d, size, out, c_at, size, depth, True)


@kernel
def softmax_row(row: np.ndarray) -> None:
    """row = e^row / sum(e^row), in place."""
    highest = _LOWEST
    for i in range(len(row)):
        highest = max(highest, row[i])
    total = np.float32(0.0)
    for i in range(len(row)):
        row[i] = exp(row[i] - highest)
        total += row[i]
    for i in range(len(row)):
        row[i] /= total


@kernel
def _attend_block(
    q: np.ndarray, first: int, n: int, position: int, head: int, table: np.ndarray, layer: int, pages: np.ndarray,
    scale: float, scratch: tuple[np.ndarray, ...], out: np.ndarray,
) -> None:  # fmt: skip
    """n consecutive tokens, the first at `position`, over all keys up to the last of them, _KEYS at a time.

    The running softmax of FlashAttention (Dao et al., 2022): sums and totals are rescaled when a block of keys raises
    the maximum. Scores are kept as [key, row], where row g * n + r is query head g of token r, so the softmax works on
    16 rows at once and K needs no transposing; the queries do, once.
    """
    queries, keys, values, weights, sums, highest, totals = scratch
    num_heads, size = q.shape[1:]
    group, width = num_heads // pages.shape[3], weights.shape[1]
    rows = group * n
    num_panels = (rows + PANEL - 1) // PANEL
    _transpose_queries(q, first, n, head * group, group, scale, queries)
    highest[:], totals[:] = _LOWEST, np.float32(0.0)
    sums[:] = np.float32(0.0)
    for start in range(0, position + n, _KEYS):
        depth = min(_KEYS, position + n - start)
        _gather(pages, layer, head, table, start, depth, keys, values)
        for p in range(num_panels):
            for k in range(0, depth, TILE_ROWS):
                m, at = min(TILE_ROWS, depth - k), k * width + p * PANEL
                q_at = p * size * PANEL
                tile(m, keys, k * size, size, 1, queries, q_at, PANEL, weights, at, width, size, False)
        if start + depth > position + 1:  # the block reaches beyond the first token's own position
            for k in range(max(0, position + 1 - start), depth):
                for g in range(group):
                    weights[k, g * n : g * n + min(n, start + k - position)] = _LOWEST
        _softmax_block(weights, depth, num_panels * PANEL, highest, totals, sums)
        for r in range(0, rows, TILE_ROWS):
            m = min(TILE_ROWS, rows - r)
            for d in range(0, size, PANEL):
                tile(m, weights, r, 1, width, values, d, size, sums, r * size + d, size, depth, True)
    for i in range(rows):
        at = (head * group + i // n) * size
        row = out[first + i % n, at : at + size]
        for d in range(size):
            row[d] = sums[i, d] / totals[i]


@kernel
def _transpose_queries(
    q: np.ndarray, first: int, n: int, head: int, group: int, scale: float, queries: np.ndarray
) -> None:
    """queries [panels, D, 16] = scaled query row g * n + r in column (g * n + r) of the panels."""
    for g in range(group):
        for r in range(n):
            i = g * n + r
            row, panel, column = q[first + r, head + g], i // PANEL, i % PANEL
            for d in range(len(row)):
                queries[panel, d, column] = row[d] * np.float32(scale)


@kernel
def _gather(
    pages: np.ndarray, layer: int, head: int, table: np.ndarray, start: int, depth: int, keys: np.ndarray,
    values: np.ndarray,
) -> None:  # fmt: skip
    """Copy keys and values start.. of one head side by side: keys and values [depth, D]."""
    page_size, size = pages.shape[4:]
    for i in range(depth):
        page, offset = table[(start + i) // page_size], (start + i) % page_size
        key, value = pages[page, layer, 0, head, offset], pages[page, layer, 1, head, offset]
        for d in range(size):
            keys[i, d] = key[d]
            values[i, d] = value[d]


@kernel
def _softmax_block(
    weights: np.ndarray, depth: int, width: int, highest: np.ndarray, totals: np.ndarray, sums: np.ndarray
) -> None:
    """Turn scores [depth, width] into e^(score - maximum) and bring totals [rows] and sums [rows, D] to the maximum."""
    new, part, before = highest[:width].copy(), np.zeros(width, np.float32), highest[:width]
    for k in range(depth):
        row = weights[k, :width]
        for i in range(width):
            new[i] = max(new[i], row[i])
    for k in range(depth):
        row = weights[k, :width]
        for i in range(width):
            row[i] = exp(row[i] - new[i])
        for i in range(width):
            part[i] += row[i]
    for i in range(width):
        before[i] = exp(before[i] - new[i])
    for i in range(width):
        totals[i] = totals[i] * before[i] + part[i]
        row = sums[i]
        for d in range(len(row)):
            row[d] *= before[i]
    before[:] = new


@kernel
def attend_kernel(
    sync: np.ndarray, q: np.ndarray, where: Where, layer: int, pages: np.ndarray, scale: float, out: np.ndarray
) -> None:
    """attend_phase as a call of its own."""
    attend_phase(sync, 0, q, where, layer, pages, scale, out)
