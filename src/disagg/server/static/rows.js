// The last requests, each as one bar from its arrival to its last token, split by phase.

import { bar, h, seconds } from "./dom.js";
import { t } from "./words.js";

export const PARTS = ["client", "router", "queue", "prefill", "handoff_wait", "handoff_copy", "admission", "decode"];
const SHOWN = 20;

let drawn = "";

/** Draw them if there are new ones. All bars have one scale, so lengths can be compared. */
export function rows(list, status, now) {
  const shown = status.rows.slice(0, SHOWN);
  const key = shown.map((row) => row.request_id).join();
  if (key === drawn) return;
  drawn = key;
  const longest = Math.max(...shown.map((row) => row.e2e_s ?? 0), 1e-9);
  const lines = shown.map((row) => line(row, longest, now - (status.at - row.end_at)));
  list.replaceChildren(item("titles", t("row_who"), [], t("row_sum")), ...lines);
}

function item(kind, who, track, sum, more = "") {
  return h("li", { class: kind },
    h("span", { class: "who", title: more }, who),
    h("div", { class: "track" }, ...track),
    h("span", { class: "sum" }, sum));
}

function line(row, longest, endedAt) {
  const clock = new Date(1000 * endedAt).toLocaleTimeString([], { hour12: false });
  const sizes = `${row.prompt_len}→${row.output_len} ${t("tokens_short")}`;
  const track = [];
  if (row.e2e_s !== null) {
    const parts = partsBar(row);
    parts.style.width = `${(100 * row.e2e_s) / longest}%`;
    track.push(parts);
  }
  const why = row.error || (row.finish_reason === "abort" ? t("aborted") : "");
  if (why) track.push(h("span", { class: "error" }, why));
  const more = `${row.request_id}, ${t("cachedtokens")}: ${row.num_cached}, ${t("attempts")}: ${row.num_attempts}`;
  const sum = row.ttft_s === null ? "" : `${seconds(row.ttft_s)} · ${seconds(row.e2e_s)}`;
  return item("", `${clock} ${route(row)} ${sizes}`, track, sum, more);
}

/** "P0→D0", or one name for a request that one worker served. */
export function route(row) {
  const name = (address) => address.replace(/\.\d+$/, "");
  const [from, to] = [name(row.prefill_worker), name(row.decode_worker)];
  return from === to ? from : `${from}→${to}`;
}

/** The bar of one row. */
export function partsBar(row) {
  const label = PARTS.map((name) => `${t(name)} ${seconds(row.parts[name])}`).join(", ");
  return bar(PARTS.map((name) => [name, row.parts[name] ?? 0]), (name, amount) => `${t(name)}: ${seconds(amount)}`, label);
}
