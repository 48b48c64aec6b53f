"""`draw.draw` in Triton: the logits are read once, or three times more where a row asks for a filter.

    _survey   one program a block    the largest of each 64 logits, and the sum of the block's weights
    _bar      one program a row      a bar that some 512 logits reach: the 512th largest of those maxima
    _collect  one program a block    the logits that reach it, in any order
    _filter   one program a row      top-k, top-p, min-p become one number: the smallest logit that is left
    _blocks   one program a block    the largest logit of 1,024, where it is, and the sum of their weights
    _pick     one program a row      the block in which the row's number falls, and the token in it; greedy: the largest

A filter nearly always ends among the largest few hundred logits. `_filter` looks at the collected ones alone where they
decide the row, and at all of them (up to 64 times, bit by bit of the threshold) where they do not: the same result.

Weights are relative to the largest logit of their block (`_blocks`) or row, so nothing overflows. Sums over blocks are
float64: a float32 running sum over a vocabulary would give the last tokens' probabilities away.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.engine.draw import Choice

_BLOCK = 1024
_FILTER_BLOCK = 4096
_GROUP = 64  # logits that share a maximum
_LEADERS = 512  # maxima that reach the bar, so at least so many logits do
_ROOM = 2048  # for the logits that reach it


def draw(logits: Tensor, choice: Choice, tokens: Tensor) -> None:
    """As `draw.draw`, on CUDA, without waiting. `logits` float32 [S, V], rows contiguous."""
    count, vocabulary = logits.shape
    if count == 0:
        return
    num_blocks = triton.cdiv(vocabulary, _BLOCK)
    floor = _floors(logits, choice) if choice.filtered else choice.temperature  # not read
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


def _floors(logits: Tensor, choice: Choice) -> Tensor:
    """The smallest logit that is left of each row, float32 [S]; -inf where all are."""
    count, vocabulary = logits.shape
    num_blocks, device = triton.cdiv(vocabulary, _BLOCK), logits.device
    num_groups = num_blocks * (_BLOCK // _GROUP)
    maxima = torch.empty((count, num_groups), dtype=torch.float32, device=device)
    weights = torch.empty((2, count, num_blocks), dtype=torch.float32, device=device)
    bars = torch.empty(count, dtype=torch.float32, device=device)
    floors = torch.empty_like(bars)
    totals = torch.empty((2, count), dtype=torch.float32, device=device)  # largest logit, sum of weights
    largest = torch.empty((count, _ROOM), dtype=torch.float32, device=device)
    found = torch.zeros(count, dtype=torch.int32, device=device)
    _survey[(count, num_blocks)](
        logits, logits.stride(0), choice.temperature, maxima, weights[0], weights[1], num_blocks,
        VOCABULARY=vocabulary, BLOCK=_BLOCK, GROUP=_GROUP, num_warps=4,
    )  # fmt: skip
    _bar[(count,)](
        maxima, choice.temperature, weights[0], weights[1], num_groups, num_blocks, bars, totals[0], totals[1],
        LEADERS=_LEADERS, GROUPS=triton.next_power_of_2(num_groups), BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )  # fmt: skip
    _collect[(count, num_blocks)](
        logits, logits.stride(0), bars, largest, found, VOCABULARY=vocabulary, BLOCK=_BLOCK, ROOM=_ROOM, num_warps=4,
    )  # fmt: skip
    _filter[(count,)](
        logits, logits.stride(0), choice.temperature, choice.top_k, choice.top_p, choice.min_p, largest, found,
        totals[0], totals[1], floors, VOCABULARY=vocabulary, BLOCK=_FILTER_BLOCK, ROOM=_ROOM, num_warps=16,
    )  # fmt: skip
    return floors


@triton.jit
def _survey(
    logits, stride, temperatures, maxima, peaks, sums, num_blocks,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=offsets < VOCABULARY, other=float("-inf"))
    at = row * num_blocks + block
    groups = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), axis=1)
    tl.store(maxima + at * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), groups)
    peak = tl.max(x, axis=0)
    temperature = tl.load(temperatures + row)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(peaks + at, peak)
    tl.store(sums + at, tl.sum(tl.exp((x - base) / tl.where(temperature == 0, 1.0, temperature)), axis=0))


@triton.jit
def _bar(
    maxima, temperatures, peaks, sums, num_groups, num_blocks, bars, highest, totals,
    LEADERS: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    blocks, groups = tl.arange(0, BLOCKS), tl.arange(0, GROUPS)
    peak = tl.load(peaks + row * num_blocks + blocks, mask=blocks < num_blocks, other=float("-inf"))
    best = tl.max(peak, axis=0)
    temperature = tl.load(temperatures + row)
    scale = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    weight = tl.load(sums + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
    total = tl.sum((weight * tl.exp((peak - best) * scale)).to(tl.float64), axis=0)
    rank = _rank(tl.load(maxima + row * num_groups + groups, mask=groups < num_groups, other=float("-inf")))
    low = tl.full([], 0, tl.int64)
    for bit in range(32):
        tried = low + (tl.full([], 1, tl.int64) << (31 - bit))
        reached = tl.sum((rank >= (tried - 2147483648).to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(reached >= LEADERS, tried, low)
    tl.store(bars + row, tl.where(low > 0, _logit(low), float("-inf")))
    tl.store(highest + row, best)
    tl.store(totals + row, total.to(tl.float32))


@triton.jit
def _collect(
    logits, stride, bars, largest, found, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + offsets, mask=offsets < VOCABULARY, other=float("-inf"))
    keep = (x >= tl.load(bars + row)) & (offsets < VOCABULARY)
    kept = keep.to(tl.int32)
    count = tl.sum(kept, axis=0)
    if count > 0:
        place = tl.atomic_add(found + row, count) + tl.cumsum(kept, axis=0) - kept
        tl.store(largest + row * ROOM + place, x, mask=keep & (place < ROOM))


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
def _logit(low):
    """The float whose rank, counted from the least of all ranks, is `low` (int64)."""
    bits = (low - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(row, size, best, scale, low, BLOCK: tl.constexpr):
    """Of `size` logits: how many rank at least `low` (counted from the least of all ranks), and their weights' sum."""
    bound = (low - 2147483648).to(tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)  # so that the order of the collected ones makes no difference
    for start in range(0, size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(row + offsets, mask=offsets < size, other=float("-inf"))
        keep = (_rank(x) >= bound) & (offsets < size)
        count += keep.to(tl.int32)
        mass += tl.where(keep, tl.exp((x - best) * scale), 0.0).to(tl.float64)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _filter(
    logits, stride, temperatures, top_ks, top_ps, min_ps, largest,
    found, highest, totals, floors,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    temperature = tl.load(temperatures + program)
    top_k, top_p, min_p = tl.load(top_ks + program), tl.load(top_ps + program), tl.load(min_ps + program)
    floor = tl.full([], float("-inf"), tl.float32)
    if temperature > 0:
        scale = 1.0 / temperature
        best = tl.load(highest + program)
        every = tl.full([], 0, tl.int64)
        counts = (top_k > 0) & (top_k < VOCABULARY)
        row, size = largest + program.to(tl.int64) * ROOM, tl.load(found + program)
        total = tl.load(totals + program).to(tl.float64)
        decided = (size <= ROOM) & (top_k <= size)
        if decided & (top_p < 1) & (top_k == 0):
            count, mass = _mass(row, size, best, scale, every, BLOCK)
            decided = mass > top_p * total * 1.0001  # two ways of summing: not on the last logit collected
        if not decided:
            row, size = logits + program.to(tl.int64) * stride, VOCABULARY
        # the largest rank that so many logits, or logits of so much weight, reach: bit by bit from the highest
        low = every
        if counts:
            for bit in range(32):
                tried = low + (tl.full([], 1, tl.int64) << (31 - bit))
                count, mass = _mass(row, size, best, scale, tried, BLOCK)
                low = tl.where(count >= top_k, tried, low)
        if top_p < 1:
            if counts:
                count, total = _mass(row, size, best, scale, low, BLOCK)
                # of equals, top-k counts only as many as it asks for
                above, mass_above = _mass(row, size, best, scale, low + 1, BLOCK)
                total = mass_above + (total - mass_above) * (top_k - above) / (count - above)
            share = top_p * total
            reached = low
            low = every
            for bit in range(32):
                tried = low + (tl.full([], 1, tl.int64) << (31 - bit))
                count, mass = _mass(row, size, best, scale, tried, BLOCK)
                low = tl.where(mass >= share, tried, low)
            low = tl.maximum(low, reached)
        if low > 0:
            floor = _logit(low)
        if min_p > 0:
            floor = tl.maximum(floor, best + temperature * tl.log(min_p))
    tl.store(floors + program, floor)
