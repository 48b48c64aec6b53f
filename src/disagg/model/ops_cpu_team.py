"""Threads that run one kernel together, without a thread pool that fights torch's.

torch's OpenMP threads and numba's own pool each keep spinning after a parallel region, and on two cores the spinning
of one takes a core from the other. So numba compiles plain serial functions here, and a `Team` runs one of them on
several Python threads at once: the kernels release the GIL and meet at the barrier in ops_cpu_jit.py. Between calls
the helpers sleep on a lock and cost nothing; with one thread there is no helper and no lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from disagg.model.ops_cpu_jit import SYNC_LEN


class Team:
    """Runs kernel(thread, num_threads, sync, *args) on torch.get_num_threads() threads, and returns when all passed
    the kernel's last barrier.

    A kernel must end with a barrier: the caller continues while a helper may still be returning from it. Calls from
    several Python threads are taken one at a time.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._helpers: list[_Helper] = []
        self._pid = os.getpid()

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        """Run one kernel on the whole team."""
        num_threads = torch.get_num_threads()
        sync = np.zeros(SYNC_LEN, np.int64)
        if num_threads == 1:
            kernel(0, 1, sync, *args)
            return
        with self._turn:
            if self._pid != os.getpid():  # a fork keeps the list but not the threads
                self._helpers, self._pid = [], os.getpid()
            while len(self._helpers) < num_threads - 1:
                self._helpers.append(_Helper(len(self._helpers) + 1))
            for helper in self._helpers[: num_threads - 1]:
                helper.start(kernel, (num_threads, sync, *args))
            kernel(0, num_threads, sync, *args)


class _Helper:
    """One sleeping thread; `start` wakes it for one kernel."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._wake, self._idle = threading.Lock(), threading.Lock()
        self._wake.acquire()
        self._job: tuple[Callable[..., None], tuple[Any, ...]] | None = None
        threading.Thread(target=self._loop, name=f"cpu-ops-{number}", daemon=True).start()

    def start(self, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._idle.acquire()  # the previous kernel has returned here too
        self._job = (kernel, args)
        self._wake.release()

    def _loop(self) -> None:
        while True:
            self._wake.acquire()
            assert self._job is not None
            kernel, args = self._job
            with suppress(Exception):  # the caller runs the same kernel on the same types and raises the same error
                kernel(self._number, *args)
            self._job = args = None  # or the arrays would live until the next call
            self._idle.release()
