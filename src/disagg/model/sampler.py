"""From logits to tokens. What a request draws depends on its own logits, parameters and tokens, and on nothing else.

Randomness has no state: the uniform number for output token i of a request is a hash of (seed, i). So batching,
preemption, a hand-off to another worker and a restart leave the tokens as they are.

Order: repetition, frequency and presence penalties, min_tokens, temperature, top-k, top-p (of what top-k left), min-p.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from disagg.engine.batch import Output, TokenLogprobs
from disagg.request import Request

_MASK = 2**64 - 1
_CANDIDATES = 1024  # likeliest tokens looked at first; sorting a whole vocabulary takes milliseconds a row


def sample(logits: Tensor, requests: Sequence[Request]) -> Output:
    """One token for each row of `logits` [S, V] float32, which belongs to the request of the same index.

    `logits` is left as it is: log-probabilities are those of the model itself.
    """
    if not requests:
        return Output([], [])
    adjusted = _adjust(logits, requests)
    tokens = adjusted.argmax(dim=-1).tolist()
    drawn = [row for row, request in enumerate(requests) if not request.params.greedy]
    if drawn:
        rows = adjusted if len(drawn) == len(requests) else adjusted[drawn]
        for row, token in zip(drawn, _draw(rows, [requests[row] for row in drawn]), strict=True):
            tokens[row] = token
    return Output(tokens, _logprobs(logits, requests, tokens))


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) for output token `index`: splitmix64 (Steele, Lea and Flood, 2014) of seed and index."""
    bits = _mix((_mix(seed & _MASK) + index) & _MASK)
    return (bits >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _seed(request: Request) -> int:
    """The front end draws a seed for a request without one; should it not, the id (the same on every worker) serves."""
    seed = request.params.seed
    return zlib.crc32(request.id.encode()) if seed is None else seed


def _adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits with penalties and forbidden stops; the same tensor when nobody asks for any."""
    adjusted = logits
    for row, request in enumerate(requests):
        params = request.params
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        too_early = request.num_output < params.min_tokens and request.stop_ids
        if not (penalised or too_early):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        if penalised:
            _penalise(adjusted[row], request)
        if too_early:
            adjusted[row, list(request.stop_ids)] = float("-inf")
    return adjusted


def _penalise(row: Tensor, request: Request) -> None:
    """Change one row [V] in place."""
    params = request.params
    tokens = torch.tensor(request.tokens, device=row.device)
    if params.repetition_penalty != 1:
        seen = tokens.unique()
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = tokens[request.prompt_len :]
    if len(output) and (params.presence_penalty or params.frequency_penalty):
        seen, counts = output.unique(return_counts=True)
        row[seen] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Inverse-transform sampling of each row.

    Unfiltered rows walk the distribution in vocabulary order, filtered ones from the likeliest down. Which way a row
    goes is decided by its own request alone, or its tokens would depend on its neighbours in the batch.
    """
    device = logits.device
    params = [request.params for request in requests]
    temperature = torch.tensor([p.temperature for p in params], device=device, dtype=torch.float32)
    peak = logits.max(dim=-1, keepdim=True).values  # a tiny temperature must not make inf - inf
    probabilities = ((logits - peak) / temperature[:, None]).softmax(dim=-1)
    numbers = torch.tensor(
        [uniform(_seed(request), request.num_output) for request in requests], device=device, dtype=torch.float64
    )
    tokens = [0] * len(requests)
    filtered = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p > 0]
    plain = [row for row in range(len(requests)) if row not in set(filtered)]
    if plain:
        for row, token in zip(plain, _walk(probabilities[plain], numbers[plain]).tolist(), strict=True):
            tokens[row] = token
    for row in filtered:
        tokens[row] = _draw_filtered(probabilities[row], requests[row], numbers[row : row + 1])
    return tokens


def _draw_filtered(probabilities: Tensor, request: Request, number: Tensor) -> int:
    """A token of one row [V] among those that top-k, top-p and min-p leave; the likeliest is always left."""
    params = request.params
    vocabulary = len(probabilities)
    cut = 0 < params.top_k < vocabulary
    values, ids = probabilities.topk(params.top_k if cut else min(_CANDIDATES, vocabulary))
    mass = values.sum(dtype=torch.float64) if cut else 1.0  # of what top-k leaves
    if not cut and values.sum() < params.top_p and values[-1] >= params.min_p * values[0]:
        values, ids = probabilities.sort(descending=True, stable=True)  # the candidates were not enough
    before = values.double().cumsum(0) - values
    keep = (before < params.top_p * mass) & (values >= params.min_p * values[0])
    keep[0] = True
    return int(ids[_walk((values * keep)[None], number)])


def _walk(weights: Tensor, numbers: Tensor) -> Tensor:
    """For each row of `weights` [S, V], the first index whose running sum exceeds number * total; int64 [S]."""
    sums = weights.double().cumsum(dim=-1)
    # strictly below the total, so that rounding can never pick a token of weight zero at the end
    targets = (numbers * sums[:, -1]).clamp(max=sums[:, -1].nextafter(sums.new_zeros(())))
    return torch.searchsorted(sums, targets[:, None], right=True)[:, 0]


def _logprobs(logits: Tensor, requests: Sequence[Request], tokens: list[int]) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * len(requests)
    for row, request in enumerate(requests):
        count = request.params.logprobs
        if count is None:
            continue
        logprobs = logits[row].log_softmax(dim=-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        found[row] = TokenLogprobs(float(logprobs[tokens[row]]), list(zip(ids.tolist(), values.tolist(), strict=True)))
    return found
