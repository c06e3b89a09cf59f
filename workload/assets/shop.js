// The shop itself: departments, search, a product.

import { Failure, get, path, post, present, failureCard } from "./api.js";
import { count, counted, duration, h, icon, price } from "./dom.js";

/** The catalogue's departments, each with its symbol. */
const DEPARTMENTS = ["Audio", "Kitchen", "Garden", "Office", "Sport", "Photography", "Toys", "Clothing"];

/** Products in one portion of a list: three or four rows on a wide screen. */
const PORTION = 24;

/** Words that many descriptions have, and words that hardly any has: the first end a search early. */
const COMMON = ["wireless", "cotton", "portable"];
const RARE = ["zither", "samovar", "narwhal"];

/** The customer that orders come from: nobody has to sign in to a demo. */
const CUSTOMER = 1;

const symbolOf = (department) => (DEPARTMENTS.includes(department) ? department.toLowerCase() : "thing");

/** A picture for a product: its department's symbol on a colour of its own. */
function picture(product) {
  return h("div.picture", { "--hue": (product.id * 47) % 360 }, icon(symbolOf(product.department)));
}

function card(product) {
  return h("li", {}, h("a.product", { href: `#/product/${product.id}` },
    picture(product),
    h("span.name", {}, product.name),
    h("span.department", {}, product.department),
    h("span.price", {}, price(product.price_cents))));
}

const list = (products) => h("ul.products", {}, products.map(card));

function departments(current) {
  return h("nav.departments", { "aria-label": "Departments" },
    DEPARTMENTS.map((name) => h("a", {
      href: `#/department/${name}`, "aria-current": name === current && "page",
    }, icon(symbolOf(name)), name)));
}

/** A list that grows by portions, in the order of the ids. */
function portions(department, signal) {
  const shelf = h("ul.products");
  const place = h("div.more");
  const portion = async (after) => {
    const found = await get(path("/api/products", { department, after, limit: PORTION }), { signal });
    shelf.append(...found.products.map(card));
    if (!found.next) return [];
    return h("button", { type: "button", onclick: () => present(place, signal, () => portion(found.next)) }, "More products");
  };
  present(place, signal, () => portion());
  return [shelf, place];
}

/** `#/`: what the shop has. */
export function home(main, _parameters, signal) {
  main.append(
    h("section.hero", {},
      h("h1", {}, "Everything for every room, and the garden behind it"),
      h("p", {}, "Good things, made to last. Find yours by department, or search what the descriptions say."),
      suggestions()),
    departments(),
    ...portions(undefined, signal));
}

function suggestions() {
  const links = (list) => list.map((word) => h("a.tag", { href: `#/search?q=${word}` }, word));
  return h("p.suggestions", {},
    h("span", {}, "Popular ", links(COMMON)),
    h("span", {}, "Rare finds ", links(RARE)));
}

/** `#/department/NAME` */
export function department(main, { name }, signal) {
  main.append(h("h1", {}, name), departments(name), ...portions(name, signal));
  return name;
}

/** `#/search?q=…`: what was found, and how long it took. */
export function search(main, { q }, signal) {
  const place = h("div", {}, h("p.muted", {}, "Searching all descriptions …"));
  main.append(h("h1", {}, "Search: ", h("em", {}, q)), place);
  present(place, signal, async () => {
    const start = performance.now();
    const found = await get(path("/api/products/search", { q, limit: PORTION }), { signal });
    const took = duration(performance.now() - start);
    const summary = h("p.muted", {}, `${counted(found.products.length, "product")} in `, h("strong.figure", {}, took),
      ", as this browser measured it.");
    return found.products.length > 0 ? [summary, list(found.products)] : [summary, nothing()];
  });
  return q;
}

const nothing = () => h("section.card", {},
  h("h2", {}, "No description says so"),
  h("p", {}, "The search reads what the descriptions say, anywhere and in any case."), suggestions());

/** `#/product/ID`: a product and its stock. */
export function product(main, { id }, signal) {
  const place = h("div");
  main.append(place);
  present(place, signal, async () => {
    const found = await get(`/api/products/${encodeURIComponent(id)}`, { signal });
    document.title = `${found.name} · Tinderbox`;
    return page(found, signal);
  });
}

function page(found, signal) {
  const stock = h("div.stock", { role: "status" }, h("p.muted", {}, "Looking into the stock room …"));
  present(stock, signal, async () => stockOf(await get(`/api/inventory/check/${found.id}`, { signal })));
  return [
    h("p.crumbs", {}, h("a", { href: "#/" }, "Shop"), " / ",
      h("a", { href: `#/department/${found.department}` }, found.department)),
    h("article.detail", {}, picture(found),
      h("div", {},
        h("h1", { tabindex: "-1" }, found.name),
        h("p.price", {}, price(found.price_cents)),
        stock, buy(found),
        h("p.description", {}, found.description))),
  ];
}

/** How many there are, in words. */
function stockOf(stock) {
  const there = stock.available;
  const [level, text] = there <= 0 ? ["out", "Sold out"]
    : there < 10 ? ["low", `Only ${count(there)} left`] : ["in", `In stock: ${count(there)}`];
  return h(`p.level.${level}`, {}, text);
}

function buy(found) {
  const outcome = h("div", { role: "status" });
  const order = async () => {
    button.disabled = true;
    try {
      const items = [{ product_id: found.id, quantity: 1 }];
      const placed = await post("/api/orders", { customer_id: CUSTOMER, items });
      outcome.replaceChildren(h("p.level.in", {}, `Ordered. Your number is ${placed.id}.`));
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      outcome.replaceChildren(failureCard(error));
    } finally {
      button.disabled = false;
    }
  };
  const button = h("button.primary", { type: "button", onclick: order }, "Buy now");
  return h("div.buy", {}, button, outcome);
}
