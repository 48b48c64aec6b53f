"""Real processes, real sockets, real shared memory, on the `seed` model: what must hold of a whole deployment."""

import os
import signal
import subprocess
import sys
import time

import pytest
from leftovers import nothing_left

from disagg import LLM, SamplingParams
from disagg.cluster.cluster import Cluster
from disagg.config import Budget, Deployment, EngineSpec
from disagg.errors import BudgetError, InputError, RequestError, WorkerLost

CORES = tuple(sorted(os.sched_getaffinity(0)))
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LENGTHS = (1, 15, 16, 17, 40, 99, 150, 64)
PROMPTS = [[(i * 37 + j * 11) % 10_000 for j in range(length)] for i, length in enumerate(LENGTHS)]

two_cores = pytest.mark.skipif(len(CORES) < 2, reason="this machine lends one core; deployments of two need two")


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_all():
    """The deployments that tests share leave no process, folder or shared memory."""
    with nothing_left():
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(nothing_left_by_all):
    """Neither does any test, however it ends."""
    with nothing_left():
        yield


@pytest.fixture(scope="module")
def single(nothing_left_by_all):
    """One colocated worker with room for everything, for all tests that only ask."""
    with LLM("seed", deploy="1C", budget="cpu:1") as llm:
        yield llm


@pytest.fixture(scope="module")
def pair(nothing_left_by_all):
    """Two workers with small chunks, likewise."""
    with LLM("seed", deploy="1P1D", budget="cpu:2", max_batch_tokens=24) as llm:
        yield llm


def wait_until(condition, cluster=None, limit_s=10.0):
    """Polls real processes: they have no clock to inject."""
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        if cluster is not None:
            cluster.poll(0.01)


def assert_idle(cluster):
    """Every page of every worker is free (or cached) and nobody holds any."""

    def idle():
        return all(report.held == 0 and not report.holders for report in cluster.audit())

    wait_until(idle)
    assert all(report.free + report.cached == report.total for report in cluster.audit())


@pytest.fixture(scope="module")
def reference(single):
    """Greedy tokens of one colocated worker with room for everything."""
    return [done.token_ids for done in single.generate(PROMPTS, GREEDY)]


@two_cores
@pytest.mark.parametrize(
    ("deploy", "options"),
    [
        ("2C", {}),
        ("1P1D", {}),
        ("1P1D", {"prefix_caching": True, "max_batch_tokens": 48}),
        pytest.param("1P1D", {"kv_bytes": 2 * 14 * 393_216, "max_batch_tokens": 32}, marks=pytest.mark.alone),
        ("2P2D", {"chunked_prefill": False}),
        ("1C", {"kv_bytes": 14 * 393_216, "max_batch_tokens": 32}),
    ],
)
def test_every_deployment_gives_the_same_tokens(reference, deploy, options):
    """Colocated, disaggregated, few pages (preemption), shared prefixes: greedy tokens are equal."""
    with LLM("seed", deploy=deploy, budget="cpu:2", **options) as llm:
        outputs = assert_twice(llm, reference)
    if deploy == "1C" and "kv_bytes" in options:  # with two workers it depends on which is ahead
        assert sum(done.record.num_preemptions for done in outputs) > 0


@two_cores
def test_small_chunks_give_the_same_tokens(reference, pair):
    """Prompts handed over in pieces that begin and end inside pages: greedy tokens are equal."""
    assert_twice(pair, reference)


def assert_twice(llm, expected):
    """Two rounds give these tokens and leave no page held."""
    rounds = [llm.generate(PROMPTS, GREEDY) for _ in range(2)]
    assert_idle(llm.cluster)
    for outputs in rounds:
        assert [done.token_ids for done in outputs] == expected
        assert {done.finish_reason for done in outputs} == {"length"}
    return [done for outputs in rounds for done in outputs]


def timed(cluster, prompt):
    """One request by the caller's own clock: seconds to its first token and to its last, and its Record."""
    sent_at, at, record = time.monotonic(), [], None
    cluster.submit(prompt, GREEDY)
    while record is None:
        for update in cluster.poll(1.0):
            at += [time.monotonic()] * len(update.tokens)
            record = update.record or record
    return at[0] - sent_at, at[-1] - sent_at, record


@two_cores
@pytest.mark.alone
@pytest.mark.parametrize("deployment", ["single", "pair"])
def test_parts_of_ttft_and_e2e_sum_to_what_the_caller_measured(deployment, single, pair):
    """Within 1 ms by a clock outside; a busy machine may come between the two clocks now and then, not usually."""
    cluster = {"single": single, "pair": pair}[deployment].cluster
    measured = [timed(cluster, prompt) for prompt in PROMPTS * 2]

    first = sorted(ttft_s - sum(record.ttft_parts().values()) for ttft_s, _, record in measured)
    last = sorted(e2e_s - sum(record.e2e_parts().values()) for _, e2e_s, record in measured)
    assert first[0] >= 0
    assert last[0] >= 0
    assert first[len(first) // 2] < 1e-3
    assert last[len(last) // 2] < 1e-3


@two_cores
def test_a_timeline_has_every_moment_in_order(pair):
    """Nothing is missing, and nothing has to be clamped for the parts to sum, but for copies beside the prefill."""
    records = [done.record for done in pair.generate(PROMPTS, GREEDY)]

    for record in records:
        assert (record.prefill_worker, record.decode_worker) == ("P0.0", "D0.0")
        assert len(record.token_at) == record.output_len == 24
        assert record.token_at == sorted(record.token_at)
        pages = -(-record.prompt_len // 16)
        assert record.handoff_bytes == pages * 393_216
        assert record.scheduled_at <= record.sent_at <= record.queued_at <= record.prefill_start_at
        assert record.prefill_start_at < record.prefill_end_at <= record.token_at[0]
        assert record.prefill_end_at < record.handoff_end_at
        assert record.handoff_start_at <= record.handoff_end_at <= record.decode_start_at < record.token_at[-1]
        assert sum(span.amount for span in record.spans if span.kind == "prefill") == record.prompt_len


@two_cores
def test_chunks_travel_while_the_prompt_is_still_computed(pair):
    """With small chunks the first copy of a long prompt starts before its prefill ends."""
    (done,) = pair.generate([list(range(1000))], GREEDY)

    assert done.record.handoff_start_at < done.record.prefill_end_at


@two_cores
def test_a_request_that_ends_with_its_first_token_hands_nothing_over(pair):
    """max_tokens 1: one token, no decode, and the decode worker's reservation is gone."""
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    outputs = pair.generate(PROMPTS, one)
    assert_idle(pair.cluster)

    assert [len(done.token_ids) for done in outputs] == [1] * len(PROMPTS)


@two_cores
def test_a_seed_gives_the_same_tokens_everywhere(single, pair):
    """Sampling depends on seed and prompt, not on batch, worker or hand-off."""
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=7 + i, max_tokens=12) for i in range(len(PROMPTS))]
    seen = []
    for llm in (single, pair):
        seen.append([done.token_ids for done in llm.generate(PROMPTS, params)])
        by_itself = llm.generate(PROMPTS[3:4], params[3])[0].token_ids

    assert seen[0] == seen[1]
    assert by_itself == seen[1][3]


@two_cores
def test_aborts_at_any_moment_free_every_page(pair):
    """A request aborted while queued, prefilling, handed over or decoding leaves nothing on either worker."""
    cluster = pair.cluster
    for delay in range(12):
        ids = [cluster.submit(list(range(200)), SamplingParams(temperature=0, max_tokens=50)) for _ in range(3)]
        for _ in range(delay):
            cluster.poll(0.004)
        records = [cluster.abort(request_id) for request_id in ids]
        assert {record.finish_reason for record in records if record} <= {"abort"}
    assert cluster.counters()["live"] == 0
    assert_idle(cluster)


@two_cores
@pytest.mark.parametrize("victim", ["P0.0", "D0.0"])
def test_a_killed_worker_ends_the_run_with_a_sentence(victim):
    """kill -9 in the middle of work: an error that names the worker within a second, no hang, nothing left."""
    deployment = Deployment.parse("1P1D", Budget.parse("cpu:2", CORES))
    with Cluster(deployment, EngineSpec()) as cluster:
        for prompt in PROMPTS:
            cluster.submit(prompt, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        wait_until(lambda: any(update.tokens for update in cluster.poll(0.05)))
        (pid,) = [w.process.pid for w in cluster.workers() if w.address == victim]
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(WorkerLost, match=f"{victim}.*SIGKILL"):
            wait_until(lambda: False, cluster)
        assert time.monotonic() - started < 1.0


@two_cores
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_front_end_that_is_stopped_takes_everything_with_it(number):
    """Ctrl-C, a termination and even kill -9 of the front end leave no worker and no folder (see the fixture)."""
    code = (
        "from disagg.cli.main import main;"
        "main(['generate', '--model', 'seed', '--ids', '1,2,3', '--deploy', '1P1D', '--budget', 'cpu:2',"
        " '--max-tokens', '5000', '--ignore-eos'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(8)  # it streams
    process.send_signal(number)
    process.communicate(timeout=20)

    assert process.returncode == (-9 if number == signal.SIGKILL else 130)


@two_cores
def test_bad_requests_are_refused_before_anything_runs(monkeypatch):
    """Too long, out of the vocabulary, not fitting into memory, no tokenizer: one sentence each, nothing started."""
    with LLM("seed", deploy="1C", budget="cpu:1", max_len=256, kv_bytes=10 * 393_216) as llm:
        for prompt, params, words in (
            ([1] * 256, GREEDY, "context"),
            ([], GREEDY, "context"),
            ([10_000], GREEDY, "vocabulary"),
            ([-1], GREEDY, "vocabulary"),
            ([1] * 150, GREEDY, "kv-memory"),
            ("text", GREEDY, "tokenizer"),
            ([1], SamplingParams(stop=("x",)), "tokenizer"),
        ):
            with pytest.raises(RequestError, match=words):
                llm.generate([[1, 2, 3], prompt], params)
        monkeypatch.setattr("disagg.llm._MOST_LIVE", 1)  # the bad one would be sent when the first had ended
        with pytest.raises(RequestError, match="context"):
            llm.generate([[1, 2, 3], [1] * 256], GREEDY)
        assert llm.cluster.counters()["started"] == 0
        assert_idle(llm.cluster)
        assert len(llm.generate([[1, 2, 3]], GREEDY)[0].token_ids) == 24


def test_what_cannot_start_says_so():
    """Unknown model, impossible budget or deployment, unknown option, too little memory: a sentence, no process."""
    for arguments, words in (
        ({"model": "sead"}, "seed"),
        ({"model": "seed", "budget": "cpu:1000"}, "cpu:1000"),
        ({"model": "seed", "budget": "gpu"}, "cpu:N"),
        ({"model": "seed", "deploy": "2X"}, "1P1D"),
        ({"model": "seed", "page_sise": 16}, "page_size"),
        ({"model": "seed", "kv_bytes": 1000}, "kv-memory"),
        ({"model": "seed", "max_len": 10**9}, "max_len"),
    ):
        with pytest.raises((InputError, BudgetError), match=words):
            LLM(**arguments)


def test_a_temporary_folder_with_a_long_path_is_no_obstacle(tmp_path, monkeypatch):
    """Paths of sockets are short: where the usual place for temporary files is too deep, another one is used."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with LLM("seed", deploy="1C", budget="cpu:1") as llm:
        assert len(llm.generate([[1, 2, 3]], GREEDY)[0].token_ids) == 24
    assert list(deep.iterdir()) == []


def test_a_start_that_fails_early_leaves_nothing(monkeypatch):
    """Also when the front end's own mailbox cannot be made: the fixture looks for what is left."""

    def broken(*_):
        raise OSError("no sockets today")

    monkeypatch.setattr("disagg.cluster.cluster.Mailbox", broken)
    with pytest.raises(OSError, match="no sockets"):
        LLM("seed", deploy="1C", budget="cpu:1")
