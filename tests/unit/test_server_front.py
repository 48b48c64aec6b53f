"""The bridge between the event loop and the thread that owns the deployment, on a deployment the test moves by hand."""

import asyncio
import os
import queue
import select
import time
from types import SimpleNamespace

import pytest

from disagg.cluster.cluster import Update, WorkerStatus
from disagg.errors import Overloaded, WorkerLost
from disagg.record import Record
from disagg.request import FinishReason, SamplingParams
from disagg.server import exchange as exchanges
from disagg.server.exchange import Ask
from disagg.server.front import Front
from disagg.server.problems import Problem
from disagg.server.reply import Reply

ASK = Ask([1, 2], SamplingParams(max_tokens=50))


class Letters:
    """Token 0 is "a", 1 is "b", and so on."""

    context = 0

    def decode(self, ids):
        return "".join(chr(97 + token) for token in ids)


class ManualCluster:
    """Says what the test put into `news`: a list of updates, or an exception."""

    def __init__(self, room=10):
        self.info = SimpleNamespace(tokenizer=Letters())
        self.news = queue.SimpleQueue()
        self.wake = os.eventfd(0, os.EFD_SEMAPHORE)
        self.submitted, self.aborted, self.closed, self.room = [], {}, False, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def watch(self, bell):
        self.bell = bell

    def workers(self):
        return [WorkerStatus("C0", "C0.0", "both", True, None)]

    def submit_all(self, asked, **rest):
        if len(self.submitted) + len(asked) > self.room:
            raise Overloaded(2.5)
        self.submitted += asked
        return [f"r{number}" for number in range(len(self.submitted))][-len(asked) :]

    def begin_audit(self, tell):
        self.tell = tell

    def abort(self, request_id, reason=FinishReason.ABORT, error=""):
        self.aborted[request_id] = reason
        return record(request_id, reason, error=error)

    def say(self, news):
        self.news.put(news)
        os.eventfd_write(self.wake, 1)

    def poll(self, timeout_s):
        ready, _, _ = select.select([self.bell, self.wake], [], [], timeout_s)
        if self.wake not in ready:
            return []
        os.eventfd_read(self.wake)
        news = self.news.get()
        if isinstance(news, BaseException):
            raise news
        return news


def record(request_id, reason="length", error=""):
    return Record(request_id=request_id, index=0, prompt_len=2, finish_reason=reason, error=error)


def update(request_id, *tokens, ended=None):
    return Update(request_id, list(tokens), [None] * len(tokens), ended)


async def opened(front, *asks):
    """An exchange whose requests the deployment has."""
    exchange = front.open(asks, 0.0, 9.0)
    await front.call(lambda cluster: None)
    return exchange


def run(scenario, room=10):
    """`scenario(cluster, front, records)` on a running front that is stopped afterwards."""
    cluster, records = ManualCluster(room), []

    async def main():
        front = Front(lambda progress: cluster, on_record=records.append)
        front.start()
        await front.settled.wait()
        try:
            await asyncio.wait_for(scenario(cluster, front, records), 10)
        finally:
            await front.stop()

    asyncio.run(main())
    assert cluster.closed
    return cluster, records


def test_tokens_become_text_in_order_and_end_with_the_record():
    """Each update is one piece; the last carries the reason and the Record."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK, ASK)
        cluster.say([update("r0", 0), update("r1", 1)])
        pieces = await exchange.next()
        while len(pieces) < 2:
            pieces += await exchange.next()
        assert [(piece.choice, piece.texts, piece.tokens) for piece in pieces] == [(0, ["a"], [0]), (1, ["b"], [1])]
        cluster.say([update("r0", 2, 3, ended=record("r0"))])
        (piece,) = await exchange.next()
        assert (piece.texts, piece.finish, piece.record) == (["c", "d"], "length", record("r0"))
        assert exchange.request_ids == ["r0", "r1"]

    _, records = run(scenario)
    assert [one.request_id for one in records] == ["r0", "r1"]  # the second was aborted when the front stopped


def test_a_stop_string_ends_the_request_with_the_token_that_completed_it():
    """What comes after it, even in the same update, is neither text nor token; the deployment is told at once."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, Ask([1], SamplingParams(stop=("cd",))))
        cluster.say([update("r0", 0, 2)])
        (held,) = await exchange.next()
        assert held.texts == ["a", ""]
        cluster.say([update("r0", 3, 4, 5)])
        (last,) = await exchange.next()
        assert (last.texts, last.tokens, last.finish) == ([""], [3], "stop")
        assert cluster.aborted == {"r0": FinishReason.STOP}
        cluster.say([update("r0", 6)])

    run(scenario)


def test_a_stop_string_in_the_last_update_needs_no_abort():
    """The Record is there already: the reason is still the stop string."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, Ask([1], SamplingParams(stop=("b",))))
        cluster.say([update("r0", 0, 1, 2, ended=record("r0"))])
        (last,) = await exchange.next()
        assert (last.texts, last.tokens, last.finish) == (["a", ""], [0, 1], "stop")
        assert cluster.aborted == {}

    run(scenario)


def test_an_exchange_is_taken_whole_or_refused_whole():
    """If the second choice finds no room, the first is never sent and the client hears why."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK, ASK)
        with pytest.raises(Overloaded) as caught:
            await exchange.next()
        assert caught.value.retry_after_s == 2.5
        assert cluster.submitted == exchange.request_ids == []

    run(scenario, room=1)


def test_offsets_are_where_the_text_of_a_token_begins():
    """Text that is held back counts; without log-probabilities nobody asks."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, Ask([1], SamplingParams(stop=("cx",), logprobs=0)), ASK)
        cluster.say([update("r0", 0, 2), update("r0", 1, ended=record("r0")), update("r1", 0)])
        pieces = await exchange.next()
        assert [(piece.texts, piece.offsets) for piece in pieces] == [(["a", ""], [0, 1]), (["cb"], [2]), (["a"], [])]

    run(scenario)


def test_news_that_came_while_the_loop_was_busy_are_taken_together():
    """A reader that waits gets all tokens of several polls in one go, however many choices they belong to."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK, ASK)
        taken = []
        exchange.shortcut = lambda news: taken.append(news) or True
        reader = asyncio.ensure_future(exchange.next())
        await asyncio.sleep(0)
        for _ in range(3):
            cluster.say([update("r0", 0), update("r1", 1, 2)])
        while not cluster.news.empty() or len(front._news) < 6:  # the loop is not free for a moment
            time.sleep(0.001)
        await front.call(lambda cluster: None)
        assert [[(piece.choice, *piece.texts) for piece in news] for news in taken] == [[(0, "a"), (1, "b", "c")] * 3]
        assert not reader.done()
        reader.cancel()

    run(scenario)


def test_tokens_before_a_failure_are_handed_over_before_it():
    """Both come to the loop at the same moment: the reader that waits has the tokens first."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK)
        taken = []
        exchange.shortcut = lambda news: taken.append([text for piece in news for text in piece.texts]) or True
        reader = asyncio.ensure_future(exchange.next())
        await asyncio.sleep(0)
        cluster.say([update("r0", 0, 1)])
        cluster.say(WorkerLost("No worker could be kept alive."))
        while front.failure is None:
            time.sleep(0.001)
        with pytest.raises(Problem, match="stopping"):
            await reader
        assert taken == [["a", "b"]]

    run(scenario)


def test_an_aborted_exchange_is_over_for_both_sides():
    """Its reader gets the reason, the deployment every request id, and what still comes is dropped."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK, ASK)
        cluster.say([update("r0", 0)])
        await exchange.next()
        front.abort(exchange, Problem(499, "gone"))
        with pytest.raises(Problem, match="gone"):
            await exchange.next()
        await front.call(lambda cluster: None)  # everything before has been done
        assert set(cluster.aborted) == {"r0", "r1"}
        cluster.say([update("r1", 0)])

    run(scenario)


def test_tokens_pass_while_an_audit_waits():
    """However long the slowest worker takes to answer; the reports come when the last is there."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK)
        audit = asyncio.ensure_future(front.audit())
        for _ in range(3):
            cluster.say([update("r0", 0)])
            assert [piece.texts for piece in await exchange.next()] == [["a"]]
        assert not audit.done()
        await front.call(lambda cluster: cluster.tell(["a report"]))
        assert await audit == ["a report"]

    run(scenario)


def test_an_audit_that_fails_or_outlives_the_deployment_says_so():
    """A worker that does not answer is an error, and when the server stops nobody waits for reports."""

    async def scenario(cluster, front, records):
        late = asyncio.ensure_future(front.audit())
        await front.call(lambda cluster: None)
        await front.call(lambda cluster: cluster.tell(WorkerLost("D0.0 did not answer.")))
        with pytest.raises(WorkerLost):
            await late
        cut_off = asyncio.ensure_future(front.audit())
        await front.call(lambda cluster: None)
        await front.stop()
        with pytest.raises(Problem, match="stopping"):
            await cut_off

    run(scenario)


def test_a_client_that_goes_away_is_called_off_at_once():
    """In the turn of the event loop that hears of it the abort is on its way, before anything that is asked later."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK, ASK)
        settings = SimpleNamespace(deadline_s=9.0)
        reply = Reply(SimpleNamespace(front=front, settings=settings), exchange, None, True, front._loop.time() + 9.0)
        left = front._loop.create_future()
        answering = asyncio.ensure_future(reply({}, lambda: left, None))
        await asyncio.sleep(0)  # it runs: it waits for tokens
        await asyncio.sleep(0)  # so does its watch: it waits for the client to leave
        left.set_result({"type": "http.disconnect"})
        await asyncio.sleep(0)
        assert exchange.failure.status == 499
        await front.call(lambda cluster: None)
        assert set(cluster.aborted) == {"r0", "r1"}
        await answering

    run(scenario)


def test_a_reader_that_stops_reading_does_not_grow_memory(monkeypatch):
    """After MOST_UNREAD tokens the exchange is ended and its requests are aborted."""
    monkeypatch.setattr(exchanges, "MOST_UNREAD", 20)

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK)
        for _ in range(7):
            cluster.say([update("r0", 0, 1, 2)])
        while not cluster.aborted:
            await asyncio.sleep(0)
        with pytest.raises(Problem, match="does not read"):
            await exchange.next()

    run(scenario)


def test_a_deployment_that_fails_ends_everything():
    """Exchanges and calls get an answer, before and after, and a Record; the error is kept for the runner."""

    async def scenario(cluster, front, records):
        exchange = await opened(front, ASK)
        cluster.say(WorkerLost("No worker could be kept alive."))
        with pytest.raises(Problem, match="stopping"):
            await exchange.next()
        assert isinstance(front.failure, WorkerLost)
        assert len(records) == 1
        with pytest.raises(Problem):
            await front.open([ASK], 0.0, 9.0).next()
        with pytest.raises(Problem):
            await front.call(lambda cluster: None)
        with pytest.raises(Problem):
            front.cluster()

    run(scenario)


def test_a_deployment_that_cannot_start_says_why():
    """The error of its constructor is kept, and nobody waits for ever."""

    async def main():
        def make(progress):
            progress("loading")
            raise WorkerLost("The model was not loaded.")

        front = Front(make)
        front.start()
        await front.settled.wait()
        assert front.progress == "loading"
        assert "not loaded" in str(front.failure)
        await front.stop()

    asyncio.run(main())


def test_stopping_interrupts_a_start():
    """`stop` while the model is loading ends at the next line of progress, and is no failure."""

    async def main():
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()

        def make(progress):
            while True:
                progress("loading")
                loop.call_soon_threadsafe(stopped.set)

        front = Front(make)
        front.start()
        await stopped.wait()
        await front.stop()
        assert front.failure is None

    asyncio.run(main())
