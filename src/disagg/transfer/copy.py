"""Copying many pages in one call that holds no GIL.

A Python loop of copies takes the GIL back after every page, and while the engine's thread is busy that can take up to
5 ms each time, a thousand times the copy. So the loop is compiled, and each page is one memcpy.
"""
# ruff: noqa: ANN001, ANN202

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from disagg.model.ops_cpu_jit import instruction, kernel


@instruction
def _memcpy(typing, target, source, num_bytes):
    """memcpy between two addresses."""

    def generate(context, b, signature, args):
        pointer = ir.IntType(8).as_pointer()
        memcpy = b.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, ir.IntType(64)])
        ends = [b.inttoptr(address, pointer) for address in args[:2]]
        b.call(memcpy, [*ends, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@kernel
def _copy(target, source, runs, page_bytes):
    for index in range(len(runs)):
        first, ours, count = runs[index]
        _memcpy(target + ours * page_bytes, source + first * page_bytes, count * page_bytes)


def copy_runs(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any], table: np.ndarray[Any, Any]) -> None:
    """Copy page runs, a `base.run_table` of these two arrays, uint8 [num_pages, page_bytes] each."""
    _copy(target.ctypes.data, source.ctypes.data, table, target.shape[1])
