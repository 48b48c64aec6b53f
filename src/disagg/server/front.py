"""The thread that owns the Cluster, and the bridge between it and the event loop.

    event loop: open, abort, call ──commands, bell──▶ front thread: submit, poll, tokens become text
    event loop: Exchange.next     ◀──one wake for all news── front thread

The Cluster is not thread safe and its poll blocks, so one thread does nothing else. Tokens become text here, off the
event loop and outside every worker, because here a stop string can end a request before its next token is wanted.

The event loop takes all news that are there when its turn comes, and hands each exchange its share at once: the busier
it is, the more tokens of a stream share the cost of a write.
"""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from disagg.cluster.cluster import Cluster, Update, WorkerStatus
from disagg.cluster.messages import AuditReport
from disagg.record import Record
from disagg.request import FinishReason
from disagg.server.choice import Choice, text_of
from disagg.server.exchange import Ask, Exchange, Piece
from disagg.server.problems import Problem, problem_of, unavailable

_POLL_S = 0.25

_T = TypeVar("_T")


class _Stopped(Exception):
    """`stop` was called while the deployment was still starting."""


class Front:
    """The front thread: `start` it, wait for `settled`, `open` exchanges, `stop` it. Made on the running event loop.

    make: builds the Cluster, in the thread; it is given where to put lines of progress. on_record: called in the
    thread with the Record of every request that is over, however it ended. on_end: called on the event loop when the
    thread has ended. What made the Cluster fail ends every exchange and is kept in `failure`.
    """

    def __init__(
        self,
        make: Callable[[Callable[[str], None]], Cluster],
        *,
        on_record: Callable[[Record], None] = lambda record: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.workers: list[WorkerStatus] = []  # as of the last poll
        self.progress = "starting"  # one line, while it starts
        self.failure: BaseException | None = None
        self.settled = asyncio.Event()  # it serves, or it has ended
        self._cluster: Cluster | None = None
        self._make = make
        self._on_record = on_record
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._commands: deque[Callable[[Cluster | None], object]] = deque()
        self._choices: dict[str, Choice] = {}  # by request id
        self._news: deque[tuple[Exchange, Piece] | tuple[Callable[[Any], None], Any]] = deque()  # for the event loop
        self._called = False  # whether the event loop is going to look at them
        self._asking: set[asyncio.Future[Any]] = set()  # who waits for an answer of the thread
        self._stopping = False
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="front")

    # On the event loop

    def start(self) -> None:
        """Start the thread, which builds the deployment. Raises RuntimeError when there can be no further thread."""
        self._thread.start()

    def cluster(self) -> Cluster:
        """The deployment, for what never changes (info, engine, num_pages) and `status`. Raises Problem 503."""
        if self._cluster is None:
            raise unavailable(f"The deployment does not serve: {self.progress}.")
        return self._cluster

    def open(self, asks: Sequence[Ask], received_at: float, deadline_s: float) -> Exchange:
        """Send all choices of an exchange, or none: what refuses one of them is raised by its `next`."""
        exchange = Exchange(asks, received_at, deadline_s, self._overflow)
        self._command(lambda cluster: self._submit(cluster, exchange))
        return exchange

    def abort(self, exchange: Exchange, why: Exception) -> None:
        """End an exchange now: every worker frees what it holds for it."""
        exchange.fail(why)
        self._command(lambda cluster: self._abort(cluster, exchange, why))

    def note(self, records: Sequence[Record], exchange: Exchange | None) -> None:
        """Pass on Records of what never came to the Cluster; unless its exchange did, which has Records then.

        Only the thread knows: it may be sending the exchange at the moment in which its client leaves.
        """
        self._command(lambda cluster: self._note(records, exchange))

    async def call(self, function: Callable[[Cluster], _T]) -> _T:
        """Run `function` in the front thread and return its result; every token waits meanwhile. Raises what it raises,
        and Problem.
        """
        result: _T = await self._ask(lambda cluster, done: self._answer(done, function(cluster)))
        return result

    async def audit(self) -> list[AuditReport]:
        """Where every page of every worker is, once all have said so; no token waits for it. Raises DisaggError."""
        reports: list[AuditReport] = await self._ask(
            lambda cluster, done: cluster.begin_audit(partial(self._answer, done))
        )
        return reports

    async def stop(self) -> None:
        """End every exchange, stop the workers and the thread. May be called twice."""
        if not self._ended.is_set():
            self._stopping = True
            if self._thread.ident is None:  # it was not started, or could not be
                self._finish()
            else:
                os.eventfd_write(self._bell, 1)
                await self._ended.wait()

    async def _ask(self, ask: "Callable[[Cluster, asyncio.Future[Any]], None]") -> Any:
        """Let the thread do something that answers the future, now or later."""
        done: asyncio.Future[Any] = self._loop.create_future()
        self._asking.add(done)
        done.add_done_callback(self._asking.discard)
        self._command(lambda cluster: self._call(cluster, ask, done))
        return await done

    def _overflow(self, exchange: Exchange) -> None:
        self.abort(exchange, Problem(408, "The client does not read its answer; the request was ended."))

    def _command(self, command: Callable[[Cluster | None], object]) -> None:
        if self._ended.is_set():
            command(None)
            self._deliver()
        else:
            self._commands.append(command)
            os.eventfd_write(self._bell, 1)

    def _finish(self) -> None:
        """The thread has nothing more to do."""
        if self._thread.ident is not None:
            self._thread.join()
        self._ended.set()
        self.settled.set()
        while self._commands:
            self._commands.popleft()(None)
        self._deliver()
        for choice in self._choices.values():
            choice.exchange.fail(_over())
        for done in self._asking:
            _settle(done, _over())
        os.close(self._bell)
        self._on_end()

    def _deliver(self) -> None:
        """Pass on the news: pieces to exchanges, which are told when they have all of theirs; the rest is called."""
        self._called = False
        told: dict[Exchange, None] = {}
        for _ in range(len(self._news)):  # what is added meanwhile waits for the next time, lest this never end
            target, news = self._news.popleft()
            if isinstance(target, Exchange):
                target.put(news)
                told[target] = None
            else:
                _tell(told)  # what came before a failure is delivered before it
                told = {}
                target(news)
        _tell(told)

    # In the thread

    def _run(self) -> None:
        try:
            with self._make(self._tell) as cluster:
                cluster.watch(self._bell)
                self._cluster = cluster
                self._loop.call_soon_threadsafe(self.settled.set)
                try:
                    while not self._stopping:
                        self._turn(cluster)
                finally:  # also when the deployment fails: what was under way gets its Record
                    for choice in list(self._choices.values()):
                        self._abort(cluster, choice.exchange, _over())
                        self._news.append((choice.exchange.fail, _over()))
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, the event loop must hear of it
            self.failure = error
        self._cluster = None
        self._loop.call_soon_threadsafe(self._finish)

    def _tell(self, progress: str) -> None:
        if self._stopping:
            raise _Stopped
        self.progress = progress

    def _turn(self, cluster: Cluster) -> None:
        updates = cluster.poll(_POLL_S)
        for update in updates:
            self._take(cluster, update)
        if self._commands or not updates:  # a bell that goes on ringing ends a poll that would have waited: then too
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        while self._commands:
            self._commands.popleft()(cluster)
        self.workers = cluster.workers()
        if self._news and not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _submit(self, cluster: Cluster | None, exchange: Exchange) -> None:
        if exchange.failure is not None:
            return  # nobody waits for it any more
        try:
            if cluster is None:
                raise _over()
            texts = [text_of(cluster.info.tokenizer, ask) for ask in exchange.asks]
            exchange.request_ids = cluster.submit_all(
                exchange.asks, scheduled_at=exchange.received_at, deadline_s=exchange.deadline_s
            )
            for place, (request_id, text) in enumerate(zip(exchange.request_ids, texts, strict=True)):
                wants_offsets = exchange.asks[place].params.logprobs is not None
                self._choices[request_id] = Choice(exchange, place, text, wants_offsets)
        except Exception as error:  # whatever is wrong with this request, the others go on
            self._news.append((exchange.fail, error))
            self._abort(cluster, exchange, error)

    def _abort(self, cluster: Cluster | None, exchange: Exchange, why: Exception) -> None:
        error = problem_of(why).brief
        reason = FinishReason.ERROR if error else FinishReason.ABORT
        for request_id in exchange.request_ids:
            if self._choices.pop(request_id, None) is not None and cluster is not None:
                record = cluster.abort(request_id, reason, error)
                if record is not None:
                    self._on_record(record)

    def _note(self, records: Sequence[Record], exchange: Exchange | None) -> None:
        if exchange is None or not exchange.request_ids:
            for record in records:
                self._on_record(record)

    def _call(
        self,
        cluster: Cluster | None,
        ask: "Callable[[Cluster, asyncio.Future[Any]], None]",
        done: "asyncio.Future[Any]",
    ) -> None:
        try:
            if cluster is None:
                raise _over()
            ask(cluster, done)
        except Exception as error:  # whatever it is, who asked hears of it and the others go on
            self._answer(done, error)

    def _answer(self, done: "asyncio.Future[Any]", result: Any) -> None:
        self._news.append((partial(_settle, done), result))

    def _take(self, cluster: Cluster, update: Update) -> None:
        choice = self._choices.get(update.request_id)
        if choice is None:
            return
        try:
            piece = choice.piece(update, partial(cluster.abort, update.request_id, FinishReason.STOP))
        except Exception as error:  # of a tokenizer, say: it ends this exchange, the others go on
            self._news.append((choice.exchange.fail, error))
            if update.record is not None:  # it has all its tokens, of which its client hears nothing
                update.record.finish_reason, update.record.error = FinishReason.ERROR, problem_of(error).brief
                self._end(update.record)
            self._abort(cluster, choice.exchange, error)
        else:
            self._end(piece.record)
            self._news.append((choice.exchange, piece))

    def _end(self, record: Record | None) -> None:
        if record is not None:
            del self._choices[record.request_id]
            self._on_record(record)


def _tell(exchanges: Iterable[Exchange]) -> None:
    for exchange in exchanges:
        exchange.tell()


def _settle(done: "asyncio.Future[Any]", result: Any) -> None:
    if done.done():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        done.set_result(result)


def _over() -> Problem:
    return unavailable("The server is stopping: send the request to another, or again later.")
