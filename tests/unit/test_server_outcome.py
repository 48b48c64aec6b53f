"""Every request has one clear outcome and its Records once, whatever fails and whenever its client leaves."""

import asyncio
import json
import logging
import os
import socket
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from test_server_front import ManualCluster, record, run, update

from disagg.config import EngineSpec
from disagg.model.tokenizer import NoTokenizer
from disagg.record import Record
from disagg.request import SamplingParams
from disagg.server import front as fronts
from disagg.server import reply
from disagg.server.app import create_app
from disagg.server.exchange import Ask
from disagg.server.front import Front
from disagg.server.guards import Keys
from disagg.server.metrics import Metrics
from disagg.server.problems import Problem, gone
from disagg.server.run import _serve
from disagg.server.state import Settings, State

BODY = json.dumps({"prompt": [1, 2], "n": 2, "max_tokens": 3}).encode()
KEY = "sk-known"


class Asker:
    """A client of an ASGI application that sends these bytes, and leaves when it is told to."""

    def __init__(self, app, path="/v1/completions", body=BODY, key=KEY, reads=True):
        self.sent, self.left, self.reads = [], asyncio.Event(), reads
        self._parts = [{"type": "http.request", "body": body, "more_body": False}] if body is not None else []
        headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())]
        method = "POST" if path.startswith("/v1") else "GET"
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        self.done = asyncio.ensure_future(app(scope, self.receive, self.send))

    async def receive(self):
        if self._parts:
            return self._parts.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if not self.reads:
            await self.left.wait()

    async def answer(self):
        """Status and JSON."""
        await self.done
        return self.sent[0]["status"], json.loads(b"".join(part.get("body", b"") for part in self.sent))


def asking(scenario, **settings):
    """`scenario(cluster, app)` with a whole application before a deployment moved by hand; returns all Records."""
    found = []

    async def of(cluster, front, records):
        info = SimpleNamespace(tokenizer=NoTokenizer("none"), spec=SimpleNamespace(vocab_size=9))
        cluster.info, cluster.engine, cluster.num_pages = info, EngineSpec(max_len=99), 99
        state = State(Settings(model="m", **settings), front, Metrics(lambda: None))
        await scenario(cluster, create_app(state, Keys([KEY]), frozenset()))
        await front.call(lambda cluster: None)  # everything before has been done
        found.extend(records)

    run(of)
    return found


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_the_log_names_each_choice_of_a_client_that_leaves_midway(caplog):
    """By the ids that their Records carry, which come later than the line."""
    caplog.set_level(logging.INFO)

    async def scenario(cluster, app):
        client = Asker(app)
        await until(lambda: len(cluster.submitted) == 2)
        client.left.set()
        await client.done
        assert [line["status"] for line in lines(caplog)] == [499]
        assert [choice["request_id"] for choice in lines(caplog)[0]["choices"]] == ["r0", "r1"]

    asking(scenario)


def test_what_a_stop_cuts_off_has_records_that_say_so():
    """Its client did not leave: the Record says error and 503, not abort. Of one that left it says abort."""

    async def scenario(cluster, front, records):
        ask = Ask([1, 2], SamplingParams())
        exchanges = [front.open([ask], 0.0, 9.0) for _ in range(2)]
        await front.call(lambda cluster: None)
        front.abort(exchanges[0], gone())
        await front.call(lambda cluster: None)

    _, records = run(scenario)
    assert [(one.request_id, one.finish_reason, one.error) for one in records] == [
        ("r0", "abort", ""), ("r1", "error", "503 unavailable"),
    ]  # fmt: skip


def lines(caplog):
    """What the server logged of requests."""
    found = [json.loads(one.message) for one in caplog.records if one.name == "disagg.serve"]
    return [one for one in found if one["event"] == "request"]


@pytest.mark.parametrize("moment", ["before", "during"])
def test_who_leaves_while_the_deployment_takes_its_request_has_one_record_a_choice(moment):
    """Aborted, by who had it: before the deployment takes it, or while it does, when both might count it."""
    going_on, reached = threading.Event(), threading.Event()

    async def scenario(cluster, app):
        front = app._state.front

        def busy(*arguments, then=lambda *_: None, **rest):
            reached.set()
            going_on.wait(10)
            return then(*arguments, **rest)

        if moment == "before":
            elsewhere = asyncio.ensure_future(front.call(busy))
            await until(reached.is_set)
        else:
            cluster.submit_all = partial(busy, then=cluster.submit_all)
        client = Asker(app)
        await until(lambda: front._commands if moment == "before" else reached.is_set())
        client.left.set()
        await client.done
        assert client.sent == []
        going_on.set()
        await front.call(lambda cluster: None)
        assert len(cluster.submitted) == (0 if moment == "before" else 2)
        if moment == "before":
            await elsewhere

    records = asking(scenario)
    assert [(one.finish_reason, one.prompt_len) for one in records] == [("abort", 2)] * 2
    assert len({one.request_id for one in records}) == 2


def test_who_leaves_before_its_body_is_there_has_a_record():
    """One, aborted: nobody knows its choices."""

    async def scenario(cluster, app):
        client = Asker(app, body=None)
        await asyncio.sleep(0)
        client.left.set()
        await client.done

    (one,) = asking(scenario)
    assert (one.finish_reason, one.prompt_len, one.error) == ("abort", 0, "")


def test_a_body_that_does_not_come_is_a_408():
    """After the time that a client may take for it; with a Record, as of all that is refused."""

    async def scenario(cluster, app):
        client = Asker(app, body=None)
        status, body = await client.answer()
        assert (status, body["error"]["type"]) == (408, "invalid_request_error")

    (one,) = asking(scenario, body_s=0.01)
    assert (one.finish_reason, one.error) == ("refused", "408")


def test_who_is_late_while_the_deployment_takes_its_request_has_one_record_a_choice(monkeypatch):
    """That of the deployment, which has the request: what was not done in time is not also refused."""
    monkeypatch.setattr(reply, "_GRACE_S", 0.0)
    going_on = threading.Event()

    async def scenario(cluster, app):
        plain = cluster.submit_all

        def slow(*arguments, **rest):
            going_on.wait(10)
            return plain(*arguments, **rest)

        cluster.submit_all = slow
        assert (await Asker(app).answer())[0] == 504
        going_on.set()

    assert [one.finish_reason for one in asking(scenario, deadline_s=0.02)] == ["abort"] * 2


def test_who_is_refused_holds_no_place():
    """However slowly a client takes its 401 or 429, it does not count among the requests that are under way."""

    async def scenario(cluster, app):
        slow = [Asker(app, key="sk-wrong", reads=False)]
        await until(lambda: slow[0].sent)
        first = Asker(app)
        await until(lambda: cluster.submitted)
        slow.append(Asker(app, reads=False))
        await until(lambda: slow[1].sent)
        assert [client.sent[0]["status"] for client in slow] == [401, 429]
        first.left.set()
        await first.done
        second = Asker(app)
        await until(lambda: len(cluster.submitted) == 4)
        for client in (*slow, second):
            client.left.set()
            await client.done
        assert app._state.num_requests == 0

    asking(scenario, max_requests=1)


def bugs(caplog):
    lines = [json.loads(entry.message) for entry in caplog.records]
    return [line for line in lines if line["event"] == "bug"]


def is_a_bug(answer, client, caplog, word):
    status, body = answer
    assert (status, body["error"]["type"], body["error"]["param"]) == (500, "server_error", None)
    assert word not in body["error"]["message"]
    (line,) = bugs(caplog)
    assert word in line["traceback"]
    assert line["id"].encode() == dict(client.sent[0]["headers"])[b"x-request-id"]


@pytest.mark.parametrize("where", ["begin_audit", "counters"])
def test_a_bug_in_a_question_is_a_500_and_the_deployment_goes_on(where, caplog):
    """Whoever asked the thread hears of whatever was raised there; the log has it with the request's id."""

    async def scenario(cluster, app):
        def fail(*_):
            raise ZeroDivisionError("oops")

        cluster.begin_audit, cluster.deployment = (lambda tell: tell([])), SimpleNamespace(name="1C")
        setattr(cluster, where, fail)
        client = Asker(app, "/audit")
        is_a_bug(await client.answer(), client, caplog, "oops")
        assert await app._state.front.call(lambda cluster: 5) == 5

    caplog.set_level("INFO", "disagg.serve")
    assert asking(scenario) == []


@pytest.mark.parametrize("where", ["sending", "text"])
def test_a_bug_in_a_request_ends_it_and_no_other(where, caplog):
    """A 500 with a Record a choice, whether it could not be sent or its tokens be made text; the log has its id."""

    async def scenario(cluster, app):
        def fail(*_, **rest):
            raise ZeroDivisionError("oops")

        other = Asker(app)
        await until(lambda: len(cluster.submitted) == 2)
        plain = cluster.submit_all
        if where == "sending":
            cluster.submit_all = fail
        client = Asker(app)
        if where == "text":
            await until(lambda: "r3" in app._state.front._choices)
            app._state.front._choices["r2"].text.push = fail
            cluster.say([update("r2", 1)])
        is_a_bug(await client.answer(), client, caplog, "oops")
        cluster.submit_all = plain
        cluster.say([update(name, 1, 2, ended=record(name)) for name in ("r0", "r1")])
        status, body = await other.answer()
        assert (status, [choice["text"] for choice in body["choices"]]) == (200, ["1 2 "] * 2)

    caplog.set_level("INFO", "disagg.serve")
    reasons = sorted(one.finish_reason for one in asking(scenario))
    assert reasons == (["length"] * 2 + ["refused"] * 2 if where == "sending" else ["error"] * 2 + ["length"] * 2)


@pytest.mark.parametrize(
    ("stop", "last", "reason"), [("2", False, "stop"), ("2", True, "error"), (None, True, "error")]
)
def test_a_bug_at_the_end_of_a_text_leaves_one_record(stop, last, reason):
    """After a stop string nothing is asked for that could fail; else its client and its Record tell the same."""

    async def scenario(cluster, app):
        client = Asker(app, body=json.dumps({"prompt": [1, 2], "stop": stop}).encode())
        await until(lambda: "r0" in app._state.front._choices)
        text = app._state.front._choices["r0"].text
        text.push = lambda ids, final=False, plain=text.push: 1 // 0 if final else plain(ids)
        cluster.say([update("r0", 1, 2, ended=record("r0") if last else None)])
        status, body = await client.answer()
        assert status == (500 if reason == "error" else 200)
        assert status == 500 or body["choices"][0]["finish_reason"] == "stop"

    (one,) = asking(scenario)
    assert (one.request_id, one.finish_reason, one.error) == ("r0", reason, "500" if reason == "error" else "")


def test_a_deployment_that_cannot_even_be_started_leaves_nothing_open(monkeypatch):
    """What keeps the thread from starting is raised, after the port and everything else has been closed."""

    class Thread(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(fronts, "threading", SimpleNamespace(Thread=Thread))

    async def scenario():
        before = len(os.listdir("/proc/self/fd"))
        over = asyncio.Event()
        front = Front(lambda progress: ManualCluster(), on_end=over.set)
        listener = socket.create_server(("127.0.0.1", 0))
        state = State(Settings(model="m"), front, Metrics(lambda: None))
        with pytest.raises(RuntimeError, match="new thread"):
            await _serve(state, None, listener, over, [], lambda url: None)
        assert listener.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(Problem):
            await front.call(lambda cluster: None)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_records_of_what_was_never_sent_are_counted_and_measure_nothing():
    """A client that left before its prompt was known is an abort, and no prompt of no tokens."""
    metrics = Metrics(lambda: None)
    metrics.add(Record(request_id="x", index=0, prompt_len=0, finish_reason="abort"))
    lines = metrics.render().decode().splitlines()
    assert 'disagg_request_success_total{finished_reason="abort"} 1.0' in lines
    assert "disagg_request_prompt_tokens_count 0.0" in lines
