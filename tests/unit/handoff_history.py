"""How the histories of the failure scenarios begin, and what is said of them."""

from handoff_world import World

PROMPT = [(7 * i + 3) % 251 for i in range(14)]  # three full pages and a half; three chunks of at most six positions


def states(world):
    """What both sides say of their hand-offs."""
    given = [held.state for held in world.sim("P").giving.held()]
    taken = [held.state for held in world.sim("D").taking.held()] if "D.0" in world.live else []
    return given, taken


def states_of(sim):
    return [one.state for one in sim.taking.held()]


def held(without="copies", **options):
    """A world in which P.0 has prefilled the prompt and D.0 has announced pages and a copy that makes no progress."""
    world = World(**options)
    world.submit(PROMPT, 4)
    world.calm(6, without)
    assert states(world)[0] == ["holding"]
    return world


def outcome(world):
    world.drain()
    (ask,) = world.asks.values()
    return ask.outcome, ask.attempt
