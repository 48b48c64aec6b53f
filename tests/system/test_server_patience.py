"""What clients and models may cost a server in time and memory: a real process with narrow limits."""

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from leftovers import nothing_left
from serving import events, post, serving, settled

from disagg.cluster.cluster import Cluster
from disagg.config import Budget, Deployment, EngineSpec
from disagg.testing import tiny_checkpoint

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="tests of servers need two cores"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

LONG = "a" * 3000  # becomes tokens in the process for long texts
DEPLOY = ("--deploy", "1C", "--budget", "cpu:1")


@pytest.fixture(scope="module")
def server(nothing_left_behind, tmp_path_factory):
    """A server on a model of bytes that takes one request at a time and gives it two seconds."""
    model = str(tiny_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny"))
    limits = ("--deadline", "2", "--max-requests", "1")
    with serving(tmp_path_factory.mktemp("server"), "--model", model, *DEPLOY, *limits) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def stopped(server):
    """The process for long texts, as on a machine that has no time for it."""
    httpx.post(f"{server.url}/tokenize", json={"prompt": LONG}, timeout=20).raise_for_status()
    (pid,) = [pid for pid, command in server.children().items() if "text_process" in command]
    os.kill(pid, signal.SIGSTOP)
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": LONG}),
        ("/detokenize", {"tokens": [1] * 3000}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
    ],
)
def test_a_deadline_holds_before_there_are_tokens(server, stopped, path, body):
    """Who waits for a text to become tokens waits no longer than for anything else, and the next is served."""
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    assert 2 <= answer.elapsed.total_seconds() < 4
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": LONG}, timeout=20).json()["count"] == len(LONG)


def test_a_client_that_leaves_before_there_are_tokens_frees_its_slot(server, stopped):
    """At once, not at the deadline: the only slot is free for the next, who is served by a new process."""
    known = len(server.requests("/v1/completions"))
    with socket.create_connection(server.address) as connection:
        connection.sendall(post("/v1/completions", json.dumps({"prompt": LONG}).encode()))
        settled(lambda: httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 429)
    settled(lambda: len(server.requests("/v1/completions")) > known, 1.5)
    assert server.requests("/v1/completions")[-1]["status"] == 499
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": LONG}, timeout=20).json()["count"] == len(LONG)


def read(connection):
    answer = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


@pytest.mark.parametrize("head", [b"GET /" + b"a" * (1 << 20), b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20)])
def test_a_head_of_megabytes_is_refused(server, head):
    """Before its end, with an error in the usual form, and the connection is closed."""
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(head[: 100 << 10])
        assert b" 431 " in read(connection).split(b"\r\n")[0]
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (68 << 10) + b"\r\n\r\n"
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(whole)
        answer = read(connection)
    assert b" 431 " in answer.split(b"\r\n")[0]
    assert "headers" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_connection_that_sends_no_request_is_closed(server):
    """After ten seconds: without a word, or with a 408 where a request had begun."""
    with (
        socket.create_connection(server.address, timeout=15) as idle,
        socket.create_connection(server.address, timeout=15) as slow,
    ):
        slow.sendall(b"GET / HTTP/1.1\r\n")
        assert read(idle) == b""
        assert b" 408 " in read(slow).split(b"\r\n")[0]


def test_sigterm_before_the_first_token_of_the_first_stream(tmp_path):
    """It is answered as any that was accepted before: with all its tokens, and the exit code is 0."""
    with serving(tmp_path, "--model", "seed", *DEPLOY) as server:
        body = {"prompt": [1] * 1000, "max_tokens": 3, "ignore_eos": True, "stream": True}
        with httpx.Client(timeout=60) as http, ThreadPoolExecutor(1) as pool:
            request = http.build_request("POST", f"{server.url}/v1/completions", json=body)
            answered = pool.submit(http.send, request, stream=True)
            settled(lambda: server.metric("disagg_requests_outstanding") == 1)
            server.process.send_signal(signal.SIGTERM)
            settled(lambda: server.get("/health").status_code == 503)
            assert not answered.done(), "no token has come yet"
            answer = answered.result()
            assert answer.status_code == 200
            assert [*events(answer.iter_lines())][-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(10) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain(tmp_path, second):
    """At once: what was under way ends with an error that its client can read, and the exit code is 130."""
    with serving(tmp_path, "--model", "seed", *DEPLOY, "--drain", "100") as server:
        body = {"prompt": [1], "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            settled(lambda: server.get("/health").status_code == 503)
            server.process.send_signal(second)
            last = [json.loads(line.removeprefix("data: ")) for line in lines if line][-1]
        assert last["error"]["code"] == "unavailable"
        assert server.process.wait(10) == 130


def test_a_start_can_be_given_up_while_the_canary_sings():
    """Its requests are under way on both workers: what `progress` raises, as the server's does on a signal, ends it."""

    class GivenUp(Exception):
        pass

    def progress(text):
        if text == "1P1D: canary":
            raise GivenUp

    deployment = Deployment.parse("1P1D", Budget.parse("cpu:2", tuple(sorted(os.sched_getaffinity(0)))))
    with nothing_left(), pytest.raises(GivenUp):
        Cluster(deployment, EngineSpec(), supervise=True, progress=progress)
