"""Kernels of `CudaOps` that go over rows once and are bound by memory: norm, rotation and page write, gated unit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.ops import Rope, Step
from disagg.model.ops_cuda_jit import after_previous, kernel, launch, overlaps, release_next

_HEADS = 8  # of one program of _rotate_kernel
_TOKENS = 4
_SILU_BLOCK = 1024


@kernel
def _norm_kernel(
    x, residual, weight, normed, total, size, eps,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One row: normed = total / rms(total) * weight with total = x + residual. `size` is H."""
    release_next(EARLY)
    after_previous(EARLY)
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value, mask=inside)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    scaled = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled, mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, early: bool = True
) -> tuple[Tensor, Tensor]:
    """`Ops.add_rms_norm`; without a residual the sum is x itself."""
    rows, size = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    launch(
        _norm_kernel, (rows,), x, residual, weight, normed, total, size, eps,
        warps=min(16, max(1, block // 512)), BLOCK=block, HAS_RESIDUAL=residual is not None,
        early=early and overlaps(x.device),
    )  # fmt: skip
    return normed, total


@kernel
def _silu_kernel(gate_up, out, size, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    """A block of one row: silu(gate) * up. `size` is I."""
    release_next(EARLY)
    after_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`Ops.silu_mul`."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    grid = (rows, triton.cdiv(size, _SILU_BLOCK))
    launch(_silu_kernel, grid, gate_up, out, size, BLOCK=_SILU_BLOCK, early=overlaps(out.device))
    return out


@kernel
def _rotate_kernel(
    qkv, q, pages, positions, slots, cos, sin, q_norm, k_norm,
    rows, layer, eps,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr, HALF_BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_NORM: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """TOKENS x HEADS heads: programs of axis 1 take query heads first, then key heads with their value heads."""
    release_next(EARLY)
    after_previous(EARLY)
    HALF: tl.constexpr = SIZE // 2
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV) * SIZE
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_query = tl.program_id(1) < QUERY_PROGRAMS
    group = tl.where(is_query, tl.program_id(1), tl.program_id(1) - QUERY_PROGRAMS)
    head = group * HEADS + tl.arange(0, HEADS)
    count = tl.where(is_query, NUM_HEADS, NUM_KV)
    half = tl.arange(0, HALF_BLOCK)
    in_half = half < HALF
    inside = (token < rows)[:, None, None] & (head < count)[None, :, None] & in_half[None, None, :]

    source_head = tl.where(is_query, head, NUM_HEADS + head)
    at = token[:, None, None] * WIDTH + (source_head * SIZE)[None, :, None] + half[None, None, :]
    first = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        norm = q_norm
        if not is_query:
            norm = k_norm
        norm_first = tl.load(norm + half, mask=in_half, other=0.0).to(tl.float32)
        norm_second = tl.load(norm + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(first * first, axis=2) + tl.sum(second * second, axis=2)) / SIZE + eps)
        first = first * scale[:, :, None] * norm_first[None, None, :]
        second = second * scale[:, :, None] * norm_second[None, None, :]
    if HAS_ROPE:
        position = tl.load(positions + token, mask=token < rows, other=0)
        angle = position[:, None] * HALF + half[None, :]
        known = (token < rows)[:, None] & in_half[None, :]
        c = tl.load(cos + angle, mask=known, other=0.0)[:, None, :]
        s = tl.load(sin + angle, mask=known, other=0.0)[:, None, :]
        first, second = first * c - second * s, second * c + first * s

    if is_query:
        at = token[:, None, None] * (NUM_HEADS * SIZE) + (head * SIZE)[None, :, None] + half[None, None, :]
        tl.store(q + at, first, mask=inside)
        tl.store(q + at + HALF, second, mask=inside)
    else:
        slot = tl.load(slots + token, mask=token < rows, other=-1)
        written = inside & (slot >= 0)[:, None, None]
        place = (slot // PAGE_SIZE) * PAGE_STRIDE + layer * (2 * NUM_KV * PAGE_SIZE * SIZE) + slot % PAGE_SIZE * SIZE
        at_page = place[:, None, None] + (head * PAGE_SIZE * SIZE)[None, :, None] + half[None, None, :]
        tl.store(pages + at_page, first, mask=written)
        tl.store(pages + at_page + HALF, second, mask=written)
        at += NUM_KV * SIZE
        at_page += NUM_KV * PAGE_SIZE * SIZE
        tl.store(pages + at_page, only_finite(tl.load(qkv + at, mask=written, other=0.0)), mask=written)
        tl.store(pages + at_page + HALF, only_finite(tl.load(qkv + at + HALF, mask=written, other=0.0)), mask=written)


@kernel
def only_finite(value):
    """Values as they are written into pages: 0 for what is no finite number.

    A page's next owner may read what the last one left behind its own, with weight 0; of infinity 0 times is no number.
    """
    return tl.where(tl.abs(value.to(tl.float32)) < float("inf"), value, 0.0).to(value.dtype)


def rotate_and_store(
    qkv: Tensor, step: Step, layer: int, pages: Tensor, rope: Rope | None, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """`Ops.rotate_and_store`."""
    num_kv, page_size, size = pages.shape[3:]
    rows, num_heads = len(qkv), qkv.shape[1] // size - 2 * num_kv
    q = qkv.new_empty(rows, num_heads, size)
    cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
    heads = min(_HEADS, triton.next_power_of_2(num_kv))
    grid = (triton.cdiv(rows, _TOKENS), triton.cdiv(num_heads, heads) + triton.cdiv(num_kv, heads))
    launch(
        _rotate_kernel, grid, qkv, q, pages, step.positions, step.slots, cos, sin, q_norm, k_norm, rows, layer, eps,
        NUM_HEADS=num_heads, NUM_KV=num_kv, SIZE=size, PAGE_SIZE=page_size, PAGE_STRIDE=pages.stride(0),
        HALF_BLOCK=triton.next_power_of_2(size // 2), TOKENS=_TOKENS, HEADS=heads, HAS_ROPE=rope is not None,
        HAS_NORM=q_norm is not None, early=overlaps(q.device),
    )  # fmt: skip
    return q
