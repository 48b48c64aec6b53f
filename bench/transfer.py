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
REPEATS = 25


def beside_memcpy(num_pages: int) -> dict[str, float]:
    """GB/s of memcpy, of a pull of neighbouring pages and of scattered ones: taken in turn, the best of each.

    In turn, because this machine's memory bandwidth changes by a factor of two within seconds.
    """
    ended = threading.Event()
    source, target = (SharedMemoryTransport(2 * num_pages, PAGE_BYTES, ended.set) for _ in range(2))
    pages = list(range(num_pages))
    plain, copy = (np.ones(num_pages * PAGE_BYTES, np.uint8) for _ in range(2))

    def pull(theirs: list[int]) -> None:
        ended.clear()
        target.pull(source.address(), theirs, pages)
        ended.wait()
        target.poll()

    source.pages[:] = 1
    target.connect(source.address())
    ways = {
        "memcpy": lambda: np.copyto(copy, plain),
        "pull": lambda: pull(pages),
        "scattered": lambda: pull([2 * page for page in pages]),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    target.close()
    source.close()
    return {name: num_pages * PAGE_BYTES / seconds / 1e9 for name, seconds in best.items()}


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
        num_bytes = tokens // 16 * PAGE_BYTES
        found = beside_memcpy(tokens // 16)
        rows.append({"tokens": tokens, "gb_s": found})
        rates = "".join(f"{found[way]:12.1f}{found[way] / found['memcpy']:8.0%}" for way in ("pull", "scattered"))
        print(f"{tokens:8}{num_bytes / 1e6:8.1f}{found['memcpy']:14.1f}{rates}{num_bytes / found['pull'] / 1e6:10.2f}")
    felt = stall(128)
    print("\na step, ms: " + ", ".join(f"{name.replace('_', ' ')} {ms:.2f}" for name, ms in felt.items()))
    print(json.dumps({"benchmark": "transfer", "rows": rows, "step_ms": felt}))


if __name__ == "__main__":
    main()
