"""Every figure of a comparison, from its Records alone, as PNG files.

    one_at_a_time   the original experiment's four panels
    timeline        what each worker did while prefill and decode met
    distributions   TTFT and gaps between tokens, a row per rate
    against_rate    latency and goodput over the rate
    waits           what the first and the second token waited for

A figure that the records hold nothing for is not drawn.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from disagg.config import SLO
from disagg.measure.plots_load import draw_against_rate, draw_distributions, draw_waits
from disagg.measure.plots_scene import STYLE, Scene
from disagg.measure.plots_sequential import draw_sequential
from disagg.measure.plots_timeline import draw_timeline
from disagg.measure.words import Words
from disagg.record import Record

FIGURES: dict[str, Callable[[Scene], Figure | None]] = {
    "one_at_a_time": draw_sequential,
    "timeline": draw_timeline,
    "distributions": draw_distributions,
    "against_rate": draw_against_rate,
    "waits": draw_waits,
}


def draw_all(records: Sequence[Record], slo: SLO, words: Words, folder: Path) -> list[str]:
    """Write `NAME.png` into `folder` for every figure that has data; returns the names drawn, in the order of FIGURES.

    An older picture of a figure that now has no data is removed, so that a folder never shows two runs.
    """
    scene = Scene(records, words, slo)
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(scene)
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path)
            drawn.append(name)
    return drawn
