"""The Python API: a model on a deployment, prompts in, outputs out.

with LLM("smollm2", deploy="1P1D", budget="cpu:2") as llm:
    outputs = llm.generate(["Hello", [1, 2, 3]], SamplingParams(temperature=0, max_tokens=16))
"""

import difflib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from disagg.cluster import limits
from disagg.cluster.cluster import Cluster, Update
from disagg.cluster.policies import DEFAULT
from disagg.config import Budget, Deployment, EngineSpec
from disagg.engine.batch import TokenLogprobs
from disagg.errors import DisaggError, InputError, RequestError
from disagg.model.tokenizer import Detokenizer, NoTokenizer
from disagg.record import Record
from disagg.request import FinishReason, SamplingParams
from disagg.text import Detokenizes, Numbers, TextStream

Prompt = str | Sequence[int]
_POLL_S = 0.5
_MOST_LIVE = 4096  # requests sent at once; the rest of a very long list follows as these end


@dataclass(slots=True)
class Completion:
    """What came of one prompt. `text` of a model without a tokenizer (`seed`) is its ids, each followed by a space."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str = ""
    record: Record | None = None


class Delta(NamedTuple):
    """A piece of the output of the prompt in this place of the call."""

    place: int
    token_ids: list[int]
    text: str


class LLM:
    """A running deployment. Leaving the `with` block (or `close`) leaves no process, socket or memory behind.

    model, deploy, budget, policy: as on the command line. Further keywords are the fields of EngineSpec (dtype,
    page_size, kv_bytes, max_batch_tokens, prefix_caching, ...). Raises InputError with the nearest name for an unknown
    one.
    """

    def __init__(
        self, model: str, deploy: str = "1C", budget: str | None = None, policy: str = DEFAULT, **engine: Any
    ) -> None:
        _refuse_unknown(engine)
        cores = tuple(sorted(os.sched_getaffinity(0)))
        placed = Deployment.parse(deploy, Budget.parse(budget or f"cpu:{len(cores)}", cores))
        self.cluster = Cluster(placed, EngineSpec.on(placed.budget.kind, model=model, **engine), policy=policy)
        self.tokenizer = self.cluster.info.tokenizer
        self._news: dict[str, list[Update]] = {}  # of every open request, until the call that made it looks

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the deployment."""
        self.cluster.close()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Run all prompts together and return their outputs in order.

        prompts: strings, or lists of token ids. params: one for all, or one each. Raises RequestError when one can
        never be served (none is then) and WorkerLost when a worker dies. One that fails on the way has finish_reason
        "error", and its record says why.
        """
        completions = [Completion(prompt) for prompt in prompts]
        for _ in self._run(completions, _one_each(params, len(prompts))):
            pass
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """One prompt, piece by piece. Closing the iterator early aborts the request. Raises DisaggError if it fails."""
        completion = Completion(prompt)
        yield from self._run([completion], _one_each(params, 1))
        if completion.record is not None and completion.record.error:
            raise DisaggError(completion.record.error)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for `generate`."""
        return self.tokenizer.chat(messages)

    def _run(self, completions: list[Completion], params: list[SamplingParams]) -> Iterator[Delta]:
        prompts = [self._encode(completion.prompt) for completion in completions]
        streams = [self._text_stream(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        cluster = self.cluster
        for prompt, each in zip(prompts, params, strict=True):  # all before any: of a long list most are sent later
            limits.validate(prompt, each, cluster.engine, cluster.info.spec.vocab_size, cluster.num_pages)
        live: dict[str, int] = {}
        try:
            waiting = deque(enumerate(zip(prompts, params, strict=True)))
            while live or waiting:
                while waiting and len(live) < _MOST_LIVE:
                    place, (prompt, each) = waiting.popleft()
                    live[self._submit(prompt, each, place)] = place
                for update in self._poll(live):
                    if update.request_id not in live:
                        continue  # it met a stop string in an earlier update
                    place = live[update.request_id]
                    text = self._take(completions[place], streams[place], update)
                    if completions[place].record is not None:
                        del live[update.request_id], self._news[update.request_id]
                    yield Delta(place, update.tokens, text)
        finally:
            for request_id in live:
                self.cluster.abort(request_id)
                del self._news[request_id]

    def _submit(self, prompt: list[int], params: SamplingParams, index: int) -> str:
        request_id = self.cluster.submit(prompt, params, index=index)
        self._news[request_id] = []
        return request_id

    def _poll(self, live: dict[str, int]) -> list[Update]:
        """What is new of these requests. Of those of another open `stream` it is kept until that one looks."""
        if not any(self._news[request_id] for request_id in live):
            for update in self.cluster.poll(_POLL_S):
                self._news.get(update.request_id, []).append(update)
        mine = [update for request_id in live for update in self._news[request_id]]
        for request_id in live:
            self._news[request_id] = []
        return mine

    def _take(self, completion: Completion, stream: TextStream, update: Update) -> str:
        """Add what is new and return its text. A stop string ends the request, with the token that completed it."""
        text = ""
        record = update.record
        for token, logprobs in zip(update.tokens, update.logprobs, strict=True):
            completion.token_ids.append(token)
            if logprobs is not None:
                completion.logprobs = [*(completion.logprobs or []), logprobs]
            text += stream.push([token])
            if stream.stopped:
                record = record or self.cluster.abort(update.request_id, FinishReason.STOP)
                break
        if record is not None:
            text += stream.push([], final=True)
        completion.text += text
        if record is not None:
            completion.finish_reason = FinishReason.STOP if stream.stopped else record.finish_reason
            completion.record = record
        return text

    def _text_stream(self, prompt: list[int], params: SamplingParams) -> TextStream:
        wordless = isinstance(self.tokenizer, NoTokenizer)
        if params.stop and wordless:
            raise RequestError("Stop strings need a tokenizer and this model has none: use stop_token_ids.")
        detokenizer: Detokenizes = Numbers() if wordless else Detokenizer(self.tokenizer, prompt)
        return TextStream(detokenizer, params.stop)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one each.")
    return list(params)


def _refuse_unknown(engine: dict[str, Any]) -> None:
    known = [field.name for field in msgspec.structs.fields(EngineSpec) if field.name != "model"]
    for name in engine:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
            raise InputError(f"LLM has no option {name!r}.{hint}")
