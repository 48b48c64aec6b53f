"""The process a worker lives in: from a WorkerConfig to a loop that runs.

Started as `python -m disagg.cluster.worker_process` with one JSON line (WorkerConfig) on standard input, which then
stays open: when it closes, whoever started this worker is gone, and so is the worker. Or forked by `template`.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from disagg.clock import WallClock
from disagg.cluster import messages as m
from disagg.cluster.mailbox import FRONT, Mailbox
from disagg.cluster.worker import Worker, WorkerConfig
from disagg.config import EngineSpec
from disagg.errors import DisaggError, InputError

if TYPE_CHECKING:
    from disagg.engine.engine import Runs
    from disagg.model.load import Loaded
    from disagg.transfer.cuda_ipc import CudaIpcTransport
    from disagg.transfer.layout import Layout
    from disagg.transfer.shm import SharedMemoryTransport

_WARM_UP_PAGES = 8


def load(engine: EngineSpec, device: str) -> "Loaded":
    """The model every worker of a deployment runs, on `device` as torch names it. Raises ModelError and InputError."""
    from disagg.model.load import load_model

    return load_model(
        engine.model, dtype=engine.dtype, device=device, random_weights=engine.random_weights,
        seed=engine.weights_seed, max_len=engine.max_len,
    )  # fmt: skip


def warm_up(loaded: "Loaded", page_size: int) -> None:
    """Import, and compile or read from the cache, all that workers and their first steps and copies would."""
    import numpy as np

    import disagg.transfer.checksum
    import disagg.transfer.layout
    import disagg.transfer.shm  # noqa: F401
    from disagg.cache.storage import KVStorage
    from disagg.engine.runner import Runner
    from disagg.transfer.copy import copy_runs

    spec = loaded.spec
    Runner(loaded, KVStorage(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, page_size=page_size,
        num_pages=_WARM_UP_PAGES, dtype=loaded.kv_dtype,
    )).warm_up()  # fmt: skip
    copy_runs(np.zeros((2, 64), np.uint8), np.zeros((2, 64), np.uint8), np.array([[0, 1, 1]]))


def build(config: WorkerConfig, loaded: "Loaded", mailbox: Mailbox, wake: Callable[[], None]) -> Worker:
    """Make the pages and warm the kernels up. Raises InputError."""
    from disagg.transfer.layout import Layout

    engine, spec = config.engine, loaded.spec
    layout = Layout(
        model=loaded.fingerprint, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads,
        page_size=engine.page_size, head_dim=spec.head_dim, dtype=loaded.kv_dtype,
    )  # fmt: skip
    made: tuple[SharedMemoryTransport | CudaIpcTransport, Runs]
    if config.spec.kind == "cpu":
        made = _on_cores(config, loaded, layout, wake)
    else:
        from disagg.cluster.on_gpu import on_gpu

        made = on_gpu(config, loaded, layout, wake)
    transport, runner = made
    hello = m.Hello(config.worker, transport.address(), layout, len(transport.pages))
    if not engine.checksum:
        return Worker(config, hello, mailbox, runner, transport, WallClock())
    from disagg.transfer.checksum import page_checksums

    return Worker(config, hello, mailbox, runner, transport, WallClock(), page_checksums(transport.pages))


def _on_cores(
    config: WorkerConfig, loaded: "Loaded", layout: "Layout", wake: Callable[[], None]
) -> tuple["SharedMemoryTransport", "Runs"]:
    """Pages in shared memory, and the runner over them, warm."""
    from disagg.cache.storage import KVStorage
    from disagg.engine.runner import Runner
    from disagg.transfer.shm import SharedMemoryTransport

    transport = SharedMemoryTransport(config.num_pages, layout.page_bytes, wake)
    runner = Runner(loaded, KVStorage(
        num_layers=layout.num_layers, num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim,
        page_size=layout.page_size, num_pages=config.num_pages, dtype=layout.dtype, buffer=transport.pages,
    ))  # fmt: skip
    runner.warm_up()
    return transport, runner


def serve(config: WorkerConfig, parent_fd: int, loaded: "Loaded | None" = None) -> None:
    """Be this worker until told to stop or until `parent_fd` closes. `loaded`: the model, if it is here already."""
    if config.spec.kind == "cpu":
        os.sched_setaffinity(0, config.spec.devices)  # before torch makes its threads
    mailbox = Mailbox(Path(config.folder), config.worker)
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        import torch

        torch.set_num_threads(config.spec.num_threads)
        if config.spec.kind == "cuda":
            torch.cuda.set_device(config.spec.torch_device)
        loaded = loaded or load(config.engine, config.spec.torch_device)
        worker = build(config, loaded, mailbox, lambda: os.eventfd_write(wake_fd, 1))
    except DisaggError as error:
        mailbox.send(FRONT, m.StartFailed(config.worker, str(error), isinstance(error, InputError)))
        raise
    if config.heartbeat_s is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: worker.drain())
    if not worker.run(parent_fd, wake_fd):
        shutil.rmtree(config.folder, ignore_errors=True)  # nobody else is left to do it


def main() -> None:
    """Entry point of the process."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    serve(config, sys.stdin.fileno())


if __name__ == "__main__":
    main()
