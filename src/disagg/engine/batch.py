"""One step's data: what the scheduler plans, and what the runner brings back."""

from dataclasses import dataclass, field
from typing import NamedTuple

from disagg.request import Request, SamplingParams, Status


class Chunk(NamedTuple):
    """Several positions of one request, computed in this step: a whole prompt, a part of one, or a recomputation."""

    request: Request
    start: int  # first position computed
    length: int  # number of positions
    samples: bool  # whether the last position yields a token: it does when start + length reaches the last known token


@dataclass(slots=True)
class Batch:
    """A step. `decodes` come first: one position each, `len(tokens) - 1`, every one yields a token. Then `chunks`."""

    decodes: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # sent back to WAITING while planning; for the records

    @property
    def num_chunk_tokens(self) -> int:
        """Positions computed by chunks."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Positions computed in all."""
        return len(self.decodes) + self.num_chunk_tokens

    def sampling(self) -> list[Request]:
        """The requests that get a token, in the order of `Output.tokens`."""
        return self.decodes + [chunk.request for chunk in self.chunks if chunk.samples]

    def leave(self, ended: list[Request]) -> None:
        """These requests are not computed any more."""
        self.decodes = [request for request in self.decodes if request not in ended]
        self.chunks = [chunk for chunk in self.chunks if chunk.request not in ended]


class TokenLogprobs(NamedTuple):
    """Log-probabilities of one sampled token, natural logarithm, of the model's own distribution."""

    chosen: float
    top: list[tuple[int, float]]  # (token id, log-probability), likeliest first


class Output(NamedTuple):
    """What a step produced, one entry for each of `Batch.sampling()`."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


class Committed(NamedTuple):
    """What a step changed beyond one more token each."""

    finished: list[Request]  # ended; `finish_reason` is set, pages are released
    holding: list[Request]  # prefilled for another worker; pages are held until `release`


class Holder(NamedTuple):
    """One line of `Scheduler.audit`."""

    request_id: str
    status: Status
    pages: list[int]


def output_index(request: Request) -> int:
    """Which output token the step last planned for `request` samples, from 0. Earlier ones may be still to come."""
    return request.num_computed - request.prompt_len


def needs_history(params: SamplingParams) -> bool:
    """Whether the next token depends on which the earlier ones are, beyond the logits: penalties do."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
