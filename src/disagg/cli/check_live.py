"""`disagg check --url`: is a server that runs well? Its health, its pages, and a canary through its front door."""

import contextlib
import json
import urllib.error
import urllib.request
import uuid
from typing import Any

from rich.console import Console
from rich.table import Table

from disagg.clock import WallClock
from disagg.errors import DisaggError, InputError

_ANSWER_S = 60.0
_SETTLE_S = 5.0
_TURN_S = 0.1
_PROMPT_LEN, _MAX_TOKENS = 53, 12


class Refused(DisaggError):
    """A server answered with an error. `reason`: its code in the OpenAI API's format, if that is what came."""

    def __init__(self, url: str, status: int, said: bytes) -> None:
        self.reason = None
        message = said.decode(errors="replace")[:300]
        with contextlib.suppress(ValueError, TypeError, KeyError):
            error = json.loads(said)["error"]
            message, self.reason = str(error["message"]), error["code"]
        super().__init__(f"{url} answered {status}: {message}")


class Live:
    """A running `disagg serve`, asked over HTTP."""

    def __init__(self, url: str, key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url {url!r} is not understood: write for example http://127.0.0.1:8000.")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of an answer, of /health also when it is a 503. Raises DisaggError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({"Content-Type": "application/json"} if data else {})}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self._url + path, data, headers), timeout=_ANSWER_S
            ) as got:
                return json.load(got)
        except urllib.error.HTTPError as error:
            said = error.read()
            if path == "/health":
                return json.loads(said)
            if error.code == 401:
                raise InputError(f"{self._url} asks for a key: give --api-key file:PATH or env:NAME.") from None
            raise Refused(f"{self._url}{path}", error.code, said) from None
        except (OSError, ValueError) as error:
            raise DisaggError(f"{self._url} does not answer as `disagg serve` does: {error}.") from None


def examine(live: Live) -> dict[str, Any]:
    """All findings, ready for JSON. Raises DisaggError when the server cannot be asked."""
    health = live.ask("/health")
    if health["status"] not in ("ready", "degraded"):
        return {"healthy": False, "faults": [f"It does not serve: {' '.join(health['reasons'])}"], "warnings": []}
    sung = _canary(live) if len(live.ask("/audit")["workers"]) > 1 else None
    audit = _settled(live)
    counters, faults = audit["counters"], []
    if sung is not None and sung["colocated"] != sung["disaggregated"]:
        faults.append("The canary died: a prompt that is handed over gives other tokens than one that is not.")
    ended = sum(counters[name] for name in ("done", "failed", "expired", "aborted"))
    if counters["started"] != ended + counters["live"]:
        faults.append(
            f"Of {counters['started']} requests {ended} ended and {counters['live']} are live: some are lost."
        )
    for worker in audit["workers"]:
        if worker["fault"]:
            faults.append(f"{worker['worker']}: {worker['fault']}")
        if worker["held"] and not counters["live"]:
            faults.append(f"{worker['worker']} still holds {worker['held']} page(s) of nobody.")
    return {"healthy": not faults, "audit": audit, "canary": sung, "faults": faults, "warnings": health["reasons"]}


def show(found: dict[str, Any], console: Console) -> None:
    """The findings for people."""
    if audit := found.get("audit"):
        counts = ", ".join(f"{count} {name}" for name, count in audit["counters"].items())
        console.print(f"{audit['deployment']}; requests: {counts}", style="bold", highlight=False)
        workers = Table("worker", "pages", "free", "cached", "held")
        for worker in audit["workers"]:
            workers.add_row(worker["worker"], *(str(worker[name]) for name in ("total", "free", "cached", "held")))
        console.print(workers)
        sung = found["canary"]
        agree = "not needed" if sung is None else "agrees" if sung["colocated"] == sung["disaggregated"] else "died"
        console.print(f"canary: {agree}", highlight=False)
    conclude(found, console)


def conclude(found: dict[str, Any], console: Console) -> None:
    """What is slow, what is wrong, and whether it is healthy: the end of every check."""
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    for fault in found["faults"]:
        console.print(f"wrong: {fault}", style="red", highlight=False, soft_wrap=True)
    console.print("healthy" if found["healthy"] else "not healthy", style="bold")


def _canary(live: Live) -> dict[str, list[int]]:
    """See `_sing`; of half the prompt, and again, where the server takes none so long (--max-prompt-len)."""
    length = _PROMPT_LEN
    while True:
        try:
            return _sing(live, length)
        except Refused as error:
            if error.reason != "context_length_exceeded" or length == 1:
                raise
            length //= 2


def _sing(live: Live, length: int) -> dict[str, list[int]]:
    """Greedy tokens of one prompt with and without a hand-off. The prompt is new, so that no prefix cache has it."""
    start = uuid.uuid4().int
    prompt = [(start + 31 * i) % 251 for i in range(length)]  # ids that every vocabulary has
    asked = {
        "prompt": prompt,
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    sung = {}
    for routing in ("colocated", "disaggregated"):
        answer = live.ask("/v1/completions", {**asked, "disagg_route": routing})
        sung[routing] = answer["choices"][0]["token_ids"]
    return sung


def _settled(live: Live) -> Any:
    """The audit, once nobody holds a page or the time for that is over; a server with traffic may never come to it."""
    clock = WallClock()
    until = clock.now() + _SETTLE_S
    while True:
        audit = live.ask("/audit")
        if not any(worker["held"] for worker in audit["workers"]) or audit["counters"]["live"] or clock.now() > until:
            return audit
        clock.sleep_until(clock.now() + _TURN_S)
