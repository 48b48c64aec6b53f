"""What a model is: one frozen `ModelSpec` for every family, read from a Hugging Face config, and what it costs.

Families differ in fields, not in code. Nothing here imports torch: the planner and the simulator use this file.

Letters in formulas: V vocabulary, H hidden, L layers, Hq query heads, Hkv key/value heads, D head size, I MLP width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from disagg.errors import ModelError

Family = Literal["seed", "llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "llama3"]

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding: base and scaling.

    `linear` divides positions by `factor`. `llama3` divides only the slow frequencies by it, with a smooth passage
    between wavelengths of original_len / high_freq_factor and original_len / low_freq_factor. `freq_factors`, when
    given, divides each of the D / 2 frequencies by its own number: GGUF files store the llama3 scaling that way.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192
    freq_factors: tuple[float, ...] = ()


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the model files need to know. Sizes in elements, lengths in tokens."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_len: int  # longest sequence, prompt and output
    rope: RopeSpec | None = None  # None: no position information at all
    eps: float = 1e-6
    gated: bool = True  # SwiGLU with gate and up; otherwise one ReLU layer
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    tied: bool = False  # the output projection is the embedding
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        max_len: int | None = None,
        freq_factors: Sequence[float] = (),
    ) -> "ModelSpec":
        """Read a Hugging Face config.json (and generation_config.json), in the words of transformers 4 or 5.

        `max_len` shortens the context. Raises ModelError for whatever this engine would compute wrongly.
        """
        family = _family(config)
        heads = _need(config, "num_attention_heads")
        hidden = _need(config, "hidden_size")
        positions = _max_len(config, max_len)
        _refuse(config, family, positions)
        # only these two families read the key; the others ignore it
        attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
        # a missing key means what the family's own configuration class says
        head_dim = config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)
        kv_heads = config.get("num_key_value_heads") or (8 if family == "mistral" else heads)
        if heads % kv_heads:
            raise ModelError(f"The config has {heads} query heads for {kv_heads} key/value heads: not a multiple.")
        return cls(
            family=family,
            vocab_size=_need(config, "vocab_size"),
            hidden_size=hidden,
            num_layers=_need(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_need(config, "intermediate_size"),
            max_len=positions,
            rope=_rope(config, freq_factors),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            qkv_bias=family == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            tied=bool(config.get("tie_word_embeddings", False)),
            eos_ids=_eos_ids(config, generation or {}),
        )

    @property
    def qkv_size(self) -> int:
        """Outputs of the fused query, key and value projection: (Hq + 2 Hkv) D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_params(self) -> int:
        """Weights of one layer's matrices: H (Hq + 2 Hkv) D + Hq D H + (3 gated, else 2) H I."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        return attention + (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def num_params(self) -> int:
        """All matrices: V H once when tied, else twice, + L layers. Norms and biases (below 0.1 %) are left out."""
        return (1 if self.tied else 2) * self.vocab_size * self.hidden_size + self.num_layers * self.layer_params

    def prefill_flops(self, num_tokens: int, start: int = 0) -> int:
        """Floating-point operations to compute positions start .. start + num_tokens - 1 and one row of logits.

        2 num_tokens L layer_params + 4 L Hq D (sum of positions attended) + 2 V H. A multiply-add counts two.
        """
        attended = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        matrices = 2 * num_tokens * self.num_layers * self.layer_params
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * attended
        return matrices + attention + 2 * self.vocab_size * self.hidden_size

    def decode_flops(self, context_len: int) -> int:
        """Floating-point operations of one more token that attends to `context_len` positions, itself included.

        2 L layer_params + 4 L Hq D context_len + 2 V H: prefill of one token at the end of the context.
        """
        return self.prefill_flops(1, context_len - 1)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights: num_params times the size of `dtype`."""
        return self.num_params * dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes a position takes in the cache: 2 (K and V) L Hkv D times the size of `dtype`."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes(dtype)


SEED = ModelSpec(
    family="seed",
    vocab_size=10_000,
    hidden_size=512,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=2048,
    max_len=8192,  # nothing in the model ends here; a limit so that traces can be scaled to it
    eps=1e-5,
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
)
"""The simplified Transformer of the original experiment; model/seed.py computes it."""


def shorten(spec: ModelSpec, max_len: int | None) -> ModelSpec:
    """`spec` with its context cut to `max_len`. Raises ModelError when the model's own is shorter."""
    if max_len is None:
        return spec
    if not 1 <= max_len <= spec.max_len:
        raise ModelError(f"max_len {max_len} is not possible: this model's context is 1 to {spec.max_len} tokens.")
    return msgspec.structs.replace(spec, max_len=max_len)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ModelError for a dtype that is none of DTYPE_BYTES."""
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported: use {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


def _need(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"The model's config says {key} = {value!r}: a whole number from 1 is needed.")
    return value


def _family(config: Mapping[str, Any]) -> Family:
    named = config.get("architectures") or [f"(none; model_type {config.get('model_type')!r})"]
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ModelError(f"Architecture {named[0]} is not supported: use one of {', '.join(ARCHITECTURES)}, or seed.")


def _max_len(config: Mapping[str, Any], wanted: int | None) -> int:
    own = _need(config, "max_position_embeddings")
    if wanted is not None and not 1 <= wanted <= own:
        raise ModelError(f"max_len {wanted} is not possible: this model's context is 1 to {own} tokens.")
    return wanted or own


def _refuse(config: Mapping[str, Any], family: Family, max_len: int) -> None:
    """Raise ModelError for settings that would silently change the numbers."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"Activation {config['hidden_act']!r} is not supported: only silu is.")
    if config.get("quantization_config"):
        raise ModelError("Quantised Hugging Face checkpoints are not supported: use an unquantised one or a GGUF.")
    window = _sliding_window(config, family)
    if window is not None and window < max_len:
        raise ModelError(
            f"Sliding-window attention ({window} tokens) is not supported: "
            f"limit the context to it with --max-len {window}, where it changes nothing."
        )


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    """The window some layer really uses, as the family's own configuration class decides it."""
    if family == "llama":
        return None
    window: int | None = config.get("sliding_window", 4096)  # the classes' default when the key is missing
    if family == "mistral":
        return window
    if not config.get("use_sliding_window", False):
        return None
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return window if "sliding_attention" in layer_types else None
    return window if config.get("max_window_layers", 28) < config["num_hidden_layers"] else None


def _rope(config: Mapping[str, Any], freq_factors: Sequence[float]) -> RopeSpec:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind: Any = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"Rotary scaling {kind!r} is not supported: only default, linear and llama3 are.")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("Rotating only a part of each head (partial_rotary_factor) is not supported.")
    if kind == "default":
        return RopeSpec(theta=float(theta), freq_factors=tuple(freq_factors))
    if "factor" not in scaling:
        raise ModelError(f"Rotary scaling {kind!r} needs a factor, and the config has none.")
    return RopeSpec(
        theta=float(theta),
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_len=int(scaling.get("original_max_position_embeddings", 8192)),
        freq_factors=tuple(freq_factors),
    )


def _eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Every end-of-sequence id either file names, ascending."""
    found: set[int] = set()
    for source in (config, generation):
        ids = source.get("eos_token_id")
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))
