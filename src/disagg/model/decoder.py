"""One decoder for Llama, Mistral, Qwen2 and Qwen3 on the `Ops` seam. Differences between them are fields of the spec.

embedding -> layers: norm, attention, norm, MLP, each added to the residual -> norm -> output projection
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disagg.model.ops import Between, LayerWeights, Ops, Rope, Step
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
        head = self._embedding if spec.tied else weights.take("lm_head.weight")
        self._head = ops.linear(head, out_dtype=torch.float32)
        rope = None if spec.rope is None else rope_tables(spec.rope, spec.head_dim, spec.max_len, self._norm.device)
        self._layers = ops.decoder(_Layers(spec, weights), rope, spec.eps)

    def forward(self, step: Step, pages: Tensor, between: Between | None = None) -> Tensor:
        """Logits float32 [S, V] of the rows `step.last`; writes the step's keys and values into `pages`.

        With `between`, which is asked before each layer, the last step that it returned counts.
        """
        hidden = torch.nn.functional.embedding(step.tokens, self._embedding)
        if between is None:
            hidden = self._layers(hidden, step, pages)
        else:
            for layer in range(self.spec.num_layers):
                step, hidden = between(step, hidden)
                if not len(hidden):
                    break
                hidden = self._layers(hidden, step, pages, range(layer, layer + 1))
        if step.last is not None and len(step.last) == 0:
            return torch.empty(0, self.spec.vocab_size, device=hidden.device)
        if step.last is not None:
            hidden = hidden[step.last]
        normed, _ = self._ops.add_rms_norm(hidden, None, self._norm, self.spec.eps)
        return self._head(normed)


def _take(weights: Weights, prefix: str, *parts: str, kind: str = "weight") -> Tensor:
    """The tensors of `parts`, one below the other."""
    tensors = [weights.take(f"{prefix}{part}.{kind}") for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _Layers(Sequence[LayerWeights]):
    """The layers of a model, each read when it is asked for, so that one at a time is in memory unpacked."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self._spec = spec
        self._weights = weights

    def __len__(self) -> int:
        return self._spec.num_layers

    def __getitem__(self, layer: int) -> LayerWeights:  # type: ignore[override]  # nobody slices a model
        if not 0 <= layer < len(self):
            raise IndexError(layer)
        return _layer(self._spec, self._weights, f"model.layers.{layer}.")


def _layer(spec: ModelSpec, weights: Weights, prefix: str) -> LayerWeights:
    def take(*parts: str, kind: str = "weight") -> Tensor:
        return _take(weights, prefix, *parts, kind=kind)

    return LayerWeights(
        attention_norm=take("input_layernorm"),
        qkv=take(*_QKV),
        out=take(_OUT),
        mlp_norm=take("post_attention_layernorm"),
        gate_up=take(*_GATE_UP),
        down=take(_DOWN),
        qkv_bias=take(*_QKV, kind="bias") if spec.qkv_bias else None,
        q_norm=take("self_attn.q_norm") if spec.qk_norm else None,
        k_norm=take("self_attn.k_norm") if spec.qk_norm else None,
        out_bias=take(_OUT, kind="bias") if spec.out_bias else None,
        gate_up_bias=take(*_GATE_UP, kind="bias") if spec.mlp_bias else None,
        down_bias=take(_DOWN, kind="bias") if spec.mlp_bias else None,
    )


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
