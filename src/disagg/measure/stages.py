"""The decisions a comparison takes by measuring first: the default SLO, the capacity, the chunk size, the rates."""

import math
from collections.abc import Sequence

import msgspec

from disagg.clock import Clock
from disagg.config import SLO, EngineSpec
from disagg.measure import metrics
from disagg.measure.drive import Driven, Label, run_one_at_a_time, run_open_loop, run_saturated
from disagg.measure.run import Arm, Capacity, Settings, Trial
from disagg.measure.sources import Source
from disagg.record import Record
from disagg.workload.traces import Trace, fit_scale, replay
from disagg.workload.workload import Limits, Note, Workload

SLO_TTFT_X, SLO_TPOT_X = 10.0, 3.0  # times the unloaded median; DistServe's "SLO scale", loose enough to be met at 0.4
TUNE_LOAD = 0.8
SEQUENTIAL_SHARE = 0.4  # of the time budget
MIN_REQUESTS, MIN_BLOCK_S = 16, 1.5  # a shorter block would measure its own start and end
FEWEST = 8  # requests of a block where the time budget does not allow MIN_REQUESTS
CAPACITY_SHARE = 0.2  # of the time budget: the longest that measuring a capacity may take
MEDIAN_SHARE = 1 / 120  # of the time budget: the longest that a trace's median request may take alone
SHORT_TOKENS = 64  # of the requests that are timed to find out how long such a request takes
TUNE_S, TUNE_SHARE = 2.5, 0.2  # of one trial; of the time budget, for all of them


def fit_lengths(
    cluster: Driven, trace: Trace, limits: Limits, clock: Clock, settings: Settings
) -> tuple[float, list[Note]]:
    """The factor on a trace's lengths: what fits the context, or less where requests would be too slow; that is stated.

    The median request may take MEDIAN_SHARE of the time budget alone. Time grows about as lengths do: short requests
    are timed first, so that a slow model does not spend the budget on being found slow, then those of the factor found.
    Nothing is made shorter than SHORT_TOKENS, of which a hiccup of the machine could convince us.
    """
    allowed_s = MEDIAN_SHARE * settings.time_budget_s
    by_length = sorted(trace.rows, key=lambda row: row.prompt_len + row.output_len)
    middle = by_length[len(by_length) // 2 - 1 :][:3]
    fitting = fit_scale(trace, limits.max_len)
    scale = least = min(fitting, SHORT_TOKENS / (middle[1].prompt_len + middle[1].output_len))
    for _ in range(2):
        timed = replay(Trace(trace.name, tuple(middle)), 0.0, len(middle), 0, settings.seed, limits, scale)
        records = run_one_at_a_time(cluster, timed, clock, Label("", "lengths"))
        scale = max(least, min(fitting, scale * allowed_s / (metrics.e2e(records).p50 or allowed_s)))
    if scale == fitting:
        return scale, []
    return scale, [Note("length_time", {"scale": scale, "fitting": fitting, "alone_s": allowed_s})]


def fit_sequential(settings: Settings, alone_s: float) -> tuple[Settings, list[Note]]:
    """Fewer requests, then fewer repeats, when a model is too slow for its share of the time budget; each is stated.

    `alone_s` is what one request takes alone. What the caller chose is kept, and so is what would exceed the share by
    less than half: a small change of the workload is not worth having to state it.
    """
    allowed_s = SEQUENTIAL_SHARE * settings.time_budget_s
    requests, repeats = settings.requests, settings.repeats
    for name, least in (("requests", 8), ("repeats", 3), ("requests", 4)):
        excess = requests * repeats * len(settings.arms) * alone_s / allowed_s
        if excess <= 1.5 or name in settings.given:
            continue
        if name == "requests":
            requests = min(requests, max(least, int(requests / excess)))
        else:
            repeats = min(repeats, max(least, int(repeats / excess)))
    notes = [
        Note("reduced", {"what": what, "before": before, "after": after, "alone_s": alone_s})
        for what, before, after in (("requests", settings.requests, requests), ("repeats", settings.repeats, repeats))
        if after != before
    ]
    return msgspec.structs.replace(settings, requests=requests, repeats=repeats), notes


def fit_loads(settings: Settings, capacity: Capacity, remaining_s: float, tail_s: float) -> tuple[Settings, list[Note]]:
    """Fewer loads when MIN_REQUESTS at each would not fit into `remaining_s`: those nearest 0.8 are kept; stated."""
    if settings.rates or "loads" in settings.given:
        return settings, []
    kept = sorted(settings.loads, key=lambda load: abs(load - TUNE_LOAD))
    blocks = settings.repeats * len(settings.arms)
    while len(kept) > 1 and blocks * len(kept) * (_shortest(min(kept) * capacity.rate) + tail_s) > remaining_s:
        kept.pop()
    if len(kept) == len(settings.loads):
        return settings, []
    before, after = (", ".join(f"{load:g}" for load in sorted(loads)) for loads in (settings.loads, kept))
    note = Note("fewer_loads", {"before": before, "after": after, "rate": capacity.rate})
    return msgspec.structs.replace(settings, loads=tuple(sorted(kept))), [note]


def default_slo(arm: str, records: Sequence[Record]) -> tuple[SLO, Note]:
    """Limits from one colocated arm's unloaded, one-at-a-time medians, the same for every arm.

    SLO_TTFT_X times TTFT and SLO_TPOT_X times TPOT, rounded up to two digits. What a user tolerates is not a multiple
    of what a machine can do, so these only place the limits where load matters: real limits come from `--slo`.
    """
    slo = SLO(
        ttft_s=_round_up(SLO_TTFT_X * (metrics.ttft(records).p50 or math.inf)),
        tpot_s=_round_up(SLO_TPOT_X * (metrics.tpot(records).p50 or math.inf)),
    )
    values: dict[str, float | int | str] = {"arm": arm, "ttft_x": SLO_TTFT_X, "tpot_x": SLO_TPOT_X}
    values |= {"ttft_ms": round(1e3 * (slo.ttft_s or 0), 6), "tpot_ms": round(1e3 * (slo.tpot_s or 0), 6)}
    return slo, Note("slo_default", values)


def _round_up(value: float) -> float | None:
    """Up to two significant digits; None for infinity, which is no limit."""
    if math.isinf(value):
        return None
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(round(value / unit, 6)) * unit


def measure_capacity(
    cluster: Driven, arm: Arm, source: Source, clock: Clock, unloaded_s: float, seconds: float, limit_s: float
) -> tuple[Capacity, list[Note]]:
    """Requests/s when saturated: 8 to 32 requests in flight, fewer the longer one takes alone (`unloaded_s`).

    Lasts about `seconds` for short requests and is cut off at `limit_s` for long ones. Where that leaves the ramp in
    it, the capacity is at least what the workers do one request at a time each, and a note says so.
    """
    in_flight = max(8, min(32, round(8 / unloaded_s)))
    workload = source.alone(4 * in_flight)
    burst = run_saturated(cluster, workload, clock, in_flight, seconds, limit_s)
    found = Capacity(arm.name, burst.rate, burst.tokens_per_s, in_flight, burst.window_s)
    if not burst.with_ramp:
        return found, []
    least = sum(1 / worker.shares for worker in arm.deployment.workers) / unloaded_s
    if least > found.rate:
        tokens_per_s = burst.tokens_per_s * least / burst.rate
        found = msgspec.structs.replace(found, rate=least, tokens_per_s=tokens_per_s)
    values: dict[str, float | int | str] = {
        "arm": arm.name,
        "window_s": burst.window_s,
        "measured": burst.rate,
        "rate": found.rate,
    }
    return found, [Note("capacity_ramp", values)]


def chunk_candidates(engine: EngineSpec) -> list[EngineSpec]:
    """The engine asked for, then with smaller chunks, which delay decode less and prefill more.

    Where mixed steps have a limit of their own (on GPUs), that is searched, and twice as much is tried too: it is the
    one that binds while anybody decodes.
    """
    asked, mixed = engine.chunk_tokens, engine.max_mixed_tokens is not None
    least = max(2 * engine.page_size, engine.max_running if mixed else 0)
    sizes = [asked // 2, asked // 4] + ([2 * asked] if mixed else [])
    fitting = [size for size in sizes if least <= size <= engine.max_batch_tokens]
    return [engine, *(engine.with_chunk(size) for size in fitting)]


def trial_s(rate: float) -> float:
    """Seconds of arrivals when one chunk size is tried."""
    return max(TUNE_S, _shortest(rate))


def try_chunk(cluster: Driven, workload: Workload, clock: Clock, engine: EngineSpec, slo: SLO) -> Trial:
    """One short block on a `cluster` that was started with this engine."""
    records = run_open_loop(cluster, workload, clock, Label("", "tuning", workload.rate))
    goodput, e2e_s = metrics.goodput(records, slo).share, metrics.e2e(records).mean or math.inf
    return Trial(engine.max_batch_tokens, goodput, e2e_s, engine.max_mixed_tokens)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The one with the most goodput; within two points of it, the lowest latency.

    The first trial, which is what was asked for, stays unless another has two points or 5 % more: a short search must
    not follow noise.
    """
    top = max(trial.goodput for trial in trials)
    best = min((trial for trial in trials if trial.goodput >= top - 0.02), key=lambda trial: trial.e2e_s)
    first = trials[0]
    clearly = best.goodput > first.goodput + 0.02 or best.e2e_s < 0.95 * first.e2e_s
    return best if clearly else first


def choose_rates(settings: Settings, capacity: Capacity) -> list[float]:
    """The rates given, or the loads times the capacity, to three digits, rising."""
    if settings.rates:
        return sorted(settings.rates)
    return sorted({float(f"{load * capacity.rate:.3g}") for load in settings.loads})


def _shortest(rate: float) -> float:
    """Seconds that a block at `rate` must have."""
    return max(MIN_BLOCK_S, MIN_REQUESTS / rate)


def choose_duration(
    settings: Settings, rates: Sequence[float], remaining_s: float, num_blocks: int, tail_s: float
) -> float:
    """Seconds of arrivals in one block: what is left of the time budget, divided over the blocks still to run.

    `tail_s` is what a block takes beyond its arrivals. Never too short for FEWEST requests at the lowest rate, even if
    the budget does not allow it.
    """
    if settings.duration_s is not None:
        return settings.duration_s
    allowed = 0.95 * remaining_s / num_blocks - tail_s
    return max(MIN_BLOCK_S, FEWEST / rates[0], allowed)


def few_requests(settings: Settings, rates: Sequence[float], duration_s: float) -> list[Note]:
    """A note when the time budget gave blocks of `duration_s` fewer than MIN_REQUESTS at the lowest rate."""
    num = round(rates[0] * duration_s)
    if settings.duration_s is not None or num >= MIN_REQUESTS:
        return []
    return [Note("few_requests", {"rate": rates[0], "num": num, "wanted": MIN_REQUESTS, "duration_s": duration_s})]
