"""disagg: serve, measure and predict prefill/decode disaggregated inference. Names resolve on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disagg.llm import LLM, Completion
    from disagg.record import Record
    from disagg.request import SamplingParams

_HOMES = {
    "LLM": "disagg.llm",
    "Completion": "disagg.llm",
    "Record": "disagg.record",
    "SamplingParams": "disagg.request",
}

__all__ = ["LLM", "Completion", "Record", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disagg' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
