"""What a server refuses, and how it stops: a real process with small limits and a key."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import events, settled, starting

from disagg.record import read_records

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="1P1D needs two cores"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

SECRET, OTHER = "sk-first-of-two", "sk-ünïcode-key"
KEY = {"Authorization": f"Bearer {SECRET}"}
LONG = {"prompt": [1, 2, 3], "max_tokens": 200, "ignore_eos": True, "stream": True}
ENDLESS = {**LONG, "max_tokens": 8000}
SHORT = {"prompt": [1], "max_tokens": 1}


@pytest.fixture(scope="module")
def both(nothing_left_behind, tmp_path_factory):
    """The two servers of this file, starting at the same time."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"{SECRET}\n\n")
    options = ("--model", "seed", "--served-model-name", "mine", "--deploy", "1P1D", "--budget", "cpu:2",
               "--api-key", f"file:{folder / 'keys'}", "--api-key", "env:DISAGG_KEY", "--host", "0.0.0.0",
               "--max-requests", "2", "--max-queue", "4", "--max-choices", "8", "--max-prompt-len", "100",
               "--max-body", "0.01", "--records", str(folder / "records.jsonl"))  # fmt: skip
    short = ("--model", "seed", "--deploy", "1C", "--budget", "cpu:1", "--deadline", "4", "--drain", "0.1")
    hasty = tmp_path_factory.mktemp("hasty")
    with starting(folder, *options, DISAGG_KEY=OTHER) as first, starting(hasty, *short) as second:
        running = first(), second()
        running[0].url = running[0].url.replace("0.0.0.0", "127.0.0.1")
        yield running
        for each in running:  # that no test has stopped
            assert each.process.poll() is not None or each.stop() == 0


@pytest.fixture
def server(both):
    """1P1D, keys from a file and the environment, room for two requests and four choices."""
    return both[0]


@pytest.fixture
def hasty(both):
    """A server that gives nobody much time."""
    return both[1]


def records(server):
    return list(read_records(server.log.parent / "records.jsonl"))


def post(server, body, headers=KEY):
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)


def test_a_key_is_asked_for(server):
    """Without a right key everything is a 401 but what holds nothing; both keys work; none is ever logged."""
    wrong = ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": SECRET}, {"Authorization": f"Basic {SECRET}"})
    for headers in wrong:
        for path in ("/v1/models", "/metrics", "/audit", "/live", "/openapi.json", "/version", "/no/such/path"):
            answer = httpx.get(f"{server.url}{path}", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert post(server, SHORT, headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    for key in (SECRET, OTHER):
        headers = [(b"Authorization", b"bearer " + key.encode())]
        assert httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
    log = server.log.read_text()
    assert log
    assert SECRET not in log
    assert OTHER not in log
    assert "sk-wrong" not in log


def test_limits_of_a_request(server):
    """Body, prompt length and choices: each has its own status and sentence."""
    assert post(server, {"prompt": [10] * 11_000}).status_code == 413
    answer = post(server, {"prompt": [1] * 101})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert post(server, {**SHORT, "n": 9}).json()["error"]["param"] == "n"


def test_too_much_at_once_is_a_429_with_retry_after(server):
    """More choices than the queue holds, or more requests than allowed: refused whole, and what runs goes on."""
    answer = post(server, {**SHORT, "n": 5})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")  # it never fits
    assert answer.json()["error"]["param"] == "n"
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**ENDLESS, "n": 2}, headers=KEY) as running:
        unread = running.iter_lines()
        next(unread)
        answer = post(server, {"prompt": [[1], [2], [3]], "max_tokens": 1})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["Retry-After"]) >= 1
        outcomes = {record.finish_reason for record in records(server)[-3:]}
        assert outcomes == {"refused"}, "none of three choices was sent to a worker"
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=KEY) as first:
        lines = first.iter_lines()
        next(lines)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, headers=KEY) as second:
            begun = second.iter_lines()
            next(begun)
            answer = post(server, SHORT)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
        assert len(list(events(lines))) > 190
    settled(lambda: all(worker["held"] == 0 for worker in server.audit(**KEY)))


def test_a_client_that_goes_away_frees_its_pages_at_once(server):
    """Of a request that the log says is over no worker holds a page: what is told it next finds it gone.

    That it is over as soon as the connection is closed: test_server_front.py.
    """

    def held():
        return {worker["worker"][:2]: worker["held"] for worker in server.audit(**KEY)}

    known = len(server.requests("/v1/completions"))
    with (
        httpx.Client() as http,
        http.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, headers=KEY) as answer,
    ):
        begun = answer.iter_lines()
        next(begun)
        settled(lambda: held()["P0"] == 0)  # the hand-off is over
        assert held()["D0"] > 0
    settled(lambda: len(server.requests("/v1/completions")) > known)
    assert [(worker["held"], worker["holders"]) for worker in server.audit(**KEY)] == [(0, [])] * 2
    assert server.requests("/v1/completions")[-1]["outcome"] == 499


def test_a_deadline_ends_a_request(hasty):
    """What is not done in time is a 504, or an error as the last event of a stream, and its pages are free."""
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(post, hasty, {**ENDLESS, "stream": False}, headers={})
        with httpx.stream("POST", f"{hasty.url}/v1/completions", json=ENDLESS) as streamed:
            assert streamed.status_code == 200
            last = [json.loads(line.removeprefix("data: ")) for line in streamed.iter_lines() if line][-1]
    assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (504, "deadline")
    assert last["error"]["code"] == "deadline"
    settled(lambda: len(hasty.requests("/v1/completions")) >= 2)
    assert sorted((one["status"], one.get("outcome")) for one in hasty.requests("/v1/completions")) == [
        (200, 504),
        (504, None),
    ]
    settled(lambda: all(worker["held"] == 0 for worker in hasty.audit()))


def test_a_client_that_does_not_read_is_cut_off(hasty):
    """Soon after its deadline its connection and its pages are free, and the log says how the stream ended."""
    body = json.dumps({**ENDLESS, "n": 16, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    known = len(hasty.requests("/v1/completions"))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        connection.connect(hasty.address)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b" 200 " in connection.recv(100)
        assert settled(lambda: len(hasty.requests("/v1/completions")) > known, 20) < 4 + 1 + 1 + 3
        settled(lambda: all(worker["held"] == 0 for worker in hasty.audit()))
        last = hasty.requests("/v1/completions")[-1]
        assert (last["status"], last["outcome"]) == (200, 504)
        with pytest.raises(ConnectionResetError):
            read_all(connection)


def read_all(connection):
    while connection.recv(1 << 20):
        pass


def test_what_cannot_be_served_is_refused_before_anything_starts():
    """Listening elsewhere without a key, a key itself as an option's value, and options that make no sense."""
    for options, words in (
        (("--host", "0.0.0.0"), b"--api-key"),
        (("--api-key", SECRET), b"file:PATH"),
        (("--api-key", "env:NOT_SET_ANYWHERE"), b"is not set"),
        (("--api-key", "file:/no/such/file"), b"cannot be read"),
        (("--host", "203.0.113.1", "--no-api-key"), b"Choose another --host"),
        (("--port", "abc"), b"a whole number from 0 to 65535"),
        (("--served-model-name", ""), b"--served-model-name is empty"),
        (("--max-prompt-len", "8192"), b"give 1 to 8191"),
        (("--kv-memory", "99999999"), b"lower --kv-memory"),
    ):
        code = "from disagg.cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", code, "serve", "--model", "seed", *options], capture_output=True)
        assert done.returncode == 2
        assert words in done.stderr
        assert SECRET.encode() not in done.stderr


def test_sigterm_lets_requests_finish(server):
    """A stream that has begun goes on to its end, new work is a 503, /health says so, and the exit code is 0."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=KEY) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        settled(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        refused = post(server, SHORT)
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert [*events(lines)][-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0


def test_a_drain_is_bounded(hasty):
    """What does not finish in time is ended with an error its client can read, and the exit code is still 0."""
    with httpx.stream("POST", f"{hasty.url}/v1/completions", json=ENDLESS) as answer:
        lines = answer.iter_lines()
        next(lines)
        hasty.process.send_signal(signal.SIGTERM)
        last = [json.loads(line.removeprefix("data: ")) for line in lines if line][-1]
    assert last["error"]["code"] == "unavailable"
    assert hasty.process.wait(10) == 0
