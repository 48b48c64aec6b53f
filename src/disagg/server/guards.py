"""What every request passes before its handler: who may ask, how many at a time; and the line about it in the log.

Secure by default: without a key only this machine may ask, and a web page that somebody on this machine looks at may
not (the Host header must be ours, and a body must be JSON, which a page of another origin may not send).
"""

import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from disagg.record import Record
from disagg.request import FinishReason
from disagg.server.exchange import Ask, Exchange
from disagg.server.problems import Problem, gone, told, unavailable
from disagg.server.state import State

log = logging.getLogger("disagg.serve")

_GONE = gone().status
_OPEN = ("/", "/health", "/static/")  # hold nothing that a key should guard
_TOKENS = ("/v1/completions", "/v1/chat/completions")  # leaves Records
_WORK = (*_TOKENS, "/tokenize", "/detokenize", "/audit")  # counts against the limit
_QUIET = ("/health", "/metrics", "/live", "/static/")  # asked again and again: logged only when they fail


_STRANGERS = (401, 415, 421)  # who may not ask leaves no Record


class Keys:
    """API keys. They are kept as digests, and a comparison takes as long for a wrong key as for a right one."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: bytes) -> bool:
        """Whether an Authorization header carries one of the keys."""
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever matches
        return any(matches) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """ASGI middleware. hosts: names this server answers to, without ports; empty: any."""

    def __init__(self, app: ASGIApp, state: State, keys: Keys, hosts: frozenset[str]) -> None:
        self._app = app
        self._state = state
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        request_id = scope["disagg.id"] = uuid.uuid4().hex
        started_at, status = time.monotonic(), _GONE  # unless an answer begins, the client went away

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        is_work = False
        try:
            self._check(scope, path)
            is_work = path in _WORK  # what is refused holds no place, however slowly its client takes the answer
            self._state.num_requests += is_work
            await self._app(scope, receive, sending)
        except Problem as problem:
            scope["disagg.problem"] = problem
            await problem.response()(scope, receive, sending)
        except Exception as error:  # Starlette raises what it has answered again
            if "disagg.problem" not in scope:
                scope["disagg.problem"] = told(error, scope)
            if status == _GONE:
                await scope["disagg.problem"].response()(scope, receive, sending)
        finally:
            self._state.num_requests -= is_work
            self._note(scope, status, started_at)

    def _check(self, scope: Scope, path: str) -> None:
        """Raise Problem when this request may not go on."""
        headers = Headers(scope=scope)
        if self._hosts and (name := _host(headers.get("host", ""))) not in self._hosts:
            raise Problem(421, f"This server does not answer to the name {name[:100]!r}: start it with --host.")
        is_open = any(path == one or (one != "/" and one.endswith("/") and path.startswith(one)) for one in _OPEN)
        authorization = headers.get("authorization", "").encode("latin-1")  # the bytes as they were sent
        if self._keys and not is_open and not self._keys.allow(authorization):
            message = "Give an API key of this server: Authorization: Bearer KEY."
            raise Problem(401, message, code="invalid_api_key")
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json"
        ):
            raise Problem(415, "Send JSON, with the header Content-Type: application/json.")
        if path in _WORK:
            if self._state.stopping:
                raise unavailable(self._state.stopping)
            if self._state.num_requests >= (most := self._state.settings.max_requests):
                raise Problem(429, f"{most} requests are under way: retry later.", code="overloaded", retry_after_s=1.0)

    def _note(self, scope: Scope, status: int, started_at: float) -> None:
        """A request is over: count it, log it, and see to it that one that was never sent has its Records too."""
        path = scope["path"]
        problem: Problem | None = scope.get("disagg.problem")
        outcome = status if problem is None else problem.status  # of a stream it is told after the status was sent
        route = scope.get("route")
        known = getattr(route, "path", "other")  # a path nobody serves must not become a metric of its own
        self._state.metrics.http.labels(known, outcome).inc()
        records: list[Record] = scope.get("disagg.records", [])
        exchange: Exchange | None = scope.get("disagg.exchange")
        failed = problem is not None or status == _GONE
        if path in _TOKENS and failed and outcome not in _STRANGERS and not (exchange and exchange.request_ids):
            records = _unsent(scope, exchange, problem or gone(), started_at)
            self._state.front.note(records, exchange)
        if outcome < 400 and any(path.startswith(quiet) for quiet in _QUIET):
            return
        line: dict[str, object] = {
            "event": "request", "id": scope["disagg.id"], "method": scope["method"], "path": path, "status": status,
            "took_ms": round((time.monotonic() - started_at) * 1e3, 3), **_client(scope),
        }  # fmt: skip
        if outcome != status:
            line["outcome"] = outcome
        if problem is not None and outcome >= 408:  # sentences of our own: those about a request may repeat parts of it
            line["error"] = problem.message
        choices = {record.request_id: _outcome(record) for record in records}
        if names := (exchange.request_ids if exchange is not None else []) or list(choices):
            line["choices"] = [choices.get(name, {"request_id": name}) for name in names]  # others have Records later
        log.info(json.dumps(line))


def _unsent(scope: Scope, exchange: Exchange | None, problem: Problem, started_at: float) -> list[Record]:
    """Records of what was never sent to a worker: one a choice, or one where it did not come to choices."""
    is_gone = problem.status == _GONE
    asks: Sequence[Ask | None] = (None,) if exchange is None else exchange.asks
    ids = [scope["disagg.id"], *(uuid.uuid4().hex for _ in asks[1:])]
    return [
        Record(
            request_id=request_id,
            index=0,
            prompt_len=0 if ask is None else len(ask.prompt),
            max_tokens=0 if ask is None else ask.params.max_tokens,
            finish_reason=FinishReason.ABORT if is_gone else FinishReason.REFUSED,
            error=problem.brief,
            scheduled_at=started_at,
        )
        for request_id, ask in zip(ids, asks, strict=True)
    ]


def _client(scope: Scope) -> Mapping[str, str]:
    client = scope.get("client")
    user = scope.get("disagg.user")
    return ({"client": client[0]} if client else {}) | ({"user": user[:100]} if user else {})


def _outcome(record: Record) -> dict[str, object]:
    """A Record in short; prompts and tokens are nobody's business here."""
    ttft_s = record.ttft_s
    return {
        "request_id": record.request_id,
        "finish_reason": record.finish_reason,
        "prompt_len": record.prompt_len,
        "output_len": record.output_len,
        "ttft_ms": None if ttft_s is None else round(ttft_s * 1e3, 3),
        "prefill_worker": record.prefill_worker,
        "decode_worker": record.decode_worker,
    }


def _host(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    return name.strip("[]").lower()
