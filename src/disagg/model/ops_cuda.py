"""`CudaOps`: the fast implementation of `disagg.model.ops.Ops` on NVIDIA GPUs, in Triton and cuBLAS.

Up to MAX_ROWS rows a product is bound by reading the weight: kernels of our own (ops_cuda_linear.py), five a layer with
one row, seven with more. Many rows are bound by arithmetic: cuBLAS, with the residual added by the product itself.
Attention: ops_cuda_decode.py for sequences with one new token, ops_cuda_prefill.py for chunks. Nothing waits for the
device, so that a step can be captured in a CUDA graph.

A row's result may differ in the last bits between batches of different padded size, because sums are cut differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from disagg.model.ops import Decoder, LayerWeights, Linear, Rope, Step
from disagg.model.ops_cuda_decode import Fused, attend_decodes
from disagg.model.ops_cuda_linear import MAX_ROWS, Extras, small_product
from disagg.model.ops_cuda_prefill import attend_chunks
from disagg.model.ops_cuda_rows import add_rms_norm, rotate_and_store, silu_mul


class _Layer(NamedTuple):
    """A layer as the products need it."""

    weights: LayerWeights
    qkv: Extras
    fused: Fused
    gate_up: Extras


class CudaOps:
    """See the module docstring. dtype is that of weights, activations and pages: bfloat16, float16 or float32.

    One instance serves one stream at a time. Raises ValueError for another dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"weights can be stored as bfloat16, float16 or float32, not {dtype}")
        self.dtype = dtype

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """The weight as it is, without a copy."""
        return lambda x: product(x, weight, bias, out_dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """One pass over each row."""
        return add_rms_norm(x, residual, weight, eps)

    def rotate_and_store(
        self, qkv: Tensor, step: Step, layer: int, pages: Tensor,
        rope: Rope | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor:  # fmt: skip
        """One pass over each token."""
        return rotate_and_store(qkv, step, layer, pages, rope, q_norm, k_norm, eps)

    def attend(self, q: Tensor, layer: int, pages: Tensor, step: Step, scale: float) -> Tensor:
        """Decodes and chunks by a kernel each."""
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        num_sequences = len(step.context_len)
        decodes = num_sequences if step.max_query_len == 1 else step.num_decodes
        if decodes:
            attend_decodes(q, layer, pages, step, scale, out, decodes)
        if decodes < num_sequences:
            attend_chunks(q, layer, pages, step, scale, out, decodes)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """One pass over each row."""
        return silu_mul(gate_up)

    def decoder(self, layers: Sequence[LayerWeights], rope: Rope | None, eps: float) -> Decoder:
        """Products, and what is joined with them; the weights as they are, without a copy."""
        stack = [
            _Layer(
                w,
                Extras(norm=w.attention_norm, eps=eps, bias=w.qkv_bias, early=index > 0),
                Fused(rope, w.q_norm, w.k_norm, eps),
                Extras(norm=w.mlp_norm, eps=eps, bias=w.gate_up_bias, gated=True),
            )
            for index, w in enumerate(layers)
        ]

        def run(hidden: Tensor, step: Step, pages: Tensor, layers: range | None = None) -> Tensor:
            assert layers is None, "kernels start before the one ahead has ended: nothing may come between layers"
            x = hidden if len(hidden) <= MAX_ROWS else hidden.clone()  # add_product writes into it
            for index, (w, qkv, fused, gate_up) in enumerate(stack):
                attended = self.attention(extended_product(x, w.qkv, qkv), fused, step, index, pages)
                x = add_product(x, attended, w.out, w.out_bias)
                x = add_product(x, extended_product(x, w.gate_up, gate_up), w.down, w.down_bias)
            return x

        return run

    def attention(self, qkv: Tensor, fused: Fused, step: Step, layer: int, pages: Tensor) -> Tensor:
        """From the merged projection [T, (Hq + 2 Hkv) * D] to what the output projection takes, [T, Hq * D]."""
        num_kv, _, size = pages.shape[3:]
        scale = size**-0.5
        if step.max_query_len != 1:
            return self.attend(rotate_and_store(qkv, step, layer, pages, *fused), layer, pages, step, scale)
        out = qkv.new_empty(len(qkv), qkv.shape[1] - 2 * num_kv * size)
        attend_decodes(qkv, layer, pages, step, scale, out, len(step.context_len), fused)
        return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """x [T, K] @ weight [N, K] transposed + bias, in the dtype of x or `out_dtype`."""
    if len(x) <= MAX_ROWS:
        return small_product(x, weight, Extras(bias=bias), out_dtype)
    if out_dtype in (None, x.dtype):
        return linear(x, weight, bias)
    out = torch.mm(x, weight.t(), out_dtype=out_dtype)
    return out if bias is None else out + bias


def extended_product(x: Tensor, weight: Tensor, extras: Extras) -> Tensor:
    """A product of the normed x, gated or not; see Extras, whose residual is not used here."""
    if len(x) <= MAX_ROWS:
        return small_product(x, weight, extras)
    if extras.norm is not None:
        x, _ = add_rms_norm(x, None, extras.norm, extras.eps, extras.early)
    out = linear(x, weight, extras.bias)
    return silu_mul(out) if extras.gated else out


def add_product(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """total [T, N] + x @ weight transposed + bias; with many rows in the memory of `total`."""
    if len(x) <= MAX_ROWS:
        return small_product(x, weight, Extras(bias=bias, residual=total))
    total.addmm_(x, weight.t())
    return total if bias is None else total.add_(bias)
