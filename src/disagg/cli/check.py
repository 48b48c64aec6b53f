"""`disagg check`: is this deployment healthy on this machine? Devices, transport, canary, pages."""

import json
import os
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from disagg.clock import WallClock
from disagg.config import Budget, Deployment, Dtype, EngineSpec
from disagg.measure.run import cpu_name

_SLOW_SHARE = 0.3  # of memcpy: below it something is in the way
_SETTLE_S = 5.0


@click.command(
    epilog="""\b
Examples:
  disagg check
  disagg check --model smollm2 --deploy 1P1D --budget cpu:2
  disagg check --model seed --deploy 2P2D --json | jq .healthy
"""
)
@click.option("--model", default="seed", show_default=True, help="seed, smollm2, a folder, GGUF or hub id.")
@click.option("--random-weights", is_flag=True, help="Draw the weights instead of loading them.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--deploy", default="1P1D", show_default=True, help="1C, 2C, 1P1D, 2P1D, ...")
@click.option("--budget", help="cpu:N (cores). Default: all cores of this process.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON line.")
def check(model: str, random_weights: bool, dtype: Dtype, deploy: str, budget: str | None, as_json: bool) -> None:
    """Start a deployment, test it and stop it.

    Shows its devices, how fast pages move beside plain memory copies, whether a prompt that is handed over gives the
    tokens it gives without (the canary), and whether every page came back. Exit code 1 when something is wrong; what
    is only slow is a warning.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    deployment = Deployment.parse(deploy, Budget.parse(budget or f"cpu:{len(cores)}", cores))
    engine = EngineSpec(model=model, random_weights=random_weights, dtype=dtype)
    with Console(stderr=True).status(f"{deploy}: starting") as status:
        found = _examine(deployment, engine, status.update)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found, Console())
    if not found["healthy"]:
        click.get_current_context().exit(1)


def _examine(deployment: Deployment, engine: EngineSpec, progress: Any) -> dict[str, Any]:
    """All findings, ready for JSON. Raises what keeps the deployment from starting."""
    import msgspec

    from disagg.cluster import canary, probe
    from disagg.cluster.cluster import Cluster
    from disagg.cluster.limits import bytes_for

    with Cluster(deployment, engine, progress=progress) as cluster:
        progress(f"{deployment.name}: canary")
        sung = canary.run(cluster)
        reports = _settled(cluster)
        page_bytes = bytes_for(cluster.info.spec, 1, engine.page_size)
    progress("transport")
    path = probe.shared_memory(page_bytes)
    faults = [canary.complaint(one) for one in sung if not one.agrees]
    faults += [f"{report.worker}: {report.fault}" for report in reports if report.fault]
    faults += [f"{report.worker} still holds {report.held} page(s) of nobody." for report in reports if report.held]
    return {
        "healthy": not faults,
        "deployment": deployment.name,
        "budget": str(deployment.budget),
        "device": cpu_name(),
        "workers": [msgspec.to_builtins(worker) for worker in deployment.workers],
        "transport": {
            **msgspec.to_builtins(path),
            "speeds": [{**msgspec.to_builtins(speed), "share_of_memcpy": speed.share} for speed in path.speeds],
        },
        "canary": [{**one._asdict(), "agrees": one.agrees} for one in sung],
        "audit": [msgspec.to_builtins(msgspec.structs.asdict(report)) for report in reports],
        "faults": faults,
        "warnings": _warnings(deployment, path.speeds[-1].share),
    }


def _settled(cluster: Any) -> list[Any]:
    """The audit, once everything has been freed or the time for that is over."""
    clock = WallClock()
    until = clock.now() + _SETTLE_S
    while True:
        reports: list[Any] = cluster.audit()
        if not any(report.held for report in reports) or clock.now() > until:
            return reports
        cluster.poll(0.05)


def _warnings(deployment: Deployment, share: float) -> list[str]:
    """What works and is slower than it need be."""
    warnings = []
    if deployment.oversubscribed:
        warnings.append(f"{len(deployment.workers)} workers share {deployment.budget}: they slow one another down.")
    if share < _SLOW_SHARE:
        warnings.append(
            f"Pages move at {share:.0%} of the speed of memory: is something else using these cores or their memory?"
        )
    return warnings


def _show(found: dict[str, Any], console: Console) -> None:
    console.print(f"{found['deployment']} on {found['budget']}, {found['device']}", style="bold", highlight=False)
    audits = {report["worker"].rpartition(".")[0]: report for report in found["audit"]}
    workers = Table("worker", "role", "cores", "pages", "free", "cached", "held")
    for worker in found["workers"]:
        report = audits[worker["name"]]
        cores = "+".join(map(str, worker["devices"])) + (f", shared by {worker['shares']}" * (worker["shares"] > 1))
        counts = (str(report[name]) for name in ("total", "free", "cached", "held"))
        workers.add_row(worker["name"], worker["role"], cores, *counts)
    console.print(workers)
    path = found["transport"]
    speeds = Table("copy", "pull", "memcpy", "share", title=f"{path['name']}, {path['latency_s'] * 1e6:.0f} us a page")
    for speed in path["speeds"]:
        size, share = f"{speed['num_bytes'] / 2**20:.0f} MiB", f"{speed['share_of_memcpy']:.0%}"
        speeds.add_row(size, f"{speed['pull_gb_s']:.1f} GB/s", f"{speed['memcpy_gb_s']:.1f} GB/s", share)
    console.print(speeds)
    agree = sum(one["agrees"] for one in found["canary"])
    console.print(f"canary: {agree} of {len(found['canary'])} agree", highlight=False)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    for fault in found["faults"]:
        console.print(f"wrong: {fault}", style="red", highlight=False, soft_wrap=True)
    console.print("healthy" if found["healthy"] else "not healthy", style="bold")
