"""How long one forward pass of a model takes on a GPU.

    python bench/gpu_model.py [--model M] [--dtype fp8] [--profile] [--out FILE]

Random weights, drawn on the device. Decoding is a CUDA graph at contexts of 256 tokens; prompts run without one, as the
engine runs those of more than 512 tokens; neither scheduling nor sampling is in it. Beside each time stands the limit:
weights and cache read once at the speed of the device's memory, or the arithmetic at that of a large product, both
measured first. --profile adds the time of each kernel. --no-early starts every kernel after the one before has ended.
The last line of output is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_limits import Limits
from gpu_ops import DTYPE, MODELS, PAGE_SIZE, ceilings, graph_ms, make_step

from disagg.model.decoder import Decoder
from disagg.model.fp8 import FP8
from disagg.model.ops import Step, pick_ops
from disagg.model.spec import ModelSpec, RopeSpec
from disagg.model.weights import Place, from_seed

CONTEXT = 256
SPECS = {
    name: ModelSpec(
        family="qwen3", vocab_size=shape.vocab, hidden_size=shape.hidden, num_layers=shape.layers,
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.size, intermediate_size=shape.mlp,
        max_len=8192, rope=RopeSpec(theta=1e6), qk_norm=True, tied=shape.tied,
    )
    for name, shape in MODELS.items()
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SPECS), action="append")
    parser.add_argument("--dtype", choices=["bfloat16", "fp8"], default="bfloat16")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-early", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing to time.")
        return
    if args.no_early:
        _start_late()
    bandwidth, peak = ceilings()
    print(f"ceilings: {bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s")
    results = {name: measure(name, args.dtype == "fp8", args.profile, bandwidth, peak) for name in args.model or SPECS}
    text = json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": args.dtype,
                       "bandwidth": bandwidth, "peak": peak, "models": results})  # fmt: skip
    if args.out:
        args.out.write_text(text)
    print(text)


def _start_late() -> None:
    from disagg.model import ops_cuda_decode, ops_cuda_linear, ops_cuda_prefill, ops_cuda_rows

    for module in (ops_cuda_decode, ops_cuda_linear, ops_cuda_prefill, ops_cuda_rows):
        module.overlaps = lambda device: False


@torch.inference_mode()
def measure(name: str, eight_bits: bool, profiled: bool, bandwidth: float, peak: float) -> dict[str, float]:
    """Milliseconds by what was timed."""
    spec = SPECS[name]
    begin = time.perf_counter()
    model = Decoder(spec, from_seed(spec, 42, Place("cuda", DTYPE)), pick_ops("cuda", FP8 if eight_bits else DTYPE))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    found = {"load_s": time.perf_counter() - begin, "memory_gib": torch.cuda.memory_allocated() / 2**30}
    print(f"\n{name}: loaded in {found['load_s']:.1f} s, {found['memory_gib']:.1f} GiB")
    at_best = Limits(spec, eight_bits, bandwidth, peak)
    for batch in (1, 8, 32, 128):
        step, pages = _inputs(spec, [(1, CONTEXT)] * batch)
        found[f"decode_{batch}"] = graph_ms([lambda: model.forward(step, pages)] * 2, 20)  # noqa: B023
        _print(f"decode, batch {batch}", found[f"decode_{batch}"], at_best.decode_s(batch, CONTEXT), batch)
        if profiled:
            graph = _captured(lambda: model.forward(step, pages))  # noqa: B023
            _profile(graph.replay, found[f"decode_{batch}"])
    for count, length in ((1, 128), (1, 512), (1, 2048), (4, 2048), (1, 8192)):
        step, pages = _inputs(spec, [(length, length)] * count)
        found[f"prefill_{count}x{length}"] = ms = eager_ms(lambda: model.forward(step, pages))  # noqa: B023
        limit = at_best.prefill_s(length, count)
        _print(f"prefill, {count} x {length}", ms, limit, count * length)
        if profiled and count * length > 2048:
            _profile(lambda: model.forward(step, pages), ms)  # noqa: B023
    return found


def _inputs(spec: ModelSpec, sequences: list[tuple[int, int]]) -> tuple[Step, torch.Tensor]:
    step, num_pages = make_step(sequences)
    step.tokens.random_(spec.vocab_size)
    last = None if sequences[0][0] == 1 else step.query_start[1:].long() - 1
    pages = torch.empty(
        num_pages, spec.num_layers, 2, spec.num_kv_heads, PAGE_SIZE, spec.head_dim, dtype=DTYPE, device="cuda"
    )
    return Step(**(vars(step) | {"last": last})), pages.normal_()


def eager_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call from an idle device to an idle device, host included: median of five."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[2:])


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _print(what: str, ms: float, limit_s: float, tokens: int) -> None:
    limit = limit_s * 1e3
    print(
        f"{what:22}{ms:9.3f} ms, limit {limit:8.3f} ms ({limit / ms:4.0%}), {tokens / ms * 1e3:9.0f} tok/s", flush=True
    )


def _profile(call: Callable[[], object], ms: float) -> None:
    """Time by kernel. Kernels that start early overlap, so their sum may be more than the whole."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events) / 3e3
    print(f"    {total:.3f} ms in kernels of {ms:.3f} ms")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:14]:
        share = event.self_device_time_total / 3e3
        each = event.self_device_time_total / event.count
        print(f"    {share:8.3f} ms {event.count // 3:5} x {each:8.1f} us  {event.key[:90]}")


if __name__ == "__main__":
    main()
