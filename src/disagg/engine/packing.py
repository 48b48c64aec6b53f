"""A batch as the arrays that a GPU's step reads, padded to a shape and put where the device finds them.

    with chunks      rows         decodes │ rows of chunk 0 │ rows of chunk 1 │ padding, nobody's
                     sequences    decodes, padding without a row │ chunks, padding without a row
    decodes alone    rows         decodes │ padding
                     sequences    decodes │ padding, each with the row of its own number

Sequences of padding have context 0, rows of padding slot -1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from disagg.engine import draw
from disagg.engine.batch import Batch
from disagg.engine.graphs import Shape
from disagg.engine.slots import Slots
from disagg.engine.staging import Place, Staging
from disagg.request import Request

BYTES_PER_POSITION = 32  # token, position, slot, source
BYTES_PER_REQUEST = 160  # all other arrays of a request in a step, 52, and of a place of padding, 16; rounded up
BYTES_PER_PAGE = 12  # an entry of the page table and its place


class Packed(NamedTuple):
    """Where a step's arrays lie, B sequences with T rows. It depends on the shape alone, so graphs find them again."""

    shape: Shape
    positions: Place  # int64 [T]
    slots: Place  # int64 [T]
    source: Place  # int64 [T], where the tokens lie, in words from the start of the device side
    table_rows: Place  # int64 [B], slots of the page table
    context_len: Place  # int32 [B]
    query_start: Place  # int32 [B + 1]
    last: Place  # int64 [shape.logits], rows whose logits are wanted


class Choosing(NamedTuple):
    """Where the fields of a Choice lie, in their order, and what else there is to do with the logits."""

    places: list[Place]
    filtered: bool
    adjusts: bool


class Packer:
    """Puts a step's arrays into `staging`. What a graph reads has to be put first."""

    def __init__(self, staging: Staging, slots: Slots, page_size: int) -> None:
        self._staging = staging
        self._slots = slots
        self._page_size = page_size

    def put(self, batch: Batch, table_rows: np.ndarray, shape: Shape, fresh: Mapping[Request, int]) -> Packed:
        """The arrays of the positions, padded to `shape`.

        `table_rows` int64 [decodes + chunks of the batch]: slots of its requests. `fresh`: where tokens lie that the
        host does not know yet, in words from the start of the device side.
        """
        count, num_sequences = len(batch.decodes), shape.decodes + shape.chunks
        tokens, positions = np.zeros(shape.rows, np.int64), np.zeros(shape.rows, np.int64)
        slots = np.full(shape.rows, -1, np.int64)
        of_sequence, context_len = np.zeros(num_sequences, np.int64), np.zeros(num_sequences, np.int32)
        query_start = np.arange(num_sequences + 1, dtype=np.int32)
        if count:
            positions[:count] = at = np.array([request.num_computed - 1 for request in batch.decodes], np.int64)
            known = zip(batch.decodes, at.tolist(), strict=True)
            tokens[:count] = [r.tokens[p] if p < len(r.tokens) else -1 for r, p in known]
            slots[:count] = self._places(table_rows[:count], at)
            of_sequence[:count], context_len[:count] = table_rows[:count], at + 1
        last = np.zeros(shape.logits, np.int64)  # of padding: row 0, which is somebody's
        last[:count] = np.arange(count)
        if shape.chunks:
            query_start[count:] = count
        row, sampled = count, count
        for index, (request, start, length, samples) in enumerate(batch.chunks):
            end, sequence, table_row = row + length, shape.decodes + index, table_rows[count + index]
            tokens[row:end] = request.tokens[start : start + length]
            positions[row:end] = at = np.arange(start, start + length)
            slots[row:end] = self._places(table_row, at)
            of_sequence[sequence], context_len[sequence] = table_row, start + length
            query_start[sequence + 1 :] = end
            if samples:
                last[sampled] = end - 1
                sampled += 1
            row = end
        put = self._staging.put
        source = np.arange(shape.rows) + put(tokens).at // tokens.itemsize
        unknown = np.flatnonzero(tokens[:count] < 0)
        if unknown.size:
            source[unknown] = [fresh[batch.decodes[index]] for index in unknown.tolist()]
        arrays = (positions, slots, source, of_sequence, context_len, query_start, last)
        return Packed(shape, *[put(array) for array in arrays])

    def put_choice(self, batch: Batch, table_rows: np.ndarray) -> Choosing:
        """The arrays of a Choice, [S] of the requests that sample. `table_rows` int64 [decodes + chunks]: as above."""
        sampling, known = batch.sampling(), self._slots
        wanted = [True] * len(batch.decodes) + [chunk.samples for chunk in batch.chunks]
        mine = table_rows[wanted] if batch.chunks else table_rows
        indices = np.array([request.num_computed - request.prompt_len for request in sampling], np.int64)
        top_k, top_p, min_p = known.top_k[mine], known.top_p[mine], known.min_p[mine]
        arrays = (known.temperature[mine], draw.uniforms(known.seed[mine], indices), top_k, top_p, min_p)
        filtered = bool(top_k.any() or (top_p < 1).any() or min_p.any())
        return Choosing([self._staging.put(array) for array in arrays], filtered, bool(known.adjusts[mine].any()))

    def _places(self, table_rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slots int64 [N] of positions int64 [N]; `table_rows`: one for each, or one for all."""
        size = self._page_size
        found: np.ndarray = self._slots.pages[table_rows, positions // size] * np.int64(size) + positions % size
        return found
