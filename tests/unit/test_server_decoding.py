"""From a body to a request: what takes long is refused before it is decoded, and every refusal names its field."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.errors import RequestError
from disagg.server import decoding
from disagg.server.asked import MOST_MESSAGES, ChatRequest, CompletionRequest, RawPrompt, TokenizeRequest
from disagg.server.decoding import MOST_STRINGS, decode
from disagg.server.problems import Problem
from disagg.server.text_process import read_ids

LONG_NAME = b"temperature" * 400_000


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, b'{"prompt": "a", "logprob": 1}', "logprob"),
        (CompletionRequest, b'{"prompt": "a", "echo": false, "nn": 1}', "nn"),
        (CompletionRequest, b'{"prompt": "a", "best_of": true}', "best_of"),
        (CompletionRequest, b'{"prompt": "a", "echo": false, "prompt": "\xff"}', None),
        (CompletionRequest, b'{"prompt": "a", "logit_bias": ' + b"[" * 100_000, None),
        (CompletionRequest, b'{"prompt": "\\ud800"}', None),
        (CompletionRequest, b'{"prompt": "a", "' + b"x" * 10_000 + b'": 1}', "x" * 100),
        (CompletionRequest, b'{"prompt": "a", "n": NaN}', None),
        (CompletionRequest, b"", None),
        (CompletionRequest, b"[]", None),
        (
            ChatRequest,
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages[0].content[0].type",
        ),
        (CompletionRequest, b'{"prompt": "a", "%s": 1}' % LONG_NAME, LONG_NAME[:100].decode()),
        (CompletionRequest, b'{"prompt": "a", "disagg_route": "%s"}' % LONG_NAME, "disagg_route"),
        (ChatRequest, b'{"messages": [{"role": "%s", "content": "a"}]}' % LONG_NAME, "messages[0].role"),
        (ChatRequest, b'{"messages": [{"role": "tool", "content": "a"}]}', "messages[0].role"),
        (ChatRequest, b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "messages[0].tool_calls"),
    ],
)
def test_what_cannot_be_decoded_names_its_field(kind, body, param):
    """A 400 with the field's path, however broken the body is."""
    with pytest.raises(Problem) as caught:
        decode(kind, body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("kind", "field", "sentence"),
    [
        (CompletionRequest, '"disagg_route": "x"', "disagg_route must be colocated or disaggregated, not 'x'."),
        (CompletionRequest, '"disagg_route": 1', "disagg_route must be colocated or disaggregated, not an integer."),
        (CompletionRequest, '"n": 1.5', "n must be an integer or null, not a floating-point number."),
        (CompletionRequest, '"n": 99999999999999999999', "n must be an integer of at most 64 bits."),
        (CompletionRequest, '"stop": {}', "stop must be a text, a list or null, not an object."),
        (CompletionRequest, '"stream": "yes"', "stream must be a boolean or null, not a text."),
        (CompletionRequest, '"temperature": []', "temperature must be a number or null, not a list."),
        (CompletionRequest, f'"temperature": {"9" * 400}', "temperature cannot be read: Number out of range."),
        (CompletionRequest, '"temprature": 1', "There is no field temprature here. Did you mean temperature?"),
        (ChatRequest, '"messages": [{}]', "messages[0].role is missing."),
        (ChatRequest, '"messages": [1]', "messages[0] must be an object, not an integer."),
        (
            ChatRequest,
            '"messages": [{"role": "tool", "content": ""}]',
            "messages[0].role must be system, developer, user or assistant, not 'tool'.",
        ),
        (
            ChatRequest,
            '"messages": [{"role": "user", "content": [{"type": "image_url"}]}]',
            "messages[0].content[0].type must be text, not 'image_url'.",
        ),
        (ChatRequest, '"messages": [{"foo": 1}]', "There is no field messages[0].foo here."),
    ],
)
def test_what_a_field_may_be_is_said(kind, field, sentence):
    """In one kind of sentence that begins with the field, by names that clients know."""
    with pytest.raises(Problem) as caught:
        decode(kind, f"{{{field}}}".encode())
    assert caught.value.message == sentence
    assert caught.value.param in sentence
    with pytest.raises(Problem) as caught:
        decode(kind, b"[]")
    assert (caught.value.message, caught.value.param) == ("The body must be an object, not a list.", None)


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
