"""How fast pages really move between two workers of this host, beside what memory itself can do."""

import statistics
import threading
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from disagg.clock import WallClock
from disagg.errors import DisaggError
from disagg.transfer.base import Transport

MIB = 1 << 20
_SIZES = (1 * MIB, 16 * MIB, 64 * MIB)
REPEATS = 7
_LATENCY_REPEATS = 200
_LIMIT_S = 10.0  # of one pull
_clock = WallClock()


class Speed(msgspec.Struct, frozen=True):
    """Copies of one size; medians."""

    num_bytes: int
    pull_gb_s: float
    plain_gb_s: float  # a copy within the memory the pages come to

    @property
    def share(self) -> float:
        """Of what memory can do."""
        return self.pull_gb_s / self.plain_gb_s


class Path(msgspec.Struct, frozen=True):
    """What was measured of one transport. `latency_s`: from asking for one page to hearing that it is here."""

    name: str
    page_bytes: int
    latency_s: float
    speeds: list[Speed]
    warning: str = ""  # a sentence, when pages take a way around


def shared_memory(page_bytes: int) -> Path:
    """Measure the shared-memory transport with two ends in this process: the same mappings and copies as between two.

    Raises DisaggError when a pull fails, HandshakeError when the pages cannot be opened.
    """
    from disagg.transfer.shm import SharedMemoryTransport

    num_pages, ended = -(-_SIZES[-1] // page_bytes), threading.Event()
    source = SharedMemoryTransport(num_pages, page_bytes)
    target = SharedMemoryTransport(num_pages, page_bytes, ended.set)
    try:
        latency_s, speeds = measure(source, target, ended, page_bytes, _SIZES, _memcpy_s)
    finally:
        target.close()
        source.close()
    return Path("shared memory", page_bytes, latency_s, speeds)


def measure(
    source: Transport,
    target: Transport,
    ended: threading.Event,
    page_bytes: int,
    sizes: Sequence[int],
    plain_copy_s: Callable[[int], float],
) -> tuple[float, list[Speed]]:
    """Latency of a page in seconds, and the speed at each size. Both ends hold the largest; `ended` is target's wake.

    `plain_copy_s` gives the seconds of an ordinary copy of so many bytes.
    """

    def pull(count: int) -> None:
        ended.clear()
        target.pull(source.address(), range(count), range(count))
        arrived = ended.wait(_LIMIT_S)
        errors = [pulled.error for pulled in target.poll() if pulled.error]
        if errors or not arrived:
            raise DisaggError(f"Pages cannot be pulled: {errors[0] if errors else f'no answer in {_LIMIT_S:g} s'}.")

    target.connect(source.address())
    pull(max(1, sizes[-1] // page_bytes))  # what is done once
    latency_s = median(lambda: pull(1), _LATENCY_REPEATS)
    speeds = []
    for size in sizes:
        count = max(1, size // page_bytes)
        moved = count * page_bytes
        pulling = median(lambda count=count: pull(count), REPEATS)  # type: ignore[misc]
        speeds.append(Speed(moved, moved / pulling / 1e9, moved / plain_copy_s(moved) / 1e9))
    return latency_s, speeds


def _memcpy_s(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    return median(lambda: np.copyto(target, source), REPEATS)


def median(action: Callable[[], None], repeats: int) -> float:
    """Seconds an action usually takes."""
    times = []
    for _ in range(repeats):
        start = _clock.now()
        action()
        times.append(_clock.now() - start)
    return statistics.median(times)
