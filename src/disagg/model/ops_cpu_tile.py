"""The vector loops that the CPU kernels are built from, written as LLVM instructions: `tile`, `dot`, `exp`.

`tile` is the one place where speed comes from. It keeps up to 6 rows x 16 columns of the result in vector registers
and walks the shared dimension once: per step one 16-wide slice of a packed weight panel is loaded (float16 is widened
on the way, which costs nothing beside the multiplications) and multiplied with each row's number. Every result is the
same chain of fused multiply-adds in order of k, whatever the number of rows: a row's result does not depend on the
batch it is computed in.

Parameters of an `@instruction` are numba's own types while compiling, which have no public names: hence `Any`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from disagg.model.ops_cpu_jit import instruction, kernel

LANES = 8  # float32 numbers in one 256-bit register
PANEL = 16  # columns of a packed weight panel: two registers
GROUP = 3  # panels read side by side when there are one or two rows: enough loads in flight to fill memory bandwidth
TILE_ROWS = 6  # 6 rows x 2 registers of sums, 2 of weights, 1 of inputs: 15 of the 16 registers


_F32, _F16, _I32, _I64 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _data(context: Any, b: ir.IRBuilder, array_type: Any, value: Any, at: Any) -> Any:
    """Pointer to element `at` of a contiguous array; uint16 arrays hold float16 bits."""
    pointer = context.make_array(array_type)(context, b, value).data
    if array_type.dtype == types.uint16:
        pointer = b.bitcast(pointer, _F16.as_pointer())
    return b.gep(pointer, [at])


def _load8(b: ir.IRBuilder, pointer: Any, offset: Any) -> Any:
    """Eight consecutive numbers as float32."""
    element = pointer.type.pointee
    value = b.load(b.bitcast(b.gep(pointer, [offset]), ir.VectorType(element, LANES).as_pointer()), align=2)
    return b.fpext(value, _VECTOR) if element == _F16 else value


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *args: Any) -> Any:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return _call(b, "llvm.fma.v8f32", _VECTOR, x, y, z)


def _splat(b: ir.IRBuilder, number: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    one = b.insert_element(undefined, number, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _sum_loop(b: ir.IRBuilder, count: Any, num_sums: int, body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """Registers sums = 0; for k in range(count): sums = body(k, sums); return sums. count >= 1."""
    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    k = b.phi(_I64)
    k.add_incoming(_int(0), before)
    sums = [b.phi(_VECTOR) for _ in range(num_sums)]
    results = body(k, sums)
    for sum_, result in zip(sums, results, strict=True):
        sum_.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
        sum_.add_incoming(result, b.block)
    following = b.add(k, _int(1))
    k.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    return results


@instruction
def tile(
    typing: Any, rows: Any, x: Any, x_at: Any, x_row: Any, x_step: Any, w: Any, w_at: Any, w_row: Any, c: Any,
    c_at: Any, c_row: Any, depth: Any, add: Any,
) -> Any:  # fmt: skip
    """c[r, n] = (c[r, n] if add) + sum over k of x[r, k] * w[k, n], for rows x 16 results, rows in 1..6.

    x, w, c are contiguous arrays of any rank, addressed by the element offset *_at and the distance *_row between
    rows; x_step is the distance between columns of x. depth >= 1.
    """
    n = types.intp
    signature = types.void(n, x, n, n, n, w, n, n, c, n, n, n, types.boolean)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, _, _, x_row, x_step, _, _, w_row, _, _, c_row, depth, add = args
        x, w, c = (_data(context, b, signature.args[i], args[i], args[i + 1]) for i in (1, 5, 8))
        weights = w, w_row, _int(0)
        _emit_tiles(b, rows, 1, TILE_ROWS, (x, x_row, x_step), weights, (c, c_row), depth, add)
        return context.get_dummy_value()

    return signature, generate


@instruction
def wide_tile(
    typing: Any, rows: Any, x: Any, x_at: Any, x_row: Any, w: Any, w_at: Any, w_panel: Any, c: Any, c_at: Any,
    c_row: Any, depth: Any, add: Any,
) -> Any:  # fmt: skip
    """The same for one or two rows x GROUP panels, which lie w_panel apart and are packed: their rows 16 apart."""
    n = types.intp
    signature = types.void(n, x, n, n, w, n, n, c, n, n, n, types.boolean)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, _, _, x_row, _, _, w_panel, _, _, c_row, depth, add = args
        x, w, c = (_data(context, b, signature.args[i], args[i], args[i + 1]) for i in (1, 4, 7))
        weights = w, _int(PANEL), w_panel
        _emit_tiles(b, rows, GROUP, 2, (x, x_row, _int(1)), weights, (c, c_row), depth, add)
        return context.get_dummy_value()

    return signature, generate


def _emit_tiles(
    b: ir.IRBuilder, rows: Any, panels: int, most_rows: int, inputs: tuple[Any, Any, Any],
    weights: tuple[Any, Any, Any], results: tuple[Any, Any], depth: Any, add: Any,
) -> None:  # fmt: skip
    """One loop for each number of rows, and the choice among them."""
    done = b.append_basic_block("done")
    choice = b.switch(rows, done)
    for num_rows in range(1, most_rows + 1):
        block = b.append_basic_block(f"tile{num_rows}x{panels}")
        choice.add_case(_int(num_rows), block)
        b.position_at_end(block)
        sums = _emit_tile(b, num_rows, panels, *inputs, *weights, depth)
        _store_tile(b, num_rows, sums, *results, add)
        b.branch(done)
    b.position_at_end(done)


def _emit_tile(
    b: ir.IRBuilder, rows: int, panels: int, x: Any, x_row: Any, x_step: Any, w: Any, w_row: Any, w_panel: Any,
    depth: Any,
) -> list[Any]:  # fmt: skip
    inputs = [b.gep(x, [b.mul(_int(r), x_row)]) for r in range(rows)]
    width = panels * PANEL // LANES

    def multiply(k: Any, sums: list[Any]) -> list[Any]:
        results = list(sums)
        for r, v, number, weights in operands(k):
            i = r * width + v
            results[i] = _fma(b, number, weights, sums[i])
        return results

    def operands(k: Any) -> Iterator[tuple[int, int, Any, Any]]:
        """The shorter side is loaded first and stays in registers: the other way 6 x 2 spills and runs half as fast."""

        def number(r: int) -> Any:
            return _splat(b, b.load(b.gep(inputs[r], [b.mul(k, x_step)]), align=4))

        def weights(v: int) -> Any:
            panel = b.add(b.mul(k, w_row), b.mul(_int(v // 2), w_panel))
            return _load8(b, w, b.add(panel, _int(v % 2 * LANES)))

        if rows <= width:
            numbers = [number(r) for r in range(rows)]
            for v in range(width):
                w8 = weights(v)
                yield from ((r, v, numbers[r], w8) for r in range(rows))
        else:
            columns = [weights(v) for v in range(width)]
            for r in range(rows):
                x8 = number(r)
                yield from ((r, v, x8, columns[v]) for v in range(width))

    return _sum_loop(b, depth, rows * width, multiply)


def _store_tile(b: ir.IRBuilder, rows: int, sums: list[Any], c: Any, c_row: Any, add: Any) -> None:
    width = len(sums) // rows
    for i, value in enumerate(sums):
        at = b.add(b.mul(_int(i // width), c_row), _int(i % width * LANES))
        pointer = b.bitcast(b.gep(c, [at]), _VECTOR.as_pointer())
        total = b.fadd(b.load(pointer, align=4), value)
        b.store(b.select(add, total, value), pointer, align=4)


@instruction
def dot(typing: Any, x: Any, x_at: Any, y: Any, y_at: Any, length: Any) -> Any:
    """Sum of x[x_at + i] * y[y_at + i], i < length (a positive multiple of 16), over contiguous float32 arrays."""
    signature = types.float32(x, types.intp, y, types.intp, types.intp)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x = _data(context, b, signature.args[0], args[0], args[1])
        y = _data(context, b, signature.args[2], args[2], args[3])

        def multiply(k: Any, sums: list[Any]) -> list[Any]:
            at = [b.add(b.mul(k, _int(PANEL)), _int(v * LANES)) for v in range(2)]
            return [_fma(b, _load8(b, x, a), _load8(b, y, a), s) for a, s in zip(at, sums, strict=True)]

        even, odd = _sum_loop(b, b.udiv(args[4], _int(PANEL)), 2, multiply)
        zero = ir.Constant(_F32, 0.0)
        total = b.fadd(even, odd)
        name = "llvm.vector.reduce.fadd.v8f32"
        function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(_F32, [_F32, _VECTOR]), name)
        return b.call(function, [zero, total], fastmath=("reassoc",))

    return signature, generate


@instruction
def power_of_two(typing: Any, n: Any) -> Any:
    """2 ** n for a whole float32 n in -126..127, by writing the exponent bits; unlike ldexp it vectorises."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        bits = b.shl(b.add(b.fptosi(args[0], _I32), ir.Constant(_I32, 127)), ir.Constant(_I32, 23))
        return b.bitcast(bits, _F32)

    return types.float32(types.float32), generate


@instruction
def rint(typing: Any, x: Any) -> Any:
    """x rounded to the nearest whole float32, as one instruction."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _call(b, "llvm.rint.f32", _F32, args[0])

    return types.float32(types.float32), generate


_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _LOWEST, _HIGHEST = np.float32(1.0), np.float32(-87.0), np.float32(88.0)


@kernel
def exp(x: Any) -> Any:
    """e ** x within 2 units in the last place, x clamped to -87..88; loops over it vectorise (Cephes' expf)."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = rint(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    return (p * r * r + r + _ONE) * power_of_two(n)
