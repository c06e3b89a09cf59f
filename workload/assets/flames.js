// The flame graphs that recordings have left, as they are: interactive, in a frame of their own.

import { get, present } from "./api.js";
import { h } from "./dom.js";

/** What the walkthrough's pictures show; others show their own title. */
const ABOUT = {
  "baseline.svg": "Before: steady traffic, no storm.",
  "storm.svg": "The storm: look for search_products_unindexed, and the sequential scan below it.",
  "fixed.svg": "After the fix: the same storm, with the index.",
  "storm-vs-fixed.svg": "What grew and what shrank between storm and fix.",
};

/** `#/flamegraphs` and `#/flamegraphs/FILE` */
export function flamegraphs(main, { file }, signal) {
  const place = h("div");
  main.append(h("h1", {}, "Flame graphs"), place);
  present(place, signal, async () => {
    const files = (await get("/flamegraphs", { signal })).map((picture) => picture.file);
    return files.length > 0 ? gallery(files, files.includes(file) ? file : files[0]) : none();
  });
  return "Flame graphs";
}

function gallery(files, current) {
  const source = `/flamegraphs/${encodeURIComponent(current)}`;
  return [
    h("nav.tabs", { "aria-label": "Flame graphs" }, files.map((name) => h("a", {
      href: `#/flamegraphs/${encodeURIComponent(name)}`, "aria-current": name === current && "page",
    }, name.replace(/\.svg$/, "")))),
    h("p.muted", {}, ABOUT[current] ?? "", " Click a frame to look into it; Ctrl-F inside the picture searches. ",
      h("a", { href: source, target: "_blank", rel: "noopener" }, "Open it alone")),
    h("iframe.flame", { src: source, title: `Flame graph ${current}` }),
  ];
}

const none = () => h("section.card", {},
  h("h2", {}, "No recording yet"),
  h("p", {}, "The walkthrough of Scene 9.5 records the shop and leaves its pictures here: ",
    h("code", {}, "workload scene 9.5"), ". ", h("code", {}, "make demo"), " does the same from the beginning."));
