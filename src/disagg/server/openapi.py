"""The OpenAPI document, made from the types that decode requests, with the bounds that are checked after decoding."""

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from disagg.server.asked import (
    MOST_MESSAGES,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    NOTHING,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
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
# What the types do not say of fields, by name or by type and name: the engine checks it (SamplingParams), or a handler.
BOUNDS: dict[str, dict[str, Any]] = {
    "n": {"minimum": 1},
    "best_of": {"minimum": 1, "description": "n, if given: no more choices are drawn than returned."},
    "temperature": {
        "minimum": 0,
        "exclusiveMaximum": 1e5,
        "description": "0 is greedy. Above 2 is possible, as in vLLM; between 0 and 1e-5 is not.",
    },
    "top_k": {"minimum": -1, "exclusiveMaximum": 2**31, "description": "0 and, as in vLLM, -1 keep all tokens."},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "seed": {"minimum": 0, "exclusiveMaximum": 2**63},
    "max_tokens": {"minimum": 1, "exclusiveMaximum": 2**31},
    "max_completion_tokens": {"minimum": 1, "exclusiveMaximum": 2**31},
    "min_tokens": {"minimum": 0, "exclusiveMaximum": 2**31, "description": "At most max_tokens."},
    "CompletionRequest.logprobs": {"minimum": 0, "maximum": 20},
    "top_logprobs": {"minimum": 0, "maximum": 20, "description": "Needs logprobs."},
    "stop": {"maxItems": MOST_STOPS},
    "stop_token_ids": {"maxItems": MOST_STOP_TOKENS},
    "messages": {"maxItems": MOST_MESSAGES},
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
    for kind in kinds:
        _complete(kind.__name__, components[kind.__name__]["properties"])
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


def _complete(kind: str, properties: dict[str, Any]) -> None:
    """Add bounds, and the fields that may be there with a value that asks for nothing."""
    for name, schema in properties.items():
        schema |= BOUNDS.get(name) or BOUNDS.get(f"{kind}.{name}", {})
    for name, values in NOTHING.items():
        properties[name] = {"enum": list(values), "description": "Not supported: these values ask for nothing."}


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
