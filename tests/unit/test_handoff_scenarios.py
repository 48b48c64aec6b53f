"""The failure scenarios of the field (docs/handoff.md has the table), each the smallest history that shows it.

1 to 18: a side dies, a client leaves, somebody is refused, late or out of memory.

`World.drain` ends every one of them the same way: each request has one outcome and right tokens, both pools are at
baseline. What is asserted here is what is special.
"""

import pytest
from handoff_history import PROMPT, held, outcome, states, states_of
from handoff_sim import LEASE_S, MAX_WAIT_S
from handoff_world import World

from disagg.cluster import messages as m


def test_scenario_01_d_dies_before_it_reads():
    """The front end sends the request again; P's pages come back as soon as the death is known."""
    world = held(without="P>D")
    world.kill("D.0")
    world.notice("D.0")
    world.calm(1)
    assert world.sim("P").giving.held() == []
    assert outcome(world) == ("length", 1)


def test_scenario_02_d_dies_in_the_middle_of_a_copy():
    """A reader that died reads no more: P's pages come back, the request is sent again."""
    world = held()
    world.sim("D").wire.advance(0, 1)
    world.kill("D.0")
    world.restart("D")
    assert outcome(world) == ("length", 1)


def test_scenario_03_p_dies_after_announcing_all_before_the_read():
    """The memory of a dead worker stays mapped, so D may read it still: within its lease the copy counts."""
    world = held()
    world.hear_all()
    world.kill("P.0")
    decode = world.sim("D")
    decode.receive(m.Lost("P.0"))
    assert states_of(decode) == ["filling"]
    while decode.wire.flights:
        decode.wire.advance(0)
    decode.turn()
    assert decode.taking.counts["done"] == 1
    assert decode.wire.mapped == {}  # and now it is unmapped
    world.drain()


def test_scenario_04_p_dies_in_the_middle_of_a_copy():
    """The copy fails, the first token is known: D computes the prompt anew and no token is repeated."""
    world = held()
    world.kill("P.0")
    decode = world.sim("D")
    decode.receive(m.Lost("P.0"))
    while decode.wire.flights:
        decode.wire.advance(0, error="remote disconnected")
    decode.turn()
    assert "r0" in decode.jobs
    assert decode.taking.counts["failed"] == 1
    world.drain()


def test_scenario_04_p_dies_while_it_still_prefills():
    """Neither pages nor first token will come: D frees its reservation and says so; the request is sent again."""
    world = World()
    world.submit(PROMPT, 4)
    world.calm(2)
    assert states(world) == (["sending"], ["filling"])
    world.kill("P.0")
    world.notice("P.0")
    world.deliver_front("D.0")
    assert world.sim("D").taking.held() == []
    assert outcome(world) == ("length", 1)


def test_scenario_05_an_old_epoch_is_not_believed():
    """P.1 came after P.0: what D says about P.0's hand-offs, and what P.0 had still sent, changes nothing."""
    world = held(without="P>D")
    late = list(world.links[("P.0", "D.0")])
    world.restart("P")
    world.calm(3)
    before = world.sim("D").taking.held()
    for message in late:
        world.sim("D").receive(message)
    assert world.sim("D").taking.held() == before
    assert outcome(world) == ("length", 1)


def test_scenario_05_another_epoch_speaks_of_our_hand_off():
    """The hand-off's name is right and the sender is not: neither side believes it."""
    world = held()
    for message in (m.PullDone("D.9", "r0/0"), m.Dropped("D.9", "r0/0"), m.Renew("D.9", 1, ["r0/0"])):
        world.sim("P").receive(message)
    for message in (m.Cancel("P.9", "r0/0", ""), m.ChunkReady("P.9", "r0/0", 7, [1]), m.Renewed("P.9", 1, [], [])):
        world.sim("D").receive(message)
    assert states(world) == (["holding"], ["filling"])
    (answer,) = world.links.pop(("P.0", "D.9"))
    assert answer.handoffs == []
    assert outcome(world) == ("length", 0)


def test_scenario_06_abort_while_queued_on_p():
    """A request that has not begun was never offered: nothing to call off on D."""
    world = World(max_running=1)
    world.submit(PROMPT, 4)
    second = world.submit(PROMPT[:5], 4)
    world.calm(1)
    world.abort(second)
    world.drain()
    assert world.asks[second].outcome == "abort"
    assert world.sim("D").taking.counts["started"] == 1


def test_scenario_07_abort_during_prefill_with_chunks_sent():
    """P keeps what it announced until D says that no copy reads it any more."""
    world = World()
    request = world.submit(PROMPT, 4)
    world.calm(2, "copies")
    world.abort(request)
    world.calm(3, "copies")
    assert states(world) == (["quiescing"], ["quiescing"])
    assert world.sim("P").pool.counts().held > 0
    world.calm(2)
    assert world.sim("P").at_baseline
    assert outcome(world) == ("abort", 0)


def test_scenario_08_the_abort_overtakes_the_offer():
    """D remembers the abort: an Offer that comes after it is not taken."""
    world = World()
    request = world.submit(PROMPT, 4)
    world.calm(1, "P>D")
    world.abort(request)
    world.deliver_front("D.0")
    while ("P.0", "D.0") in world.links:
        world.deliver(("P.0", "D.0"))
    assert world.sim("D").taking.held() == []
    assert outcome(world) == ("abort", 0)


@pytest.mark.parametrize("ahead", [False, True])
def test_scenario_08_d_hears_of_the_abort_first(ahead):
    """D drops a hand-off that P still prefills: P stops computing it, and its own Abort finds nothing left.

    A step in flight may still write the pages: they come back when it is done.
    """
    world = World(ahead=ahead)
    request = world.submit(PROMPT, 4)
    world.calm(2)
    assert states(world) == (["sending"], ["filling"])
    world.abort(request)
    world.deliver_front("D.0")
    while ("D.0", "P.0") in world.links:
        world.deliver(("D.0", "P.0"))
    prefill = world.sim("P")
    assert prefill.turn() == ahead
    assert prefill.at_baseline
    assert not prefill.turn()
    assert outcome(world) == ("abort", 0)


def test_scenario_09_abort_while_d_waits_and_p_never_answers():
    """Both sides let go by themselves: D at once, P when its lease is over."""
    world = World()
    request = world.submit(PROMPT, 4)
    world.calm(1)
    world.abort(request)
    world.deliver_front("D.0")
    assert world.sim("D").taking.held() == []
    world.links.clear()  # its Dropped is lost, and so is everything else
    world.deliver_front("P.0")
    world.links.clear()
    world.clock.advance(2 * LEASE_S)
    world.sim("P").turn()
    assert world.sim("P").at_baseline
    assert outcome(world) == ("abort", 0)


def test_scenario_10_a_late_write_never_lands_in_another_requests_pages():
    """Aborted while a copy is in flight: D's pages are given to nobody until it has ended."""
    world = held(pages=8)
    world.abort("r0")
    world.calm(1, "copies")
    assert states(world)[1] == ["quiescing"]
    reserved = set(world.sim("D").taking.held()[0].pages)
    other = world.submit(PROMPT[::-1], 4)
    world.calm(4, "copies")
    assert all(not reserved & {*holder.pages} for holder in world.sim("D").taking.held()[1:])
    world.drain()
    assert world.asks[other].outcome == "length"


def test_scenario_11_d_rejects_before_admission():
    """The pool of D can never hold the prompt: refused at once with a sentence; P decodes it itself."""
    world = World()
    world.restart("D", pages=2)
    world.submit(PROMPT, 4)
    world.calm(3)
    assert world.sim("P").giving.held() == []
    assert outcome(world) == ("length", 0)


def test_scenario_12_p_refuses_while_d_would_wait():
    """What P cannot serve ends there with an error before D hears of it."""
    world = World(max_len=10)
    world.submit(PROMPT, 4)
    assert outcome(world) == ("error", 0)
    assert world.sim("D").taking.counts["started"] == 0


def test_scenario_13_the_offer_never_arrives():
    """P does not wait for its destination: it prefills, and when the lease is over the request is sent again."""
    world = held(without="P>D")
    world.drop(("P.0", "D.0"), 0)
    assert outcome(world) == ("length", 1)


def test_scenario_13_the_destination_is_known_to_be_dead():
    """The request waited on P while its decode worker died: nothing is offered, P decodes it."""
    world = World()
    world.submit(PROMPT, 4)
    world.kill("D.0")
    world.sim("P").receive(m.Lost("D.0"))
    world.calm(8)
    assert world.sim("P").giving.counts["started"] == 0
    assert outcome(world) == ("length", 0)


def test_scenario_14_a_lease_that_ends_while_d_is_stalled():
    """P has given the pages to others: what D copied too late is thrown away, and P's Cancel need not have come."""
    world = held()
    world.clock.advance(2 * LEASE_S)
    world.sim("P").turn()
    assert world.sim("P").at_baseline
    for page in world.sim("P").memory:
        page[:] = b"zzzz"
    decode = world.sim("D")
    while decode.wire.flights:
        decode.wire.advance(0)
    decode.turn()
    assert decode.taking.counts["expired"] == 1
    assert decode.taking.counts["done"] == 0
    world.drain()


def test_scenario_14_copied_in_time_but_noticed_too_late():
    """D copied within its lease and was stopped until after it: it may not adopt, for P has let the request go."""
    world = held()
    decode = world.sim("D")
    while decode.wire.flights:
        decode.wire.advance(0)
    world.clock.advance(LEASE_S)
    decode.turn()
    assert decode.taking.counts["done"] == 0
    world.drain()


def test_scenario_15_renewals_lost_and_clocks_apart():
    """Leases are durations: hosts whose clocks differ by 1000 s hand over, and one Renew in three is enough."""
    world = held(skewed=True)
    for _ in range(3):
        for _ in range(2):
            world.clock.advance(LEASE_S / 4)
            world.sim("D").turn()
            world.links.clear()
        world.clock.advance(LEASE_S / 4)
        world.calm(3, "copies")
    assert states(world) == (["holding"], ["filling"])
    assert outcome(world) == ("length", 0)


def test_scenario_15_a_late_answer_counts_from_the_question():
    """Renewed comes six seconds after its Renew: D's lease runs from when it asked, so P's ends later."""
    world = held()
    world.clock.advance(LEASE_S / 4)
    world.sim("D").turn()
    world.deliver(("D.0", "P.0"))
    world.clock.advance(6.0)
    world.deliver(("P.0", "D.0"))
    mine, theirs = world.sim("D").taking.held()[0], world.sim("P").giving.held()[0]
    assert mine.lease_s == pytest.approx(LEASE_S - 6.0)
    assert theirs.lease_s > mine.lease_s
    assert outcome(world) == ("length", 0)


def test_scenario_15_a_foreign_clock_proves_nothing():
    """Without a shared clock D does not adopt before P answered a Renew, however fast the copy was."""
    world = World(skewed=True)
    world.submit(PROMPT, 4)
    world.calm(6, "D>P")
    assert states(world) == (["holding"], ["filling"])
    assert not world.sim("D").wire.flights
    assert outcome(world) == ("length", 0)


def test_scenario_16_abort_storms():
    """Hundreds cancelled at once, again and again: the pools recover every time."""
    world = World(names=("P", "D"), pages=12)
    for turn in range(10):
        ids = [world.submit(PROMPT[: 1 + i % 14], 4) for i in range(30)]
        world.calm(turn % 5)
        for request in ids:
            world.abort(request)
        world.calm(8)
        assert all(sim.at_baseline for sim in world.live.values())
    world.drain()


def test_scenario_17_cleanup_runs_when_nothing_else_can():
    """P's pool is full of pages for a D that is silent: leases end all the same and the next request runs."""
    world = World(pages=5)
    world.submit(PROMPT, 4)
    second = world.submit(PROMPT[::-1], 4)
    world.calm(6, "D")
    assert world.asks[second].tokens == []
    world.kill("D.0")
    world.clock.advance(2 * LEASE_S)
    world.sim("P").turn()
    assert not world.sim("P").giving.held() or world.sim("P").giving.held()[0].handoff.startswith(second)
    world.drain()
    assert world.asks[second].outcome == "length"


def test_scenario_18_d_without_room():
    """P holds, D waits for room; after `max_wait_s` it refuses and P goes on from the pages it has."""
    world = World()
    full = world.sim("D").pool
    taken = full.allocate(full.num_pages)
    world.submit(PROMPT, 4)
    world.calm(6)
    assert states(world) == (["holding"], ["wait_pages"])
    for _ in range(int(MAX_WAIT_S / LEASE_S * 4) + 1):
        world.clock.advance(LEASE_S / 4)
        world.calm(2)
    assert states(world) == ([], [])
    assert world.sim("P").giving.counts["failed"] == world.sim("D").taking.counts["failed"] == 1
    full.release(taken)
    assert outcome(world) == ("length", 0)


def test_scenario_18_two_workers_full_of_each_others_prompts():
    """P and D hand over to each other with pools full: both waits are bounded, so both go on."""
    world = World(pages=5)
    world.submit(PROMPT, 4)
    world.submit(PROMPT[::-1], 4, prefill="D", decode="P")
    world.calm(10)
    world.drain()
    assert {ask.outcome for ask in world.asks.values()} == {"length"}
