"""The canary: what it compares, what it says, and that it keeps a deployment with wrong answers from serving."""

from types import SimpleNamespace

import pytest

from disagg.cluster import canary
from disagg.cluster.ledger import Update
from disagg.engine.batch import TokenLogprobs
from disagg.errors import DisaggError
from disagg.record import Record


class FakeCluster:
    """Workers that answer at once; `spoil(prefill, decode)` says which route gives other tokens."""

    def __init__(self, roles, spoil=lambda prefill, decode: False, error="", kind="cpu", second=-9.0):
        self.roles, self.spoil, self.error, self.second = roles, spoil, error, second
        self.deployment = SimpleNamespace(budget=SimpleNamespace(kind=kind))
        self.info = SimpleNamespace(spec=SimpleNamespace(vocab_size=1000))
        self.engine = SimpleNamespace(max_len=256, page_size=16)
        self.num_pages = 10
        self.asked, self.waiting = [], []

    def workers(self):
        return [SimpleNamespace(name=name, role=role) for name, role in self.roles.items()]

    def submit(self, prompt, params, *, route):
        self.asked.append(tuple(route))
        tokens = [prompt[0]] * params.max_tokens
        if self.spoil(*route):
            tokens[5] = -1
        one = Record(request_id=str(len(self.asked)), index=0, prompt_len=len(prompt), tokens=tokens, error=self.error)
        logprobs = [None if params.logprobs is None else TokenLogprobs(-1.0, [(prompt[0], -1.0), (-1, self.second)])]
        self.waiting.append(Update(one.request_id, tokens, logprobs * len(tokens), one))
        return one.request_id

    def poll(self, timeout_s):
        updates, self.waiting = self.waiting, []
        return updates


def test_every_pair_is_compared_with_its_prefill_worker_alone():
    """Colocated runs come first, so that a prefix cache holds what a worker computed itself."""
    cluster = FakeCluster({"P0": "prefill", "P1": "prefill", "D0": "decode"})
    sung = canary.run(cluster)
    assert cluster.asked == [("P0", "P0"), ("P1", "P1"), ("P0", "D0"), ("P1", "D0")]
    assert [(one.prefill, one.decode, one.agrees) for one in sung] == [("P0", "D0", True), ("P1", "D0", True)]
    canary.require(cluster)


def test_a_pair_with_other_tokens_keeps_all_from_serving():
    """The sentence names the pair and where the tokens part."""
    cluster = FakeCluster({"P0": "prefill", "D0": "decode", "D1": "decode"}, lambda _, decode: decode == "D1")
    with pytest.raises(DisaggError, match=r"from P0 to D1 .* token 5"):
        canary.require(cluster)


def test_a_canary_that_fails_says_why():
    """An error of the request is the complaint."""
    with pytest.raises(DisaggError, match="P0 and D0: no room"):
        canary.require(FakeCluster({"P0": "prefill", "D0": "decode"}, error="no room"))


def test_a_canary_can_be_given_up():
    """Whatever is raised at a turn of waiting ends it, also while no worker answers."""
    cluster = FakeCluster({"P0": "prefill", "D0": "decode"})
    cluster.poll = lambda timeout_s: []
    turns = iter(range(3))

    def waiting():
        if next(turns, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        canary.require(cluster, waiting)


def test_workers_that_hand_nothing_over_are_compared_with_one_another():
    """2C: each alone, and the same tokens from both."""
    cluster = FakeCluster({"C0": "both", "C1": "both"}, lambda prefill, _: prefill == "C1")
    assert [one.agrees for one in canary.run(cluster)] == [True, False]


@pytest.mark.parametrize(("kind", "second", "agrees"), [
    ("cuda", -1.1, True), ("cuda", -2.0, False), ("cuda", -9.0, False), ("cpu", -1.1, False),
])  # fmt: skip
def test_only_a_near_tie_is_forgiven_and_only_on_gpus(kind, second, agrees):
    """Rounding turns a near tie around; anything further apart is wrong pages, and on cores every difference is."""
    roles = {"P0": "prefill", "D0": "decode"}
    (sung,) = canary.run(FakeCluster(roles, lambda _, decode: decode == "D0", kind=kind, second=second))
    assert sung.agrees is agrees
