"""What a worker on a GPU is made of: as many pages as it has room for, the transport that owns them, the runner.

In this order, because each needs the one before: the weights are there; the largest step is run over a page of its
own, so that what activations take is known; the rest of this worker's share of the GPU becomes pages; the kernels are
warmed up and the graphs captured over those.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from disagg.cache.storage import KVStorage
from disagg.engine.runner_cuda import CudaRunner
from disagg.errors import BudgetError
from disagg.transfer.cuda_ipc import CudaIpcTransport
from disagg.transfer.layout import Layout

if TYPE_CHECKING:
    from disagg.cluster.worker import WorkerConfig
    from disagg.model.load import Loaded

_CONTEXT_BYTES = 1 << 30  # of a process, beyond what torch allocates: the driver's context, kernels, captured graphs
_FEWEST_PAGES = 2


def on_gpu(
    config: "WorkerConfig", loaded: "Loaded", layout: Layout, wake: Callable[[], None]
) -> tuple[CudaIpcTransport, CudaRunner]:
    """Pages on the worker's GPU, and the runner over them, warm. Raises BudgetError when there is no room for them."""
    num_pages = config.num_pages or _num_pages(config, loaded, layout)
    transport = CudaIpcTransport(num_pages, layout.page_bytes, config.spec.devices[0], wake)
    runner = _runner(config, loaded, layout, buffer=transport.pages)
    runner.warm_up()
    return transport, runner


def _num_pages(config: "WorkerConfig", loaded: "Loaded", layout: Layout) -> int:
    """What is left of this worker's share of the GPU when weights and the largest step are paid for.

    Counted from what this process took, not from what is free now: other workers of this GPU may be loading, and every
    arm of a comparison must come to the same number.
    """
    gpu = config.spec.torch_device
    torch.cuda.reset_peak_memory_stats(gpu)
    _runner(config, loaded, layout, num_pages=1, device=gpu).warm_up(sizes=())
    taken = torch.cuda.max_memory_allocated(gpu) + _CONTEXT_BYTES
    taken += 4 * config.engine.max_running * loaded.spec.vocab_size  # logits of the largest graph: graphs were left out
    torch.cuda.empty_cache()
    share = torch.cuda.get_device_properties(gpu).total_memory * config.engine.gpu_memory / config.spec.shares
    num_pages = int(share - taken) // layout.page_bytes
    if num_pages < _FEWEST_PAGES:
        raise BudgetError(
            f"{config.worker} may take {share / 2**30:.1f} GiB of GPU {config.spec.devices[0]} and its weights and "
            f"activations take {taken / 2**30:.1f} GiB: use more GPUs, a smaller model or a lower --max-batch-tokens."
        )
    return num_pages


def _runner(config: "WorkerConfig", loaded: "Loaded", layout: Layout, **pages: Any) -> CudaRunner:
    """A runner over `pages`, as KVStorage takes them."""
    engine = config.engine
    assert engine.max_len is not None
    storage = KVStorage(
        num_layers=layout.num_layers, num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim,
        page_size=layout.page_size, dtype=layout.dtype, **pages,
    )  # fmt: skip
    return CudaRunner(
        loaded, storage, max_running=engine.max_running, max_batch_tokens=engine.max_batch_tokens,
        max_len=engine.max_len,
    )  # fmt: skip
