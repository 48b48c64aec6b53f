"""A deployment becomes processes, and leaves nothing behind.

Every worker is a child in a session of its own, so that Ctrl-C reaches only the front end, which then stops the
workers. A worker also ends by itself when its standard input closes, that is when the front end dies in any way. The
mailboxes and logs lie in one folder that only this user can enter; pages lie in memory files without a name.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from disagg.cluster.worker import WorkerConfig

_STOP_S = 3.0  # how long a worker may take to leave by itself


class Process:
    """One worker process."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.log = Path(config.folder) / f"{config.worker}.log"
        num_threads = str(len(config.spec.devices))
        environment = os.environ | {
            "OMP_NUM_THREADS": num_threads,
            "MKL_NUM_THREADS": num_threads,
            "NUMBA_NUM_THREADS": num_threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "disagg.cluster.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.exit_fd = os.pidfd_open(self.popen.pid)  # readable when the process has ended
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: noticed by its exit
            self.popen.stdin.write(msgspec.json.encode(config) + b"\n")
            self.popen.stdin.flush()

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.popen.poll() is None

    def obituary(self) -> str:
        """How it ended, in words, with the last line it wrote."""
        code = self.popen.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        said = f"; its last words: {lines[-1].strip()}" if lines and code > 0 else ""
        return f"Worker {self.config.worker} (pid {self.popen.pid}) {how}{said}."

    def close(self) -> None:
        """Close its standard input, wait for it to leave, and kill it if it does not."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        try:
            self.popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        os.close(self.exit_fd)


def make_folder() -> Path:
    """A new folder for mailboxes and logs, for this user only. Its path is short, as socket paths must be."""
    return Path(tempfile.mkdtemp(prefix="disagg-"))


def remove_folder(folder: Path) -> None:
    """Remove it with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
