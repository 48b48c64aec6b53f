"""The tensor operations of a decoder, behind one seam, and their plain definition.

`Ops` has six methods. Five are the operations a model file composes by hand; the sixth, `decoder`, is a whole stack
of pre-norm layers. It exists because at batch 1 a layer takes 0.4 ms, so thirty layers of seven separate calls would
spend more time on calling than on arithmetic: an implementation may run the stack as one kernel, and the definition
of what that kernel computes is `compose_decoder`, which uses nothing but the other five.

`ReferenceOps` is the definition: plain torch, float32, any device, slow. `CpuOps` (ops_cpu.py) and `CudaOps`
(ops_cuda.py) are fast. They pass tests/seams/test_ops.py and test_ops_cuda.py.

Dtypes: on a CPU every tensor is float32. `CudaOps` has one dtype for weights, activations and pages (bfloat16, float16
or float32); it adds up in float32, and rotary tables are float32 everywhere.

Letters in shapes: T tokens of this step, B sequences, H hidden, Hq query heads, Hkv key/value heads, D head size,
I MLP width, N and K a weight's outputs and inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""x [T, K] -> [T, N], with the weight inside."""


@dataclass(frozen=True)
class Step:
    """What one forward pass computes: any mix of decodes (one new token) and prefill chunks (many).

    Sequence b owns rows query_start[b] : query_start[b + 1]; they are its last tokens, in order, so row r of n sits
    at position context_len[b] - n + r. Its keys and values lie in pages page_table[b, 0 : ceil(context_len / size)].

    The last three fields tell the host what the tensors on a device hold, so that nobody has to wait for them. Zero
    means not known: right, but slower. A padded batch has sequences of context_len 0, with a row or without, and may
    end with rows of no sequence. Slots of its rows are -1: nothing is written for them, and their results mean nothing.
    """

    tokens: Tensor  # int64 [T], token ids
    positions: Tensor  # int64 [T], place of each token in its sequence, from 0
    slots: Tensor  # int64 [T], page * page_size + offset: where this token's key and value are written
    query_start: Tensor  # int32 [B + 1], first row of each sequence, then the end of the last one
    context_len: Tensor  # int32 [B], tokens of each sequence including this step's
    page_table: Tensor  # int32 [B, most pages of a sequence]; entries past a sequence's end are not read
    last: Tensor | None  # int64 [S], rows whose logits are wanted; None: all of them
    max_query_len: int = 0  # most rows of a sequence; 1: every sequence has one, its row is its own number
    max_context_len: int = 0  # no context is longer; a captured step keeps it for all later ones
    num_decodes: int = 0  # the first sequences: one row each, that of its own number, or context_len 0


@dataclass(frozen=True)
class Rope:
    """Rotary tables, both float32 [max_position, D / 2]; channel i is paired with channel i + D / 2."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One pre-norm decoder layer (Llama, Mistral, Qwen2, Qwen3), weights as [outputs, inputs]."""

    attention_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) * D, H]: all query heads, then key heads, then value heads
    out: Tensor  # [H, Hq * D]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]: gate rows, then up rows
    down: Tensor  # [H, I]
    qkv_bias: Tensor | None = None  # [(Hq + 2 Hkv) * D]
    q_norm: Tensor | None = None  # [D], RMSNorm of each query head before rotation
    k_norm: Tensor | None = None  # [D]
    out_bias: Tensor | None = None  # [H]; this and the next two only in odd Llama checkpoints
    gate_up_bias: Tensor | None = None  # [2 I]
    down_bias: Tensor | None = None  # [H]

    @property
    def has_odd_bias(self) -> bool:
        """Whether there is a bias other than that of query, key and value."""
        return any(bias is not None for bias in (self.out_bias, self.gate_up_bias, self.down_bias))


Between = Callable[[Step, Tensor], tuple[Step, Tensor]]
"""(step, hidden [T, H]) -> what is left of both: rows may leave a step between two layers."""


class Decoder(Protocol):
    """A stack of layers."""

    def __call__(self, hidden: Tensor, step: Step, pages: Tensor, layers: range | None = None) -> Tensor:
        """hidden [T, H] -> hidden [T, H] after all layers, residual included, final norm not applied.

        `layers`: only these, so that a long step can be given up between them. Run one range after the other, the stack
        gives the same bits as in one call. CudaOps takes None only.
        """


class Ops(Protocol):
    """The seam. Tensors are contiguous; `pages` is [num_pages, num_layers, 2, Hkv, page_size, D]."""

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """Prepare weight [N, K] (and bias [N]) once; the result computes x @ weight.T + bias for any T.

        The result has the dtype of x, or `out_dtype`: logits are wanted in float32, unrounded.
        """

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(normed, sum) with sum = x + residual [T, H] and normed = sum / sqrt(mean(sum^2) + eps) * weight [H]."""

    def rotate_and_store(
        self, qkv: Tensor, step: Step, layer: int, pages: Tensor,
        rope: Rope | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor:  # fmt: skip
        """Norm and rotate q and k of qkv [T, (Hq + 2 Hkv) * D], write k and v to their slots, return q [T, Hq, D]."""

    def attend(self, q: Tensor, layer: int, pages: Tensor, step: Step, scale: float) -> Tensor:
        """Causal attention of q [T, Hq, D] over each sequence's pages; returns [T, Hq * D]."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [T, 2 I]; returns [T, I]."""

    def decoder(self, layers: Sequence[LayerWeights], rope: Rope | None, eps: float) -> Decoder:
        """A stack of layers as one call: what `compose_decoder` computes.

        Goes through `layers` once, in order: a sequence that reads each layer when it is asked for never holds a
        second copy of the model.
        """


class _Packed(NamedTuple):
    """A layer whose matrices are prepared; the small tensors as they are."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


def _pack(ops: Ops, w: LayerWeights) -> _Packed:
    return _Packed(
        w.attention_norm, ops.linear(w.qkv, w.qkv_bias), w.q_norm, w.k_norm, ops.linear(w.out, w.out_bias),
        w.mlp_norm, ops.linear(w.gate_up, w.gate_up_bias), ops.linear(w.down, w.down_bias),
    )  # fmt: skip


def compose_decoder(ops: Ops, layers: Iterable[LayerWeights], rope: Rope | None, eps: float) -> Decoder:
    """The definition of `Ops.decoder`, made of the five other operations."""
    packed = [_pack(ops, w) for w in layers]

    def run(hidden: Tensor, step: Step, pages: Tensor, layers: range | None = None) -> Tensor:
        x, residual = hidden, None
        for layer in range(len(packed)) if layers is None else layers:
            w = packed[layer]
            normed, residual = ops.add_rms_norm(x, residual, w.attention_norm, eps)
            q = ops.rotate_and_store(w.qkv(normed), step, layer, pages, rope, w.q_norm, w.k_norm, eps)
            x = w.out(ops.attend(q, layer, pages, step, q.shape[-1] ** -0.5))
            normed, residual = ops.add_rms_norm(x, residual, w.mlp_norm, eps)
            x = w.down(ops.silu_mul(w.gate_up(normed)))
        return x if residual is None else x + residual

    return run


class ReferenceOps:
    """The definition: one line of mathematics per line of code, float32, any device."""

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """x @ weight.T + bias; everything is float32 here, so `out_dtype` has nothing to change."""
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of the sum (Zhang and Sennrich, 2019)."""
        total = x if residual is None else x + residual
        return _rms_norm(total, weight, eps), total

    def rotate_and_store(
        self, qkv: Tensor, step: Step, layer: int, pages: Tensor,
        rope: Rope | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor:  # fmt: skip
        """Norm, rotate, write by advanced indexing."""
        num_kv, page_size, size = pages.shape[3:]
        heads = qkv.view(len(qkv), -1, size)
        q, k, v = heads.split([heads.shape[1] - 2 * num_kv, num_kv, num_kv], dim=1)
        q = q if q_norm is None else _rms_norm(q, q_norm, eps)
        k = k if k_norm is None else _rms_norm(k, k_norm, eps)
        if rope is not None:
            q, k = _rotate(q, step.positions, rope), _rotate(k, step.positions, rope)
        real = step.slots >= 0
        page, offset = step.slots[real] // page_size, step.slots[real] % page_size
        pages[page, layer, 0, :, offset] = k[real]
        pages[page, layer, 1, :, offset] = v[real]
        return q.contiguous()

    def attend(self, q: Tensor, layer: int, pages: Tensor, step: Step, scale: float) -> Tensor:
        """Softmax over the whole context, one sequence after the other."""
        num_kv, page_size, size = pages.shape[3:]
        out = torch.zeros_like(q)
        starts = step.query_start.tolist()
        for b, context_len in enumerate(step.context_len.tolist()):
            if not context_len:
                continue
            rows = slice(starts[b], starts[b + 1])
            table = step.page_table[b, : -(-context_len // page_size)].long()
            k, v = pages[table, layer].movedim(0, 2).reshape(2, num_kv, -1, size)[:, :, :context_len]
            queries = q[rows].transpose(0, 1).reshape(num_kv, -1, rows.stop - rows.start, size)
            scores = torch.einsum("hgtd,hkd->hgtk", queries, k) * scale
            future = torch.arange(context_len, device=q.device) > step.positions[rows, None]
            weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
            out[rows] = torch.einsum("hgtk,hkd->thgd", weights, v).reshape(-1, q.shape[1], size)
        return out.view(len(q), -1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """The gated unit of Llama (SwiGLU: Shazeer, 2020)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def decoder(self, layers: Sequence[LayerWeights], rope: Rope | None, eps: float) -> Decoder:
        """The definition itself."""
        return compose_decoder(self, layers, rope, eps)


def pick_ops(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Ops:
    """The fastest implementation for a device; dtype is how weights are stored.

    On CPU: float32 or float16; without numba the reference runs instead, in float32 only: asking for float16 there is
    an error, because silently storing twice the bytes would make a measurement compare different things. On CUDA:
    bfloat16, float16 or float32, and Triton must be installed. Raises ValueError.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("CUDA needs Triton (pip install 'disagg[cuda]')")
        if dtype == torch.float8_e4m3fn:
            from disagg.model.ops_cuda_fp8 import Fp8Ops

            return Fp8Ops(device)
        from disagg.model.ops_cuda import CudaOps

        return CudaOps(dtype)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError("weights can be stored as float32 or float16 there")
    if kind == "cpu" and importlib.util.find_spec("numba") is not None:
        from disagg.model.ops_cpu import CpuOps

        return CpuOps(dtype)
    if dtype == torch.float16:
        raise ValueError(f"float16 weights on {kind} need numba (pip install numba); use dtype float32 without it")
    return ReferenceOps()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope.cos[positions].unsqueeze(1), rope.sin[positions].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
