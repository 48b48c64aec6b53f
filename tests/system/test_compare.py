"""`disagg compare` with real workers: the folder, the numbers' consistency, and what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disagg.cli.main import run
from disagg.measure.run import RECORDS, RUN, WORKLOADS, read_run, write_run
from disagg.record import read_records

SMALL = ("--requests", "3", "--repeats", "2", "--rate", "8", "--duration", "1.5", "--no-tune", "--kv-memory", "0.1")


def _command(*args):
    code = "from disagg.cli.main import main; main()"
    return [sys.executable, "-c", code, *args]


def _run(*args):
    return subprocess.run(_command(*args), capture_output=True, text=True, timeout=150, check=False)


def _workers():
    """Process ids of this user's workers: on two cores, what a process has forked that has loaded the model."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if b"disagg.cluster.template" in words:
            found.add(int(folder.name))
    return {pid for pid in found if _parent(pid) in found}


def _children(pid):
    """Workers of the deployments that `pid` started."""
    return {worker for worker in _workers() if _parent(_parent(worker)) == pid}


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One small comparison of the seed model, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    done = _run("compare", *SMALL, "--json", "--out", str(folder))
    assert done.stdout, done.stderr
    void = json.loads(done.stdout)["overall"]["key"] == "overall_void"  # on a busy machine it may be
    assert done.returncode == (1 if void else 0), done.stderr
    stages = re.findall(r"^([a-z ]+): \d+\.\d s$", done.stderr, re.MULTILINE)  # no terminal: a line for each
    assert stages[:2] == ["start", "warm up"]
    assert stages[-1] == "report"
    return folder, json.loads(done.stdout)


@pytest.mark.alone  # it makes the result, which is void if others disturb it
def test_the_folder(result):
    """Records, workloads, run, summary, report and figures are there, and stdout had the summary alone."""
    folder, summary = result
    names = {path.name for path in folder.iterdir()}
    assert {RECORDS, WORKLOADS, RUN, "summary.json", "report.html"} <= names
    assert sum(name.endswith(".png") for name in names) >= 4
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_both_arms_did_the_same(result):
    """Every request of every block left one record that ended at its length, with the same tokens in both arms."""
    folder, summary = result
    records = list(read_records(folder / RECORDS))
    tokens = {}
    for record in records:
        assert record.finish_reason == "length"
        assert len(record.tokens) == record.output_len == record.max_tokens == len(record.token_at)
        tokens.setdefault((record.phase, record.rate, record.repeat, record.index), {})[record.arm] = record.tokens
    assert all(set(each) == {"2C", "1P1D"} for each in tokens.values())
    assert all(each["2C"] == each["1P1D"] for each in tokens.values())
    assert summary["token_mismatches"] == {"1P1D": 0}


def test_every_timeline_is_in_order(result):
    """No moment is missing or has to be clamped for the parts to sum; only the disaggregated arm has a hand-off."""
    folder, _ = result
    for record in read_records(folder / RECORDS):
        assert record.num_attempts == 1
        marks = [record.scheduled_at, record.sent_at, record.queued_at, record.prefill_start_at, record.prefill_end_at]
        assert marks == sorted(marks)
        assert record.prefill_end_at <= record.token_at[0]
        if record.arm == "1P1D" and record.max_tokens > 1:
            marks = [record.prefill_end_at, record.handoff_end_at, record.decode_start_at, record.token_at[-1]]
            assert marks == sorted(marks)
        handed = record.arm == "1P1D" and record.max_tokens > 1
        assert (record.handoff_bytes > 0) == handed
        assert (record.prefill_worker != record.decode_worker) == handed


def test_report_rebuilds(result, tmp_path):
    """From records and run alone, the same summary; in Chinese if asked."""
    folder, summary = result
    for name in (RECORDS, RUN):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    done = _run("report", str(tmp_path), "--lang", "zh", "--json")
    assert done.returncode == (1 if summary["overall"]["key"] == "overall_void" else 0), done.stderr
    assert json.loads(done.stdout) == summary
    assert "分离" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_of_a_run_that_was_cut_off_ends_as_compare_does(result, tmp_path, capsys):
    """Void: exit code 1, and the page is written all the same."""
    folder, _ = result
    (tmp_path / RECORDS).write_bytes((folder / RECORDS).read_bytes())
    cut = read_run(folder)
    cut.complete = False
    write_run(tmp_path, cut)
    assert run(["report", str(tmp_path)]) == 1
    assert "VOID: The run was cut off" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the command line here, which spares a process and its import of torch, and returns what it said.

    It must end with 2, and cannot start a process.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("disagg.cluster.launch.subprocess", None)

    def call(*args):
        assert run(args) == 2
        out, said = capsys.readouterr()
        assert out == ""
        return said

    return call


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("compare", "--arms", "2C"), "compares nothing"),
        (("compare", "--arms", "2C,1X1D"), "not understood"),
        (("compare", "--budget", "cpu:4096"), "cpu:1 to cpu:"),
        (("compare", "--slo", "ttft=fast"), "ttft=200ms"),
        (("compare", "--prompt-len", "long"), "write 512"),
        (("compare", "--slo", "ttft=200"), "write 200ms or 200s"),
        (("compare", "--prompt-len", "9000"), "the context holds"),
        (("compare", "--model", "smolm2"), "Did you mean smollm2?"),
        (("compare", "--qick"), "--quick"),
        (("compare", "--dtype", "bfloat16", "--budget", "cpu:2"), "use float32 or float16 on cores"),
        (("check", "--api-key", "env:HOME"), "give --url too"),
        (("compare", "--trace", "none.csv"), "does not exist. See disagg compare --help."),
        (("generate", "--model", "seed", "a text"), "no tokenizer"),
        (("generate", "--model", "seed", "--ids", "1,999999"), "Token ids must lie between"),
        (("compar",), "Did you mean 'compare'"),
        (("report", "nowhere"), "folder that compare has written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(args, says, tmp_path, refused):
    """Before any worker starts, on the last line, without the usage, and without leaving a folder."""
    said = refused(*args)
    assert says in said.splitlines()[-1]
    assert "Usage" not in said
    assert not list(tmp_path.iterdir())


def test_a_process_ends_with_the_code_and_the_sentence():
    """What the tests around this one see of a call is what a shell sees of a process."""
    done = _run("compar")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'compare'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_malformed_trace_names_its_line(tmp_path, refused):
    """The row that cannot be read stops the run with file and line."""
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\nnonsense\n")
    assert "trace.csv:3: " in refused("compare", "--trace", str(trace), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("how", ["interrupt", "kill a worker"])
def test_it_leaves_nothing_behind(how, tmp_path):
    """Ctrl-C gives 130, a killed worker 1 with a sentence; neither leaves a worker."""
    process = subprocess.Popen(
        _command("compare", "--requests", "2", "--no-tune", "--duration", "60", "--out", str(tmp_path / "out")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = _wait_for(lambda: (tmp_path / "out" / RECORDS).exists() and _children(process.pid), process)
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(min(workers), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if how == "interrupt" else 1), stderr
    assert "Traceback" not in stderr
    assert ("Interrupted" if how == "interrupt" else "SIGKILL") in stderr
    assert not workers & _workers()


def _wait_for(condition, process, limit_s=90.0):
    """What `condition` gives once it is true; fails when the process ends or the time is up before."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come")


def test_a_gpu_that_is_not_here_is_bad_input(tmp_path, refused):
    """Whatever the driver says of it: exit code 2, and no folder."""
    said = refused("compare", "--model", "seed", "--budget", "cuda:99", "--out", str(tmp_path / "out"))
    assert "Budget cuda:99" in said
    assert not list(tmp_path.iterdir())
