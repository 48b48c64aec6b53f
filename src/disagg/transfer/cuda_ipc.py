"""Pages in GPU memory, pulled by copy engines from another process's pool on the same host.

The pool is one allocation of its own; its address carries a CUDA IPC handle, by which a peer of the same user maps it.
A pull merges runs of neighbouring pages and hands all of them to the driver in one call, on a stream that nothing else
uses, so neither the engine's thread nor its kernels wait. A thread waits until the copies are done: it spins, which
costs a core while pages are on their way (0.2 ms for 300 MB on one GPU) and nothing in between.

Nothing orders a pull against the kernels on either side, and nothing has to. Whoever announces a page has seen the end
of the step that wrote it, not only launched it; and a page is free for reservation when no launched step can touch it
any more, as the engine releases pages only after the last such step has ended. So a copy may start at once, in the
middle of a step. What is pulled is read by steps that are launched after `poll` told of its end.

    where the peer's pool lies          path
    on the same GPU                     device memory
    on a GPU with peer access           NVLink or PCIe
    on any other GPU of the host        through host memory, by the driver: slow, and warned of
"""

import logging
import os
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from disagg.clock import WallClock
from disagg.errors import HandshakeError
from disagg.transfer.base import Pulled, run_table
from disagg.transfer.beside import Copied, CopyThread, Order
from disagg.transfer.cuda_driver import CudaError, Driver, driver

_SCHEME = "cuda-ipc:"
_TRIAL_BYTES = 64 << 20  # copied to tell how slow a path through the host is
_log = logging.getLogger(__name__)


class _Pool(msgspec.Struct, frozen=True):
    """A pool as its owner describes it to peers."""

    pid: int
    gpu: str  # uuid
    handle: str
    pointer: int  # in the owner's address space
    num_pages: int
    page_bytes: int


class _Peer(msgspec.Struct, frozen=True):
    """A pool mapped here."""

    pool: _Pool
    pointer: int  # in our address space
    device: int  # where it lies
    path: str


_own: set[int] = set()  # pointers of the pools of this process: these are not mapped, but used as they are


class CudaIpcTransport:
    """`pages` is a tensor, uint8 [num_pages, page_bytes], on `device`.

    Raises CudaError when the memory is not there.
    """

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        device: int = 0,
        wake: Callable[[], None] = lambda: None,
        cuda: Driver | None = None,
    ) -> None:
        """`wake`: see CopyThread. `cuda` replaces the driver in tests."""
        self._cuda = cuda or driver()
        self._device = device
        self._cuda.enter(device)
        pointer = self._cuda.allocate(num_pages * page_bytes)
        _own.add(pointer)
        handle = self._cuda.export(pointer)
        self._pool = _Pool(os.getpid(), self._cuda.uuid(device), handle, pointer, num_pages, page_bytes)
        self.pages = self._cuda.tensor(pointer, num_pages * page_bytes, device).view(num_pages, page_bytes)
        self._stream = self._cuda.stream()
        self._begun, self._done = self._cuda.event(), self._cuda.event()
        self._peers: dict[str, _Peer] = {}
        self._clock = WallClock()
        self._thread = CopyThread(self._copy, wake)

    def address(self) -> str:
        """See Transport."""
        return _SCHEME + msgspec.json.encode(self._pool).decode()

    def connect(self, address: str) -> None:
        """See Transport."""
        if address in self._peers:
            return
        try:
            pool = msgspec.json.decode(address.removeprefix(_SCHEME), type=_Pool)
        except msgspec.DecodeError as error:
            raise HandshakeError(f"{address} is no pool of a GPU: both workers must be on GPUs.") from error
        if pool.page_bytes != self._pool.page_bytes:
            theirs, ours = pool.page_bytes, self._pool.page_bytes
            raise HandshakeError(f"Pages of process {pool.pid} have {theirs} bytes, ours have {ours}.")
        device = self._cuda.find(pool.gpu)
        if device is None:
            raise HandshakeError(
                f"The GPU of process {pool.pid} is not visible here: start all workers with the same "
                "CUDA_VISIBLE_DEVICES."
            )
        try:
            self._peers[address] = peer = self._map(pool, device)
        except CudaError as error:
            message = f"The pages of process {pool.pid} cannot be mapped ({error}): is its worker alive?"
            raise HandshakeError(message) from error
        finally:
            self._cuda.enter(self._device)
        if peer.path == "host":
            self._thread.then(lambda: self._warn(peer))

    def path(self, address: str) -> str:
        """How pages of a connected peer come: "device", "peer" or "host"."""
        return self._peers[address].path

    def pull(self, address: str, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """See Transport."""
        return self._thread.pull(address, theirs, ours)

    def poll(self) -> list[Pulled]:
        """See Transport."""
        return self._thread.poll()

    def disconnect(self, address: str) -> None:
        """See Transport."""
        if (peer := self._peers.pop(address, None)) is not None:
            self._thread.then(lambda: self._unmap(peer))

    def close(self) -> None:
        """See Transport. `pages` must not be used afterwards."""
        for address in list(self._peers):
            self.disconnect(address)
        self._thread.close()
        self._cuda.enter(self._device)
        self._cuda.end_stream(self._stream)
        for event in (self._begun, self._done):
            self._cuda.end_event(event)
        _own.discard(self._pool.pointer)
        self._cuda.free(self._pool.pointer)

    def _map(self, pool: _Pool, device: int) -> _Peer:
        path = "device"
        if device != self._device:
            path = "peer" if self._cuda.can_access_peer(self._device, device) else "host"
        self._cuda.enter(device if path == "host" else self._device)  # in whose address space it is opened
        if pool.pid != os.getpid():
            return _Peer(pool, self._cuda.open(pool.handle), device, path)
        if pool.pointer not in _own:
            raise CudaError("it was closed")
        if path == "peer":
            self._cuda.enable_peer(device)
        return _Peer(pool, pool.pointer, device, path)

    def _unmap(self, peer: _Peer) -> None:
        if peer.pool.pid != os.getpid():
            self._cuda.enter(peer.device if peer.path == "host" else self._device)
            self._cuda.close(peer.pointer)

    def _copy(self, order: Order) -> Copied:
        """Runs in the copying thread."""
        start, peer, page_bytes = self._clock.now(), self._peers.get(order.address), self._pool.page_bytes
        if peer is None:
            raise HandshakeError(f"not connected to {order.address}")
        table = run_table(order.theirs, order.ours, peer.pool.num_pages, self._pool.num_pages)
        theirs, ours, sizes = np.ascontiguousarray((table * page_bytes).astype(np.uint64).T)
        if not len(sizes):
            return 0, start, start
        took_s = self._timed(ours + np.uint64(self._pool.pointer), theirs + np.uint64(peer.pointer), sizes)
        end = self._clock.now()
        return len(order.ours) * page_bytes, end - took_s, end

    def _timed(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> float:
        """Copy, and wait until it is done; returns how long the device took, in seconds."""
        cuda = self._cuda
        cuda.enter(self._device)
        cuda.record(self._begun, self._stream)
        cuda.copy(targets, sources, sizes, self._stream)
        cuda.record(self._done, self._stream)
        cuda.wait(self._done)
        return cuda.seconds_between(self._begun, self._done)

    def _warn(self, peer: _Peer) -> None:
        """Say that the path is slow, and how slow. Runs in the copying thread."""
        num_bytes = min(_TRIAL_BYTES, peer.pool.num_pages * peer.pool.page_bytes)
        self._cuda.enter(self._device)
        scratch = self._cuda.allocate(num_bytes)
        trial = (np.array([each], np.uint64) for each in (scratch, peer.pointer, num_bytes))
        took_s = self._timed(*trial)
        self._cuda.free(scratch)
        _log.warning(
            "GPU %d cannot read GPU %d directly: pages go through host memory, at %.1f GB/s.",
            self._device, peer.device, num_bytes / took_s / 1e9,
        )  # fmt: skip
