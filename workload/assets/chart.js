// A small chart of one figure over time, as inline SVG.

import { h, NOTHING, s, say } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 72;

/** Air above the highest point, so that its line is not cut. */
const HEADROOM = 1.12;

const round = (value) => Math.round(value * 10) / 10;

/** The points with a value, as runs without gaps: a line must not claim what was not measured. */
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point.value === null || point.value === undefined) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((run) => run.length > 0);
}

/** `{ label, format, expected, max }` → a chart; `update(points)` draws `[{ t_s, value }]`. */
export function chart({ label, format, expected = null, max = 0 }) {
  const line = s("path.line");
  const area = s("path.area");
  const goal = s("path.goal", { "vector-effect": "non-scaling-stroke" });
  const picture = s("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label,
  }, area, line, goal);
  const now = h("strong.figure", {}, NOTHING);
  const scale = h("span.scale");
  const span = h("span");
  const element = h("figure.chart", {},
    h("figcaption", {}, h("span", {}, label), now),
    picture,
    h("p.axis", {}, span, expected !== null && h("span.goal", {}, `expected ${format(expected)}`), scale));

  function update(points) {
    const values = points.map((point) => point.value).filter((value) => value !== null && value !== undefined);
    const highest = Math.max(...values, 0);
    const top = Math.max(max, highest * HEADROOM, expected ? expected * HEADROOM : 0) || 1;
    const [first, last] = [points.at(0)?.t_s ?? 0, points.at(-1)?.t_s ?? 1];
    const x = (point) => round(((point.t_s - first) / Math.max(last - first, 1e-3)) * WIDTH);
    const y = (value) => round(HEIGHT - (value / top) * HEIGHT);
    const path = (run) => run.map((point, index) => `${index ? "L" : "M"}${x(point)} ${y(point.value)}`).join("");
    const drawn = runs(points);
    // A run of one point would be invisible without the `h0.1`.
    line.setAttribute("d", drawn.map((run) => `${path(run)}h.1`).join(""));
    area.setAttribute("d", drawn.map((run) => `${path(run)}V${HEIGHT}H${x(run[0])}Z`).join(""));
    goal.setAttribute("d", expected === null ? "" : `M0 ${y(expected)}H${WIDTH}`);
    const latest = points.at(-1)?.value;
    say(now, format(latest));
    say(span, points.length > 1 ? `${Math.round(last - first)} s` : "");
    say(scale, values.length > 0 ? `highest ${format(highest)}` : "");
    picture.setAttribute("aria-label", `${label}: now ${format(latest)}, highest ${format(highest)}`);
  }
  return { element, update };
}
