"""The engine beside transformers: the same weights, two threads, one run.

What limits it. Decoding one token reads every weight once: 135 M parameters are 538 MB in float32 and 269 MB in
float16, so memory bandwidth bounds batch 1. Prefill and large batches do 2 FLOPs per weight and token, so arithmetic
bounds them: 106 M weights outside the embedding, 28 M more for the logits of each token that is sampled. Both ceilings
are measured here (ops.py), on the same threads, before and after, and stand beside the result.

    python bench/engine.py [--quick]

prints a table, then one JSON line. Rates are tokens/s, the best of several repeats; noise of a shared machine only
ever makes them worse. Peers are run by generate() with the cache on, greedy.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ops import machine
from transformers import LlamaConfig, LlamaForCausalLM

from disagg.cache.pages import PagePool
from disagg.cache.storage import KVStorage
from disagg.clock import WallClock
from disagg.engine.engine import Engine
from disagg.engine.runner import Runner
from disagg.engine.scheduler import Scheduler
from disagg.model.gguf_reader import GgufFile
from disagg.model.load import load_model, resolve
from disagg.model.weights import from_gguf
from disagg.request import Request, SamplingParams

CONTEXT, NEW_TOKENS = 128, 24


def best(run: Callable[[], float], repeats: int) -> float:
    return min(run() for _ in range(repeats))


class Ours:
    """The worker's own parts in this process: scheduler, pages, runner."""

    def __init__(self, dtype: str) -> None:
        loaded = load_model("smollm2", dtype=dtype)
        spec = loaded.spec
        self._pool = PagePool(640, 16)
        storage = KVStorage(
            num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, page_size=16,
            num_pages=640, dtype=loaded.kv_dtype,
        )  # fmt: skip
        self._runner = Runner(loaded, storage)
        self._runner.warm_up()

    def times(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, float]:
        """Seconds until every prompt is read, and seconds of the steps after that."""
        longest = max(map(len, prompts)) + max_tokens + 1
        scheduler = Scheduler(self._pool, max_batch_tokens=512, max_running=64, max_len=longest)
        engine = Engine("bench", scheduler, self._runner, WallClock())
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            scheduler.add(Request(str(index), len(prompt), list(prompt), params, frozenset(), float(index)))
        start = middle = time.perf_counter()
        first = 0
        while (stepped := engine.step(lambda batch: None)) is not None:
            if first < len(prompts):
                first += sum(chunk.samples for chunk in stepped.batch.chunks)
                middle = time.perf_counter()
        return middle - start, time.perf_counter() - middle


class Transformers:
    """The same file's weights, run by transformers in float32."""

    def __init__(self) -> None:
        file = GgufFile(Path(resolve("smollm2").where))
        spec = file.spec()
        found = from_gguf(file, spec)
        config = LlamaConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size, max_position_embeddings=spec.max_len, rms_norm_eps=spec.eps,
            tie_word_embeddings=True,
        )  # fmt: skip
        self._model = LlamaForCausalLM(config).eval()
        names = [name for name in self._model.state_dict() if name != "lm_head.weight"]  # tied to the embedding
        self._model.load_state_dict({name: found.take(name) for name in names}, strict=False)

    @torch.inference_mode()
    def times(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, float]:
        """As Ours.times: prefill, then the rest of generate()."""
        ids = torch.tensor(prompts)
        fixed: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        start = time.perf_counter()
        self._model.generate(ids, max_new_tokens=1, min_new_tokens=1, **fixed)
        prefill = time.perf_counter() - start
        if max_tokens == 1:
            return prefill, 0.0
        start = time.perf_counter()
        self._model.generate(ids, max_new_tokens=max_tokens, min_new_tokens=max_tokens, **fixed)
        return prefill, time.perf_counter() - start - prefill


def measure(engine: Ours | Transformers, repeats: int) -> dict[str, float]:
    draw = np.random.default_rng(0)
    rates = {}
    for batch in (1, 8, 32):
        prompts = draw.integers(1000, 40_000, (batch, CONTEXT)).tolist()
        seconds = best(lambda prompts=prompts: engine.times(prompts, NEW_TOKENS)[1], repeats)
        rates[f"decode batch {batch}"] = batch * (NEW_TOKENS - 1) / seconds
    for length in (512, 2048):
        prompts = draw.integers(1000, 40_000, (1, length)).tolist()
        rates[f"prefill {length}"] = length / best(lambda prompts=prompts: engine.times(prompts, 1)[0], repeats)
    return rates


def limits(ceiling: dict[str, float], num_bytes: int) -> dict[str, float]:
    """Tokens/s if nothing but the binding ceiling took time. `num_bytes`: of all weights."""
    body, head = 106.2e6, 28.3e6
    arithmetic = ceiling["gflop_s"] * 1e9
    found = {}
    for batch in (1, 8, 32):
        step_s = max(num_bytes / (ceiling["read_gb_s"] * 1e9), batch * 2 * (body + head) / arithmetic)
        found[f"decode batch {batch}"] = batch / step_s
    for length in (512, 2048):
        found[f"prefill {length}"] = arithmetic / (2 * body + 4 * 30 * 9 * 64 * length / 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of everything")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 1 if arguments.quick else 4
    before = machine()
    results = {"transformers f32": measure(Transformers(), max(1, repeats // 2))}
    for dtype in ("float32", "float16"):
        results[f"disagg {dtype}"] = measure(Ours(dtype), repeats)
    read, peak = (max(pair) for pair in zip(before, machine(), strict=True))
    ceiling = {"read_gb_s": read / 1e9, "gflop_s": peak / 1e9}
    bounds = {"float32": limits(ceiling, 538_000_000), "float16": limits(ceiling, 269_000_000)}
    print(f"read {ceiling['read_gb_s']:.1f} GB/s, {ceiling['gflop_s']:.0f} GFLOP/s on {arguments.threads} thread(s)\n")
    heads = "".join(f"{name:>18}" for name in results)
    print(f"{'tokens/s':18}{heads}{'limit f32':>12}{'limit f16':>12}{'f16/peer':>10}")
    for case, peer in results["transformers f32"].items():
        cells = "".join(f"{rates[case]:18.1f}" for rates in results.values())
        ratio = results["disagg float16"][case] / peer
        print(f"{case:18}{cells}{bounds['float32'][case]:12.0f}{bounds['float16'][case]:12.0f}{ratio:9.2f}x")
    print(json.dumps({"benchmark": "engine", "threads": arguments.threads, **ceiling, "tokens_per_s": results,
                      "limits": bounds}))  # fmt: skip


if __name__ == "__main__":
    main()
