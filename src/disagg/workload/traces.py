"""Real traffic: the Azure LLM inference traces (CSV) and the Mooncake traces (JSONL), replayed at our size.

| format | times | prompts |
| --- | --- | --- |
| Azure 2023 | `2023-11-16 18:17:03.9799600`: seven digits, no zone | lengths only: random ids |
| Azure 2024 | `2024-05-10 00:00:00.009930+00:00`: six digits, UTC | lengths only: random ids |
| Mooncake | milliseconds from the start | one hash per 512-token block: equal hashes, equal tokens |

What is changed on the way is stated in the workload's notes: lengths are scaled by one factor to the model's context,
times by one factor to the wanted rate. Mooncake's conversation trace is quantised to 3 s slots; a literal replay would
fire ten requests at once, so requests are spread over their slot, from a fixed seed.
"""

import datetime
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from disagg.errors import TraceError
from disagg.workload.workload import Limits, Note, Row, Workload, cut

BLOCK_LEN = 512  # tokens per Mooncake hash
LONG_GAP_S = 30.0  # a trace with longer silences than this makes bursts when its mean rate is matched
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:\+00:00|Z)?")


class TraceRow(msgspec.Struct, frozen=True):
    """One request as the trace has it; `at_s` from the first row, lengths in the tracer's tokens."""

    at_s: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


class Trace(msgspec.Struct, frozen=True):
    """A trace's rows in order of arrival, and what was done to its times while reading."""

    name: str
    rows: tuple[TraceRow, ...]
    notes: tuple[Note, ...] = ()


class _MooncakeLine(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, limit: int | None = None, seed: int = 42) -> Trace:
    """The first `limit` rows of a trace; the format is told from the first line. Raises TraceError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline()
            reader = _reader(path, first)
            lines = itertools.chain([first], file) if reader is _mooncake_rows else file
            start = 1 if reader is _mooncake_rows else 2
            rows = list(itertools.islice(reader(path, lines, start), limit))
    except OSError as error:
        raise TraceError(f"Trace {path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"Trace {path} is not UTF-8 text: give an unpacked CSV or JSONL file.") from error
    if len(rows) < 2:
        raise TraceError(f"Trace {path} holds {len(rows)} request(s): at least 2 are needed.")
    origin = rows[0].at_s
    rows = [TraceRow(row.at_s - origin, row.prompt_len, row.output_len, row.blocks) for row in rows]
    spread, notes = _spread_slots(rows, seed)
    return Trace(path.name, tuple(spread), notes)


def _reader(path: Path, first: str) -> Callable[[Path, Iterator[str], int], Iterator[TraceRow]]:
    """Which reader a file's first line asks for."""
    if first.lstrip().startswith("{"):
        return _mooncake_rows
    if [name.strip() for name in first.split(",")] == ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        return _azure_rows
    raise TraceError(
        f"{path}:1: neither an Azure CSV (header TIMESTAMP,ContextTokens,GeneratedTokens) nor Mooncake JSONL: "
        "give a trace in one of these formats."
    )


def _azure_rows(path: Path, lines: Iterator[str], start: int) -> Iterator[TraceRow]:
    """Rows of `TIMESTAMP,ContextTokens,GeneratedTokens`, the header already taken."""
    last = -math.inf
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            raise TraceError(f"{path}:{number}: {len(cells)} columns instead of 3: repair or remove the row.")
        at = _azure_seconds(cells[0])
        if at is None:
            raise TraceError(
                f"{path}:{number}: time {cells[0]!r} is not like 2023-11-16 18:17:03.9799600: repair or remove the row."
            )
        if not (cells[1].isdecimal() and cells[2].isdecimal()):
            raise TraceError(f"{path}:{number}: token counts must be whole numbers: repair or remove the row.")
        yield _checked(path, number, TraceRow(at, int(cells[1]), int(cells[2])), last)
        last = at


def _azure_seconds(text: str) -> float | None:
    """Seconds since 1970, UTC (2023 has no zone; only differences are used). None when it is no time."""
    match = _STAMP.fullmatch(text)
    if not match:
        return None
    try:
        whole = datetime.datetime.fromisoformat(match[1]).replace(tzinfo=datetime.UTC)
    except ValueError:
        return None
    return whole.timestamp() + (int(match[2]) / 10 ** len(match[2]) if match[2] else 0.0)


def _mooncake_rows(path: Path, lines: Iterator[str], start: int) -> Iterator[TraceRow]:
    """Rows of `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`."""
    last = -math.inf
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        try:
            raw = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}:{number}: {error}: repair or remove the row.") from error
        if len(raw.hash_ids) * BLOCK_LEN < raw.input_length:
            raise TraceError(
                f"{path}:{number}: {len(raw.hash_ids)} hashes of {BLOCK_LEN} tokens cannot cover a prompt of "
                f"{raw.input_length}: repair or remove the row."
            )
        row = TraceRow(raw.timestamp / 1e3, raw.input_length, raw.output_length, tuple(raw.hash_ids))
        yield _checked(path, number, row, last)
        last = row.at_s


def _checked(path: Path, number: int, row: TraceRow, last: float) -> TraceRow:
    """The row, if it is a request that can be replayed after one at `last`."""
    if row.prompt_len < 1 or row.output_len < 1:
        raise TraceError(f"{path}:{number}: a length of 0 tokens cannot be replayed: remove the row.")
    if row.at_s < last:
        raise TraceError(f"{path}:{number}: earlier than the row before it: sort the file by time.")
    return row


def _spread_slots(rows: Sequence[TraceRow], seed: int) -> tuple[list[TraceRow], tuple[Note, ...]]:
    """Rows whose clock is quantised (most gaps exactly zero), spread uniformly over their slot; others unchanged."""
    gaps = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(rows)]
    real = [gap for gap in gaps if gap > 0]
    if not real or 2 * (len(gaps) - len(real)) <= len(gaps):
        return list(rows), ()
    slot_s = statistics.median(real)
    rng = np.random.default_rng(seed)
    moved = [
        TraceRow(row.at_s + slot_s * float(rng.random()), row.prompt_len, row.output_len, row.blocks) for row in rows
    ]
    note = Note("slots", {"slot_s": round(slot_s, 3), "share": (len(gaps) - len(real)) / len(gaps), "seed": seed})
    return sorted(moved, key=lambda row: row.at_s), (note,)


def fit_scale(trace: Trace, max_len: int) -> float:
    """The largest factor up to 1 by which 99 % of the rows fit the context; the rest is cut, and counted in a note."""
    totals = sorted(row.prompt_len + row.output_len for row in trace.rows)
    return min(1.0, max_len / totals[math.ceil(0.99 * len(totals)) - 1])


def replay(
    trace: Trace, rate: float, num: int, repeat: int, seed: int, limits: Limits, scale: float | None = None
) -> Workload:
    """`num` neighbouring rows as a workload of `rate` requests/s (0: one at a time).

    Repeat r takes the r-th window of `num` rows, wrapping at the end, so repeats differ in traffic and all arms of a
    repeat meet the same. Times are scaled so that the window's mean rate is `rate`: its bursts stay as they are in
    proportion, and the note says how large they are. `scale` multiplies lengths; None fits them to the context. Notes
    also state a trace that is too short: for one window, or for windows that do not overlap.
    """
    asked, num = num, min(num, len(trace.rows))
    start = _start(trace, num, repeat)
    window = trace.rows[start : start + num]
    scale = fit_scale(trace, limits.max_len) if scale is None else scale
    rng = np.random.default_rng((seed, repeat))
    rows, num_cut = [], 0
    times, time_note = _scaled_times(trace, window, rate)
    for index, (row, at) in enumerate(zip(window, times, strict=True)):
        wanted = max(1, round(row.prompt_len * scale)), max(1, round(row.output_len * scale))
        prompt_len, output_len = cut(*wanted, limits.max_len)
        num_cut += (prompt_len, output_len) != wanted
        rows.append(Row(index, at, _prompt(row, prompt_len, scale, limits, seed, rng), output_len))
    lengths = Note("length_scale", {"scale": scale, "max_len": limits.max_len, "num": num_cut, "of": num})
    notes = (*trace.notes, lengths, *_short(trace, rate, asked, repeat), *time_note)
    return Workload(seed, rate, repeat, tuple(rows), notes)


def _start(trace: Trace, num: int, repeat: int) -> int:
    """The first row of a repeat's window."""
    return repeat * num % (len(trace.rows) - num + 1)


def _short(trace: Trace, rate: float, asked: int, repeat: int) -> list[Note]:
    """What a trace with too few rows for `asked` requests, or for so many repeats of them, did to this one."""
    num, notes = min(asked, len(trace.rows)), []
    values: dict[str, float | int | str] = {"trace": trace.name, "rate": rate, "rows": len(trace.rows)}
    if asked > num:
        notes.append(Note("trace_short", values | {"asked": asked}))
    *earlier, ours = (range(start, start + num) for start in (_start(trace, num, each) for each in range(repeat + 1)))
    if seen := len(set(ours).intersection(set().union(*earlier))):
        notes.append(Note("overlap", values | {"num": seen, "of": num}))
    return notes


def _prompt(
    row: TraceRow, length: int, scale: float, limits: Limits, seed: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Random ids; where the trace has block hashes, a block's ids are a function of seed and hash alone."""
    if not row.blocks:
        return limits.ids(length, rng)
    block_len = math.ceil(BLOCK_LEN * scale)  # rounded up, so the blocks cover the scaled prompt
    tokens: list[int] = []
    for block in row.blocks:
        tokens += limits.ids(block_len, np.random.default_rng((seed, block)))
        if len(tokens) >= length:
            break
    return tuple(tokens[:length])


def _scaled_times(trace: Trace, window: Sequence[TraceRow], rate: float) -> tuple[list[float], tuple[Note, ...]]:
    """Arrivals from 0 with a mean rate of `rate`, and what that did to them."""
    if rate == 0:
        return [0.0] * len(window), ()
    raw = [row.at_s - window[0].at_s for row in window]
    if raw[-1] == 0:
        raise TraceError(f"Trace {trace.name}: {len(raw)} rows share one moment, which has no rate: take more rows.")
    factor = (len(raw) - 1) / rate / raw[-1]
    tenth = raw[-1] / 10
    busiest = max(np.histogram(raw, bins=10, range=(0, raw[-1]))[0]) / tenth
    long_gaps = sum(later - earlier > LONG_GAP_S for earlier, later in itertools.pairwise(raw))
    values: dict[str, float | int | str] = {
        "trace": trace.name,
        "from_rate": (len(raw) - 1) / raw[-1],
        "rate": rate,
        "factor": factor,
        "burst": float(busiest * raw[-1] / len(raw)),
        "long_gaps": long_gaps,
    }
    return [at * factor for at in raw], (Note("time_scale", values),)
