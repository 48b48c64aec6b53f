"""Text to token ids and back, for handlers: short texts at once, long ones and chat templates in processes."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import msgspec

from disagg.errors import RequestError
from disagg.model.load import Info
from disagg.model.tokenizer import NoTokenizer
from disagg.server.asked import MOST_MESSAGES, Message
from disagg.server.fewest import Measure, Portable
from disagg.server.problems import Problem
from disagg.server.text_process import Done, Job, TextProcess, read_ids
from disagg.text import numbers

SHORT_LEN = 2_000  # characters; encoding more would hold up the event loop for over a millisecond
CHAT_S = 5.0  # that a chat template may take

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


class Tokens(NamedTuple):
    """Token ids, as JSON until somebody wants them: of a text that is too long only the number matters."""

    num: int
    json: bytes

    def ids(self) -> list[int]:
        """All of them."""
        return msgspec.json.decode(self.json, type=list[int])


class Texts:
    """The tokenizer of a server. `start` it before there are streams that the start could hold up."""

    def __init__(self, info: Info) -> None:
        self._tokenizer = info.tokenizer
        self._vocab_size = info.spec.vocab_size
        self._process: TextProcess | None = None
        self._measure: Measure | None = None
        self._special: frozenset[int] = frozenset()
        if portable := info.tokenizer.portable():
            known = msgspec.json.decode(portable, type=Portable)
            self._measure, self._special = known.measure(), known.special_ids()
            self._process = TextProcess(("disagg.server.text_process", str(self._vocab_size)), portable)
        self._chats: TextProcess | None = None
        with contextlib.suppress(RequestError):  # there is no template
            too_long = f"The model's chat template took longer than {CHAT_S:g} s for these messages."
            self._chats = TextProcess(("disagg.server.chat_process",), info.tokenizer.template(), CHAT_S, too_long)
        self._thread = ThreadPoolExecutor(1, "texts")  # for tokenizers that are written in Python

    async def start(self) -> None:
        """Have the processes ready."""
        await asyncio.gather(*(process.start() for process in (self._process, self._chats) if process is not None))
        if self._chats is not None:
            with contextlib.suppress(RequestError):  # the template is compiled, that is all
                await self._chats.run(Job("render", "[]"))

    def fewest(self, text: str) -> int:
        """How many tokens the text has at least, without making them; 0 where that cannot be told."""
        return 0 if self._measure is None else self._measure.fewest(text)

    async def encode(self, text: str, num_chars: int = 0) -> Tokens:
        """Token ids of a plain text. `num_chars`: of all texts of its request. Raises Problem 400 of the prompt."""
        with _about("prompt"):
            if max(len(text), num_chars) <= SHORT_LEN:
                return _tokens(self._tokenizer.encode(text))
            if self._process is None:
                return _tokens(await self._in_thread(self._tokenizer.encode, text))
            return _of(await self._process.run(Job("encode", text)))

    async def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation. Raises Problem 400 of the messages."""
        with _about("messages"):
            return await self._rendered(messages)

    async def encode_chat(self, text: str) -> Tokens:
        """Token ids of a conversation's text. Raises Problem 400 of the messages."""
        with _about("messages"):
            if len(text) <= SHORT_LEN:
                return _tokens(self._tokenizer.encode_chat(text))
            if self._process is None:
                return _tokens(await self._in_thread(self._tokenizer.encode_chat, text))
            return _of(await self._process.run(Job("chat", text)))

    async def _rendered(self, messages: Sequence[Message]) -> str:
        if not messages:
            raise RequestError("messages must not be empty.")
        if len(messages) > MOST_MESSAGES:
            raise RequestError(f"messages has {len(messages)} entries: give at most {MOST_MESSAGES}.")
        if isinstance(self._tokenizer, NoTokenizer):
            raise RequestError("This model has no tokenizer: send a list of token ids to /v1/completions instead.")
        if self._chats is None:
            return self._tokenizer.template()  # raises
        plain = msgspec.json.encode([message.plain() for message in messages]).decode()
        return msgspec.json.decode((await self._chats.run(Job("render", plain))).json, type=str)

    async def decode(self, ids: bytes) -> bytes:
        """The text of token ids, both as JSON, with special tokens. Raises RequestError."""
        if len(ids) <= SHORT_LEN and self._special.isdisjoint(read_ids(ids, self._vocab_size)):
            return self._decode(ids)
        if self._process is None:
            return await self._in_thread(self._decode, ids)
        return (await self._process.run(Job("decode", ids.decode()))).json

    async def close(self) -> None:
        """Let go of the process and the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for process in (self._process, self._chats):
            if process is not None:
                await process.close()

    def _decode(self, ids: bytes) -> bytes:
        known = read_ids(ids, self._vocab_size)
        wordless = isinstance(self._tokenizer, NoTokenizer)
        return msgspec.json.encode(numbers(known) if wordless else self._tokenizer.decode(known))

    async def _in_thread(self, function: Callable[[_Asked], _Answer], asked: _Asked) -> _Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, asked)


@contextlib.contextmanager
def _about(param: str) -> Iterator[None]:
    """What a tokenizer or a template refuses is this field, whatever the sentence begins with."""
    try:
        yield
    except RequestError as error:
        raise Problem(400, str(error), param=param) from None


def _tokens(ids: list[int]) -> Tokens:
    return Tokens(len(ids), msgspec.json.encode(ids))


def _of(done: Done) -> Tokens:
    return Tokens(done.num, done.json)
