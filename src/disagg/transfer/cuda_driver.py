"""The calls of the CUDA driver that the cuda_ipc transport needs and torch does not offer, each result checked.

Bound with ctypes to libcuda.so.1, whose entry points keep their names and meanings (`_v2` is another entry point): no
compiler, no further package. The GIL is dropped during a call, unless the call is over in a microsecond: getting it
back from a busy engine thread takes longer. Source: NVIDIA's CUDA Driver API reference, modules Memory Management,
Stream Management, Event Management and Peer Context Memory Access.

Devices are numbers from 0 as this process sees them (CUDA_VISIBLE_DEVICES applies), addresses and handles plain ints.
"""

import ctypes as c
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disagg.errors import DisaggError

_NON_BLOCKING = 1  # stream: no implicit order with the default stream
_SPIN = 0  # event: a waiting thread spins; sleeping instead would end some 0.1 ms late, a third of a hand-off
_LAZY_PEER_ACCESS = 1  # IPC: mapping another GPU's memory turns peer access on
_STREAM_ORDER = 1  # batch of copies: sources are read in stream order
_BESIDE_COMPUTE = 1  # likewise: prefer copy engines to multiprocessors
_HANDLE_BYTES = 64
_ALREADY_ENABLED = 704

_Out = c.c_void_p  # a pointer the call writes through


class CudaError(DisaggError):
    """A call of the driver failed."""


class _Handle(c.Structure):
    _fields_ = (("data", c.c_ubyte * _HANDLE_BYTES),)


class _Location(c.Structure):
    _fields_ = (("kind", c.c_int), ("id", c.c_int))


class _CopyAttributes(c.Structure):
    _fields_ = (("order", c.c_int), ("source", _Location), ("target", _Location), ("flags", c.c_uint))


class _Exposed:
    """Device memory under the protocol by which libraries exchange it (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        shape = (num_bytes,)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c.c_uint,),
    "cuDeviceGetCount": (_Out,),
    "cuDeviceGetName": (_Out, c.c_int, c.c_int),
    "cuDeviceGetUuid_v2": (_Out, c.c_int),
    "cuDeviceCanAccessPeer": (_Out, c.c_int, c.c_int),
    "cuDevicePrimaryCtxRetain": (_Out, c.c_int),
    "cuCtxSetCurrent": (c.c_void_p,),
    "cuCtxEnablePeerAccess": (c.c_void_p, c.c_uint),
    "cuCtxGetStreamPriorityRange": (_Out, _Out),
    "cuStreamCreateWithPriority": (_Out, c.c_uint, c.c_int),
    "cuStreamDestroy_v2": (c.c_void_p,),
    "cuStreamSynchronize": (c.c_void_p,),
    "cuEventCreate": (_Out, c.c_uint),
    "cuEventDestroy_v2": (c.c_void_p,),
    "cuEventRecord": (c.c_void_p, c.c_void_p),
    "cuEventSynchronize": (c.c_void_p,),
    "cuEventElapsedTime": (_Out, c.c_void_p, c.c_void_p),
    "cuMemAlloc_v2": (_Out, c.c_size_t),
    "cuMemFree_v2": (c.c_uint64,),
    "cuMemsetD8_v2": (c.c_uint64, c.c_ubyte, c.c_size_t),
    "cuIpcGetMemHandle": (_Out, c.c_uint64),
    "cuIpcOpenMemHandle_v2": (_Out, _Handle, c.c_uint),
    "cuIpcCloseMemHandle": (c.c_uint64,),
    "cuMemcpyAsync": (c.c_uint64, c.c_uint64, c.c_size_t, c.c_void_p),
    "cuGetErrorName": (c.c_int, _Out),
}
_BRIEF = ("cuCtxSetCurrent", "cuEventRecord", "cuEventElapsedTime")  # called with the GIL held
# CUDA 13; the entry point of 12.8 under the old name takes one argument more, and is done without
_BATCH = "cuMemcpyBatchAsync_v2"
_BATCH_SIGNATURE = (_Out, _Out, _Out, c.c_size_t, _Out, _Out, c.c_size_t, c.c_void_p)


class Driver:
    """libcuda.so.1, initialised. Every method raises CudaError when the driver refuses."""

    def __init__(self) -> None:
        try:
            self._library, brief = c.CDLL("libcuda.so.1"), c.PyDLL("libcuda.so.1")
        except OSError:
            raise CudaError("No CUDA driver (libcuda.so.1) is on this machine: use a cpu budget.") from None
        self.can_batch = hasattr(self._library, _BATCH)
        signatures = _SIGNATURES | ({_BATCH: _BATCH_SIGNATURE} if self.can_batch else {})
        self._functions = {name: getattr(brief if name in _BRIEF else self._library, name) for name in signatures}
        for name, types in signatures.items():
            self._functions[name].argtypes = types
        self._contexts: dict[int, int] = {}
        self._call("cuInit", 0)

    @property
    def num_devices(self) -> int:
        """How many devices this process sees."""
        return self._int("cuDeviceGetCount")

    def name(self, device: int) -> str:
        """The device's name, as "NVIDIA H100 80GB HBM3"."""
        text = c.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), device)
        return text.value.decode()

    def uuid(self, device: int) -> str:
        """What names this device in every process, as hexadecimal digits."""
        text = (c.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", text, device)
        return bytes(text).hex()

    def find(self, uuid: str) -> int | None:
        """The device of that name; None when this process does not see it."""
        return next((device for device in range(self.num_devices) if self.uuid(device) == uuid), None)

    def can_access_peer(self, device: int, peer: int) -> bool:
        """Whether `device` can read the memory of `peer` without the host."""
        return bool(self._int("cuDeviceCanAccessPeer", device, peer))

    def enter(self, device: int) -> None:
        """Make the device's primary context, which is torch's too, current in this thread. Cheap when repeated."""
        self._call("cuCtxSetCurrent", self._context(device))

    # What follows happens on the device entered last.

    def allocate(self, num_bytes: int) -> int:
        """Memory of its own allocation, as IPC handles name whole allocations; filled with zeros."""
        address = self._pointer("cuMemAlloc_v2", num_bytes)
        self._call("cuMemsetD8_v2", address, 0, num_bytes)
        return address

    def free(self, address: int) -> None:
        """Give memory back; waits for the device."""
        self._call("cuMemFree_v2", address)

    def export(self, address: int) -> str:
        """A handle by which other processes can map this allocation, as hexadecimal digits."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", c.byref(handle), address)
        return bytes(handle.data).hex()

    def open(self, handle: str) -> int:
        """Map an allocation of another process. Opened twice, it must be closed twice."""
        text = _Handle((c.c_ubyte * _HANDLE_BYTES)(*bytes.fromhex(handle)))
        return self._pointer("cuIpcOpenMemHandle_v2", text, _LAZY_PEER_ACCESS)

    def close(self, address: int) -> None:
        """Unmap what `open` gave."""
        self._call("cuIpcCloseMemHandle", address)

    def stream(self) -> int:
        """A stream of the lowest priority that waits for no other."""
        lowest, highest = c.c_int(), c.c_int()
        self._call("cuCtxGetStreamPriorityRange", c.byref(lowest), c.byref(highest))
        return self._pointer("cuStreamCreateWithPriority", _NON_BLOCKING, lowest.value)

    def end_stream(self, stream: int) -> None:
        """Wait for the stream and let it go."""
        self._call("cuStreamSynchronize", stream)
        self._call("cuStreamDestroy_v2", stream)

    def event(self) -> int:
        """An event with a time."""
        return self._pointer("cuEventCreate", _SPIN)

    def end_event(self, event: int) -> None:
        """Let an event go."""
        self._call("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        """Let the event happen when all that the stream was given so far is done."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Return once the event has happened. Keeps a core busy until then, but not the GIL."""
        self._call("cuEventSynchronize", event)

    def seconds_between(self, first: int, second: int) -> float:
        """Time on the device between two events that have happened."""
        milliseconds = c.c_float()
        self._call("cuEventElapsedTime", c.byref(milliseconds), first, second)
        return milliseconds.value / 1e3

    def enable_peer(self, peer: int) -> None:
        """Let the device entered last read memory that this process has on `peer`, without the host."""
        self._call("cuCtxEnablePeerAccess", self._context(peer), 0, fine=(0, _ALREADY_ENABLED))

    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        """Enqueue copies, pairwise; addresses and sizes uint64 [n]. Returns before they are done.

        One call where the driver has the batch call (13.0 and newer). Between devices without peer access the driver
        goes through host memory.
        """
        if not self.can_batch:
            for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
                self._call("cuMemcpyAsync", target, source, size, stream)
        elif len(sizes):
            attributes = _CopyAttributes(order=_STREAM_ORDER, flags=_BESIDE_COMPUTE)
            arrays = (array.ctypes.data for array in (targets, sources, sizes))
            self._call(_BATCH, *arrays, len(sizes), c.byref(attributes), c.byref(c.c_size_t(0)), 1, stream)

    def tensor(self, address: int, num_bytes: int, device: int) -> Tensor:
        """Memory of `device` as a tensor, uint8 [num_bytes]. It must not be used after the memory was freed."""
        return torch.as_tensor(_Exposed(address, num_bytes), device=f"cuda:{device}")

    def _context(self, device: int) -> int:
        if device not in self._contexts:
            self._contexts[device] = self._pointer("cuDevicePrimaryCtxRetain", device)
        return self._contexts[device]

    def _call(self, name: str, *arguments: Any, fine: tuple[int, ...] = (0,)) -> None:
        if (code := self._functions[name](*arguments)) not in fine:
            text = c.c_char_p()
            self._functions["cuGetErrorName"](code, c.byref(text))
            raise CudaError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code}).")

    def _pointer(self, name: str, *arguments: Any) -> int:
        """Of a call that writes a handle or an address through its first argument."""
        value = c.c_void_p()
        self._call(name, c.byref(value), *arguments)
        return value.value or 0

    def _int(self, name: str, *arguments: int) -> int:
        """Of a call that writes an int through its first argument."""
        value = c.c_int()
        self._call(name, c.byref(value), *arguments)
        return value.value


@cache
def driver() -> Driver:
    """The driver, loaded once in this process."""
    return Driver()
