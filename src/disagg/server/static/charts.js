// A small line chart in SVG: time to the left, one or two lines, the value under the pointer in words.

import { h, s } from "./dom.js";
import { t } from "./words.js";

const HEIGHT = 144;
const MARGIN = { left: 52, right: 10, top: 8, bottom: 20 };

/** A chart that is drawn anew with every `update`. `lines`: [{name, label}], name "a" or "b". */
export class Chart {
  constructor(title, lines, format) {
    this.lines = lines;
    this.format = format;
    this.values = [];
    this.at = null; // the step under the pointer
    this.keys = lines.map((line) => h("span", { class: `key ${line.name}` }));
    this.svg = s("svg", { role: "img", "aria-label": title });
    const head = h("div", { class: "head" }, h("h3", {}, title), h("span", { class: "right legend" }, ...this.keys));
    this.element = h("div", { class: "card chart" }, head, this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /** `values`: one list of numbers or nulls per line, `step` seconds apart, the last one now. */
  update(values, step) {
    this.values = values;
    this.step = step;
    this.draw();
  }

  point(event) {
    const count = this.values[0]?.length ?? 0;
    const { width } = this.area();
    const place = event ? Math.round(((event.offsetX - MARGIN.left) / width) * (count - 1)) : null;
    this.at = place === null ? null : Math.min(Math.max(place, 0), count - 1);
    this.draw();
  }

  area() {
    const width = Math.max(this.svg.clientWidth, 120) - MARGIN.left - MARGIN.right;
    return { width, height: HEIGHT - MARGIN.top - MARGIN.bottom };
  }

  draw() {
    const count = this.values[0]?.length ?? 0;
    if (!count) return;
    const { width, height } = this.area();
    const top = ceiling(Math.max(0, ...this.values.flat()));
    const x = (place) => MARGIN.left + (place / (count - 1)) * width;
    const y = (value) => MARGIN.top + height * (1 - value / top);
    this.svg.setAttribute("viewBox", `0 0 ${width + MARGIN.left + MARGIN.right} ${HEIGHT}`);
    const marks = [...this.scale(top, x, y, width, count)];
    this.values.forEach((values, line) => marks.push(...trace(values, this.lines[line].name, x, y)));
    if (this.at !== null) marks.push(s("line", { class: "rule", x1: x(this.at), x2: x(this.at), y1: MARGIN.top, y2: MARGIN.top + height }));
    this.svg.replaceChildren(...marks);
    this.lines.forEach((line, i) => {
      this.keys[i].textContent = `${line.label} ${this.format(this.shown(this.values[i]))}`;
    });
  }

  /** The value under the pointer, else the latest there is. */
  shown(values) {
    return this.at !== null ? values[this.at] : (values.findLast((value) => value !== null) ?? null);
  }

  *scale(top, x, y, width, count) {
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      yield s("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + width, y1: at, y2: at });
      yield s("text", { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, share ? short(this.format(top * share)) : "0");
    }
    const minutes = Math.round((count * this.step) / 60);
    const every = width < 260 ? 2 : 1; // minutes, so that labels keep apart
    for (let minute = 0; minute < minutes; minute += every) {
      const anchor = minute === 0 ? "end" : "middle";
      const text = minute === 0 ? t("ago") : `−${minute} min`;
      yield s("text", { x: x((count - 1) * (1 - minute / minutes)), y: HEIGHT - 5, "text-anchor": anchor }, text);
    }
  }
}

/** The line through neighbouring values, and a dot for a value without neighbours. */
function* trace(values, name, x, y) {
  let path = "";
  let run = 0;
  for (let place = 0; place <= values.length; place += 1) {
    const value = values[place] ?? null;
    if (value !== null) {
      path += `${run ? "L" : "M"}${x(place).toFixed(1)} ${y(value).toFixed(1)}`;
      run += 1;
    } else {
      if (run === 1) yield s("circle", { class: name, cx: x(place - 1), cy: y(values[place - 1]), r: 2.5 });
      run = 0;
    }
  }
  yield s("path", { class: name, d: path });
}

/** Without zeros that say nothing: "2.50 s" is "2.5 s". */
const short = (text) => text.replace(/\.(\d*?)0+(?=\D|$)/, (_, digits) => (digits ? `.${digits}` : ""));

/** The next round number: 1, 2 or 5 times a power of ten. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= value * 0.999);
}
