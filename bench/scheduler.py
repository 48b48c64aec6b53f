"""How many steps per second the scheduler can plan and commit on one core: the ceiling of any engine built on it.

A steady decode batch; every request gets one token a step and, while it grows, a page every 16 steps. `plan` alone is
what stands between two steps when planning is not overlapped with the device.

    PYTHONPATH=src python bench/scheduler.py
"""

import json
import time
from typing import Any

from disagg.cache.pages import PagePool
from disagg.engine.batch import Output
from disagg.engine.scheduler import Scheduler
from disagg.request import Request, SamplingParams

PAGE_SIZE = 16
PROMPT_LEN = 64
REPEATS = 5


def steady(size: int, *, page_size: int, prefix_caching: bool, num_steps: int) -> Scheduler:
    """A scheduler that is decoding `size` requests, none of which ends within `num_steps`."""
    max_tokens = num_steps + 16
    num_pages = size * -(-(PROMPT_LEN + max_tokens) // page_size)
    scheduler = Scheduler(
        PagePool(num_pages, page_size),
        max_batch_tokens=size * PROMPT_LEN,
        max_running=size,
        max_len=PROMPT_LEN + max_tokens,
        prefix_caching=prefix_caching,
    )
    params = SamplingParams(max_tokens=max_tokens)
    for number in range(size):
        prompt = [number * PROMPT_LEN + position for position in range(PROMPT_LEN)]
        scheduler.add(Request(f"r{number}", PROMPT_LEN, prompt, params, frozenset({-1}), float(number)))
    prefill = scheduler.plan()
    assert prefill is not None
    scheduler.commit(prefill, Output([7] * size, [None] * size))
    return scheduler


def measure(size: int, *, growing: bool, prefix_caching: bool) -> tuple[float, float]:
    """Steps per second (plan and commit, plan alone), best of REPEATS: the machine's noise only ever slows."""
    num_steps = max(400, 64_000 // size)
    both, plan_only = float("inf"), float("inf")
    output = Output([7] * size, [None] * size)
    for _ in range(REPEATS):
        page_size = PAGE_SIZE if growing else PROMPT_LEN + num_steps + 16
        scheduler = steady(size, page_size=page_size, prefix_caching=prefix_caching, num_steps=num_steps)
        planning = 0.0
        begin = time.perf_counter()
        for _ in range(num_steps // 2):
            batch = scheduler.plan()
            assert batch is not None
            scheduler.commit(batch, output)
        both = min(both, (time.perf_counter() - begin) / (num_steps // 2))
        for _ in range(num_steps // 2):
            before = time.perf_counter()
            batch = scheduler.plan()
            planning += time.perf_counter() - before
            assert batch is not None
            scheduler.commit(batch, output)
        plan_only = min(plan_only, planning / (num_steps // 2))
    return 1 / both, 1 / plan_only


def main() -> None:
    """Print the table, then one JSON line."""
    kinds = {"fixed pages": (False, False), "growing": (True, False), "growing, prefix cache": (True, True)}
    rows: list[dict[str, Any]] = []
    print(f"{'batch':>5}  {'pages':<22} {'plan+commit /s':>15} {'plan /s':>12} {'ns per request':>15}")
    for size in (1, 8, 32, 128, 256):
        for name, (growing, prefix_caching) in kinds.items():
            both, plan_only = measure(size, growing=growing, prefix_caching=prefix_caching)
            print(f"{size:>5}  {name:<22} {both:>15,.0f} {plan_only:>12,.0f} {1e9 / both / size:>15,.0f}")
            rows.append({"batch": size, "pages": name, "steps_per_s": round(both), "plans_per_s": round(plan_only)})
    print(json.dumps({"bench": "scheduler", "page_size": PAGE_SIZE, "rows": rows}))


if __name__ == "__main__":
    main()
