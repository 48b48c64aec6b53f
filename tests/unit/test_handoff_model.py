"""The hand-off under a network that may do anything: whatever is lost, late, doubled or dead, each request ends once.

Each history is a random sequence of steps on a small world (handoff_world.py). After every step every page of every
worker is accounted for and the client has only right tokens; at the end the network is made whole, time passes, every
request has one outcome and every pool is as at the start. DISAGG_HISTORIES=n asks for n histories of each machine.
"""

import os

from handoff_world import PAGE_SIZE, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

HISTORIES = int(os.environ.get("DISAGG_HISTORIES", "0"))
SMALL = st.integers(0, 7)


class HandOff(RuleBasedStateMachine):
    """The rules all machines share: work arrives, time passes, messages and copies arrive in any order."""

    names = ("P", "D")
    options = ({},)

    @initialize(options=st.integers(0, 7))
    def start(self, options):
        self.world = World(self.names, **self.options[options % len(self.options)])

    @rule(seed=SMALL, length=st.integers(1, 14), shape=st.integers(0, 15))
    def submit(self, seed, length, shape):
        """A request, often with the beginning of another; some end at once."""
        prompt = [(seed % 3 * 31 + position * 7) % 251 for position in range(length)]
        names = self.names
        prefill = names[shape % len(names)] if shape > 12 else names[0]
        stop = {self.next(prompt)} if shape == 7 else ()
        self.world.submit(prompt, 1 if shape == 6 else 2 + shape % 4, stop, prefill, names[1 + shape % (len(names) - 1)])
        self.world.check()

    @staticmethod
    def next(prompt):
        from handoff_world import fault_free

        return fault_free(prompt, 1)[0]

    @rule(rounds=st.integers(1, 4))
    def calm(self, rounds):
        """Everything works for a while."""
        self.world.calm(rounds)
        self.world.check()

    @rule(which=SMALL)
    def turn(self, which):
        """One worker turns its loop."""
        sims = list(self.world.live.values())
        if sims:
            sims[which % len(sims)].turn()
        self.world.check()

    @rule(which=SMALL, count=st.integers(1, 3))
    def front(self, which, count):
        """Messages between the front end and a worker arrive, in order."""
        queues = [(queue, worker) for queue in (0, 1) for worker in self.world.to_worker]
        kind, worker = queues[which % len(queues)]
        queue = (self.world.to_worker, self.world.to_front)[kind][worker]
        for _ in range(min(count, len(queue))):
            (self.world.deliver_front, self.world.hear)[kind](worker)
        self.world.check()

    @precondition(lambda self: self.world.links)
    @rule(which=SMALL, count=st.integers(1, 3))
    def deliver(self, which, count):
        """Messages between two workers arrive, in order."""
        link = list(self.world.links)[which % len(self.world.links)]
        for _ in range(min(count, len(self.world.links[link]))):
            self.world.deliver(link)
        self.world.check()

    @precondition(lambda self: any(sim.wire.flights for sim in self.world.live.values()))
    @rule(which=SMALL, num_pages=st.integers(1, 4))
    def copy(self, which, num_pages):
        """A copy in flight makes progress."""
        sims = [sim for sim in self.world.live.values() if sim.wire.flights]
        sim = sims[which % len(sims)]
        sim.wire.advance(which % len(sim.wire.flights), num_pages)
        self.world.check()

    @rule(seconds=st.sampled_from((0.5, 3.0, 6.0, 11.0, 16.0, 30.0)))
    def wait(self, seconds):
        """Time passes, beyond a lease perhaps, and nobody does anything."""
        self.world.clock.advance(seconds)

    @precondition(lambda self: self.world.asks)
    @rule(which=SMALL)
    def abort(self, which):
        """The client goes away."""
        self.world.abort(list(self.world.asks)[-1 - which % len(self.world.asks)])
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


class Storm(HandOff):
    """Between workers, messages are lost, doubled and overtake one another; copies fail or bring damaged pages."""

    options = ({}, {"checksum": True}, {"skewed": True}, {"prefix_caching": True})

    @precondition(lambda self: self.world.links)
    @rule(which=SMALL, index=SMALL)
    def overtake(self, which, index):
        """A message arrives before older ones."""
        link = list(self.world.links)[which % len(self.world.links)]
        self.world.deliver(link, index % len(self.world.links[link]))
        self.world.check()

    @precondition(lambda self: self.world.links)
    @rule(which=SMALL, index=SMALL)
    def double(self, which, index):
        """A message arrives, and will arrive again."""
        link = list(self.world.links)[which % len(self.world.links)]
        self.world.deliver(link, index % len(self.world.links[link]), keep=True)
        self.world.check()

    @precondition(lambda self: self.world.links)
    @rule(which=SMALL, index=SMALL)
    def lose(self, which, index):
        """A message is gone."""
        link = list(self.world.links)[which % len(self.world.links)]
        self.world.drop(link, index % len(self.world.links[link]))

    @precondition(lambda self: any(sim.wire.flights for sim in self.world.live.values()))
    @rule(which=SMALL)
    def break_copy(self, which):
        """A copy fails; where pages are checked, it may bring a wrong byte instead."""
        sims = [sim for sim in self.world.live.values() if sim.wire.flights]
        sim = sims[which % len(sims)]
        if sim.checked and which % 2:
            sim.wire.advance(0, damage=True)
        else:
            sim.wire.advance(0, error="link down")
        self.world.check()


class Deaths(Storm):
    """And workers die, are noticed late, and come back with the next epoch."""

    names = ("P", "D", "E")
    options = ({}, {"checksum": True, "pages": 6}, {"skewed": True}, {"prefix_caching": True, "chunked_prefill": False})

    @precondition(lambda self: self.world.live)
    @rule(which=SMALL)
    def kill(self, which):
        """kill -9."""
        self.world.kill(list(self.world.live)[which % len(self.world.live)])
        self.world.check()

    @rule(which=SMALL)
    def notice(self, which):
        """The front end finds out that a worker is dead."""
        dead = [worker for worker in self.world.to_front if worker not in self.world.live]
        if dead:
            self.world.notice(dead[which % len(dead)])
        self.world.check()

    @rule(which=SMALL)
    def restart(self, which):
        """A dead worker, or one that lives, is started anew."""
        self.world.restart(self.names[which % len(self.names)])
        self.world.check()


class Crowded(HandOff):
    """Pools so small that neither side has room for two requests."""

    options = (
        {"pages": 5},
        {"pages": 5, "max_running": 1},
        {"pages": 6, "prefix_caching": True},
        {"pages": 5, "chunked_prefill": False},
    )


def histories(machine, normal, steps):
    case = machine.TestCase
    case.settings = settings(
        max_examples=HISTORIES or normal,
        stateful_step_count=steps,
        derandomize=not HISTORIES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


assert PAGE_SIZE == 4  # the lengths above are chosen for it
TestOrdinary = histories(HandOff, 2_000, 15)
TestCrowded = histories(Crowded, 2_000, 15)
TestStorm = histories(Storm, 3_000, 20)
TestDeaths = histories(Deaths, 3_000, 20)
