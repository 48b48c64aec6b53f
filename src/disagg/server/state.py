"""What every handler shares: the settings, the front thread, the tokenizer, and what the server says of itself."""

import time
from functools import cached_property
from typing import Any

import msgspec

from disagg.cluster.status import Status
from disagg.model.load import Info
from disagg.server.answers import TokenNames
from disagg.server.front import Front
from disagg.server.metrics import Metrics
from disagg.server.problems import Problem, unavailable
from disagg.server.texts import Texts


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and names. Seconds and bytes."""

    model: str  # as clients call it
    max_body_bytes: int = 4 << 20
    max_prompt_len: int | None = None  # tokens; None: what the context allows
    max_choices: int = 64  # prompts of a batch times n
    max_requests: int = 512  # HTTP requests that cost something, at a time: guards._WORK
    deadline_s: float = 600.0  # from the arrival of a request to the end of its answer
    body_s: float = 30.0  # how long a client may take to send its body
    drain_s: float = 30.0  # how long requests may go on after SIGTERM


class State:
    """One per server, made on the running event loop. `stopping` is a sentence once the server no longer wants work."""

    def __init__(self, settings: Settings, front: Front, metrics: Metrics) -> None:
        self.settings = settings
        self.front = front
        self.metrics = metrics
        self.created = int(time.time())
        self.num_requests = 0  # HTTP requests that cost something and are under way
        self.stopping = ""

    def info(self) -> Info:
        """The model. Raises Problem 503 while there is none to ask."""
        if self.stopping:
            raise unavailable(self.stopping)
        return self.front.cluster().info

    def status(self) -> Status:
        """What the deployment does now, under the name it is served by. Raises Problem 503 when there is none."""
        return msgspec.structs.replace(self.front.cluster().status(), model=self.settings.model)

    @cached_property
    def texts(self) -> Texts:
        """Texts to token ids and back. Raises Problem 503 while there is no model to ask."""
        return Texts(self.front.cluster().info)

    @cached_property
    def names(self) -> TokenNames:
        """Texts of single tokens. Not through `info`: requests under way need it while the server stops."""
        return TokenNames(self.front.cluster().info.tokenizer)

    def most_tokens(self) -> int:
        """How long prompt and output may be together, in tokens, for any request."""
        cluster = self.front.cluster()
        assert cluster.engine.max_len is not None
        return min(cluster.engine.max_len, cluster.num_pages * cluster.engine.page_size)

    def check_model(self, name: str | None) -> None:
        """Raise Problem 404 when a request names another model than the one served."""
        if name is not None and name != self.settings.model:
            message = f"There is no model {name[:100]!r} here: this server has {self.settings.model!r}."
            raise Problem(404, message, param="model", code="model_not_found")

    def check_len(self, count: int, param: str) -> None:
        """Raise Problem 400 when a prompt is longer than this server takes."""
        most = self._most_prompt()
        if not 1 <= count <= most:
            message = f"{param} has {count} tokens and this server takes 1 to {most}."
            raise Problem(400, message, param=param, code="context_length_exceeded" if count else None)

    def check_text(self, text: str, param: str) -> None:
        """The same of a text that nobody has tokenized yet: Problem 400 when it cannot possibly fit."""
        fewest, most = self.texts.fewest(text), self._most_prompt()
        if fewest > most:
            message = f"{param} has at least {fewest} tokens and this server takes 1 to {most}."
            raise Problem(400, message, param=param, code="context_length_exceeded")

    def _most_prompt(self) -> int:
        most = self.most_tokens() - 1
        return most if self.settings.max_prompt_len is None else min(most, self.settings.max_prompt_len)

    def model(self) -> dict[str, Any]:
        """The served model as the OpenAI API lists it; `max_model_len` as vLLM adds it."""
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "disagg",
            "max_model_len": self.most_tokens(),
        }

    async def close(self) -> None:
        """Let go of what turns texts into tokens."""
        if "texts" in self.__dict__:
            await self.texts.close()
