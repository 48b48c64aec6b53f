"""What must hold when workers die, fall silent or run out of memory. Numbers: the scenarios of docs/handoff.md.

Real processes on the `seed` model. Deployments are shared by tests: one that has recovered is as good as a new one,
and that is what most tests here end by showing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from leftovers import nothing_left, processes

from disagg import SamplingParams
from disagg.cluster.cluster import MOST_ATTEMPTS, Cluster
from disagg.cluster.router import Route
from disagg.config import Budget, Deployment, EngineSpec
from disagg.errors import InputError, Overloaded

CORES = tuple(sorted(os.sched_getaffinity(0)))
PAGE_BYTES = 393_216
PAGES = 72  # per worker
LEASE_S = 1.0
SILENCE_S = 5.0
LONG = [(i * 37) % 10_000 for i in range(1000)]  # some thirty chunks of CHUNK: time to interfere
CHUNK = 32

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="this machine lends one core; deployments of two need two")


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind():
    """After all that happens here, no process and no folder is left."""
    with nothing_left():
        yield


def start(deploy, lease_s=LEASE_S, max_wait_s=5.0, **options):
    engine = EngineSpec(kv_bytes=int(deploy[0]) * 2 * PAGES * PAGE_BYTES, max_batch_tokens=CHUNK, checksum=True)
    deployment = Deployment.parse(deploy, Budget.parse("cpu:2", CORES))
    return Cluster(
        deployment, engine, supervise=True, lease_s=lease_s, max_wait_s=max_wait_s, silence_s=SILENCE_S, **options
    )


@pytest.fixture(scope="module")
def pair():
    with start("1P1D", max_outstanding=60) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def quad():
    with start("2P2D") as cluster:
        yield cluster


def wait_until(condition, cluster=None, limit_s=20.0):
    """Polls real processes: they have no clock to inject. Returns what the cluster said meanwhile."""
    until, updates = time.monotonic() + limit_s, []
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        if cluster is None:
            time.sleep(0.02)
        else:
            updates += cluster.poll(0.01)
    return updates


class Client:
    """Sends requests and keeps what each was given, token by token."""

    def __init__(self, cluster):
        self.cluster, self.tokens, self.records = cluster, {}, {}

    def send(self, prompt, max_tokens, **options):
        request_id = self.cluster.submit(prompt, greedy(max_tokens), **options)
        self.tokens[request_id] = []
        return request_id

    def take(self, timeout_s=0.01):
        for update in self.cluster.poll(timeout_s):
            self.tokens[update.request_id] += update.tokens
            if update.record is not None:
                self.records[update.request_id] = update.record

    def until(self, condition, limit_s=20.0):
        until = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < until, "did not happen in time"
            self.take()

    def finish(self, limit_s=40.0):
        """The records, in order of sending, once all have ended. Nobody had a token twice."""
        self.until(lambda: len(self.records) == len(self.tokens), limit_s)
        for request_id, record in self.records.items():
            assert self.tokens[request_id] == record.tokens
        return [self.records[request_id] for request_id in self.tokens]


def worker(cluster, name):
    (found,) = [worker for worker in cluster.workers() if worker.name == name]
    return found


def recovered(cluster):
    """All workers are up, every page is free, the books are right and the counters add up."""

    def idle():
        if not all(worker.up for worker in cluster.workers()):
            return False
        reports = cluster.audit()
        assert not [report.fault for report in reports if report.fault]
        return len(reports) == len(cluster.workers()) and all(
            report.free + report.cached == report.total and not report.holders for report in reports
        )

    wait_until(idle, cluster)
    counts = cluster.counters()
    assert counts["live"] == 0
    assert counts["started"] == counts["done"] + counts["failed"] + counts["aborted"]


def truth(cluster, prompt, max_tokens, name):
    """What one worker makes of the prompt by itself."""
    client = Client(cluster)
    client.send(prompt, max_tokens, route=Route(name, name))
    return client.finish()[0].tokens


def folders():
    """Those of the deployments that run, or have left theirs behind."""
    return set(Path(os.environ["TMPDIR"]).glob("disagg-*"))


def held_as(cluster, side, state):
    return any(h.side == side and h.state == state for report in cluster.audit() for h in report.holders)


@pytest.mark.parametrize(
    ("victim", "reading"), [("D0", False), ("D0", True), ("P0", False), ("P0", True)], ids=["1", "2", "3", "4"]
)
def test_a_worker_may_die_at_any_point_of_a_handoff(pair, victim, reading):
    """1 to 4: either side dies, before the read begins or in its middle: the same tokens, none twice, no page lost."""
    prompt = LONG if reading else LONG[:100]
    expected = truth(pair, prompt, 8, "P0")
    if not reading:
        pair.withhold("D0", 0.5 if victim == "P0" else 30)  # D cannot reserve, so it cannot read
    client = Client(pair)
    request_id = client.send(prompt, 8)
    if reading:
        client.until(lambda: held_as(pair, "decode", "filling"))
    else:
        client.until(lambda: client.tokens[request_id])
    retried = pair.counters()["retried"]
    worker(pair, victim).process.send_signal(signal.SIGKILL)
    (record,) = client.finish()

    assert record.ok
    assert record.tokens == expected
    assert pair.counters()["retried"] == retried + 1
    recovered(pair)


def test_a_restarted_worker_is_not_taken_for_the_old_one(pair):
    """5: after a restart the new epoch hands over at once, and the peer that knew the old one takes it."""
    old = worker(pair, "P0")
    old.process.send_signal(signal.SIGKILL)
    wait_until(lambda: worker(pair, "P0").up and worker(pair, "P0").address != old.address, pair)
    client = Client(pair)
    client.send(LONG[:100], 4)
    (record,) = client.finish()

    assert record.prefill_worker == worker(pair, "P0").address != old.address
    assert record.decode_worker == worker(pair, "D0").address
    assert record.handoff_bytes == 7 * PAGE_BYTES


@pytest.mark.alone
@pytest.mark.parametrize(("victim", "other"), [("P0", "D0"), ("D0", "P0")])
def test_death_is_known_at_once_and_the_other_phase_stands_in(pair, victim, other):
    """A killed worker is known to be dead within a second; until it is back the one of the other phase does both."""
    died_at = time.monotonic()
    worker(pair, victim).process.send_signal(signal.SIGKILL)
    wait_until(lambda: not worker(pair, victim).up, pair)
    assert time.monotonic() - died_at < 1.0
    client = Client(pair)
    client.send(LONG[:40], 4)
    (record,) = client.finish()

    assert record.prefill_worker == record.decode_worker == worker(pair, other).address
    recovered(pair)


def test_a_request_that_outlives_no_worker_is_given_up(pair):
    """A request whose workers die again and again ends with one clear error after a bounded number of attempts."""
    client = Client(pair)
    request_id = client.send(LONG, 100)
    while request_id not in client.records:
        victims = {status.address: status.process for status in pair.workers() if status.up}
        for process in victims.values():
            process.send_signal(signal.SIGKILL)
        client.until(lambda victims=victims: not victims.keys() & {status.address for status in pair.workers()})
        client.until(lambda: request_id in client.records or held_as(pair, "scheduler", "running"))
    (record,) = client.finish()

    assert record.finish_reason == "error"
    assert f"after {MOST_ATTEMPTS} attempts" in record.error
    assert "SIGKILL" in record.error
    recovered(pair)


def test_abort_storms_leave_nothing(pair):
    """16: many requests cancelled at once, again and again, at different stages: every page comes back."""
    for delay_s in (0.0, 0.05, 0.3):
        ids = [pair.submit(LONG[:200], greedy(50)) for _ in range(50)]
        until = time.monotonic() + delay_s
        while time.monotonic() < until:
            pair.poll(0.01)
        assert {record.finish_reason for record in map(pair.abort, ids) if record} <= {"abort"}
    recovered(pair)


def test_cleanup_runs_while_no_work_can(pair):
    """17: with every page taken nothing can run, and what is aborted meanwhile is gone all the same."""
    for name in ("P0", "D0"):
        pair.withhold(name, 1.0)
    client = Client(pair)
    ids = [client.send(LONG[:200], 4) for _ in range(8)]
    for request_id in ids[:4]:
        client.records[request_id] = pair.abort(request_id)
    wait_until(lambda: {h.side for r in pair.audit() for h in r.holders} >= {"withheld"}, pair)
    records = client.finish()

    assert [record.finish_reason for record in records] == ["abort"] * 4 + ["length"] * 4
    recovered(pair)


@pytest.mark.alone
def test_too_little_memory_delays_and_never_deadlocks(pair):
    """18, 31: far more than the decode worker can hold: it preempts, prefill holds, and all end with their tokens."""
    expected = truth(pair, LONG[:60], 80, "P0")
    pair.withhold("D0", 1.0)  # so that its pool fills at once, however fast each worker is
    client = Client(pair)
    for _ in range(24):
        client.send(LONG[:60], 80)
    records = client.finish(limit_s=90)

    assert all(record.tokens == expected for record in records)
    assert sum(record.num_preemptions for record in records) > 0
    assert sum(record.handoff_bytes for record in records) > 0
    recovered(pair)


def test_more_than_the_limit_is_refused_with_a_time(pair):
    """Beyond the limit of outstanding requests the answer is "overloaded, retry after s", and nothing is queued."""
    ids = [pair.submit([1, 2, 3], greedy(200)) for _ in range(60)]
    with pytest.raises(Overloaded, match="retry after") as refused:
        pair.submit([1, 2, 3], greedy(200))
    assert refused.value.retry_after_s > 0
    for request_id in ids:
        pair.abort(request_id)
    recovered(pair)


def test_a_worker_that_is_asked_to_end_finishes_first(pair):
    """28: SIGTERM with pages nobody has read yet: they are read, then it ends and is replaced; nothing is retried."""
    old, before = worker(pair, "P0"), pair.counters()
    pair.withhold("D0", 1.0)
    client = Client(pair)
    request_id = client.send(LONG[:100], 8)
    client.until(lambda: client.tokens[request_id])
    old.process.send_signal(signal.SIGTERM)
    client.until(lambda: request_id in client.records)
    wait_until(lambda: worker(pair, "P0").up and worker(pair, "P0").address != old.address, pair)

    assert client.records[request_id].decode_worker == worker(pair, "D0").address
    assert pair.counters()["retried"] == before["retried"]
    assert pair.counters()["restarts"] == before["restarts"] + 1
    recovered(pair)


def test_unknown_workers_and_roles_are_refused(pair):
    """A name that no worker has: one sentence with the nearest one."""
    with pytest.raises(InputError, match="P0"):
        pair.set_role("P1", "both")


@pytest.mark.alone
def test_a_stopped_worker_that_wakes_up_disturbs_nobody(quad):
    """32: a decode worker is stopped for longer than its leases; its requests end elsewhere; what it says later is
    ignored."""
    expected = truth(quad, LONG, 8, "P0")
    client = Client(quad)
    for _ in range(4):
        client.send(LONG, 8)
    client.until(lambda: held_as(quad, "decode", "filling"))
    stopped = [worker(quad, "D0"), worker(quad, "D1")][0]
    stopped.process.send_signal(signal.SIGSTOP)
    before = time.monotonic()
    while time.monotonic() - before < 3 * LEASE_S:
        client.take()
    stopped.process.send_signal(signal.SIGCONT)
    records = client.finish()

    assert all(record.ok and record.tokens == expected for record in records)
    assert worker(quad, "D0").address == stopped.address
    recovered(quad)


def test_a_silent_worker_is_replaced(quad):
    """A worker that lives but says nothing for too long is killed, its requests end elsewhere, a successor comes."""
    expected = truth(quad, LONG[:64], 200, "P0")
    client = Client(quad)
    for _ in range(4):
        client.send(LONG[:64], 200)
    client.until(lambda: all(len(tokens) > 2 for tokens in client.tokens.values()))
    stopped = worker(quad, "D1")
    stopped.process.send_signal(signal.SIGSTOP)
    records = client.finish()
    client.until(lambda: worker(quad, "D1").up and worker(quad, "D1").address != stopped.address)

    assert all(record.tokens == expected for record in records)
    recovered(quad)


def test_workers_come_back_without_their_template(quad):
    """When the process that forks workers is dead too, a worker is started from scratch."""
    quad._supervisor._template._popen.kill()
    old = worker(quad, "P1")
    old.process.send_signal(signal.SIGKILL)
    wait_until(lambda: worker(quad, "P1").up and worker(quad, "P1").address != old.address, quad, limit_s=60)
    recovered(quad)


@pytest.mark.alone
def test_roles_change_under_load():
    """29: 2C becomes 1P1D and 2C again with transfers in flight: nothing dropped, repeated, retried or hung."""
    # patient: where another program has the cores, a hand-off that is given up would look like a wrong role
    with start("2C", lease_s=30.0, max_wait_s=30.0) as cluster:
        expected = truth(cluster, LONG[:150], 20, "C0")
        client, handed = Client(cluster), []
        for turn, roles in enumerate(
            (("prefill", "decode"), ("both", "both"), ("decode", "prefill"), ("both", "both"))
        ):
            for name, role in zip(("C0", "C1"), roles, strict=True):
                cluster.set_role(name, role)
            ids = [client.send(LONG[:150], 20) for _ in range(8)]
            client.until(lambda ids=ids: any(client.tokens[one] for one in ids))
            handed.append((turn, ids))
        client.finish()
        counts = cluster.counters()
        recovered(cluster)

    assert all(record.tokens == expected for record in client.records.values())
    assert counts["retried"] == counts["restarts"] == counts["failed"] == 0
    for turn, ids in handed:
        records = [client.records[one] for one in ids]
        apart = [record.prefill_worker != record.decode_worker for record in records]
        assert apart == [turn in (0, 2)] * len(ids)
        assert any(record.handoff_bytes for record in records) == (turn in (0, 2))


def test_workers_of_a_killed_front_end_are_gone():
    """33: the front end is the router; when it is killed nothing of a supervised deployment is left to expire."""
    code = "from disagg.cli.main import main; main(['chaos', '--requests', '100000', '--deploy', '1P1D'])"
    before = len(processes())
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(processes()) >= before + 4, limit_s=60)  # front end, template, two workers
    process.kill()
    process.wait()
    wait_until(lambda: len(processes()) == before)


def test_a_front_end_killed_while_it_starts_leaves_nothing():
    """33: before there is a worker to notice, the process that loads the model removes the folder."""
    code = "from disagg.cli.main import main; main(['chaos', '--deploy', '1P1D'])"
    before, known = len(processes()), folders()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(processes()) == before + 2 and folders() != known, limit_s=60)  # front end, template
    process.kill()
    process.wait()
    wait_until(lambda: len(processes()) == before, limit_s=60)
    assert folders() == known


def test_a_request_for_a_worker_that_was_replaced_meanwhile_ends_well():
    """Its only worker is asked to end: a request for that very worker waits, and the successor takes it."""
    with start("1C") as cluster:
        old = worker(cluster, "C0").address
        cluster.drain("C0")
        client = Client(cluster)
        client.send(LONG[:40], 4, route=Route("C0", "C0"))
        (record,) = client.finish()
        assert record.ok
        assert worker(cluster, "C0").address == record.prefill_worker != old


@pytest.mark.alone
def test_chaos_loses_nothing():
    """35, small: kills, stops, full pools and leaving clients under load: nothing hangs, leaks or differs."""
    command = ["chaos", "--requests", "150", "--fault-every", "25", "--seed", "3", "--budget", "cpu:2", "--json"]
    done = subprocess.run([sys.executable, "-m", "disagg", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)

    assert (outcome["hung"], outcome["leaked"], outcome["different"]) == (0, 0, 0)
    assert outcome["completed"] + outcome["failed"] + outcome["aborted"] == 150
    assert sum(outcome["faults"].values()) >= 5
    assert outcome["audits"] > 0
    assert outcome["retried"] > 0
