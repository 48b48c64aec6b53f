// One card per worker: role, where its pages are, its queue and its hand-offs.

import { bar, bytes, h, seconds, whole } from "./dom.js";
import { t } from "./words.js";

export const PAGES = ["running", "holding", "sending", "quiescing", "cached", "free"];
const ROLE = { both: "both", prefill: "prefill_role", decode: "decode_role" };

/** Draws the cards anew with every answer; keeps the last one, to tell speeds. */
export class WorkerCards {
  constructor(element) {
    this.element = element;
    this.before = new Map(); // address -> snapshot
    this.speed = new Map(); // address -> bytes/s
  }

  draw(status) {
    this.element.replaceChildren(...status.workers.map((worker) => this.card(worker, status)));
  }

  card(worker, status) {
    const { snapshot } = worker;
    const state = worker.up ? (worker.silent ? "silent" : null) : "down";
    const head = h("div", { class: "head" },
      h("h3", {}, worker.address),
      h("span", { class: `badge ${worker.role}` }, t(ROLE[worker.role])),
      state && h("span", { class: "badge down" }, t(state)),
      snapshot && h("span", { class: "right" }, inUse(snapshot.pages, status)));
    const card = h("article", { class: state ? "card down" : "card" }, head);
    if (snapshot) card.append(pages(snapshot.pages), this.numbers(worker.address, snapshot));
    else card.append(h("p", { class: "quiet" }, worker.up ? t("nosnapshot") : ""));
    return card;
  }

  numbers(address, now) {
    const before = this.before.get(address);
    if (before && now.at > before.at) this.speed.set(address, (now.pulled_bytes - before.pulled_bytes) / (now.at - before.at));
    this.before.set(address, now);
    const shown = [
      ["running_now", now.num_running], ["waiting_now", now.num_waiting],
      ["giving", now.num_giving], ["taking", now.num_taking],
      ["step", now.num_steps ? seconds(now.step_s) : "–"],
      ["pulled", `${bytes(this.speed.get(address) ?? 0)}/s`],
    ];
    return h("dl", {}, ...shown.map(([name, value]) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, String(value)))));
  }
}

function inUse(counts, status) {
  const used = status.num_pages - counts.free - counts.cached;
  return `${whole(used)}/${whole(status.num_pages)} ${t("pages")}`;
}

function pages(counts) {
  const label = PAGES.map((name) => `${t(name)} ${counts[name]}`).join(", ");
  return bar(PAGES.map((name) => [name, counts[name]]), (name, amount) => `${t(name)}: ${whole(amount)}`, label);
}
