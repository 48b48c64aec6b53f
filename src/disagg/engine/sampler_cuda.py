"""`draw.draw` in Triton: the logits are read once, or some twenty times more where a row asks for a filter.

    _filter   one program a row      top-k, top-p, min-p become one number: the smallest logit that is left
    _blocks   one program a block    the largest logit of 1,024, where it is, and the sum of their weights
    _pick     one program a row      the block in which the row's number falls, and the token in it; greedy: the largest

Weights are relative to the largest logit of their block (`_blocks`) or row, so nothing overflows. Sums over blocks are
float64: a float32 running sum over a vocabulary would give the last tokens' probabilities away.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.engine.draw import Choice

_BLOCK = 1024
_FILTER_BLOCK = 8192


def draw(logits: Tensor, choice: Choice, tokens: Tensor) -> None:
    """As `draw.draw`, on CUDA, without waiting. `logits` float32 [S, V], rows contiguous."""
    count, vocabulary = logits.shape
    if count == 0:
        return
    num_blocks = triton.cdiv(vocabulary, _BLOCK)
    floor = torch.empty(count if choice.filtered else 0, dtype=torch.float32, device=logits.device)
    if choice.filtered:
        _filter[(count,)](
            logits, logits.stride(0), choice.temperature, choice.top_k, choice.top_p, choice.min_p, floor,
            VOCABULARY=vocabulary, BLOCK=_FILTER_BLOCK, num_warps=16,
        )  # fmt: skip
    peaks = torch.empty((2, count, num_blocks), dtype=torch.float32, device=logits.device)
    places = torch.empty((count, num_blocks), dtype=torch.int32, device=logits.device)
    _blocks[(count, num_blocks)](
        logits, logits.stride(0), choice.temperature, floor, peaks[0], peaks[1], places, num_blocks,
        VOCABULARY=vocabulary, FILTERED=choice.filtered, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    _pick[(count,)](
        logits, logits.stride(0), choice.temperature, choice.number, floor, peaks[0], peaks[1], places, num_blocks,
        tokens, VOCABULARY=vocabulary, FILTERED=choice.filtered, BLOCK=_BLOCK,
        BLOCKS=triton.next_power_of_2(num_blocks), num_warps=4,
    )  # fmt: skip


@triton.jit
def _blocks(
    logits, stride, temperatures, floors, peaks, sums, places,
    num_blocks, VOCABULARY: tl.constexpr, FILTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=offsets < VOCABULARY, other=float("-inf"))
    peak = tl.max(x, axis=0)
    at = row * num_blocks + block
    tl.store(peaks + at, peak)
    tl.store(places + at, block * BLOCK + tl.argmax(x, axis=0))
    if FILTERED:
        x = tl.where(x >= tl.load(floors + row), x, float("-inf"))
    temperature = tl.load(temperatures + row)
    scale = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(sums + at, tl.sum(tl.exp((x - base) * scale), axis=0))


@triton.jit
def _pick(
    logits, stride, temperatures, numbers, floors, peaks, sums,
    places, num_blocks, tokens, VOCABULARY: tl.constexpr, FILTERED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS)
    here = blocks < num_blocks
    peak = tl.load(peaks + row * num_blocks + blocks, mask=here, other=float("-inf"))
    best = tl.max(peak, axis=0)
    temperature = tl.load(temperatures + row)
    if temperature == 0:
        first = tl.min(tl.where(peak == best, blocks, BLOCKS), axis=0)
        tl.store(tokens + row, tl.load(places + row * num_blocks + first).to(tl.int64))
    else:
        scale = 1.0 / temperature
        sums_here = tl.load(sums + row * num_blocks + blocks, mask=here, other=0.0)
        weight = (sums_here * tl.exp((peak - best) * scale)).to(tl.float64)
        running = tl.cumsum(weight, axis=0)
        target = tl.load(numbers + row) * tl.sum(weight, axis=0)
        block = tl.sum((running <= target).to(tl.int32), axis=0)
        block = tl.minimum(block, tl.max(tl.where(weight > 0, blocks, 0), axis=0))
        rest = target - tl.sum(tl.where(blocks < block, weight, 0.0), axis=0)
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=offsets < VOCABULARY, other=float("-inf"))
        if FILTERED:
            x = tl.where(x >= tl.load(floors + row), x, float("-inf"))
        inside = tl.exp((x - best) * scale).to(tl.float64)
        place = tl.sum((tl.cumsum(inside, axis=0) <= rest).to(tl.int32), axis=0)
        # two ways of summing a block differ in the last bit: stay at or before its last weight above zero
        place = tl.minimum(place, tl.max(tl.where(inside > 0, tl.arange(0, BLOCK), 0), axis=0))
        tl.store(tokens + row, (block * BLOCK + place).to(tl.int64))


@triton.jit
def _rank(x):
    """Integers in the order of the floats, int32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(row, best, scale, low, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """(how many logits rank at least `low`, which counts from the least of all ranks, and the sum of their weights)."""
    bound = (low - 2147483648).to(tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(row + offsets, mask=offsets < VOCABULARY, other=float("-inf"))
        keep = (_rank(x) >= bound) & (offsets < VOCABULARY)
        count += keep.to(tl.int32)
        mass += tl.where(keep, tl.exp((x - best) * scale), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _filter(
    logits, stride, temperatures, top_ks, top_ps, min_ps, floors,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * stride
    temperature = tl.load(temperatures + program)
    top_k, top_p, min_p = tl.load(top_ks + program), tl.load(top_ps + program), tl.load(min_ps + program)
    floor = tl.full([], float("-inf"), tl.float32)
    if temperature > 0:
        scale = 1.0 / temperature
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(row + offsets, mask=offsets < VOCABULARY, other=float("-inf"))
            highest = tl.maximum(highest, x)
        best = tl.max(highest, axis=0)
        # the largest rank that so many logits, or logits of so much weight, reach: bit by bit from the highest
        low = tl.full([], 0, tl.int64)
        if (top_k > 0) & (top_k < VOCABULARY):
            for bit in range(32):
                tried = low + (tl.full([], 1, tl.int64) << (31 - bit))
                count, mass = _mass(row, best, scale, tried, VOCABULARY, BLOCK)
                low = tl.where(count >= top_k, tried, low)
        if top_p < 1:
            count, mass = _mass(row, best, scale, low, VOCABULARY, BLOCK)
            if (top_k > 0) & (top_k < VOCABULARY):  # of equals, top-k counts only as many as it asks for
                above, mass_above = _mass(row, best, scale, low + 1, VOCABULARY, BLOCK)
                mass = mass_above + (mass - mass_above) * (top_k - above) / (count - above)
            share = top_p * mass
            reached = low
            low = tl.full([], 0, tl.int64)
            for bit in range(32):
                tried = low + (tl.full([], 1, tl.int64) << (31 - bit))
                count, mass = _mass(row, best, scale, tried, VOCABULARY, BLOCK)
                low = tl.where(mass >= share, tried, low)
            low = tl.maximum(low, reached)
        if low > 0:
            bits = (low - 2147483648).to(tl.int32)  # the rank, from which `_rank` leads back
            floor = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        if min_p > 0:
            floor = tl.maximum(floor, best + temperature * tl.log(min_p))
    tl.store(floors + program, floor)
