"""A real `disagg serve` to test against, and the plainest client there is."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 120.0


@dataclass
class Server:
    """A running server. `log` is its standard error."""

    process: subprocess.Popen
    url: str
    log: Path
    _http: httpx.Client | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def audit(self, **headers: str) -> list[dict]:
        """Where every page of every worker is."""
        if self._http is None:  # one connection: making one takes as long as what is measured with it
            self._http = httpx.Client()
        return self._http.get(f"{self.url}/audit", headers=headers).raise_for_status().json()["workers"]

    def stop(self, number: int = signal.SIGTERM, limit_s: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(limit_s)


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """`disagg serve` with these options on a free port, ready to answer; killed at the end if it still runs."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    code = "from disagg.cli.main import main; main()"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
        )
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        watchdog.cancel()
        server = Server(process, line.split()[-1], log)
        yield server
        if server._http is not None:
            server._http.close()
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def raw(server: Server, data: bytes, close: bool = False) -> bytes:
    """Send these bytes as they are and return all that comes back until the server closes. `close`: nothing follows."""
    with socket.create_connection(server.address, timeout=10.0) as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
        return answer


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request as bytes; the connection ends with its answer."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}", *headers]
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def events(lines: Iterator[str]) -> Iterator[dict]:
    """The objects of a stream of server-sent events, without the [DONE] that must end it."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream did not end with [DONE]")


def settled(condition, limit_s: float = 10.0) -> float:
    """Seconds until the condition holds. Polls a real process: it has no clock to inject."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, "did not happen in time"
        time.sleep(0.002)
    return time.monotonic() - started
