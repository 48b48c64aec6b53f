"""Weights and activations of products in eight bits: what is computed, in plain torch. ops_cuda_fp8.py does it fast.

A row of a weight (an output channel) and a row of activations (a token) are each divided by a scale of their own, so
that the largest number becomes 448, the largest of e4m3 (Micikevicius and others, 2022), and rounded. The weight's
scales are known when it is loaded, those of activations are found at each step. The product is scaled back. Embedding,
output projection, norms, attention and the cache stay as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from disagg.model.ops import Linear, ReferenceOps

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST_SCALE = 1e-30  # of a row of zeros


class Scaled(NamedTuple):
    """A matrix whose row r is values[r] * scale[r]."""

    values: Tensor  # float8_e4m3fn [N, K]
    scale: Tensor  # float32 [N]

    def plain(self) -> Tensor:
        """float32 [N, K]."""
        return self.values.float() * self.scale[:, None]


def quantise(rows: Tensor) -> Scaled:
    """Rows [N, K] of any dtype, each to its own scale."""
    wide = rows.float()
    scale = (wide.abs().amax(1) / LARGEST).clamp_min(LEAST_SCALE)
    return Scaled((wide / scale[:, None]).to(FP8), scale)


class Fp8ReferenceOps(ReferenceOps):
    """The definition on any device: products of numbers rounded to eight bits, everything else in float32."""

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """With `out_dtype` it is the output projection, which is not rounded."""
        if out_dtype is not None:
            return super().linear(weight, bias, out_dtype)
        rounded = super().linear(quantise(weight).plain(), bias)
        return lambda x: rounded(quantise(x).plain())
