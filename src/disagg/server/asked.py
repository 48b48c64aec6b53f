"""What clients may ask, as types: decoded strictly, so that nothing is ignored.

An unknown field is a 400 that names it and the nearest known one. A field of the OpenAI API that this server does not
support may be there with a value that asks for nothing (`null`, an empty list, `false`, ...): clients send those.
"""

import difflib
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec

from disagg.errors import RequestError
from disagg.request import SamplingParams
from disagg.server.problems import Problem

_LONGEST_NAME = 100  # of a field or value that an answer repeats
MOST_STOPS = 16  # every token is compared with every stop string
MOST_STOP_TOKENS = 256
MOST_MESSAGES = 2048

_LARGE = 1 << 16  # bytes of JSON that are decoded without a second look
MOST_STRINGS = 1 << 15  # in a body that is larger; a conversation with all the messages it may have has half of them
_MAY_BE_LONG = ("prompt", "messages", "tokens")

_SHARED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
           "seed", "min_tokens", "ignore_eos")  # fmt: skip

NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),  # about tools, of which there are none
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of the OpenAI API that are not supported, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`: the usage so far in each (vLLM)."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat completions share. Fields from `top_k` on are vLLM's, `disagg_route` is our own."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None  # n, if given: no more choices are drawn than returned
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    user: str | None = None  # a label for the server's log
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    disagg_route: Literal["colocated", "disaggregated"] | None = None

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Parameters for the engine. Raises Problem, or RequestError whose first word is the field."""
        if self.best_of not in (None, self.n or 1):
            message = f"best_of {self.best_of} is not supported: it must equal n, as all choices drawn are returned."
            raise Problem(400, message, param="best_of")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MOST_STOPS:
            raise Problem(400, f"stop has {len(stop)} strings: give at most {MOST_STOPS}.", param="stop")
        ids = self.stop_token_ids or ()
        if len(ids) > MOST_STOP_TOKENS:
            message = f"stop_token_ids has {len(ids)} ids: give at most {MOST_STOP_TOKENS}."
            raise Problem(400, message, param="stop_token_ids")
        given = {name: value for name in _SHARED if (value := getattr(self, name)) is not None}
        try:
            return SamplingParams(
                max_tokens=max_tokens, logprobs=logprobs, stop=stop, stop_token_ids=tuple(ids), **given
            )
        except RequestError as error:
            engines, _, rest = str(error).partition(" ")
            raise RequestError(f"{self.name_of(engines)} {rest}") from None

    def name_of(self, engines: str) -> str:
        """What the client calls the parameter that the engine knows by this name."""
        return engines


_NO_PROMPT = "prompt must be a text, a list of token ids, or a list of texts or of lists of ids."


class CompletionRequest(Generate, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. `prompt`: a text, token ids, or for a batch a list of texts or a list of lists of ids."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = None  # None: 16, as in the OpenAI API
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt of the batch. Raises Problem."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        if kinds == {int}:
            return [cast("list[int]", self.prompt)]
        if len(kinds) != 1:  # none, or texts beside ids
            raise Problem(400, _NO_PROMPT, param="prompt")
        return cast("list[str | list[int]]", self.prompt)


class RawPrompt(msgspec.Struct):
    """Of a CompletionRequest only the prompt, while it is still JSON."""

    prompt: msgspec.Raw

    def num_lists(self) -> int:
        """How many lists of ids there are; 0 where there is a text."""
        json = bytes(self.prompt)
        return max(1, json.count(b"[") - 1) if json.startswith(b"[") and b'"' not in json else 0

    def longest(self) -> int:
        """How many ids the longest of these lists has."""
        lists = bytes(self.prompt).split(b"]")
        return max(each.rpartition(b"[")[2].count(b",") + 1 for each in lists if b"[" in each)


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation. Fields that an answer of this API carries may come back as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Generate, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None  # None: to the end of the context
    max_tokens: int | None = None  # its older name
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def name_of(self, engines: str) -> str:
        """See Generate: the chat API has names of its own."""
        if engines == "max_tokens" and self.max_tokens is None:
            return "max_completion_tokens"
        return "top_logprobs" if engines == "logprobs" else engines

    def most_tokens(self) -> int | None:
        """The limit under either name. Raises Problem when they disagree."""
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise Problem(400, "max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
        return old if new is None else new

    def num_logprobs(self) -> int | None:
        """Alternatives per token, None without log-probabilities. Raises Problem."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    # still JSON, for there may be a million
    tokens: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "array", "items": {"type": "integer"}})]
    model: str | None = None


_KINDS = (CompletionRequest, ChatRequest, DetokenizeRequest)
FIELDS = tuple(dict.fromkeys(field for kind in _KINDS for field in kind.__struct_fields__))
"""Of all requests."""

_Asked = TypeVar("_Asked", bound=msgspec.Struct)


def decode(kind: type[_Asked], body: bytes) -> _Asked:
    """The request in `body`. Raises Problem 400, with `param` where one field is at fault."""
    try:
        if len(body) <= _LARGE:
            return msgspec.json.decode(body, type=kind)
        _check_sizes(kind, body)
        with _no_collection():
            return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        if len(message) > 8 * _LONGEST_NAME:  # it repeats megabytes of the request; where they are stands at the end
            message = message[: 4 * _LONGEST_NAME] + message[-4 * _LONGEST_NAME :]
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL)
        if unknown is None or unknown[1] not in NOTHING:
            raise _refusal(message, kind.__struct_fields__) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None
    return decode(kind, _without_nothing(body))


def _check_sizes(kind: type[msgspec.Struct], body: bytes) -> None:
    """Raise Problem for what a million objects would be made of: they would hold up every stream.

    Decoding in another thread would not help: the decoder does not let go of the interpreter.
    """
    fields = _undecoded(kind)
    values = msgspec.json.decode(body, type=fields)
    rest = len(body)
    for name in fields.__struct_fields__:
        size = memoryview(getattr(values, name)).nbytes  # of the last, if it is given twice
        if name not in _MAY_BE_LONG and size > _LARGE:
            raise Problem(400, f"{name} is longer than {_LARGE} bytes.", param=name)
        rest -= size
    if num_strings(body) > MOST_STRINGS:
        raise Problem(400, f"The body holds more than {MOST_STRINGS} strings, which is the most this server takes.")
    if rest > _LARGE:
        for name in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys() - {*fields.__struct_fields__}:
            raise _refusal(f"Object contains unknown field `{name}`", kind.__struct_fields__)
        raise Problem(400, f"More than {_LARGE} bytes are no field's value: is a field given twice?")
    if "prompt" in kind.__struct_fields__:
        _check_mixture(bytes(values.prompt))


def num_strings(body: bytes) -> int:
    """How many strings there are in JSON, names of fields included."""
    quotes = body.count(b'"')
    if quotes > 2 * MOST_STRINGS:  # else it does not matter which of them are within strings
        quotes -= body.replace(b"\\\\", b"").count(b'\\"')
    return quotes // 2


def _check_mixture(prompt: bytes) -> None:
    """Raise Problem for a list of texts and other things, before these are made."""
    if prompt.startswith(b"[") and b'"' in prompt:
        try:
            msgspec.json.decode(prompt, type=list[str])  # ends at the first that is no text
        except msgspec.ValidationError:
            raise Problem(400, _NO_PROMPT, param="prompt") from None


@lru_cache
def _undecoded(kind: type[msgspec.Struct]) -> Any:
    names = dict.fromkeys((*kind.__struct_fields__, *NOTHING))
    return msgspec.defstruct("Undecoded", [(name, msgspec.Raw, msgspec.Raw()) for name in names])


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage, which would go through all objects again and again while many are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _without_nothing(body: bytes) -> bytes:
    """The request without the fields we do not support. Raises Problem if one of them asks for something."""
    try:
        whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        for name in NOTHING.keys() & whole.keys():
            json = bytes(whole.pop(name))
            value = msgspec.json.decode(json) if len(json) < _LONGEST_NAME else ...
            if not any(value == nothing and type(value) is type(nothing) for nothing in NOTHING[name]):
                raise Problem(400, f"{name} is not supported by this server: leave it out.", param=name)
        return msgspec.json.encode(whole)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> Problem:
    return Problem(400, f"The body is not valid JSON: {error}.")


def _refusal(error: str, fields: tuple[str, ...]) -> Problem:
    """A validation error as a Problem that names the field. What it repeats of the request is cut short."""
    where = re.search(r" - at `\$\.?(.*)`$", error, re.DOTALL)
    path = where[1] if where else ""
    what = error[: where.start()] if where else error
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL)
    if unknown is None:
        field = path or next(iter(re.findall(r"required field `(.*)`", what)), None)
        return Problem(400, f"{_cut(what)}{f', in {_cut(path)}' if path else ''}.", param=field and _cut(field))
    name = unknown[1][:_LONGEST_NAME]
    near = difflib.get_close_matches(name, fields, 1) if not path else []
    name = f"{path}.{name}"[-_LONGEST_NAME:].lstrip(".")
    hint = f" Did you mean {near[0]}?" if near else ""
    return Problem(400, f"There is no field {name} here.{hint}", param=name)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
