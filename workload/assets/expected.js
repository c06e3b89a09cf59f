// What the audience is told to expect, and what was measured beside it.

import { count, duration, h, percent, say } from "./dom.js";

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
function verdict(measure, expected, measured) {
  if (typeof measured !== "number") return "unknown";
  if (measured < measure.low(expected)) return "below";
  return measured > measure.high(expected) ? "above" : "as";
}

const expectation = (measure, expected) => [measure.format(expected), measure.note && h("small", {}, ` ${measure.note}`)];

const name = (measure) => [measure.label, measure.of && h("small", {}, ` of ${measure.of}`)];

const heads = (texts) => h("thead", {}, h("tr", {}, texts.map((text) => h("th", { scope: "col" }, text))));

/** What a storm is expected to show, for the question before it. */
export const stormExpectations = () => MEASURES
  .filter((measure) => measure.key !== "baseline_p95_ms")
  .map((measure) => ({ ...measure, expected: expectation(measure, EXPECTED[measure.key]) }));

/**
 * Expected beside what is measured now: `[{ label, expected, key, format, holds? }]`. After
 * `update(figures)` each row says its figure, and a sign once `holds`.
 */
export function expectations(rows) {
  const cells = rows.map(() => h("td.measured"));
  const element = h("table.figures", {}, heads(["Measure", "Expected", "Now"]),
    h("tbody", {}, rows.map((row, index) => h("tr", { "data-measure": row.key },
      h("th", { scope: "row" }, name(row)), h("td", {}, row.expected), cells[index]))));
  const update = (figures) => rows.forEach((row, index) => {
    const value = figures?.[row.key];
    const holds = value !== undefined && value !== null && row.holds?.(value);
    say(cells[index], `${holds ? "✓ " : ""}${row.format(value)}`);
    cells[index].classList.toggle("as", Boolean(holds));
  });
  return { element, update };
}

/** For the result: expected beside measured, and beside the storm before if there was one. */
export function comparison(report, before) {
  const expected = { ...EXPECTED, ...report.expected };
  const row = (measure) => {
    const key = measure.measured ?? measure.key;
    const found = verdict(measure, expected[measure.key], report[key]);
    const { sign, text } = VERDICTS[found];
    return h("tr", { "data-measure": measure.key },
      h("th", { scope: "row" }, name(measure)),
      h("td", {}, expectation(measure, expected[measure.key])),
      before && h("td", {}, measure.format(before[key])),
      h("td.measured", {}, measure.format(report[key])),
      h(`td.verdict.${found}`, {}, h("span", { "aria-hidden": "true" }, sign), h("span.text", {}, ` ${text}`)));
  };
  return h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Measured against expected" },
    h("table.figures.results", {},
      heads(["Measure", "Expected", ...(before ? ["Storm before"] : []), "Measured", "Verdict"]),
      h("tbody", {}, MEASURES.map(row))));
}
