"""`CpuOps`: the fast implementation of `disagg.model.ops.Ops` on CPU.

numba compiles the kernels on first use (about half a minute, once per machine: see ops_cpu_jit.py for the cache); no
compiler is needed. Weights are packed as float32 or float16; all arithmetic is float32. All kernels use
torch.get_num_threads() threads. A row's result of every operation is the same bits in any batch and for any number of
threads, with one exception told in `attend_phase`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from disagg.model.ops import Decoder, LayerWeights, Linear, Rope, Step, compose_decoder
from disagg.model.ops_cpu_attention import attend_kernel, attend_phase
from disagg.model.ops_cpu_gemm import linear_kernel, linear_phase, pack, silu_mul_kernel, silu_phase
from disagg.model.ops_cpu_jit import kernel
from disagg.model.ops_cpu_rows import Where, norm_kernel, norm_phase, rotate_kernel, rotate_phase
from disagg.model.ops_cpu_team import Team
from disagg.model.ops_cpu_tile import PANEL

_NOTHING = np.zeros(0, np.float32)  # stands for None: kernels ask for the length, so they compile once
_NO_ROWS = np.zeros((0, 0), np.float32)
_PHASES = 8  # of a layer in decoder_kernel
_PLAIN = ("attention_norm", "mlp_norm", "qkv_bias", "q_norm", "k_norm")  # float32 as they are


class _Stack(NamedTuple):
    """All layers' weights, stacked along a first axis; norms and biases that a model lacks have a length of 0."""

    attention_norm: np.ndarray  # float32 [L, H]
    qkv: np.ndarray  # packed [L, panels, H, 16]
    qkv_bias: np.ndarray  # float32 [L, N or 0]
    q_norm: np.ndarray  # float32 [L, D or 0]
    k_norm: np.ndarray  # float32 [L, D or 0]
    out: np.ndarray  # packed [L, panels, Hq * D, 16]
    mlp_norm: np.ndarray  # float32 [L, H]
    gate_up: np.ndarray  # packed [L, 2, panels, H, 16]
    down: np.ndarray  # packed [L, panels, I, 16]


class _Buffers(NamedTuple):
    """Float32 intermediate results of one step, reused by every layer."""

    normed: np.ndarray  # [T, H]
    qkv: np.ndarray  # [T, (Hq + 2 Hkv) * D]
    q: np.ndarray  # [T, Hq, D]
    attended: np.ndarray  # [T, Hq * D]
    mlp: np.ndarray  # [T, I]


@kernel
def decoder_kernel(
    sync: np.ndarray, stack: _Stack, where: Where, pages: np.ndarray, hidden: np.ndarray, buffers: _Buffers,
    eps: float, first: int, stop: int,
) -> None:  # fmt: skip
    """Layers `first` to before `stop` over hidden [T, H], in place."""
    s, b = stack, buffers
    scale = np.float32(1.0 / np.sqrt(b.q.shape[2]))
    no_bias = s.qkv_bias[0, :0]
    for i in range(first, stop):
        p = (i - first) * _PHASES
        norm_phase(sync, p, hidden, b.normed[:0], s.attention_norm[i], eps, b.normed, hidden)
        linear_phase(sync, p + 1, b.normed, s.qkv[i], s.qkv_bias[i], b.qkv, False)
        rotate_phase(sync, p + 2, b.qkv, where, i, pages, s.q_norm[i], s.k_norm[i], eps, b.q)
        attend_phase(sync, p + 3, b.q, where, i, pages, scale, b.attended)
        linear_phase(sync, p + 4, b.attended, s.out[i], no_bias, hidden, True)
        norm_phase(sync, p + 5, hidden, b.normed[:0], s.mlp_norm[i], eps, b.normed, hidden)
        silu_phase(sync, p + 6, b.normed, s.gate_up[i], b.mlp)
        linear_phase(sync, p + 7, b.mlp, s.down[i], no_bias, hidden, True)


class CpuOps:
    """See the module docstring. dtype is how `linear` and `decoder` store weights: float32 or float16."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._team = Team()

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """Pack the weight once; see `pack`. Results are float32 anyhow, so `out_dtype` has nothing to change."""
        packed, num_out, added = pack(weight, self.dtype), len(weight), _array(bias)

        def run(x: Tensor) -> Tensor:
            out = torch.empty(len(x), num_out)
            self._team.run(linear_kernel, 1, _array(x), packed, added, out.numpy())
            return out

        return run

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """One pass over each row."""
        normed, total = torch.empty_like(x), torch.empty_like(x)
        before = _NO_ROWS if residual is None else _array(residual)
        self._team.run(norm_kernel, 1, _array(x), before, _array(weight), eps, normed.numpy(), total.numpy())
        return normed, total

    def rotate_and_store(
        self, qkv: Tensor, step: Step, layer: int, pages: Tensor,
        rope: Rope | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor:  # fmt: skip
        """One pass over each token."""
        q = torch.empty(len(qkv), *_query_shape(qkv.shape[1], pages))
        self._team.run(
            rotate_kernel, 1, _array(qkv), _where(step, rope), layer, pages.numpy(), _array(q_norm), _array(k_norm),
            eps, q.numpy(),
        )  # fmt: skip
        return q

    def attend(self, q: Tensor, layer: int, pages: Tensor, step: Step, scale: float) -> Tensor:
        """One kernel for all sequences; see `attend_phase`."""
        _query_shape(0, pages)
        out, where = torch.empty(len(q), q.shape[1] * q.shape[2]), _where(step, None)
        self._team.run(attend_kernel, 1, _array(q), where, layer, pages.numpy(), np.float32(scale), out.numpy())
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """One pass over each row."""
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2)
        self._team.run(silu_mul_kernel, 1, _array(gate_up), out.numpy())
        return out

    def decoder(self, layers: Sequence[LayerWeights], rope: Rope | None, eps: float) -> Decoder:
        """The whole stack as one kernel, which has no place for odd biases; a stack with them is composed."""
        num_layers, remaining = len(layers), iter(layers)
        first = next(remaining)
        if first.has_odd_bias:
            return compose_decoder(self, chain([first], remaining), rope, eps)
        stack = _stack(chain([first], remaining), num_layers, self.dtype)
        width, mlp_width = first.qkv.shape[0], first.down.shape[1]
        del first  # `run` would keep it alive

        def run(hidden: Tensor, step: Step, pages: Tensor, layers: range | None = None) -> Tensor:
            first_layer, stop = (0, num_layers) if layers is None else (layers.start, layers.stop)
            rows, hidden = len(hidden), hidden.clone(memory_format=torch.contiguous_format)
            query_shape = _query_shape(width, pages)
            shapes = (hidden.shape[1:], (width,), query_shape, (query_shape[0] * query_shape[1],), (mlp_width,))
            buffers = _Buffers(*(np.empty((rows, *shape), np.float32) for shape in shapes))
            self._team.run(
                decoder_kernel, _PHASES * (stop - first_layer), stack, _where(step, rope), pages.numpy(),
                hidden.numpy(), buffers, eps, first_layer, stop,
            )  # fmt: skip
            return hidden

        return run


def _array(tensor: Tensor | None) -> np.ndarray:
    """A contiguous float32 view; kernels address memory directly, so a strided or wider tensor must not reach them."""
    if tensor is None:
        return _NOTHING
    if tensor.dtype != torch.float32:
        raise TypeError(f"CpuOps computes in float32, got {tensor.dtype}")
    return tensor.detach().contiguous().numpy()


def _where(step: Step, rope: Rope | None) -> Where:
    """query_start is copied: a late thread counts items by it when the caller may already build the next step in the
    same memory. Everything else is read for an item only."""
    cos, sin = (_NO_ROWS, _NO_ROWS) if rope is None else (_array(rope.cos), _array(rope.sin))
    return Where(
        step.positions.numpy(), step.slots.numpy(), step.query_start.numpy().copy(), step.context_len.numpy(),
        step.page_table.numpy(), cos, sin,
    )  # fmt: skip


def _query_shape(qkv_width: int, pages: Tensor) -> tuple[int, int]:
    """(Hq, D). Raises ValueError for a head the kernels cannot cut in registers."""
    num_kv, size = pages.shape[3], pages.shape[5]
    if size % PANEL:
        raise ValueError(f"CpuOps needs a head size that is a multiple of {PANEL}, not {size}; use ReferenceOps")
    return qkv_width // size - 2 * num_kv, size


def _stack(layers: Iterable[LayerWeights], num_layers: int, dtype: torch.dtype) -> _Stack:
    """Pack layer by layer into the stacked arrays, so that little more than the result is in memory."""
    fields: dict[str, np.ndarray] = {}
    for index, layer in enumerate(layers):
        packed = {name: pack(getattr(layer, name), dtype) for name in ("qkv", "out", "down")}
        packed["gate_up"] = np.stack([pack(half, dtype) for half in layer.gate_up.chunk(2)])
        plain = {name: _array(getattr(layer, name)) for name in _PLAIN}
        for name, array in (packed | plain).items():
            if name not in fields:
                fields[name] = np.empty((num_layers, *array.shape), array.dtype)
            fields[name][index] = array
    return _Stack(**fields)
