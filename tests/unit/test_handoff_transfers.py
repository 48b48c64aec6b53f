"""The failure scenarios of the field from 19 on: what travels is shared, doubled, lost, mixed up or damaged.

`World.drain` ends every one of them the same way: each request has one outcome and right tokens, both pools are at
baseline. What is asserted here is what is special.
"""

import msgspec
import pytest
from handoff_history import PROMPT, held, outcome, states, states_of
from handoff_sim import LAYOUT, LEASE_S, fault_free
from handoff_world import World

from disagg.cluster import messages as m
from disagg.cluster.conserve import conserve
from disagg.errors import InvariantError


def test_scenario_19_no_staging_buffer_to_fill():
    """Pages are reserved for the whole prompt before the first is copied: what is half filled never waits for room."""
    world = World(pages=6)
    world.submit(PROMPT, 4)
    world.submit(PROMPT[::-1], 4)
    world.calm(3, "copies")
    reserved = [len(one.pages) for one in world.sim("D").taking.held()]
    assert all(count in (0, 4) for count in reserved)
    world.drain()


def test_scenario_21_source_pages_outlive_their_prefix_entry():
    """P evicts all it can and other prompts want the room: announced pages stay until they are read."""
    world = held(pages=6, prefix_caching=True)
    world.abort("r0")
    world.deliver_front("P.0")  # the request is gone, its pages are published, and only the hand-off keeps them
    announced = set(world.sim("P").giving.held()[0].pages)
    pool = world.sim("P").pool
    taken = pool.allocate(pool.num_free)
    assert not announced & set(taken)
    pool.release(taken)
    world.drain()


def test_scenario_22_doubled_reordered_and_late_messages():
    """Every message between the workers comes three times, newest first: nothing is taken twice, nothing is wrong."""
    world = World()
    seen = []
    for number in range(6):
        world.submit(PROMPT[: 3 + number], 4)
        for _ in range(6):
            world.calm(1, "P>D")
            for link, messages in list(world.links.items()):
                seen += [(link, message) for message in messages]
                for message in reversed(messages):
                    world.live[link[1]].receive(message)
                world.links.pop(link, None)
    for link, message in seen:
        world.live[link[1]].receive(message)
        world.check()
    world.drain()
    assert all(ask.outcome == "length" for ask in world.asks.values())


def test_scenario_22_an_old_hand_off_comes_again():
    """All messages of a hand-off that ended come once more, in order and within the lease: it stays ended."""
    world = World()
    world.submit(PROMPT, 4)
    seen = []
    for _ in range(8):
        world.calm(1, "P>D")
        seen += world.links.get(("P.0", "D.0"), [])
        world.calm(1)
    decode = world.sim("D")
    assert decode.taking.counts["done"] == 1
    for message in seen:
        decode.receive(message)
    assert decode.taking.held() == []
    assert outcome(world) == ("length", 0)


@pytest.mark.parametrize("field", ["first_page", "pages", "first_token"])
def test_scenario_22_a_chunk_that_does_not_fit_is_refused(field):
    """A hole, a page too many, a first token too early: P keeps the request and the tokens are right."""
    wrong = {"first_page": 2, "pages": [0] * 9, "first_token": 5}
    world = World()
    world.submit(PROMPT, 4)
    world.calm(1, "P>D")
    link = ("P.0", "D.0")
    world.links[link] = [
        msgspec.structs.replace(message, **{field: wrong[field]}) if isinstance(message, m.ChunkReady) else message
        for message in world.links[link]
    ]
    world.calm(1)
    assert world.sim("D").taking.counts["failed"] == 1
    assert outcome(world) == ("length", 0)


def test_scenario_22_a_lost_chunk_shows_in_the_next_renewal():
    """The last chunk is lost: D learns from Renewed how many pages were announced, and gives the request back."""
    world = World()
    world.submit(PROMPT, 4)
    world.calm(6, "P>D")
    world.drop(("P.0", "D.0"), -1)
    world.calm(1)
    world.clock.advance(LEASE_S / 2)
    world.calm(4)
    assert world.sim("P").giving.counts["failed"] == 1
    assert outcome(world) == ("length", 0)


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_scenario_23_the_offer_comes_before_and_after_the_prefill(rounds):
    """D may hear of the request before the first chunk, between two, or when all are announced."""
    world = World()
    world.submit(PROMPT, 4)
    world.calm(rounds, "P>D")
    assert outcome(world) == ("length", 0)
    assert world.sim("D").taking.counts["done"] == 1


@pytest.mark.parametrize("first", ["P", "D"])
def test_scenario_24_prefix_hits_on_either_side(first):
    """Both prompts are cached on one side: a hit on P is announced like computed pages, D copies whatever it has."""
    world = World(prefix_caching=True, pages=16)
    world.submit(PROMPT, 4, prefill=first, decode=first)
    world.drain()
    world.submit(PROMPT, 4)
    world.submit([*PROMPT[:8], 1, 2, 3], 4)
    world.calm(2)
    pool = world.sim("D").pool
    pool.forget(range(pool.num_pages))  # the hit is evicted meanwhile
    world.drain()
    assert world.sim("D").taking.counts["done"] == 2


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 8, 12, 13])
def test_scenario_25_page_and_chunk_boundaries(length):
    """Shorter than a page, exactly full pages, a partial last page, chunks that end inside a page."""
    world = World()
    world.submit(PROMPT[:length], 4)
    assert outcome(world) == ("length", 0)
    assert world.sim("D").taking.counts["done"] == 1


@pytest.mark.parametrize(
    "change", [{"page_size": 8}, {"dtype": "float16"}, {"model": "other"}, {"num_kv_heads": 2}, {"protocol": 1}]
)
def test_scenario_26_workers_that_differ(change):
    """Nothing is copied between workers that differ; the sentence names what differs, and P decodes."""
    world = World()
    world.restart("D", layout=msgspec.structs.replace(LAYOUT, **change))
    world.submit(PROMPT, 4)
    world.calm(2, "D>P")
    (refusal,) = [one for one in world.links[("D.1", "P.0")] if isinstance(one, m.Dropped)]
    assert next(iter(change)) in refusal.refused
    assert outcome(world) == ("length", 0)


@pytest.mark.parametrize("ends", ["stop", "length"])
def test_scenario_27_the_first_token_is_the_last(ends):
    """End-of-sequence or max_tokens 1: chunks were announced, nothing is needed; both sides are free at once."""
    world = World()
    world.submit(PROMPT, 4 if ends == "stop" else 1, fault_free(PROMPT, 1) if ends == "stop" else ())
    world.calm(6)
    assert all(sim.at_baseline for sim in world.live.values())
    assert outcome(world) == (ends, 0)
    assert world.sim("D").taking.counts["done"] == 0


def test_scenario_29_both_directions_at_once():
    """A role is only routing: hand-offs from P to D and from D to P are in flight together."""
    world = World(pages=16)
    for number in range(4):
        names = ("P", "D") if number % 2 else ("D", "P")
        world.submit(PROMPT[: 6 + number], 4, (), *names)
        world.calm(1, "copies")
    world.drain()
    assert {ask.attempt for ask in world.asks.values()} == {0}


def test_scenario_30_a_partition_heals_after_both_gave_up():
    """Both leases ended in silence: what then arrives of the old hand-off is ignored on both sides."""
    world = held()
    world.clock.advance(3 * LEASE_S)
    for sim in world.live.values():
        sim.turn()
    assert world.sim("P").giving.held() == []
    world.calm(1)
    assert outcome(world)[0] == "length"


def test_scenario_31_preempted_on_d_after_the_pages_came():
    """D runs out of pages while decoding: the request is computed anew there, tokens as ever."""
    world = World(pages=6)
    world.submit(PROMPT[:6], 12)
    world.submit(PROMPT[2:8], 12)
    world.drain()
    assert {ask.outcome for ask in world.asks.values()} == {"length"}


def test_scenario_32_retried_elsewhere_while_the_first_d_still_reads():
    """The next attempt is another hand-off; P keeps the old pages until the old reader has ended."""
    world = World(names=("P", "D", "E"), pages=12)
    world.submit(PROMPT, 4)
    world.calm(6, "copies")
    world.asks["r0"].route = ("P.0", "E.0")
    world.to_worker["D.0"].append(m.Abort("r0", 0))
    world.retry("r0")
    world.calm(6, "copies")
    assert [one.handoff for one in world.sim("P").giving.held()] == ["r0/0", "r0/1"]
    assert states_of(world.sim("D")) == ["quiescing"]
    assert outcome(world) == ("length", 1)


def test_scenario_32_the_next_attempt_comes_to_the_same_d():
    """A later attempt ends the earlier one on D, also when it overtakes the front end's Abort and P's Cancel."""
    world = held()
    world.retry("r0")
    while world.to_worker["P.0"]:
        world.deliver_front("P.0")
    aborts, world.to_worker["D.0"] = world.to_worker["D.0"], []
    world.links[("P.0", "D.0")] = [one for one in world.links[("P.0", "D.0")] if not isinstance(one, m.Cancel)]
    world.calm(6, "copies")
    world.to_worker["D.0"] = aborts
    assert states(world)[1] == ["quiescing", "filling"]
    assert outcome(world) == ("length", 1)


def test_scenario_34_damaged_pages_are_never_adopted():
    """A wrong byte in one page: the checksum tells, the request goes on where its pages are right."""
    world = held(checksum=True)
    decode = world.sim("D")
    decode.wire.advance(0, damage=True)
    while decode.wire.flights:
        decode.wire.advance(0)
    decode.turn()
    assert decode.taking.counts["failed"] == 1
    assert outcome(world) == ("length", 0)


def test_scenario_34_checksums_that_were_not_sent_count_as_damage():
    """D checks and P does not: no page is taken unchecked."""
    world = World(checksum=True)
    world.sim("P").checked = False
    world.submit(PROMPT, 4)
    assert outcome(world) == ("length", 0)
    assert world.sim("D").taking.counts["done"] == 0


def test_the_conservation_rule_finds_a_lost_page():
    """A page held by nobody that is listed, and one that is listed twice, are both found."""
    sim = held().sim("P")
    sim.check()
    conserve(sim.scheduler, sim.giving.held(), sim.taking.held())
    (page,) = sim.pool.allocate(1)
    with pytest.raises(InvariantError):
        conserve(sim.scheduler, sim.giving.held(), sim.taking.held())
    assert conserve(sim.scheduler, sim.giving.held(), sim.taking.held(), [page]).holding == 5
    with pytest.raises(InvariantError):
        conserve(sim.scheduler, [*sim.giving.held()] * 2, sim.taking.held(), [page])


def test_the_conservation_rule_counts_a_shared_page_once():
    """Announced while the prompt is computed: held by the request and by the hand-off, counted as sending."""
    world = World()
    world.submit(PROMPT, 4)
    world.calm(1)
    sim = world.sim("P")
    counts = conserve(sim.scheduler, sim.giving.held(), sim.taking.held())
    assert (counts.sending, counts.running, sum(counts)) == (1, 3, sim.pool.num_pages)


def test_tombstones_are_bounded():
    """Ten thousand ended hand-offs are remembered, no more."""
    side = World().sim("D").taking
    for number in range(10_100):
        side.abort(f"x{number}")
        side.on_message(m.Cancel("P.0", f"x{number}/0", "late"))
        side.worker_lost(f"Z.{number}")
    assert len(side._aborted) == len(side._ended) == len(side._lost) == 10_000
