import subprocess
import sys

import numpy as np
import pytest

from disagg.errors import TraceError
from disagg.workload.traces import Trace, TraceRow, fit_scale, read_trace, replay
from disagg.workload.workload import Limits

LIMITS = Limits(vocab_size=1000, max_len=2048)
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def _file(tmp_path, text):
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_azure_2023(tmp_path):
    """Seven fractional digits and no zone; times count from the first row."""
    path = _file(tmp_path, HEADER + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n\n")
    rows = read_trace(path).rows
    assert [(row.prompt_len, row.output_len) for row in rows] == [(4808, 10), (3180, 8)]
    assert rows[1].at_s == pytest.approx(0.052, abs=1e-6)


def test_azure_2024(tmp_path):
    """Six fractional digits or none, and +00:00."""
    path = _file(tmp_path, HEADER + "2024-05-10 00:00:00.009930+00:00,20,3\n2024-05-10 00:00:02+00:00,30,4\n")
    assert read_trace(path).rows[1].at_s == pytest.approx(1.99007, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("2023-11-16 18:17:04.0319600,3180", "2 columns"),
        ("16.11.2023 18:17,3180,8", "time"),
        ("2023-11-36 18:17:04.0319600,3180,8", "time"),
        ("2023-11-16 18:17:04.0319600,many,8", "whole numbers"),
        ("2023-11-16 18:17:04.0319600,-3,8", "whole numbers"),
        ("2023-11-16 18:17:04.0319600,3180,0", "length of 0"),
        ("2023-11-16 18:17:02.0319600,3180,8", "sort the file"),
    ],
)
def test_a_malformed_row_names_its_line(tmp_path, row, says):
    """File, line and what to do, in one sentence."""
    path = _file(tmp_path, HEADER + "2023-11-16 18:17:03.9799600,4808,10\n" + row + "\n")
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "row",
    [
        '{"timestamp": 1, "input_length": 600, "output_length": 5, "hash_ids": [1]}',
        '{"timestamp": 1, "input_length": 6, "output_length": 5}',
        '{"timestamp": 1, "input_length": 6, "output_length": 5, "hash_ids": [1], "priority": 2}',
        '{"timestamp": 1, "input_length',
        '{"timestamp": 1, "input_length": "6", "output_length": 5, "hash_ids": [1]}',
    ],
)
def test_a_malformed_mooncake_row_names_its_line(tmp_path, row):
    """Also for JSON: missing and unknown fields, wrong types, hashes that do not cover the prompt."""
    good = '{"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": [0]}\n'
    path = _file(tmp_path, good + row + "\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_what_is_no_trace(tmp_path):
    """An unknown header, an empty file and a missing file say what is expected."""
    with pytest.raises(TraceError, match="header TIMESTAMP"):
        read_trace(_file(tmp_path, "time,in,out\n1,2,3\n"))
    with pytest.raises(TraceError, match="neither"):
        read_trace(_file(tmp_path, ""))
    with pytest.raises(TraceError, match="at least 2"):
        read_trace(_file(tmp_path, HEADER))
    with pytest.raises(TraceError, match="check the path"):
        read_trace(tmp_path / "nothing")


def _mooncake(num_slots, per_slot):
    """Rows in slots 3 s apart, `per_slot` at each, as the conversation trace has them."""
    row = '{{"timestamp": {}, "input_length": 700, "output_length": 5, "hash_ids": [0, {}]}}\n'
    return "".join(
        row.format(3000 * slot, 1 + slot * per_slot + i) for slot in range(num_slots) for i in range(per_slot)
    )


def test_slots_are_spread(tmp_path):
    """Ten rows every 3 s become a steady stream: every row within its slot, in order, and a note says so."""
    trace = read_trace(_file(tmp_path, _mooncake(40, 10)))
    times = np.array([row.at_s for row in trace.rows])
    assert (np.diff(times) >= 0).all()
    assert len(set(times)) == 400
    assert (np.histogram(times, bins=40, range=(0, 120))[0] == 10).all()
    assert trace.notes[0].key == "slots"
    assert trace.notes[0].values["slot_s"] == 3
    assert trace == read_trace(_file(tmp_path, _mooncake(40, 10)))


def test_a_fine_clock_is_left_alone(tmp_path):
    """Few equal times are chance, not slots."""
    trace = read_trace(_file(tmp_path, _mooncake(40, 1)))
    assert [row.at_s for row in trace.rows] == [3 * slot for slot in range(40)]
    assert trace.notes == ()


def test_equal_blocks_are_equal_tokens(tmp_path):
    """Prompts share exactly the blocks whose hashes they share, at any scale."""
    trace = read_trace(_file(tmp_path, _mooncake(4, 1)))
    for scale in (1.0, 0.1):
        rows = replay(trace, 1.0, 4, 0, 42, LIMITS, scale).rows
        block = 512 if scale == 1 else 52
        assert len(rows[0].prompt) == round(700 * scale)
        assert rows[0].prompt[:block] == rows[1].prompt[:block]
        assert rows[0].prompt[block : block + 5] != rows[1].prompt[block : block + 5]


def test_block_tokens_are_the_same_in_every_process(tmp_path):
    """No salted hash decides: another interpreter with another hash seed draws the same prompts."""
    path = _file(tmp_path, _mooncake(3, 1))
    code = (
        "import sys; from pathlib import Path; from disagg.workload.traces import *;"
        "print(replay(read_trace(Path(sys.argv[1])), 1.0, 3, 0, 42, Limits(1000, 2048), 0.1).rows[2].prompt)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, env=_env(seed)
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{replay(read_trace(path), 1.0, 3, 0, 42, LIMITS, 0.1).rows[2].prompt}\n"}


def _env(hash_seed):
    import os

    return os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))}


def _trace(lengths, gap_s=1.0):
    return Trace("t", tuple(TraceRow(gap_s * i, *each) for i, each in enumerate(lengths)))


def test_lengths_are_scaled_by_one_factor_to_the_context():
    """99 % of the rows fit by the factor; the rest are cut; nothing is ever stretched; all of it is stated."""
    trace = _trace([(3000, 1096)] * 99 + [(100_000, 10)])
    assert fit_scale(trace, 2048) == 0.5
    assert fit_scale(trace, 100_000) == 1.0
    workload = replay(trace, 1.0, 100, 0, 42, LIMITS)
    assert (len(workload.rows[0].prompt), workload.rows[0].max_tokens) == (1500, 548)
    assert all(len(row.prompt) + row.max_tokens <= 2048 for row in workload.rows)
    note = next(note for note in workload.notes if note.key == "length_scale")
    assert note.values == {"scale": 0.5, "max_len": 2048, "num": 1, "of": 100}


def test_times_are_scaled_and_bursts_stated():
    """The mean rate becomes the asked one; the shape stays; the note tells the burst and the long silences."""
    times = [float(i) for i in range(10)] + [100.0 + i for i in range(10)]
    trace = Trace("t", tuple(TraceRow(at, 10, 5) for at in times))
    workload = replay(trace, 2.0, 20, 0, 42, LIMITS)
    assert workload.span_s == pytest.approx(19 / 2)
    ratios = [row.arrival_at / at for row, at in zip(workload.rows, times, strict=True) if at]
    assert max(ratios) == pytest.approx(min(ratios))
    note = workload.notes[-1]
    assert note.values["long_gaps"] == 1
    assert note.values["burst"] == pytest.approx(5.0)  # half of the rows in one tenth of the time


def test_repeats_take_other_windows():
    """Repeat r is the r-th window, wrapping; so repeats differ in traffic."""
    trace = _trace([(10 + i, 5) for i in range(10)])
    firsts = [len(replay(trace, 1.0, 4, repeat, 42, LIMITS).rows[0].prompt) for repeat in range(3)]
    assert firsts == [10, 14, 11]


def test_overlapping_repeats_are_stated():
    """The third window's four rows were replayed before; a trace that is too short is replayed whole, each time."""
    trace = _trace([(10 + i, 5) for i in range(10)])
    found = [_notes(replay(trace, 1.0, 4, repeat, 42, LIMITS)) for repeat in range(3)]
    assert [each.get("overlap", {}).get("num") for each in found] == [None, None, 4]
    first, second = (_notes(replay(trace, 1.0, 12, repeat, 42, LIMITS)) for repeat in range(2))
    assert (first["trace_short"]["asked"], first["trace_short"]["rows"]) == (12, 10)
    assert "overlap" not in first
    assert (second["overlap"]["num"], second["overlap"]["of"]) == (10, 10)


def _notes(workload):
    return {note.key: note.values for note in workload.notes}


def test_limit(tmp_path):
    """Only the first rows are read, so a bad row beyond them does not matter."""
    path = _file(tmp_path, _mooncake(5, 1) + "nonsense\n")
    assert len(read_trace(path, limit=5).rows) == 5


def test_one_moment_has_no_rate():
    """Rows at one moment cannot be scaled to a rate."""
    with pytest.raises(TraceError, match="share one moment"):
        replay(_trace([(10, 5)] * 3, gap_s=0.0), 1.0, 3, 0, 42, LIMITS)
