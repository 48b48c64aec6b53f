"""The original experiment's four panels: requests served one at a time by every arm."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from disagg.measure import metrics
from disagg.measure.plots_scene import PARTS, WIDTH, Scene, legend_above
from disagg.record import Record

_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_sequential(scene: Scene) -> Figure | None:
    """Time per request, cumulative time, share of the stages, time over lengths. None without sequential records."""
    arms = {arm: _means(scene.sequential(arm)) for arm in scene.arms}
    arms = {arm: rows for arm, rows in arms.items() if rows}
    if not arms:
        return None
    words = scene.words
    figure = Figure(figsize=(WIDTH, 6.6))
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1))
    top = grid[0].subgridspec(1, 2)
    per_request, cumulative = figure.add_subplot(top[0]), figure.add_subplot(top[1])
    bottom = grid[1].subgridspec(1, 3, width_ratios=(2.05, 1, 1))
    stages, over_prompt = figure.add_subplot(bottom[0]), figure.add_subplot(bottom[1])
    over_output = figure.add_subplot(bottom[2], sharey=over_prompt)

    for place, (arm, rows) in enumerate(arms.items()):
        index, prompt, output, total = (np.array(column) for column in zip(*rows, strict=True))
        size = max(4.5, 8.5 - 1.25 * place)  # the arms nearly coincide here: the first ones look out from below
        marker = _MARKERS[place % len(_MARKERS)]
        look: dict[str, Any] = {"color": scene.colours[arm], "marker": marker, "markersize": size}
        look |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        per_request.plot(index + 1, total * 1e3, label=arm, linewidth=1.2, **look)
        cumulative.plot(index + 1, np.cumsum(total), **look)
        for axes, length in ((over_prompt, prompt), (over_output, output)):
            axes.plot(length, total * 1e3, linestyle="none", alpha=0.85, **look)
    _stage_bars(scene, list(arms), stages)

    per_request.set(title=words("plot.per_request"), xlabel=words("axis.request"), ylabel=words("axis.time_ms"))
    cumulative.set(title=words("plot.cumulative"), xlabel=words("axis.request"), ylabel=words("axis.cumulative_s"))
    over_prompt.set(title=words("plot.over_lengths"), xlabel=words("axis.prompt_len"), ylabel=words("axis.time_ms"))
    over_output.set(xlabel=words("axis.output_len"))
    over_output.tick_params(labelleft=False)
    for axes in (per_request, cumulative, over_prompt):
        axes.set_ylim(bottom=0)
    for axes in (per_request, cumulative):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, per_request)
    return figure


def _means(records: list[Record]) -> list[tuple[int, int, int, float]]:
    """One row per request of the workload: index, prompt, output, mean time over the repeats; failures left out."""
    times: dict[int, list[float]] = defaultdict(list)
    lengths: dict[int, tuple[int, int]] = {}
    for record in metrics.completed(records):
        if record.e2e_s is not None:
            times[record.index].append(record.e2e_s)
            lengths[record.index] = (record.prompt_len, record.output_len)
    return [(index, *lengths[index], float(np.mean(times[index]))) for index in sorted(times)]


def _stages(records: Sequence[Record]) -> dict[str, float]:
    """Mean time as the experiment splits it, in seconds."""
    stages = {
        "prefill": metrics.part("prefill", records),
        "handoff": metrics.handoff(records),
        "decode": metrics.part("decode", records),
    }
    return {name: found.mean or 0.0 for name, found in stages.items()}


def _stage_bars(scene: Scene, arms: list[str], axes: Axes) -> None:
    """A bar per arm, 100 % long, split by stage; each share is written in or above its piece."""
    for place, arm in enumerate(arms):
        means = _stages(scene.sequential(arm))
        total = sum(means.values()) or 1.0
        left = 0.0
        for stage, mean in means.items():
            share = 100 * mean / total
            axes.barh(place, share, left=left, height=0.5, color=PARTS[stage])
            _share_label(axes, place, left, share)
            left += share
    for stage in ("prefill", "handoff", "decode"):
        axes.barh(0, 0, color=PARTS[stage], label=scene.words(f"part.{stage}"))
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.45, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set(title=scene.words("plot.stages"), xlabel=scene.words("axis.share"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, handlelength=1.2, columnspacing=1.2)


def _share_label(axes: Axes, place: int, left: float, share: float) -> None:
    if share >= 8:
        axes.text(left + share / 2, place, f"{share:.0f} %", ha="center", va="center", color="white", fontsize=9)
    elif share >= 0.05:
        axes.text(left + share / 2, place - 0.29, f"{share:.1f} %", ha="center", va="bottom", fontsize=8.5)
