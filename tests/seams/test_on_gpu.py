"""What a worker on a GPU makes of its share of the memory; on a CPU, with a driver over ordinary memory."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeDriver

from disagg.cluster import on_gpu
from disagg.cluster.worker import WorkerConfig
from disagg.config import EngineSpec, WorkerSpec
from disagg.errors import BudgetError
from disagg.model.load import load_model
from disagg.transfer.layout import Layout

TAKEN = 1 << 30  # weights and activations


@pytest.fixture
def made(monkeypatch):
    """A function from the GPU's memory, the worker's shares and the pages asked for to (transport, runner)."""
    transports = []

    def make(total, shares=1, num_pages=0):
        monkeypatch.setattr(on_gpu.torch.cuda, "reset_peak_memory_stats", lambda gpu: None)
        monkeypatch.setattr(on_gpu.torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(on_gpu.torch.cuda, "max_memory_allocated", lambda gpu: TAKEN)
        monkeypatch.setattr(on_gpu.torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=total))
        monkeypatch.setattr("disagg.transfer.cuda_ipc.driver", FakeDriver)
        loaded = load_model("seed", max_len=64)
        spec = loaded.spec
        layout = Layout("seed", spec.num_layers, spec.num_kv_heads, 16, spec.head_dim, loaded.kv_dtype)
        engine = EngineSpec(max_len=64, max_batch_tokens=32, max_running=2, gpu_memory=0.5)
        config = WorkerConfig(WorkerSpec("C0", "both", (0,), shares), 0, engine, "", num_pages, 1.0, 1.0)
        found = on_gpu.on_gpu(config, loaded, layout, lambda: None)
        transports.append(found[0])
        return *found, layout.page_bytes

    yield make
    for transport in transports:
        transport.close()


def test_what_is_left_of_the_share_becomes_pages(made):
    """Half of 9 GiB for two workers is 2.25 GiB each; weights take 1 of it, and 1 is set aside for the process."""
    transport, runner, page_bytes = made(9 << 30, shares=2)
    left = (9 << 30) * 0.5 / 2 - TAKEN - on_gpu._CONTEXT_BYTES

    assert len(transport.pages) == left // page_bytes > 100
    assert runner.storage.pages.data_ptr() == transport.pages.data_ptr()
    assert runner.storage.num_pages == len(transport.pages)


def test_pages_that_were_asked_for_are_made(made):
    """With --kv-memory nothing is worked out, and nothing else is taken."""
    transport, runner, _ = made(0, num_pages=12)

    assert len(transport.pages) == runner.storage.num_pages == 12
    assert torch.isfinite(runner.storage.pages).all()


def test_a_gpu_without_room_is_named_with_the_numbers(made):
    """The sentence says what the worker may take, what it needs and what helps."""
    with pytest.raises(BudgetError, match=r"C0\.0 may take 1\.0 GiB of GPU 0 and its weights and .* take 2\.0 GiB"):
        made(2 << 30)
