"""How long prompts and outputs are: fixed, uniform or lognormal token counts."""

import math
import re
from typing import Literal

import msgspec
import numpy as np

from disagg.errors import InputError


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of token counts, all at least 1.

    fixed: `low`. uniform: `low` to `high`, both included. lognormal: `mean` and `cv` (standard deviation / mean) of
    the counts themselves, not of their logarithm; rounded, so the mean holds to half a token.
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int = 1
    high: int = 1
    mean: float = 0.0
    cv: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`512`, `10:99` or `lognormal:MEAN:CV`. Raises InputError."""
        number = r"(\d+(?:\.\d+)?)"
        if match := re.fullmatch(r"(\d+)(?::(\d+))?", text):
            low = int(match[1])
            high = int(match[2]) if match[2] else low
            if not 1 <= low <= high:
                raise InputError(f"Lengths {text!r} must rise from at least 1 token, as in 10:99.")
            return cls("uniform" if match[2] else "fixed", low, high)
        if match := re.fullmatch(rf"lognormal:{number}:{number}", text):
            mean, cv = float(match[1]), float(match[2])
            if mean < 1 or cv <= 0:
                raise InputError(f"Lengths {text!r} need a mean of at least 1 token and a spread above 0.")
            return cls("lognormal", mean=mean, cv=cv)
        raise InputError(f"Lengths {text!r} are not understood: write 512, 10:99 or lognormal:512:0.8 (mean, spread).")

    def draw(self, rng: np.random.Generator) -> int:
        """One count. A fixed length draws nothing from `rng`."""
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return int(rng.integers(self.low, self.high, endpoint=True))
        spread = math.log(1 + self.cv**2)
        return max(1, round(float(rng.lognormal(math.log(self.mean) - spread / 2, math.sqrt(spread)))))

    @property
    def longest(self) -> int | None:
        """The largest count it can draw; None when there is no bound."""
        return None if self.kind == "lognormal" else self.high

    def __str__(self) -> str:
        if self.kind == "lognormal":
            return f"lognormal:{self.mean:g}:{self.cv:g}"
        return str(self.low) if self.kind == "fixed" else f"{self.low}:{self.high}"
