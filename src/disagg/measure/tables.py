"""The printed summary: readable tables of `summary.json`, in English or Chinese. Milliseconds here, seconds inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from disagg.measure.metrics import lane_of
from disagg.measure.sentences import Lang, say, sentence
from disagg.measure.verdict import Verdict

_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "sequential": "One request at a time, {requests}, {repeats}; means, ms",
        "request": "1 request",
        "requests": "{} requests",
        "repeat": "1 repeat",
        "repeats": "{} repeats",
        "total_s": "total",
        "prefill_s": "prefill",
        "decode_s": "decode",
        "handoff_s": "hand-off",
        "share": "hand-off's share",
        "published": "published\n{kind}",
        "colocated": "coloc.",
        "disaggregated": "disagg.",
        "p99": "p50/p90/p99",
        "difference": "Relative difference {other} / {base} - 1: {estimate:+.2%} ({low:+.2%} to {high:+.2%})",
        "difference_single": "Relative difference {other} / {base} - 1: {estimate:+.2%} (one repeat: no interval)",
        "difference_published": "; published: {relative_difference:+.2%}",
        "stop": ".",
        "rate": "{rate:g} requests/s{load}, {repeats}; p50 / p90 / p99, ms",
        "load": " ({load:.0%} of the colocated capacity)",
        "throughput": "throughput, tokens/s",
        "goodput": "goodput: share, requests/s",
        "completed": "completed, failed",
        "handoff": "hand-off",
        "busy": "busy: prefill + decode",
        "slo": "A good request: {slo}.",
        "void": "VOID: {reason}",
        "below": "see the end.",
        "folder": "Results: {folder}",
    },
    "zh": {
        "sequential": "逐个请求，{requests}，{repeats}；均值，ms",
        "request": "1 个请求",
        "requests": "{} 个请求",
        "repeat": "1 次重复",
        "repeats": "{} 次重复",
        "total_s": "总延迟",
        "prefill_s": "预填充",
        "decode_s": "解码",
        "handoff_s": "KV 传输",
        "share": "传输占比",
        "published": "已发表\n{kind}",
        "colocated": "合并",
        "disaggregated": "分离",
        "p99": "p50/p90/p99",
        "difference": "相对差异 {other} / {base} - 1：{estimate:+.2%}（{low:+.2%} 至 {high:+.2%}）",
        "difference_single": "相对差异 {other} / {base} - 1：{estimate:+.2%}（仅一次重复，无区间）",
        "difference_published": "；已发表：{relative_difference:+.2%}",
        "stop": "。",
        "rate": "{rate:g} 请求/s{load}，{repeats}；p50 / p90 / p99，ms",
        "load": "（合并部署容量的 {load:.0%}）",
        "throughput": "吞吐量，token/s",
        "goodput": "有效吞吐：占比，请求/s",
        "completed": "完成，失败",
        "handoff": "KV 传输",
        "busy": "忙碌：预填充 + 解码",
        "slo": "合格请求：{slo}。",
        "void": "无效：{reason}",
        "below": "见末尾。",
        "folder": "结果：{folder}",
    },
}


def show(summary: Mapping[str, Any], folder: Path, console: Console, lang: Lang) -> None:
    """Print everything a reader needs to judge the run, ending with the verdict and where the rest lies."""
    words = _WORDS[lang]
    for note in summary["notes"]:
        console.print(say(note["key"], note["values"], lang), style="dim", highlight=False)
    whole = summary["void"]
    if summary["sequential"]["arms"]:
        _sequential(summary["sequential"], whole, console, lang)
    if summary["concurrent"]:
        console.print(words["slo"].format(slo=_slo(summary["slo"])), highlight=False)
    for part in summary["concurrent"]:
        _concurrent(part, whole, console, lang)
    console.print()
    for reason in whole:
        console.print(
            words["void"].format(reason=say(reason["key"], reason["values"], lang)), style="bold red", highlight=False
        )
    overall = summary["overall"]
    console.print(say(overall["key"], overall["values"], lang), style="bold", highlight=False)
    console.print(words["folder"].format(folder=folder), highlight=False, soft_wrap=True)


def _sequential(part: Mapping[str, Any], whole: Sequence[Any], console: Console, lang: Lang) -> None:
    words, arms, published = _WORDS[lang], part["arms"], part["published"]
    requests, repeats = _count("request", part["requests"], words), _count("repeat", part["repeats"], words)
    title = words["sequential"].format(requests=requests, repeats=repeats)
    kinds = ("colocated", "disaggregated") if published else ()
    table = _table(title, [*arms, *(words["published"].format(kind=words[kind]) for kind in kinds)])
    table.add_row(
        words["total_s"],
        *(_ms(arm["total_s"]["mean"]) for arm in arms.values()),
        *(_ms(published[f"{kind}_s"]) for kind in kinds),
    )
    for name in ("prefill_s", "decode_s", "handoff_s"):
        theirs = ("", _ms(published[name])) if published else ()
        table.add_row(words[name], *(_ms(arm[name]["mean"]) for arm in arms.values()), *theirs)
    theirs = ("", _share(published["handoff_share"])) if published else ()
    table.add_row(words["share"], *(_share(arm["handoff_share"]) for arm in arms.values()), *theirs)
    percentiles = (_percentiles(arm["total_s"]) for arm in arms.values())
    table.add_row(f"{words['total_s']} {words['p99']}", *percentiles)
    console.print(table)
    found = part["relative_difference"]
    if found:
        text = words["difference" if found["low"] is not None else "difference_single"]
        text = text.format(base=part["base"], other=part["other"], **found)
        if published:
            text += words["difference_published"].format(**published)
        console.print(text + words["stop"], highlight=False)
    _verdicts([part["verdict"]], part["void"], whole, console, lang)
    for note in part["why"]:
        console.print(say(note["key"], note["values"], lang), highlight=False)


def _concurrent(part: Mapping[str, Any], whole: Sequence[Any], console: Console, lang: Lang) -> None:
    words, arms = _WORDS[lang], part["arms"]
    load = words["load"].format(load=part["load"]) if part["load"] else ""
    title = words["rate"].format(rate=part["rate"], load=load, repeats=_count("repeat", part["repeats"], words))
    table = _table(title, list(arms))
    for name, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2E")):
        table.add_row(label, *(_percentiles(arm[name]) for arm in arms.values()))
    table.add_row(words["handoff"], *(_percentiles(arm["handoff_s"]) for arm in arms.values()))
    table.add_row(words["throughput"], *(f"{arm['throughput_tok_s']:.0f}" for arm in arms.values()))
    good = (arm["goodput"] for arm in arms.values())
    table.add_row(words["goodput"], *(f"{100 * each['share']:.1f} %, {each['rate']:.2f}" for each in good))
    table.add_row(words["completed"], *(f"{arm['completed']}, {arm['failed']}" for arm in arms.values()))
    table.add_row(words["busy"], *(_busy(arm["utilisation"]) for arm in arms.values()))
    console.print(table)
    shown = [part["verdicts"].get(name) for name in ("goodput", "ttft_s", "tpot_s", "itl_p99_s")]
    _verdicts(shown, part["void"], whole, console, lang)


def _verdicts(
    verdicts: Sequence[Mapping[str, Any] | None],
    void: Sequence[Mapping[str, Any]],
    whole: Sequence[Mapping[str, Any]],
    console: Console,
    lang: Lang,
) -> None:
    """The sentences, or the reasons why there is none; reasons that void the whole run are told once, at the end."""
    words = _WORDS[lang]
    for reason in (each for each in void if each not in whole):
        text = words["void"].format(reason=say(reason["key"], reason["values"], lang))
        console.print(text, style="bold red", highlight=False)
    if whole:
        console.print(words["void"].format(reason=words["below"]), style="bold red", highlight=False)
    for verdict in verdicts:
        if verdict is not None and not void:
            console.print(sentence(msgspec.convert(dict(verdict), Verdict), lang), style="bold", highlight=False)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _count(name: str, number: int, words: Mapping[str, str]) -> str:
    """How many there are, one in the singular."""
    return words[name if number == 1 else f"{name}s"].format(number)


def _ms(seconds: float | None) -> str:
    """Milliseconds, three or more digits."""
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _percentiles(stat: Mapping[str, Any]) -> str:
    return " / ".join(_ms(stat[name]) for name in ("p50", "p90", "p99"))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _busy(utilisation: Mapping[str, Mapping[str, float]]) -> str:
    """Each worker's prefill + decode share of the time."""
    return "\n".join(
        f"{lane_of(name)} {100 * each['prefill']:.0f} + {100 * each['decode']:.0f} %"
        for name, each in utilisation.items()
    )


def _slo(slo: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name.removesuffix('_s').upper()} ≤ {_ms(limit)} ms" for name, limit in slo.items() if limit)
