"""POST /v1/completions and /v1/chat/completions: from a request to what the Cluster is asked for."""

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from disagg.clock import WallClock
from disagg.request import SamplingParams
from disagg.server.answers import Form
from disagg.server.asked import ChatRequest, CompletionRequest, Generate, RawPrompt
from disagg.server.decoding import decode
from disagg.server.exchange import Ask
from disagg.server.problems import Problem, gone, late
from disagg.server.reply import Reply
from disagg.server.state import State
from disagg.server.text_process import check_ids

_DEFAULT_MAX_TOKENS = 16  # of completions, as in the OpenAI API
_SEEDS = 1 << 63

_Asked = TypeVar("_Asked", bound=msgspec.Struct)


class Arrival(NamedTuple):
    """When a request came: on the cluster's clock, and on the event loop's."""

    received_at: float
    at: float

    @classmethod
    def now(cls) -> "Arrival":
        """It comes now."""
        return cls(WallClock().now(), asyncio.get_running_loop().time())


async def completions(request: Request) -> Reply:
    """POST /v1/completions."""
    arrival, state = Arrival.now(), request.app.state.disagg
    asked = decode(CompletionRequest, await body_of(request), partial(_check_prompt, state))
    state.check_model(asked.model)
    prompts = asked.prompts()
    _check_choices(state, asked.n, len(prompts))
    max_tokens = _DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    params = [asked.sampling(max_tokens, asked.logprobs)] * len(prompts)
    async with in_time(request, arrival):
        texts = [one for one in prompts if isinstance(one, str)]
        for one in texts:  # all before any: none is tokenized in vain
            state.check_text(one, "prompt")
        num_chars = sum(map(len, texts))
        encoded = [await _ids(state, one, num_chars) for one in prompts]
    return _reply(request, asked, encoded, params, arrival, chat=False)


async def chat_completions(request: Request) -> Reply:
    """POST /v1/chat/completions."""
    arrival, state = Arrival.now(), request.app.state.disagg
    asked = await read(request, ChatRequest)
    state.check_model(asked.model)
    _check_choices(state, asked.n, 1)
    async with in_time(request, arrival):
        text = await state.texts.render(asked.messages)
        state.check_text(text, "messages")
        tokens = await state.texts.encode_chat(text)
    state.check_len(tokens.num, "messages")
    prompt = tokens.ids()
    max_tokens = asked.most_tokens()
    if max_tokens is None:
        max_tokens = state.most_tokens() - len(prompt)
    params = asked.sampling(max_tokens, asked.num_logprobs())
    return _reply(request, asked, [prompt], [params], arrival, chat=True)


async def _ids(state: State, prompt: str | list[int], num_chars: int) -> list[int]:
    """Token ids of a prompt. Raises Problem or RequestError when it is not one for this model.

    num_chars: of all texts of its request.
    """
    if isinstance(prompt, str):
        tokens = await state.texts.encode(prompt, num_chars)
        state.check_len(tokens.num, "prompt")
        return tokens.ids()
    state.check_len(len(prompt), "prompt")
    check_ids(prompt, state.info().spec.vocab_size, "prompt")
    return prompt


def _check_prompt(state: State, prompt: RawPrompt) -> None:
    """Raise Problem when prompts are more or longer lists of token ids than fit, before a million integers are made."""
    if num_lists := prompt.num_lists():
        _check_choices(state, None, num_lists)
        state.check_len(prompt.longest(), "prompt")


@contextlib.asynccontextmanager
async def in_time(request: Request, arrival: Arrival) -> AsyncIterator[None]:
    """What a request waits for before its answer begins. Ends it, as a Problem, at the deadline or when its client goes
    away. The body has been read.
    """
    deadline_s = request.app.state.disagg.settings.deadline_s
    loop = asyncio.get_running_loop()
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        if not limit.expired():
            limit.reschedule(loop.time())

    try:
        async with asyncio.timeout_at(arrival.at + deadline_s) as limit:
            watching = asyncio.create_task(watch())
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        raise (gone() if is_gone else late(deadline_s)) from None


async def read(request: Request, kind: type[_Asked]) -> _Asked:
    """The request's body as `kind`. Raises Problem: too large, too slow, or not what it should be."""
    return decode(kind, await body_of(request))


async def body_of(request: Request) -> bytes:
    """The request's body. Raises Problem: too large or too slow."""
    settings = request.app.state.disagg.settings
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body_bytes:
                    raise Problem(
                        413, f"The body is larger than the {settings.max_body_bytes} bytes this server takes."
                    )
    except TimeoutError:
        raise Problem(408, f"The body did not come within {settings.body_s:g} s.") from None
    except ClientDisconnect:
        raise gone() from None
    return bytes(body)


def _check_choices(state: State, n: int | None, num_prompts: int) -> None:
    most = state.settings.max_choices
    n = 1 if n is None else n
    if n < 1 or n * num_prompts > most:
        message = f"n times the number of prompts must be 1 to {most}, not {n * num_prompts}."
        raise Problem(400, message, param="n" if n != 1 else "prompt")


def _reply(
    request: Request,
    asked: Generate,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    arrival: Arrival,
    *,
    chat: bool,
) -> Reply:
    state: State = request.app.state.disagg
    if asked.stream_options is not None and not asked.stream:
        raise Problem(400, "stream_options needs stream: true.", param="stream_options")
    request.scope["disagg.user"] = asked.user
    n = asked.n or 1
    options = asked.stream_options
    form = Form(
        chat=chat,
        model=state.settings.model,
        prompt_lens=[len(prompt) for prompt in prompts],
        n=n,
        logprobs=params[0].logprobs is not None,
        token_ids=bool(asked.return_token_ids),
        usage=options is not None and options.include_usage,
        usage_so_far=options is not None and options.continuous_usage_stats,
    )
    asks = [
        Ask(prompt, for_choice(each, choice), asked.disagg_route)
        for prompt, each in zip(prompts, params, strict=True)
        for choice in range(n)
    ]
    until = arrival.at + state.settings.deadline_s
    left_s = until - asyncio.get_running_loop().time()
    exchange = request.scope["disagg.exchange"] = state.front.open(asks, arrival.received_at, left_s)
    return Reply(state, exchange, form, bool(asked.stream), until)


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one prompt differ: each has a seed of its own, counted up from the one asked for."""
    if params.seed is None or choice == 0:
        return params
    other = copy.copy(params)  # unlike `replace` this does not check again what has been checked
    msgspec.structs.force_setattr(other, "seed", (params.seed + choice) % _SEEDS)
    return other
