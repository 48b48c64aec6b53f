"""Whether load generators of the field agree with the server's own Records of the same run.

Starts `disagg serve` with --records and lets AIPerf and GuideLLM, each from a virtual environment that is thrown away,
send it the same prompts, two at a time. How far apart may they be? As far as the tool can tell time on this machine: in
a run of its own a relay between tool and server stamps the bytes that pass, and the farthest that a request of the tool
lies from these stamps is its resolution. Then the tool asks the server itself; it agrees when its requests are, on
average, no farther than that from their Records, and all counts are equal.

Two controls must disagree: Records whose times are off by more than the resolution, and Records of the same prompts on
the other deployment.

    python bench/agree          measures; prints a table, then one JSON line; exit code 1 unless all agrees
    python bench/agree FILE     the table of such a line, kept in a file

On two cores, with pip able to install packages; ten minutes or more, most of them installing.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from compare import judge, of_call, of_record, resolution, shifted, summary, table
from relay import Relay
from tools import MODEL, STREAMS, TOOLS, Row, drive, install, write_inputs

from disagg.record import read_records

DEPLOYS, REQUESTS = ("1P1D", "2C"), 24
SERVE = ["disagg", "serve", "--model", MODEL, "--budget", "cpu:2", "--no-prefix-caching", "--port", "0"]
PATIENCE_S = 5.0  # a Record is written a moment after its stream's end


class Run(NamedTuple):
    """One tool against one deployment."""

    deploy: str
    tool: str
    command: str
    resolves: dict[str, float]
    says: list[Row]
    records: list[Row]


@contextlib.contextmanager
def serving(deploy: str, records: Path) -> Iterator[int]:
    """A server; gives its port."""
    command = [sys.executable, "-m", *SERVE, "--deploy", deploy, "--records", str(records)]
    log = records.with_suffix(".log")
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server:
        try:
            said = server.stdout.readline()
            if not said:
                raise RuntimeError(f"The server did not start:\n{log.read_text()[-3000:]}")
            yield int(said.rsplit(":", 1)[1])
        finally:
            server.send_signal(signal.SIGTERM)


def run(deploy: str, name: str, port: int, folder: Path, records: Path) -> Run:
    """Learn what a tool resolves, then let it and the server say what they say of the same requests."""
    rest = folder, folder / "export", REQUESTS
    relay = Relay(port)
    _, says = drive(TOOLS[name], folder / name, relay.url, *rest)
    resolves = resolution(says, sorted(map(of_call, relay.calls), key=lambda row: row.output))
    begun = len(_settled(records, 0))
    url = f"http://127.0.0.1:{port}"
    command, says = drive(TOOLS[name], folder / name, url, *rest)
    recorded = [of_record(record) for record in _settled(records, begun + len(says))[begun:]]
    plain = shlex.join(command).replace(str(folder), "FOLDER").replace(url, "URL")
    return Run(deploy, name, plain, resolves, says, sorted(recorded, key=lambda row: row.output))


def _settled(records: Path, least: int) -> list[Any]:
    """All Records, once there are no more to come: at least so many, unless they do not come at all."""
    until, before = time.monotonic() + PATIENCE_S, -1
    while (now := len(found := list(read_records(records)))) != before or (now < least and time.monotonic() < until):
        before = now
        time.sleep(0.2)
    return found


def measure(folder: Path) -> dict[str, Any]:
    """All runs, and the versions of what ran."""
    write_inputs(folder, REQUESTS)
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(lambda name: install(TOOLS[name], folder / name), TOOLS)
        missing = {name: why for name, why in zip(TOOLS, reasons, strict=True) if why}
    there = [name for name in TOOLS if name not in missing]
    runs = []
    for deploy in DEPLOYS:
        records = folder / f"{deploy}.jsonl"
        with serving(deploy, records) as port:
            for name in there:
                print(f"{name} on {deploy}", file=sys.stderr)
                runs.append(run(deploy, name, port, folder, records))
    return {
        "bench": "agree",
        "command": "python bench/agree",
        "date": datetime.date.today().isoformat(),
        "disagg": importlib.metadata.version("disagg"),
        "python": platform.python_version(),
        "tools": [TOOLS[name].packages[0] for name in there],
        "not_installed": missing,
        "server": shlex.join(SERVE),
        "requests": REQUESTS,
        "streams": STREAMS,
        "runs": [judged(one, runs) for one in runs],
    }


def judged(one: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """A run, whether its two sides agree, and whether its controls do not, as they should."""
    other = next(run for run in runs if run.tool == one.tool and run.deploy != one.deploy)
    return {
        "deploy": one.deploy,
        "tool": one.tool,
        "command": one.command,
        "says": summary(one.says),
        "records": summary(one.records),
        "resolution": one.resolves,
        **judge(one.says, one.records, one.resolves),
        "controls": {
            "shifted": judge(one.says, shifted(one.records, one.resolves), one.resolves),
            "other run": judge(one.says, other.records, one.resolves),
        },
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What keeps the result from being that all agrees."""
    wrong = [f"{name} is not installed: {why}" for name, why in found["not_installed"].items()]
    for run in found["runs"]:
        where = f"{run['tool']} on {run['deploy']}"
        if run["disagree"]:
            wrong.append(f"{where} disagrees about {', '.join(run['disagree'])}.")
        wrong += [
            f"{where}: the control, {name}, agrees." for name, it in run["controls"].items() if not it["disagree"]
        ]
    return wrong


def main() -> None:
    if len(sys.argv) > 1:
        print(table(json.loads(Path(sys.argv[1]).read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    wrong = faults(found)
    print(table(found), *(wrong or ["All agree, no control does."]), json.dumps(found), sep="\n\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
