"""What a request may cost before it comes to the deployment: every list is short, and checked once."""

import msgspec
import pytest

from disagg.request import SamplingParams
from disagg.server.asked import MOST_STOP_TOKENS, CompletionRequest, decode
from disagg.server.generating import for_choice
from disagg.server.problems import Problem


def test_stop_tokens_are_few():
    """As many as allowed are taken; one more is a 400 that names the field."""
    most = decode(CompletionRequest, b'{"prompt": [1], "stop_token_ids": %s}' % str([7] * MOST_STOP_TOKENS).encode())
    assert len(most.sampling(1, None).stop_token_ids) == MOST_STOP_TOKENS
    most.stop_token_ids += [7]
    with pytest.raises(Problem, match="257") as caught:
        most.sampling(1, None)
    assert (caught.value.status, caught.value.param) == (400, "stop_token_ids")


def test_parameters_are_checked_once_however_many_choices():
    """Choices differ in their seeds and share everything else, which nobody looks at again."""
    params = SamplingParams(seed=(1 << 63) - 1)
    msgspec.structs.force_setattr(params, "temperature", -1.0)  # what a check would refuse
    choices = [for_choice(params, place) for place in range(3)]
    assert [(choice.seed, choice.temperature) for choice in choices] == [((1 << 63) - 1, -1.0), (0, -1.0), (1, -1.0)]
