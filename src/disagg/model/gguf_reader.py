"""A GGUF file: its metadata, its tensors, and the Hugging Face config they amount to.

The header is parsed here, in 0.1 s: `gguf.GGUFReader` makes a numpy view of every vocabulary entry and takes 4.6 s for
SmolLM2, in every worker. Tensor blocks are dequantised by the `gguf` library.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from functools import partial
from math import gcd, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from disagg.errors import ModelError
from disagg.model.spec import ModelSpec

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# GGUF's name of a layer's part -> Hugging Face's
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
          "output.weight": "lm_head.weight"}  # fmt: skip


class _Entry(NamedTuple):
    """Where one tensor lies."""

    shape: tuple[int, ...]  # outermost first, as torch has it
    kind: int  # ggml's number of the element type
    offset: int  # bytes from the start of the data section


class GgufFile:
    """An opened GGUF file. `metadata` maps keys to plain Python values; `tensors` names what the file holds.

    Raises ModelError when the file is not a whole GGUF file, version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self._data[:4] != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
            self.metadata, self.tensors, self._start = self._read_header()
        except (struct.error, UnicodeDecodeError, ValueError, OSError, KeyError) as error:
            raise ModelError(f"{path} cannot be read as GGUF ({error}): is it whole?") from error

    def _read_header(self) -> tuple[dict[str, Any], dict[str, _Entry], int]:
        version, num_tensors, num_values = struct.unpack_from("<IQQ", self._data, 4)
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}: only 2 and 3 are supported.")
        at = 24
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key, at = self._string(at)
            metadata[key], at = self._value(at)
        tensors: dict[str, _Entry] = {}
        for _ in range(num_tensors):
            name, at = self._string(at)
            (rank,) = struct.unpack_from("<I", self._data, at)
            *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", self._data, at + 4)
            tensors[name] = _Entry(tuple(reversed(shape)), kind, offset)
            at += 4 + 8 * rank + 12
        alignment = metadata.get("general.alignment", 32)
        return metadata, tensors, -(-at // alignment) * alignment

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._data, at)
        end = at + 8 + length
        return self._data[at + 8 : end].decode(), end

    def _value(self, at: int) -> tuple[Any, int]:
        (kind,) = struct.unpack_from("<I", self._data, at)
        at += 4
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            (value,) = struct.unpack_from("<" + _SCALARS[kind], self._data, at)
            return value, at + struct.calcsize(_SCALARS[kind])
        kind, length = struct.unpack_from("<IQ", self._data, at)
        at += 12
        if kind == _STRING:
            strings = []
            for _ in range(length):
                string, at = self._string(at)
                strings.append(string)
            return strings, at
        values = struct.unpack_from(f"<{length}{_SCALARS[kind]}", self._data, at)
        return list(values), at + length * struct.calcsize(_SCALARS[kind])

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, dequantised to float32. Raises ModelError for an element type unknown to `gguf`."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # takes 0.2 s, and only tensors need it

        shape, kind, offset = self.tensors[name]
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            begin, size = self._start + offset, prod(shape) // block * block_bytes
            if begin + size > len(self._data):
                raise ModelError(f"{self.path} ends before tensor {name} does: fetch it again.")
            # blocks lie end to end, and `gguf` takes 16 rows at a time: long rows cost half of what short ones do
            rows = prod(shape[:-1])
            raw = np.frombuffer(self._data, np.uint8, size, begin).reshape(rows // gcd(rows, 16), -1)
            return torch.from_numpy(np.array(dequantize(raw, GGMLQuantizationType(kind)), np.float32)).reshape(shape)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"Tensor {name} of {self.path} cannot be dequantised: {error}.") from error

    def spec(self, max_len: int | None = None) -> ModelSpec:
        """The model this file describes. Raises ModelError when this engine does not support it."""
        factors = self.tensor("rope_freqs.weight").tolist() if "rope_freqs.weight" in self.tensors else ()
        return ModelSpec.from_config(self._config(), max_len=max_len, freq_factors=factors)

    def _config(self) -> dict[str, Any]:
        """The metadata in the words of a Hugging Face config."""
        meta = self.metadata
        family = str(meta.get("general.architecture"))
        if family not in _ARCHITECTURES:
            raise ModelError(f"GGUF architecture {family!r} is not supported: use one of {', '.join(_ARCHITECTURES)}.")
        if meta.get("split.count", 1) > 1:
            raise ModelError(f"{self.path} is one part of {meta['split.count']}: merge them with llama-gguf-split.")
        if meta.get(f"{family}.expert_count", 0):
            raise ModelError(f"{self.path} is a mixture of experts, which is not supported.")

        def own(key: str, default: Any = None) -> Any:
            return meta.get(f"{family}.{key}", default)

        heads = own("attention.head_count")
        head_dim = own("attention.key_length") or own("embedding_length") // heads
        scaling = own("rope.scaling.type", "none")
        return {
            "architectures": [_ARCHITECTURES[family]],
            "vocab_size": own("vocab_size") or len(meta["tokenizer.ggml.tokens"]),
            "hidden_size": own("embedding_length"),
            "intermediate_size": own("feed_forward_length"),
            "num_hidden_layers": own("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": own("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": own("context_length"),
            "rms_norm_eps": own("attention.layer_norm_rms_epsilon", 1e-6),
            "partial_rotary_factor": own("rope.dimension_count", head_dim) / head_dim,
            "rope_theta": own("rope.freq_base", 10_000.0),
            "rope_scaling": None if scaling == "none" else {"type": scaling, "factor": own("rope.scaling.factor", 1.0)},
            "attention_bias": "blk.0.attn_output.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in self.tensors,
            "sliding_window": own("attention.sliding_window"),
            "use_sliding_window": own("attention.sliding_window") is not None,
            "max_window_layers": 0,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "eos_token_id": [
                meta[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in meta
            ],
        }

    def named(self, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        """(Hugging Face name, shape, read) of every tensor; a name unknown here stays as it is in the file."""
        for name, entry in self.tensors.items():
            if name != "rope_freqs.weight":  # already in the spec
                hf_name = _hf_name(name)
                yield hf_name, entry.shape, partial(self._converted, name, hf_name, spec)

    def _converted(self, name: str, hf_name: str, spec: ModelSpec) -> Tensor:
        tensor = self.tensor(name)
        if spec.family != "llama":
            return tensor
        # the llama converter interleaves the two rotary halves of every query and key head
        for part, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads)):
            if part in hf_name:
                return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor


def _hf_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}" if prefix == "blk" and part in _PARTS else name
