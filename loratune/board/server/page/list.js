/** The runs of the folder, with the models and evaluations that belong to none of them. */

import { address, age, bytes, chip, el, number, percent, section, stateChip, table, verdictChip } from "./dom.js";

const MOST_COMPARED = 6;
const chosen = new Set();
const button = el("button.strong", { type: "button", id: "compare", click: () => (window.location.hash = address(...chosen)) });
let wanted = "";
let order = { column: "age", isReversed: false };

const COLUMNS = {
  run: (run) => run.name,
  state: (run) => run.state,
  loss: (run) => run.loss ?? Infinity,
  valid: (run) => run.validation_loss ?? Infinity,
  exact: (run) => -(run.exact_answers ?? -1),
  verdict: (run) => run.evaluations[0]?.verdict ?? "~",
  size: (run) => -run.bytes,
  age: (run) => -(Date.parse(run.time) || 0),
};
const TITLES = { run: "Run", state: "State", loss: "Loss", valid: "Validation", exact: "Exact", verdict: "Evaluation", size: "Size", age: "Age" };
const FIGURES = new Set(["loss", "valid", "exact", "size", "age"]);

export function listView(values) {
  for (const name of chosen) if (!values.runs.some((run) => run.name === name)) chosen.delete(name);
  const rows = el("div");
  const view = el("div", null, el("h1.visually-hidden", null, "Runs"), toolbar(values, rows), rows, others(values));
  showRows(values, rows);
  return view;
}

function toolbar(values, rows) {
  const again = (event) => {
    wanted = event.target.value;
    showRows(values, rows);
  };
  return el(
    "div.toolbar",
    null,
    el("input", { type: "search", id: "filter", placeholder: "Filter: name, base, data, state, tag", "aria-label": "Filter", value: wanted, input: again }),
    button,
  );
}

function showRows(values, box) {
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const runs = values.runs.filter((run) => words.every((word) => textOf(run).includes(word)));
  const key = COLUMNS[order.column];
  runs.sort((one, other) => (key(one) < key(other) ? -1 : key(one) > key(other) ? 1 : 0) * (order.isReversed ? -1 : 1));
  const head = Object.keys(TITLES).map((column) => ({ node: heading(column, values, box), kind: FIGURES.has(column) ? "figure" : null }));
  const none = values.runs.length ? "No run matches the filter." : "There is no run in this folder yet. It appears here as soon as one starts.";
  box.replaceChildren(
    runs.length ? table([{ node: el("span.visually-hidden", null, "Chosen") }, ...head], runs.map((run) => row(run, values, box)), "runs cards") : el("p.empty", null, none),
  );
  showChosen();
}

function heading(column, values, box) {
  const mark = order.column === column ? (order.isReversed ? " ↑" : " ↓") : "";
  const sort = () => {
    order = { column, isReversed: order.column === column && !order.isReversed };
    showRows(values, box);
  };
  return el("button.sort", { type: "button", click: sort }, TITLES[column] + mark);
}

function textOf(run) {
  return [run.name, run.base, run.state, ...run.tags, ...run.data.map((file) => file.path)].join(" ").toLowerCase();
}

function row(run) {
  const choose = (event) => {
    if (event.target.checked) chosen.add(run.name);
    else chosen.delete(run.name);
    showChosen();
  };
  const box = el("input", { type: "checkbox", "aria-label": `Choose ${run.name}`, checked: chosen.has(run.name), change: choose });
  const verdict = run.evaluations[0]?.verdict;
  return [
    { node: box, kind: "choice" },
    { node: named(run), kind: "name" },
    { node: [stateChip(run.state), progress(run)] },
    figure("loss", number(run.loss)),
    figure("valid", number(run.validation_loss)),
    figure("exact", percent(run.exact_answers)),
    { node: verdict ? verdictChip(verdict) : "–", label: TITLES.verdict },
    figure("size", bytes(run.bytes)),
    figure("age", age(run.time)),
  ];
}

function figure(column, text) {
  return { node: text, kind: "figure", label: TITLES[column] };
}

function named(run) {
  const data = run.data.map((file) => `${file.path.split("/").at(-1)} (${file.rows.toLocaleString("en")})`);
  const problems = [...run.problems, ...(run.changed.length ? [`changed or missing: ${run.changed.join(", ")}`] : [])];
  return [
    el("a", { href: address(run.name) }, run.name),
    run.tags.map((tag) => chip(tag, "tag")),
    el("span.details", null, [run.base, ...data].filter(Boolean).join(" · ")),
    problems.map((problem) => el("span.details.bad", null, problem)),
  ];
}

export function progress(run) {
  if (!run.steps || run.state === "finished") return null;
  return el("span.progress", null, el("progress", { max: run.steps, value: Math.min(run.step, run.steps) }), ` ${run.step} of ${run.steps}`);
}

function showChosen() {
  button.disabled = chosen.size < 2 || chosen.size > MOST_COMPARED;
  button.textContent = chosen.size > MOST_COMPARED ? `At most ${MOST_COMPARED}` : chosen.size > 1 ? `Compare ${chosen.size} runs` : "Choose runs to compare";
}

function others(values) {
  const digested = new Set(values.runs.flatMap((run) => run.evaluations.map((one) => one.name)));
  const strange = values.evaluations.filter((one) => !digested.has(one.name));
  const models = values.models.map((model) => [
    { node: [el("span", null, model.name), model.problems.map((one) => el("span.details.bad", null, one)), changes(model)], kind: "name" },
    { node: model.kind, label: "Kind" },
    { node: model.runs.length ? model.runs.map((name) => el("a.listed", { href: address(name) }, name)) : model.origin, label: "From" },
    { node: model.verified ?? "–", label: "Verified" },
    figure("size", bytes(model.bytes)),
    figure("age", age(model.time)),
  ]);
  const head = ["Folder", "Kind", "From", "Verified", { node: "Size", kind: "figure" }, { node: "Age", kind: "figure" }];
  return [
    section("Merged models and exports", models.length ? table(head, models, "cards") : null),
    section("Other evaluations", strange.map((one) => el("p", null, one.name, " ", one.verdict ? verdictChip(one.verdict) : el("span.dim", null, asked(one)), one.problems.map((problem) => el("span.details.bad", null, problem))))),
    values.foreign.length ? el("p.dim", null, `Nothing of loratune's in: ${values.foreign.join(", ")}`) : null,
    values.is_cut ? el("p.bad", null, "The folder holds too many folders; not all were looked into.") : null,
  ];
}

function asked(evaluation) {
  return evaluation.tasks.length ? `benchmark tasks: ${evaluation.tasks.join(", ")}` : null;
}

function changes(model) {
  return model.changed.length ? el("span.details.bad", null, `changed or missing: ${model.changed.join(", ")}`) : null;
}
