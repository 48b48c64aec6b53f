"""How GPU kernels are compiled and launched: Triton, with each kernel starting while the one before it still runs.

Kernels of one step depend on each other, and between two of them a GPU idles for some microseconds. Programmatic
dependent launch (CUDA's name; Hopper and newer) hides most of it: a kernel says at its start that the next one may be
brought up, and waits itself, at `after_previous`, until all writes of the one before are visible. What it does before
that point must touch nothing that a kernel writes: it can fetch weights.

Parameters of a kernel are pointers and numbers, typed by its compiler; only `tl.constexpr` ones say what they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as Python on the CPU: slow, and right; for tests without a GPU."""

_NOT_SPECIALIZED = ("layer", "rows", "num_sequences", "table_width")  # change from step to step: compile once for all


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first use, for each set of `tl.constexpr` values; cached on disk by Triton."""
    return triton.jit(function, do_not_specialize=[name for name in _NOT_SPECIALIZED if name in _names(function)])


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def overlaps(device: torch.device) -> bool:
    """Whether kernels on a device may start early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch(function: Any, grid: tuple[int, ...], *args: Any, early: bool, warps: int = 4, **constants: Any) -> None:
    """Run a kernel whose last constant is EARLY; `early` starts it before the kernel before it has ended."""
    options: dict[str, Any] = {"num_warps": warps}
    if early:
        options["launch_pdl"] = True
    function[grid](*args, **constants, EARLY=early, **options)


@kernel
def after_previous(EARLY: tl.constexpr) -> None:
    """Let the next kernel be brought up, then wait for the writes of the previous one."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
