// The gateway's API, and what is shown while a part of the shop does not answer.

import { h, pause } from "./dom.js";

/** Longer than the gateway itself waits for a service: its own answer should be seen. */
const PATIENCE_MS = 20_000;

/** An answer that is not a success: RFC 9457's members, as far as they are known. */
export class Failure extends Error {
  constructor({ status = 0, title = "No answer", code = "no_answer", detail = "" }) {
    super(detail || title);
    Object.assign(this, { status, title, code, detail });
  }

  /** Whether the same request may succeed later. */
  get mayPass() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

async function failureOf(response) {
  const known = { status: response.status, title: response.statusText || "Error", code: "", detail: "" };
  const problem = await response.json().catch(() => ({}));
  return new Failure({ ...known, ...problem });
}

async function ask(path, { signal, patience = PATIENCE_MS, ...options } = {}) {
  const signals = [AbortSignal.timeout(patience), ...(signal ? [signal] : [])];
  let response;
  try {
    response = await fetch(path, { ...options, signal: AbortSignal.any(signals) });
  } catch (error) {
    if (signal?.aborted) throw error;
    const detail = error.name === "TimeoutError"
      ? "The gateway took too long to answer."
      : "The gateway cannot be reached.";
    throw new Failure({ detail });
  }
  if (!response.ok) throw await failureOf(response);
  return response.json();
}

/** `GET path`: the JSON of a success, else a `Failure`. */
export const get = (path, options) => ask(path, options);

/** `POST path` with a JSON body. */
export const post = (path, body = {}, options = {}) => ask(path, {
  ...options, method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
});

/** A path with its query: `path("/api/x", { q: "a b" })`; what is not given is left out. */
export function path(base, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length === 0 ? base : `${base}?${new URLSearchParams(given)}`;
}

/** What is known of a failure, for people. */
export function failureCard(failure, ...more) {
  const facts = [failure.status > 0 && `HTTP ${failure.status}`, failure.code].filter(Boolean).join(" · ");
  return h("section.card.failure", { role: "alert" },
    h("h2", {}, failure.title),
    h("p", {}, failure.detail || "No more is known."),
    facts && h("p.facts", {}, h("code", {}, facts)),
    more);
}

/**
 * Fills `place` by `load`. What fails is shown and tried again until it works, unless trying again
 * cannot help; a pause grows from one second to eight, so that a service that comes back is
 * noticed soon and one that stays away is left in peace.
 */
export async function present(place, signal, load) {
  place.setAttribute("aria-busy", "true");
  for (let wait = 1000; !signal.aborted; wait = Math.min(wait * 2, 8000)) {
    try {
      const content = await load();
      if (!signal.aborted) place.replaceChildren(...[content].flat());
      break;
    } catch (error) {
      if (signal.aborted) break;
      if (!(error instanceof Failure)) throw error;
      const again = error.mayPass && h("p.muted", {}, "Trying again by itself …");
      place.replaceChildren(failureCard(error, again));
      if (!error.mayPass) break;
    }
    await pause(wait, signal);
  }
  place.removeAttribute("aria-busy");
}
