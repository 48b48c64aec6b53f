"""The OpenAPI document, made from the types that decode requests: it cannot say anything else than they do."""

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from disagg.server.asked import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from disagg.server.problems import answer

_POSTS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "/v1/completions": (CompletionRequest, "Continue prompts, streamed or not."),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation, streamed or not."),
    "/tokenize": (TokenizeRequest, "Token ids of a prompt or a conversation."),
    "/detokenize": (DetokenizeRequest, "Text of token ids."),
}
_GETS = {
    "/v1/models": "The model that is served.",
    "/v1/models/{name}": "The model, by its name.",
    "/health": "200 while requests are served, 503 otherwise.",
    "/version": "This package's version.",
    "/audit": "Where every page of every worker is.",
    "/openapi.json": "This document.",
}
_REFUSALS = {
    "400": "The request is at fault.",
    "401": "No valid API key.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "421": "Not a name of this server.",
    "429": "Too many requests; see Retry-After.",
    "500": "The request failed.",
    "503": "Not serving at the moment; see Retry-After.",
    "504": "The deadline has passed.",
}


async def document(request: Request) -> Response:
    """GET /openapi.json."""
    return answer(make())


@cache
def make() -> dict[str, Any]:
    """The document."""
    kinds = [kind for kind, _ in _POSTS.values()]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components["Error"] = _error_schema()
    paths: dict[str, Any] = {path: {"get": _operation(path, text)} for path, text in _GETS.items()}
    paths["/metrics"] = {"get": _operation("/metrics", "Metrics for Prometheus.", "text/plain")}
    for (path, (_, text)), schema in zip(_POSTS.items(), references, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {**_operation(path, text), "requestBody": body}}
        if path.endswith("completions"):
            paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "disagg", "version": "1", "description": "An OpenAI-compatible server."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _operation(path: str, text: str, media_type: str = "application/json") -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": {media_type: {}}}}
    responses |= {status: {"description": why, "content": error} for status, why in _REFUSALS.items()}
    if path == "/health":
        responses["503"]["content"] = {media_type: {}}
    names = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}] if "{name}" in path else []
    return {"summary": text, "parameters": names, "responses": responses}


def _error_schema() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    inner = {"message": text, "type": text, "param": maybe, "code": maybe}
    required = {"type": "object", "properties": inner, "required": list(inner)}
    return {"type": "object", "properties": {"error": required}, "required": ["error"]}
