import msgspec
import numpy as np
import pytest

from disagg.errors import InputError, RequestError
from disagg.workload.arrivals import Arrivals
from disagg.workload.lengths import Lengths
from disagg.workload.workload import (
    Limits,
    Shape,
    Workload,
    cut,
    one_at_a_time,
    open_loop,
    write_workloads,
)

LIMITS = Limits(vocab_size=10_000, max_len=2048)


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [(Arrivals("poisson", 5.0), 1.0), (Arrivals("gamma", 5.0, 2.0), 2.0), (Arrivals("constant", 5.0, 0.0), 0.0)],
)
def test_rate_and_dispersion_are_what_was_asked(arrivals, cv):
    """20,000 s at 5 requests/s: rate within 3 %, coefficient of variation of the gaps within 5 %."""
    times = np.array(arrivals.until(20_000, np.random.default_rng(1)))
    gaps = np.diff(times)
    assert len(times) / 20_000 == pytest.approx(5.0, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)
    assert times[-1] < 20_000
    assert (gaps >= 0).all()


def test_counts_of_poisson_arrivals_vary_as_poisson():
    """Nothing is rescaled to fit: the number in 1 s has a variance equal to its mean (index of dispersion 1)."""
    times = Arrivals("poisson", 5.0).until(20_000, np.random.default_rng(2))
    counts = np.histogram(times, bins=20_000, range=(0, 20_000))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.05)


def test_no_gap_is_cut():
    """Among 100,000 exponential gaps some exceed ten means; a generator that truncates has none."""
    times = Arrivals("poisson", 1.0).until(100_000, np.random.default_rng(3))
    assert np.diff(times).max() > 10


def test_parse_and_its_refusals():
    """The three processes have one spelling each, and anything else says what to write."""
    assert Arrivals.parse("gamma:2", 3.0) == Arrivals("gamma", 3.0, 2.0)
    assert Arrivals.parse("constant", 3.0).cv == 0
    for bad in ("possion", "gamma", "gamma:0", "gamma:-1"):
        with pytest.raises(InputError):
            Arrivals.parse(bad, 1.0)
    with pytest.raises(InputError, match="above 0"):
        Arrivals.parse("poisson", 0.0)


def test_lengths():
    """Bounds are included; a lognormal keeps the mean and spread of the counts themselves."""
    rng = np.random.default_rng(4)
    uniform = [Lengths.parse("10:99").draw(rng) for _ in range(5000)]
    assert (min(uniform), max(uniform)) == (10, 99)
    assert Lengths.parse("512").draw(rng) == 512
    free = np.array([Lengths.parse("lognormal:300:0.8").draw(rng) for _ in range(40_000)])
    assert free.mean() == pytest.approx(300, rel=0.03)
    assert free.std() / free.mean() == pytest.approx(0.8, rel=0.05)
    for text in ("512", "10:99", "lognormal:300:0.8"):
        assert str(Lengths.parse(text)) == text
    for bad in ("0", "9:3", "ten", "lognormal:0:1", "lognormal:5"):
        with pytest.raises(InputError):
            Lengths.parse(bad)


def test_the_original_experiment():
    """20 requests, prompts of 10 to 99, outputs of 5 to 49, ids below 10,000; the same in every process and year."""
    workload = one_at_a_time(Shape(), 20, 42, LIMITS)
    assert len(workload.rows) == 20
    assert all(10 <= len(row.prompt) <= 99 and 5 <= row.max_tokens <= 49 for row in workload.rows)
    assert all(0 <= token < 10_000 for row in workload.rows for token in row.prompt)
    assert workload == one_at_a_time(Shape(), 20, 42, LIMITS)
    first = workload.rows[0]
    assert (len(first.prompt), first.max_tokens, first.prompt[:3]) == (18, 39, (6545, 4388, 4330))


def test_same_seed_same_file(tmp_path):
    """Saved and read back, a workload is the one that was drawn; another seed is another."""
    drawn = [open_loop(Shape(), Arrivals("poisson", 4.0), 10, seed, LIMITS) for seed in (1, 1, 2)]
    for name, workload in zip("abc", drawn, strict=True):
        write_workloads(tmp_path / name, [workload])
    files = [(tmp_path / name).read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert msgspec.json.decode(files[0], type=Workload) == drawn[0]


def test_special_ids_are_avoided():
    """An end-of-sequence id never lies in a prompt, even in a tiny vocabulary."""
    limits = Limits(vocab_size=4, max_len=2048, avoid=frozenset({0, 2}))
    assert set(limits.ids(500, np.random.default_rng(0))) == {1, 3}


def test_what_cannot_fit_is_refused_or_cut_and_said():
    """Bounded lengths beyond the context are the caller's error; unbounded ones are cut, and a note counts them."""
    small = Limits(vocab_size=100, max_len=64)
    with pytest.raises(RequestError, match="99"):
        one_at_a_time(Shape(), 5, 1, small)
    shape = Shape(Lengths.parse("lognormal:50:1"), Lengths.parse("10"))
    workload = one_at_a_time(shape, 200, 1, small)
    assert all(len(row.prompt) + row.max_tokens <= 64 for row in workload.rows)
    assert workload.notes[0].key == "cut"
    assert 0 < workload.notes[0].values["num"] < 200


def test_cut():
    """The output keeps up to half of the context, the prompt the rest."""
    assert cut(10, 10, 64) == (10, 10)
    assert cut(100, 10, 64) == (54, 10)
    assert cut(100, 100, 64) == (32, 32)


def test_no_arrival_is_an_error():
    """A block in which nothing happens cannot be measured."""
    with pytest.raises(InputError, match="longer --duration"):
        open_loop(Shape(), Arrivals("poisson", 0.001), 1, 1, LIMITS)
