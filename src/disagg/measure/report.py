"""The report: one HTML page and its figures, rebuilt from a results folder at any time.

The page says what `summary.json` says, in tables for people (milliseconds, per cent), and embeds the figures, so it can
be mailed as one file. Nothing in it is loaded from elsewhere; a Chinese page brings its characters with it.
"""

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from fontTools import subset  # matplotlib needs it, too
from fontTools.ttLib import TTFont

from disagg.config import SLO
from disagg.measure import sentences
from disagg.measure.metrics import lane_of
from disagg.measure.plots import draw_all
from disagg.measure.plots_scene import FONT, PARTS, arm_colours, colocated
from disagg.measure.sentences import Lang
from disagg.measure.summary import read_results, summarize, write_summary
from disagg.measure.verdict import Verdict
from disagg.measure.words import Words

PAGE = "report.html"
_PAIRED = ("goodput", "ttft_s", "tpot_s", "itl_p99_s", "e2e_s", "throughput")
Plain = Mapping[str, Any]


def build(folder: Path, lang: Lang = "en") -> dict[str, Any]:
    """Write every figure as PNG, `report.html` and a new `summary.json` into a results folder; returns the summary.

    Raises InputError when the folder is not one that compare has written.
    """
    records, run = read_results(folder)
    summary = summarize(records, run)
    write_summary(folder, summary)
    words = Words(lang)
    slo = msgspec.convert(summary["slo"], SLO)
    drawn = draw_all(records, slo, words, folder)
    images = {name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in drawn}
    page = render(summary, images, words)
    if lang == "zh":
        page = render(summary, images, words, font_of(page))
    (folder / PAGE).write_text(page, encoding="utf-8")
    return summary


def font_of(page: str) -> str:
    """The figures' font as a base64 WOFF of those of its glyphs that the page needs: 70 KB instead of 1.1 MB.

    For machines without Chinese characters; Latin ones every machine has.
    """
    font, cut, file = TTFont(FONT, recalcTimestamp=False), subset.Subsetter(), io.BytesIO()
    cut.populate(text="".join(sorted({character for character in page if not character.isascii()})))
    cut.subset(font)
    font.flavor = "woff"
    font.save(file)
    return base64.b64encode(file.getvalue()).decode()


def render(summary: Plain, images: Mapping[str, str], words: Words, font: str = "") -> str:
    """The page. `images` are base64 PNGs by figure name, in the order to show them; `font` is of `font_of`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    arms = [arm["name"] for arm in summary["config"]["arms"]]
    return environment.get_template("report.html").render(
        w=words,
        ms=milliseconds,
        note=lambda note: _told(note, words),
        summary=summary,
        settings=summary["config"]["settings"],
        images=images,
        font=font,
        verdicts=list(_verdicts(summary, words)),
        one_at_a_time=_one_at_a_time(summary["sequential"], words),
        differences=[_difference_row(each, words) for each in summary["concurrent"]],
        paired=_PAIRED,
        limits=_limits(summary["slo"]),
        unequal=[_unequal(each, words) for each in summary["parity"]],
        flat_settings=list(flatten(summary["config"]["settings"])),
        flat_environment=list(flatten(summary["environment"])),
        colours=arm_colours(sorted(arms, key=lambda arm: not colocated(arm))),
        parts=PARTS,
        by_role=_by_role,
    )


def milliseconds(seconds: float | None) -> str:
    """Three digits that mean something: 0.042, 1.23, 12.3, 123, 1,234; a dash for nothing."""
    if seconds is None:
        return "–"
    value = 1e3 * seconds
    if value == 0:
        return "0"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.0995 else 3
    return f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """A share as per cent with one decimal; a dash for nothing."""
    return "–" if share is None else f"{100 * share:.1f} %"


def change(share: float) -> str:
    """A difference in hundredths with its sign: +2.2, -71.4, +361."""
    decimals = 0 if abs(share) >= 1 else 1
    return f"{round(100 * share, decimals) + 0.0:+.{decimals}f}"  # adding zero turns -0.0 into 0.0


def flatten(tree: Plain, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`a.b` and value for every leaf that says something; what is unset or empty is left out."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            if value:
                yield name, ", ".join(str(each) for each in value)
        elif value is not None and value != "":
            yield name, str(value)


def _verdicts(summary: Plain, words: Words) -> Iterator[dict[str, str]]:
    """The sentences of the box on top, one per rate. None where the whole run is void: the box gives the reasons."""
    for part in [] if summary["void"] else summary["concurrent"]:
        kind = "void" if part["void"] else part["verdict"]["kind"] if part["verdict"] else "open"
        head = words("text.rate", rate=f"{part['rate']:.3g}", kind=words(f"kind.{kind}"))
        reasons = " ".join(_told(each, words) for each in part["void"])
        yield {"kind": kind, "head": head, "text": reasons or _sentence(part["verdict"], words)}


def _told(note: Plain, words: Words) -> str:
    """A note of the summary as a sentence."""
    return sentences.say(note["key"], note["values"], words.lang)


def _sentence(verdict: Plain | None, words: Words) -> str:
    """A verdict of the summary as a sentence; nothing where the arms allow none."""
    if verdict is None:
        return ""
    return sentences.sentence(msgspec.convert(verdict, Verdict), words.lang)


def _one_at_a_time(sequential: Plain, words: Words) -> dict[str, Any] | None:
    """Columns and rows of the table: every arm, then the published figures, if any. None without that phase."""
    arms = sequential["arms"]
    if not arms:
        return None
    rows = [
        (words("table.total"), [_spread(arm["total_s"]) for arm in arms.values()]),
        *(
            (words(f"part.{stage}"), [_spread(arm[f"{stage}_s"]) for arm in arms.values()])
            for stage in ("prefill", "handoff", "decode")
        ),
    ]
    rows.append((words("table.handoff_share"), [(percent(arm["handoff_share"]), "") for arm in arms.values()]))
    rows.append((words("table.ttft"), [_spread(arm["ttft_s"]) for arm in arms.values()]))
    rows.append((words("table.num"), [(f"{arm['completed']} / {arm['failed']}", "") for arm in arms.values()]))
    differences = [
        _difference(sequential["relative_difference"] if name == sequential.get("other") else None, " %")
        for name in arms
    ]
    rows.append((words("table.relative"), differences))
    published = sequential["published"]
    if published:
        for (_, cells), more in zip(rows, _published(published), strict=True):
            cells += [(cell, "") for cell in more]
    verdict = _sentence(sequential["verdict"], words)
    return {"arms": list(arms), "rows": rows, "published": bool(published), "verdict": verdict}


def _published(figures: Plain) -> list[tuple[str, str]]:
    """What was published of the colocated and of the disaggregated deployment, for each row of the table."""
    total, prefill, handoff, decode = (
        f"{1e3 * figures[name]:.1f}" for name in ("disaggregated_s", "prefill_s", "handoff_s", "decode_s")
    )
    share, relative = percent(figures["handoff_share"]), change(figures["relative_difference"]) + " %"
    rows = (prefill, handoff, decode, share, "–", "–", relative)
    return [(f"{1e3 * figures['colocated_s']:.1f}", total), *(("–", each) for each in rows)]


def _spread(stat: Plain) -> tuple[str, str]:
    """A mean, and the percentiles to print small beneath it."""
    if not stat["mean"]:
        return milliseconds(stat["mean"]), ""
    return milliseconds(stat["mean"]), " / ".join(milliseconds(stat[name]) for name in ("p50", "p90", "p99"))


def _difference(interval: Plain | None, unit: str) -> tuple[str, str]:
    """Estimate with its unit, and the interval in brackets where there is one."""
    if interval is None:
        return "–", ""
    bounds = "" if interval["low"] is None else f"[{change(interval['low'])}, {change(interval['high'])}]"
    return change(interval["estimate"]) + unit, bounds


def _difference_row(part: Plain, words: Words) -> dict[str, Any]:
    """A row of the table of differences: for every metric its kind, estimate and interval."""
    cells = []
    for metric in _PAIRED:
        verdict = part["verdicts"].get(metric)
        kind = verdict["kind"] if verdict else ""
        estimate, interval = _difference(part["differences"].get(metric), "" if metric == "goodput" else " %")
        cells.append(
            {"kind": kind, "word": words(f"kind.{kind}") if kind else "", "estimate": estimate, "of": interval}
        )
    load = words("table.load", share=f"{part['load']:.0%}") if part["load"] else ""
    return {"rate": f"{part['rate']:.3g}", "load": load, "cells": cells, "void": bool(part["void"])}


def _by_role(utilisation: Plain) -> list[tuple[str, Plain]]:
    """What each worker was busy with, by its name without the epoch; prefill workers before decode workers."""
    items = ((lane_of(worker), busy) for worker, busy in utilisation.items())
    return sorted(items, key=lambda item: (item[0].startswith("D"), item[0]))


def _limits(slo: Plain) -> str:
    """The SLO as people write it."""
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
    return ", ".join(f"{names[key]} ≤ {milliseconds(limit)} ms" for key, limit in slo.items() if limit is not None)


def _unequal(found: Plain, words: Words) -> str:
    """A setting in which an arm differs from the first one, and whether that is meant."""
    values = {key: found[key] for key in ("arm", "base", "field", "ours", "theirs")}
    text = sentences.say("unequal", values, words.lang)
    return words("text.tuned" if found["tuned"] else "text.unequal", text=text)
