"""A real `disagg serve` to test against, and the plainest client there is."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Ask over the one connection that is kept: making one takes as long as what is measured with it."""
        if self._http is None:
            self._http = httpx.Client()
        return self._http.get(f"{self.url}{path}", headers=headers)

    def audit(self, **headers: str) -> list[dict]:
        """Where every page of every worker is."""
        return self.get("/audit", **headers).raise_for_status().json()["workers"]

    def metric(self, name: str) -> float:
        """The value of a metric, whose labels are part of the name."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)

    def requests(self, path: str = "/") -> list[dict]:
        """What the log says of requests to such paths."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == "request" and line["path"].startswith(path)]

    def children(self) -> dict[int, str]:
        """Command lines of all processes that it started, and of theirs, by pid."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in found - {self.process.pid}}

    def close(self) -> None:
        """Let go of the connection."""
        if self._http is not None:
            self._http.close()

    def stop(self, number: int = signal.SIGTERM, limit_s: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(limit_s)


@contextmanager
def starting(folder: Path, *options: str, **environment: str) -> Iterator[Callable[[], Server]]:
    """`disagg serve` with these options on a free port; killed at the end if it still runs.

    Gives a function that waits until it serves: what else is slow can be done before.
    """
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
    servers = []

    def ready() -> Server:
        line = process.stdout.readline()
        assert line, log.read_text()
        watchdog.cancel()
        servers.append(Server(process, line.split()[-1], log))
        return servers[-1]

    try:
        yield ready
    finally:
        watchdog.cancel()
        for server in servers:
            server.close()
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """The same, ready to answer."""
    with starting(folder, *options, **environment) as ready:
        yield ready()


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
