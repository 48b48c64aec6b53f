"""The hand-off's copy between two processes on GPUs, beside a plain copy, and what a decode step feels of it.

A second process owns a pool of pages; this one maps it (transfer/cuda_ipc.py) and pulls prompts of several lengths:
in one piece, in runs of 16 pages, and with no two pages neighbours. With one GPU both pools lie on it; with two, the
pages cross the link as well. Every pull's bytes are checked before any time is taken.

The second part replays a CUDA graph of Qwen3-8B's matrix products for 32 tokens, as a decoding worker does, alone and
with a 2,048-token prompt pulled now and then, in turns: the difference is the stall.

    python bench/gpu_transfer.py [--pages 128] [--page-bytes 2359296] [--owners 1] [--out FILE]

prints tables, then one JSON line, which --out keeps. A page of 2359296 bytes is 16 tokens of Qwen3-8B in bf16.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from disagg.transfer.cuda_driver import driver
from disagg.transfer.cuda_ipc import CudaIpcTransport

HOME = 0  # the GPU that pulls
PATTERNS = ("one piece", "runs of 16", "scattered")
REPEATS, STEPS, STEPS_A_PULL = 20, 400, 4
LAYERS, ROWS = 36, 32
SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))  # of a layer of Qwen3-8B: qkv, out, gate_up, down


def own(device: int, num_pages: int, page_bytes: int) -> None:
    """The other process: hold a pool whose page p holds p % 251, until standard input ends."""
    torch.cuda.set_device(device)
    transport = CudaIpcTransport(num_pages, page_bytes, device)
    transport.pages[:] = (torch.arange(num_pages, device=device) % 251).to(torch.uint8)[:, None]
    torch.cuda.synchronize()
    print(transport.address(), flush=True)
    sys.stdin.read()
    transport.close()


class Reader:
    """Our pool, and a peer's to pull from."""

    def __init__(self, device: int, num_pages: int, page_bytes: int) -> None:
        arguments = [str(number) for number in (device, num_pages, page_bytes)]
        command = [sys.executable, __file__, "--own", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        self.ended = threading.Event()
        self.transport = CudaIpcTransport(num_pages, page_bytes, HOME, self.ended.set)
        self.transport.connect(self.address)

    def pull(self, theirs: list[int], ours: list[int]) -> tuple[float, float, float]:
        """Seconds on the device, until its end was known here, and of the call itself."""
        self.ended.clear()
        start = time.perf_counter()
        self.transport.pull(self.address, theirs, ours)
        called = time.perf_counter()
        self.ended.wait()
        arrived = time.perf_counter()
        (pulled,) = self.transport.poll()
        assert not pulled.error, pulled.error
        return pulled.end_at - pulled.start_at, arrived - start, called - start

    def check(self, theirs: list[int], ours: list[int]) -> None:
        """Every byte of a pull, on poisoned pages."""
        pages = self.transport.pages
        pages.fill_(255)
        torch.cuda.synchronize()
        self.pull(theirs, ours)
        wanted = (torch.tensor(theirs, device=HOME) % 251).to(torch.uint8)
        for first in range(0, len(ours), 64):  # in parts: a comparison makes a tensor of the same size
            part = pages[ours[first : first + 64]]
            assert (part == wanted[first : first + 64, None]).all(), "a page arrived wrong"
        untouched = sorted(set(range(len(pages))) - set(ours))[:64]
        assert (pages[untouched] == 255).all(), "a page was written that was not asked for"

    def close(self) -> None:
        """Let both ends go."""
        self.transport.close()
        self.process.stdin.close()
        self.process.wait(60)


def numbers(pattern: str, count: int) -> tuple[list[int], list[int]]:
    """Page numbers there and here, in pools of 2 * count pages."""
    if pattern == "one piece":
        return list(range(count)), list(range(count))
    piece = 16 if pattern == "runs of 16" else 1
    starts = np.arange(0, count, piece) * 2
    theirs = (starts[:, None] + np.arange(piece)).ravel()[:count].tolist()
    ours = (starts[::-1, None] + np.arange(piece)).ravel()[:count].tolist()
    return theirs, ours


def plain_copy_s(device: int, num_bytes: int) -> float:
    """One torch copy of that size in one process, on the device's clock: what the hardware does at best."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{device}").random_()
    target = torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{HOME}")
    times = []
    for _ in range(REPEATS):
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begun.record()
        target.copy_(source)
        done.record()
        done.synchronize()
        times.append(begun.elapsed_time(done) / 1e3)
    return float(np.median(times))


def copies(reader: Reader, device: int, counts: list[int], page_bytes: int) -> list[dict]:
    """A row for every length and pattern; scattered pages also with one call of the driver a page."""
    rows = []
    ways = [(pattern, True) for pattern in PATTERNS] + [("scattered", False)]
    for count in counts:
        limit = plain_copy_s(device, count * page_bytes)
        for pattern, batch in ways:
            if batch and not driver().can_batch:
                continue
            can_batch, driver().can_batch = driver().can_batch, batch
            pages = numbers(pattern, count)
            try:
                reader.check(*pages)
            except AssertionError as error:
                print(f"{pattern}, {'one call' if batch else 'a call a page'}: {error}")
                driver().can_batch = can_batch and not batch
                continue
            taken = np.array([reader.pull(*pages) for _ in range(REPEATS)])
            driver().can_batch = can_batch
            copied, arrived, called = np.median(taken, 0)
            rows.append({
                "pages": count, "mb": count * page_bytes / 1e6, "pattern": pattern, "one_call": batch,
                "copy_ms": copied * 1e3, "gb_s": count * page_bytes / copied / 1e9, "arrived_ms": arrived * 1e3,
                "worst_arrived_ms": taken[:, 1].max() * 1e3, "call_us": called * 1e6, "plain_copy_ms": limit * 1e3,
            })  # fmt: skip
    return rows


def decode_graph() -> torch.cuda.CUDAGraph:
    """36 layers of matrix products: 13.9 GB of weights read a step, as a decode step of Qwen3-8B does."""
    weights = [torch.randn(*shape, device=HOME, dtype=torch.bfloat16) for _ in range(LAYERS) for shape in SHAPES]
    inputs = {width: torch.randn(ROWS, width, device=HOME, dtype=torch.bfloat16) for width in (4096, 12288)}

    def step() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def stall(reader: Reader, graph: torch.cuda.CUDAGraph, count: int) -> dict:
    """Step times alone and with a pull at every STEPS_A_PULL-th step, in turns.

    The stall of a pull is how much longer its step took than the steps without (the mean; else their median). Whether
    later steps feel it, too, is in the median of `beside`: most of those steps have no pull.
    """
    pages = numbers("scattered", count)
    done = torch.cuda.Event()

    def steps(pulling: bool) -> list[float]:
        times = []
        for index in range(STEPS // 4):
            start = time.perf_counter()
            if pulling and index % STEPS_A_PULL == 0:
                reader.transport.pull(reader.address, *pages)
            graph.replay()
            done.record()
            done.synchronize()
            reader.transport.poll()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    steps(True)
    alone, beside = [], []
    for _ in range(4):
        alone += steps(False)
        beside += steps(True)
    found = {}
    for name, times in (("alone", alone), ("beside", beside)):
        found |= {f"{name}_{key}_ms": value for key, value in zip(
            ("p50", "p99", "max"), [*np.percentile(times, [50, 99]).tolist(), max(times)], strict=True
        )}  # fmt: skip
    hit = [time for index, time in enumerate(beside) if index % (STEPS // 4) % STEPS_A_PULL == 0]
    late = np.array(hit) - found["alone_p50_ms"]
    found["pulls"] = len(hit)
    found["stall_mean_ms"] = float(np.mean(hit) - np.mean(alone))
    found["stall_p50_ms"], found["stall_p99_ms"] = np.percentile(late, [50, 99]).tolist()
    found["stall_worst_ms"] = late.max().item()
    return found


def measure(device: int, counts: list[int], stalled: int, page_bytes: int) -> dict:
    where = "one GPU" if device == HOME else f"GPU {device} to GPU {HOME}"
    reader = Reader(device, 2 * max(counts), page_bytes)
    path = reader.transport.path(reader.address)
    print(f"\n{where} (path: {path}), two processes")
    heads = (("MB", 8), ("pages", 14), ("calls", 7), ("copy ms", 10), ("GB/s", 8), ("arrived ms", 12), ("worst", 8))
    print("".join(f"{name:>{width}}" for name, width in (*heads, ("call us", 9), ("plain copy ms", 15))))
    rows = copies(reader, device, counts, page_bytes)
    for row in rows:
        calls = "one" if row["one_call"] else "many"
        print(
            f"{row['mb']:8.1f}{row['pattern']:>14}{calls:>7}{row['copy_ms']:10.3f}{row['gb_s']:8.0f}"
            f"{row['arrived_ms']:12.3f}{row['worst_arrived_ms']:8.3f}{row['call_us']:9.1f}{row['plain_copy_ms']:15.3f}"
        )
    felt = stall(reader, decode_graph(), stalled)
    for kind in ("alone", "beside", "stall"):
        shown = (f"{name.removeprefix(kind)[1:-3]} {ms:.3f}" for name, ms in felt.items() if name.startswith(kind))
        print(f"decode step, ms, {kind}: {', '.join(shown)}" + (f" over {felt['pulls']} pulls" * (kind == "stall")))
    reader.close()
    torch.cuda.empty_cache()
    return {"where": where, "path": path, "copies": rows, "decode": felt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=128, help="of the middle length; a fourth and four times as many")
    parser.add_argument("--page-bytes", type=int, default=2_359_296)
    parser.add_argument("--owners", type=int, nargs="+", help="GPUs to pull from (default: 0, and 1 if it is there)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--own", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own:
        own(*options.own)
        return
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing to measure.")
        return
    torch.cuda.set_device(HOME)
    counts = [max(1, options.pages // 4), options.pages, options.pages * 4]
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    print(f"{len(names)} x {names[0]}, torch {torch.__version__}, one call for many pages: {driver().can_batch}")
    owners = options.owners or range(min(2, len(names)))
    places = [measure(device, counts, options.pages, options.page_bytes) for device in owners]
    found = {
        "benchmark": "gpu_transfer", "devices": names, "torch": torch.__version__, "page_bytes": options.page_bytes,
        "batch_call": driver().can_batch, "command": " ".join(sys.argv), "places": places,
    }  # fmt: skip
    line = json.dumps(found)
    print(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
