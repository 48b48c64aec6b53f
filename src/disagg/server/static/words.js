// Every word of the page, in the browser's language where we have it.

const english = {
  connecting: "Connecting", live: "Live", lost: "The server does not answer; trying again",
  key: "This server asks for an API key", use: "Use",
  workers: "Workers", minutes: "The last five minutes", last: "The last requests, by phase",
  none: "No request has ended yet.", try: "Try a prompt both ways",
  tryhow: "The same prompt runs on one worker for both phases (colocated), then on two (disaggregated).",
  prompt: "Prompt (a text, or token ids as in 1, 2, 3)", tokens: "Output tokens", run: "Run both ways",
  running_now: "running", waiting_now: "waiting", now: "requests now", per_s: "output tokens/s", done: "done",
  notdone: "failed, expired", aborted: "aborted", inflight: "hand-offs in flight", restarts: "worker restarts",
  both: "both phases", prefill_role: "prefill", decode_role: "decode", down: "down", silent: "silent",
  free: "free", cached: "cached", running: "running", holding: "holding", sending: "sending", quiescing: "quiescing",
  pages: "pages in use", giving: "handing over", taking: "taking over", step: "last step", pulled: "pulled",
  computed: "tokens computed", nosnapshot: "This deployment is not supervised: workers tell nothing.",
  client: "client", router: "router", queue: "queue", prefill: "prefill", handoff_wait: "hand-off wait",
  handoff_copy: "hand-off copy", admission: "admission", decode: "decode",
  ttft: "Time to first token", itl: "Time between tokens", rate: "Output", per_second: "tokens/s",
  total: "total", colocated: "Colocated", disaggregated: "Disaggregated", tokens_short: "tok",
  attempts: "attempts", waiting: "waits for its turn", cachedtokens: "prompt tokens cached", ago: "now",
  row_who: "ended, workers, prompt→output", row_sum: "first token · total",
  sample: "Water moves between the sea, the air and the land. The sun warms the sea, and",
};

const chinese = {
  connecting: "正在连接", live: "实时", lost: "服务器没有应答，正在重试",
  key: "此服务器需要 API 密钥", use: "使用",
  workers: "工作进程", minutes: "最近五分钟", last: "最近的请求，按阶段",
  none: "还没有请求结束。", try: "同一提示，两种方式",
  tryhow: "同一个提示先由一个工作进程完成两个阶段（合置），再由两个工作进程分别完成（分离）。",
  prompt: "提示（文本，或词元编号，如 1, 2, 3）", tokens: "输出词元数", run: "两种方式都运行",
  running_now: "运行中", waiting_now: "等待中", now: "当前请求", per_s: "输出词元/秒", done: "已完成",
  notdone: "失败、超时", aborted: "已中止", inflight: "进行中的交接", restarts: "工作进程重启",
  both: "两个阶段", prefill_role: "预填充", decode_role: "解码", down: "已停止", silent: "无心跳",
  free: "空闲", cached: "缓存", running: "运行", holding: "保留", sending: "传送", quiescing: "收尾",
  pages: "已用页", giving: "正在交出", taking: "正在接收", step: "上一步", pulled: "已拉取",
  computed: "已计算词元", nosnapshot: "此部署没有监督：工作进程不报告状态。",
  client: "客户端", router: "路由", queue: "排队", prefill: "预填充", handoff_wait: "交接等待",
  handoff_copy: "交接拷贝", admission: "接纳", decode: "解码",
  ttft: "首词元时间", itl: "词元间隔", rate: "输出", per_second: "词元/秒",
  total: "总计", colocated: "合置", disaggregated: "分离", tokens_short: "词元",
  attempts: "尝试次数", waiting: "等待轮到", cachedtokens: "来自缓存的提示词元", ago: "现在",
  row_who: "结束时间、工作进程、提示→输出", row_sum: "首词元 · 总计",
  sample: "水在海洋、空气和陆地之间循环。太阳温暖海水，然后",
};

export const language = navigator.language.startsWith("zh") ? "zh" : "en";
const words = language === "zh" ? chinese : english;

/** The word for `name`; the name itself where there is none, so a new field of the server is shown, not hidden. */
export const t = (name) => words[name] ?? name;

/** Put words into the page's own text. */
export function translate(root) {
  document.documentElement.lang = language;
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
}
