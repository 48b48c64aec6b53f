"""A small world for the hand-off: workers (handoff_sim.py), the network between them, a front end that knows the truth.

Between the workers the network may delay, lose, double and reorder anything. Between front end and worker messages
keep their order and arrive, late perhaps, as long as both live: that is what the front end is built on.
"""

from dataclasses import dataclass, field

from handoff_sim import Sim, fault_free

from disagg.clock import ManualClock
from disagg.cluster import messages as m
from disagg.request import FinishReason, SamplingParams

MAX_ATTEMPTS = 6


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
        self.taken = set()  # hand-offs whose request went on at its decode worker
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
        skew = {"offset": -1000.0 * number, "clock_name": name} if self.skewed else {}
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

    def arrivals(self, worker):
        """All that is under way to a worker, the front end's messages first."""
        found, self.to_worker[worker] = self.to_worker[worker], []
        for link in [link for link in self.links if link[1] == worker]:
            found += [m.decode(m.encode(message)) for message in self.links.pop(link)]
        return found

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
                if ask.owner in ("", message.worker):  # else it goes on there
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
                # its first token may have died with the prefill worker, although the others are here
                parts = {ask.owner} if ask.owner and len(ask.tokens) > ask.known else {*ask.route}
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
            held = [(sim.name, sim.giving.held(), sim.taking.held()) for sim in self.live.values()]
            raise AssertionError(f"hung: {self.asks} {held}")
        self.check()
        for sim in self.live.values():
            assert sim.at_baseline, (sim.name, sim.pool.counts(), sim.giving.held(), sim.taking.held())
        assert all(ask.outcome for ask in self.asks.values())
