// Log lines of all services, by level and by trace.

import { get, path, present } from "./api.js";
import { h, timeOfDay } from "./dom.js";

/** A level means itself and all above it. */
const LEVELS = [["", "All"], ["info", "Info and above"], ["warn", "Warnings and errors"], ["error", "Errors"]];
const LIMIT = 200;
const NANOS = 1e6;

/** A field's value; of a measured number as many digits as mean anything. */
function shown(value) {
  if (typeof value === "number") return String(Number(value.toFixed(3)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function line(entry, linked) {
  const fields = Object.entries(entry.fields ?? {});
  return h(`li.line.${String(entry.level).toLowerCase()}`, {},
    h("span.when", {}, timeOfDay(Number(entry.time_unix_nano) / NANOS)),
    h("span.level", {}, String(entry.level).toUpperCase()),
    h("span.service", {}, entry.service),
    h("span.message", {}, entry.message),
    (fields.length > 0 || (linked && entry.trace_id)) && h("span.fields", {},
      fields.map(([key, value]) => h("span", {}, h("i", {}, `${key}=`), shown(value))),
      linked && entry.trace_id && h("a", { href: `#/traces/${entry.trace_id}` }, "trace")));
}

/** Lines as a list; `linked` if each should lead to its trace. */
export function logLines(entries, linked = false) {
  if (entries.length === 0) return h("p.muted", {}, "No line is kept.");
  return h("ol.log", {}, entries.map((entry) => line(entry, linked)));
}

/** `#/logs?level=…&trace_id=…` */
export function logs(main, { level = "", trace_id = "" }, signal) {
  const place = h("div", {}, h("p.muted", {}, "Asking the services …"));
  const choose = (event) => {
    event.preventDefault();
    const chosen = new FormData(event.currentTarget.form ?? event.currentTarget);
    location.hash = path("#/logs", Object.fromEntries(chosen));
  };
  const form = h("form.filter", { onsubmit: choose },
    h("label.field", {}, h("span", {}, "Level"), h("select", { name: "level", onchange: choose },
      LEVELS.map(([value, name]) => h("option", { value, selected: value === level }, name)))),
    h("label.field", {}, h("span", {}, "Trace id"),
      h("input", { name: "trace_id", value: trace_id, pattern: "[0-9a-f]{32}", title: "32 hexadecimal digits", autocomplete: "off", spellcheck: "false" })),
    h("button", {}, "Show"));
  main.append(h("h1", {}, "Logs"), h("p.muted", {}, "What the services keep in memory of their log lines, newest first."), form, place);
  present(place, signal, async () => h("section.card", {}, logLines((await get(path("/api/logs", { level, trace_id, limit: LIMIT }), { signal })).toReversed(), true)));
  return "Logs";
}
