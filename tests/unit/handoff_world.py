"""A small world for the hand-off: real schedulers, pools and both sides; everything else is made up and can go wrong.

The model has real pages: a worker writes each computed position into them and reads all positions back through them for
the next token. So a page that is reused early, copied late, lost or damaged changes the tokens, and the front end, which
knows the right ones, notices at once.

Between the workers the network may delay, lose, double and reorder anything. Between front end and worker messages
keep their order and arrive, late perhaps, as long as both live: that is what the front end is built on.
"""

import zlib
from dataclasses import dataclass, field

from disagg.cache.pages import PagePool
from disagg.clock import ManualClock
from disagg.cluster import messages as m
from disagg.cluster.conserve import conserve
from disagg.cluster.handoff_decode import DecodeSide
from disagg.cluster.handoff_prefill import PrefillSide, handoff_id
from disagg.engine.batch import Output
from disagg.engine.engine import Engine
from disagg.engine.scheduler import Scheduler
from disagg.errors import HandshakeError, RequestError
from disagg.record import Facts
from disagg.request import FinishReason, Request, SamplingParams
from disagg.transfer.base import Pulled
from disagg.transfer.layout import Layout

PAGE_SIZE = 4
LEASE_S = 10.0
MAX_WAIT_S = 25.0
MAX_ATTEMPTS = 6
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
    """One worker: as cluster/worker.py, without processes."""

    def __init__(self, world, name, pages, offset=0.0, clock_name="host", layout=LAYOUT, **options):
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
        elsewhere = submit.decode_on not in (None, self.name)
        self.start(submit, self.request(submit, elsewhere), self.scheduler.add)

    def request(self, submit, elsewhere=False):
        return Request(
            submit.id, submit.prompt_len, list(submit.tokens), submit.params, frozenset(submit.stop_ids), submit.order,
            decode_elsewhere=elsewhere,
        )  # fmt: skip

    def start(self, submit, request, enter):
        if submit.attempt:
            self.abort(submit.id, submit.attempt - 1)
        self.engine.ledger[request.id] = Facts(self.name)
        self.jobs[request.id] = (submit, request)
        try:
            enter(request)
        except RequestError as error:
            self.pool.release(request.pages)
            self.end(request, FinishReason.ERROR, str(error))

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

    def run(self, batch):
        """The model: K and V are written into the pages, the next token is read back through them."""
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
                self.giving.advanced(handoff_id(self.jobs[chunk.request.id][0]))
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
        request = self.request(receiving.offer.request)
        request.tokens.append(receiving.first_token)
        return request

    def adopt(self, receiving):
        request = self.taken(receiving)
        request.pages, request.num_computed = receiving.pages, receiving.num_computed
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


@dataclass
class Ask:
    """A request as the front end sees it."""

    prompt: list
    params: SamplingParams
    stop_ids: list
    expected: list
    tokens: list = field(default_factory=list)
    early: dict = field(default_factory=dict)
    attempt: int = 0
    route: tuple = ()
    known: int = 0  # tokens the present attempt started with
    owner: str = ""  # the worker that is known to decode it
    ended: m.Ended | None = None
    outcome: str = ""


class World:
    """Workers, a front end and what lies between them."""

    def __init__(self, names=("P", "D"), pages=8, skewed=False, **options):
        self.clock = ManualClock(100.0)
        self.memories = {}
        self.links = {}  # (from, to) -> messages, oldest first: lossy
        self.to_worker, self.to_front = {}, {}  # worker -> messages, oldest first: reliable
        self.options = {"pages": pages, **options}
        self.skewed = skewed
        self.epochs = dict.fromkeys(names, -1)
        self.live = {}  # name.epoch -> Sim
        self.lost = set()
        self.asks = {}
        self.parked = []
        for name in names:
            self.restart(name)

    def sim(self, name):
        """The present epoch of a worker."""
        return self.live[f"{name}.{self.epochs[name]}"]

    def restart(self, name, **options):
        old = f"{name}.{self.epochs[name]}"
        if old in self.to_front:
            self.kill(old)
            self.notice(old)
        self.epochs[name] += 1
        new = f"{name}.{self.epochs[name]}"
        number = list(self.epochs).index(name)
        skew = {"offset": 1000.0 * number, "clock_name": name} if self.skewed else {}
        self.to_worker[new], self.to_front[new] = [], []
        self.live[new] = Sim(self, new, **{**self.options, **skew, **options})
        parked, self.parked = self.parked, []
        for request_id in parked:
            self.dispatch(request_id)

    # the network

    def send(self, source, to, message):
        assert source in self.live
        self.links.setdefault((source, to), []).append(message)

    def deliver(self, link, index=0, keep=False):
        """One message between workers; `keep`: it will come again."""
        messages = self.links[link]
        message = messages[index] if keep else messages.pop(index)
        if not messages:
            del self.links[link]
        if link[1] in self.live:
            # as on the wire: what arrives shares no list with what was sent
            self.live[link[1]].receive(m.decode(m.encode(message)))

    def drop(self, link, index=0):
        del self.links[link][index]
        if not self.links[link]:
            del self.links[link]

    def deliver_front(self, worker):
        """The oldest message of the front end to a worker."""
        message = self.to_worker[worker].pop(0)
        if worker in self.live:
            self.live[worker].receive(message)

    def hear(self, worker):
        """The front end reads the oldest message of a worker."""
        self.progress(self.to_front[worker].pop(0))

    # the front end

    def submit(self, prompt, max_tokens=3, stop_ids=(), prefill="P", decode="D"):
        request_id = f"r{len(self.asks)}"
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.asks[request_id] = Ask(
            list(prompt), params, list(stop_ids), fault_free(prompt, max_tokens, stop_ids), route=(prefill, decode)
        )
        self.dispatch(request_id)
        return request_id

    def dispatch(self, request_id):
        """Send an attempt to the workers of its route, or to others when those are dead."""
        ask = self.asks[request_id]
        able = [worker for worker in self.live if worker not in self.lost]
        if not able:
            self.parked.append(request_id)
            return
        wanted = [f"{name}.{self.epochs[name]}" if name in self.epochs else name for name in ask.route]
        start = ask.attempt
        prefill, decode = (name if name in able else able[(start + i) % len(able)] for i, name in enumerate(wanted))
        ask.route = (prefill, decode)
        elsewhere = None if prefill == decode else decode
        self.to_worker[prefill].append(
            m.Submit(
                request_id, ask.prompt + ask.tokens, len(ask.prompt), ask.params, ask.stop_ids,
                float(int(request_id[1:])), ask.attempt, elsewhere,
            )
        )  # fmt: skip

    def retry(self, request_id):
        """The present attempt is dead: what is known goes to other workers, under the next number."""
        ask = self.asks[request_id]
        for worker in {*ask.route} - self.lost:
            if worker in self.to_worker:
                self.to_worker[worker].append(m.Abort(request_id, ask.attempt))
        if len(ask.tokens) >= ask.params.max_tokens or (ask.tokens and ask.tokens[-1] in ask.stop_ids):
            self.over(request_id, "stop" if ask.tokens[-1] in ask.stop_ids else "length")
        elif ask.attempt >= MAX_ATTEMPTS:
            self.over(request_id, "failed")
        else:
            ask.attempt += 1
            ask.early, ask.owner, ask.ended, ask.known = {}, "", None, len(ask.tokens)
            self.dispatch(request_id)

    def over(self, request_id, outcome):
        ask = self.asks[request_id]
        assert not ask.outcome, "two outcomes"
        ask.outcome = outcome
        if outcome in ("stop", "length"):
            assert ask.tokens == ask.expected
            assert (outcome == "stop") == (ask.tokens[-1] in ask.stop_ids)

    def abort(self, request_id):
        """The client is gone."""
        if not self.asks[request_id].outcome:
            self.over(request_id, "abort")
            if request_id in self.parked:
                self.parked.remove(request_id)
            for worker in sorted({*self.asks[request_id].route} - self.lost):
                if worker in self.to_worker:
                    self.to_worker[worker].append(m.Abort(request_id))

    def progress(self, message):
        if message.worker in self.lost:
            return
        for token in message.tokens:
            ask = self.asks[token.id]
            if ask.outcome or token.attempt != ask.attempt:
                continue
            if token.index > ask.known:  # not the first of this attempt: its sender decodes it
                assert ask.owner in ("", message.worker), "two workers write one text"
                ask.owner = message.worker
            ask.early[token.index] = token.token
            while (ready := ask.early.pop(len(ask.tokens), None)) is not None:
                ask.tokens.append(ready)
                assert ask.tokens == ask.expected[: len(ask.tokens)], "wrong tokens reached the client"
            self.finish(token.id)
        for ended in message.ended:
            ask = self.asks[ended.id]
            if ask.outcome or ended.attempt != ask.attempt:
                continue
            if ended.retryable:
                self.retry(ended.id)
            elif ended.reason == FinishReason.ERROR:
                self.over(ended.id, "error")
            else:
                ask.ended = ended
                self.finish(ended.id)

    def finish(self, request_id):
        ask = self.asks[request_id]
        if not ask.outcome and ask.ended is not None and len(ask.tokens) >= ask.ended.num_output:
            self.over(request_id, str(ask.ended.reason))

    # faults

    def kill(self, worker):
        """Its state vanishes. What it had sent may still arrive; its memory stays for those that mapped it."""
        if self.live.pop(worker, None) is not None:
            del self.memories[f"mem://{worker}"]

    def notice(self, worker):
        """The front end hears of a death: it tells the others and tries again what hung on it."""
        if worker in self.lost or worker in self.live:
            return
        self.lost.add(worker)
        for other in self.live:
            self.to_worker[other].append(m.Lost(worker))
        for request_id, ask in self.asks.items():
            if not ask.outcome and request_id not in self.parked:
                parts = {ask.owner} if ask.owner else {*ask.route}
                if worker in parts:
                    self.retry(request_id)

    # going on

    def calm(self, rounds=1, without=""):
        """Rounds in which everything works but what `without` names. Whether anything happened in the last one.

        `without`: "front", "copies", a worker's name (it stands still), or two, "P>D" (that link is silent).
        """
        busy = False
        for _ in range(rounds):
            busy = without != "front" and self.hear_all()
            for link in list(self.links):
                source, to = (end.partition(".")[0] for end in link)
                if without not in (to, f"{source}>{to}"):
                    for _ in range(len(self.links[link])):
                        self.deliver(link)
                        busy = True
            for sim in list(self.live.values()):
                while sim.wire.flights and without != "copies":
                    sim.wire.advance(0)
                    busy = True
                if not sim.name.startswith(f"{without}."):
                    busy |= sim.turn()
            busy |= without != "front" and self.hear_all()
            self.clock.advance(0.001)
        return busy

    def hear_all(self):
        """All there is between the front end and the workers arrives."""
        busy = False
        for worker in list(self.to_worker):
            while self.to_worker[worker]:
                self.deliver_front(worker)
                busy = True
        for worker in list(self.to_front):
            while self.to_front[worker]:
                self.hear(worker)
                busy = True
        return busy

    def check(self):
        for sim in self.live.values():
            sim.check()

    def drain(self, limit=1_000):
        """The network is whole again and time passes: every request gets its outcome, every pool its pages."""
        for name in self.epochs:
            worker = f"{name}.{self.epochs[name]}"
            if worker not in self.live:
                self.restart(name)
        for _ in range(limit):
            busy = self.calm()
            if not busy and all(ask.outcome for ask in self.asks.values()) and all(s.idle for s in self.live.values()):
                break
            if not busy:
                self.clock.advance(1.0)
        else:
            raise AssertionError(f"hung: {self.asks} {[(s.giving.held(), s.taking.held()) for s in self.live.values()]}")
        self.check()
        for sim in self.live.values():
            assert sim.at_baseline, (sim.name, sim.pool.counts(), sim.giving.held(), sim.taking.held())
        assert all(ask.outcome for ask in self.asks.values())
