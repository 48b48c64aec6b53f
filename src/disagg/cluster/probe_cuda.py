"""How fast pages move between the GPUs of a budget: a path for every two of them, and one within each."""

import threading
from collections.abc import Sequence
from itertools import product

import torch

from disagg.cluster.probe import MIB, REPEATS, Path, measure, median
from disagg.transfer.cuda_driver import driver
from disagg.transfer.cuda_ipc import CudaIpcTransport

_SIZES = (1 * MIB, 16 * MIB, 256 * MIB)
_WORDS = {"device": "within GPU {0}", "peer": "GPU {1} to GPU {0}, peer access", "host": "GPU {1} to GPU {0}, by host"}


def gpus(devices: Sequence[int], page_bytes: int) -> list[Path]:
    """Measure every ordered pair of devices, both ends in this process: the copies are those between two processes.

    Raises DisaggError when a pull fails.
    """
    return [_path(reader, owner, page_bytes) for reader, owner in product(devices, devices)]


def names(devices: Sequence[int]) -> list[str]:
    """What the devices are, as "GPU 0, NVIDIA H100 80GB HBM3"."""
    return [f"GPU {device}, {driver().name(device)}" for device in devices]


def _path(reader: int, owner: int, page_bytes: int) -> Path:
    num_pages, ended = -(-_SIZES[-1] // page_bytes), threading.Event()
    source = CudaIpcTransport(num_pages, page_bytes, owner)
    target = CudaIpcTransport(num_pages, page_bytes, reader, ended.set)
    try:
        latency_s, speeds = measure(source, target, ended, page_bytes, _SIZES, lambda size: _plain_copy_s(reader, size))
        way = target.path(source.address())
    finally:
        target.close()
        source.close()
    name, warning = _WORDS[way].format(reader, owner), ""
    if way == "host":
        warning = f"Pages from GPU {owner} to GPU {reader} go through host memory: {speeds[-1].pull_gb_s:.1f} GB/s."
    return Path(name, page_bytes, latency_s, speeds, warning)


def _plain_copy_s(device: int, num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=f"cuda:{device}")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(device)

    return median(copy, REPEATS)
