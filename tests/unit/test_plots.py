"""Figures: every one comes from Records, and none needs all of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from matplotlib.patches import Rectangle
from synthetic import one_at_a_time, simulate, under_load

from disagg.config import SLO
from disagg.measure import plots_scene
from disagg.measure.plots import FIGURES, draw_all
from disagg.measure.plots_load import _rate_keys, across_repeats
from disagg.measure.plots_scene import PARTS, Scene, arm_colours
from disagg.measure.plots_timeline import _FRAME, Stretch, draw_timeline, find_stretch, longest_wait, worst_gap
from disagg.measure.words import ZH, Words
from disagg.record import Record, Span


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer dots, the same pictures: most of the time goes into writing PNGs."""
    monkeypatch.setitem(plots_scene.STYLE, "savefig.dpi", 40)


def scene(records: list[Record]) -> Scene:
    return Scene(records, Words(), SLO(ttft_s=0.2))


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    """Both phases present: one PNG for every figure. pytest turns the warning of a missing glyph into an error."""
    arms = ["2C", "1P1D"]
    records = one_at_a_time(arms, 2) + under_load(arms, [8.0], 2, 40)
    assert draw_all(records, SLO(ttft_s=0.2), Words("zh"), tmp_path) == list(FIGURES)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def test_no_records_no_figures(tmp_path: Path) -> None:
    """Nothing to show is not an error, and the picture of an earlier run does not stay behind."""
    (tmp_path / "timeline.png").write_bytes(b"old")
    assert draw_all([], SLO(), Words(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_only_the_sequential_phase(tmp_path: Path) -> None:
    """Without load only the figure of the sequential phase is drawn."""
    assert draw_all(one_at_a_time(["2C", "1P1D"], 1, 3), SLO(), Words(), tmp_path) == ["one_at_a_time"]


def test_one_rate_one_repeat_many_arms(tmp_path: Path) -> None:
    """A single point, no interval, four arms."""
    records = under_load(["1C", "2C", "1P1D", "2P2D"], [10.0], 1, 20)
    assert draw_all(records, SLO(), Words(), tmp_path) == [name for name in FIGURES if name != "one_at_a_time"]


def test_runs_in_which_everything_failed(tmp_path: Path) -> None:
    """Records without a single token still make figures: empty ones."""
    records = [
        Record(
            request_id=f"{arm}{index}", index=index, prompt_len=5, finish_reason="error", arm=arm, phase=phase, rate=r
        )
        for arm in ("2C", "1P1D")
        for index in range(3)
        for phase, r in (("sequential", 0.0), ("concurrent", 4.0))
    ]
    draw_all(records, SLO(ttft_s=0.2), Words("zh"), tmp_path)


def test_each_arm_has_its_own_colour_and_no_stage_has_it() -> None:
    """Six arms, six colours, the same whenever they are asked for; none means a stage somewhere else."""
    arms = ["1C", "2C", "4C@cpu:4", "1P1D", "3P1D", "2P2D"]
    colours = arm_colours(arms)
    assert len(set(colours.values())) == len(arms)
    assert not set(colours.values()) & set(PARTS.values())
    assert arm_colours(arms) == colours


def test_colocated_arms_come_first() -> None:
    """Colocated arms stand before disaggregated ones, whatever the order of the records."""
    records = [Record(request_id=arm, index=0, prompt_len=1, arm=arm) for arm in ("1P1D", "2C@cpu:2", "1C")]
    assert scene(records).arms == ["2C@cpu:2", "1C", "1P1D"]


def test_worst_gap_is_the_one_with_the_most_prefill_in_it() -> None:
    """A longer gap without prefill does not count; chunks of one step count once; the first gap is left out."""
    victim = Record(request_id="v", index=0, prompt_len=9, decode_worker="C0", scheduled_at=10.0)
    victim.token_at = [10.0, 10.5, 10.6, 11.0, 13.0]
    chunks = [Span("prefill", "C0", 10.1, 10.4, 64), Span("prefill", "C0", 10.7, 10.9, 64)]
    other = Record(request_id="o", index=1, prompt_len=99, scheduled_at=10.05, spans=chunks)
    third = Record(request_id="t", index=2, prompt_len=99, scheduled_at=10.05, spans=chunks[1:])
    gap = worst_gap([victim, other, third])
    assert gap is not None
    assert (gap.start_s, gap.end_s, gap.prefill_s) == pytest.approx((0.6, 1.0, 0.2))
    assert worst_gap([victim]) is None


def test_stretch_holds_the_gap_of_the_colocated_arm() -> None:
    """The figure shows the gap with room on both sides, in a run of the colocated arm."""
    shown = scene(under_load(["1P1D", "2C"], [8.0, 16.0], 2, 60))
    found = find_stretch(shown)
    assert found is not None
    gap = worst_gap([record for record in shown.concurrent("2C", found.rate) if record.repeat == found.repeat])
    assert gap is not None
    assert found.start_s <= gap.start_s < gap.end_s <= found.end_s
    assert found.end_s - found.start_s >= 3 * (gap.end_s - gap.start_s)


def test_what_is_framed_is_the_longest_wait_of_one_request() -> None:
    """A wider hole between two requests is no wait; one that reaches into the stretch counts whole; the first does not.

    Every arm has a frame of its own, so none says less than another lane shows.
    """
    first = Record(request_id="a", index=0, prompt_len=9, decode_worker="C0.0", scheduled_at=10.0)
    first.token_at = [10.0, 10.9, 11.0, 11.2]
    second = Record(request_id="b", index=1, prompt_len=9, decode_worker="C1.2", scheduled_at=10.0)
    second.token_at = [11.9, 12.0, 12.3]
    wait = longest_wait([first, second], Stretch(8.0, 0, 0.5, 2.1))
    assert wait is not None
    assert (wait.start_s, wait.end_s) == pytest.approx((2.0, 2.3))
    assert wait.lane == "C1"
    assert longest_wait([first, second], Stretch(8.0, 0, 1.3, 1.9)) is None


def test_every_arm_has_its_frame() -> None:
    """As many frames as arms, and the width of each is the number in its arm's title."""
    figure = draw_timeline(scene(under_load(["1C", "2C", "1P1D"], [16.0], 1, 60)))
    assert figure is not None
    for axes in figure.axes:
        (frame,) = [patch for patch in axes.patches if patch.get_linewidth() == _FRAME["linewidth"]]
        assert isinstance(frame, Rectangle)
        assert f"up to {1e3 * frame.get_width():,.0f} ms" in axes.get_title()


def test_stretch_without_a_colocated_arm_is_somewhere_in_the_run() -> None:
    """With nothing to frame, the window is still a part of the run."""
    found = find_stretch(scene(under_load(["1P1D"], [8.0], 1, 20)))
    assert found is not None
    assert found.end_s > found.start_s >= 0


@pytest.mark.parametrize(("rates", "lines"), [([8.0], {"None"}), ([8.0, 16.0], {"-", "--"})])
def test_the_legend_shows_no_lines_that_one_rate_does_not_have(rates: list[float], lines: set[str]) -> None:
    """A single rate has points only."""
    shown = scene(under_load(["2C", "1P1D"], rates, 1, 20))
    assert {key.get_linestyle() for key in _rate_keys(shown) if key.get_label() in ("p50", "p99")} == lines


def test_interval_is_over_repeats_not_requests() -> None:
    """Three repeats with values 1, 2, 3: mean 2 and Student's t with two degrees of freedom."""
    records = [Record(request_id=str(repeat), index=0, prompt_len=repeat, repeat=repeat) for repeat in (1, 2, 3)]
    found = across_repeats(records, lambda block: float(block[0].prompt_len))
    assert found is not None
    assert found.high is not None
    assert (found.estimate, found.high - 2) == pytest.approx((2.0, 4.3027 / np.sqrt(3)), rel=1e-4)


def test_the_font_has_every_character_of_the_figures() -> None:
    """A fresh machine has no Chinese font, so ours must hold all that words.py can put into a figure."""
    glyphs = TTFont(plots_scene.FONT).getBestCmap()
    used = set("".join(text for key, text in ZH.items() if key.startswith(("part.", "plot.", "axis."))))
    assert {character for character in used if ord(character) not in glyphs} == set()


def test_the_simulation_interferes_only_where_phases_share_a_worker() -> None:
    """The records these tests draw are worth drawing: a long prompt stalls decode on 1C and not on 1P1D."""
    rows = [(0.0, 20, 60), (0.05, 900, 5)]
    longest = {
        arm: max(later - earlier for earlier, later in itertools.pairwise(simulate(arm, rows)[0].token_at[1:]))
        for arm in ("1C", "1P1D")
    }
    assert longest["1C"] > 5 * longest["1P1D"]
