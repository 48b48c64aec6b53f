"""`disagg compare`: the options, the results folder and the progress bar around `measure.compare`."""

import contextlib
import datetime
import functools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from disagg.clock import WallClock
from disagg.cluster.policies import DEFAULT, POLICIES
from disagg.config import DTYPES, SLO, Budget, EngineSpec
from disagg.errors import InputError
from disagg.measure import run as runs
from disagg.measure.compare import compare as measure
from disagg.measure.tables import show
from disagg.workload.lengths import Lengths
from disagg.workload.workload import Limits, Shape

GIB = 1 << 30
_ENGINE, _ON_GPUS = EngineSpec.on("cpu"), EngineSpec.on("cuda")
_SETTINGS, _SHAPE = runs.Settings(), Shape()
_BETWEEN_ARMS = r",(?!\s*\d+\s*(?:,|$))"  # not the comma of 2C@cuda:0,1
QUICK: dict[str, Any] = {"repeats": 3, "loads": (0.6, 0.9), "tune": False, "time_budget_s": 44.0}

_Command = Callable[..., None]


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, shown in this order."""

    def apply(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def _gibibytes(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """A size that memory can have. Raises InputError."""
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"--kv-memory {value:g} is no size: give GiB above 0, as in 0.5.")
    return value


engine_options = _options(
    click.option("--model", default=_ENGINE.model, show_default=True, help="seed, smollm2, a folder, GGUF or hub id."),
    click.option("--random-weights", is_flag=True, help="Draw the weights instead of reading them."),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help=f"Of the weights. Default: {_ENGINE.dtype} on cores, where the KV cache is float32 always; "
        f"{_ON_GPUS.dtype} on GPUs.",
    ),
    click.option("--max-len", type=int, help="Context limit in tokens (default: the model's own)."),
    click.option("--page-size", type=int, default=_ENGINE.page_size, show_default=True, help="Tokens in a KV page."),
    click.option(
        "--kv-memory",
        type=float,
        callback=_gibibytes,
        help=f"KV cache of an arm in GiB, split over its workers. Default: {_ENGINE.kv_bytes / GIB:g}; on GPUs all "
        "they have left.",
    ),
    click.option(
        "--max-batch-tokens",
        type=int,
        help="Tokens a step may compute: the chunk size. The colocated arm's is searched from here down. "
        f"Default: {_ENGINE.max_batch_tokens}, on GPUs {_ON_GPUS.max_batch_tokens}.",
    ),
)

workload_options = _options(
    click.option("--requests", type=int, help=f"Of the one-at-a-time part (default: {_SETTINGS.requests})."),
    click.option(
        "--prompt-len", default=str(_SHAPE.prompt), show_default=True, help="512, 10:99 or lognormal:MEAN:CV."
    ),
    click.option("--output-len", default=str(_SHAPE.output), show_default=True, help="Likewise; enforced."),
    click.option("--arrivals", default=_SETTINGS.arrivals, show_default=True, help="poisson, constant or gamma:CV."),
    click.option(
        "--trace",
        type=click.Path(exists=True, dir_okay=False),
        default=None,
        help="Replay an Azure CSV or Mooncake JSONL trace instead.",
    ),
    click.option("--trace-limit", type=int, help="Use the trace's first rows only."),
    click.option(
        "--length-scale", type=float, help="Factor on the trace's lengths (default: what fits in context and time)."
    ),
    click.option("--seed", type=int, default=_SETTINGS.seed, show_default=True, help="Of prompts, arrivals and order."),
)


@click.command(
    epilog="""\b
Examples:
  disagg compare                                     the whole comparison, under five minutes
  disagg compare --quick                             a first look, about a minute
  disagg compare --arms 1C,2C,1P1D                   against the better of two colocated arms
  disagg compare --prompt-len 512 --output-len 64 --slo ttft=500ms,tpot=50ms
  disagg compare --model smollm2 --trace AzureLLMInferenceTrace_conv.csv --length-scale 0.1
  disagg compare --rate 4 --rate 8 --json > summary.json
  disagg compare --model ./Qwen3-8B --random-weights --budget cuda:0,1
"""
)
@click.option(
    "--arms", default=",".join(_SETTINGS.arms), show_default=True, help="2C: two colocated; 3P1D: 3 + 1 apart."
)
@click.option("--budget", default=_SETTINGS.budget, show_default=True, help="Devices every arm gets: cpu:N, cuda:0,1.")
@click.option(
    "--policy",
    type=click.Choice(list(POLICIES)),
    default=DEFAULT,
    show_default=True,
    help="Who gets a request, in every arm.",
)
@click.option(
    "--repeats", type=int, help=f"Paired repeats (default: {_SETTINGS.repeats}; {QUICK['repeats']} if quick)."
)
@click.option("--rate", "rates", type=float, multiple=True, help="Requests/s; repeatable (default: from the capacity).")
@click.option("--duration", type=float, help="Seconds of arrivals per block (default: what five minutes allow).")
@click.option("--slo", help="Limits of a good request, as in ttft=200ms,tpot=50ms (default: from unloaded latency).")
@click.option("--no-tune", is_flag=True, help="Do not search the colocated arm's chunk size.")
@click.option("--quick", is_flag=True, help="Fewer rates, repeats and no search: about a minute.")
@click.option("--allow-unequal", is_flag=True, help="Compare arms that differ in more than their roles.")
@workload_options
@engine_options
@click.option("--out", type=click.Path(path_type=Path), help="Results folder (default: results/TIME-MODEL).")
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Of report and figures.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON, and nothing else, on stdout.")
def compare(out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure colocated against disaggregated serving on one budget: same requests, same devices, paired repeats.

    Writes records.jsonl, summary.json, report.html and figures into a folder and ends with a verdict; where the run is
    void, with the reasons and exit code 1. An arm may name a budget of its own, as in 1C@cpu:1, which --allow-unequal
    has to permit.
    """
    from disagg.cluster.cluster import Cluster  # pulls in torch: not for --help

    cores = tuple(sorted(os.sched_getaffinity(0)))
    budget = Budget.parse(options["budget"], cores)
    settings = _settings(options, budget)
    arms = runs.make_arms(settings, cores)
    _check(settings, arms)
    run = runs.Run(
        command=shlex.join(["disagg", *sys.argv[1:]]),
        settings=settings,
        arms=arms,
        environment=runs.environment(budget),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    console = Console(stderr=True)
    console.print(_headline(run), style="bold", highlight=False)
    with _results_folder(out, settings.engine.model) as folder, _progress(console) as bar:
        start = functools.partial(Cluster, policy=settings.policy)
        summary = measure(run, folder, start, WallClock(), bar)
        bar.stage("report")
        from disagg.measure.report import build  # draws: slow to import

        build(folder, settings.lang)
        bar.step()
    if as_json:
        click.echo(json.dumps(summary))
    else:
        show(summary, folder, Console(), settings.lang)
    if summary["overall"]["key"] == "overall_void":
        raise click.exceptions.Exit(1)


def _settings(options: dict[str, Any], budget: Budget) -> runs.Settings:
    """The options as Settings; what was not given keeps the default, or the quick one."""
    arms = tuple(filter(None, (arm.strip() for arm in re.split(_BETWEEN_ARMS, options["arms"]))))
    kv_memory, on_gpus = options["kv_memory"], budget.kind == "cuda"
    engine = EngineSpec.on(
        budget.kind,
        model=options["model"],
        random_weights=options["random_weights"],
        dtype=options["dtype"],
        max_len=options["max_len"],
        page_size=options["page_size"],
        kv_bytes=None if kv_memory is None else round(kv_memory * GIB),
        gpu_memory=_ON_GPUS.gpu_memory / len(arms) if on_gpus and arms else None,  # all arms stay loaded
        max_batch_tokens=options["max_batch_tokens"],
    )
    chosen: dict[str, Any] = dict(QUICK) if options["quick"] else {}
    given = [name for name in ("requests", "repeats") if options[name] is not None]
    chosen |= {name: options[name] for name in given}
    if options["no_tune"]:
        chosen["tune"] = False
    return runs.Settings(
        engine=engine,
        arms=arms,
        budget=options["budget"],
        policy=options["policy"],
        shape=Shape(Lengths.parse(options["prompt_len"]), Lengths.parse(options["output_len"])),
        arrivals=options["arrivals"],
        trace=options["trace"] or "",
        trace_limit=options["trace_limit"],
        length_scale=options["length_scale"],
        given=tuple(given),
        rates=tuple(options["rates"]),
        duration_s=options["duration"],
        slo=None if options["slo"] is None else SLO.parse(options["slo"]),
        seed=options["seed"],
        allow_unequal=options["allow_unequal"],
        lang=options["lang"],
        **chosen,
    )


def _check(settings: runs.Settings, arms: list[runs.Arm]) -> None:
    """Refuse what cannot be served while no worker runs: the devices and the model's configuration decide it."""
    from disagg.cluster import limits  # pulls in torch
    from disagg.model.load import load_info

    for arm in arms:
        limits.check_devices(arm.deployment.budget)
    spec = load_info(settings.engine.model, settings.engine.max_len).spec
    max_len = limits.resolved(settings.engine, spec.max_len).max_len or 0
    for arm in arms:
        limits.pages_per_worker(arm.engine, spec, arm.deployment)
    if not settings.trace:
        settings.shape.check(Limits(spec.vocab_size, max_len))


def _headline(run: runs.Run) -> str:
    """What is compared on what, in one line."""
    engine = run.settings.engine
    placed = []
    for arm in run.arms:
        homes = (f"{worker.name} on {worker.place}" for worker in arm.deployment.workers)
        placed.append(f"{arm.name} ({', '.join(homes)})")
    return f"{engine.model}, {engine.dtype}, seed {run.settings.seed}: {' against '.join(placed)}"


@contextlib.contextmanager
def _results_folder(out: Path | None, model: str) -> Iterator[Path]:
    """A new folder, taken away again when nothing was written into it.

    Raises InputError when it holds something: records of two runs must not mix.
    """
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-.") or "model"
        out = Path("results") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder: name another --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): name another --out.") from error
    try:
        yield out
    finally:
        with contextlib.suppress(OSError):  # not empty: the usual case
            out.rmdir()


def _progress(console: Console) -> "_Bar | contextlib.nullcontext[_Lines]":
    """Bars for people, lines for logs."""
    return _Bar(console) if console.is_terminal else contextlib.nullcontext(_Lines())


class _Lines:
    """Progress on a stderr that is no terminal: one line per finished stage."""

    def __init__(self) -> None:
        self._clock = WallClock()
        self._text, self._left, self._begun_at = "", 0, 0.0

    def stage(self, text: str, total: int = 1) -> None:
        """See measure.compare.Progress."""
        self._text, self._left, self._begun_at = text, total, self._clock.now()

    def step(self) -> None:
        """See measure.compare.Progress."""
        self._left -= 1
        if self._left == 0:
            click.echo(f"{self._text}: {self._clock.now() - self._begun_at:.1f} s", err=True)


class _Bar:
    """Progress on stderr: one bar per stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._task: Any = None

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str, total: int = 1) -> None:
        """See measure.compare.Progress."""
        self._task = self._progress.add_task(text, total=total)

    def step(self) -> None:
        """See measure.compare.Progress."""
        self._progress.advance(self._task)
