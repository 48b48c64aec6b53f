"""What a comparison is: its settings, and everything about a finished one that its Records do not say.

A results folder holds `records.jsonl` (what happened), `workload.jsonl` (what was asked), `run.json` (the `Run` below)
and `summary.json`, which is a function of the records and the run, so `disagg report` can rebuild it.
"""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Literal

import msgspec

from disagg.cluster.policies import DEFAULT
from disagg.config import SLO, Budget, Deployment, EngineSpec
from disagg.errors import BudgetError, InputError
from disagg.workload.workload import Note, Shape

RECORDS, WORKLOADS, RUN, SUMMARY = "records.jsonl", "workload.jsonl", "run.json", "summary.json"
PACKAGES = ("disagg", "torch", "triton", "numba", "numpy", "scipy", "transformers", "gguf", "pyzmq", "msgspec")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller asked for. Empty or None fields are resolved by measuring; the Run says to what."""

    engine: EngineSpec = EngineSpec()
    arms: tuple[str, ...] = ("2C", "1P1D")  # a deployment each, `NAME@BUDGET` where one differs from `budget`
    budget: str = "cpu:2"
    policy: str = DEFAULT  # of routing, for every arm
    shape: Shape = Shape()
    arrivals: str = "poisson"
    trace: str = ""  # path; "": the shape above
    trace_limit: int | None = None
    length_scale: float | None = None
    requests: int = 20  # of the sequential phase
    repeats: int = 5  # of each phase
    rates: tuple[float, ...] = ()  # requests/s; (): `loads` times the measured capacity
    loads: tuple[float, ...] = (0.4, 0.6, 0.8, 0.9)
    duration_s: float | None = None  # of arrivals in one block; None: what `time_budget_s` allows
    time_budget_s: float = 255.0  # for measuring; the report and the start of Python come on top
    slo: SLO | None = None
    seed: int = 42
    tune: bool = True
    given: tuple[str, ...] = ()  # fields the caller chose, which no time budget may lower
    allow_unequal: bool = False
    lang: Literal["en", "zh"] = "en"

    def __post_init__(self) -> None:
        rules = (
            (self.requests >= 1, "--requests must be at least 1."),
            (self.repeats >= 1, "--repeats must be at least 1."),
            (all(rate > 0 for rate in self.rates), "--rate must be above 0 requests/s."),
            (self.duration_s is None or self.duration_s > 0, "--duration must be above 0 seconds."),
            (self.length_scale is None or self.length_scale > 0, "--length-scale must be above 0."),
            (self.trace_limit is None or self.trace_limit >= 2, "--trace-limit must be at least 2."),
            (len(set(self.arms)) == len(self.arms), "--arms names an arm twice: name each once."),
        )
        for holds, message in rules:
            if not holds:
                raise InputError(message)


class Arm(msgspec.Struct, frozen=True):
    """One side of the comparison: a deployment and how its workers run."""

    name: str
    deployment: Deployment
    engine: EngineSpec


class Block(msgspec.Struct, frozen=True):
    """One unbroken stretch of requests on one arm, in the order in which they were run."""

    arm: str
    phase: Literal["sequential", "concurrent"]
    rate: float
    repeat: int
    num: int  # requests
    duration_s: float = 0.0  # of arrivals; 0 where requests run one at a time


class Capacity(msgspec.Struct, frozen=True):
    """What a colocated arm delivers when saturated."""

    arm: str
    rate: float  # requests/s
    tokens_per_s: float
    in_flight: int
    window_s: float


class Trial(msgspec.Struct, frozen=True):
    """One chunk size tried on the colocated arm."""

    max_batch_tokens: int
    goodput: float
    e2e_s: float
    max_mixed_tokens: int | None = None


class Run(msgspec.Struct, kw_only=True):
    """Everything about a comparison that its Records do not say. Written when it starts, and again when it ends."""

    command: str
    settings: Settings
    arms: list[Arm]
    environment: dict[str, str | int | float | dict[str, str]]
    slo: SLO = SLO()
    rates: list[float] = []
    blocks: list[Block] = []
    capacity: list[Capacity] = []
    tuning: list[Trial] = []
    notes: list[Note] = []
    started: str = ""  # ISO 8601, UTC
    took_s: float = 0.0
    complete: bool = False


def make_arms(settings: Settings, cores: tuple[int, ...]) -> list[Arm]:
    """The arms, placed on their budgets. Raises InputError when they are no comparison, BudgetError when impossible."""
    arms = []
    for text in settings.arms:
        notation, _, budget = text.partition("@")
        deployment = Deployment.parse(notation, Budget.parse(budget or settings.budget, cores))
        arms.append(Arm(text, deployment, settings.engine))
    if len({arm.deployment.disaggregated for arm in arms}) < 2:
        raise InputError(
            f"--arms {','.join(settings.arms)} compares nothing: name a colocated arm and a disaggregated one, "
            "as in 2C,1P1D."
        )
    kinds = {arm.deployment.budget.kind for arm in arms}
    if len(kinds) > 1:
        raise BudgetError("Arms on different kinds of device cannot be compared: give all of them cores, or all GPUs.")
    return arms


def write_run(folder: Path, run: Run) -> None:
    """Write `run.json`, readable. Whenever the writer is stopped, the folder has the old one or the new one, whole."""
    draft = folder / f"{RUN}.new"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=2))
    draft.replace(folder / RUN)


def read_run(folder: Path) -> Run:
    """Read `run.json`. Raises InputError when the folder is not a results folder."""
    try:
        return msgspec.json.decode((folder / RUN).read_bytes(), type=Run)
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(
            f"{folder} holds no readable {RUN} ({error}): give a folder that compare has written."
        ) from error


def environment(budget: Budget | None = None) -> dict[str, str | int | float | dict[str, str]]:
    """The machine and the versions that a result depends on; with a budget of GPUs their names too."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    found: dict[str, str | int | float | dict[str, str]] = {
        "cpu": cpu_name(),
        "cores": len(cores),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if budget is not None and budget.kind == "cuda":
        from disagg.transfer.cuda_driver import driver

        found["gpus"] = {str(device): driver().name(device) for device in budget.devices}
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
