/** The page's entry point: shows the view of the address, and draws it again when the server has something new. */

import { onMissingKey, readJson, takeKey } from "./api.js";
import { compareView } from "./compare.js";
import { el } from "./dom.js";
import { listView } from "./list.js";
import { runView } from "./run.js";
import { preference, setPreference } from "./storage.js";

const POLL_MS = 2000;
const SHARE = 10; // of the time, at most one tenth is spent on asking
const THEMES = ["auto", "light", "dark"];
const find = (selector) => document.querySelector(selector);
let current = { path: "", draw: null, tag: null };
let timer = 0;
let loading = null;

function viewOf(hash) {
  const [view, ...names] = hash.replace(/^#\/?/, "").split("/").map(decoded);
  if (view === "run" && names.length === 1) return [`v1/run?name=${encodeURIComponent(names[0])}`, runView, names[0]];
  if (view === "compare") return [`v1/comparison?${names.map((name) => `run=${encodeURIComponent(name)}`).join("&")}`, compareView, "comparison"];
  return ["v1/runs", listView, ""];
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function route() {
  if (takeKey()) return void load();
  const [path, draw, title] = viewOf(window.location.hash);
  if (path === current.path) return undefined;
  current = { path, draw, tag: null };
  document.title = title ? `${title} – loratune runs` : "loratune runs";
  window.scrollTo(0, 0);
  return load();
}

/** Ask for the current view; what is asked for already is given up if the view has changed. */
async function load() {
  clearTimeout(timer);
  loading?.abort();
  const mine = (loading = new AbortController());
  const asked = current;
  const begin = performance.now();
  try {
    const answer = await readJson(asked.path, asked.tag, mine.signal);
    if (mine.signal.aborted) return;
    find("#connection").textContent = "";
    if (answer) show(asked, answer);
  } catch (error) {
    if (mine.signal.aborted) return;
    find("#connection").textContent = error.key === "errorOffline" ? "no connection" : "";
    if (error.key !== "errorOffline") {
      asked.tag = null;
      find("#main").replaceChildren(el("p.box.bad", null, error.message), el("p", null, el("a", { href: "#/" }, "All runs")));
    }
  }
  timer = setTimeout(load, Math.max(POLL_MS, SHARE * (performance.now() - begin)));
}

function show(asked, { tag, value }) {
  asked.tag = tag;
  if (value.title) find("#folder").textContent = value.title;
  const main = find("#main");
  const field = document.activeElement?.id === "filter" ? document.activeElement.selectionStart : null;
  const folds = new Map([...main.querySelectorAll("details")].map((each) => [each.dataset.key, each.open]));
  const back = asked.draw === listView ? [] : [el("p.back", null, el("a", { href: "#/" }, "← All runs"))];
  main.replaceChildren(...back, asked.draw(value));
  main.dataset.path = asked.path;
  for (const each of main.querySelectorAll("details")) each.open = folds.get(each.dataset.key) ?? each.open;
  if (field !== null && find("#filter")) {
    find("#filter").focus();
    find("#filter").setSelectionRange(field, field);
  }
}

function askForKey(wasWrong) {
  const dialog = find("#key-dialog");
  find("#key-form").reset();
  find("#key-wrong").hidden = !wasWrong;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(find("#key-form").elements.key.value.trim() || null), { once: true });
  });
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  setPreference("theme", theme);
}

chooseTheme(preference("theme", "auto"));
find("#theme").addEventListener("click", () => {
  chooseTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
onMissingKey(askForKey);
takeKey();
window.addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : load()));
route();
