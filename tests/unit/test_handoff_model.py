"""The hand-off under a network that may do anything: whatever is lost, late, doubled or dead, each request ends once.

A history is a random sequence of steps on a small world (handoff_world.py). After every step every page of every worker
is accounted for and the client has only right tokens; at the end the network is made whole, time passes, every request
has one outcome and every pool is as at the start. DISAGG_HISTORIES=n asks for n histories of each test, other ones each
time.

Most histories are drawn as a string of bytes, three a step: drawing them step by step, as the state machines do, which
shrink better, costs ten times more.
"""

import os

import pytest
from handoff_sim import fault_free
from handoff_world import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

HISTORIES = int(os.environ.get("DISAGG_HISTORIES", "0"))
SECONDS = (0.5, 3.0, 6.0, 11.0, 16.0, 30.0)


class Ordinary:
    """What all histories share: work arrives, time passes, messages and copies arrive whenever they like.

    Every step takes two numbers, whose meaning is its own, and does nothing when it does not apply.
    """

    names = ("P", "D")
    options = (
        {},
        {"ahead": True},
        {"skewed": True},
        {"prefix_caching": True},
        {"checksum": True, "max_running": 1},
        {"ahead": True, "prefix_caching": True, "max_mixed_tokens": 4},
        {"prompt": True},
        {"prompt": True, "prefix_caching": True, "max_batch_tokens": 12},
    )
    steps = (
        "submit", "submit", "submit", "calm", "turn", "turn", "front", "deliver", "deliver", "copy", "wait", "abort",
        "limp", "limp", "limp", "limp",
    )  # fmt: skip

    def __init__(self, options):
        self.world = World(self.names, **self.options[options])

    def submit(self, a, b):
        """A request, often with the beginning of another; some end with their first token."""
        prompt = [(a % 3 * 31 + position * 7) % 251 for position in range(1 + b % 14)]
        names = self.names
        prefill, decode = names[a % len(names) if b % 5 == 0 else 0], names[1 + a % (len(names) - 1)]
        stop = fault_free(prompt, 1) if a % 16 == 7 else ()
        self.world.submit(prompt, 1 if a % 16 == 6 else 2 + b % 4, stop, prefill, decode)
        if b % 3:
            self.world.hear_all()

    def calm(self, a, b):
        """Everything works for a while."""
        self.world.calm(1 + a % 4)

    def limp(self, a, b):
        """All but one thing works for a while."""
        missing = ("copies", "front", *self.names, *(f"{x}>{y}" for x in self.names for y in self.names if x != y))
        self.world.calm(1 + b % 4, missing[a % len(missing)])

    def turn(self, a, b):
        """One worker turns its loop."""
        if sims := list(self.world.live.values()):
            sims[a % len(sims)].turn()

    def front(self, a, b):
        """Messages between the front end and a worker arrive, in order."""
        world = self.world
        queues = [(queue, worker) for queue in (0, 1) for worker in world.to_worker]
        kind, worker = queues[a % len(queues)]
        queue = (world.to_worker, world.to_front)[kind][worker]
        for _ in range(min(1 + b % 3, len(queue))):
            (world.deliver_front, world.hear)[kind](worker)

    def deliver(self, a, b):
        """Messages between two workers arrive, in order."""
        if link := self.link(a):
            for _ in range(min(1 + b % 3, len(self.world.links[link]))):
                self.world.deliver(link)

    def copy(self, a, b):
        """A copy in flight makes progress."""
        if sim := self.copying(a):
            sim.wire.advance(b % len(sim.wire.flights), 1 + b % 4)

    def wait(self, a, b):
        """Time passes, beyond a lease perhaps, and nobody does anything."""
        self.world.clock.advance(SECONDS[a % len(SECONDS)])

    def abort(self, a, b):
        """The client goes away."""
        if asks := list(self.world.asks):
            self.world.abort(asks[-1 - a % len(asks)])
            queues = [worker for worker in self.world.to_worker if worker in self.world.live]
            if b % 3 and queues:  # one worker hears of it at once
                worker = queues[b % len(queues)]
                while self.world.to_worker[worker]:
                    self.world.deliver_front(worker)

    def link(self, a):
        links = list(self.world.links)
        return links[a % len(links)] if links else None

    def copying(self, a):
        sims = [sim for sim in self.world.live.values() if sim.wire.flights]
        return sims[a % len(sims)] if sims else None


class Crowded(Ordinary):
    """Pools so small that neither side has room for two requests."""

    options = (
        {"pages": 5},
        {"pages": 5, "ahead": True},
        {"pages": 5, "max_running": 1},
        {"pages": 6, "prefix_caching": True},
        {"pages": 5, "chunked_prefill": False},
    )


class Storm(Ordinary):
    """Between workers, messages are lost, doubled and overtake one another; copies fail or bring damaged pages."""

    steps = (*Ordinary.steps, "overtake", "double", "lose", "break_copy")

    def overtake(self, a, b):
        """A message arrives before older ones."""
        if link := self.link(a):
            self.world.deliver(link, b % len(self.world.links[link]))

    def double(self, a, b):
        """A message arrives, and will arrive again."""
        if link := self.link(a):
            self.world.deliver(link, b % len(self.world.links[link]), keep=True)

    def lose(self, a, b):
        """A message is gone."""
        if link := self.link(a):
            self.world.drop(link, b % len(self.world.links[link]))

    def break_copy(self, a, b):
        """A copy fails; where pages are checked, it may bring a wrong byte instead."""
        if sim := self.copying(a):
            if sim.checked and b % 2:
                sim.wire.advance(0, damage=True)
            else:
                sim.wire.advance(0, error="link down")


class Deaths(Storm):
    """And workers die, are noticed late, and come back with the next epoch."""

    names = ("P", "D", "E")
    options = (
        {},
        {"checksum": True, "pages": 6},
        {"skewed": True},
        {"prefix_caching": True, "chunked_prefill": False},
    )
    steps = (*Storm.steps, "kill", "notice", "restart")

    def kill(self, a, b):
        """kill -9."""
        if self.world.live:
            self.world.kill(list(self.world.live)[a % len(self.world.live)])

    def notice(self, a, b):
        """The front end finds out that a worker is dead."""
        if dead := [worker for worker in self.world.to_front if worker not in self.world.live]:
            self.world.notice(dead[a % len(dead)])

    def restart(self, a, b):
        """A worker is started anew, dead or not."""
        self.world.restart(self.names[a % len(self.names)])


KINDS = (Ordinary, Crowded, Storm, Deaths)
COMMON = {
    "derandomize": not HISTORIES,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_history_ends_well(kind):
    """Every page accounted for after every step; at the end one outcome each, right tokens, pools at baseline."""

    @given(st.integers(0, len(kind.options) - 1), st.binary(min_size=45, max_size=120))
    @settings(max_examples=HISTORIES or 2_500, **COMMON)
    def run(options, history):
        fate = kind(options)
        for i in range(0, len(history) - 2, 3):
            getattr(fate, kind.steps[history[i] % len(kind.steps)])(history[i + 1], history[i + 2])
            fate.world.check()
        fate.world.drain()

    run()


def machine(kind):
    """The same steps as a hypothesis state machine, one rule each."""

    def step(name):
        def body(self, a, b):
            getattr(self.fate, name)(a, b)
            self.fate.world.check()

        body.__name__ = name
        return rule(a=st.integers(0, 15), b=st.integers(0, 15))(body)

    def start(self, options):
        self.fate = kind(options)

    def teardown(self):
        if hasattr(self, "fate"):
            self.fate.world.drain()

    rules = {name: step(name) for name in dict.fromkeys(kind.steps)}
    start = initialize(options=st.integers(0, len(kind.options) - 1))(start)
    made = type(f"{kind.__name__}Machine", (RuleBasedStateMachine,), {**rules, "start": start, "teardown": teardown})
    made.TestCase.settings = settings(max_examples=HISTORIES or 100, stateful_step_count=20, **COMMON)
    return made.TestCase


TestOrdinary, TestCrowded, TestStorm, TestDeaths = (machine(kind) for kind in KINDS)
