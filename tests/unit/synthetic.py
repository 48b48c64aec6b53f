"""Realistic Records without an engine: a tiny simulation of colocated and disaggregated workers, seeded.

A step of a worker costs a fixed time, plus a time for each prompt position, plus a time for each running sequence. A
colocated worker puts prompt chunks and decode into the same step; that is all the interference there is.
"""

import heapq
import random
from dataclasses import dataclass, field
from pathlib import Path

from disagg.config import SLO, Budget, Deployment
from disagg.measure.run import RECORDS, Arm, Block, Capacity, Run, Settings, environment, write_run
from disagg.record import Record, Span, write_records
from disagg.workload.workload import Note

CHUNK = 128
STEP_S, POSITION_S, SEQUENCE_S, COPY_S, WIRE_S = 0.002, 0.0002, 0.0005, 0.0015, 0.0004


@dataclass
class Work:
    record: Record
    left: int
    out: int


@dataclass
class Worker:
    name: str
    role: str
    now: float = 0.0
    waiting: list[tuple[float, int, Work]] = field(default_factory=list)
    running: list[Work] = field(default_factory=list)
    order: int = 0

    def give(self, at: float, work: Work) -> None:
        self.order += 1
        heapq.heappush(self.waiting, (at, self.order, work))

    def step(self) -> list[Work]:
        """Run one step; returns the requests whose prompt it finished."""
        if not self.running and self.waiting and self.waiting[0][0] > self.now:
            self.now = self.waiting[0][0]
        decoding = list(self.running)
        chunks: list[tuple[Work, int]] = []
        room = CHUNK
        for at, _, work in sorted(self.waiting, key=lambda item: item[:2]):
            if at <= self.now and work.left and room:
                chunks.append((work, min(room, work.left)))
                room -= chunks[-1][1]
        for item in [item for item in self.waiting if item[0] <= self.now and not item[2].left]:
            self.waiting.remove(item)
            item[2].record.decode_start_at = self.now
            self.running.append(item[2])
            decoding.append(item[2])
        start = self.now
        cost = STEP_S + POSITION_S * sum(num for _, num in chunks) + SEQUENCE_S * len(decoding)
        self.now += cost
        for work in decoding:
            work.record.token_at.append(self.now + WIRE_S)
            work.record.decode_busy_s += cost / max(len(decoding) + sum(n for _, n in chunks), 1)
            work.out -= 1
        self.running = [work for work in self.running if work.out > 0]
        return [work for work, num in chunks if self._advance(work, num, start, cost)]

    def _advance(self, work: Work, num: int, start: float, cost: float) -> bool:
        record = work.record
        record.prefill_start_at = record.prefill_start_at or start
        record.spans.append(Span("prefill", self.name, start, self.now, num))
        record.prefill_busy_s += cost
        work.left -= num
        return work.left == 0


def simulate(arm: str, rows: list[tuple[float, int, int]], start: float = 100.0) -> list[Record]:
    """Records of `rows` (arrival, prompt, output) on an arm such as 2C or 1P1D."""
    if arm.endswith("C"):
        front = back = [Worker(f"C{i}.0", "both") for i in range(int(arm[:-1]))]
    else:
        num_prefill, num_decode = arm[:-1].split("P")
        front = [Worker(f"P{i}.0", "prefill") for i in range(int(num_prefill))]
        back = [Worker(f"D{i}.0", "decode") for i in range(int(num_decode))]
    records = []
    for index, (at, prompt, output) in enumerate(rows):
        due, worker = start + at, front[index % len(front)]
        record = Record(request_id=f"r{index}", index=index, prompt_len=prompt, output_len=output, max_tokens=output)
        record.scheduled_at, record.sent_at, record.queued_at = due, due + 1e-4, due + 3e-4
        record.arm, record.prefill_worker, record.finish_reason = arm, worker.name, "length"
        records.append(record)
        worker.give(due + 3e-4, Work(record, prompt, output - 1))
    workers = list({id(worker): worker for worker in front + back}.values())
    while busy := [worker for worker in workers if worker.waiting or worker.running]:
        worker = min(busy, key=lambda one: one.now if one.running else max(one.now, one.waiting[0][0]))
        for work in worker.step():
            _hand_over(worker, work, worker if worker in back else back[work.record.index % len(back)])
    return records


def _hand_over(worker: Worker, work: Work, target: Worker) -> None:
    record = work.record
    worker.waiting = [item for item in worker.waiting if item[2] is not work]
    heapq.heapify(worker.waiting)
    record.prefill_end_at = worker.now
    record.token_at.append(worker.now + WIRE_S)
    if not work.out:
        return
    record.decode_worker = target.name
    if target is worker:
        record.decode_start_at = worker.now
        worker.running.append(work)
        return
    record.handoff_start_at = worker.now + 1e-4
    record.handoff_end_at = record.handoff_start_at + COPY_S
    record.handoff_busy_s, record.handoff_bytes = COPY_S, record.prompt_len * 24576
    record.spans.append(
        Span("handoff", target.name, record.handoff_start_at, record.handoff_end_at, record.handoff_bytes)
    )
    target.give(record.handoff_end_at + 1e-4, work)


def one_at_a_time(arms: list[str], repeats: int = 3, num: int = 20) -> list[Record]:
    """The sequential phase: every request due when the one before it has ended."""
    records = []
    for repeat in range(repeats):
        draw = random.Random(42)
        lengths = [(draw.randint(10, 99), draw.randint(5, 49)) for _ in range(num)]
        for arm in arms:
            start = 10.0 + 100 * repeat
            for index, (prompt, output) in enumerate(lengths):
                (record,) = simulate(arm, [(0.0, prompt, output)], start)
                record.index, record.phase, record.repeat = index, "sequential", repeat
                start = record.token_at[-1]
                records.append(record)
    return records


def under_load(arms: list[str], rates: list[float], repeats: int = 3, num: int = 120) -> list[Record]:
    """The concurrent phase: Poisson arrivals, one prompt in ten long, the same rows for every arm."""
    records = []
    for rate in rates:
        for repeat in range(repeats):
            draw = random.Random(f"{rate} {repeat}")
            at, rows = 0.0, []
            for _ in range(num):
                at += draw.expovariate(rate)
                prompt = draw.randint(400, 900) if draw.random() < 0.1 else draw.randint(20, 120)
                rows.append((at, prompt, draw.randint(10, 60)))
            for place, arm in enumerate(arms):
                run = simulate(arm, rows, 1000.0 * (place + 1))
                for record in run:
                    record.phase, record.rate, record.repeat = "concurrent", rate, repeat
                records += run
    return records


def results(folder: Path, arms: list[str], records: list[Record], slo: SLO | None = None) -> Run:
    """Write the folder that a comparison with these records would have left, and return its run."""
    settings = Settings(arms=tuple(arms), repeats=3)
    deployments = [Arm(arm, Deployment.parse(arm, Budget("cpu", (0, 1))), settings.engine) for arm in arms]
    counts: dict[tuple[str, str, float, int], int] = {}
    for record in records:
        key = (record.arm, record.phase, record.rate, record.repeat)
        counts[key] = counts.get(key, 0) + 1
    run = Run(
        command=f"disagg compare --model seed --arms {','.join(arms)} --rate '8,14' --out <results>",
        settings=settings,
        arms=deployments,
        environment=environment(),
        slo=slo or SLO(ttft_s=0.25, tpot_s=0.02),
        rates=sorted({record.rate for record in records if record.rate}),
        blocks=[Block(*key, num=num) for key, num in counts.items()],  # type: ignore[arg-type]
        capacity=[Capacity(arms[0], 30.0, 1000.0, 32, 3.0)],
        notes=[
            Note("alive"),
            Note("capacity", {"arm": arms[0], "rate": 30.0, "tokens": 1000.0, "in_flight": 32, "window_s": 3.0}),
        ],
        started="2026-11-22T18:30:00Z",
        took_s=247.0,
        complete=True,
    )
    write_records(folder / RECORDS, records)
    write_run(folder, run)
    return run
