"""The timeline: what every worker of every arm did in the same stretch of the same workload.

The stretch is found, not chosen by hand: where a colocated arm has the gap between two tokens that holds the most
prefill. Arms ran at different times but replayed the same arrivals, so each run's clock starts at its first scheduled
arrival, and the same stretch of it is shown for every arm. What is framed and told is each arm's longest wait in it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from disagg.measure import metrics
from disagg.measure.metrics import lane_of
from disagg.measure.plots_scene import PARTS, WIDTH, Scene, colocated
from disagg.record import Record

Floats = NDArray[np.float64]
_FRAME: dict[str, Any] = {"fill": False, "edgecolor": "#222222", "linestyle": (0, (1, 1)), "linewidth": 1.4}
SHOWN_STEPS = 60  # a stretch shows about so many decode steps, and four to six times the gap it is about


class Gap(NamedTuple):
    """Two neighbouring tokens of a request, and how long their worker prefilled between them. From the run's start."""

    start_s: float
    end_s: float
    prefill_s: float


class Wait(NamedTuple):
    """The longest wait of a request for its next token, and the lane it is seen in. From the run's start."""

    start_s: float
    end_s: float
    lane: str


class Stretch(NamedTuple):
    """What the figure shows: a stretch of one repeat at one rate."""

    rate: float
    repeat: int
    start_s: float
    end_s: float


def run_start(run: Sequence[Record]) -> float:
    """The first scheduled arrival of a run: zero on the timeline's axis."""
    return min(record.scheduled_at for record in run)


def worst_gap(run: Sequence[Record]) -> Gap | None:
    """The gap between neighbouring tokens of one request that holds the most prefill. None: no gap holds any.

    The gap from the first to the second token is left out: what it holds may be the request's own prefill.
    """
    begin = run_start(run)
    worst: Gap | None = None
    for worker, (starts, ends) in _prefills(run).items():
        for record in run:
            if record.decode_worker != worker or len(record.token_at) < 3:
                continue
            tokens = np.array(record.token_at[1:])
            held = np.diff(_busy_before(tokens, starts, ends))
            place = int(np.argmax(held))
            if held[place] > (worst.prefill_s if worst else 1e-6):
                start_s, end_s = tokens[place : place + 2] - begin
                worst = Gap(float(start_s), float(end_s), float(held[place]))
    return worst


def _prefills(run: Sequence[Record]) -> dict[str, tuple[Floats, Floats]]:
    """Start and end of each worker's prefill steps, in order. Chunks of one step share its time and count once."""
    steps: dict[str, set[tuple[float, float]]] = {}
    for record in run:
        for span in record.spans:
            if span.kind == "prefill":
                steps.setdefault(span.worker, set()).add((span.start_at, span.end_at))
    both = {worker: np.array(sorted(pairs)) for worker, pairs in steps.items()}
    return {worker: (pairs[:, 0], np.maximum.accumulate(pairs[:, 1])) for worker, pairs in both.items()}


def _busy_before(moments: Floats, starts: Floats, ends: Floats) -> Floats:
    """Prefill time before each moment; `starts` and `ends` are sorted."""
    starts = np.maximum(starts, np.concatenate(([-np.inf], ends[:-1])))  # an overlap counts once
    corners = np.stack((starts, ends), axis=1).ravel()
    total = np.concatenate(([0.0], np.cumsum(ends - starts)))
    busy = np.stack((total[:-1], total[1:]), axis=1).ravel()
    return np.asarray(np.interp(moments, corners, busy))


def find_stretch(scene: Scene) -> Stretch | None:
    """Around the worst gap of the first colocated arm that has one; else the middle of the busiest run."""
    runs = {(run[0].arm, run[0].rate, run[0].repeat): run for run in metrics.blocks(_concurrent(scene))}
    if not runs:
        return None
    for arm in filter(colocated, scene.arms):
        gaps = [(gap, key) for key, run in runs.items() if key[0] == arm and (gap := worst_gap(run)) is not None]
        if gaps:
            gap, (_, rate, repeat) = max(gaps, key=lambda found: found[0].prefill_s)
            step_s = metrics.itl(runs[arm, rate, repeat]).p50 or 0.0
            length = gap.end_s - gap.start_s
            half = min(max(SHOWN_STEPS / 2 * step_s, 2 * length), 3 * length)
            middle = (gap.start_s + gap.end_s) / 2
            return Stretch(rate, repeat, max(0.0, middle - half), middle + half)
    (_, rate, repeat), run = max(runs.items(), key=lambda item: item[0][1])
    step_s = metrics.itl(run).p50 or 0.01
    middle = float(np.median([record.scheduled_at for record in run])) - run_start(run)
    half = SHOWN_STEPS / 2 * step_s
    return Stretch(rate, repeat, max(0.0, middle - half), middle + half)


def _concurrent(scene: Scene) -> Iterator[Record]:
    return (record for record in scene.records if record.phase == "concurrent")


def draw_timeline(scene: Scene) -> Figure | None:
    """Lanes of all workers, arm under arm; prefill and hand-off as bars, decoded tokens as ticks. None without any."""
    stretch = find_stretch(scene)
    if stretch is None:
        return None
    runs = {
        arm: [record for record in scene.concurrent(arm, stretch.rate) if record.repeat == stretch.repeat]
        for arm in scene.arms
    }
    lanes = {arm: names for arm, run in runs.items() if (names := _lanes(run))}
    if not lanes:
        return None
    figure = Figure(figsize=(WIDTH, 1.25 + sum(0.55 + 0.55 * len(names) for names in lanes.values())))
    heights = [1 + len(names) for names in lanes.values()]
    grid = figure.subplots(len(lanes), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (arm, names) in zip(grid, lanes.items(), strict=True):
        _draw_arm(axes, runs[arm], names, stretch)
        title = arm
        if wait := longest_wait(runs[arm], stretch):
            _frame(axes, names.index(wait.lane), wait)
            title = scene.words("plot.timeline_arm", arm=arm, gap=f"{1e3 * (wait.end_s - wait.start_s):,.0f}")
        axes.set_title(title)
        for label in axes.get_yticklabels():
            label.set_color(scene.colours[arm])
    grid[-1].xaxis.set_major_formatter(lambda at, _: f"{1e3 * (at - stretch.start_s):,.5g}")
    grid[-1].xaxis.set_major_locator(_EvenTicks(stretch.start_s))
    grid[-1].set_xlabel(scene.words("axis.since", at=f"{stretch.start_s:.2f}", rate=f"{stretch.rate:.3g}"))
    figure.legend(handles=_keys(scene), loc="outside upper left", ncols=4, handlelength=1.6)
    return figure


class _EvenTicks(MaxNLocator):
    """Round numbers counted from the start of the stretch."""

    def __init__(self, start_s: float) -> None:
        super().__init__(nbins=8)
        self._start_s = start_s

    def tick_values(self, vmin: float, vmax: float) -> Floats:  # type: ignore[override]
        return np.asarray(super().tick_values(vmin - self._start_s, vmax - self._start_s)) + self._start_s


def _lanes(run: Sequence[Record]) -> list[str]:
    """The lanes of all workers that took part, prefill before decode, by number."""
    workers = {span.worker for record in run for span in record.spans}
    workers |= {record.decode_worker for record in run if record.decode_worker}
    role = {"C": 0, "P": 1, "D": 2}
    names = {lane_of(worker) for worker in workers}
    return sorted(names, key=lambda name: (role.get(name[:1], 3), int(re.sub(r"\D", "", name) or 0), name))


def longest_wait(run: Sequence[Record], stretch: Stretch) -> Wait | None:
    """The longest wait for a next token that lies in the stretch or reaches into it. None without one."""
    begin = run_start(run)
    waits = (
        Wait(earlier - begin, later - begin, lane_of(record.decode_worker))
        for record in run
        if record.decode_worker
        for earlier, later in zip(record.token_at[1:], record.token_at[2:], strict=False)
        if _inside(earlier - begin, later - begin, stretch)
    )
    return max(waits, key=lambda wait: wait.end_s - wait.start_s, default=None)


def _draw_arm(axes: Axes, run: Sequence[Record], names: list[str], stretch: Stretch) -> None:
    """One arm's lanes. Upper half of a lane: prefill and hand-off; lower half: a tick for every token."""
    begin = run_start(run)
    # White edges keep prefill steps apart; a copy may be too short to be seen, so its own colour widens it.
    for kind, edge, width in (("prefill", "white", 0.4), ("handoff", PARTS["handoff"], 1.2)):
        bars = {
            (names.index(lane_of(span.worker)), span.start_at - begin, span.end_at - begin)
            for record in run
            for span in record.spans
            if span.kind == kind and _inside(span.start_at - begin, span.end_at - begin, stretch)
        }
        boxes = [
            [(start, lane - 0.42), (end, lane - 0.42), (end, lane - 0.04), (start, lane - 0.04)]
            for lane, start, end in bars
        ]
        axes.add_collection(PolyCollection(boxes, facecolors=PARTS[kind], edgecolors=edge, linewidths=width))
    for lane, name in enumerate(names):
        axes.axhspan(lane - 0.47, lane + 0.47, color="#F5F5F5", zorder=0, linewidth=0)
        moments = [
            moment - begin
            for record in run
            if lane_of(record.decode_worker) == name
            for moment in record.token_at[1:]
            if _inside(moment - begin, moment - begin, stretch)
        ]
        axes.vlines(moments, lane + 0.04, lane + 0.42, color=PARTS["decode"], linewidth=0.9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(stretch.start_s, stretch.end_s)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    place = axes.get_subplotspec()
    if place is not None and not place.is_last_row():
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)


def _inside(start_s: float, end_s: float, stretch: Stretch) -> bool:
    return end_s > stretch.start_s and start_s < stretch.end_s


def _frame(axes: Axes, lane: int, wait: Wait) -> None:
    corner, size = (wait.start_s, lane - 0.47), (wait.end_s - wait.start_s, 0.94)
    axes.add_patch(Rectangle(corner, *size, zorder=5, **_FRAME))


def _keys(scene: Scene) -> list[Patch | Line2D]:
    words = scene.words
    tick = Line2D([], [], color=PARTS["decode"], marker="|", markersize=9, linestyle="none", markeredgewidth=1.4)
    tick.set_label(words("plot.token"))
    return [
        Patch(color=PARTS["prefill"], label=words("part.prefill")),
        tick,
        Patch(color=PARTS["handoff"], label=words("part.handoff")),
        Patch(label=words("plot.longest_wait"), **_FRAME),
    ]
