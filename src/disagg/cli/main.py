"""The `disagg` command: names of subcommands, loaded when used, and what becomes of errors.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. An error is one sentence on stderr.
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence

import click

from disagg.errors import DisaggError

COMMANDS = {
    "chaos": "disagg.cli.chaos:chaos",
    "check": "disagg.cli.check:check",
    "compare": "disagg.cli.compare:compare",
    "generate": "disagg.cli.generate:generate",
    "report": "disagg.cli.report:report",
    "serve": "disagg.cli.serve:serve",
}
INTERRUPTED = 130


class _Lazy(click.Group):
    """A group that imports a subcommand when it is asked for, so that `--help` and errors come at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:  # click would make an error of the whole help
            click.echo(self.get_help(ctx), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(COMMANDS)}."
            ctx.fail(f"No command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="disagg")
def cli() -> None:
    """Serve, measure and predict LLM inference with prefill and decode together or apart.

    \b
    Example:
      disagg compare --quick
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with it ignored
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(args))


def _terminate(number: int, frame: object) -> None:
    """Leave as Ctrl-C does, so that workers are stopped and nothing is left behind."""
    raise KeyboardInterrupt


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        # Outside standalone mode click returns the code of --help and --version instead of leaving.
        return cli.main(args=args, prog_name="disagg", standalone_mode=False) or 0
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "disagg"
        said = error.format_message()
        said += "" if said.endswith((".", "?", "!")) else "."  # click leaves some sentences open
        click.echo(f"{place}: {said} See {place} --help.", err=True)
        return error.exit_code
    except DisaggError as error:
        click.echo(f"disagg: {error}", err=True)
        return error.exit_code
