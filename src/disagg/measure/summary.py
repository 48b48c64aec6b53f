"""The numbers of a comparison: `summarize(records, run)`, a pure function, so reports are rebuilt from the folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from disagg.errors import InputError
from disagg.measure import metrics
from disagg.measure.guards import UNSPLIT_LIMIT, Broken, differences, mismatches, run_guards, unsplit
from disagg.measure.run import RECORDS, SUMMARY, Arm, Run, Settings, read_run
from disagg.measure.sentences import say, sentence
from disagg.measure.stats import Interval, paired_difference, paired_ratio
from disagg.measure.verdict import METRICS, Verdict, explain, judge
from disagg.record import Record, read_records
from disagg.workload.workload import Note, Shape

# The original experiment's figures, seconds: mean latency of both deployments and of the stages.
PUBLISHED = {
    "colocated_s": 0.1823,
    "disaggregated_s": 0.1567,
    "gain": 0.1404,
    "relative_difference": 0.1567 / 0.1823 - 1,
    "prefill_s": 0.0582,
    "decode_s": 0.1241,
    "handoff_s": 0.0123,
    "handoff_share": 0.0123 / 0.1567,
}

_PER_REPEAT: dict[str, Callable[[Sequence[Record]], float | None]] = {
    "e2e_s": lambda records: metrics.e2e(records).mean,
    "ttft_s": lambda records: metrics.ttft(records).mean,
    "tpot_s": lambda records: metrics.tpot(records).mean,
    "itl_p99_s": lambda records: metrics.itl(records).p99,
    "throughput": metrics.throughput,
}


def summarize(records: Sequence[Record], run: Run) -> dict[str, Any]:
    """`summary.json` as plain data. Units are in the keys; times are seconds."""
    broken = run_guards(records, run)
    sequential = [record for record in records if record.phase == "sequential"]
    rates = sorted({record.rate for record in records if record.phase == "concurrent"})
    concurrent = [
        _concurrent([r for r in records if r.phase == "concurrent" and r.rate == rate], run, rate, broken)
        for rate in rates
    ]
    seldom = [each for each in unsplit(records, run) if float(each.values["share"]) <= UNSPLIT_LIMIT]
    tuned = [run.capacity[0].arm] if run.capacity else []
    summary = {
        "config": {"settings": run.settings, "arms": run.arms, "rates": run.rates},
        "environment": run.environment,
        "command": run.command,
        "started": run.started,
        "took_s": run.took_s,
        "complete": run.complete,
        "slo": run.slo,
        "capacity": run.capacity,
        "tuning": run.tuning,
        "notes": _notes(run.notes) + _reasons(seldom),
        "parity": differences(run.arms, tuned),
        "token_mismatches": {arm: wrong for arm, (wrong, _) in mismatches(records, run.arms[0].name).items()},
        "sequential": _sequential(sequential, run, broken),
        "concurrent": concurrent,
        "void": _reasons([each for each in broken if not each.phase]),
    }
    summary["overall"] = _overall(concurrent, bool(summary["void"]))
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(summary))  # lists, not tuples, as a reader has it
    return plain


def read_summary(folder: Path) -> dict[str, Any]:
    """Rebuild the summary of a results folder from its records and its run, and write it. Raises InputError."""
    summary = summarize(*read_results(folder))
    write_summary(folder, summary)
    return summary


def read_results(folder: Path) -> tuple[list[Record], Run]:
    """What a results folder says happened. Raises InputError when it is not one that compare has written."""
    run = read_run(folder)
    try:
        return list(read_records(folder / RECORDS)), run
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(
            f"{folder / RECORDS} cannot be read ({error}): give a folder that compare has written."
        ) from error


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`, readable."""
    (folder / SUMMARY).write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))


def _notes(notes: Sequence[Note]) -> list[dict[str, Any]]:
    """Notes with their English sentence; `sentences.say` gives the other language."""
    return [{"key": each.key, "values": each.values, "text": say(each.key, each.values)} for each in notes]


def _reasons(broken: Sequence[Broken]) -> list[dict[str, Any]]:
    return _notes([Note(each.key, each.values) for each in broken])


def _void(broken: Sequence[Broken], phase: str, rate: float) -> list[dict[str, Any]]:
    """Why this part is void: its own broken guards, and the run's."""
    return _reasons([each for each in broken if not each.phase or (each.phase == phase and each.rate == rate)])


def _by_arm(records: Sequence[Record], run: Run) -> dict[str, list[Record]]:
    """Each arm's records, in the order of the arms; arms that did not come to run are left out."""
    named = {arm.name: [record for record in records if record.arm == arm.name] for arm in run.arms}
    return {name: found for name, found in named.items() if found}


def _opponents(
    by_arm: dict[str, list[Record]], arms: Sequence[Arm], loss: Callable[[list[Record]], Any]
) -> tuple[str, str] | None:
    """The better colocated arm and the better disaggregated one, by the smaller `loss`. None if one kind is missing."""
    split = {arm.name: arm.deployment.disaggregated for arm in arms}
    colocated = [name for name in by_arm if not split[name]]
    handing = [name for name in by_arm if split[name]]
    if not colocated or not handing:
        return None
    return min(colocated, key=lambda name: loss(by_arm[name])), min(handing, key=lambda name: loss(by_arm[name]))


def _sequential(records: Sequence[Record], run: Run, broken: Sequence[Broken]) -> dict[str, Any]:
    """The one-at-a-time part. Differences are disaggregated / colocated - 1: above zero, disaggregation is slower."""
    by_arm = _by_arm(records, run)
    arms = {name: _sequential_arm(found) for name, found in by_arm.items()}
    result: dict[str, Any] = {
        "requests": run.settings.requests,
        "repeats": len({record.repeat for record in records}),
        "arms": arms,
        "published": PUBLISHED if _as_published(run.settings) else None,
        "void": _void(broken, "sequential", 0.0),
    }
    pair = _opponents(by_arm, run.arms, lambda found: metrics.e2e(found).mean or float("inf"))
    if pair is None:
        return result | {"relative_difference": None, "verdict": None, "why": []}
    base, other = pair
    interval = _paired("e2e_s", by_arm[base], by_arm[other])
    verdict = None
    if interval:
        handoff_s, total_s = arms[other]["handoff_s"].mean or 0.0, arms[base]["total_s"].mean
        verdict = explain(judge("e2e_s", base, other, interval), handoff_s / total_s)
    why = [Note("one_at_a_time")]
    if result["published"]:
        parts = PUBLISHED["prefill_s"] + PUBLISHED["decode_s"] + PUBLISHED["handoff_s"]
        values = {"gain": PUBLISHED["gain"], "parts": parts, "colocated": PUBLISHED["colocated_s"]}
        why.append(Note("published", values))
    if sum(not arm.deployment.disaggregated for arm in run.arms) > 1:
        why.append(Note("better_colocated", {"arm": base}))
    return result | {
        "base": base,
        "other": other,
        "relative_difference": interval,
        "handoff_share": arms[other]["handoff_share"],
        "verdict": _told(verdict),
        "why": [] if result["void"] else _notes(why),  # void numbers need no explanation
    }


def _as_published(settings: Settings) -> bool:
    """Whether the published figures are of this model and workload; beside others they would mean nothing."""
    return settings.engine.model == "seed" and settings.shape == Shape() and not settings.trace


def _sequential_arm(records: list[Record]) -> dict[str, Any]:
    total, handed = metrics.e2e(records), metrics.handoff(records)
    return {
        "total_s": total,
        "prefill_s": metrics.part("prefill", records),
        "decode_s": metrics.part("decode", records),
        "handoff_s": handed,
        "handoff_copy_s": metrics.part("handoff_copy", records),
        "handoff_share": handed.mean / total.mean if handed.mean is not None and total.mean else None,
        "handoff_bytes_per_s": metrics.handoff_rate(records),
        "ttft_s": metrics.ttft(records),
        "tpot_s": metrics.tpot(records),
        "e2e_parts_s": metrics.e2e_parts(records),
        "completed": len(metrics.completed(records)),
        "failed": len(records) - len(metrics.completed(records)),
        "per_repeat": {"e2e_s": [metrics.e2e(found).mean for found in _repeats(records).values()]},
    }


def _concurrent(records: Sequence[Record], run: Run, rate: float, broken: Sequence[Broken]) -> dict[str, Any]:
    """One arrival rate. `difference` and `verdict` are of goodput; `differences` and `verdicts` of every metric."""
    by_arm = _by_arm(records, run)
    result: dict[str, Any] = {
        "rate": rate,
        "load": rate / run.capacity[0].rate if run.capacity else None,
        "repeats": len({record.repeat for record in records}),
        "durations_s": _durations(run, rate),
        "arms": {name: _concurrent_arm(found, run) for name, found in by_arm.items()},
        "void": _void(broken, "concurrent", rate),
    }
    pair = _opponents(by_arm, run.arms, lambda found: _loss(found, run))
    if pair is None:
        return result | {"difference": None, "verdict": None, "differences": {}, "verdicts": {}}
    base, other = pair
    found = {metric: _paired(metric, by_arm[base], by_arm[other]) for metric in _PER_REPEAT}
    found["goodput"] = _goodput_difference(by_arm[base], by_arm[other], run)
    intervals = {metric: interval for metric, interval in found.items() if interval is not None}
    verdicts = {metric: judge(metric, base, other, interval) for metric, interval in intervals.items()}
    return result | {
        "base": base,
        "other": other,
        "difference": {"metric": "goodput", **msgspec.to_builtins(intervals["goodput"])},
        "verdict": _told(verdicts["goodput"]),
        "differences": intervals,
        "verdicts": {metric: _told(verdicts[metric]) for metric in METRICS if metric in verdicts},
    }


def _durations(run: Run, rate: float) -> list[float]:
    """Seconds of arrivals in each repeat: later ones are shorter where the earlier took longer than foreseen."""
    blocks = [block for block in run.blocks if block.phase == "concurrent" and block.rate == rate]
    return list({block.repeat: block.duration_s for block in blocks}.values())


def _concurrent_arm(records: list[Record], run: Run) -> dict[str, Any]:
    done = metrics.completed(records)
    repeats = _repeats(records).values()
    return {
        "ttft_s": metrics.ttft(records),
        "tpot_s": metrics.tpot(records),
        "itl_s": metrics.itl(records),
        "e2e_s": metrics.e2e(records),
        "throughput_tok_s": metrics.throughput(records),
        "goodput": metrics.goodput(records, run.slo),
        "completed": len(done),
        "failed": len(records) - len(done),
        "utilisation": metrics.utilisation(records),
        "ttft_parts_s": metrics.ttft_parts(records),
        "e2e_parts_s": metrics.e2e_parts(records),
        "handoff_s": metrics.handoff(records),
        "handoff_bytes_per_s": metrics.handoff_rate(records),
        "late_s": metrics.lateness(records),
        "preemptions": sum(record.num_preemptions for record in records),
        "per_repeat": {name: [value(found) for found in repeats] for name, value in _PER_REPEAT.items()}
        | {"goodput": [metrics.goodput(found, run.slo).share for found in repeats]},
    }


def _loss(records: list[Record], run: Run) -> tuple[float, float]:
    """Smaller is better: goodput first, then mean end-to-end latency."""
    return -metrics.goodput(records, run.slo).share, metrics.e2e(records).mean or float("inf")


def _repeats(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Records by repeat, rising."""
    numbers = sorted({record.repeat for record in records})
    return {number: [record for record in records if record.repeat == number] for number in numbers}


def _paired(metric: str, base: Sequence[Record], other: Sequence[Record]) -> Interval | None:
    """other / base - 1 from the repeats in which both arms have a value. None without one.

    Latencies are those of the requests that both completed: an arm that lost its slowest requests must not gain by it.
    """
    if metric != "throughput":
        shared = _completed_keys(base) & _completed_keys(other)
        base, other = ([r for r in found if (r.repeat, r.index) in shared] for found in (base, other))
    ours, theirs = _repeats(base), _repeats(other)
    value = _PER_REPEAT[metric]
    pairs = [(value(ours[number]), value(theirs[number])) for number in ours if number in theirs]
    kept = [(one, two) for one, two in pairs if one and two]
    return paired_ratio([one for one, _ in kept], [two for _, two in kept]) if kept else None


def _completed_keys(records: Sequence[Record]) -> set[tuple[int, int]]:
    """Which requests of one phase and rate were completed."""
    return {(record.repeat, record.index) for record in metrics.completed(records)}


def _goodput_difference(base: Sequence[Record], other: Sequence[Record], run: Run) -> Interval:
    """Difference of the shares, repeat by repeat.

    When every repeat gives the same difference (often none: all requests good on both arms) the spread is zero, which
    does not mean certainty: what was never seen in n requests may still happen 3 times in n (the rule of three).
    """
    ours, theirs = _repeats(base), _repeats(other)
    both = [number for number in ours if number in theirs]
    interval = paired_difference(
        [metrics.goodput(ours[number], run.slo).share for number in both],
        [metrics.goodput(theirs[number], run.slo).share for number in both],
    )
    if interval.spread != 0:
        return interval
    unseen = 3 / sum(len(ours[number]) for number in both)
    at = interval.estimate
    return Interval(at, at - unseen, at + unseen, interval.num, interval.spread)


def _told(verdict: Verdict | None) -> dict[str, Any] | None:
    """A verdict as data, with its English sentence; `sentences.sentence` gives the other language."""
    if verdict is None:
        return None
    plain: dict[str, Any] = msgspec.to_builtins(verdict)
    return plain | {"sentence": sentence(verdict)}


def _overall(concurrent: Sequence[dict[str, Any]], void: bool) -> dict[str, Any]:
    """The last line: how many rates went which way, void ones aside."""
    valid = [each["verdict"] for each in concurrent if each["verdict"] and not each["void"]]
    if void or not valid:
        return _notes([Note("overall_void")])[0]
    counts = {kind: sum(each["kind"] == kind for each in valid) for kind in ("better", "worse", "equal", "open")}
    names = {side: "/".join(sorted({each[side] for each in valid})) for side in ("base", "other")}
    return _notes([Note("overall", {**names, **counts, "num": len(valid)})])[0]
