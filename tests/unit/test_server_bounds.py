"""What a request may cost before it comes to the deployment: every list is short, and checked once."""

import asyncio
import json
import threading
from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from uvicorn.server import ServerState

from disagg.errors import RequestError
from disagg.model.tokenizer import NoTokenizer
from disagg.request import SamplingParams
from disagg.server import decoding
from disagg.server.app import create_app
from disagg.server.asked import (
    MOST_MESSAGES,
    MOST_STOP_TOKENS,
    ChatRequest,
    CompletionRequest,
    RawPrompt,
    TokenizeRequest,
)
from disagg.server.decoding import MOST_STRINGS, decode
from disagg.server.generating import for_choice
from disagg.server.guards import Keys
from disagg.server.http import Http
from disagg.server.metrics import Metrics
from disagg.server.problems import Problem
from disagg.server.state import Settings, State
from disagg.server.text_process import read_ids


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


@pytest.mark.parametrize("prompt", ['["a", []%s]', '[[1], "a"%s]', '[1, "a"%s]', "[[1], 1%s]"])
def test_a_prompt_of_texts_and_ids_is_refused_whatever_its_length(prompt):
    """Before what it holds is made, where that is much."""
    for more in ("", ", []" * 100_000):
        with pytest.raises(Problem, match=r"^prompt must be a text") as caught:
            decode(CompletionRequest, (f'{{"prompt": {prompt % more}}}').encode()).prompts()
        assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize("name", ["prompt", r"pr\u006fmpt", r"\u0070\u0072ompt"])
@pytest.mark.parametrize(
    ("last", "words"), [('"prompt": "x"', "given twice"), ('"prompt": "x", "unknown": 1', "no field unknown")]
)
def test_a_field_given_twice_cannot_hide_what_the_first_one_holds(name, last, words):
    """However its name is written, of a large body: nothing is made of it. In a small one the last counts."""
    body = '{"%s": [%s], %s}'
    assert decode(CompletionRequest, (body % (name, "[1]", '"prompt": "x"')).encode()).prompts() == ["x"]
    with pytest.raises(Problem, match=words):
        decode(CompletionRequest, (body % (name, ", ".join(["[1]"] * 100_000), last)).encode())


KNOWN, SHORT = ("messages", "stop", "user", "tools"), ("stop", "user", "tools")
KEYS = st.sampled_from([*KNOWN, 'a"b', "\\", "é", ""])
VALUES = st.recursive(
    st.none() | st.integers() | st.text('a"\\é\x00', max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def escaped(draw, text):
    """The text as a JSON string, each character written as it is or by its number."""
    plain = [json.dumps(char, ensure_ascii=False)[1:-1] for char in text]
    numbers = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
    pairs = zip(text, plain, numbers, strict=True)
    return '"' + "".join(f"\\u{ord(char):04x}" if number else as_is for char, as_is, number in pairs) + '"'


@given(st.data(), st.lists(st.tuples(KEYS, VALUES), max_size=6))
def test_sizes_and_strings_are_those_of_a_plain_parse(data, fields):
    """Of any object: no way to write a name, and none to write a value, hides what has to be made of it."""
    written = [(name, data.draw(escaped(name)), json.dumps(value, ensure_ascii=False)) for name, value in fields]
    body = ("{" + ", ".join(f"{name}: {value}" for _, name, value in written) + "}").encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoding, "_LARGE", 20)
        patched.setattr(decoding, "MOST_STRINGS", 3)
        said = ""
        try:
            decode(Fields, body)
        except Problem as problem:
            said = problem.message
    expected = refusal_of(body, {name: value for name, _, value in written})
    assert expected in said
    assert bool(expected) == bool(said)


def refusal_of(body, values):
    """What is wrong with these fields of this body, by a parse that knows no bounds."""
    if len(body) > 20 and count_strings(json.loads(body, object_pairs_hook=Pairs)) > 3:
        return "more than 3 strings"
    rest = len(body)
    for name, value in values.items():  # of one that comes twice the last, in the place of the first
        if name not in KNOWN:
            return "There is no field"
        if name in SHORT and len(value.encode()) > 20:
            return f"{name} is longer than 20 bytes"
        rest -= len(value.encode())
    if rest > 20:
        return "given twice"
    return "tools is not supported" if values.get("tools", "null") not in ("null", "[]") else ""


class Fields(msgspec.Struct, forbid_unknown_fields=True):
    """What bounds are checked of: one field that may be long, two that may not."""

    messages: msgspec.Raw = msgspec.Raw()
    stop: msgspec.Raw = msgspec.Raw()
    user: msgspec.Raw = msgspec.Raw()


class Pairs(list):
    """An object with every field it was given."""


def count_strings(value):
    if isinstance(value, Pairs):
        return len(value) + sum(count_strings(inner) for _, inner in value)
    if isinstance(value, list):
        return sum(map(count_strings, value))
    return isinstance(value, str)


@pytest.mark.parametrize(
    ("prompt", "lists", "longest"),
    [
        ("[1, 2,3]", 1, 3), ("[]", 1, 1), ("[[1, 2], [3]]", 2, 2), ("[[1] , [2, 3]\n,[4,5]]", 3, 2), ("[[1]]", 1, 1),
        ("[[1], 1, 1, 1]", 1, 3), ("[[1], 1, 1, [1], 1,1,1,1]", 2, 4),
        ('"[1, 2]"', 0, 0), ('["a, b"]', 0, 0), ("null", 0, 0),
    ],
)  # fmt: skip
def test_token_ids_are_counted_before_they_are_decoded(prompt, lists, longest):
    """Only where they are nothing but ids, in lists or beside them; of anything else decoding tells."""
    raw = RawPrompt(prompt.encode())
    assert raw.num_lists() == lists
    assert not lists or raw.longest() == longest


@pytest.mark.parametrize("digits", ["9" * 20, "9" * 4_000, "-" + "9" * 4_000])
@pytest.mark.parametrize("prompt", ["[%s, null]", "[1, %s, null]", "[[%s], null]", "[[1], [%s, null]]"])
def test_decoding_ends_at_a_number_of_too_many_digits(prompt, digits):
    """It is what the 400 is about: the decoder, which would be busy with thousands of these, did not go on."""
    with pytest.raises(Problem, match="prompt") as caught:
        decode(CompletionRequest, f'{{"prompt": {prompt % digits}}}'.encode())
    assert prompt.count(",", 0, prompt.index("%")) == sum(map(int, caught.value.param[7:-1].split("][")))
    with pytest.raises(RequestError, match="tokens"):
        read_ids(f"[{digits}, 1]".encode(), 99)


@pytest.mark.parametrize("name", ["n", "\\u006e", "unknown", ""])
@pytest.mark.parametrize("end", ["}", "nonsense", ""])
def test_strings_are_counted_before_anything_is_decoded(name, end):
    """A field that comes again and again is told by its names; nobody has seen yet that the rest is no JSON."""
    with pytest.raises(Problem, match=f"{MOST_STRINGS} strings"):
        decode(CompletionRequest, ("{" + f'"{name}":1,' * 40_000 + '"prompt": "a"' + end).encode())


def test_a_prompt_is_looked_at_before_anything_is_made_of_it():
    """Whatever is wrong with it otherwise; other requests and fields are not."""

    def look(prompt):
        raise Problem(400, f"looked at {prompt.json.decode()}")

    for prompt in ("[1, null]", "{}", '"a"'):
        with pytest.raises(Problem) as caught:
            decode(CompletionRequest, f'{{"prompt": {prompt}, "n": "x"}}'.encode(), look)
        assert caught.value.message == f"looked at {prompt}"
    assert decode(TokenizeRequest, b'{"prompt": "a"}', look).prompt == "a"
    with pytest.raises(Problem, match="missing"):
        decode(CompletionRequest, b"{}", look)


def test_a_large_request_may_hold_values_that_ask_for_nothing():
    """They are taken out of it."""
    body = {"prompt": "a" * 100_000, "tools": [], "store": False, "user": "me"}
    asked = decode(CompletionRequest, json.dumps(body).encode())
    assert (asked.prompt, asked.user) == (body["prompt"], "me")


@pytest.mark.parametrize(
    ("kind", "body", "field", "param"),
    [
        (CompletionRequest, '{"prompt": "a", "stop": [%s]}', f'"{"a" * 40}"', "stop"),
        (CompletionRequest, '{"prompt": "a", "stop_token_ids": [%s]}', "1", "stop_token_ids"),
        (CompletionRequest, '{"prompt": "a", "tools": [%s]}', "[]", "tools"),
        (ChatRequest, '{"messages": [], "logit_bias": [%s]}', "{}", "logit_bias"),
    ],
)
def test_a_field_of_megabytes_is_refused_by_its_length(kind, body, field, param):
    """No object is made of it."""
    with pytest.raises(Problem) as caught:
        decode(kind, (body % ",".join([field] * (900_000 // len(field)))).encode())
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("kind", "body", "unit"),
    [
        (CompletionRequest, '{"prompt": [%s]}', '"a"'),
        (CompletionRequest, '{"prompt": "a", %s}', '"tools": null'),
        (ChatRequest, '{"messages": [%s]}', '{"role": "user", "content": ""}'),
        (ChatRequest, '{"messages": [{"role": "user", "content": [%s]}]}', '{"type": "text", "text": "\\\\"}'),
        (CompletionRequest, '{"prompt": [%s]}', r'"\\"'),
    ],
)
def test_a_body_of_very_many_strings_is_refused_by_their_number(kind, body, unit):
    """No object is made of them."""
    with pytest.raises(Problem, match=f"{MOST_STRINGS} strings"):
        decode(kind, (body % ",".join([unit] * 40_000)).encode())


def test_quotes_within_a_text_are_no_strings():
    """A prompt that is itself JSON, or a program, may have as many as it likes."""
    text = 'say "a" \\ ' * 40_000
    assert decode(CompletionRequest, msgspec.json.encode({"prompt": text})).prompt == text
    messages = [{"role": "user", "content": [{"type": "text", "text": "a" * 40}]}] * MOST_MESSAGES
    assert len(decode(ChatRequest, msgspec.json.encode({"messages": messages})).messages) == MOST_MESSAGES


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
