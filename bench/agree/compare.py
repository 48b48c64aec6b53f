"""When a load generator and the server's Records agree about a run, and what would show that they do not.

Rows of both are in the order of their output lengths, of which no two are alike.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from relay import Call
from tools import Row

from disagg.record import Record

TIMES, COUNTS = ("ttft", "gap", "e2e"), ("prompt", "output")
SHIFT = 2.5  # limits by which the control moves all times


def of_call(call: Call) -> Row:
    """A request as the relay saw it, which does not look into prompts."""
    gap_s = (call.last_at - call.first_at) / max(1, call.length - 1)
    return Row(1e3 * (call.first_at - call.asked_at), 1e3 * gap_s, 1e3 * (call.last_at - call.asked_at), 0, call.length)


def of_record(record: Record) -> Row:
    """A request as the server recorded it; what never came to a time is no number, which agrees with none."""
    seconds = (record.ttft_s, record.tpot_s, record.e2e_s)
    times = (float("nan") if each is None else 1e3 * each for each in seconds)
    return Row(*times, record.prompt_len, record.output_len)


def _later(rows: Sequence[Row], others: Sequence[Row], name: str) -> np.ndarray:
    if len(rows) != len(others):
        raise ValueError(f"{len(rows)} requests cannot be held against {len(others)}: some were lost.")
    return np.array([getattr(row, name) - getattr(other, name) for row, other in zip(rows, others, strict=True)])


def apart(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, float]:
    """How far a request of the one is from that of the other, on average."""
    return {name: float(abs(_later(rows, others, name)).mean()) for name in TIMES}


def later(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, float]:
    """The same with its sign: by how much the one says more."""
    return {name: float(_later(rows, others, name).mean()) for name in TIMES}


def resolution(relayed: Iterable[tuple[Sequence[Row], Sequence[Row]]]) -> dict[str, float]:
    """How well a tool can tell time here: no request, of any deployment, lies farther from what passed the relay."""
    runs = list(relayed)
    return {name: max(float(abs(_later(*run, name)).max()) for run in runs) for name in TIMES}


def spread(repeats: Sequence[dict[str, float]]) -> dict[str, float]:
    """By how much the same comparison came out differently."""
    return {name: max(each[name] for each in repeats) - min(each[name] for each in repeats) for name in TIMES}


def limits(resolves: dict[str, float], spreads: dict[str, float]) -> dict[str, float]:
    """How far apart the two may be: both errors are there, and neither knows of the other."""
    return {name: math.hypot(resolves[name], spreads[name]) for name in TIMES}


def judge(rows: Sequence[Row], records: Sequence[Row], most: dict[str, float]) -> dict[str, Any]:
    """How far a request is from its Record, on average, and which numbers are farther apart than they may be.

    Counts of tokens must be the same for every request. Raises ValueError unless there are as many Records as requests.
    """
    found = apart(rows, records)
    disagree = [name for name in TIMES if not found[name] <= most[name]]
    disagree += [name for name in COUNTS if _later(rows, records, name).any()]
    return {"apart": found, "disagree": disagree}


def shifted(records: Sequence[Row], most: dict[str, float]) -> list[Row]:
    """A control: Records whose times are off by more than they may be."""
    return [row._replace(**{name: getattr(row, name) + SHIFT * most[name] for name in TIMES}) for row in records]


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Means of times, sums of tokens."""
    means = {name: float(np.mean([getattr(row, name) for row in rows])) for name in TIMES}
    return {**means, **{name: sum(getattr(row, name) for row in rows) for name in COUNTS}, "requests": len(rows)}


def table(found: dict[str, Any]) -> str:
    """All runs, as docs/serve.md shows them."""
    lines = [
        "| deployment | | TTFT ms | gap ms | E2E ms | prompt tokens | output tokens | requests |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def line(deploy: str, who: str, times: dict[str, float], counts: Sequence[object]) -> None:
        cells = (deploy, who, *(f"{times[name]:.{2 if name == 'gap' else 1}f}" for name in TIMES), *map(str, counts))
        lines.append(f"| {' | '.join(cells)} |")

    for run in found["runs"]:
        for deploy, who, said in ((run["deploy"], run["tool"], run["says"]), ("", "Records", run["records"])):
            line(deploy, who, said, [said[name] for name in (*COUNTS, "requests")])
        line("", "apart", run["apart"], ["", "", ""])
        line("", f"{run['tool']} resolves", run["resolution"], ["", "", ""])
        line("", "repeats differ by", run["spread"], ["", "", ""])
        line("", "the wire says later than Records", run["wire_later"], ["", "", ""])
        line("", "apart from the other deployment", run["controls"]["other run"]["apart"], ["", "", ""])
    return "\n".join(lines)
