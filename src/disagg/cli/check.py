"""`disagg check`: is this deployment healthy on this machine? Devices, transport, canary, pages."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from disagg.cli import check_live, keys, options
from disagg.clock import WallClock
from disagg.config import Budget, Deployment, Dtype, EngineSpec
from disagg.errors import InputError
from disagg.measure.run import cpu_name

if TYPE_CHECKING:
    from disagg.cluster.probe import Path

_SLOW_SHARE = 0.3  # of memcpy: below it something is in the way
_SETTLE_S = 5.0


@click.command(
    epilog="""\b
Examples:
  disagg check
  disagg check --model smollm2 --deploy 1P1D --budget cpu:2
  disagg check --model smollm2 --deploy 1P1D --budget cuda:0,1
  disagg check --model seed --deploy 2P2D --json | jq .healthy
  disagg check --url http://127.0.0.1:8000 --api-key file:keys.txt
"""
)
@options.deployment(model="seed", deploy="1P1D")
@click.option("--url", help="Check a running `disagg serve` instead; the options above are then its own.")
@click.option("--api-key", "key_source", help="Its key, with --url: file:PATH or env:NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON line.")
def check(
    model: str,
    random_weights: bool,
    dtype: Dtype | None,
    deploy: str,
    budget: str | None,
    url: str | None,
    key_source: str | None,
    as_json: bool,
) -> None:
    """Start a deployment, test it and stop it.

    Shows its devices, how fast pages move beside plain memory copies, whether a prompt that is handed over gives the
    tokens it gives without (the canary), and whether every page came back. Exit code 1 when something is wrong; what
    is only slow is a warning. With --url the deployment is one that serves: its health, the canary and its pages.
    """
    if url is not None:
        live = check_live.Live(url, keys.read(key_source)[0] if key_source else None)
        _report(check_live.examine(live), as_json, check_live.show)
        return
    if key_source is not None:
        raise InputError("--api-key is for a running server: give --url too, or leave it out.")
    deployment = options.placed(deploy, budget)
    engine = EngineSpec.on(deployment.budget.kind, model=model, random_weights=random_weights, dtype=dtype)
    with Console(stderr=True).status(f"{deploy}: starting") as status:
        found = _examine(deployment, engine, status.update)
    _report(found, as_json, _show)


def _report(found: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any], Console], None]) -> None:
    """Print the findings and leave with the exit code they deserve."""
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found, Console())
    if not found["healthy"]:
        click.get_current_context().exit(1)


def _examine(deployment: Deployment, engine: EngineSpec, progress: Any) -> dict[str, Any]:
    """All findings, ready for JSON. Raises what keeps the deployment from starting."""
    import msgspec

    from disagg.cluster import canary
    from disagg.cluster.cluster import Cluster
    from disagg.cluster.limits import bytes_for, kv_dtype

    with Cluster(deployment, engine, progress=progress) as cluster:
        progress(f"{deployment.name}: canary")
        sung = canary.run(cluster)
        reports = _settled(cluster)
        dtype = kv_dtype(engine, deployment.budget.kind)
        page_bytes = bytes_for(cluster.info.spec, 1, engine.page_size, dtype)
    progress("transport")
    devices, paths = _devices(deployment.budget, page_bytes)
    faults = [canary.complaint(one) for one in sung if not one.agrees]
    faults += [f"{report.worker}: {report.fault}" for report in reports if report.fault]
    faults += [f"{report.worker} still holds {report.held} page(s) of nobody." for report in reports if report.held]
    return {
        "healthy": not faults,
        "deployment": deployment.name,
        "budget": str(deployment.budget),
        "devices": devices,
        "workers": [msgspec.to_builtins(worker) for worker in deployment.workers],
        "transports": [
            {
                **msgspec.to_builtins(path),
                "speeds": [{**msgspec.to_builtins(speed), "share": speed.share} for speed in path.speeds],
            }
            for path in paths
        ],
        "canary": [{**one._asdict(), "agrees": one.agrees} for one in sung],
        "audit": [msgspec.to_builtins(msgspec.structs.asdict(report)) for report in reports],
        "faults": faults,
        "warnings": _warnings(deployment, paths),
    }


def _devices(budget: Budget, page_bytes: int) -> tuple[list[str], list["Path"]]:
    """What the budget's devices are, and how fast pages move between them. No worker may be running."""
    from disagg.cluster import probe

    if budget.kind == "cpu":
        return [cpu_name()], [probe.shared_memory(page_bytes)]
    from disagg.cluster import probe_cuda

    return probe_cuda.names(budget.devices), probe_cuda.gpus(budget.devices, page_bytes)


def _settled(cluster: Any) -> list[Any]:
    """The audit, once everything has been freed or the time for that is over."""
    clock = WallClock()
    until = clock.now() + _SETTLE_S
    while True:
        reports: list[Any] = cluster.audit()
        if not any(report.held for report in reports) or clock.now() > until:
            return reports
        cluster.poll(0.05)


def _warnings(deployment: Deployment, paths: list["Path"]) -> list[str]:
    """What works and is slower than it need be."""
    warnings = [path.warning for path in paths if path.warning]
    if deployment.oversubscribed:
        warnings.append(f"{len(deployment.workers)} workers share {deployment.budget}: they slow one another down.")
    if deployment.budget.kind == "cpu" and (share := paths[0].speeds[-1].share) < _SLOW_SHARE:
        warnings.append(
            f"Pages move at {share:.0%} of the speed of memory: is something else using these cores or their memory?"
        )
    return warnings


def _show(found: dict[str, Any], console: Console) -> None:
    devices = "; ".join(found["devices"])
    console.print(f"{found['deployment']} on {found['budget']}, {devices}", style="bold", highlight=False)
    audits = {report["worker"].rpartition(".")[0]: report for report in found["audit"]}
    workers = Table("worker", "role", "devices", "pages", "free", "cached", "held")
    for worker in found["workers"]:
        report = audits[worker["name"]]
        place = "+".join(map(str, worker["devices"])) + (f", shared by {worker['shares']}" * (worker["shares"] > 1))
        counts = (str(report[name]) for name in ("total", "free", "cached", "held"))
        workers.add_row(worker["name"], worker["role"], place, *counts)
    console.print(workers)
    for path in found["transports"]:
        title = f"{path['name']}, {path['latency_s'] * 1e6:.0f} us a page"
        speeds = Table("copy", "pull", "plain copy", "share", title=title)
        for speed in path["speeds"]:
            size, share = f"{speed['num_bytes'] / 2**20:.0f} MiB", f"{speed['share']:.0%}"
            speeds.add_row(size, f"{speed['pull_gb_s']:.1f} GB/s", f"{speed['plain_gb_s']:.1f} GB/s", share)
        console.print(speeds)
    agree = sum(one["agrees"] for one in found["canary"])
    console.print(f"canary: {agree} of {len(found['canary'])} agree", highlight=False)
    check_live.conclude(found, console)
