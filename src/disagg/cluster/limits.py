"""What a deployment can hold, decided once, and which requests could never be served by it."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from disagg.cluster.worker import KV_DTYPE
from disagg.config import Budget, Deployment, DeviceKind, EngineSpec
from disagg.errors import BudgetError, InputError, RequestError
from disagg.model.spec import ModelSpec
from disagg.request import SamplingParams


def resolved(engine: EngineSpec, model_max_len: int) -> EngineSpec:
    """The spec with the context length decided. Raises InputError when it is beyond the model's."""
    max_len = model_max_len if engine.max_len is None else engine.max_len
    if not 2 <= max_len <= model_max_len:
        raise InputError(f"--max-len {max_len} is not possible: this model's context is 2 to {model_max_len} tokens.")
    return msgspec.structs.replace(engine, max_len=max_len)


def check_devices(budget: Budget) -> None:
    """Raise BudgetError for a GPU that is not here."""
    if budget.kind == "cpu":
        return
    from disagg.transfer.cuda_driver import CudaError, driver

    try:
        num_gpus = driver().num_devices
    except CudaError as error:
        raise BudgetError(f"Budget {budget} cannot be used here: {error}") from None
    if (most := max(budget.devices)) >= num_gpus:
        there = f"this process sees {num_gpus}" + (f": use 0 to {num_gpus - 1}" if num_gpus else "")
        raise BudgetError(f"Budget {budget} names GPU {most} and {there}.")


def forked(deployment: Deployment, restart: bool, nodes: Path = Path("/sys/devices/system/node")) -> bool:
    """Whether workers are forked from one process that has loaded the model, instead of loading it each.

    They start sooner and share the memory of its weights. Not on GPUs, for a process that has used one cannot be
    forked, nor a single worker, unless it is to `restart`. Nor over several `nodes` of memory, unless likewise: those
    far from the weights would be slower than the others.
    """
    if restart or deployment.budget.kind != "cpu":
        return deployment.budget.kind == "cpu"
    homes = {home.parent for core in deployment.budget.devices for home in nodes.glob(f"node*/cpu{core}")}
    return len(deployment.workers) > 1 and len(homes) <= 1


def kv_dtype(engine: EngineSpec, kind: DeviceKind) -> str:
    """The dtype of keys and values in the cache: that of activations."""
    if kind == "cpu":
        return KV_DTYPE
    return "bfloat16" if engine.dtype == "fp8" else engine.dtype


def pages_per_worker(engine: EngineSpec, spec: ModelSpec, deployment: Deployment) -> int:
    """An even split of the KV memory; 0: each worker finds out what its GPU has left.

    Raises InputError when it is not enough for a single page each, or more than the machine has.
    """
    num_workers, kind = len(deployment.workers), deployment.budget.kind
    if engine.kv_bytes == 0 and kind == "cuda":
        return 0
    if kind == "cpu" and engine.kv_bytes > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise InputError(
            f"{engine.kv_bytes / 2**30:.1f} GiB of KV memory is more than this machine has, {memory / 2**30:.1f} GiB: "
            "lower --kv-memory."
        )
    page_bytes = bytes_for(spec, 1, engine.page_size, kv_dtype(engine, kind))
    num_pages = engine.kv_bytes // num_workers // page_bytes
    if num_pages < 2:
        raise InputError(
            f"{engine.kv_bytes / 2**20:.0f} MiB of KV memory over {num_workers} worker(s) holds {num_pages} page(s) of "
            f"{page_bytes / 2**20:.1f} MiB each: raise --kv-memory."
        )
    return num_pages


def bytes_for(spec: ModelSpec, num_pages: int, page_size: int, dtype: str = KV_DTYPE) -> int:
    """KV memory that so many pages take."""
    return spec.kv_bytes_per_token(dtype) * page_size * num_pages


def validate(
    prompt: Sequence[int], params: SamplingParams, engine: EngineSpec, vocab_size: int, num_pages: int
) -> None:
    """Raise RequestError for a request that no worker could ever serve."""
    max_len = engine.max_len
    assert max_len is not None
    if not 1 <= len(prompt) < max_len:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens and the context {max_len}: give it 1 to {max_len - 1}."
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"Token ids must lie between 0 and {vocab_size - 1}, the model's vocabulary.")
    if any(not 0 <= stop < vocab_size for stop in params.stop_token_ids):
        raise RequestError(f"stop_token_ids must lie between 0 and {vocab_size - 1}, the model's vocabulary.")
    room = num_pages * engine.page_size
    needed = min(len(prompt) + params.max_tokens, max_len)
    if needed > room:
        raise RequestError(
            f"Prompt and output may need {needed} tokens of KV cache and a worker has {room}: "
            "raise --kv-memory, or shorten the prompt or the output."
        )
