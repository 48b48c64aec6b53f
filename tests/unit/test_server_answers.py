"""What clients get, without a server: events, whole answers, usage, metrics, health."""

import json
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from disagg.cluster.cluster import WorkerStatus
from disagg.cluster.status import Status
from disagg.engine.batch import TokenLogprobs
from disagg.errors import RequestError, WorkerLost
from disagg.record import Record
from disagg.server.answers import DONE, Events, Form, TokenNames, Whole
from disagg.server.app import create_app
from disagg.server.asked import FIELDS, ChatRequest
from disagg.server.decoding import decode
from disagg.server.exchange import Piece
from disagg.server.guards import Keys
from disagg.server.metrics import Metrics
from disagg.server.openapi import make
from disagg.server.problems import problem_of
from disagg.server.state import Settings, State


class Bytes:
    """Token i is byte i; two halves of a character are no text."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


NAMES = TokenNames(Bytes())
RECORD = Record(request_id="r", index=0, prompt_len=9, finish_reason="length", num_cached=4)


def piece(choice, text, tokens, finish="", record=None, at=0):
    values = [TokenLogprobs(-1.0, [(token, -1.0), (195, -2.0)]) for token in tokens]
    return Piece(
        choice, list(text) or [""], tokens, values, finish, record, [at + number for number in range(len(tokens))]
    )


PIECES = [
    piece(0, 'a"\n', [97, 34, 10]),
    piece(1, "", [195]),
    piece(1, "é", [169]),
    piece(0, "", [], "stop", RECORD),
    piece(1, "z", [122], "length", RECORD, at=1),
]


def parsed(form):
    events = Events(form, "id0", NAMES)
    stream = events.events(PIECES[:1]) + events.events(PIECES[1:]) + events.last()
    assert stream.endswith(DONE)
    return [json.loads(event.removeprefix("data: ")) for event in stream.decode().split("\n\n")[:-2]]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("options", [{}, {"usage": True}, {"logprobs": True, "token_ids": True, "usage_so_far": True}])
def test_a_stream_says_what_the_whole_answer_says(chat, options):
    """Joined, the events of a choice are the choice of the whole answer: text, ids, logprobs, reason, usage."""
    form = Form(chat, "m", [9], 2, **options)
    whole = Whole(form, NAMES)
    for each in PIECES:
        whole.add(each)
    body = whole.body("id0")
    events = parsed(form)
    for index, choice in enumerate(body["choices"]):
        mine = [one for event in events for one in event["choices"] if one["index"] == index]
        said = [one["delta"] if chat else one for one in mine]
        text = choice["message"]["content"] if chat else choice["text"]
        assert "".join(one["content" if chat else "text"] for one in said) == text == ('a"\n', "éz")[index]
        assert [one.get("role") for one in said] == (
            ["assistant"] + [None] * (len(said) - 1) if chat else [None] * len(said)
        )
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        if form.token_ids:
            assert [token for one in mine for token in one["token_ids"]] == choice["token_ids"]
        if form.logprobs:
            key = "content" if chat else "tokens"
            assert [entry for one in mine for entry in one["logprobs"][key]] == choice["logprobs"][key]
            if not chat:
                assert [at for one in mine for at in one["logprobs"]["text_offset"]] == choice["logprobs"][
                    "text_offset"
                ]
    assert {event["id"] for event in events} == {body["id"]} == {"chatcmpl-id0" if chat else "cmpl-id0"}
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 6,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert body["usage"] == usage
    if form.usage:
        assert [event["usage"] for event in events] == [None] * 7 + [usage]
        assert events[-1]["choices"] == []
    elif form.usage_so_far:
        assert events[-1]["usage"] == usage
    else:
        assert all("usage" not in event for event in events)


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "token_ids": True, "usage_so_far": True}])
def test_every_token_is_an_event_of_its_own(options):
    """However many come at once; only a choice's last event says why it ended, and usage grows by one a token."""
    form = Form(False, "m", [9], 2, **options)
    mine = [event for event in parsed(form) if event["choices"][0]["index"] == 0]
    assert [event["choices"][0]["text"] for event in mine] == ["a", '"', "\n", ""]
    assert [event["choices"][0]["finish_reason"] for event in mine] == [None, None, None, "stop"]
    if options:
        assert [event["choices"][0]["token_ids"] for event in mine] == [[97], [34], [10], []]
        assert [event["choices"][0]["logprobs"]["text_offset"] for event in mine] == [[0], [1], [2], []]
        assert [event["usage"]["completion_tokens"] for event in mine] == [1, 2, 3, 5]


def test_names_of_tokens_are_never_half_characters():
    """A token that is no text by itself has a name of its own and no bytes."""
    assert NAMES.entry(97, -1.0) == {"token": "a", "logprob": -1.0, "bytes": [97]}
    assert NAMES.entry(195, -2.0) == {"token": "token_id:195", "logprob": -2.0, "bytes": None}


def test_the_chosen_token_is_among_the_likeliest():
    """As in the OpenAI API: one more than asked for if it is not; of tokens with the same text the likeliest counts."""
    whole = Whole(Form(False, "m", [1], 1, logprobs=True), NAMES)
    values = [TokenLogprobs(-3.0, [(97, -1.0), (98, -2.0)]), TokenLogprobs(-1.0, [(97, -1.0)]), TokenLogprobs(-5.0, [])]
    whole.add(Piece(0, ["z", "a", "b"], [122, 97, 98], values, "length", RECORD, [0, 1, 2]))
    found = whole.body("id0")["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"a": -1.0, "b": -2.0, "z": -3.0}, {"a": -1.0}, {"b": -5.0}]
    assert found["token_logprobs"] == [-3.0, -1.0, -5.0]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_chat_names_parameters_as_its_clients_do(body, name):
    """The engine's name for a limit is not what the client wrote."""
    asked = decode(ChatRequest, json.dumps({"messages": [], **body}).encode())
    limit = 5 if asked.most_tokens() is None else asked.most_tokens()
    with pytest.raises(RequestError) as caught:
        asked.sampling(limit, asked.num_logprobs())
    assert problem_of(caught.value, FIELDS).param == name


def test_a_worker_that_is_missing_is_a_503():
    """As for a forced route that cannot be had, or an audit that is not answered: later it may be."""
    answer = problem_of(WorkerLost("Fewer than two workers are up.")).response()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def client_of(workers, stopping="", progress="loading"):
    front = SimpleNamespace(workers=workers, progress=progress, cluster=None)
    state = State(Settings(model="m"), front, Metrics(lambda: None))
    state.stopping = stopping
    return TestClient(create_app(state, Keys([]), frozenset({"testserver"})))


def worker(name, up):
    return WorkerStatus(name, f"{name}.0", "both", up, None)


@pytest.mark.parametrize(
    ("workers", "stopping", "status", "code", "words"),
    [
        ([], "", "starting", 503, "loading"),
        ([worker("P0", True), worker("D0", True)], "", "ready", 200, None),
        ([worker("P0", False), worker("D0", True)], "", "degraded", 200, "P0"),
        ([worker("P0", False), worker("D0", False)], "", "unavailable", 503, "D0"),
        ([worker("P0", True)], "It stops.", "stopping", 503, "It stops."),
    ],
)
def test_health_is_ready_only_when_every_worker_is(workers, stopping, status, code, words):
    """Degraded still serves, and says which worker is missing; without any it is a 503."""
    answer = client_of(workers, stopping).get("/health")
    assert (answer.status_code, answer.json()["status"]) == (code, status)
    assert (words is None) == (answer.json()["reasons"] == [])
    assert words is None or words in " ".join(answer.json()["reasons"])


def test_unknown_paths_and_methods_are_errors_of_the_same_form():
    """404 and 405 in OpenAI's format; the metrics do not grow with what strangers ask for."""
    client = client_of([])
    assert client.get("/v2/x").json()["error"]["type"] == "invalid_request_error"
    wrong = client.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"]
    for number in range(5):
        client.get(f"/stranger/{number}")
    paths = [line for line in client.get("/metrics").text.splitlines() if line.startswith("disagg_http_requests_total")]
    assert sum('path="other"' in line for line in paths) == 1
    assert not any("stranger" in line for line in paths)


def test_metrics_parse_and_sum_up():
    """Prometheus' own parser reads them; the histogram of gaps counts every gap once, in the right bucket."""
    metrics = Metrics(lambda: None)
    record = Record(request_id="r", index=0, prompt_len=3, output_len=4, finish_reason="stop")
    record.prefill_worker, record.decode_worker, record.token_at = "P0.0", "D0.0", [1.0, 1.004, 1.012, 21.0]
    record.handoff_bytes, record.handoff_busy_s = 10, 2.0
    metrics.add(record)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    gaps = families["disagg_inter_token_latency_seconds"].samples
    counts = {sample.labels["le"]: sample.value for sample in gaps if "le" in sample.labels}
    assert (counts["0.0025"], counts["0.005"], counts["0.015"], counts["10"], counts["+Inf"]) == (0, 1, 2, 2, 3)
    assert next(s.value for s in gaps if s.name.endswith("_sum")) == pytest.approx(20.0)
    assert families["disagg_handoff_bytes"].samples[0].value == 10
    phases = {s.labels["phase"] for s in families["disagg_request_phase_seconds"].samples}
    assert {"queue", "prefill", "handoff_copy", "decode"} <= phases


def test_a_model_is_known_by_the_name_it_is_served_by():
    """Metrics and page say that name; the path of the weights on this machine is nobody's business."""
    inside = Status(0.0, "1C", "/home/me/weights", "conditional", 1, 16, 1, [], {"live": 0}, None, [])
    front = SimpleNamespace(cluster=lambda: SimpleNamespace(status=lambda: inside))
    state = State(Settings(model="m"), front, Metrics(lambda: None))
    text = Metrics(state.status).render().decode()
    assert 'model_name="m"' in text
    assert "/home" not in text


def test_the_document_names_every_route():
    """The OpenAPI document has the paths that the application has, but for the page's."""
    inner = client_of([]).app._app
    served = {route.path for route in inner.routes} - {"/", "/live", "/static"}
    assert {path.replace("{name}", "{name:path}") for path in make()["paths"]} == served
    assert "additionalProperties" in make()["components"]["schemas"]["CompletionRequest"]


def test_keys_are_compared_whole():
    """A prefix, another scheme or an empty key is none; several keys are all good."""
    keys = Keys(["one", "zwö"])
    assert all(keys.allow(value.encode()) for value in ("Bearer one", "bearer zwö", "Bearer  one "))
    assert not any(keys.allow(value) for value in (b"", b"Bearer", b"Bearer on", b"Bearer onee", b"Basic one", b"one"))
    assert not Keys([])
