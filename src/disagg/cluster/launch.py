"""Workers become processes, and leave nothing behind.

A worker is started by itself (`spawn`), or forked by a Template, which has loaded the model before. Either way it lives
in a session of its own, so that Ctrl-C reaches only the front end, which then stops the workers, and it ends by itself
when a pipe closes, that is when the front end dies in any way. The mailboxes and logs lie in one folder that only this
user can enter; pages lie in memory files without a name.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from disagg.clock import WallClock
from disagg.cluster import template as t
from disagg.cluster.worker import WorkerConfig
from disagg.config import EngineSpec
from disagg.errors import DisaggError, InputError, WorkerLost

_STOP_S = 3.0  # how long a worker may take to leave by itself
_LONGEST_ROOT = 64  # bytes of a path: a socket's may have 107, and folder and worker take up to 40 of these
_FORK_S = 10.0  # how long a template may take to fork; it takes some milliseconds


class Process:
    """One worker process. `code` waits for its end and tells its exit code, once; None when nobody knows it."""

    def __init__(
        self, config: WorkerConfig, pid: int, code: Callable[[], int | None], leave: Callable[[], None]
    ) -> None:
        self.config = config
        self.pid = pid
        self.log = _log(config)
        self.exit_fd = os.pidfd_open(pid)  # readable when the process has ended
        self._ask_code = code
        self._leave = leave

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return not _readable(self.exit_fd, 0)

    def send_signal(self, number: int) -> None:
        """Send a signal to this process and to no other that may have its number by now."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.exit_fd, number)

    @cached_property
    def _code(self) -> int | None:
        return self._ask_code()

    def obituary(self) -> str:
        """How it ended, in words, with the last line it wrote."""
        code = self._code
        if code is None:
            how = "ended"
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        said = _last_words(self.log) if code is not None and code > 0 else ""
        return f"Worker {self.config.worker} (pid {self.pid}) {how}{said}."

    def close(self, patience_s: float = _STOP_S) -> None:
        """Let it leave, wait, kill it if it does not, and forget it."""
        self._leave()
        if not _readable(self.exit_fd, patience_s):
            self.send_signal(signal.SIGKILL)
            _readable(self.exit_fd, _STOP_S)
        _ = self._code  # a child that nobody asks for stays in the table of processes
        os.close(self.exit_fd)


def spawn(config: WorkerConfig) -> Process:
    """A worker in a new interpreter, which has everything to load yet."""
    with _log(config).open("wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "disagg.cluster.worker_process"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=_environment(config.spec.num_threads),
            start_new_session=True,
        )
    stdin = popen.stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: noticed by its exit
        stdin.write(msgspec.json.encode(config) + b"\n")
        stdin.flush()

    def leave() -> None:
        with contextlib.suppress(BrokenPipeError):
            stdin.close()

    return Process(config, popen.pid, popen.wait, leave)


class Template:
    """The front end's handle of the process described in template.py."""

    def __init__(self, engine: EngineSpec, folder: Path) -> None:
        alive_fd, self._keep_fd = os.pipe()
        self._log = folder / "template.log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "disagg.cluster.template", str(alive_fd), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(1),
                start_new_session=True,
                pass_fds=(alive_fd,),
            )
        os.close(alive_fd)
        self._clock = WallClock()
        self._buffer = b""
        self._ready = False
        self._closed = False
        self._forked: dict[str, int] = {}  # worker -> pid, until it is asked for
        self._codes: dict[int, int] = {}  # likewise
        self._write(engine)

    def ready(self, timeout_s: float) -> bool:
        """Whether it has loaded the model, after waiting for it. Raises what kept it from doing so."""
        self._read_until(lambda: self._ready, timeout_s)
        return self._ready

    def fork(self, config: WorkerConfig) -> Process:
        """A worker. Should the template be gone, it is spawned instead, which takes longer."""
        with contextlib.suppress(WorkerLost, ProcessLookupError):
            self._write(config)
            self._read_until(lambda: config.worker in self._forked, _FORK_S)
            if (pid := self._forked.pop(config.worker, None)) is not None:
                return Process(config, pid, lambda: self._code(pid), lambda: None)
            self._popen.kill()  # it is stuck, and must not come up with this worker later
        return spawn(config)

    def close(self) -> None:
        """Let all forked workers leave, and then the template. May be called twice."""
        if self._closed:
            return
        self._closed = True
        os.close(self._keep_fd)
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def _code(self, pid: int) -> int | None:
        if not self._closed:
            with contextlib.suppress(WorkerLost):
                self._read_until(lambda: pid in self._codes, 1.0)
        return self._codes.pop(pid, None)

    def _write(self, line: msgspec.Struct) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(msgspec.json.encode(line) + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            raise WorkerLost(f"The process that starts workers has ended{_last_words(self._log)}.") from None

    def _read_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        assert self._popen.stdout is not None
        fd = self._popen.stdout.fileno()
        until = self._clock.now() + timeout_s
        while not condition() and _readable(fd, max(0.0, until - self._clock.now())):
            data = os.read(fd, 1 << 16)
            if not data:
                raise WorkerLost(f"The process that starts workers has ended{_last_words(self._log)}.")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._note(msgspec.json.decode(line, type=t.News))

    def _note(self, news: Any) -> None:
        if isinstance(news, t.Failed):
            raise (InputError if news.input_error else DisaggError)(news.reason)
        if isinstance(news, t.Ready):
            self._ready = True
        elif isinstance(news, t.Forked):
            self._forked[news.worker] = news.pid
        elif isinstance(news, t.Exited):
            self._codes[news.pid] = news.code


def make_folder() -> Path:
    """A new folder for mailboxes and logs, for this user only. Its path is short, as socket paths must be."""
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="disagg-", dir=root if len(os.fsencode(root)) <= _LONGEST_ROOT else "/tmp"))


def remove_folder(folder: Path) -> None:
    """Remove it with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _log(config: WorkerConfig) -> Path:
    return Path(config.folder) / f"{config.worker}.log"


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return f"; its last words: {lines[-1].strip()}" if lines else ""


def _environment(num_threads: int) -> dict[str, str]:
    threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(num_threads)
    )
    # passive: torch's threads must not spin between two operations on cores that the CPU kernels use
    return os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


def _readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))
