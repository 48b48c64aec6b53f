"""Who has the machine: with several test processes (pytest -n 2) some tests here must not run beside any other.

A test holds a lock, with whatever it sets up and takes down: shared with other tests, or, marked `alone`, for itself.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from leftovers import nothing_left


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the timeout of a test too: to wait is not to hang
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Any test of the run, from setting its fixtures up to taking them down."""
    if not hasattr(item.config, "workerinput"):  # the only process
        return (yield)
    run = Path(item.config.option.basetemp).parent  # the folder of this run, in which each process has one
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    # who waits for the machine keeps the door, so that nobody else goes first
    with _locked(run / "door", fcntl.LOCK_EX) as door, _locked(run / "machine", how):
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@contextmanager
def _locked(file: Path, how: int) -> Iterator[int]:
    """Hold this lock; a process that dies lets go of it."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def nothing_left_behind() -> Iterator[None]:
    """All that the tests of a file start leaves no process, folder or shared memory."""
    with nothing_left():
        yield
