"""`disagg serve`: the options around `server.run`."""

import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from disagg.cli import keys as api_keys
from disagg.cli import options
from disagg.cli.options import WholeNumber
from disagg.config import Deployment, EngineSpec
from disagg.errors import InputError
from disagg.server.listening import listen

if TYPE_CHECKING:
    from collections.abc import Callable

    from disagg.cluster.cluster import Cluster
    from disagg.server.state import Settings

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")
_GIB, _MIB = 1 << 30, 1 << 20
# options that go on as they are
_OF_ENGINE = ("random_weights", "dtype", "max_len", "max_batch_tokens", "prefix_caching")
_OF_SERVER = ("max_prompt_len", "max_requests")


@click.command(
    epilog="""\b
Examples:
  disagg serve --model smollm2 --deploy 1P1D
  disagg serve --model ./Qwen3-8B --deploy 1P1D --budget cuda:0,1 --host 0.0.0.0 --api-key file:keys.txt
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The capital of France is"}'
"""
)
@options.deployment(model="smollm2", deploy="1C")
@click.option("--served-model-name", help="What clients call it. Default: the name of --model.")
@options.policy
@options.max_len
@click.option(
    "--kv-memory", type=float, help="KV cache in GiB, split over the workers. Default: 1; all a GPU has left."
)
@click.option("--max-batch-tokens", type=WholeNumber(1), help="Tokens a step may compute: the chunk size.")
@click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True, help="Share equal beginnings.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --api-key.")
@click.option("--port", type=WholeNumber(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    "key_sources",
    multiple=True,
    help=api_keys.HELP,
)
@click.option("--no-api-key", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--max-queue", type=WholeNumber(1), default=1024, show_default=True, help="Choices at a time.")
@click.option("--max-requests", type=WholeNumber(1), default=512, show_default=True, help="HTTP ones at a time.")
@click.option("--max-choices", type=WholeNumber(1), default=64, show_default=True, help="Prompts times n.")
@click.option("--max-prompt-len", type=WholeNumber(1), help="In tokens. Default: what the context allows.")
@click.option("--max-body", type=float, default=4.0, show_default=True, help="Of a request, in MiB.")
@click.option("--deadline", type=float, default=600.0, show_default=True, help="Of a whole request, in seconds.")
@click.option("--drain", type=float, default=30.0, show_default=True, help="Seconds to finish in after SIGTERM.")
@click.option("--records", type=click.Path(dir_okay=False, path_type=Path), help="Add every request's timeline here.")
def serve(
    model: str,
    served_model_name: str | None,
    deploy: str,
    budget: str | None,
    policy: str,
    host: str,
    port: int,
    key_sources: tuple[str, ...],
    no_api_key: bool,
    records: Path | None,
    **rest: Any,
) -> None:
    """Serve a model over the OpenAI API, on any deployment.

    Prints its address when it is ready, and one JSON line per request on standard error. SIGTERM lets requests finish
    and exits with code 0; Ctrl-C stops at once. Stopping takes at most --drain seconds (SIGTERM only), 3 s a worker and
    5 s more; with traces, also what their collector takes.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # nothing is served yet that could be finished
    keys = _keys(host, key_sources, no_api_key)
    if served_model_name is not None and not served_model_name.strip():
        raise InputError("--served-model-name is empty: give a name, or leave it out.")
    if records is not None:
        _check_appends(records)
    deployment = options.placed(deploy, budget)
    engine = _engine(deployment, model, rest)
    listener = listen(host, port)

    from disagg.cluster.cluster import Cluster  # imports torch: slow
    from disagg.server.guards import Keys
    from disagg.server.run import serve as run

    settings = _settings(served_model_name or _name(model), rest)

    def make(progress: "Callable[[str], None]") -> "Cluster":
        _check_prompt_len(engine, settings.max_prompt_len)
        return Cluster(
            deployment, engine, policy=policy, supervise=True, max_outstanding=rest["max_queue"], progress=progress
        )

    drained = run(
        make,
        listener,
        settings,
        Keys(keys),
        frozenset() if host in _ANY else frozenset({host.lower(), *(_LOOPBACK if host in _LOOPBACK else ())}),
        records=records,
        on_ready=lambda url: click.echo(f"{settings.model} on {deployment.name} at {url}"),
    )
    if not drained:
        raise KeyboardInterrupt


def _keys(host: str, sources: tuple[str, ...], no_api_key: bool) -> list[str]:
    keys = [key for source in sources for key in api_keys.read(source)]
    if host not in _LOOPBACK and not keys and not no_api_key:
        raise InputError(f"Listening on {host} lets others in: give --api-key, or --no-api-key if that is meant.")
    return keys


def _engine(deployment: Deployment, model: str, options: dict[str, Any]) -> EngineSpec:
    kv_memory = options["kv_memory"]
    return EngineSpec.on(
        deployment.budget.kind,
        model=model,
        kv_bytes=None if kv_memory is None else int(_positive("--kv-memory", kv_memory) * _GIB),
        **{name: options[name] for name in _OF_ENGINE},
    )


def _settings(name: str, options: dict[str, Any]) -> "Settings":
    from disagg.server.state import Settings

    return Settings(
        model=name,
        max_body_bytes=int(_positive("--max-body", options["max_body"]) * _MIB),
        deadline_s=_positive("--deadline", options["deadline"]),
        drain_s=_positive("--drain", options["drain"]),
        max_choices=min(options["max_choices"], options["max_queue"]),  # for more there is never room
        **{name: options[name] for name in _OF_SERVER},
    )


def _check_prompt_len(engine: EngineSpec, max_prompt_len: int | None) -> None:
    """Raise InputError when no prompt of this length leaves the context a token for the output."""
    from disagg.cluster.limits import resolved
    from disagg.model.load import load_info

    context = resolved(engine, load_info(engine.model, engine.max_len).spec.max_len).max_len or 0
    if max_prompt_len is not None and max_prompt_len >= context:
        raise InputError(f"--max-prompt-len {max_prompt_len} is beyond the context: give 1 to {context - 1}.")


def _name(model: str) -> str:
    """A path of this machine is no name for clients: its last part is."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _positive(option: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{option} must be above 0, not {value:g}.")
    return value


def _check_appends(records: Path) -> None:
    try:
        records.open("a").close()
    except OSError as error:
        raise InputError(f"--records {records}: {error.strerror}. Name a file that can be written.") from None
