"""`disagg report`: rebuild every table and figure of a results folder from its records."""

import json
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from disagg.measure.run import read_run
from disagg.measure.tables import show


@click.command(
    epilog="""\b
Examples:
  disagg report results/20260101-120000-seed
  disagg report results/20260101-120000-seed --lang zh
  disagg report results/20260101-120000-seed --json | jq .overall.text
"""
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--lang", type=click.Choice(["en", "zh"]), help="Language of report and figures (default: the run's).")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of tables.")
def report(folder: Path, lang: Literal["en", "zh"] | None, as_json: bool) -> None:
    """Rebuild summary.json, figures and report.html of FOLDER from records.jsonl and run.json.

    Exit code 1 where the run is void, as of compare.
    """
    from disagg.measure.report import build  # draws: slow to import

    chosen = lang or read_run(folder).settings.lang
    summary = build(folder, chosen)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        show(summary, folder, Console(), chosen)
    if summary["overall"]["key"] == "overall_void":
        raise click.exceptions.Exit(1)
