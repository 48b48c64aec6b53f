// Small tools: making elements, and numbers for people.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element with attributes and children (elements or text; text is never read as HTML). */
export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** The same for SVG. */
export const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Three digits of a time given in seconds, in the unit people read it in. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.9995e-3) return `${digits(value * 1e6)} µs`;
  if (value < 0.9995) return `${digits(value * 1e3)} ms`;
  return `${digits(value)} s`;
}

/** Bytes in binary units. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) [value, place] = [value / 1024, place + 1];
  return `${place ? digits(value) : value} ${units[place]}`;
}

/** A whole number with separators. */
export const whole = (value) => Math.round(value).toLocaleString("en-US");

function digits(value) {
  return value >= 99.95 ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

const WAITS = new Set(["queue", "handoff_wait", "admission", "holding", "quiescing"]); // for others: hatched

function coloured(name, attributes = {}) {
  const piece = h("i", WAITS.has(name) ? { ...attributes, class: "waits" } : attributes);
  piece.style.backgroundColor = `var(--${name})`;
  return piece;
}

/** A stacked bar: [name, amount] pairs, coloured by name, each with its amount as a tooltip. */
export function bar(parts, describe, label) {
  const total = parts.reduce((sum, [, amount]) => sum + amount, 0) || 1;
  const shown = parts.filter(([, amount]) => amount > 0);
  const pieces = shown.map(([name, amount]) => {
    const piece = coloured(name, { title: describe(name, amount) });
    piece.style.width = `${(100 * amount) / total}%`;
    return piece;
  });
  return h("div", { class: "bar", role: "img", "aria-label": label }, ...pieces);
}

/** The names of a bar's colours. */
export function legend(list, names, word) {
  list.replaceChildren(...names.map((name) => h("li", {}, coloured(name), word(name))));
}
