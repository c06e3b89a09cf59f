// Traces: the slowest first, and each as a waterfall.

import { get, path, present } from "./api.js";
import { counted, duration, h, timeOfDay } from "./dom.js";
import { logLines } from "./logs.js";

/** As many as a person would look through. */
const LIMIT = 40;

/** The share of a waterfall's width below which a bar would be invisible, in per cent. */
const THINNEST = 0.4;

const NANOS = 1e6;

/** `#/traces` */
export function traces(main, _parameters, signal) {
  const place = h("div", {}, h("p.muted", {}, "Asking the services …"));
  const load = () => present(place, signal, async () => listOf(await get(path("/api/traces", { limit: LIMIT }), { signal })));
  main.append(
    h("div.title", {}, h("h1", {}, "Slowest traces"), h("button", { type: "button", onclick: load }, "Look again")),
    h("p.muted", {}, "From the bounded memory of recent spans that each service keeps. Older ones give way."),
    place);
  load();
  return "Traces";
}

function listOf(found) {
  if (found.length === 0) {
    return h("section.card", {}, h("h2", {}, "No traces yet"),
      h("p", {}, "Search for something, or start the storm in the ", h("a", { href: "#/demo" }, "control room"), "."));
  }
  const longest = Math.max(...found.map((trace) => trace.duration_ms), 1e-3);
  return h("ol.traces", {}, found.map((trace) => h("li", {}, h("a", { href: `#/traces/${trace.trace_id}` },
    h("strong.figure", {}, duration(trace.duration_ms)),
    h("span.root", {}, trace.root, trace.error && h("span.tag.bad", {}, "error")),
    h("span.muted", {}, `${timeOfDay(trace.start_unix_ms)} · ${counted(trace.spans, "span")}`),
    h("span.bar", { "--width": `${(100 * trace.duration_ms) / longest}%`, "aria-hidden": "true" })))));
}

/** Spans in the order of a waterfall, each with its depth: children below their parent, by time. */
export function arrange(spans) {
  const known = new Set(spans.map((span) => span.span_id));
  const children = Map.groupBy(spans, (span) => (known.has(span.parent_span_id) ? span.parent_span_id : ""));
  const rows = [];
  const visit = (parent, depth) => {
    const below = (children.get(parent) ?? []).toSorted((a, b) => a.start_unix_nano - b.start_unix_nano);
    for (const span of below) {
      rows.push({ span, depth });
      if (span.span_id) visit(span.span_id, depth + 1);
    }
  };
  visit("", 0);
  return rows;
}

const failed = (span) => /error/i.test(span.status?.code ?? span.status ?? "");

/** The statement that took longest: it is what a waterfall is opened for. */
function longestStatement(spans) {
  const statements = spans.filter((span) => span.attributes?.["db.query.text"]);
  return statements.toSorted((a, b) => b.duration_ms - a.duration_ms)[0];
}

/** What the conventions call an attribute now, and what they called it before. */
const BEFORE = {
  "db.query.text": "db.statement", "db.namespace": "db.name", "db.operation.name": "db.operation",
  "db.collection.name": "db.sql.table", "db.system.name": "db.system",
  "server.address": "net.peer.name", "server.port": "net.peer.port",
};

/** The statement's text first, since it is looked for; then by name. What has two names is shown once. */
function attributesOf(span) {
  const all = span.attributes ?? {};
  const twice = Object.entries(BEFORE).filter(([now, before]) => now in all && all[now] === all[before]);
  const hidden = new Set(twice.map(([, before]) => before));
  const both = Object.fromEntries(twice.map(([now, before]) => [now, `${now}, ${before}`]));
  const rows = Object.entries(all).filter(([name]) => !hidden.has(name)).map(([name, value]) => [both[name] ?? name, value]);
  const isText = ([name]) => name.startsWith("db.query.text");
  const others = rows.filter((entry) => !isText(entry)).toSorted(([a], [b]) => a.localeCompare(b));
  return [...rows.filter(isText), ...others, ["kind", span.kind], ["span id", span.span_id]];
}

function row({ span, depth }, start, whole, opened) {
  const left = (100 * (Number(span.start_unix_nano) - start)) / NANOS / whole;
  const width = Math.max((100 * span.duration_ms) / whole, THINNEST);
  return h("li", {}, h(`details.span${failed(span) ? ".bad" : ""}`, { "--depth": depth, "data-service": span.service, open: span === opened },
    h("summary", {},
      h("span.what", {}, h("span.name", {}, span.name), h("span.service", {}, span.service)),
      h("span.lane", { "aria-hidden": "true" }, h("span.bar", { "--left": `${Math.min(left, 100 - THINNEST)}%`, "--width": `${width}%` })),
      h("span.figure", {}, duration(span.duration_ms))),
    h("dl.attributes", {}, attributesOf(span).map(([key, value]) =>
      h("div", {}, h("dt", {}, key), h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))))));
}

/** The waterfall of one trace. */
export function waterfall(spans) {
  const starts = spans.map((span) => Number(span.start_unix_nano));
  const start = Math.min(...starts);
  const end = Math.max(...spans.map((span, index) => starts[index] + span.duration_ms * NANOS));
  const whole = Math.max((end - start) / NANOS, 1e-3);
  const opened = longestStatement(spans);
  return h("section.card.waterfall", {},
    h("header", {}, h("h2", {}, "Waterfall"), h("p.muted.caption", {}, `${duration(whole)} from ${timeOfDay(start / NANOS)}; a span opens to its attributes`)),
    h("p.ruler", { "aria-hidden": "true" }, [0, 0.25, 0.5, 0.75, 1].map((share) => h("span", {}, duration(whole * share)))),
    h("ol", {}, arrange(spans).map((placed) => row(placed, start, whole, opened))));
}

/** `#/traces/ID`: the waterfall, and the log lines of the same trace. */
export function trace(main, { id }, signal) {
  const spans = h("div", {}, h("p.muted", {}, "Asking the services …"));
  const lines = h("div");
  main.append(
    h("p.crumbs", {}, h("a", { href: "#/traces" }, "Traces")),
    h("h1", {}, "Trace ", h("code.id", {}, id)),
    spans, lines);
  present(spans, signal, async () => waterfall((await get(`/api/traces/${encodeURIComponent(id)}`, { signal })).spans));
  present(lines, signal, async () => h("section.card", {}, h("h2", {}, "Its log lines"),
    logLines(await get(path("/api/logs", { trace_id: id, limit: 200 }), { signal }))));
  return "Trace";
}
