// The control room: what is wrong with the shop on purpose, and how that shows.

import { Failure, failureCard, post } from "./api.js";
import { confirm } from "./dialog.js";
import { h } from "./dom.js";
import { announcement } from "./expected.js";
import { map } from "./map.js";
import { figures, refresh, state, watch } from "./status.js";
import { storm } from "./storm.js";

/** A storm of twelve rounds takes most of a minute, and much longer where the database is slow. */
const STORM_PATIENCE_MS = 600_000;

/** An index over a large catalogue takes a while. */
const INDEX_PATIENCE_MS = 300_000;

const field = (label, input, hint) => h("label.field", {}, h("span", {}, label), input, hint && h("small", {}, hint));

const numberField = (label, name, value, min, max, hint) =>
  field(label, h("input", { type: "number", name, value, min, max, step: 1, required: true, inputmode: "numeric" }), hint);

const paragraph = (...text) => h("p", {}, ...text);

const rounds = () => h("fieldset", {}, h("legend", {}, "Rounds"),
  [[1, "1", "about 4 s"], [4, "4", "about 16 s"], [12, "12", "516 queries, about 50 s"]].map(([value, label, hint]) =>
    h("label.choice", {}, h("input", { type: "radio", name: "rounds", value, checked: value === 4 }),
      h("span", {}, h("b", {}, label), h("small", {}, hint)))));

/** Each thing that can be done: what is asked before, and what is sent then. */
const ACTIONS = [
  {
    id: "storm", title: "Simulate Database Issues (Scene 9)", label: "🔥 Simulate Database Issues (Scene 9)", kind: "fire",
    about: "43 searches at once, through three services, over a table that has no index for them.",
    action: "Start the storm", path: "/api/demo/trigger-database-scenario", patience: STORM_PATIENCE_MS,
    body: () => [
      paragraph("In each round 15, 15 and 13 queries reach product-, order- and inventory-service at the same moment. "
        + "The work is real: expect the shop to be slow for everybody until it is over."),
      announcement(figures(state.status)),
      state.status?.database?.search_index && h("p.note", {},
        "The search index exists: expect far less than this. Drop it first to see the storm."),
      rounds()],
    send: (data) => ({ rounds: Number(data.get("rounds")) }),
    done: "The storm is over.",
  },
  {
    id: "slow", title: "Slow queries", label: "Slow queries", tag: "simulated",
    about: "Every statement sleeps inside PostgreSQL before it works.",
    action: "Slow them down", path: "/api/demo/enable-slow-queries",
    body: () => [
      paragraph("Each statement of the three services calls ", h("code", {}, "pg_sleep"), " first. Expect P95 to rise by this much, "
        + "connections to be held for as long, and statements to be cancelled beyond the timeout of 3200 ms. "
        + "It is labelled as simulated wherever it shows."),
      numberField("Delay in milliseconds", "delay_ms", 2800, 1, 10_000, "2800 is the storm's expected P95")],
    send: (data) => ({ delay_ms: Number(data.get("delay_ms")) }),
    done: "Statements sleep now. Reset ends it.",
  },
  {
    id: "pool", title: "Pool exhaustion", label: "Pool exhaustion",
    about: "Real connections are held by real work, until none is left.",
    action: "Take the connections", path: "/api/demo/enable-pool-exhaustion",
    body: () => [
      paragraph("Connections of each service are taken and kept busy. Expect the pools to be full, and requests that "
        + "find no connection to fail with ", h("code", {}, "pool_exhausted"), " and status 503."),
      numberField("Seconds until they are given back", "hold_seconds", 30, 1, 300, "Reset gives them back at once")],
    send: (data) => ({ hold_seconds: Number(data.get("hold_seconds")) }),
    done: "Connections are held.",
  },
  {
    id: "index-create", title: "Create the search index", label: "Create index", tag: "the fix", kind: "fix",
    about: "A trigram index over the descriptions: the search no longer reads every product.",
    action: "Create it", path: "/api/demo/index", patience: INDEX_PATIENCE_MS,
    body: () => [
      paragraph("PostgreSQL builds a ", h("code", {}, "pg_trgm"), " GIN index over all descriptions, which takes some seconds. "
        + "Expect a search for a rare word to take milliseconds afterwards, and a storm to leave no trace on the charts.")],
    send: () => ({ action: "create" }), done: "The index is there.",
  },
  {
    id: "index-drop", title: "Drop the search index", label: "Drop index",
    about: "Back to reading the whole table for each search.",
    action: "Drop it", path: "/api/demo/index", patience: INDEX_PATIENCE_MS,
    body: () => [paragraph("Expect a search for a rare word to read every product again, as before the fix.")],
    send: () => ({ action: "drop" }), done: "The index is gone.",
  },
  {
    id: "reset", title: "Reset", label: "Reset",
    about: "No simulation, no held connections.",
    action: "Reset", path: "/api/demo/reset",
    body: () => [paragraph("Ends slow queries and gives held connections back, in all three services. "
      + "Expect the figures to be back at the baseline within seconds: P95 45 ms at most, 3 to 5 % of the pool. The index stays as it is.")],
    send: () => ({}), done: "Everything is as it was.",
  },
];

async function perform(action, button, outcome, signal, look) {
  const data = await confirm({ title: action.title, body: h("div.body", {}, action.body()), action: action.action, signal });
  button.focus();
  if (!data || signal.aborted) return;
  outcome.replaceChildren(h("p.muted", {}, `${action.title}: under way …`));
  button.setAttribute("aria-busy", "true");
  // The request of a storm ends with it; the live figures should begin with it.
  const [asked] = [post(action.path, action.send(data), { patience: action.patience }), setTimeout(look, 200)];
  try {
    await asked;
    outcome.replaceChildren(h("p.level.in", {}, action.done));
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    outcome.replaceChildren(failureCard(error));
  } finally {
    button.removeAttribute("aria-busy");
  }
  await Promise.all([refresh(), look()]);
}

function panel(signal, look) {
  const outcome = h("div.outcome-line", { role: "status" });
  const buttons = ACTIONS.map((action) => {
    const button = h(`button.${action.kind ?? "plain"}`, {
      type: "button", id: `do-${action.id}`, "aria-describedby": `about-${action.id}`,
      onclick: () => perform(action, button, outcome, signal, look),
    }, action.label, action.tag && h("span.tag", {}, action.tag));
    return { action, button };
  });
  const why = h("p.note", { id: "why-disabled", hidden: true },
    "The demo is switched off: the gateway and the services were started without ", h("code", {}, "--demo"),
    ". Start them with it to use these buttons; they can take the shop down, so they are never there by themselves.");
  watch(({ status }) => {
    const off = status && !status.demo;
    why.hidden = !off;
    const index = status?.database?.search_index;
    for (const { action, button } of buttons) {
      const useless = (action.id === "index-create" && index === true) || (action.id === "index-drop" && index === false);
      const busy = action.id === "storm" && status?.storm?.running;
      button.disabled = !status || off || useless || Boolean(busy);
    }
  }, signal);
  return h("section.card.panel", { "aria-label": "Demo" }, h("h2", {}, "What shall go wrong?"), why,
    h("ul.actions", {}, buttons.map(({ action, button }) => h("li", {}, button, h("p.muted", { id: `about-${action.id}` }, action.about)))),
    outcome);
}

/** `#/demo` */
export function controlRoom(main, _parameters, signal) {
  const live = storm(signal);
  const drawn = map(signal);
  const index = h("p.index");
  watch(({ status }) => {
    if (!status) return;
    drawn.update(status);
    const there = status.database?.search_index;
    index.replaceChildren(there === undefined || there === null ? "The database was not reached." : there
      ? "The search has its index." : "The search has no index: it reads every product.");
  }, signal);
  main.append(
    h("h1", {}, "Control room"),
    h("div.room", {},
      panel(signal, live.look),
      h("div.views", {},
        h("section.card", {}, h("header", {}, h("h2", {}, "Service map"), index), drawn.element),
        live.live)),
    live.result);
  return "Control room";
}
