"""Every error this package raises on purpose, in one tree.

    DisaggError            exit code 1
    ├── InputError         the caller can mend it: exit code 2, HTTP 400
    │   ├── ModelError     unknown model, unsupported architecture, missing or extra tensors
    │   ├── BudgetError    devices the machine lacks, arms that do not fit the budget
    │   ├── TraceError     a malformed trace row; names the line
    │   └── RequestError   a prompt that cannot fit, sampling values out of range
    ├── Overloaded         too many requests are outstanding; HTTP 429 with Retry-After
    ├── WorkerLost         a worker process died or fell silent while it was needed
    ├── HandshakeError     two workers disagree on model, dtype, page layout or protocol
    └── InvariantError     our own bookkeeping is broken; never the caller's fault

A message is one sentence that says what is wrong and what to do.
"""

import math


class DisaggError(Exception):
    """Root of the tree. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(DisaggError):
    """The caller gave something that cannot work and can mend it."""

    exit_code = 2


class ModelError(InputError):
    """The model cannot be found, is not supported, or its tensors do not match its configuration."""


class BudgetError(InputError):
    """The budget names devices the machine lacks, or an arm cannot be placed on it."""


class TraceError(InputError):
    """A trace row cannot be read; the message names the file and the line."""


class RequestError(InputError):
    """A request that can never be served: too long for the context, sampling values out of range."""


class Overloaded(DisaggError):
    """The deployment has as many requests as it may hold; another may come in `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"Overloaded: retry after {max(1, math.ceil(retry_after_s))} s.")  # as the header says it
        self.retry_after_s = retry_after_s


class WorkerLost(DisaggError):
    """A worker process died or stopped answering while requests or a run needed it."""


class HandshakeError(DisaggError):
    """Two workers cannot exchange pages: the message names what differs."""


class InvariantError(DisaggError):
    """A page or a request is not where the bookkeeping says. A bug in this package, never in the input."""
