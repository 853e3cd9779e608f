/** One run: figures, curves, findings, health, answers, evaluations, origin and settings. */

import { chart } from "./chart.js";
import { chip, el, fold, number, percent, section, stateChip, table, verdictChip } from "./dom.js";
import { progress } from "./list.js";

const SHOWN = new Set(["state", "model checks", "evaluation", "merged, exported", "health", "files changed", "base weights"]);

const MEASURES = { rouge_l: "ROUGE-L", bleu: "BLEU" };

export function runView(run) {
  return el(
    "div",
    null,
    el("h1", null, run.name, " ", stateChip(run.state), run.tags.map((tag) => chip(tag, "tag")), progress(run)),
    run.problems.map((problem) => el("p.box.bad", null, problem)),
    run.changed.length ? el("p.box.bad", null, `Changed since the run wrote them: ${run.changed.join(", ")}`) : null,
    el("dl.figures", null, run.figures.filter(([name]) => !SHOWN.has(name)).map(([name, text]) => el("div", null, el("dt", null, name), el("dd", null, text)))),
    curves(run.curves),
    section("Answers before and after", run.answers.map((one, at) => answer(one, at))),
    section("Evaluations", run.results.map(evaluation)),
    section("Health", health(run)),
    section("Findings in the rows", findings(run.findings)),
    section("Where it comes from, and what was made of it", origin(run)),
    section("Settings", run.settings.length ? fold("settings", `${run.settings.length} settings`, table(["Setting", "Value"], run.settings)) : null),
    run.next ? section("Next", el("pre", null, run.next)) : null,
  );
}

function curves(found) {
  const line = (name, color, form = "") => ({ name, points: found[name] ?? [], color, form });
  return el(
    "div.charts",
    null,
    chart("Loss, nats per token", [line("training loss", 1, "noisy"), line("validation loss", 2, "dotted")], (value) => number(value, 3)),
    chart("Exact answers", [line("exact answers", 3, "dotted")], percent),
    chart("Learning rate", [line("learning rate", 4)], (value) => (value ? value.toExponential(1) : "0")),
  );
}

function answer(one, at) {
  const ended = one.ended === false ? chip("does not end", "bad") : null;
  const block = (title, text, kind = "") => el("div", { class: kind || null }, el("h3", null, title), el("pre", null, text));
  const title = [el("span", null, one.question), " ", chip(one.has_changed ? "changed" : "as the base", one.has_changed ? "live" : "dim"), ended];
  const content = el("div.side", null, block("Expected", one.expected, "wide"), block("Base", one.base), block("Adapter", one.adapter));
  const shown = fold(`answer-${at}`, title, content);
  shown.open = at < 3;
  return shown;
}

function evaluation(one, at) {
  const decisions = one.decisions.map((each) => [each.name, { node: verdictChip(each.verdict) }, each.why]);
  const measures = Object.entries(one.measures).map(([name, each]) => [
    MEASURES[name] ?? name.replaceAll("_", " "),
    ...[each.baseline, each.tuned, each.difference, each.low, each.high].map((value) => ({ node: number(value, 3), kind: "figure" })),
    ...[each.better, each.worse].map((value) => ({ node: value, kind: "figure" })),
  ]);
  const head = ["Measure", "Baseline", "Tuned", "Difference", "Low", "High", "Better", "Worse"];
  const figures = head.map((title, place) => (place ? { node: title, kind: "figure" } : title));
  const folded = fold(
    `evaluation-${at}`,
    [verdictChip(one.verdict), ` ${one.sentence}`],
    one.objection ? el("p", null, one.objection) : null,
    Object.values(one.fallen).map((text) => el("p.box.warn", null, text)),
    el("p.dim", null, `${one.tests}, beside ${one.baseline}. The answers are in ${one.name}/eval.html.`),
    table(["", "Verdict", "Why"], decisions),
    table(figures, measures),
    one.warnings.map((text) => el("p", null, text)),
  );
  folded.open = at === 0;
  return folded;
}

function health(run) {
  const found = run.health;
  const checks = run.checks.map((check) => [check.name, check.result]);
  const told = found ? (found.sentences.length ? found.sentences.map((text) => el("p.box.warn", null, text)) : [el("p.box.good", null, "Nothing stands out.")]) : [];
  const updates = Object.entries(found?.updates ?? {}).map(([name, each]) => [
    name,
    ...[each.modules, number(each.median), number(each.largest)].map((value) => ({ node: value, kind: "figure" })),
    [...each.unchanged.map((one) => `${one} unchanged`), ...each.not_finite.map((one) => `${one} not finite`)].join(", ") || "–",
  ]);
  const figures = ["Modules", "Median ‖ΔW‖ / ‖W‖", "Largest"].map((node) => ({ node, kind: "figure" }));
  return [
    told,
    found?.without_gradient.length ? el("p.box.warn", null, `No gradient has reached: ${found.without_gradient.join(", ")}`) : null,
    checks.length ? fold("checks", "What was measured on the model before the first step", table(["Check", "Result"], checks)) : null,
    updates.length ? fold("updates", "Size of the update", table(["Target", ...figures, "Remarks"], updates)) : null,
  ];
}

function findings(found) {
  if (found === null) return el("p.dim", null, "The run was made by a version that did not record them.");
  if (!found.length) return el("p.dim", null, "None.");
  return found.map((one) => {
    const title = [chip(one.name, one.level === "warn" ? "warn" : "dim"), ` ${one.text}`];
    return one.rows.length ? fold(`finding-${one.name}-${one.text}`, title, el("ul", null, one.rows.map((row) => el("li", null, row)))) : el("p", null, title);
  });
}

function origin(run) {
  const data = run.data.map((file) => [file.path, "rows", `${file.rows.toLocaleString("en")} of ${file.seen.toLocaleString("en")}`, file.sha256]);
  const base = run.base ? [[run.base, "base", "", run.base_sha256]] : [];
  const own = run.weights_sha256 ? [[run.name, "this adapter", "", run.weights_sha256]] : [];
  const models = run.models.map((model) => [
    model.name,
    model.kind,
    [model.verified && `verified: ${model.verified}`, model.has_base_of_run === false && "another base", model.changed.length && "files changed"].filter(Boolean).join(", "),
    "",
  ]);
  const rows = [...data, ...base, ...own, ...models].map(([name, kind, about, sha256]) => [name, kind, about, { node: el("code", { title: sha256 }, (sha256 ?? "").slice(0, 12)) }]);
  return rows.length ? table(["Name", "What", "", "sha256"], rows) : null;
}
