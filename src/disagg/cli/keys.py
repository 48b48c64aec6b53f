"""API keys as options name them: where they are, never what they are."""

import os
from pathlib import Path

from disagg.errors import InputError

HELP = "file:PATH (a key a line) or env:NAME; may be given several times. A key itself would show in `ps`."


def read(source: str) -> list[str]:
    """The keys of one --api-key. Raises InputError, which never says a key."""
    kind, _, name = source.partition(":")
    if kind == "file":
        try:
            text = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The API keys in {name} cannot be read: {error}.") from None
    elif kind == "env":
        if (found := os.environ.get(name)) is None:
            raise InputError(f"--api-key {source}: the environment variable {name} is not set.")
        text = found
    else:
        raise InputError("--api-key takes file:PATH or env:NAME, not a key: others could see it on the command line.")
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise InputError(f"--api-key {source} holds no key: write one a line.")
    return keys
