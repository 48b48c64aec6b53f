"""Long texts to token ids and back, in a process of their own.

A tokenizer keeps the interpreter to itself while it works: in the server's process a text of some megabytes would hold
up every stream by a second. What comes and goes is JSON that is read and written here, so that the server never makes a
million Python integers either.

    server ──length, msgpack of a Job──▶ standard input     standard output ──length, msgpack of a Done──▶ server

The process imports nothing but the tokenizer's library, works at low priority, beside decoding, and ends with its
standard input, that is with the server. chat_process.py is another of the kind.
"""

import asyncio
import contextlib
import os
import resource
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import msgspec

from disagg.errors import DisaggError, RequestError
from disagg.server.turns import Turns

_LENGTH = struct.Struct("<I")
_NICENESS = 10
_PIPE_LEN = 1 << 20  # bytes that are read ahead
_MOST_MEMORY = 4 << 30  # bytes of addresses of the process

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""The decoder stops at the first that is longer. Else numbers of thousands of digits would take it a tenth of a second.
"""

_Loaded = TypeVar("_Loaded")


class Job(msgspec.Struct, frozen=True, array_like=True):
    """What to do: a plain text or that of a conversation to ids, JSON of ids to text, JSON of messages to text.

    The first gives the tokenizer, or the chat template, that the others are done with.
    """

    kind: Literal["load", "encode", "chat", "decode", "render"]
    text: str


class Done(msgspec.Struct, frozen=True, array_like=True):
    """What came of it, as JSON: of ids also how many they are. `error`: what is wrong with the request."""

    json: bytes = b"null"
    num: int = 0
    error: str = ""


class TextProcess:
    """The server's side. `command`: a module and its arguments. `load`: what it loads. One job at a time: see Turns.

    Each is given `limit_s` seconds, then the process is killed, made anew for the next, and `too_long` is what is wrong
    with the request.
    """

    def __init__(self, command: Sequence[str], load: str, limit_s: float | None = None, too_long: str = "") -> None:
        self._command = command
        self._load = Job("load", load)
        self._limit_s = limit_s
        self._too_long = too_long
        self._turns = Turns()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, job: Job) -> Done:
        """Do a job. Raises RequestError when it is at fault, DisaggError when the process dies of it, twice."""
        async with self._turns.turn(len(job.text)):
            for _ in range(2):
                try:
                    await self._start()
                    async with asyncio.timeout(self._limit_s):
                        done = await self._ask(job)
                    break
                except TimeoutError:
                    await self.close()
                    raise RequestError(self._too_long) from None
                except (OSError, RuntimeError, asyncio.IncompleteReadError):  # uvloop's pipes raise RuntimeError
                    await self.close()
                except asyncio.CancelledError:  # its answer would be taken for that of the next job
                    await self.close()
                    raise
            else:
                raise DisaggError("The process that turns long texts into tokens and back died of this one.")
        if done.error:
            raise RequestError(done.error)
        return done

    async def start(self) -> None:
        """Have the process ready before the first job. Raises DisaggError."""
        async with self._turns.turn(0):
            try:
                await self._start()
            except (OSError, asyncio.IncompleteReadError):
                raise DisaggError("The process that turns long texts into tokens could not be started.") from None

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> None:
        if self._process is not None:
            return
        command = (sys.executable, "-m", *self._command)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, limit=_PIPE_LEN, start_new_session=True
        )
        await self._ask(self._load)

    async def _ask(self, job: Job) -> Done:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        body = msgspec.msgpack.encode(job)
        self._process.stdin.writelines((_LENGTH.pack(len(body)), body))
        (length,) = _LENGTH.unpack(await self._process.stdout.readexactly(_LENGTH.size))
        return msgspec.msgpack.decode(await self._process.stdout.readexactly(length), type=Done)


def main() -> None:
    """Entry point of the process; its argument is how many token ids there are."""
    os.nice(_NICENESS)
    serve(_load, partial(work, vocab_size=int(sys.argv[1])))


def serve(load: Callable[[str], _Loaded], do: Callable[[_Loaded, Job], Done]) -> None:
    """Load what the first job gives, then do one after the other until the server is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(BrokenPipeError):
        loaded: list[_Loaded] = []
        while job := _next(jobs):
            if loaded:
                done = do(loaded[0], job)
            else:
                loaded, done = [load(job.text)], Done()
            body = msgspec.msgpack.encode(done)
            answers.write(_LENGTH.pack(len(body)) + body)
            answers.flush()


def _load(text: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def work(tokenizer: Any, job: Job, vocab_size: int) -> Done:
    """Do one job with a tokenizer."""
    if job.kind != "decode":
        ids = tokenizer.encode(job.text, add_special_tokens=job.kind == "encode").ids
        return Done(msgspec.json.encode(ids), len(ids))
    try:
        ids = read_ids(job.text.encode(), vocab_size)
    except RequestError as error:
        return Done(error=str(error))
    return Done(msgspec.json.encode(tokenizer.decode(ids, skip_special_tokens=False)))


def read_ids(json: bytes, vocab_size: int) -> list[int]:
    """Token ids from JSON. Raises RequestError when they are none of this vocabulary."""
    try:
        ids = msgspec.json.decode(json, type=list[Int])
    except msgspec.ValidationError:
        raise RequestError("tokens must be a list of token ids.") from None
    check_ids(ids, vocab_size, "tokens")
    return ids


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise RequestError when these are no token ids."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(
            f"{param} holds ids outside of the model's vocabulary: they must lie between 0 and {vocab_size - 1}."
        )


def _next(jobs: BinaryIO) -> Job | None:
    head = jobs.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return msgspec.msgpack.decode(jobs.read(*_LENGTH.unpack(head)), type=Job)


if __name__ == "__main__":
    main()
