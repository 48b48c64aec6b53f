import io
import re

import msgspec
import pytest
from fake_cluster import FakeCluster
from rich.console import Console

from disagg.clock import ManualClock
from disagg.config import SLO, EngineSpec
from disagg.errors import BudgetError, InputError
from disagg.measure import stages
from disagg.measure.compare import compare, merge_note
from disagg.measure.guards import differences, run_guards
from disagg.measure.report import render
from disagg.measure.run import RECORDS, SUMMARY, WORKLOADS, Run, Settings, Trial, make_arms, read_run, write_run
from disagg.measure.summary import read_summary, summarize
from disagg.measure.tables import show
from disagg.measure.words import Words
from disagg.record import Record, read_records
from disagg.workload.lengths import Lengths
from disagg.workload.workload import Note, Shape, Workload

QUICK = Settings(repeats=3, rates=(20.0, 60.0), duration_s=2.0, requests=5, tune=False)


class _Silent:
    def __init__(self):
        self.stages = []

    def stage(self, text, total=1):
        self.stages.append([text, total, 0])

    def step(self):
        self.stages[-1][2] += 1


def _compare(folder, settings=QUICK, **options):
    """A whole comparison on fakes; returns run, summary and the clusters that were started.

    `options` go to every fake, `disagg_options` in it to the disaggregated ones only.
    """
    clock, started = ManualClock(), []
    apart = options.pop("disagg_options", {})

    def start(deployment, engine):
        more = apart if deployment.disaggregated else {}
        started.append(FakeCluster(deployment, engine, clock, **options, **more))
        return started[-1]

    run = Run(command="disagg compare", settings=settings, arms=make_arms(settings, (0, 1)), environment={})
    progress = _Silent()
    summary = compare(run, folder, start, clock, progress)
    assert all(done == total for _, total, done in progress.stages)
    return run, summary, started


def test_the_truth_comes_out(tmp_path):
    """Fakes with a hand-off of 3 ms and nothing else between them: every number is known, and found."""
    _, summary, started = _compare(tmp_path)
    part = summary["sequential"]
    arms = part["arms"]
    for arm, handoff in (("2C", 0.0), ("1P1D", 0.003)):
        assert arms[arm]["prefill_s"]["mean"] == pytest.approx(0.010)
        assert arms[arm]["handoff_s"]["mean"] == pytest.approx(handoff)
        assert arms[arm]["completed"] == 15
    first, _, _ = (tmp_path / WORKLOADS).read_bytes().partition(b"\n")
    rows = msgspec.json.decode(first, type=Workload).rows
    total = sum(0.010 + 0.002 * (row.max_tokens - 1) for row in rows) / 5
    assert arms["2C"]["total_s"]["mean"] == pytest.approx(total)
    assert part["relative_difference"]["estimate"] == pytest.approx(0.003 / total)
    assert part["handoff_share"] == pytest.approx(0.003 / (total + 0.003))
    assert part["verdict"]["kind"] == "worse"
    assert [each["rate"] for each in summary["concurrent"]] == [20.0, 60.0]
    for each in summary["concurrent"]:
        assert each["arms"]["2C"]["ttft_s"] == pytest.approx(each["arms"]["1P1D"]["ttft_s"])
        assert each["verdicts"]["ttft_s"]["kind"] == "equal"
        assert each["arms"]["2C"]["failed"] == 0
        assert each["void"] == []
    assert summary["void"] == []
    assert summary["capacity"][0]["rate"] == pytest.approx(100, rel=0.05)
    assert all(fake.closed for fake in started)


def test_summary_has_the_agreed_keys(tmp_path):
    """The keys that reports and other tools rely on."""
    _, summary, _ = _compare(tmp_path)
    stat = {"mean", "p50", "p90", "p99"}
    assert {"config", "environment", "sequential", "concurrent"} <= set(summary)
    arm = summary["sequential"]["arms"]["1P1D"]
    assert all(stat <= set(arm[key]) for key in ("total_s", "prefill_s", "decode_s", "handoff_s"))
    assert {"estimate", "low", "high"} <= set(summary["sequential"]["relative_difference"])
    assert summary["sequential"]["verdict"]["sentence"]
    for part in summary["concurrent"]:
        assert {"rate", "arms", "difference", "verdict"} <= set(part)
        for each in part["arms"].values():
            assert all(stat <= set(each[key]) for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s"))
            assert {"throughput_tok_s", "goodput", "completed", "failed"} <= set(each)


def test_every_arm_meets_the_same_requests_in_mixed_order(tmp_path):
    """Same arrivals and prompts in both arms of a repeat, other ones in another repeat; the order of arms changes."""
    run, _, _ = _compare(tmp_path, msgspec.structs.replace(QUICK, repeats=6))
    records = [record for record in read_records(tmp_path / RECORDS) if record.phase == "concurrent"]
    plans: dict[tuple, set] = {}
    for block in run.blocks[10:-2]:  # the sequential ones come first and last
        rows = [r for r in records if (r.arm, r.rate, r.repeat) == (block.arm, block.rate, block.repeat)]
        origin = rows[0].scheduled_at
        plan = tuple((row.prompt_len, row.max_tokens, round(row.scheduled_at - origin, 6)) for row in rows)
        plans.setdefault((block.rate, block.repeat), set()).add(plan)
    assert all(len(each) == 1 for each in plans.values())
    assert len({plan for each in plans.values() for plan in each}) == 12
    firsts = [block.arm for block in run.blocks[10:-2:2]]
    assert set(firsts) == {"2C", "1P1D"}
    assert run.blocks[-1].phase == "sequential"


def test_everything_is_rebuilt_from_the_folder(tmp_path):
    """`disagg report` needs records and run only: the same summary to the last digit."""
    _, summary, _ = _compare(tmp_path)
    (tmp_path / SUMMARY).unlink()
    assert read_summary(tmp_path) == summary
    assert msgspec.json.decode((tmp_path / SUMMARY).read_bytes()) == summary
    with pytest.raises(InputError, match="folder that compare has written"):
        read_summary(tmp_path / "nowhere")


def _printed(summary, folder, lang):
    console = Console(record=True, width=160, file=io.StringIO())
    show(summary, folder, console, lang)
    return console.export_text()


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_it_can_be_printed(tmp_path, lang):
    """The tables hold the published figures beside ours and end with verdict and folder, in both languages."""
    _, summary, _ = _compare(tmp_path)
    text = _printed(summary, tmp_path, lang)
    for expected in ("182.3", "156.7", "58.2", "124.1", "12.3", "-14.04%", "1P1D", str(tmp_path)):
        assert expected in text


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_figures_of_others_stand_beside_their_own_workload_only(tmp_path, lang):
    """Other lengths, other numbers: nothing published is printed or on the page."""
    other = msgspec.structs.replace(QUICK, shape=Shape(Lengths("fixed", 50), Lengths("fixed", 10)))
    _, summary, _ = _compare(tmp_path, other)
    text = _printed(summary, tmp_path, lang) + render(summary, {}, Words(lang))
    for published in ("182.3", "156.7", "14.04", "ublished", "已发表"):
        assert published not in text


def test_different_tokens_make_the_run_void(tmp_path):
    """Arms that do not give the same tokens did not do the same work: no verdict."""
    _, summary, _ = _compare(tmp_path, disagg_options={"wrong_tokens": True})
    assert summary["token_mismatches"]["1P1D"] > 15
    assert [reason["key"] for reason in summary["void"]] == ["tokens"]
    assert summary["overall"]["key"] == "overall_void"
    assert summary["sequential"]["why"] == []


def test_failures_make_their_part_void(tmp_path):
    """Errors are no result; the reason is shown. Requests past their deadline are a result: misses."""
    _, summary, _ = _compare(tmp_path, disagg_options={"failing": frozenset({3})})
    assert {reason["key"] for reason in summary["sequential"]["void"]} == {"failures"}
    assert "out of luck" in summary["concurrent"][0]["void"][0]["text"]


def test_a_missed_deadline_is_a_result(tmp_path):
    """An arm that cannot keep up has misses, not a void run."""
    _, summary, _ = _compare(tmp_path, disagg_options={"stuck": frozenset({20})})
    for part in summary["concurrent"]:
        assert part["void"] == []
        assert part["arms"]["1P1D"]["failed"] == 3
        assert part["arms"]["1P1D"]["goodput"]["share"] < 1


def test_a_late_client_makes_its_part_void(tmp_path):
    """When sending itself takes 40 ms, lateness is ours and the rate was not what was asked."""
    _, summary, _ = _compare(tmp_path, submit_s=0.040)
    assert summary["concurrent"][-1]["void"][0]["key"] == "late"
    assert summary["overall"]["key"] == "overall_void"


def _run(arms=("2C", "1P1D"), **settings):
    chosen = Settings(arms=arms, **settings)
    return Run(command="", settings=chosen, arms=make_arms(chosen, (0, 1)), environment={}, complete=True)


def _record(arm, repeat, seconds, index=0):
    return Record(
        request_id=f"{arm}{repeat}{index}",
        index=index,
        prompt_len=3,
        arm=arm,
        phase="sequential",
        repeat=repeat,
        finish_reason="length",
        token_at=[seconds / 2, seconds],
    )


def test_drift_between_first_and_last_repeat():
    """The same requests 40 % slower at the end: the machine changed, whatever the arms did."""
    steady = [_record("2C", repeat, 1.0) for repeat in range(3)]
    assert run_guards(steady, _run()) == []
    (broken,) = run_guards([*steady, _record("2C", 3, 1.4)], _run())
    assert (broken.key, broken.values["change"]) == ("drift", pytest.approx(0.4))


def _handing(num_without, of=40):
    records = [_record("1P1D", 0, 1.0, index) for index in range(of)]
    for record in records:
        record.output_len, record.handoff_bytes = 2, 0 if record.index < num_without else 100
    return records


def test_an_arm_that_did_not_disaggregate_is_noticed():
    """More than 5 % without a hand-off make the part void; fewer are stated; one-token outputs and 2C need none."""
    (broken,) = run_guards(_handing(3), _run())
    assert (broken.key, broken.phase, broken.values["num"], broken.values["of"]) == ("unsplit", "sequential", 3, 40)
    assert summarize(_handing(3), _run())["sequential"]["void"][0]["key"] == "unsplit"
    seldom = summarize(_handing(2), _run())
    assert seldom["sequential"]["void"] == []
    assert [note["key"] for note in seldom["notes"]] == ["unsplit"]
    fine = _handing(40)
    for record in fine[:20]:
        record.output_len = 1
    for record in fine[20:]:
        record.arm = "2C"
    assert run_guards(fine, _run()) == []


def test_latency_is_compared_over_what_both_completed():
    """Equal arms, of which one lost its slow request: no difference, where separate means would show a gain."""
    records = []
    for repeat in range(3):
        for arm in ("2C", "1P1D"):
            records += [_record(arm, repeat, 1.0, 0), _record(arm, repeat, 9.0, 1)]
        records[-1].finish_reason = "abort"
    summary = summarize(records, _run())
    assert summary["sequential"]["relative_difference"]["estimate"] == pytest.approx(0)
    assert summary["sequential"]["arms"]["2C"]["total_s"]["mean"] == 5.0


def test_more_than_the_hand_off_is_not_called_worse():
    """One at a time 14 % more and no hand-off to show for it: the verdict says so; with half of it, it is worse."""
    records = [
        _record(arm, repeat, seconds + repeat / 1000)
        for repeat in range(3)
        for arm, seconds in (("2C", 1.0), ("1P1D", 1.14))
    ]
    verdict = summarize(records, _run())["sequential"]["verdict"]
    assert (verdict["kind"], verdict["handoff"]) == ("unexplained", 0.0)
    assert verdict["sentence"].startswith("Not explained by the split")


def test_counts_are_in_the_right_number(tmp_path):
    """1 repeat, not 1 repeats; workers are named as in the figures."""
    _, summary, _ = _compare(tmp_path, msgspec.structs.replace(QUICK, repeats=1))
    text = _printed(summary, tmp_path, "en")
    assert "5 requests, 1 repeat;" in text
    assert re.search(r"P0 \d+ \+ \d+ %", text)
    assert "P0.0" not in text


def test_an_interrupted_run_is_void():
    """What was measured is kept and shown, without a verdict."""
    run = _run()
    run.complete = False
    summary = summarize([_record("2C", 0, 1.0), _record("1P1D", 0, 1.1)], run)
    assert summary["void"][0]["key"] == "incomplete"
    assert summary["sequential"]["arms"]["2C"]["total_s"]["mean"] == 1.0


def test_a_missing_record_is_noticed(tmp_path):
    """Every request of every block must have left one record."""
    run, _, _ = _compare(tmp_path)
    records = list(read_records(tmp_path / RECORDS))
    assert [each.key for each in run_guards(records[:-1], run)] == ["missing"]


def test_parity(tmp_path):
    """Arms on different budgets are refused, with what differs, unless that is wanted and then stated."""
    settings = msgspec.structs.replace(QUICK, arms=("1C@cpu:1", "1P1D"))
    with pytest.raises(InputError, match=r"devices is cpu:\[0, 1\] in 1P1D, cpu:\[0\] in 1C@cpu:1.*--allow-unequal"):
        _compare(tmp_path, settings)
    _, summary, _ = _compare(tmp_path, msgspec.structs.replace(settings, allow_unequal=True))
    assert summary["parity"][0]["field"] == "devices"
    assert "unequal" in {note["key"] for note in summary["notes"]}


def test_a_tuned_chunk_size_is_listed_and_allowed():
    """It differs on purpose; any other engine setting would be refused."""
    arms = _run().arms
    other = msgspec.structs.replace(arms[0], engine=EngineSpec(max_batch_tokens=128))
    (found,) = differences([other, arms[1]], tuned=["2C"])
    assert (found.field, found.ours, found.theirs, found.tuned) == ("max_batch_tokens", "128", "512", True)
    assert not differences([other, arms[1]])[0].tuned


def test_impossible_arms():
    """A comparison needs both kinds; every arm must fit its budget."""
    with pytest.raises(InputError, match="compares nothing"):
        _run(arms=("2C", "1C"))
    with pytest.raises(BudgetError, match="not understood"):
        _run(arms=("2C", "2X"))
    with pytest.raises(BudgetError, match="3 core"):
        _run(budget="cpu:3")
    with pytest.raises(InputError, match="twice"):
        _run(arms=("2C", "2C", "1P1D"))


def test_the_better_colocated_arm_is_the_opponent():
    """Of 1C and 2C the faster one is compared against, and the report says which."""
    records = [
        _record(arm, repeat, seconds + repeat / 100)
        for repeat in range(3)
        for arm, seconds in (("2C", 1.0), ("1C", 0.8), ("1P1D", 1.1))
    ]
    part = summarize(records, _run(arms=("2C", "1C", "1P1D")))["sequential"]
    assert part["base"] == "1C"
    assert "1C" in part["why"][-1]["text"]


def test_tuning(tmp_path):
    """The colocated arm is restarted with each size, every start is stopped again, and the choice is stated."""
    settings = msgspec.structs.replace(QUICK, tune=True)
    run, summary, started = _compare(tmp_path, settings)
    assert [trial.max_batch_tokens for trial in run.tuning] == [512, 256, 128]
    assert run.arms[0].engine.max_batch_tokens == 512  # the fake does not care, so what was asked for stays
    assert all(fake.closed for fake in started)
    assert "tuned" in {note["key"] for note in summary["notes"]}


def test_tuning_searches_the_limit_that_binds(tmp_path, monkeypatch):
    """Where steps with decodes have a limit of their own, that is tried, and the arm restarts with it; it is meant."""
    monkeypatch.setattr(stages, "best_trial", lambda trials: trials[1])
    engine = EngineSpec(max_batch_tokens=8192, max_mixed_tokens=1024, max_running=256)
    run, summary, started = _compare(tmp_path, msgspec.structs.replace(QUICK, tune=True, engine=engine))
    assert [trial.max_mixed_tokens for trial in run.tuning] == [1024, 512, 256, 2048]
    assert {trial.max_batch_tokens for trial in run.tuning} == {8192}
    colocated = [fake.asked.max_mixed_tokens for fake in started if not fake.deployment.disaggregated]
    assert colocated == [1024, 512, 256, 2048, 512]
    assert run.arms[0].engine == engine.with_chunk(512)
    assert [(each["field"], each["tuned"]) for each in summary["parity"]] == [("max_mixed_tokens", True)]
    assert next(note["values"]["value"] for note in summary["notes"] if note["key"] == "tuned") == 512


def test_chunk_sizes_worth_trying():
    """None twice, none that leaves prefill nothing beside all decodes, none below two pages or above a whole step."""
    assert [each.chunk_tokens for each in stages.chunk_candidates(EngineSpec())] == [512, 256, 128]
    assert [each.chunk_tokens for each in stages.chunk_candidates(EngineSpec(max_batch_tokens=64))] == [64, 32]
    tight = EngineSpec(max_batch_tokens=512, max_mixed_tokens=512, max_running=200)
    assert [each.chunk_tokens for each in stages.chunk_candidates(tight)] == [512, 256]


def test_one_configuration_is_judged(tmp_path, monkeypatch):
    """Every judged request, the first sequential repeat's too, runs on the arm as it is after the search."""
    monkeypatch.setattr(stages, "best_trial", lambda trials: trials[-1])
    run, summary, started = _compare(tmp_path, msgspec.structs.replace(QUICK, tune=True))
    assert run.arms[0].engine.max_batch_tokens == 128
    last = [fake for fake in started if not fake.deployment.disaggregated][-1]
    first_at = min(r.sent_at for r in read_records(tmp_path / RECORDS))
    others = [fake for fake in started if fake is not last and not fake.deployment.disaggregated]
    assert last.engine.max_batch_tokens == 128
    assert all(at < first_at for fake in others for _, at in fake.sent)
    assert summary["sequential"]["arms"]["2C"]["completed"] == 15


def test_best_trial():
    """Goodput first; within two points, latency; and noise moves nothing."""
    asked = Trial(512, 0.90, 1.0)
    assert stages.best_trial([asked, Trial(256, 0.91, 0.97)]) == asked
    assert stages.best_trial([asked, Trial(256, 0.95, 1.5)]).max_batch_tokens == 256
    assert stages.best_trial([asked, Trial(256, 0.90, 0.9)]).max_batch_tokens == 256
    assert stages.best_trial([asked, Trial(256, 0.80, 0.5)]) == asked


def test_default_slo():
    """TTFT 0.5 s and TPOT 0.5 s unloaded: limits of ten and three times that, in two digits."""
    slo, note = stages.default_slo("2C", [_record("2C", 0, 1.0)])
    assert slo == SLO(ttft_s=5.0, tpot_s=1.5)
    assert note.values["ttft_ms"] == 5000
    odd, _ = stages.default_slo("2C", [_record("2C", 0, 0.01234)])
    assert odd.ttft_s == pytest.approx(0.062)


def test_rates_and_durations():
    """Loads times the capacity; the time budget divided over the blocks; never too few requests."""
    capacity = _capacity(50.0)
    assert stages.choose_rates(Settings(), capacity) == [20.0, 30.0, 40.0, 45.0]
    assert stages.choose_rates(Settings(rates=(9.0, 3.0)), capacity) == [3.0, 9.0]
    assert stages.choose_duration(Settings(), [20.0, 45.0], 200.0, 20, 0.5) == pytest.approx(0.95 * 200 / 20 - 0.5)
    assert stages.choose_duration(Settings(), [2.0], 1.0, 20, 0.5) == stages.FEWEST / 2.0
    (note,) = stages.few_requests(Settings(), [2.0], 4.0)
    assert (note.values["num"], note.values["wanted"]) == (8, 16)
    assert not stages.few_requests(Settings(), [2.0], 8.0)
    assert not stages.few_requests(Settings(duration_s=4.0), [2.0], 4.0)
    assert stages.choose_duration(Settings(duration_s=3.0), [2.0], 1.0, 20, 0.5) == 3.0


def test_counts_of_one_kind_of_note_add_up():
    """Cut requests of all blocks make one note; scalings of different rates stay apart."""
    notes: list[Note] = []
    for rate, num in ((1.0, 2), (1.0, 3), (2.0, 0)):
        notes = merge_note(notes, Note("length_scale", {"scale": 0.5, "max_len": 10, "num": num, "of": 20}))
        notes = merge_note(notes, Note("time_scale", {"rate": rate}))
    assert [note.key for note in notes] == ["length_scale", "time_scale", "time_scale"]
    assert notes[0].values == {"scale": 0.5, "max_len": 10, "num": 5, "of": 60}


def test_a_slow_model_gets_fewer_requests_and_says_so():
    """A request of 0.1 s fits; one of 5 s leaves 4 requests and 3 repeats; what the caller chose is never lowered."""
    assert stages.fit_sequential(Settings(), 0.1) == (Settings(), [])
    fitted, notes = stages.fit_sequential(Settings(), 5.0)
    assert (fitted.requests, fitted.repeats) == (4, 3)
    assert {note.values["what"] for note in notes} == {"requests", "repeats"}
    chosen = Settings(given=("requests", "repeats"))
    assert stages.fit_sequential(chosen, 5.0) == (chosen, [])


def test_a_slow_model_gets_fewer_loads_and_says_so():
    """At 50 requests/s all four fit; at 1 request/s those nearest 0.8 are kept."""
    assert stages.fit_loads(Settings(), _capacity(50.0), 200.0, 0.5) == (Settings(), [])
    fitted, (note,) = stages.fit_loads(Settings(), _capacity(1.0), 450.0, 2.0)
    assert fitted.loads == (0.8, 0.9)
    assert note.values["after"] == "0.8, 0.9"
    chosen = Settings(rates=(1.0,))
    assert stages.fit_loads(chosen, _capacity(0.01), 200.0, 0.5) == (chosen, [])


def _capacity(rate):
    from disagg.measure.run import Capacity

    return Capacity("2C", rate, 30 * rate, 32, 3.0)


def test_workers_are_stopped_when_a_run_breaks(tmp_path, monkeypatch):
    """Whatever ends it, every cluster is closed and the folder says that it is incomplete."""
    closed = []
    monkeypatch.setattr(FakeCluster, "close", lambda self: closed.append(self.deployment.name))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "choose_rates", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _compare(tmp_path)
    assert sorted(closed) == ["1P1D", "2C"]
    assert not read_run(tmp_path).complete
    assert len(list(read_records(tmp_path / RECORDS))) == 20


def test_a_folder_whose_writer_was_killed_can_be_read(tmp_path):
    """Half a line at the end of the records is left out and missed; run.json is never half there."""
    _compare(tmp_path)
    path = tmp_path / RECORDS
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(list(read_records(path))) == whole.count(b"\n") - 1
    assert "missing" in {note["key"] for each in read_summary(tmp_path)["concurrent"] for note in each["void"]} | {
        note["key"] for note in read_summary(tmp_path)["sequential"]["void"]
    }


def test_run_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A writer that is stopped half-way leaves the folder with the run that was there before."""
    run, _, _ = _compare(tmp_path)

    def half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path, run)
    assert read_run(tmp_path).complete


def test_every_block_knows_how_long_its_arrivals_last(tmp_path, monkeypatch):
    """When later repeats have to be shorter, the summary says so for each; one figure would hold for the last only."""
    lengths = iter((2.0, 1.5, 3.0))
    monkeypatch.setattr(stages, "choose_duration", lambda *_: next(lengths))
    run, summary, _ = _compare(tmp_path)
    assert [each["durations_s"] for each in summary["concurrent"]] == [[2.0, 1.5, 1.5]] * 2
    assert {block.duration_s for block in run.blocks if block.phase == "sequential"} == {0.0}
