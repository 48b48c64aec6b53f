"""Open-loop serving of Qwen3-8B shapes on GPUs, colocated and disaggregated: the same requests for every arm.

Random bf16 weights; prompts and outputs of 2,048 and 128 tokens, each uniform within 50 % of that; Poisson arrivals;
greedy; end of sequence ignored; latency from the scheduled arrival. Requests are drawn as the client for other servers
draws them, so a seed and a rate name the same requests there.

Workers are loaded once and change roles between arms, which is all that an arm is: 1C on one GPU; 2C and 1P1D in turns
on two. Before any time is taken a prompt is handed over and compared with one that is not (the canary).

    python bench/gpu_serving.py --budget cuda:0 --arms 1C --rates 4 6 8 10 [--seconds 25] [--out FILE]
    python bench/gpu_serving.py --budget cuda:0,1 --arms 2C 1P1D --rates 4 8 12 16
    python bench/gpu_serving.py --model tiny --budget cpu:2 --arms 2C 1P1D --rates 4 --seconds 3    (a rehearsal)

prints a table, then one JSON line, which --out keeps.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from disagg.clock import WallClock
from disagg.cluster import canary
from disagg.cluster.cluster import Cluster
from disagg.config import Budget, Deployment, EngineSpec, Role
from disagg.measure.drive import Label, run_open_loop
from disagg.record import Record
from disagg.workload.workload import Row, Workload

SHAPES = {  # hidden, MLP, layers, heads, tied embeddings
    "qwen3-8b": (4096, 12288, 36, 32, False),
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "tiny": (64, 96, 2, 4, True),
}
SLOS = ((200, 15), (400, 10), (400, 15), (400, 25), (1000, 15), (1000, 25), (2000, 50))  # TTFT, TPOT; ms
ROLES: dict[str, tuple[Role, ...]] = {"1C": ("both",), "2C": ("both", "both"), "1P1D": ("prefill", "decode")}
WARM_UP = (2.0, 5.0)  # requests/s, seconds
DRAIN_S = 60.0


def write_model(name: str, folder: str) -> None:
    """A config.json of Qwen3 shapes; with random weights nothing else is needed."""
    hidden, mlp, layers, heads, tied = SHAPES[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": "silu",
        "num_key_value_heads": min(8, heads), "head_dim": 128 if name != "tiny" else 16, "attention_bias": False,
        "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "rope_scaling": None,
        "tie_word_embeddings": tied, "eos_token_id": 151_645, "bos_token_id": 151_643,
    }  # fmt: skip
    Path(folder, "config.json").write_text(json.dumps(config))


def draw(rate: float, seconds: float, prompt: int, output: int) -> Workload:
    """The requests of one point."""
    seed = int(rate * 100) + 7
    rng = random.Random(seed)
    rows, at = [], 0.0
    while at < seconds:
        prompt_len, output_len = int(prompt * rng.uniform(0.5, 1.5)), max(2, int(output * rng.uniform(0.5, 1.5)))
        tokens = tuple(rng.randint(10, 100_000) for _ in range(prompt_len))
        rows.append(Row(len(rows), at, tokens, output_len))
        at += rng.expovariate(rate)
    return Workload(seed, rate, 0, tuple(rows))


def play(cluster: Cluster, arm: str, workload: Workload) -> tuple[list[Record], float]:
    """One point on one arm: its records, and the seconds from the first arrival to the last token."""
    for worker, role in zip(cluster.workers(), ROLES[arm], strict=True):
        cluster.set_role(worker.name, role)
    start = time.monotonic()
    records = run_open_loop(cluster, workload, WallClock(), Label(arm, "concurrent", workload.rate), DRAIN_S)
    return records, time.monotonic() - start


def milliseconds(values: list[float]) -> list[float]:
    """p50, p90, p99 of seconds."""
    return [round(each * 1e3, 2) for each in np.percentile(values, (50, 90, 99))] if values else []


def point(arm: str, workload: Workload, records: list[Record], took_s: float) -> dict:
    """What a point came to. Percentiles over the requests that were completed, goodput over all."""
    done = [record for record in records if record.ok]
    handed = [record for record in done if record.handoff_bytes]
    ttft, tpot = [record.ttft_s for record in done], [record.tpot_s for record in done]
    good = {
        f"{a}/{b}": round(sum(x < a / 1e3 and y < b / 1e3 for x, y in zip(ttft, tpot, strict=True)) / len(records), 3)
        for a, b in SLOS
    }
    parts = [record.e2e_parts() for record in done]
    waits = {name: milliseconds([each[name] for each in parts]) for name in (parts[0] if parts else ())}
    begun_at = min((record.scheduled_at for record in records), default=0.0)
    latest = sorted(done, key=lambda record: -record.ttft_s)[:5]  # one event, or a burst?
    handoff_s = [record.handoff_busy_s for record in handed]
    num_bytes = sum(record.handoff_bytes for record in handed)
    return {
        "arm": arm, "rate": workload.rate, "n": len(records), "ok": len(done), "took_s": round(took_s, 1),
        "output_tokens_s": round(sum(len(record.token_at) for record in done) / took_s),
        "ttft": milliseconds(ttft), "tpot": milliseconds(tpot),
        "itl": milliseconds([gap for record in done for gap in record.itl_s]),
        "second_token": milliseconds([record.itl_s[0] for record in done]),
        "e2e": milliseconds([record.e2e_s for record in done]), "good": good, "parts": waits,
        "latest": [
            {"at_s": round(each.scheduled_at - begun_at, 2)}
            | {name: round(part_s * 1e3, 1) for name, part_s in (each.ttft_parts() or {}).items()}
            for each in latest
        ],
        "late": milliseconds([record.sent_at - record.scheduled_at for record in done]),
        "handed_over": len(handed), "handoff_copy": milliseconds(handoff_s),
        "handoff_gb_s": round(num_bytes / sum(handoff_s) / 1e9, 1) if handoff_s else None,
        "preemptions": sum(record.num_preemptions for record in done),
        "errors": sorted({record.error for record in records if record.error})[:3],
    }  # fmt: skip


def line(found: dict) -> str:
    """A point as a row of the table."""

    def three(name: str) -> str:
        return " / ".join(f"{each:.1f}" for each in found[name]) or "-"

    return (
        f"{found['arm']:>6}{found['rate']:>6g}{found['ok']:>5}/{found['n']:<4}{three('ttft'):>24}{three('tpot'):>20}"
        f"{three('itl'):>20}{found['good']['400/10']:>9.3f}{found['good']['400/15']:>9.3f}"
        f"{found['output_tokens_s']:>8}  {three('handoff_copy')}"
    )


def serve(options: argparse.Namespace, folder: str, keep: Callable[[dict], None]) -> None:
    """All points; `keep` is given everything found so far after each one, so that no interruption takes it away."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    budget = Budget.parse(options.budget, cores)
    most = max(len(ROLES[arm]) for arm in options.arms)
    engine = EngineSpec.on(
        budget.kind, model=folder, random_weights=True, max_len=8192, max_batch_tokens=options.max_batch_tokens,
    )  # fmt: skip
    start = time.monotonic()
    with Cluster(Deployment.parse(f"{most}C", budget), engine) as cluster:
        ready_s = time.monotonic() - start
        capacity = cluster.num_pages * cluster.engine.page_size
        print(f"{options.model} on {budget}, ready after {ready_s:.0f} s, {capacity} tokens of KV a worker")
        sung = {}
        for arm in options.arms:
            play(cluster, arm, draw(*WARM_UP, options.prompt, options.output))
            sung[arm] = [one.agrees or canary.complaint(one) for one in canary.run(cluster)]
        print("canary:", sung, flush=True)
        heads = (("arm", 6), ("req/s", 6), ("ok", 10), ("TTFT p50/p90/p99 ms", 24), ("TPOT", 20), ("ITL", 20))
        heads = (*heads, ("400/10", 9), ("400/15", 9), ("tok/s", 8))
        print("".join(f"{name:>{width}}" for name, width in heads) + "  hand-off copy ms")
        found = {"ready_s": ready_s, "kv_tokens": capacity, "canary": sung, "points": []}
        for rate in options.rates:
            workload = draw(rate, options.seconds, options.prompt, options.output)
            for arm in options.arms:
                found["points"].append(point(arm, workload, *play(cluster, arm, workload)))
                print(line(found["points"][-1]), flush=True)
                keep(found)
        keep(found | {"faults": [report.fault for report in cluster.audit() if report.fault]})


def devices() -> dict:
    """What it ran on."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"devices": names, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--budget", default="cuda:0")
    parser.add_argument("--arms", nargs="+", choices=ROLES, default=["1C"])
    parser.add_argument("--rates", nargs="+", type=float, default=[4, 6, 8, 10])
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if len({len(ROLES[arm]) for arm in options.arms}) > 1:
        parser.error("arms that share workers need equally many: 2C and 1P1D, or 1C alone")
    described = {name: value for name, value in vars(options).items() if name != "out"}
    described |= {"benchmark": "gpu_serving", "command": " ".join(sys.argv), **devices()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: dict) -> None:
        text = json.dumps(described | found)
        if options.out:
            options.out.write_text(text + "\n")
        if "faults" in found:
            print(text)

    with tempfile.TemporaryDirectory() as folder:
        write_model(options.model, folder)
        serve(options, folder, keep)


if __name__ == "__main__":
    main()
