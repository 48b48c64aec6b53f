// The page: asks the server once a second how the deployment is, and draws it.

import { ask, onKey } from "./api.js";
import { Chart } from "./charts.js";
import { h, legend, seconds, whole } from "./dom.js";
import { PARTS, rows } from "./rows.js";
import { suggest, trial } from "./trial.js";
import { t, translate } from "./words.js";
import { PAGES, WorkerCards } from "./workers.js";

const EVERY_MS = 1000;
const $ = (id) => document.getElementById(id);

translate(document);
const cards = new WorkerCards($("workers"));
const charts = {
  ttft: new Chart(t("ttft"), [{ name: "a", label: "p50" }, { name: "b", label: "p99" }], seconds),
  itl: new Chart(t("itl"), [{ name: "a", label: "p50" }, { name: "b", label: "p99" }], seconds),
  rate: new Chart(t("rate"), [{ name: "a", label: t("per_second") }], (value) => (value === null ? "–" : whole(value))),
};
$("charts").append(...Object.values(charts).map((chart) => chart.element));
legend($("page-legend"), PAGES, t);
legend($("part-legend"), PARTS, t);

function draw({ now, status }) {
  const { series, workers } = status;
  $("deployment").textContent = `${status.deployment} · ${status.model} · ${status.policy}`;
  document.title = `disagg · ${status.deployment}`;
  tiles(status);
  cards.draw(status);
  charts.ttft.update([series.ttft_p50, series.ttft_p99], series.step_s);
  charts.itl.update([series.itl_p50, series.itl_p99], series.step_s);
  charts.rate.update([rates(series)], series.step_s);
  rows($("rows"), status, now);
  $("no-rows").hidden = status.rows.length > 0;
  $("workers-h").textContent = `${t("workers")} (${workers.filter((worker) => worker.up).length}/${workers.length})`;
}

/** Tokens a second; the step that is not over yet is left out. */
function rates(series) {
  return series.tokens.map((count, place) => (place === series.tokens.length - 1 ? null : count / series.step_s));
}

function tiles({ counters, series, workers }) {
  const seen = workers.map((worker) => worker.snapshot).filter(Boolean);
  const inflight = seen.reduce((sum, snapshot) => sum + snapshot.num_taking, 0);
  const recent = series.tokens.slice(-6, -1);
  const rate = recent.reduce((sum, count) => sum + count, 0) / (recent.length * series.step_s);
  const missed = counters.failed + counters.expired;
  const shown = [
    ["now", counters.live], ["per_s", rate], ["inflight", inflight], ["done", counters.done],
    ["notdone", missed], ["aborted", counters.aborted], ["restarts", counters.restarts],
  ];
  $("tiles").replaceChildren(
    ...shown.map(([name, value]) => {
      const bad = value > 0 && (name === "notdone" || name === "restarts");
      return h("div", { class: bad ? "tile bad" : "tile" }, h("b", {}, whole(value)), h("span", {}, t(name)));
    }),
  );
}

function say(kind, text) {
  if ($("state").textContent === text) return; // else screen readers would say it every second
  $("state").className = `state ${kind}`;
  $("state").textContent = text;
}

async function look() {
  try {
    const answer = await ask("live");
    draw(answer);
    suggest($("try"), answer.takes_text);
    say("live", t("live"));
  } catch (error) {
    say("lost", error.keyWanted ? t("key") : t("lost"));
  }
  setTimeout(look, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}

onKey($("key"));
trial($("try"), $("tried"));
look();
