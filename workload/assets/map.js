// The map: the gateway, the three services, and the database that they share.

import { counted, duration, h, NOTHING, percent, s } from "./dom.js";

/** From here on an edge is amber, and from here on red: well above a healthy P95 of 45 ms. */
const SLUGGISH_MS = 150;
const SLOW_MS = 1000;

/** Below this width the boxes are narrow and the words short. */
const NARROW = 560;

/** One step of the dashes that flow along a busy edge, as in the style sheet. */
const FLOW_MS = 800;

const GATEWAY = { name: "api-gateway" };

function level(service) {
  if (!service.up) return "down";
  const latency = service.health?.latency;
  if (!latency?.count) return "idle";
  return latency.p95_ms >= SLOW_MS ? "slow" : latency.p95_ms >= SLUGGISH_MS ? "sluggish" : "fine";
}

/** Where everything stands in a picture of that width. */
function plan(width, services) {
  const narrow = width < NARROW;
  const gap = narrow ? 8 : Math.max(20, width * 0.06);
  const box = { width: Math.min((width - gap * (services.length + 1)) / services.length, 190), height: narrow ? 62 : 68 };
  const step = box.width + gap;
  const left = (width - step * services.length + gap) / 2;
  const column = (index) => left + index * step + box.width / 2;
  return { narrow, box, column, middle: width / 2, rows: { gateway: 8, services: narrow ? 112 : 124, database: narrow ? 256 : 272 },
    height: narrow ? 330 : 352 };
}

function node({ x, y, box, kind, title, lines }) {
  return s(`g.node.${kind}`, {},
    s("rect", { x: x - box.width / 2, y, width: box.width, height: box.height, rx: 12 }),
    s("text.title", { x, y: y + 25, "text-anchor": "middle" }, title),
    lines.map((line, index) => s("text", { x, y: y + 44 + index * 15, "text-anchor": "middle" }, line)));
}

/** A curve from above to below, and what is written beside it. */
function edge({ from, to, kind, label, active = 0 }) {
  const bend = (to.y - from.y) / 2;
  const d = `M${from.x} ${from.y}C${from.x} ${from.y + bend} ${to.x} ${to.y - bend} ${to.x} ${to.y}`;
  return s(`g.edge.${kind}`, {},
    s("path", { d, "--weight": 1.5 + Math.min(active, 15) / 5 }),
    // The picture is drawn anew each second: the phase lets the flow go on where it was.
    active > 0 && s("path.flow", { d, "--weight": 1.5 + Math.min(active, 15) / 5, "--phase": `${-(performance.now() % FLOW_MS)}ms` }),
    label && s("text.label", { x: from.x, y: from.y + 20, "text-anchor": "middle" }, label));
}

const short = (name, narrow) => (narrow ? name.replace(/-service$/, "") : name);

function serviceLines(service, narrow) {
  if (!service.up) return ["does not answer"];
  const pool = service.health?.pool;
  if (!pool) return [NOTHING];
  return [narrow ? `${pool.active}/${pool.max} pool` : `pool ${pool.active} of ${pool.max}, ${percent(pool.utilization_percent)}`];
}

function draw(width, { services, database }) {
  const at = plan(width, services);
  const wide = { ...at.box, width: at.narrow ? 200 : 260 };
  const kinds = services.map(level);
  // Of the database nothing is known but through services that answer.
  const worst = ["slow", "sluggish", "fine", "idle"].find((kind) => kinds.includes(kind)) ?? "idle";
  const edges = services.flatMap((service, index) => {
    const x = at.column(index);
    const active = service.health?.queries?.active ?? 0;
    const latency = service.health?.latency;
    const label = service.up && latency?.count ? `${at.narrow ? "" : "P95 "}${duration(latency.p95_ms)}` : "";
    const reaches = service.up ? kinds[index] : "idle";
    return [
      edge({ from: { x: at.middle, y: at.rows.gateway + at.box.height }, to: { x, y: at.rows.services }, kind: service.up ? "plain" : "down" }),
      edge({ from: { x, y: at.rows.services + at.box.height }, to: { x: at.middle + (x - at.middle) * 0.28, y: at.rows.database }, kind: reaches, label, active }),
    ];
  });
  const nodes = services.map((service, index) => node({
    x: at.column(index), y: at.rows.services, box: at.box, kind: kinds[index],
    title: short(service.name, at.narrow), lines: serviceLines(service, at.narrow),
  }));
  const backends = database?.backends_active;
  return s("svg.map", { viewBox: `0 0 ${width} ${at.height}`, role: "img", "aria-label": describe(services) },
    edges, nodes,
    node({ x: at.middle, y: at.rows.gateway, box: wide, kind: "gateway", title: GATEWAY.name, lines: ["the shop's API"] }),
    node({ x: at.middle, y: at.rows.database, box: wide, kind: `database.${worst}`, title: `postgresql:${database?.name ?? NOTHING}`,
      lines: [`${backends === null || backends === undefined ? NOTHING : counted(backends, "backend")} at work`] }));
}

/** The map in a sentence each, for those who do not see it. */
function describe(services) {
  return services.map((service) => {
    if (!service.up) return `${service.name} does not answer.`;
    const latency = service.health?.latency;
    return `${service.name} to the database: ${latency?.count ? `P95 ${duration(latency.p95_ms)}` : "no statements lately"}.`;
  }).join(" ");
}

/** A map that redraws itself with each state and each width. */
export function map(signal) {
  const place = h("div.map");
  let current = null;
  const redraw = () => {
    if (!current || place.clientWidth === 0) return;
    // Drawn for letters of 16 pixels, shown as large as the page's own.
    const scale = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
    place.replaceChildren(draw(place.clientWidth / scale, current));
  };
  const observer = new ResizeObserver(redraw);
  observer.observe(place);
  signal.addEventListener("abort", () => observer.disconnect(), { once: true });
  return { element: place, update: (status) => { current = status; redraw(); } };
}
