"""Options that several commands share: which model, on which deployment."""

import os
from collections.abc import Callable
from typing import Any

import click

from disagg.cluster.policies import DEFAULT, POLICIES
from disagg.config import DTYPES, Budget, Deployment


class WholeNumber(click.IntRange):
    """A whole number within bounds, refused in words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Fails where click fails."""
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            bounds = f"from {self.min}" + ("" if self.max is None else f" to {self.max}")
            self.fail(f"{value} is not a whole number {bounds}.", param, ctx)


def placed(deploy: str, budget: str | None) -> Deployment:
    """What --deploy and --budget say; without a budget on all cores of this process. Raises InputError."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Deployment.parse(deploy, Budget.parse(budget or f"cpu:{len(cores)}", cores))


def deployment(*, model: str, deploy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--model, --random-weights, --dtype, --deploy and --budget, with the defaults of a command."""
    options = (
        click.option(
            "--model", default=model, show_default=True, help="seed, smollm2, a folder, a .gguf file or a hub id."
        ),
        click.option("--random-weights", is_flag=True, help="Draw the weights instead of loading them."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Default: float32 on cores, bfloat16 on GPUs. fp8: on Hopper GPUs.",
        ),
        click.option("--deploy", default=deploy, show_default=True, help="1C, 2C, 1P1D, 2P1D, ..."),
        click.option("--budget", help="cpu:N (cores) or cuda:0,1 (GPUs). Default: all cores of this process."),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


policy = click.option(
    "--policy", type=click.Choice(list(POLICIES)), default=DEFAULT, show_default=True, help="Who gets a request."
)
max_len = click.option(
    "--max-len", type=WholeNumber(2), help="Limit of prompt and output together, in tokens. Default: the model's."
)
