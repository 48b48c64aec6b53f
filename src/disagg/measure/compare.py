"""The main job: the same requests on every arm, on one budget, repeated, interleaved, and judged.

    start every arm, check parity ─▶ warm up ─▶ unloaded latency and capacity of the colocated arms
      ─▶ chunk size of the best one ─▶ one at a time (repeats, all but the last) ─▶ rates
      ─▶ open loop: repeats × rates × arms, arms in random order ─▶ one at a time (last repeat) ─▶ summary

All arms stay loaded and one is driven at a time: an idle worker sleeps in its poll and costs memory, not time. So arms
can alternate from block to block, and slow drift of the machine meets all of them alike. The last sequential repeat
runs at the very end, so a drift of the machine is seen (`guards`). What is judged comes after the last restart: each
arm has one configuration throughout.
"""

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from disagg.clock import Clock
from disagg.config import Deployment, EngineSpec
from disagg.measure import metrics, stages
from disagg.measure.drive import Driven, Label, run_one_at_a_time, run_open_loop
from disagg.measure.guards import check_parity
from disagg.measure.run import RECORDS, WORKLOADS, Arm, Block, Run, Settings, write_run
from disagg.measure.sources import Source, load_trace, make_source
from disagg.measure.summary import summarize, write_summary
from disagg.record import Record, write_records
from disagg.workload.workload import Limits, Note, Row, Workload, write_workloads

WARM_UP, PROBE, UNLOADED = 8, 3, 8  # requests, none of them judged
CAPACITY_S = 3.0
TAIL = 3.0  # a block ends about so many unloaded request times after its last arrival
CLOSING_S = 3.0  # kept back for stopping the workers and writing the summary


class Served(Driven, Protocol):
    """A running deployment, as `Cluster` is one."""

    engine: EngineSpec  # with the context length resolved
    num_pages: int  # of each worker

    @property
    def info(self) -> Any:
        """`info.spec` has vocab_size and eos_ids."""

    def close(self) -> None:
        """Stop it; may be called twice."""


class Progress(Protocol):
    """Who is told how far it is."""

    def stage(self, text: str, total: int = 1) -> None:
        """A stage of `total` steps begins."""

    def step(self) -> None:
        """One step is done."""


Start = Callable[[Deployment, EngineSpec], Served]


def compare(run: Run, folder: Path, start: Start, clock: Clock, progress: Progress) -> dict[str, Any]:
    """Measure, write records, workloads, run and summary into `folder` (which exists), and return the summary.

    `run` comes with settings, arms, command and environment; the rest is filled in. Whatever ends it early, the workers
    are stopped and the folder keeps what was measured, marked incomplete.
    """
    check_parity(run.arms, run.settings.allow_unequal)
    with contextlib.ExitStack() as stack:
        comparison = _Comparison(run, folder, start, clock, progress)
        stack.callback(comparison.close)
        comparison.measure()
    run.took_s = clock.now() - comparison.begun_at
    run.complete = True
    write_run(folder, run)
    summary = summarize(comparison.records, run)
    write_summary(folder, summary)
    return summary


def merge_note(notes: Sequence[Note], new: Note) -> list[Note]:
    """The notes with one more; of the same kind (and rate, where it has one) there is one only, its counts added up."""
    merged = list(notes)
    for place, old in enumerate(notes):
        if (old.key, old.values.get("rate")) != (new.key, new.values.get("rate")):
            continue
        counts = {name: int(old.values[name]) + int(new.values[name]) for name in ("num", "of") if name in new.values}
        merged[place] = Note(old.key, {**old.values, **counts})
        return merged
    return [*merged, new]


class _Comparison:
    """The live side of a Run: its clusters and what they have recorded so far."""

    def __init__(self, run: Run, folder: Path, start: Start, clock: Clock, progress: Progress) -> None:
        self.run, self.folder = run, folder
        self.start, self.clock, self.progress = start, clock, progress
        self.clusters: dict[str, Served] = {}
        self.records: list[Record] = []
        self.begun_at = clock.now()
        self.start_s = 0.0  # of one cluster
        self.random = random.Random(run.settings.seed)

    def measure(self) -> None:
        """All stages, in order."""
        trace = load_trace(self.settings)  # before anything is started: it may be refused
        self._start_all()
        limits = self._limits()
        source = make_source(self.settings, limits, trace)
        self._write_facts()
        self.progress.stage("warm up", len(self.run.arms))
        for arm in self.run.arms:
            self._warm_up(arm, source.alone(WARM_UP))
            self.progress.step()
        if trace is not None and self.settings.length_scale is None:
            first = self.clusters[self.run.arms[0].name]
            scale, notes = stages.fit_lengths(first, trace, limits, self.clock, self.settings)
            self._resolve(msgspec.structs.replace(self.settings, length_scale=scale), notes)
            source = make_source(self.settings, limits, trace)
        self._resolve(*stages.fit_sequential(self.settings, self._probe(source)))
        self._decide(source)
        alone = source.alone(self.settings.requests)
        num_first = max(1, self.settings.repeats - 1)
        before_at = self.clock.now()
        self._sequential(alone, range(num_first))
        closing_s = CLOSING_S + (self.clock.now() - before_at) / num_first
        self._choose_rates(closing_s)
        self._concurrent(source, closing_s)
        self._sequential(alone, range(num_first, self.settings.repeats))

    @property
    def settings(self) -> Settings:
        """The settings as far as they are resolved."""
        return self.run.settings

    def _resolve(self, settings: Settings, notes: Sequence[Note]) -> None:
        """Take settings that measuring has changed, and state how."""
        self.run.settings = settings
        self.run.notes += notes

    def _remaining_s(self) -> float:
        return self.settings.time_budget_s - (self.clock.now() - self.begun_at)

    def close(self) -> None:
        """Stop every cluster, also when stopping one of them fails."""
        with contextlib.ExitStack() as stack:
            for cluster in self.clusters.values():
                stack.callback(cluster.close)

    def _start_all(self) -> None:
        before_at = self.clock.now()
        self.progress.stage("start", len(self.run.arms))
        for arm in self.run.arms:
            self.clusters[arm.name] = self.start(arm.deployment, arm.engine)
            self.progress.step()
        self.start_s = (self.clock.now() - before_at) / len(self.run.arms)

    def _limits(self) -> Limits:
        """What every arm can take: the context, or the KV memory of a worker where that is less."""
        clusters = self.clusters.values()
        room = min(min(each.engine.max_len or 0, each.num_pages * each.engine.page_size) for each in clusters)
        spec = next(iter(clusters)).info.spec
        return Limits(spec.vocab_size, room, frozenset(spec.eos_ids))

    def _write_facts(self) -> None:
        """State what is known before measuring, so that an interrupted run can be read too."""
        self.run.notes.append(Note("alive"))
        for arm in self.run.arms:
            if arm.deployment.oversubscribed:
                self.run.notes.append(Note("oversubscribed", {"arm": arm.name}))
        for found in check_parity(self.run.arms, self.settings.allow_unequal):
            values = {"arm": found.arm, "base": found.base, "field": found.field}
            self.run.notes.append(Note("unequal", values | {"theirs": found.theirs, "ours": found.ours}))
        write_run(self.folder, self.run)

    def _warm_up(self, arm: Arm, workload: Workload) -> None:
        """First calls compile and fault in memory; these short requests, all at once, are not recorded."""
        short = [Row(row.index, 0.0, row.prompt[:128], min(8, row.max_tokens)) for row in workload.rows[:WARM_UP]]
        few = msgspec.structs.replace(workload, rows=tuple(short))
        run_open_loop(self.clusters[arm.name], few, self.clock, Label(arm.name, "warm-up"))

    def _probe(self, source: Source) -> float:
        """Seconds that one request takes alone on the first arm: decides how many can be afforded."""
        name = self.run.arms[0].name
        records = run_one_at_a_time(self.clusters[name], source.alone(PROBE), self.clock, Label(name, "probe"))
        return metrics.e2e(records).mean or 0.0

    def _sequential(self, workload: Workload, repeats: Sequence[int]) -> None:
        """The same requests on every arm, one at a time."""
        self.progress.stage("one at a time", len(repeats) * len(self.run.arms))
        for repeat in repeats:
            if repeat == 0:
                self._keep_workload(workload)
            for arm in self._shuffled():
                label = Label(arm.name, "sequential", 0.0, repeat)
                records = run_one_at_a_time(self.clusters[arm.name], workload, self.clock, label)
                self._keep(records, Block(arm.name, "sequential", 0.0, repeat, len(workload.rows)))

    def _decide(self, source: Source) -> None:
        """Default SLO, capacity and chunk size, each by measuring. See `stages`."""
        run = self.run
        colocated = [arm for arm in run.arms if not arm.deployment.disaggregated]
        few, by_arm = source.alone(min(UNLOADED, self.settings.requests)), {}
        self.progress.stage("unloaded", len(colocated))
        for arm in colocated:
            label = Label(arm.name, "unloaded")
            by_arm[arm.name] = run_one_at_a_time(self.clusters[arm.name], few, self.clock, label)
            self.progress.step()
        unloaded = {name: metrics.e2e(found).mean or 1.0 for name, found in by_arm.items()}
        fastest = min(unloaded, key=lambda name: unloaded[name])
        if self.settings.slo is None:
            run.slo, slo_note = stages.default_slo(fastest, by_arm[fastest])
            run.notes.append(slo_note)
        else:
            run.slo = self.settings.slo
        self.progress.stage("capacity", len(colocated))
        limit_s = min(6 * CAPACITY_S, stages.CAPACITY_SHARE * self.settings.time_budget_s)
        for arm in colocated:
            cluster, alone_s = self.clusters[arm.name], unloaded[arm.name]
            capacity, notes = stages.measure_capacity(cluster, arm, source, self.clock, alone_s, CAPACITY_S, limit_s)
            run.capacity.append(capacity)
            run.notes += notes
            self.progress.step()
        run.capacity.sort(key=lambda capacity: -capacity.rate)
        for found in run.capacity:
            values: dict[str, float | int | str] = {"arm": found.arm, "rate": found.rate, "tokens": found.tokens_per_s}
            values |= {"in_flight": found.in_flight, "window_s": found.window_s}
            run.notes.append(Note("capacity", values))
        self._tune(source)

    def _choose_rates(self, closing_s: float) -> None:
        """The rates, by the capacity and the time that is left."""
        run, tail_s = self.run, TAIL * (metrics.e2e(self.records).mean or 0.0)
        self._resolve(*stages.fit_loads(self.settings, run.capacity[0], self._remaining_s() - closing_s, tail_s))
        run.rates = stages.choose_rates(self.settings, run.capacity[0])

    def _tune(self, source: Source) -> None:
        """Search the chunk size of the colocated arm with the highest capacity, and restart it with the best.

        Left out, and that stated, when it is not wanted or takes too long.
        """
        best = self.run.capacity[0]
        place = next(place for place, arm in enumerate(self.run.arms) if arm.name == best.arm)
        engines = stages.chunk_candidates(self.run.arms[place].engine)
        rate = stages.TUNE_LOAD * best.rate
        seconds = len(engines) * (self.start_s + stages.trial_s(rate))
        if not self.settings.tune:
            self.run.notes.append(Note("not_tuned", {"value": engines[0].chunk_tokens}))
            return
        if seconds > stages.TUNE_SHARE * self.settings.time_budget_s:
            self.run.notes.append(Note("tune_slow", {"value": engines[0].chunk_tokens, "seconds": seconds}))
            return
        # One repeat more than will be judged: the search must not see the traffic that decides.
        workload = source.stream(rate, stages.trial_s(rate), self.settings.repeats)
        self.progress.stage("chunk size", len(engines))
        for engine in engines:
            self._restart(place, engine, workload)
            trial = stages.try_chunk(self.clusters[best.arm], workload, self.clock, engine, self.run.slo)
            self.run.tuning.append(trial)
            self.progress.step()
        chosen = engines[self.run.tuning.index(stages.best_trial(self.run.tuning))]
        self._restart(place, chosen, workload)
        tried = ", ".join(str(engine.chunk_tokens) for engine in engines)
        self.run.notes.append(Note("tuned", {"arm": best.arm, "value": chosen.chunk_tokens, "tried": tried}))

    def _restart(self, place: int, engine: EngineSpec, workload: Workload) -> None:
        """Run one arm with another engine, if it has not got it already, and warm it up."""
        arm = self.run.arms[place]
        if arm.engine == engine:
            return
        self.run.arms[place] = msgspec.structs.replace(arm, engine=engine)
        self.clusters[arm.name].close()
        self.clusters[arm.name] = self.start(arm.deployment, engine)
        self._warm_up(self.run.arms[place], workload)

    def _concurrent(self, source: Source, closing_s: float) -> None:
        """Open loop: every repeat meets every rate, every arm meets the same requests, in random order."""
        run, settings = self.run, self.settings
        tail_s = TAIL * (metrics.e2e(self.records).mean or 0.0)
        per_repeat = len(run.rates) * len(run.arms)
        self.progress.stage("under load", settings.repeats * per_repeat)
        duration_s = math.inf
        for repeat in range(settings.repeats):
            # Shorter blocks when the earlier ones took longer than foreseen; within a repeat all arms have the same.
            num_left = (settings.repeats - repeat) * per_repeat
            allowed_s = stages.choose_duration(settings, run.rates, self._remaining_s() - closing_s, num_left, tail_s)
            duration_s = min(duration_s, allowed_s)
            write_run(self.folder, run)
            for rate in self.random.sample(run.rates, len(run.rates)):
                workload = source.stream(rate, duration_s, repeat)
                self._keep_workload(workload)
                for arm in self._shuffled():
                    label = Label(arm.name, "concurrent", rate, repeat)
                    drain_s = max(10.0, 3 * workload.span_s)
                    records = run_open_loop(self.clusters[arm.name], workload, self.clock, label, drain_s)
                    self._keep(records, Block(arm.name, "concurrent", rate, repeat, len(workload.rows), duration_s))
        run.notes += stages.few_requests(settings, run.rates, duration_s)

    def _shuffled(self) -> list[Arm]:
        return self.random.sample(self.run.arms, len(self.run.arms))

    def _keep_workload(self, workload: Workload) -> None:
        """Save what will be asked, and state what had to be changed to ask it: counts of all blocks in one note."""
        write_workloads(self.folder / WORKLOADS, [workload])
        for note in workload.notes:
            self.run.notes = merge_note(self.run.notes, note)

    def _keep(self, records: list[Record], block: Block) -> None:
        """Save a block's records as soon as they are there."""
        write_records(self.folder / RECORDS, records)
        self.records += records
        self.run.blocks.append(block)
        self.progress.step()
