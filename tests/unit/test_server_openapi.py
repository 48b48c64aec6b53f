"""The OpenAPI document says what the server takes: bounds, values that ask for nothing, and best_of."""

import json

import pytest

from disagg.errors import RequestError
from disagg.server.asked import NOTHING, ChatRequest, CompletionRequest
from disagg.server.decoding import decode
from disagg.server.openapi import BOUNDS, make
from disagg.server.problems import Problem


def sampled(name, value):
    """What the engine is asked for when this field has this value."""
    kind = ChatRequest if name in ("max_completion_tokens", "top_logprobs") else CompletionRequest
    prompt = {"messages": [], "logprobs": True} if kind is ChatRequest else {"prompt": "a"}
    asked = decode(kind, json.dumps({**prompt, name: value}).encode())
    most = asked.most_tokens() if kind is ChatRequest else asked.max_tokens
    logprobs = asked.num_logprobs() if kind is ChatRequest else asked.logprobs
    return asked.sampling(2**31 - 1 if most is None else most, logprobs)


HANDLERS = {"n", "best_of", "messages", "stop", "stop_token_ids"}  # not for the engine to check


@pytest.mark.parametrize("key", [key for key in BOUNDS if key not in HANDLERS])
def test_the_bounds_in_the_document_are_the_engines(key):
    """A bound is taken, or, being exclusive, refused; so is what lies a little beyond."""
    name = key.rpartition(".")[2]
    for bound, beyond in (("minimum", -1), ("exclusiveMinimum", -1), ("maximum", 1), ("exclusiveMaximum", 1)):
        if (value := BOUNDS[key].get(bound)) is None:
            continue
        if bound.startswith("exclusive"):
            with pytest.raises((Problem, RequestError)):
                sampled(name, value)
        else:
            sampled(name, value)
        with pytest.raises((Problem, RequestError)):
            sampled(name, value + beyond)


def test_top_k_is_off_in_two_ways():
    """0, and -1 for vLLM's clients."""
    assert [sampled("top_k", value).top_k for value in (-1, 0, 1)] == [0, 0, 1]


def test_the_document_says_which_values_ask_for_nothing():
    """Of every unsupported field, and each of them is taken."""
    properties = make()["components"]["schemas"]["CompletionRequest"]["properties"]
    for name, values in NOTHING.items():
        assert properties[name]["enum"] == list(values)
        for value in values:
            decode(CompletionRequest, json.dumps({"prompt": "a", name: value}).encode())


@pytest.mark.parametrize(("n", "best_of"), [(None, 1), (2, 2), (2, None)])
def test_best_of_may_only_be_n(n, best_of):
    """All choices that are drawn are returned: any other number is refused, 1 beside n 2 too."""
    decode(CompletionRequest, json.dumps({"prompt": "a", "n": n, "best_of": best_of}).encode()).sampling(1, None)
    with pytest.raises(Problem, match="best_of") as caught:
        decode(CompletionRequest, json.dumps({"prompt": "a", "n": n, "best_of": 3}).encode()).sampling(1, None)
    assert (caught.value.status, caught.value.param) == (400, "best_of")


def test_the_document_says_what_detokenize_takes():
    """A list of ids, although the server reads them later."""
    tokens = make()["components"]["schemas"]["DetokenizeRequest"]["properties"]["tokens"]
    assert tokens == {"type": "array", "items": {"type": "integer"}}
