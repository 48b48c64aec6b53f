"""How CPU kernels are compiled, and how the threads of a team that runs one meet.

Parameters of an `@intrinsic` are numba's own types while compiling, so they carry no annotation here.
"""
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic


def _cache_dir() -> str:
    """Compiled code goes to the user's cache, in a folder named by a hash of all kernel sources.

    numba checks only the file a function is in, not the files of functions it inlines; the hash does. Writes are
    atomic renames, so several processes may start at once.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("ops_cpu*.py")):
        digest.update(path.read_bytes())
    root = os.environ.get("NUMBA_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "disagg", "numba"
    )
    return os.path.join(root, digest.hexdigest()[:16])


_CACHE_DIR = _cache_dir()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile without the GIL, cached on disk; sums may be reordered within a row, never across rows."""
    before, config.CACHE_DIR = config.CACHE_DIR, _CACHE_DIR
    try:
        return njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "nnan"})(
            function
        )
    finally:
        config.CACHE_DIR = before


# The team: `num_threads` threads run the same kernel and meet at barriers (ops_cpu_team.py starts them). They share
# one int64 array; each word has a cache line of its own.
ARRIVED, ROUND, NEXT_ITEM = 0, 8, 16
SYNC_LEN = 24
_SPINS_BEFORE_YIELD = 2000  # about 30 us of waiting before the core is offered to someone else


@intrinsic
def _fetch_add(typing, words, at, value):
    """Atomically words[at] += value; returns the old value."""

    def generate(context, b, signature, args):
        pointer = b.gep(context.make_array(signature.args[0])(context, b, args[0]).data, [args[1]])
        return b.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(words, types.intp, types.int64), generate


def _call_void(b: ir.IRBuilder, name: str) -> None:
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(ir.VoidType(), []), name)
    b.call(function, [])


@intrinsic
def _pause(typing):
    """Tell the core that this is a waiting loop (x86; elsewhere nothing)."""

    def generate(context, b, signature, args):
        if platform.machine() in ("x86_64", "AMD64"):
            _call_void(b, "llvm.x86.sse2.pause")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield_core(typing):
    """sched_yield() where the C library has it."""

    def generate(context, b, signature, args):
        if os.name == "posix":
            _call_void(b, "sched_yield")
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def next_item(sync: np.ndarray) -> int:
    """The next piece of work of this phase, from 0; each number is given to exactly one thread."""
    return _fetch_add(sync, NEXT_ITEM, 1)


@kernel
def barrier(sync: np.ndarray, num_threads: int) -> None:
    """Wait until every thread of the team is here; the next phase's items count from 0 again."""
    if num_threads == 1:
        sync[NEXT_ITEM] = 0
        return
    round_ = _fetch_add(sync, ROUND, 0)
    if _fetch_add(sync, ARRIVED, 1) == num_threads - 1:
        sync[ARRIVED] = 0
        sync[NEXT_ITEM] = 0
        _fetch_add(sync, ROUND, 1)
        return
    spins = 0
    while _fetch_add(sync, ROUND, 0) == round_:
        spins += 1
        _pause()
        if spins > _SPINS_BEFORE_YIELD:
            _yield_core()
