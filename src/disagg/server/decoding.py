"""A request's JSON becomes one of the types in asked.py, or a 400 that names the field at fault.

Every stream waits meanwhile, and in another thread as well, as the decoder does not let go of the interpreter. So the
strings of a large body are counted first, which takes no decoder. Then its fields are told apart, still as JSON, and
only what is neither unknown nor too long becomes objects.

An unknown field is refused with the nearest known one.
"""

import difflib
import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from disagg.garbage import no_collection
from disagg.server.asked import CHOICES, NO_PROMPT, NOTHING, CompletionRequest, RawPrompt
from disagg.server.problems import Problem

_LONGEST_NAME = 100  # of a field or value that an answer repeats
_LARGE = 1 << 16  # bytes of JSON that are decoded without a second look
MOST_STRINGS = 1 << 15  # in a body that is larger; a conversation with all the messages it may have has half of them
_MAY_BE_LONG = ("prompt", "messages", "tokens")
_KINDS = {
    "int": "an integer", "float": "a number", "str": "a text", "bool": "a boolean", "array": "a list",
    "object": "an object",
}  # fmt: skip
"""What clients call what the decoder names."""

_Asked = TypeVar("_Asked", bound=msgspec.Struct)
_Fields = dict[str, msgspec.Raw]


def decode(kind: type[_Asked], body: bytes, look: Callable[[RawPrompt], None] = lambda prompt: None) -> _Asked:
    """The request in `body`. Raises Problem 400, with `param` where one field is at fault.

    look: may raise a Problem of a prompt before anything is made of it.
    """
    try:
        if len(body) > _LARGE and num_strings(body) > MOST_STRINGS:
            raise Problem(400, f"The body holds more than {MOST_STRINGS} strings, which is the most this server takes.")
        with no_collection():  # which would go through all objects again and again while many are made
            fields = msgspec.json.decode(body, type=_Fields)
            _check_fields(kind, fields, len(body))
            if kind is CompletionRequest and "prompt" in fields:
                prompt = RawPrompt(bytes(fields["prompt"]))
                look(prompt)
                _check_mixture(prompt.json)
            if NOTHING.keys() & fields.keys():
                body = _without_nothing(fields)
            return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The body is not valid JSON: {error}.") from None


def num_strings(body: bytes) -> int:
    """How many strings there are in JSON, names of fields included."""
    quotes = body.count(b'"')
    if quotes > 2 * MOST_STRINGS:  # else it does not matter which of them are within strings
        quotes -= body.replace(b"\\\\", b"").count(b'\\"')
    return quotes // 2


def _check_fields(kind: type[msgspec.Struct], fields: _Fields, length: int) -> None:
    """Raise Problem for an unknown field, and for what a million objects would be made of."""
    rest = length
    for name, value in fields.items():
        if name not in kind.__struct_fields__ and name not in NOTHING:
            raise _unknown("", name, kind.__struct_fields__)
        size = memoryview(value).nbytes  # of the last, if it is given twice
        if name not in _MAY_BE_LONG and size > _LARGE:
            raise Problem(400, f"{name} is longer than {_LARGE} bytes.", param=name)
        rest -= size
    if rest > _LARGE:
        raise Problem(400, f"More than {_LARGE} bytes are no field's value: is a field given twice?")


def _check_mixture(prompt: bytes) -> None:
    """Raise Problem for a list of texts and other things, before these are made."""
    if prompt.startswith(b"[") and b'"' in prompt:
        try:
            msgspec.json.decode(prompt, type=list[str])  # ends at the first that is no text
        except msgspec.ValidationError:
            raise Problem(400, NO_PROMPT, param="prompt") from None


def _without_nothing(fields: _Fields) -> bytes:
    """The request without the fields we do not support. Raises Problem if one of them asks for something."""
    for name in NOTHING.keys() & fields.keys():
        json = bytes(fields.pop(name))
        value = msgspec.json.decode(json) if len(json) < _LONGEST_NAME else ...
        if not any(value == nothing and type(value) is type(nothing) for nothing in NOTHING[name]):
            raise Problem(400, f"{name} is not supported by this server: leave it out.", param=name)
    return msgspec.json.encode(fields)


def _refusal(error: str) -> Problem:
    """A validation error as a Problem that names the field. What it repeats of the request is cut short."""
    if len(error) > 8 * _LONGEST_NAME:  # it repeats megabytes of the request; where they are stands at the end
        error = error[: 4 * _LONGEST_NAME] + error[-4 * _LONGEST_NAME :]
    where = re.search(r" - at `\$\.?(.*)`$", error, re.DOTALL)
    path = where[1] if where else ""
    what = error[: where.start()] if where else error
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return _unknown(path, unknown[1], ())
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        field = f"{path}.{missing[1]}".lstrip(".")
        return Problem(400, f"{field} is missing.", param=field)
    return Problem(400, _explained(what, path), param=_cut(path) or None)


def _explained(what: str, path: str) -> str:
    """What the decoder says of a value, as a sentence that says what the field may be."""
    field = _cut(path) or "The body"
    allowed = CHOICES.get(path.rpartition(".")[2], ())
    if kinds := re.fullmatch(r"Expected `(.*)`, got `(.*)`", what):
        allowed = allowed or tuple(_KINDS.get(kind, kind) for kind in kinds[1].split(" | "))
        given = _KINDS.get(kinds[2], kinds[2]) if kinds[2] != "float" else "a floating-point number"
    elif value := re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL):
        given = _cut(value[1])
    elif re.fullmatch(r"Expected `int` [<>]= .*", what):
        return f"{field} must be an integer of at most 64 bits."
    else:
        return f"{field} cannot be read: {_cut(what)}."
    *others, last = allowed
    return f"{field} must be {', '.join(others)}{' or ' if others else ''}{last}, not {given}."


def _unknown(path: str, name: str, known: tuple[str, ...]) -> Problem:
    name = name[:_LONGEST_NAME]
    near = difflib.get_close_matches(name, known, 1)
    name = f"{path}.{name}"[-_LONGEST_NAME:].lstrip(".")
    return Problem(400, f"There is no field {name} here.{f' Did you mean {near[0]}?' if near else ''}", param=name)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
