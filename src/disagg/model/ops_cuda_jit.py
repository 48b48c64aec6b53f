"""How GPU kernels are compiled and launched: Triton, with each kernel starting while the one before it still runs.

Kernels of one step depend on each other, and between two of them a GPU idles for some microseconds. Programmatic
dependent launch (CUDA's name; Hopper and newer) hides most of it: a kernel says at its start, with `release_next`, that
the next one may be brought up, and waits itself, at `after_previous`, until all writes of the one before are visible.
Before that point it must write nothing, and read nothing but what was there when the first kernel of the step began,
which is launched with early=False and so waits for everything: weights, the step's tables, keys and values of the past.

Parameters of a kernel are pointers and numbers, typed by its compiler; only `tl.constexpr` ones say what they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as Python on the CPU: slow, and right; for tests without a GPU."""

# what changes from step to step, or lies where the step's other tensors leave room: compile once for all
_NUMBERS = ("layer", "rows", "first", "num_sequences", "table_width", "num_tiles")
_TENSORS = ("page_table", "query_start", "context_len", "positions", "slots")


def kernel(function: Callable[..., Any], jit: Callable[..., Any] = triton.jit) -> Any:
    """Compile on first use, for each set of `tl.constexpr` values; cached on disk by Triton."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return jit(
        function,
        do_not_specialize=[name for name in _NUMBERS if name in names],
        do_not_specialize_on_alignment=[name for name in _TENSORS if name in names],
    )


@functools.cache
def counters_on(device: torch.device) -> Tensor:
    """int32 [65,536] zeros, by which programs that share a result find out who is last; every kernel leaves zeros.

    Kernels of one stream share them. Made on first use, which has to be before a CUDA graph is captured.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of the largest kind run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on a device may start early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def is_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels written for Hopper's tensor cores run on a device, with numbers of two bytes."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


class Memory(NamedTuple):
    """Of a tensor, what a descriptor wants to know. Hashable, so that descriptors can be kept."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """As a tensor says it."""
        return self.address


class _Compiled(NamedTuple):
    """A compiled kernel as the driver takes it."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]  # a launch wants a value for each parameter, used or not


_compiled: dict[tuple[Any, ...], _Compiled] = {}


def launch(function: Any, grid: tuple[int, ...], *args: Any, early: bool, warps: int = 4, **constants: Any) -> None:
    """Run a kernel whose last constant is EARLY; `early` starts it before the kernel before it has ended.

    Triton looks a kernel up anew at each launch, and takes longer for it than a small kernel runs. So what it finds is
    kept here, by all that it would compile for: the constants, the types, and how pointers and numbers divide.
    """
    if INTERPRETED:
        function[grid](*args, **constants, EARLY=early)
        return
    device = torch.cuda.current_device()
    values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    traits = tuple([_trait(arg, value) for arg, value in zip(args, values, strict=True)])
    key = (id(function), device, early, warps, *constants.values(), traits)
    found = _compiled.get(key)
    if found is None:
        options: dict[str, Any] = {"launch_pdl": True} if early else {}
        made = function[grid](*args, **constants, EARLY=early, num_warps=warps, **options)
        by_name = constants | {"EARLY": early}
        in_order = tuple(by_name[name] for name in function.arg_names[len(args) :])
        _compiled[key] = _Compiled(made.run, made.function, made.packed_metadata, in_order)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    found.run(x, y, z, stream, found.function, found.metadata, None, None, None, *values, *found.constants)


def _trait(arg: Any, value: Any) -> Any:
    """What Triton compiles for, of one argument; at least as fine as its own distinction."""
    if isinstance(arg, Tensor):
        return arg.dtype, value % 16 == 0
    if isinstance(arg, int):
        return value == 1, value % 16 == 0, value.bit_length() > 31
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    return type(arg)


@kernel
def release_next(EARLY: tl.constexpr) -> None:
    """Let the next kernel be brought up as soon as there is room for it."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@kernel
def after_previous(EARLY: tl.constexpr) -> None:
    """Wait for the writes of the previous kernel, and so of all before it."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
