"""What clients may ask, as types, which decoding.py decodes strictly: nothing is ignored.

A field of the OpenAI API that this server does not support may be there with a value that asks for nothing (`null`, an
empty list, `false`, ...): clients send those.
"""

from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

import msgspec

from disagg.errors import RequestError
from disagg.request import SamplingParams
from disagg.server.problems import Problem
from disagg.server.text_process import Int

MOST_STOPS = 16  # every token is compared with every stop string
MOST_STOP_TOKENS = 256
MOST_MESSAGES = 2048

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


_Route = Literal["colocated", "disaggregated"]
_Part = Literal["text"]
_Role = Literal["system", "developer", "user", "assistant"]
CHOICES: dict[str, tuple[str, ...]] = {
    "disagg_route": get_args(_Route),
    "type": get_args(_Part),
    "role": get_args(_Role),
}
"""The values of fields that take one of a few."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`: the usage so far in each (vLLM)."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat completions share. Fields from `top_k` on are vLLM's, `disagg_route` is our own."""

    model: str | None = None
    n: Int | None = None
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
    disagg_route: _Route | None = None

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


NO_PROMPT = "prompt must be a text, a list of token ids, or a list of texts or of lists of ids."


class CompletionRequest(Generate, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. `prompt`: a text, token ids, or for a batch a list of texts or a list of lists of ids."""

    prompt: str | list[Int | str | list[Int]]
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
            raise Problem(400, NO_PROMPT, param="prompt")
        return cast("list[str | list[int]]", self.prompt)


class RawPrompt(NamedTuple):
    """Of a CompletionRequest only the prompt, while it is still JSON."""

    json: bytes

    def num_lists(self) -> int:
        """How many lists of ids there are; 0 where there is a text."""
        return max(1, self.json.count(b"[") - 1) if self.json.startswith(b"[") and b'"' not in self.json else 0

    def longest(self) -> int:
        """How many ids the longest of these lists has; ids that stand beside the lists count as one of them."""
        return max(each.lstrip().count(b",", 1) + 1 for each in self.json.split(b"]"))  # a comma ahead ends nothing


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content; text is the only kind."""

    type: _Part
    text: str


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation. Fields that an answer of this API carries may come back as null."""

    role: _Role
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
