"""The engine on one GPU, in this process, without server or cluster: what a worker's loop can do at best.

Qwen3 shapes with random weights, bf16 or in eight bits, by the method that vLLM 0.25.1 was timed with on the same kind
of GPU: 256 requests of 100 to 1024 tokens in and out (seed 0) at temperature 0.6; decode from a context of 128 for 256
tokens; prefill alone. Its numbers stand beside ours: those of this machine (--peer-log), or else of another one. So
does the limit: decode reads every weight once a step, prefill does two FLOPs per weight and token.

    python bench/gpu_engine.py --model qwen3-8b [--dtype fp8] [--out FILE] [--peer-log FILE] [--profile] [--check-only]
    python bench/gpu_engine.py --dry-run     # a tiny model on the CPU: no numbers, all of the code but the kernels

First it checks that steps launched ahead as CUDA graphs give the tokens of steps run one by one without graphs, in the
same batch shapes. Prints a table, then one JSON line.
"""

import argparse
import json
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_limits import Limits
from gpu_ops import ceilings

from disagg.cache.pages import PagePool
from disagg.cache.storage import KVStorage
from disagg.clock import WallClock
from disagg.engine.batch import Batch, Output
from disagg.engine.draw import Choice
from disagg.engine.engine import Engine
from disagg.engine.runner_cuda import CudaRunner
from disagg.engine.scheduler import Scheduler
from disagg.model.load import Loaded, load_model
from disagg.request import Request, SamplingParams

PAGE_SIZE = 16
SPARE_BYTES = 6 << 30  # for activations and graphs

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "max_position_embeddings": 40_960,
    "vocab_size": 151_936, "eos_token_id": 151_645, "bos_token_id": 151_643, "hidden_act": "silu",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "tiny": _QWEN3 | {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "eos_token_id": 1, "bos_token_id": 0,
    },
}  # fmt: skip
PEER_LINES = {
    r"bench \d+ tok [\d.]+ s ([\d.]+) tok/s": "256 requests, tok/s",
    r"decode B (\d+) TPOT ms ([\d.]+)": "decode {}, ms",
    r"prefill 1x (\d+) ms ([\d.]+)": "prefill 1x{}, ms",
    r"prefill 32x2048 tok/s ([\d.]+)": "prefill 32x2048, tok/s",
}
VLLM: dict[str, dict[str, float]] = {
    "qwen3-8b": {
        "decode 1, ms": 6.82, "decode 8, ms": 7.00, "decode 32, ms": 7.43, "decode 128, ms": 9.48,
        "256 requests, tok/s": 8082, "prefill 1x128, ms": 14.1, "prefill 1x512, ms": 16.3, "prefill 1x2048, ms": 50.0,
        "prefill 1x3968, ms": 102.3, "prefill 32x2048, tok/s": 42_630,
    },
    "qwen3-0.6b": {
        "decode 1, ms": 2.14, "decode 8, ms": 2.31, "decode 32, ms": 2.85, "decode 128, ms": 4.62,
        "256 requests, tok/s": 18_953, "prefill 1x128, ms": 8.9, "prefill 1x512, ms": 9.0, "prefill 1x2048, ms": 21.4,
        "prefill 1x3968, ms": 22.2, "prefill 32x2048, tok/s": 371_657,
    },
}  # fmt: skip


class Shape(NamedTuple):
    """How much is run: the method's own amounts, or next to nothing."""

    num_requests: int
    longest: int  # of prompts and outputs of the mixed run
    shortest: int
    batches: tuple[int, ...]
    new_tokens: int
    prompts: tuple[int, ...]
    many: tuple[int, int]  # prompts of so many tokens
    max_len: int


FULL = Shape(256, 1024, 100, (1, 8, 32, 128), 256, (128, 512, 2048, 3968), (32, 2048), 4096)
DRY = Shape(6, 24, 4, (1, 3), 6, (8, 20), (2, 20), 64)


class Timed(CudaRunner):
    """Counts what the host does: time spent launching, and waiting for the device."""

    steps, launching, waiting = 0, 0.0, 0.0

    def launch(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Callable[[], Output]:
        """As ever."""
        start = time.perf_counter()
        collect = super().launch(batch, shed)
        self.launching += time.perf_counter() - start
        self.steps += 1

        def wait() -> Output:
            begin = time.perf_counter()
            output = collect()
            self.waiting += time.perf_counter() - begin
            return output

        return wait


class OneByOne(CudaRunner):
    """Nothing ahead; not warmed up with sizes, it has no graphs either."""

    ahead = False


class Bench:
    """One model, its pages, and the workloads."""

    def __init__(self, model: str, shape: Shape, device: str, arguments: argparse.Namespace) -> None:
        self.shape, self.arguments, self.device = shape, arguments, device
        begin = time.perf_counter()
        self.loaded = load(model, device, arguments.dtype)
        self.load_s = time.perf_counter() - begin
        self.draw = random.Random(0)
        self.vocabulary = min(10_000, self.loaded.spec.vocab_size - 1)
        self.warm_prompt = self.prompt(64 if shape is FULL else 8)
        count, least, most = shape.num_requests, shape.shortest, shape.longest
        self.prompts = [self.prompt(self.draw.randint(least, most)) for _ in range(count)]
        self.outputs = [self.draw.randint(least, most) for _ in range(count)]
        self.storage = self._storage()
        begin, before = time.perf_counter(), in_use(device)
        self.runner = self.make(Timed)
        self.runner.warm_up()
        self.warm_up_s, self.warm_up_bytes = time.perf_counter() - begin, in_use(device) - before

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [self.draw.randint(0, self.vocabulary) for _ in range(length)]

    def make(self, kind: type[CudaRunner]) -> Any:
        """A runner over the same pages."""
        options = {"max_running": self.arguments.max_running, "max_batch_tokens": self.arguments.max_batch_tokens}
        return kind(self.loaded, self.storage, max_len=self.shape.max_len, **options)

    def _storage(self) -> KVStorage:
        """Pages for all requests at once, or as many as there is room for."""
        spec = self.loaded.spec
        dimensions = {"num_layers": spec.num_layers, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim,
                      "page_size": PAGE_SIZE, "dtype": self.loaded.kv_dtype, "device": self.device}  # fmt: skip
        mixed = sum(-(-(len(p) + n) // PAGE_SIZE) for p, n in zip(self.prompts, self.outputs, strict=True))
        number, length = self.shape.many
        decoding = max(self.shape.batches) * -(-(128 + self.shape.new_tokens) // PAGE_SIZE)
        num_pages = max(mixed, number * (-(-length // PAGE_SIZE) + 1), decoding, self.shape.max_len // PAGE_SIZE)
        if self.device == "cuda":
            page_bytes = KVStorage(num_pages=1, **dimensions).page_bytes
            num_pages = min(num_pages, (torch.cuda.mem_get_info()[0] - SPARE_BYTES) // page_bytes)
        return KVStorage(num_pages=num_pages, **dimensions)

    def run(
        self, prompts: list[list[int]], outputs: list[int], temperature: float = 0.6, runner: CudaRunner | None = None
    ) -> tuple[float, list[Request]]:
        """Seconds until all are served, and the requests."""
        runner = runner or self.runner
        scheduler = Scheduler(
            PagePool(self.storage.num_pages, PAGE_SIZE), max_batch_tokens=self.arguments.max_batch_tokens,
            max_running=self.arguments.max_running, max_len=self.shape.max_len,
        )  # fmt: skip
        engine = Engine("bench", scheduler, runner, WallClock())
        requests = []
        for n, (prompt, count) in enumerate(zip(prompts, outputs, strict=True)):
            params = SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True, seed=n)
            requests.append(Request(str(n), len(prompt), list(prompt), params, frozenset(), float(n)))
        begin = time.perf_counter()
        for request in requests:
            scheduler.add(request)
        while engine.step(lambda batch: None) is not None:
            pass
        seconds = time.perf_counter() - begin
        assert all(request.num_output == count for request, count in zip(requests, outputs, strict=True))
        return seconds, requests

    def best(self, make: Callable[[], list[list[int]]], tokens: int, repeats: int) -> float:
        """The shortest time of several runs, each with prompts of its own."""
        return min(self.run(prompts, [tokens] * len(prompts))[0] for prompts in (make() for _ in range(repeats)))

    def check(self) -> list[str]:
        """What is wrong: tokens that differ between graphs launched ahead and steps run one by one."""
        plain = self.make(OneByOne)
        plain.warm_up(sizes=())
        faults = []
        for batch in (1, 3, max(self.shape.batches)):
            for temperature in (0.0, 0.6):
                prompts = [self.prompt(48) for _ in range(batch)] if self.shape is FULL else [self.prompt(7)] * batch
                count = [min(40, self.shape.new_tokens)] * batch
                ours = [r.tokens for r in self.run(prompts, count, temperature)[1]]
                theirs = [r.tokens for r in self.run(prompts, count, temperature, plain)[1]]
                wrong = sum(a != b for a, b in zip(ours, theirs, strict=True))
                distinct = len({token for tokens in ours for token in tokens[len(prompts[0]) :]})
                print(f"check: batch {batch}, temperature {temperature}: {wrong} differ; {distinct} distinct tokens")
                if wrong:
                    faults.append(f"{wrong} of {batch} requests differ at temperature {temperature}")
        return faults

    def measure(self) -> dict[str, float]:
        """All rows of the table."""
        shape, found = self.shape, {}
        self.run([self.warm_prompt], [min(8, shape.new_tokens)])
        for _ in range(2):
            seconds = self.run(self.prompts, self.outputs)[0]
            found[f"{shape.num_requests} requests, tok/s"] = sum(self.outputs) / seconds
        for batch in shape.batches:
            prompts = lambda batch=batch: [self.prompt(min(128, shape.max_len // 2)) for _ in range(batch)]  # noqa: E731
            first = self.best(prompts, 1, 2)
            self.reset()
            rest = self.best(prompts, shape.new_tokens, 2)
            found[f"decode {batch}, ms"] = (rest - first) / (shape.new_tokens - 1) * 1e3
            self.host(found, batch)
        for length in shape.prompts:
            found[f"prefill 1x{length}, ms"] = self.best(lambda length=length: [self.prompt(length)], 1, 5) * 1e3
        number, length = shape.many
        seconds = self.best(lambda: [self.prompt(length) for _ in range(number)], 1, 2)
        found[f"prefill {number}x{length}, tok/s"] = number * length / seconds
        return found | self.draws()

    def draws(self) -> dict[str, float]:
        """Drawing alone, from random logits: at temperature 0.6, and with top-k and top-p, too."""
        runner, vocabulary, found = self.runner, self.loaded.spec.vocab_size, {}
        for batch in self.shape.batches:
            logits = torch.randn(batch, vocabulary, device=self.device) * 3
            tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
            column = torch.ones(batch, device=self.device)
            number = torch.rand(batch, dtype=torch.float64, device=self.device)
            for name, filtered in (("draw", False), ("draw filtered", True)):
                choice = Choice(column * 0.6, number, column.int() * 50, column.double() * 0.95, column * 0, filtered)
                run = partial(runner._draw, logits, choice, tokens)
                found[f"{name} {batch}, ms"] = milliseconds(run, self.device)
        return found

    def limits(self, at_best: Limits) -> dict[str, float]:
        """The same rows as far as bytes and FLOPs tell."""
        shape = self.shape
        tokens_s = sum(self.outputs) / at_best.requests_s([len(prompt) for prompt in self.prompts], self.outputs)
        found = {f"{shape.num_requests} requests, tok/s": tokens_s}
        for batch in shape.batches:
            found[f"decode {batch}, ms"] = at_best.decode_s(batch, 128 + shape.new_tokens / 2) * 1e3
        for length in shape.prompts:
            found[f"prefill 1x{length}, ms"] = at_best.prefill_s(length) * 1e3
        number, length = shape.many
        found[f"prefill {number}x{length}, tok/s"] = number * length / at_best.prefill_s(length, number)
        return found

    def reset(self) -> None:
        """Start counting the host's time."""
        self.runner.steps, self.runner.launching, self.runner.waiting = 0, 0.0, 0.0

    def host(self, found: dict[str, float], batch: int) -> None:
        """Of the host's time per step: launching, and waiting for the device. What lacks is plan and commit."""
        runner = self.runner
        found[f"host launch {batch}, ms"] = runner.launching / runner.steps * 1e3
        found[f"host wait {batch}, ms"] = runner.waiting / runner.steps * 1e3

    def profile(self) -> None:
        """The kernels of 20 decode steps at each batch size, and of one prefill."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        cases = [(batch, 128, 20) for batch in self.shape.batches] + [(4, 2048, 1)]
        for batch, length, tokens in cases if self.shape is FULL else [(2, 8, 3)]:
            prompts = [self.prompt(length) for _ in range(batch)]
            with torch.profiler.profile(activities=kinds) as seen:
                self.run(prompts, [tokens] * batch)
            print(f"\nprofile: batch {batch}, prompts of {length}, {tokens} tokens")
            print(seen.key_averages().table(sort_by=order, row_limit=18, max_name_column_width=60))


def in_use(device: str) -> int:
    """Bytes of device memory that are in use, also by the driver, which keeps the graphs."""
    free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
    return total - free


def milliseconds(run: Callable[[], Any], device: str, repeats: int = 50) -> float:
    """Of one of many runs, after some to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        run()
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - begin) / repeats * 1e3


def load(model: str, device: str, dtype: str) -> Loaded:
    """Random weights of a shape; float32 on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[model]))
        return load_model(folder, dtype=dtype if device == "cuda" else "float32", device=device, random_weights=True)


def read_peer(text: str) -> dict[str, float]:
    """vLLM's numbers from what its timing script printed, a line a row of the table; of repeated ones the last."""
    found = {}
    for line in text.splitlines():
        for pattern, name in PEER_LINES.items():
            if match := re.search(pattern, line):
                *key, value = match.groups()
                found[name.format(*key)] = float(value)
    if not found:
        sys.exit("The peer's log has none of the lines that are looked for: give what the timing script printed.")
    return found


def table(found: dict[str, float], model: str, peers: dict[str, float], bounds: dict[str, float]) -> str:
    lines = [f"{model:26}{'ours':>12}{'vLLM 0.25.1':>14}{'ours/vLLM':>11}{'limit':>12}"]
    for name, value in found.items():
        peer, bound = peers.get(name), bounds.get(name)
        ratio = "" if peer is None else f"{value / peer:.2f}"
        show = lambda number: "" if number is None else f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"  # noqa: E731
        lines.append(f"{name:26}{show(value):>12}{show(peer):>14}{ratio:>11}{show(bound):>12}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[name for name in CONFIGS if name != "tiny"], default="qwen3-8b")
    parser.add_argument("--dtype", choices=["bfloat16", "fp8"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--peer-log", type=Path, help="what vLLM's timing script printed for this model here")
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="kernels by time, after the table")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.model, arguments.max_batch_tokens, arguments.max_running = "tiny", 48, 8
    elif not torch.cuda.is_available():
        sys.exit("There is no CUDA device: use --dry-run to run the code on a tiny model.")
    shape, device = (DRY, "cpu") if arguments.dry_run else (FULL, "cuda")
    measured = read_peer(arguments.peer_log.read_text()) if arguments.peer_log else None
    peers = measured or VLLM.get(arguments.model, {})
    bench = Bench(arguments.model, shape, device, arguments)
    print(f"{arguments.model}: loaded in {bench.load_s:.1f} s, warm in {bench.warm_up_s:.1f} s, "
          f"{len(bench.runner._graphs._captured)} graphs, {bench.warm_up_bytes / 2**30:.1f} GiB for activations and "
          f"graphs, {bench.storage.num_pages} pages", flush=True)  # fmt: skip
    faults = bench.check()
    found = {} if arguments.check_only else bench.measure()
    bandwidth, peak = ceilings() if device == "cuda" else (1e10, 1e11)  # of a rehearsal, anything
    bounds = bench.limits(Limits(bench.loaded.spec, arguments.dtype == "fp8", bandwidth, peak))
    print(table(found, arguments.model, peers, bounds))
    if arguments.profile:
        bench.profile()
    result = {
        "bench": "gpu_engine", "model": arguments.model, "dtype": arguments.dtype, "command": " ".join(sys.argv),
        "faults": faults, "results": found, "limits": bounds, "bandwidth": bandwidth, "peak": peak,
        "vllm": peers, "vllm_same_machine": measured is not None,
        "load_s": bench.load_s, "warm_up_s": bench.warm_up_s, "warm_up_bytes": bench.warm_up_bytes,
        "num_pages": bench.storage.num_pages, "max_running": arguments.max_running,
        "max_batch_tokens": arguments.max_batch_tokens, "output_tokens": sum(bench.outputs),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
    }  # fmt: skip
    print(text := json.dumps(result))
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    if faults:
        sys.exit(f"The check failed: {'; '.join(faults)}.")


if __name__ == "__main__":
    main()
