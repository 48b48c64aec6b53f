"""The hand-off's copy beside memcpy, and what a decode step feels of it.

A pull is a copy between two shared mappings, so its ceiling is memcpy on the same core. The second table runs a fixed
piece of arithmetic over and over, alone and while pulls of a 2,048-token prompt go on beside it on the same core:
the difference is what a decoding worker feels.

    python bench/transfer.py

prints two tables, then one JSON line.
"""

import json
import os
import threading
import time

import numpy as np

from disagg.transfer.shm import SharedMemoryTransport

PAGE_BYTES = 16 * 46_080  # SmolLM2-135M, 16 tokens a page, float32
REPEATS = 7


def memcpy_gb_s(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    target[:] = source
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return num_bytes / min(times) / 1e9


def pulls(num_pages: int, scattered: bool) -> dict[str, float]:
    ended = threading.Event()
    source, target = (SharedMemoryTransport(2 * num_pages, PAGE_BYTES, ended.set) for _ in range(2))

    def pull_once() -> float:
        ended.clear()
        start = time.perf_counter()
        target.pull(source.address(), theirs, pages)
        ended.wait()
        seconds = time.perf_counter() - start
        target.poll()
        return seconds

    source.pages[:] = 1
    target.connect(source.address())
    pages = list(range(num_pages))
    theirs = [2 * page for page in pages] if scattered else pages
    seconds = min(pull_once() for _ in range(REPEATS))
    target.close()
    source.close()
    return {"ms": seconds * 1e3, "gb_s": num_pages * PAGE_BYTES / seconds / 1e9}


def stall(num_pages: int) -> dict[str, float]:
    """Milliseconds of a step of some ms, median and 99th percentile, alone and beside pulls without a pause.

    Pinned to one core as a worker is, the copying thread too: a step may last longer, since the core is shared while
    a copy goes on, but it never waits for the end of one.
    """
    source, target = (SharedMemoryTransport(num_pages, PAGE_BYTES) for _ in range(2))
    target.connect(source.address())
    pages = list(range(num_pages))
    work = np.ones((2400, 2400), np.float32)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def steps(beside: bool) -> list[float]:
        times = []
        for _ in range(150):
            if beside and (target.poll() or not times):
                target.pull(source.address(), pages, pages)
            start = time.perf_counter()
            work.sum(axis=0)
            work.sum(axis=1)
            times.append((time.perf_counter() - start) * 1e3)
        return times

    alone, beside = steps(False), steps(True)
    target.close()
    source.close()
    found = {}
    for name, times in (("alone", alone), ("beside", beside)):
        found[f"{name}_p50_ms"], found[f"{name}_p99_ms"] = np.percentile(times, [50, 99]).tolist()
    return found


def main() -> None:
    print(f"{os.cpu_count()} cores; a page is {PAGE_BYTES / 1e3:.0f} kB\n")
    heads = (("tokens", 8), ("MB", 8), ("memcpy GB/s", 14), ("pull GB/s", 12), ("share", 8), ("scattered", 12))
    print("".join(f"{name:>{width}}" for name, width in (*heads, ("share", 8), ("pull ms", 10))))
    rows = []
    for tokens in (128, 512, 2048):
        num_pages = tokens // 16
        ceiling = memcpy_gb_s(num_pages * PAGE_BYTES)
        whole, scattered = pulls(num_pages, False), pulls(num_pages, True)
        rows.append({"tokens": tokens, "memcpy_gb_s": ceiling, "pull": whole, "scattered": scattered})
        rates = "".join(f"{each['gb_s']:12.1f}{each['gb_s'] / ceiling:8.0%}" for each in (whole, scattered))
        print(f"{tokens:8}{num_pages * PAGE_BYTES / 1e6:8.1f}{ceiling:14.1f}{rates}{whole['ms']:10.2f}")
    felt = stall(128)
    print("\na step, ms: " + ", ".join(f"{name.replace('_', ' ')} {ms:.2f}" for name, ms in felt.items()))
    print(json.dumps({"benchmark": "transfer", "rows": rows, "step_ms": felt}))


if __name__ == "__main__":
    main()
