// The control room: what is wrong with the shop on purpose, and how that shows.

import { ACTIONS } from "./actions.js";
import { Failure, failureCard, post } from "./api.js";
import { confirm } from "./dialog.js";
import { h } from "./dom.js";
import { expectations } from "./expected.js";
import { map } from "./map.js";
import { figures, refresh, state, watch } from "./status.js";
import { storm } from "./storm.js";

/** A storm is asked for and runs; the live figures should soon begin with it. */
const FIRST_LOOK_MS = 200;

const toResult = () => h("button", {
  type: "button", onclick: () => document.querySelector(".result")?.scrollIntoView(),
}, "See what was measured");

/** The question before an action; resolves to the form's data or null. */
function ask(action, signal) {
  const table = expectations(action.expects({}));
  const asking = new AbortController();
  watch(({ status }) => table.update(figures(status)), asking.signal);
  const body = h("div.body", {}, action.body(state.status), table.element, action.fields?.());
  return confirm({ title: action.title, body, action: action.action, signal }).finally(() => asking.abort());
}

/** Ends what the action before shows. */
let unfolded = new AbortController();

/** What an action is expected to show, beside what the services measure from now on. */
function unfolding(action, data, signal) {
  const table = expectations(action.expects(data));
  unfolded = new AbortController();
  watch(({ status }) => table.update(figures(status)), AbortSignal.any([signal, unfolded.signal]));
  return table.element;
}

/** Asks, does, and shows what came of it in `outcome`. */
async function perform(action, { button, outcome, signal, follow }) {
  const form = await ask(action, signal);
  button.focus();
  if (!form || signal.aborted) return;
  const data = action.send(form);
  unfolded.abort();
  outcome.replaceChildren(h("p.muted", {}, `${action.title}: under way …`));
  button.setAttribute("aria-busy", "true");
  const soon = setTimeout(follow, FIRST_LOOK_MS);
  try {
    await post(action.path, data, { patience: action.patience });
    outcome.replaceChildren(h("p.level.in", {}, action.done),
      action.id === "storm" ? toResult() : unfolding(action, data, signal));
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    outcome.replaceChildren(failureCard(error));
  } finally {
    clearTimeout(soon);
    button.removeAttribute("aria-busy");
  }
  await Promise.all([refresh(), follow()]);
}

/** Whether a button would do nothing, as far as is known. */
function useless(action, status) {
  const index = status.database?.search_index;
  switch (action.id) {
    case "storm": return Boolean(status.storm?.running);
    case "index-create": return index === true;
    case "index-drop": return index === false;
    default: return false;
  }
}

function panel(signal, follow) {
  const outcome = h("div.outcome-line", { role: "status" });
  const buttons = ACTIONS.map((action) => {
    const button = h(`button.${action.kind ?? "plain"}`, {
      type: "button", id: `do-${action.id}`, "aria-describedby": `about-${action.id}`, disabled: true,
      onclick: () => perform(action, { button, outcome, signal, follow }),
    }, action.label ?? action.title, action.tag && h("span.tag", {}, action.tag));
    return { action, button };
  });
  const why = h("p.note", { id: "why-disabled", hidden: true },
    "The demo is switched off: the gateway was started without ", h("code", {}, "--demo"),
    ". Start the shop with it to use these buttons. They can take the shop down, so they are never there by themselves.");
  watch(({ status }) => {
    why.hidden = !status || status.demo;
    for (const { action, button } of buttons) button.disabled = !status?.demo || useless(action, status);
  }, signal);
  return h("section.card.panel", { "aria-label": "Demo" }, h("h2", {}, "Break it, then fix it"), why,
    h("ul.actions", {}, buttons.map(({ action, button }) => h("li", {}, button, h("p.muted", { id: `about-${action.id}` }, action.about)))),
    outcome);
}

function mapCard(signal) {
  const drawn = map(signal);
  const index = h("p.index");
  watch(({ status }) => {
    if (!status) return;
    drawn.update(status);
    const there = status.database?.search_index;
    if (there === true) index.textContent = "The search has its index.";
    else if (there === false) index.textContent = "The search has no index: it reads every product.";
    else index.textContent = "The database was not reached.";
  }, signal);
  return h("section.card", {}, h("header", {}, h("h2", {}, "Service map"), index), drawn.element);
}

/** `#/demo` */
export function controlRoom(main, _parameters, signal) {
  const live = storm(signal);
  main.append(
    h("h1", {}, "Control room"),
    h("div.room", {}, panel(signal, live.follow), h("div.views", {}, mapCard(signal), live.live)),
    live.result);
  return "Control room";
}
