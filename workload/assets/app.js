// The shell: routes, the header, and what is to be said on every page.

import { controlRoom } from "./demo.js";
import { count, h } from "./dom.js";
import { flamegraphs } from "./flames.js";
import { logs } from "./logs.js";
import { department, home, product, search } from "./shop.js";
import { keepWatching, simulations, watch } from "./status.js";
import { trace, traces } from "./traces.js";

/** Each page: a function that fills `main` until its signal aborts, and may return its title. */
const ROUTES = [
  [/^\/$/, home],
  [/^\/department\/(?<name>[^/]+)$/, department],
  [/^\/search$/, search],
  [/^\/product\/(?<id>[^/]+)$/, product],
  [/^\/demo$/, controlRoom],
  [/^\/traces$/, traces],
  [/^\/traces\/(?<id>[^/]+)$/, trace],
  [/^\/logs$/, logs],
  [/^\/flamegraphs(?:\/(?<file>[^/]+))?$/, flamegraphs],
];

const main = document.querySelector("#main");
const field = document.querySelector("#q");
const links = [...document.querySelectorAll("#pages a")];
let leaving = new AbortController();

function unknown(main) {
  main.append(h("section.card", {}, h("h1", {}, "There is no such page"), h("p", {}, h("a", { href: "#/" }, "To the shop"))));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    // A stray `%` stands for itself.
    return text;
  }
}

/** What the address says after its `#`: a page and its parameters. */
function route() {
  const [where, query = ""] = (location.hash.slice(1) || "/").split("?");
  for (const [pattern, page] of ROUTES) {
    const found = where.match(pattern);
    if (!found) continue;
    const groups = Object.entries(found.groups ?? {}).filter(([, value]) => value !== undefined);
    const named = Object.fromEntries(groups.map(([name, value]) => [name, decoded(value)]));
    return { where, page, parameters: { ...Object.fromEntries(new URLSearchParams(query)), ...named } };
  }
  return { where, page: unknown, parameters: {} };
}

function markCurrent(where) {
  for (const link of links) {
    const target = link.hash.slice(1);
    const shop = target === "/" && /^\/($|department|search|product)/.test(where);
    const inside = target !== "/" && (where === target || where.startsWith(`${target}/`));
    if (shop || inside) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function open({ first = false } = {}) {
  leaving.abort();
  leaving = new AbortController();
  const { where, page, parameters } = route();
  main.replaceChildren();
  markCurrent(where);
  field.value = where === "/search" ? (parameters.q ?? "") : "";
  const title = page(main, parameters, leaving.signal);
  document.title = title ? `${title} · Tinderbox` : "Tinderbox";
  if (first) return;
  // Who reads by ear, or goes by keyboard, begins at the new page's beginning.
  window.scrollTo({ top: 0, behavior: "instant" });
  main.focus({ preventScroll: true });
}

/** What concerns every page: a gateway or a service that is away, a storm, a simulation. */
function notices({ status, failure }) {
  const all = [];
  if (failure) all.push(["bad", `${failure.detail} Trying again by itself …`]);
  else if (status) {
    for (const service of status.services.filter((service) => !service.up)) {
      all.push(["bad", `${service.name} does not answer. Trying again by itself …`]);
    }
    const storm = status.storm;
    if (storm?.running) {
      all.push(["storm", `Storm: round ${storm.round} of ${storm.rounds}, ${count(storm.done)} queries done, ${count(storm.failed)} failed`]);
    }
    for (const simulation of simulations(status)) all.push(["simulated", `Simulated: ${simulation}`]);
  }
  return all;
}

let said = "";

function tell(state) {
  const all = notices(state);
  const key = JSON.stringify(all);
  if (key === said) return;
  said = key;
  document.querySelector("#notices").replaceChildren(...all.map(([kind, text]) => h(`p.notice.${kind}`, {}, text)));
}

document.querySelector("#search").addEventListener("submit", (event) => {
  event.preventDefault();
  const word = field.value.trim();
  if (word) location.hash = `#/search?${new URLSearchParams({ q: word })}`;
});
document.querySelector(".skip").addEventListener("click", (event) => {
  // The address after `#` is a page here, not a place in one.
  event.preventDefault();
  main.focus();
});
window.addEventListener("hashchange", () => open());
watch(tell);
open({ first: true });
keepWatching();
