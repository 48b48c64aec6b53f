"""One worker for the hand-off's tests: the real one, of which only the model, the transport and the mail are made up.

The model has real pages: it writes each computed position into them and reads all positions back through them for the
next token. So a page that is reused early, copied late, lost or damaged changes the tokens.
"""

import zlib
from dataclasses import dataclass
from functools import partial

from disagg.cluster import messages as m
from disagg.cluster.conserve import conserve
from disagg.cluster.mailbox import FRONT
from disagg.cluster.worker import Worker, WorkerConfig
from disagg.config import EngineSpec, WorkerSpec
from disagg.engine.batch import Output
from disagg.errors import HandshakeError
from disagg.transfer.base import Pulled
from disagg.transfer.layout import Layout

PAGE_SIZE = 4
LEASE_S = 10.0
MAX_WAIT_S = 25.0
LAYOUT = Layout(model="model", num_layers=1, num_kv_heads=1, page_size=PAGE_SIZE, head_dim=1, dtype="float32")


def slot(token, position):
    return (token * 3 + position * 7 + 1) & 255


def next_token(content):
    return zlib.crc32(content) % 251


def fault_free(prompt, max_tokens, stop_ids=()):
    """The output of a request nothing happens to."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(bytes(slot(token, i) for i, token in enumerate(tokens))))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


class Shifted:
    """The world's clock as one host reads it."""

    def __init__(self, base, offset):
        self.base, self.offset = base, offset

    def now(self):
        return self.base.now() + self.offset


@dataclass
class Flight:
    """A pull whose pages are copied when the test says so, one by one."""

    ticket: int
    address: str
    pairs: list
    start_at: float
    error: str = ""


class Wire:
    """A Transport without a thread."""

    def __init__(self, world, clock, name, memory):
        self.world, self.clock, self.name, self.memory = world, clock, name, memory
        self.mapped, self.flights, self.ended, self.count = {}, [], [], 0

    def connect(self, address):
        if address not in self.mapped:
            if address not in self.world.memories:
                raise HandshakeError(f"nobody at {address}")
            self.mapped[address] = self.world.memories[address]

    def pull(self, address, theirs, ours):
        self.count += 1
        pairs = list(zip(theirs, ours, strict=True))
        self.flights.append(Flight(self.count, address, pairs, self.clock.now()))
        return self.count

    def poll(self):
        ended, self.ended = self.ended, []
        return ended

    def disconnect(self, address):
        self.mapped.pop(address, None)

    def advance(self, index, num_pages=1_000, error="", damage=False):
        """Copy the next pages of a flight; it ends when none is left, or with `error`."""
        flight = self.flights[index]
        source = self.mapped.get(flight.address)
        if source is None:
            error = f"not connected to {flight.address}"
        if not error:
            for theirs, ours in flight.pairs[:num_pages]:
                self.memory[ours][:] = source[theirs]
                if damage:
                    self.memory[ours][0] ^= 0x55
        del flight.pairs[:num_pages]
        if error or not flight.pairs:
            del self.flights[index]
            self.ended.append(Pulled(flight.ticket, 1, flight.start_at, self.clock.now(), error))


class Model:
    """What a worker runs: K and V are written into its pages, and the next token is read back through them.

    `ahead`: as on GPUs, with a step in flight between turns. Otherwise the worker may shed requests amid a step.
    """

    def __init__(self, memory, ahead):
        self.memory, self.ahead = memory, ahead

    def launch(self, batch, shed=None):
        return partial(self.compute, batch, shed)

    def busy(self):
        return False

    def compute(self, batch, shed):
        """As late as it can be, when it is collected: pages that were given away too early would show."""
        layers = 1 if self.ahead else 2
        for layer in range(layers):
            if not self.ahead:
                shed()
            wrong = 0 if layer == layers - 1 else 0x55  # a layer too few
            for request in batch.decodes:
                self.write(request, len(request.tokens) - 1, len(request.tokens), wrong)
            for request, start, length, _ in batch.chunks:
                self.write(request, start, start + length, wrong)
        tokens = []
        for request in batch.sampling():
            content = b"".join(self.memory[page] for page in request.pages)
            tokens.append(next_token(content[: len(request.tokens)]))
        return Output(tokens, [None] * len(tokens))

    def write(self, request, start, stop, wrong):
        for position in range(start, stop):
            page = request.pages[position // PAGE_SIZE]
            self.memory[page][position % PAGE_SIZE] = slot(request.tokens[position], position) ^ wrong


class Post:
    """A worker's mailbox in the world: the front end's side is reliable, the other workers' is not.

    `prompt`: what is under way to it arrives while a step is computed; otherwise the world hands it over between steps.
    """

    def __init__(self, world, name, prompt):
        self.world, self.name, self.prompt = world, name, prompt

    def receive(self, timeout_s):
        return self.world.arrivals(self.name) if self.prompt else [], []

    def send(self, to, message):
        if to == FRONT:
            self.world.to_front[self.name].append(message)
        else:
            self.world.send(self.name, to, message)

    def forget(self, to):
        """What is under way to the dead is lost with them."""


class Sim(Worker):
    """The real worker, without a process: its messages, steps and clock are the world's."""

    def __init__(
        self, world, name, pages, offset=0.0, clock_name="host", layout=LAYOUT, ahead=False, prompt=False, **options
    ):
        self.world, self.name = world, name
        self.clock = Shifted(world.clock, offset)
        self.memory = [bytearray(PAGE_SIZE) for _ in range(pages)]
        world.memories[f"mem://{name}"] = self.memory
        self.wire = Wire(world, self.clock, name, self.memory)
        options = {"max_batch_tokens": 6, "max_running": 4, "max_len": 64, **options}
        self.checked = options.pop("checksum", False)
        self.touched = True  # since the last check
        engine = EngineSpec(page_size=PAGE_SIZE, **options)
        config = WorkerConfig(WorkerSpec(name, "both", (0,)), 0, engine, "", pages, LEASE_S, MAX_WAIT_S)
        hello = m.Hello(name, f"mem://{name}", layout, pages)
        model, post = Model(self.memory, ahead), Post(world, name, prompt)
        super().__init__(config, hello, post, model, self.wire, self.clock, self.sums, clock_name)
        self.scheduler, self.pool = self._scheduler, self._scheduler.pool
        self.giving, self.taking, self.jobs = self._giving, self._taking, self._jobs

    def receive(self, message):
        """A message comes in between two turns."""
        self.touched = True
        self._on_message(message)
        self._flush()

    def turn(self, messages=()):
        self.touched = True
        return super().turn(messages)

    def sums(self, pages):
        return [zlib.crc32(self.memory[page]) for page in pages] if self.checked else []

    def adopt(self, receiving):
        self.once(receiving)
        content = b"".join(self.memory[page] for page in receiving.pages)
        right = bytes(slot(token, position) for position, token in enumerate(receiving.offer.request.tokens))
        assert content[: len(right)] == right, "wrong pages were adopted"
        super().adopt(receiving)

    def recompute(self, receiving):
        self.once(receiving)
        super().recompute(receiving)

    def once(self, receiving):
        assert receiving.offer.handoff not in self.world.taken, "a hand-off was taken twice"
        self.world.taken.add(receiving.offer.handoff)

    # the audit

    def check(self):
        """Conservation, and every hand-off counted once."""
        if not self.touched:
            return
        self.touched = False
        conserve(self.scheduler, self.giving.held(), self.taking.held())
        for side in (self.giving, self.taking):
            over = sum(side.counts[outcome] for outcome in ("done", "failed", "expired", "aborted"))
            assert side.counts["started"] == over + len(side.held())

    @property
    def idle(self):
        tables = self.giving.held() or self.taking.held() or self.wire.flights or self.wire.ended
        return self.scheduler.is_idle and not tables and not self.jobs

    @property
    def at_baseline(self):
        return self.idle and self.pool.counts().held == 0
