// Each thing that can be done to the shop: what is asked before, what is sent, what to expect.

import { duration, h, NOTHING, percent } from "./dom.js";
import { EXPECTED, stormExpectations } from "./expected.js";

/** A storm of twelve rounds takes most of a minute, and longer where the database is slow. */
const STORM_PATIENCE_MS = 600_000;

/** An index over a large catalogue takes a while. */
const INDEX_PATIENCE_MS = 300_000;

/** All connections but one, of each service's fifteen. */
const HELD_PERCENT = 93;

/** The delay that is offered: the storm's own P95, without its work. */
const DELAY_MS = EXPECTED.p95_ms;

const field = (label, input, hint) => h("label.field", {}, h("span", {}, label), input, hint && h("small", {}, hint));

const numberField = (label, name, { value, min, max }, hint) =>
  field(label, h("input", { type: "number", name, value, min, max, step: 1, required: true, inputmode: "numeric" }), hint);

const p = (...text) => h("p", {}, ...text);
const code = (text) => h("code", {}, text);

const ROUNDS = [[1, "43 queries, about 4 s"], [4, "172 queries, about 16 s"], [12, "516 queries, about 50 s"]];

const rounds = () => h("fieldset", {}, h("legend", {}, "Rounds"), ROUNDS.map(([value, hint]) =>
  h("label.choice", {}, h("input", { type: "radio", name: "rounds", value, checked: value === 4 }),
    h("span", {}, h("b", {}, value), h("small", {}, hint)))));

/** The search index is there, or it is not. */
const indexRow = (wanted) => ({
  key: "search_index", label: "Search index", expected: wanted ? "there" : "none",
  format: (there) => (there === true ? "there" : there === false ? "none" : NOTHING), holds: (there) => there === wanted,
});

const p95Row = (expected, holds) => ({ key: "p95_ms", label: "Query duration P95", expected, format: duration, holds });
const poolRow = (expected, holds) => ({ key: "pool_utilization_percent", label: "Connection pool used", expected, format: percent, holds });

/** In the order in which a presenter needs them. */
export const ACTIONS = [
  {
    id: "storm", title: "Simulate Database Issues (Scene 9)", label: "🔥 Simulate Database Issues (Scene 9)", kind: "fire",
    about: "43 searches at once, through three services, over a table that has no index for them.",
    action: "Start the storm", done: "The storm is over.",
    path: "/api/demo/trigger-database-scenario", patience: STORM_PATIENCE_MS,
    body: (status) => [
      p("In each round 15, 15 and 13 queries reach product-, order- and inventory-service at the same moment. "
        + "The work is real: expect the shop to be slow for everybody until it is over."),
      status?.database?.search_index && h("p.note", {},
        "The search index is there: expect far less than this. Drop it first to see the storm.")],
    expects: stormExpectations, fields: rounds,
    send: (form) => ({ rounds: Number(form.get("rounds")) }),
  },
  {
    id: "slow", title: "Slow queries", tag: "simulated",
    about: "Every reading statement sleeps inside PostgreSQL before it works.",
    action: "Slow them down", done: "Statements sleep now, until the reset.",
    path: "/api/demo/enable-slow-queries",
    body: () => p("Each reading statement of the three services calls ", code("pg_sleep"), " first, holds its connection for as long, "
      + "and is cancelled at the statement timeout of 3200 ms. It is labelled as simulated wherever it shows."),
    expects: ({ delay_ms = DELAY_MS }) => [p95Row(`${duration(delay_ms)} at least`, (p95) => p95 >= delay_ms)],
    fields: () => numberField("Delay in milliseconds", "delay_ms", { value: DELAY_MS, min: 1, max: 10_000 }),
    send: (form) => ({ delay_ms: Number(form.get("delay_ms")) }),
  },
  {
    id: "pool", title: "Pool exhaustion",
    about: "Real connections are held by real work, until hardly any is left.",
    action: "Take the connections", done: "Connections are held, until their time is over or the reset.",
    path: "/api/demo/enable-pool-exhaustion",
    body: () => p("Of each service all connections but one are taken and kept busy. Requests that find none in time fail with ",
      code("pool_exhausted"), ", and with a storm on top of it many do."),
    expects: () => [poolRow(`${percent(HELD_PERCENT)} at least`, (used) => used >= HELD_PERCENT)],
    fields: () => numberField("Seconds until they are given back", "hold_seconds", { value: 30, min: 1, max: 120 }),
    send: (form) => ({ hold_seconds: Number(form.get("hold_seconds")) }),
  },
  {
    id: "index-create", title: "Create the search index", label: "Create index", tag: "the fix", kind: "fix",
    about: "A trigram index over the descriptions: the search no longer reads every product.",
    action: "Create it", done: "The index is there.", path: "/api/demo/index", patience: INDEX_PATIENCE_MS,
    body: () => p("PostgreSQL builds a ", code("pg_trgm"), " GIN index over all descriptions, which takes some seconds. "
      + "Expect a search for a rare word to take milliseconds afterwards, and a storm to leave hardly a trace on the charts."),
    expects: () => [indexRow(true)], send: () => ({ action: "create" }),
  },
  {
    id: "index-drop", title: "Drop the search index", label: "Drop index",
    about: "Back to reading the whole table for each search.",
    action: "Drop it", done: "The index is gone.", path: "/api/demo/index", patience: INDEX_PATIENCE_MS,
    body: () => p("Expect a search for a rare word to read every product again, as before the fix."),
    expects: () => [indexRow(false)], send: () => ({ action: "drop" }),
  },
  {
    id: "reset", title: "Reset",
    about: "No simulation, no held connections.",
    action: "Reset", done: "Nothing is simulated, nothing is held.", path: "/api/demo/reset",
    body: () => p("Ends slow queries and gives held connections back, in all three services. The index stays as it is. "
      + "Expect the figures of the baseline within seconds."),
    expects: () => [
      p95Row(`${duration(EXPECTED.baseline_p95_ms)} at most`, (p95) => p95 <= EXPECTED.baseline_p95_ms),
      poolRow("3 to 5 %", (used) => used <= 5)],
    send: () => ({}),
  },
];
