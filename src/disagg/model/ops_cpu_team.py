"""Threads that run one kernel together, without a thread pool that fights torch's.

torch's OpenMP threads and numba's own pool each keep spinning after a parallel region, and on two cores the spinning
of one takes a core from the other. So numba compiles plain serial functions here, and a `Team` runs one of them on
several Python threads at once: the kernels release the GIL and share their items out as ops_cpu_jit.py describes.
Between calls the helpers sleep and cost nothing; with one thread there is no helper.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from disagg.model.ops_cpu_jit import PHASE_LEN


class Team:
    """Runs kernel(sync, *args) on up to torch.get_num_threads() threads; returns when all its work is done.

    The caller works from the start and helpers join when they are awake, which may be never: ops_cpu_jit.py says why
    that is safe. Several Python threads may call at once.
    """

    def __init__(self) -> None:
        self._helpers: list[_Helper] = []
        self._pid = os.getpid()

    def run(self, kernel: Callable[..., None], num_phases: int, *args: Any) -> None:
        """Run one kernel of num_phases phases."""
        sync = np.zeros(num_phases * PHASE_LEN, np.int64)
        for helper in self._awake(torch.get_num_threads() - 1):
            helper.offer(kernel, (sync, *args))
        kernel(sync, *args)

    def _awake(self, num_helpers: int) -> list[_Helper]:
        if self._pid != os.getpid():  # a fork keeps the list but not the threads
            self._helpers, self._pid = [], os.getpid()
        while len(self._helpers) < num_helpers:
            self._helpers.append(_Helper())
        return self._helpers[:num_helpers]


class _Helper:
    """One sleeping thread; `offer` wakes it for one kernel, in place of an offer it has not taken up yet."""

    def __init__(self) -> None:
        self._offers: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque(maxlen=1)
        self._wakes: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._loop, name="cpu-ops", daemon=True).start()

    def offer(self, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Wake the thread for a kernel that the caller runs as well.

        An offer is never refused because the thread is still returning from the kernel before: it may need the
        caller to release the GIL for that, which happens only inside this kernel.
        """
        self._offers.append((kernel, args))
        if self._wakes.empty():
            self._wakes.put(None)

    def _loop(self) -> None:
        while True:
            self._wakes.get()
            while self._offers:
                kernel, args = self._offers.pop()
                with suppress(Exception):  # the caller runs the same kernel on the same types and raises the same
                    kernel(*args)
                del kernel, args  # or the arrays would live until the next call
