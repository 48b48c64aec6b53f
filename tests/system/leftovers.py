"""What a deployment could leave behind, told apart from what others do on the same machine."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TAG = "DISAGG_TEST"  # in the environment of every process started here, and so of its children


def processes() -> list[str]:
    """Processes started within `nothing_left`."""
    mark = f"{_TAG}={os.environ[_TAG]}".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in file.read_bytes():
                found.append(str(file.parent))
        except OSError:
            continue
    return found


@contextmanager
def nothing_left(limit_s: float = 5.0) -> Iterator[None]:
    """Whatever is done within leaves no process, no folder and no named shared memory soon after.

    One within another sees what began in itself only.
    """
    folder = Path(tempfile.mkdtemp(prefix="t-"))  # short: it becomes part of socket paths
    kept, variables = tempfile.tempdir, {name: os.environ.get(name) for name in ("TMPDIR", _TAG)}
    shared = set(Path("/dev/shm").glob("*disagg*"))
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    os.environ[_TAG] = uuid.uuid4().hex
    try:
        yield
        until = time.monotonic() + limit_s
        while (left := [*processes(), *folder.glob("disagg-*")]) and time.monotonic() < until:
            time.sleep(0.02)
        assert left == []
        assert set(Path("/dev/shm").glob("*disagg*")) <= shared
    finally:
        tempfile.tempdir = kept
        for name, value in variables.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
