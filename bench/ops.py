"""How fast the CPU operations are, beside what the machine allows: a table, then one JSON line.

    python bench/ops.py [--dtype float16] [--threads 1 2] [--repeats 15] [--page-size 16]

Shapes are SmolLM2-135M's (30 layers, hidden 576, 9 query and 3 key heads of 64, MLP 1536, vocabulary 49,152) with
random weights; a step is decoder, final norm and logits. The limit of each line is max(bytes / bandwidth,
FLOP / peak). Bandwidth (reading 512 MB) and peak (the better of torch's 1024^3 sgemm and our own product of matrices
that stay in cache) are measured in the same run, before and after, and the better is taken: on a shared machine they
move by a factor of two.
Times are the best and the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from disagg.model.ops import LayerWeights, Ops, Rope, Step, pick_ops

LAYERS, HIDDEN, HEADS, KV_HEADS, SIZE, WIDTH, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
QKV = (HEADS + 2 * KV_HEADS) * SIZE
LAYER_WEIGHTS = QKV * HIDDEN + HIDDEN * HEADS * SIZE + 3 * WIDTH * HIDDEN
STEPS = {"decode 1": [(1, 128)], "decode 8": [(1, 128)] * 8, "decode 32": [(1, 128)] * 32,
         "prefill 512": [(512, 512)], "prefill 2048": [(2048, 2048)]}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One measurement; num_bytes and flop are the least that any implementation must move and compute."""

    name: str
    threads: int
    rows: int
    num_bytes: float
    flop: float
    best_s: float
    median_s: float

    def limit_s(self, bandwidth: float, peak: float) -> float:
        """Seconds below which this machine cannot go."""
        return max(self.num_bytes / bandwidth, self.flop / peak)


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--page-size", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    ops, results = pick_ops("cpu", getattr(torch, args.dtype)), []
    step_of = build_model(ops)
    weight_bytes = 2 if args.dtype == "float16" else 4
    for threads in args.threads:
        torch.set_num_threads(threads)
        before = machine()
        lines = [
            *measure_ops(ops, threads, args.repeats, args.page_size),
            *measure_steps(step_of, threads, weight_bytes, args.repeats, args.page_size),
        ]
        bandwidth, peak = (max(pair) for pair in zip(before, machine(), strict=True))
        print_table(lines, bandwidth, peak)
        results += [asdict(line) | {"limit_s": line.limit_s(bandwidth, peak)} for line in lines]
    print(json.dumps({"dtype": args.dtype, "page_size": args.page_size, "lines": results}))


def best_of(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(best, median) seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times)


def machine() -> tuple[float, float]:
    """(bytes/s of reading, FLOP/s of multiplying) with the current number of threads."""
    big, square, rows = torch.ones(128 << 20), torch.randn(1024, 1024), torch.randn(480, 480)
    read_s, _ = best_of(lambda: big.sum(), 5)
    multiply_s, _ = best_of(lambda: square @ square, 10)
    cached = pick_ops("cpu").linear(torch.randn(192, 480))
    ours_s, _ = best_of(lambda: [cached(rows) for _ in range(20)], 10)
    return big.nbytes / read_s, max(2 * 1024**3 / multiply_s, 20 * 2 * 480 * 480 * 192 / ours_s)


def make_step(sequences: list[tuple[int, int]], page_size: int) -> tuple[Step, int]:
    """A Step of (new tokens, context) pairs of equal context on consecutive pages, and the number of pages."""
    per = -(-sequences[0][1] // page_size)
    new, context = sequences[0]
    positions = torch.arange(context - new, context).repeat(len(sequences))
    owner = torch.arange(len(sequences)).repeat_interleave(new)
    starts = torch.arange(0, new * len(sequences) + 1, new, dtype=torch.int32)
    step = Step(
        tokens=torch.zeros(len(positions), dtype=torch.int64),
        positions=positions,
        slots=owner * per * page_size + positions,
        query_start=starts,
        context_len=torch.full((len(sequences),), context, dtype=torch.int32),
        page_table=torch.arange(per * len(sequences), dtype=torch.int32).view(-1, per),
        last=starts[1:].long() - 1,
    )
    return step, per * len(sequences)


def make_rope() -> Rope:
    """Tables for 4,096 positions."""
    angles = torch.outer(torch.arange(4096), 10_000 ** (-torch.arange(0, SIZE, 2) / SIZE))
    return Rope(angles.cos(), angles.sin())


def build_model(ops: Ops) -> Callable[[Tensor, Step, Tensor], Tensor]:
    """hidden, step, pages -> logits; random weights, 30 layers."""

    def layer() -> LayerWeights:
        shapes = (QKV, HIDDEN), (HIDDEN, HEADS * SIZE), (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
        qkv, out, gate_up, down = (torch.randn(shape) * 0.02 for shape in shapes)
        return LayerWeights(torch.ones(HIDDEN), qkv, out, torch.ones(HIDDEN), gate_up, down)

    decoder = ops.decoder([layer() for _ in range(LAYERS)], make_rope(), 1e-5)
    head, norm = ops.linear(torch.randn(VOCAB, HIDDEN) * 0.02), torch.ones(HIDDEN)

    def step_of(hidden: Tensor, step: Step, pages: Tensor) -> Tensor:
        hidden = decoder(hidden, step, pages)[step.last]
        return head(ops.add_rms_norm(hidden, None, norm, 1e-5)[0])

    return step_of


def attention_work(sequences: list[tuple[int, int]]) -> tuple[float, float]:
    """(bytes, FLOP) of one layer's attention: K and V read once per sequence; two products per visible key."""
    pairs = sum(new * (2 * context - new + 1) / 2 for new, context in sequences)
    return 8.0 * KV_HEADS * SIZE * sum(c for _, c in sequences), 4.0 * HEADS * SIZE * pairs


def measure_steps(
    step_of: Callable[[Tensor, Step, Tensor], Tensor], threads: int, weight_bytes: int, repeats: int, page_size: int
) -> Iterator[Line]:
    """The whole step at every batch."""
    for name, sequences in STEPS.items():
        step, num_pages = make_step(sequences, page_size)
        rows = len(step.tokens)
        hidden, pages = torch.randn(rows, HIDDEN), torch.randn(num_pages, LAYERS, 2, KV_HEADS, page_size, SIZE)
        few = repeats if rows <= 32 else max(2, repeats // (rows // 128))
        best, median = best_of(lambda: step_of(hidden, step, pages), few)  # noqa: B023 - called before the next turn
        moved, flop = attention_work(sequences)
        num_bytes = LAYERS * (moved + LAYER_WEIGHTS * weight_bytes) + VOCAB * HIDDEN * weight_bytes
        flop = LAYERS * (flop + 2.0 * rows * LAYER_WEIGHTS) + 2.0 * len(sequences) * VOCAB * HIDDEN
        yield Line(f"step {name}", threads, rows, num_bytes, flop, best, median)


def measure_ops(ops: Ops, threads: int, repeats: int, page_size: int) -> Iterator[Line]:
    """Each operation as a call of its own. Repeats find their data in the cache, so these limits count FLOP only."""
    linear, norm, rope = ops.linear(torch.randn(2 * WIDTH, HIDDEN)), torch.ones(HIDDEN), make_rope()
    for sequences in ([(1, 128)], [(1, 128)] * 8, [(1, 128)] * 32, [(512, 512)]):
        step, num_pages = make_step(sequences, page_size)
        rows = len(step.tokens)
        x, qkv, gate_up = (torch.randn(rows, width) for width in (HIDDEN, QKV, 2 * WIDTH))
        q, pages = torch.randn(rows, HEADS, SIZE), torch.randn(num_pages, 1, 2, KV_HEADS, page_size, SIZE)
        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "linear 3072 x 576": (4.0 * rows * WIDTH * HIDDEN, lambda: linear(x)),  # noqa: B023
            "attend": (attention_work(sequences)[1], lambda: ops.attend(q, 0, pages, step, 0.125)),  # noqa: B023
            "rotate_and_store": (0.0, lambda: ops.rotate_and_store(qkv, step, 0, pages, rope)),  # noqa: B023
            "add_rms_norm": (0.0, lambda: ops.add_rms_norm(x, x, norm, 1e-5)),  # noqa: B023
            "silu_mul": (0.0, lambda: ops.silu_mul(gate_up)),  # noqa: B023
        }
        for name, (flop, call) in calls.items():
            yield Line(f"{name}, {rows} rows", threads, rows, 0.0, flop, *best_of(call, repeats))


def print_table(lines: list[Line], bandwidth: float, peak: float) -> None:
    """Milliseconds, rows per second and share of the limit."""
    print(f"\n{lines[0].threads} threads: reads {bandwidth / 1e9:.1f} GB/s, sgemm {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':28}{'best ms':>10}{'median ms':>11}{'rows/s':>10}{'GFLOP/s':>9}{'limit ms':>10}{'of limit':>10}")
    for line in lines:
        limit = line.limit_s(bandwidth, peak)
        share = f"{limit / line.best_s:>10.0%}" if limit else f"{'':>10}"
        print(
            f"{line.name:28}{line.best_s * 1e3:10.3f}{line.median_s * 1e3:11.3f}{line.rows / line.best_s:10.0f}"
            f"{line.flop / line.best_s / 1e9:9.1f}{limit * 1e3:10.3f}{share}"
        )


if __name__ == "__main__":
    main()
