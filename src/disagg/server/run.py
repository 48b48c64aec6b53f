"""A server process from start to end: socket, deployment, signals, drain.

SIGTERM: new requests are answered 503, those under way may finish for `drain_s`, then exit code 0. SIGINT: at once.
"""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

from disagg.cluster.cluster import Cluster
from disagg.cluster.status import Status
from disagg.record import Record, write_records
from disagg.server.app import create_app
from disagg.server.front import Front
from disagg.server.guards import Keys, log
from disagg.server.http import Http, most_connections
from disagg.server.metrics import Metrics
from disagg.server.problems import Problem
from disagg.server.state import Settings, State
from disagg.server.telemetry import Traces, traces

_TICK_S = 0.05
_LAST_WORDS_S = 2  # for answers that say that the server stops

Make = Callable[[Callable[[str], None]], Cluster]


def serve(
    make: Make,
    listener: socket.socket,
    settings: Settings,
    keys: Keys,
    hosts: frozenset[str],
    *,
    records: Path | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> bool:
    """Serve until a signal comes. Returns whether that was SIGTERM, and the only one; raises why the deployment failed.

    records: a file to which the Record of every request is added, without its tokens. on_ready: told the address.
    """
    _log_to_stderr()

    async def run() -> bool:
        over = asyncio.Event()  # a signal came, or the deployment is no more
        signals = _heard(over)
        tracing = traces(settings.model)
        state = _assemble(make, settings, tracing, records, over)
        app = create_app(state, keys, hosts)
        try:
            await _serve(state, app, listener, over, signals, on_ready)
        finally:
            if tracing is not None:
                tracing.close()
        return signals == [signal.SIGTERM]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _heard(over: asyncio.Event) -> list[signal.Signals]:
    """The signals that have come so far; the first sets `over`."""
    signals: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        signals.append(number)
        over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return signals


def _assemble(
    make: Make, settings: Settings, tracing: Traces | None, records: Path | None, over: asyncio.Event
) -> State:
    """The deployment's thread, not started, with all who are told of requests that have ended."""

    def status() -> Status | None:
        with contextlib.suppress(Problem):
            return state.status()
        return None

    def on_record(record: Record) -> None:
        metrics.add(record)
        if tracing is not None:
            tracing.add(record)
        if records is not None:
            record.tokens = []
            try:
                write_records(records, [record])
            except OSError as error:  # a full disk must not end what is served
                log.error(json.dumps({"event": "records", "error": str(error)}))

    metrics = Metrics(status, lambda: {worker.name: worker.role for worker in state.front.workers})
    state = State(settings, Front(make, on_record=on_record, on_end=over.set), metrics)
    return state


async def _serve(
    state: State,
    app: ASGIApp,
    listener: socket.socket,
    over: asyncio.Event,
    signals: list[signal.Signals],
    on_ready: Callable[[str], None],
) -> None:
    """Start the deployment, answer until it is over, and take everything down again."""
    front = state.front
    server = _Server(_config(app))
    serving: asyncio.Task[None] | None = None
    try:
        front.start()
        serving = asyncio.create_task(server.serve([listener]))
        await _first(front.settled, over)
        if front.failure is None and not over.is_set():
            await state.texts.start()
            keep_loaded()
            _warn_of_context(state)
            on_ready(_url(listener))
            await over.wait()
        if signals == [signal.SIGTERM]:
            await _drain(state, signals)
    finally:
        state.stopping = "The server is stopping: send the request to another."
        await front.stop()
        server.should_exit = True
        if serving is not None:
            await serving
        listener.close()
        await state.close()
    if front.failure is not None:
        raise front.failure


def _warn_of_context(state: State) -> None:
    """Say so if the KV memory is what limits how long a request may be."""
    cluster, most = state.front.cluster(), state.most_tokens()
    if most < (cluster.engine.max_len or 0):
        why = f"a worker's share of the KV memory holds no {cluster.engine.max_len} tokens: raise --kv-memory"
        log.warning(json.dumps({"event": "context", "max_model_len": most, "why": why}))


def _config(app: ASGIApp) -> uvicorn.Config:
    http: Any = partial(Http, most=most_connections())
    return uvicorn.Config(
        app, http=http, ws="none", lifespan="off", access_log=False, log_config=None, proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=_LAST_WORDS_S,
    )  # fmt: skip


def keep_loaded() -> None:
    """Let the garbage collector pass over what has been loaded: each time it looks there, every stream waits."""
    gc.collect()
    gc.freeze()


async def _drain(state: State, signals: list[signal.Signals]) -> None:
    """Let what is under way finish, up to the limit or another signal."""
    loop = asyncio.get_running_loop()
    state.stopping = "The server is stopping and takes no new request: send it to another."
    log.info(json.dumps({"event": "drain", "requests": state.num_requests, "limit_s": state.settings.drain_s}))
    until = loop.time() + state.settings.drain_s
    while state.num_requests and loop.time() < until and len(signals) == 1:
        await asyncio.sleep(_TICK_S)


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of them."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class _Server(uvicorn.Server):
    """uvicorn leaves the signals to us: it would exit by raising them again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr() -> None:
    """One JSON object a line; uvicorn's warnings and errors as plain lines."""
    handler = logging.StreamHandler(sys.stderr)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.handlers = [handler]
    uvicorn_log.setLevel(logging.WARNING)
