"""The sampler: penalties by eye, distributions by chi-square, randomness by (seed, index) alone."""

import math

import pytest
import torch
from scipy.stats import chi2

from disagg.engine.sampler import sample, uniform
from disagg.request import Request, SamplingParams


def request(output=(), prompt=(0,), id="r", stop_ids=(), **params):
    params.setdefault("max_tokens", 1000)
    tokens = [*prompt, *output]
    return Request(
        id, len(prompt), tokens, SamplingParams(**params), frozenset(stop_ids), 0.0, num_computed=len(tokens)
    )


def draws(logits, count, **params):
    """Tokens `count` requests with consecutive seeds draw from one row of logits."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    return sample(rows, [request(seed=seed, **params) for seed in range(count)]).tokens


def assert_distribution(tokens, expected):
    """Chi-square at 99.9 %; the seeds are fixed, so this never flickers. Tokens of probability 0 must not occur."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    statistic = sum(
        (count - p * len(tokens)) ** 2 / (p * len(tokens)) for count, p in zip(counts, expected, strict=True) if p
    )
    assert statistic < chi2.ppf(0.999, sum(p > 0 for p in expected) - 1)


PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = [math.log(p) for p in PROBABILITIES]


def test_greedy_takes_the_likeliest():
    """temperature 0 is argmax; the first of equals."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]])
    assert sample(logits, [request(temperature=0)] * 2).tokens == [1, 0]
    assert sample(torch.zeros(0, 3), []).tokens == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),  # of the two left the first has 4/7, which is enough
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),  # at least 0.3 x 0.4
        ({"temperature": 2.0}, [p**0.5 / sum(q**0.5 for q in PROBABILITIES) for p in PROBABILITIES]),
        ({"temperature": 1e-5}, [1, 0, 0, 0, 0]),
    ],
)
def test_distribution(params, expected):
    """Over 2,000 seeds the tokens follow the distribution the parameters describe."""
    tokens = draws(LOGITS, 2000, **params)
    if expected[0] == 1:
        assert set(tokens) == {0}
    else:
        assert_distribution(tokens, expected)


@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"top_k": 2000}, {"min_p": 0.5}, {"top_p": 0.05}, {}])
def test_nearly_flat_vocabulary(params):
    """Where more tokens are left than are sorted at first, exactly those are left that a full sort leaves."""
    vocabulary = 5000
    weights = [math.exp(-number / 5000) for number in range(vocabulary)]
    reached = [sum(weights[:number]) < params.get("top_p", 1.1) * sum(weights) for number in range(vocabulary)]
    num_left = min(sum(reached), params.get("top_k", vocabulary), sum(w >= params.get("min_p", 0) for w in weights))
    tokens = draws([math.log(weight) for weight in weights], 3000, **params)

    assert 0.98 * num_left < max(tokens) < num_left
    tenths = [int(token * 10 / num_left) for token in tokens]
    mass = [
        sum(w for number, w in enumerate(weights[:num_left]) if int(number * 10 / num_left) == t) for t in range(10)
    ]
    assert_distribution(tenths, [m / sum(mass) for m in mass])


def test_uniform_numbers_are_uniform_and_independent():
    """Numbers of one seed over indices, and of neighbouring seeds at one index, fill [0, 1) evenly."""
    for numbers in ([uniform(5, index) for index in range(4000)], [uniform(seed, 3) for seed in range(4000)]):
        assert all(0 <= number < 1 for number in numbers)
        assert_distribution([int(number * 16) for number in numbers], [1 / 16] * 16)
    assert uniform(1, 2) != uniform(2, 1)


def test_a_token_depends_on_seed_and_index_only():
    """Alone, in a batch of strangers, in another order, under another id: the same tokens."""
    torch.manual_seed(0)
    logits = torch.randn(6, 500)
    requests = [
        request(seed=11, output=[1, 2]),
        request(temperature=0),
        request(seed=11, top_p=0.9, output=[1, 2]),
        request(seed=12, top_k=40),
        request(seed=13, min_p=0.02, logprobs=3),
        request(seed=14, repetition_penalty=1.3, output=[4]),
    ]
    together = sample(logits, requests).tokens
    alone = [sample(logits[row : row + 1], [requests[row]]).tokens[0] for row in range(6)]
    order = [3, 0, 5, 1, 4, 2]
    shuffled = sample(logits[order], [requests[row] for row in order]).tokens

    assert together == alone
    assert shuffled == [together[row] for row in order]
    assert sample(logits[:1], [request(seed=11, output=[1, 2], id="other")]).tokens == together[:1]


def test_requests_without_a_seed_differ():
    """Should the front end have drawn no seed, the request's id stands in, equal on every worker."""
    rows = torch.zeros(50, 1000)
    requests = [request(id=str(number)) for number in range(50)]
    tokens = sample(rows, requests).tokens
    assert len(set(tokens)) > 40
    assert tokens == sample(rows, requests).tokens


def adjusted(logits, **kwargs):
    """One row of logits after penalties."""
    from disagg.engine.sampler import adjust

    return adjust(torch.tensor([logits]), [request(temperature=0, **kwargs)])[0].tolist()


def test_penalties_by_eye():
    """Repetition divides positive and multiplies negative logits of prompt and output, once each; presence and
    frequency subtract for output only, frequency times the count."""
    logits = [2.0, -2.0, 4.0, 1.0]

    assert adjusted(logits, prompt=[0], output=[1, 1], repetition_penalty=2.0) == [1.0, -4.0, 4.0, 1.0]
    assert adjusted(logits, prompt=[0], output=[1, 1], presence_penalty=0.5) == [2.0, -2.5, 4.0, 1.0]
    assert adjusted(logits, prompt=[0], output=[1, 1], frequency_penalty=0.5) == [2.0, -3.0, 4.0, 1.0]
    both = adjusted(logits, prompt=[0], output=[2, 2], repetition_penalty=2.0, presence_penalty=1.0)
    assert both == [1.0, -2.0, 1.0, 1.0]


def test_min_tokens_forbids_stops():
    """Before min_tokens no stop id is drawn, neither greedily nor at random; afterwards it may be."""
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    for temperature in (0.0, 1.0):
        early = request(temperature=temperature, seed=0, stop_ids=[0], min_tokens=2, output=[5])
        ripe = request(temperature=temperature, seed=0, stop_ids=[0], min_tokens=2, output=[5, 5])
        assert sample(logits, [early]).tokens != [0]
        assert sample(logits, [ripe]).tokens == [0]


def test_logprobs_are_the_models_own():
    """Log-probabilities are taken before temperature, penalties and filters; likeliest first."""
    asking = request(temperature=0.5, seed=3, top_k=1, output=[0], presence_penalty=2.0, logprobs=2)
    requests = [asking, request(seed=0)]
    out = sample(torch.tensor([LOGITS, LOGITS]), requests)

    assert out.tokens[0] == 1  # token 0 was penalised away
    assert out.logprobs[0].chosen == pytest.approx(LOGITS[1], abs=1e-5)
    assert [token for token, _ in out.logprobs[0].top] == [0, 1]
    assert out.logprobs[0].top[0][1] == pytest.approx(LOGITS[0], abs=1e-5)
    assert out.logprobs[1] is None
    none_asked = sample(torch.tensor([LOGITS]), [request(temperature=0, logprobs=0)])
    assert none_asked.logprobs[0].top == []


def test_logits_are_left_alone():
    """The caller's tensor does not change."""
    logits = torch.tensor([LOGITS])
    before = logits.clone()
    sample(logits, [request(seed=1, output=[0], repetition_penalty=2.0, min_tokens=5, stop_ids=[1])])
    assert torch.equal(before, logits)
