"""When requests come: every moment of a run, drawn once, before it starts.

Arrivals are data. They are drawn from one seeded generator, saved with the results, and replayed to every arm and to
the simulator. Gaps are neither cut nor rescaled to fit: the realised rate varies from seed to seed as the process
says, which is part of what repeats have to average over.
"""

import re
from typing import Literal

import msgspec
import numpy as np

from disagg.errors import InputError

Process = Literal["poisson", "constant", "gamma"]


class Arrivals(msgspec.Struct, frozen=True):
    """A renewal process of `rate` requests/s.

    `cv` is the coefficient of variation of the gaps: 1 for poisson, 0 for constant, free for gamma (above 1 is
    burstier than Poisson).
    """

    process: Process
    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise InputError(f"An arrival rate must be above 0 requests/s, not {self.rate}.")
        if self.process == "gamma" and not self.cv > 0:
            raise InputError(f"The gaps of gamma arrivals need a coefficient of variation above 0, not {self.cv}.")

    @classmethod
    def parse(cls, text: str, rate: float) -> "Arrivals":
        """`poisson`, `constant` or `gamma:CV`. Raises InputError."""
        if text == "poisson":
            return cls("poisson", rate)
        if text == "constant":
            return cls("constant", rate, 0.0)
        if match := re.fullmatch(r"gamma:(\d+(?:\.\d+)?)", text):
            return cls("gamma", rate, float(match[1]))
        raise InputError(f"Arrivals {text!r} are not understood: write poisson, constant or gamma:CV, as in gamma:2.")

    def until(self, end_s: float, rng: np.random.Generator) -> list[float]:
        """All arrivals in [0, end_s), seconds, rising. How many there are is random, unless they are constant."""
        times: list[float] = []
        at = self._gap(rng)
        while at < end_s:
            times.append(at)
            at += self._gap(rng)
        return times

    def _gap(self, rng: np.random.Generator) -> float:
        """One gap in seconds, mean 1 / rate."""
        if self.process == "constant":
            return 1 / self.rate
        if self.process == "poisson":
            return float(rng.exponential(1 / self.rate))
        shape = self.cv**-2  # a gamma variable of shape k has cv 1 / sqrt(k)
        return float(rng.gamma(shape, 1 / (shape * self.rate)))
