"""How soon the pages of a client that goes away are free on every worker: python bench/disconnect.py [--out FILE]

A real server of each deployment on two cores. A stream is read for some tokens and its connection closed; from then
on `/audit` is asked until no worker holds a page. The time is that at which the answer is here, the audit's own time
included. The limit: a worker hears of it between two steps, so the step in flight has to end. In a stream that is one
token; while a prompt is computed it is a chunk of 512 positions, so clients that leave then are a row of their own.

    python bench/disconnect.py [--model smollm2] [--out FILE]

prints a table, then one JSON line.
"""

import argparse
import contextlib
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
LONG, LONG_TRIES, LEAVE_S = list(range(2, 202)) * 5, 6, 0.03  # a prompt of two chunks, left while the first is computed
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


def free_after_leaving_a_prompt(client: httpx.Client) -> float:
    """Seconds from the close until no worker holds a page, for a client that did not wait for the first token."""
    body = json.dumps({"prompt": LONG, "max_tokens": 4, "stream": True}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(LEAVE_S)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, object] = {"benchmark": "disconnect", "model": options.model, "tries": TRIES,
                                "python": platform.python_version()}  # fmt: skip
    print(f"{options.model} on two cores, {TRIES} clients that go away mid-stream; ms\n")
    print(f"{'':>6}{'free p50':>10}{'p99':>8}{'worst':>8}{'a token':>9}{'an idle audit':>15}")
    for deploy in DEPLOYS:
        with serving(options.model, deploy) as client:
            for _ in range(3):
                free_after(client, 5)
            tries = [free_after(client, 5 + number % 7) for number in range(TRIES)]
            long = milliseconds([free_after_leaving_a_prompt(client) for _ in range(LONG_TRIES)])
            free, audits = milliseconds([one for one, _ in tries]), [idle_audit(client) for _ in range(TRIES)]
        token, audit = float(np.median([gap for _, gap in tries])) * 1e3, float(np.median(audits)) * 1e3
        found[deploy] = free | {"token_ms": round(token, 2), "audit_ms": round(audit, 2), "in_the_prompt": long}
        print(f"{deploy:>6}{free['p50']:>10.1f}{free['p99']:>8.1f}{free['worst']:>8.1f}{token:>9.1f}{audit:>15.1f}")
        print(f"{'':>6}{long['p50']:>10.1f}{'':>8}{long['worst']:>8.1f}   in a prompt of {len(LONG):,} tokens")
    text = json.dumps(found)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
