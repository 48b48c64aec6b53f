"""What the server itself costs: streamed tokens a second, and what it adds to the time to first token.

A deployment that answers at once stands in for the workers; everything else is the real server: front thread, text,
HTTP. Beside it, the simplest possible stream of the same stack: a Starlette StreamingResponse of a constant. All send
the same number of events a stream. They run in two ways:

    stepped   every token is a write of its own, as when workers step: the next one waits until the last is sent
    flat out  no waiting. The server writes tokens of a stream together that come while it is busy with others; the
              simplest stream writes every event by itself, as it would; "joined" is the simplest stream once more, its
              constant as many events long as the server's mean write had: what is left when the source costs nothing

The server runs on one core, its client on another. Tokens a CPU second are those that the server would do with a core
to itself; on a busy machine it gets less. They include what the stand-in costs. Rows are medians of rounds that take
turns.

    python bench/server.py

prints a table, then one JSON line.
"""

import asyncio
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from disagg.cluster.cluster import Update
from disagg.errors import ModelError
from disagg.model.load import load_info
from disagg.record import Record
from disagg.server.app import create_app
from disagg.server.front import Front
from disagg.server.guards import Keys
from disagg.server.http import Http
from disagg.server.listening import listen
from disagg.server.metrics import Metrics
from disagg.server.run import keep_loaded
from disagg.server.state import Settings, State

STREAMS, TOKENS = 64, 500
PINGS = 200
ROUNDS = 3
TEXT = "The capital of France is Paris, a city of two million people on the river Seine. "


class InstantCluster:
    """Answers every request with the same text, a token for each of them at every poll."""

    def __init__(self, info, loop, stepped) -> None:
        self.info = info
        self.engine, self.num_pages = SimpleNamespace(max_len=8192, page_size=16), 1 << 20
        self._text = info.tokenizer.encode(TEXT)
        self._live: dict[str, tuple[Record, itertools.cycle]] = {}
        self._ids = itertools.count()
        self._loop, self._sent, self._stepped = loop, threading.Event(), stepped

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def watch(self, bell) -> None:  # noqa: D102
        self._bell = bell

    def workers(self):  # noqa: D102
        return []

    def submit_all(self, asked, *, scheduled_at, deadline_s):  # noqa: D102
        records = []
        for prompt, params, _ in asked:
            record = Record(request_id=f"{next(self._ids):032x}", index=0, prompt_len=len(prompt))
            record.scheduled_at, record.max_tokens = scheduled_at, params.max_tokens
            self._live[record.request_id] = (record, itertools.cycle(self._text))
            records.append(record.request_id)
        return records

    def abort(self, request_id):  # noqa: D102
        return self._live.pop(request_id, (None,))[0]

    def poll(self, timeout_s):  # noqa: D102
        select.select([self._bell], [], [], 0 if self._live else timeout_s)  # as a real one, which lets others run
        if not self._live:
            return []
        if self._stepped:
            self._sent.clear()
            self._loop.call_soon_threadsafe(self._loop.call_soon, self._loop.call_soon, self._sent.set)
            self._sent.wait(timeout_s)
        now, updates = time.monotonic(), []
        for request_id, (record, text) in list(self._live.items()):
            record.token_at.append(now)
            done = len(record.token_at) == record.max_tokens
            if done:
                record.finish_reason, record.output_len = "length", record.max_tokens
                del self._live[request_id]
            updates.append(Update(request_id, [next(text)], [None], record if done else None))
        return updates


def simplest(stepped: bool, joined: int = 1) -> Starlette:
    """The same bytes as one of our events, as often as asked for, `joined` at a time."""
    chunk = {"id": f"cmpl-{0:032x}", "object": "text_completion", "created": 1_700_000_000, "model": "bench"}
    chunk["choices"] = [{"index": 0, "text": " city", "logprobs": None, "finish_reason": None}]
    event = b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    async def answer(request):
        count = msgspec.json.decode(await request.body())["max_tokens"]

        async def body():
            for at in range(0, count, joined):
                yield event * min(joined, count - at)
                if stepped:
                    await asyncio.sleep(0)

        return StreamingResponse(body(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])


async def measure(app) -> dict[str, float]:
    """Serve `app` and let the client loose on it."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, http=Http, ws="none", lifespan="off", access_log=False, log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "client",
        str(listener.getsockname()[1]),
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    found = {}
    while line := await client.stdout.readline():
        said = json.loads(line)
        if said == "go":
            cpu_s = time.process_time()
            client.stdin.write(b"\n")
        elif "tokens" in said:
            said["per_cpu_s"] = said["tokens"] / (time.process_time() - cpu_s)
            found |= said
            client.stdin.write(b"\n")
        else:
            found |= said
    server.should_exit = True
    await serving
    return found


async def ours(info, stepped: bool) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    metrics = Metrics(lambda: None)
    front = Front(lambda progress: InstantCluster(info, loop, stepped), on_record=metrics.add)
    front.start()
    await front.settled.wait()
    found = await measure(create_app(State(Settings(model="bench"), front, metrics), Keys([]), frozenset()))
    await front.stop()
    return found


async def client(port: int) -> None:
    """All streams at once, counted; then single tokens, one request after the other, timed."""

    def request(num_tokens: int) -> bytes:
        body = json.dumps({"prompt": "Hello", "max_tokens": num_tokens, "stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        return (head % len(body)).encode() + body

    async def stream(num_tokens: int) -> tuple[int, int, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(num_tokens))
        count, writes, first_at, tail = 0, 0, 0.0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 18)
            count += (tail[-5:] + data).count(b'"text"')
            writes += (tail[-3:] + data).count(b"\n\n\r\n")  # an HTTP chunk that ends with an event
            first_at = first_at or time.perf_counter()
            tail = (tail + data)[-16:]
        writer.close()
        return count, writes, first_at

    def ready(said) -> None:
        print(json.dumps(said), flush=True)
        sys.stdin.readline()

    await stream(10)
    ready("go")
    started_at = time.perf_counter()
    counts = await asyncio.gather(*(stream(TOKENS) for _ in range(STREAMS)))
    took_s = time.perf_counter() - started_at
    tokens, writes = (sum(each) for each in list(zip(*counts, strict=True))[:2])
    ready({"tokens": tokens, "per_s": tokens / took_s, "per_write": tokens / writes})
    times = []
    for _ in range(PINGS):
        at = time.perf_counter()
        *_, first_at = await stream(1)
        times.append((first_at - at) * 1e3)
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    print(json.dumps({"ttft_p50_ms": p50, "ttft_p99_ms": p99}))


def compare(info, stepped: bool) -> dict[str, dict[str, float]]:
    """Rows by name: the median of each number over the rounds."""
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        rounds.setdefault("simplest", []).append(uvloop.run(measure(simplest(stepped))))
        rounds.setdefault("disagg", []).append(mine := uvloop.run(ours(info, stepped)))
        if not stepped:
            joined = simplest(stepped, max(1, round(mine["per_write"])))
            rounds.setdefault("joined", []).append(uvloop.run(measure(joined)))
    return {
        name: {key: float(np.median([each[key] for each in row])) for key in row[0]} for name, row in rounds.items()
    }


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if sys.argv[1:2] == ["client"]:
        os.sched_setaffinity(0, {cores[-1]})
        uvloop.run(client(int(sys.argv[2])))
        return
    os.sched_setaffinity(0, {cores[0]})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        info = load_info("smollm2", None)
    except ModelError:
        sys.exit("The bench needs a tokenizer: make model")
    keep_loaded()
    print(f"{STREAMS} streams of {TOKENS} tokens, server on one core\n")
    columns = f"{'tokens/s':>12}{'tokens/CPU s':>14}{'us/token':>10}{'a write':>9}{'TTFT p50 ms':>13}{'p99 ms':>9}"
    print(f"{'':>20}{columns}")
    found = {}
    for way, stepped in (("stepped", True), ("flat out", False)):
        rows = compare(info, stepped)
        for name, row in rows.items():
            cost = f"{1e6 / row['per_cpu_s']:10.1f}{row['per_write']:9.1f}"
            times = f"{row['ttft_p50_ms']:13.2f}{row['ttft_p99_ms']:9.2f}"
            print(f"{way:>10}{name:>10}{row['per_s']:12,.0f}{row['per_cpu_s']:14,.0f}{cost}{times}")
        mine, other = rows["disagg"], rows["simplest"]
        share, share_wall = (mine[key] / other[key] for key in ("per_cpu_s", "per_s"))
        added_ms = mine["ttft_p50_ms"] - other["ttft_p50_ms"]
        print(f"{'':>10}{share:.0%} of the simplest stream by CPU time, {share_wall:.0%} by the clock; ", end="")
        print(f"{added_ms:.2f} ms added to TTFT")
        found[way] = {**rows, "share": share, "share_wall": share_wall, "added_ttft_ms": added_ms}
    print(json.dumps({"benchmark": "server", "streams": STREAMS, "tokens": TOKENS, **found}))


if __name__ == "__main__":
    main()
