// Elements and words: what every page is made of.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * An HTML element: `h("a.card", { href: "#/" }, "text", child)`. A string is always text, never
 * markup; `on…` is a listener, `--…` a custom property of its style.
 */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length > 0) element.className = classes.join(" ");
  return fill(element, properties, children);
}

/** The same for SVG. */
export function s(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElementNS(SVG, tag);
  if (classes.length > 0) element.setAttribute("class", classes.join(" "));
  return fill(element, properties, children);
}

/** One of the symbols in `icons.svg`. */
export function icon(name) {
  return s("svg.icon", { "aria-hidden": "true", viewBox: "0 0 24 24" },
    s("use", { href: `/assets/icons.svg#${name}` }));
}

/** Writes `text` only if it differs, so that selections and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const money = new Intl.NumberFormat("en", { style: "currency", currency: "EUR" });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** What stands where nothing was measured. */
export const NOTHING = "–";

/** Between a number and its unit: they stay on one line. */
const GAP = "\u00a0";

/** `0.3 ms`, `45 ms`, `2.81 s`. */
export function duration(milliseconds) {
  if (!isNumber(milliseconds)) return NOTHING;
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(2)}${GAP}s`;
  return `${milliseconds < 10 ? number.format(milliseconds) : Math.round(milliseconds)}${GAP}ms`;
}

/** `95.6 %`. */
export const percent = (value) => (isNumber(value) ? `${number.format(value)}${GAP}%` : NOTHING);

/** `1,234`. */
export const count = (value) => (isNumber(value) ? number.format(value) : NOTHING);

/** `1 round`, `4 rounds`; `many` where an s is not enough. */
export const counted = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** Cents as euros. */
export const price = (cents) => money.format(cents / 100);

/** Unix milliseconds as the time of day, with thousandths. */
export function timeOfDay(milliseconds) {
  const thousandths = String(Math.floor(milliseconds) % 1000).padStart(3, "0");
  return `${clock.format(new Date(milliseconds))}.${thousandths}`;
}

/** `statement_timeout` as `statement timeout`. */
export const words = (code) => String(code).replaceAll("_", " ");

/** Resolves after `milliseconds`, at once when `signal` aborts. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
