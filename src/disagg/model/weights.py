"""Where a model's tensors come from, and the proof that they are exactly the ones it needs.

A model pulls tensors by their Hugging Face names, each read from its file when it is taken, so nothing is in memory
that the model has not asked for. Before the first one is read, names and shapes are compared with what the spec asks
for: nothing missing, nothing left over, no shape different. Never pickle.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from disagg.errors import ModelError
from disagg.model.gguf_reader import GgufFile
from disagg.model.spec import ModelSpec

Read = Callable[[], Tensor]
_NAMED_AT_MOST = 5  # tensors an error lists by name


class Place(NamedTuple):
    """Where tensors go and what they are there."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32


_CPU = Place()


class Weights:
    """Tensors by name, each read when it is taken, straight to its `place`.

    `found` maps each name to its shape and a function that reads it. Raises ModelError unless these are exactly the
    tensors of `spec`; `source` says in the error where they come from.
    """

    def __init__(
        self, spec: ModelSpec, found: dict[str, tuple[tuple[int, ...], Read]], source: str, place: Place
    ) -> None:
        _check(expected_shapes(spec), {name: shape for name, (shape, _) in found.items()}, source)
        self._found = found
        self._place = place
        self._digest = hashlib.blake2b(digest_size=8)

    def take(self, name: str) -> Tensor:
        """The tensor called `name`, contiguous, of the place's dtype."""
        tensor = self._found[name][1]().to(device=self._place.device, dtype=self._place.dtype).contiguous()
        self._digest.update(name.encode())
        # a sample is enough: it tells models apart, it does not protect against forgery
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)]
        self._digest.update(sample.float().cpu().numpy().tobytes())
        return tensor

    def fingerprint(self) -> str:
        """Hexadecimal text, equal for equal numbers, of all tensors taken so far."""
        return self._digest.hexdigest()


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-like model of this spec, by Hugging Face name, biases included."""
    H, D = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * D, spec.num_kv_heads * D
    matrices = {
        "self_attn.q_proj": (q, H, spec.qkv_bias),
        "self_attn.k_proj": (kv, H, spec.qkv_bias),
        "self_attn.v_proj": (kv, H, spec.qkv_bias),
        "self_attn.o_proj": (H, q, spec.out_bias),
        "mlp.gate_proj": (spec.intermediate_size, H, spec.mlp_bias),
        "mlp.up_proj": (spec.intermediate_size, H, spec.mlp_bias),
        "mlp.down_proj": (H, spec.intermediate_size, spec.mlp_bias),
    }
    norms = {"input_layernorm": H, "post_attention_layernorm": H}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": D, "self_attn.k_norm": D}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, H), "model.norm.weight": (H,)}
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, H)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        for part, (outputs, inputs, bias) in matrices.items():
            shapes[f"{prefix}{part}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{part}.bias"] = (outputs,)
        shapes |= {f"{prefix}{part}.weight": (size,) for part, size in norms.items()}
    return shapes


def _check(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str) -> None:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} ({list(found[name])}, not {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:_NAMED_AT_MOST])}{', ...' * (len(names) > _NAMED_AT_MOST)}"
        for names, what in ((missing, "missing"), (extra, "left over"), (wrong, "of another shape"))
        if names
    ]
    if faults:
        raise ModelError(f"The tensors of {source} do not match its configuration; {'; '.join(faults)}.")


def from_folder(folder: Path, spec: ModelSpec, place: Place = _CPU) -> Weights:
    """The safetensors of a Hugging Face folder, one file or shards. Raises ModelError."""
    files = _safetensor_files(folder)
    found: dict[str, tuple[tuple[int, ...], Read]] = {}
    for file in files:
        for name, shape in _safetensor_shapes(file).items():
            if name in found:
                raise ModelError(f"Tensor {name} is in two files of {folder}: the checkpoint is inconsistent.")
            found[name] = (shape, _reader(file, name))
    for name in list(found):  # computed from the config, or a second copy of the embedding
        if name.endswith("rotary_emb.inv_freq") or (spec.tied and name == "lm_head.weight"):
            del found[name]
    return Weights(spec, found, str(folder), place)


def _safetensor_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error!r}): fetch it again.") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelError(f"{folder} lacks {', '.join(absent)}, named by its index: fetch the whole checkpoint.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(f"{folder} has only pickled weights, which can run code: convert them to safetensors first.")
    raise ModelError(f"{folder} has no *.safetensors files: add them, or use --random-weights.")


def _safetensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes, from the file's JSON header."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(opened.read(size))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors file ({error}): fetch it again.") from error


def _reader(file: Path, name: str) -> Read:
    def read() -> Tensor:
        from safetensors import SafetensorError, safe_open

        # opened for each tensor: a file kept open keeps every page read so far mapped
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read ({error}): fetch it again.") from error

    return read


def from_gguf(file: GgufFile, spec: ModelSpec, place: Place = _CPU) -> Weights:
    """The tensors of a GGUF file, dequantised, queries and keys in Hugging Face order. Raises ModelError."""
    found = {name: (shape, read) for name, shape, read in file.named(spec)}
    return Weights(spec, found, str(file.path), place)


def from_seed(spec: ModelSpec, seed: int, place: Place = _CPU) -> Weights:
    """Random tensors for performance work: the same numbers in every worker with the same kind of device and dtype.

    Matrices are uniform with variance 1 / inputs, so a layer keeps the size of what passes through it; norms are 1;
    biases are small. Each tensor has its own generator, so the order of taking does not matter.
    """
    found = {name: (shape, _random(name, shape, seed, place)) for name, shape in expected_shapes(spec).items()}
    return Weights(spec, found, "random weights", place)


def _random(name: str, shape: tuple[int, ...], seed: int, place: Place) -> Read:
    def read() -> Tensor:
        empty = torch.empty(shape, device=place.device, dtype=place.dtype)
        if "norm" in name:
            return empty.fill_(1)
        # torch's CPU generator heeds only the low 32 bits of its seed
        generator = torch.Generator(place.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        bound = (3 / shape[-1]) ** 0.5 if len(shape) > 1 else 0.02
        return empty.uniform_(-bound, bound, generator=generator)

    return read
