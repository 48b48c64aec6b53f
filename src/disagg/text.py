"""From tokens to text as they come: nothing half, nothing past a stop string."""

from collections.abc import Sequence
from typing import Protocol


class Detokenizes(Protocol):
    """Turns token ids into text piece by piece; `model.tokenizer.Detokenizer` is one."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that is complete now."""
        ...

    def flush(self) -> str:
        """What was held back, at the end."""
        ...


def numbers(ids: Sequence[int]) -> str:
    """Text of a model without a tokenizer: its token ids, each followed by a space."""
    return "".join(f"{token} " for token in ids)


class Numbers:
    """The same, piece by piece."""

    def push(self, ids: Sequence[int]) -> str:
        """See Detokenizes."""
        return numbers(ids)

    def flush(self) -> str:
        """See Detokenizes."""
        return ""


class TextStream:
    """One request's text. `push` returns what may be shown; after a stop string `stopped` is True and nothing follows.

    Text that could be the beginning of a stop string is held back until it is decided. The stop string itself is not
    shown, as in the OpenAI API. `begins_at` counts the characters before those of the last push, shown or held back.
    """

    def __init__(self, detokenizer: Detokenizes, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        self.begins_at = 0
        self._num_chars = 0

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """Take new tokens; `final` says that no more will come, so nothing needs to be held back."""
        if self.stopped:
            return ""
        new = self._detokenizer.push(ids)
        if final:
            new += self._detokenizer.flush()
        self.begins_at = self._num_chars
        if new[:1] == "\ufffd":  # bytes from before, which turned out to be no character
            broken = len(new) - len(new.lstrip("\ufffd"))
            self.begins_at += broken if broken < len(new) else 0
        self._num_chars += len(new)
        if not self._stop:
            return new
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:  # the one that was complete first, however the text was cut into tokens
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = 0 if final else self._undecided()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
