"""One made-up worker for the hand-off's tests: a real scheduler, pool and both sides; model and transport are made up.

The model has real pages: it writes each computed position into them and reads all positions back through them for the
next token. So a page that is reused early, copied late, lost or damaged changes the tokens.
"""

import zlib
from dataclasses import dataclass
from functools import partial

from disagg.cache.pages import PagePool
from disagg.cluster import messages as m
from disagg.cluster.conserve import conserve
from disagg.cluster.handoff_decode import DecodeSide
from disagg.cluster.handoff_prefill import PrefillSide, handoff_id
from disagg.engine.batch import Output
from disagg.engine.engine import Engine
from disagg.engine.scheduler import Scheduler
from disagg.errors import HandshakeError, RequestError
from disagg.record import Facts
from disagg.request import FinishReason, Request
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


class Sim:
    """One worker: as cluster/worker.py, without processes. `ahead`: as on GPUs, with a step in flight between turns."""

    def __init__(self, world, name, pages, offset=0.0, clock_name="host", layout=LAYOUT, ahead=False, **options):
        self.ahead = ahead
        self.world, self.name = world, name
        self.clock = Shifted(world.clock, offset)
        self.memory = [bytearray(PAGE_SIZE) for _ in range(pages)]
        world.memories[f"mem://{name}"] = self.memory
        self.wire = Wire(world, self.clock, name, self.memory)
        self.pool = PagePool(pages, PAGE_SIZE)
        options = {"max_batch_tokens": 6, "max_running": 4, "max_len": 64, **options}
        self.checked = options.pop("checksum", False)
        self.scheduler = Scheduler(self.pool, **options)
        self.engine = Engine(name, self.scheduler, self, self.clock)
        hello = m.Hello(name, f"mem://{name}", layout, pages)
        send = lambda to, message: world.send(name, to, message)  # noqa: E731
        self.giving = PrefillSide(
            hello, self.clock, send, self.scheduler, LEASE_S, self.freed, self.checksum, self.orphaned, clock_name
        )
        self.taking = DecodeSide(
            hello, self.clock, send, self.wire, self.scheduler, self, MAX_WAIT_S, clock_name
        )  # fmt: skip
        self.jobs, self.offered, self.lost, self.stale = {}, set(), set(), {}
        self.out = m.Progress(name, [], [])
        self.touched = True  # since the last check

    # what arrives

    def receive(self, message):
        self.touched = True
        if isinstance(message, m.Submit):
            self.submit(message)
        elif isinstance(message, m.Offer):
            self.abort_before(message.request)
            self.taking.on_offer(message)
        elif isinstance(message, m.ChunkReady | m.Cancel | m.Renewed):
            self.taking.on_message(message)
        elif isinstance(message, m.PullDone | m.Dropped | m.Renew):
            self.giving.on_message(message)
        elif isinstance(message, m.Abort):
            self.abort(message.id, message.attempt)
        elif isinstance(message, m.Lost):
            self.lost.add(message.worker)
            self.giving.worker_lost(message.worker)
            self.taking.worker_lost(message.worker)
        self.flush()

    def submit(self, submit):
        self.abort_before(submit)
        elsewhere = submit.decode_on not in (None, self.name)
        self.start(submit, self.request(submit, elsewhere), self.scheduler.add)

    def request(self, submit, elsewhere=False):
        return Request(
            submit.id, submit.prompt_len, list(submit.tokens), submit.params, frozenset(submit.stop_ids), submit.order,
            decode_elsewhere=elsewhere,
        )  # fmt: skip

    def start(self, submit, request, enter):
        self.engine.ledger[request.id] = Facts(self.name)
        self.jobs[request.id] = (submit, request)
        try:
            enter(request)
        except RequestError as error:
            self.pool.release(request.pages)
            self.end(request, FinishReason.ERROR, str(error))

    def abort_before(self, submit):
        if submit.attempt:
            self.abort(submit.id, submit.attempt - 1)

    def abort(self, request_id, attempt):
        submit, _ = self.jobs.get(request_id, (None, None))
        if submit is not None and (attempt is None or submit.attempt <= attempt):
            self.giving.cancel(handoff_id(submit), "aborted")
            self.scheduler.abort(request_id)
            self.forget(request_id)
        self.taking.abort(request_id, attempt)

    # one turn

    def turn(self):
        """Whether anything was computed."""
        self.touched = True
        self.taking.tick()
        self.giving.tick()
        stepped = self.engine.step(self.begin)
        if stepped is not None:
            self.report(stepped)
        self.flush()
        return stepped is not None

    def begin(self, batch):
        for chunk in batch.chunks:
            request = chunk.request
            if request.decode_elsewhere and request.id not in self.offered:
                self.offered.add(request.id)
                self.giving.begin(self.jobs[request.id][0], request)

    def launch(self, batch):
        return partial(self.run, batch)

    def run(self, batch):
        """The model: K and V are written into the pages, the next token is read back through them.

        It runs when it is collected, as late as it can: pages that were given away too early would show.
        """
        for request in batch.decodes:
            self.write(request, len(request.tokens) - 1, len(request.tokens))
        for request, start, length, _ in batch.chunks:
            self.write(request, start, start + length)
        tokens = []
        for request in batch.sampling():
            content = b"".join(self.memory[page] for page in request.pages)
            tokens.append(next_token(content[: len(request.tokens)]))
        return Output(tokens, [None] * len(tokens))

    def write(self, request, start, stop):
        for position in range(start, stop):
            page = request.pages[position // PAGE_SIZE]
            self.memory[page][position % PAGE_SIZE] = slot(request.tokens[position], position)

    def report(self, stepped):
        for request, token, _ in stepped.tokens:
            attempt = self.jobs[request.id][0].attempt
            self.out.tokens.append(m.NewToken(request.id, attempt, request.num_output - 1, token))
        self.flush()
        for chunk in stepped.batch.chunks:
            if chunk.request.decode_elsewhere and chunk.request.finish_reason is None:
                handoff = handoff_id(self.jobs[chunk.request.id][0])
                self.giving.advanced(handoff, chunk.start + chunk.length)
        for request in stepped.finished:
            self.giving.cancel(handoff_id(self.jobs[request.id][0]), "its first token was its last")
            self.end(request, request.finish_reason)

    def end(self, request, reason, error="", retryable=False):
        submit, _ = self.jobs[request.id]
        self.out.ended.append(
            m.Ended(submit.id, submit.attempt, reason, request.num_output, Facts(self.name), error, retryable)
        )
        self.forget(request.id)

    def forget(self, request_id):
        self.jobs.pop(request_id, None)
        self.engine.ledger.pop(request_id, None)
        self.offered.discard(request_id)

    def flush(self):
        if self.out.tokens or self.out.ended:
            self.world.to_front[self.name].append(self.out)
            self.out = m.Progress(self.name, [], [])

    # what the two sides ask

    def freed(self, request):
        assert self.jobs[request.id][1] is request
        self.forget(request.id)

    def orphaned(self, request, reason):
        assert self.jobs[request.id][1] is request
        self.end(request, FinishReason.ERROR, reason, retryable=True)

    def checksum(self, pages):
        return [zlib.crc32(self.memory[page]) for page in pages] if self.checked else []

    def taken(self, receiving):
        assert receiving.offer.handoff not in self.world.taken, "a hand-off was taken twice"
        self.world.taken.add(receiving.offer.handoff)
        request = self.request(receiving.offer.request)
        request.tokens.append(receiving.first_token)
        return request

    def adopt(self, receiving):
        request = self.taken(receiving)
        request.pages, request.num_computed = receiving.pages, receiving.num_computed
        content = b"".join(self.memory[page] for page in request.pages)
        right = bytes(slot(token, position) for position, token in enumerate(receiving.offer.request.tokens))
        assert content[: len(right)] == right, "wrong pages were adopted"
        self.start(receiving.offer.request, request, self.scheduler.adopt)

    def recompute(self, receiving):
        self.start(receiving.offer.request, self.taken(receiving), self.scheduler.add)

    def give_up(self, receiving, reason):
        submit = receiving.offer.request
        facts = Facts(self.name)
        self.out.ended.append(m.Ended(submit.id, submit.attempt, FinishReason.ERROR, 0, facts, reason, retryable=True))

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
