// The box: one prompt, run on one worker and then on two, with what each took.

import { ask, stream } from "./api.js";
import { h, seconds } from "./dom.js";
import { partsBar, route } from "./rows.js";
import { t } from "./words.js";

const WAYS = ["colocated", "disaggregated"];
const ROW_TRIES = 10;
const ROW_EVERY_MS = 100;

/** Let the form run its prompt both ways, into `output`. */
export function trial(form, output) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    const views = WAYS.map((way) => new View(way));
    output.replaceChildren(...views.map((view) => view.element));
    try {
      for (const view of views) await view.run(request(form));
    } finally {
      button.disabled = false;
    }
  });
}

/** A prompt to begin with, unless there is one: text where the model takes it, else token ids. */
export function suggest(form, takesText) {
  const box = form.elements.prompt;
  if (!box.value && !box.dataset.suggested) box.value = takesText ? t("sample") : "1, 2, 3, 5, 8, 13, 21, 34, 55, 89";
  box.dataset.suggested = "yes"; // once: an empty box may be meant
}

/** The request's body. Whole numbers with commas are token ids, which every model takes. */
function request(form) {
  const text = form.elements.prompt.value;
  const ids = /^[\s\d,]+$/.test(text) && /\d/.test(text);
  return {
    prompt: ids ? text.split(",").filter((part) => part.trim()).map(Number) : text,
    max_tokens: form.elements.max_tokens.valueAsNumber,
    temperature: 0,
    ignore_eos: true,
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** What came of one way. */
class View {
  constructor(way) {
    this.way = way;
    this.path = h("span", { class: "right" });
    this.text = h("div", { class: "output", tabindex: "0" }, t("waiting"));
    this.bar = h("div");
    this.numbers = h("dl");
    const head = h("div", { class: "head" }, h("h3", {}, t(way)), this.path);
    this.element = h("article", { class: "card", "data-way": way }, head, this.text, this.bar, this.numbers);
  }

  async run(body) {
    this.text.textContent = "";
    try {
      const id = await this.read({ ...body, disagg_route: this.way });
      const row = await finished(id);
      if (row) this.explain(row);
    } catch (error) {
      this.text.append(h("span", { class: "error" }, error.message));
    }
  }

  /** Show the text as it comes; returns the completion's id. */
  async read(body) {
    const start = performance.now();
    let id = "";
    let first = null;
    let count = 0;
    for await (const news of stream("v1/completions", body)) {
      id = news.id ?? id;
      const choice = news.choices?.[0];
      if (choice && first === null) first = performance.now() - start;
      if (choice?.text) this.text.append(choice.text);
      count = news.usage?.completion_tokens ?? count;
    }
    const total = performance.now() - start;
    const between = count > 1 ? (total - first) / (count - 1) : null;
    if (!this.text.textContent) this.text.textContent = `${count} ${t("tokens_short")}`;
    this.show([["ttft", first / 1000], ["itl", between === null ? null : between / 1000], ["total", total / 1000]]);
    return id;
  }

  show(shown) {
    this.numbers.append(...shown.map(([name, value]) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, seconds(value)))));
  }

  /** The phases, as the server recorded them. */
  explain(row) {
    this.path.textContent = route(row);
    this.bar.replaceChildren(partsBar(row));
    const named = Object.entries(row.parts).filter(([name, value]) => value > 0 && !["client", "router"].includes(name));
    this.show(named);
    const cached = h("div", {}, h("dt", {}, t("cachedtokens")), h("dd", {}, `${row.num_cached}/${row.prompt_len}`));
    this.numbers.append(cached);
  }
}

/** The row of a completion, once the server has it; null if it does not come. */
async function finished(id) {
  for (let i = 0; i < ROW_TRIES; i += 1) {
    const { status } = await ask("live");
    const row = status.rows.find((each) => id.includes(each.request_id));
    if (row) return row;
    await new Promise((resolve) => setTimeout(resolve, ROW_EVERY_MS));
  }
  return null;
}
