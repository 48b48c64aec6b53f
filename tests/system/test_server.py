"""A real server process on a tiny model, asked by the official client and by rude ones."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leftovers import nothing_left
from serving import events, post, raw, settled, starting

from disagg import LLM, SamplingParams
from disagg.record import read_records
from disagg.testing import tiny_checkpoint

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="1P1D needs two cores")

PROMPT = "Die Hauptstadt von Frankreich: Paris, 日本語!"
MESSAGES = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi ✓"}]
TRANSPORT_S = 0.03  # of a request to this server and of its answer back, client and JSON included
PENALTIES = {"presence_penalty": 2.0, "frequency_penalty": 1.5, "repetition_penalty": 1.7}
LONG = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Every byte is a token, so outputs are full of halves of characters."""
    return str(tiny_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    """1P1D for all tests here, while it starts; Ctrl-C ends it with exit code 130 and nothing left."""
    folder = tmp_path_factory.mktemp("server")  # before nothing_left sets another place for such
    records = str(folder / "records.jsonl")
    options = ("--model", model, "--deploy", "1P1D", "--budget", "cpu:2", "--records", records)
    with nothing_left(), starting(folder, *options) as ready:
        running = []

        def server():
            running[:] = running or [ready()]
            return running[0]

        yield server
        assert server().stop(2) == 130


@pytest.fixture(scope="module")
def expected(model, started):
    """What the Python API gives: for the prompt, for the conversation, and for the prompt with penalties."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
    with LLM(model, deploy="1C", budget="cpu:1") as llm:
        penalised = [msgspec.structs.replace(params, **{name: value}) for name, value in PENALTIES.items()]
        return llm.generate([PROMPT, llm.chat(MESSAGES)] + [PROMPT] * len(penalised), [params, params, *penalised])


@pytest.fixture(scope="module")
def server(started, expected):
    """The server, ready."""
    return started()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 40}
EXTRA = {"ignore_eos": True, "return_token_ids": True}


def all_free(server) -> bool:
    return all(worker["held"] == 0 and not worker["holders"] for worker in server.audit())


def test_completions_equal_the_python_api(server, client, expected):
    """Greedy text and token ids are those of LLM.generate, from a text and from token ids, whole and streamed."""
    plain = client.completions.create(prompt=PROMPT, extra_body=EXTRA, **GREEDY)
    assert plain.choices[0].text == expected[0].text
    assert plain.choices[0].token_ids == expected[0].token_ids
    assert plain.choices[0].finish_reason == "length"
    assert plain.usage.completion_tokens == 40

    pieces = list(client.completions.create(prompt=PROMPT, stream=True, extra_body=EXTRA, **GREEDY))
    assert [token for piece in pieces for token in piece.choices[0].token_ids] == expected[0].token_ids
    assert "".join(piece.choices[0].text for piece in pieces) == expected[0].text
    assert len(pieces) >= 40
    assert pieces[-1].choices[0].finish_reason == "length"

    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert client.completions.create(prompt=ids, extra_body=EXTRA, **GREEDY).choices[0].text == expected[0].text


def test_chat_equals_the_python_api(client, expected):
    """The chat template is the tokenizer's, and a stream is the same text, beginning with the role."""
    asked = {"messages": MESSAGES, "extra_body": EXTRA, **GREEDY}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected[1].text

    pieces = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces[:-1]) == expected[1].text
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": pieces[-1].usage.prompt_tokens_details}
    )
    assert whole.usage.prompt_tokens_details.cached_tokens <= pieces[-1].usage.prompt_tokens_details.cached_tokens


def test_logprobs_are_the_models_own(client, expected):
    """Both forms carry the values of the Python API; a half character is named by its id."""
    whole = client.completions.create(prompt=PROMPT, logprobs=2, extra_body=EXTRA, **GREEDY)
    found = whole.choices[0].logprobs
    assert found.token_logprobs == pytest.approx([one.chosen for one in expected[0].logprobs], abs=1e-4)
    text, names = whole.choices[0].text, found.tokens
    assert len(names) == len(found.text_offset) == 40
    assert "token_id:" in "".join(names)
    for at, name in zip(found.text_offset, names, strict=True):  # also behind halves of characters
        assert name.startswith("token_id:") or text[at] == name
    assert all(name in top and 2 <= len(top) <= 3 for name, top in zip(names, found.top_logprobs, strict=True))

    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body=EXTRA, **GREEDY)
    for entry, token, one in zip(
        chat.choices[0].logprobs.content, chat.choices[0].token_ids, expected[1].logprobs, strict=True
    ):
        assert entry.logprob == pytest.approx(one.chosen, abs=1e-4)
        assert len(entry.top_logprobs) == 2
        assert (entry.bytes is None) == (entry.token == f"token_id:{token}")


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_equal_the_python_api(server, expected, penalty):
    """Each changes the greedy tokens, to those that the Python API gives with it."""
    body = {"prompt": PROMPT, penalty: PENALTIES[penalty], **GREEDY, **EXTRA}
    found = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["token_ids"]
    assert found == expected[2 + list(PENALTIES).index(penalty)].token_ids
    assert found != expected[0].token_ids


def test_cached_tokens_are_the_whole_pages_found(client):
    """None of a new prompt; of one asked before all whole pages, but for a token to compute, once for all choices."""
    for length, cached in ((16, 0), (40, 32), (48, 32), (49, 48)):
        asked = {"prompt": [length] * 3 + list(range(length - 3)), "n": 2, **GREEDY, "max_tokens": 2}
        first, second = (client.completions.create(**{**asked, "n": n}).usage for n in (1, 2))
        assert (first.prompt_tokens, first.prompt_tokens_details.cached_tokens) == (length, 0)
        assert (second.prompt_tokens, second.prompt_tokens_details.cached_tokens) == (length, cached)


def test_choices_batches_and_seeds(client):
    """n choices of each prompt, in order; a seed repeats them, and choices of one request differ."""
    asked = {"model": "tiny", "prompt": ["one", "two"], "n": 2, "seed": 7, "max_tokens": 12}
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in second.choices]
    assert texts[0] != texts[1]
    assert first.usage.prompt_tokens == 6
    assert second.usage.prompt_tokens_details.cached_tokens == 0  # less than a page


def test_a_stop_string_is_never_shown(client, expected):
    """Text ends before it, streamed or not, and the reason is `stop`."""
    text = expected[0].text
    stop = text[10:13]
    until = text.index(stop)
    asked = {"prompt": PROMPT, "stop": [stop, "never"], "extra_body": EXTRA, **GREEDY}
    whole = client.completions.create(**asked)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[:until], "stop")
    pieces = list(client.completions.create(stream=True, **asked))
    assert "".join(piece.choices[0].text for piece in pieces) == text[:until]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_max_tokens_is_bounded_by_the_context(server):
    """500 tokens of a context of 512 leave 12: no more come than fit, whatever was allowed, and that is a length."""
    body = {"prompt": "a" * 500, "max_tokens": 100, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "a", "temprature": 1}, "temprature", "temperature"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"prompt": "a", "best_of": 4}, "best_of", "not supported"),
        ({"prompt": "a", "echo": True}, "echo", "not supported"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "int"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens", "2**31"),
        ({"prompt": "a", "top_k": 10**30}, "top_k", "2**31"),
        ({"prompt": "a", "min_tokens": 10**30}, "min_tokens", "max_tokens"),
        ({"prompt": "a", "stop_token_ids": [10**30]}, "stop_token_ids", "token ids"),
        ({"prompt": "a", "temperature": -1}, "temperature", "0"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "16"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream"),
        ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "no field"),
        ({"prompt": "a", "n": 65}, "n", "64"),
        ({"prompt": "a", "n": 0}, "n", "1"),
        ({"prompt": ["a", 1]}, "prompt", "list"),
        ({"prompt": []}, "prompt", "list"),
        ({"prompt": ""}, "prompt", "0 tokens"),
        ({"prompt": [320]}, "prompt", "vocabulary"),
        ({"prompt": "a" * 512}, "prompt", "512 tokens"),
        ({}, "prompt", "missing"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_it(server, body, param, words):
    """Nothing is ignored: an unknown, unsupported or impossible field is an error in OpenAI's format."""
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


def test_values_that_ask_for_nothing_are_accepted(server):
    """Clients send unsupported fields with neutral values; these change nothing."""
    body = {"prompt": "a", "max_tokens": 1, "best_of": 1, "logit_bias": {}, "echo": False, "suffix": None, "user": "me"}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    chat = {"messages": MESSAGES, "max_tokens": 1, "tools": [], "response_format": {"type": "text"}, "store": False}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).status_code == 200
    returned = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}
    chat["messages"] = [*MESSAGES, returned, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).status_code == 200


def test_another_model_is_a_404(client):
    """In OpenAI's words."""
    with pytest.raises(openai.NotFoundError, match="gpt-4") as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512


def test_tokenize_and_detokenize(server):
    """Both ways, for a prompt and for a conversation."""
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(PROMPT.encode())
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}
    assert httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()["count"] > 10
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [320]}).status_code == 400


def test_a_client_that_leaves_before_the_first_token_frees_its_pages(server):
    """The same while nothing has been sent, and for an answer that is not streamed."""
    body = json.dumps({**LONG, "stream": False}).encode()
    for _ in range(5):
        with socket.create_connection(server.address) as connection:
            connection.sendall(post("/v1/completions", body))
    settled(lambda: all_free(server))


def test_both_routings_give_the_same_tokens(server):
    """`disagg_route` chooses one worker or two; the tokens are equal, and the Records say which it was."""
    texts = []
    for routing in ("colocated", "disaggregated"):
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "disagg_route": routing}
        answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
        texts.append(answer["choices"][0]["text"])
        name = answer["id"].removeprefix("cmpl-")
        settled(lambda name=name: name in server.log.read_text())
        (line,) = (json.loads(line) for line in server.log.read_text().splitlines() if name in line)
        (choice,) = line["choices"]
        assert (choice["prefill_worker"] == choice["decode_worker"]) == (routing == "colocated")
    assert texts[0] == texts[1]


@pytest.mark.alone
def test_parts_sum_to_what_a_client_measures(server, client):
    """By the client's own clock, over HTTP: the parts are 1 ms off at most, and what HTTP itself usually takes."""
    client.completions.create(prompt=PROMPT, extra_body=EXTRA, **GREEDY)
    known = len(list(read_records(server.log.parent / "records.jsonl")))
    seen = []
    for _ in range(9):
        sent_at = time.monotonic()
        pieces = client.completions.create(prompt=PROMPT, stream=True, extra_body=EXTRA, **GREEDY)
        at = [time.monotonic() for _ in pieces]
        seen.append((at[0] - sent_at, at[-1] - sent_at))
    records = list(read_records(server.log.parent / "records.jsonl"))[known:]
    first = sorted(ttft_s - sum(r.ttft_parts().values()) for (ttft_s, _), r in zip(seen, records, strict=True))
    last = sorted(e2e_s - sum(r.e2e_parts().values()) for (_, e2e_s), r in zip(seen, records, strict=True))
    assert 0 <= first[len(first) // 2] < 1e-3 + TRANSPORT_S
    assert 0 <= last[len(last) // 2] < 1e-3 + TRANSPORT_S


def test_records_and_metrics_count_alike(server, client):
    """Every request leaves a Record without its tokens; the metrics are sums of the Records."""
    client.completions.create(prompt=PROMPT, extra_body=EXTRA, **GREEDY)
    metrics = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    written = list(read_records(server.log.parent / "records.jsonl"))
    records = [record for record in written if record.finish_reason != "refused"]
    assert float(values["disagg_prompt_tokens_total"]) == sum(record.prompt_len for record in records)
    assert float(values["disagg_generation_tokens_total"]) == sum(record.output_len for record in records)
    assert float(values["disagg_inter_token_latency_seconds_count"]) == sum(len(r.itl_s) for r in records)
    assert float(values['disagg_worker_up{role="prefill",worker="P0"}']) == 1
    assert all(record.tokens == [] for record in written)
    assert {"stop", "length", "abort"} >= {record.finish_reason for record in records}
    refused = server.metric('disagg_request_success_total{finished_reason="refused"}')
    assert refused == len(written) - len(records) > 0


def test_what_is_refused_leaves_a_record(server):
    """One a choice once it is known what they are; the sentence, which may repeat parts of a prompt, is in none."""
    known = len(list(read_records(server.log.parent / "records.jsonl")))
    for body in ({"prompt": [[1], [1, 2]], "stop_token_ids": [320], "n": 2}, {"prompt": "a" * 512}, {"prompt": 5}):
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 400
        request_id = answer.headers["X-Request-Id"]
    settled(lambda: len(list(read_records(server.log.parent / "records.jsonl"))) == known + 6)
    found = list(read_records(server.log.parent / "records.jsonl"))[known:]
    assert {record.finish_reason for record in found} == {"refused"}
    assert [record.prompt_len for record in found] == [1, 1, 2, 2, 0, 0]
    assert [record.error for record in found] == ["400"] * 4 + ["400 context_length_exceeded", "400"]
    assert found[-1].request_id == request_id
    settled(lambda: any(line["id"] == request_id for line in server.requests()))


def test_health_version_and_page(server):
    """Ready means that every worker is; the page and its feed are there."""
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready", "reasons": []}
    assert httpx.get(f"{server.url}/version").json()["version"]
    assert httpx.get(f"{server.url}/").headers["content-type"].startswith("text/html")
    assert httpx.get(f"{server.url}/live").json()["status"]["deployment"] == "1P1D"


def test_a_killed_worker_is_degraded_health(server, client, expected):
    """While it is started again /health says which one is missing, is a 200, and requests are served."""

    def health():
        answer = server.get("/health")
        assert answer.status_code == 200
        return answer.json()

    seen = []
    for _ in range(5):  # it is back within hundredths of a second, which may be missed
        settled(lambda: any(logs_to(pid, "P0.") for pid in server.children()))
        os.kill(next(pid for pid in server.children() if logs_to(pid, "P0.")), signal.SIGKILL)
        until = time.monotonic() + 1
        while not seen and time.monotonic() < until:
            seen = [answer for answer in [health()] if answer["status"] == "degraded"]
        settled(lambda: health()["status"] == "ready")
        if seen:
            break
    assert seen[0] == {"status": "degraded", "reasons": ["Worker P0 is not up."]}
    assert client.completions.create(prompt=PROMPT, extra_body=EXTRA, **GREEDY).choices[0].text == expected[0].text


def test_a_worker_killed_under_a_stream_is_a_pause(server):
    """Its client gets every token once, those of an undisturbed request, and a proper end; all workers are back."""
    ask = {"prompt": PROMPT, "temperature": 0, "max_tokens": 400, "n": 4, **EXTRA}
    url = f"{server.url}/v1/completions"
    undisturbed = httpx.post(url, json=ask, timeout=60).json()["choices"]
    for _ in range(5):  # on a busy machine the stream may be over before the blow falls
        settled(lambda: any(logs_to(pid, "D0.") for pid in server.children()))
        victim = next(pid for pid in server.children() if logs_to(pid, "D0."))
        retried = server.metric("disagg_retried_total")
        tokens = [[] for _ in undisturbed]
        with httpx.stream("POST", url, json={**ask, "stream": True}, timeout=60) as answer:
            for number, event in enumerate(events(answer.iter_lines())):
                if number == 20:
                    os.kill(victim, signal.SIGKILL)
                for choice in event["choices"]:
                    tokens[choice["index"]] += choice["token_ids"]
        assert tokens == [choice["token_ids"] for choice in undisturbed]
        settled(lambda: server.get("/health").json()["status"] == "ready")
        if server.metric("disagg_retried_total") > retried:
            break
    assert server.metric("disagg_retried_total") > retried
    settled(lambda: all_free(server))


def logs_to(pid, name) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/1")).name.startswith(name)
    except OSError:
        return False


def test_long_texts_hold_up_nobody(server):
    """They become tokens, and tokens text, in a process of their own: while that stands still, streams go on."""
    (pid,) = (pid for pid, command in server.children().items() if "text_process" in command)
    text = PROMPT * 1000
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"] * 1000
    with ThreadPoolExecutor() as pool:
        os.kill(pid, signal.SIGSTOP)
        try:
            there = pool.submit(httpx.post, f"{server.url}/tokenize", json={"prompt": text}, timeout=60)
            back = pool.submit(httpx.post, f"{server.url}/detokenize", json={"tokens": ids}, timeout=60)
            stream = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60)
            assert stream.text.count('"text"') >= 400
            assert stream.text.endswith("data: [DONE]\n\n")
            assert not there.done()
            assert not back.done()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert there.result().json()["tokens"] == ids
        assert back.result().json()["prompt"] == text
    chat = [{"role": "user", "content": text}]
    assert httpx.post(f"{server.url}/tokenize", json={"messages": chat}).json()["count"] > len(ids)
    answer = httpx.post(f"{server.url}/detokenize", json={"tokens": [*ids, 320]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")
    os.kill(pid, signal.SIGKILL)  # another takes over
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"] == ids


def test_web_pages_of_others_cannot_ask(server):
    """A name that is not ours (DNS rebinding) and a body that any page may send (no JSON) are refused."""
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert b" 421 " in raw(server, post("/v1/completions", body).replace(b"Host: 127.0.0.1", b"Host: evil.example"))
    assert b" 415 " in raw(server, post("/v1/completions", body, "Content-Type: text/plain"))
    assert b" 200 " in raw(server, post("/v1/completions", body))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_nonsense_is_a_4xx(server, data):
    """Broken JSON and UTF-8, lone surrogates, deep nesting, wrong types, wild numbers: never a 5xx, never silence."""
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3),
        st.just([[1], "a"]), st.just({}), st.just(10**30), st.just("\ud800"),
    )  # fmt: skip
    path = data.draw(st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]))
    fields = ("prompt", "messages", "tokens", "n", "stop", "seed", "logprobs", "temperature", "top_k", "stream",
              "model", "stop_token_ids", "max_tokens", "min_tokens", "stream_options", "logit_bias", "x")  # fmt: skip
    document = data.draw(st.dictionaries(st.sampled_from(fields), values, max_size=6))
    body = json.dumps({"max_tokens": 2, **document} if "completions" in path else document).encode()
    at = data.draw(st.integers(0, len(body)))
    noise = data.draw(st.one_of(st.just(b""), st.binary(max_size=4), st.just(b"[" * 5000), st.just(b"\\ud800")))
    answer = raw(server, post(path, body[:at] + noise + body[at:]))
    status = int(answer.split(b" ", 2)[1])
    assert status in (200, 400, 404), answer
    if status != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_broken_http_leaves_the_server_well(server):
    """What is no HTTP is refused; afterwards everything is free and the server serves."""
    for data in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                 post("/v1/completions", b"{}").replace(b"Content-Length: 2", b"Content-Length: 3")):  # fmt: skip
        answer = raw(server, data, close=True)
        assert answer == b"" or b" 4" in answer.split(b"\r\n")[0]
    settled(lambda: all_free(server))
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "max_tokens": 3}) as answer:
        assert len(list(events(answer.iter_lines()))) >= 3


def test_check_audits_a_running_server(server):
    """`disagg check --url` finds a healthy deployment healthy: canary through the front door, pages, counts."""
    settled(lambda: all_free(server))
    done = subprocess.run(
        [sys.executable, "-m", "disagg", "check", "--url", server.url, "--json"], capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["faults"] == found["warnings"] == []
    assert found["canary"]["colocated"] == found["canary"]["disaggregated"]
    assert len(found["canary"]["colocated"]) == 12
    gone = subprocess.run([sys.executable, "-m", "disagg", "check", "--url", "http://127.0.0.1:9"], capture_output=True)
    assert gone.returncode == 1
    assert b"does not answer" in gone.stderr


def test_no_5xx_against_the_openapi_document(server, tmp_path):
    """schemathesis, bounded: whatever the document allows or forbids, no answer is a 5xx or one it does not name."""
    options = {
        "--checks": "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--phases": "examples,coverage,fuzzing", "--max-examples": "8", "--max-time": "12", "--seed": "1",
        "--workers": "1", "--request-timeout": "10", "--generation-database": "none",
    }  # fmt: skip
    flat = [part for option in options.items() for part in option]
    command = [str(Path(sys.executable).with_name("st")), "run", f"{server.url}/openapi.json", "--no-color", *flat]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    settled(lambda: all_free(server))
