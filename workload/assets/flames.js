// The flame graphs that recordings have left, as they are: interactive, in a frame of their own.

import { get, present } from "./api.js";
import { h } from "./dom.js";

/** What the walkthrough's pictures show, in the order of its story; others show their own title. */
const ABOUT = {
  "baseline.svg": "Before: steady traffic, no storm.",
  "storm.svg": "The storm: look for search_products_unindexed, and the sequential scan below it.",
  "storm-app.svg": "The storm, without what PostgreSQL did.",
  "storm-database.svg": "The storm, only what PostgreSQL did.",
  "fixed.svg": "After the fix: the same storm, with the index.",
  "storm-vs-fixed.svg": "What grew and what shrank between storm and fix.",
};

/** What the story is about. */
const FIRST = "storm.svg";

const STORY = Object.keys(ABOUT);

/** Those of the story first, in its order; the others by name, as they came. */
const placeInStory = (file) => (STORY.includes(file) ? STORY.indexOf(file) : STORY.length);

/** `#/flamegraphs` and `#/flamegraphs/FILE` */
export function flamegraphs(main, { file }, signal) {
  const place = h("div");
  main.append(h("h1", {}, "Flame graphs"), place);
  present(place, signal, async () => {
    const files = (await get("/flamegraphs", { signal })).map((picture) => picture.file);
    files.sort((a, b) => placeInStory(a) - placeInStory(b));
    const current = [file, FIRST].find((wanted) => files.includes(wanted)) ?? files[0];
    return files.length > 0 ? gallery(files, current) : none();
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
