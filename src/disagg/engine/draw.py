"""Drawing tokens where the logits are: one row, one number in [0, 1), one token; nothing waits for the host.

`draw` is the definition, in plain torch, on any device. `sampler_cuda` computes the same in three kernels. Both walk
the distribution in vocabulary order, as `sampler` does, so that a request's number means the same token everywhere, up
to the rounding of the sums.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Choice(NamedTuple):
    """How the token of each of S rows is chosen."""

    temperature: Tensor  # float32 [S]; 0: the likeliest token, the first of equals
    number: Tensor  # float64 [S], in [0, 1)
    top_k: Tensor  # int32 [S]; 0: all
    top_p: Tensor  # float64 [S]
    min_p: Tensor  # float32 [S]
    filtered: bool  # whether any row asks for top-k, top-p or min-p


def uniforms(seeds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """`sampler.uniform` of each pair: seeds uint64 [S], indices int64 [S] (which output token), float64 [S]."""
    bits = _mix(_mix(seeds) + indices.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64; unsigned arithmetic wraps around as it should."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))


def draw(logits: Tensor, choice: Choice, tokens: Tensor) -> None:
    """Write one token for each row of `logits` float32 [S, V] into `tokens` int64 [S].

    Order: temperature, top-k, top-p (of what top-k left), min-p. Tokens as likely as the last one left are left too.
    """
    greedy = choice.temperature == 0
    temperature = torch.where(greedy, 1.0, choice.temperature)[:, None]
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    if choice.filtered:
        weights = weights.masked_fill(weights < _threshold(weights, choice), 0.0)
    running = weights.cumsum(dim=-1, dtype=torch.float64)
    place = (running <= choice.number[:, None] * running[:, -1:]).sum(dim=-1)
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(dim=-1)  # rounding may reach behind it
    tokens.copy_(torch.where(greedy, logits.argmax(dim=-1), torch.minimum(place, last)))


def _threshold(weights: Tensor, choice: Choice) -> Tensor:
    """The smallest weight that is left, float32 [S, 1]."""
    vocabulary = weights.shape[1]
    ranked = weights.sort(dim=-1, descending=True).values
    running = ranked.cumsum(dim=-1, dtype=torch.float64)
    top_k = torch.where(choice.top_k == 0, vocabulary, choice.top_k.clamp(max=vocabulary)).long()[:, None]
    share = choice.top_p[:, None] * running.gather(1, top_k - 1)
    num_before = (running < share).sum(dim=-1, keepdim=True)  # tokens that do not reach the share together
    return torch.maximum(ranked.gather(1, torch.minimum(num_before, top_k - 1)), choice.min_p[:, None] * ranked[:, :1])
