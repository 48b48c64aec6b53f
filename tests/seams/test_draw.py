"""Drawing on the device against its definition, and the definition against the sampler of the CPU.

The Triton kernels run on a GPU, or on a CPU under TRITON_INTERPRET=1; otherwise that part skips itself.
"""

import importlib.util
import os

import numpy as np
import pytest
import torch

from disagg.engine.draw import Choice, draw, uniforms
from disagg.engine.sampler import sample, uniform
from disagg.request import Request, SamplingParams

HAS_GPU = torch.cuda.is_available()
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="needs a GPU, or Triton's interpreter")
DEVICE = "cuda" if HAS_GPU else "cpu"
# Triton's interpreter turns one-element arrays into numbers in a way that numpy is about to forbid
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def choice(rows: list[SamplingParams], numbers: torch.Tensor, device: str = "cpu") -> Choice:
    return Choice(
        temperature=torch.tensor([p.temperature for p in rows], dtype=torch.float32, device=device),
        number=numbers.to(device),
        top_k=torch.tensor([p.top_k for p in rows], dtype=torch.int32, device=device),
        top_p=torch.tensor([p.top_p for p in rows], dtype=torch.float64, device=device),
        min_p=torch.tensor([p.min_p for p in rows], dtype=torch.float32, device=device),
        filtered=any(p.top_k or p.top_p < 1 or p.min_p for p in rows),
    )


def anything(count: int, filtered: bool) -> list[SamplingParams]:
    """Parameters drawn anew in each run; about a third greedy, each filter in about half of the others."""
    draws = np.random.default_rng()
    rows = []
    for _ in range(count):
        params: dict = {"temperature": float(draws.choice([0, 0.1, 0.7, 1, 2]))}
        if filtered:
            params["top_k"] = int(draws.choice([0, 0, 1, 5, 40, 10**6]))
            params["top_p"] = float(draws.choice([1, 1, 0.01, 0.5, 0.95]))
            params["min_p"] = float(draws.choice([0, 0, 0.05, 0.3, 1]))
        rows.append(SamplingParams(**params))
    return rows


def test_numbers_are_those_of_the_sampler():
    """The vectorised hash is the same function of seed and output token."""
    pairs = [(0, 0), (1, 0), (2**63 - 1, 5), (12345, 2**31), (7, 99)]
    seeds, indices = zip(*pairs, strict=True)
    found = uniforms(np.array(seeds, np.uint64), np.array(indices, np.int64))
    assert found.tolist() == [uniform(seed, index) for seed, index in pairs]


@pytest.mark.parametrize("filtered", [False, True])
def test_definition_draws_what_the_sampler_draws(filtered):
    """The same logits, parameters and number give the same token."""
    rows = anything(40, filtered)
    logits = torch.randn(40, 1500) * 3
    requests = [Request(str(n), 1, [0], p, frozenset(), 0.0, num_computed=1) for n, p in enumerate(rows)]
    numbers = torch.tensor([uniform(n, 0) for n in range(40)], dtype=torch.float64)
    for request, seed in zip(requests, range(40), strict=True):
        request.params = SamplingParams(
            temperature=request.params.temperature, top_k=request.params.top_k, top_p=request.params.top_p,
            min_p=request.params.min_p, seed=seed,
        )  # fmt: skip
    tokens = torch.full((40,), -1)
    draw(logits, choice(rows, numbers), tokens)
    assert tokens.tolist() == sample(logits, requests).tokens


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocabulary", [700, 2500, 151_936])
def test_kernels_draw_what_the_definition_draws(vocabulary, ties, filtered):
    """Fresh logits in each run, equal ones among them; a token may differ only where its number lies on an edge."""
    count = 64 if HAS_GPU else 6 if vocabulary < 10_000 else 1
    logits = torch.randn(count, vocabulary) * 3
    logits = (logits * 2).round() / 2 if ties else logits
    logits[0, : vocabulary // 2] = float("-inf")
    rows = anything(count, filtered)
    numbers = torch.rand(count, dtype=torch.float64)
    expected, found = torch.full((count,), -1), torch.full((count,), -2, device=DEVICE)
    draw(logits, choice(rows, numbers), expected)
    from disagg.engine.sampler_cuda import draw as fast

    fast(logits.to(DEVICE), choice(rows, numbers, DEVICE), found)
    wrong = (found.cpu() != expected).nonzero()[:, 0].tolist()
    assert len(wrong) <= count // 32, [(rows[n], int(found[n]), int(expected[n])) for n in wrong]


@pytest.mark.gpu
@needs_triton
def test_numbers_at_the_ends_draw_tokens_with_weight():
    """0 and the largest number below 1 draw the first and the last token that is left, never one without weight."""
    logits = torch.full((2, 3000), float("-inf"))
    logits[:, [1100, 2100]] = 0.0
    rows = [SamplingParams(), SamplingParams()]
    numbers = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    found = torch.full((2,), -1, device=DEVICE)
    from disagg.engine.sampler_cuda import draw as fast

    fast(logits.to(DEVICE), choice(rows, numbers, DEVICE), found)
    assert found.tolist() == [1100, 2100]
    tokens = torch.full((2,), -1)
    draw(logits, choice(rows, numbers), tokens)
    assert tokens.tolist() == [1100, 2100]
