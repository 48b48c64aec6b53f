"""Where a comparison's requests come from: drawn lengths, or a trace. One seed per block, the same for every arm."""

from pathlib import Path
from typing import Protocol

import msgspec

from disagg.errors import InputError
from disagg.measure.run import Settings
from disagg.workload.arrivals import Arrivals
from disagg.workload.traces import Trace, read_trace, replay
from disagg.workload.workload import Limits, Shape, Workload, one_at_a_time, open_loop


class Source(Protocol):
    """Makes workloads; the same arguments give the same workload."""

    def alone(self, num: int) -> Workload:
        """`num` requests without arrival times."""

    def stream(self, rate: float, duration_s: float, repeat: int) -> Workload:
        """About `duration_s` seconds of requests at `rate`; another repeat is another draw."""


class Drawn:
    """Lengths and arrivals drawn from distributions."""

    def __init__(self, shape: Shape, arrivals: str, seed: int, limits: Limits) -> None:
        self.shape, self.arrivals, self.seed, self.limits = shape, arrivals, seed, limits
        shape.check(limits)

    def alone(self, num: int) -> Workload:
        """See Source. With the default settings, the original experiment's 20 requests."""
        return one_at_a_time(self.shape, num, self.seed, self.limits)

    def stream(self, rate: float, duration_s: float, repeat: int) -> Workload:
        """See Source. Repeat r is drawn from seed + 1 + r; the rate only stretches the gaps of the same draw."""
        seed = self.seed + 1 + repeat
        drawn = open_loop(self.shape, Arrivals.parse(self.arrivals, rate), duration_s, seed, self.limits)
        return msgspec.structs.replace(drawn, repeat=repeat)


class Replayed:
    """A trace, scaled in length to the context and in time to the rate."""

    def __init__(self, trace: Trace, seed: int, limits: Limits, scale: float | None) -> None:
        self.trace, self.seed, self.limits, self.scale = trace, seed, limits, scale

    def alone(self, num: int) -> Workload:
        """See Source: the trace's first rows."""
        return replay(self.trace, 0.0, num, 0, self.seed, self.limits, self.scale)

    def stream(self, rate: float, duration_s: float, repeat: int) -> Workload:
        """See Source: repeat r replays the trace's r-th window."""
        num = max(2, round(rate * duration_s))
        return replay(self.trace, rate, num, repeat, self.seed, self.limits, self.scale)


def load_trace(settings: Settings) -> Trace | None:
    """The trace that the settings name, if any. Raises TraceError, or InputError when options do not go together."""
    if not settings.trace:
        if settings.trace_limit is not None or settings.length_scale is not None:
            raise InputError("--trace-limit and --length-scale are about a trace: give --trace FILE too.")
        Arrivals.parse(settings.arrivals, 1.0)
        return None
    if settings.shape != Shape() or settings.arrivals != Settings().arrivals:
        raise InputError(
            "A trace brings its own lengths and arrivals: leave out --prompt-len, --output-len, --arrivals."
        )
    return read_trace(Path(settings.trace), settings.trace_limit, settings.seed)


def make_source(settings: Settings, limits: Limits, trace: Trace | None) -> Source:
    """The source that the settings ask for. Raises RequestError when its requests cannot fit the context."""
    if trace is None:
        return Drawn(settings.shape, settings.arrivals, settings.seed, limits)
    return Replayed(trace, settings.seed, limits, settings.length_scale)
