"""What happens to one row at a time on CPU: norm, rotation, and writing K and V into pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from disagg.model.ops_cpu_jit import finish_item, finish_phase, kernel, next_item
from disagg.model.ops_cpu_tile import PANEL, dot


class Where(NamedTuple):
    """A Step's index arrays and the rotary tables, as the kernels take them."""

    positions: np.ndarray
    slots: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    page_table: np.ndarray
    cos: np.ndarray  # float32 [max_position, D / 2], or no rows for a model without rotary
    sin: np.ndarray


@kernel
def rms_scale(row: np.ndarray, eps: float) -> float:
    """1 / sqrt(mean(row^2) + eps), float32."""
    aligned = len(row) // PANEL * PANEL
    total = dot(row, 0, row, 0, aligned) if aligned > 0 else np.float32(0.0)
    for i in range(aligned, len(row)):
        total += row[i] * row[i]
    return np.float32(1.0) / np.sqrt(total / np.float32(len(row)) + np.float32(eps))


@kernel
def norm_phase(
    sync: np.ndarray, phase: int, x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float,
    normed: np.ndarray, total: np.ndarray,
) -> None:  # fmt: skip
    """total = x + residual (residual may have no rows: then total = x), normed = RMSNorm(total); all [T, H]."""
    while True:
        t = next_item(sync, phase)
        if t >= len(x):
            break
        row = total[t]
        if len(residual) > 0:
            for i in range(len(row)):
                row[i] = x[t, i] + residual[t, i]
        else:
            row[:] = x[t]
        scale = rms_scale(row, eps)
        for i in range(len(row)):
            normed[t, i] = row[i] * scale * weight[i]
        finish_item(sync, phase)
    finish_phase(sync, phase, len(x))


@kernel
def _rotate_head(
    head: np.ndarray, norm: np.ndarray, eps: float, cos: np.ndarray, sin: np.ndarray, out: np.ndarray
) -> None:
    """out [D] = head [D], normed if norm has a length, rotated if cos has one; pairs are (i, i + D / 2)."""
    half = len(head) // 2
    if len(norm) > 0:
        scale = rms_scale(head, eps)
        for i in range(len(head)):
            out[i] = head[i] * scale * norm[i]
    else:
        out[:] = head
    if len(cos) > 0:
        for i in range(half):
            first, second = out[i], out[half + i]
            out[i] = first * cos[i] - second * sin[i]
            out[half + i] = second * cos[i] + first * sin[i]


@kernel
def rotate_phase(
    sync: np.ndarray, phase: int, qkv: np.ndarray, where: Where, layer: int, pages: np.ndarray, q_norm: np.ndarray,
    k_norm: np.ndarray, eps: float, q: np.ndarray,
) -> None:  # fmt: skip
    """Fill q [T, Hq, D] and this layer's K and V of every token's slot from qkv [T, (Hq + 2 Hkv) * D]."""
    num_heads, size = q.shape[1:]
    num_kv, page_size = pages.shape[3], pages.shape[4]
    rotated = len(where.cos) > 0
    while True:
        t = next_item(sync, phase)
        if t >= len(q):
            break
        row = qkv[t].reshape(num_heads + 2 * num_kv, size)
        position = where.positions[t] if rotated else 0
        c, s = (where.cos[position], where.sin[position]) if rotated else (q_norm[:0], q_norm[:0])
        for h in range(num_heads):
            _rotate_head(row[h], q_norm, eps, c, s, q[t, h])
        page, offset = where.slots[t] // page_size, where.slots[t] % page_size
        for h in range(num_kv):
            _rotate_head(row[num_heads + h], k_norm, eps, c, s, pages[page, layer, 0, h, offset])
            pages[page, layer, 1, h, offset] = row[num_heads + num_kv + h]
        finish_item(sync, phase)
    finish_phase(sync, phase, len(q))


@kernel
def norm_kernel(
    sync: np.ndarray, x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float, normed: np.ndarray,
    total: np.ndarray,
) -> None:  # fmt: skip
    """norm_phase as a call of its own."""
    norm_phase(sync, 0, x, residual, weight, eps, normed, total)


@kernel
def rotate_kernel(
    sync: np.ndarray, qkv: np.ndarray, where: Where, layer: int, pages: np.ndarray, q_norm: np.ndarray,
    k_norm: np.ndarray, eps: float, q: np.ndarray,
) -> None:  # fmt: skip
    """rotate_phase as a call of its own."""
    rotate_phase(sync, 0, qkv, where, layer, pages, q_norm, k_norm, eps, q)
