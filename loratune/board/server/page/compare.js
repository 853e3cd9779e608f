/** Runs beside each other: what differs, curves over each other, and answers side by side. */

import { chart } from "./chart.js";
import { address, el, fold, number, percent, section, table } from "./dom.js";

export function compareView(values) {
  const { runs } = values;
  const beside = (found) => {
    const head = runs.map((name, at) => ({ node: [el(`i.swatch.series-${at + 1}`), el("a", { href: address(name) }, name)] }));
    return found.length ? table(["", ...head], found.map((row) => [row.name, ...row.values]), "beside") : el("p.dim", null, "None.");
  };
  return el(
    "div",
    null,
    el("h1", null, `${runs.length} runs beside each other`),
    values.problems.map((problem) => el("p.box.bad", null, problem)),
    beside(values.figures),
    el(
      "div.charts",
      null,
      overlaid(values, "training loss", "Training loss, nats per token", (value) => number(value, 3), "noisy"),
      overlaid(values, "validation loss", "Validation loss, nats per token", (value) => number(value, 3), "dotted"),
      overlaid(values, "exact answers", "Exact answers", percent, "dotted"),
    ),
    section("Settings that differ", beside(values.settings)),
    section("Data that differs, with its rows", beside(values.data)),
    section("Versions that differ", values.versions.length ? beside(values.versions) : null),
    section("Answers", values.answers.map((asked, at) => answers(runs, asked, at))),
  );
}

function overlaid(values, name, title, format, form) {
  const lines = values.runs.map((run, at) => ({ name: run, points: values.curves[at][name] ?? [], color: at + 1, form }));
  return chart(title, lines, format);
}

function answers(runs, asked, at) {
  const block = (title, text, kind = null) => (text === null ? null : el("div", { class: kind }, el("h3", null, title), el("pre", null, text)));
  const bases = new Set(asked.bases.filter((text) => text !== null));
  const same = bases.size === 1 ? block("Base", [...bases][0], "wide") : asked.bases.map((text, place) => block(`Base of ${runs[place]}`, text));
  const tuned = asked.answers.map((text, place) => block([el(`i.swatch.series-${place + 1}`), runs[place]], text));
  const folded = fold(`asked-${at}`, asked.question, el("div.side", null, block("Expected", asked.expected, "wide"), same, tuned));
  folded.open = at < 4;
  return folded;
}
