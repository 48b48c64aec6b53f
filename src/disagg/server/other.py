"""Every endpoint that makes no tokens: models, tokenizing, health, version, metrics, audit."""

import importlib.metadata

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from disagg.server.asked import DetokenizeRequest, TokenizeRequest
from disagg.server.generating import Arrival, in_time, read
from disagg.server.metrics import CONTENT_TYPE
from disagg.server.problems import Problem, answer
from disagg.server.state import State


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return answer({"object": "list", "data": [_state(request).model()]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    state = _state(request)
    state.check_model(request.path_params["name"])
    return answer(state.model())


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    arrival, state = Arrival.now(), _state(request)
    asked = await read(request, TokenizeRequest)
    state.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise Problem(400, "Give either prompt or messages.", param="prompt")
    async with in_time(request, arrival):
        if asked.prompt is not None:
            tokens = await state.texts.encode(asked.prompt)
        else:
            tokens = await state.texts.encode_chat(await state.texts.render(asked.messages or []))
    return answer({"count": tokens.num, "max_model_len": state.most_tokens(), "tokens": msgspec.Raw(tokens.json)})


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    arrival, state = Arrival.now(), _state(request)
    asked = await read(request, DetokenizeRequest)
    state.check_model(asked.model)
    async with in_time(request, arrival):
        text = await state.texts.decode(bytes(asked.tokens))
    return answer({"prompt": msgspec.Raw(text)})


async def health(request: Request) -> Response:
    """GET /health: 200 while requests are served, 503 otherwise; `reasons` says what is not as it should be."""
    state = _state(request)
    workers = state.front.workers
    down = [f"Worker {worker.name} is not up." for worker in workers if not worker.up]
    down += [f"Worker {worker.name} has not been heard of for a while." for worker in workers if worker.silent]
    if state.stopping:
        status, reasons = "stopping", [state.stopping]
    elif not workers:
        status, reasons = "starting", [state.front.progress]
    elif len(down) == len(workers):
        status, reasons = "unavailable", down
    else:
        status, reasons = ("degraded", down) if down else ("ready", [])
    return answer({"status": status, "reasons": reasons}, 200 if status in ("ready", "degraded") else 503)


async def version(request: Request) -> Response:
    """GET /version."""
    return answer({"version": importlib.metadata.version("disagg")})


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    return Response(_state(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def audit(request: Request) -> Response:
    """GET /audit: where every page of every worker is, and what became of every request."""
    state = _state(request)
    reports = await state.front.audit()
    return answer({
        "deployment": state.front.cluster().deployment.name,
        "counters": await state.front.call(lambda cluster: cluster.counters()),
        "workers": [msgspec.structs.asdict(report) for report in reports],
    })  # fmt: skip


def _state(request: Request) -> State:
    state: State = request.app.state.disagg
    return state
