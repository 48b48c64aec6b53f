"""What only the cuda_ipc transport has: paths between GPUs, calls saved, and peers in other processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fake_cuda import FakeDriver

from disagg.errors import HandshakeError
from disagg.transfer.cuda_ipc import CudaIpcTransport

PAGE_BYTES = 1 << 16
OWNER = f"""
import sys, torch
from disagg.transfer.cuda_ipc import CudaIpcTransport
torch.cuda.set_device(int(sys.argv[1]))
owner = CudaIpcTransport(16, {PAGE_BYTES}, int(sys.argv[1]))
for page in range(16):
    owner.pages[page] = page + 100
torch.cuda.synchronize()
print(owner.address(), flush=True)
sys.stdin.read()
owner.close()
"""


def pulled(transport):
    """The one pull in flight, once it has ended."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if ended := transport.poll():
            return ended[0]
    raise AssertionError("the pull never ended")


@pytest.mark.parametrize(("device", "peers", "path"), [(0, True, "device"), (1, True, "peer"), (1, False, "host")])
def test_the_path_follows_from_where_the_pools_lie(device, peers, path):
    """Same GPU, peer access, or through the host: the transport knows, and the pages come in any case."""
    fake = FakeDriver(peers)
    source, target = CudaIpcTransport(4, 64, device, cuda=fake), CudaIpcTransport(4, 64, 0, cuda=fake)
    source.pages[3] = 7
    target.connect(source.address())
    target.pull(source.address(), [3], [1])

    assert target.path(source.address()) == path
    assert (("enable_peer", 1) in fake.log) == (path == "peer")
    assert pulled(target).error == ""
    assert target.pages[1].tolist() == [7] * 64
    target.close()
    source.close()


def test_a_path_through_the_host_is_warned_of(caplog):
    """A slow path is never silent: the warning names both GPUs and the bandwidth, and its trial leaves no memory."""
    fake = FakeDriver(peers=False)
    source, target = CudaIpcTransport(4, 64, 1, cuda=fake), CudaIpcTransport(4, 64, 0, cuda=fake)
    target.connect(source.address())
    target.close()

    assert "GPU 0 cannot read GPU 1 directly" in caplog.text
    assert "GB/s" in caplog.text
    source.close()
    assert fake.memory == {}


def test_neighbouring_pages_travel_in_one_copy():
    """What is in one piece on both sides is one copy, and a pull is one call of the driver."""
    fake = FakeDriver()
    source, target = CudaIpcTransport(16, 64, cuda=fake), CudaIpcTransport(16, 64, cuda=fake)
    target.connect(source.address())
    target.pull(source.address(), [0, 1, 2, 3, 9, 10], [4, 5, 6, 7, 12, 13])
    pulled(target)

    assert fake.log == [("copy", 2)]
    target.close()
    source.close()


def test_pages_outside_of_a_pool_are_refused():
    """A page number beyond either pool is a failed ticket: device memory has no other guard."""
    fake = FakeDriver()
    source, target = CudaIpcTransport(4, 64, cuda=fake), CudaIpcTransport(2, 64, cuda=fake)
    target.connect(source.address())
    errors = []
    for theirs, ours in (([4], [0]), ([0], [2]), ([-1], [0])):
        target.pull(source.address(), theirs, ours)
        errors.append(pulled(target).error)

    assert ["outside of its pool" in error for error in errors] == [True] * 3
    assert fake.log == []
    target.close()
    source.close()


def test_an_address_of_another_transport_is_refused():
    """A worker on cores cannot be read by one on a GPU: a sentence says so."""
    target = CudaIpcTransport(2, 64, cuda=FakeDriver())
    with pytest.raises(HandshakeError, match="both workers must be on GPUs"):
        target.connect("/proc/1/fd/7")
    target.close()


def test_a_gpu_that_is_not_visible_is_named_as_the_reason():
    """With different CUDA_VISIBLE_DEVICES no handle opens: the sentence says what to change."""
    fake = FakeDriver()
    source = CudaIpcTransport(2, 64, 1, cuda=fake)
    fake.find = lambda uuid: None
    target = CudaIpcTransport(2, 64, 0, cuda=fake)
    with pytest.raises(HandshakeError, match="CUDA_VISIBLE_DEVICES"):
        target.connect(source.address())
    source.close()
    target.close()


@pytest.fixture(params=[0, 1])
def owner(request):
    """A pool in another process, on this GPU or on the next; page i holds i + 100."""
    if torch.cuda.device_count() <= request.param:
        pytest.skip(f"needs {request.param + 1} CUDA device(s)")
    command = [sys.executable, "-c", OWNER, str(request.param)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().strip()
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


@pytest.mark.gpu
def test_pages_of_another_process_arrive(owner):
    """Scattered and neighbouring pages of a pool in another process land where they should, whole."""
    _, address = owner
    target = CudaIpcTransport(16, PAGE_BYTES)
    target.connect(address)
    target.pull(address, [3, 9, 10, 11, 0], [0, 5, 6, 7, 15])

    done = pulled(target)

    assert (done.error, done.num_bytes) == ("", 5 * PAGE_BYTES)
    assert target.pages[[0, 5, 6, 7, 15]].float().mean(1).tolist() == [103, 109, 110, 111, 100]
    assert not target.pages[[1, 2, 3, 4, 8, 14]].any()
    target.close()


@pytest.mark.gpu
def test_a_dead_owner_does_not_take_its_reader_along(owner):
    """A pull from a process that was killed ends, with the right bytes or with an error; later pulls still work."""
    process, address = owner
    target, neighbour = CudaIpcTransport(16, PAGE_BYTES), CudaIpcTransport(16, PAGE_BYTES)
    target.connect(address)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    target.pull(address, [5], [2])
    done = pulled(target)
    print(json.dumps({"after the owner's death": done.error or "arrived"}))

    assert done.error or (target.pages[2] == 105).all()
    neighbour.pages[1] = 9
    torch.cuda.synchronize()
    target.connect(neighbour.address())
    target.pull(neighbour.address(), [1], [4])
    assert pulled(target).error == ""
    assert (target.pages[4] == 9).all()
    target.close()
    neighbour.close()
