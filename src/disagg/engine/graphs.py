"""CUDA graphs of the decode step at a ladder of batch sizes, in one memory pool.

A captured graph costs the host one launch instead of hundreds. All graphs share their memory, logits included: what a
replay leaves is valid until the next one.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_In = TypeVar("_In")


def ladder(largest: int) -> list[int]:
    """Batch sizes worth a graph: the padding costs at most a step of the matrix products' tiles."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 32)]
    return [size for size in steps if size < largest] + [largest]


class _Captured(NamedTuple):
    graph: "torch.cuda.CUDAGraph"
    logits: Tensor  # a view of the shared pool's memory, which it does not keep


class Graphs(Generic[_In]):
    """`forward(inputs)` computes logits float32 [size, V] from memory that stays in its place.

    `sizes` ascending; empty: nothing is ever captured.
    """

    def __init__(self, sizes: list[int], forward: Callable[[_In], Tensor]) -> None:
        self.sizes = sizes
        self._forward = forward
        self._captured: dict[int, _Captured] = {}
        self._pool: Any = None

    def padded(self, size: int) -> int:
        """The size a step of `size` requests is run at."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else size

    def capture(self, size: int, inputs: _In) -> None:
        """Capture `forward(inputs)` for `size`, the largest size first: the others then fit into its memory.

        Runs once without a graph before, for whatever compiles or allocates on first use.
        """
        self._forward(inputs)
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(inputs)
        self._captured[size] = _Captured(graph, _borrowed(logits))

    def run(self, size: int, inputs: _In) -> Tensor:
        """Logits [size, V] of `inputs`, which must be those it was captured with; without a graph, any."""
        captured = self._captured.get(size)
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
