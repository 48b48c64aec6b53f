"""docs/serve.md says what there is: no more options, paths and metrics, and no fewer."""

import re
from pathlib import Path

from disagg.cli.serve import serve
from disagg.cluster import launch
from disagg.cluster.status import Snapshot, Status, WorkerLine
from disagg.server import run
from disagg.server.metrics import Metrics
from disagg.server.openapi import make

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def test_every_option_is_explained():
    """The table of options has those of the command."""
    options = {parameter.opts[0] for parameter in serve.params}
    section = TEXT.split("## Options")[1].split("## Security")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", section)) == options


def test_every_path_is_explained():
    """The table of paths has those of the OpenAPI document."""
    assert [path for path in make()["paths"] if f"{path}`" not in TEXT] == []


def test_every_metric_is_explained():
    """The table of metrics has those of a running server."""
    snapshot = Snapshot(0.0, {"free": 1}, 0, 0, 0, 0, 0, 0, 0, 0.0, {"prefill": {"started": 0}})
    line = WorkerLine("P0", "P0.0", "prefill", True, False, snapshot)
    status = Status(0.0, "1P1D", "m", "p", 1, 16, 1, [line], {"live": 0}, None, [])
    lines = Metrics(lambda: status).render().decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    section = TEXT.split("## Metrics")[1].split("## Operations")[0]
    assert {name for name in re.findall(r"`(disagg_[a-z0-9_]+)`", section) if name != "disagg_"} == names


def test_the_help_says_how_long_a_stop_may_take():
    """The sum of what is waited for: each worker, the process that forks them, and the last words to clients."""
    bound = f"{launch._STOP_S:g} s a worker and {launch._STOP_S + run._LAST_WORDS_S:g} s more"
    assert bound in " ".join(serve.help.split())
