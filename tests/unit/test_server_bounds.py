"""What a request may cost before it comes to the deployment: every list is short, and checked once."""

import asyncio
import threading
from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
import uvicorn
from starlette.testclient import TestClient
from uvicorn.server import ServerState

from disagg.errors import RequestError
from disagg.model.tokenizer import NoTokenizer
from disagg.request import SamplingParams
from disagg.server.app import create_app
from disagg.server.asked import (
    MOST_STOP_TOKENS,
    CompletionRequest,
)
from disagg.server.decoding import decode
from disagg.server.generating import for_choice
from disagg.server.guards import Keys
from disagg.server.http import Http
from disagg.server.metrics import Metrics
from disagg.server.problems import Problem
from disagg.server.state import Settings, State


def test_stop_tokens_are_few():
    """As many as allowed are taken; one more is a 400 that names the field."""
    most = decode(CompletionRequest, b'{"prompt": [1], "stop_token_ids": %s}' % str([7] * MOST_STOP_TOKENS).encode())
    assert len(most.sampling(1, None).stop_token_ids) == MOST_STOP_TOKENS
    most.stop_token_ids += [7]
    with pytest.raises(Problem, match="257") as caught:
        most.sampling(1, None)
    assert (caught.value.status, caught.value.param) == (400, "stop_token_ids")


def test_parameters_are_checked_once_however_many_choices():
    """Choices differ in their seeds and share everything else, which nobody looks at again."""
    params = SamplingParams(seed=(1 << 63) - 1)
    msgspec.structs.force_setattr(params, "temperature", -1.0)  # what a check would refuse
    choices = [for_choice(params, place) for place in range(3)]
    assert [(choice.seed, choice.temperature) for choice in choices] == [((1 << 63) - 1, -1.0), (0, -1.0), (1, -1.0)]


def served(info):
    cluster = SimpleNamespace(info=info, engine=SimpleNamespace(max_len=99, page_size=1), num_pages=99)
    front = SimpleNamespace(cluster=lambda: cluster, workers=[], note=lambda records, exchange: None)
    return TestClient(create_app(State(Settings(model="m"), front, Metrics(lambda: None)), Keys([]), frozenset()))


class Slow(NoTokenizer):
    """A tokenizer that works in a thread, and notes on which."""

    def __init__(self):
        super().__init__("slow")
        self.threads = []

    def template(self):
        raise RequestError("There is none.")

    def encode(self, text):
        self.threads.append(threading.current_thread().name)
        return [1] * len(text)


def test_texts_are_short_together_or_not_at_all():
    """Many short ones cost as much as a long one, so none of them becomes tokens on the event loop."""
    slow = Slow()
    client = served(SimpleNamespace(tokenizer=slow, spec=SimpleNamespace(vocab_size=256)))
    answer = client.post("/v1/completions", json={"prompt": ["a" * 80] * 50 + ["a" * 100]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert len(slow.threads) == 51
    assert all(name.startswith("texts") for name in slow.threads)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", {"prompt": [[1]] * 65}, "64"),
        ("/v1/completions", {"prompt": [[1]] * 65 + [[1] * 300]}, "64"),
        ("/v1/completions", {"prompt": [[1], [1] * 300]}, "300 tokens"),
        ("/v1/completions", {"prompt": [1] * 1_000_000}, "1000000 tokens"),
        ("/v1/completions", {"prompt": [[1]] + [1] * 1_000_000}, "1000000 tokens"),
        ("/v1/completions", {"prompt": [1], "n": 10**4299}, "int"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 10**4299 * 5}, "int"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 2049}, "2048"),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}] * 2049}, "2048"),
    ],
)
def test_more_than_a_request_may_hold(path, body, words):
    """Each is a 400 that says how many there may be, or are."""
    answer = served(SimpleNamespace(tokenizer=Slow(), spec=SimpleNamespace(vocab_size=256))).post(path, json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == next(name for name in ("n", "prompt", "messages") if name in body)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/completions", {"prompt": "a"}, "prompt", "no tokenizer"),
        ("/v1/completions", {"prompt": "a" * 5_000}, "prompt", "no tokenizer"),
        ("/tokenize", {"prompt": "a"}, "prompt", "no tokenizer"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "messages", "no tokenizer"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "messages", "no tokenizer"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}]},
            "messages",
            "ids to /v1/completions",
        ),
        ("/v1/chat/completions", {"messages": []}, "messages", "empty"),
        ("/detokenize", {"tokens": ["a"]}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": 10**30}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": [256]}, "tokens", "vocabulary"),
    ],
)
def test_what_cannot_become_tokens_or_text_names_its_field(path, body, param, words):
    """Also where the model is what is missing."""
    info = SimpleNamespace(tokenizer=NoTokenizer("none"), spec=SimpleNamespace(vocab_size=256))
    answer = served(info).post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]


def test_connections_are_few():
    """One more than allowed is told so and closed; when one of the others ends there is room again."""

    async def scenario():
        config = uvicorn.Config(None, log_config=None, ws="none", lifespan="off")
        state, loop = ServerState(), asyncio.get_running_loop()
        make = partial(Http, config=config, server_state=state, app_state={}, most=1)
        async with await loop.create_server(make, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()
            _, first = await asyncio.open_connection(*address)
            reader, second = await asyncio.open_connection(*address)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"overloaded"' in answer
            first.close()
            second.close()
            while state.connections:
                await asyncio.sleep(0)
            reader, third = await asyncio.open_connection(*address)
            third.write(b"nonsense\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            third.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))
