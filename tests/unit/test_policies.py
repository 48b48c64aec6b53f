"""The routing policies, the map of cached prompts and the running averages: rules that hold for any workers."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.cache.prefix import page_hashes
from disagg.cluster.policies import (
    POLICIES,
    ROUTINGS,
    colocated,
    conditional,
    disaggregated,
    least_outstanding,
    named,
    prefix_aware,
    round_robin,
)
from disagg.cluster.prefix_map import PrefixMap
from disagg.cluster.router import Ask, Router, WorkerView
from disagg.cluster.speeds import Speeds
from disagg.errors import InputError
from disagg.record import Record, Span

PAGE = 4
ROLES = {"P": "prefill", "D": "decode", "C": "both"}
rates = st.none() | st.floats(1.0, 1e6)


@st.composite
def views(draw, letters="PDC"):
    """One to six workers in any state."""
    text = draw(st.text(letters, min_size=1, max_size=6))
    counts = st.integers(0, 10_000)
    return [
        WorkerView(f"{letter}{i}", ROLES[letter], draw(counts), draw(counts), draw(st.integers(0, 64)), draw(rates))
        for i, letter in enumerate(text)
    ]


@st.composite
def asks(draw, workers):
    prompt_len = draw(st.integers(1, 5000))
    cached = {view.name: draw(st.integers(0, prompt_len - 1)) for view in workers if draw(st.booleans())}
    return Ask(draw(st.integers(0, 1000)), prompt_len, draw(st.integers(1, 1000)), cached, draw(rates))


@st.composite
def questions(draw, letters="PDC"):
    workers = draw(views(letters))
    return draw(asks(workers)), workers


def known(text, **rate):
    """Workers of which the speeds are known: 1,000 tokens/s."""
    return [WorkerView(f"{letter}{i}", ROLES[letter], prefill_rate=1000.0) for i, letter in enumerate(text)]


def ask(prompt_len=100, cached=None, handoff_rate=1000.0, serial=0):
    return Ask(serial, prompt_len, 10, cached or {}, handoff_rate)


@pytest.mark.parametrize("policy", [*POLICIES.values(), *ROUTINGS.values()])
@given(question=questions())
def test_every_policy_is_a_function_that_picks_workers_it_was_shown(policy, question):
    """Any workers, any books: a route over these workers, the same each time, and nothing shown is changed."""
    asked, workers = question
    before = [str(view) for view in workers]
    decision = policy(asked, workers)
    assert decision or (policy is disaggregated and len(workers) == 1)
    assert not decision or {*decision.route} <= {view.name for view in workers}
    assert policy(asked, workers) == decision
    assert [str(view) for view in workers] == before


@pytest.mark.parametrize("policy", [round_robin, least_outstanding, prefix_aware])
@given(question=questions())
def test_roles_are_kept_while_they_can_be(policy, question):
    """Who decodes only prefills nothing, and the other way round, while both phases have a worker of their own."""
    asked, workers = question
    route = policy(asked, workers).route
    role = {view.name: view.role for view in workers}
    has = {view.role for view in workers}
    if has & {"prefill", "both"}:
        assert role[route.prefill] != "decode"
    if has & {"decode", "both"}:
        assert role[route.decode] != "prefill"
    assert route.prefill == route.decode or (role[route.prefill] == "prefill" and role[route.decode] != "prefill")


@given(questions())
def test_prefix_aware_never_picks_more_work_than_it_need(question):
    """The prefill worker picked has the fewest tokens to do before this prompt is done."""
    asked, workers = question
    picked = prefix_aware(asked, workers).route.prefill
    able = [view for view in workers if view.role != "decode"] or workers
    done = {view.name: view.prefill_tokens + view.decode_tokens + asked.uncached(view.name) for view in able}
    assert done[picked] == min(done.values())


def test_a_prompt_goes_where_its_prefix_is_until_that_worker_has_too_much_to_do():
    """800 cached tokens outweigh 700 tokens of work, and not 900."""
    workers = known("CC")
    for work, expected in ((700, "C1"), (900, "C0")):
        workers[1].prefill_tokens = work
        assert prefix_aware(ask(1000, {"C1": 800}), workers).route.prefill == expected


@given(questions())
def test_conditional_takes_the_shortest_of_what_it_weighed(question):
    """It weighs by time only when both speeds are known, and then the chosen route is the one expected to be over
    first; the record gets both estimates, the chosen one first. Otherwise it is prefix-aware."""
    asked, workers = question
    decision = conditional(asked, workers)
    if not decision.estimates:
        assert decision == prefix_aware(asked, workers)
        return
    first, second = decision.estimates
    assert decision.route == (first.prefill_worker, first.decode_worker)
    assert first.total_s <= second.total_s
    assert (first.handoff_s == 0) == (first.prefill_worker == first.decode_worker)
    assert (first.prefill_worker == first.decode_worker) != (second.prefill_worker == second.decode_worker)


def test_conditional_keeps_a_prompt_where_moving_it_costs_more():
    """By hand: 100 tokens at 1,000/s take 0.1 s on either side, and the hand-off comes on top."""
    kept, moved = conditional(ask(), known("PD")).estimates
    assert (kept.prefill_worker, kept.total_s) == ("D1", pytest.approx(0.1))
    assert (moved.prefill_worker, moved.handoff_s, moved.total_s) == ("P0", 0.1, pytest.approx(0.2))


def test_conditional_spares_those_who_decode():
    """Two requests that decode would lose 0.2 s: more than the hand-off's 0.1 s. Not so if 90 % is cached there."""
    workers = known("PD")
    workers[1].num_decoding = 2
    assert conditional(ask(), workers).route == ("P0", "D1")
    assert conditional(ask(cached={"D1": 90}), workers).route == ("D1", "D1")


def test_conditional_leaves_a_long_queue():
    """A prompt that would wait behind others at the prefill worker is kept, although a hand-off is cheap."""
    workers = known("PD")
    workers[1].num_decoding = 2
    workers[0].prefill_tokens = 500
    assert conditional(ask(handoff_rate=1e6), workers).route == ("D1", "D1")


def test_conditional_hands_over_until_it_knows_better():
    """Without a measured speed there is nothing to weigh: roles decide, and no estimate is claimed."""
    assert conditional(ask(handoff_rate=None), known("PD")) == least_outstanding(ask(), known("PD"))
    slow = [WorkerView("P0", "prefill"), WorkerView("D1", "decode")]
    assert conditional(ask(), slow).estimates == ()


@given(questions())
def test_a_request_that_asks_to_be_colocated_or_apart_is(question):
    """One worker does both phases, or two do one each, whatever their roles; a single one has no such route."""
    asked, workers = question
    assert len({*colocated(asked, workers).route}) == 1
    if len(workers) == 1:
        assert disaggregated(asked, workers) is None
    else:
        assert len({*disaggregated(asked, workers).route}) == 2


def test_a_request_that_is_to_be_handed_over_is_never_colocated_by_the_router():
    """A worker that is silent is the second rather than none; where there is none the request is not placed."""
    router = Router(least_outstanding, known("PD"))
    router.set_silent("D1", True)
    assert router.route("r0", 10, 10).route == ("P0", "P0")
    assert router.route("r1", 10, 10, policy=disaggregated).route == ("P0", "D1")
    router.remove("D1")
    assert router.route("r2", 10, 10, policy=disaggregated) is None
    router.add(WorkerView("D1.1", "decode"))
    assert router.route("r2", 10, 10, policy=disaggregated).route == ("P0", "D1.1")


def test_an_unknown_policy_names_the_nearest():
    """A misspelt policy is an error that says which one is meant."""
    assert named("conditional") is conditional
    with pytest.raises(InputError, match="conditional"):
        named("conditonal")


def test_all_policies_spread_work_over_equal_workers():
    """Of four equal colocated workers each gets its share."""
    for policy in POLICIES.values():
        router = Router(policy, known("CCCC"))
        picked = [router.route(f"r{i}", 10, 10).route.prefill for i in range(8)]
        assert sorted(picked) == sorted(["C0", "C1", "C2", "C3"] * 2)


# What policies decide by

prompts = st.lists(st.integers(0, 2), max_size=40)


@given(st.lists(prompts, max_size=8), prompts.filter(bool))
def test_the_map_finds_the_longest_prefix_it_was_told(told, prompt):
    """With room for all: as many whole pages as some earlier prompt shares with this one, never its last token."""
    prefixes = PrefixMap(PAGE, 10_000)
    for each in told:
        prefixes.note("W", page_hashes(each, PAGE))
    found = prefixes.cached(["W", "other"], page_hashes(prompt, PAGE), len(prompt))

    def shared(other):
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))))
        return min(same, len(prompt) - 1) // PAGE * PAGE

    longest = max(map(shared, told), default=0)
    assert found == ({"W": longest} if longest else {})


@given(st.lists(prompts, min_size=1, max_size=20), st.integers(1, 6))
def test_the_map_is_bounded_and_keeps_what_was_used_last(told, capacity):
    """Never more than `capacity` pages a worker; of the last prompt its first pages are those that stay."""
    prefixes = PrefixMap(PAGE, capacity)
    for each in told:
        prefixes.note("W", page_hashes(each, PAGE))
    last = [*told[-1], 9]
    found = prefixes.cached(["W"], page_hashes(last, PAGE), len(last)).get("W", 0)
    assert found == min(capacity, len(told[-1]) // PAGE) * PAGE
    prefixes.forget("W")
    assert prefixes.cached(["W"], page_hashes(last, PAGE), len(last)) == {}


def record(worker="P.0", num_tokens=100, busy_s=0.1, handoff_s=None, **options):
    """A request of `num_tokens` whose second token waited `handoff_s` for its pages."""
    done = Record(request_id="r", index=0, prompt_len=num_tokens, finish_reason="length", **options)
    done.sent_at = done.queued_at = done.prefill_start_at = 0.0
    done.prefill_end_at, done.token_at, done.prefill_busy_s = busy_s, [busy_s, busy_s + (handoff_s or 0) + 1], busy_s
    done.spans = [Span("prefill", worker, 0.0, busy_s, num_tokens)]
    if handoff_s is not None:
        done.handoff_start_at = busy_s
        done.handoff_end_at = done.decode_start_at = busy_s + handoff_s
    return done


@given(st.floats(10, 1e5), st.lists(st.integers(1, 1000), min_size=1, max_size=100))
def test_speeds_of_steady_records_are_those_of_the_records(rate, lengths):
    """Whatever their sizes: tokens of prompts over step time, by worker, and over the delay of hand-offs."""
    speeds = Speeds()
    for length in lengths:
        speeds.observe(record(num_tokens=length, busy_s=length / rate, handoff_s=length / rate / 4))
    assert speeds.prefill_rate("P.0") == pytest.approx(rate)
    assert speeds.prefill_rate("another") == pytest.approx(rate)
    assert speeds.handoff_rate() == pytest.approx(4 * rate, rel=1e-3)


def test_speeds_follow_a_change():
    """After a hundred requests at another speed the old one is forgotten."""
    speeds = Speeds()
    for busy_s in [0.1] * 100 + [0.2] * 100:
        speeds.observe(record(busy_s=busy_s))
    assert speeds.prefill_rate("P.0") == pytest.approx(500, rel=0.01)
    speeds.forget("P.0")
    assert speeds.prefill_rate("P.0") == pytest.approx(500, rel=0.01)  # the average of all


def test_faults_teach_no_speed():
    """Failed and repeated requests, and prompts computed in two places, do not count."""
    speeds = Speeds()
    twice = record()
    twice.spans = [Span("prefill", worker, 0.0, 0.1, 50) for worker in ("P.0", "D.0")]
    failed = record(handoff_s=60.0)
    failed.finish_reason = "error"
    for each in (twice, failed, record(handoff_s=60.0, num_attempts=2)):
        speeds.observe(each)
    assert (speeds.prefill_rate("P.0"), speeds.handoff_rate()) == (None, None)


def test_a_bad_average_of_hand_offs_is_put_to_the_test_again():
    """One terrible hand-off would keep every later prompt from being handed over; now and then the average is hidden,
    so that one is, and a new one starts the count anew."""
    speeds = Speeds()
    speeds.observe(record(handoff_s=60.0))
    answers = [speeds.handoff_rate() for _ in range(200)]
    assert 2 <= answers.count(None) <= 4
    assert answers[0] is not None
