"""How CPU kernels are compiled, and how the threads that run one share the work.

Parameters of an `@instruction` are numba's own types while compiling, which have no public names: hence `Any`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def _cache_dir() -> str:
    """Compiled code goes to the user's cache, in a folder named by a hash of all kernel sources.

    numba checks only the file a function is in, not the files of functions it inlines; the hash does. Writes are
    atomic renames, so several processes may start at once.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("ops_cpu*.py")):
        digest.update(path.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(
        os.environ.get("NUMBA_CACHE_DIR") or os.path.join(home, "disagg", "numba"), digest.hexdigest()[:16]
    )
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # a read-only home: compile once for each process rather than not at all
        return tempfile.mkdtemp(prefix="disagg-numba-")
    return folder


_CACHE_DIR = _cache_dir()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile without the GIL, cached on disk; sums may be reordered within a row, never across rows."""
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, _CACHE_DIR
    try:
        return njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "nnan"})(
            function
        )
    finally:
        config.CACHE_DIR = before


def instruction(function: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, which type checkers misread: the function emits LLVM instructions at each call of it."""
    return intrinsic(function)


# A kernel is a sequence of phases, a phase a number of independent items. Threads take items until none is left, and a
# phase is over when every item is finished, not when every thread has arrived: a thread that wakes late, or whose core
# was taken away, delays nobody unless it holds an item. So a thread may still walk through phases that are over, even
# after the caller has returned; it finds no items and touches no data.
#
# sync int64 holds two words for each phase, on a cache line each: the next item, and how many are finished.
_LINE = 8
PHASE_LEN = 2 * _LINE
_SPINS_BEFORE_YIELD = 500  # some microseconds of waiting before the core is offered to someone else


@instruction
def _fetch_add(typing: Any, words: Any, at: Any, value: Any) -> Any:
    """Atomically words[at] += value; returns the old value."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = b.gep(context.make_array(signature.args[0])(context, b, args[0]).data, [args[1]])
        return b.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(words, types.intp, types.int64), generate


def _call_void(b: ir.IRBuilder, name: str) -> None:
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(ir.VoidType(), []), name)
    b.call(function, [])


@instruction
def _pause(typing: Any) -> Any:
    """Tell the core that this is a waiting loop (x86; elsewhere nothing)."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call_void(b, "llvm.x86.sse2.pause")
        return context.get_dummy_value()

    return types.void(), generate


@instruction
def _yield_core(typing: Any) -> Any:
    """sched_yield() where the C library has it."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if os.name == "posix":
            _call_void(b, "sched_yield")
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def next_item(sync: np.ndarray, phase: int) -> int:
    """The next piece of work of a phase, from 0; each number is given to exactly one thread."""
    return _fetch_add(sync, phase * PHASE_LEN, 1)


@kernel
def finish_item(sync: np.ndarray, phase: int) -> None:
    """Say that the item taken last is finished: its results are visible to whoever sees the phase end."""
    _fetch_add(sync, phase * PHASE_LEN + _LINE, 1)


@kernel
def finish_phase(sync: np.ndarray, phase: int, num_items: int) -> None:
    """Wait until all items of a phase are finished."""
    spins = 0
    while _fetch_add(sync, phase * PHASE_LEN + _LINE, 0) < num_items:
        spins += 1
        _pause()
        if spins > _SPINS_BEFORE_YIELD:
            _yield_core()
