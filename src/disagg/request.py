"""What is asked: SamplingParams and Request, the nouns every other file speaks.

    WAITING ──plan──▶ RUNNING ──commit──▶ FINISHED
       ▲                │  │
       └──preempted─────┘  └──first token sampled, KV wanted elsewhere──▶ HOLDING ──acked──▶ FINISHED

A request has no phases. `num_computed` counts the positions whose K and V lie in pages (or will, when the step in
flight ends); the scheduler lets it catch up with `len(tokens)`. A prompt is far behind, a decoding request is one
behind, a preempted one starts again from zero.
"""

import enum
from dataclasses import dataclass, field

import msgspec

from disagg.errors import RequestError


class Status(enum.Enum):
    """Where a request is on one worker."""

    WAITING = "waiting"  # holds no page
    RUNNING = "running"  # holds pages, takes part in plans
    HOLDING = "holding"  # prefilled here for another worker: holds pages, takes part in no plan
    FINISHED = "finished"  # holds nothing


class FinishReason(enum.StrEnum):
    """Why a request ended, in the words of the OpenAI API where it has them."""

    STOP = "stop"  # end-of-sequence, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"  # the client went away or asked to stop
    ERROR = "error"  # it failed; the Record says why
    REFUSED = "refused"  # it was never taken: no room for it, or it could not be served


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen. Field names are the field's (OpenAI, vLLM). Raises RequestError on impossible values.

    `temperature` 0 is greedy. `top_k` 0 keeps all; so does -1, as in vLLM, which becomes 0. `seed` makes a
    request's tokens a function of seed and prompt alone; without one the front end draws one. `logprobs` n returns the
    chosen token's log-probability and the n most likely ones, both of the model's own distribution (before temperature
    and filters).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in CTRL (arXiv 1909.05858)
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output, times the count
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0  # no end-of-sequence or stop token before this many
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)
        rules = (
            (self.temperature == 0 or 1e-5 <= self.temperature < 1e5, "temperature must be 0, or from 1e-5 to 1e5"),
            (0 <= self.top_k < 2**31, "top_k must lie between 1 and 2**31 - 1, or be 0 or -1, which keep all tokens"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must lie between 0 and 1"),
            (0.01 <= self.repetition_penalty <= 100, "repetition_penalty must lie between 0.01 and 100"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must lie between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must lie between -2 and 2"),
            (1 <= self.max_tokens < 2**31, "max_tokens must be at least 1 and below 2**31"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens must lie between 0 and max_tokens"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must lie between 0 and 20"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed must lie between 0 and 2**63 - 1"),
            (all(self.stop), "stop strings must not be empty"),
            (all(0 <= token < 2**31 for token in self.stop_token_ids), "stop_token_ids must be token ids"),
        )
        for holds, message in rules:
            if not holds:
                raise RequestError(message + ".")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(slots=True, eq=False)
class Request:
    """One request as a worker sees it. Mutable; owned by that worker's scheduler and, while HOLDING, by its hand-off.

    `id` is global and stable: the front end chose it, and it names the request on every worker. `stop_ids` is the
    resolved set (the model's end-of-sequence ids unless ignored, and the caller's). `order` decides first come first
    served and who is preempted last. `decode_elsewhere` says that only the prompt is computed here.
    """

    id: str
    prompt_len: int
    tokens: list[int]  # prompt, then every known output token
    params: SamplingParams
    stop_ids: frozenset[int]
    order: float
    decode_elsewhere: bool = False

    status: Status = Status.WAITING
    num_computed: int = 0
    num_cached: int = 0  # of num_computed, how many came from the prefix cache
    pages: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_output(self) -> int:
        """How many output tokens are known."""
        return len(self.tokens) - self.prompt_len
