"""The front end: a Deployment as live processes, requests in, tokens and Records out.

    submit ─▶ router picks workers ─▶ Submit to the prefill worker
    poll   ◀─ first token from the prefill worker, the others from the decode worker, in order ◀─

Not thread safe: one thread submits and polls. Messages of two workers may overtake one another, so tokens are put in
order by their index, and a request is over when it was said to be, all its tokens are here and every worker that had a
part in it has told its part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple
from uuid import uuid4

import msgspec

from disagg.clock import WallClock
from disagg.cluster import messages as m
from disagg.cluster.launch import Process, make_folder, remove_folder
from disagg.cluster.mailbox import FRONT, Mailbox
from disagg.cluster.router import LeastOutstanding, Policy, Route, Router, WorkerView
from disagg.cluster.worker import KV_DTYPE, WorkerConfig
from disagg.config import Deployment, EngineSpec
from disagg.engine.batch import TokenLogprobs
from disagg.errors import DisaggError, InputError, RequestError, WorkerLost
from disagg.model.spec import ModelSpec
from disagg.record import Record
from disagg.request import FinishReason, SamplingParams

_START_S = 180.0  # the longest a worker may take to load its model and compile its kernels
_TURN_S = 0.5


class Update(NamedTuple):
    """News of one request: tokens that are new to the client, and the Record when it is over."""

    request_id: str
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    record: Record | None


@dataclass(slots=True)
class _Live:
    """A request the client still waits for."""

    record: Record
    route: Route
    early: dict[int, m.NewToken] = field(default_factory=dict)  # came before one with a smaller index
    ended: m.Ended | None = None
    told: set[str] = field(default_factory=set)  # workers whose facts are in the record


class Cluster:
    """Workers of one deployment. A context manager: leaving it leaves no process, file, socket or memory behind.

    `spec` is the model's shape, `num_pages` what each worker's KV cache holds. Raises ModelError, BudgetError and
    WorkerLost from the constructor, after cleaning up.
    """

    def __init__(
        self,
        deployment: Deployment,
        engine: EngineSpec,
        *,
        policy: Policy | None = None,
        lease_s: float = 10.0,
        max_wait_s: float = 60.0,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        from disagg.model.load import load_info

        self.info = load_info(engine.model)
        self.engine = _resolved(engine, self.info.spec.max_len)
        self.deployment = deployment
        self._eos = frozenset(self.info.spec.eos_ids)
        self._clock = WallClock()
        self._live: dict[str, _Live] = {}
        self._audits: dict[str, m.AuditReport] = {}
        self._serial = 0
        self._processes: list[Process] = []
        self._folder = make_folder()
        self._mailbox = Mailbox(self._folder, FRONT)
        try:
            self.num_pages = _pages_per_worker(self.engine, self.info.spec, len(deployment.workers))
            self._start(lease_s, max_wait_s, progress)
        except BaseException:
            self.close()
            raise
        views = [WorkerView(process.config.worker, process.config.spec.role) for process in self._processes]
        self._router = Router(policy or LeastOutstanding(), views)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        scheduled_at: float | None = None,
        index: int = 0,
    ) -> str:
        """Send one request of token ids; returns its id. `scheduled_at`: when it should have been sent, if not now.

        Raises RequestError when it could never be served, before anything is sent.
        """
        self._validate(prompt, params)
        now = self._clock.now()
        request_id = uuid4().hex
        if params.seed is None and not params.greedy:
            params = msgspec.structs.replace(params, seed=uuid4().int >> 65)
        route = self._router.route(request_id, len(prompt), params.max_tokens)
        record = Record(
            request_id=request_id,
            index=index,
            prompt_len=len(prompt),
            max_tokens=params.max_tokens,
            arm=self.deployment.name,
            prefill_worker=route.prefill,
            decode_worker=route.decode,
            scheduled_at=now if scheduled_at is None else scheduled_at,
            sent_at=now,
        )
        self._live[request_id] = _Live(record, route)
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
        elsewhere = None if route.prefill == route.decode else route.decode
        submit = m.Submit(
            request_id, list(prompt), len(prompt), params, sorted(stop_ids), self._clock.now(), attempt=0, decode_on=elsewhere
        )
        self._mailbox.send(route.prefill, submit)
        return request_id

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Record | None:
        """End a request now; returns its Record, or None when it is over already. Its pages are freed behind us."""
        live = self._live.pop(request_id, None)
        if live is None:
            return None
        self._router.ended(request_id)
        for worker in {*live.route}:
            self._mailbox.send(worker, m.Abort(request_id))
        live.record.finish_reason = reason
        return live.record

    def poll(self, timeout_s: float) -> list[Update]:
        """What happened since the last call, after waiting up to `timeout_s` for the first news.

        Raises WorkerLost when a worker process has died.
        """
        updates: list[Update] = []
        messages, readable = self._mailbox.receive(timeout_s)
        now = self._clock.now()
        for message in messages:
            if isinstance(message, m.Progress):
                self._progress(message, now, updates)
            elif isinstance(message, m.AuditReport):
                self._audits[message.worker] = message
        if readable:
            self._check_alive()
        return updates

    @property
    def num_live(self) -> int:
        """Requests that are not over."""
        return len(self._live)

    def audit(self, timeout_s: float = 5.0) -> list[m.AuditReport]:
        """Where every page of every worker is. Only while no tokens are awaited: news that arrives meanwhile is lost.

        Raises WorkerLost when a worker does not answer.
        """
        self._audits.clear()
        self._serial += 1
        for process in self._processes:
            self._mailbox.send(process.config.worker, m.Audit(self._serial))
        until = self._clock.now() + timeout_s
        while len(self._audits) < len(self._processes):
            if self._clock.now() > until:
                raise WorkerLost(f"Only {len(self._audits)} of {len(self._processes)} workers answered an audit.")
            self.poll(0.1)
        return [self._audits[process.config.worker] for process in self._processes]

    def close(self) -> None:
        """Stop the workers and remove every trace. May be called twice."""
        for process in self._processes:
            self._mailbox.send(process.config.worker, m.Stop())
        for process in self._processes:
            process.close()
        self._processes.clear()
        if self._folder.exists():
            self._mailbox.close()
            remove_folder(self._folder)

    def _start(self, lease_s: float, max_wait_s: float, progress: Callable[[str], None]) -> None:
        for spec in self.deployment.workers:
            config = WorkerConfig(spec, 0, self.engine, str(self._folder), self.num_pages, lease_s, max_wait_s)
            process = Process(config)
            self._processes.append(process)
            self._mailbox.watch(process.exit_fd)
        until = self._clock.now() + _START_S
        waiting = {process.config.worker for process in self._processes}
        while waiting:
            progress(f"{self.deployment.name}: waiting for {', '.join(sorted(waiting))}")
            messages, _ = self._mailbox.receive(_TURN_S)
            for message in messages:
                if isinstance(message, m.StartFailed):
                    raise (InputError if message.input_error else DisaggError)(message.reason)
                if isinstance(message, m.Hello):
                    waiting.discard(message.worker)
            self._check_alive()
            if self._clock.now() > until:
                raise WorkerLost(f"Worker {min(waiting)} was not ready after {_START_S:g} s.")

    def _check_alive(self) -> None:
        for process in self._processes:
            if not process.alive:
                raise WorkerLost(process.obituary())

    def _validate(self, prompt: Sequence[int], params: SamplingParams) -> None:
        max_len, vocab_size = self.engine.max_len, self.info.spec.vocab_size
        assert max_len is not None
        if not 1 <= len(prompt) < max_len:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens and the context {max_len}: give it 1 to {max_len - 1}."
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise RequestError(f"Token ids must lie between 0 and {vocab_size - 1}, the model's vocabulary.")
        room = self.num_pages * self.engine.page_size
        needed = min(len(prompt) + params.max_tokens, max_len)
        if needed > room:
            raise RequestError(
                f"Prompt and output may need {needed} tokens of KV cache and a worker has {room}: "
                "raise --kv-memory, or shorten the prompt or the output."
            )

    def _progress(self, message: m.Progress, now: float, updates: list[Update]) -> None:
        fresh: dict[str, list[m.NewToken]] = {}
        for token in message.tokens:
            live = self._live.get(token.id)
            if live is None:
                continue
            if token.facts is not None:
                live.record.merge(token.facts)
                live.told.add(token.facts.worker)
            live.early[token.index] = token
            while (ready := live.early.pop(len(live.record.token_at), None)) is not None:
                if not live.record.token_at:
                    self._router.prefilled(token.id)
                live.record.token_at.append(now)
                live.record.tokens.append(ready.token)
                fresh.setdefault(token.id, []).append(ready)
        over = [ended.id for ended in message.ended if self._note_end(ended)]
        for request_id in {**fresh, **dict.fromkeys(over)}:
            record = self._finish(request_id)
            news = fresh.get(request_id, [])
            if news or record is not None:
                updates.append(Update(request_id, [t.token for t in news], [t.logprobs for t in news], record))

    def _note_end(self, ended: m.Ended) -> bool:
        live = self._live.get(ended.id)
        if live is None:
            return False
        live.record.merge(ended.facts)
        live.told.add(ended.facts.worker)
        live.ended = ended
        return True

    def _finish(self, request_id: str) -> Record | None:
        """The Record, if all that will come has come."""
        live = self._live[request_id]
        ended, record = live.ended, live.record
        if ended is None:
            return None
        failed = ended.reason == FinishReason.ERROR
        if not failed and (len(record.token_at) < ended.num_output or live.route.prefill not in live.told):
            return None
        record.finish_reason, record.error = ended.reason, ended.error
        record.output_len = len(record.token_at)
        del self._live[request_id]
        self._router.ended(request_id)
        return record


def _resolved(engine: EngineSpec, model_max_len: int) -> EngineSpec:
    """The spec with the context length decided. Raises InputError when it is beyond the model's."""
    max_len = engine.max_len or model_max_len
    if max_len > model_max_len:
        raise InputError(f"max_len {max_len} is beyond the model's context of {model_max_len} tokens.")
    return msgspec.structs.replace(engine, max_len=max_len)


def _pages_per_worker(engine: EngineSpec, spec: ModelSpec, num_workers: int) -> int:
    """An even split of the KV memory. Raises InputError when it is not enough for a single page each."""
    page_bytes = spec.kv_bytes_per_token(KV_DTYPE) * engine.page_size
    num_pages = engine.kv_bytes // num_workers // page_bytes
    if num_pages < 2:
        raise InputError(
            f"{engine.kv_bytes / 2**20:.0f} MiB of KV memory over {num_workers} worker(s) holds {num_pages} page(s) of "
            f"{page_bytes / 2**20:.1f} MiB each: raise --kv-memory."
        )
    return num_pages
