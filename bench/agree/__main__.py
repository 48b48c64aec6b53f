"""Whether load generators of the field agree with the server's own Records of the same run.

Starts `disagg serve` with --records and lets AIPerf and GuideLLM, each from a virtual environment that is thrown away,
send it the same prompts, two at a time. How far apart may they be? As far as the tool can tell time on this machine,
and as the comparison repeats itself:

- In a run of its own a relay between tool and server stamps the bytes that pass. The farthest that a request of the
  tool lies from these stamps, on either deployment, is its resolution: that is the tool's and the machine's.
- Then the tool asks the server itself, twice. How differently the two comparisons come out is their spread.

It agrees when its requests are, on average, no farther from their Records than the root of the sum of squares of both,
and all counts are equal. The stamps of the relay, held against the Records of that run, also say what the difference is
made of: how much later than the Record the bytes are on the wire. That is no error of the tool and counts for nothing.

Two controls must disagree: Records whose times are off by more than that, and Records of the same prompts on the other
deployment.

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

from compare import apart, judge, later, limits, of_call, of_record, resolution, shifted, spread, summary, table
from relay import Relay
from tools import MODEL, STREAMS, TOOLS, Row, drive, install, write_inputs

from disagg.record import read_records

DEPLOYS, REQUESTS, REPEATS = ("1P1D", "2C"), 24, 2
SERVE = ["disagg", "serve", "--model", MODEL, "--budget", "cpu:2", "--no-prefix-caching", "--port", "0"]
PATIENCE_S = 5.0  # a Record is written a moment after its stream's end


class Run(NamedTuple):
    """One tool against one deployment."""

    deploy: str
    tool: str
    command: str
    relayed: tuple[list[Row], list[Row], list[Row]]  # what it said, what passed the relay, what was recorded
    repeats: list[tuple[list[Row], list[Row]]]  # without the relay: what it said, what was recorded

    def says(self) -> list[Row]:
        """Of all repeats."""
        return [row for rows, _ in self.repeats for row in rows]

    def records(self) -> list[Row]:
        """Theirs."""
        return [row for _, rows in self.repeats for row in rows]


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

    def asked(url: str) -> tuple[list[str], list[Row], list[Row]]:
        begun = len(_settled(records, 0))
        command, says = drive(TOOLS[name], folder / name, url, folder, folder / "export", REQUESTS)
        recorded = [of_record(record) for record in _settled(records, begun + len(says))[begun:]]
        return command, says, sorted(recorded, key=lambda row: row.output)

    relay = Relay(port)
    _, says, recorded = asked(relay.url)
    relayed = says, sorted(map(of_call, relay.calls), key=lambda row: row.output), recorded
    url = f"http://127.0.0.1:{port}"
    found = [asked(url) for _ in range(REPEATS)]
    plain = shlex.join(found[0][0]).replace(str(folder), "FOLDER").replace(url, "URL")
    return Run(deploy, name, plain, relayed, [(says, recorded) for _, says, recorded in found])


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
        "repeats": REPEATS,
        "streams": STREAMS,
        "runs": [judged(one, runs) for one in runs],
    }


def judged(one: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """A run, whether its two sides agree, and whether its controls do not, as they should."""
    other = next(run for run in runs if run.tool == one.tool and run.deploy != one.deploy)
    resolves = resolution(run.relayed[:2] for run in (one, other))
    each = [apart(*repeat) for repeat in one.repeats]
    most = limits(resolves, spread(each))
    says, records = one.says(), one.records()
    return {
        "deploy": one.deploy,
        "tool": one.tool,
        "command": one.command,
        "says": summary(says),
        "records": summary(records),
        "resolution": resolves,
        "resolution_here": resolution([one.relayed[:2]]),
        "repeats": each,
        "spread": spread(each),
        "limit": most,
        "later": later(says, records),
        "wire_later": later(*one.relayed[1:]),
        **judge(says, records, most),
        "controls": {
            "shifted": judge(says, shifted(records, most), most),
            "other run": judge(says, other.records(), most),
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
