"""`disagg chaos`: the options and the progress bar around `measure.chaos`."""

import json
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from disagg.cli import options
from disagg.clock import WallClock

if TYPE_CHECKING:
    from disagg.measure.chaos import Outcome


@click.command(
    epilog="""\b
Examples:
  disagg chaos --requests 1000
  disagg chaos --deploy 2P2D --budget cpu:2 --requests 10000 --fault-every 50 --seed 1
  disagg chaos --requests 300 --json | jq '.hung + .leaked + .different'
"""
)
@click.option("--model", default="seed", show_default=True, help="seed, smollm2, a folder, GGUF or hub id.")
@click.option("--deploy", default="2P2D", show_default=True, help="2C, 1P1D, 2P2D, ...")
@click.option("--budget", help="cpu:N (cores). Default: all cores of this process.")
@click.option(
    "--requests", type=click.IntRange(min=1), default=1000, show_default=True, help="How many, all short and greedy."
)
@click.option(
    "--fault-every", type=click.IntRange(min=1), default=50, show_default=True, help="Finished requests per fault."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts, clients and faults.")
@click.option("--concurrency", type=click.IntRange(min=1), default=24, show_default=True, help="Requests at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON line.")
def chaos(
    model: str,
    deploy: str,
    budget: str | None,
    requests: int,
    fault_every: int,
    seed: int,
    concurrency: int,
    as_json: bool,
) -> None:
    """Kill, stop and starve workers under load; count what is lost.

    Workers get little memory, short leases and checksums on every page. Exit code 1 unless nothing hung, no page
    leaked and every token is that of a run without faults.
    """
    deployment = options.placed(deploy, budget)

    from disagg.measure import chaos as runs  # imports torch: slow

    plan = runs.Plan(requests=requests, fault_every=fault_every, seed=seed, concurrency=concurrency)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{deploy}: starting", total=requests)
        with runs.deploy(deployment, model, lambda text: progress.update(task, description=text)) as cluster:
            progress.update(task, description=f"{deploy}, a fault every {fault_every}")
            outcome = runs.Chaos(cluster, plan, WallClock(), lambda: progress.advance(task)).run()
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(outcome)))
    else:
        Console().print(_table(outcome, requests))
        for error in outcome.errors:
            click.echo(f"failed: {error}")
    if not outcome.clean:
        click.get_current_context().exit(1)


def _table(outcome: "Outcome", requests: int) -> Table:
    table = Table("what", "count", "", title=f"{requests} requests in {outcome.duration_s:.0f} s")
    faults = ", ".join(f"{count} {name}" for name, count in outcome.faults.items())
    must = {True: "as it must be", False: "[red]must be 0[/red]"}
    rows = (
        ("completed", outcome.completed, ""),
        ("retried", outcome.retried, "needed another attempt, however they ended"),
        ("failed", outcome.failed, "with a clear error"),
        ("aborted", outcome.aborted, "by their clients"),
        ("hung", outcome.hung, must[outcome.hung == 0]),
        ("leaked", outcome.leaked, "pages; " + must[outcome.leaked == 0]),
        ("different", outcome.different, must[outcome.different == 0]),
        ("faults", sum(outcome.faults.values()), f"{faults}; restarts: {outcome.restarts}"),
    )
    for what, count, remark in rows:
        table.add_row(what, str(count), remark)
    return table
