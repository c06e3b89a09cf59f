// What the audience is told to expect, and what was measured beside it.

import { count, duration, h, percent } from "./dom.js";

/** Scene 9 as it is announced. A report brings its own; these are for the question before it. */
export const EXPECTED = {
  baseline_p95_ms: 45, p95_ms: 2800, p99_ms: 3200, active: 43, pool_utilization_percent: 95, failed_percent: 8.3,
};

/** In which range a measured figure counts as the expected one, and how it is written. */
const MEASURES = [
  { key: "baseline_p95_ms", label: "Query duration P95 before", format: duration, low: () => 0, high: (e) => e, note: "at most" },
  { key: "p95_ms", label: "Query duration P95", format: duration, low: (e) => e * 0.8, high: (e) => e * 1.2, note: "± 20 %", of: "completed" },
  { key: "p99_ms", label: "Query duration P99", format: duration, low: (e) => e * 0.9, high: (e) => e * 1.1, note: "± 10 %", of: "all executed" },
  { key: "active", measured: "active_max", label: "Active queries", format: count, low: (e) => e, high: (e) => e },
  { key: "pool_utilization_percent", label: "Connection pool used", format: percent, low: (e) => e, high: () => 100, note: "at least" },
  { key: "failed_percent", label: "Queries failed", format: percent, low: () => 4, high: () => 13, note: "4 to 13 %" },
];

const VERDICTS = {
  as: { sign: "✓", text: "as expected" },
  above: { sign: "▲", text: "above" },
  below: { sign: "▼", text: "below" },
  unknown: { sign: "?", text: "not measured" },
};

/** How a measured figure stands to what was expected. */
export function verdict(measure, expected, measured) {
  if (typeof measured !== "number") return "unknown";
  if (measured < measure.low(expected)) return "below";
  return measured > measure.high(expected) ? "above" : "as";
}

const expectation = (measure, expected) => [measure.format(expected), measure.note && h("small", {}, ` ${measure.note}`)];

const name = (measure) => [measure.label, measure.of && h("small", {}, ` of ${measure.of}`)];

/** For the question: expected beside what is measured now. */
export function announcement(now) {
  const measured = { p95_ms: now?.p95_ms, active: now?.active, pool_utilization_percent: now?.pool_utilization_percent };
  return h("table.figures", {},
    h("thead", {}, h("tr", {}, ["Measure", "Expected", "Now"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, MEASURES.filter((measure) => measure.key !== "baseline_p95_ms").map((measure) => h("tr", {},
      h("th", { scope: "row" }, name(measure)),
      h("td", {}, expectation(measure, EXPECTED[measure.key])),
      h("td", {}, measure.format(measured[measure.key]))))));
}

/** For the result: expected beside measured, and beside the storm before if there was one. */
export function comparison(report, before) {
  const expected = { ...EXPECTED, ...report.expected };
  const columns = ["Measure", "Expected", "Measured", ...(before ? ["Storm before"] : []), "Verdict"];
  const row = (measure) => {
    const key = measure.measured ?? measure.key;
    const found = verdict(measure, expected[measure.key], report[key]);
    const { sign, text } = VERDICTS[found];
    return h("tr", { "data-measure": measure.key },
      h("th", { scope: "row" }, name(measure)),
      h("td", {}, expectation(measure, expected[measure.key])),
      h("td.measured", {}, measure.format(report[key])),
      before && h("td", {}, measure.format(before[key])),
      h(`td.verdict.${found}`, {}, h("span", { "aria-hidden": "true" }, sign), ` ${text}`));
  };
  return h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Measured against expected" },
    h("table.figures.results", {},
      h("thead", {}, h("tr", {}, columns.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, MEASURES.map(row))));
}
