"""The front end's ledger: order, attempts, and what becomes of a request whose workers die."""

import pytest

from disagg.cluster import messages as m
from disagg.cluster.ledger import Ledger, Live
from disagg.cluster.router import Route
from disagg.record import Facts, Record
from disagg.request import FinishReason, SamplingParams


def opened(route=("P.0", "D.0"), **params):
    """A ledger with one request, "r", sent on `route`."""
    ledger = Ledger()
    params = SamplingParams(temperature=0, **{"max_tokens": 4, **params})
    live = Live(Record(request_id="r", index=0, prompt_len=2), [1, 2], params, [99], 0.0, route=Route(*route))
    ledger.open(live)
    return ledger, live


def token(index, value, attempt=0, facts=None):
    return m.NewToken("r", attempt, index, value, None, facts and Facts(facts))


def ended(num_output, worker, attempt=0, reason="length", **options):
    return m.Ended("r", attempt, reason, num_output, Facts(worker), **options)


def told(ledger, worker, tokens=(), endings=(), now=1.0):
    return ledger.take(m.Progress(worker, list(tokens), list(endings)), now)


def given(news):
    return [token for update in news.updates for token in update.tokens]


def test_tokens_reach_the_client_in_order():
    """A token that overtakes an earlier one waits for it."""
    ledger, _ = opened()
    assert given(told(ledger, "D.0", [token(1, 11)])) == []
    news = told(ledger, "P.0", [token(0, 10, facts="P.0")])
    assert (given(news), news.prefilled) == ([10, 11], ["r"])


def test_a_request_is_over_when_all_has_come():
    """The end may be known before the last token or before the prefill worker's facts: the Record waits for both."""
    ledger, live = opened(max_tokens=2)
    assert told(ledger, "D.0", [token(1, 11)], [ended(2, "D.0")]).updates == []
    (update,) = told(ledger, "P.0", [token(0, 10, facts="P.0")]).updates
    assert update.record is live.record
    assert (live.record.tokens, live.record.finish_reason) == ([10, 11], "length")
    assert ledger.counts["done"] == 1
    assert len(ledger) == 0


def test_the_next_attempt_begins_with_what_the_client_has():
    """Prompt and known tokens are sent again, indices go on, and nothing of the old attempt is taken any more."""
    ledger, live = opened()
    told(ledger, "P.0", [token(0, 10, facts="P.0")])
    told(ledger, "D.0", [token(2, 12)])
    live.next_attempt()
    live.route = Route("P.1", "P.1")
    submit = live.submit()
    assert (submit.tokens, submit.prompt_len, submit.attempt, submit.decode_on) == ([1, 2, 10], 2, 1, None)

    late = told(ledger, "D.0", [token(1, 11)], [ended(4, "D.0")])
    assert late.updates == []
    news = told(ledger, "P.1", [token(1, 11, 1)])
    assert (given(news), news.prefilled) == ([11], ["r"])
    (update,) = told(ledger, "P.1", [token(2, 12, 1), token(3, 13, 1)], [ended(4, "P.1", 1)]).updates
    assert update.record.tokens == [10, 11, 12, 13]


def test_who_is_needed_depends_on_who_writes():
    """Until a second token has come both workers are needed; afterwards only the one that sent it."""
    ledger, live = opened()
    assert ledger.that_need("P.0") == ledger.that_need("D.0") == ["r"]
    told(ledger, "P.0", [token(0, 10, facts="P.0")])
    assert live.needs("P.0")
    told(ledger, "D.0", [token(1, 11)])
    assert not live.needs("P.0")
    assert live.needs("D.0")


def test_a_token_that_overtook_the_first_does_not_make_its_sender_enough():
    """While the first token is missing its worker is needed, whatever came of the others."""
    _, live = opened()
    ledger = Ledger()
    ledger.open(live)
    told(ledger, "D.0", [token(1, 11)])
    assert live.needs("P.0")


def test_a_failure_that_can_be_retried_is_not_the_end():
    """It asks for another attempt, unless the other worker writes already and needs no help."""
    ledger, live = opened()
    news = told(ledger, "P.0", [], [ended(0, "P.0", reason="error", error="lease", retryable=True)])
    assert (news.updates, news.retry) == ([], [("r", "lease")])

    told(ledger, "P.0", [token(0, 10, facts="P.0")])
    told(ledger, "D.0", [token(1, 11)])
    assert told(ledger, "P.0", [], [ended(1, "P.0", reason="error", retryable=True)]).retry == []
    assert live.ended is None


def test_a_failure_that_cannot_be_retried_ends_it_at_once():
    """One Record with the error, whatever else is missing."""
    ledger, _ = opened()
    (update,) = told(ledger, "P.0", [], [ended(0, "P.0", reason="error", error="too long")]).updates
    assert (update.record.finish_reason, update.record.error) == ("error", "too long")
    assert ledger.counts["failed"] == 1


@pytest.mark.parametrize(
    ("tokens", "params", "reason"),
    [
        ([10, 11, 12, 13], {}, FinishReason.LENGTH),
        ([10, 99], {}, FinishReason.STOP),
        ([10, 99], {"min_tokens": 3}, None),
        ([10, 11], {}, None),
        ([], {}, None),
    ],
)
def test_a_request_whose_last_token_came_is_not_computed_again(tokens, params, reason):
    """A worker may die between its last token and saying that it was the last."""
    _, live = opened(**params)
    live.record.tokens += tokens
    assert live.reason_to_end(max_len=100) is reason


def test_the_context_may_be_what_ends_it():
    """No token beyond the context is computed after a retry."""
    _, live = opened()
    live.record.tokens += [10, 11]
    assert live.reason_to_end(max_len=4) is FinishReason.LENGTH


def test_every_request_is_counted_once():
    """started == done + failed + aborted + live, and closing twice counts once."""
    ledger, _ = opened()
    assert ledger.close("r", FinishReason.ABORT) is not None
    assert ledger.close("r", FinishReason.ABORT) is None
    assert {name: ledger.counts[name] for name in ("started", "done", "failed", "aborted")} == {
        "started": 1, "done": 0, "failed": 0, "aborted": 1,
    }  # fmt: skip


def test_the_record_says_who_wrote_and_how_often_it_was_sent():
    """A hand-off that failed is billed to the worker that went on with it, and every attempt is counted."""
    ledger, live = opened(max_tokens=2)
    told(ledger, "P.0", [token(0, 10, facts="P.0")])
    (update,) = told(ledger, "P.0", [token(1, 11)], [ended(2, "P.0")]).updates
    assert (update.record.decode_worker, update.record.num_attempts) == ("P.0", 1)

    ledger, live = opened()
    live.next_attempt()
    assert live.record.num_attempts == 2


def test_a_deadline_is_said_once_and_counted_by_itself():
    """Overdue requests are named once, those that ended in time never; the counters still add up."""
    ledger = Ledger()
    for name, deadline in (("a", 5.0), ("b", 3.0), ("c", 4.0)):
        record = Record(request_id=name, index=0, prompt_len=1)
        ledger.open(Live(record, [1], SamplingParams(), [], 0.0, deadline=deadline))
    ledger.close("c", FinishReason.STOP)
    assert ledger.overdue(2.9) == []
    assert ledger.overdue(6.0) == ["b", "a"]
    assert ledger.overdue(9.0) == []
    ledger.close("b", FinishReason.ERROR, "late", expired=True)
    counts = ledger.counts
    assert (counts["expired"], counts["done"], counts["failed"]) == (1, 1, 0)
    assert counts["started"] == sum(counts[k] for k in ("done", "failed", "expired", "aborted")) + len(ledger)


def test_every_end_is_told_once():
    """Whoever asked for it is told the complete Record of each request, once, however it ended."""
    seen = []
    ledger = Ledger(seen.append)
    for name in "ab":
        ledger.open(Live(Record(request_id=name, index=0, prompt_len=1), [1], SamplingParams(), [], 0.0))
    ledger.close("a", FinishReason.ABORT)
    ledger.close("a", FinishReason.ABORT)
    assert [(record.request_id, record.finish_reason) for record in seen] == [("a", "abort")]


def test_every_counter_is_there_from_the_start():
    """Who reads the counters need not know which of them has happened yet."""
    assert Ledger().counts == dict.fromkeys(
        ("started", "done", "failed", "expired", "aborted", "retried", "refused"), 0
    )
