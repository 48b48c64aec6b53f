"""How fast pages really move between two workers of this host, beside what memory itself can do."""

import statistics
import threading
from collections.abc import Callable

import msgspec
import numpy as np

from disagg.clock import WallClock
from disagg.errors import DisaggError
from disagg.transfer.shm import SharedMemoryTransport

MIB = 1 << 20
SIZES = (1 * MIB, 16 * MIB, 64 * MIB)
_REPEATS = 7
_LATENCY_REPEATS = 200
_LIMIT_S = 10.0  # of one pull
_clock = WallClock()


class Speed(msgspec.Struct, frozen=True):
    """Copies of one size; medians."""

    num_bytes: int
    pull_gb_s: float
    memcpy_gb_s: float

    @property
    def share(self) -> float:
        """Of what memory can do."""
        return self.pull_gb_s / self.memcpy_gb_s


class Path(msgspec.Struct, frozen=True):
    """What was measured of one transport. `latency_s`: from asking for one page to hearing that it is here."""

    name: str
    page_bytes: int
    latency_s: float
    speeds: list[Speed]


def shared_memory(page_bytes: int) -> Path:
    """Measure the shared-memory transport with two ends in this process: the same mappings and copies as between two.

    Raises DisaggError when a pull fails, HandshakeError when the pages cannot be opened.
    """
    num_pages = -(-SIZES[-1] // page_bytes)
    ended = threading.Event()
    source = SharedMemoryTransport(num_pages, page_bytes)
    target = SharedMemoryTransport(num_pages, page_bytes, ended.set)

    def pull(count: int) -> None:
        ended.clear()
        target.pull(source.address(), range(count), range(count))
        arrived = ended.wait(_LIMIT_S)
        errors = [pulled.error for pulled in target.poll() if pulled.error]
        if errors or not arrived:
            raise DisaggError(f"Pages cannot be pulled through shared memory: {errors[0] if errors else 'no answer'}.")

    try:
        target.connect(source.address())
        pull(num_pages)  # what is done once
        latency_s = _median(lambda: pull(1), _LATENCY_REPEATS)
        speeds = []
        for size in SIZES:
            count = max(1, size // page_bytes)
            moved = count * page_bytes
            pulling = _median(lambda count=count: pull(count), _REPEATS)  # type: ignore[misc]
            speeds.append(Speed(moved, moved / pulling / 1e9, moved / _memcpy_s(moved) / 1e9))
    finally:
        target.close()
        source.close()
    return Path("shared memory", page_bytes, latency_s, speeds)


def _memcpy_s(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    return _median(lambda: np.copyto(target, source), _REPEATS)


def _median(action: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = _clock.now()
        action()
        times.append(_clock.now() - start)
    return statistics.median(times)
