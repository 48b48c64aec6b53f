"""The words of figures and report in English and Chinese: two tables with the same keys.

Sentences that carry a judgement (verdicts, notes, guards) live in `sentences`; here are labels, headings and captions.
"""

from disagg.measure.sentences import Lang

EN: dict[str, str] = {
    # parts of a request's time
    "part.prefill": "prefill",
    "part.decode": "decode",
    "part.handoff": "hand-off",
    "part.client": "client late",
    "part.router": "router",
    "part.queue": "queue",
    "part.reply": "reply",
    "part.handoff_wait": "wait for hand-off",
    "part.handoff_copy": "copy",
    "part.admission": "admission to decode",
    # figures
    "plot.per_request": "Time per request",
    "plot.cumulative": "Cumulative time",
    "plot.stages": "Share of the stages",
    "plot.over_lengths": "Time over prompt and output length",
    "plot.ttft_at": "Time to first token, {rate} requests/s",
    "plot.itl_at": "Gaps between tokens, {rate} requests/s",
    "plot.ttft_rate": "Time to first token (TTFT)",
    "plot.tpot_rate": "Time per output token (TPOT)",
    "plot.itl_rate": "Gap between tokens (ITL)",
    "plot.goodput_rate": "Goodput: requests within the SLO",
    "plot.slo": "SLO",
    "plot.first_token": "Until the first token",
    "plot.second_token": "Added before the second",
    "plot.timeline_arm": "{arm}: a request waits up to {gap} ms between two of its tokens",
    "plot.longest_wait": "longest wait for a next token",
    "plot.token": "decode: a token reaches the client",
    # axes
    "axis.request": "request",
    "axis.time_ms": "time, ms",
    "axis.cumulative_s": "time, s",
    "axis.share": "share of the time, %",
    "axis.prompt_len": "prompt, tokens",
    "axis.output_len": "output, tokens",
    "axis.share_within": "requests within",
    "axis.share_longer": "gaps at least this long",
    "axis.ttft_ms": "time to first token, ms",
    "axis.itl_ms": "gap between tokens, ms",
    "axis.log_ms": "ms, log scale",
    "axis.mean_ms": "mean, ms",
    "axis.goodput": "share of all requests",
    "axis.rate": "arrival rate, requests/s",
    "axis.since": "ms, from {at} s after the first arrival, at {rate} requests/s",
    # figures in the report: heading and what to see
    "figure.one_at_a_time": "The four panels",
    "figure.timeline": "What the workers did",
    "figure.distributions": "Distributions",
    "figure.against_rate": "Against the arrival rate",
    "figure.waits": "What the first tokens waited for",
    "caption.one_at_a_time": "The original experiment's four panels. With one request in flight the phases never meet, "
    "so the hand-off is the only difference to expect; more than that is noise of the machine.",
    "caption.timeline": "The same stretch of the same run on every arm. Upper half of a lane: prefill steps and "
    "hand-off copies; lower half: a tick for each token. On a colocated worker the ticks stop while it prefills for "
    "someone else; on a decode worker nothing stops them. Framed: the longest wait of one request between two tokens, "
    "from its second token on. A wider hole without a frame lies between requests: one had ended, the next "
    "had not got its second token.",
    "caption.distributions": "Left: the further left a curve, the sooner first tokens come. Right: the share of gaps "
    "between tokens that last at least x, tails enlarged; interference is a shoulder far to the right.",
    "caption.against_rate": "Mean over the repeats; bars are 95 % intervals. Circles: median; squares: 99th "
    "percentile.",
    "caption.waits": "Mean time by part. Left: the parts of the time to first token. Right: what the hand-off adds "
    "before the second token; mind its own scale. A colocated request has no hand-off.",
    # report: headings
    "report.title": "Colocated or disaggregated?",
    "report.summary": "Model {model}, budget {budget}, arms {arms}",
    "report.when": "Started {started}, took {took} s without the start of the program and the drawing of this report",
    "report.verdict": "Verdict",
    "report.void_why": "This run breaks a guard, so no verdict may be drawn from what it touches:",
    "report.void_part": "Void for this part:",
    "report.sequential": "One request at a time",
    "report.concurrent": "Concurrent load",
    "report.differences": "Differences by arrival rate",
    "report.latencies": "Latency and goodput",
    "report.utilisation": "What the workers were busy with",
    "report.method": "How it was measured",
    "report.notes": "Notes on this run",
    "report.parity": "Parity of the arms",
    "report.settings": "Configuration",
    "report.environment": "Environment",
    "report.repeat": "Repeat it",
    # report: tables
    "table.quantity": "mean, ms",
    "table.total": "total latency",
    "table.handoff_share": "hand-off, share of the total",
    "table.ttft": "time to first token",
    "table.num": "requests completed / failed",
    "table.published_colocated": "published, colocated",
    "table.published_disaggregated": "published, disaggregated",
    "table.relative": "difference to colocated",
    "table.rate": "requests/s",
    "table.load": "{share} of capacity",
    "table.arm": "arm",
    "table.worker": "worker",
    "table.role": "role",
    "table.devices": "devices",
    "table.chunk": "tokens a step",
    "table.mixed": "{num} where some decode",
    "table.triple": "p50 / p90 / p99, ms",
    "table.throughput": "tokens/s",
    "table.goodput": "goodput",
    "table.done": "completed / failed",
    "table.shares": "shared by {num}",
    "metric.goodput": "goodput, points",
    "metric.ttft_s": "TTFT, mean",
    "metric.tpot_s": "TPOT, mean",
    "metric.itl_p99_s": "ITL, p99",
    "metric.e2e_s": "E2E, mean",
    "metric.throughput": "throughput",
    "kind.better": "better",
    "kind.worse": "worse",
    "kind.equal": "no difference",
    "kind.open": "not resolved",
    "kind.void": "void",
    "role.both": "prefill and decode",
    "role.prefill": "prefill",
    "role.decode": "decode",
    # report: sentences that hold for every run
    "text.differences": "Disaggregated ({other}) against colocated ({base}); of several arms of a kind, the one with "
    "the higher goodput. Green is better for disaggregation, red worse.",
    "text.slo": "A request is good when it meets the SLO: {limits}.",
    "text.no_slo": "No SLO was set, so goodput is the share of requests that completed.",
    "text.utilisation": "Share of the run that each worker spent on prefill and on decode; the rest is idle, "
    "waiting or copying.",
    "text.tokens_equal": "All arms gave the same tokens for the same requests.",
    "text.parity_equal": "The arms share devices, model, data type, memory, page size, prompts and arrivals; only the "
    "roles of the workers differ.",
    "text.tuned": "{text} This was searched for, so it is meant.",
    "text.unequal": "{text} This was allowed, and makes the comparison unequal.",
    "text.rate": "{rate} requests/s: {kind}.",
    "text.concurrent_missing": "This run has no concurrent phase, and only concurrent load can show a gain.",
    "method.open_loop": "Open loop: requests are sent at times drawn beforehand, whether or not earlier ones have "
    "ended. Latency counts from the scheduled arrival, so a stalled server cannot hide behind a slower client.",
    "method.same": "Every arm gets the same prompts at the same times; output lengths are enforced, decoding is "
    "greedy.",
    "method.repeats": "Repeats have seeds of their own and run interleaved, the arms in random order. Differences are "
    "paired by repeat; intervals are Student's t over repeats, not over requests, which are not independent.",
    "method.metrics": "TTFT: scheduled arrival to first token. TPOT: mean gap after the first token. ITL: every gap. "
    "E2E: scheduled arrival to last token. Failed requests are left out of latencies and are misses in goodput.",
    "method.verdict": "A verdict is better or worse when its interval leaves out zero, no difference when the interval "
    "lies within ±5 %, and not resolved otherwise. One at a time, a difference of which the hand-off is less than "
    "half is unexplained, not better or worse.",
    "method.limits": "One at a time, every repeat asks the same requests: that interval covers the machine's noise, "
    "not other prompts. The rates of a repeat share their draws, so verdicts at several rates are not independent.",
}

ZH: dict[str, str] = {
    "part.prefill": "预填充（prefill）",
    "part.decode": "解码（decode）",
    "part.handoff": "KV 传输",
    "part.client": "客户端迟发",
    "part.router": "路由",
    "part.queue": "排队",
    "part.reply": "返回",
    "part.handoff_wait": "等待传输",
    "part.handoff_copy": "传输",
    "part.admission": "等待进入解码",
    "plot.per_request": "单个请求耗时",
    "plot.cumulative": "累计耗时",
    "plot.stages": "各阶段占比",
    "plot.over_lengths": "耗时与提示、输出长度的关系",
    "plot.ttft_at": "首 token 延迟，{rate} 请求/s",
    "plot.itl_at": "token 间隔，{rate} 请求/s",
    "plot.ttft_rate": "首 token 延迟（TTFT）",
    "plot.tpot_rate": "每 token 延迟（TPOT）",
    "plot.itl_rate": "token 间隔（ITL）",
    "plot.goodput_rate": "有效吞吐：满足 SLO 的请求",
    "plot.slo": "SLO",
    "plot.first_token": "首 token 之前",
    "plot.second_token": "第二个 token 之前另加",
    "plot.timeline_arm": "{arm}：同一请求相邻两个 token 之间最多等待 {gap} ms",
    "plot.longest_wait": "等待下一个 token 的最长一次",
    "plot.token": "解码：一个 token 到达客户端",
    "axis.request": "请求",
    "axis.time_ms": "耗时，ms",
    "axis.cumulative_s": "耗时，s",
    "axis.share": "耗时占比，%",
    "axis.prompt_len": "提示，token",
    "axis.output_len": "输出，token",
    "axis.share_within": "在此时间内的请求",
    "axis.share_longer": "不短于此的间隔",
    "axis.ttft_ms": "首 token 延迟，ms",
    "axis.itl_ms": "token 间隔，ms",
    "axis.log_ms": "ms，对数刻度",
    "axis.mean_ms": "平均，ms",
    "axis.goodput": "占全部请求的比例",
    "axis.rate": "到达率，请求/s",
    "axis.since": "ms，自首个请求到达后 {at} s 起，{rate} 请求/s",
    "figure.one_at_a_time": "四幅图",
    "figure.timeline": "各 worker 在做什么",
    "figure.distributions": "延迟分布",
    "figure.against_rate": "延迟与到达率",
    "figure.waits": "前两个 token 在等什么",
    "caption.one_at_a_time": "原实验的四幅图。同一时刻只有一个请求，两个阶段从不相遇，"
    "因此预期的差别只有 KV 传输；超出部分是机器噪声。",
    "caption.timeline": "各部署在同一次运行、同一时段内的活动。每条泳道的上半部分是预填充步与 KV 传输，"
    "下半部分每一道竖线是一个 token。合并部署的 worker 为其他请求做预填充时，竖线中断；解码 worker 则不会被打断。"
    "虚线框：单个请求从第二个 token 起，相邻两个 token 之间最长的等待。没有虚线框的更宽空白位于请求之间："
    "前一个已结束，后一个还没有第二个 token。",
    "caption.distributions": "左：曲线越靠左，首 token 越快。右：不短于 x 的 token 间隔所占比例，"
    "对数坐标放大了尾部；干扰表现为远在右侧的肩部。",
    "caption.against_rate": "各次重复的平均值，误差棒为 95 % 置信区间。圆点为中位数，方块为 p99。",
    "caption.waits": "各部分的平均耗时。左：首 token 延迟的组成。右：KV 传输在第二个 token 之前增加的耗时"
    "（注意坐标尺度不同）。合并部署没有传输。",
    "report.title": "合并部署还是 PD 分离？",
    "report.summary": "模型 {model}，预算 {budget}，部署 {arms}",
    "report.when": "开始于 {started}，用时 {took} s，不含程序启动和本报告的绘制",
    "report.verdict": "结论",
    "report.void_why": "本次运行违反了下列检查项，受影响的部分不能得出结论：",
    "report.void_part": "此部分无效：",
    "report.sequential": "逐个处理请求",
    "report.concurrent": "并发负载",
    "report.differences": "各到达率下的差异",
    "report.latencies": "延迟与有效吞吐",
    "report.utilisation": "各 worker 的忙碌情况",
    "report.method": "测量方法",
    "report.notes": "本次运行说明",
    "report.parity": "部署之间的对等性",
    "report.settings": "配置",
    "report.environment": "环境",
    "report.repeat": "复现命令",
    "table.quantity": "平均值，ms",
    "table.total": "总延迟",
    "table.handoff_share": "KV 传输占总延迟的比例",
    "table.ttft": "首 token 延迟",
    "table.num": "完成 / 失败的请求",
    "table.published_colocated": "已发表，合并部署",
    "table.published_disaggregated": "已发表，PD 分离",
    "table.relative": "与合并部署的差异",
    "table.rate": "请求/s",
    "table.load": "容量的 {share}",
    "table.arm": "部署",
    "table.worker": "worker",
    "table.role": "角色",
    "table.devices": "设备",
    "table.chunk": "每步 token 数",
    "table.mixed": "含解码时 {num}",
    "table.triple": "p50 / p90 / p99，ms",
    "table.throughput": "token/s",
    "table.goodput": "有效吞吐",
    "table.done": "完成 / 失败",
    "table.shares": "{num} 个 worker 共享",
    "metric.goodput": "有效吞吐，百分点",
    "metric.ttft_s": "TTFT 平均",
    "metric.tpot_s": "TPOT 平均",
    "metric.itl_p99_s": "ITL p99",
    "metric.e2e_s": "E2E 平均",
    "metric.throughput": "吞吐量",
    "kind.better": "更好",
    "kind.worse": "更差",
    "kind.equal": "无差异",
    "kind.open": "未判定",
    "kind.void": "无效",
    "role.both": "预填充与解码",
    "role.prefill": "预填充",
    "role.decode": "解码",
    "text.differences": "PD 分离（{other}）与合并部署（{base}）的比较；同类部署有多个时，取有效吞吐较高者。"
    "绿色表示 PD 分离更好，红色表示更差。",
    "text.slo": "满足 SLO 的请求才算有效：{limits}。",
    "text.no_slo": "未设置 SLO，因此有效吞吐即完成请求的比例。",
    "text.utilisation": "每个 worker 用于预填充和解码的时间占比；其余时间为空闲、等待或传输。",
    "text.tokens_equal": "对相同的请求，各部署给出的 token 完全一致。",
    "text.parity_equal": "各部署的设备、模型、数据类型、内存、页大小、提示和到达时间都相同，仅 worker 的角色不同。",
    "text.tuned": "{text}此差异由搜索得出，属预期。",
    "text.unequal": "{text}此差异经明确许可，比较因而不对等。",
    "text.rate": "{rate} 请求/s：{kind}。",
    "text.concurrent_missing": "本次运行没有并发阶段，而只有并发负载才可能体现收益。",
    "method.open_loop": "开环负载：请求按事先抽取的时刻发出，不等待先前的请求结束。延迟从计划到达时刻算起，"
    "因此服务端的停顿不会被变慢的客户端掩盖。",
    "method.same": "各部署在相同时刻收到相同的提示，输出长度固定，采用贪心解码。",
    "method.repeats": "每次重复使用各自的随机种子，各部署交错运行、顺序随机。差异按重复配对计算；"
    "置信区间是对重复而非对请求的 t 区间，因为同一次运行中的请求并不独立。",
    "method.metrics": "TTFT：从计划到达到首个 token。TPOT：首 token 之后的平均间隔。ITL：每一个 token 间隔。"
    "E2E：从计划到达到最后一个 token。失败的请求不计入延迟，但在有效吞吐中计为未达标。",
    "method.verdict": "区间不含零时判定为更好或更差；区间落在 ±5 % 之内时为无差异；其余为未判定。"
    "逐个处理请求时，若 KV 传输不足差异的一半，则判定为无法解释，而非更好或更差。",
    "method.limits": "逐个请求时，每次重复使用相同的请求：该区间只反映机器的波动，不反映提示的差异。"
    "同一次重复的各到达率共用随机抽取，因此多个到达率下的判定并不独立。",
}

_TABLES: dict[str, dict[str, str]] = {"en": EN, "zh": ZH}


class Words:
    """One language's words: `words("plot.slo")`, `words("plot.ttft_at", rate="3.5")`. An unknown key is a KeyError."""

    def __init__(self, lang: Lang = "en") -> None:
        self.lang: Lang = lang
        self._table = _TABLES[lang]

    def __call__(self, key: str, **values: str | int | float) -> str:
        """The word or sentence, filled with `values`."""
        return self._table[key].format(**values)
