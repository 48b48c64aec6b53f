"""Every sentence the measurement says, in English and Chinese: verdicts, notes on the workload, reasons of a void run.

Structured data goes in (`Verdict`, `Note`), one sentence comes out. Numbers for people: milliseconds, per cent.
"""

from collections.abc import Mapping
from typing import Literal

from disagg.measure.verdict import Verdict

Lang = Literal["en", "zh"]

_METRIC = {
    "en": {
        "e2e_s": "mean end-to-end latency",
        "ttft_s": "mean time to first token",
        "tpot_s": "mean time per output token",
        "itl_p99_s": "p99 inter-token latency",
        "throughput": "throughput",
        "goodput": "goodput",
    },
    "zh": {
        "e2e_s": "平均端到端延迟",
        "ttft_s": "平均首 token 延迟（TTFT）",
        "tpot_s": "平均每 token 延迟（TPOT）",
        "itl_p99_s": "p99 token 间隔（ITL）",
        "throughput": "吞吐量",
        "goodput": "有效吞吐（goodput）",
    },
}

_VERDICT = {
    "en": {
        "better": "{other} is better than {base}: {metric} {estimate} ({interval}).",
        "worse": "{other} is worse than {base}: {metric} {estimate} ({interval}).",
        "equal": "No difference in {metric} larger than {bound} between {other} and {base}: {estimate} ({interval}).",
        "open": "Not resolved whether {other} or {base} is better: {metric} {estimate} ({interval}); {more}.",
        "unexplained": "Not explained by the split: {metric} of {other} against {base} {estimate} ({interval}), of "
        "which the hand-off accounts for {handoff}. The rest is noise of the machine or another cause.",
        "one": "about one more repeat needed",
        "more": "about {n} more repeats needed",
        "hopeless": "no practical number of repeats would settle it",
        "interval": "95 % interval {low} to {high}, {repeats} paired repeats",
        "single": "{repeats} repeat, which allows no interval",
    },
    "zh": {
        "better": "{other} 优于 {base}：{metric} {estimate}（{interval}）。",
        "worse": "{other} 劣于 {base}：{metric} {estimate}（{interval}）。",
        "equal": "{other} 与 {base} 的{metric}差异不超过 {bound}：{estimate}（{interval}）。",
        "open": "尚不能判定 {other} 与 {base} 孰优：{metric} {estimate}（{interval}）；{more}。",
        "unexplained": "{other} 与 {base} 的差异无法用分离解释：{metric} {estimate}（{interval}），"
        "其中 KV 传输只占 {handoff}；其余是机器噪声或其他原因。",
        "one": "约需再重复一次",
        "more": "约需再重复 {n} 次",
        "hopeless": "无法用合理的重复次数判定",
        "interval": "95 % 置信区间 {low} 至 {high}，{repeats} 次配对重复",
        "single": "仅 {repeats} 次重复，无法给出区间",
    },
}

SENTENCES: dict[str, dict[str, str]] = {
    "en": {
        # why
        "one_at_a_time": "One request at a time, the two phases never compete, so splitting them can only add the "
        "hand-off: disaggregation cannot win this case, only lose little.",
        "published": "The published gain of {gain:.2%} cannot come from disaggregation either: its own parts sum to "
        "{parts:.4f} s, more than the colocated {colocated:.4f} s.",
        "better_colocated": "The better colocated arm here was {arm}; the verdict compares against it.",
        # workload
        "cut": "{num} of {of} requests were cut to the context of {max_len} tokens.",
        "slots": "{share:.0%} of the trace's gaps are zero: its clock is quantised to {slot_s:g} s, so requests were "
        "spread uniformly over their slot (seed {seed}).",
        "length_scale": "Lengths of the trace were multiplied by {scale:.3g} (the context holds {max_len} tokens); "
        "{num} of {of} requests had to be cut as well.",
        "length_time": "With lengths that fit the context the trace would take too long here: their factor is "
        "{scale:.3g} instead of {fitting:.3g}, so that the median request takes about {alone_s:.1f} s alone. "
        "Give --length-scale to choose.",
        "time_scale": "Times of {trace} were multiplied by {factor:.3g} in the first repeat: {from_rate:.3g} "
        "requests/s became {rate:.3g} on average, and the busiest tenth of the window runs at {burst:.1f} times that; "
        "gaps above 30 s in the original window: {long_gaps}.",
        "trace_short": "{asked} requests were wanted from {trace}, which holds {rows}: a block replays those only.",
        "overlap": "Repeats at {rate:.3g} requests/s overlap, as {trace} holds only {rows} requests: {num} of {of} in "
        "these repeats had been replayed in an earlier one, so they are not independent.",
        # set-up
        "oversubscribed": "{arm} has more workers than the budget has devices: they share, and are slower for it.",
        "alive": "All arms stay loaded while one is driven; an idle worker sleeps and costs memory, not time.",
        "tuned": "{arm} runs with up to {value} tokens in a step that decodes, the best of {tried} in a short search "
        "at 0.8 of its capacity.",
        "not_tuned": "The colocated chunk size was not searched (up to {value} tokens in a step that decodes, "
        "in every arm).",
        "tune_slow": "The colocated chunk size was not searched, which would take about {seconds:.0f} s (up to "
        "{value} tokens in a step that decodes, in every arm).",
        "reduced": "A request takes {alone_s:.1f} s alone, so {what} were lowered from {before} to {after}: give "
        "--{what} to keep more.",
        "fewer_loads": "At a capacity of {rate:.3g} requests/s the loads {before} would take too long; measured: "
        "{after}. Give --rate to choose.",
        "capacity": "Capacity of {arm}: {rate:.3g} requests/s ({tokens:.4g} output tokens/s), with {in_flight} "
        "requests kept in flight for {window_s:.1f} s.",
        "capacity_ramp": "Requests were too slow for the measuring window of {arm} to open within {window_s:.1f} s: "
        "with the ramp at the start it was {measured:.3g} requests/s. Taken: {rate:.3g}, at least what its workers do "
        "one request at a time each; too low rather than too high.",
        "few_requests": "The time allows blocks of {duration_s:.1f} s, about {num} requests at {rate:.3g} requests/s "
        "instead of {wanted}: intervals are wide. Give --duration to choose.",
        "slo_default": "SLO by default: TTFT {ttft_x:g} times and TPOT {tpot_x:g} times the unloaded median of {arm}, "
        "rounded up to two digits: ttft {ttft_ms:g} ms, tpot {tpot_ms:g} ms.",
        "unequal": "{arm} differs from {base} in {field}: {theirs} instead of {ours}.",
        # guards
        "late": "The client sent late: p99 {p99_ms:.1f} ms in {arm} at {rate:g} requests/s (limit {limit_ms:g} ms). "
        "Another program may have used the cores: run it again on a quiet machine, or at lower rates.",
        "failures": "{num} of {of} requests failed in {arm} at {rate:g} requests/s ({why}).",
        "missing": "{arm} at {rate:g} requests/s, repeat {repeat}, has {num} records for {of} requests.",
        "drift": "{arm} drifted: the same requests took {change:+.0%} at the end of the run (limit {limit:.0%}). "
        "Another program may have used the cores: run it again on a quiet machine, or with more requests.",
        "tokens": "{num} of {of} requests gave different tokens in {arm} than in {base}.",
        "unsplit": "{num} of {of} requests in {arm} at {rate:g} requests/s (0: one at a time) had no hand-off: they "
        "were not disaggregated ({share:.1%}; above 5 % the part is void).",
        "incomplete": "The run was cut off before it ended: run it again.",
        # overall
        "overall_void": "No verdict: the run is void, for the reasons given.",
        "overall": "{other} against {base} under load: goodput better at {better} of {num} rates, worse at {worse}, no "
        "difference at {equal}, not resolved at {open}.",
    },
    "zh": {
        "one_at_a_time": "逐个处理请求时，两个阶段从不竞争，分离只会增加 KV 传输的开销："
        "此情形下分离部署不可能获胜，最多只是输得不多。",
        "published": "已发表的 {gain:.2%} 增益同样不可能来自分离部署：其各部分之和为 {parts:.4f} s，"
        "高于合并部署的 {colocated:.4f} s。",
        "better_colocated": "此处较好的合并部署是 {arm}；结论以它为基准。",
        "cut": "{of} 个请求中有 {num} 个被截短到 {max_len} token 的上下文。",
        "slots": "该 trace 有 {share:.0%} 的间隔为零：其时钟量化为 {slot_s:g} s，故将请求均匀分散到各自的时隙中"
        "（种子 {seed}）。",
        "length_scale": "trace 的长度乘以 {scale:.3g}（上下文为 {max_len} token）；另有 {num}/{of} 个请求被截短。",
        "length_time": "按上下文缩放的长度（trace 的 {fitting:.3g} 倍）在此耗时过长：改为 {scale:.3g} 倍，"
        "使中位请求独占时约需 {alone_s:.1f} s。可用 --length-scale 指定。",
        "time_scale": "首次重复中 {trace} 的时间乘以 {factor:.3g}：{from_rate:.3g} 请求/s 变为平均 {rate:.3g} 请求/s，"
        "窗口内最忙的十分之一是平均值的 {burst:.1f} 倍；原窗口中超过 30 s 的间隔：{long_gaps} 个。",
        "trace_short": "需要 {trace} 中的 {asked} 个请求，但它只有 {rows} 个：每段只重放这些。",
        "overlap": "{rate:.3g} 请求/s 的各次重复有重叠，因为 {trace} 只有 {rows} 个请求：这些重复的 {of} 个请求中"
        "有 {num} 个已在先前的重复中重放过，故它们并不独立。",
        "oversubscribed": "{arm} 的 worker 多于预算中的设备：它们共享设备，因而更慢。",
        "alive": "驱动某一臂时，其余各臂保持加载；空闲的 worker 休眠，只占内存，不占时间。",
        "tuned": "{arm} 含解码的一步最多 {value} token，是在其容量的 0.8 倍负载下从 {tried} 中短搜索得到的最佳值。",
        "not_tuned": "未搜索合并部署的分块大小（各臂含解码的一步最多 {value} token）。",
        "tune_slow": "未搜索合并部署的分块大小，那约需 {seconds:.0f} s（各臂含解码的一步最多 {value} token）。",
        "reduced": "单个请求独占需 {alone_s:.1f} s，故 {what} 从 {before} 降为 {after}：可用 --{what} 指定更多。",
        "fewer_loads": "容量为 {rate:.3g} 请求/s 时，负载 {before} 耗时过长；实测：{after}。可用 --rate 指定。",
        "capacity": "{arm} 的容量：{rate:.3g} 请求/s（{tokens:.4g} 输出 token/s），在 {window_s:.1f} s 内保持 "
        "{in_flight} 个请求在途。",
        "capacity_ramp": "{arm} 的请求太慢，测量窗口在 {window_s:.1f} s 内未能打开：连同起始的爬升段为 "
        "{measured:.3g} 请求/s。采用 {rate:.3g}，不低于各 worker 逐个处理请求的速度，宁可偏低而非偏高。",
        "few_requests": "时间只允许每段 {duration_s:.1f} s，{rate:.3g} 请求/s 时约 {num} 个请求，而非 {wanted} 个："
        "区间较宽。可用 --duration 指定。",
        "slo_default": "默认 SLO：TTFT 为 {arm} 空载中位数的 {ttft_x:g} 倍，TPOT 为 {tpot_x:g} 倍，"
        "向上取两位有效数字：ttft {ttft_ms:g} ms，tpot {tpot_ms:g} ms。",
        "unequal": "{arm} 与 {base} 在 {field} 上不同：{theirs}，而非 {ours}。",
        "late": "客户端发送迟到：{arm} 在 {rate:g} 请求/s 时 p99 为 {p99_ms:.1f} ms（上限 {limit_ms:g} ms）。"
        "可能有其他程序占用了核心：请在空闲的机器上重跑，或降低到达率。",
        "failures": "{arm} 在 {rate:g} 请求/s 时 {of} 个请求中有 {num} 个失败（{why}）。",
        "missing": "{arm} 在 {rate:g} 请求/s 的第 {repeat} 次重复中，{of} 个请求只有 {num} 条记录。",
        "drift": "{arm} 发生漂移：同样的请求在运行结束时耗时变化 {change:+.0%}（上限 {limit:.0%}）。"
        "可能有其他程序占用了核心：请在空闲的机器上重跑，或增加请求数。",
        "tokens": "{of} 个请求中有 {num} 个在 {arm} 中的 token 与 {base} 不同。",
        "unsplit": "{arm} 在 {rate:g} 请求/s（0 表示逐个处理）时，{of} 个请求中有 {num} 个没有 KV 传输：它们并未分离"
        "（{share:.1%}；超过 5 % 则该部分无效）。",
        "incomplete": "运行在结束前被中断：请重跑。",
        "overall_void": "无结论：本次运行无效。",
        "overall": "负载下 {other} 对 {base}：{num} 个到达率中，goodput 更好 {better} 个，更差 {worse} 个，"
        "无差异 {equal} 个，未判定 {open} 个。",
    },
}


def say(key: str, values: Mapping[str, float | int | str], lang: Lang = "en") -> str:
    """The sentence named `key`, filled with `values`: of a Note, or of a note in summary.json. May raise KeyError."""
    return SENTENCES[lang][key].format(**values)


def sentence(verdict: Verdict, lang: Lang = "en") -> str:
    """The verdict as one sentence that names metric, estimate and interval."""
    words = _VERDICT[lang]
    shown = _points if verdict.metric == "goodput" else _percent
    if verdict.low is None or verdict.high is None:
        interval = words["single"].format(repeats=verdict.repeats)
    else:
        interval = words["interval"].format(
            low=shown(verdict.low, lang), high=shown(verdict.high, lang), repeats=verdict.repeats
        )
    more = words["hopeless" if verdict.n_more is None else "one" if verdict.n_more == 1 else "more"]
    return words[verdict.kind].format(
        base=verdict.base,
        other=verdict.other,
        metric=_METRIC[lang][verdict.metric],
        estimate=shown(verdict.estimate, lang),
        interval=interval,
        more=more.format(n=verdict.n_more),
        bound="" if verdict.bound is None else shown(verdict.bound, lang).lstrip("+"),
        handoff="" if verdict.handoff is None else shown(verdict.handoff, lang),
    )


def _percent(value: float, lang: Lang) -> str:
    """A relative difference."""
    return f"{100 * value:+.1f} %"


def _points(value: float, lang: Lang) -> str:
    """A difference of two shares."""
    return f"{100 * value:+.1f} " + {"en": "points", "zh": "个百分点"}[lang]
