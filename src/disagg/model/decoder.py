"""One decoder for Llama, Mistral, Qwen2 and Qwen3 on the `Ops` seam. Differences between them are fields of the spec.

embedding -> layers: norm, attention, norm, MLP, each added to the residual -> norm -> output projection
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from disagg.model.ops import LayerWeights, Ops, Rope, Step
from disagg.model.spec import ModelSpec, RopeSpec
from disagg.model.weights import Weights

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT = "self_attn.o_proj"
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = "mlp.down_proj"


class Decoder:
    """Weights packed by `ops`, ready to run. Takes every tensor of `weights` exactly once. Raises ModelError."""

    def __init__(self, spec: ModelSpec, weights: Weights, ops: Ops) -> None:
        self.spec = spec
        self._ops = ops
        self._embedding = weights.take("model.embed_tokens.weight")
        self._norm = weights.take("model.norm.weight")
        self._head = ops.linear(self._embedding if spec.tied else weights.take("lm_head.weight"))
        rope = None if spec.rope is None else rope_tables(spec.rope, spec.head_dim, spec.max_len, self._norm.device)
        prefixes = [f"model.layers.{layer}." for layer in range(spec.num_layers)]
        layers = [_layer(spec, weights, prefix) for prefix in prefixes]
        if spec.out_bias or spec.mlp_bias:
            biases = [_biases(spec, weights, prefix) for prefix in prefixes]
            self._layers = _compose_biased(ops, layers, biases, rope, spec.eps)
        else:
            self._layers = ops.decoder(layers, rope, spec.eps)

    def forward(self, step: Step, pages: Tensor) -> Tensor:
        """Logits float32 [S, V] of the rows `step.last`; writes the step's keys and values into `pages`."""
        hidden = self._layers(torch.nn.functional.embedding(step.tokens, self._embedding), step, pages)
        if len(step.last) < len(hidden):
            hidden = hidden[step.last]
        normed, _ = self._ops.add_rms_norm(hidden, None, self._norm, self.spec.eps)
        return self._head(normed)


def _take(weights: Weights, prefix: str, *parts: str, kind: str = "weight") -> Tensor:
    """The tensors of `parts`, one below the other."""
    tensors = [weights.take(f"{prefix}{part}.{kind}") for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _layer(spec: ModelSpec, weights: Weights, prefix: str) -> LayerWeights:
    return LayerWeights(
        attention_norm=_take(weights, prefix, "input_layernorm"),
        qkv=_take(weights, prefix, *_QKV),
        out=_take(weights, prefix, _OUT),
        mlp_norm=_take(weights, prefix, "post_attention_layernorm"),
        gate_up=_take(weights, prefix, *_GATE_UP),
        down=_take(weights, prefix, _DOWN),
        qkv_bias=_take(weights, prefix, *_QKV, kind="bias") if spec.qkv_bias else None,
        q_norm=_take(weights, prefix, "self_attn.q_norm") if spec.qk_norm else None,
        k_norm=_take(weights, prefix, "self_attn.k_norm") if spec.qk_norm else None,
    )


class _Biases(NamedTuple):
    """The biases that LayerWeights has no place for, because of the families only odd Llama checkpoints use them."""

    out: Tensor | None  # [H]
    gate_up: Tensor | None  # [2 I]
    down: Tensor | None  # [H]


def _biases(spec: ModelSpec, weights: Weights, prefix: str) -> _Biases:
    return _Biases(
        out=_take(weights, prefix, _OUT, kind="bias") if spec.out_bias else None,
        gate_up=_take(weights, prefix, *_GATE_UP, kind="bias") if spec.mlp_bias else None,
        down=_take(weights, prefix, _DOWN, kind="bias") if spec.mlp_bias else None,
    )


def _compose_biased(
    ops: Ops, layers: list[LayerWeights], biases: list[_Biases], rope: Rope | None, eps: float
) -> Callable[[Tensor, Step, Tensor], Tensor]:
    """`ops.compose_decoder` with the remaining biases; operation by operation, so slower than `ops.decoder`."""
    packed = [
        (
            w,
            ops.linear(w.qkv, w.qkv_bias),
            ops.linear(w.out, bias.out),
            ops.linear(w.gate_up, bias.gate_up),
            ops.linear(w.down, bias.down),
        )
        for w, bias in zip(layers, biases, strict=True)
    ]

    def run(x: Tensor, step: Step, pages: Tensor) -> Tensor:
        residual: Tensor | None = None
        for index, (w, qkv, out, gate_up, down) in enumerate(packed):
            normed, residual = ops.add_rms_norm(x, residual, w.attention_norm, eps)
            q = ops.rotate_and_store(qkv(normed), step, index, pages, rope, w.q_norm, w.k_norm, eps)
            x = out(ops.attend(q, index, pages, step, q.shape[-1] ** -0.5))
            normed, residual = ops.add_rms_norm(x, residual, w.mlp_norm, eps)
            x = down(ops.silu_mul(gate_up(normed)))
        return x if residual is None else x + residual

    return run


def rope_tables(rope: RopeSpec, head_dim: int, max_len: int, device: torch.device | str = "cpu") -> Rope:
    """cos and sin of every position, float32 [max_len, D / 2]: angle = position * frequency.

    frequency_i = theta^(-2 i / D), then scaled as RopeSpec tells. Computed in float32 in the order transformers does
    it (modeling_rope_utils.py), because a different rounding of a large angle is a different angle.
    """
    frequency = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    if rope.kind == "llama3":
        frequency = _llama3(frequency, rope)
    if rope.freq_factors:
        frequency = frequency / torch.tensor(rope.freq_factors, dtype=torch.float32)
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * frequency
    return Rope(angle.cos().to(device), angle.sin().to(device))


def _llama3(frequency: Tensor, rope: RopeSpec) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a linear passage between (Llama 3.1)."""
    wavelength = 2 * math.pi / frequency
    slowest, fastest = rope.original_len / rope.low_freq_factor, rope.original_len / rope.high_freq_factor
    smooth = (rope.original_len / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequency / rope.factor + smooth * frequency
    return torch.where(
        wavelength > slowest, frequency / rope.factor, torch.where(wavelength < fastest, frequency, between)
    )
