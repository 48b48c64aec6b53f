"""From logits to tokens. What a request draws depends on its own logits, parameters and tokens, and on nothing else.

Randomness has no state: the uniform number for output token i of a request is a hash of (seed, i). So batching,
preemption, a hand-off to another worker and a restart leave the tokens as they are.

Order: repetition, frequency and presence penalties, min_tokens, temperature, top-k, top-p (of what top-k left), min-p.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from disagg.engine.batch import Output, TokenLogprobs, needs_history, output_index
from disagg.request import Request, SamplingParams

_MASK = 2**64 - 1
_CANDIDATES = 1024  # largest weights looked at first
_BLOCK = 256  # weights summed together when a distribution is walked


def sample(logits: Tensor, requests: Sequence[Request]) -> Output:
    """One token for each row of `logits` [S, V] float32, which belongs to the request of the same index.

    `logits` is left as it is: log-probabilities are those of the model itself.
    """
    if not requests:
        return Output([], [])
    adjusted = adjust(logits, requests)
    tokens = _argmax(adjusted)
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


def seed_of(request: Request) -> int:
    """The front end draws a seed for a request without one; should it not, the id (the same on every worker) serves."""
    seed = request.params.seed
    return zlib.crc32(request.id.encode()) if seed is None else seed


def adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits with penalties and forbidden stops; the same tensor when nobody asks for any."""
    adjusted = logits
    for row, request in enumerate(requests):
        params = request.params
        penalised = needs_history(params)
        too_early = output_index(request) < params.min_tokens and request.stop_ids
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
    tokens = np.array(request.tokens)
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(tokens).to(row.device)
        values = row[seen]  # a token seen twice is written twice with the same value
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if request.num_output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(tokens[request.prompt_len :], return_counts=True)
        penalty = (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
        row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(penalty).to(row.device)


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Inverse-transform sampling of each row, walking the distribution in vocabulary order."""
    temperature = _column([request.params.temperature for request in requests], logits)
    # the peak is subtracted first, so that a tiny temperature cannot make inf - inf
    weights = (logits - logits.max(dim=-1, keepdim=True).values).div_(temperature).exp_()
    params = [request.params for request in requests]
    filtered = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p > 0]
    if filtered:
        chosen = weights[filtered]
        chosen[chosen < _thresholds(chosen, [params[row] for row in filtered])] = 0
        weights[filtered] = chosen
    numbers = [uniform(seed_of(request), output_index(request)) for request in requests]
    return _walk(weights, torch.tensor(numbers, dtype=torch.float64, device=logits.device))


def _thresholds(weights: Tensor, params: Sequence[SamplingParams], candidates: int = _CANDIDATES) -> Tensor:
    """The smallest weight that top-k, top-p and min-p leave, for each row of `weights` [S, V]; float32 [S, 1].

    Tokens as likely as the last one left are left too. The likeliest always is. Only the `candidates` largest weights
    are sorted, unless they do not decide every row; the result is the same.
    """
    vocabulary = weights.shape[1]
    ranked = _largest(weights, min(candidates, vocabulary))
    running = ranked.cumsum(dim=-1, dtype=torch.float64)
    reach = ranked.shape[1]
    top_k = _column([min(p.top_k or vocabulary, vocabulary) for p in params], weights).long()
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=weights.device)
    floor = _column([p.min_p for p in params], weights) * ranked[:, :1]
    within = top_k.clamp(max=reach) - 1
    # the share top-p asks for is one of what top-k leaves
    share = top_p * torch.where(
        top_k < vocabulary, running.gather(1, within), weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    )
    undecided = (top_k > reach) & (running[:, -1:] < share) & (ranked[:, -1:] >= floor)
    undecided |= (top_k > reach) & (top_k < vocabulary)
    if reach < vocabulary and undecided.any():
        return _thresholds(weights, params, vocabulary)
    num_before = (running < share).sum(dim=-1, keepdim=True)  # tokens that do not reach the share together
    return torch.maximum(ranked.gather(1, torch.minimum(num_before, within)), floor)


def _walk(weights: Tensor, numbers: Tensor) -> list[int]:
    """For each row of `weights` [S, V], the first index whose running sum exceeds number * total.

    Sums of blocks first, then one block: a running sum over a whole vocabulary costs ten times as much.
    """
    rows = torch.arange(len(weights), device=weights.device)
    if fill := -weights.shape[1] % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, fill))
    blocks = weights.view(len(weights), -1, _BLOCK)
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = ends[:, -1]
    # strictly below the total, so that rounding can never pick what lies behind the last weight
    targets = (numbers * total).clamp(max=total.nextafter(total.new_zeros(())))
    block = torch.searchsorted(ends, targets[:, None], right=True)[:, 0]
    inside = blocks[rows, block].double()
    rest = targets - torch.where(block > 0, ends[rows, block - 1], 0.0)
    sums = inside.cumsum(dim=-1)
    # two ways of summing a block differ in the last bit: stay at or before its last weight above zero
    place = torch.searchsorted(sums, rest[:, None], right=True)[:, 0]
    last = _BLOCK - 1 - (inside > 0).flip(-1).int().argmax(dim=-1)
    return (block * _BLOCK + torch.minimum(place, last)).tolist()


def _largest(weights: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, largest first. On a CPU numpy sorts with vector instructions, torch does not."""
    if not weights.is_cpu:
        return weights.topk(count).values
    found = np.partition(weights.numpy(), weights.shape[1] - count, axis=-1)[:, weights.shape[1] - count :]
    found.sort(axis=-1)
    return torch.from_numpy(found).flip(-1)


def _argmax(logits: Tensor) -> list[int]:
    """The first of the largest of each row; numpy for the same reason as above."""
    return (logits.numpy() if logits.is_cpu else logits).argmax(-1).tolist()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


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
