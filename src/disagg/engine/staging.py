"""Arrays of a step on their way to the device: packed into pinned memory, sent as one copy.

The device side stays where it is, so CUDA graphs may read it. There are two host sides: while one is being sent, the
next step's arrays are written into the other.
"""

import math

import numpy as np
import torch
from torch import Tensor

from disagg.errors import InvariantError

_ALIGN = 16
_TORCH = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32", "float64")}


class Place:
    """Where an array lies, the same on both sides. `at` is in bytes."""

    __slots__ = ("at", "dtype", "shape")

    def __init__(self, at: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.at = at
        self.shape = shape
        self.dtype = dtype


class Staging:
    """`head_bytes` at the start of the device side belong to the caller; the arrays of a step follow."""

    def __init__(self, head_bytes: int, num_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._head = -(-head_bytes // _ALIGN) * _ALIGN
        self._device = torch.zeros(self._head + num_bytes, dtype=torch.uint8, device=device)
        self._host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._bytes = [host.numpy() for host in self._host]
        self._turn = 0
        self._used = 0

    def begin(self) -> None:
        """Start a step. What was sent two steps ago must have arrived."""
        self._turn ^= 1
        self._used = 0

    def put(self, array: np.ndarray) -> Place:
        """Add an array: int32, int64, float32 or float64. Raises InvariantError when the step outgrows the buffer."""
        at, size = self._used, array.nbytes
        if at + size > len(self._bytes[0]):
            raise InvariantError(f"A step needs more than the {len(self._bytes[0])} bytes set aside for its arrays.")
        self._bytes[self._turn][at : at + size] = array.reshape(-1).view(np.uint8)
        self._used = at + -(-size // _ALIGN) * _ALIGN
        return Place(self._head + at, array.shape, array.dtype)

    def view(self, place: Place) -> Tensor:
        """The array on the device, there once `send` has been called."""
        size = math.prod(place.shape) * place.dtype.itemsize
        return self._device[place.at : place.at + size].view(_TORCH[place.dtype]).view(place.shape)

    def words(self) -> Tensor:
        """The whole device side as int64: an int64 array of a step starts at `place.at // 8`."""
        return self._device[: len(self._device) // 8 * 8].view(torch.int64)

    def send(self) -> None:
        """Copy to the device, in the order of its stream."""
        used = min(self._used, len(self._bytes[0]))
        self._device[self._head : self._head + used].copy_(self._host[self._turn][:used], non_blocking=True)
