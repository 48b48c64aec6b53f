"""How soon the pages of a client that goes away are free on every worker: python bench/disconnect.py [--out FILE]

A real server of each deployment on two cores. A stream is read for some tokens and its connection closed; from then
on `/audit` is asked until no worker holds a page. The time is that at which the answer is here, the audit's own time
included. The limit: a worker hears of it between two steps, or between two layers of a long one. In a stream that is
one token; while a prompt is computed it is a layer of a chunk of 512 positions, so clients that leave then, at moments
spread evenly over the time that the prompt takes, are rows of their own.

    python bench/disconnect.py [--model smollm2] [--out FILE]

prints a table, then one JSON line. With `--layers`, another table and line: one worker's chunk of 512 positions on one
core at the end of longer and longer contexts, as one call and layer by layer, and the longest time between two looks.
"""

import argparse
import contextlib
import itertools
import json
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

DEPLOYS, TRIES, PROMPT = ("1P1D", "2C"), 40, list(range(2, 66))
LONG = {155: 12, 640: 12, 1000: 16, 4000: 8}  # tokens of prompts that are left, and by how many clients
CHUNK, CONTEXTS = 512, (512, 1024, 2048, 4096, 8192)
_GIVE_UP_S = 20.0


@contextlib.contextmanager
def serving(model: str, deploy: str) -> Iterator[httpx.Client]:
    """A client of a server that is stopped afterwards."""
    command = [sys.executable, "-m", "disagg", "serve", "--model", model, "--deploy", deploy, "--budget", "cpu:2",
               "--no-prefix-caching", "--port", "0"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield client
        finally:
            server.send_signal(signal.SIGTERM)


def free_after(client: httpx.Client, read: int) -> tuple[float, float]:
    """(seconds from the close until no worker holds a page, mean seconds between the stream's tokens)."""
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines, times = answer.iter_lines(), []
        while len(times) < read:
            if next(lines).startswith("data:"):
                times.append(time.perf_counter())
        start = time.perf_counter()
    return _all_free(client, start), (times[-1] - times[0]) / (read - 1)


def long_prompt(length: int) -> list[int]:
    """Token ids."""
    return [2 + place % 200 for place in range(length)]


def while_it_is_computed(client: httpx.Client, length: int, tries: int) -> dict[str, float]:
    """How soon pages are free when clients leave a prompt at moments spread over the time it takes."""
    start = time.perf_counter()
    client.post("/v1/completions", json={"prompt": long_prompt(length), "max_tokens": 1}).raise_for_status()
    takes_s = time.perf_counter() - start
    moments = [takes_s * (number + 0.5) / tries for number in range(tries)]
    return milliseconds([free_after_leaving_a_prompt(client, length, moment) for moment in moments])


def free_after_leaving_a_prompt(client: httpx.Client, length: int, leave_s: float) -> float:
    """Seconds from the close until no worker holds a page, for a client that did not wait for the first token."""
    body = json.dumps({"prompt": long_prompt(length), "max_tokens": 4, "stream": True}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(leave_s)
    return _all_free(client, time.perf_counter())


def _all_free(client: httpx.Client, start: float) -> float:
    while True:
        workers = client.get("/audit").raise_for_status().json()["workers"]
        now = time.perf_counter()
        if not any(worker["held"] for worker in workers):
            return now - start
        if now - start > _GIVE_UP_S:
            sys.exit(f"Pages are still held {_GIVE_UP_S:g} s after the client went away: {workers}")


def idle_audit(client: httpx.Client) -> float:
    """Seconds of an audit when there is nothing to do: what the measuring itself takes."""
    start = time.perf_counter()
    client.get("/audit").raise_for_status()
    return time.perf_counter() - start


def milliseconds(values: list[float]) -> dict[str, float]:
    """p50, p99 and the worst of seconds."""
    p50, p99 = np.percentile(values, (50, 99)) * 1e3
    return {"p50": round(p50, 2), "p99": round(p99, 2), "worst": round(max(values) * 1e3, 2)}


def layers(model: str) -> dict[str, dict[str, float]]:
    """By context: a chunk's milliseconds as one call and layer by layer (medians, taking turns), and between looks."""
    import torch

    from disagg.cache.storage import KVStorage
    from disagg.engine.batch import Batch, Chunk
    from disagg.engine.runner import Runner
    from disagg.model.load import load_model
    from disagg.request import Request, SamplingParams

    torch.set_num_threads(1)
    loaded = load_model(model)
    spec, found = loaded.spec, {}
    storage = KVStorage(num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
                        page_size=16, num_pages=max(CONTEXTS) // 16)  # fmt: skip
    storage.pages.zero_()
    runner = Runner(loaded, storage)
    print(f"{model}, a chunk of {CHUNK} positions on one core; ms\n")
    print(f"{'context':>8}{'one call':>10}{'by layers':>11}{'ratio':>8}{'between two looks':>19}")
    for context in (context for context in CONTEXTS if context <= spec.max_len):
        request = Request("r", context, [5] * context, SamplingParams(temperature=0), frozenset(), 0.0,
                          num_computed=context, pages=list(range(context // 16)))  # fmt: skip
        batch = Batch(chunks=[Chunk(request, context - CHUNK, CHUNK, True)])
        times: dict[bool, list[float]] = {False: [], True: []}
        looks: list[float] = []

        def look(looks: list[float] = looks) -> bool:
            looks.append(time.perf_counter())
            return False

        gaps: list[float] = []
        runner.run(batch)
        for number in range(2 * max(3, CONTEXTS[-1] // context)):
            looks.clear()
            start = time.perf_counter()
            runner.run(batch, look if number % 2 else None)
            looks.append(time.perf_counter())
            times[bool(number % 2)].append(looks[-1] - start)
            gaps += [b - a for a, b in itertools.pairwise(looks)]
        plain, layered = (float(np.median(times[kind])) * 1e3 for kind in (False, True))
        found[str(context)] = {
            "one_call_ms": round(plain, 1), "by_layers_ms": round(layered, 1), "ratio": round(layered / plain, 3),
            "longest_gap_ms": round(max(gaps) * 1e3, 1),
        }  # fmt: skip
        print(f"{context:>8}{plain:>10.0f}{layered:>11.0f}{layered / plain:>8.3f}{max(gaps) * 1e3:>19.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", action="store_true")
    options = parser.parse_args()
    if options.layers:
        print(json.dumps({"benchmark": "layers", "model": options.model, "contexts": layers(options.model)}))
        return
    found: dict[str, object] = {"benchmark": "disconnect", "model": options.model, "tries": TRIES,
                                "python": platform.python_version()}  # fmt: skip
    print(f"{options.model} on two cores, {TRIES} clients that go away mid-stream; ms\n")
    print(f"{'':>6}{'free p50':>10}{'p99':>8}{'worst':>8}{'a token':>9}{'an idle audit':>15}")
    for deploy in DEPLOYS:
        with serving(options.model, deploy) as client:
            for _ in range(3):
                free_after(client, 5)
            streams = [free_after(client, 5 + number % 7) for number in range(TRIES)]
            long = {length: while_it_is_computed(client, length, tries) for length, tries in LONG.items()}
            free, audits = milliseconds([one for one, _ in streams]), [idle_audit(client) for _ in range(TRIES)]
        token, audit = float(np.median([gap for _, gap in streams])) * 1e3, float(np.median(audits)) * 1e3
        found[deploy] = free | {"token_ms": round(token, 2), "audit_ms": round(audit, 2), "in_the_prompt": long}
        print(f"{deploy:>6}{free['p50']:>10.1f}{free['p99']:>8.1f}{free['worst']:>8.1f}{token:>9.1f}{audit:>15.1f}")
        for length, row in long.items():
            print(f"{'':>6}{row['p50']:>10.1f}{'':>8}{row['worst']:>8.1f}   in a prompt of {length:,} tokens")
    text = json.dumps(found)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
