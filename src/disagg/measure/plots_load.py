"""Figures of the concurrent phase: distributions, latency against rate, and what the first two tokens waited for."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from disagg.measure import metrics
from disagg.measure.plots_scene import GREY, PARTS, WIDTH, Scene, legend_above, log_ms
from disagg.measure.stats import Interval, mean_interval
from disagg.record import TTFT_PARTS, Record

SECOND_TOKEN = ("handoff_wait", "handoff_copy", "admission")
_LINES: dict[str, Any] = {"p50": "-", "p99": "--", "": "-"}
_MARKERS = {"p50": "o", "p99": "s", "": "o"}
_NUDGES = {"p50": -0.175, "p99": 0.175, "": 0.0}
Measure = Callable[[Sequence[Record]], float | None]


def draw_distributions(scene: Scene) -> Figure | None:
    """A row per rate: share of requests whose first token came within x; share of gaps longer than x."""
    if not scene.rates:
        return None
    words, rates = scene.words, scene.rates
    figure = Figure(figsize=(WIDTH, 0.9 + 2.05 * len(rates)))
    grid = figure.subplots(len(rates), 2, squeeze=False, sharex="col")
    for (left, right), rate in zip(grid, rates, strict=True):
        for arm in scene.arms:
            records = metrics.completed(scene.concurrent(arm, rate))
            ttft = np.sort([record.ttft_s for record in records]) * 1e3
            gaps = np.sort([gap for record in records for gap in record.itl_s]) * 1e3
            look = {"where": "post", "color": scene.colours[arm]}
            left.step(ttft, np.arange(1, len(ttft) + 1) / max(len(ttft), 1), label=arm, **look)
            right.step(gaps, 1 - np.arange(len(gaps)) / max(len(gaps), 1), **look)
        left.set(title=words("plot.ttft_at", rate=_plain(rate)), ylabel=words("axis.share_within"), ylim=(0, 1.03))
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.set(title=words("plot.itl_at", rate=_plain(rate)), ylabel=words("axis.share_longer"), yscale="log")
        right.set_ylim(top=1.3)
        right.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        right.yaxis.set_minor_locator(NullLocator())
        if scene.slo.ttft_s is not None:
            left.axvline(scene.slo.ttft_s * 1e3, color=GREY, linestyle=":", linewidth=1.2, label=words("plot.slo"))
    for axes, label in zip(grid[-1], ("axis.ttft_ms", "axis.itl_ms"), strict=True):
        axes.set_xlabel(words(label))
        log_ms(axes, "x")
    legend_above(figure, grid[0][0])
    return figure


def draw_against_rate(scene: Scene) -> Figure | None:
    """TTFT, TPOT and ITL (median and 99th percentile) and goodput over the rate, with 95 % intervals over repeats."""
    if not scene.rates:
        return None
    words = scene.words
    figure = Figure(figsize=(WIDTH, 6.2))
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for axes, name in zip(panels, ("ttft", "tpot", "itl"), strict=False):
        for percentile in ("p50", "p99"):
            _curves(scene, axes, _percentile_ms(name, percentile), percentile)
        axes.set(title=words(f"plot.{name}_rate"), ylabel=words("axis.log_ms"))
        log_ms(axes, "y")
        limit = getattr(scene.slo, f"{name}_s", None)
        if limit is not None:
            axes.axhline(limit * 1e3, color=GREY, linestyle=":", linewidth=1.2)
    goodput = panels[3]
    _curves(scene, goodput, lambda rows: metrics.goodput(rows, scene.slo).share, "")
    goodput.set(title=words("plot.goodput_rate"), ylabel=words("axis.goodput"), ylim=(-0.03, 1.05))
    goodput.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in panels[2:]:
        axes.set_xlabel(words("axis.rate"))
        axes.xaxis.set_major_locator(FixedLocator(scene.rates))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: _plain(rate)))
        axes.set_xlim(scene.rates[0] - 0.09 * _span(scene), scene.rates[-1] + 0.09 * _span(scene))
    figure.legend(handles=_rate_keys(scene), loc="outside upper left", ncols=8, handlelength=2.2, columnspacing=1.4)
    return figure


def _span(scene: Scene) -> float:
    """The width of the axis of rates; a single rate stands in the middle of one."""
    return scene.rates[-1] - scene.rates[0] or 1.0


def _rate_keys(scene: Scene) -> list[Line2D]:
    """What the figure's legend explains; a single rate has no lines."""
    keys = [Line2D([], [], color=scene.colours[arm], linewidth=3, label=arm) for arm in scene.arms]
    for name in ("p50", "p99"):
        line: Any = _LINES[name] if len(scene.rates) > 1 else "none"
        keys.append(Line2D([], [], color=GREY, linestyle=line, marker=_MARKERS[name], markersize=4, label=name))
    if scene.slo.ttft_s is not None or scene.slo.tpot_s is not None:
        keys.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=scene.words("plot.slo")))
    return keys


def _plain(rate: float) -> str:
    return f"{rate:.3g}"


def _percentile_ms(metric: str, percentile: str) -> Measure:
    """A function of records: the percentile of a metric in milliseconds."""
    statistic: Callable[[Sequence[Record]], metrics.Stat] = getattr(metrics, metric)

    def measure(records: Sequence[Record]) -> float | None:
        seconds: float | None = getattr(statistic(records), percentile)
        return None if seconds is None else 1e3 * seconds

    return measure


def _curves(scene: Scene, axes: Axes, measure: Measure, name: str) -> None:
    """A curve per arm: the mean of `measure` over repeats at each rate, a bar for its interval."""
    # Apart, so that bars do not cover each other; a single rate leaves room for more.
    width = (0.016 if len(scene.rates) > 1 else 0.12 / len(scene.arms)) * _span(scene)
    for place, arm in enumerate(scene.arms):
        nudge = width * (place - (len(scene.arms) - 1) / 2 + _NUDGES[name])
        found = [(rate, across_repeats(scene.concurrent(arm, rate), measure)) for rate in scene.rates]
        kept = [(rate, mean) for rate, mean in found if mean is not None]
        if not kept:
            continue
        rates = np.array([rate for rate, _ in kept])
        means = np.array([mean.estimate for _, mean in kept])
        halves = np.array([0.0 if mean.high is None else mean.high - mean.estimate for _, mean in kept])
        below = np.minimum(halves, 0.9 * means) if name else np.minimum(halves, means)  # a log axis has no zero
        above = halves if name else np.minimum(halves, 1 - means)
        axes.errorbar(
            rates + nudge,
            means,
            yerr=(below, above),
            color=scene.colours[arm],
            linestyle=_LINES[name],
            marker=_MARKERS[name],
            markersize=4,
            capsize=2.5,
            elinewidth=1,
        )


def across_repeats(records: Sequence[Record], measure: Measure) -> Interval | None:
    """Mean of `measure` over the repeats with its 95 % interval. None when no repeat has a value."""
    measured = [measure(block) for block in metrics.blocks(records)]
    values = [value for value in measured if value is not None]
    return mean_interval(values) if values else None


def draw_waits(scene: Scene) -> Figure | None:
    """Mean wait of the first token, by part, and what the second token waits for on top; a bar per arm and rate."""
    if not scene.rates:
        return None
    words = scene.words
    bars = list(_bars(scene))
    figure = Figure(figsize=(WIDTH, 1.7 + 0.34 * len(bars)))
    first, second = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = [place for place, _, _ in bars]
    for axes, parts, of in (
        (first, TTFT_PARTS, metrics.ttft_parts),
        (second, SECOND_TOKEN, metrics.e2e_parts),
    ):
        means = [of(records) for _, _, records in bars]
        left = np.zeros(len(bars))
        for name in parts:
            widths = np.array([(row[name] or 0.0) * 1e3 for row in means])
            axes.barh(places, widths, left=left, height=0.72, color=PARTS[name], label=words(f"part.{name}"))
            left += widths
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
    first.set_yticks(places, [label for _, label, _ in bars])
    first.invert_yaxis()
    first.tick_params(axis="y", length=0)
    second.tick_params(axis="y", length=0)
    for axes, columns in ((first, 3), (second, 2)):  # beneath their panels, both 38 points below the axis
        below = axes.transAxes + ScaledTranslation(0, -38 / 72, figure.dpi_scale_trans)
        look: Any = {"borderaxespad": 0, "handlelength": 1.2, "columnspacing": 1.2, "fontsize": 9}
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=columns, **look)
    first.set(title=words("plot.first_token"), xlabel=words("axis.mean_ms"))
    second.set(title=words("plot.second_token"), xlabel=words("axis.mean_ms"))
    if second.get_xlim()[1] < 1e-6 or not any(bar.get_width() for bar in second.patches):
        second.set_xlim(0, 1)
    return figure


def _bars(scene: Scene) -> Iterator[tuple[float, str, list[Record]]]:
    """Place, label and records of each bar; the arms of a rate lie together."""
    place = 0.0
    for rate in scene.rates:
        for arm in scene.arms:
            yield place, f"{arm}, {_plain(rate)}/s", scene.concurrent(arm, rate)
            place += 1
        place += 0.5
