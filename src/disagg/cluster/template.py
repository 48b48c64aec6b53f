"""A process that has loaded everything a worker needs and forks one whenever a line asks for it.

Importing torch and loading a model takes seconds; a fork of a process that has done both takes a few hundredths. So a
deployment on cores loads once, its workers share the weights' memory, and a dead worker is back almost at once. Which
deployments: `limits.forked`.

Started as `python -m disagg.cluster.template ALIVE_FD FOLDER`. Standard input: one line with an EngineSpec, then a line
with a WorkerConfig for every worker to start. Standard output: a line for each News. ALIVE_FD closes when the front end
is gone, which ends the workers. FOLDER holds the mailboxes: a front end that dies before there is a worker leaves it to
us to remove. This process runs no thread and opens no socket: neither would survive a fork.
"""

import contextlib
import gc
import os
import select
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from disagg.cluster.worker import WorkerConfig
from disagg.cluster.worker_process import load, serve, warm_up
from disagg.config import EngineSpec
from disagg.errors import DisaggError, InputError

if TYPE_CHECKING:
    from disagg.model.load import Loaded


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It could not be; see messages.StartFailed."""

    reason: str
    input_error: bool


class Forked(msgspec.Struct, frozen=True, tag=True):
    """A worker process was made."""

    worker: str
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A worker process ended; `code` as of subprocess: negative for a signal."""

    pid: int
    code: int


News = Ready | Failed | Forked | Exited


def main() -> None:
    """Entry point of the process: fork until the front end is done or gone."""
    alive_fd, folder = int(sys.argv[1]), sys.argv[2]
    with contextlib.suppress(BrokenPipeError):  # it died while the model was loaded
        _fork_until_done(alive_fd)
    shutil.rmtree(folder, ignore_errors=True)


def _fork_until_done(alive_fd: int) -> None:
    lines = os.fdopen(0, "rb", buffering=0)  # unbuffered: a line must not hide from the poll below
    first = lines.readline()
    if not first:
        return
    loaded = _load(msgspec.json.decode(first, type=EngineSpec))
    children: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(lines)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                poll.unregister(fd)
                _reap(children.pop(fd), fd)
                continue
            line = lines.readline()
            if not line:
                return
            config = msgspec.json.decode(line, type=WorkerConfig)
            pid = os.fork()
            if pid == 0:
                _become(config, alive_fd, loaded)
            fd = os.pidfd_open(pid)
            children[fd] = pid
            poll.register(fd, select.POLLIN)
            _tell(Forked(config.worker, pid))


def _load(engine: EngineSpec) -> "Loaded":
    """The model, warm, on one thread: a pool of threads would be missing in every fork."""
    import torch

    torch.set_num_threads(1)
    try:
        loaded = load(engine, "cpu")
        warm_up(loaded, engine.page_size)
    except DisaggError as error:
        _tell(Failed(str(error), isinstance(error, InputError)))
        raise
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, every page of memory it looks at
    _tell(Ready())
    return loaded


def _become(config: WorkerConfig, alive_fd: int, loaded: "Loaded") -> None:
    """In the child: be that worker. Does not return."""
    code = 1
    try:
        log = os.open(Path(config.folder) / f"{config.worker}.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, place in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(fd, place)
        serve(config, alive_fd, loaded)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # what the template would do at exit is not ours to do


def _reap(pid: int, fd: int) -> None:
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    _tell(Exited(pid, os.waitstatus_to_exitcode(status)))


def _tell(news: Any) -> None:
    os.write(1, msgspec.json.encode(news) + b"\n")


if __name__ == "__main__":
    main()
