"""What is asked of a deployment: rows of (arrival, prompt, output length), drawn once and replayed to every arm."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from disagg.errors import InputError, RequestError
from disagg.request import SamplingParams
from disagg.workload.arrivals import Arrivals
from disagg.workload.lengths import Lengths


class Note(msgspec.Struct, frozen=True):
    """Something the output must state. `key` names a sentence in `disagg.measure.sentences`, `values` fill it."""

    key: str
    values: Mapping[str, float | int | str] = {}


class Row(msgspec.Struct, frozen=True):
    """One request to come. `arrival_at` is seconds from the start of the workload."""

    index: int
    arrival_at: float
    prompt: tuple[int, ...]
    max_tokens: int  # exactly so many come back: end-of-sequence is ignored

    def params(self) -> SamplingParams:
        """Greedy, so that arms can be compared token for token, and of enforced length."""
        return SamplingParams(temperature=0.0, max_tokens=self.max_tokens, ignore_eos=True)


class Workload(msgspec.Struct, frozen=True):
    """The rows of one block, in order of arrival; saved with the results."""

    seed: int
    rate: float  # requests/s asked for; 0: one at a time
    repeat: int
    rows: tuple[Row, ...]
    notes: tuple[Note, ...] = ()

    @property
    def span_s(self) -> float:
        """The last arrival, in seconds from the start."""
        return self.rows[-1].arrival_at if self.rows else 0.0


class Limits(msgspec.Struct, frozen=True):
    """What the model allows. `avoid` are ids with a special meaning, never put into a prompt."""

    vocab_size: int
    max_len: int
    avoid: frozenset[int] = frozenset()

    def ids(self, num: int, rng: np.random.Generator) -> tuple[int, ...]:
        """`num` ids, uniform over the vocabulary; a forbidden one is drawn again."""
        drawn: list[int] = rng.integers(0, self.vocab_size, num).tolist()
        while self.avoid and (bad := [place for place, token in enumerate(drawn) if token in self.avoid]):
            for place in bad:
                drawn[place] = int(rng.integers(0, self.vocab_size))
        return tuple(drawn)


class Shape(msgspec.Struct, frozen=True):
    """Prompt and output lengths, drawn independently of each other."""

    prompt: Lengths = Lengths("uniform", 10, 99)  # the defaults are the original experiment's
    output: Lengths = Lengths("uniform", 5, 49)

    def check(self, limits: Limits) -> None:
        """Raises RequestError when a request could be longer than the context."""
        longest = (self.prompt.longest or 1) + (self.output.longest or 1)
        if longest > limits.max_len:
            raise RequestError(
                f"A prompt of {self.prompt} and an output of {self.output} tokens can reach {longest} tokens and the "
                f"context holds {limits.max_len}: use shorter --prompt-len or --output-len."
            )


def one_at_a_time(shape: Shape, num: int, seed: int, limits: Limits) -> Workload:
    """`num` requests without arrival times, each sent when the one before has ended.

    Draw order, from one generator seeded with `seed`: for each request in turn its prompt length, its output length,
    its ids. With the default shape, seed 42 and 20 requests this is the original experiment's workload.
    """
    rng = np.random.default_rng(seed)
    rows, notes = _rows([0.0] * num, shape, rng, limits)
    return Workload(seed, 0.0, 0, rows, notes)


def open_loop(shape: Shape, arrivals: Arrivals, end_s: float, seed: int, limits: Limits) -> Workload:
    """Requests that come whether or not the earlier ones have ended, over `end_s` seconds.

    Draw order, from one generator seeded with `seed`: all arrivals, then the requests as in `one_at_a_time`. Raises
    InputError when nothing arrives.
    """
    rng = np.random.default_rng(seed)
    times = arrivals.until(end_s, rng)
    if not times:
        raise InputError(
            f"No request arrives within {end_s:g} s at {arrivals.rate:g} requests/s: use a longer --duration."
        )
    rows, notes = _rows(times, shape, rng, limits)
    return Workload(seed, arrivals.rate, 0, rows, notes)


def _rows(
    times: list[float], shape: Shape, rng: np.random.Generator, limits: Limits
) -> tuple[tuple[Row, ...], tuple[Note, ...]]:
    """One row per time, and a note when unbounded lengths had to be cut to the context."""
    shape.check(limits)
    rows: list[Row] = []
    num_cut = 0
    for index, at in enumerate(times):
        prompt_len, output_len = shape.prompt.draw(rng), shape.output.draw(rng)
        fitted = cut(prompt_len, output_len, limits.max_len)
        num_cut += fitted != (prompt_len, output_len)
        rows.append(Row(index, at, limits.ids(fitted[0], rng), fitted[1]))
    notes = (Note("cut", {"num": num_cut, "of": len(rows), "max_len": limits.max_len}),) if num_cut else ()
    return tuple(rows), notes


def cut(prompt_len: int, output_len: int, max_len: int) -> tuple[int, int]:
    """Both lengths, shortened to fit the context together: the output to half of it at most, then the prompt."""
    if prompt_len + output_len <= max_len:
        return prompt_len, output_len
    output_len = min(output_len, max(1, max_len // 2))
    return min(prompt_len, max_len - output_len), output_len


def write_workloads(path: Path, workloads: Iterable[Workload]) -> None:
    """Append one JSON line per workload."""
    encoder = msgspec.json.Encoder()
    with path.open("ab") as file:
        for workload in workloads:
            file.write(encoder.encode(workload) + b"\n")
