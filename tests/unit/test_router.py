"""Routing: who gets a request, what the books say, and what happens when workers come, go and change their role."""

import pytest

from disagg.cache.prefix import page_hashes
from disagg.cluster.policies import POLICIES, least_outstanding, prefix_aware
from disagg.cluster.prefix_map import PrefixMap
from disagg.cluster.router import Decision, Route, Router, WorkerView

POLICIES = list(POLICIES.values())
PAGE = 4


def router(text, policy=least_outstanding, **options):
    """`router("PPD")`: two prefill workers and a decode worker, named P0, P1, D2."""
    roles = {"P": "prefill", "D": "decode", "C": "both"}
    return Router(policy, [WorkerView(f"{letter}{i}", roles[letter]) for i, letter in enumerate(text)], **options)


def route(router, request_id, prompt_len=10, max_tokens=10, **options):
    return router.route(request_id, prompt_len, max_tokens, **options).route


def routes(router, count, prompt_len=10, max_tokens=10):
    return [route(router, f"r{i}", prompt_len, max_tokens) for i in range(count)]


@pytest.mark.parametrize("policy", POLICIES)
def test_roles_decide_who_does_what(policy):
    """Prefill workers prefill, decode workers decode, and all of them are used."""
    found = routes(router("PPDD", policy), 8)
    assert {route.prefill for route in found} == {"P0", "P1"}
    assert {route.decode for route in found} == {"D2", "D3"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", ["CC", "DD", "PP"])
def test_where_a_phase_has_no_worker_the_others_do_both(policy, workers):
    """Without prefill (or decode) workers those that are left do everything, and hand nothing over."""
    found = routes(router(workers, policy), 6)
    assert all(route.prefill == route.decode for route in found)
    assert len(set(found)) == 2


def test_the_least_loaded_worker_is_picked_by_tokens_not_by_requests():
    """One long prompt weighs more than several short ones; finished work no longer counts."""
    books = router("CC")
    assert route(books, "long", 1000, 10).prefill == "C0"
    assert {route(books, f"s{i}", 10, 10).prefill for i in range(5)} == {"C1"}
    books.prefilled("long")
    assert route(books, "next", 10, 10).prefill == "C0"


def test_the_books_end_at_zero():
    """Whatever order requests are prefilled, retried and ended in, nothing is owed in the end."""
    books = router("PDD")
    routes(books, 6)
    books.prefilled("r0")
    books.prefilled("r0")
    for i in range(6):
        books.ended(f"r{i}")
        books.ended(f"r{i}")
    books.prefilled("r1")
    assert {(view.prefill_tokens, view.decode_tokens) for view in books.workers} == {(0, 0)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_removed_worker_gets_nothing_and_its_books_go(policy):
    """After a death the rest carry on; ending the dead worker's requests is no error; a successor is used again."""
    books = router("PD", policy)
    route(books, "old", 10, 10)
    books.remove("P0")
    books.remove("P0")
    assert route(books, "new", 10, 10) == Route("D1", "D1")
    books.ended("old")
    books.add(WorkerView("P0.1", "prefill"))
    assert route(books, "newer", 10, 10) == Route("P0.1", "D1")


def test_without_workers_there_is_no_route():
    """None, and nothing is booked: the caller waits for a worker."""
    books = router("")
    assert books.route("r", 10, 10) is None
    books.ended("r")


def test_a_silent_worker_is_spared_while_there_is_another():
    """A worker that missed heartbeats gets work only if nobody else can have it."""
    books = router("PPD")
    books.set_silent("P0", True)
    assert {route.prefill for route in routes(books, 4)} == {"P1"}
    books.set_silent("D2", True)
    assert route(books, "r", 10, 10) == Route("P1", "P1")
    books.set_silent("P1", True)
    assert route(books, "s", 10, 10).decode == "D2"
    books.set_silent("gone", True)


def test_a_new_role_holds_from_the_next_request_on():
    """A role change moves no request that is under way, and the next one sees it."""
    books = router("CC")
    assert route(books, "before", 10, 10) == Route("C0", "C0")
    books.set_role("C0", "decode")
    books.set_role("C1", "prefill")
    books.set_role("gone", "both")
    assert route(books, "after", 10, 10) == Route("C1", "C0")
    views = {view.name: view for view in books.workers}
    assert (views["C0"].prefill_tokens, views["C0"].decode_tokens) == (10, 20)


def test_a_pinned_route_is_taken_as_it_is():
    """A route given by the caller overrides the policy and is booked like any other."""
    books = router("PPDD")
    assert route(books, "r", pinned=Route("P1", "D3")) == Route("P1", "D3")
    assert route(books, "s", 10, 10) == Route("P0", "D2")


def test_cached_tokens_are_none_to_compute():
    """What a worker was given before is booked as cached there, up to the last token, and goes with the worker."""
    books = router("CC", prefix_aware, prefixes=PrefixMap(PAGE, 100))
    prompt = list(range(12))
    hashes = page_hashes(prompt, PAGE)
    route(books, "first", 12, 1, hashes=hashes)
    books.ended("first")
    assert route(books, "again", 12, 1, hashes=hashes).prefill == "C0"
    assert {view.name: view.prefill_tokens for view in books.workers} == {"C0": 4, "C1": 0}
    books.remove("C0")
    books.add(WorkerView("C0", "both"))
    assert route(books, "anew", 12, 1, hashes=hashes).prefill == "C1"


def test_a_request_may_ask_for_another_policy():
    """One request's own policy decides for it alone, and its work is booked like any other's."""
    books = router("PD")
    own = books.route("own", 10, 10, policy=lambda ask, workers: Decision(Route("D1", "D1")))
    assert own.route == Route("D1", "D1")
    assert route(books, "usual") == Route("P0", "D1")
    assert {view.name: view.prefill_tokens for view in books.workers} == {"P0": 10, "D1": 10}
