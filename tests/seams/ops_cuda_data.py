"""What the tests of CUDA operations share: where they run, random inputs, steps and layers, how close is close.

Imported before any kernel: Triton reads the variable that makes it interpret them when they are defined.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from ops_data import make_rope
from torch import Tensor

from disagg.model.ops import LayerWeights, Rope, Step

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of one operation
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def assert_close(ours: Tensor, expected: Tensor, bound: float) -> None:
    assert ours.shape == expected.shape
    error = (ours.float() - expected).norm() / expected.norm()
    assert error <= bound, f"error {error:.2e}, bound {bound:.0e}"  # NaN fails too


def on_device(step: Step, **host: Any) -> Step:
    tensors = {name: value.to(DEVICE) for name, value in vars(step).items() if isinstance(value, Tensor)}
    return replace(step, **tensors, **host)


def rope_on_device(size: int) -> Rope:
    return Rope(*(table.to(DEVICE) for table in (make_rope(size).cos, make_rope(size).sin)))


def make_layer(hidden: int, heads: tuple[int, int, int], width: int, extras: bool, dtype: torch.dtype) -> LayerWeights:
    num_heads, num_kv, size = heads

    def weight(*shape: int) -> Tensor:
        return draw(*shape, dtype=dtype, scale=shape[-1] ** -0.5)

    def norm(length: int) -> Tensor:
        return (torch.rand(length, device=DEVICE) + 0.5).to(dtype)

    qkv = (num_heads + 2 * num_kv) * size
    layer = LayerWeights(
        norm(hidden), weight(qkv, hidden), weight(hidden, num_heads * size),
        norm(hidden), weight(2 * width, hidden), weight(hidden, width),
    )  # fmt: skip
    if not extras:
        return layer
    return replace(
        layer, qkv_bias=weight(qkv), q_norm=norm(size), k_norm=norm(size), out_bias=weight(hidden),
        gate_up_bias=weight(2 * width), down_bias=weight(hidden),
    )  # fmt: skip


def widened(layer: LayerWeights) -> LayerWeights:
    return LayerWeights(**{name: None if value is None else value.float() for name, value in vars(layer).items()})
