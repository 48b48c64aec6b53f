"""What can go wrong with a request over HTTP, in the OpenAI API's error format.

    {"error": {"message": one sentence, "type": ..., "param": the field at fault or null, "code": ...}}

`type` is `invalid_request_error` where the caller can mend it, `rate_limit_error` when there is too much at once,
`server_error` otherwise.
"""

import json
import logging
import math
import traceback
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from disagg.errors import DisaggError, InputError, Overloaded, WorkerLost

log = logging.getLogger("disagg.serve")

_TYPES = {429: "rate_limit_error"}
_GONE = 499  # nginx's, of a client that left before it had its answer


class Problem(Exception):
    """An answer that is an error. `param` is the request's field at fault; `retry_after_s` becomes Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def brief(self) -> str:
        """For a Record, where no sentence may stand that repeats parts of a request; of a client that left nothing."""
        return "" if self.status == _GONE else f"{self.status} {self.code or ''}".rstrip()

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))  # whole seconds (RFC 9110, 10.2.3)
        return answer(self.body(), self.status, headers)


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer of anything msgspec can encode."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def problem_of(error: Exception, fields: tuple[str, ...] = ()) -> Problem:
    """What an error of this package means to a client. `fields` are the request's, to find the one a sentence names."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Overloaded):
        return Problem(429, str(error), code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, InputError):
        first = str(error).partition(" ")[0]
        return Problem(400, str(error), param=first if first in fields else None)
    if isinstance(error, WorkerLost):
        return unavailable(str(error))
    if isinstance(error, DisaggError):
        return Problem(500, str(error))
    return Problem(500, "The server failed on this request; its log says why.")


def told(error: Exception, scope: Scope, fields: tuple[str, ...] = ()) -> Problem:
    """The same. What is nobody's mistake but ours goes into the log, with the request's id."""
    problem = problem_of(error, fields)
    if not isinstance(error, Problem | DisaggError):
        trace = "".join(traceback.format_exception(error))
        log.error(json.dumps({"event": "bug", "id": scope.get("disagg.id"), "traceback": trace}))
    return problem


def unavailable(reason: str) -> Problem:
    """Not now: the deployment starts, stops or has failed."""
    return Problem(503, reason, code="unavailable", retry_after_s=5.0)


def gone() -> Problem:
    """The client went away. Nobody reads this answer; the log shows the status that proxies use for it."""
    return Problem(_GONE, "The client closed the connection.")


def late(deadline_s: float) -> Problem:
    """It was not done by its deadline."""
    return Problem(504, f"Not finished within {deadline_s:g} s.", code="deadline")
