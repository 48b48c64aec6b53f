"""Matrix products on CPU: weights packed in panels, float32 sums, one kernel for 1 row and for 2,000.

A weight [N, K] is stored as panels [ceil(N / 16), K, 16], so the tile reads it front to back. Rows are taken in blocks
small enough to stay in the second-level cache, and a block meets each group of panels once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from disagg.model.ops_cpu_jit import finish_item, finish_phase, kernel, next_item
from disagg.model.ops_cpu_tile import GROUP, PANEL, TILE_ROWS, exp, tile, wide_tile

_BLOCK_BYTES = 256 * 1024  # of inputs: half of a 512 KiB second-level cache
_SILU_ROWS = 24  # rows whose gate and up results wait in the first-level cache for the product


def pack(weight: Tensor, dtype: torch.dtype) -> np.ndarray:
    """weight [N, K] -> panels [ceil(N / 16), K, 16] in dtype, zero-padded; float16 is returned as its uint16 bits.

    The memory is numpy's, which asks for huge pages: reading is then not held up at every 4 KiB.
    Raises ValueError if a weight does not fit float16, where it would silently become infinite.
    """
    num_out, depth = weight.shape
    whole = num_out // PANEL
    packed = np.zeros((-(-num_out // PANEL), depth, PANEL), np.float16 if dtype == torch.float16 else np.float32)
    panels = torch.from_numpy(packed).transpose(1, 2)
    stored = weight.detach().to(dtype)
    if not torch.isfinite(stored).all():
        raise ValueError(f"a weight is not finite as {dtype}; use float32")
    panels[:whole] = stored[: whole * PANEL].reshape(whole, PANEL, depth)
    if num_out % PANEL:
        panels[whole, : num_out % PANEL] = stored[whole * PANEL :]
    return packed.view(np.uint16) if dtype == torch.float16 else packed


@kernel
def _rows_times_panels(
    x: np.ndarray, x_at: int, x_row: int, rows: int, w: np.ndarray, w_at: int, panels: int, depth: int,
    c: np.ndarray, c_at: int, c_row: int, add: bool,
) -> None:  # fmt: skip
    """c[rows, panels * 16] (+)= x[rows, depth] @ w, where w is `panels` consecutive [depth, 16] panels."""
    size = depth * PANEL
    if rows <= 2 and panels == GROUP:
        wide_tile(rows, x, x_at, x_row, w, w_at, size, c, c_at, c_row, depth, add)
        return
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for panel in range(panels):
        row = 0
        for i in range(tiles):
            n = (rows - row + tiles - i - 1) // (tiles - i)  # near-equal tiles: 8 rows are 4 + 4, not 6 + 2
            at = c_at + row * c_row + panel * PANEL
            x_row_at, w_panel_at = x_at + row * x_row, w_at + panel * size
            tile(n, x, x_row_at, x_row, 1, w, w_panel_at, PANEL, c, at, c_row, depth, add)
            row += n


@kernel
def _block_rows(depth: int) -> int:
    return max(TILE_ROWS, _BLOCK_BYTES // (4 * depth) // TILE_ROWS * TILE_ROWS)


@kernel
def linear_phase(
    sync: np.ndarray, phase: int, x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray, add: bool
) -> None:
    """out [T, N] = x [T, K] @ w + bias, or out += x @ w if add; w is packed, bias has length N or 0."""
    rows, depth = x.shape
    num_out = out.shape[1]
    num_groups = (w.shape[0] + GROUP - 1) // GROUP
    block = _block_rows(depth)
    num_items = num_groups * ((rows + block - 1) // block)
    while True:
        item = next_item(sync, phase)
        if item >= num_items:
            break
        row, panel = item // num_groups * block, item % num_groups * GROUP
        n = min(block, rows - row)
        panels = min(GROUP, num_out // PANEL - panel)
        if len(bias) > 0:
            column = panel * PANEL
            for r in range(row, row + n):
                for j in range(column, min(column + GROUP * PANEL, num_out)):
                    out[r, j] = bias[j]
        added = add or len(bias) > 0
        at = panel * depth * PANEL
        if panels > 0:
            _rows_times_panels(
                x, row * depth, depth, n, w, at, panels, depth, out, row * num_out + panel * PANEL, num_out, added
            )
        if panels < GROUP and num_out % PANEL > 0:
            _ragged_panel(x, row, n, w, out, added)
        finish_item(sync, phase)
    finish_phase(sync, phase, num_items)


@kernel
def _ragged_panel(x: np.ndarray, row: int, n: int, w: np.ndarray, out: np.ndarray, add: bool) -> None:
    """The last panel of a weight whose N is no multiple of 16, through a buffer."""
    depth, num_out = x.shape[1], out.shape[1]
    column = num_out // PANEL * PANEL
    buffer = np.empty((TILE_ROWS, PANEL), np.float32)
    at = (w.shape[0] - 1) * depth * PANEL
    for first in range(row, row + n, TILE_ROWS):
        rows = min(TILE_ROWS, row + n - first)
        tile(rows, x, first * depth, depth, 1, w, at, PANEL, buffer, 0, PANEL, depth, False)
        for r in range(rows):
            for j in range(num_out - column):
                before = out[first + r, column + j] if add else np.float32(0.0)
                out[first + r, column + j] = before + buffer[r, j]


@kernel
def silu_phase(sync: np.ndarray, phase: int, x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out [T, I] = silu(x @ gate) * (x @ up); w is packed [2, ceil(I / 16), K, 16]. The two products never reach
    memory: _SILU_ROWS of them wait in a buffer."""
    rows, depth = x.shape
    width, num_panels = out.shape[1], w.shape[1]
    num_groups = (num_panels + GROUP - 1) // GROUP
    block = _block_rows(depth)
    num_items = num_groups * ((rows + block - 1) // block)
    gate = np.empty((_SILU_ROWS, GROUP * PANEL), np.float32)
    up = np.empty((_SILU_ROWS, GROUP * PANEL), np.float32)
    half = num_panels * depth * PANEL
    while True:
        item = next_item(sync, phase)
        if item >= num_items:
            break
        row, panel = item // num_groups * block, item % num_groups * GROUP
        panels, column = min(GROUP, num_panels - panel), panel * PANEL
        columns, at = min(panels * PANEL, width - column), panel * depth * PANEL
        end = min(row + block, rows)
        for first in range(row, end, _SILU_ROWS):
            n, x_at, c_row = min(_SILU_ROWS, end - first), first * depth, GROUP * PANEL
            _rows_times_panels(x, x_at, depth, n, w, at, panels, depth, gate, 0, c_row, False)
            _rows_times_panels(x, x_at, depth, n, w, at + half, panels, depth, up, 0, c_row, False)
            for r in range(n):
                silu_mul_row(gate[r], up[r], out[first + r, column : column + columns])
        finish_item(sync, phase)
    finish_phase(sync, phase, num_items)


@kernel
def silu_mul_row(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out = gate / (1 + e^-gate) * up, over the length of out."""
    for i in range(len(out)):
        out[i] = gate[i] / (np.float32(1.0) + exp(-gate[i])) * up[i]


@kernel
def linear_kernel(sync: np.ndarray, x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """linear_phase as a call of its own."""
    linear_phase(sync, 0, x, w, bias, out, False)


@kernel
def silu_mul_kernel(sync: np.ndarray, gate_up: np.ndarray, out: np.ndarray) -> None:
    """out [T, I] = silu(gate) * up of gate_up [T, 2 I], rows shared out among the threads."""
    rows, width = out.shape
    while True:
        row = next_item(sync, 0)
        if row >= rows:
            break
        silu_mul_row(gate_up[row, :width], gate_up[row, width:], out[row])
        finish_item(sync, 0)
    finish_phase(sync, 0, rows)
