"""Every transport does what the in-process one does: the same tests, one line in the table per transport."""

import os
import threading
import time
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import FakeDriver
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.errors import HandshakeError
from disagg.transfer.base import runs
from disagg.transfer.checksum import page_checksums
from disagg.transfer.cuda_ipc import CudaIpcTransport
from disagg.transfer.inprocess import InProcessTransport
from disagg.transfer.shm import SharedMemoryTransport

PAGE_BYTES = 4096
_names = count()
_fake = FakeDriver()

MAKERS = {
    "inprocess": lambda num_pages, size=PAGE_BYTES: InProcessTransport(f"test{next(_names)}", num_pages, size),
    "shm": lambda num_pages, size=PAGE_BYTES: SharedMemoryTransport(num_pages, size),
    "cuda_ipc, fake driver": lambda num_pages, size=PAGE_BYTES: CudaIpcTransport(num_pages, size, cuda=_fake),
    "cuda_ipc": lambda num_pages, size=PAGE_BYTES: CudaIpcTransport(num_pages, size),
}
KINDS = [pytest.param(kind, marks=[pytest.mark.gpu] * (kind == "cuda_ipc")) for kind in MAKERS]


@pytest.fixture(params=KINDS)
def make(request):
    """Makes transports of one kind and closes them."""
    if request.param == "cuda_ipc" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made = []

    def maker(*args):
        made.append(MAKERS[request.param](*args))
        return made[-1]

    yield maker
    for transport in made:
        transport.close()


def fill(transport, seed):
    numbers = np.random.default_rng(seed).integers(0, 256, tuple(transport.pages.shape), dtype=np.uint8)
    transport.pages[:] = numbers if isinstance(transport.pages, np.ndarray) else torch.from_numpy(numbers)


def content(transport):
    """A copy of the pages as they are now."""
    pages = transport.pages
    return pages.copy() if isinstance(pages, np.ndarray) else pages.cpu().clone().numpy()


def ended(transport, wanted=1):
    """Polls until `wanted` pulls have ended."""
    found = []
    until = time.monotonic() + 10
    while len(found) < wanted and time.monotonic() < until:
        found += transport.poll()
    return found


def test_a_pull_copies_the_named_pages_and_no_other(make):
    """theirs[i] lands in ours[i]; every other page is untouched; bytes and times are told."""
    source, target = make(8), make(8)
    fill(source, 1)
    fill(target, 2)
    before = content(target)
    target.connect(source.address())

    ticket = target.pull(source.address(), [5, 1, 2], [0, 6, 7])
    (done,) = ended(target)

    assert (done.ticket, done.num_bytes, done.error) == (ticket, 3 * PAGE_BYTES, "")
    assert done.start_at <= done.end_at
    assert (content(target)[[0, 6, 7]] == content(source)[[5, 1, 2]]).all()
    assert (content(target)[1:6] == before[1:6]).all()


def test_an_empty_pull_still_ends(make):
    """A hand-off with nothing to move (all pages there already) completes like any other."""
    source, target = make(2), make(2)
    target.connect(source.address())

    ticket = target.pull(source.address(), [], [])

    assert [(done.ticket, done.num_bytes, done.error) for done in ended(target)] == [(ticket, 0, "")]


def test_every_ticket_ends_exactly_once(make):
    """Tickets are unique and polled once, whatever the number in flight."""
    source, target = make(4), make(4)
    target.connect(source.address())

    tickets = [target.pull(source.address(), [page % 4], [page % 4]) for page in range(50)]

    assert sorted(done.ticket for done in ended(target, 50)) == sorted(tickets)
    assert target.poll() == []


def test_a_pull_from_a_stranger_fails_and_says_so(make):
    """Pulling without connecting is a failed ticket, not an exception and not silence."""
    source, target = make(2), make(2)

    target.pull(source.address(), [0], [0])

    assert "not connected" in ended(target)[0].error


def test_connecting_to_nobody_is_refused(make):
    """An address that leads nowhere is a HandshakeError at connect, before anything moves."""
    target = make(2)
    gone = make(2)
    address = gone.address()
    gone.close()
    gone.close = lambda: None

    with pytest.raises(HandshakeError):
        target.connect(address)


def test_pages_of_another_size_are_refused(make):
    """A pool that is not made of our pages cannot be read as if it were."""
    source, target = make(3, 1000), make(2, PAGE_BYTES)

    with pytest.raises(HandshakeError, match="bytes"):
        target.connect(source.address())


def test_connecting_twice_is_once(make):
    """`connect` is called for every hand-off and maps a peer only once."""
    source, target = make(2), make(2)
    target.connect(source.address())
    target.connect(source.address())
    target.pull(source.address(), [1], [1])

    assert ended(target)[0].error == ""


def test_a_disconnected_peer_is_a_stranger_again(make):
    """After `disconnect` new pulls fail; nothing is left mapped."""
    source, target = make(2), make(2)
    target.connect(source.address())
    target.disconnect(source.address())
    target.pull(source.address(), [1], [1])

    assert ended(target)[0].error != ""


def test_a_mapped_pool_outlives_its_owner():
    """A copy from shared memory whose owner has gone still ends; there is no fault to crash the reader."""
    source, target = MAKERS["shm"](4), MAKERS["shm"](4)
    fill(source, 3)
    wanted = source.pages[2].copy()
    target.connect(source.address())
    address = source.address()
    source.close()

    target.pull(address, [2], [0])

    assert ended(target)[0].error == ""
    assert (target.pages[0] == wanted).all()
    target.close()


def test_closing_frees_thread_and_file_descriptors():
    """Made and closed a hundred times, nothing is left."""
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        MAKERS["shm"](2).close()

    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, fds)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
@settings(max_examples=300)
def test_runs_say_the_same_in_fewer_words(pairs):
    """Expanding the runs gives back the pairs, and no two neighbouring runs could be one."""
    theirs, ours = [a for a, _ in pairs], [b for _, b in pairs]

    merged = runs(theirs, ours)

    assert [(a + i, b + i) for a, b, n in merged for i in range(n)] == pairs
    for (a, b, n), (c, d, _) in pairwise(merged):
        assert (a + n, b + n) != (c, d)


def test_checksums_follow_the_bytes(make):
    """Equal pages have equal sums on both sides of a pull; one changed byte anywhere in a page changes its sum."""
    source, target = make(4), make(4)
    fill(source, 4)
    target.connect(source.address())
    theirs, ours = page_checksums(source.pages), page_checksums(target.pages)
    sums = theirs([3, 0, 2])

    target.pull(source.address(), [3, 0, 2], [1, 2, 0])
    ended(target)

    assert ours([1, 2, 0]) == sums
    assert len(set(sums)) == 3
    for position in (0, PAGE_BYTES // 2, PAGE_BYTES - 1):
        target.pages[1, position] ^= 1
        assert ours([1, 2, 0])[0] != sums[0]
        target.pages[1, position] ^= 1
    assert ours([]) == []


def test_a_peer_can_be_mapped_again_after_it_was_forgotten(make):
    """Disconnected and connected again, the same address works: tickets in between failed, none is lost."""
    source, target = make(2), make(2)
    fill(source, 5)
    target.connect(source.address())
    target.disconnect(source.address())
    target.pull(source.address(), [0], [0])
    assert ended(target)[0].error
    target.connect(source.address())

    target.pull(source.address(), [0], [1])

    assert ended(target)[0].error == ""
    assert (content(target)[1] == content(source)[0]).all()


def resident_bytes():
    """Shared memory that this process has mapped page by page."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem")]
    return int(line.split()[1]) * 1024


def test_connecting_does_not_map_a_whole_pool_at_once():
    """The engine's thread connects: it must not wait until every page of a peer's pool is mapped."""
    size, num = 1 << 20, 64
    ours, theirs = SharedMemoryTransport(1, size), SharedMemoryTransport(num, size)
    try:
        before = resident_bytes()
        ours.connect(theirs.address())
        assert resident_bytes() - before < num * size / 4
    finally:
        ours.close()
        theirs.close()
