// The storm: its live figures while it runs, its report afterwards.

import { get } from "./api.js";
import { chart } from "./chart.js";
import { count, counted, duration, h, pause, percent, words } from "./dom.js";
import { comparison, EXPECTED } from "./expected.js";
import { state, watch } from "./status.js";

/** How often a running storm is looked at. */
const LOOK_MS = 500;

const FIGURES = [
  { key: "p95_ms", label: "Query duration P95", format: duration, expected: EXPECTED.p95_ms },
  { key: "pool_utilization_percent", label: "Connection pool", format: percent, expected: EXPECTED.pool_utilization_percent, max: 100 },
  { key: "active", label: "Active queries", format: count, expected: EXPECTED.active },
  { key: "failed", label: "Failed queries", format: count, max: 4 },
];

/** As many as a person looks at. */
const SLOWEST = 8;

/** Reports of this tab, newest last: the fix is seen against the storm before it. */
const reports = [];

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** The charts of the storm's own samples. */
function charts() {
  const drawn = FIGURES.map((figure) => ({ ...figure, chart: chart(figure) }));
  const update = (samples) => {
    for (const { key, chart } of drawn) {
      chart.update(samples.map((sample) => ({ t_s: sample.t_s, value: sample[key] })));
    }
  };
  return { element: h("div.charts", {}, drawn.map(({ chart }) => chart.element)), update };
}

/** Samples of the shop's state, with failures counted from the first of them. */
function calmSamples() {
  const before = state.samples[0]?.failed ?? 0;
  // A service that was started anew counts from nothing.
  return state.samples.map((sample) => ({ ...sample, failed: Math.max(sample.failed - before, 0) }));
}

/** Live figures, and below them the last storm's report. `follow` looks at once. */
export function storm(signal) {
  const heading = h("h2", {}, "Live figures");
  const caption = h("p.muted.caption");
  const drawn = charts();
  const result = h("div.result");
  let shown = null;
  let watching = null;

  const draw = () => {
    const running = watching?.running;
    const samples = running ? watching.samples : calmSamples();
    heading.textContent = running ? `Storm: round ${watching.round} of ${watching.rounds}` : "Live figures";
    caption.textContent = running
      ? "43 queries at once in each round, measured where they are sent."
      : "All services together, from their own health; P95 is that of the slowest over its last 10 s.";
    drawn.update(samples);
  };
  const show = (report) => {
    if (!report || same(report, shown)) return;
    if (!same(report, reports.at(-1))) reports.push(report);
    shown = report;
    result.replaceChildren(...resultOf(report, reports.at(-2)));
  };
  const look = async () => {
    watching = await get("/api/demo/storm", { signal }).catch(() => watching);
    if (signal.aborted) return;
    if (watching && !watching.running) show(watching.report);
    draw();
  };
  let looking = false;
  /** Follows a storm to its end, whoever started it; at first also looks for the last one's report. */
  const follow = async () => {
    if (looking) return;
    looking = true;
    do {
      await look();
      await pause(LOOK_MS, signal);
    } while (watching?.running && !signal.aborted);
    looking = false;
  };
  watch(({ status }) => {
    if (status?.demo && (!watching || status.storm?.running)) follow();
    if (!watching?.running) draw();
  }, signal);
  return { follow, result, live: h("section.card.live", {}, h("header", {}, heading, caption), drawn.element) };
}

function resultOf(report, before) {
  const failures = Object.entries(report.failures ?? {}).filter(([, number]) => number > 0);
  return [h("section.card", { "aria-labelledby": "result-title" },
    h("header", {}, h("h2", { id: "result-title" }, "Measured against expected"),
      h("p.muted.caption", {}, `${counted(report.queries, "query", "queries")} in ${counted(report.rounds, "round")}, ${report.seconds.toFixed(1)} s; `
        + `${count(report.executed)} executed, ${count(report.completed)} completed, ${count(report.failed)} failed.`)),
    comparison(report, before),
    h("dl.facts", {},
      fact("One such query alone", duration(report.single_query_ms)),
      fact("Median of completed", duration(report.p50_ms)),
      failures.map(([cause, number]) => fact(`Failed by ${words(cause)}`, count(number)))),
    h("div.columns", {}, byService(report.by_service ?? []), slowest(report.slowest ?? [])))];
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function byService(services) {
  return h("div", {}, h("h3", {}, "By service"),
    h("table.figures", {},
      h("thead", {}, h("tr", {}, ["Service", "Queries", "P95", "Failed"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, services.map(({ service, queries, p95_ms, failed }) => h("tr", {},
        h("th", { scope: "row" }, service), h("td", {}, count(queries)), h("td", {}, duration(p95_ms)), h("td", {}, count(failed)))))));
}

function slowest(traces) {
  return h("div", {}, h("h3", {}, "Slowest traces"),
    h("ol.slowest", {}, traces.slice(0, SLOWEST).map(({ trace_id, service, ms, outcome }) => h("li", {},
      h("a", { href: `#/traces/${trace_id}` },
        h("strong.figure", {}, duration(ms)), h("span", {}, service), h(`span.outcome.${outcome === "completed" ? "fine" : "bad"}`, {}, words(outcome)))))));
}
