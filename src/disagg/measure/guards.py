"""What makes a comparison worthless, looked for before (parity of the arms) and after (the run itself).

A broken run guard makes its part of the results void: its numbers are still shown, with the reason, and no verdict.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from disagg.errors import InputError
from disagg.measure.metrics import Stat, lateness
from disagg.measure.run import Arm, Run
from disagg.record import Record

LATE_LIMIT_S = 0.025  # p99 of sent - scheduled
Values = Mapping[str, float | int | str]
UNSPLIT_LIMIT = 0.05  # of the requests of a disaggregated arm, without a hand-off
ROUNDING_LIMIT = 0.5  # of the requests that ran alone on GPUs, with other tokens than in the first arm
_SEARCHED = ("max_batch_tokens", "max_mixed_tokens")  # what the search for the colocated chunk size changes
DRIFT_LIMIT = 0.25  # change of the median of the same requests between the first and the last sequential repeat


class Difference(msgspec.Struct, frozen=True):
    """A setting in which an arm differs from the first one. `tuned` ones are meant to; the others are not."""

    arm: str
    base: str
    field: str
    ours: str
    theirs: str
    tuned: bool = False


def differences(arms: Sequence[Arm], tuned: Iterable[str] = ()) -> list[Difference]:
    """Every setting in which an arm differs from the first, roles aside (they are what is compared).

    `tuned` names the arms whose chunk size was searched.
    """
    found = []
    searched = set(tuned)
    first = _comparable(arms[0])
    for arm in arms[1:]:
        for field, theirs in _comparable(arm).items():
            if theirs != first[field]:
                meant = field in _SEARCHED and bool(searched & {arm.name, arms[0].name})
                found.append(Difference(arm.name, arms[0].name, field, str(first[field]), str(theirs), meant))
    return found


def check_parity(arms: Sequence[Arm], allow_unequal: bool, tuned: Iterable[str] = ()) -> list[Difference]:
    """The differences; raises InputError naming each unless all are meant or `allow_unequal`."""
    found = differences(arms, tuned)
    unmeant = [each for each in found if not each.tuned]
    if unmeant and not allow_unequal:
        listed = "; ".join(
            f"{each.field} is {each.theirs} in {each.arm}, {each.ours} in {each.base}" for each in unmeant
        )
        raise InputError(f"The arms are not equal ({listed}): make them equal, or say --allow-unequal.")
    return found


def _comparable(arm: Arm) -> dict[str, Any]:
    """What must be equal: the devices, and every engine setting."""
    used = sorted({device for worker in arm.deployment.workers for device in worker.devices})
    settings: dict[str, Any] = msgspec.to_builtins(arm.engine)
    return {"devices": f"{arm.deployment.budget.kind}:{used}"} | settings


class Broken(msgspec.Struct, frozen=True):
    """A guard that was broken, and where. `key` and `values` make a sentence; rate None is the whole run."""

    key: str
    values: Values
    phase: str = ""  # "": the whole run
    rate: float = 0.0


def run_guards(records: Sequence[Record], run: Run) -> list[Broken]:
    """Every guard that the run broke."""
    broken = [] if run.complete else [Broken("incomplete", {})]
    groups: dict[tuple[str, str, float], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.phase, record.arm, record.rate].append(record)
    for (phase, arm, rate), group in groups.items():
        broken += _failures(phase, arm, rate, group)
        late = lateness(group)
        if phase == "concurrent" and late.p99 is not None and late.p99 > LATE_LIMIT_S:
            values: Values = {"arm": arm, "rate": rate, "p99_ms": 1e3 * late.p99, "limit_ms": 1e3 * LATE_LIMIT_S}
            broken.append(Broken("late", values, phase, rate))
        if phase == "sequential":
            broken += _drift(arm, group)
    broken += [each for each in unsplit(records, run) if float(each.values["share"]) > UNSPLIT_LIMIT]
    return broken + _missing(records, run) + _tokens(records, run)


def unsplit(records: Sequence[Record], run: Run) -> list[Broken]:
    """Where a disaggregated arm completed requests without a hand-off: prefill and decode on one worker.

    Above UNSPLIT_LIMIT it breaks a guard; below, it is worth a note. Outputs of one token have nothing to hand over.
    """
    split = {arm.name for arm in run.arms if arm.deployment.disaggregated}
    counts: dict[tuple[str, str, float], list[bool]] = defaultdict(list)
    for record in records:
        if record.arm in split and record.ok and record.output_len > 1:
            counts[record.phase, record.arm, record.rate].append(record.handoff_bytes == 0)
    found = []
    for (phase, arm, rate), without in counts.items():
        num, of = sum(without), len(without)
        if num:
            values: Values = {"arm": arm, "rate": rate, "num": num, "of": of, "share": num / of}
            found.append(Broken("unsplit", values, phase, rate))
    return found


def _failures(phase: str, arm: str, rate: float, group: Sequence[Record]) -> list[Broken]:
    """Requests that ended in an error. Those past their deadline are not: an arm that cannot keep up is a result."""
    errors = Counter(record.error or "no reason given" for record in group if record.finish_reason == "error")
    if not errors:
        return []
    why = errors.most_common(1)[0][0]
    values: Values = {"arm": arm, "rate": rate, "num": errors.total(), "of": len(group), "why": why}
    return [Broken("failures", values, phase, rate)]


def _drift(arm: str, group: Sequence[Record]) -> list[Broken]:
    """The same requests in the first and the last repeat, between which all the load lies."""
    repeats = sorted({record.repeat for record in group})
    first, last = (Stat.of(r.e2e_s for r in group if r.repeat == repeat).p50 for repeat in (repeats[0], repeats[-1]))
    if not first or not last or abs(last / first - 1) <= DRIFT_LIMIT:
        return []
    return [Broken("drift", {"arm": arm, "change": last / first - 1, "limit": DRIFT_LIMIT})]


def _missing(records: Sequence[Record], run: Run) -> list[Broken]:
    """Blocks without exactly one record per request."""
    have = Counter((record.arm, record.phase, record.rate, record.repeat) for record in records)
    broken = []
    for block in run.blocks:
        num = have[block.arm, block.phase, block.rate, block.repeat]
        if num != block.num:
            values: Values = {"arm": block.arm, "rate": block.rate, "repeat": block.repeat, "num": num, "of": block.num}
            broken.append(Broken("missing", values, block.phase, block.rate))
    return broken


def mismatches(records: Sequence[Record], base: str) -> dict[str, tuple[int, int]]:
    """Of each arm but `base`: requests whose tokens differ from base's, of how many that both completed.

    Greedy decoding of the same prompt by the same weights: any difference means that the arms did different work.
    """
    ours = {(r.phase, r.rate, r.repeat, r.index): r.tokens for r in records if r.arm == base and r.ok}
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        key = (record.phase, record.rate, record.repeat, record.index)
        if record.arm == base or not record.ok or key not in ours:
            continue
        wrong, of = counts.get(record.arm, (0, 0))
        counts[record.arm] = (wrong + (record.tokens != ours[key]), of + 1)
    return counts


def _tokens(records: Sequence[Record], run: Run) -> list[Broken]:
    """Arms that did not give the first arm's tokens.

    On GPUs the last bits of a sum depend on what else is in the step, and a near tie of two tokens falls either way. So
    there only requests that ran alone are compared, and up to ROUNDING_LIMIT of them may differ: wrong pages make
    nonsense of nearly all.
    """
    base, allowed = run.arms[0].name, 0.0
    if run.arms[0].deployment.budget.kind == "cuda":
        records, allowed = [record for record in records if record.phase == "sequential"], ROUNDING_LIMIT
    return [
        Broken("tokens", {"num": wrong, "of": of, "arm": arm, "base": base})
        for arm, (wrong, of) in mismatches(records, base).items()
        if wrong > allowed * of
    ]
