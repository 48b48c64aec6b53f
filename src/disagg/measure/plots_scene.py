"""What every figure shares: the records sorted for drawing, the palette, the type face and the axes' habits."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from disagg.config import SLO
from disagg.measure.words import Words
from disagg.record import Record

# Okabe-Ito: readable with every common colour blindness. Cold for colocated arms, warm for disaggregated ones.
_COLD = ("#0072B2", "#49A6DE", "#1B3A5C")
_WARM = ("#D55E00", "#D99A00", "#8C2D04")

# Tol's muted set: the parts of a request's time, never an arm's colour.
PARTS = {
    "prefill": "#882255",
    "decode": "#44AA99",
    "handoff": "#B8A63D",
    "client": "#D9D9D9",
    "router": "#332288",
    "queue": "#88B3C9",
    "reply": "#117733",
    "handoff_wait": "#DDCC77",
    "handoff_copy": "#B8A63D",
    "admission": "#7A6A1E",
}
GREY = "#666666"
WIDTH = 8.0  # inches; every figure fills the same column of the report
DPI = 200  # twice what the page shows, for sharp print and screens

FONT = Path(__file__).parent / "fonts" / "NotoSansSC-subset.otf"  # Latin and the 3,755 everyday Chinese characters
font_manager.fontManager.addfont(FONT)

STYLE: dict[Any, Any] = {
    "font.family": [font_manager.FontProperties(fname=FONT).get_name(), "DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 9.5,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.wspace": 0.05,
}


def colocated(arm: str) -> bool:
    """Whether an arm's name, in the field's notation, says that nothing is handed over."""
    return re.match(r"\d+C(@|$)", arm) is not None


def arm_colours(arms: Iterable[str]) -> dict[str, str]:
    """One colour for each arm, the same in every figure: cold if colocated, warm if disaggregated."""
    colours: dict[str, str] = {}
    used = {True: 0, False: 0}
    for arm in arms:
        family = _COLD if colocated(arm) else _WARM
        colours[arm] = family[used[colocated(arm)] % len(family)]
        used[colocated(arm)] += 1
    return colours


@dataclass(frozen=True)
class Scene:
    """All a figure may look at. `arms`: colocated first, then in order of appearance."""

    records: Sequence[Record]
    words: Words
    slo: SLO

    @property
    def arms(self) -> list[str]:
        """Every arm that has a record."""
        seen = dict.fromkeys(record.arm for record in self.records)
        return sorted(seen, key=lambda arm: not colocated(arm))

    @property
    def colours(self) -> dict[str, str]:
        """Each arm's colour."""
        return arm_colours(self.arms)

    @property
    def rates(self) -> list[float]:
        """The arrival rates of the concurrent phase, rising."""
        return sorted({record.rate for record in self.records if record.phase == "concurrent"})

    def sequential(self, arm: str) -> list[Record]:
        """An arm's requests that were served one at a time."""
        return [record for record in self.records if record.phase == "sequential" and record.arm == arm]

    def concurrent(self, arm: str, rate: float | None = None) -> list[Record]:
        """An arm's requests under concurrent load, at one rate or at all."""
        return [
            record
            for record in self.records
            if record.phase == "concurrent" and record.arm == arm and rate in (None, record.rate)
        ]


def log_ms(axes: Axes, which: str) -> None:
    """Make an axis logarithmic with plain numbers (1, 2, 5, 10 ...) as its labels."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    if not low > 0:  # nothing was drawn
        low, high = 1.0, 100.0
        (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis.set_major_locator(LogLocator(subs=_steps(high / low), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _steps(span: float) -> tuple[float, ...]:
    """Which multiples of the powers of ten carry a label on an axis whose end is `span` times its start."""
    if span < 4:
        return (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    if span < 15:
        return (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    return (1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0) if span < 2000 else (1.0,)


def legend_above(figure: Figure, axes: Axes, columns: int = 8) -> None:
    """One legend for the whole figure, above it, outside of all data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.6)
