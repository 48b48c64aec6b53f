"""CUDA graphs of whole steps, in one memory pool, and the shapes that steps are padded to.

A captured graph costs the host one launch instead of hundreds. All graphs share their memory, logits included: what a
replay leaves is valid until the next one. Steps without a graph are padded, too, in what kernels are compiled for:
nothing may be left to compile when requests are served.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from disagg.garbage import no_collection

_In = TypeVar("_In")
# Rows of steps with chunks. More keep a GPU busy for longer than its host takes to launch them kernel by kernel, if the
# model has some billion weights (with 8 billion, 512 rows take 12 ms, launching 8); smaller ones wait for their host.
_ROWS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
# Places for decodes beside chunks, below the most there can be. Few: attention may need another kernel for each.
_BESIDE = (16, 64, 256, 512, 1024, 2048, 4096)
MOST_ROWS = _ROWS[-1]
MOST_CHUNKS = 8
"""Of a step that has a graph. One with more is launched kernel by kernel, whatever that costs its host."""


class Shape(NamedTuple):
    """What a step is padded to. Decodes come first, one row each; the rows of chunks follow them at once."""

    rows: int
    decodes: int  # places for them
    chunks: int  # places for them; 0: a step of decodes alone, where each place has the row of its own number
    logits: int  # rows of the result


def ladder(largest: int) -> list[int]:
    """Batch sizes worth a graph, 1 to `largest`: the padding costs at most a step of the matrix products' tiles."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 32)]
    return [size for size in steps if size < largest] + [largest]


class Shapes:
    """What steps of up to `max_running` requests, up to `max_rows` of them decodes, are padded to.

    Chunks above MOST_CHUNKS, and rows above 512 or `max_rows`, stay as many as they are.
    """

    def __init__(self, max_running: int, max_rows: int) -> None:
        self._max_running = max_running
        most_rows, most_beside = min(max_rows, MOST_ROWS), min(max_rows, max_running)
        self._sizes = ladder(max_running)
        self._rows = [*(rows for rows in _ROWS if rows < most_rows), most_rows]
        self._beside = [0, *(count for count in _BESIDE if count < most_beside), most_beside]

    def of(self, decodes: int, chunks: int, rows: int) -> Shape:
        """The smallest that holds a step of so many decodes, chunks, and rows in all."""
        if not chunks:
            size = self._sizes[bisect_left(self._sizes, decodes)]
            return Shape(rows=size, decodes=size, chunks=0, logits=size)
        places, chunks = self._beside[bisect_left(self._beside, decodes)], max(chunks, MOST_CHUNKS)
        if rows <= self._rows[-1]:
            rows = self._rows[bisect_left(self._rows, rows)]
            places = min(places, rows)  # a short step stays short
        rows = max(rows, places)  # attention of decodes writes the row of each place
        return Shape(rows, places, chunks, min(places + chunks, self._max_running))

    def all(self) -> list[Shape]:
        """Those worth a graph, which take most memory first.

        Steps that find none have the `decodes` of one of them all the same.
        """
        fewest = [0, *(count + 1 for count in self._beside[:-1] if count + 2 <= self._max_running)]  # that need so many
        mixed = {self.of(count, 1, max(rows, count + 1)) for rows in self._rows for count in fewest}
        alone = {self.of(size, 0, size) for size in self._sizes}
        return sorted(alone | mixed, key=lambda shape: (shape.logits, *shape), reverse=True)


class _Captured(NamedTuple):
    graph: "torch.cuda.CUDAGraph"
    logits: Tensor  # a view of the shared pool's memory, which it does not keep


class Graphs(Generic[_In]):
    """`forward(inputs)` computes logits float32 [shape.logits, V] from memory that stays in its place."""

    def __init__(self, forward: Callable[[_In], Tensor]) -> None:
        self._forward = forward
        self._captured: dict[Shape, _Captured] = {}
        self._pool: Any = None

    def capture(self, shape: Shape, inputs: _In) -> None:
        """Capture `forward(inputs)`, the shape that takes most memory first: the others then fit into it.

        Runs once without a graph before, for whatever compiles or allocates on first use.
        """
        self._forward(inputs)
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # a graph of an earlier runner that is collected amid a capture would break it off
        with no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(inputs)
        self._captured[shape] = _Captured(graph, _borrowed(logits))

    def run(self, shape: Shape, inputs: _In) -> Tensor:
        """Logits of `inputs`, which must lie where those it was captured with lay; without a graph, anywhere."""
        captured = self._captured.get(shape)
        if captured is None:
            return self._forward(inputs)
        captured.graph.replay()
        return captured.logits


class _Memory:
    """Device memory of somebody else, in the words of the CUDA array interface (version 3)."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": "<f4", "data": (tensor.data_ptr(), False), "strides": None,
            "version": 3,
        }  # fmt: skip


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory (float32, contiguous), not kept alive: a result kept for each graph would end the sharing."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device)
