"""The CUDA driver as transfer.cuda_driver offers it, over ordinary memory: for the transport's logic without a GPU."""

import numpy as np
import torch

from disagg.transfer.cuda_driver import CudaError


class FakeDriver:
    """Two devices. Copies are made when enqueued, each one a memmove that must lie in memory that is allocated.

    `peers` says whether the devices can read each other; `log` keeps what a test may ask for.
    """

    def __init__(self, peers=True):
        self.peers = peers
        self.memory = {}  # address -> bytes
        self.mapped = {}  # address -> how often
        self.log = []

    def uuid(self, device):
        return f"gpu{device}"

    def find(self, uuid):
        return {"gpu0": 0, "gpu1": 1}.get(uuid)

    def can_access_peer(self, device, peer):
        return self.peers

    def enable_peer(self, peer):
        self.log.append(("enable_peer", peer))

    def enter(self, device):
        assert device in (0, 1)

    def allocate(self, num_bytes):
        memory = np.zeros(num_bytes, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address):
        del self.memory[address]

    def export(self, address):
        return f"{address:x}"

    def open(self, handle):
        address = int(handle, 16)
        if address not in self.memory:
            raise CudaError("no such handle")
        self.mapped[address] = self.mapped.get(address, 0) + 1
        return address

    def close(self, address):
        self.mapped[address] -= 1

    def stream(self):
        return 1

    def end_stream(self, stream):
        pass

    def event(self):
        return 2

    def end_event(self, event):
        pass

    def record(self, event, stream):
        pass

    def wait(self, event):
        pass

    def seconds_between(self, first, second):
        return 1e-3

    def copy(self, targets, sources, sizes, stream):
        self.log.append(("copy", len(sizes)))
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._view(target, size)[:] = self._view(source, size)

    def tensor(self, address, num_bytes, device):
        return torch.from_numpy(self.memory[address])

    def _view(self, address, size):
        for base, memory in self.memory.items():
            if base <= address and address + size <= base + len(memory):
                return memory[address - base : address - base + size]
        raise CudaError("a copy outside of allocated memory")
