"""Steps and rotary tables for the tests of `Ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disagg.model.ops import Rope, Step

MIXED = [(1, 128), (40, 40), (7, 77), (1, 1), (70, 200), (2, 3)]  # (new tokens, context) of each sequence


def make_step(sequences: Sequence[tuple[int, int]], page_size: int) -> tuple[Step, int]:
    """A Step of (new tokens, context) pairs on shuffled pages, and the number of pages."""
    counts = [-(-context // page_size) for _, context in sequences]
    order = torch.randperm(sum(counts)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    starts, positions, slots = [0], [], []
    for (new, context), table in zip(sequences, tables, strict=True):
        starts.append(starts[-1] + new)
        positions += range(context - new, context)
        slots += [table[p // page_size] * page_size + p % page_size for p in range(context - new, context)]
    padded = [table + [-1] * (max(counts) - len(table)) for table in tables]
    step = Step(
        tokens=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([context for _, context in sequences], dtype=torch.int32),
        page_table=torch.tensor(padded, dtype=torch.int32),
        last=torch.tensor(starts[1:]) - 1,
    )
    return step, sum(counts)


def make_rope(size: int) -> Rope:
    angles = torch.outer(torch.arange(256), 10_000 ** (-torch.arange(0, size, 2) / size))
    return Rope(angles.cos(), angles.sin())
