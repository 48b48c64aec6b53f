"""The ASGI application: which path is answered by what."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from disagg.errors import DisaggError
from disagg.server import live, openapi, other
from disagg.server.asked import FIELDS
from disagg.server.generating import chat_completions, completions
from disagg.server.guards import Guard, Keys
from disagg.server.problems import Problem, told
from disagg.server.state import State


def create_app(state: State, keys: Keys, hosts: frozenset[str]) -> ASGIApp:
    """Everything a server answers, behind the guard."""
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", other.models),
        Route("/v1/models/{name:path}", other.model),
        Route("/tokenize", other.tokenize, methods=["POST"]),
        Route("/detokenize", other.detokenize, methods=["POST"]),
        Route("/health", other.health),
        Route("/version", other.version),
        Route("/metrics", other.metrics),
        Route("/audit", other.audit),
        Route("/openapi.json", openapi.document),
        *live.routes(state),
    ]
    handlers = {HTTPException: _http, Problem: _mistake, DisaggError: _mistake, Exception: _mistake}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.disagg = state
    return Guard(app, state, keys, hosts)


async def _mistake(request: Request, error: Exception) -> Response:
    problem = request.scope["disagg.problem"] = told(error, request.scope, FIELDS)
    return problem.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {404: "There is nothing at this path.", 405: "This path does not take this method."}
    response = Problem(error.status_code, sentences.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response
