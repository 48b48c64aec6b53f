"""The page at `/` and what feeds it: static files without a build step, and `GET /live`, which the page polls.

    /          the page; it holds no data, so it needs no key
    /static/   its script, style and icon
    /live      what the deployment does at that moment: Status of cluster/status.py, `now` in seconds since 1970, and
               whether the model takes text

`/live` needs the API key where the server asks for one; the page asks its reader for it when it is answered 401.

The page's box sends a prompt twice to `POST /v1/completions`, streamed, with the body field `disagg_route`:
"colocated" (one worker does both phases) or "disaggregated" (two workers, whatever their roles). That is
Cluster.submit's `routing`, and works while two workers or more are up. The Row of a request is found again by
`request_id`, which the completion's `id` contains.
"""

import time
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from disagg.model.tokenizer import NoTokenizer
from disagg.server.state import State

_STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes(state: State) -> list[BaseRoute]:
    """The page's routes, for the server to mount."""

    async def page(request: Request) -> Response:
        return FileResponse(_STATIC / "index.html", headers=_HEADERS)

    async def live(request: Request) -> Response:
        takes_text = not isinstance(state.info().tokenizer, NoTokenizer)
        body = {"now": time.time(), "takes_text": takes_text, "status": state.status()}
        return Response(msgspec.json.encode(body), media_type="application/json", headers={"Cache-Control": "no-store"})

    return [Route("/", page), Route("/live", live), Mount("/static", StaticFiles(directory=_STATIC), name="static")]
