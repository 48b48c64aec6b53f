"""What is deployed on what: budgets, places and the defaults that follow from them."""

import pytest

from disagg.cluster import limits
from disagg.config import SLO, Budget, Deployment, EngineSpec
from disagg.errors import BudgetError, InputError
from disagg.model.spec import SEED
from disagg.transfer.cuda_driver import CudaError


def places(deploy, budget):
    workers = Deployment.parse(deploy, Budget.parse(budget, (0, 1, 2, 3))).workers
    return [(worker.name, worker.place, worker.shares) for worker in workers]


@pytest.mark.parametrize("text", ["cpu:2", "cuda:0", "cuda:0,1", "cuda:3,1"])
def test_a_budget_reads_as_it_is_written(text):
    """Printed in a report, a budget can be given again; GPUs keep their order."""
    assert str(Budget.parse(text, (0, 1, 2, 3))) == text


@pytest.mark.parametrize(("text", "says"), [
    ("cuda:", "not understood"), ("cuda", "not understood"), ("cuda:0,", "not understood"), ("gpu:0", "not understood"),
    ("cuda:0,0", "twice"), ("cpu:9", "9 core"),
])  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(text, says):
    """The sentence says what is wrong with it."""
    with pytest.raises(BudgetError, match=says):
        Budget.parse(text, (0, 1, 2, 3))


def test_workers_are_dealt_over_gpus():
    """One each while they last; more workers share, evenly, and the deployment says that they do."""
    assert places("1P1D", "cuda:0,1") == [("P0", "GPU 0", 1), ("D0", "GPU 1", 1)]
    assert places("2C", "cuda:5") == [("C0", "GPU 5", 2), ("C1", "GPU 5", 2)]
    assert places("3P1D", "cuda:0,1") == [
        ("P0", "GPU 0", 2),
        ("P1", "GPU 1", 2),
        ("P2", "GPU 0", 2),
        ("D0", "GPU 1", 2),
    ]
    assert Deployment.parse("2C", Budget.parse("cuda:0", ())).oversubscribed
    assert places("1C", "cpu:2") == [("C0", "core 0+1", 1)]


def test_a_worker_takes_one_gpu():
    """Fewer workers than GPUs would leave some of the budget idle: refused, unlike cores, which a worker can share."""
    with pytest.raises(BudgetError, match="at least as many workers"):
        Deployment.parse("1C", Budget.parse("cuda:0,1", ()))


def test_what_is_not_given_follows_from_the_devices():
    """GPUs have other defaults than cores; what is given holds on both, and None is not given."""
    assert EngineSpec.on("cpu") == EngineSpec()
    on_gpus = EngineSpec.on("cuda", dtype=None, max_running=7)
    assert (on_gpus.dtype, on_gpus.kv_bytes, on_gpus.max_running) == ("bfloat16", 0, 7)
    assert EngineSpec.on("cuda", dtype="float16").dtype == "float16"
    assert on_gpus.max_mixed_tokens < on_gpus.max_batch_tokens
    assert EngineSpec.on("cuda", max_batch_tokens=4096).max_mixed_tokens is None  # the number given is for every step
    with pytest.raises(InputError, match=r"max_mixed_tokens \(512\) must be at least max_running \(2000\)"):
        EngineSpec.on("cuda", max_running=2000)
    with pytest.raises(InputError, match="gpu_memory"):
        EngineSpec.on("cuda", gpu_memory=1.5)


def test_kv_memory_is_split_where_it_is_given_and_left_to_the_worker_where_not():
    """Pages are counted in the dtype they have there: float32 on cores whatever the weights, the weights' on GPUs."""
    two_gpus, cores = (Deployment.parse("2C", Budget.parse(text, (0, 1))) for text in ("cuda:0,1", "cpu:2"))
    half = EngineSpec.on("cuda", kv_bytes=1 << 30)
    assert limits.pages_per_worker(EngineSpec.on("cuda"), SEED, two_gpus) == 0
    assert limits.pages_per_worker(half, SEED, two_gpus) == 2 * limits.pages_per_worker(half, SEED, cores)
    with pytest.raises(InputError, match="0 page"):
        limits.pages_per_worker(EngineSpec(kv_bytes=0), SEED, cores)


class Driver:
    num_devices = 2


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    """The first thing a deployment checks, so that the caller reads a sentence and not a driver's code."""
    monkeypatch.setattr("disagg.transfer.cuda_driver.driver", Driver)
    limits.check_devices(Budget("cuda", (1, 0)))
    with pytest.raises(BudgetError, match="names GPU 2 and this process sees 2: use 0 to 1"):
        limits.check_devices(Budget("cuda", (0, 2)))


def test_a_machine_without_a_driver_is_the_callers_to_mend(monkeypatch):
    """Exit code 2, as for every budget that cannot be."""

    def no_driver():
        raise CudaError("No CUDA driver.")

    monkeypatch.setattr("disagg.transfer.cuda_driver.driver", no_driver)
    with pytest.raises(BudgetError, match="cannot be used here: No CUDA driver"):
        limits.check_devices(Budget("cuda", (0,)))


def test_limits_are_read_in_seconds():
    """Milliseconds, seconds and bare numbers; what is not named is no limit."""
    assert SLO.parse("ttft=200ms, tpot=0.05") == SLO(ttft_s=0.2, tpot_s=0.05)
    assert SLO.parse("e2e=3s") == SLO(e2e_s=3.0)


@pytest.mark.parametrize(("text", "says"), [
    ("", "not understood"), (",", "not understood"), ("ttft=1,", "not understood"), ("itl=1", "not understood"),
    ("ttft=-1", "not understood"), ("ttft=0", "above 0"), ("tpot=0.0ms", "above 0"), ("ttft=1,ttft=2", "ttft twice"),
    ("ttft=200,tpot=50ms", "write 200ms or 200s"),
])  # fmt: skip
def test_limits_that_say_nothing_are_refused(text, says):
    """No limit at all, one that nothing can meet, or two of a kind: the sentence says which."""
    with pytest.raises(InputError, match=says):
        SLO.parse(text)


@pytest.mark.parametrize(
    ("deploy", "budget", "restart", "expected"),
    [
        ("1P1D", "cpu:2", False, True),
        ("1P1D", "cpu:4", False, False),  # half of these cores have the other memory nearer
        ("1P1D", "cpu:4", True, True),
        ("1C", "cpu:2", False, False),
        ("1C", "cpu:2", True, True),
        ("1P1D", "cuda:0,1", True, False),
    ],
)
def test_workers_share_weights_where_that_costs_none_its_speed(tmp_path, deploy, budget, restart, expected):
    """Forked on cores near the same memory, or when a restart must be quick; never on GPUs."""
    for core in range(4):
        (tmp_path / f"node{core // 2}" / f"cpu{core}").mkdir(parents=True)
    deployment = Deployment.parse(deploy, Budget.parse(budget, (0, 1, 2, 3)))

    assert limits.forked(deployment, restart, nodes=tmp_path) == expected
    if "cuda" not in budget and len(deployment.workers) > 1:
        assert limits.forked(deployment, restart, nodes=tmp_path / "not told")
